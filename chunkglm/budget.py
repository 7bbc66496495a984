"""One budget: what a command may use of this machine's memory besides the interpreter and its imports.

An argument ``memory=`` (``--memory``) comes first, then Dask's configuration ``chunkglm.memory`` (a YAML file of Dask, the
environment variable ``DASK_CHUNKGLM__MEMORY``, or ``dask.config.set``), then ``DEFAULT``. It decides how much is in flight,
never how numbers are grouped. It is that of this process: on a cluster, workers have memory limits of their own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dask
import dask.threaded
from dask.local import get_sync

from chunkglm import plan
from chunkglm.tasks import active_client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT = "2GiB"

KEY = "chunkglm.memory"
"""Of the default in Dask's configuration."""

ON_THREADS = (None, "threads", "threading", dask.threaded.get)
IN_THIS_THREAD = ("sync", "synchronous", "single-threaded", get_sync)
"""What Dask's ``scheduler`` is set to where tasks run on threads of this process, and where they run one after another."""


def configured() -> str:
    """What is allowed where a command is not told: an amount of memory, as it is configured or by default."""
    return str(dask.config.get(KEY, DEFAULT))


def allowed(memory: int | str | None = None) -> int:
    """Find out what a command may use.

    Parameters
    ----------
    memory : int, str or None
        As :func:`chunkglm.plan.parse_memory` reads it; None for what is configured.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    InputError
        If it is not an amount of memory.
    """
    return plan.parse_memory(configured() if memory is None else memory)


@contextmanager
def tasks_within(memory: int | str | None, needed: Callable[[int], int], what: str) -> Iterator[None]:
    """Have Dask work on as many tasks at a time, on threads of this process, as the budget holds.

    Where Dask computes on a cluster or in other processes, that is not this process's memory, and this changes nothing.

    Parameters
    ----------
    memory : int, str or None
        See :func:`allowed`.
    needed : callable
        From a number of threads to bytes.
    what : str
        What is done, for the message.

    Raises
    ------
    MemoryBudgetError
        If not even one task fits.
    """
    budget, scheduler = allowed(memory), dask.config.get("scheduler", None)
    if scheduler in IN_THIS_THREAD:
        plan.most_threads(budget, needed, 1, what)
    if scheduler not in ON_THREADS or active_client() is not None:
        yield
        return
    pool: Any = dask.config.get("pool", None)
    workers = getattr(pool, "_max_workers", None) or dask.config.get("num_workers", None)
    number = plan.most_threads(budget, needed, int(workers or plan.available_cpus()), what)
    if number == workers:
        yield
        return
    # What threads keep for their work is let go when they end.
    with ThreadPoolExecutor(number) as own, dask.config.set(num_workers=number, pool=own):
        yield
