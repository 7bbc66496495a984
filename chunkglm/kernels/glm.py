r"""Least squares under autoregressive noise at every voxel, from sums that were accumulated over time.

Notation, for one run: design :math:`X` (T, P) of rank r; :math:`Q` (T, r) an orthonormal basis of its column space that
diagonalises :math:`Q'(S + S')Q = \Lambda = \mathrm{diag}(l)`, where S shifts down by one sample with a first row of zeros.
Estimates are found in the coordinates of Q, at each voxel's own coefficients, from sums (:mod:`chunkglm.kernels.sums`)
and the precision matrix of the noise (:mod:`chunkglm.kernels.precision`): :math:`b = M^{-1} Q'V^{-1}y` with
:math:`M = Q'V^{-1}Q`.

AR(1) without gaps, the usual case, needs no factorisation. Whitening is :math:`W = I - \rho S` (the first sample is left as
it is),

.. math:: W'W = (1 + \rho^2) I - \rho (S + S') - \rho^2 e_T e_T'

with :math:`e_T` the last unit vector. With q the last row of Q, :math:`c_0 = Q'y` and :math:`c_1 = Q'(S + S')y`,

.. math::
    M(\rho) &= Q'W'WQ = D - \rho^2 q q', \quad D = \mathrm{diag}(1 + \rho^2 - \rho l) \\
    Q'W'Wy &= (1 + \rho^2) c_0 - \rho c_1 - \rho^2 q y_T \\
    y'W'Wy &= (1 + \rho^2) s_0 - 2 \rho s_1 - \rho^2 y_T^2

where :math:`s_0 = \sum y_t^2` and :math:`s_1 = \sum y_t y_{t+1}`. M is diagonal plus rank one, so its inverse
is that of Sherman and Morrison, in O(r) operations a voxel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chunkglm.kernels.autocorrelation import DIFFERENCE, Correction, corrected, durbin, solve_lags, spread
from chunkglm.kernels.precision import (
    Precision,
    factorise,
    invert,
    make_precision,
    normal_matrix,
    quadratic_form,
    right_hand_side,
    substitute_back,
)
from chunkglm.kernels.sums import accumulate, quiet, remove_mean, scale_signal
from chunkglm.kernels.uncertainty import coefficient_covariance

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from chunkglm.kernels.basis import Basis
    from chunkglm.kernels.sums import Signal, Sums
    from chunkglm.kernels.uncertainty import Frequencies

    Floats = NDArray[np.float64]

TILE = 2048
"""Voxels that are solved for at a time where only sums over regressors are needed: these stay in the cache."""

SOLVE_BYTES = 8 * 2**20
"""Size of the normal equations that are solved at a time. In larger steps than what stays in the cache: threads that work on
little at a time wait for each other."""

NO_RESIDUAL = 8 * np.finfo(np.float64).eps
"""A residual sum of squares below this part of the total, for each volume, is rounding."""

BINS = 100
"""Steps of the autocorrelation per unit, under the reference's rules."""


# --------------------------------------------------------------------------------------------------- estimates


class Fit(NamedTuple):
    """Estimates of V voxels: coefficients (P, V), variance of the innovations (V,)."""

    beta: Floats
    sigma2: Floats


@quiet
def residual_lags(signal: Signal, basis: Basis) -> Floats:
    """Sum the squares and the lag products of the least squares residuals, shape (N + 1, V).

    With k = 0 for the squares, ``r_k = s_k - c0'c_k + c0' Q'(S^k + S'^k)Q c0 / 2``.
    """
    r, sums = basis.rank, signal.sums
    out = np.empty((basis.order + 1, len(sums.squares)))
    c0 = sums.products[:r]
    out[0] = sums.squares - np.einsum("rv,rv->v", c0, c0)
    for k, cross in enumerate(basis.cross, start=1):
        c = sums.products[k * r : (k + 1) * r]
        out[k] = sums.lagged[k - 1] - np.einsum("rv,rv->v", c0, c - cross @ c0 / 2)
    return out


@quiet
def residual_autocorrelation(signal: Signal, basis: Basis) -> Floats:
    """Autocorrelations of the least squares residuals, r_k / r_0, shape (N, V); NaN where there is no residual."""
    lags = residual_lags(signal, basis)
    return np.where(lags[0] > _rounding(signal, basis), lags[1:] / lags[0], np.nan)


def _rounding(signal: Signal, basis: Basis) -> Floats:
    """Residual sum of squares that means nothing: what rounding of the samples and of the sums amounts to."""
    limit: Floats = np.maximum(signal.rounding, NO_RESIDUAL * basis.n_kept * signal.sums.squares)
    return limit


def binned(observed: Floats, n_volumes: int) -> Floats:
    """Estimate AR(1) coefficients as the reference does.

    Lag products are divided by their numbers of terms, and the quotient cut towards zero to steps of
    1 / ``BINS``. Source: nilearn 0.14.1, ``run_glm``.

    Parameters
    ----------
    observed : ndarray
        r_1 / r_0.
    n_volumes : int
    """
    rho: Floats = np.trunc(observed * n_volumes / (n_volumes - 1) * BINS) / BINS
    return rho


@quiet
def fit_at(signal: Signal, basis: Basis, rho: Floats, dof: int) -> Fit:
    """Fit by generalised least squares, with the autoregressive coefficients of each voxel.

    Parameters
    ----------
    signal : Signal
    basis : Basis
    rho : ndarray, shape (N, V)
        N is the order of the basis, 0 for ordinary least squares.
    dof : int
        Divisor of the residual sum of squares.

    Returns
    -------
    Fit
        ``sigma2`` is NaN where the residual is rounding.
    """
    solve, size = _solve, _solve_tile(basis)
    if basis.order == 0:
        solve, size = _solve_white, TILE
    elif basis.order == 1 and basis.gapless:
        solve, size = _solve_ar1, TILE
    V = rho.shape[1]
    beta, residual = np.empty((len(basis.to_beta), V)), np.empty(V)
    for start in range(0, V, size):
        tile = slice(start, start + size)
        some = signal.tile(start, size)
        coordinates, residual[tile] = solve(some, basis, rho[:, tile])
        coordinates += basis.totals[: basis.rank, None] * some.level
        beta[:, tile] = basis.to_beta @ coordinates
    residual = np.where(residual > _rounding(signal, basis), residual, np.nan)
    return Fit(beta, residual / dof)


def _solve_tile(basis: Basis) -> int:
    """Voxels whose normal equations are solved at a time."""
    return int(np.clip(SOLVE_BYTES // (8 * basis.rank * (basis.rank + 1)), 64, TILE))


def _solve_white(signal: Signal, basis: Basis, rho: Floats) -> tuple[Floats, Floats]:  # noqa: ARG001  (one signature)
    """Coordinates in Q (r, V) and residual sums of squares (V,), by ordinary least squares."""
    coordinates = signal.sums.products[: basis.rank].copy()
    return coordinates, signal.sums.squares - np.einsum("rv,rv->v", coordinates, coordinates)


def _solve_ar1(signal: Signal, basis: Basis, rho: Floats) -> tuple[Floats, Floats]:
    """Coordinates in Q (r, V) and residual sums of squares (V,), by Sherman and Morrison."""
    r, sums, rho = basis.rank, signal.sums, rho[0]
    c0, c1 = sums.products[:r], sums.products[r : 2 * r]
    q, last = basis.near_rows[-1][:, None], sums.near[-1]
    rhs = (1 + rho**2) * c0 - rho * c1 - rho**2 * q * last
    total = (1 + rho**2) * sums.squares - 2 * rho * sums.lagged[0] - rho**2 * last**2
    D = (1 + rho**2) - rho * np.diagonal(basis.cross[0])[:, None]
    coordinates: Floats = rhs / D
    tail = q / D
    correction = rho**2 * (q * coordinates).sum(axis=0)
    coordinates += tail * (correction / (1 - rho**2 * (q * tail).sum(axis=0)))
    return coordinates, total - np.einsum("rv,rv->v", coordinates, rhs)


def _solve(signal: Signal, basis: Basis, rho: Floats) -> tuple[Floats, Floats]:
    """Coordinates in Q (r, V) and residual sums of squares (V,), by Cholesky factors."""
    r, N, sums = basis.rank, basis.order, signal.sums
    precision = make_precision(basis, rho)
    products = sums.products[: (N + 1) * r].reshape(N + 1, r, -1)
    rhs = right_hand_side(basis, precision, products, sums.near)
    total = quadratic_form(basis, precision, sums.squares, sums.lagged, sums.near)
    factor = factorise(np.concatenate([normal_matrix(basis, precision), rhs[None]]))
    return substitute_back(factor, factor[r]), total - np.einsum("rv,rv->v", factor[r], factor[r])


def contrast_covariance(basis: Basis, weights: Floats, rho: Floats) -> Floats:
    """Compute the covariance of one contrast: see :func:`contrast_covariances`."""
    (covariance,) = contrast_covariances(basis, [weights], rho)
    return covariance


@quiet
def contrast_covariances(basis: Basis, weights: Sequence[Floats], rho: Floats) -> list[Floats]:
    """Compute the covariances of contrasts in units of sigma2: ``C (X' V^-1 X)^+ C'``.

    Parameters
    ----------
    basis : Basis
        Of order N.
    weights : sequence of ndarray, shape (q, P)
        Of contrasts that the design can estimate.
    rho : ndarray, shape (N, ...)

    Returns
    -------
    list of ndarray, shape (q, q, ...)
        For N = 0, (q, q).
    """
    rotated = [one @ basis.to_beta for one in weights]
    if basis.order == 0:
        return [one @ one.T for one in rotated]
    flat = rho.reshape(basis.order, -1)
    solve = _covariances_ar1 if basis.order == 1 and basis.gapless else _covariances
    out = [np.empty((len(one), len(one), flat.shape[1])) for one in rotated]
    size = TILE if solve is _covariances_ar1 else _solve_tile(basis)
    for start in range(0, flat.shape[1], size):
        tile = slice(start, start + size)
        for target, found in zip(out, solve(basis, rotated, flat[:, tile]), strict=True):
            target[..., tile] = found
    return [one.reshape(*one.shape[:2], *rho.shape[1:]) for one in out]


def _covariances(basis: Basis, rotated: Sequence[Floats], rho: Floats) -> list[Floats]:
    """For any noise: the matrix is factorised once for all contrasts."""
    below = _factor_of(basis, np.concatenate(rotated), rho)[basis.rank :]
    places = np.cumsum([len(one) for one in rotated])[:-1]
    return [np.einsum("irv,jrv->ijv", rows, rows) for rows in np.split(below, places)]


def _factor_of(basis: Basis, rotated: Floats, rho: Floats) -> Floats:
    """The factor L of Q' V^-1 Q, with rows C L'^-1 below it, (r + q, r, V); C (q, r) in the coordinates of Q."""
    below = np.broadcast_to(rotated[:, :, None], (*rotated.shape, rho.shape[1]))
    return factorise(np.concatenate([normal_matrix(basis, make_precision(basis, rho)), below]))


def _covariances_ar1(basis: Basis, rotated: Sequence[Floats], rho: Floats) -> list[Floats]:
    """For AR(1) without gaps: with D diagonal, C D^-1 C' and its correction are sums over regressors, one product for all."""
    rho2 = rho[0] ** 2
    inverse = 1 / (1 + rho2 - rho * np.diagonal(basis.cross[0])[:, None])
    q = basis.near_rows[-1]
    tail = (q * q) @ inverse
    scale = rho2 / (1 - rho2 * tail)
    out = []
    for C in rotated:
        n = len(C)
        mixed = (C * q) @ inverse
        direct = (C[:, None] * C).reshape(n * n, -1) @ inverse
        covariance = direct.reshape(n, n, -1)
        covariance += mixed[:, None] * mixed * scale
        out.append(covariance)
    return out


@quiet
def whitener(covariance: Floats) -> Floats:
    """Find the symmetric square roots of inverse covariances (q, q, ...), as the reference whitens effects.

    Source: nilearn 0.14.1, ``compute_contrast``.

    Parameters
    ----------
    covariance : ndarray, shape (q, q, ...)

    Returns
    -------
    ndarray, shape (q, q, ...)
        NaN where the covariance is not finite.
    """
    last = np.moveaxis(covariance, (0, 1), (-2, -1))
    finite = np.isfinite(last).all(axis=(-2, -1), keepdims=True)
    values, vectors = np.linalg.eigh(np.where(finite, last, np.eye(len(covariance))))
    root = np.einsum("...ik,...k,...jk->...ij", vectors, 1 / np.sqrt(values), vectors)
    out: Floats = np.moveaxis(np.where(finite, root, np.nan), (-2, -1), (0, 1))
    return out


@quiet
def effective_dofs(
    basis: Basis,
    weights: Sequence[Floats],
    rho: Floats,
    uncertainty: Correction | Frequencies,
    dof: float,
) -> list[Floats]:
    r"""Degrees of freedom of contrasts under autoregressive noise whose coefficients are estimated.

    Parameters
    ----------
    basis : Basis
        Of order N.
    weights : sequence of ndarray, shape (q, P)
        Of contrasts that the design can estimate, the rows of each linearly independent.
    rho : ndarray, shape (N, ...)
    uncertainty : Correction or Frequencies
        Of the coefficients: the table for N = 1, what the design leaves of each frequency for more.
    dof : float
        Residual degrees of freedom.

    Returns
    -------
    list of ndarray, shape (...)
        At most ``dof``.

    Notes
    -----
    The variance of a contrast is estimated with the variance of sigma2, relative 2 / dof, and with that of the coefficients,
    so that its degrees of freedom are, by Satterthwaite (1946, Biometrics Bulletin 2:110-114),

    .. math:: \nu = 2 / (2 / dof + \delta^2)

    with the variance :math:`\delta^2` that the coefficients give to :math:`f = \log |C(\rho)| / q + \log E s^2(\rho)`, C the
    covariance of the rows in units of sigma2 and :math:`E s^2` the expectation of the latter. For N = 1,
    :math:`\delta = (f(\rho_+) - f(\rho_-)) / 2` between the coefficients one standard deviation above and below; for more,
    :math:`\delta^2 = \nabla f' \Sigma \nabla f` with their covariance :math:`\Sigma` (see
    :mod:`chunkglm.kernels.autocorrelation` and :mod:`chunkglm.kernels.uncertainty`).
    """
    n_rows = [len(one) for one in weights]
    if isinstance(uncertainty, Correction):
        lower, upper, residual = spread(rho, uncertainty)
        above, below = (contrast_covariances(basis, weights, one) for one in (upper, lower))
        slopes = [
            (_log_determinant(a) - _log_determinant(b)) / (2 * q)
            for a, b, q in zip(above, below, n_rows, strict=True)
        ]
        variances = [(slope + residual[0]) ** 2 for slope in slopes]
    else:
        flat = rho.reshape(len(rho), -1)
        variances = [np.empty(flat.shape[1]) for _ in weights]
        size = _solve_tile(basis)
        for start in range(0, flat.shape[1], size):
            tile = flat[:, start : start + size]
            covariance, slope = coefficient_covariance(tile, uncertainty)
            for variance, one in zip(variances, weights, strict=True):
                gradient = _log_determinant_slope(basis, one, tile) / len(one) + slope
                variance[start : start + size] = np.einsum("iv,vij,jv->v", gradient, covariance, gradient)
        variances = [variance.reshape(rho.shape[1:]) for variance in variances]
    return [2 / (2 / dof + variance) for variance in variances]


def _log_determinant_slope(basis: Basis, weights: Floats, rho: Floats) -> Floats:
    """Derivatives (N, V) of log |C (X' V^-1 X)^+ C'| with respect to the coefficients.

    With M = Q'V^-1 Q and X = M^-1 C', that of the covariance C X is -X' dM X, and M is linear in the features of V^-1.
    """
    r = basis.rank
    factor = _factor_of(basis, weights @ basis.to_beta, rho)
    X = np.stack([substitute_back(factor, row) for row in factor[r:]])
    inverse = invert(np.einsum("irv,jrv->ijv", factor[r:], factor[r:]))
    out = np.empty_like(rho)
    for i in range(len(rho)):
        step = np.zeros((len(rho), 1))
        step[i] = DIFFERENCE
        ahead, behind = make_precision(basis, rho + step), make_precision(basis, rho - step)
        change = Precision(
            (ahead.diagonals - behind.diagonals) / (2 * DIFFERENCE),
            [(one - other) / (2 * DIFFERENCE) for one, other in zip(ahead.edges, behind.edges, strict=True)],
        )
        dM_X = np.einsum("rsv,jsv->jrv", normal_matrix(basis, change), X)
        out[i] = -np.einsum("ijv,irv,jrv->v", inverse, X, dM_X, optimize=["einsum_path", (1, 2), (0, 1)])
    return out


def _log_determinant(matrix: Floats) -> Floats:
    """Of symmetric positive definite matrices (q, q, ...)."""
    if len(matrix) == 1:
        single: Floats = np.log(matrix[0, 0])
        return single
    factor = factorise(matrix.copy())
    out: Floats = 2 * np.log(np.stack([factor[i, i] for i in range(len(matrix))])).sum(axis=0)
    return out


# ----------------------------------------------------------------------------------------------------- one run


class Model(NamedTuple):
    """How one run is fitted: everything but the data.

    Attributes
    ----------
    basis : Basis
        Of the run's design and kept volumes, at the order of the noise model.
    dof : int
        Divisor of the residual sum of squares.
    scaling : {"voxel", "run", "none"}
        Percent of the voxel's temporal mean, of the mean over the mask and time, or as it is.
    reference_rules : bool
        The rules of nilearn 0.14.1: means below 1 count as 1, non-finite samples as 0, binned coefficients.
    correction : Correction, ndarray or None
        For the bias that fitting leaves in the autocorrelation: the table of order 1, the expectations of lag
        products of a higher order, None under the reference's rules and without autocorrelation.
    """

    basis: Basis
    dof: int
    scaling: str
    reference_rules: bool
    correction: Correction | Floats | None = None


class Estimates(NamedTuple):
    """What is estimated at V voxels.

    Attributes
    ----------
    beta : ndarray, shape (P, V)
        Regression coefficients.
    sigma2 : ndarray, shape (V,)
        Variance of the innovations.
    rho : ndarray, shape (N, V)
        AR coefficients that were used.
    at_limit : ndarray of bool, shape (V,)
        Where no coefficients within bounds explain what is observed.
    n_unscaled : int
        Voxels with variance in time that are NaN because the mean that percent refer to is 0 or less.
    """

    beta: Floats
    sigma2: Floats
    rho: Floats
    at_limit: NDArray[np.bool_]
    n_unscaled: int


@quiet
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


@quiet
def estimate_noise(observed: Floats, model: Model) -> tuple[Floats, NDArray[np.bool_]]:
    """Estimate the autoregressive coefficients of each voxel, (N, V), and tell where they are at their bounds, (V,).

    Parameters
    ----------
    observed : ndarray, shape (N, V)
        Autocorrelations of the residuals.
    model : Model
    """
    if model.reference_rules:
        observed = binned(observed, model.basis.n_kept)
    if model.correction is None:
        return observed, np.zeros(observed.shape[1], dtype=bool)
    if isinstance(model.correction, np.ndarray):
        rho, solved = solve_lags(observed, model.correction)
        return rho, ~solved & np.isfinite(observed).all(axis=0)
    rho = corrected(observed, model.correction)
    low, high = model.correction.limits
    at_limit: NDArray[np.bool_] = (rho[0] <= low) | (rho[0] >= high)
    return rho, at_limit


@quiet
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
    return fit_sums(accumulate(blocks, model.basis, voxels, finite=model.reference_rules), model, run_mean)


@quiet
def fit_sums(tiles: Sequence[Sums], model: Model, run_mean: float = np.nan) -> Estimates:
    """Fit a run from the sums of its data.

    Parameters
    ----------
    tiles : sequence of Sums
        Of all voxels, in order. They are used up.
    model : Model
    run_mean : float
        Mean over the mask and time, for the scaling "run".

    Returns
    -------
    Estimates
    """
    basis = model.basis
    sizes = [len(sums.squares) for sums in tiles]
    places = [slice(stop - size, stop) for size, stop in zip(sizes, np.cumsum(sizes).tolist(), strict=True)]
    V = sum(sizes)
    beta, sigma2, observed = np.empty((len(basis.to_beta), V)), np.empty(V), np.empty((basis.order, V))
    n_unscaled, signals = 0, []
    for sums, tile in zip(tiles, places, strict=True):
        signal, lost = _scaled(sums, model, run_mean)
        signals.append(signal)
        n_unscaled += lost
        observed[:, tile] = residual_autocorrelation(signal, basis)
    # Of all voxels together: the few that need more steps than others would cost every tile these steps.
    rho, at_limit = estimate_noise(observed, model)
    for signal, tile in zip(signals, places, strict=True):
        beta[:, tile], sigma2[tile] = fit_at(signal, basis, rho[:, tile], model.dof)
    return Estimates(beta, sigma2, rho, at_limit, n_unscaled)


def _scaled(sums: Sums, model: Model, run_mean: float) -> tuple[Signal, int]:
    """The signal in the units of the model, and the number of voxels that vary but have none."""
    data = remove_mean(sums, model.basis)
    gain, offset = gain_and_offset(data.level, model, run_mean)
    lost = int((np.isnan(gain) & ~np.isnan(data.sums.squares)).sum())
    return scale_signal(data, model.basis, gain, offset), lost


@quiet
def information_criteria(
    blocks: Iterable[NDArray[Any]],
    voxels: NDArray[np.intp],
    model: Model,
    G: Floats,
    run_mean: float = np.nan,
) -> Floats:
    r"""Compute the information criterion of every order of the noise model at some voxels.

    Parameters
    ----------
    blocks : iterable of ndarray, shape (n, ...)
        Consecutive volumes.
    voxels : ndarray of int, shape (V,)
        Numbers of the voxels in a raveled volume.
    model : Model
        With a basis of the largest order N.
    G : ndarray, shape (N + 1, T)
        Expectations of lag products.
    run_mean : float
        Mean over the mask and time, for the scaling "run".

    Returns
    -------
    ndarray, shape (N + 1, V)
        BIC of the orders 0 to N, less what they have in common; NaN where there is no residual.

    Notes
    -----
    :math:`BIC_k = n \log \hat\sigma^2_k + k \log n` (Schwarz 1978, Annals of Statistics 6:461-464), n kept volumes, with
    :math:`\hat\sigma^2_k / \hat\sigma^2_0 = \prod_{j \le k} (1 - \phi_j^2)` by the partial autocorrelations. These are those of
    the residuals, corrected for the bias of the design up to lag N (Worsley et al. 2002, NeuroImage 15:1-15).
    """
    basis = model.basis
    n, N = basis.n_kept, basis.order
    inverse = np.linalg.pinv(G[:, : N + 1])
    out = []
    for sums in accumulate(blocks, basis, voxels):
        signal, _ = _scaled(sums, model, run_mean)
        observed = residual_autocorrelation(signal, basis)
        lags = inverse @ np.concatenate([np.ones((1, observed.shape[1])), observed])
        left = durbin(lags[1:] / lags[0]).left
        penalty = np.log(n) * np.arange(N + 1)
        out.append(n * np.log(left) + penalty[:, None])
    return np.concatenate(out, axis=1)
