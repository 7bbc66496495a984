r"""Gaussian smoothing of volumes.

Along each axis in turn a Gaussian of standard deviation ``fwhm / (sqrt(8 ln 2) * voxel size)`` voxels is
applied, cut off at four standard deviations, with the volume reflected at its borders. Nothing is normalised by
a mask.

Along one axis this is a product :math:`K v`, with K the matrix whose rows are the kernel, folded back at the borders. It
has a band of :math:`2 \cdot 4 \sigma + 1` entries about its diagonal, so it is applied in tiles of rows, each a small dense
product with the values under its band: the work of a matrix product at little more than that of a convolution, and where only
a box of the result is asked for, only that part of the volume is read which the box depends on. Some planes at a time are
smoothed along x and y, then the tiles along z follow for pieces of planes: what is worked on stays in the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Box = tuple[slice, slice, slice]

TRUNCATE = 4.0
"""Standard deviations after which the kernel is cut off."""

TILE, TILE_X = 16, 48
"""Rows of a product along z and y, and along x: what was fastest, with several threads at work."""

PLANES_BYTES = 1280 * 2**10
"""Of the planes that are smoothed along x and y at a time."""

PIECE = 8192
"""Voxels of a plane that are smoothed along z at a time."""


def sigma_voxels(fwhm: float, sizes: Sequence[float]) -> tuple[float, ...]:
    """Find the standard deviation of the smoothing kernel in voxels.

    Parameters
    ----------
    fwhm : float
        Full width at half maximum, in mm.
    sizes : sequence of float
        Voxel size along each axis, in mm.

    Returns
    -------
    tuple of float
    """
    return tuple(float(fwhm / (np.sqrt(8 * np.log(2)) * size)) for size in sizes)


class Tile(NamedTuple):
    """A product along one axis: rows of the result, the values that they come from, and the weights."""

    rows: slice
    values: slice
    weights: Floats


class Smoother(NamedTuple):
    """How the volumes of a run are smoothed.

    Attributes
    ----------
    box : tuple of slice
        The part of a volume that is made, along z, y, x.
    window : tuple of slice
        The part of a volume that it depends on.
    tiles : tuple of list of Tile
        Along z, y, x.
    rounded : bool
        Whether values are rounded to float32 between the axes, as the reference does with what is not 64 bits wide.
    slope, intercept : float
        Of the physical values.
    """

    box: Box
    window: Box
    tiles: tuple[list[Tile], list[Tile], list[Tile]]
    rounded: bool
    slope: float
    intercept: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the result."""
        z, y, x = (part.stop - part.start for part in self.box)
        return z, y, x


def make_smoother(
    shape: tuple[int, int, int],
    sigma_zyx: Sequence[float],
    dtype: np.dtype[Any],
    *,
    box: Box | None = None,
    slope: float = 1.0,
    intercept: float = 0.0,
) -> Smoother:
    """Prepare smoothing.

    Parameters
    ----------
    shape : tuple of int
        Of the volumes.
    sigma_zyx : sequence of float
        Standard deviation along z, y, x in voxels; 0 leaves an axis alone.
    dtype : numpy.dtype
        Of the volumes, real.
    box : tuple of slice, optional
        The part of the volume that is wanted, along z, y, x; all by default.
    slope, intercept : float
        A stored value ``v`` means ``slope * v + intercept``.

    Returns
    -------
    Smoother
    """
    box = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])) if box is None else box
    lengths = (TILE, TILE, TILE_X)
    parts = [_axis(*one) for one in zip(shape, sigma_zyx, box, lengths, strict=True)]
    (z_window, z), (y_window, y), (x_window, x) = parts
    rounded = dtype.itemsize < 8 and (slope, intercept) == (1.0, 0.0)
    return Smoother(box, (z_window, y_window, x_window), (z, y, x), rounded, slope, intercept)


def _axis(n: int, sigma: float, part: slice, length: int) -> tuple[slice, list[Tile]]:
    """What a part of an axis of n voxels depends on, and the products that make it."""
    radius = int(TRUNCATE * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2) if sigma > 0 else np.ones(1)
    kernel /= kernel.sum()
    rows = np.arange(part.start, part.stop)
    # Reflected with the edge repeated, as often as it takes.
    source = (rows[:, None] + offsets) % (2 * n)
    source = np.where(source < n, source, 2 * n - 1 - source)
    K = np.zeros((len(rows), n))
    np.add.at(K, (np.arange(len(rows))[:, None], source), kernel)
    window = slice(int(source.min()), int(source.max()) + 1)
    tiles = []
    for start in range(0, len(rows), length):
        stop = min(start + length, len(rows))
        values = slice(int(source[start:stop].min()), int(source[start:stop].max()) + 1)
        weights = np.ascontiguousarray(K[start:stop, values])
        tiles.append(
            Tile(slice(start, stop), slice(values.start - window.start, values.stop - window.start), weights)
        )
    return window, tiles


class Scratch(NamedTuple):
    """Memory that smoothing a volume needs, made once."""

    read: NDArray[Any]
    planes: Floats
    along_x: Floats
    along_y: NDArray[Any]
    stack: NDArray[Any]
    values: Floats
    result: Floats


def make_scratch(smoother: Smoother) -> Scratch:
    """Make the memory that smoothing needs; one for each thread."""
    dtype = np.float32 if smoother.rounded else np.float64
    (n_z, n_y, n_x), (_, y, x) = (part_lengths(part) for part in (smoother.window, smoother.box))
    n = max(1, PLANES_BYTES // (8 * n_y * n_x))
    longest = max(len(tile.weights.T) for tile in smoother.tiles[0])
    return Scratch(
        read=np.empty((n, n_y, n_x), dtype=dtype),
        planes=np.empty((n, n_y, n_x)),
        along_x=np.empty((n, n_y, x)),
        along_y=np.empty((n, y, x)),
        stack=np.empty((n_z, y, x), dtype=dtype),
        values=np.empty((longest, PIECE)),
        result=np.empty((TILE, PIECE)),
    )


def part_lengths(part: Box) -> tuple[int, ...]:
    """Lengths of a box along its axes."""
    return tuple(one.stop - one.start for one in part)


def smooth_volume(
    volume: NDArray[Any], smoother: Smoother, scratch: Scratch, out: NDArray[np.floating[Any]]
) -> None:
    """Smooth one volume.

    Parameters
    ----------
    volume : ndarray, shape (z, y, x)
        Stored values, of the dtype that ``smoother`` was made for. Non-finite values count as 0, and are NaN in the
        result.
    smoother : Smoother
    scratch : Scratch
        Of this smoother; used by one thread at a time.
    out : ndarray, shape of the box
        For the result, float32 or float64.

    Notes
    -----
    Products are in float64. Where the reference has float32, values are rounded to it between the axes, and x comes
    first, as there (nilearn 0.14.1, ``smooth_img``).
    """
    window = volume[smoother.window]
    z_tiles, y_tiles, x_tiles = smoother.tiles
    n = len(scratch.planes)
    # What float32 holds exactly.
    direct = volume.dtype.kind in "iu" and volume.dtype.itemsize < 4 and smoother.rounded
    bad = False
    for start in range(0, len(window), n):
        some = window[start : start + n]
        read, planes, along_x, along_y = (
            one[: len(some)] for one in (scratch.read, scratch.planes, scratch.along_x, scratch.along_y)
        )
        if direct:
            planes[...] = some
        else:
            bad |= _read(some, read, smoother)
            planes[...] = read
        lines, lines_out = planes.reshape(-1, planes.shape[2]), along_x.reshape(-1, along_x.shape[2])
        for rows, values, weights in x_tiles:
            np.matmul(lines[:, values], weights.T, out=lines_out[:, rows])
        _round(along_x, read, smoother)
        for rows, values, weights in y_tiles:
            np.matmul(weights, along_x[:, values], out=along_y[:, rows])
        scratch.stack[start : start + n] = along_y
    stack = scratch.stack.reshape(len(scratch.stack), -1)
    result = out.reshape(len(out), -1)
    for rows, values, weights in z_tiles:
        for start in range(0, stack.shape[1], PIECE):
            piece = slice(start, min(start + PIECE, stack.shape[1]))
            width = piece.stop - start
            under, made = scratch.values[: len(weights.T), :width], scratch.result[: len(weights), :width]
            under[...] = stack[values, piece]
            np.matmul(weights, under, out=made)
            result[rows, piece] = made
    if bad:
        out[~np.isfinite(volume[smoother.box])] = np.nan


def _read(planes: NDArray[Any], out: NDArray[Any], smoother: Smoother) -> bool:
    """Read physical values, with 0 for those that are not finite; tell whether there was any of these."""
    out[...] = planes
    if not smoother.rounded and (smoother.slope, smoother.intercept) != (1.0, 0.0):
        out *= smoother.slope
        out += smoother.intercept
    if planes.dtype.kind != "f":
        return False
    finite = np.isfinite(planes)
    if finite.all():
        return False
    out[~finite] = 0
    return True


def _round(values: Floats, scratch: NDArray[Any], smoother: Smoother) -> None:
    """Round to float32 in place, where the reference works in it."""
    if smoother.rounded:
        rounded = scratch.reshape(-1)[: values.size].reshape(values.shape)
        rounded[...] = values
        values[...] = rounded
