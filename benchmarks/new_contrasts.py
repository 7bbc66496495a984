"""Twenty new contrasts with fixed effects from a saved fit, against fitting again for them."""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import _compare, _study
from benchmarks._nilearn import contrast_weights
from benchmarks.refit import run_stores

N_CONTRASTS = 20


def test_contrasts(fit: str, output: Path) -> None:
    """Effects, variances, t and z of the fixed effects of every contrast, as maps."""
    import numpy as np

    import chunkglm as cg
    from chunkglm.cluster import share_freed_memory, threads
    from chunkglm.plan import available_cpus

    share_freed_memory()
    fitted = cg.open_store(fit)
    n = fitted.sizes["regressor"]
    definitions = {
        f"contrast{number}": np.pad(contrast_weights(number), (0, n - 4)) for number in range(N_CONTRASTS)
    }
    combined = cg.fixed_effects(cg.contrast(fitted, definitions))[["effect", "variance", "stat", "z_score"]]
    with threads(available_cpus()):
        maps = combined.compute()
    output.mkdir()

    def write(item: tuple[str, str]) -> None:
        name, variable = item
        one = maps[variable].sel(contrast=name).fillna(0)
        cg.to_nifti(one, output / f"{name}_{variable}.nii.gz")

    with ThreadPoolExecutor(available_cpus()) as pool:
        list(pool.map(write, itertools.product(definitions, map(str, maps.data_vars))))


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks new_contrasts", description=__doc__)
    _study.add_options(parser)
    _compare.add_options(parser)
    options = parser.parse_args(arguments)
    study = _study.study_of(options)
    with tempfile.TemporaryDirectory(dir=_study.CACHE) as folder:
        place = Path(folder)
        run_stores(study, place / "study.zarr", [])
        words = [_compare.PYTHON, "-m", "chunkglm", "-q", "fit", f"{place}/study.zarr", *study.design_words()]
        _compare.measure([*words, "--output", f"{place}/fit.zarr"])

        def clear() -> None:
            for name in ("ours", "theirs"):
                shutil.rmtree(place / name, ignore_errors=True)

        theirs = [_compare.PYTHON, "-m", "benchmarks._nilearn", *study.words()]
        theirs += ["--contrasts", str(N_CONTRASTS), "--output", f"{place}/theirs"]
        ours = [_compare.PYTHON, "-m", "benchmarks.new_contrasts", f"{place}/fit.zarr", f"{place}/ours"]
        commands = [
            _compare.Command("nilearn: fit and 20 contrasts", theirs, clear),
            _compare.Command("chunkglm: 20 contrasts of a saved fit", ours, clear),
        ]
        found = _compare.take_turns(commands, options.repeats, warmup=options.warmup, touch=options.touch)
    print(_compare.describe_machine() + "\n")
    goals = {"chunkglm: 20 contrasts of a saved fit": "50 to 200 times"}
    _compare.print_comparison(found, "nilearn: fit and 20 contrasts", goals)


if __name__ == "__main__":
    test_contrasts(sys.argv[1], Path(sys.argv[2]))
