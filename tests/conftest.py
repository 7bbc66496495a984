"""Fixtures that several files of tests share."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import settings

from chunkglm import grids
from chunkglm.testing import simulate_run

settings.register_profile("local", deadline=None, max_examples=15)
settings.register_profile("ci", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")

REAL_DATA, REQUIRED = "CHUNKGLM_REAL_DATA", "CHUNKGLM_REQUIRE_REAL_DATA"


@pytest.fixture(scope="session")
def real_data():
    """The folder of real recordings."""
    where = os.environ.get(REAL_DATA)
    if where and Path(where).is_dir():
        return Path(where)
    reason = f"{REAL_DATA} names no folder of real recordings ({where!r})"
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason}, and {REQUIRED} is 1")
    return pytest.skip(reason)


@pytest.fixture
def cluster():
    """A cluster of two workers in this process, as the default scheduler; on any free ports."""
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    options = {"n_workers": 2, "threads_per_worker": 2, "processes": False, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as local, distributed.Client(local):
        yield local


def on_grid(run):
    """The run with coordinates of its grid, as open_run gives them."""
    affine = np.array(run.attrs["affine"])
    return run.assign_coords(grids.grid_coords(affine, run["mask"].shape, b""))


@pytest.fixture(scope="session")
def two_runs():
    """Two small simulated runs of one brain, in memory, of 60 and 46 volumes."""
    shape = (9, 10, 8)
    first = simulate_run(shape=shape, n_volumes=60, seed=1)
    second = simulate_run(shape=shape, n_volumes=46, seed=1, session=1)
    return {"a": on_grid(first), "b": on_grid(second)}


@pytest.fixture(scope="session")
def two_designs(two_runs):
    return {label: run["design"].to_pandas() for label, run in two_runs.items()}


@pytest.fixture(scope="session")
def volume():
    """A function that makes a run of any array (time, z, y, x): on a grid, all voxels in the mask."""
    import xarray as xr

    def make(bold, mask=None, t_r=2.0):
        bold = np.asarray(bold)
        space = ("z", "y", "x")
        ds = xr.Dataset(
            {
                "bold": (("time", *space), bold),
                "mask": (space, np.ones(bold.shape[1:], bool) if mask is None else mask),
            },
            coords=grids.grid_coords(np.diag([3.0, 3.0, 3.0, 1.0]), bold.shape[1:], b""),
        )
        return ds.assign_coords(time=t_r * np.arange(len(bold)))

    return make


@pytest.fixture(scope="session")
def make_design():
    """A function that makes a design: slow random regressors, drift and constant."""

    def make(n_volumes, names=("face", "house", "cat"), seed=0, n_drifts=2):
        rng = np.random.default_rng(seed)
        smooth = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)
        columns = {name: np.convolve(rng.standard_normal(n_volumes + 12), smooth, "valid") for name in names}
        angles = np.pi * (np.arange(n_volumes) + 0.5) / n_volumes
        columns |= {f"drift_{k + 1}": np.cos((k + 1) * angles) for k in range(n_drifts)}
        return pd.DataFrame(columns | {"constant": np.ones(n_volumes)})

    return make


def pytest_addoption(parser):
    """How much of the slow evidence is gathered."""
    parser.addoption("--kills", type=int, default=20, help="processes that are killed at random instants")
    parser.addoption(
        "--worker-kills", type=int, default=3, help="workers that are killed, paused or restarted"
    )
    parser.addoption("--flips", type=int, default=50, help="bits that are flipped in stores")


SLOW = ("test_benchmarks", "test_cluster", "test_cluster_page", "test_memory", "test_notebooks")
"""Files of tests that take minutes: they start, measure and kill processes."""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def n_kills(request):
    return request.config.getoption("--kills")


@pytest.fixture
def n_worker_kills(request):
    return request.config.getoption("--worker-kills")


@pytest.fixture
def n_flips(request):
    return request.config.getoption("--flips")
