"""Peak memory of ``chunkglm run`` as runs grow longer and more, and under other budgets.

Each job is a process of its own; its peak is what the system counted, and what the imports take is measured in the same way and
taken off.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import _compare, _study
from chunkglm.plan import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

IMPORTS = "import chunkglm.cli, zarr, xarray, scipy.ndimage"


class Case(NamedTuple):
    """A job: runs, how many times the volumes, the budget, smoothing in mm."""

    n_runs: int
    longer: int
    memory: str
    fwhm: float | None


CASES = (
    Case(1, 1, "2GiB", None),
    Case(1, 1, "2GiB", 5.0),
    Case(1, 4, "2GiB", 5.0),
    Case(8, 1, "2GiB", 5.0),
    Case(2, 1, "256MiB", 5.0),
    Case(2, 1, "512MiB", 5.0),
    Case(2, 1, "1GiB", 5.0),
    Case(2, 1, "4GiB", 5.0),
)


def job(case: Case, n_volumes: int, shape: Sequence[int], n_voxels: int) -> _compare.Measured:
    """Measure ``chunkglm run``."""
    study = _study.make_study(1, n_volumes * case.longer, shape, n_voxels)
    study = study._replace(runs=study.runs * case.n_runs, designs=study.designs * case.n_runs)
    with tempfile.TemporaryDirectory(dir=_study.CACHE) as folder:
        words = [
            _compare.PYTHON,
            "-m",
            "chunkglm",
            "-q",
            "run",
            *study.words(),
            "--contrast",
            "diff=DSt - SSt",
        ]
        words += ["--output", f"{folder}/out", "--memory", case.memory]
        if case.fwhm is not None:
            words += ["--smoothing-fwhm", str(case.fwhm)]
        return _compare.measure(words)


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=_study.SHAPE)
    parser.add_argument("--volumes", type=int, default=284)
    parser.add_argument("--voxels", type=int, default=240_000)
    options = parser.parse_args(arguments)
    imports = _compare.measure([_compare.PYTHON, "-c", IMPORTS]).memory
    print(f"{_compare.describe_machine()}\n\nimports: {format_bytes(imports)}\n")
    print(
        "| runs | volumes | smoothing | --memory | one run as float32 | peak above imports | part of one run | wall s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        n_volumes = options.volumes * case.longer
        measured = job(case, options.volumes, options.shape, options.voxels)
        raw, above = 4 * math.prod(options.shape) * n_volumes, measured.memory - imports
        cells = [
            case.n_runs,
            n_volumes,
            "none" if case.fwhm is None else f"{case.fwhm:g} mm",
            case.memory,
            format_bytes(raw),
            format_bytes(above),
            f"{above / raw:.2f}",
            f"{measured.wall:.1f}",
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
