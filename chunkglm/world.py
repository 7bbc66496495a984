"""World millimetres of voxels: which voxel lies at a point, and coordinates that are computed when they are looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import xarray as xr
from xarray.indexes import CoordinateTransform, CoordinateTransformIndex

from chunkglm.errors import InputError
from chunkglm.grids import Grid, check_same_grid, corners, grid_of, same_grid, world_of
from chunkglm.schema import SPACE

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from numpy.typing import NDArray

    Millimetres = float | xr.DataArray

Labelled = TypeVar("Labelled", xr.Dataset, xr.DataArray)

WORLD = ("x_mm", "y_mm", "z_mm")
"""Names of the world coordinates; they are never stored."""


def at(ds: Labelled, x: Millimetres, y: Millimetres, z: Millimetres) -> Labelled:
    """Pick the voxels in which points lie that are given in world millimetres.

    Parameters
    ----------
    ds : Dataset or DataArray
        On any grid, also oblique; or a slice of it.
    x, y, z : float or DataArray
        Millimetres (RAS+). DataArrays are broadcast against each other, and their dims, which are others than those of
        ``ds``, take the place of z, y and x.

    Returns
    -------
    Dataset or DataArray
        ``ds`` at these voxels, as lazy as it was. ``x``, ``y``, ``z`` and ``grid`` say which voxels they are.

    Raises
    ------
    InputError
        If a point lies outside of the grid (beyond the faces of its outermost voxels), dims of points are those of ``ds``,
        or ``ds`` has no grid.

    Examples
    --------
    >>> cg.at(run, 40, -52, -18).bold.plot()  # doctest: +SKIP
    """
    given = [xr.DataArray(mm) for mm in (x, y, z)]
    if taken := {dim for one in given for dim in one.dims} & set(ds.dims):
        raise InputError(
            f"The points have the dim {', '.join(sorted(map(str, taken)))}, which is one of the data. Rename it: for example "
            f"x.rename({min(map(str, taken))}='point')."
        )
    given = [one.drop_vars([name for name in (*SPACE, "grid") if name in one.coords]) for one in given]
    try:
        points = xr.broadcast(*xr.align(*given, join="exact"))
    except ValueError as error:
        raise InputError(f"x, y and z belong to other points, by their labels: {error}") from error
    numbers = dict(zip(SPACE[::-1], _voxels_at(grid_of(ds), [one.values for one in points]), strict=True))
    return ds.isel({dim: points[0].copy(data=numbers[dim]) for dim in SPACE if dim in ds.dims})


def world(ds: Labelled) -> Labelled:
    """Attach world coordinates, which are computed when they are looked at.

    Parameters
    ----------
    ds : Dataset or DataArray
        On any grid, also oblique; or a slice of it.

    Returns
    -------
    Dataset or DataArray
        ``ds`` with ``x_mm``, ``y_mm`` and ``z_mm``: millimetres (RAS+, float64) over the spatial dims of ``ds``. They select
        (``.sel(x_mm=40, y_mm=-52, z_mm=-18, method="nearest")``), follow slices, and are left out by :func:`chunkglm.save`.

    Raises
    ------
    InputError
        If ``ds`` has no grid, or is not an evenly spaced slice of it.
    """
    dims = [dim for dim in SPACE if dim in ds.dims]
    if not dims:
        return ds.assign_coords(dict(zip(WORLD, world_of(grid_of(ds), (0, 0, 0)), strict=True)))
    return ds.assign_coords(_world_coords(grid_of(ds), dims))


def _voxels_at(grid: Grid, points: list[Any]) -> list[NDArray[np.intp]]:
    """Numbers along x, y and z of the voxels in which points in millimetres lie."""
    x, y, z = (np.asarray(mm, dtype=np.float64) for mm in points)
    inverse = np.linalg.inv(grid.affine)
    exact = [row[0] * x + row[1] * y + row[2] * z + row[3] for row in inverse[:3]]
    # Half up, not to even, and a point on the outer face of the last voxel lies in it.
    numbers = [np.floor(number + 0.5 + 1e-9) for number in exact]
    lengths = grid.shape[::-1]
    numbers = [
        np.where(e <= n - 0.5 + 1e-6, np.minimum(k, n - 1), k)
        for k, e, n in zip(numbers, exact, lengths, strict=True)
    ]
    inside = np.logical_and.reduce([(k >= 0) & (k < n) for k, n in zip(numbers, lengths, strict=True)])
    if not inside.all():
        place = np.unravel_index(np.argmin(inside), inside.shape)
        point = ", ".join(f"{float(mm[place]):g}" for mm in np.broadcast_arrays(x, y, z))
        raise InputError(
            f"{(~inside).sum()} of {inside.size} points lie outside of the grid, the first of them at ({point}) mm. Its voxels "
            f"reach {_reach(grid)}. Give x, y and z in world millimetres, not the numbers of voxels."
        )
    return [number.astype(np.intp) for number in numbers]


def _reach(grid: Grid) -> str:
    """From where to where the centres of voxels reach, for messages."""
    ends = corners(grid)
    low, high = ends.min(axis=1), ends.max(axis=1)
    return ", ".join(
        f"from {name} = {a:g} to {b:g} mm"
        for name, a, b in zip(SPACE[::-1], low.round(2), high.round(2), strict=True)
    )


def _world_coords(grid: Grid, dims: list[str]) -> xr.Coordinates:
    return xr.Coordinates.from_xindex(_WorldIndex(_Affine(grid, dims)))


class _Affine(CoordinateTransform):
    """From the numbers of voxels to millimetres; along a dim that was selected away there is one voxel, number 0."""

    def __init__(self, grid: Grid, dims: list[str]) -> None:
        super().__init__(WORLD, {dim: grid.shape[SPACE.index(dim)] for dim in dims})
        self.grid = grid
        self.axes = [SPACE[::-1].index(dim) for dim in dims]

    def forward(self, dim_positions: dict[str, Any]) -> dict[Hashable, Any]:
        numbers = [0, 0, 0]
        for dim, axis in zip(self.dims, self.axes, strict=True):
            numbers[axis] = dim_positions[dim]
        x, y, z = numbers
        rows = self.grid.affine[:3]
        return {
            name: row[0] * x + row[1] * y + row[2] * z + row[3]
            for name, row in zip(self.coord_names, rows, strict=True)
        }

    def reverse(self, coord_labels: dict[Hashable, Any]) -> dict[str, Any]:
        numbers = _voxels_at(self.grid, [coord_labels[name] for name in self.coord_names])
        return {dim: numbers[axis] for dim, axis in zip(self.dims, self.axes, strict=True)}

    def equals(self, other: CoordinateTransform, **kwargs: Any) -> bool:  # noqa: ARG002  (xarray's signature)
        return isinstance(other, _Affine) and self.dims == other.dims and same_grid(self.grid, other.grid)


class _WorldIndex(CoordinateTransformIndex):
    """Follows slices, takes plain numbers, and refuses points outside of the grid."""

    def isel(self, indexers: Mapping[Any, Any]) -> _WorldIndex | None:
        transform = cast("_Affine", self.transform)
        affine, lengths, left = transform.grid.affine.copy(), list(transform.grid.shape), []
        for dim, axis in zip(transform.dims, transform.axes, strict=True):
            place = indexers.get(dim, slice(None))
            length = lengths[2 - axis]
            if isinstance(place, slice):
                numbers = range(length)[place]
                left.append(SPACE[2 - axis])
            elif isinstance(place, int | np.integer):
                numbers = range(length)[place : place + 1 or None]
            else:
                return None
            if not numbers:
                return None
            affine[:3, 3] += affine[:3, axis] * numbers.start
            affine[:3, axis] *= numbers.step
            lengths[2 - axis] = len(numbers)
        if not left or transform.dims != tuple(SPACE[2 - axis] for axis in transform.axes):
            return None
        return _WorldIndex(_Affine(Grid((lengths[0], lengths[1], lengths[2]), affine), left))

    def join(self, other: _WorldIndex, how: str = "inner") -> _WorldIndex:  # noqa: ARG002  (xarray's signature)
        """Called where the grids of two objects differ: no voxels are left out in silence."""
        one, another = (cast("_Affine", index.transform).grid for index in (self, other))
        check_same_grid(another, one, "The second array", "the first")
        return self

    def sel(self, labels: dict[Any, Any], method: str | None = None, tolerance: Any = None) -> Any:
        if tolerance is not None:
            raise InputError(
                "World coordinates know no tolerance: a point in no voxel is refused. Leave it out."
            )
        # xarray takes DataArrays only.
        points = {
            name: xr.DataArray(value) if np.ndim(value) == 0 else value for name, value in labels.items()
        }
        return super().sel(points, method=method, tolerance=tolerance)
