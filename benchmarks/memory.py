"""Peak memory of ``chunkglm run`` as runs grow longer and more, under other budgets, and at the smallest one.

Each job is a process of its own; its peak is what the system counted, and what the imports take is measured in the same way and
taken off. What is projected is what ``chunkglm run --plan`` says. The smallest budget is what the plan asks for when it is
given too little; that less is refused is tried, and its speed is held against that of the default, in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import _compare, _study
from chunkglm.budget import DEFAULT
from chunkglm.plan import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

IMPORTS = "import chunkglm.cli, zarr, xarray, scipy.ndimage"


class Case(NamedTuple):
    """A job: runs, how many times the volumes, the budget, smoothing in mm, and other options."""

    n_runs: int
    longer: int
    memory: str
    fwhm: float | None
    options: tuple[str, ...] = ()


CASES = (
    Case(1, 1, "2GiB", None),
    Case(1, 1, "2GiB", 5.0),
    Case(1, 4, "2GiB", 5.0),
    Case(8, 1, "2GiB", 5.0),
    Case(2, 1, "256MiB", 5.0),
    Case(2, 1, "512MiB", 5.0),
    Case(2, 1, "4GiB", 5.0),
    Case(2, 1, "2GiB", None, ("--noise-model", "ar3")),
    Case(2, 1, "2GiB", None, ("--contrast", "all=DSt; SSt; DSp; SSp")),
    Case(2, 1, "2GiB", None, ("--n-threads", "4")),
)

SMALLEST = Case(2, 1, "1MiB", 5.0)
"""The job whose smallest budget is looked for: the budget here is too little."""


def words_of(case: Case, n_volumes: int, shape: Sequence[int], n_voxels: int, output: str) -> list[str]:
    """Arguments of ``chunkglm``."""
    study = _study.make_study(min(case.n_runs, 2), n_volumes * case.longer, shape, n_voxels)
    copies = -(-case.n_runs // len(study.runs))
    study = study._replace(
        runs=(study.runs * copies)[: case.n_runs], designs=(study.designs * copies)[: case.n_runs]
    )
    words = [
        "run",
        *study.words(),
        "--contrast",
        "diff=DSt - SSt",
        "--output",
        output,
        "--memory",
        case.memory,
    ]
    if case.fwhm is not None:
        words += ["--smoothing-fwhm", str(case.fwhm)]
    return [*words, *case.options]


def plan_of(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """What ``--plan`` says of a job."""
    command = [_compare.PYTHON, "-m", "chunkglm", *words, "--plan", "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=_compare.ROOT)


def job(words: Sequence[str]) -> _compare.Measured:
    """Measure ``chunkglm run``."""
    return _compare.measure([_compare.PYTHON, "-m", "chunkglm", "-q", *words])


def main(arguments: list[str]) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=_study.SHAPE)
    parser.add_argument("--volumes", type=int, default=284)
    parser.add_argument("--voxels", type=int, default=240_000)
    parser.add_argument("--smallest", action="store_true", help="only the smallest budget")
    parser.add_argument("--repeats", type=int, default=3, help="turns of the smallest budget and the default")
    options = parser.parse_args(arguments)
    _study.CACHE.mkdir(exist_ok=True)
    imports = _compare.measure([_compare.PYTHON, "-c", IMPORTS]).memory
    print(f"{_compare.describe_machine()}\n\nimports: {format_bytes(imports)}\n")
    if not options.smallest:
        print_cases(options, imports)
    print_smallest(options, imports)


def print_cases(options: argparse.Namespace, imports: int) -> None:
    """A row for each case."""
    print(
        "| runs | volumes | smoothing | options | --memory | one run as float32 | peak above imports | projected | measured of "
        "projected | part of one run | wall s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        n_volumes = options.volumes * case.longer
        with tempfile.TemporaryDirectory(dir=_study.CACHE) as folder:
            words = words_of(case, options.volumes, options.shape, options.voxels, f"{folder}/out")
            projected = json.loads(plan_of(words).stdout)["peak"]
            measured = job(words)
        raw, above = 4 * math.prod(options.shape) * n_volumes, measured.memory - imports
        cells = [
            case.n_runs,
            n_volumes,
            "none" if case.fwhm is None else f"{case.fwhm:g} mm",
            " ".join(case.options),
            case.memory,
            format_bytes(raw),
            format_bytes(above),
            format_bytes(projected),
            f"{above / projected:.2f}",
            f"{above / raw:.2f}",
            f"{measured.wall:.1f}",
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print()


def print_smallest(options: argparse.Namespace, imports: int) -> None:
    """The smallest budget, and its speed against the default."""
    with tempfile.TemporaryDirectory(dir=_study.CACHE) as folder:

        def words(memory: str, output: str) -> list[str]:
            case = SMALLEST._replace(memory=memory)
            return words_of(case, options.volumes, options.shape, options.voxels, f"{folder}/{output}")

        refused = plan_of(words(SMALLEST.memory, "none")).stderr
        asked = re.search(r"Allow (\d+)MiB or more", refused)
        if asked is None:
            raise RuntimeError(f"No amount of memory is asked for: {refused}")
        least = int(asked[1])
        less = plan_of(words(f"{least - 1}MiB", "none"))
        print(f"smallest budget: {least} MiB; {least - 1} MiB: {less.stderr.strip()}\n")
        found: dict[str, list[_compare.Measured]] = {f"{least}MiB": [], DEFAULT: []}
        for turn in range(options.repeats):
            for memory, measured in found.items():
                measured.append(job(words(memory, f"{memory}-{turn}")))
        print(
            "| --memory | projected | peak above imports | wall s | cpu s | time over that of the default |"
        )
        print("|---|---|---|---|---|---|")
        for memory, measured in found.items():
            projected = json.loads(plan_of(words(memory, "none")).stdout)["peak"]
            ratios = [one.wall / other.wall for one, other in zip(measured, found[DEFAULT], strict=True)]
            cells = [
                memory,
                format_bytes(projected),
                format_bytes(max(one.memory for one in measured) - imports),
                _compare.spread([one.wall for one in measured]),
                _compare.spread([one.cpu for one in measured]),
                "" if memory == DEFAULT else _compare.spread(ratios, 2),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)
