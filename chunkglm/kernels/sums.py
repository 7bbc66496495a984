"""What is kept of the data of a run: sums over time, accumulated block by block, and their scaling.

Only products with the rows of a basis, sums of squares and of lag products, and the samples about gaps and the end touch
the data. They are sums over time: a run is fitted in one pass over blocks of volumes, none of which is kept. Censored
volumes count as nothing, whatever they hold.

The samples are accumulated relative to a level near their mean, and the mean is then removed exactly, so that nothing
cancels that the model does not remove itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chunkglm.kernels.scratch import scratch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from chunkglm.kernels.basis import Basis

    Floats = NDArray[np.float64]

VOXEL_TILE = 8192
"""Voxels that are accumulated at a time: few enough to stay in the cache for the most part, and so many that threads
seldom wait for the interpreter."""

NO_VARIANCE = 16 * np.finfo(np.float64).eps
"""A standard deviation below this part of the level is rounding, not signal."""

# Whatever is not finite ends as NaN in its own voxel, which is the answer and no surprise.
quiet = np.errstate(divide="ignore", invalid="ignore", over="ignore")


class Sums(NamedTuple):
    """What is kept of the data of V voxels, relative to ``shift``; N is the order of the basis.

    Attributes
    ----------
    products : ndarray, shape ((N + 1) r + 1 + N, V)
        With the rows of the basis.
    squares : ndarray, shape (V,)
        Sum of squares.
    lagged : ndarray, shape (N, V)
        Sums of products of samples at each lag.
    near : ndarray, shape (n_near, V)
        Samples about gaps and the end.
    newest : ndarray, shape (N, V)
        The last N samples so far, the newest last.
    shift : ndarray, shape (V,)
        What was subtracted from every sample.
    """

    products: Floats
    squares: Floats
    lagged: Floats
    near: Floats
    newest: Floats
    shift: Floats

    def tile(self, start: int, size: int) -> Sums:
        """Views of the sums of ``size`` voxels, the first of them ``start``."""
        return Sums(*(values[..., start : start + size] for values in self))


class Accumulator:
    """The sums of some voxels of a run, while its blocks come in.

    Parameters
    ----------
    basis : Basis
    voxels : ndarray of int, shape (V,)
        Numbers of the voxels in a raveled volume.
    finite : bool
        Count non-finite values as 0, as the reference does. Otherwise they make their voxel NaN, unless their
        volume is censored.
    """

    def __init__(self, basis: Basis, voxels: NDArray[np.intp], *, finite: bool = False) -> None:
        self._basis, self._finite = basis, finite
        self._voxels = [voxels[start : start + VOXEL_TILE] for start in range(0, len(voxels), VOXEL_TILE)]
        self._tiles = _make_tiles(basis, [len(some) for some in self._voxels])
        self._done = self._centred = 0

    @quiet
    def add(self, block: NDArray[Any]) -> None:
        """Add the next volumes.

        Parameters
        ----------
        block : ndarray, shape (n, ...)
            Any real dtype.
        """
        n, basis, done = len(block), self._basis, self._done
        if n == 0:
            return
        flat = block.reshape(n, -1)
        part = slice(done, done + n)
        # Where the design has fewer rows, that is said at the end.
        rows = np.ascontiguousarray(basis.rows[:, part])
        kept = basis.kept[part]
        n = len(kept)
        begins = bool(kept.any()) and not basis.kept[:done].any()
        near = np.flatnonzero((basis.near >= done) & (basis.near < done + n))
        for voxels, tile in zip(self._voxels, self._tiles, strict=True):
            values = _gather(flat[:n], voxels, finite=self._finite)
            if begins:
                tile.shift[:] = values[kept].mean(axis=0)
            values -= tile.shift
            if not kept.all():
                values[~kept] = 0
            tile.near[near] = values[basis.near[near] - done]
            tile.products[:] += np.matmul(rows, values, out=scratch("products", tile.products.shape))
            _add(tile, values)
        self._done += len(block)
        if self._done >= 2 * self._centred and basis.kept[: self._done].any():
            if self._centred:
                _recentre(self._tiles, basis, self._done)
            self._centred = self._done

    def sums(self) -> list[Sums]:
        """The sums, ``VOXEL_TILE`` voxels after ``VOXEL_TILE`` voxels, once every block was added.

        Raises
        ------
        ValueError
            If the volumes were not as many as the rows of the design.
        """
        if self._done != self._basis.rows.shape[1]:
            raise ValueError(
                f"The blocks hold {self._done} volumes and the design {self._basis.rows.shape[1]}."
            )
        return self._tiles


def accumulate(
    blocks: Iterable[NDArray[Any]], basis: Basis, voxels: NDArray[np.intp], *, finite: bool = False
) -> list[Sums]:
    """Accumulate the sums of some voxels over the blocks of a run.

    Parameters
    ----------
    blocks : iterable of ndarray, shape (n, ...)
        Consecutive volumes, any real dtype; together as many as ``basis`` has. Each is dropped before the next
        is taken.
    basis : Basis
    voxels : ndarray of int, shape (V,)
    finite : bool
        See :class:`Accumulator`.

    Returns
    -------
    list of Sums
        Of ``VOXEL_TILE`` voxels each, in order.

    Raises
    ------
    ValueError
        If the volumes are not as many as the rows of the design.
    """
    accumulator = Accumulator(basis, voxels, finite=finite)
    for block in blocks:
        accumulator.add(block)
        # The next block is made before this name is bound to it.
        del block
    return accumulator.sums()


def _make_tiles(basis: Basis, sizes: Sequence[int]) -> list[Sums]:
    """Sums of no data for tiles of voxels: parts of one array, which the system hands out in larger pages."""
    N = basis.order
    rows = (len(basis.rows), 1, N, len(basis.near), N, 1)
    memory = np.zeros(sum(rows) * sum(sizes))
    tiles, place = [], 0
    for V in sizes:
        parts = []
        for n in rows:
            parts.append(memory[place : place + n * V].reshape(n, V))
            place += n * V
        products, squares, lagged, near, newest, shift = parts
        tiles.append(Sums(products, squares[0], lagged, near, newest, shift[0]))
    return tiles


def _gather(flat: NDArray[Any], voxels: NDArray[np.intp], *, finite: bool) -> Floats:
    """Samples of some voxels, (n, v), valid until the next."""
    shape = len(flat), len(voxels)
    taken, values = scratch("taken", shape, flat.dtype), scratch("values", shape)
    # The numbers are within the volume; without checks, nothing is buffered.
    flat.take(voxels, axis=1, out=taken, mode="clip")
    values[...] = taken
    if finite:
        np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    return values


def _add(sums: Sums, y: Floats) -> None:
    """Add the squares and lag products of the samples y (n, v), relative to the shift and 0 where censored, in place."""
    sums.squares[:] += np.einsum("tv,tv->v", y, y)
    n, order = len(y), len(sums.lagged)
    for k in range(1, order + 1):
        if n > k:
            sums.lagged[k - 1] += np.einsum("tv,tv->v", y[k:], y[:-k])
        first = sums.newest[order - k : order - k + min(k, n)]
        sums.lagged[k - 1] += np.einsum("tv,tv->v", first, y[: len(first)])
    if order:
        sums.newest[:] = np.concatenate([sums.newest, y[-order:]])[-order:]


def _recentre(tiles: list[Sums], basis: Basis, done: int) -> None:
    """Make the sums relative to the mean of the samples so far, in place.

    The first block may be a single volume, and far from the others. Done whenever the volumes have doubled, this
    costs next to nothing, and no sum grows larger than the variance of the data makes it.
    """
    N = basis.order
    kept = np.concatenate([np.zeros(N, dtype=bool), basis.kept, np.zeros(N, dtype=bool)])
    newest = kept[done : done + N]
    # Of a pair at lag k, the later one may be still to come.
    open_pairs = np.zeros((N, N))
    for k in range(1, N + 1):
        open_pairs[k - 1, N - k :] = newest[N - k :] & kept[done + N : done + N + k]
    totals = basis.rows[:, :done].sum(axis=1)
    # The products are plain sums so far, open pairs or not.
    plain = totals.copy()
    totals[len(totals) - N :] -= open_pairs.sum(axis=1)
    seen = basis.near < done
    place = len(totals) - N - 1
    for tile in tiles:
        by = -tile.products[place] / totals[place]
        linear = tile.products[place + 1 :] - open_pairs @ tile.newest
        _shift(tile, totals, by, linear, plain=plain)
        tile.near[~seen] = 0
        tile.newest[~newest] = 0


def _shift(sums: Sums, totals: Floats, by: Floats, linear: Floats, *, plain: Floats | None = None) -> None:
    """Add ``by`` (V,), constant in time, to the data, in place.

    ``totals`` are the sums of the rows used so far, and ``linear`` (N, V) of the samples that lag products are made of;
    ``plain`` those that products are made of, where they differ.
    """
    N = len(linear)
    place = len(totals) - N - 1
    sums.squares[:] += 2 * by * sums.products[place] + totals[place] * by**2
    sums.lagged[:] += by * linear + totals[place + 1 :, None] / 2 * by**2
    change = scratch("products", sums.products.shape)
    sums.products[:] += np.multiply.outer(totals if plain is None else plain, by, out=change)
    sums.near[:] += by
    sums.newest[:] += by
    sums.shift[:] -= by


class Signal(NamedTuple):
    """The sums of a signal without its mean, and that mean.

    Attributes
    ----------
    sums : Sums
    level : ndarray, shape (V,)
        The constant that was left out.
    rounding : ndarray, shape (V,)
        Sum of squares that the rounding of the samples may amount to.
    """

    sums: Sums
    level: Floats
    rounding: Floats

    def tile(self, start: int, size: int) -> Signal:
        """Views of ``size`` voxels, the first of them ``start``."""
        part = slice(start, start + size)
        return Signal(self.sums.tile(start, size), self.level[part], self.rounding[part])


@quiet
def remove_mean(sums: Sums, basis: Basis) -> Signal:
    """Split the data into its temporal mean over the kept volumes and the rest.

    Parameters
    ----------
    sums : Sums
        Of the data as it was read; they become those of the result.
    basis : Basis

    Returns
    -------
    Signal
        ``squares`` is NaN for voxels without variance in time.
    """
    n = basis.n_kept
    largest = np.abs(sums.shift)
    mean = sums.products[-1 - basis.order] / n
    _shift(sums, basis.totals, -mean, sums.products[len(sums.products) - basis.order :])
    level = sums.shift
    rounding = n * (NO_VARIANCE * np.maximum(largest, np.abs(level))) ** 2
    sums.squares[sums.squares <= rounding] = np.nan
    return Signal(sums, level, rounding)


@quiet
def scale_signal(signal: Signal, basis: Basis, gain: Floats, offset: Floats) -> Signal:
    """Scale the data to ``gain * y + offset``.

    Parameters
    ----------
    signal : Signal
        From :func:`remove_mean`; its sums become those of the result.
    basis : Basis
    gain, offset : ndarray, shape (V,)

    Returns
    -------
    Signal
        All NaN for voxels without variance in time. If the design spans no constant, nothing is left out of its
        sums.
    """
    level = gain * signal.level + offset
    gain = np.where(np.isnan(signal.sums.squares), np.nan, gain)
    sums, rounding = signal.sums, signal.rounding * gain**2
    for values, factor in (
        (sums.products, gain),
        (sums.near, gain),
        (sums.newest, gain),
        (sums.squares, gain**2),
        (sums.lagged, gain**2),
    ):
        np.multiply(values, factor, out=values)
    if basis.spans_constant:
        return Signal(sums, level, rounding)
    _shift(sums, basis.totals, level, sums.products[len(sums.products) - basis.order :])
    return Signal(sums, np.zeros_like(level), rounding)


@quiet
def mean_voxels(
    blocks: Iterable[NDArray[Any]], voxels: NDArray[np.intp], kept: NDArray[np.bool_], *, finite: bool
) -> Floats:
    """Average each voxel over the kept volumes of a run.

    Parameters
    ----------
    blocks : iterable of ndarray, shape (n, ...)
        Consecutive volumes.
    voxels : ndarray of int, shape (V,)
        Numbers of the voxels in a raveled volume.
    kept : ndarray of bool, shape (T,)
        Volumes that are not censored.
    finite : bool
        Count non-finite values as 0.

    Returns
    -------
    ndarray, shape (1, V)
        NaN where the mean is not finite, so that such a voxel can be left out of a mean of voxels.
    """
    total = np.zeros((1, len(voxels)))
    done = 0
    for block in blocks:
        chosen = kept[done : done + len(block)]
        flat = block.reshape(len(block), -1)
        for start in range(0, len(voxels), VOXEL_TILE):
            tile = slice(start, start + VOXEL_TILE)
            total[0, tile] += _gather(flat, voxels[tile], finite=finite)[chosen].sum(axis=0)
        done += len(block)
        del block, flat
    average: Floats = total / kept.sum()
    average[~np.isfinite(average)] = np.nan
    return average
