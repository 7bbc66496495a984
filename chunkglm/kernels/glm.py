r"""Least squares and exact AR(1) at every voxel, from sums that are accumulated over time.

Notation, for one run: design :math:`X` (T, P) of rank r; its singular value decomposition :math:`X = U s V'`; S shifts down
by one sample, with a first row of zeros. :math:`Q = U R` with R the rotation that diagonalises :math:`U'(S + S')U`, so that

.. math:: Q'Q = I, \qquad Q'(S + S')Q = \Lambda = \mathrm{diag}(l).

Whitening by AR(1) with coefficient :math:`\rho` is :math:`W = I - \rho S` (the first sample is left as it is), and

.. math:: W'W = (1 + \rho^2) I - \rho (S + S') - \rho^2 e_T e_T'

with :math:`e_T` the last unit vector. With q the last row of Q, :math:`c_0 = Q'y` and :math:`c_1 = Q'(S + S')y`, the
generalised least squares problem in the coordinates of Q is

.. math::
    M(\rho) &= Q'W'WQ = D - \rho^2 q q', \quad D = \mathrm{diag}(1 + \rho^2 - \rho l) \\
    Q'W'Wy &= (1 + \rho^2) c_0 - \rho c_1 - \rho^2 q y_T \\
    y'W'Wy &= (1 + \rho^2) s_0 - 2 \rho s_1 - \rho^2 y_T^2

where :math:`s_0 = \sum y_t^2` and :math:`s_1 = \sum y_t y_{t+1}`. M is diagonal plus rank one, so its inverse is that of
Sherman and Morrison, in O(r) operations a voxel and at that voxel's own :math:`\rho`. Only :math:`c_0, c_1, s_0, s_1`, the
sum, and the first and last sample touch the data, and all of them are sums over time: a run is fitted in one pass over
blocks of volumes, none of which is kept.

The samples are accumulated relative to their mean in the first block, and the mean is then removed exactly, so that
nothing cancels that the model does not remove itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

VOXEL_TILE = 1024
"""Voxels that are accumulated at a time: their samples and sums stay in the cache."""

NO_VARIANCE = 16 * np.finfo(np.float64).eps
"""A standard deviation below this part of the level is rounding, not signal."""

NO_RESIDUAL = 1e-13
"""A residual sum of squares below this part of the total has no correct digit."""

BINS = 100
"""Steps of the autocorrelation per unit, under the reference's rules."""


class Basis(NamedTuple):
    """Everything that fitting and contrasts need of a design matrix.

    Attributes
    ----------
    rows : ndarray, shape (2 r + 1, T)
        Q', Q'(S + S') and a row of ones: what the data is multiplied by.
    lag : ndarray, shape (r,)
        The diagonal of Q'(S + S')Q.
    last : ndarray, shape (r,)
        The last row of Q.
    ones : ndarray, shape (2 r,)
        Q'1 and Q'(S + S')1.
    to_beta : ndarray, shape (P, r)
        From coordinates in Q to regression coefficients (of minimal norm where r < P).
    spans_constant : bool
        Whether a constant signal is fitted exactly.
    """

    rows: Floats
    lag: Floats
    last: Floats
    ones: Floats
    to_beta: Floats
    spans_constant: bool

    @property
    def rank(self) -> int:
        """Rank r of the design."""
        return len(self.lag)


def make_basis(design: Floats) -> Basis:
    """Decompose a design matrix.

    Parameters
    ----------
    design : ndarray, shape (T, P), float64

    Returns
    -------
    Basis
    """
    U, s, Vt = np.linalg.svd(design, full_matrices=False)
    rank = int((s > s[0] * max(design.shape) * np.finfo(np.float64).eps).sum())
    U, s, Vt = U[:, :rank], s[:rank], Vt[:rank]
    cross = U.T @ _shift_both(U)
    lag, R = np.linalg.eigh((cross + cross.T) / 2)
    Q = U @ R
    shifted = _shift_both(Q)
    constant = np.ones(len(Q))
    unfitted = constant - Q @ Q.sum(axis=0)
    return Basis(
        rows=np.ascontiguousarray(np.vstack([Q.T, shifted.T, constant[None]])),
        lag=lag,
        last=Q[-1].copy(),
        ones=np.concatenate([Q.sum(axis=0), shifted.sum(axis=0)]),
        to_beta=(Vt.T / s) @ R,
        spans_constant=bool(np.linalg.norm(unfitted) < 1e-8 * np.sqrt(len(Q))),
    )


def _shift_both(Z: Floats) -> Floats:
    """(S + S') Z."""
    out = np.zeros_like(Z)
    out[1:] += Z[:-1]
    out[:-1] += Z[1:]
    return out


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


def accumulate(blocks: Iterable[NDArray[Any]], basis: Basis, voxels: NDArray[np.intp], *, finite: bool = False) -> Sums:
    """Accumulate the sums of some voxels over the blocks of a run.

    Parameters
    ----------
    blocks : iterable of ndarray, shape (n, ...)
        Consecutive volumes, any real dtype; together as many as ``basis`` has. Each is dropped before the next is taken.
    basis : Basis
    voxels : ndarray of int, shape (V,)
        Numbers of the voxels in a raveled volume.
    finite : bool
        Count non-finite values as 0, as the reference does. Otherwise they make their voxel NaN.

    Returns
    -------
    Sums
    """
    V = len(voxels)
    sums = Sums(np.zeros((len(basis.rows), V)), *(np.zeros(V) for _ in range(5)))
    done = 0
    for block in blocks:
        flat = block.reshape(len(block), -1)
        rows = np.ascontiguousarray(basis.rows[:, done : done + len(block)])
        for start in range(0, V, VOXEL_TILE):
            tile = slice(start, start + VOXEL_TILE)
            y = flat[:, voxels[tile]].astype(np.float64)
            if finite:
                np.nan_to_num(y, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
            _add(sums, tile, y, rows, is_first=done == 0)
        done += len(block)
    if done != basis.rows.shape[1]:
        raise ValueError(f"The blocks hold {done} volumes and the design {basis.rows.shape[1]}.")
    return sums


def _add(sums: Sums, tile: slice, y: Floats, rows: Floats, *, is_first: bool) -> None:
    """Add the samples y (n, v) of a tile."""
    with np.errstate(invalid="ignore", over="ignore"):
        if is_first:
            sums.shift[tile] = y.mean(axis=0)
        y -= sums.shift[tile]
        sums.products[:, tile] += rows @ y
        sums.squares[tile] += np.einsum("tv,tv->v", y, y)
        sums.lagged[tile] += np.einsum("tv,tv->v", y[1:], y[:-1])
        if is_first:
            sums.first[tile] = y[0]
        else:
            sums.lagged[tile] += sums.last[tile] * y[0]
        sums.last[tile] = y[-1]


def temporal_mean(sums: Sums, n_volumes: int) -> Floats:
    """Temporal mean of every voxel, shape (V,)."""
    mean: Floats = sums.shift + sums.products[-1] / n_volumes
    return mean


def _shifted(sums: Sums, basis: Basis, by: Floats) -> Sums:
    """The sums of the data plus ``by`` (V,), which is constant in time."""
    T, r = basis.rows.shape[1], basis.rank
    total = sums.products[-1]
    products = sums.products.copy()
    products[: 2 * r] += basis.ones[:, None] * by
    products[-1] += T * by
    return Sums(
        products=products,
        squares=sums.squares + 2 * by * total + T * by**2,
        lagged=sums.lagged + by * (2 * total - sums.first - sums.last) + (T - 1) * by**2,
        first=sums.first + by,
        last=sums.last + by,
        shift=sums.shift - by,
    )


def _scaled(sums: Sums, by: Floats) -> Sums:
    """The sums of the data times ``by`` (V,)."""
    return Sums(
        sums.products * by, sums.squares * by**2, sums.lagged * by**2, sums.first * by, sums.last * by, sums.shift * by
    )


class Signal(NamedTuple):
    """The sums of the scaled signal without its mean, and that mean.

    Attributes
    ----------
    sums : Sums
        Of the signal minus its temporal mean; of the signal itself where the design does not span a constant.
    level : ndarray, shape (V,)
        Constant that was left out, which the design fits exactly.
    """

    sums: Sums
    level: Floats


def scale_signal(sums: Sums, basis: Basis, gain: Floats, offset: Floats) -> Signal:
    """Scale the data to ``gain * y + offset``.

    Parameters
    ----------
    sums : Sums
        Of the data as it was read.
    basis : Basis
    gain, offset : ndarray, shape (V,)

    Returns
    -------
    Signal
        All NaN for voxels without variance in time.
    """
    T = basis.rows.shape[1]
    with np.errstate(invalid="ignore", over="ignore"):
        mean = temporal_mean(sums, T)
        centred = _shifted(sums, basis, -sums.products[-1] / T)
        level = gain * mean + offset
        flat = centred.squares <= T * (NO_VARIANCE * np.maximum(np.abs(mean), np.abs(sums.shift))) ** 2
        scaled = _scaled(centred, np.where(flat, np.nan, gain))
        if basis.spans_constant:
            return Signal(scaled, level)
        return Signal(_shifted(scaled, basis, level), np.zeros_like(level))


class Fit(NamedTuple):
    """Estimates of V voxels: coefficients (P, V), variance of the innovations (V,)."""

    beta: Floats
    sigma2: Floats


def residual_lags(signal: Signal, basis: Basis) -> tuple[Floats, Floats]:
    """Sums of squares and of lag-1 products of the least squares residuals, each of shape (V,).

    ``r0 = s0 - c0'c0`` and ``r1 = s1 - c0'c1 + c0' diag(l) c0 / 2``.
    """
    r = basis.rank
    sums = signal.sums
    c0, c1 = sums.products[:r], sums.products[r : 2 * r]
    r0 = sums.squares - np.einsum("rv,rv->v", c0, c0)
    r1 = sums.lagged - np.einsum("rv,rv->v", c0, c1) + np.einsum("r,rv,rv->v", basis.lag, c0, c0) / 2
    return r0, r1


def yule_walker(signal: Signal, basis: Basis) -> Floats:
    """Lag-1 autocorrelation of the least squares residuals, r1 / r0, shape (V,); between -1 and 1."""
    r0, r1 = residual_lags(signal, basis)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(r0 > NO_RESIDUAL * signal.sums.squares, r1 / r0, np.nan)


def yule_walker_binned(signal: Signal, basis: Basis) -> Floats:
    """The reference's coefficient: lag products by their numbers of terms, cut towards zero to steps of 1 / ``BINS``.

    Source: nilearn 0.14.1, ``run_glm``.
    """
    T = basis.rows.shape[1]
    rho: Floats = np.trunc(yule_walker(signal, basis) * T / (T - 1) * BINS) / BINS
    return rho


def fit_ar1(signal: Signal, basis: Basis, rho: Floats, dof: int) -> Fit:
    """Generalised least squares with the AR(1) coefficient of each voxel; ``rho = 0`` is ordinary least squares.

    Parameters
    ----------
    signal : Signal
    basis : Basis
    rho : ndarray, shape (V,)
    dof : int
        Divisor of the residual sum of squares.

    Returns
    -------
    Fit
        ``sigma2`` is NaN where the residual has no correct digit.
    """
    r = basis.rank
    sums = signal.sums
    c0, c1 = sums.products[:r], sums.products[r : 2 * r]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        rhs = (1 + rho**2) * c0 - rho * c1 - rho**2 * basis.last[:, None] * sums.last
        total = (1 + rho**2) * sums.squares - 2 * rho * sums.lagged - rho**2 * sums.last**2
        coordinates = _solve(basis, rho, rhs)
        residual = total - np.einsum("rv,rv->v", coordinates, rhs)
        residual = np.where(residual > NO_RESIDUAL * total, residual, np.nan)
        coordinates += basis.ones[:r, None] * signal.level
        return Fit(basis.to_beta @ coordinates, residual / dof)


def _solve(basis: Basis, rho: Floats, rhs: Floats) -> Floats:
    """M(rho)^-1 rhs for each voxel, by Sherman and Morrison."""
    D = (1 + rho**2) - rho * basis.lag[:, None]
    out: Floats = rhs / D
    tail = basis.last[:, None] / D
    rho2 = rho**2
    out += tail * (rho2 * np.einsum("r,rv->v", basis.last, out) / (1 - rho2 * np.einsum("r,rv->v", basis.last, tail)))
    return out


def contrast_variance(basis: Basis, weights: Floats, rho: Floats) -> Floats:
    """Variance of a contrast in units of sigma2: ``c' (X' W'W X)^+ c``.

    Parameters
    ----------
    basis : Basis
    weights : ndarray, shape (P,)
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
    """

    basis: Basis
    dof: int
    autoregressive: bool
    scaling: str
    reference_rules: bool


def gain_and_offset(mean: Floats, model: Model, run_mean: float) -> tuple[Floats, Floats]:
    """The linear scaling of each voxel: the signal becomes ``gain * y + offset``.

    Returns
    -------
    gain, offset : ndarray, shape (V,)
        NaN where the level that percent refer to is 0 or less (under the reference's rules there is no such level).
    """
    if model.scaling == "none":
        return np.ones_like(mean), np.zeros_like(mean)
    level = mean if model.scaling == "voxel" else np.full_like(mean, run_mean)
    level = np.maximum(level, 1) if model.reference_rules else np.where(level > 0, level, np.nan)
    return 100 / level, np.full_like(mean, -100.0)


def mean_voxels(blocks: Iterable[NDArray[Any]], voxels: NDArray[np.intp], model: Model) -> Floats:
    """Temporal mean of each voxel over the blocks of a run, shape (1, V)."""
    sums = accumulate(blocks, model.basis, voxels, finite=model.reference_rules)
    return temporal_mean(sums, model.basis.rows.shape[1])[None]


def fit_voxels(
    blocks: Iterable[NDArray[Any]], voxels: NDArray[np.intp], model: Model, run_mean: float = np.nan
) -> Floats:
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
    ndarray, shape (P + 2, V), float64
        Coefficients, innovation variance, and the AR coefficient that was used (0 for OLS).
    """
    basis = model.basis
    sums = accumulate(blocks, basis, voxels, finite=model.reference_rules)
    out = np.empty((len(basis.to_beta) + 2, len(voxels)))
    for start in range(0, len(voxels), VOXEL_TILE):
        # In tiles, because solving needs several times the memory of the sums.
        tile = slice(start, start + VOXEL_TILE)
        part = Sums(*(values[..., tile] for values in sums))
        gain, offset = gain_and_offset(temporal_mean(part, basis.rows.shape[1]), model, run_mean)
        signal = scale_signal(part, basis, gain, offset)
        rho = np.zeros_like(gain)
        if model.autoregressive:
            estimate = yule_walker_binned if model.reference_rules else yule_walker
            rho = estimate(signal, basis)
        fit = fit_ar1(signal, basis, rho, model.dof)
        out[:-2, tile], out[-2, tile], out[-1, tile] = fit.beta, fit.sigma2, rho
    return out


def reference_rank(design: Floats) -> int:
    """Rank by the reference's rule: singular values above ``eps`` times the sum of all absolute entries.

    Source: nilearn 0.14.1, ``OLSModel.df_resid``.
    """
    tolerance = np.abs(design).sum() * np.finfo(np.float64).eps
    return int((np.linalg.svd(design, compute_uv=False) > tolerance).sum())
