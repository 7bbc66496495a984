"""Autoregressive noise of any order, with and without gaps: against dense matrices, statsmodels, nilearn and truth."""

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st
from nilearn.glm.regression import ARModel
from oracles import joined
from scipy.optimize import least_squares
from scipy.signal import lfilter
from scipy.special import polygamma
from statsmodels.tsa.stattools import levinson_durbin

from chunkglm.kernels import autocorrelation as ac
from chunkglm.kernels import glm
from chunkglm.kernels import uncertainty as un
from chunkglm.kernels.basis import make_basis
from chunkglm.kernels.precision import factorise, invert, make_precision, normal_matrix
from chunkglm.kernels.sums import accumulate, remove_mean, scale_signal


def coefficients(rng, order, n=1, largest=0.9):
    """Of stationary noise, (order, n)."""
    return ac.of_partial(rng.uniform(-largest, largest, (order, n))).rho


def whitener(rho, n):
    return np.eye(n) - sum((c * np.eye(n, k=-i) for i, c in enumerate(rho, 1)), np.zeros((n, n)))


def covariance(rho, kept):
    """Of the kept samples: the block of the inverse of W'W."""
    W = whitener(rho, len(kept))
    return np.linalg.inv(W.T @ W)[np.ix_(kept, kept)]


def by_matrices(X, y, rho, kept):
    """Coefficients, residual sum of squares and (X'V^-1 X)^+ at one voxel."""
    P = np.linalg.inv(covariance(rho, kept))
    Xk, yk = X[kept], y[kept]
    C = np.linalg.pinv(Xk.T @ P @ Xk)
    beta = C @ Xk.T @ P @ yk
    e = yk - Xk @ beta
    return beta, e @ P @ e, C


def signal_of(basis, y, sizes=(None,)):
    """The sums of y (T, V), from blocks of some sizes."""
    blocks, start = [], 0
    for size in sizes:
        stop = len(y) if size is None else start + size
        blocks.append(y[start:stop])
        start = stop
    n = y.shape[1]
    sums = joined(accumulate(iter(blocks), basis, np.arange(n)))
    return scale_signal(remove_mean(sums, basis), basis, np.ones(n), np.zeros(n))


def problem(seed, order, part_kept, edge="none"):
    """A design with or without a constant, data with a level, kept volumes and coefficients, all at random."""
    rng = np.random.default_rng(seed)
    n, p = int(rng.integers(24, 60)), int(rng.integers(1, 7))
    X = rng.standard_normal((n, p))
    if seed % 3:
        X[:, -1] = 1.0
    kept = rng.random(n) < part_kept
    if edge in ("start", "both"):
        kept[:3] = False
    if edge in ("end", "both"):
        kept[-2:] = False
    y = 300 + np.cumsum(rng.standard_normal((n, 4)), axis=0)
    return rng, X, y, kept, coefficients(rng, order, 4)


def sizes_of(rng, n):
    sizes = []
    while sum(sizes) < n:
        sizes.append(min(int(rng.integers(0, 9)), n - sum(sizes)))
    return sizes


# ------------------------------------------------------------------------------------------------ at given coefficients


@pytest.mark.parametrize("edge", ["none", "start", "end", "both"])
@pytest.mark.parametrize("part_kept", [1.0, 0.85, 0.6])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_fit_at__is_least_squares_under_the_covariance_of_the_kept_samples(order, part_kept, edge):
    for seed in range(6):
        rng, X, y, kept, rho = problem(seed, order, part_kept, edge)
        basis = make_basis(X, kept, order=order)
        got = glm.fit_at(signal_of(basis, y, sizes_of(rng, len(y))), basis, rho, 1)
        weights = rng.standard_normal((2, X.shape[1]))
        spread = glm.contrast_covariance(basis, weights, rho)
        for v in range(y.shape[1]):
            beta, rss, C = by_matrices(X, y[:, v], rho[:, v], kept)
            np.testing.assert_allclose(got.sigma2[v], rss, rtol=1e-10)
            se = np.sqrt(rss * np.diag(C))
            assert (np.abs(got.beta[:, v] - beta) < 1e-9 * se + 1e-12 * np.abs(beta)).all()
            one = spread[..., v] if order else spread
            np.testing.assert_allclose(
                one, weights @ C @ weights.T, rtol=1e-8, atol=1e-10 * np.abs(one).max()
            )


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_fit_at__a_censored_fit_is_that_with_a_regressor_for_each_censored_volume(order):
    for seed in range(8):
        rng, X, y, kept, rho = problem(seed, order, 0.75, "both")
        censored = make_basis(X, kept, order=order)
        indicators = np.eye(len(X))[:, ~kept]
        full = make_basis(np.column_stack([X, indicators]), order=order)
        one = glm.fit_at(signal_of(censored, y, sizes_of(rng, len(y))), censored, rho, 1)
        other = glm.fit_at(signal_of(full, y), full, rho, 1)
        p = X.shape[1]
        np.testing.assert_allclose(one.sigma2, other.sigma2, rtol=1e-10)
        spread = glm.contrast_covariance(censored, np.eye(p), rho).reshape(p, p, -1)
        se = np.sqrt(one.sigma2 * np.stack([spread[i, i] for i in range(p)]))
        assert (np.abs(one.beta - other.beta[:p]) < 1e-10 * se).all()
        weights = rng.standard_normal((2, p))
        padded = np.column_stack([weights, np.zeros((2, indicators.shape[1]))])
        np.testing.assert_allclose(
            glm.contrast_covariance(censored, weights, rho),
            glm.contrast_covariance(full, padded, rho),
            rtol=1e-10,
            atol=1e-13,
        )
        # What the coefficients are estimated from is the same as well: pairs of kept samples.
        np.testing.assert_allclose(
            glm.residual_lags(signal_of(censored, y), censored),
            glm.residual_lags(signal_of(full, y), full),
            rtol=1e-8,
            atol=1e-9 * np.ptp(y) ** 2,
        )
        if order:
            np.testing.assert_allclose(
                ac.lag_expectations(censored), ac.lag_expectations(full), rtol=1e-9, atol=1e-10
            )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, -5.0])
def test_fit_at__what_a_censored_volume_holds_does_not_matter(value):
    _, X, y, kept, rho = problem(1, 2, 0.7, "both")
    basis = make_basis(X, kept, order=2)
    expected = glm.fit_at(signal_of(basis, y, (5, 5, None)), basis, rho, 1)
    y = y.copy()
    y[~kept] = value
    got = glm.fit_at(signal_of(basis, y, (5, 5, None)), basis, rho, 1)
    np.testing.assert_array_equal(got.beta, expected.beta)
    np.testing.assert_array_equal(got.sigma2, expected.sigma2)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_fit_at__equals_nilearn_and_statsmodels(order):
    rng, X, y, kept, rho = problem(4, order, 1.0)
    basis = make_basis(X, order=order)
    got = glm.fit_at(signal_of(basis, y, (7, None)), basis, rho, len(X) - X.shape[1])
    c = rng.standard_normal(X.shape[1])
    variance = got.sigma2 * glm.contrast_covariance(basis, c[None], rho)[0, 0]
    for v in range(y.shape[1]):
        theirs = ARModel(X, rho[:, v]).fit(y[:, [v]])
        np.testing.assert_allclose(got.beta[:, v], theirs.theta[:, 0], rtol=1e-8)
        np.testing.assert_allclose(got.sigma2[v], theirs.dispersion.item(), rtol=1e-9)
        np.testing.assert_allclose(np.sqrt(variance[v]), theirs.Tcontrast(c).sd.item(), rtol=1e-8)
        gls = sm.GLS(y[:, v], X, sigma=covariance(rho[:, v], kept)).fit()
        np.testing.assert_allclose(got.beta[:, v], gls.params, rtol=1e-7)
        np.testing.assert_allclose(got.sigma2[v], gls.scale, rtol=1e-8)


def test_fit_at__equals_statsmodels_with_gaps():
    _, X, y, kept, rho = problem(5, 2, 0.7, "both")
    basis = make_basis(X, kept, order=2)
    got = glm.fit_at(signal_of(basis, y), basis, rho, kept.sum() - X.shape[1])
    for v in range(y.shape[1]):
        gls = sm.GLS(y[kept, v], X[kept], sigma=covariance(rho[:, v], kept)).fit()
        np.testing.assert_allclose(got.beta[:, v], gls.params, rtol=1e-7)
        np.testing.assert_allclose(got.sigma2[v], gls.scale, rtol=1e-8)


def test_fit_at__the_general_way_and_that_of_order_1_agree():
    """Order 2 with a second coefficient of 0 is order 1."""
    _, X, y, _, rho = problem(7, 1, 1.0)
    first, second = make_basis(X, order=1), make_basis(X, order=2)
    longer = np.concatenate([rho, np.zeros_like(rho)])
    one, other = (
        glm.fit_at(signal_of(first, y), first, rho, 1),
        glm.fit_at(signal_of(second, y), second, longer, 1),
    )
    np.testing.assert_allclose(one.sigma2, other.sigma2, rtol=1e-11)
    weights = np.eye(X.shape[1])
    np.testing.assert_allclose(
        glm.contrast_covariance(first, weights, rho),
        glm.contrast_covariance(second, weights, longer),
        rtol=1e-9,
    )


def test_fit_at__voxels_do_not_meet():
    """In any order, and any number together: beyond the size of a tile too."""
    rng = np.random.default_rng(3)
    _, X, _, kept, _ = problem(3, 3, 0.8)
    n = glm.TILE + 7
    y, rho = 100 + rng.standard_normal((len(X), n)), coefficients(rng, 3, n)
    basis = make_basis(X, kept, order=3)
    whole = glm.fit_at(signal_of(basis, y), basis, rho, 1)
    order = rng.permutation(n)[:50]
    some = glm.fit_at(signal_of(basis, y[:, order]), basis, rho[:, order], 1)
    np.testing.assert_allclose(some.sigma2, whole.sigma2[order], rtol=1e-12)
    np.testing.assert_allclose(some.beta, whole.beta[:, order], rtol=1e-12, atol=1e-13)


def test_factorise__is_cholesky_with_rows_below_and_nan_where_there_is_none():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((5, 5, 3))
    M = np.einsum("ikv,jkv->ijv", A, A)
    M[..., 2] -= 100 * np.eye(5)
    B = rng.standard_normal((2, 5, 3))
    with np.errstate(invalid="ignore"):
        factor, inverse = factorise(np.concatenate([M, B])), invert(M)
    for v in range(2):
        L = np.linalg.cholesky(M[..., v])
        np.testing.assert_allclose(np.tril(factor[:5, :, v]), L, rtol=1e-9)
        np.testing.assert_allclose(factor[5:, :, v] @ L.T, B[..., v], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(inverse[..., v], np.linalg.inv(M[..., v]), rtol=1e-7)
    assert np.isnan(inverse[..., 2]).all()


def test_normal_matrix__gaps_that_look_alike_are_one_kind():
    kept = np.ones(200, dtype=bool)
    kept[10:190:20] = False
    rng = np.random.default_rng(1)
    X, rho = rng.standard_normal((200, 4)), coefficients(rng, 2)
    basis = make_basis(X, kept, order=2)
    assert len(basis.edges) == 2
    Q = basis.rows[:4].T[kept]
    expected = Q.T @ np.linalg.inv(covariance(rho[:, 0], kept)) @ Q
    np.testing.assert_allclose(normal_matrix(basis, make_precision(basis, rho))[..., 0], expected, atol=1e-9)


# ------------------------------------------------------------------------------------------------ expectations


@pytest.mark.parametrize("part_kept", [1.0, 0.7])
def test_lag_expectations__are_the_traces(part_kept):
    for seed in range(4):
        _, X, _, kept, _ = problem(seed, 3, part_kept)
        basis = make_basis(X, kept, order=3)
        G = ac.lag_expectations(basis)
        n = len(X)
        K = np.diag(kept.astype(float))
        R = K - K @ X @ np.linalg.pinv(X[kept].T @ X[kept]) @ X.T @ K
        D = [np.eye(n), *((np.eye(n, k=j) + np.eye(n, k=-j)) / 2 for j in range(1, n))]
        expected = [
            [(1 if j == 0 else 2) * np.trace(R @ D[k] @ R @ D[j]) for j in range(n)] for k in range(4)
        ]
        np.testing.assert_allclose(G, expected, atol=1e-10)


@pytest.mark.parametrize("part_kept", [1.0, 0.7])
def test_correction__its_deviation_is_that_of_the_traces(part_kept):
    _, X, _, kept, _ = problem(10, 1, part_kept)
    basis = make_basis(X, kept)
    n = len(X)
    rho = np.array([-0.6, 0.0, 0.3, 0.85])
    g = ac.expected_lag1(basis, rho)
    K = np.diag(kept.astype(float))
    R = K - K @ X @ np.linalg.pinv(X[kept].T @ X[kept]) @ X.T @ K
    D = (np.eye(n, k=1) + np.eye(n, k=-1)) / 2
    expected = []
    for c, expectation in zip(rho, g, strict=True):
        V = float(c) ** np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
        B = R @ (D - expectation * np.eye(n)) @ R
        expected.append(np.sqrt(2 * np.trace(B @ V @ B @ V)) / np.trace(R @ V))
    np.testing.assert_allclose(ac._deviation(basis, rho, g), expected, rtol=1e-9)


@pytest.mark.parametrize("part_kept", [1.0, 0.7])
def test_correction__the_residual_variance_it_expects_is_that_of_the_traces(part_kept):
    _, X, _, kept, _ = problem(11, 1, part_kept, "both")
    rho, used = np.array([-0.5, 0.2, 0.8]), np.array([-0.3, 0.3, 0.9])
    got = ac._residual_variance(make_basis(X, kept), rho, used)
    apart = np.abs(np.subtract.outer(np.flatnonzero(kept), np.flatnonzero(kept)))
    for r, u, value in zip(rho, used, got, strict=True):
        A = np.linalg.inv(covariance([u], kept))
        P = A - A @ X[kept] @ np.linalg.inv(X[kept].T @ A @ X[kept]) @ X[kept].T @ A
        assert value == pytest.approx(np.trace(P @ r**apart), rel=1e-10)


def design(n, p=16, seed=0):
    """Slow regressors, drift and a constant."""
    rng = np.random.default_rng(seed)
    slow = lfilter(np.ones(8) / 8, [1.0], rng.standard_normal((n, p // 2)), axis=0)
    angles = np.pi * (np.arange(n) + 0.5) / n
    return np.column_stack([slow, *(np.cos(k * angles) for k in range(p - slow.shape[1]))])


def noise(n, n_voxels, rho, seed=0):
    """Stationary, from white noise of variance 1, (n, voxels)."""
    w = np.random.default_rng(seed).standard_normal((n + 300, n_voxels))
    return lfilter([1.0], [1.0, *(-np.asarray(rho))], w, axis=0)[300:]


def test_correction__its_deviation_is_that_of_simulated_noise():
    X = design(200)
    kept = np.random.default_rng(2).random(200) > 0.2
    for mask in (None, kept):
        basis = make_basis(X, mask)
        table = ac.make_correction(basis)
        signal = signal_of(basis, noise(200, 8000, [0.5]))
        found = ac.corrected(glm.residual_autocorrelation(signal, basis)[0], table)
        lower, upper, _ = ac.spread(np.array(0.5), table)
        assert lower < 0.5 < upper
        # A quarter of a standard error of a standard deviation is about 1 %; what is not linear adds some.
        assert (upper - lower) / 2 == pytest.approx(found.std(), rel=0.05)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_durbin__equals_statsmodels_and_its_inverse(order):
    rng = np.random.default_rng(order)
    partial = rng.uniform(-0.9, 0.9, (order, 6))
    model = ac.of_partial(partial)
    for v in range(6):
        sigma, coefficient, pacf, _, _ = levinson_durbin(
            np.array([1.0, *model.autocorrelation[:, v]]), nlags=order, isacov=True
        )
        np.testing.assert_allclose(model.rho[:, v], coefficient, atol=1e-10)
        np.testing.assert_allclose(partial[:, v], pacf[1:], atol=1e-10)
        np.testing.assert_allclose(model.left[-1, v], sigma, atol=1e-10)
    back = ac.durbin(model.autocorrelation)
    np.testing.assert_allclose(back.partial, partial, atol=1e-10)
    outside = ac.durbin(np.array([[1.7], [-4.0]]))
    np.testing.assert_array_equal(outside.partial, [[ac.LARGEST], [-ac.LARGEST]])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_solve_lags__finds_what_the_expectations_were_made_of(order):
    rng = np.random.default_rng(order)
    basis = make_basis(design(150), order=order)
    G = ac.lag_expectations(basis)
    model = ac.of_partial(rng.uniform(-0.6, 0.6, (order, 200)))
    rho, solved = ac.solve_lags(ac._expected(model, G), G)
    assert solved.all() if order < 4 else solved.mean() > 0.98
    np.testing.assert_allclose(rho[:, solved], model.rho[:, solved], atol=1e-7)
    np.testing.assert_allclose(
        ac._expected(_model_at(rho), G)[:, solved], ac._expected(model, G)[:, solved], atol=1e-8
    )


def test_solve_lags__of_order_1_is_the_table():
    basis = make_basis(design(150))
    observed = np.linspace(-0.7, 0.55, 29)
    rho, solved = ac.solve_lags(observed[None], ac.lag_expectations(basis))
    assert solved.all()
    np.testing.assert_allclose(rho[0], ac.corrected(observed, ac.make_correction(basis)), atol=1e-5)


def test_solve_lags__without_a_solution_is_the_least_squared_error_and_told():
    """Few volumes, noise next to a random walk, and a design that takes most of what is slow."""
    basis = make_basis(design(60, 24), order=2)
    G = ac.lag_expectations(basis)
    observed = glm.residual_autocorrelation(signal_of(basis, noise(60, 120, [0.9, 0.05])), basis)
    rho, solved = ac.solve_lags(observed, G)
    assert 10 < (~solved).sum() < 110
    found = ac._expected(_model_at(rho), G) - observed
    np.testing.assert_allclose(found[:, solved], 0, atol=1e-8)
    for v in np.flatnonzero(~solved)[:8]:

        def error(partial, v=v):
            return (ac._expected(ac.of_partial(partial[:, None]), G) - observed[:, [v]])[:, 0]

        best = min(
            (
                least_squares(error, start, bounds=(-0.99, 0.99))
                for start in ([0.3, 0.1], [0.9, 0.0], [0.0, 0.5])
            ),
            key=lambda found: found.cost,
        )
        # Given to three decimals, and some minima are flat.
        assert np.sum(found[:, v] ** 2) <= 2 * best.cost * 1.02 + 1e-5


def _model_at(rho):
    """The models of given coefficients: partial autocorrelations by the recursion step down."""
    partial, left = np.empty_like(rho), rho.copy()
    for k in range(len(rho) - 1, -1, -1):
        partial[k] = left[k]
        left = (left[:k] + left[k] * left[:k][::-1]) / (1 - left[k] ** 2)
    return ac.of_partial(partial)


def test_solve_lags__nan_stays_nan_and_voxels_do_not_meet():
    basis = make_basis(design(60, 24), order=2)
    G = ac.lag_expectations(basis)
    observed = glm.residual_autocorrelation(signal_of(basis, noise(60, 90, [0.9, 0.05])), basis)
    observed[1, 5] = np.nan
    rho, solved = ac.solve_lags(observed, G)
    assert np.isnan(rho[:, 5]).all()
    assert not solved[5]
    order = np.random.default_rng(0).permutation(90)[:31]
    some, also = ac.solve_lags(observed[:, order], G)
    np.testing.assert_allclose(some, rho[:, order], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(also, solved[order])
    nothing, _ = ac.solve_lags(np.full((2, 3), np.nan), G)
    assert np.isnan(nothing).all()


@given(seed=st.integers(0, 10_000), order=st.integers(1, 4))
def test_solve_lags__is_stationary_whatever_is_observed(seed, order):
    rng = np.random.default_rng(seed)
    basis = make_basis(design(40, 14, seed), order=order)
    rho, _ = ac.solve_lags(rng.uniform(-1, 1, (order, 10)), ac.lag_expectations(basis))
    companion = np.zeros((10, order, order))
    companion[:, 0] = rho.T
    companion[:, range(1, order), range(order - 1)] = 1
    assert (np.abs(np.linalg.eigvals(companion)) < 1).all()


@pytest.mark.parametrize("rho", [(0.5, 0.2), (0.4, -0.3), (0.5, 0.1, 0.15)], ids=str)
@pytest.mark.parametrize("censored", [False, True])
def test_solve_lags__finds_the_coefficients_of_simulated_noise(rho, censored):
    X = design(240)
    kept = np.random.default_rng(4).random(240) > 0.2 if censored else None
    basis = make_basis(X, kept, order=len(rho))
    signal = signal_of(basis, noise(240, 3000, rho, seed=1))
    observed = glm.residual_autocorrelation(signal, basis)
    found, solved = ac.solve_lags(observed, ac.lag_expectations(basis))
    assert solved.mean() > 0.8
    np.testing.assert_allclose(np.median(found, axis=1), rho, atol=0.03)
    if not censored:
        uncorrected = [ac.durbin(observed[:, [v]]).rho[0, 0] for v in range(200)]
        assert np.median(uncorrected) < rho[0] - 0.03, "without correction it would be far too low"


# ------------------------------------------------------------------------------------------------ degrees of freedom


def test_effective_dof__is_the_formula_and_belongs_to_the_space_of_rows():
    X = design(120)
    basis = make_basis(X)
    table = ac.make_correction(basis)
    rho = np.array([[0.1, 0.4, 0.8, np.nan]])
    c = np.zeros((1, 16))
    c[0, :2] = 1, -1
    got = glm.effective_dofs(basis, [c], rho, table, 104)[0]
    lower, upper, residual = ac.spread(rho, table)
    ratio = glm.contrast_covariance(basis, c, upper) / glm.contrast_covariance(basis, c, lower)
    np.testing.assert_allclose(got, 2 / (2 / 104 + (np.log(ratio[0, 0]) / 2 + residual[0]) ** 2))
    assert (got[:3] < 104).all()
    assert np.isnan(got[3])
    np.testing.assert_allclose(glm.effective_dofs(basis, [-7 * c], rho, table, 104)[0], got)
    rows = np.eye(16)[:3]
    mixed = np.random.default_rng(0).standard_normal((3, 3)) @ rows
    np.testing.assert_allclose(
        glm.effective_dofs(basis, [mixed], rho, table, 104)[0],
        glm.effective_dofs(basis, [rows], rho, table, 104)[0],
        rtol=1e-9,
    )


def test_effective_dof__is_that_of_simulated_variances():
    """A variance on nu degrees of freedom has a logarithm with the variance of that of chi-square."""
    X = design(200)
    basis = make_basis(X)
    table = ac.make_correction(basis)
    model = glm.Model(basis, 184, "none", False, table)
    fit = glm.fit_voxels([noise(200, 6000, [0.5])], np.arange(6000), model)
    for c in np.eye(16)[[0, 3, 9]]:
        variance = fit.sigma2 * glm.contrast_covariance(basis, c[None], fit.rho)[0, 0]
        nu = glm.effective_dofs(basis, [c[None]], np.array([[0.5]]), table, 184)[0].item()
        assert np.sqrt(polygamma(1, nu / 2)) == pytest.approx(np.log(variance).std(), rel=0.1)


# ------------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize(
    ("rho", "order"), [((), 0), ((0.4,), 1), ((0.4, 0.3), 2), ((0.3, 0.0, 0.4), 3)], ids=str
)
def test_information_criteria__are_smallest_at_the_order_of_simulated_noise(rho, order):
    X = design(300)
    basis = make_basis(X, order=5)
    model = glm.Model(basis, 284, "none", False)
    y = noise(300, 400, rho)
    G = ac.lag_expectations(basis)
    criteria = glm.information_criteria(iter([y[:100], y[100:]]), np.arange(400), model, G)
    assert criteria.shape == (6, 400)
    assert criteria.mean(axis=1).argmin() == order
    np.testing.assert_array_equal(criteria[0], 0)


def test_information_criteria__of_white_residuals_are_those_of_a_fit_of_each_order():
    """Without a design to speak of they are n log(variance of the innovations) + k log n."""
    X = np.zeros((400, 1))
    X[0] = 1.0
    y = noise(400, 3, [0.4, 0.2])
    y -= y.mean(axis=0)
    basis = make_basis(X, order=2)
    got = glm.information_criteria(
        [y], np.arange(3), glm.Model(basis, 399, "none", False), ac.lag_expectations(basis)
    )
    for v in range(3):
        for k in (1, 2):
            autocovariance = [y[1:, v] @ y[1:, v], *(y[1 + j :, v] @ y[1:-j, v] for j in range(1, k + 1))]
            sigma, *_ = levinson_durbin(np.array(autocovariance) / autocovariance[0], nlags=k, isacov=True)
            expected = 400 * np.log(sigma) + k * np.log(400)
            assert got[k, v] == pytest.approx(expected, rel=0.02)


# ------------------------------------------------------------------------------------------------ higher orders


def test_make_frequencies__is_what_a_design_leaves_of_each():
    X = design(60)
    kept = np.random.default_rng(0).random(60) > 0.2
    for mask in (np.ones(60, dtype=bool), kept):
        basis = make_basis(X, mask, order=2)
        got = un.make_frequencies(basis)
        Xk = np.where(mask[:, None], X, 0)
        R = np.diag(mask.astype(float)) - Xk @ np.linalg.pinv(Xk)
        for f in (0, 7, 33, 59):
            wave = np.exp(1j * np.pi * (f + 0.5) / 60 * np.arange(60))
            assert got.left[f] == pytest.approx(np.vdot(wave, R @ wave).real / 60, abs=1e-12)
        # With the slope of the formula at white noise they give that of the expectations.
        G = ac.lag_expectations(basis)
        h, c = got.left / got.left.sum(), got.cosine
        for lag in range(2):
            step = np.zeros((2, 1))
            step[lag] = 1e-5
            rise = (ac._expected(ac.durbin(step), G) - ac._expected(ac.durbin(-step), G))[lag, 0] / 2e-5
            formula = 2 * (c[lag] ** 2 @ h - (c[lag] @ h) ** 2)
            assert got.exact[lag] * formula == pytest.approx(rise, rel=1e-5)


@pytest.mark.parametrize(("kind", "tolerance"), [("drift", 0.1), ("slow regressors too", 0.3)])
def test_coefficient_covariance__of_order_1_is_nearly_that_of_exact_traces(kind, tolerance):
    """Of regressors that leak into other frequencies less nearly."""
    angles = np.pi * (np.arange(200) + 0.5) / 200
    drift = np.column_stack([np.cos(k * angles) for k in range(16)])
    basis = make_basis(drift if kind == "drift" else design(200))
    rho = np.array([-0.4, 0.0, 0.3, 0.6])
    covariance, slope = un.coefficient_covariance(rho[None], un.make_frequencies(basis))
    g = ac.expected_lag1(basis, rho)
    rise = (ac.expected_lag1(basis, rho + 1e-4) - ac.expected_lag1(basis, rho - 1e-4)) / 2e-4
    exact = ac._deviation(basis, rho, g) / rise
    np.testing.assert_allclose(np.sqrt(covariance[:, 0, 0]), exact, rtol=tolerance)
    change = [np.log(ac._residual_variance(basis, rho, rho + step)) for step in (1e-4, -1e-4)]
    np.testing.assert_allclose(slope[0], (change[0] - change[1]) / 2e-4, rtol=tolerance)


@pytest.mark.parametrize("censored", [False, True])
def test_coefficient_covariance__is_that_of_simulated_noise(censored):
    rho = (0.4, 0.2)
    kept = np.random.default_rng(4).random(200) > 0.2 if censored else None
    basis = make_basis(design(200), kept, order=2)
    observed = glm.residual_autocorrelation(signal_of(basis, noise(200, 5000, rho, seed=2)), basis)
    found, _ = ac.solve_lags(observed, ac.lag_expectations(basis))
    covariance, _ = un.coefficient_covariance(np.array(rho)[:, None], un.make_frequencies(basis))
    np.testing.assert_allclose(np.sqrt(np.diag(covariance[0])), found.std(axis=1), rtol=0.2)


def test_coefficient_covariance__stays_finite_next_to_the_bounds_and_nan_stays_nan():
    basis = make_basis(design(60, 24), order=2)
    rho = np.column_stack([[1.97, -0.99], [0.0, 0.99], [0.5, np.nan], [0.3, 0.2]])
    covariance, _ = un.coefficient_covariance(rho, un.make_frequencies(basis))
    assert np.isnan(covariance[2]).all()
    for one in covariance[[0, 1, 3]]:
        values = np.linalg.eigvalsh(one)
        assert (values > 0).all()
        assert (values <= 1 / 3 + 1e-9).all()


@pytest.mark.parametrize("order", [2, 4, 6])
def test_coefficient_covariance__of_noise_at_its_bounds_is_no_singular_matrix(order):
    frequencies = un.make_frequencies(make_basis(design(60, 4), order=order))
    partial = np.random.default_rng(order).choice([-0.99, 0.0, 0.5, 0.99], (order, 3000))
    covariance, _ = un.coefficient_covariance(ac.of_partial(partial).rho, frequencies)
    assert (np.linalg.eigvalsh(covariance) > -1e-9).all()
    assert (np.diagonal(covariance, axis1=1, axis2=2) >= 0).all()


@pytest.mark.parametrize("kept", [None, 0.75])
@pytest.mark.parametrize("q", [1, 3])
def test_effective_dof__of_higher_orders_is_the_formula(q, kept):
    rng = np.random.default_rng(5)
    mask = None if kept is None else rng.random(120) < kept
    basis = make_basis(design(120), mask, order=2)
    frequencies = un.make_frequencies(basis)
    rows, rho = np.eye(16)[:q], np.array([[0.4, 0.1, np.nan], [0.2, -0.3, 0.1]])
    got = glm.effective_dofs(basis, [rows], rho, frequencies, 104)[0]

    def log_determinant(at):
        return np.linalg.slogdet(glm.contrast_covariance(basis, rows, at[:, None])[..., 0])[1] / q

    for v in range(2):
        at = rho[:, v]
        steps = 1e-5 * np.eye(2)
        gradient = np.array([(log_determinant(at + h) - log_determinant(at - h)) / 2e-5 for h in steps])
        covariance, slope = un.coefficient_covariance(at[:, None], frequencies)
        gradient += slope[:, 0]
        assert got[v] == pytest.approx(2 / (2 / 104 + gradient @ covariance[0] @ gradient), rel=1e-6)
        assert got[v] < 104
    assert np.isnan(got[2])
    many = np.repeat(rho[:, :1], glm.TILE + 3, axis=1)
    np.testing.assert_allclose(
        glm.effective_dofs(basis, [rows], many, frequencies, 104)[0], got[0], rtol=1e-10
    )


def test_effective_dof__of_higher_orders_is_that_of_simulated_variances():
    basis = make_basis(design(200), order=2)
    model = glm.Model(basis, 184, "none", False, ac.lag_expectations(basis))
    fit = glm.fit_voxels([noise(200, 5000, [0.4, 0.2])], np.arange(5000), model)
    for c in np.eye(16)[[0, 9]]:
        variance = fit.sigma2 * glm.contrast_covariance(basis, c[None], fit.rho)[0, 0]
        truth = np.array([[0.4], [0.2]])
        nu = glm.effective_dofs(basis, [c[None]], truth, un.make_frequencies(basis), 184)[0].item()
        # The logarithm of chi-square on nu degrees of freedom has the variance trigamma(nu / 2).
        assert np.sqrt(polygamma(1, nu / 2)) == pytest.approx(np.log(variance).std(), rel=0.25)
