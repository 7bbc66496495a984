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

OVERHEAD = 48 * MIB
"""What a command takes besides arrays, and what allocators keep: measured, see ``benchmarks/README.md``."""

REPORT_OVERHEAD = 96 * MIB
"""The same with matplotlib and jinja2, their fonts and templates."""

WRITTEN = 4
"""Copies of a chunk that there are while it is written: itself, filled up at the edge, and compressed."""

VOXEL_TILE, TILE, SOLVE_TILE, SOLVE_BYTES = 8192, 2048, 8192, 8 * MIB
"""Voxels that kernels work on at a time, and size of their normal equations: a test holds these against the kernels."""

RUNS_TOGETHER = 8
"""Runs of which all rows of a block are there at a time, to be combined."""

COMBINED_BYTES = 2 * MIB
"""Of the rows of all runs that are put together at a time, to be combined."""

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


def enough(n: int) -> str:
    """Write an amount of memory that is at least ``n`` bytes, as :func:`parse_memory` reads it."""
    return f"{-(-n // MIB)}MiB"


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
    found: bool = True,
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
    found : bool
        Whether the mask is found in the temporal mean.

    Returns
    -------
    int
        Bytes: while the run streams, for each thread a raw block, the smoothed block, a chunk with what it is filled up and
        compressed to, and the sum over time; after that the volumes that finding the mask needs, the larger of both.
    """
    stored = 4 if smoothed else itemsize
    chunks = bold_chunks(shape, stored)
    voxels = math.prod(shape[1:])
    per_thread = chunks.time * voxels * itemsize + WRITTEN * math.prod(chunks) * stored
    if smoothed:
        # A volume between the axes, in float64 at most, about the box.
        per_thread += chunks.time * math.prod(smoothed) * stored + 8 * voxels + 2 * MIB
    streaming = n_threads * per_thread + 10 * voxels
    masking = 8 * 8 * voxels if found else 24 * voxels
    return max(streaming, masking) + OVERHEAD


class FitSize(NamedTuple):
    """What the memory that fitting takes depends on.

    Attributes
    ----------
    chunks : Chunks
        Of the signal; the largest.
    itemsize : int
        Bytes of a value of the signal, as it is opened.
    n_regressors : int
    order : int
        Of the autoregressive noise.
    n_censored : int
        Censored volumes; those about them are kept.
    n_volumes : int
        0 if it is not known.
    """

    chunks: Chunks
    itemsize: int
    n_regressors: int
    order: int = 1
    n_censored: int = 0
    n_volumes: int = 0

    @property
    def voxels(self) -> int:
        """Of a voxel block."""
        return self.chunks.z * self.chunks.y * self.chunks.x

    @property
    def rows_summed(self) -> int:
        """Numbers that are kept of the data of a voxel: with each regressor and lag, and the samples about gaps."""
        near = self.order * (2 * self.n_censored + 1)
        return (self.order + 1) * self.n_regressors + 3 * self.order + 3 + near

    @property
    def rows_estimated(self) -> int:
        """Numbers that are estimated at a voxel."""
        return self.n_regressors + 2 + self.order


def sums_memory(size: FitSize, n_voxels: int) -> int:
    """Bytes of the sums of a run over ``n_voxels`` voxels."""
    return 8 * size.rows_summed * n_voxels


def adding_memory(size: FitSize) -> int:
    """Bytes that a thread needs for adding a time block to sums: the samples of some voxels, and their products."""
    return (
        8 * min(VOXEL_TILE, size.voxels) * (3 * size.chunks.time + (size.order + 1) * size.n_regressors + 16)
    )


def estimating_memory(size: FitSize) -> int:
    """Bytes that a thread needs for the estimates of a voxel block, besides its sums, until these are let go."""
    solving = 0
    if size.order > 1 or size.n_censored:
        # Normal equations of some voxels, as a matrix, with the other side, and factorised; and equations of coefficients.
        solving = _equations(size.n_regressors) + 8 * SOLVE_TILE * (8 * size.order**2 + 64)
    return 8 * size.voxels * (size.n_regressors + 2 * size.order + 8) + solving


def writing_memory(size: FitSize) -> int:
    """Bytes that a thread needs for the estimates of a voxel block while they are put into their places and written."""
    made = size.rows_estimated
    return 8 * size.voxels * max(made + (WRITTEN - 1) * size.n_regressors, 2 * made)


def _equations(n_regressors: int) -> int:
    """Bytes of the normal equations that are solved at a time, four times over."""
    each = 8 * n_regressors * (n_regressors + 1)
    return 4 * max(min(SOLVE_BYTES, each * TILE), 64 * each)


def fit_memory_per_thread(
    chunks: Chunks, itemsize: int, n_regressors: int, *, order: int = 1, n_censored: int = 0
) -> int:
    """Project the memory of one fitting task.

    Parameters
    ----------
    chunks : Chunks
    itemsize : int
        Bytes of a value of the signal, as it is opened.
    n_regressors : int
    order : int
        Of the autoregressive noise.
    n_censored : int
        Censored volumes; those about them are kept.

    Returns
    -------
    int
        Bytes: one decoded time block of a voxel block with what it was decoded from, the sums (a row a
        regressor and lag), and the estimates.
    """
    size = FitSize(chunks, itemsize, n_regressors, order, n_censored)
    block = chunks.time * size.voxels * itemsize
    sums = sums_memory(size, size.voxels)
    # A thread keeps what it read from a file for the next.
    return (
        block * 5 // 4
        + adding_memory(size)
        + max(block + sums, sums + estimating_memory(size), writing_memory(size))
    )


class StatisticsSize(NamedTuple):
    """What the memory that statistics take depends on.

    Attributes
    ----------
    voxels : int
        Of a voxel block.
    n_regressors : int
    order : int
        Of the autoregressive noise.
    n_volumes : int
        Of the longest run.
    n_weighted : int
        Regressors that a contrast gives a weight.
    n_rows : int
        Effects, covariances and degrees of freedom of all contrasts at a voxel: q + q q + 1 of each.
    n_runs : int
        Runs that are combined; 0 if none are.
    n_contrasts : int
    """

    voxels: int
    n_regressors: int
    order: int
    n_volumes: int
    n_weighted: int
    n_rows: int
    n_runs: int
    n_contrasts: int = 1


def statistics_memory_per_thread(size: StatisticsSize) -> int:
    """Project the memory of the tasks that make the statistics of a voxel block.

    Parameters
    ----------
    size : StatisticsSize

    Returns
    -------
    int
        Bytes: the estimates of a run with what they were decoded from, and the rows of all contrasts; of runs that are
        combined, those of each run until they are.
    """
    read = size.n_regressors + 1 + size.order
    making = read + 3 * size.n_rows + size.n_weighted
    # What was made of some runs waits; then they are combined, some voxels at a time.
    waiting = combining = 0
    if size.n_runs:
        held = rows_held(size.n_runs, size.n_rows, size.n_contrasts)
        waiting, combining = held - size.n_rows, held + 3 * size.n_rows
    rows = read * 5 // 4 + max(making + waiting, combining) + 4 * size.n_contrasts + 8
    beside = 5 * COMBINED_BYTES if size.n_runs else 0
    return 8 * size.voxels * rows + beside + uncertainty_memory(size.n_regressors, size.order, size.n_volumes)


def rows_held(n_runs: int, n_rows: int, n_contrasts: int) -> int:
    """Rows of a block that are there until runs are combined: those of some runs, and the sums over the ones before."""
    together = min(n_runs, RUNS_TOGETHER)
    before = n_rows + n_contrasts if n_runs > together else 0
    return together * n_rows + before


def combining_memory(n_voxels: int, n_rows: int, n_runs: int, n_contrasts: int) -> int:
    """Bytes that a thread needs for the rows of runs until they are combined, and for the tests of all contrasts."""
    held = rows_held(n_runs, n_rows, n_contrasts)
    return 8 * n_voxels * (held + 3 * n_rows + 4 * n_contrasts + 8) + 5 * COMBINED_BYTES


def leaving_out_memory(n_voxels: int, n_rows: int, n_runs: int, n_contrasts: int) -> int:
    """The same for maps without each run in turn: the rows of all runs, those of as many maps, and their tests."""
    rows = (2 * n_runs + 3) * n_rows + 5 * n_runs * n_contrasts + 8
    return 8 * n_voxels * rows + 5 * COMBINED_BYTES


def uncertainty_memory(n_regressors: int, order: int, n_volumes: int) -> int:
    """Bytes that a thread needs for the uncertainty of coefficients of some voxels, at all frequencies: order 2 and more."""
    if order < 2:
        return 8 * TILE * (3 * n_regressors + 16)
    tile = min(max(SOLVE_BYTES // (8 * n_regressors * (n_regressors + 1)), 64), TILE)
    return 8 * tile * n_volumes * (5 * order + 5) + _equations(n_regressors)


def maps_memory(size: StatisticsSize, n_voxels: int, map_bytes: int, n_at_a_time: int, n_threads: int) -> int:
    """Project the peak memory of computing and writing maps, above the imports.

    Parameters
    ----------
    size : StatisticsSize
    n_voxels : int
        Of a volume.
    map_bytes : int
        Of all statistics of one run, or of the fixed effects.
    n_at_a_time : int
        Runs, or fixed effects, whose maps are computed together.
    n_threads : int

    Returns
    -------
    int
        Bytes: what was computed, besides the tasks; or that with the maps that are put together of it; or the maps, besides the
        volumes that are being compressed.
    """
    maps = n_at_a_time * map_bytes
    computing = maps + n_threads * statistics_memory_per_thread(size)
    writing = maps + (3 * n_threads + 2) * 8 * n_voxels
    return max(computing, 2 * maps, writing) + OVERHEAD


def report_memory(n_voxels: int) -> int:
    """Project what pictures and report take, with the packages that draw: some volumes at a time."""
    return REPORT_OVERHEAD + 8 * 8 * n_voxels


def examining_memory(n_voxels: int, itemsize: int, n_sampled: int) -> int:
    """Project what a look at a mask and at ``n_sampled`` volumes takes."""
    return OVERHEAD + n_voxels * (n_sampled * (2 * itemsize + 2) + 24)


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
            f"{format_bytes(memory)} are allowed. Allow {enough(needed(1))} or more (memory= or --memory)."
        )
    return next(n for n in range(max(wanted, 1), 0, -1) if needed(n) <= memory)
