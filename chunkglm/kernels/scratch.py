"""Memory that a thread keeps for its work: asking the system for it anew each time would cost more than the sums."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    from numpy.typing import NDArray

_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float64) -> NDArray[Any]:
    """Make an array in the memory that this thread keeps under a name.

    Parameters
    ----------
    name : str
    shape : tuple of int
    dtype : dtype

    Returns
    -------
    ndarray
        With any content; valid until this thread asks for the same name again.
    """
    dtype = np.dtype(dtype)
    n_bytes = math.prod(shape) * dtype.itemsize
    memory: NDArray[np.uint8] | None = getattr(_kept, name, None)
    if memory is None or len(memory) < n_bytes:
        memory = np.empty(n_bytes, dtype=np.uint8)
        setattr(_kept, name, memory)
    return memory[:n_bytes].view(dtype).reshape(shape)
