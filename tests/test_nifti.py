"""Grids and export: every slice knows where it came from, and no value is changed."""

import gzip

import dask.array as da
import nibabel as nib
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkglm import grids, nifti, to_nifti
from chunkglm.errors import GridMismatchError, InputError, MaskError, StoreError, StoreExistsError
from chunkglm.schema import SPACE

SHAPE = (9, 8, 7)  # x, y, z
N_TIME = 6
ASCENDING = np.array([[2.0, 0, 0, -30.5], [0, 2.5, 0, -40], [0, 0, 3.3, -20.2], [0, 0, 0, 1]])
DESCENDING = np.array([[-2.0, 0, 0, 30.5], [0, 2.5, 0, -40], [0, 0, -3.3, 20.2], [0, 0, 0, 1]])
OBLIQUE = np.array([[2.9, -0.4, 0.2, -90.0], [0.5, 2.8, -0.7, -120.0], [0.1, 0.6, 3.5, -60.0], [0, 0, 0, 1]])
SWAPPED = np.array([[0, 0, 3.0, -10], [2.0, 0, 0, 5], [0, -2.5, 0, 70], [0, 0, 0, 1]])
AFFINES = {"ascending": ASCENDING, "descending": DESCENDING, "oblique": OBLIQUE, "swapped": SWAPPED}
TINY = np.diag([0.002, 0.003, 0.002, 1.0])


def source_header(
    affine, *, shape=(*SHAPE, N_TIME), dtype="int16", forms=(1, 4), version=1, order="<", units="msec"
):
    header = (nib.Nifti1Header if version == 1 else nib.Nifti2Header)(endianness=order)
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    if forms[0]:
        header.set_qform(affine, forms[0])
    if forms[1]:
        header.set_sform(affine, forms[1])
    header["pixdim"][1:5] = [*np.linalg.norm(affine[:3, :3], axis=0), 2200 if units == "msec" else 2.2]
    header.set_xyzt_units("mm", units)
    header["descrip"], header["intent_name"] = b"made by a scanner", b"bold"
    header["cal_max"], header["slice_code"], header["slice_end"], header["intent_code"] = 3000, 3, 6, 2001
    header["vox_offset"] = header.sizeof_hdr + 4
    return header


def make_run(affine=ASCENDING, header=None, chunks=None, scale=None):
    """A run whose every value is its own place: 1000 x + 100 y + 10 z + t, in a shape below ten."""
    header = source_header(affine) if header is None else header
    t, z, y, x = np.indices((N_TIME, *SHAPE[::-1]))
    bold = (1000 * x + 100 * y + 10 * z + t).astype(np.int16)
    if scale:
        bold = bold * scale
    raw = header.binaryblock + b"\0" * 4
    described = nifti._describe(raw, "test")
    coords = grids.grid_coords(described.affine, SHAPE[::-1], raw)
    array = xr.DataArray(bold, dims=("time", *SPACE), coords=coords)
    array = array.assign_coords(time=("time", 2.2 * np.arange(N_TIME), {"units": "s"}))
    if scale:
        array.encoding = {"dtype": np.dtype(np.int16), "scale_factor": scale, "add_offset": 0.0}
    return array.chunk(chunks) if chunks else array


def places(image):
    """Voxel numbers in the source of every value of an exported image, and its world coordinates."""
    data = np.asarray(image.dataobj)
    numbers = np.stack([data // 1000, data // 100 % 10, data // 10 % 10], axis=-1)
    here = np.stack(np.indices(data.shape)[:3], axis=-1)
    return numbers, nib.affines.apply_affine(image.affine, here)


def assert_in_place(image, affine):
    numbers, world = places(image)
    np.testing.assert_allclose(world, nib.affines.apply_affine(affine, numbers), rtol=0, atol=2e-3)
    sizes = np.linalg.norm(image.affine[:3, :3], axis=0)
    np.testing.assert_allclose(image.header.get_zooms()[:3], sizes, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ grids


@pytest.mark.parametrize("name", AFFINES)
def test_coordinates(name):
    affine = AFFINES[name]
    coords = grids.grid_coords(affine, SHAPE[::-1], b"header")
    aligned = name in {"ascending", "descending"}
    for axis, dim in enumerate("xyz"):
        numbers = np.arange(SHAPE[axis])
        expected = np.round(affine[axis, axis] * numbers + affine[axis, 3], 4) if aligned else numbers
        np.testing.assert_array_equal(coords[dim].values, expected)
        assert not np.signbit(coords[dim].values[coords[dim].values == 0]).any()
        assert coords[dim].attrs["units"] == ("mm" if aligned else "voxel")
    assert coords["grid"].dims == ()
    np.testing.assert_array_equal(np.reshape(coords["grid"].attrs["affine"], (4, 4)), affine)


def test_coordinates_of_equal_grids_align():
    noisy = ASCENDING + 1e-7 * np.array([[1, 0, 0, 1], [0, -1, 0, 1], [0, 0, 1, -1], [0, 0, 0, 0]])
    first, second = (
        xr.DataArray(np.zeros(SHAPE[::-1]), dims=SPACE, coords=grids.grid_coords(a, SHAPE[::-1], b""))
        for a in (ASCENDING, noisy)
    )
    xr.align(first, second, join="exact")


def test_voxels_that_are_too_small_for_rounded_millimetres():
    array = make_run(TINY)
    assert array["x"].attrs["units"] == "voxel"
    assert_in_place(to_nifti(array[:, 1:, ::2]), TINY)


@pytest.mark.parametrize("name", AFFINES)
@settings(max_examples=12)
@given(data=st.data())
def test_every_slice_is_in_its_place(name, data):
    array = make_run(AFFINES[name])
    steps = st.sampled_from([-3, -2, -1, 1, 2, 3])
    selection = {}
    for dim, length in zip("xyz", SHAPE, strict=True):
        kind = data.draw(st.sampled_from(["slice", "number", "all"]))
        if kind == "number":
            selection[dim] = data.draw(st.integers(0, length - 1))
        elif kind == "slice":
            start, step = data.draw(st.integers(0, length - 1)), data.draw(steps)
            selection[dim] = slice(start, None, step)
    picked = array.isel(selection)
    image = to_nifti(picked)
    assert_in_place(image, AFFINES[name])
    dims = [dim for dim in picked.dims if dim != "time"]
    np.testing.assert_array_equal(
        np.asarray(image.dataobj).squeeze(), picked.transpose(*dims[::-1], "time").values.squeeze()
    )
    # A slice of a slice is in its place as well.
    again = picked.isel({dim: slice(None, None, 2) for dim in dims} | {"time": slice(1, 4)})
    assert_in_place(to_nifti(again), AFFINES[name])
    # Maps of it too, in any order of dims.
    assert_in_place(to_nifti(picked.isel(time=0).transpose(*dims)), AFFINES[name])


@pytest.mark.parametrize("name", AFFINES)
def test_selection_by_label_keeps_the_place(name):
    array = make_run(AFFINES[name])
    picked = array.sel(x=array["x"][3], y=slice(array["y"][2], array["y"][6]), z=float(array["z"][4]))
    assert_in_place(to_nifti(picked), AFFINES[name])


def test_grid_of_slices():
    array = make_run(OBLIQUE)
    grid = grids.grid_of(array[:, ::-2, 3, 1:])
    assert grid.shape == (4, 1, 8)
    origin = OBLIQUE @ [1, 3, 6, 1]
    np.testing.assert_allclose(grid.affine[:, 3], origin, atol=1e-12)
    np.testing.assert_allclose(grid.affine[:, 2], -2 * OBLIQUE[:, 2], atol=1e-12)
    assert grids.grid_of(array.to_dataset(name="bold")).shape == SHAPE[::-1]


def test_grids_are_compared_by_their_corners():
    grid = grids.Grid(SHAPE[::-1], OBLIQUE)
    near, far = OBLIQUE.copy(), OBLIQUE.copy()
    near[0, 3] += 0.009 * 2.9
    far[0, 3] += 0.011 * 2.97
    grids.check_same_grid(grids.Grid(SHAPE[::-1], near), grid, "a", "b")
    with pytest.raises(GridMismatchError, match="a and b have the same shape"):
        grids.check_same_grid(grids.Grid(SHAPE[::-1], far), grid, "a", "b")
    turned = OBLIQUE.copy()
    turned[:3, :3] = turned[:3, :3] @ np.array(
        [[np.cos(0.003), -np.sin(0.003), 0], [np.sin(0.003), np.cos(0.003), 0], [0, 0, 1]]
    )
    # The same at the first voxel, and only there.
    with pytest.raises(GridMismatchError):
        grids.check_same_grid(grids.Grid((7, 80, 90), turned), grids.Grid((7, 80, 90), OBLIQUE), "a", "b")
    with pytest.raises(
        GridMismatchError, match=r"a has \(9, 8, 6\) voxels along x, y, z and b has \(9, 8, 7\)"
    ):
        grids.check_same_grid(grids.Grid((6, 8, 9), OBLIQUE), grid, "a", "b")


def test_a_mask_array_is_held_against_the_grid():
    run = make_run(DESCENDING)
    mask = (run[0] > 3000).drop_vars("time")
    inside = nifti.read_mask(mask, grids.grid_of(run), "run 1")
    np.testing.assert_array_equal(inside, mask.values)
    part = run[:, 1:]
    np.testing.assert_array_equal(nifti.read_mask(mask[1:], grids.grid_of(part), "run 1"), mask.values[1:])
    with pytest.raises(GridMismatchError, match="run 1"):
        nifti.read_mask(mask[:-1], grids.grid_of(part), "run 1")
    with pytest.raises(MaskError, match="dims"):
        nifti.read_mask(run, grids.grid_of(run), "run 1")


def test_a_mask_of_many_runs_is_in_memory_once():
    run = make_run(DESCENDING)
    mask = (run[0] > 3000).drop_vars("time")
    grid = grids.grid_of(run)
    inside = nifti.read_mask(mask, grid, "run 1")
    assert nifti.read_mask(mask.copy(), grid, "run 2") is inside
    assert nifti.read_mask(~mask, grid, "run 3") is not inside
    with pytest.raises(ValueError, match="read-only"):
        inside[0] = True
    # Not longer than it is used, and nobody else's array.
    mask.values[:] = True
    there = len(nifti._masks)
    assert not inside.all()
    del inside
    assert len(nifti._masks) < there


# ----------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("forms", [(1, 4), (0, 2), (3, 0), (0, 0)])
@pytest.mark.parametrize("affine", [DESCENDING, OBLIQUE], ids=["aligned", "oblique"])
def test_slices_keep_the_codes_of_the_source(forms, affine):
    if forms[0] and affine is OBLIQUE:
        affine = nib.affines.from_matvec(
            np.linalg.qr(OBLIQUE[:3, :3])[0] * [2, 2.5, 3.3], OBLIQUE[:3, 3]
        )  # no shears
    run = make_run(affine, source_header(affine, forms=forms))
    used = grids.source_affine(run)
    image = to_nifti(run[:, ::-1, 2:, ::2])
    assert_in_place(image, used)
    codes = (int(image.header["qform_code"]), int(image.header["sform_code"]))
    assert codes == (forms if any(forms) else (0, 2))
    if forms[0]:
        np.testing.assert_allclose(image.header.get_qform(), image.affine, atol=1e-3)


def test_a_sheared_slice_of_a_qform_gets_an_sform():
    affine = nib.affines.from_matvec(np.linalg.qr(OBLIQUE[:3, :3])[0] * [2, 2.5, 3.3], OBLIQUE[:3, 3])
    run = make_run(affine, source_header(affine, forms=(1, 0)))
    run["grid"].attrs["affine"] = OBLIQUE.ravel().tolist()
    image = to_nifti(run[:, 1:])
    assert_in_place(image, OBLIQUE)


def test_header_of_a_time_slice():
    run = make_run(OBLIQUE)
    header = to_nifti(run[1:4]).header
    # The step is the same, so it stays as the source says it.
    assert float(header["pixdim"][4]) == 2200
    assert header.get_xyzt_units() == ("mm", "msec")
    assert bytes(header["descrip"]).startswith(b"made by a scanner")
    assert (int(header["cal_max"]), int(header["slice_code"]), int(header["slice_end"])) == (3000, 3, 6)
    header = to_nifti(run[::2]).header
    assert header.get_zooms()[3] == pytest.approx(4.4)
    assert header.get_xyzt_units() == ("mm", "sec")
    # No step describes uneven volumes.
    assert to_nifti(run[[0, 1, 3]]).header["pixdim"][4] == 0
    assert to_nifti(run[::-1]).header["pixdim"][4] == 2200
    # One volume alone keeps what the source says.
    assert to_nifti(run[2:3]).header["pixdim"][4] == 2200
    assert to_nifti(run.drop_vars("time")[1:]).header["pixdim"][4] == 2200
    # Other slices are another acquisition.
    assert to_nifti(run[:, 1:]).header["slice_end"] == 0


def test_header_of_a_map():
    run = make_run(OBLIQUE)
    header = to_nifti(run.mean("time")).header
    assert header["dim"].tolist() == [3, 9, 8, 7, 1, 1, 1, 1]
    assert header["pixdim"][4:].tolist() == [0, 0, 0, 0]
    assert header.get_data_dtype() == np.float64
    assert (header["cal_max"], header["intent_code"], header["slice_code"]) == (0, 0, 0)
    assert bytes(header["intent_name"]).strip(b"\0") == b""
    assert int(header["sform_code"]) == 4
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(header.get_sform(), OBLIQUE.astype(np.float32))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "dtype",
    [
        "bool",
        "int8",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float16",
        "float32",
        "float64",
    ],
)
def test_values_of_any_dtype_are_kept(tmp_path, order, version, dtype):
    rng = np.random.default_rng(0)
    run = make_run(OBLIQUE, source_header(OBLIQUE, version=version, order=order))
    if np.dtype(dtype).kind == "f":
        values = rng.normal(size=SHAPE[::-1]).astype(dtype)
        values[0, 0, :4] = np.nan, np.inf, -np.inf, -0.0
    elif dtype == "bool":
        values = rng.uniform(size=SHAPE[::-1]) > 0.5
    else:
        info = np.iinfo(dtype)
        values = rng.integers(info.min, info.max, SHAPE[::-1], dtype=dtype, endpoint=True)
    image = to_nifti(run[0].copy(data=values), tmp_path / "map.nii.gz")
    data = np.asarray(image.dataobj)
    assert data.dtype.newbyteorder("=") == {"bool": "uint8", "float16": "float32"}.get(dtype, dtype)
    np.testing.assert_array_equal(data.T, values)
    assert type(image) is (nib.Nifti1Image if version == 1 else nib.Nifti2Image)
    assert image.header.endianness == order


def test_maps_of_several_runs():
    run = make_run(DESCENDING)
    maps = xr.concat([run[0], run[1], run[3]], dim="run").drop_vars("time")
    image = to_nifti(maps)
    assert image.shape == (*SHAPE, 3)
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, maps.values)
    assert image.header["pixdim"][4:].tolist() == [1, 0, 0, 0]
    assert_in_place(image, DESCENDING)
    signals = xr.concat([run, run + 1], dim="run")
    image = to_nifti(signals)
    assert image.shape == (*SHAPE, N_TIME, 2)
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, signals.values)
    assert image.header["pixdim"][4:].tolist() == [2200, 1, 0, 0]
    # Where the fourth dimension is not time, its step is not the repetition time.
    image = to_nifti(signals.transpose("time", "run", ...))
    assert image.shape == (*SHAPE, 2, N_TIME)
    assert image.header["pixdim"][4:6].tolist() == [1, 1]
    six = run.expand_dims(a=2, b=3, c=2)
    np.testing.assert_array_equal(np.asarray(to_nifti(six).dataobj).T, six.values)


@pytest.mark.parametrize("chunks", [{"time": 2, "z": 3}, {"time": 4, "y": 5, "x": 2}, {"time": -1}, {"z": 1}])
def test_lazy_arrays_are_streamed(tmp_path, chunks):
    run = make_run(OBLIQUE)
    whole = to_nifti(run, tmp_path / "whole.nii")
    asked = []

    def watch(block):
        asked.append(block.shape)
        return block

    lazy = make_run(OBLIQUE, chunks=chunks)
    lazy = lazy.copy(data=lazy.data.map_blocks(watch, dtype=np.int16, meta=np.empty((0,) * 4, np.int16)))
    to_nifti(lazy, tmp_path / "lazy.nii")
    assert (tmp_path / "lazy.nii").read_bytes() == (tmp_path / "whole.nii").read_bytes()
    assert len(asked) == np.prod(lazy.data.numblocks)  # every block once
    assert whole.shape == (*SHAPE, N_TIME)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("scale", [0.1, 75.4876, -3.0])
def test_scaled_values_go_back_to_their_integers(tmp_path, lazy, scale):
    scale = float(np.float32(scale))
    header = source_header(OBLIQUE)
    header["scl_slope"] = scale
    run = make_run(OBLIQUE, header, chunks={"time": 4, "z": 3} if lazy else None, scale=scale)
    expected = make_run(OBLIQUE)
    for part in (run, run[1:5, ::-1], run[2]):
        image = to_nifti(part, tmp_path / "part.nii", overwrite=True)
        assert image.header.get_data_dtype() == np.int16
        np.testing.assert_array_equal(image.get_fdata().T, part.values)
    back = np.asarray(to_nifti(run).dataobj.get_unscaled()).T
    np.testing.assert_array_equal(back, expected.values)
    # What was computed is written as it is, also where the old encoding still hangs on it.
    half = run + scale / 2
    stale = run.copy(data=half.data)
    stale.encoding = dict(run.encoding)
    broken = run.where(run != run[0, 0, 0, 1])
    broken.encoding = dict(run.encoding)
    for changed in (half, stale, broken):
        image = to_nifti(changed, tmp_path / "changed.nii.gz", overwrite=True)
        assert image.header.get_data_dtype() == np.float64
        np.testing.assert_array_equal(image.get_fdata().T, changed.values)
        np.testing.assert_array_equal(to_nifti(changed).get_fdata().T, changed.values)


def test_a_dimension_too_long_for_nifti_1(tmp_path):
    length = 40_000
    header = source_header(ASCENDING, shape=(9, 8, 7, 6))
    raw = header.binaryblock + b"\0" * 4
    affine = nifti._describe(raw, "test").affine
    values = np.arange(length, dtype=np.float32)[None, None]
    array = xr.DataArray(values, dims=SPACE, coords=grids.grid_coords(affine, (1, 1, length), raw))
    image = to_nifti(array, tmp_path / "long.nii.gz")
    assert isinstance(image, nib.Nifti2Image)
    np.testing.assert_array_equal(np.asarray(image.dataobj).ravel(), values.ravel())
    np.testing.assert_allclose(image.affine, ASCENDING, atol=1e-5)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (4, 1)
    assert bytes(image.header["descrip"]).startswith(b"made by a scanner")
    assert bytes(image.header["magic"]).startswith(b"n+2")
    # FreeSurfer's variant for this very length is for NIfTI-1 only.
    ico7 = xr.DataArray(
        np.zeros((1, 1, 163842), np.uint8), dims=SPACE, coords=grids.grid_coords(affine, (1, 1, 163842), raw)
    )
    assert to_nifti(ico7).shape == (163842, 1, 1)


def test_without_a_header_of_the_source():
    array = make_run(OBLIQUE)
    array["grid"].attrs["header"] = ""
    image = to_nifti(array[:, ::2])
    assert_in_place(image, OBLIQUE)
    assert image.header.get_xyzt_units() == ("mm", "sec")
    assert image.header.get_zooms()[3] == pytest.approx(2.2)
    del array["grid"].attrs["header"]
    assert_in_place(to_nifti(array[0]), OBLIQUE)


def test_files(tmp_path):
    array = make_run()[0]
    to_nifti(array, tmp_path / "map.nii")
    before = (tmp_path / "map.nii").read_bytes()
    with pytest.raises(StoreExistsError, match="exists.*overwrite=True"):
        to_nifti(array + 1, tmp_path / "map.nii")
    assert (tmp_path / "map.nii").read_bytes() == before
    to_nifti(array + 1, str(tmp_path / "map.nii"), overwrite=True)
    assert (tmp_path / "map.nii").read_bytes() != before
    for name in ("map.img", "map", "map.nii.bz2"):
        with pytest.raises(InputError, match="the name of a NIfTI file"):
            to_nifti(array, tmp_path / name)
    with pytest.raises(StoreError, match="was not written"):
        to_nifti(array, tmp_path / "nofolder" / "map.nii")
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(StoreExistsError, match="exists"):
        to_nifti(array, tmp_path / "folder.nii", overwrite=True)
    (tmp_path / "link.nii").symlink_to(tmp_path / "nothing")
    with pytest.raises(StoreExistsError, match="exists"):
        to_nifti(array, tmp_path / "link.nii")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.nii", "link.nii", "map.nii"]


def test_an_export_that_fails_leaves_nothing_and_spares_what_is_there(tmp_path):
    array = make_run()
    (tmp_path / "run.nii.gz").write_bytes(b"old")
    lazy = array.copy(
        data=da.from_array(array.values, chunks=2).map_blocks(
            _fail, dtype=np.int16, meta=np.empty((0,) * 4, np.int16)
        )
    )
    with pytest.raises(ZeroDivisionError):
        to_nifti(lazy, tmp_path / "run.nii.gz", overwrite=True)
    with pytest.raises(InputError):
        to_nifti(array.astype(complex), tmp_path / "run.nii.gz", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run.nii.gz"]
    assert (tmp_path / "run.nii.gz").read_bytes() == b"old"


def _fail(block):
    raise ZeroDivisionError


def test_the_gzip_file_is_plain_gzip(tmp_path):
    to_nifti(make_run(), tmp_path / "run.nii.gz")
    to_nifti(make_run(), tmp_path / "run.nii")
    assert gzip.decompress((tmp_path / "run.nii.gz").read_bytes()) == (tmp_path / "run.nii").read_bytes()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a.drop_vars("grid"), "no voxel grid.*assign_coords"),
        (lambda a: a.drop_attrs(), "no voxel grid"),
        (lambda a: a.isel(x=[0, 1, 3]), "'x' are not evenly spaced"),
        (lambda a: a.isel(y=[0, 0]), "'y' are not evenly spaced"),
        (lambda a: a.isel(z=[2, 1, 3]), "'z' are not evenly spaced"),
        (lambda a: a.assign_coords(x=("x", a["x"].values + 0.3, a["x"].attrs)), "'x' are not evenly spaced"),
        (
            lambda a: a.assign_coords(x=("x", a["x"].values * np.nan, a["x"].attrs)),
            "'x' are not evenly spaced",
        ),
        (lambda a: a.coarsen(x=2, boundary="trim").mean(), "'x' are not evenly spaced"),
        (lambda a: a.drop_vars("x"), "no coordinate 'x'"),
        (lambda a: a.assign_coords(x=a["x"].values), "no coordinate 'x' with the units"),
        (lambda a: a.isel(x=0, drop=True), "needs z, y and x"),
        (lambda a: a.stack(voxel=SPACE), "needs z, y and x"),
        (lambda a: a.isel(x=slice(0)), "at least one value"),
        (lambda a: a.isel(time=slice(0)), "at least one value"),
        (lambda a: a.expand_dims(["a", "b", "c", "d"]), "at most four others"),
        (lambda a: a.astype(complex), "dtype complex128.*astype"),
        (lambda a: a.astype(str), "dtype <U"),
        (lambda a: a.astype("datetime64[ns]"), "dtype datetime64"),
        (lambda a: a.astype(np.longdouble), "dtype float128|dtype longdouble"),
        (lambda a: a.to_dataset(name="bold"), "A Dataset cannot be written.*DataArray"),
        (lambda a: a.values, "A ndarray cannot be written"),
    ],
)
@pytest.mark.parametrize("where", ["file", "memory"])
def test_what_cannot_be_exported(tmp_path, change, match, where):
    array = make_run()
    with pytest.raises(InputError, match=match):
        to_nifti(change(array), tmp_path / "a.nii.gz" if where == "file" else None)
    assert not any(tmp_path.iterdir())


def test_points_are_no_grid():
    array = make_run()
    points = array.isel(x=xr.DataArray([0, 1, 2], dims="p"), y=xr.DataArray([0, 1, 2], dims="p"))
    with pytest.raises(InputError):
        to_nifti(points)
    with pytest.raises(InputError, match="not evenly spaced"):
        grids.slice_affine(points)


def test_export_header_is_that_of_the_file(tmp_path):
    array = make_run(OBLIQUE)
    for number, part in enumerate((array, array[1:, ::2], array[0], array.astype(float))):
        to_nifti(part, tmp_path / f"{number}.nii")
        header = nifti.export_header(part)
        assert (tmp_path / f"{number}.nii").read_bytes()[: len(header)] == header
        assert int(nib.load(tmp_path / f"{number}.nii").dataobj.offset) == len(header)
