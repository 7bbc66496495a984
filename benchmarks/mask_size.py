"""A mask of one per cent of the brain: what fitting it costs, against the whole mask."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks import _compare, _study
from benchmarks.refit import run_stores


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks mask_size", description=__doc__)
    _study.add_options(parser, n_runs=2)
    _compare.add_options(parser, repeats=5)
    options = parser.parse_args(arguments)
    study = _study.study_of(options)
    small = study._replace(
        mask=_study.make_study(
            options.runs, options.volumes, options.shape, max(options.voxels // 100, 1)
        ).mask
    )
    with tempfile.TemporaryDirectory(dir=_study.CACHE) as folder:
        place = Path(folder)
        run_stores(study, place / "study.zarr", [])
        commands = [
            _compare.Command("imports alone", [_compare.PYTHON, "-c", "import chunkglm.cli"]),
            *(
                _compare.Command(
                    name,
                    [
                        *(_compare.PYTHON, "-m", "chunkglm", "-q", "fit", f"{place}/study.zarr"),
                        *(*one.design_words(), "--mask", str(one.mask), "--output", f"{place}/fit.zarr"),
                    ],
                    lambda: shutil.rmtree(place / "fit.zarr", ignore_errors=True),
                )
                for name, one in (("the whole mask", study), ("one per cent of it", small))
            ),
        ]
        found = _compare.take_turns(commands, options.repeats, warmup=options.warmup, touch=options.touch)
    print(_compare.describe_machine() + "\n")
    _compare.print_comparison(found, "the whole mask", {"one per cent of it": "7 to 20 times"})
    rows = zip(*found.values(), strict=True)
    ratios = [(few.wall - start.wall) / (whole.wall - start.wall) for start, whole, few in rows]
    print(f"\nBeyond the imports: {_compare.spread(ratios, 2)} of the time of the whole mask.")
