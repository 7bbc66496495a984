"""The whole job, ``chunkglm run``, against the same by nilearn: smoothing, AR(1), a contrast, fixed effects, maps."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks import _compare, _study

CONTRAST = "diff=[-1,-1,1,1]"


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks whole_job", description=__doc__)
    _study.add_options(parser)
    _compare.add_options(parser)
    parser.add_argument("--smoothing-fwhm", type=float, default=5.0)
    options = parser.parse_args(arguments)
    study = _study.study_of(options)
    with tempfile.TemporaryDirectory(dir=_study.CACHE) as folder:
        place = Path(folder)
        smoothing = ["--smoothing-fwhm", str(options.smoothing_fwhm)]
        ours = [_compare.PYTHON, "-m", "chunkglm", "-q", "run", *study.words(), *smoothing]
        ours += ["--contrast", CONTRAST, "--output", f"{place}/ours"]
        theirs = [_compare.PYTHON, "-m", "benchmarks._nilearn", *study.words(), *smoothing]
        theirs += ["--contrasts", "1", "--output", f"{place}/theirs"]

        def clear() -> None:
            for name in ("ours", "theirs"):
                shutil.rmtree(place / name, ignore_errors=True)

        commands = [
            _compare.Command("nilearn", theirs, clear),
            _compare.Command("chunkglm run --no-report", [*ours, "--no-report"], clear),
            _compare.Command("... --memory 256MiB", [*ours, "--no-report", "--memory", "256MiB"], clear),
            _compare.Command("... with report and pictures", ours, clear),
        ]
        found = _compare.take_turns(commands, options.repeats, warmup=options.warmup, touch=options.touch)
    print(_compare.describe_machine() + "\n")
    goals = {"chunkglm run --no-report": "8 to 12 times; a fifth to a tenth"}
    _compare.print_comparison(found, "nilearn", goals)
