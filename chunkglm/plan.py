"""Arithmetic only: chunk shapes, projected memory, and refusal before any work.

Chunk shapes depend on the shape and dtype of a run alone. Memory settings and thread counts decide how much
is in flight, never how the numbers are grouped, so that results are the same to the last bit.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from chunkglm.errors import InputError, MemoryBudgetError

if TYPE_CHECKING:
    from collections.abc import Callable

    Place = tuple[slice, slice, slice]

MIB = 2**20

TIME_BLOCK = 32
"""Volumes in a chunk, where volumes are not huge."""

SLAB = 16
"""Slices in a chunk, where slices are not huge."""

TIME_BLOCK_BYTES = 64 * MIB
"""A block of whole volumes is what each thread of a conversion holds: fewer volumes where 32 would be more than this."""

CHUNK_BYTES = 16 * MIB
"""The largest decoded chunk."""

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
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, flags=re.IGNORECASE)
    amount = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if amount <= 0:
        raise InputError(
            f"The memory {memory!r} is not an amount of memory. Give bytes, or a number with a unit such as "
            "'512MiB' or '2GiB'."
        )
    return amount


def format_bytes(n: float) -> str:
    """Write an amount of memory for people: ``'1.5 GiB'``."""
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


def available_memory() -> int | None:
    """Bytes of memory that programs can still have; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


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
        32 volumes by 16 whole slices; fewer volumes where 32 of them exceed ``TIME_BLOCK_BYTES``, fewer slices
        and then parts of slices where a chunk would exceed ``CHUNK_BYTES``.
    """
    n_time, n_z, n_y, n_x = shape
    volume = n_z * n_y * n_x * itemsize
    time = min(n_time, TIME_BLOCK, _power_of_two(TIME_BLOCK_BYTES // volume))
    z = min(n_z, SLAB, _power_of_two(CHUNK_BYTES // (time * n_y * n_x * itemsize)))
    y = _even_part(n_y, CHUNK_BYTES // (time * z * n_x * itemsize))
    x = _even_part(n_x, CHUNK_BYTES // (time * z * y * itemsize))
    return Chunks(time, z, y, x)


def _even_part(length: int, limit: int) -> int:
    """Divide ``length`` into as few parts of at most ``limit`` as possible, of about the same length."""
    parts = math.ceil(length / max(limit, 1))
    return math.ceil(length / parts)


def _power_of_two(limit: int) -> int:
    """Find the largest power of two that is at most ``limit``, and at least 1."""
    return 1 << max(int(limit).bit_length() - 1, 0)


def voxel_blocks(shape: tuple[int, int, int], chunks: Chunks) -> list[Place]:
    """Divide a volume into voxel blocks: the places of its chunks.

    Parameters
    ----------
    shape : tuple of int
        ``(z, y, x)``.
    chunks : Chunks

    Returns
    -------
    list of tuple of slice
        Along z, y, x; x changes fastest.
    """
    z, y, x = (
        [slice(start, min(start + length, n)) for start in range(0, n, length)]
        for n, length in zip(shape, chunks[1:], strict=True)
    )
    return list(itertools.product(z, y, x))


def convert_memory(
    shape: tuple[int, int, int, int],
    itemsize: int,
    n_threads: int,
    *,
    smoothed: tuple[int, int, int] | None = None,
) -> int:
    """Project the peak memory of converting a run, above the imports.

    Parameters
    ----------
    shape : tuple of int
        ``(time, z, y, x)``.
    itemsize : int
        Bytes of a value in the source.
    n_threads : int
        Threads that read, smooth and store blocks of volumes.
    smoothed : tuple of int, optional
        Shape of the part of a volume that is smoothed and stored as float32.

    Returns
    -------
    int
        Bytes: while the run streams, for each thread a raw block, the smoothed block, a chunk and two more that it is
        compressed to, and the sum over time; after that the volumes that finding the mask needs, the larger of both;
        and what allocators keep, which was measured.
    """
    stored = 4 if smoothed else itemsize
    chunks = bold_chunks(shape, stored)
    voxels = math.prod(shape[1:])
    per_thread = chunks.time * voxels * itemsize + 3 * math.prod(chunks) * stored
    if smoothed:
        # A volume between the axes, in float64 at most, about the box.
        per_thread += chunks.time * math.prod(smoothed) * stored + 8 * voxels + 2 * MIB
    streaming = n_threads * per_thread + 9 * voxels
    masking = 8 * 8 * voxels
    return max(streaming, masking) + 32 * MIB


def fit_memory_per_thread(
    chunks: Chunks, itemsize: int, n_regressors: int, *, order: int = 1, n_censored: int = 0
) -> int:
    """Project the memory of one fitting task.

    Parameters
    ----------
    chunks : Chunks
    itemsize : int
        Bytes of a stored value.
    n_regressors : int
    order : int
        Of the autoregressive noise.
    n_censored : int
        Censored volumes; those about them are kept.

    Returns
    -------
    int
        Bytes: one decoded time block of a voxel block with what it was decoded from, the sums (a row a
        regressor and lag), the results and the statistics of their contrasts.
    """
    voxels = chunks.z * chunks.y * chunks.x
    rows = (order + 3) * n_regressors + 2 * order * n_censored + 5 * order + 24
    # Normal equations of some voxels, as a matrix, with the other side, and factorised.
    solving = 24 * MIB if order > 1 or n_censored else 0
    return voxels * (chunks.time * (itemsize + 8) + 8 * rows) + solving


def threads_within(memory: int, fixed: int, per_thread: int, wanted: int, what: str) -> int:
    """Find how many tasks fit into a budget at a time, where each needs the same.

    Returns
    -------
    int
        Between 1 and ``wanted``.

    Raises
    ------
    MemoryBudgetError
        If not even one fits; the message gives both numbers.
    """
    return most_threads(memory, lambda n: fixed + n * per_thread, wanted, what)


def most_threads(memory: int, needed: Callable[[int], int], wanted: int, what: str) -> int:
    """Find the largest number of threads, up to ``wanted``, for which ``needed`` is within ``memory``.

    Raises
    ------
    MemoryBudgetError
        If not even one is; the message gives both numbers.
    """
    if needed(1) > memory:
        raise MemoryBudgetError(
            f"{what} needs about {format_bytes(needed(1))} of memory besides the interpreter and its imports, and "
            f"{format_bytes(memory)} are allowed. Allow more (memory= or --memory)."
        )
    return next(n for n in range(max(wanted, 1), 0, -1) if needed(n) <= memory)
