"""Where the work runs, and how it is watched."""

from __future__ import annotations

import ctypes
import platform
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dask
import dask.threaded
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt."""

KEPT_PIECE, KEPT_BYTES = 32 * 2**20, 8 * 2**20
"""Freed memory that may be kept for later: pieces of at most this size, and at the end of the heap."""

SECONDS_BETWEEN_LINES = 10.0
"""Between lines of progress where there is no terminal."""


def share_freed_memory() -> None:
    """Have the C library use what one thread freed for the next array of any thread.

    By default each thread has a heap of its own, and freed chunks that lie in the middle of one wait there: the peak grows
    with the number of chunks. Giving every array back to the system when it is freed is worse in another way: the next one
    is made of pages that have to be found and cleared, which was a sixth of the processor time. One heap for all threads
    does neither; arrays are few and large, so that threads do not wait for it. For the process of the command line; a
    library does not decide this for others.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_PIECE)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute on this machine with a number of threads.

    Parameters
    ----------
    number : int
        Voxel blocks that are worked on at a time. It changes no result.
    """
    # By its function: where dask is given a name, it imports distributed to look for a cluster.
    with dask.config.set(scheduler=dask.threaded.get, num_workers=number):
        yield


@contextmanager
def stage(
    console: Console, title: str, unit: str, *, quiet: bool = False
) -> Iterator[Callable[[int, int], None] | None]:
    """Show the progress of one stage of the work with an estimate of what is left.

    Parameters
    ----------
    console : rich.console.Console
        A bar on a terminal or in a notebook, plain lines elsewhere.
    title, unit : str
        What is done, and what is counted.
    quiet : bool
        Show nothing.

    Yields
    ------
    callable or None
        To be called with the number of finished units and of all units.
    """
    if quiet:
        yield None
    elif console.is_terminal or console.is_jupyter:
        columns: list[Any] = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
        ]
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _lines(console, title, unit)


def _lines(console: Console, title: str, unit: str) -> Callable[[int, int], None]:
    """Progress as plain lines: at intervals, and at the end."""
    started = time.monotonic()
    last = [started]

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - last[0] < SECONDS_BETWEEN_LINES:
            return
        last[0] = now
        spent = now - started
        rest = f"about {spent / done * (total - done):.0f} s left" if done < total else f"{spent:.1f} s"
        console.print(
            f"{title}: {done} of {total} {unit}, {rest}", highlight=False, markup=False, soft_wrap=True
        )

    return show
