"""Where the work runs, and how it is watched."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import dask
import dask.threaded
import dask.utils
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from chunkglm import plan
from chunkglm._version import __version__
from chunkglm.errors import ChunkGLMWarning, ClusterError, InputError, MissingDependencyError
from chunkglm.tasks import active_client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt."""

KEPT_PIECE, KEPT_BYTES = 32 * 2**20, 8 * 2**20
"""Freed memory that may be kept for later: pieces of at most this size, and at the end of the heap."""

FIRST_LINE, SECONDS_BETWEEN_LINES = 5.0, 60.0
"""Until the first line of progress where there is no terminal, and between the next ones."""

SECONDS_BETWEEN_CHANGES = 0.2
"""Between changes of the line of progress in a notebook."""

SECONDS_BETWEEN_LOOKS = 2.0
"""Between looks at the memory in use."""

SECONDS_TO_CONNECT, SECONDS_TO_WAIT = 10.0, 30.0
"""For a scheduler to answer, and for its workers to come and to answer."""

THREADS, PROCESSES, SLURM, PROTOCOLS = "threads", "processes", "slurm", ("tcp://", "tls://")

DECIDING = ("numpy", "scipy", "numcodecs", "nibabel", "xarray", "zarr", "dask", "distributed")
"""Packages that must be the same on all machines, for one result and for tasks that are understood."""

INTERPRETER_BYTES = 300 * 2**20
"""What a batch job is asked for besides the memory that chunkglm is to use."""


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
    # By its function: where dask is given a name, it imports distributed to look for a cluster. In a pool of its own: what
    # threads keep for their work is let go when they end.
    with (
        ThreadPoolExecutor(number) as pool,
        dask.config.set(scheduler=dask.threaded.get, num_workers=number, pool=pool),
    ):
        yield


def check_scheduler(scheduler: str, workers: int | None, performance_report: object | None) -> None:
    """Refuse what cannot be meant.

    Parameters
    ----------
    scheduler, workers, performance_report
        See :func:`computing`.

    Raises
    ------
    InputError
    """
    if scheduler not in {THREADS, PROCESSES, SLURM} and not scheduler.startswith(PROTOCOLS):
        raise InputError(
            f"The scheduler is {scheduler!r}; it must be threads, processes, slurm, or the address of a running Dask "
            "scheduler: tcp://host:8786."
        )
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers were asked for; there must be at least 1.")
    if scheduler == THREADS and workers is not None:
        raise InputError(
            "Workers are processes, and the scheduler is threads. Give the number of threads (--n-threads), or have worker "
            "processes: --scheduler processes."
        )
    if scheduler == THREADS and performance_report is not None:
        raise InputError(
            "A performance report is drawn from what a cluster's scheduler takes down, and threads have none. With "
            "--scheduler processes there is one on this machine."
        )


@contextmanager
def computing(
    scheduler: str,
    *,
    n_threads: int,
    workers: int | None = None,
    memory: int,
    console: Console,
    quiet: bool = False,
    performance_report: Path | None = None,
) -> Iterator[None]:
    """Compute on threads, or on a cluster, which is made or found, checked, and left at the end.

    Parameters
    ----------
    scheduler : str
        ``"threads"`` of this process; ``"processes"`` of this machine, each of one thread; ``"slurm"``, for batch jobs as
        dask's configuration of ``jobqueue.slurm`` has them; or the address of a running scheduler, ``"tcp://host:port"``.
    n_threads : int
        Of ``threads``, and of each job of ``slurm`` where the configuration says nothing.
    workers : int, optional
        Number of ``processes`` (all processors by default) or of jobs (1 by default); of a running scheduler, how many
        workers are waited for (1 by default).
    memory : int
        Bytes that each worker may use besides interpreter and imports; what a job of ``slurm`` asks for where the
        configuration says nothing.
    console : rich.console.Console
        For the address of the dashboard.
    quiet : bool
        Tell nothing.
    performance_report : Path, optional
        HTML file for distributed's report of the computation.

    Raises
    ------
    InputError, MissingDependencyError
    ClusterError
        If the scheduler does not answer, no worker comes, or workers have other versions of what decides about results.
    """
    check_scheduler(scheduler, workers, performance_report)
    if scheduler == THREADS:
        with threads(n_threads):
            yield
        return
    with _needs("distributed", "cluster", f"--scheduler {scheduler}"):
        import distributed as untyped  # noqa: PLC0415
    distributed: Any = untyped
    if performance_report is not None:
        with _needs("bokeh", "cluster", "--performance-report"):
            import bokeh  # noqa: F401, PLC0415
        # Found out now, not when all is done.
        performance_report = Path(performance_report).absolute()
        performance_report.parent.mkdir(parents=True, exist_ok=True)

    def tell(text: str) -> None:
        if not quiet:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    with (
        _made(scheduler, distributed, n_threads, workers, memory) as address,
        _connected(distributed, address) as client,
    ):
        if client.run_on_scheduler(_has_dashboard):
            tell(f"Dashboard: {client.dashboard_link}")
        _wait_for_workers(client, 1 if scheduler == SLURM else (workers or 1), scheduler, tell)
        check_versions(client)
        if performance_report is None:
            yield
            return
        report = distributed.performance_report(filename=str(performance_report))
        report.__enter__()
        yield
        try:
            report.__exit__(None, None, None)
        except Exception as error:  # noqa: BLE001  (whatever it is, the results are worth more)
            warnings.warn(
                f"The performance report {performance_report} was not written: {type(error).__name__}: {error}. What was "
                "computed is complete.",
                ChunkGLMWarning,
                stacklevel=3,
            )


def _has_dashboard(dask_scheduler: Any) -> bool:
    """Whether there is one: a scheduler gives the address of one also without."""
    return "dashboard" in dask_scheduler.services and "distributed.dashboard.scheduler" in sys.modules


@contextmanager
def _needs(package: str, extra: str, wanted: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(
            f"{wanted} needs {package}, which is not installed. Install it: pip install 'chunkglm[{extra}]'."
        ) from error


@contextmanager
def _made(
    scheduler: str, distributed: Any, n_threads: int, workers: int | None, memory: int
) -> Iterator[Any]:
    """A cluster that is ours, or the address of one that is not."""
    if scheduler == PROCESSES:
        # One thread each, and no limit of distributed's own: what a task takes is chunkglm's arithmetic.
        with distributed.LocalCluster(
            n_workers=workers or plan.available_cpus(),
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=None,
            silence_logs=logging.CRITICAL,
        ) as cluster:
            yield cluster
    elif scheduler == SLURM:
        with slurm_cluster(n_threads, memory) as cluster:
            cluster.scale(jobs=workers or 1)
            yield cluster
    else:
        yield scheduler


def slurm_cluster(n_threads: int, memory: int) -> Any:
    """Make a cluster of Slurm jobs, without any yet.

    Parameters
    ----------
    n_threads : int
        Processors of a job, and threads of its one worker, where dask's configuration (``jobqueue.slurm``) says nothing.
    memory : int
        Bytes for chunkglm in a job, where the configuration says nothing.

    Returns
    -------
    dask_jobqueue.SLURMCluster

    Raises
    ------
    MissingDependencyError, ClusterError
    """
    with _needs("dask-jobqueue", "hpc", "--scheduler slurm"):
        import dask_jobqueue as untyped  # noqa: PLC0415
    jobqueue: Any = untyped
    # Several users share a login node: the dashboard is on any free port.
    configured = dask.config.get("jobqueue.slurm.scheduler-options", None) or {}
    options: dict[str, Any] = {"scheduler_options": {"dashboard_address": ":0", **configured}}
    if dask.config.get("jobqueue.slurm.cores", None) is None:
        options["cores"] = n_threads
        options["processes"] = dask.config.get("jobqueue.slurm.processes", None) or 1
    if dask.config.get("jobqueue.slurm.memory", None) is None:
        options["memory"] = f"{memory + INTERPRETER_BYTES}B"
    try:
        # Here, as a cluster that fails while it is made complains once more when it is collected.
        dask.utils.parse_bytes(options.get("memory") or dask.config.get("jobqueue.slurm.memory"))
        return jobqueue.SLURMCluster(**options)
    except (ValueError, TypeError, OSError) as error:
        raise ClusterError(
            f"Slurm jobs cannot be prepared: {error}. What they ask for comes from dask's configuration, jobqueue.slurm in "
            "~/.config/dask/jobqueue.yaml (queue, account, walltime, cores, memory)."
        ) from error


@contextmanager
def _connected(distributed: Any, cluster: Any) -> Iterator[Any]:
    try:
        client = distributed.Client(cluster, timeout=SECONDS_TO_CONNECT)
    except (OSError, ValueError, TimeoutError, RuntimeError) as error:
        raise ClusterError(
            f"The scheduler {cluster} cannot be reached: {error}. Check the address, which dask scheduler prints when it "
            "starts, and that this machine may connect to it."
        ) from error
    with client:
        yield client


def _wait_for_workers(client: Any, number: int, scheduler: str, tell: Callable[[str], None]) -> None:
    """Until so many workers are there: for batch jobs as long as it takes, else not for long."""
    started, told = time.monotonic(), False
    while (there := n_workers(client)) < number:
        if scheduler == SLURM and not told:
            told = True
            tell("Waiting for the first Slurm job to start (squeue tells about it; Ctrl-C gives up).")
        if scheduler != SLURM and time.monotonic() - started > SECONDS_TO_WAIT:
            raise ClusterError(
                f"The scheduler {client.scheduler.address} has {there} workers after {SECONDS_TO_WAIT:.0f} s, and {number} are "
                f"needed. Start some: dask worker {client.scheduler.address} --nthreads 1."
            )
        time.sleep(0.1)


def n_workers(client: Any) -> int:
    """How many workers a cluster has at the moment."""
    return len(client.nthreads())


class Workers(NamedTuple):
    """What the workers of a cluster have."""

    n_workers: int
    total_threads: int
    most_threads: int
    """Of one worker."""
    memory: int | None
    """The smallest limit that dask keeps one of them to, in bytes; None if to none."""


def describe_workers(client: Any) -> Workers:
    """Find out what a task may use, from what the scheduler knows of its workers.

    Parameters
    ----------
    client : distributed.Client

    Returns
    -------
    Workers
    """
    known = client.run_on_scheduler(_threads_and_limits)
    n_threads = [one for one, _ in known] or [1]
    limits = [limit for _, limit in known if limit]
    return Workers(len(known), sum(n_threads), max(n_threads), min(limits, default=None))


def _threads_and_limits(dask_scheduler: Any) -> list[tuple[int, int]]:
    return [(one.nthreads, one.memory_limit or 0) for one in dask_scheduler.workers.values()]


def ask_workers(client: Any, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Call a function on every worker, beside its tasks.

    Returns
    -------
    dict
        By the address of the worker. Those that are lost or stopped in this moment are not among them.

    Raises
    ------
    ClusterError
        If none answers, or one cannot import chunkglm.
    """
    answers: dict[str, Any] = {}

    def ask(address: str) -> None:
        # A worker that cannot be reached is the scheduler's business.
        with suppress(Exception):
            answers.update(client.run(function, *arguments, workers=[address], on_error="return"))

    # In threads, as a worker that is stopped does not answer.
    asking = [threading.Thread(target=ask, args=(one,), daemon=True) for one in client.nthreads()]
    for one in asking:
        one.start()
    end = time.monotonic() + SECONDS_TO_CONNECT
    for one in asking:
        one.join(max(0.0, end - time.monotonic()))
    found = {address: answer for address, answer in answers.items() if not isinstance(answer, OSError)}
    if not found:
        raise ClusterError(
            f"No worker of {client.scheduler.address} answers within {SECONDS_TO_CONNECT:.0f} s. Restart those that hang."
        )
    for address, answer in found.items():
        if isinstance(answer, BaseException):
            raise ClusterError(
                f"The worker {address} cannot run chunkglm {__version__}: {type(answer).__name__}: {answer}. Scheduler and "
                "workers must run in the same environment as this command."
            )
    return found


def check_versions(client: Any) -> None:
    """Refuse workers with other versions of what decides about results.

    Raises
    ------
    ClusterError
    """
    here = _versions()
    for address, there in ask_workers(client, _versions).items():
        if different := [f"{name} {there.get(name)}" for name in here if there.get(name) != here[name]]:
            ours = ", ".join(f"{name} {here[name]}" for name in here if there.get(name) != here[name])
            raise ClusterError(
                f"The worker {address} has {', '.join(different)}, and this command {ours}. Results could differ from worker "
                "to worker: start the workers in the same environment as this command."
            )


def _versions() -> dict[str, str]:
    """Of Python and what decides about results."""
    python = ".".join(map(str, sys.version_info[:2]))
    return {"chunkglm": __version__, "python": python, **{name: version(name) for name in DECIDING}}


def check_paths(client: Any, paths: Sequence[Path]) -> None:
    """Refuse workers that do not see the files and folders that they are to work on.

    Parameters
    ----------
    client : distributed.Client
    paths : sequence of Path
        Absolute.

    Raises
    ------
    ClusterError
    """
    for address, missing in ask_workers(client, _missing, [str(path) for path in paths]).items():
        if missing:
            raise ClusterError(
                f"The worker {address} does not see {missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. Workers read the runs and write the results "
                "themselves: all must lie on a file system that every machine has under the same path."
            )


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


# ----------------------------------------------------------------------------------------------------------- watching


def memory_in_use() -> int | None:
    """Resident bytes of this process; on a cluster, of all its workers. None where it is not known."""
    client = active_client()
    if client is not None:
        # A look at what is shown must not end the work.
        with suppress(Exception):
            return int(client.run_on_scheduler(_memory_of_workers))
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _memory_of_workers(dask_scheduler: Any) -> int:
    return sum(one.metrics.get("memory", 0) for one in dask_scheduler.workers.values())


class _Watch:
    """How far a stage is, how fast, and what it takes."""

    def __init__(self, title: str, unit: str, n_bytes: int | None) -> None:
        self.title, self.unit, self.n_bytes = title, unit, n_bytes
        self.done, self.total = 0, 0
        self._started = time.monotonic()
        self._memory: int | None = None
        self._looked = -SECONDS_BETWEEN_LOOKS

    def about(self) -> str:
        """Throughput and memory."""
        now = time.monotonic()
        spent = max(now - self._started, 1e-3)
        if now - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked, self._memory = now, memory_in_use()
        rate = ""
        if self.done and self.total and self.n_bytes is not None:
            rate = f"{self.n_bytes * self.done / self.total / spent / 2**20:.1f} MiB/s"
        elif self.done:
            rate = f"{self.done / spent:.3g} {self.unit}/s"
        memory = "" if self._memory is None else f"{plan.format_bytes(self._memory)} in use"
        return ", ".join(filter(None, (rate, memory)))

    def line(self) -> str:
        """All of it in one line."""
        spent = time.monotonic() - self._started
        if not self.total:
            parts = [f"{self.title}: begun {spent:.0f} s ago"]
        else:
            left = self.total - self.done
            rest = f"about {spent / self.done * left:.0f} s left" if self.done else f"{spent:.0f} s so far"
            parts = [
                f"{self.title}: {self.done} of {self.total} {self.unit}",
                rest if left else f"{spent:.1f} s",
            ]
        return ", ".join(filter(None, (*parts, self.about())))


@contextmanager
def stage(
    console: Console, title: str, unit: str, *, n_bytes: int | None = None, quiet: bool = False
) -> Iterator[Callable[[int, int], None] | None]:
    """Show the progress of one stage of the work: an estimate of what is left, throughput, and memory in use.

    Parameters
    ----------
    console : rich.console.Console
        A bar on a terminal, a line that changes in a notebook; elsewhere plain lines: one soon, one a minute, and one at the
        end.
    title, unit : str
        What is done, and what is counted.
    n_bytes : int, optional
        Bytes of signal that all units are together; throughput is in MiB of signal a second, else in units.
    quiet : bool
        Show nothing.

    Yields
    ------
    callable or None
        To be called with the number of finished units and of all units, from any thread.
    """
    watch_of = _Watch(title, unit, n_bytes)
    if quiet:
        yield None
    elif console.is_jupyter:
        with _cell(watch_of) as show:
            yield show
    elif console.is_terminal:
        columns: list[Any] = [
            TextColumn("{task.description}", markup=False),
            # The bar takes what the words leave.
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[about]}", markup=False),
        ]
        with Progress(*columns, console=console, expand=True) as bar:
            task = bar.add_task(title, total=None, about="")

            def update(done: int, total: int) -> None:
                watch_of.done, watch_of.total = done, total
                bar.update(task, completed=done, total=total, about=watch_of.about())

            yield update
    else:
        with _lines(console, watch_of) as show:
            yield show


@contextmanager
def _lines(console: Console, watch_of: _Watch) -> Iterator[Callable[[int, int], None]]:
    """Progress as plain lines: at intervals, whatever happens or does not, and at the end."""
    over = threading.Event()

    def tell() -> None:
        console.print(watch_of.line(), highlight=False, markup=False, soft_wrap=True)

    def tick() -> None:
        pause = FIRST_LINE
        while not over.wait(pause):
            tell()
            pause = SECONDS_BETWEEN_LINES

    def show(done: int, total: int) -> None:
        watch_of.done, watch_of.total = done, total
        if done >= total and not over.is_set():
            over.set()
            tell()

    ticking = threading.Thread(target=tick, name="chunkglm-progress", daemon=True)
    ticking.start()
    try:
        yield show
    finally:
        over.set()
        ticking.join()


@contextmanager
def _cell(watch_of: _Watch) -> Iterator[Callable[[int, int], None]]:
    """Progress as a line below a notebook's cell, which changes: bars there need ipywidgets, and do not outlive the session."""
    import IPython.display as untyped  # noqa: PLC0415

    display: Any = untyped.display
    handle = display({"text/plain": watch_of.line()}, raw=True, display_id=True)
    shown = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown
        watch_of.done, watch_of.total = done, total
        if done >= total or time.monotonic() - shown >= SECONDS_BETWEEN_CHANGES:
            shown = time.monotonic()
            handle.update({"text/plain": watch_of.line()}, raw=True)

    yield show


@contextmanager
def watch(title: str, *, unit: str = "blocks") -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a conversion or of saving, with an estimate of what is left, throughput and memory in use.

    Parameters
    ----------
    title : str
        What is done.
    unit : str
        What is counted: the blocks that :func:`chunkglm.save` writes, the ``"volumes"`` that :func:`chunkglm.convert` reads.

    Yields
    ------
    callable
        For ``progress=``. On a terminal it draws a bar, in a notebook a line that changes; elsewhere it prints lines: one
        soon, one a minute, and one at the end. On a cluster the memory is that of its workers together.

    Examples
    --------
    >>> with cg.watch("Fitting") as progress:  # doctest: +SKIP
    ...     cg.save(cg.fit(runs, designs), "fit.zarr", progress=progress)
    """
    with stage(Console(stderr=True, highlight=False, markup=False), title, unit) as progress:
        if progress is not None:
            yield progress
