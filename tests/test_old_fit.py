"""New questions of an old fit: saved, opened where the runs are gone, and read no further than it must be."""

import shutil
import sys
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import xarray as xr

import chunkglm as cg
from chunkglm.testing import raise_if_computes, write_simulated_run

CHUNKS = {"z": 5, "y": 4, "x": 8}
LENGTHS = (60, 46, 50)

_opened: list[str] | None = None


def _watch(event, arguments):
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes | Path):
        _opened.append(str(arguments[0]))


# Python itself tells of every file that is opened, by whatever function, in whatever thread. A hook cannot be taken back.
sys.addaudithook(_watch)


class Watching:
    """Names of the chunk files below a folder that are opened."""

    def __init__(self, folder):
        self._folder = Path(folder)

    def __enter__(self):
        global _opened  # noqa: PLW0603
        _opened = []
        return self

    def __exit__(self, *_):
        global _opened
        self.opened, _opened = _opened, None

    @property
    def chunks(self):
        paths = [Path(name) for name in self.opened]
        inside = [path.relative_to(self._folder) for path in paths if path.is_relative_to(self._folder)]
        return [path.as_posix() for path in inside if "c" in path.parts]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three run stores, their designs, and the fit of them, saved."""
    folder = tmp_path_factory.mktemp("study")
    designs, runs = {}, {}
    for number, n in enumerate(LENGTHS, start=1):
        nifti, label = folder / f"{number}.nii", str(number)
        truth = write_simulated_run(nifti, shape=(8, 9, 10), n_volumes=n, seed=1, session=number)
        mask = cg.to_nifti(truth["mask"].astype(np.uint8).assign_coords(_grid_of(truth)))
        runs[label] = cg.convert(nifti, folder / "runs.zarr" / f"run-{label}", mask=mask)
        designs[label] = truth["design"].to_pandas()
    designs["2"] = designs["2"].drop(columns="DSp")
    cg.save(fit_of(runs, designs), folder / "fit.zarr")
    return folder, designs


def _grid_of(truth):
    from chunkglm import grids

    return grids.grid_coords(np.array(truth.attrs["affine"]), truth["mask"].shape, b"")


def fit_of(runs, designs):
    """The fit in several voxel blocks."""
    return cg.fit({label: run.chunk(CHUNKS) for label, run in runs.items()}, designs)


def fresh_fit(study):
    folder, designs = study
    return fit_of({label: cg.open_run(folder / "runs.zarr" / f"run-{label}") for label in designs}, designs)


@pytest.fixture(scope="module")
def fresh(study):
    return fresh_fit(study).persist()


@pytest.fixture
def old(study, tmp_path):
    """The saved fit at another place, where there is no run store."""
    folder, _ = study
    shutil.copytree(folder / "fit.zarr", tmp_path / "elsewhere" / "fit.zarr")
    return cg.open_store(tmp_path / "elsewhere" / "fit.zarr")


# Run 2 lacks DSp.
QUESTIONS = {
    "t": lambda fit: cg.contrast(fit, "DSt - SSt"),
    "several t": lambda fit: cg.contrast(fit, {"a": "DSt - SSt", "b": "0.5*SSp + 0.5*SSt"}),
    "F": lambda fit: cg.contrast(fit, ["DSt - SSt", "SSp"]),
    "fixed effects": lambda fit: cg.fixed_effects(cg.contrast(fit, "DSt - SSt")),
    "weighted fixed effects of F": lambda fit: cg.fixed_effects(
        cg.contrast(fit, ["DSt", "SSp"]), precision_weighted=True
    ),
    "leave one out": lambda fit: cg.leave_one_out(cg.contrast(fit, "DSt - SSt")),
    "leave one out of F": lambda fit: cg.leave_one_out(
        cg.contrast(fit, {"a": ["DSt", "SSp"], "b": ["SSt", "SSp"]})
    ),
    "some runs": lambda fit: cg.fixed_effects(cg.contrast(fit.sel(run=["1", "3"]), "DSp - SSp")),
    "a run less": lambda fit: cg.fixed_effects(cg.contrast(fit.drop_sel(run="2"), "DSp - SSp")),
    "one run": lambda fit: cg.contrast(fit.sel(run="3"), "DSp"),
    "some voxels": lambda fit: cg.contrast(fit.isel(z=slice(2, 7), y=3), "DSt"),
}


def is_lazy(ds, names=("effect", "stat", "p_value", "z_score")):
    return all(ds[name].chunks is not None for name in names)


@pytest.mark.parametrize("question", QUESTIONS)
def test_old_fit__answers_like_a_fresh_one(fresh, old, question):
    with raise_if_computes():
        got = QUESTIONS[question](old)
    assert is_lazy(got)
    expected = QUESTIONS[question](fresh)
    assert np.isfinite(expected["stat"]).any()
    for ds in (got, expected):
        for key in ("chunkglm_version", "package_versions"):
            ds.attrs.pop(key, None)
    xr.testing.assert_identical(got.compute(), expected.compute())


def test_old_fit__is_what_was_fitted(fresh, old):
    xr.testing.assert_equal(old.compute(), fresh.compute())
    assert old.attrs | fresh.attrs == old.attrs
    with raise_if_computes(), pytest.raises(AssertionError, match="should be lazy"):
        old["beta"].compute()


def test_old_fit__dropped_runs_are_those_of_a_fit_without_them(study, old):
    """Not only like the fresh fit less a run: like a fit that never had it."""
    folder, designs = study
    some = {label: designs[label] for label in ("1", "3")}
    runs = {label: cg.open_run(folder / "runs.zarr" / f"run-{label}") for label in some}
    expected = cg.fixed_effects(cg.contrast(fit_of(runs, some), "DSp - SSt"))
    with raise_if_computes():
        got = [
            cg.fixed_effects(cg.contrast(fit, "DSp - SSt"))
            for fit in (old.sel(run=["1", "3"]), old.drop_sel(run="2"))
        ]
    for one in got:
        assert one.attrs["combined"] == ["1", "3"]
        for name in ("effect", "variance", "dof", "stat", "z_score", "n_runs"):
            np.testing.assert_array_equal(one[name], expected[name])


# ------------------------------------------------------------------------------------------------ what is read


def of_bold(chunks):
    return [name for name in chunks if "/bold/" in name]


def test_old_fit__a_new_question_reads_no_signal(study):
    """The run stores are there, and nothing of them is read; nor any chunk at all before the maps are asked for."""
    folder, _ = study
    opened = cg.open_store(folder / "fit.zarr")
    with Watching(folder) as before:
        fixed = cg.fixed_effects(cg.contrast(opened, "DSt - SSp"))
        left_out = cg.leave_one_out(cg.contrast(opened, "DSt - SSp"))
    assert before.chunks == []
    with Watching(folder) as after:
        maps = fixed["z_score"].compute()
        left_out["z_score"].compute()
    assert np.isfinite(maps).any()
    assert {name.split("/")[:2][1] for name in after.chunks} == {"beta", "sigma2", "rho"}
    assert {name.split("/")[0] for name in after.chunks} == {"fit.zarr"}
    # The same counter sees the signal where a fit is made of it.
    with Watching(folder) as lazily:
        fit = fresh_fit(study)
    assert of_bold(lazily.chunks) == []
    with Watching(folder) as fitting:
        cg.fixed_effects(cg.contrast(fit, "DSt - SSp"))["z_score"].compute()
    stored = {
        path.relative_to(folder).as_posix() for path in (folder / "runs.zarr").glob("run-*/bold/c/*/*/*/*")
    }
    assert len(stored) >= len(LENGTHS)
    assert set(of_bold(fitting.chunks)) == stored


def test_old_fit__the_counter_sees_every_way_of_reading(study):
    """Through chunkglm, through zarr, through plain xarray, and from threads."""
    folder, _ = study
    bold = "runs.zarr/run-1/bold/c/0/0/0/0"
    opened = cg.open_run(folder / "runs.zarr" / "run-1")
    strided = da.from_array(np.arange(3)).map_blocks(lambda block: opened["bold"].values[block])
    plain = xr.open_zarr(folder / "runs.zarr" / "run-1", consolidated=False)
    for read in (
        lambda: opened["bold"].compute(scheduler="sync"),
        lambda: opened["bold"].compute(scheduler="threads"),
        lambda: strided.compute(scheduler="threads"),
        plain["bold"].compute,
        lambda: cg.verify(folder / "runs.zarr" / "run-1"),
    ):
        with Watching(folder) as seen:
            read()
        assert bold in seen.chunks
    with Watching(folder) as seen:
        opened["bold"].isel(time=0)
    assert seen.chunks == []


def test_old_fit__opening_reads_no_map(study):
    folder, _ = study
    with Watching(folder) as seen:
        cg.open_store(folder / "fit.zarr")
    assert {"fit.zarr/design/c/0/0/0", "fit.zarr/run/c/0"} <= set(seen.chunks)
    maps = ("beta", "sigma2", "rho", "rho_at_limit", "mask")
    assert [name for name in seen.chunks if name.split("/")[1] in maps] == []


@pytest.mark.parametrize("block", [(0, 0, 0), (1, 1, 0), (1, 2, 0)])
def test_old_fit__one_block_of_one_map_reads_the_chunks_of_that_block(study, block):
    folder, _ = study
    opened = cg.open_store(folder / "fit.zarr")
    assert opened["sigma2"].data.numblocks == (3, 2, 3, 1)
    place = "/".join(map(str, block))
    voxels = {
        dim: slice(number * length, (number + 1) * length)
        for (dim, length), number in zip(CHUNKS.items(), block, strict=True)
    }

    def chunks_of(runs):
        names = [f"{name}/c/{run}/0" for name in ("beta", "rho") for run in runs]
        return sorted(f"fit.zarr/{name}/{place}" for name in [*names, *(f"sigma2/c/{run}" for run in runs)])

    result = cg.contrast(opened, {"a": "DSt - SSp", "b": "SSt"})
    fixed, left_out = cg.fixed_effects(result), cg.leave_one_out(result)
    with Watching(folder) as seen:
        result["effect"].sel(contrast="a", run="2").isel(voxels).compute()
    assert sorted(seen.chunks) == chunks_of([1])
    for ds in (fixed, left_out):
        with Watching(folder) as seen:
            ds["z_score"].sel(contrast="b").isel(voxels).compute()
        assert sorted(seen.chunks) == chunks_of([0, 1, 2])  # each of them once


def test_old_fit__another_run_is_added_without_reading_the_others(study, fresh, tmp_path):
    folder, designs = study
    two = cg.save(cg.open_store(folder / "fit.zarr").isel(run=[0, 1]), tmp_path / "two.zarr")
    run = cg.open_run(folder / "runs.zarr" / "run-3").chunk(CHUNKS)
    with Watching(folder) as before:
        fit = cg.append_run(two, run, designs["3"])
    assert before.chunks == []
    with Watching(folder) as seen:
        saved = cg.save(fit, tmp_path / "three.zarr")
    assert {name.split("/")[1] for name in of_bold(seen.chunks)} == {"run-3"}
    xr.testing.assert_equal(saved.compute(), fresh.compute())
