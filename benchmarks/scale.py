"""What a study of many subjects takes on a cluster: multiplied from one subject, which is measured on a scheduler and a worker.

One subject is done whole: its runs are converted, fitted and combined by a worker process of one thread, and counted are the
tasks, their seconds, and what passes through the scheduler's sockets. What the scheduler takes for a task is measured with many
that do little. The study is so many times that; nothing of its size is run.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from benchmarks import _compare, _study
from benchmarks.workers import cluster_of
from chunkglm.plan import format_bytes
from chunkglm.store.saving import WAVE_BLOCKS, WAVE_STORES

if TYPE_CHECKING:
    from collections.abc import Callable


class Counted(NamedTuple):
    """What something took: tasks, seconds of the worker's thread in them, processor seconds and bytes."""

    tasks: int
    task_seconds: float
    worker_seconds: float
    scheduler_seconds: float
    scheduler_bytes: int
    client_seconds: float

    def plus(self, other: Counted) -> Counted:
        """Both together."""
        return Counted(*(one + two for one, two in zip(self, other, strict=True)))


class Subject(NamedTuple):
    """One subject, as it was measured: conversion of its runs, fit, and fixed effects; and bytes of files."""

    converting: Counted
    fitting: Counted
    combining: Counted
    source: int
    runs: int
    fit: int
    fixed: int
    fit_blocks: int
    fixed_blocks: int


def main(arguments: list[str]) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__)
    _study.add_options(parser, n_runs=4)
    parser.add_argument("--smoothing-fwhm", type=float, default=5.0)
    parser.add_argument("--subjects", type=int, nargs="+", default=[1_000, 50_000])
    parser.add_argument("--threads", type=int, default=32, help="workers of one thread on a node")
    parser.add_argument("--small-tasks", type=int, default=4000, help="that measure what the scheduler takes")
    options = parser.parse_args(arguments)
    study = _study.make_study(options.runs, options.volumes, options.shape, options.voxels, suffix=".nii")
    with tempfile.TemporaryDirectory(dir=_study.CACHE) as folder:
        place = Path(folder).resolve()
        with cluster_of(place / "cluster", 1) as address:
            small, one = _measure(address, study, place, options)
    raw = options.runs * options.volumes * math.prod(options.shape) * 4
    print(_compare.describe_machine() + "\n")
    _print_measured(small, one, raw, options)
    _print_multiplied(small, one, raw, options)


def _print_measured(small: Counted, one: Subject, raw: int, options: argparse.Namespace) -> None:
    x, y, z = options.shape
    print(
        f"Measured: one subject of {options.runs} runs of {x} x {y} x {z} x {options.volumes} ({format_bytes(raw)} as "
        "float32), by a worker of one thread.\n"
    )
    print(
        "| stage | tasks | worker s | worker cpu s | scheduler cpu s | through the scheduler | client cpu s | written |"
    )
    print("|---|---|---|---|---|---|---|---|")
    stages = (
        ("convert", one.converting, one.runs),
        ("fit", one.fitting, one.fit),
        ("contrast and fixed effects", one.combining, one.fixed),
        ("small tasks", small, None),
    )
    for name, counted, written in stages:
        cells = [
            name,
            f"{counted.tasks:,}",
            f"{counted.task_seconds:.2f}",
            f"{counted.worker_seconds:.2f}",
            f"{counted.scheduler_seconds:.2f}",
            format_bytes(counted.scheduler_bytes),
            f"{counted.client_seconds:.2f}",
            "" if written is None else format_bytes(written),
        ]
        print("| " + " | ".join(cells) + " |")
    each = small.scheduler_seconds / small.tasks
    n_bytes = format_bytes(small.scheduler_bytes / small.tasks)
    print(f"\nA small task takes {1000 * each:.2f} ms of the scheduler and {n_bytes} through it.")


def _print_multiplied(small: Counted, one: Subject, raw: int, options: argparse.Namespace) -> None:
    subject = one.converting.plus(one.fitting).plus(one.combining)
    disk = one.runs + one.fit + one.fixed
    stages = ((one.fitting.tasks, one.fit_blocks), (one.combining.tasks, one.fixed_blocks))
    # What is computed together is counted in blocks of the datasets that are saved.

    def n_together(blocks: int) -> int:
        return max(1, min(WAVE_STORES, WAVE_BLOCKS // blocks))

    tasks, blocks = max(stages, key=lambda stage: stage[0] * n_together(stage[1]))
    together = n_together(blocks)
    heading = ["", "of one subject", *(f"{n:,} subjects" for n in options.subjects), "how"]
    print("\nMultiplied:\n")
    print("| " + " | ".join(heading) + " |")
    print("|" + "---|" * len(heading))

    def row(name: str, value: Callable[[int], str], how: str) -> None:
        print("| " + " | ".join([name, *(value(n) for n in (1, *options.subjects)), how]) + " |")

    def hours(seconds: float) -> str:
        return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:,.1f} h"

    each = small.scheduler_seconds / small.tasks
    node = subject.task_seconds / options.threads
    row("recordings", lambda n: format_bytes(n * one.source), "measured x subjects")
    row("tasks", lambda n: f"{n * subject.tasks:,}", "measured x subjects")
    row(
        "largest graph at a time, tasks",
        lambda n: f"{min(n, together) * tasks:,}",
        f"{tasks} of a subject, measured, x the {together:,} that are saved together: at most {WAVE_STORES} stores of at most "
        f"{WAVE_BLOCKS:,} blocks to write",
    )
    row("worker threads", lambda n: hours(n * subject.task_seconds), "measured x subjects")
    row(
        f"nodes of {options.threads} threads",
        lambda n: hours(n * node),
        f"the same / {options.threads}, as if threads did not slow each other down",
    )
    row(
        "scheduler, at least",
        lambda n: hours(n * subject.tasks * each),
        "tasks x processor time of a small task",
    )
    row(
        "scheduler, at most",
        lambda n: hours(n * subject.scheduler_seconds),
        "measured x subjects: with graphs of one subject each, and its upkeep while it waits",
    )
    row(
        "through the scheduler",
        lambda n: format_bytes(n * subject.scheduler_bytes),
        "measured x subjects",
    )
    row("client", lambda n: hours(n * subject.client_seconds), "measured x subjects")
    row(
        "read by workers",
        lambda n: format_bytes(n * (one.source + one.runs + one.fit)),
        "recordings, run stores, fits: sizes of files x subjects",
    )
    row("written by workers", lambda n: format_bytes(n * disk), "run stores, fits, fixed effects: the same")
    row(
        "disk for results",
        lambda n: format_bytes(n * disk),
        f"{disk / raw:.2f} bytes a byte of float32 signal",
    )
    least = subject.task_seconds / subject.scheduler_seconds
    most = subject.task_seconds / (subject.tasks * each)
    print(
        f"\nA scheduler keeps up with {least:,.0f} threads at the least and {most:,.0f} at the most, and one client with "
        f"{subject.task_seconds / subject.client_seconds:,.0f}: seconds of workers over their own."
    )


def _measure(
    address: str, study: _study.Study, place: Path, options: argparse.Namespace
) -> tuple[Counted, Subject]:
    """Small tasks, and one subject."""
    from distributed import Client, wait

    import chunkglm as cg
    from chunkglm.convert import convert_run

    with Client(address) as client:
        client.wait_for_workers(1, timeout=60)
        client.run_on_scheduler(_count_bytes())

        def small_tasks(n: int, number: int) -> None:
            ds = xr.Dataset({"a": (("z", "y", "x"), _ones(n))})
            cg.save(ds, place / f"small-{number}")

        # The first ones import what the worker needs.
        small_tasks(min(100, options.small_tasks), 0)
        small = _counted(client, lambda: small_tasks(options.small_tasks, 1))

        stores = [place / "runs.zarr" / f"run-{n}" for n in range(1, options.runs + 1)]
        calls = [
            {
                "source": str(source),
                "store": str(store),
                "mask": str(study.mask),
                "t_r": None,
                "smoothing_fwhm": options.smoothing_fwhm,
                "memory": 2**30,
                "n_threads": 1,
                "overwrite": False,
                "progress": None,
            }
            for source, store in zip(study.runs, stores, strict=True)
        ]

        def convert() -> None:
            for call in calls:
                # What is returned stays there, as in a job.
                wait([future := client.submit(convert_run, **call, pure=False)])
                if future.status != "finished":
                    future.result()

        def fit() -> None:
            lazy = cg.fit([cg.open_run(store) for store in stores], study.designs)
            cg.save(lazy, place / "fit.zarr")

        def combine() -> None:
            contrasts = cg.contrast(cg.open_store(place / "fit.zarr"), "DSt + DSp - SSt - SSp")
            cg.save(cg.fixed_effects(contrasts), place / "fixed.zarr")

        counted = [_counted(client, one) for one in (convert, fit, combine)]
        blocks = [_n_blocks(cg.open_store(place / name)) for name in ("fit.zarr", "fixed.zarr")]
        sizes = [
            sum(path.stat().st_size for path in study.runs),
            *(_disk(place / name) for name in ("runs.zarr", "fit.zarr", "fixed.zarr")),
        ]
    return small, Subject(*counted, *sizes, *blocks)


def _n_blocks(ds: xr.Dataset) -> int:
    """Blocks of a dataset, as those are counted that are computed together."""
    return max(int(np.prod(one.data.numblocks)) for one in ds.variables.values() if one.chunks is not None)


def _ones(n: int) -> Any:
    """An array of so many blocks of one voxel."""
    import dask.array as da

    return da.ones((n, 1, 1), chunks=1, dtype=np.float32)


def _disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _counted(client: Any, work: Callable[[], None]) -> Counted:
    """Do something on the cluster, and count what it took."""

    def look() -> tuple[float, ...]:
        by_workers = sum(client.run(_processor_time()).values())
        return (*client.run_on_scheduler(_look()), by_workers, time.process_time())

    before = look()
    work()
    tasks, seconds, cpu, n_bytes, by_workers, own = (
        new - old for new, old in zip(look(), before, strict=True)
    )
    return Counted(int(tasks), seconds, by_workers, cpu, int(n_bytes), own)


# Functions within functions are sent to the scheduler whole; it cannot import this module.


def _count_bytes() -> Callable[[], None]:
    def install() -> None:
        from tornado.iostream import IOStream

        IOStream.n_counted = 0

        def count(name: str) -> None:
            original = getattr(IOStream, name)

            def counting(self: Any, data: Any) -> Any:
                n = original(self, data if name == "read_from_fd" else memoryview(data))
                IOStream.n_counted += n or 0
                return n

            setattr(IOStream, name, counting)

        count("read_from_fd")
        count("write_to_fd")

    return install


def _processor_time() -> Callable[[], float]:
    def look() -> float:
        import time as its

        return its.process_time()

    return look


def _look() -> Callable[..., tuple[float, ...]]:
    def look(dask_scheduler: Any) -> tuple[float, ...]:
        import time as its

        from tornado.iostream import IOStream

        known = dask_scheduler.task_prefixes.values()
        return (
            sum(one.state_counts["memory"] for one in known),
            sum(one.all_durations.get("compute", 0.0) for one in known),
            its.process_time(),
            IOStream.n_counted,
        )

    return look
