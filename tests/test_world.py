"""Voxels by world millimetres, on aligned, descending and oblique grids."""

import pickle

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import chunkglm as cg
from chunkglm import grids
from chunkglm.errors import GridMismatchError, InputError
from chunkglm.testing import raise_if_computes
from chunkglm.world import WORLD

SHAPE = (5, 6, 7)


def oblique():
    a, b = 0.31, -0.17
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ np.diag([-2.0, 2.5, 3.0])
    affine[:3, 3] = 11, -7, 4
    return affine


AFFINES = {
    "aligned": np.array([[2.0, 0, 0, -6], [0, 2.5, 0, -7], [0, 0, 3, -4], [0, 0, 0, 1]]),
    "descending": np.array([[-2.0, 0, 0, 6], [0, 2.5, 0, -7], [0, 0, -3, 4], [0, 0, 0, 1]]),
    "oblique": oblique(),
}


def volume_on(affine, shape=SHAPE):
    """A map whose values are the numbers of its voxels."""
    values = np.arange(np.prod(shape), dtype=float).reshape(shape)
    return xr.DataArray(
        values, dims=("z", "y", "x"), coords=grids.grid_coords(affine, shape, b""), name="number"
    )


def millimetres(affine, place):
    """By the definition of the affine: ``place`` is (z, y, x)."""
    return affine[:3, :3] @ np.array(place[::-1], dtype=float) + affine[:3, 3]


@pytest.fixture(params=list(AFFINES))
def affine(request):
    return AFFINES[request.param]


@given(st.data())
def test_at__every_point_near_a_voxel_gives_that_voxel(data):
    affine = AFFINES[data.draw(st.sampled_from(sorted(AFFINES)))]
    place = [data.draw(st.integers(0, n - 1)) for n in SHAPE]
    near = [number + data.draw(st.floats(-0.49, 0.49)) for number in place]
    array = volume_on(affine)
    found = cg.at(array.to_dataset(), *millimetres(affine, near))
    assert float(found.number) == np.ravel_multi_index(place, SHAPE)
    assert found.number.dims == ()


def test_at__in_a_slice_of_the_grid_strided_or_reversed(affine):
    array = volume_on(affine)
    part = array.isel(x=slice(None, None, -2), y=slice(1, 5), z=slice(1, None, 3))
    for place in ((1, 1, 0), (4, 4, 6), (1, 3, 2)):
        assert float(cg.at(part, *millimetres(affine, place))) == float(array[place])


def test_at__a_slice_that_was_selected_away_has_its_own_voxels_only(affine):
    array = volume_on(affine)
    plane = array.isel(z=2)
    assert float(cg.at(plane, *millimetres(affine, (2, 1, 3)))) == float(array[2, 1, 3])
    with pytest.raises(InputError, match="outside of the grid"):
        cg.at(plane, *millimetres(affine, (3, 1, 3)))


def test_at__many_points_by_label(affine):
    places = [(0, 0, 0), (4, 5, 6), (2, 3, 1)]
    x, y, z = (
        xr.DataArray(mm, dims="region", coords={"region": ["a", "b", "c"]})
        for mm in np.array([millimetres(affine, place) for place in places]).T
    )
    array = volume_on(affine)
    found = cg.at(array, x, y, z)
    assert found.dims == ("region",)
    assert found.region.values.tolist() == ["a", "b", "c"]
    assert found.values.tolist() == [float(array[place]) for place in places]


def test_at__a_line_of_points_broadcasts():
    array = volume_on(AFFINES["aligned"])
    found = cg.at(array, xr.DataArray([-6.0, -2.0], dims="point"), -7, -4)
    assert found.values.tolist() == [0.0, 2.0]


def test_at__result_knows_where_it_is(affine):
    array = volume_on(affine)
    image = cg.to_nifti(cg.at(array, *millimetres(affine, (2, 3, 1))))
    expected = affine.copy()
    expected[:3, 3] = millimetres(affine, (2, 3, 1))
    np.testing.assert_allclose(image.affine, expected, atol=1e-4)
    assert np.asarray(image.dataobj).ravel().tolist() == [float(array[2, 3, 1])]


@pytest.mark.parametrize("point", [(-7.01, -7, -4), (7.1, -7, -4), (-6, -7, np.nan), (1e9, 0, 0)])
def test_at__refuses_points_outside_and_says_how_far_the_grid_reaches(point):
    with pytest.raises(InputError, match=r"1 of 1 points.*x = -6 to 6 mm.*z = -4 to 8 mm.*not the numbers"):
        cg.at(volume_on(AFFINES["aligned"]), *point)


@pytest.mark.parametrize("point", [(-7, -7, -4), (7, 6.75, 9.5)])
def test_at__faces_of_the_outermost_voxels_belong_to_them(point):
    array = volume_on(AFFINES["aligned"])
    corner = array[0, 0, 0] if point[0] < 0 else array[-1, -1, -1]
    assert float(cg.at(array, *point)) == float(corner)


def test_at__names_the_first_point_outside():
    x = xr.DataArray([0.0, 99.0, 98.0], dims="point")
    with pytest.raises(InputError, match=r"2 of 3 points.*\(99, 0, 0\) mm"):
        cg.at(volume_on(AFFINES["aligned"]), x, 0, 0)


def test_at__without_a_grid():
    with pytest.raises(InputError, match="no voxel grid"):
        cg.at(xr.DataArray(np.zeros(SHAPE), dims=("z", "y", "x")), 0, 0, 0)


def test_at__stays_lazy(affine):
    array = volume_on(affine).chunk(z=2)
    with raise_if_computes():
        found = cg.at(array, *millimetres(affine, (2, 3, 1)))
    assert float(found) == np.ravel_multi_index((2, 3, 1), SHAPE)


# -------------------------------------------------------------------------------------------------------------- world


def expected_world(affine, shape=SHAPE):
    numbers = np.indices(shape)[::-1].reshape(3, -1)
    return (affine[:3, :3] @ numbers + affine[:3, 3:]).reshape(3, *shape)


def test_world__millimetres_of_all_voxels(affine):
    ds = cg.world(volume_on(affine).to_dataset())
    for name, expected in zip(WORLD, expected_world(affine), strict=True):
        assert ds[name].dims == ("z", "y", "x")
        np.testing.assert_allclose(ds[name].values, expected, atol=1e-12)


def test_world__is_computed_when_it_is_looked_at():
    shape = (30_000, 30_000, 30_000)
    ds = xr.Dataset(coords=grids.grid_coords(oblique(), shape, b"")).assign(a=("x", np.zeros(30_000)))
    found = cg.world(ds).isel(z=7, y=slice(10, 12), x=29_999).x_mm.values
    np.testing.assert_allclose(found, [millimetres(oblique(), (7, y, 29_999))[0] for y in (10, 11)])


@pytest.mark.parametrize(
    "cut",
    [
        {"x": slice(None, None, -2)},
        {"y": slice(1, 4), "z": 3},
        {"z": -1, "y": -2},
        {"x": np.int64(2)},
        {"x": slice(3, None, 2), "y": slice(None, None, 5), "z": slice(2, 4)},
    ],
)
def test_world__follows_slices(affine, cut):
    whole = xr.Dataset(
        {name: (("z", "y", "x"), mm) for name, mm in zip(WORLD, expected_world(affine), strict=True)}
    )
    ds = cg.world(volume_on(affine)).isel(cut)
    again = ds.isel({dim: slice(1, None) for dim in ds.dims if ds.sizes[dim] > 1})
    expected = whole.isel(cut)
    for name in WORLD:
        np.testing.assert_allclose(ds[name].values, expected[name].values, atol=1e-12)
        np.testing.assert_allclose(
            cg.world(volume_on(affine).isel(cut))[name].values, expected[name].values, atol=1e-4
        )
        assert name in ds.xindexes
        assert name in again.xindexes


def test_world__irregular_selections_keep_their_millimetres(affine):
    ds = cg.world(volume_on(affine)).isel(x=[0, 1, 5], y=xr.DataArray([2, 0, 3], dims="x"))
    place = [(2, 0), (0, 1), (3, 5)]
    expected = [[millimetres(affine, (z, y, x))[1] for y, x in place] for z in range(SHAPE[0])]
    np.testing.assert_allclose(ds.y_mm.transpose("z", "x").values, expected, atol=1e-12)


def test_world__selects_nearest_voxels(affine):
    array = volume_on(affine)
    x, y, z = millimetres(affine, (2.2, 3.3, 0.8))
    assert float(cg.world(array).sel(x_mm=x, y_mm=y, z_mm=z, method="nearest")) == float(array[2, 3, 1])
    plane = cg.world(array).isel(z=2)
    assert float(plane.sel(x_mm=x, y_mm=y, z_mm=z, method="nearest")) == float(array[2, 3, 1])
    # xarray alone takes numbers below 0 from the other end.
    with pytest.raises(InputError, match="outside of the grid"):
        cg.world(array).sel(x_mm=x + 100, y_mm=y, z_mm=z, method="nearest")


def test_world__of_one_voxel(affine):
    one = cg.world(volume_on(affine).isel(z=1, y=2, x=3))
    found = [float(one[name]) for name in WORLD]
    np.testing.assert_allclose(found, millimetres(affine, (1, 2, 3)), atol=1e-4)


def test_world__survives_arithmetic_pickle_concat_and_rename(affine):
    ds = cg.world(volume_on(affine))
    for other in (
        ds + ds,
        pickle.loads(pickle.dumps(ds)),
        xr.concat([ds, ds], "run"),
        ds.rename(x="i"),
        ds.T,
    ):
        np.testing.assert_allclose(
            other.y_mm.transpose("z", "y", ...).values, expected_world(affine)[1], atol=1e-12
        )
    renamed = ds.rename(x="i").isel(i=slice(2, None))
    np.testing.assert_allclose(renamed.y_mm.values, expected_world(affine)[1][..., 2:], atol=1e-12)


def test_world__grids_that_differ_by_rounding_are_one_and_others_are_not(affine):
    ds, nudged, shifted = (volume_on(affine) for _ in range(3))
    near, far = affine.copy(), affine.copy()
    near[0, 3] += 1e-6
    far[0, 3] += 1.0
    nudged, shifted = (
        (
            cg.world(array.assign_coords(grid=array.grid.assign_attrs(affine=other.ravel().tolist())))
            for array, other in ((nudged, near), (shifted, far))
        )
        if "voxel" in ds.x.units
        else (cg.world(volume_on(near)), cg.world(volume_on(far)))
    )
    assert (cg.world(ds) + nudged).shape == SHAPE
    with pytest.raises(GridMismatchError, match="up to 1 mm apart"):
        cg.world(ds) + shifted


def test_world__is_not_stored(tmp_path, affine):
    ds = cg.world(volume_on(affine).to_dataset())
    with pytest.raises(InputError, match="no voxel grid"):
        cg.world(ds.drop_vars("grid"))
    cg.save(ds, tmp_path / "map.zarr")
    opened = cg.open_store(tmp_path / "map.zarr")
    assert not set(WORLD) & set(opened.variables)
    xr.testing.assert_equal(opened.compute(), ds.drop_vars(WORLD))


def test_at__points_that_are_coordinates_of_the_data():
    array = volume_on(AFFINES["aligned"])
    with pytest.raises(InputError, match=r"dim x, y, z.*x.rename\(x='point'\)"):
        cg.at(array, array.x[:2], array.y[:2], array.z[:2])
    x, y, z = (array[axis][:2].rename({axis: "point"}) for axis in "xyz")
    with pytest.raises(InputError, match="belong to other points"):
        cg.at(array, x, y, z)
    x, y, z = (one.drop_vars("point") for one in (x, y, z))
    assert cg.at(array, x, y, z).values.tolist() == [float(array[n, n, n]) for n in (0, 1)]
    one = array.isel(x=1, y=2, z=3)
    assert float(cg.at(array, one.x, one.y, one.z)) == float(one)


def test_world__knows_no_tolerance():
    with pytest.raises(InputError, match="no tolerance"):
        cg.world(volume_on(AFFINES["aligned"])).sel(x_mm=0, y_mm=0, z_mm=0, method="nearest", tolerance=0.1)
