"""The kernels of the fit against brute force, statsmodels and nilearn."""

import numpy as np
import pytest
import statsmodels.api as sm
from nilearn.glm.regression import ARModel
from oracles import joined

from chunkglm.kernels.basis import make_basis, reference_rank
from chunkglm.kernels.combine import add_runs, combined
from chunkglm.kernels.glm import Model, contrast_covariance, fit_at, fit_voxels, residual_lags
from chunkglm.kernels.sums import VOXEL_TILE, accumulate, mean_voxels, remove_mean, scale_signal

T, V = 84, 7


def plain(rng):
    """Three conditions, drift and constant."""
    t = np.linspace(-1, 1, T)
    return np.column_stack([np.cumsum(rng.standard_normal((T, 3)), axis=0), t, t**2, np.ones(T)])


def without_constant(rng):
    return rng.standard_normal((T, 5))


def constant_in_the_span(rng):
    """No column is constant, but two add up to a constant."""
    on = (np.arange(T) // 9 % 2).astype(float)
    return np.column_stack([on, 1 - on, rng.standard_normal((T, 2))])


def badly_scaled(rng):
    """Columns of very different units; well conditioned apart from these."""
    t = np.linspace(0, 1, T)
    units = np.array([1e-9, 1e-3, 1.0, 1e6, 1e12])
    return np.column_stack([rng.standard_normal((T, 2)), np.ones(T), t, t**2]) * units


def rank_deficient(rng):
    """The third condition is the sum of the others, and one column is zero."""
    a, b = rng.standard_normal((2, T))
    return np.column_stack([a, b, a + b, np.zeros(T), np.ones(T)])


def censoring_first(rng):
    """An indicator of the first volume."""
    return np.column_stack([rng.standard_normal((T, 2)), np.arange(T) == 0, np.ones(T)])


DESIGNS = [plain, without_constant, constant_in_the_span, badly_scaled, rank_deficient, censoring_first]


def noise(rng, n=T, v=V, rho=0.4):
    out = np.empty((n, v))
    out[0] = rng.standard_normal(v)
    for i in range(1, n):
        out[i] = rho * out[i - 1] + rng.standard_normal(v)
    return out


def ordinary(rng):
    return 100 + 5 * noise(rng)


def large_mean(rng):
    return 1e4 + noise(rng)


def outlier_first(rng):
    """The first volume of a scan is often half as bright again."""
    y = 1e3 + 10 * noise(rng)
    y[0] += 500
    return y


SIGNALS = [ordinary, large_mean, outlier_first]


def whitener(rho, n=T):
    return np.eye(n) - rho * np.eye(n, k=-1)


def brute_force(X, y, rho, dof):
    """Whiten and solve, voxel by voxel."""
    scale = np.abs(X).max(axis=0)
    scale[scale == 0] = 1
    beta, sigma2 = np.empty((X.shape[1], y.shape[1])), np.empty(y.shape[1])
    for v in range(y.shape[1]):
        W = whitener(rho[v])
        beta[:, v] = np.linalg.lstsq(W @ X / scale, W @ y[:, v], rcond=1e-12)[0] / scale
        sigma2[v] = np.sum((W @ (y[:, v] - X @ beta[:, v])) ** 2) / dof
    return beta, sigma2


def fit_in_blocks(X, y, rho, sizes, dof):
    """The kernels, at given coefficients."""
    basis = make_basis(X)
    stops = np.cumsum(sizes)
    blocks = (y[stop - size : stop] for size, stop in zip(sizes, stops, strict=True))
    sums = joined(accumulate(blocks, basis, np.arange(y.shape[1])))
    signal = scale_signal(remove_mean(sums, basis), basis, np.ones(y.shape[1]), np.zeros(y.shape[1]))
    return basis, signal, fit_at(signal, basis, rho[None], dof)


def variance_of(basis, weights, rho):
    """Of one contrast, in units of sigma2."""
    return contrast_covariance(basis, np.asarray(weights)[None], rho[None])[0, 0]


def estimable(X, rng):
    """A contrast that the design can estimate, in any units of its columns."""
    return X.T @ rng.standard_normal(len(X)) / len(X)


@pytest.mark.parametrize(
    "sizes", [(T,), (32, 32, 20), (1,) * T, (1, 0, 5, 78)], ids=["1", "3", "T", "uneven"]
)
@pytest.mark.parametrize("signal", SIGNALS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("design", DESIGNS, ids=lambda f: f.__name__)
def test_fit__equals_brute_force(design, signal, sizes):
    rng = np.random.default_rng(5)
    X, y = design(rng), signal(rng)
    rho = np.linspace(-0.8, 0.97, V)
    dof = T - make_basis(X).rank
    basis, _, fit = fit_in_blocks(X, y, rho, sizes, dof)
    beta, sigma2 = brute_force(X, y, rho, dof)
    np.testing.assert_allclose(fit.sigma2, sigma2, rtol=1e-9)
    weights = [estimable(X, rng) for _ in range(3)]
    if basis.rank == X.shape[1]:
        weights += list(np.eye(X.shape[1]))
    for c in weights:
        error = np.abs(c @ fit.beta - c @ beta)
        se = np.sqrt(sigma2 * variance_of(basis, c, rho))
        assert (error < 1e-9 * se + 1e-14 * np.abs(c @ beta)).all()


@pytest.mark.parametrize("design", DESIGNS, ids=lambda f: f.__name__)
def test_contrast_variance__equals_brute_force(design):
    rng = np.random.default_rng(6)
    X = design(rng)
    scale = np.abs(X).max(axis=0)
    scale[scale == 0] = 1
    rho = np.linspace(-0.95, 0.95, 9)
    for _ in range(3):
        c = estimable(X, rng)
        expected = []
        for r in rho:
            WX = whitener(r) @ X / scale
            expected.append(c / scale @ np.linalg.pinv(WX.T @ WX, rcond=1e-12) @ (c / scale))
        np.testing.assert_allclose(variance_of(make_basis(X), c, rho), expected, rtol=1e-9)


@pytest.mark.parametrize("design", DESIGNS, ids=lambda f: f.__name__)
def test_residual_lags__are_those_of_the_residuals(design):
    rng = np.random.default_rng(7)
    X, y = design(rng), ordinary(rng)
    basis, signal, _ = fit_in_blocks(X, y, np.zeros(V), (40, 44), 1)
    beta, _ = brute_force(X, y, np.zeros(V), 1)
    e = y - X @ beta
    r0, r1 = residual_lags(signal, basis)
    np.testing.assert_allclose(r0, (e**2).sum(axis=0), rtol=1e-10)
    np.testing.assert_allclose(r1, (e[1:] * e[:-1]).sum(axis=0), rtol=1e-9, atol=1e-9 * r0.max())


def test_ols__equals_statsmodels():
    rng = np.random.default_rng(8)
    X, y = plain(rng), ordinary(rng)
    basis, _, fit = fit_in_blocks(X, y, np.zeros(V), (32, 32, 20), T - 6)
    for v in range(V):
        model = sm.OLS(y[:, v], X).fit()
        np.testing.assert_allclose(fit.beta[:, v], model.params, rtol=1e-10)
        np.testing.assert_allclose(fit.sigma2[v], model.scale, rtol=1e-10)
        for c in ([1, -1, 0, 0, 0, 0], [0.5, 0.5, -1, 0, 0, 0.0]):
            test = model.t_test(c)
            np.testing.assert_allclose(np.dot(c, fit.beta[:, v]), test.effect.item(), rtol=1e-9)
            variance = fit.sigma2[v] * variance_of(basis, c, np.zeros(1)).item()
            np.testing.assert_allclose(variance, test.sd.item() ** 2, rtol=1e-10)


def test_ar1__equals_statsmodels_and_nilearn_at_given_coefficients():
    rng = np.random.default_rng(9)
    X, y = plain(rng), ordinary(rng)
    rho = np.linspace(-0.6, 0.9, V)
    basis, _, fit = fit_in_blocks(X, y, rho, (32, 32, 20), T - 6)
    c = np.array([1.0, 0, -1, 0, 0, 0])
    for v in range(V):
        W = whitener(rho[v])
        gls = sm.GLS(y[:, v], X, sigma=np.linalg.inv(W.T @ W)).fit()
        np.testing.assert_allclose(fit.beta[:, v], gls.params, rtol=1e-8)
        np.testing.assert_allclose(fit.sigma2[v], gls.scale, rtol=1e-8)
        reference = ARModel(X, rho[v]).fit(y[:, [v]])
        test = reference.Tcontrast(c)
        np.testing.assert_allclose(c @ fit.beta[:, v], test.effect.item(), rtol=1e-9)
        np.testing.assert_allclose(fit.sigma2[v], reference.dispersion.item(), rtol=1e-10)
        sd = np.sqrt(fit.sigma2[v] * variance_of(basis, c, rho[[v]]).item())
        np.testing.assert_allclose(sd, test.sd.item(), rtol=1e-9)


def test_basis__units_of_columns_do_not_change_rank_or_span():
    rng = np.random.default_rng(10)
    for design, rank, spans in [
        (plain, 6, True),
        (without_constant, 5, False),
        (constant_in_the_span, 4, True),
        (badly_scaled, 5, True),
        (rank_deficient, 3, True),
    ]:
        basis = make_basis(design(rng))
        assert (basis.rank, basis.spans_constant) == (rank, spans), design.__name__
    almost = plain(rng)
    almost[:, -1] += 1e-6 * rng.standard_normal(T)
    assert not make_basis(almost).spans_constant


def test_basis__coefficients_of_least_norm_where_columns_are_redundant():
    rng = np.random.default_rng(11)
    X = rank_deficient(rng)
    X /= np.maximum(np.abs(X).max(axis=0), 1e-300)
    y = ordinary(rng)
    _, _, fit = fit_in_blocks(X, y, np.zeros(V), (T,), T - 3)
    np.testing.assert_allclose(fit.beta, np.linalg.pinv(X) @ y, atol=1e-9)


def test_reference_rank__has_an_absolute_tolerance():
    rng = np.random.default_rng(12)
    X = rng.standard_normal((T, 4))
    assert reference_rank(X) == 4
    assert reference_rank(np.column_stack([X, X[:, 0]])) == 4
    assert reference_rank(np.column_stack([X, 1e-16 * rng.standard_normal(T)])) == 4


# ------------------------------------------------------------------------------------------------------ one run


def model(X, *, order=1, scaling="voxel", reference_rules=False):
    basis = make_basis(X, order=order)
    return Model(basis, T - basis.rank, scaling, reference_rules)


def fit_all(y, of, run_mean=np.nan, size=32):
    blocks = (y[start : start + size] for start in range(0, len(y), size))
    return fit_voxels(blocks, np.arange(y.shape[1]), of, run_mean)


def test_fit_voxels__scales_estimates_the_coefficient_and_fits():
    rng = np.random.default_rng(13)
    X, y = plain(rng), 200 + 50 * rng.random(V) + noise(rng)
    for scaling, expected in [
        ("voxel", 100 * (y / y.mean(axis=0) - 1)),
        ("run", 100 * (y / 210.0 - 1)),
        ("none", y),
    ]:
        got = fit_all(y, model(X, scaling=scaling), 210.0)
        beta, _ = brute_force(X, expected, np.zeros(V), 1)
        e = expected - X @ beta
        rho = (e[1:] * e[:-1]).sum(axis=0) / (e**2).sum(axis=0)
        np.testing.assert_allclose(got.rho[0], rho, rtol=1e-9)
        beta, sigma2 = brute_force(X, expected, rho, T - 6)
        np.testing.assert_allclose(got.beta, beta, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(got.sigma2, sigma2, rtol=1e-9)
        assert got.n_unscaled == 0


def test_fit_voxels__tiles_and_order_of_voxels_do_not_matter():
    rng = np.random.default_rng(14)
    X, y = plain(rng), 100 + noise(rng, v=2 * VOXEL_TILE + 3)
    order = rng.permutation(y.shape[1])
    of = model(X)
    whole = fit_all(y, of)
    some = fit_voxels([y], order, of)
    for name in ("beta", "sigma2", "rho"):
        np.testing.assert_allclose(
            getattr(some, name), getattr(whole, name)[..., order], rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("reference_rules", [False, True])
@pytest.mark.parametrize("scaling", ["voxel", "none"])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 32])
def test_fit_voxels__no_variance_is_nan_at_every_level(order, scaling, size, reference_rules):
    rng = np.random.default_rng(15)
    levels = [0.0, 1e-300, 1e-7, 0.1, 1.0, 1 / 3, 999.7, 1e4 + 1e-9, 32767.0, 1e15, 1e100, -0.1, -1e7]
    y = np.column_stack([np.full((T, len(levels)), levels), 100 + noise(rng, v=2)])
    for design in (plain, without_constant):
        of = model(design(rng), order=order, scaling=scaling, reference_rules=reference_rules)
        got = fit_all(y, of, size=size)
        assert np.isnan(got.sigma2[:-2]).all()
        assert np.isnan(got.beta[:, :-2]).all()
        assert np.isfinite(got.sigma2[-2:]).all()
        assert np.isfinite(got.beta[:, -2:]).all()
        assert got.n_unscaled == 0


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 32])
def test_fit_voxels__perfect_fit_has_no_variance_estimate(order, size):
    rng = np.random.default_rng(16)
    for design in (plain, badly_scaled, censoring_first):
        X = design(rng)
        scale = np.abs(X).max(axis=0)
        y = 1000 + X / scale @ rng.standard_normal((X.shape[1], 50)) * 30
        y[:, 25:] = np.rint(X[:, [0]] * 1000 / scale[0]) * np.arange(1, 26) + 5000
        y = np.column_stack([y[:, :25], 1000 + noise(rng)])
        got = fit_all(y, model(X, order=order), size=size)
        assert np.isnan(got.sigma2[:25]).all()
        assert np.isfinite(got.sigma2[25:]).all()


def test_fit_voxels__perfect_fit_of_an_outlier_in_a_long_run_of_single_volumes():
    rng = np.random.default_rng(17)
    n = 3000
    X = np.column_stack([np.arange(n) == 0, rng.standard_normal(n), np.ones(n)])
    y = np.full((n, 40), 1000.0)
    y[0] += 10.0 ** np.linspace(-1, 6, 40)
    basis = make_basis(X)
    got = fit_all(y, Model(basis, n - 3, "voxel", False), size=1)
    assert np.isnan(got.sigma2).all()


def test_fit_voxels__not_finite_samples_stay_in_their_voxel():
    rng = np.random.default_rng(18)
    X, y = plain(rng), 100 + noise(rng)
    clean = fit_all(y, model(X))
    y[[3, 40, 83], [0, 1, 2]] = np.nan, np.inf, -np.inf
    y[:, 3] = np.nan
    y[:, 4] = 1e200 * (1 + noise(rng, v=1)[:, 0])
    got = fit_all(y, model(X))
    assert np.isnan(got.sigma2[:5]).all()
    assert np.isnan(got.beta[:, :4]).all()
    np.testing.assert_array_equal(got.sigma2[5:], clean.sigma2[5:])
    np.testing.assert_array_equal(got.beta[:, 5:], clean.beta[:, 5:])
    assert got.n_unscaled == 0


def test_fit_voxels__under_the_reference_not_finite_samples_count_as_0():
    rng = np.random.default_rng(19)
    X, y = plain(rng), 100 + noise(rng)
    y[[3, 40, 83], [0, 1, 2]] = np.nan, np.inf, -np.inf
    filled = np.nan_to_num(y, nan=0, posinf=0, neginf=0)
    got, expected = (fit_all(data, model(X, reference_rules=True)) for data in (y, filled))
    for name in ("beta", "sigma2", "rho"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
        assert np.isfinite(getattr(got, name)).all()


def test_fit_voxels__counts_voxels_whose_mean_is_not_positive():
    rng = np.random.default_rng(20)
    X = plain(rng)
    e = noise(rng, v=6)
    y = e - e.mean(axis=0) + np.array([-50.0, -1e-9, 1e-9, 50, 50, 50])
    y[:, 5] = np.nan
    y = np.column_stack([y, np.zeros(T), np.full(T, -4.0)])
    got = fit_all(y, model(X))
    assert got.n_unscaled == 2
    assert list(np.isnan(got.sigma2)) == [True, True, False, False, False, True, True, True]
    assert fit_all(y, model(X, scaling="none")).n_unscaled == 0
    assert fit_all(y, model(X, scaling="run"), -3.0).n_unscaled == 5
    assert np.isnan(fit_all(y, model(X, scaling="run"), -3.0).sigma2).all()
    assert fit_all(y, model(X, scaling="run"), 3.0).n_unscaled == 0


def test_fit_voxels__under_the_reference_no_mean_is_less_than_1():
    rng = np.random.default_rng(21)
    X, e = plain(rng), noise(rng)
    y = e - e.mean(axis=0) + np.linspace(-3, 3, V)
    got = fit_all(y, model(X, reference_rules=True, order=0))
    scaled = 100 * (y / np.maximum(y.mean(axis=0), 1) - 1)
    beta, sigma2 = brute_force(X, scaled, np.zeros(V), T - 6)
    np.testing.assert_allclose(got.beta, beta, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got.sigma2, sigma2, rtol=1e-10)


def test_fit_voxels__reads_any_dtype_as_its_values():
    rng = np.random.default_rng(22)
    X, y = plain(rng), np.rint(100 + 5 * noise(rng))
    expected = fit_all(y, model(X))
    for dtype in (np.int8, np.uint8, np.int16, ">i2", np.int64, np.float32, ">f4", np.float16):
        got = fit_all(y.astype(dtype), model(X))
        np.testing.assert_array_equal(got.beta, expected.beta)


def test_accumulate__refuses_another_number_of_volumes():
    basis = make_basis(plain(np.random.default_rng(23)))
    with pytest.raises(ValueError, match="80 volumes and the design 84"):
        accumulate([np.ones((80, 3))], basis, np.arange(3))


def test_mean_voxels__averages_over_time():
    y = 1000 + noise(np.random.default_rng(24), v=VOXEL_TILE + 5)
    voxels = np.arange(3, VOXEL_TILE + 4)
    got = mean_voxels(
        (y[start : start + 9] for start in range(0, T, 9)), voxels, np.ones(T, dtype=bool), finite=False
    )
    np.testing.assert_allclose(got, y.mean(axis=0)[None, voxels], rtol=1e-13)
    y[5, 7], y[5, 8] = np.nan, np.inf
    kept = np.ones(T, dtype=bool)
    assert np.isnan(mean_voxels([y], np.array([7, 8]), kept, finite=False)).all()
    np.testing.assert_allclose(mean_voxels([y], np.array([7]), kept, finite=True), np.nansum(y[:, 7]) / T)
    kept[5] = False
    got = mean_voxels([y[:4], y[4:]], np.array([7, 8]), kept, finite=False)
    np.testing.assert_allclose(got[0], y[kept][:, 7:9].mean(axis=0), rtol=1e-13)


# ------------------------------------------------------------------------------------------------- fixed effects


def combine_runs(*given, precision_weighted, reference_rules):
    options = {"precision_weighted": precision_weighted, "reference_rules": reference_rules}
    return combined(add_runs(None, *given, **options), precision_weighted=precision_weighted)


def test_combine__equals_the_formulas():
    rng = np.random.default_rng(25)
    effect, variance = rng.standard_normal((3, 5)), rng.random((3, 5)) + 0.1
    dof = np.array([50.0, 60, 70])[:, None]
    got = combine_runs(effect, variance, dof, precision_weighted=False, reference_rules=False)
    np.testing.assert_allclose(got[0], effect.mean(axis=0))
    np.testing.assert_allclose(got[1], variance.sum(axis=0) / 9)
    np.testing.assert_array_equal(got[2:], [[180] * 5, [3] * 5])
    got = combine_runs(effect, variance, dof, precision_weighted=True, reference_rules=False)
    w = 1 / variance
    np.testing.assert_allclose(got[0], (w * effect).sum(axis=0) / w.sum(axis=0))
    np.testing.assert_allclose(got[1], 1 / w.sum(axis=0))
    np.testing.assert_array_equal(got[2:], [[180] * 5, [3] * 5])


@pytest.mark.parametrize("precision_weighted", [False, True])
@pytest.mark.parametrize("reference_rules", [False, True])
def test_combine__leaves_out_runs_that_are_nan(precision_weighted, reference_rules):
    rng = np.random.default_rng(26)
    options = {"precision_weighted": precision_weighted, "reference_rules": reference_rules}
    effect, variance = rng.standard_normal((3, 4)), rng.random((3, 4)) + 0.1
    dof = np.broadcast_to(np.array([50.0, 60, 70])[:, None], (3, 4)).copy()
    effect[0, 0] = variance[0, 1] = dof[0, 2] = np.nan
    effect[:, 3] = np.nan
    got = combine_runs(effect, variance, dof, **options)
    expected = combine_runs(effect[1:], variance[1:], dof[1:], **options)
    np.testing.assert_array_equal(got, expected)
    assert np.isnan(got[:3, 3]).all()
    np.testing.assert_array_equal(got[3], [2, 2, 2, 0])


def test_combine__variances_have_a_floor_under_the_reference():
    args = np.array([[1.0], [3.0]]), np.array([[1e-20], [1e-16]]), np.array([[5.0], [5.0]])
    got = combine_runs(*args, precision_weighted=True, reference_rules=True)
    np.testing.assert_allclose(got[:, 0], [2, 5e-17, 10, 2])
    got = combine_runs(*args, precision_weighted=True, reference_rules=False)
    np.testing.assert_allclose(got[0, 0], 1.0002, rtol=1e-6)
