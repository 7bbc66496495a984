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

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from chunkglm.kernels.basis import Basis

    Floats = NDArray[np.float64]

VOXEL_TILE = 1024
"""Voxels that are accumulated at a time: their samples and sums stay in the cache."""

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

    def tile(self, start: int, size: int = VOXEL_TILE) -> Sums:
        """Views of the sums of ``size`` voxels, the first of them ``start``."""
        return Sums(*(values[..., start : start + size] for values in self))


@quiet
def accumulate(
    blocks: Iterable[NDArray[Any]], basis: Basis, voxels: NDArray[np.intp], *, finite: bool = False
) -> Sums:
    """Accumulate the sums of some voxels over the blocks of a run.

    Parameters
    ----------
    blocks : iterable of ndarray, shape (n, ...)
        Consecutive volumes, any real dtype; together as many as ``basis`` has. Each is dropped before the next
        is taken.
    basis : Basis
    voxels : ndarray of int, shape (V,)
        Numbers of the voxels in a raveled volume.
    finite : bool
        Count non-finite values as 0, as the reference does. Otherwise they make their voxel NaN, unless their
        volume is censored.

    Returns
    -------
    Sums

    Raises
    ------
    ValueError
        If the volumes are not as many as the rows of the design.
    """
    V, N = len(voxels), basis.order
    shapes = ((len(basis.rows), V), (V,), (N, V), (len(basis.near), V), (N, V), (V,))
    sums = Sums(*(np.zeros(shape) for shape in shapes))
    done = centred = 0
    for block in blocks:
        n = len(block)
        if n == 0:
            continue
        flat = block.reshape(n, -1)
        part = slice(done, done + n)
        rows, kept = np.ascontiguousarray(basis.rows[:, part]), basis.kept[part]
        begins = bool(kept.any()) and not basis.kept[:done].any()
        near = np.flatnonzero((basis.near >= done) & (basis.near < done + n))
        for start in range(0, V, VOXEL_TILE):
            y = samples(flat, voxels[start : start + VOXEL_TILE], finite=finite)
            tile = sums.tile(start)
            if begins:
                tile.shift[:] = y[kept].mean(axis=0)
            y -= tile.shift
            y[~kept] = 0
            tile.near[near] = y[basis.near[near] - done]
            _add(tile, y, rows)
        done += n
        # The next block is made before these names are bound to it.
        del block, flat
        if done >= 2 * centred and basis.kept[:done].any():
            if centred:
                _recentre(sums, basis, done)
            centred = done
    if done != basis.rows.shape[1]:
        raise ValueError(f"The blocks hold {done} volumes and the design {basis.rows.shape[1]}.")
    return sums


def samples(flat: NDArray[Any], voxels: NDArray[np.intp], *, finite: bool) -> Floats:
    """Samples of some voxels, as a new array (n, v)."""
    y = flat[:, voxels].astype(np.float64)
    if finite:
        np.nan_to_num(y, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    return y


def _add(sums: Sums, y: Floats, rows: Floats) -> None:
    """Add the samples y (n, v), relative to the shift and 0 where censored, in place."""
    sums.products[:] += rows @ y
    sums.squares[:] += np.einsum("tv,tv->v", y, y)
    n, order = len(y), len(sums.lagged)
    for k in range(1, order + 1):
        if n > k:
            sums.lagged[k - 1] += np.einsum("tv,tv->v", y[k:], y[:-k])
        first = sums.newest[order - k : order - k + min(k, n)]
        sums.lagged[k - 1] += np.einsum("tv,tv->v", first, y[: len(first)])
    if order:
        sums.newest[:] = np.concatenate([sums.newest, y[-order:]])[-order:]


def _recentre(sums: Sums, basis: Basis, done: int) -> None:
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
    totals[len(totals) - N :] -= open_pairs.sum(axis=1)
    seen = basis.near < done
    place = len(totals) - N - 1
    for start in range(0, len(sums.shift), VOXEL_TILE):
        old = sums.tile(start)
        by = -old.products[place] / totals[place]
        linear = old.products[place + 1 :] - open_pairs @ old.newest
        new = _shifted(old, totals, by, linear)
        new.near[~seen] = 0
        new.newest[~newest] = 0
        # The products are plain sums so far, open pairs or not.
        new.products[place + 1 :] += open_pairs.sum(axis=1)[:, None] * by
        for target, values in zip(old, new, strict=True):
            target[...] = values


def _shifted(sums: Sums, totals: Floats, by: Floats, linear: Floats) -> Sums:
    """Sums of the data plus ``by`` (V,), constant in time.

    ``totals`` are the sums of the rows used so far, and ``linear`` (N, V) of the samples that lag products are made of.
    """
    N = len(linear)
    place = len(totals) - N - 1
    n, total = totals[place], sums.products[place]
    return Sums(
        products=sums.products + totals[:, None] * by,
        squares=sums.squares + 2 * by * total + n * by**2,
        lagged=sums.lagged + by * linear + totals[place + 1 :, None] / 2 * by**2,
        near=sums.near + by,
        newest=sums.newest + by,
        shift=sums.shift - by,
    )


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
        Of the data as it was read.
    basis : Basis

    Returns
    -------
    Signal
        ``squares`` is NaN for voxels without variance in time.
    """
    n = basis.n_kept
    total, linear = sums.products[-1 - basis.order], sums.products[len(sums.products) - basis.order :]
    centred = _shifted(sums, basis.totals, -total / n, linear)
    level = sums.shift + total / n
    rounding = n * (NO_VARIANCE * np.maximum(np.abs(level), np.abs(sums.shift))) ** 2
    flat = centred.squares <= rounding
    return Signal(centred._replace(squares=np.where(flat, np.nan, centred.squares)), level, rounding)


@quiet
def scale_signal(signal: Signal, basis: Basis, gain: Floats, offset: Floats) -> Signal:
    """Scale the data to ``gain * y + offset``.

    Parameters
    ----------
    signal : Signal
        From :func:`remove_mean`.
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
    products, squares, lagged, near, newest, shift = signal.sums
    scaled = Sums(
        products * gain, squares * gain**2, lagged * gain**2, near * gain, newest * gain, shift * gain
    )
    rounding = signal.rounding * gain**2
    if basis.spans_constant:
        return Signal(scaled, level, rounding)
    linear = scaled.products[len(products) - basis.order :]
    return Signal(_shifted(scaled, basis.totals, level, linear), np.zeros_like(level), rounding)


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
            total[0, tile] += samples(flat, voxels[tile], finite=finite)[chosen].sum(axis=0)
        done += len(block)
        del block, flat
    average: Floats = total / kept.sum()
    average[~np.isfinite(average)] = np.nan
    return average
