r"""Least squares and exact AR(1) at every voxel, from sums that are accumulated over time.

Notation, for one run: design :math:`X` (T, P) of rank r; :math:`U` (T, r) an orthonormal basis of its column
space; S shifts down by one sample, with a first row of zeros. :math:`Q = U R` with R the rotation that
diagonalises :math:`U'(S + S')U`, so that

.. math:: Q'Q = I, \qquad Q'(S + S')Q = \Lambda = \mathrm{diag}(l).

Whitening by AR(1) with coefficient :math:`\rho` is :math:`W = I - \rho S` (the first sample is left as it is),
and

.. math:: W'W = (1 + \rho^2) I - \rho (S + S') - \rho^2 e_T e_T'

with :math:`e_T` the last unit vector. With q the last row of Q, :math:`c_0 = Q'y` and
:math:`c_1 = Q'(S + S')y`, the generalised least squares problem in the coordinates of Q is

.. math::
    M(\rho) &= Q'W'WQ = D - \rho^2 q q', \quad D = \mathrm{diag}(1 + \rho^2 - \rho l) \\
    Q'W'Wy &= (1 + \rho^2) c_0 - \rho c_1 - \rho^2 q y_T \\
    y'W'Wy &= (1 + \rho^2) s_0 - 2 \rho s_1 - \rho^2 y_T^2

where :math:`s_0 = \sum y_t^2` and :math:`s_1 = \sum y_t y_{t+1}`. M is diagonal plus rank one, so its inverse
is that of Sherman and Morrison, in O(r) operations a voxel and at that voxel's own :math:`\rho`. Only
:math:`c_0, c_1, s_0, s_1`, the sum, and the first and last sample touch the data, and all of them are sums over
time: a run is fitted in one pass over blocks of volumes, none of which is kept.

The samples are accumulated relative to a level near their mean, and the mean is then removed exactly, so that
nothing cancels that the model does not remove itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chunkglm.kernels.autocorrelation import corrected

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from chunkglm.kernels.autocorrelation import Correction
    from chunkglm.kernels.basis import Basis

    Floats = NDArray[np.float64]

VOXEL_TILE = 1024
"""Voxels that are accumulated at a time: their samples and sums stay in the cache."""

NO_VARIANCE = 16 * np.finfo(np.float64).eps
"""A standard deviation below this part of the level is rounding, not signal."""

NO_RESIDUAL = 8 * np.finfo(np.float64).eps
"""A residual sum of squares below this part of the total, for each volume, is rounding."""

BINS = 100
"""Steps of the autocorrelation per unit, under the reference's rules."""

# Whatever is not finite ends as NaN in its own voxel, which is the answer and no surprise.
_quiet = np.errstate(divide="ignore", invalid="ignore", over="ignore")


# -------------------------------------------------------------------------------------------------------- sums


class Sums(NamedTuple):
    """What is kept of the data of V voxels, relative to ``shift``.

    Attributes
    ----------
    products : ndarray, shape (2 r + 1, V)
        c0, c1 and the sum of the samples.
    squares, lagged : ndarray, shape (V,)
        s0 and s1.
    first, last : ndarray, shape (V,)
        First and last sample.
    shift : ndarray, shape (V,)
        What was subtracted from every sample.
    """

    products: Floats
    squares: Floats
    lagged: Floats
    first: Floats
    last: Floats
    shift: Floats

    def tile(self, start: int) -> Sums:
        """Views of the sums of ``VOXEL_TILE`` voxels, the first of them ``start``."""
        return Sums(*(values[..., start : start + VOXEL_TILE] for values in self))


@_quiet
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
        Count non-finite values as 0, as the reference does. Otherwise they make their voxel NaN.

    Returns
    -------
    Sums

    Raises
    ------
    ValueError
        If the volumes are not as many as the rows of the design.
    """
    V = len(voxels)
    sums = Sums(np.zeros((len(basis.rows), V)), *(np.zeros(V) for _ in range(5)))
    done = centred = 0
    for block in blocks:
        n = len(block)
        if n == 0:
            continue
        flat = block.reshape(n, -1)
        rows = np.ascontiguousarray(basis.rows[:, done : done + n])
        for start in range(0, V, VOXEL_TILE):
            y = _samples(flat, voxels[start : start + VOXEL_TILE], finite=finite)
            _add(sums.tile(start), y, rows, is_first=done == 0)
        done += n
        # The next block is made before these names are bound to it.
        del block, flat
        if done >= 2 * centred:
            if centred:
                _recentre(sums, basis.rows[:, :done].sum(axis=1))
            centred = done
    if done != basis.rows.shape[1]:
        raise ValueError(f"The blocks hold {done} volumes and the design {basis.rows.shape[1]}.")
    return sums


def _samples(flat: NDArray[Any], voxels: NDArray[np.intp], *, finite: bool) -> Floats:
    """Samples of some voxels, as a new array (n, v)."""
    y = flat[:, voxels].astype(np.float64)
    if finite:
        np.nan_to_num(y, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    return y


def _add(sums: Sums, y: Floats, rows: Floats, *, is_first: bool) -> None:
    """Add the samples y (n, v), in place."""
    if is_first:
        sums.shift[:] = y.mean(axis=0)
    y -= sums.shift
    sums.products[:] += rows @ y
    sums.squares[:] += np.einsum("tv,tv->v", y, y)
    sums.lagged[:] += np.einsum("tv,tv->v", y[1:], y[:-1])
    if is_first:
        sums.first[:] = y[0]
    else:
        sums.lagged[:] += sums.last * y[0]
    sums.last[:] = y[-1]


def _recentre(sums: Sums, totals: Floats) -> None:
    """Make the sums relative to the mean of the samples so far, in place.

    The first block may be a single volume, and far from the others. Done whenever the volumes have doubled, this
    costs next to nothing, and no sum grows larger than the variance of the data makes it.
    """
    for start in range(0, len(sums.shift), VOXEL_TILE):
        old = sums.tile(start)
        new = _shifted(old, totals, -old.products[-1] / totals[-1])
        for target, values in zip(old, new, strict=True):
            target[...] = values


def _shifted(sums: Sums, totals: Floats, by: Floats) -> Sums:
    """Sums of the data plus ``by`` (V,), constant in time; ``totals`` are the sums of the rows used so far."""
    n, total = totals[-1], sums.products[-1]
    return Sums(
        products=sums.products + totals[:, None] * by,
        squares=sums.squares + 2 * by * total + n * by**2,
        lagged=sums.lagged + by * (2 * total - sums.first - sums.last) + (n - 1) * by**2,
        first=sums.first + by,
        last=sums.last + by,
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


@_quiet
def remove_mean(sums: Sums, basis: Basis) -> Signal:
    """Split the data into its temporal mean and the rest.

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
    n = basis.totals[-1]
    centred = _shifted(sums, basis.totals, -sums.products[-1] / n)
    level = sums.shift + sums.products[-1] / n
    rounding = n * (NO_VARIANCE * np.maximum(np.abs(level), np.abs(sums.shift))) ** 2
    flat = centred.squares <= rounding
    return Signal(centred._replace(squares=np.where(flat, np.nan, centred.squares)), level, rounding)


@_quiet
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
    products, squares, lagged, first, last, shift = signal.sums
    scaled = Sums(
        products * gain, squares * gain**2, lagged * gain**2, first * gain, last * gain, shift * gain
    )
    rounding = signal.rounding * gain**2
    if basis.spans_constant:
        return Signal(scaled, level, rounding)
    return Signal(_shifted(scaled, basis.totals, level), np.zeros_like(level), rounding)


# --------------------------------------------------------------------------------------------------- estimates


class Fit(NamedTuple):
    """Estimates of V voxels: coefficients (P, V), variance of the innovations (V,)."""

    beta: Floats
    sigma2: Floats


@_quiet
def residual_lags(signal: Signal, basis: Basis) -> tuple[Floats, Floats]:
    """Sum the squares and the lag-1 products of the least squares residuals, each of shape (V,).

    ``r0 = s0 - c0'c0`` and ``r1 = s1 - c0'c1 + c0' diag(l) c0 / 2``.
    """
    r = basis.rank
    sums = signal.sums
    c0, c1 = sums.products[:r], sums.products[r : 2 * r]
    r0 = sums.squares - np.einsum("rv,rv->v", c0, c0)
    r1 = sums.lagged - np.einsum("rv,rv->v", c0, c1) + np.einsum("r,rv,rv->v", basis.lag, c0, c0) / 2
    return r0, r1


@_quiet
def yule_walker(signal: Signal, basis: Basis) -> Floats:
    """Estimate the lag-1 autocorrelation of the residuals, r1 / r0, shape (V,); between -1 and 1.

    NaN where there is no residual.
    """
    r0, r1 = residual_lags(signal, basis)
    return np.where(r0 > _rounding(signal, basis), r1 / r0, np.nan)


def _rounding(signal: Signal, basis: Basis) -> Floats:
    """Residual sum of squares that means nothing: what rounding of the samples and of the sums amounts to."""
    limit: Floats = np.maximum(signal.rounding, NO_RESIDUAL * basis.totals[-1] * signal.sums.squares)
    return limit


def yule_walker_binned(signal: Signal, basis: Basis) -> Floats:
    """Estimate the coefficient as the reference does.

    Lag products are divided by their numbers of terms, and the quotient cut towards zero to steps of
    1 / ``BINS``. Source: nilearn 0.14.1, ``run_glm``.
    """
    T = basis.rows.shape[1]
    rho: Floats = np.trunc(yule_walker(signal, basis) * T / (T - 1) * BINS) / BINS
    return rho


@_quiet
def fit_ar1(signal: Signal, basis: Basis, rho: Floats, dof: int) -> Fit:
    """Fit by generalised least squares, with the AR(1) coefficient of each voxel.

    Parameters
    ----------
    signal : Signal
    basis : Basis
    rho : ndarray, shape (V,)
        0 is ordinary least squares.
    dof : int
        Divisor of the residual sum of squares.

    Returns
    -------
    Fit
        ``sigma2`` is NaN where the residual is rounding.
    """
    r = basis.rank
    sums = signal.sums
    c0, c1 = sums.products[:r], sums.products[r : 2 * r]
    rhs = (1 + rho**2) * c0 - rho * c1 - rho**2 * basis.last[:, None] * sums.last
    total = (1 + rho**2) * sums.squares - 2 * rho * sums.lagged - rho**2 * sums.last**2
    coordinates = _solve(basis, rho, rhs)
    residual = total - np.einsum("rv,rv->v", coordinates, rhs)
    residual = np.where(residual > _rounding(signal, basis), residual, np.nan)
    coordinates += basis.totals[:r, None] * signal.level
    return Fit(basis.to_beta @ coordinates, residual / dof)


def _solve(basis: Basis, rho: Floats, rhs: Floats) -> Floats:
    """M(rho)^-1 rhs for each voxel, by Sherman and Morrison."""
    D = (1 + rho**2) - rho * basis.lag[:, None]
    out: Floats = rhs / D
    tail = basis.last[:, None] / D
    correction = rho**2 * np.einsum("r,rv->v", basis.last, out)
    out += tail * (correction / (1 - rho**2 * np.einsum("r,rv->v", basis.last, tail)))
    return out


def contrast_variance(basis: Basis, weights: Floats, rho: Floats) -> Floats:
    """Compute the variance of a contrast in units of sigma2: ``c' (X' W'W X)^+ c``.

    Parameters
    ----------
    basis : Basis
    weights : ndarray, shape (P,)
        Of a contrast that the design can estimate.
    rho : ndarray, any shape

    Returns
    -------
    ndarray
        Of the shape of ``rho``.
    """
    v = basis.to_beta.T @ weights
    rho2 = rho**2
    direct = np.zeros_like(rho)
    mixed = np.zeros_like(rho)
    tail = np.zeros_like(rho)
    # A loop over regressors, not voxels: scratch stays at the size of a map.
    for v_i, l_i, q_i in zip(v, basis.lag, basis.last, strict=True):
        inverse = 1 / (1 + rho2 - rho * l_i)
        direct += v_i * v_i * inverse
        mixed += v_i * q_i * inverse
        tail += q_i * q_i * inverse
    return direct + rho2 * mixed**2 / (1 - rho2 * tail)


# ----------------------------------------------------------------------------------------------------- one run


class Model(NamedTuple):
    """How one run is fitted: everything but the data.

    Attributes
    ----------
    basis : Basis
        Of the run's design.
    dof : int
        Divisor of the residual sum of squares.
    autoregressive : bool
        AR(1) at each voxel's own coefficient; otherwise ordinary least squares.
    scaling : {"voxel", "run", "none"}
        Percent of the voxel's temporal mean, of the mean over the mask and time, or as it is.
    reference_rules : bool
        The rules of nilearn 0.14.1: means below 1 count as 1, non-finite samples as 0, binned coefficients.
    correction : Correction or None
        For the bias that fitting leaves in the autocorrelation; None leaves it uncorrected.
    """

    basis: Basis
    dof: int
    autoregressive: bool
    scaling: str
    reference_rules: bool
    correction: Correction | None = None


class Estimates(NamedTuple):
    """What is estimated at V voxels.

    Attributes
    ----------
    beta : ndarray, shape (P, V)
        Regression coefficients.
    sigma2 : ndarray, shape (V,)
        Variance of the innovations.
    rho : ndarray, shape (V,)
        AR coefficient that was used, 0 for ordinary least squares.
    n_unscaled : int
        Voxels with variance in time that are NaN because the mean that percent refer to is 0 or less.
    """

    beta: Floats
    sigma2: Floats
    rho: Floats
    n_unscaled: int


@_quiet
def gain_and_offset(mean: Floats, model: Model, run_mean: float) -> tuple[Floats, Floats]:
    """Find the linear scaling of each voxel: the signal becomes ``gain * y + offset``.

    Parameters
    ----------
    mean : ndarray, shape (V,)
        Temporal mean of each voxel.
    model : Model
    run_mean : float
        Mean over the mask and time.

    Returns
    -------
    gain, offset : ndarray, shape (V,)
        ``gain`` is NaN where the mean that percent refer to is 0 or less (under the reference's rules, no mean
        counts as less than 1).
    """
    if model.scaling == "none":
        return np.ones_like(mean), np.zeros_like(mean)
    level = mean if model.scaling == "voxel" else np.full_like(mean, run_mean)
    level = np.maximum(level, 1) if model.reference_rules else np.where(level > 0, level, np.nan)
    return 100 / level, np.full_like(mean, -100.0)


@_quiet
def mean_voxels(blocks: Iterable[NDArray[Any]], voxels: NDArray[np.intp], *, finite: bool) -> Floats:
    """Average each voxel over the blocks of a run.

    Parameters
    ----------
    blocks : iterable of ndarray, shape (n, ...)
        Consecutive volumes.
    voxels : ndarray of int, shape (V,)
        Numbers of the voxels in a raveled volume.
    finite : bool
        Count non-finite values as 0.

    Returns
    -------
    ndarray, shape (1, V)
        NaN where the mean is not finite, so that such a voxel can be left out of a mean of voxels.
    """
    total = np.zeros((1, len(voxels)))
    n = 0
    for block in blocks:
        flat = block.reshape(len(block), -1)
        for start in range(0, len(voxels), VOXEL_TILE):
            tile = slice(start, start + VOXEL_TILE)
            total[0, tile] += _samples(flat, voxels[tile], finite=finite).sum(axis=0)
        n += len(block)
        del block, flat
    average: Floats = total / n
    average[~np.isfinite(average)] = np.nan
    return average


@_quiet
def fit_voxels(
    blocks: Iterable[NDArray[Any]], voxels: NDArray[np.intp], model: Model, run_mean: float = np.nan
) -> Estimates:
    """Fit a run at some voxels, in one pass over its blocks.

    Parameters
    ----------
    blocks : iterable of ndarray, shape (n, ...)
        Consecutive volumes.
    voxels : ndarray of int, shape (V,)
        Numbers of the voxels in a raveled volume.
    model : Model
    run_mean : float
        Mean over the mask and time, for the scaling "run".

    Returns
    -------
    Estimates
    """
    basis = model.basis
    V = len(voxels)
    sums = accumulate(blocks, basis, voxels, finite=model.reference_rules)
    beta, sigma2, rho = np.empty((len(basis.to_beta), V)), np.empty(V), np.zeros(V)
    n_unscaled = 0
    for start in range(0, V, VOXEL_TILE):
        # In tiles, because solving needs several times the memory of the sums.
        tile = slice(start, start + VOXEL_TILE)
        data = remove_mean(sums.tile(start), basis)
        gain, offset = gain_and_offset(data.level, model, run_mean)
        n_unscaled += int((np.isnan(gain) & ~np.isnan(data.sums.squares)).sum())
        signal = scale_signal(data, basis, gain, offset)
        if model.autoregressive:
            rho[tile] = (yule_walker_binned if model.reference_rules else yule_walker)(signal, basis)
            if model.correction is not None:
                rho[tile] = corrected(rho[tile], model.correction)
        beta[:, tile], sigma2[tile] = fit_ar1(signal, basis, rho[tile], model.dof)
    return Estimates(beta, sigma2, rho, n_unscaled)
