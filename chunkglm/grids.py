"""Voxel grids: labels of voxels in millimetres, the affine of a slice, whether two grids are the same."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import xarray as xr

from chunkglm.errors import GridMismatchError, InputError
from chunkglm.schema import SPACE

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

SAME_GRID = 0.01
"""Grids whose corners lie closer than this part of a voxel are the same grid."""

ROUNDED_TO = 1e-4
"""Coordinates in mm are rounded to this, so that equal grids align."""

SMALLEST_IN_MM = 0.01
"""Voxels smaller than this (mm) have coordinates in voxels: those in mm are rounded to 1e-4."""


_TWO_LABELS = (
    "Voxels have two labels ({} for {} voxels): xarray joined arrays whose labels differ by rounding. Give the second the "
    "labels of the first beforehand, second.assign_coords(first.mask.coords), or say join='override' to xr.concat and "
    "xr.merge."
)


class Grid(NamedTuple):
    """A voxel grid: lengths along z, y, x, and the affine from voxel numbers (x, y, z) to millimetres."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]


def grid_coords(affine: Array, shape: Sequence[int], header: bytes) -> dict[Hashable, xr.Variable]:
    """Make the coordinates of a voxel grid.

    Parameters
    ----------
    affine : ndarray, shape (4, 4)
        From voxel numbers (x, y, z) to millimetres (RAS+).
    shape : sequence of int
        Lengths along z, y, x.
    header : bytes
        The source's header, kept for export.

    Returns
    -------
    dict
        ``x``, ``y``, ``z`` (millimetres rounded to 1e-4 where the affine is diagonal to that precision, else voxel
        numbers; ``units`` says which) and the scalar ``grid`` with the attributes ``affine`` (16 numbers, row by row) and
        ``header`` (base64).
    """
    # Of two headers of one grid, one may hold 0 and the other 1e-9: they need the same labels, or xarray would match
    # the millimetres of one with the voxel numbers of the other.
    off_axis = np.abs(affine[:3, :3] - np.diag(np.diag(affine[:3, :3]))) @ np.asarray(
        shape[::-1], dtype=np.float64
    )
    aligned = bool(off_axis.max() < ROUNDED_TO / 2 and voxel_sizes(affine).min() >= SMALLEST_IN_MM)
    coords: dict[Hashable, xr.Variable] = {}
    for axis, (dim, length) in enumerate(zip(SPACE[::-1], tuple(shape)[::-1], strict=True)):
        numbers = np.arange(length, dtype=np.float64)
        # Adding 0.0 turns -0.0 into 0.0.
        values = np.round(affine[axis, axis] * numbers + affine[axis, 3], 4) + 0.0 if aligned else numbers
        coords[dim] = xr.Variable(dim, values, {"units": "mm" if aligned else "voxel"})
    attrs = {"affine": [float(v) for v in np.ravel(affine)], "header": base64.b64encode(header).decode()}
    coords["grid"] = xr.Variable((), np.int64(0), attrs)
    return coords


def source_affine(obj: xr.Dataset | xr.DataArray) -> NDArray[np.float64]:
    """Read the affine of the grid that ``obj`` was cut from, shape (4, 4).

    Raises
    ------
    InputError
        If ``obj`` has no ``grid`` coordinate.
    """
    values = obj.coords["grid"].attrs.get("affine") if "grid" in obj.coords else None
    if values is None or np.size(values) != 16:
        raise InputError(
            "The data has no voxel grid: the scalar coordinate 'grid' with its attribute 'affine' is missing. Data "
            "opened by chunkglm has it; give it back with data.assign_coords(grid=run.grid), or, where x, y and z "
            "lost their attributes too, with data.assign_coords(run.mask.coords)."
        )
    return np.asarray(values, dtype=np.float64).reshape(4, 4)


def slice_affine(obj: xr.Dataset | xr.DataArray) -> NDArray[np.float64]:
    """Find the affine of ``obj`` itself, which may be a slice (also strided or reversed) of its source grid.

    Returns
    -------
    ndarray, shape (4, 4)

    Raises
    ------
    InputError
        If the voxels of ``obj`` are not evenly spaced voxels of the source grid, or coordinates are missing.
    """
    affine = source_affine(obj)
    out = affine.copy()
    for axis, dim in enumerate(SPACE[::-1]):
        first, step = _first_and_step(obj, dim, affine, axis)
        out[:3, axis] = affine[:3, axis] * step
        out[:3, 3] += affine[:3, axis] * first
    return out


def _first_and_step(obj: xr.Dataset | xr.DataArray, dim: str, affine: Array, axis: int) -> tuple[int, int]:
    """Voxel number of the first voxel along ``dim`` in the source grid, and the step to the next."""
    coordinate = obj.coords.get(dim)
    if coordinate is None or coordinate.attrs.get("units") not in {"mm", "voxel"}:
        raise InputError(
            f"The data has no coordinate {dim!r} with the units 'mm' or 'voxel', so its place in the grid is not "
            "known. Keep the coordinates x, y and z with their attributes (no drop=True when selecting), or give them "
            "back with data.assign_coords(run.mask.coords)."
        )
    values = _exact_numbers(coordinate, affine, axis)
    numbers = np.rint(values)
    known = values.size > 0 and coordinate.dims in {(), (dim,)} and bool(np.isfinite(values).all())
    on_voxels = known and np.abs(values - numbers).max() <= 0.05
    steps = np.unique(np.diff(numbers)) if on_voxels else np.zeros(2)
    if steps.size > 1 or 0 in steps:
        raise InputError(
            f"The voxels along {dim!r} are not evenly spaced voxels of the source grid, so no affine describes "
            f"them. {_why_uneven(dim, np.atleast_1d(coordinate.values), numbers, known=known, on_voxels=on_voxels)}"
        )
    return int(numbers[0]), int(steps[0]) if steps.size else 1


def _exact_numbers(coordinate: xr.DataArray, affine: Array, axis: int) -> NDArray[np.float64]:
    """Numbers in the source grid, before they are rounded, of the voxels that have these labels."""
    values = np.atleast_1d(np.asarray(coordinate.values, dtype=np.float64))
    if coordinate.attrs["units"] == "mm":
        values = (values - affine[axis, 3]) / affine[axis, axis]
    return values


def _why_uneven(dim: str, labels: Array, numbers: Array, *, known: bool, on_voxels: bool) -> str:
    """What may have happened to the coordinate ``dim``, and how to mend it."""
    if known and not on_voxels:
        return (
            f"Some of {dim} lie between them, as after coarsen or interp. Export before averaging or interpolating "
            "along space; nilearn.image.resample_img makes other grids."
        )
    labels, voxels = np.unique(labels), np.unique(numbers)
    if known and voxels.size < labels.size:
        return _TWO_LABELS.format(labels.size, voxels.size)
    return "Select with a slice, or export before selecting."


def check_no_voxel_twice(obj: xr.Dataset | xr.DataArray, what: str) -> None:
    """Refuse data in which xarray gave one voxel two labels, by an outer join of grids that differ by rounding.

    Raises
    ------
    GridMismatchError
    """
    if "grid" not in obj.coords:
        return
    affine = source_affine(obj)
    for axis, dim in enumerate(SPACE[::-1]):
        labels = obj.coords.get(dim)
        if labels is None or labels.dims != (dim,) or labels.attrs.get("units") not in {"mm", "voxel"}:
            continue
        values = _exact_numbers(labels, affine, axis)
        numbers = np.rint(values)
        if np.unique(numbers).size < np.unique(values).size and np.abs(values - numbers).max() <= 0.05:
            raise GridMismatchError(
                f"{what} along {dim!r}: {_TWO_LABELS.format(values.size, np.unique(numbers).size)}"
            )


def grid_of(obj: xr.Dataset | xr.DataArray) -> Grid:
    """Find the voxel grid of ``obj``; a spatial dimension that was selected away has length 1."""
    sizes = cast("Any", obj.sizes)
    return Grid((sizes.get("z", 1), sizes.get("y", 1), sizes.get("x", 1)), slice_affine(obj))


def world_of(grid: Grid, place: Sequence[Any]) -> tuple[float, float, float]:
    """Find the millimetres (x, y, z) of the centre of the voxel ``place`` (z, y, x)."""
    x, y, z = grid.affine[:3] @ [*place[::-1], 1.0]
    return float(x), float(y), float(z)


def with_space(array: xr.DataArray) -> xr.DataArray:
    """Give back the spatial dims that were selected to a scalar, with length 1."""
    for dim in SPACE:
        if dim not in array.dims and dim in array.coords and array.coords[dim].ndim == 0:
            array = array.expand_dims(dim)
    return array


def corners(grid: Grid) -> NDArray[np.float64]:
    """Millimetres of the centres of the eight outermost voxels, shape (3, 8)."""
    numbers = np.array(np.meshgrid(*[(0, n - 1) for n in grid.shape[::-1]], [1], indexing="ij"))
    world: NDArray[np.float64] = grid.affine[:3] @ numbers.reshape(4, -1)
    return world


def corners_apart(one: Grid, other: Grid) -> float:
    """Largest distance in millimetres between equal corners of two grids of one shape."""
    return float(np.linalg.norm(corners(one) - corners(other), axis=0).max())


def same_grid(one: Grid, other: Grid) -> bool:
    """Whether two grids differ by no more than rounding: their corners by less than 1 % of a voxel."""
    return (
        one.shape == other.shape and corners_apart(one, other) <= SAME_GRID * voxel_sizes(other.affine).min()
    )


def check_same_grid(got: Grid, expected: Grid, got_name: str, expected_name: str) -> None:
    """Refuse two grids that differ by more than rounding.

    Raises
    ------
    GridMismatchError
        If the shapes differ, or a corner lies further away than 1 % of a voxel.
    """
    if got.shape != expected.shape:
        raise GridMismatchError(
            f"{got_name} has {got.shape[::-1]} voxels along x, y, z and {expected_name} has {expected.shape[::-1]}. "
            "They must lie on the same grid: resample one to the other first (for example with "
            "nilearn.image.resample_to_img)."
        )
    if not same_grid(got, expected):
        apart = corners_apart(got, expected)
        raise GridMismatchError(
            f"{got_name} and {expected_name} have the same shape, but their voxels lie up to {apart:.3g} mm apart "
            f"(affines {np.round(got.affine, 3).tolist()} and {np.round(expected.affine, 3).tolist()}). Resample "
            "one to the other, or correct the header that is wrong."
        )


def voxel_sizes(affine: Array) -> NDArray[np.float64]:
    """Voxel size along x, y, z in millimetres: the norms of the affine's columns."""
    sizes: NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    return sizes
