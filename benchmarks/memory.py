"""Peak memory of ``chunkglm run`` as runs grow longer and more.

Simulated 91 x 109 x 91 runs (int16, two millimetres) are streamed to disk once and kept in ``benchmarks/cache``. Each job is a
process of its own; its peak is what the system counted, and what the imports take is measured in the same way and taken off.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from chunkglm.plan import format_bytes
from chunkglm.testing import write_simulated_run

if TYPE_CHECKING:
    from collections.abc import Sequence

CACHE = Path(__file__).parent / "cache"
SHAPE = (91, 109, 91)


def simulated(n_volumes: int, shape: Sequence[int] = SHAPE) -> tuple[Path, Path, Path]:
    """Run, design and mask; made if they are not there."""
    CACHE.mkdir(exist_ok=True)
    stem = "x".join(map(str, (*shape, n_volumes)))
    run, design, mask = (CACHE / f"{stem}{suffix}" for suffix in (".nii.gz", "_design.npz", "_mask.nii.gz"))
    if not (run.exists() and design.exists() and mask.exists()):
        write_simulated_run(
            run, design, mask, shape=tuple(shape), n_volumes=n_volumes, voxel_size=2.0, overwrite=True
        )
    return run, design, mask


def measure(command: Sequence[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        sys.exit(message.decode())
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def job(
    n_runs: int, n_volumes: int, shape: Sequence[int], memory: str, fwhm: float | None
) -> tuple[float, int]:
    """Measure ``chunkglm run``."""
    run, design, mask = simulated(n_volumes, shape)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "chunkglm", "-q", "run", *[str(run)] * n_runs]
        command += [word for _ in range(n_runs) for word in ("--design", str(design))]
        command += [
            "--mask",
            str(mask),
            "--contrast",
            "diff=DSt - SSt",
            "--output",
            f"{folder}/out",
            "--memory",
            memory,
        ]
        if fwhm is not None:
            command += ["--smoothing-fwhm", str(fwhm)]
        return measure(command)


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE)
    parser.add_argument("--volumes", type=int, default=284)
    parser.add_argument("--memory", default="2GiB")
    options = parser.parse_args(arguments)
    _, imports = measure([sys.executable, "-c", "import chunkglm.cli, zarr, xarray, scipy.ndimage"])
    voxels = options.shape[0] * options.shape[1] * options.shape[2]
    print(f"imports: {format_bytes(imports)}; shape {tuple(options.shape)}, --memory {options.memory}\n")
    print(
        "| runs | volumes | smoothing | one run as float32 | peak above imports | part of one run | wall s |"
    )
    print("|---|---|---|---|---|---|---|")
    cases = [(1, 1, None), (1, 1, 5.0), (1, 4, 5.0), (4, 1, 5.0), (8, 1, 5.0)]
    for n_runs, longer, fwhm in cases:
        n_volumes = options.volumes * longer
        seconds, peak = job(n_runs, n_volumes, options.shape, options.memory, fwhm)
        raw = voxels * n_volumes * 4
        above = peak - imports
        smoothing = "none" if fwhm is None else f"{fwhm:g} mm"
        cells = [
            n_runs,
            n_volumes,
            smoothing,
            format_bytes(raw),
            format_bytes(above),
            f"{above / raw:.2f}",
            f"{seconds:.1f}",
        ]
        print("| " + " | ".join(map(str, cells)) + " |")
