"""Every exception and warning that chunkglm raises on purpose.

Each kind is also the builtin kind that a caller would expect to catch (``ValueError``, ``OSError``, ...). A
message is one paragraph: what was got, what is accepted, and how to mend it, naming the file where there is one.

================================  =====================================================================
An input cannot be right          ``InputError``, and more closely ``NiftiError``, ``GridMismatchError``,
                                  ``MaskError``, ``DesignError``, ``ContrastError``; ``PreflightError``
                                  for several at once
A file is not there, or the       ``SourceNotFoundError``, ``SourceReadError``
system cannot read it
A store cannot be used            ``StoreError``, and more closely ``StoreExistsError``,
                                  ``BusyStoreError``, ``IncompleteStoreError``, ``DamagedStoreError``,
                                  ``FormatVersionError``
It cannot be done as asked        ``MemoryBudgetError``, ``NotAvailableError``,
                                  ``MissingDependencyError``
A cluster is not as it should be  ``ClusterError``
================================  =====================================================================

All are ``ChunkGLMError``. Inputs are examined before any work; what was finished when a ``StoreError``, a
``SourceReadError`` or a ``ClusterError`` stops the work is kept, and the same call goes on there.
"""


class ChunkGLMError(Exception):
    """Base of all exceptions that chunkglm raises on purpose."""


class InputError(ChunkGLMError, ValueError):
    """An argument or the content of an input cannot be right."""


class PreflightError(InputError):
    """Several inputs of a job cannot be right."""


class SourceNotFoundError(ChunkGLMError, FileNotFoundError):
    """A file or store that was named does not exist."""


class SourceReadError(ChunkGLMError, OSError):
    """A file could not be read to its end, for a reason that is not in the file."""


class NiftiError(InputError):
    """A file is not a NIfTI image that can be read, or is cut off."""


class GridMismatchError(InputError):
    """Two datasets do not lie on the same voxel grid."""


class MaskError(InputError):
    """A mask is empty, not binary, or not a mask."""


class DesignError(InputError):
    """A design matrix cannot be read or does not fit its run."""


class ContrastError(InputError):
    """A contrast is not a linear, estimable combination of the regressors."""


class StoreError(ChunkGLMError, OSError):
    """A Zarr store cannot be used."""


class StoreExistsError(StoreError, FileExistsError):
    """Something exists at the place to be written, and ``overwrite`` was not given."""


class BusyStoreError(StoreError, BlockingIOError):
    """Another process is writing the same store."""


class IncompleteStoreError(StoreError):
    """A store was never finished, or was not written by chunkglm."""


class DamagedStoreError(StoreError):
    """A chunk or metadata file of a complete store is missing or altered."""


class FormatVersionError(StoreError):
    """A store was written in a format that this version of chunkglm does not read."""


class MemoryBudgetError(ChunkGLMError, ValueError):
    """The memory allowed is less than what the smallest unit of work needs."""


class NotAvailableError(ChunkGLMError, NotImplementedError):
    """The option is part of the design, but this version does not do it yet."""


class MissingDependencyError(ChunkGLMError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class ClusterError(ChunkGLMError, ConnectionError):
    """A scheduler or its workers cannot be reached, are lost, or cannot do the work."""


class ChunkGLMWarning(UserWarning):
    """Base of the warnings of chunkglm: something was decided that the user should know of."""
