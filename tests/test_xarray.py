"""What users do with xarray: every result is exported in its place, or refused with words that help."""

import pickle

import cloudpickle
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import chunkglm as cg
from chunkglm import grids
from chunkglm.cli import main
from chunkglm.errors import GridMismatchError, InputError
from chunkglm.schema import SPACE
from chunkglm.testing import write_simulated_run

SHAPE, N_TIME, T_R = (7, 8, 9), 12, 2.0  # x, y, z
TURN = np.array([[0.94, -0.32, 0.1], [0.33, 0.93, -0.17], [-0.04, 0.19, 0.98]])
AFFINES = {
    "aligned": nib.affines.from_matvec(np.diag([3.0, 3.3, 2.7]), [-40, -50.55, -31.3]),
    "descending": nib.affines.from_matvec(np.diag([-3.0, 3.0, 4.0]), [40, -50, -31]),
    "oblique": nib.affines.from_matvec(TURN * [-2.5, 3.0, 3.5], [20, -31.3, 12.7]),
}


def write_run(path, affine, number=1, noise=False):
    """A run whose every value is its own place: 1000 (t + 1) + 100 z + 10 y + x, or noise around 1000."""
    t, z, y, x = np.indices((N_TIME, *SHAPE[::-1]))
    values = 1000 * (t + number) + 100 * z + 10 * y + x
    if noise:
        values = np.random.default_rng(number).normal(1000, 50, values.shape)
    image = nib.Nifti1Image(np.round(values).T.astype(np.int16), affine)
    image.header.set_zooms((*image.header.get_zooms()[:3], T_R))
    image.header.set_xyzt_units("mm", "sec")
    # The headers of two runs are never the same.
    image.header["descrip"] = f"run {number}"
    image.to_filename(path)
    return path


def write_mask(path, affine):
    values = np.ones(SHAPE, np.uint8)
    values[2, 3, 4] = 0
    nib.Nifti1Image(values, affine).to_filename(path)
    return path


def make_study(folder, affines, noise=False):
    """A study with one run for each affine, all with the mask of the first."""
    mask = write_mask(folder / "mask.nii", affines[0])
    for number, affine in enumerate(affines, start=1):
        source = write_run(folder / f"run{number}.nii", affine, number, noise)
        cg.convert(source, folder / "study.zarr" / f"run-{number}", mask=mask)
    return folder / "study.zarr"


@pytest.fixture(scope="module", params=AFFINES)
def study(request, tmp_path_factory):
    """The affine of a grid, and a study of two runs on it; not to be changed."""
    affine = AFFINES[request.param]
    return affine, make_study(tmp_path_factory.mktemp(request.param), [affine, affine])


@pytest.fixture
def affine(study):
    return study[0]


@pytest.fixture
def tree(study):
    return cg.open_study(study[1])


@pytest.fixture
def run(tree):
    return tree["run-1"].to_dataset()


@pytest.fixture
def other(tree):
    return tree["run-2"].to_dataset()


def cut(affine, **steps):
    """The affine of every ``step``-th voxel from ``first`` on, along some dims."""
    voxels = np.eye(4)
    for dim, (first, step) in steps.items():
        axis = "xyz".index(dim)
        voxels[axis, axis], voxels[axis, 3] = step, first
    return affine @ voxels


def assert_in_place(array, affine, shape=SHAPE):
    """The exported image has this affine and these lengths along x, y, z, and the values of the array."""
    image = cg.to_nifti(array)
    np.testing.assert_allclose(image.affine, affine, rtol=0, atol=1e-4)
    assert image.shape[:3] == shape
    full = array.expand_dims([dim for dim in SPACE if dim not in array.dims])
    rest = [dim for dim in full.dims if dim not in SPACE]
    expected = full.transpose(*SPACE[::-1], *rest[::-1]).values
    assert image.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(image.dataobj), expected)


def labelled(runs):
    """Arrays of runs side by side, with labels."""
    return xr.concat(runs, xr.DataArray(["a", "b"], dims="run", name="run"))


def as_dates(array):
    return array.assign_coords(time=pd.Timestamp("2020-01-01") + pd.to_timedelta(array["time"].values, "s"))


def merged(run, other):
    maps = [run["bold"].mean("time").rename("first"), other["bold"].mean("time").rename("second")]
    return xr.merge(maps, join="exact", compat="override")["second"]


# ------------------------------------------------------------------------------------------------- part of the voxels

PARTS = {
    "a voxel by label": (lambda b: b.sel(x=b["x"][2]), {"x": (2, 1, 1)}),
    "voxels by label": (lambda b: b.sel(y=b["y"][[1, 3, 5]]), {"y": (1, 2, 3)}),
    "the nearest voxel": (lambda b: b.sel(z=float(b["z"][3]) + 0.2, method="nearest"), {"z": (3, 1, 1)}),
    "a range of labels": (
        lambda b: b.sel(x=slice(b["x"][1], b["x"][4]), y=slice(b["y"][2], None)),
        {"x": (1, 1, 4), "y": (2, 1, 6)},
    ),
    "a slice": (lambda b: b.isel(x=slice(2, None), z=slice(1, 5)), {"x": (2, 1, 5), "z": (1, 1, 4)}),
    "every other voxel": (lambda b: b.isel(y=slice(1, None, 2)), {"y": (1, 2, 4)}),
    "in reverse": (lambda b: b.isel(x=slice(None, None, -1)), {"x": (6, -1, 7)}),
    "every third in reverse": (lambda b: b[..., ::-3, :], {"y": (7, -3, 3)}),
    "a slice of a slice": (lambda b: b[:, 2:, ::2][:, ::-2, 1:], {"z": (8, -2, 4), "y": (2, 2, 3)}),
    "one slice, selected away": (lambda b: b.isel(z=5), {"z": (5, 1, 1)}),
    "one slice, squeezed": (lambda b: b.isel(z=[5]).squeeze(), {"z": (5, 1, 1)}),
    "one voxel": (lambda b: b.isel(x=1, y=2, z=3), {"x": (1, 1, 1), "y": (2, 1, 1), "z": (3, 1, 1)}),
    "numbers that are even": (lambda b: b.isel(x=[5, 3, 1]), {"x": (5, -2, 3)}),
    "where, dropping": (lambda b: b.where(b["y"] > b["y"][2], drop=True), {"y": (3, 1, 5)}),
    "reindexed": (lambda b: b.reindex(y=b["y"][::-1]), {"y": (7, -1, 8)}),
    "interpolated at voxels": (lambda b: b.load().interp(y=b["y"].values[2:5], z=b["z"][4]), {"y": (2, 1, 3), "z": (4, 1, 1)}),
    "head": (lambda b: b.head(x=3, time=2), {"x": (0, 1, 3)}),
    "differences of neighbours": (lambda b: b.diff("z", label="lower"), {"z": (0, 1, 8)}),
    "blocks of three, whose middles are voxels": (lambda b: b.coarsen(x=3, boundary="trim").mean(), {"x": (1, 3, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_part_of_the_voxels__is_in_its_place(run, affine, name):
    pick, steps = PARTS[name]
    lengths = {dim: length for dim, (_, _, length) in steps.items()}
    expected = cut(affine, **{dim: (first, step) for dim, (first, step, _) in steps.items()})
    shape = tuple(lengths.get(dim, n) for dim, n in zip("xyz", SHAPE, strict=True))
    part = pick(run["bold"])
    assert_in_place(part, expected, shape)
    # A map of it is there as well.
    assert_in_place(part.mean("time"), expected, shape)
    if "differences" not in name:
        # Every value says which voxel it is.
        first = np.asarray(cg.to_nifti(part).dataobj)[..., 0].astype(int)
        numbers = np.stack([first % 10, first // 10 % 10, first // 100 % 10], axis=-1)
        here = np.moveaxis(np.indices(shape), 0, -1)
        np.testing.assert_allclose(
            nib.affines.apply_affine(expected, here), nib.affines.apply_affine(affine, numbers), atol=1e-9
        )


def test_sortby__follows_the_labels(run, affine):
    """Labels of a descending axis come out ascending, with the voxels in reverse."""
    reverse = affine[0, 0] < 0 and run["x"].attrs["units"] == "mm"
    expected = cut(affine, x=(6, -1)) if reverse else affine
    assert_in_place(run["bold"].sortby("x"), expected)
    flat = run["bold"].stack(voxel=SPACE)
    assert_in_place(flat.unstack("voxel"), affine)
    with pytest.raises(InputError, match="needs z, y and x"):
        cg.to_nifti(flat)


def test_slice_order__is_forgotten_where_slices_are_in_reverse(run):
    header = nib.Nifti1Header(cg.to_nifti(run["bold"]).header.binaryblock)
    header["slice_code"], header["slice_end"] = 1, SHAPE[2] - 1
    bold = run["bold"].copy()
    raw = header.binaryblock + bytes(4)
    bold = bold.assign_coords(grids.grid_coords(grids.source_affine(bold), SHAPE[::-1], raw))
    bold = bold * 1
    assert int(cg.to_nifti(bold[2:]).header["slice_code"]) == 1
    assert int(cg.to_nifti(bold[:, :, ::-1]).header["slice_code"]) == 1
    assert int(cg.to_nifti(bold[:, ::-1]).header["slice_code"]) == 0
    assert int(cg.to_nifti(bold[:, 1:]).header["slice_code"]) == 0


# ---------------------------------------------------------------------------------------------------- all the voxels

WHOLE = {
    "as it is": lambda run, other: run["bold"],
    "a difference of runs": lambda run, other: run["bold"] - other["bold"],
    "a difference of maps": lambda run, other: run["bold"].mean("time") - other["bold"].std("time"),
    "less its mean": lambda run, other: run["bold"] - run["bold"].mean("time"),
    "a dataset times two": lambda run, other: (run * 2)["bold"],
    "minus": lambda run, other: -run["bold"],
    "a ufunc": lambda run, other: np.sqrt(run["bold"]),
    "a ufunc of two": lambda run, other: np.maximum(run["bold"], other["bold"]),
    "a comparison": lambda run, other: run["bold"] > 3000,
    "astype": lambda run, other: run["bold"].astype("f4"),
    "where": lambda run, other: run["bold"].where(run["mask"]),
    "where, otherwise another": lambda run, other: run["bold"].where(run["mask"], other["bold"]),
    "xr.where": lambda run, other: xr.where(run["mask"], run["bold"], other["bold"]),
    "fillna": lambda run, other: run["bold"].where(run["mask"]).fillna(0),
    "clip": lambda run, other: run["bold"].clip(1000, 2000),
    "rolling": lambda run, other: run["bold"].rolling(time=3, center=True).mean(),
    "coarsen over time": lambda run, other: run["bold"].coarsen(time=3).mean(),
    "resample": lambda run, other: as_dates(run["bold"]).resample(time="4s").mean(),
    "interpolated over time": lambda run, other: run["bold"].load().interp(time=np.arange(0, 20, 1.5)),
    "groupby_bins over time": lambda run, other: run["bold"].groupby_bins("time", 3).mean(),
    "differences over time": lambda run, other: run["bold"].diff("time"),
    "volumes by label": lambda run, other: run["bold"].sel(time=slice(4, 12)),
    "volumes by number": lambda run, other: run["bold"].isel(time=[0, 1, 5]),
    "rechunked": lambda run, other: run["bold"].chunk(x=3, time=5),
    "loaded": lambda run, other: run.load()["bold"],
    "computed": lambda run, other: run.compute()["bold"],
    "persisted": lambda run, other: run.persist()["bold"],
    "stacked and unstacked": lambda run, other: run["bold"].stack(voxel=SPACE).unstack("voxel"),
    "transposed": lambda run, other: run["bold"].transpose("x", "time", "z", "y"),
    "reversed dims": lambda run, other: run["bold"].T,
    "renamed": lambda run, other: run.rename(bold="signal")["signal"],
    "another coordinate": lambda run, other: run["bold"].assign_coords(trial=("time", np.arange(N_TIME))),
    "another dim": lambda run, other: run["bold"].expand_dims(subject=["s1"]),
    "assigned": lambda run, other: run.assign(z_map=run["bold"].mean("time") / run["bold"].std("time"))["z_map"],
    "from numpy": lambda run, other: run["mask"].copy(data=np.asarray(run["bold"][0])),
    "weighted": lambda run, other: run["bold"].weighted(run["time"]).mean("time"),
    "apply_ufunc": lambda run, other: xr.apply_ufunc(
        lambda values: values.mean(-1), run["bold"], input_core_dims=[["time"]], dask="parallelized", output_dtypes=[float]
    ),
    "map_blocks": lambda run, other: xr.map_blocks(lambda block: block * 2, run["bold"].chunk(x=3)),
    "a product over time": lambda run, other: xr.dot(run["bold"], run["time"], dim="time"),
    "a correlation": lambda run, other: xr.corr(run["bold"], other["bold"] ** 2, dim="time"),
    "runs concatenated": lambda run, other: xr.concat([run, other], "run")["bold"],
    "maps concatenated": lambda run, other: labelled([one["bold"].mean("time") for one in (run, other)]),
    "volumes concatenated": lambda run, other: xr.concat([run["bold"], other["bold"]], "time"),
    "a sum over runs": lambda run, other: labelled([run["bold"], other["bold"]]).sum("run"),
    "groupby, mean": lambda run, other: labelled([run["bold"], other["bold"]]).groupby("run").mean("time"),
    "groupby, map": lambda run, other: labelled([run["bold"], other["bold"]]).groupby("run").map(lambda b: b - b.mean("time")),
    "groupby, less its mean": lambda run, other: (
        labelled([run["bold"], other["bold"]]).groupby("run") - labelled([run["bold"], other["bold"]]).groupby("run").mean("time")
    ),
    "merged": merged,
    "pickled": lambda run, other: pickle.loads(pickle.dumps(run))["bold"],
    "cloudpickled": lambda run, other: cloudpickle.loads(cloudpickle.dumps(run))["bold"],
    "to a dict and back": lambda run, other: xr.Dataset.from_dict(run.to_dict())["bold"],
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_all_voxels__stay_in_their_place(run, other, affine, name):
    assert_in_place(WHOLE[name](run, other), affine)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    "name",
    ["a difference of runs", "less its mean", "where", "rolling", "runs concatenated", "maps concatenated", "groupby, mean",
     "groupby, map", "merged", "transposed"],
)  # fmt: skip
def test_keep_attrs__does_not_matter(run, other, affine, name, keep):
    with xr.set_options(keep_attrs=keep):
        assert_in_place(WHOLE[name](run, other), affine)


@pytest.mark.parametrize("name", ["a ufunc", "a ufunc of two", "xr.where", "apply_ufunc", "weighted"])
def test_attributes_that_xarray_drops__are_asked_for(run, other, affine, name):
    with xr.set_options(keep_attrs=False):
        lost = WHOLE[name](run, other)
    with pytest.raises(InputError, match=r"no voxel grid.*data.assign_coords\(run.mask.coords\)"):
        cg.to_nifti(lost)
    with pytest.raises(InputError, match=r"no coordinate 'x'.*data.assign_coords\(run.mask.coords\)"):
        cg.to_nifti(lost.assign_coords(grid=run["grid"]))
    assert_in_place(lost.assign_coords(run["mask"].coords), affine)


def test_quantile__needs_the_grid_again(run, affine):
    """It is one of the few that drop scalar coordinates."""
    median = run["bold"].load().quantile(0.5, "time")
    if "grid" not in median.coords:
        with pytest.raises(InputError, match=r"no voxel grid.*data.assign_coords\(grid=run.grid\)"):
            cg.to_nifti(median)
    assert_in_place(median.assign_coords(grid=run["grid"]), affine)


def test_trees__keep_the_places_of_their_runs(tree, affine):
    mapped = tree.map_over_datasets(lambda ds: ds.mean("time") if "time" in ds.dims else ds)
    cuts = tree.map_over_datasets(lambda ds: ds.isel(x=slice(2, None)) if "x" in ds.dims else ds)
    for number, label in enumerate(("run-1", "run-2"), start=1):
        for whole in (
            tree,
            tree * 2,
            tree.mean("time"),
            mapped,
            tree.load(),
            pickle.loads(pickle.dumps(tree)),
        ):
            assert_in_place(whole[label]["bold"], affine)
        np.testing.assert_allclose(mapped[label]["bold"][0, 0, 0], 1000 * (number + (N_TIME - 1) / 2))
        assert_in_place(cuts[label]["bold"], cut(affine, x=(2, 1)), (5, 8, 9))


REFUSED = {
    "numbers that are uneven": (lambda b: b.isel(x=[0, 1, 4]), "'x' are not evenly spaced.*Select with a slice"),
    "a voxel twice": (lambda b: b.isel(y=[2, 2]), "'y' are not evenly spaced.*Select with a slice"),
    "blocks of two": (
        lambda b: b.coarsen(y=2).mean(),
        "'y' are not evenly spaced.*lie between them, as after coarsen or interp.*Export before averaging",
    ),
    "one block of two": (lambda b: b[:, :2].coarsen(z=2).mean(), "'z' are not evenly spaced.*lie between them"),
    "between voxels": (
        lambda b: b.load().interp(z=(b["z"].values[1:] + b["z"].values[:-1]) / 2),
        "'z' are not evenly spaced.*lie between them",
    ),
    "moved": (
        lambda b: b.assign_coords(z=("z", b["z"].values + 0.4, b["z"].attrs)),
        "'z' are not evenly spaced.*lie between them",
    ),
    "rolled around the end": (lambda b: b.roll(x=1, roll_coords=True), "'x' are not evenly spaced"),
    "padded": (lambda b: b.pad(x=1), "'x' are not evenly spaced"),
    "planes of a mask, dropping": (
        lambda b: b.where(b["z"].isin(b["z"][[0, 1, 5]]), drop=True), "'z' are not evenly spaced.*Select with a slice",
    ),
    "labels without units": (lambda b: b.assign_coords(x=b["x"].values), "no coordinate 'x' with the units.*assign_coords"),
    "one slice, its place dropped": (lambda b: b.isel(z=3, drop=True), "needs z, y and x"),
    "a projection": (lambda b: b.max("x"), "needs z, y and x"),
    "a dim of another name": (lambda b: b.rename(x="i"), "needs z, y and x"),
    "no grid": (lambda b: b.drop_vars("grid"), r"no voxel grid.*assign_coords\(grid=run.grid\)"),
    "no voxel": (lambda b: b.sel(z=slice(900, 1000)), "at least one value"),
    "all of a dataset": (lambda b: b.to_dataset(name="bold"), "give one variable of it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_voxels_without_a_place__are_refused_clearly(run, name):
    change, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        cg.to_nifti(change(run["bold"]))


def test_to_dataframe__tells_the_place_of_a_voxel(run):
    frame = run["bold"].isel(x=1, y=2, z=3).to_dataframe()
    assert frame["bold"].tolist() == [1000 * (t + 1) + 321 for t in range(N_TIME)]
    assert frame.index.tolist() == [T_R * t for t in range(N_TIME)]
    np.testing.assert_array_equal(frame[["x", "y", "z"]].iloc[0], [float(run[dim][n]) for dim, n in zip("xyz", (1, 2, 3), strict=True)])  # fmt: skip


def test_plot__draws_slices_series_and_histograms(run):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    try:
        mesh = run["mean_image"].isel(z=3).plot()
        units = run["x"].attrs["units"]
        assert mesh.axes.get_xlabel() == f"x [{units}]"
        plt.figure()
        (line,) = run["bold"].isel(x=1, y=2, z=3).plot()
        np.testing.assert_array_equal(line.get_ydata(), run["bold"][:, 3, 2, 1])
        plt.figure()
        run["bold"].isel(time=0).plot.hist()
        run["mean_image"].plot.imshow(col="z", col_wrap=3)
    finally:
        plt.close("all")


# ------------------------------------------------------------------------------------------------------------- files


def test_plain_zarr__keeps_the_places(run, affine, tmp_path):
    run.to_zarr(tmp_path / "run.zarr", consolidated=False)
    opened = xr.open_zarr(tmp_path / "run.zarr", consolidated=False)
    xr.testing.assert_equal(opened, run)
    assert_in_place(opened["bold"], affine)
    change = (run["bold"][::2, 1:, :, ::-1] * 0.5).mean("time")
    change.to_dataset(name="change").to_zarr(tmp_path / "map.zarr", consolidated=False)
    opened = xr.open_zarr(tmp_path / "map.zarr", consolidated=False)
    assert "grid" in opened.coords
    assert_in_place(opened["change"], cut(affine, z=(1, 1), x=(6, -1)), (7, 8, 8))


@pytest.mark.parametrize("engine", ["h5netcdf", "scipy"])
def test_netcdf__keeps_the_places(run, affine, tmp_path, engine):
    """The classic format of scipy has no lists of texts, which the attributes of a run are."""
    if engine == "h5netcdf":
        pytest.importorskip("h5netcdf")
        pytest.importorskip("h5py")
    written = run if engine == "h5netcdf" else run.drop_attrs(deep=False)
    written.to_netcdf(tmp_path / "run.nc", engine=engine)
    with xr.open_dataset(tmp_path / "run.nc", engine=engine) as opened:
        xr.testing.assert_equal(opened, run)
        assert opened["mask"].dtype == bool
        assert opened["bold"].dtype == np.int16
        assert "grid" in opened.coords
        assert_in_place(opened["bold"], affine)
        assert cg.to_nifti(opened["bold"]).to_bytes() == cg.to_nifti(run["bold"]).to_bytes()
        assert_in_place(opened["mask"].isel(y=slice(None, None, -2)), cut(affine, y=(7, -2)), (7, 4, 9))
    run["bold"].mean("time").to_netcdf(tmp_path / "map.nc", engine=engine)
    with xr.open_dataarray(tmp_path / "map.nc", engine=engine) as opened:
        assert_in_place(opened.isel(z=4), cut(affine, z=(4, 1)), (7, 8, 1))


# --------------------------------------------------------------------------------------------------------- statistics


def designs_for(runs):
    task = np.random.default_rng(5).normal(size=N_TIME)
    return {label: pd.DataFrame({"task": task, "constant": 1.0}) for label in runs}


def noisy(run, seed):
    noise = np.random.default_rng(seed).normal(0, 30, run["bold"].shape)
    return run.load().assign(bold=run["bold"] + noise)


def test_contrasts__can_be_computed_with(run, other, affine, tmp_path):
    runs = {"a": noisy(run, 1), "b": noisy(other, 2)}
    fit = cg.fit(runs, designs_for(runs))
    contrasts = cg.contrast(fit, "task")
    assert_in_place(contrasts["stat"].sel(run="b"), affine)
    assert_in_place(contrasts["effect"].sum("run"), affine)
    assert_in_place(contrasts["effect"].sel(run="a") - contrasts["effect"].sel(run="b"), affine)
    assert_in_place(contrasts["stat"].where(abs(contrasts["stat"]) > 1), affine)
    assert_in_place(contrasts.groupby("run").map(lambda one: one * 2)["effect"], affine)
    assert_in_place(contrasts.groupby("run").mean()["effect"], affine)
    part = {"x": slice(None, None, -2), "z": 3}
    assert_in_place(contrasts["z_score"].isel(part), cut(affine, x=(6, -2), z=(3, 1)), (4, 8, 1))
    fixed = cg.fixed_effects(contrasts)
    assert_in_place(fixed["stat"], affine)
    # A fit of a part is the part of the fit.
    cuts = {label: one.isel(x=slice(None, None, -2)) for label, one in runs.items()}
    of_part = cg.contrast(cg.fit(cuts, designs_for(cuts)), "task")
    xr.testing.assert_allclose(of_part["stat"], contrasts["stat"].isel(x=slice(None, None, -2)))
    assert_in_place(of_part["stat"], cut(affine, x=(6, -2)), (4, 8, 9))
    # Maps of runs that were computed apart.
    apart = [cg.contrast(cg.fit({label: one}, designs_for([label])), "task") for label, one in runs.items()]
    joined = xr.concat(apart, "run", data_vars="minimal", coords="minimal", compat="override", join="exact")
    np.testing.assert_array_equal(cg.fixed_effects(joined)["stat"], fixed["stat"])


# ------------------------------------------------------------------------------------- headers that differ by rounding


def nearly(affine, part):
    """The affine with every number off by a part of a voxel."""
    changed = affine.copy()
    changed[:3, :3] *= 1 + part
    changed[:3, 3] += part * np.linalg.norm(affine[:3, :3], axis=0)
    return changed


@pytest.fixture(scope="module", params=[(name, part) for name in AFFINES for part in (1e-6, 1e-4)], ids=str)
def near_study(request, tmp_path_factory):
    """A study of two runs whose headers differ by rounding; not to be changed."""
    name, part = request.param
    affines = [AFFINES[name], nearly(AFFINES[name], part)]
    return AFFINES[name], make_study(tmp_path_factory.mktemp(name), affines, noise=True)


def test_grids_that_differ_by_rounding__lose_no_voxel(near_study, tmp_path):
    affine, place = near_study
    tree = cg.open_study(place)
    first, second = (tree[label].to_dataset() for label in ("run-1", "run-2"))
    assert not np.array_equal(grids.source_affine(first), grids.source_affine(second))
    runs = {"1": first, "2": second}
    same = {"1": first, "2": second.assign_coords(first["mask"].coords)}
    designs = designs_for(runs)
    fits = [cg.fit(given, designs) for given in (runs, same, tree)]
    contrasts = [cg.contrast(fit, "task") for fit in fits]
    fixed = [cg.fixed_effects(one) for one in contrasts]
    for kind in (fits, contrasts, fixed):
        for one in kind:
            assert [one.sizes[dim] for dim in "xyz"] == list(SHAPE)
        xr.testing.assert_equal(kind[0], kind[1])
        xr.testing.assert_equal(kind[0], kind[2])
    inside = first["mask"].values
    assert (fits[0]["mask"].values == inside).all()
    assert (fixed[0]["n_runs"].values == np.where(inside, 2, 0)).all()
    assert np.isfinite(fixed[0]["stat"].values[inside]).all()
    for number, one in enumerate((fits[0], contrasts[0], fixed[0])):
        xr.testing.assert_equal(cg.save(one, tmp_path / f"{number}.zarr").load(), one.load())
    assert_in_place(fixed[0]["stat"], affine)
    # The mask of one run for both, and the other way round.
    masked = cg.fit(runs, designs, mask=second["mask"])
    np.testing.assert_array_equal(masked["mask"].values, fits[0]["mask"].values)


def test_pictures__of_grids_that_differ_by_rounding_are_whole(near_study):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from chunkglm.report.cuts import take_cuts

    affine, place = near_study
    tree = cg.open_study(place)
    change = tree["run-1"]["bold"].mean("time")
    under = tree["run-2"]["mean_image"]
    centre = affine[:3] @ [3, 4, 4, 1]
    figure = cg.plot(change, background=under, cut_coords=centre, threshold=0.0)
    assert figure.axes
    places = [(axis, float(centre[axis])) for axis in range(3)]
    for over, below in zip(take_cuts(change, places), take_cuts(under, places), strict=True):
        assert np.isfinite(over.values).sum() > 30
        # At the edge, a pixel may be of the one and not of the other.
        assert (
            abs(np.isfinite(over.values).sum() - np.isfinite(below.values).sum()) <= 0.1 * below.values.size
        )


def test_a_job__on_grids_that_differ_by_rounding_loses_no_voxel(tmp_path):
    shape, sources = (12, 13, 9), []
    for session in (1, 2):
        names = [tmp_path / name for name in (f"run{session}.nii", f"design{session}.npz", "mask.nii")]
        write_simulated_run(*names, shape=shape, n_volumes=40, session=session, overwrite=True)
        sources.append(names)
    image = nib.load(sources[1][0])
    changed = nib.Nifti1Image(np.asarray(image.dataobj), nearly(image.affine, 1e-4), image.header)
    changed.to_filename(tmp_path / "changed.nii")
    mask = nib.load(tmp_path / "mask.nii").get_fdata() != 0
    results = tmp_path / "results"
    columns = np.load(sources[0][1])["X"].shape[1]
    options = [
        "--mask",
        tmp_path / "mask.nii",
        "--contrast",
        f"c=[1,-1{',0' * (columns - 2)}]",
        "--output",
        results,
    ]
    for _, design, _ in sources:
        options += ["--design", design]
    with pytest.raises(SystemExit) as exit_:
        main([str(one) for one in ["run", sources[0][0], tmp_path / "changed.nii", *options]])
    assert exit_.value.code == 0
    labels = [cg.open_run(results / "runs.zarr" / f"run-{label}")["x"].values for label in "12"]
    assert not np.array_equal(*labels)
    for prefix in ("", "run-1_", "run-2_"):
        stat = nib.load(results / "maps" / f"{prefix}contrast-c_stat-t_statmap.nii.gz")
        assert stat.shape == shape
        np.testing.assert_array_equal(stat.get_fdata() != 0, mask)
    assert cg.report(results).exists()


def test_xarrays_arithmetic__matches_labels_exactly(tmp_path):
    """It leaves voxels out and says nothing where labels differ in the last digit; with "exact" it says so."""
    affine = AFFINES["aligned"]
    place = make_study(tmp_path, [affine, nearly(affine, 1e-4)])
    # open_study gives them the labels of the first; runs that are opened each by itself have their own.
    first, second = (cg.open_run(f"{place}/{label}")["bold"].mean("time") for label in ("run-1", "run-2"))
    with xr.set_options(arithmetic_join="exact"), pytest.raises(ValueError, match="cannot align"):
        first - second
    with pytest.raises(InputError, match="only labels that all arrays have in common"):
        cg.to_nifti(first - second)
    outer = xr.concat([first, second], "run", join="outer")
    with pytest.raises(InputError, match=r"two labels \(14 for 7 voxels\).*assign_coords.*join='override'"):
        cg.to_nifti(outer)
    # What the messages say helps.
    assert_in_place(first - second.assign_coords(first.coords), affine)
    assert_in_place(xr.concat([first, second], "run", join="override"), affine)
    difference = first - second.assign_coords(first.coords)
    np.testing.assert_allclose(difference, np.full(SHAPE[::-1], -1000.0))


def test_rounding__can_part_labels_of_equal_grids():
    """Any rounding has such places. To chunkglm's own functions the grids are the same."""
    labels, made = [], []
    for offset in (1.00005 - 1e-9, 1.00005 + 1e-9):
        affine = nib.affines.from_matvec(np.diag([3.0, 3.0, 3.0]), [offset, 0, 0])
        coords = grids.grid_coords(affine, SHAPE[::-1], b"")
        labels.append(coords["x"].values)
        bold = np.random.default_rng(1).normal(100, 5, (N_TIME, *SHAPE[::-1]))
        ds = xr.Dataset(
            {"bold": (("time", *SPACE), bold), "mask": (SPACE, np.ones(SHAPE[::-1], bool))}, coords
        )
        made.append(ds.assign_coords(time=T_R * np.arange(N_TIME)))
    assert (labels[0] != labels[1]).all()
    np.testing.assert_allclose(labels[0], labels[1], atol=1.01e-4)
    contrasts = cg.contrast(cg.fit(made, list(designs_for("ab").values())), "task")
    fixed = cg.fixed_effects(contrasts)
    assert (fixed["n_runs"] == 2).all()
    assert fixed["stat"].shape == SHAPE[::-1]


def test_labels__of_an_affine_that_is_diagonal_but_for_rounding_are_millimetres():
    """Millimetres of one header must not meet voxel numbers of another: 3 mm would be matched with voxel 3."""
    clean = AFFINES["aligned"]
    noise = clean + 1e-7 * np.array([[0, 1, -1, 0], [1, 0, 1, 0], [-1, 1, 0, 0], [0, 0, 0, 0]])
    arrays = [
        xr.DataArray(np.zeros(SHAPE[::-1]), dims=SPACE, coords=grids.grid_coords(one, SHAPE[::-1], b""))
        for one in (clean, noise)
    ]
    for array, one in zip(arrays, (clean, noise), strict=True):
        assert {array[dim].attrs["units"] for dim in "xyz"} == {"mm"}
        assert_in_place(array[::-1, 1:, ::2], cut(one, z=(8, -1), y=(1, 1), x=(0, 2)), (4, 7, 9))
    xr.align(*arrays, join="exact")
    # As soon as it could be seen in the labels, they are numbers.
    turned = clean + 1e-5 * np.array([[0, 1, -1, 0], [1, 0, 1, 0], [-1, 1, 0, 0], [0, 0, 0, 0]])
    assert grids.grid_coords(turned, SHAPE[::-1], b"")["x"].attrs["units"] == "voxel"


@pytest.mark.parametrize("name", AFFINES)
def test_grids_that_truly_differ__are_refused_with_the_difference(tmp_path, name):
    affine = AFFINES[name]
    moved = affine @ nib.affines.from_matvec(np.eye(3), [0.5, 0, 0])
    place = make_study(tmp_path, [affine, affine], noise=True)
    cg.convert(
        write_run(tmp_path / "moved.nii", moved),
        tmp_path / "moved.zarr",
        mask=write_mask(tmp_path / "m.nii", moved),
    )
    first, second = cg.open_run(place / "run-1"), cg.open_run(tmp_path / "moved.zarr")
    apart = 0.5 * np.linalg.norm(affine[:3, 0])
    with pytest.raises(
        GridMismatchError, match=rf"Run b and run a have the same shape.* up to {apart:.3g} mm apart"
    ):
        cg.fit({"a": first, "b": second}, designs_for("ab"))
    with pytest.raises(GridMismatchError, match=f"up to {apart:.3g} mm apart"):
        cg.fit(first, list(designs_for("a").values()), mask=second["mask"])
    with pytest.raises(
        GridMismatchError, match=r"Run b has \(6, 8, 9\) voxels along x, y, z and run a has \(7, 8, 9\)"
    ):
        cg.fit({"a": first, "b": first.isel(x=slice(1, None))}, designs_for("ab"))
    # The same voxels in reverse are other places.
    with pytest.raises(GridMismatchError, match="mm apart"):
        cg.fit({"a": first, "b": first.isel(x=slice(None, None, -1))}, designs_for("ab"))
    with pytest.raises(GridMismatchError, match="up to"):
        cg.convert(tmp_path / "run1.nii", tmp_path / "a.zarr", mask=tmp_path / "m.nii")
