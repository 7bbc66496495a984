"""The coefficient of the noise from the autocorrelation of residuals: against dense traces and simulated truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import joined
from scipy import stats
from scipy.signal import lfilter

from chunkglm.kernels import autocorrelation as ac
from chunkglm.kernels import glm
from chunkglm.kernels.basis import make_basis
from chunkglm.kernels.sums import accumulate, remove_mean


def expected_by_matrices(X, rho):
    """g of the module, with every matrix written out."""
    n = len(X)
    R = np.eye(n) - X @ np.linalg.pinv(X)
    D1 = (np.eye(n, k=1) + np.eye(n, k=-1)) / 2
    V = rho ** np.abs(np.subtract.outer(np.arange(n), np.arange(n))).astype(float)
    return np.trace(R @ D1 @ R @ V) / np.trace(R @ V)


def design(n, n_regressors, seed=0):
    """Slow regressors, drift and a constant."""
    rng = np.random.default_rng(seed)
    slow = lfilter(np.ones(5) / 5, [1.0], rng.standard_normal((n, n_regressors // 2)), axis=0)
    angles = np.pi * (np.arange(n) + 0.5) / n
    drift = [np.cos(k * angles) for k in range(n_regressors - slow.shape[1])]
    return np.column_stack([slow, *drift])


def noise(n, n_voxels, rho, seed=0):
    """Stationary AR(1) noise of variance 1, (n, voxels)."""
    w = np.random.default_rng(seed).standard_normal((n, n_voxels))
    w[1:] *= np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], w, axis=0)


@given(
    n=st.integers(12, 40),
    n_regressors=st.integers(1, 8),
    rho=st.floats(-0.98, 0.98),
    seed=st.integers(0, 1000),
    redundant=st.booleans(),
)
def test_expected_lag1__is_the_quotient_of_traces(n, n_regressors, rho, seed, redundant):
    X = np.random.default_rng(seed).standard_normal((n, n_regressors))
    if redundant:
        X = np.column_stack([X, X[:, 0] - 3 * X[:, -1]])
    got = ac.expected_lag1(make_basis(X), np.array([rho, -rho]))
    np.testing.assert_allclose(got, [expected_by_matrices(X, r) for r in (rho, -rho)], rtol=1e-9, atol=1e-11)


def test_expected_lag1__without_loss_is_the_coefficient():
    """A regressor of one sample takes next to nothing of a long run."""
    X = np.zeros((20000, 1))
    X[0] = 1.0
    rho = np.array([-0.6, 0.0, 0.5, 0.9])
    np.testing.assert_allclose(ac.expected_lag1(make_basis(X), rho), rho, atol=2e-4)


def test_expected_lag1__belongs_to_the_space_and_not_to_its_columns():
    X = design(80, 12)
    mixed = X @ np.random.default_rng(1).standard_normal((12, 12))
    one, other = (ac.expected_lag1(make_basis(Z), np.array([-0.4, 0.3, 0.9])) for Z in (X, mixed))
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_correction__reads_back_what_it_was_made_of():
    """Between the tabulated values too."""
    basis = make_basis(design(120, 14))
    table = ac.make_correction(basis)
    rho = np.linspace(-0.97, 0.97, 61) + 0.0011
    observed = ac.expected_lag1(basis, rho)
    np.testing.assert_allclose(ac.corrected(observed, table), rho, atol=5e-5)
    inner = np.abs(rho) < 0.9
    np.testing.assert_allclose(ac.corrected(observed[inner], table), rho[inner], atol=1e-5)
    assert table.limits == (-0.99, 0.99)
    assert (np.diff(table.observed) > 0).all()


def test_correction__beyond_its_reach_is_the_limit_and_nan_stays_nan():
    table = ac.make_correction(make_basis(design(60, 10)))
    got = ac.corrected(np.array([-1.0, 1.0, np.nan]), table)
    np.testing.assert_array_equal(got, [table.limits[0], table.limits[1], np.nan])


def test_correction__ends_where_it_stops_rising():
    """With few volumes and many regressors noise of large coefficients leaves less autocorrelation, not more."""
    X = np.column_stack([np.random.default_rng(19).standard_normal((20, 13)), np.ones(20)])
    table = ac.make_correction(make_basis(X))
    low, high = table.limits
    assert (np.diff(table.observed) > 0).all()
    assert -ac.LARGEST < low < 0 < high < ac.LARGEST
    assert expected_by_matrices(X, high + 2 * ac.STEP) < expected_by_matrices(X, high)
    assert expected_by_matrices(X, low - 2 * ac.STEP) > expected_by_matrices(X, low)


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.3, 0.6, 0.8])
def test_correction__finds_the_coefficient_of_simulated_noise(rho):
    X = design(200, 16)
    basis = make_basis(X)
    signal = remove_mean(joined(accumulate([noise(200, 4000, rho)], basis, np.arange(4000))), basis)
    observed = glm.residual_autocorrelation(signal, basis)[0]
    found = ac.corrected(observed, ac.make_correction(basis))
    assert abs(found.mean() - rho) < 0.015
    if rho > 0:
        assert observed.mean() < rho - 0.08, "uncorrected it would be far too low"


def false_positives(n, X, rho, correction, levels=(0.05, 0.001), n_voxels=40000):
    """Two-sided rates of a contrast of the first two regressors under noise alone."""
    basis = make_basis(X)
    model = glm.Model(
        basis,
        n - basis.rank,
        scaling="none",
        reference_rules=False,
        correction=correction,
    )
    fit = glm.fit_voxels([noise(n, n_voxels, rho, seed=7)], np.arange(n_voxels), model)
    weights = np.zeros(X.shape[1])
    weights[:2] = 1, -1
    covariance = glm.contrast_covariance(basis, weights[None], fit.rho)[0, 0]
    t = weights @ fit.beta / np.sqrt(fit.sigma2 * covariance)
    dof = n - basis.rank
    if correction is not None:
        (dof,) = glm.effective_dofs(basis, [weights[None]], fit.rho, correction, dof)
    p = 2 * stats.t.sf(np.abs(t), dof)
    return [float((p < level).mean()) for level in levels]


def test_correction__keeps_false_positives_near_their_level():
    """The bounds are those that are promised for 200 volumes and 16 regressors, with four standard errors of the count."""
    X = design(200, 16)
    at_05, at_001 = false_positives(200, X, 0.6, ac.make_correction(make_basis(X)))
    assert 0.045 - 0.0044 < at_05 < 0.057 + 0.0044
    assert 0.0005 - 0.0006 < at_001 < 0.0020 + 0.0009
    without, _ = false_positives(200, X, 0.6, None)
    assert without > 0.065
