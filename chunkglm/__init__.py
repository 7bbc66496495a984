"""First-level fMRI models and fixed effects on chunked arrays."""

from chunkglm import errors
from chunkglm._version import __version__

__all__ = ["__version__", "errors"]
