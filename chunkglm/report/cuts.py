"""Cuts through maps at millimetres: which voxels a plane meets, and their values. Nothing is drawn here.

A cut shows the voxels of the map as they are: the value at a point of the plane is that of the voxel around it. Along
the axes of an aligned grid a pixel is a voxel; on an oblique grid the plane is sampled finer than the voxels.
"""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xarray as xr

from chunkglm.errors import InputError
from chunkglm.grids import Grid, grid_of, voxel_sizes, world_of
from chunkglm.schema import SPACE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

AXES = "xyz"
IN_PLANE = ((1, 2), (0, 2), (0, 1))
"""World axes drawn to the right and upwards in a cut through x (sagittal), y (coronal) and z (axial)."""

SLAB = 8
"""Slices of an array in memory that are worked on at a time."""

FINER = 3.0
"""Pixels per voxel on an oblique grid, at most."""

ENOUGH = 500.0
"""Pixels along the longest side of a cut through an oblique grid that are enough, if each voxel has one."""


class Cut(NamedTuple):
    """A plane through a map.

    ``values`` (upwards, to the right) are NaN outside of the grid; ``extent`` is (left, right, bottom, top) in
    millimetres, from edge to edge; the plane is normal to the world axis ``axis`` (0, 1, 2) at ``mm``.
    """

    values: Array
    extent: tuple[float, float, float, float]
    axis: int
    mm: float


def bounds(grid: Grid) -> Array:
    """Smallest box of world millimetres around the voxels of a grid, from edge to edge; shape (3, 2)."""
    ends = [(-0.5, length - 0.5) for length in grid.shape[::-1]]
    corners = np.array([[*corner, 1.0] for corner in product(*ends)])
    world = corners @ grid.affine[:3].T
    return np.column_stack([world.min(axis=0), world.max(axis=0)])


def check_within(grid: Grid, places: Sequence[tuple[int, float]]) -> None:
    """Refuse cuts that lie outside of a grid.

    Raises
    ------
    InputError
    """
    box = bounds(grid)
    for axis, mm in places:
        low, high = box[axis]
        if not low <= mm <= high:
            raise InputError(
                f"The cut at {AXES[axis]} = {mm:g} mm lies outside of the map, which reaches from {low:g} to {high:g} mm "
                "along that axis. Choose cut coordinates within it, or leave them out to cut at the peak."
            )


def take_cuts(array: xr.DataArray, places: Sequence[tuple[int, float]]) -> list[Cut]:
    """Cut an array by planes; of a lazy array only the chunks that the planes meet are loaded, at once.

    Parameters
    ----------
    array : DataArray, dims (z, y, x)
        On any grid, also oblique or descending.
    places : sequence of (axis, mm)
        Normal of each plane (0, 1, 2 for x, y, z) and where it lies.

    Returns
    -------
    list of Cut
    """
    grid = grid_of(array)
    planes = [_plane(grid, axis, mm) for axis, mm in places]
    met = np.unique(np.concatenate([voxels[voxels >= 0] for voxels, _ in planes]))
    z, y, x = (xr.DataArray(numbers, dims="voxel") for numbers in np.unravel_index(met, grid.shape))
    loaded = array.transpose(*SPACE).isel(z=z, y=y, x=x).values.astype(np.float64)
    cuts = []
    for (axis, mm), (voxels, extent) in zip(places, planes, strict=True):
        values = np.full(voxels.shape, np.nan)
        inside = voxels >= 0
        values[inside] = loaded[np.searchsorted(met, voxels[inside])]
        cuts.append(Cut(values, extent, axis, mm))
    return cuts


def _plane(grid: Grid, axis: int, mm: float) -> tuple[NDArray[np.intp], tuple[float, float, float, float]]:
    """Number of the voxel at each pixel of a plane (-1 outside of the grid), and the extent of the plane."""
    box, (right, up) = bounds(grid), IN_PLANE[axis]
    step = _pixel_sizes(grid)
    counts = [max(1, round((box[a, 1] - box[a, 0]) / step[a])) for a in (right, up)]
    centres = [
        box[a, 0] + (np.arange(n) + 0.5) * (box[a, 1] - box[a, 0]) / n
        for a, n in zip((right, up), counts, strict=True)
    ]
    points = np.empty((counts[1], counts[0], 4))
    points[..., right], points[..., up], points[..., axis] = centres[0], centres[1][:, None], mm
    points[..., 3] = 1.0
    # Rounding half up, and not to even: a plane between two slices shows one of them, not a patchwork.
    numbers = np.floor(points @ np.linalg.inv(grid.affine)[:3].T + 0.5 + 1e-9).astype(np.intp)[..., ::-1]
    inside = ((numbers >= 0) & (numbers < grid.shape)).all(axis=-1)
    voxels = np.full(inside.shape, -1, dtype=np.intp)
    voxels[inside] = np.ravel_multi_index(tuple(numbers[inside].T), grid.shape)
    extent = (*box[right].tolist(), *box[up].tolist())
    return voxels, extent


def _pixel_sizes(grid: Grid) -> Array:
    """Size of a pixel along the world axes in millimetres."""
    linear = np.abs(grid.affine[:3, :3])
    if np.count_nonzero(linear > 1e-6 * linear.max()) == 3:
        sizes: Array = linear.max(axis=1)
        return sizes
    box, voxel = bounds(grid), voxel_sizes(grid.affine).min()
    return np.full(3, np.clip((box[:, 1] - box[:, 0]).max() / ENOUGH, voxel / FINER, voxel))


def _in_pieces(array: xr.DataArray) -> xr.DataArray:
    """The array, dims (z, y, x), in dask chunks: what is made of one in memory must not hold it several times over."""
    array = array.transpose(*SPACE)
    return array if array.chunks else array.chunk(z=SLAB)


def millimetres(place: Sequence[float]) -> list[str]:
    """Coordinates for reading, to a tenth of a millimetre."""
    return [f"{round(mm, 1) + 0.0:g}" for mm in place]


def largest(array: xr.DataArray) -> tuple[tuple[float, float, float], float]:
    """Where the absolute value is largest.

    Parameters
    ----------
    array : DataArray, dims (z, y, x)
        A lazy array is reduced chunk by chunk; it is never held whole.

    Returns
    -------
    (x, y, z) in millimetres, and the signed value there

    Raises
    ------
    InputError
        If no value is finite.
    """
    array = _in_pieces(array)
    values = array.astype(np.float64)
    size = abs(values).where(abs(values) < np.inf, -1.0)
    # Along one dimension after another: each step reduces chunk by chunk, and keeps the first of equals.
    found = size.max(["y", "x"]).values
    z = int(np.argmax(found))
    if found[z] < 0:
        raise InputError(
            "The map has no finite value, so there is nothing to draw. Check the fit and its mask."
        )
    plane = size.isel(z=z).values
    y, x = np.unravel_index(np.argmax(plane), plane.shape)
    return world_of(grid_of(array), (z, y, x)), float(array.isel(z=z, y=y, x=x))


def occupied(array: xr.DataArray, axis: int) -> tuple[float, float]:
    """First and last millimetre along a world axis where the array has values other than 0 and NaN, from edge to edge.

    A lazy array is reduced chunk by chunk; without any such value, the ends of the grid.
    """
    grid = grid_of(array)
    array = _in_pieces(array)
    there = ((array != 0) & (abs(array) < np.inf)).drop_vars(SPACE)
    place = there.astype(np.float64).where(there) * grid.affine[axis, 3]
    for number, dim in enumerate(SPACE[::-1]):
        place = place + xr.DataArray(grid.affine[axis, number] * np.arange(array.sizes[dim]), dims=dim)
    ends = xr.Dataset({"low": place.min(), "high": place.max()}).compute()  # both in one pass
    low, high = float(ends["low"]), float(ends["high"])
    if not math.isfinite(low):
        low, high = bounds(grid)[axis]
        return float(low), float(high)
    half = np.abs(grid.affine[axis, :3]).sum() / 2
    return float(low - half), float(high + half)
