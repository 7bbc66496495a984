"""Fitting again from stores, with other designs, against fitting again by nilearn."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks import _compare, _study

GOALS = {"ar1": "30 to 50 times", "ar3": "50 to 150 times"}


def main(arguments: list[str], *, noise_models: tuple[str, ...] = ("ar1",), name: str = "refit") -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=__doc__)
    _study.add_options(parser)
    _compare.add_options(parser)
    parser.add_argument("--smoothing-fwhm", type=float, help="of the stores and of nilearn's fit")
    options = parser.parse_args(arguments)
    study = _study.study_of(options)
    with tempfile.TemporaryDirectory(dir=_study.CACHE) as folder:
        place = Path(folder)
        smoothing = (
            [] if options.smoothing_fwhm is None else ["--smoothing-fwhm", str(options.smoothing_fwhm)]
        )
        run_stores(study, place / "study.zarr", smoothing)
        commands = []
        for noise_model in noise_models:
            noise = ["--noise-model", noise_model]
            theirs = [_compare.PYTHON, "-m", "benchmarks._nilearn", *study.words(), *smoothing, *noise]
            ours = [_compare.PYTHON, "-m", "chunkglm", "-q", "fit", f"{place}/study.zarr"]
            ours += [*study.design_words(), *noise, "--output", f"{place}/fit.zarr"]
            commands += [
                _compare.Command(f"nilearn {noise_model}", theirs),
                _compare.Command(
                    f"chunkglm fit {noise_model}",
                    ours,
                    lambda: shutil.rmtree(place / "fit.zarr", ignore_errors=True),
                ),
            ]
        found = _compare.take_turns(commands, options.repeats, warmup=options.warmup, touch=options.touch)
    print(_compare.describe_machine() + "\n")
    for noise_model in noise_models:
        pair = {kind: found[kind] for kind in (f"nilearn {noise_model}", f"chunkglm fit {noise_model}")}
        _compare.print_comparison(
            pair, f"nilearn {noise_model}", {f"chunkglm fit {noise_model}": GOALS.get(noise_model, "")}
        )
        print()


def run_stores(study: _study.Study, place: Path, smoothing: list[str]) -> None:
    """Convert the runs of a study."""
    for number, run in enumerate(study.runs, start=1):
        words = [_compare.PYTHON, "-m", "chunkglm", "-q", "convert", str(run), f"{place}/run-{number}"]
        _compare.measure([*words, "--mask", str(study.mask), *smoothing])
