"""Arithmetic only: chunk shapes, projected memory, and refusal before any work.

Chunk shapes depend on the shape and dtype of a run alone. Memory settings and thread counts decide how much is in
flight, never how the numbers are grouped, so that results are the same to the last bit.
"""

from __future__ import annotations

import math
import os
import re
from typing import NamedTuple

from chunkglm.errors import InputError, MemoryBudgetError

MIB = 2**20

TIME_BLOCK = 32
"""Volumes in a chunk, where volumes are not huge."""

SLAB = 16
"""Slices in a chunk, where slices are not huge."""

TIME_BLOCK_BYTES = 128 * MIB
"""A block of whole volumes is what a conversion holds: fewer than 32 volumes where they would be more than this."""

CHUNK_BYTES = 16 * MIB
"""The largest decoded chunk."""

VOXEL_TILE = 1024
"""Voxels that a kernel takes at a time: small enough for the cache."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_memory(memory: int | str) -> int:
    """Read an amount of memory.

    Parameters
    ----------
    memory : int or str
        Bytes, or a number with a unit: ``"512MiB"``, ``"2 GiB"``, ``"1.5G"``. Units are powers of 1024.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    InputError
        If it is not an amount of memory, or not positive.
    """
    text = str(memory).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, flags=re.IGNORECASE)
    amount = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if amount <= 0:
        raise InputError(
            f"The memory {memory!r} is not an amount of memory. Give bytes, or a number with a unit such as '512MiB' or "
            "'2GiB'."
        )
    return amount


def format_bytes(n: float) -> str:
    """An amount of memory for people: ``'1.5 GiB'``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def available_cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Chunks(NamedTuple):
    """Lengths of a chunk of ``bold`` along each dimension."""

    time: int
    z: int
    y: int
    x: int


def bold_chunks(shape: tuple[int, int, int, int], itemsize: int) -> Chunks:
    """Choose the chunk shape of a run.

    Parameters
    ----------
    shape : tuple of int
        ``(time, z, y, x)``.
    itemsize : int
        Bytes of a stored value.

    Returns
    -------
    Chunks
        32 volumes by 16 whole slices; fewer volumes where 32 of them exceed ``TIME_BLOCK_BYTES``, fewer slices and
        then parts of slices where a chunk would exceed ``CHUNK_BYTES``.
    """
    n_time, n_z, n_y, n_x = shape
    volume = n_z * n_y * n_x * itemsize
    time = min(n_time, TIME_BLOCK, _power_of_two(TIME_BLOCK_BYTES // volume))
    z = min(n_z, SLAB, _power_of_two(CHUNK_BYTES // (time * n_y * n_x * itemsize)))
    y = min(n_y, math.ceil(n_y / math.ceil(time * z * n_y * n_x * itemsize / CHUNK_BYTES)))
    x = min(n_x, math.ceil(n_x / math.ceil(time * z * y * n_x * itemsize / CHUNK_BYTES)))
    return Chunks(time, z, y, x)


def _power_of_two(limit: int) -> int:
    """The largest power of two that is at most ``limit``, and at least 1."""
    return 1 << max(int(limit).bit_length() - 1, 0)


def convert_memory(
    shape: tuple[int, int, int, int], itemsize: int, stored_itemsize: int, n_threads: int, *, smooth: bool
) -> int:
    """Project the peak memory of converting a run, above the imports.

    Parameters
    ----------
    shape : tuple of int
        ``(time, z, y, x)``.
    itemsize, stored_itemsize : int
        Bytes of a value in the source and in the store.
    n_threads : int
        Threads that smooth volumes.
    smooth : bool
        Whether volumes are smoothed.

    Returns
    -------
    int
        Bytes: two raw blocks (one read while the other is stored), the smoothed block, volumes in float64 (the mean,
        and scratch for the mean, for smoothing and for the mask), and chunks in compression.
    """
    chunks = bold_chunks(shape, stored_itemsize)
    voxels = math.prod(shape[1:])
    block = chunks.time * voxels
    scratch = 4 + (3 * n_threads if smooth else 0)
    in_compression = 3 * n_threads * math.prod(chunks) * stored_itemsize
    smoothed = block * stored_itemsize if smooth else 0
    return 2 * block * itemsize + smoothed + scratch * voxels * 8 + in_compression + 16 * MIB


def fit_memory_per_thread(chunks: Chunks, itemsize: int, n_regressors: int) -> int:
    """Project the memory of one fitting task.

    Returns
    -------
    int
        Bytes: one decoded time block of a voxel block with what it was decoded from, the sums (two rows a regressor),
        the results and the statistics of their contrasts.
    """
    voxels = chunks.z * chunks.y * chunks.x
    return voxels * (chunks.time * (itemsize + 8) + 8 * (4 * n_regressors + 24))


def threads_within(memory: int, fixed: int, per_thread: int, wanted: int, what: str) -> int:
    """How many tasks fit into a budget at a time.

    Returns
    -------
    int
        Between 1 and ``wanted``.

    Raises
    ------
    MemoryBudgetError
        If not even one fits; the message gives both numbers.
    """
    if fixed + per_thread > memory:
        raise MemoryBudgetError(
            f"{what} needs about {format_bytes(fixed + per_thread)} of memory besides the interpreter and its imports, "
            f"and {format_bytes(memory)} are allowed. Allow more (memory= or --memory)."
        )
    return max(1, min(wanted, (memory - fixed) // max(per_thread, 1)))
