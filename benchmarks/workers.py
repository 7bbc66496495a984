"""The whole job on a cluster: two workers of one thread against one."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import _compare, _study

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTRAST = "diff=[-1,-1,1,1]"
SECONDS_TO_START = 60.0


@contextmanager
def cluster_of(folder: Path, n_workers: int) -> Iterator[str]:
    """A scheduler and workers of one thread, as processes that speak TCP; the address of the scheduler."""
    folder.mkdir()
    about = folder / "scheduler.json"
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    at_home = ["--host", "127.0.0.1"]
    words = ["distributed.cli.dask_scheduler", *at_home, "--port", "0", "--no-dashboard"]
    processes = []
    try:
        scheduler = [_compare.PYTHON, "-m", *words, "--scheduler-file", str(about)]
        processes.append(subprocess.Popen(scheduler, **quiet))
        end = time.monotonic() + SECONDS_TO_START
        while not about.is_file():
            if time.monotonic() > end:
                raise SystemExit("The scheduler did not start.")
            time.sleep(0.05)
        address = json.loads(about.read_text(encoding="utf-8"))["address"]
        words = ["distributed.cli.dask_worker", address, *at_home, "--nthreads", "1", "--no-nanny"]
        words += ["--no-dashboard", "--local-directory", str(folder), "--memory-limit", "0"]
        processes += [subprocess.Popen([_compare.PYTHON, "-m", *words], **quiet) for _ in range(n_workers)]
        yield address
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks workers", description=__doc__)
    _study.add_options(parser, n_runs=4)
    _compare.add_options(parser)
    parser.add_argument("--smoothing-fwhm", type=float, default=5.0)
    options = parser.parse_args(arguments)
    study = _study.study_of(options)
    with tempfile.TemporaryDirectory(dir=_study.CACHE) as folder, ExitStack() as clusters:
        place = Path(folder).resolve()
        output = place / "output"
        words = [_compare.PYTHON, "-m", "chunkglm", "-q", "run", *study.words(), "--no-report"]
        words += ["--smoothing-fwhm", str(options.smoothing_fwhm), "--contrast", CONTRAST]
        commands = []
        for name, n_workers in (("one worker", 1), ("two workers", 2)):
            address = clusters.enter_context(cluster_of(place / name.replace(" ", "-"), n_workers))
            there = ["--scheduler", address, "--workers", str(n_workers), "--output", str(output)]
            commands.append(
                _compare.Command(name, [*words, *there], lambda: shutil.rmtree(output, ignore_errors=True))
            )
        found = _compare.take_turns(commands, options.repeats, warmup=options.warmup, touch=options.touch)
    print(_compare.describe_machine() + "\n")
    _compare.print_comparison(found, "one worker", {"two workers": "at least 1.7 times"})
    print("\nProcessor time and memory are those of the command, not of the workers.")
