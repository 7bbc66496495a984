"""Memory stays bounded: peaks of whole processes."""

import sys

import pytest

import chunkglm as cg
from chunkglm.testing import peak_rss, write_simulated_run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="peak memory is measured with getrusage")

SHAPE = (64, 64, 40)
MIB = 2**20
SETUP = """
import warnings
import numpy as np, scipy.ndimage, xarray as xr, zarr
import chunkglm.cli, chunkglm as cg
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for volumes in (160, 640):
        write_simulated_run(
            folder / f"{volumes}.nii",
            folder / f"{volumes}_design.npz",
            folder / "mask.nii.gz",
            shape=SHAPE,
            n_volumes=volumes,
            overwrite=True,
        )
    return folder


def peak_of(arguments):
    """Peak of a command above its imports, in MiB."""
    statements = f"try:\n    chunkglm.cli.main({arguments!r})\nexcept SystemExit as e:\n    assert not e.code"
    base, peak = peak_rss(statements, setup=SETUP)
    return (peak - base) / MIB


def peak_of_run(data, output, n_runs, volumes, memory="1GiB"):
    """Peak of the whole job above its imports, in MiB."""
    arguments = ["-q", "run", *[str(data / f"{volumes}.nii")] * n_runs]
    arguments += [word for _ in range(n_runs) for word in ("--design", str(data / f"{volumes}_design.npz"))]
    arguments += ["--mask", str(data / "mask.nii.gz"), "--contrast", "d=DSt - SSt", "--smoothing-fwhm", "5"]
    arguments += ["--output", str(output), "--memory", memory]
    return peak_of(arguments)


def test_peak__does_not_grow_with_volumes_or_runs_and_keeps_to_the_budget(data, tmp_path):
    # Which thread is where at the peak is chance: the higher of two is nearer to what can be.
    short = max(peak_of_run(data, tmp_path / f"short{n}", 1, 160, memory="160MiB") for n in (1, 2))
    long = peak_of_run(data, tmp_path / "long", 1, 640, memory="160MiB")
    many = peak_of_run(data, tmp_path / "many", 4, 160, memory="160MiB")
    raw = 640 * 64 * 64 * 40 * 4 / MIB
    # The longer design has more drifts, and so more sums.
    assert long < 1.15 * short + 24, "four times the volumes"
    assert many < 1.15 * short + 24, "four times the runs"
    assert max(short, long, many) < 160, "the budget"
    assert long < raw / 2


def test_peak__of_an_export_is_a_few_blocks(data, tmp_path):
    store, back = tmp_path / "run.zarr", tmp_path / "back.nii"
    cg.convert(data / "640.nii", store)
    peak = peak_of(["export", str(store), "--output", str(back)])
    raw = 640 * 64 * 64 * 40 * 2 / MIB
    assert peak < raw / 1.5
    assert back.read_bytes() == (data / "640.nii").read_bytes()
