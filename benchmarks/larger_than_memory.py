"""``chunkglm run`` over a study that is many times larger than a hard limit on memory, against a study that fits.

The limit is on the whole process, imports included, and is the system's: a control group where one can be made (its count takes
in page cache), else ``RLIMIT_DATA``. The job is convert with smoothing, fit, contrasts, fixed effects and all maps, without the
report. It takes turns with the same job that nothing limits, over as many of the runs as fit into half of the machine's memory.
nilearn gets the same files and the same limit.
"""

from __future__ import annotations

import argparse
import filecmp
import math
import os
import shutil
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import _compare, _limits, _study
from benchmarks.memory import IMPORTS
from chunkglm.plan import MIB, available_cpus, available_memory, format_bytes, parse_memory
from chunkglm.testing import write_simulated_run

try:
    from isal import igzip as gzip
except ImportError:
    import gzip

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TIMES = 6
"""How many times larger than the limit a study is at least, to be called larger than memory."""

BESIDES = 256 * MIB
"""Part of the limit that is not given to ``--memory``: the interpreter, the imports, and page cache."""

FOLDER = "larger_than_memory"
"""Folder of the study, in the cache of all benchmarks."""

KEPT = 16
"""Runs that stay in the cache for next time; those after them are removed at the end."""

SLACK = 2**30
"""Bytes of disk that are left to others, besides a tenth of what is needed."""

KINDS = {
    "cgroup": "a control group: all processes, page cache included, no swap",
    "rlimit": "RLIMIT_DATA: private memory that is asked for, used or not, in each process",
}

CONTRAST = "diff=[-1,-1,1,1]"


class Ended(NamedTuple):
    """How a job ended: what it took, the peak with page cache if the system tells it, words, the kind of its limit."""

    measured: _compare.Measured
    charged: int | None
    words: str
    kind: str


class Found(NamedTuple):
    """What was measured. Between two jobs that are free lies one under the limit."""

    start_up: float
    free: list[_compare.Measured]
    limited: list[Ended]
    same: bool
    """Whether both were over the same runs, and gave the same maps."""
    left: int
    """Bytes of stores and maps."""
    nilearn: Ended


def runs_that_fit(n_runs: int, raw: int) -> int:
    """How many of the runs, of so many bytes each as float32, fit into half of the machine's memory."""
    return min(n_runs, max(1, (available_memory() or 8 * 2**30) // 2 // raw))


def disk_needed(n_runs: int, run: Path, n_volumes: int, n_voxels: int) -> tuple[int, int]:
    """Bytes on disk for as many runs like this one, and at most for what the job writes."""
    # The series of the mask as float32, and as float64 a coefficient for each regressor, a few sums, and the maps.
    stored = n_voxels * (4 * n_volumes + 8 * (_study.N_REGRESSORS + 16))
    return n_runs * run.stat().st_size, (n_runs + 1) * stored


def check_disk(needed: int, what: str) -> None:
    """End with numbers if the disk has no room."""
    free, slack = shutil.disk_usage(_study.CACHE).free, SLACK + needed // 10
    if free < needed + slack:
        sys.exit(
            f"{what} takes {format_bytes(needed)} in {_study.CACHE}, and {format_bytes(slack)} are to stay free, but "
            f"{format_bytes(free)} are free. Give a smaller --size, or free {format_bytes(needed + slack - free)}."
        )


def make_study(n_runs: int, raw: int, options: argparse.Namespace) -> _study.Study:
    """Make what is not there yet, run by run, after a look at the disk."""
    folder = _study.CACHE / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    stem = "x".join(map(str, (*options.shape, options.volumes)))
    mask = folder / f"{'x'.join(map(str, options.shape))}_{options.voxels}_mask.nii.gz"

    def run_path(number: int | str) -> Path:
        return folder / f"{stem}_{number}.nii.gz"

    def design_path(number: int) -> Path:
        return folder / f"{stem}_{number}_design.npz"

    def make(number: int) -> None:
        check_disk(raw, f"Run {number} of {n_runs}")
        make_run(run_path(number), design_path(number), number - 1, options)

    make(1)
    if not mask.exists():
        _study.write_mask(mask, run_path(1), options.voxels, tuple(options.shape))
    sources, written = disk_needed(n_runs, run_path(1), options.volumes, options.voxels)
    if runs_that_fit(n_runs, raw) == n_runs:
        # The results of both jobs lie there to be compared.
        written *= 2
    there = sum(path.stat().st_size for path in folder.glob(run_path("*").name))
    check_disk(max(0, sources - there) + written, f"A study of {n_runs} runs")
    numbers = range(1, n_runs + 1)
    with ThreadPoolExecutor(min(2, available_cpus())) as pool:
        try:
            for number, _ in enumerate(pool.map(make, numbers), start=1):
                if number % 10 == 0:
                    print(f"{number} of {n_runs} runs are there", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return _study.Study([run_path(number) for number in numbers], [design_path(n) for n in numbers], mask)


def make_run(run: Path, design: Path, session: int, options: argparse.Namespace) -> None:
    """Make a run, volume by volume, and its design, if they are not there yet."""
    if run.exists() and design.exists():
        return
    plain, partial = run.with_suffix(""), run.with_name(run.name + ".partial")
    truth = write_simulated_run(
        plain,
        overwrite=True,
        shape=tuple(options.shape),
        n_volumes=options.volumes,
        voxel_size=2.0,
        session=session,
    )
    _study.write_design(design, truth)
    # Compressing with zlib would take three times as long as all the rest.
    with plain.open("rb") as source, gzip.open(partial, "wb", compresslevel=1) as target:
        shutil.copyfileobj(source, target, MIB)
    plain.unlink()
    partial.replace(run)


def drop_from_cache(paths: list[Path]) -> None:
    """Let the system forget files, so that a job reads them from the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def how_it_ended(code: int, message: str, limit: _limits.Limit) -> str:
    """What became of a process under a limit, in a few words."""
    if limit.n_killed():
        return "killed by the system: out of memory"
    lines = [line for line in message.splitlines() if line.strip()]
    if any("MemoryError" in line or "Unable to allocate" in line for line in lines):
        return "MemoryError"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"failed: {lines[-1] if lines else code}" if code else "finished"


def same_maps(one: Path, other: Path) -> bool:
    """Whether two results have the same maps, to the last bit."""
    names = sorted(path.name for path in one.glob("maps/*.nii.gz"))
    if not names or names != sorted(path.name for path in other.glob("maps/*.nii.gz")):
        return False
    return filecmp.cmpfiles(one / "maps", other / "maps", names, shallow=False)[0] == names


def main(arguments: list[str]) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks larger_than_memory", description=__doc__)
    parser.add_argument("--limit", type=parse_memory, default=parse_memory("768MiB"))
    parser.add_argument(
        "--limit-by", choices=("cgroup", "rlimit"), help="default: cgroup where one can be made"
    )
    parser.add_argument(
        "--size", type=parse_memory, help=f"of the runs as float32; default: {TIMES} times the limit"
    )
    parser.add_argument(
        "--memory", type=parse_memory, help="budget of chunkglm; default: the limit less 256 MiB"
    )
    parser.add_argument("--shape", type=int, nargs=3, default=_study.SHAPE)
    parser.add_argument("--volumes", type=int, default=284)
    parser.add_argument("--voxels", type=int, default=240_000, help="in the mask")
    parser.add_argument("--smoothing-fwhm", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    # What is large is removed then, too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("The benchmark was told to end."))
    folder = _study.CACHE / FOLDER
    output = folder / "output"
    try:
        shutil.rmtree(output, ignore_errors=True)
        compare(options, output)
    finally:
        shutil.rmtree(output, ignore_errors=True)
        for path in folder.glob("*x*_*"):
            number = path.name.split("_")[1].split(".")[0]
            if path.name.endswith((".partial", ".nii")) or ("_mask" not in path.name and int(number) > KEPT):
                path.unlink()
        signal.signal(signal.SIGTERM, before)


def compare(options: argparse.Namespace, output: Path) -> None:
    """Make the study, run the jobs, print."""
    raw = 4 * math.prod(options.shape) * options.volumes
    n_runs = max(2, math.ceil((options.size or TIMES * options.limit) / raw))
    budget = options.memory or max(options.limit - BESIDES, options.limit // 4)
    started = time.perf_counter()
    study = make_study(n_runs, raw, options)
    made = time.perf_counter() - started
    n_fitting = runs_that_fit(n_runs, raw)
    found = take_turns(study, n_fitting, budget, options, output)

    sources = sum(path.stat().st_size for path in study.runs)
    print(_compare.describe_machine() + "\n")
    print(
        f"{n_runs} runs of {' x '.join(map(str, options.shape))} x {options.volumes}: "
        f"{format_bytes(n_runs * raw)} as float32, {n_runs * raw / options.limit:.1f} times the limit of "
        f"{format_bytes(options.limit)} ({KINDS[found.nilearn.kind]}). {format_bytes(sources)} of files, there after "
        f"{made:.1f} s; {format_bytes(found.left)} of stores and maps. Start-up, taken off for MiB/s: {found.start_up:.2f} s.\n"
    )
    if n_runs * raw < TIMES * options.limit:
        print(f"Less than {TIMES} times the limit: this shows nothing about memory.\n")
    print_table(found, n_runs * raw, n_fitting * raw, options.limit, budget)


def take_turns(
    study: _study.Study, n_fitting: int, budget: int, options: argparse.Namespace, output: Path
) -> Found:
    """Run the job without a limit and under it by turns, then nilearn under it."""
    fitting = study._replace(runs=study.runs[:n_fitting], designs=study.designs[:n_fitting])
    smoothing = ["--smoothing-fwhm", str(options.smoothing_fwhm)]
    job = [_compare.PYTHON, "-m", "chunkglm", "-q", "run", "--no-report", "--contrast", CONTRAST, *smoothing]
    start_ups: list[float] = []
    free: list[_compare.Measured] = []
    limited: list[Ended] = []
    left, whole = 0, n_fitting == len(study.runs)
    for number in range(options.repeats + 1):
        start_ups.append(_compare.measure([_compare.PYTHON, "-c", IMPORTS]).wall)
        drop_from_cache(study.runs)
        free.append(run_free([*job, *fitting.words(), "--output", str(output / "free")]))
        if not whole:
            shutil.rmtree(output / "free")
        if number < options.repeats:
            drop_from_cache(study.runs)
            words = [*job, *study.words(), "--memory", str(budget), "--output", str(output / "limited")]
            limited.append(run_limited(words, options))
            if limited[-1].words != "finished":
                sys.exit(f"{' '.join(words)} under the limit: {limited[-1].words}")
            left = sum(path.stat().st_size for path in (output / "limited").rglob("*") if path.is_file())
            if whole and not same_maps(output / "free", output / "limited"):
                sys.exit(
                    "The maps under the limit are not those without it: the numbers depend on the memory."
                )
        shutil.rmtree(output)

    drop_from_cache(study.runs)
    words = [_compare.PYTHON, "-m", "benchmarks._nilearn", *study.words(), *smoothing, "--contrasts", "1"]
    nilearn = run_limited([*words, "--output", str(output / "nilearn")], options)
    return Found(statistics.median(start_ups), free, limited, whole, left, nilearn)


def run_free(words: Sequence[str]) -> _compare.Measured:
    """Run a job that nothing limits to its good end."""
    measured, code, message = _compare.run_to_end(words, disk_trouble)
    if code:
        sys.exit(f"{' '.join(words)} ended with {code}:\n{message}")
    return measured


def run_limited(words: Sequence[str], options: argparse.Namespace) -> Ended:
    """Run a job under the limit, whatever its end."""
    with _limits.hard_limit(options.limit, options.limit_by) as limit:
        measured, code, message = _compare.run_to_end([*limit.words, *words], disk_trouble)
        return Ended(measured, limit.peak(), how_it_ended(code, message, limit), limit.kind)


def disk_trouble() -> str | None:
    """Say so before the disk is full."""
    free = shutil.disk_usage(_study.CACHE).free
    return None if free > SLACK // 2 else f"The disk has {format_bytes(free)} left: ended before it is full."


def print_table(found: Found, size: int, fitting: int, limit: int, budget: int) -> None:
    """Print a row for each job, and the ratio of the throughputs."""

    def throughput(n_bytes: int, jobs: Sequence[_compare.Measured]) -> list[float]:
        return [n_bytes / MIB / max(one.wall - found.start_up, 0.01) for one in jobs]

    jobs = [one.measured for one in found.limited]
    fast, slow = throughput(fitting, found.free), throughput(size, jobs)
    charged = [one.charged for one in found.limited if one.charged is not None]
    theirs = found.nilearn
    rows = [
        ("chunkglm run, fits", fitting, "none", "2GiB", found.free, None, fast, "finished"),
        (
            "chunkglm run, larger than memory",
            size,
            format_bytes(limit),
            format_bytes(budget),
            jobs,
            max(charged, default=None),
            slow,
            "finished",
        ),
        ("nilearn", size, format_bytes(limit), "", [theirs.measured], theirs.charged, [], theirs.words),
    ]
    print(
        "| command | raw float32 | limit | --memory | peak resident | with page cache | wall s | cpu s | MiB/s | end |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, n_bytes, under, memory, runs, peak, rates, end in rows:
        cells = [
            name,
            format_bytes(n_bytes),
            under,
            memory,
            format_bytes(max(one.memory for one in runs)),
            "" if peak is None else format_bytes(peak),
            _compare.spread([one.wall for one in runs]),
            _compare.spread([one.cpu for one in runs]),
            _compare.spread(rates, 0) if rates else "",
            end,
        ]
        print("| " + " | ".join(cells) + " |")
    ratios = [one / statistics.mean(fast[k : k + 2]) for k, one in enumerate(slow)]
    costs = [one.cpu / size for one in jobs]
    costs_free = [one.cpu / fitting for one in found.free]
    work = [one / statistics.mean(costs_free[k : k + 2]) for k, one in enumerate(costs)]
    print(f"\nThroughput under the limit over that without: {_compare.spread(ratios, 2)}.")
    print(f"Processor time for a byte under the limit over that without: {_compare.spread(work, 2)}.")
    if found.same:
        print("Both made the same maps, to the last bit.")
