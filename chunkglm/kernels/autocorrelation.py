r"""The autocorrelation of the noise from that of the residuals, which carry a bias.

Fitting removes r dimensions from the noise, and slow ones first: residuals are less correlated than the noise was.
With R the matrix that forms residuals (of the kept volumes), :math:`D_l = (S^l + S'^l) / 2`, and
:math:`V = \sum_j m_j v_j D_j` the correlation matrix of the noise, :math:`v_0 = 1`, :math:`m_0 = 1` and else 2, lag products
of the residuals :math:`r_l = e' D_l e` are expected at

.. math:: E r_l \propto tr(R D_l R V) = \sum_j G_{lj} v_j, \qquad G_{lj} = m_j\, tr(R D_l R D_j).

The estimate of autoregressive coefficients of order N is the one at which :math:`E r_l / E r_0` equals what is observed,
:math:`r_l / r_0`, for l = 1 to N, where :math:`v_j(\rho)` goes over all lags. This is exact in the traces where the correction
of Worsley et al. (2002, NeuroImage 15:1-15) is linear in the autocorrelations of a few lags. For N = 1 the expectation is
a function of one coefficient, tabulated for each design. With few volumes and many regressors it stops rising somewhere;
beyond that the residuals no longer tell the noise, and the table ends there. For higher orders the equations are
solved for each voxel, within the stationary models whose partial autocorrelations are at most ``LARGEST``.

The coefficient of one voxel is itself uncertain. For N = 1 the variance of what is observed is, by the delta method for
the quotient of two quadratic forms of normal noise, with :math:`B = R (D_1 - g I) R` and g the expected quotient,

.. math:: s^2 = 2\, tr(B V B V) / tr(R V)^2,

and the coefficients that :math:`g - s` and :math:`g + s` stand for say how far the variance of a contrast may be off:
by its own dependence on the coefficient, and by that of the residual sum of squares, expected at
:math:`tr(P(\rho_\pm) V(\rho))` with P the matrix of the quadratic form that it is.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.polynomial.polynomial import polyval
from scipy.fft import irfft, rfft

from chunkglm.kernels.basis import shift_both
from chunkglm.kernels.precision import make_precision, normal_matrix
from chunkglm.kernels.scratch import scratch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from chunkglm.kernels.basis import Basis

    Floats = NDArray[np.float64]

LARGEST = 0.99
"""Partial autocorrelations are looked for up to this absolute value."""

STEP = 0.0025
"""Between tabulated coefficients; linear interpolation is then good to 1e-5, and near the ends to 5e-5."""

SPREAD_STEP = 20
"""Uncertainty is computed at every so many-th tabulated coefficient, and interpolated."""

TOLERANCE = 1e-8
"""Equations for higher orders are solved to this, and by one step more."""

FEW_STEPS, MAX_STEPS = 5, 20
"""Steps that most voxels need at most; and those after which solving the equations ends, and the least squared error is
looked for, in twice as many."""

SOLVE_TILE = 8192
"""Voxels that are solved for at a time: their autocorrelations at all lags stay in the cache."""

N_STARTS, START_LARGEST = 81, 0.96
"""Coefficients of order 1 from whose neighbourhood equations for higher orders are solved, and the largest of them."""

DECAYED = 1e-12
"""Autocorrelations that have become smaller than this count as nothing, and so do those at all later lags."""

SEGMENT = 24
"""Lags after which it is looked whether they have."""

DECIMALS = 3
"""Where there is no solution, partial autocorrelations of the least squared error are given to this: a minimum is found
less precisely than a root, and rounding must not depend on which voxels are fitted together."""

SETTLED = 1e-8
"""A step that is shorter ends the search for the least squared error."""

INSIDE = 0.5
"""The least squared error is looked for from within these bounds."""

DIFFERENCE = 1e-6
"""Step of numerical derivatives."""


def lag_expectations(basis: Basis) -> Floats:
    r"""Expectations of lag products of residuals, for each lag of the autocorrelation of the noise.

    Parameters
    ----------
    basis : Basis
        Of the design, r regressors, T volumes and order N.

    Returns
    -------
    ndarray, shape (N + 1, T)
        G of the module's docstring.

    Notes
    -----
    With K the kept volumes, R = K - QQ' and :math:`C_l = Q'D_lQ`,

    .. math:: tr(R D_l R D_j) = tr(K D_l K D_j) - \sum_a (2 K D_l Q - Q C_l)_a' D_j Q_a.

    The first term counts pairs of kept volumes, where l = j. The second is a sum of correlations of columns, for all j at
    once by fast Fourier transform, in O(r T log T).
    """
    r, n, N = basis.rank, len(basis.kept), basis.order
    Q = basis.rows[:r]
    of_Q = rfft(Q, 2 * n)
    G = np.empty((N + 1, n))
    for lag in range(N + 1):
        half = 1 if lag == 0 else 2
        C = np.eye(r) if lag == 0 else basis.cross[lag - 1] / 2
        columns = 2 * basis.rows[lag * r : (lag + 1) * r] / half - C @ Q
        correlation = irfft((rfft(columns, 2 * n).conj() * of_Q).sum(axis=0), 2 * n)
        G[lag] = -correlation[:n]
        G[lag, 1:] -= correlation[:n:-1]
        if lag < n:
            G[lag, lag] += basis.totals[(N + 1) * r + lag] / half
    return G


# ---------------------------------------------------------------------------------------------------- order 1: a table


class Correction(NamedTuple):
    """A table from observed autocorrelation to coefficient, and of the uncertainty of the latter.

    Attributes
    ----------
    observed : ndarray, shape (n,)
        Expected r1 / r0 of the residuals, rising.
    coefficient : ndarray, shape (n,)
        The AR(1) coefficient of the noise that it is expected for, rising.
    lower, upper : ndarray, shape (n,)
        The coefficients that one standard deviation less and more of what is observed stands for.
    residual : ndarray, shape (n,)
        Half the logarithm of the quotient of the residual variances that are expected at ``upper`` and at ``lower``.
    """

    observed: Floats
    coefficient: Floats
    lower: Floats
    upper: Floats
    residual: Floats

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest coefficient of the table."""
        return float(self.coefficient[0]), float(self.coefficient[-1])


def expected_lag1(basis: Basis, rho: Floats) -> Floats:
    r"""Ratio of the expectations of r1 and r0 of the residuals of AR(1) noise.

    Parameters
    ----------
    basis : Basis
        Of the design, of order 1 or more.
    rho : ndarray, shape (n,)
        Coefficients of the noise, between -1 and 1.

    Returns
    -------
    ndarray, shape (n,)
    """
    G = lag_expectations(basis)
    # By Horner's rule, lag by lag: no table of powers is held.
    ratio: Floats = polyval(rho, G[1]) / polyval(rho, G[0])
    return ratio


def make_correction(basis: Basis) -> Correction:
    """Tabulate what is expected for one design, as far as it rises on both sides of 0.

    Parameters
    ----------
    basis : Basis

    Returns
    -------
    Correction
    """
    half = np.round(np.arange(STEP, LARGEST + STEP / 2, STEP), 4)
    coefficient = np.concatenate([-half[::-1], [0.0], half])
    observed = expected_lag1(basis, coefficient)
    middle = len(half)
    falls = np.flatnonzero(np.diff(observed) <= 0)
    first = int(falls[falls < middle].max(initial=-1)) + 1
    last = int(falls[falls >= middle].min(initial=len(coefficient) - 1))
    observed, coefficient = observed[first : last + 1], coefficient[first : last + 1]
    sparse = np.unique(np.append(np.arange(0, len(coefficient), SPREAD_STEP), len(coefficient) - 1))
    some, expected = coefficient[sparse], observed[sparse]
    deviation = _deviation(basis, some, expected)
    lower = np.interp(expected - deviation, observed, coefficient)
    upper = np.interp(expected + deviation, observed, coefficient)
    above, below = (_residual_variance(basis, some, used) for used in (upper, lower))
    spreads = (lower, upper, np.log(above / below) / 2)
    return Correction(observed, coefficient, *(np.interp(coefficient, some, one) for one in spreads))


def corrected(observed: Floats, correction: Correction) -> Floats:
    """Read the table at what was observed.

    Parameters
    ----------
    observed : ndarray, any shape
        r1 / r0 of each voxel.
    correction : Correction

    Returns
    -------
    ndarray
        The coefficient of the noise; beyond the table its last one; NaN where ``observed`` is.
    """
    rho: Floats = np.interp(observed, correction.observed, correction.coefficient)
    return rho


def spread(rho: Floats, correction: Correction) -> tuple[Floats, Floats, Floats]:
    """Find the coefficients about one standard deviation below and above estimated ones, and what they do to residuals.

    Parameters
    ----------
    rho : ndarray, any shape
    correction : Correction

    Returns
    -------
    lower, upper, residual : ndarray
        See :class:`Correction`.
    """
    lower, upper, residual = (
        np.interp(rho, correction.coefficient, values)
        for values in (correction.lower, correction.upper, correction.residual)
    )
    return lower, upper, residual


def _deviation(basis: Basis, rho: Floats, expected: Floats) -> Floats:
    r"""Standard deviations of r1 / r0 under AR(1) noise of some coefficients: s of the module's docstring.

    With :math:`A = K (D_1 - g I) K` and :math:`Z = [Q, AQ]`, :math:`B = A + Z M Z'`, so that tr(BVBV) is tr(AVAV), a sum over
    lags, and traces of small matrices.
    """
    r, n = basis.rank, len(basis.kept)
    Q, D1Q = basis.rows[:r].T, basis.rows[r : 2 * r].T / 2
    kept = basis.kept.astype(np.float64)
    pairs = np.append(kept[:-1] * kept[1:], 0.0)
    of_kept, of_pairs = rfft(kept, 2 * n), rfft(pairs, 2 * n)
    # Lags 0, 1, ..., n - 1, -n, ..., -1.
    among_kept = irfft(np.abs(of_kept) ** 2, 2 * n)
    among_pairs = irfft(np.abs(of_pairs) ** 2, 2 * n)
    between = irfft(of_kept.conj() * of_pairs, 2 * n)
    lag = np.fft.fftfreq(2 * n, 1 / (2 * n)).round().astype(int)
    total = polyval(rho, lag_expectations(basis)[0])
    out = np.empty(len(rho))
    for number, (c, g) in enumerate(zip(rho, expected, strict=True)):
        v, before, after = (float(c) ** np.abs(lag + step) for step in (0, -1, 1))
        alone = (
            g**2 * (among_kept @ v**2)
            - 2 * g * (between @ (v * after))
            + among_pairs @ (v**2 + before * after) / 2
        )
        Z = np.hstack([Q, D1Q - g * Q])
        VZ = _correlate(c, Z)
        M = np.zeros((2 * r, 2 * r))
        M[:r, :r] = Q.T @ Z[:, r:]
        M[:r, r:] = M[r:, :r] = -np.eye(r)
        MP = M @ (Z.T @ VZ)
        A_VZ = kept[:, None] * VZ
        A_VZ = kept[:, None] * (shift_both(A_VZ, 1) / 2 - g * A_VZ)
        trace = alone + 2 * np.sum(M * (VZ.T @ A_VZ).T) + np.sum(MP * MP.T)
        out[number] = np.sqrt(max(2 * trace, 0.0))
    deviation: Floats = out / total
    return deviation


def _residual_variance(basis: Basis, rho: Floats, used: Floats) -> Floats:
    r"""Expected residual sums of squares under AR(1) noise of variance 1 and coefficients rho, fitted with others.

    :math:`tr(AV) - tr((Q'AQ)^{-1} Q'AVAQ)` with A the precision matrix at the coefficients that are used, of the kept volumes.
    """
    r = basis.rank
    precision = make_precision(basis, used[None])
    M = normal_matrix(basis, precision)
    times = np.einsum("kv,krt->vtr", precision.diagonals, basis.rows[: 2 * r].reshape(2, r, -1))
    g0, g1 = precision.diagonals
    # The row that counts kept volumes, and that which counts neighbours of each.
    total = g0 * basis.totals[2 * r] + g1 * rho * basis.totals[2 * r + 1]
    for edge, weights in zip(basis.edges, precision.edges, strict=True):
        q = basis.near_rows[edge.samples]
        volumes = basis.near[edge.samples]
        apart = np.abs(volumes[:, :, None] - volumes[:, None])
        for number in range(len(rho)):
            np.subtract.at(times[number], volumes, np.einsum("ij,mjr->mir", weights[..., number], q))
            total[number] -= (weights[..., number] * float(rho[number]) ** apart).sum()
    out = np.empty(len(rho))
    for number, c in enumerate(rho):
        AQ = times[number]
        out[number] = total[number] - np.trace(np.linalg.solve(M[..., number], AQ.T @ _correlate(c, AQ)))
    return out


def _correlate(c: float, Z: Floats) -> Floats:
    """V Z with V_ij = c^|i - j|: a convolution."""
    n = len(Z)
    kernel = c ** np.abs(np.fft.fftfreq(2 * n, 1 / (2 * n)).round())
    out: Floats = irfft(rfft(Z, 2 * n, axis=0) * rfft(kernel)[:, None], 2 * n, axis=0)[:n]
    return out


# ---------------------------------------------------------------------------------------------- any order: equations


def solve_lags(observed: Floats, G: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Find the coefficients whose expected residual autocorrelations are those observed, at any order.

    Parameters
    ----------
    observed : ndarray, shape (N, V)
        r_l / r_0 of each voxel, l = 1 to N.
    G : ndarray, shape (N + 1, T)
        From :func:`lag_expectations`.

    Returns
    -------
    rho : ndarray, shape (N, V)
        Stationary; NaN where ``observed`` is.
    solved : ndarray of bool, shape (V,)
        Whether the equations hold. Where not, because no model within bounds explains what is observed, ``rho``
        is that of the least squared error.
    """
    rho, solved = np.full(observed.shape, np.nan), np.zeros(observed.shape[1], dtype=bool)
    finite = np.flatnonzero(np.isfinite(observed).all(axis=0))
    starts = _make_starts(G)
    # Those that need many steps, and those that need another way, are put together again: a step for few voxels takes
    # as long as one for many.
    ways: list[Callable[[Floats], tuple[Floats, Floats]]] = [
        partial(_broyden, G=G, starts=starts, n_steps=FEW_STEPS),
        partial(_broyden, G=G, starts=starts, n_steps=MAX_STEPS),
        partial(_least_squares, G=G),
    ]
    for solve in ways:
        for start in range(0, finite.size, SOLVE_TILE):
            some = finite[start : start + SOLVE_TILE]
            rho[:, some], error = solve(observed[:, some])
            solved[some] = error < TOLERANCE
        finite = finite[~solved[finite]]
    return rho, solved


def _near_white(target: Floats, G: Floats) -> AR:
    """Models (N, V) that explain what is observed if noise is nearly white.

    About white noise only the design counts, and one matrix is that of all voxels.
    """
    N = len(target)
    white = G[1:, 0] / G[0, 0]
    slope = (G[1:, 1 : N + 1] - np.outer(white, G[0, 1 : N + 1])) / G[0, 0]
    inverse = np.linalg.pinv(slope)
    return durbin(np.einsum("ij,jv->iv", inverse, target - white[:, None]))


class _Starts(NamedTuple):
    """Where to begin: models of order 1 with what is expected of each, and inverse slopes (n, N, N) there."""

    autocorrelation: Floats
    expected: Floats
    inverse: Floats


def _make_starts(G: Floats) -> _Starts:
    """Compute them, as far as the first autocorrelation that is expected rises."""
    N = len(G) - 1
    rho = np.linspace(-START_LARGEST, START_LARGEST, N_STARTS)
    at = rho ** np.arange(1, N + 1)[:, None]
    expected = _expected(durbin(at), G)
    jacobian = np.empty((N_STARTS, N, N))
    for j in range(N):
        step = np.zeros((N, 1))
        step[j] = DIFFERENCE
        jacobian[:, :, j] = (
            (_expected(durbin(at + step), G) - _expected(durbin(at - step), G)) / (2 * DIFFERENCE)
        ).T
    middle = N_STARTS // 2
    falls = np.flatnonzero(np.diff(expected[0]) <= 0)
    first = int(falls[falls < middle].max(initial=-1)) + 1
    last = int(falls[falls >= middle].min(initial=N_STARTS - 1))
    part = slice(first, last + 1)
    return _Starts(
        at[:, part], expected[:, part], np.asarray(np.linalg.pinv(jacobian[part]), dtype=np.float64)
    )


def _broyden(target: Floats, G: Floats, starts: _Starts, n_steps: int) -> tuple[Floats, Floats]:
    """Solve for the first N autocorrelations by Broyden's method, in ``n_steps`` at most.

    Returns coefficients (N, V), and the largest error (V,) before the last step.
    """
    V = target.shape[1]
    between = (starts.expected[0, 1:] + starts.expected[0, :-1]) / 2
    near = np.searchsorted(between, target[0])
    inverse = starts.inverse[near]
    change = np.einsum("vij,jv->iv", inverse, target - starts.expected[:, near])
    model = durbin(starts.autocorrelation[:, near] + change)
    rho, size, active = model.rho.copy(), np.full(V, np.inf), np.arange(V)
    error = _expected(model, G) - target
    for _ in range(n_steps):
        now = np.abs(error).max(axis=0)
        step = durbin(model.autocorrelation - np.einsum("vij,jv->iv", inverse, error))
        better = now < size[active]
        # The last step is not tried: it is far better than what it starts from.
        rho[:, active[better]] = np.where(now < TOLERANCE, step.rho, model.rho)[:, better]
        size[active] = np.minimum(now, size[active])
        go = now >= TOLERANCE
        if not go.any():
            break
        active, inverse, error = active[go], inverse[go], error[:, go]
        before, model = model.autocorrelation[:, go], AR(*(values[:, go] for values in step))
        new_error = _expected(model, G) - target[:, active]
        _update(inverse, model.autocorrelation - before, new_error - error)
        error = new_error
    return rho, size


def _update(inverse: Floats, dx: Floats, dy: Floats) -> None:
    """Update inverse Jacobians (V, N, N) by Broyden's first formula, in place; not where nothing moved."""
    Hy = np.einsum("vij,jv->vi", inverse, dy)
    xH = np.einsum("iv,vij->vj", dx, inverse)
    scale = np.einsum("iv,vi->v", dx, Hy)
    scale = np.where(np.abs(scale) > np.finfo(np.float64).tiny, scale, np.inf)
    inverse += (dx.T - Hy)[:, :, None] * xH[:, None, :] / scale[:, None, None]


def _least_squares(target: Floats, G: Floats) -> tuple[Floats, Floats]:
    """Find the partial autocorrelations within bounds of the least squared error, by Levenberg's method.

    Returns coefficients (N, V) and the largest error (V,).
    """
    V = target.shape[1]
    # Next to the bounds there are minima that are not the least.
    partial = np.clip(_near_white(target, G).partial, -INSIDE, INSIDE)
    error = _expected(of_partial(partial), G) - target
    damping, active = np.full(V, 1e-3), np.arange(V)
    for _ in range(2 * MAX_STEPS):
        old, old_error, wanted = partial[:, active], error[:, active], target[:, active]
        new = np.clip(old + _damped_step(old, old_error, wanted, damping[active], G), -LARGEST, LARGEST)
        new_error = _expected(of_partial(new), G) - wanted
        better = (new_error**2).sum(axis=0) < (old_error**2).sum(axis=0)
        partial[:, active] = np.where(better, new, old)
        error[:, active] = np.where(better, new_error, old_error)
        damping[active] = np.clip(np.where(better, damping[active] / 10, damping[active] * 10), 1e-12, 1e6)
        active = active[np.abs(new - old).max(axis=0) > SETTLED]
        if not active.size:
            break
    size = np.abs(error).max(axis=0)
    rough = np.clip(np.round(partial, DECIMALS), -LARGEST, LARGEST)
    return of_partial(np.where(size < TOLERANCE, partial, rough)).rho, size


def _damped_step(partial: Floats, error: Floats, target: Floats, damping: Floats, G: Floats) -> Floats:
    """A step of Levenberg's method for the partial autocorrelations (N, V) that are not held by their bounds."""
    N, V = partial.shape
    jacobian = np.empty((V, N, N))
    for j in range(N):
        # Towards 0, so as to stay within bounds.
        h = np.where(partial[j] > 0, -DIFFERENCE, DIFFERENCE)
        moved = partial.copy()
        moved[j] += h
        jacobian[:, :, j] = ((_expected(of_partial(moved), G) - target - error) / h).T
    gradient = np.einsum("vij,iv->vj", jacobian, error)
    stuck = (np.abs(partial.T) >= LARGEST) & (gradient * partial.T < 0)
    free = ~stuck[:, :, None] & ~stuck[:, None, :]
    hessian = np.where(free, np.einsum("vij,vik->vjk", jacobian, jacobian), 0.0)
    hessian += np.eye(N) * (damping[:, None, None] + stuck[:, :, None])
    step: Floats = np.linalg.solve(hessian, np.where(stuck, 0.0, -gradient)[..., None])[..., 0].T
    return step


class AR(NamedTuple):
    """Autoregressive models of order N at V voxels.

    Attributes
    ----------
    rho, partial, autocorrelation : ndarray, shape (N, V)
        Coefficients, partial autocorrelations, and autocorrelations at the lags 1 to N.
    left : ndarray, shape (N + 1, V)
        Variance that the model of each order from 0 to N does not explain, as part of the whole.
    """

    rho: Floats
    partial: Floats
    autocorrelation: Floats
    left: Floats


def durbin(autocorrelation: Floats) -> AR:
    """Find the autoregressive model of given autocorrelations, or one within bounds.

    By the recursion of Levinson and Durbin, with partial autocorrelations kept within ``LARGEST``.

    Parameters
    ----------
    autocorrelation : ndarray, shape (N, V)
        At lags 1 to N.
    """
    return _recursion(
        lambda k, explained, left: np.clip((autocorrelation[k] - explained) / left, -LARGEST, LARGEST),
        autocorrelation.shape,
    )


def of_partial(partial: Floats) -> AR:
    """Make the autoregressive model of given partial autocorrelations, shape (N, V)."""
    return _recursion(lambda k, *_: partial[k], partial.shape)


def _recursion(next_partial: Callable[[int, Floats, Floats], Floats], shape: tuple[int, ...]) -> AR:
    N, V = shape
    rho, partial, v, left = np.empty(shape), np.empty(shape), np.ones((N + 1, V)), np.ones((N + 1, V))
    for k in range(N):
        explained = (rho[:k] * v[k:0:-1]).sum(axis=0)
        partial[k] = next_partial(k, explained, left[k])
        v[k + 1] = explained + partial[k] * left[k]
        rho[:k] -= partial[k] * rho[:k][::-1].copy()
        rho[k] = partial[k]
        left[k + 1] = left[k] * (1 - partial[k] ** 2)
    return AR(rho, partial, v[1:], left)


def _expected(model: AR, G: Floats) -> Floats:
    """Expected r_l / r_0 of residuals, (N, V), under the noise of some models."""
    N, K = len(model.rho), G.shape[1]
    first = min(N + 1, K)
    window, backwards = model.autocorrelation, model.rho[::-1]
    # Not by BLAS, whose result for a voxel depends on its place among the others by a bit.
    expected = np.einsum("lk,kv->lv", G[:, 1:first], window[: first - 1])
    expected += G[:, :1]
    going = np.arange(window.shape[1])
    for start in range(first, K, SEGMENT):
        n = min(SEGMENT, K - start)
        lags = scratch("lags", (N + n, len(going)))
        lags[:N] = window
        for k in range(n):
            np.einsum("iv,iv->v", backwards, lags[k : k + N], out=lags[N + k])
        expected[:, going] += np.einsum("lk,kv->lv", G[:, start : start + n], lags[N:])
        window = lags[n:]
        goes_on = np.abs(window).max(axis=0) > DECAYED
        if not goes_on.any():
            break
        going, backwards, window = going[goes_on], backwards[:, goes_on], window[:, goes_on]
    ratio: Floats = expected[1:] / expected[0]
    return ratio
