import mpmath as mp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nilearn.glm.contrasts import Contrast

from chunkglm.kernels.distributions import (
    f_p_value,
    f_z_score,
    f_z_score_clipped,
    t_p_value,
    t_z_score,
    t_z_score_clipped,
)

DOFS = [0.5, 1.0, 2.0, 3.7, 10.0, 30.0, 100.5, 199.0, 201.0, 271.0, 1000.0, 5000.0, 1e5, 1e6]
SIZES = [1e-12, 9e-8, 1.1e-7, 1e-4, 0.03, 0.4, 0.999, 1.0, 1.7, 3.1, 6.0, 12.0, 25.0, 35.0, 36.3, 36.6, 37.0]

F_STATS = [1e-300, 1e-120, 1e-40, 1e-12, 1e-5, 0.003, 0.05, 0.3, 0.8, 0.97]
F_STATS += [1.02, 1.2, 1.6, 2, 4, 9, 25, 40, 60, 150, 400, 1300, 1e4, 1e9, 1e40, 1e120, 1e300]
F_DOFS = [1.0, 3.5, 20.0, 184.0, 5000.0, 9998.0, 1e6, 1e12, 1e17, np.inf]

Z_OF_UNDERFLOW = 30.20559417957964
"""Where the tail probability is 1e-200."""

dofs = st.floats(0.5, 1e7)
rows = st.integers(1, 50)
sizes = st.floats(0, 1e150)


def exact_tail(t, dof):
    """P(T >= t) for t >= 0, from the definition of the density."""
    t, dof = mp.mpf(t), mp.mpf(dof)
    if dof < 2000:
        squared = t * t
        if t < 2:
            return (1 - mp.betainc(0.5, dof / 2, 0, squared / (dof + squared), regularized=True)) / 2
        return mp.betainc(dof / 2, 0.5, 0, dof / (dof + squared), regularized=True) / 2
    constant = mp.exp(mp.loggamma((dof + 1) / 2) - mp.loggamma(dof / 2)) / mp.sqrt(mp.pi * dof)

    def density(s):
        return constant * mp.exp(-(dof + 1) / 2 * mp.log1p(s * s / dof))

    if t < 1:
        return mp.mpf(1) / 2 - mp.quad(density, [0, t])
    width = (dof + t * t) / ((dof + 1) * t)
    return mp.quad(density, [t + width * k for k in (0, 1, 3, 6, 12, 20, 30, 45, 60, 80, 110, 150)])


def exact_z(tail, start):
    """The z whose normal tail probability is `tail`: Newton steps on its logarithm from any rough start."""
    z = mp.mpf(start)
    for _ in range(30):
        q = mp.erfc(z / mp.sqrt(2)) / 2
        step = mp.log(q / tail) * q / (mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi))
        z += step
        if abs(step) < abs(z) * mp.mpf(10) ** -20:
            return z
    raise AssertionError("no convergence")


@pytest.mark.parametrize("dof", DOFS)
def test_z_and_p__agree_with_mpmath(dof):
    with mp.workdps(40):
        for size in SIZES:
            tail = exact_tail(size, dof)
            z = t_z_score([size, -size], dof)
            expected = exact_z(tail, start=min(size, 30) if dof > 5 else min(size, 1))
            assert float(abs(z[0] / expected - 1)) < 1e-12, (size, dof)
            assert z[1] == -z[0]
            p = t_p_value([size, -size], dof)
            assert float(abs(p[0] / tail - 1)) < 1e-10, (size, dof)
            assert float(abs(p[1] - (1 - tail))) < 1e-12, (size, dof)


@pytest.mark.parametrize(
    ("t", "dof"),
    [(1e6, 5000.0), (1e140, 30.0), (4e3, 150.0), (60.0, 900.0), (1e30, 9.5), (1e150, 1.0), (1e5, 270.0)],
)
def test_z__where_the_probability_underflows_or_nearly(t, dof):
    with mp.workdps(60):
        tail = (
            exact_tail(t, dof)
            if dof < 2000
            else mp.betainc(dof / 2, 0.5, 0, dof / (dof + mp.mpf(t) ** 2)) / (2 * mp.beta(dof / 2, 0.5))
        )
        z = float(t_z_score(t, dof))
        assert float(abs(z / exact_z(tail, start=z * 1.01) - 1)) < 1e-11


def test_z__both_sides_of_each_change_of_method_meet():
    for dof in (1.0, 4.5, 30.0, 271.0, 3000.0, 1e6):
        switches = [1e-7, 1.0]
        low, high = 1.0, 1e150
        for _ in range(300):
            middle = np.sqrt(low * high)
            low, high = (middle, high) if t_p_value(middle, dof) >= 1e-200 else (low, middle)
        switches.append(high)
        for switch in switches:
            t = switch * (1 + np.linspace(-1e-9, 1e-9, 41))
            z = t_z_score(t, dof)
            np.testing.assert_array_less(np.diff(z) / z[1:], 1e-10)
            assert np.all(np.diff(z) > -1e-13 * z[1:])


@given(sizes, dofs)
def test_z__is_odd_finite_and_shrunk(size, dof):
    z = float(t_z_score(size, dof))
    assert z == -float(t_z_score(-size, dof))
    assert 0 <= z <= size * (1 + 1e-14)
    assert np.isfinite(z)


@given(sizes, st.floats(1e-9, 10), dofs)
def test_z_and_p__are_monotone_in_the_statistic(size, growth, dof):
    z = t_z_score([-size * (1 + growth), -size, size, size * (1 + growth)], dof)
    assert np.all(np.diff(z) >= -1e-13 * np.abs(z[1:]))
    p = t_p_value([-size * (1 + growth), -size, size, size * (1 + growth)], dof)
    assert np.all(np.diff(p) <= 1e-13 * p[:-1])


@given(st.floats(1e-3, 30), dofs, st.floats(1.001, 100))
def test_z__grows_with_the_degrees_of_freedom(size, dof, factor):
    low, high = t_z_score(size, [dof, dof * factor])
    assert low <= high * (1 + 1e-13)


def test_z_and_p__of_what_is_not_finite_or_not_a_dof():
    inf, nan = np.inf, np.nan
    np.testing.assert_array_equal(t_z_score([inf, -inf, nan, 0.0], 12), [inf, -inf, nan, 0.0])
    np.testing.assert_array_equal(t_p_value([inf, -inf, nan, 0.0], 12), [0.0, 1.0, nan, 0.5])
    np.testing.assert_array_equal(t_z_score(2.0, [nan, 0.0, -3.0]), [nan] * 3)
    np.testing.assert_array_equal(t_p_value(-2.0, [nan, 0.0, -3.0]), [nan] * 3)
    np.testing.assert_array_equal(t_z_score([-40.0, 2.0, 1e200], inf), [-40.0, 2.0, 1e200])
    np.testing.assert_array_equal(t_z_score_clipped([nan, 1.0], [3.0, nan]), [nan, nan])


def test_z__is_finite_for_every_finite_statistic():
    t = np.array([5e-324, 1e-300, 1e-160, 1e-30, 1e30, 1e154, 1e155, 1e300, np.finfo(float).max])
    dof = np.array([[0.01], [1.0], [2.5], [271.0], [1e6], [1e10], [1e15], [1e100], [1e300]])
    z = t_z_score(t, dof)
    assert np.all(np.isfinite(z))
    assert np.all(np.diff(z, axis=1) > 0)
    assert np.all(t_z_score(-t, dof) == -z)


def test_p__of_a_heavy_tail_does_not_vanish_where_squares_overflow():
    assert float(t_p_value(1e200, 1.0)) == pytest.approx(1 / np.pi * 1e-200, rel=1e-12, abs=0)
    assert float(t_p_value(-1e200, 0.001)) + float(t_p_value(1e200, 0.001)) == pytest.approx(1)


def test_shapes_broadcast_and_dtype_is_float64():
    stat = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
    dof = np.array([[4], [50], [700]])
    for function in (t_p_value, t_z_score, t_z_score_clipped):
        result = function(stat, dof)
        assert result.shape == (3, 4)
        assert result.dtype == np.float64
        assert function(2.0, 10).shape == ()
        assert function(np.zeros((0, 2)), 10).shape == (0, 2)
        np.testing.assert_array_equal(result[1], function(stat[1], 50.0))


@pytest.mark.parametrize("dof", [1.0, 12.5, 271.0, 5000.0, 1e10, 1e12])
def test_clipped_z__is_that_of_nilearn(dof):
    rng = np.random.default_rng(4)
    variance = rng.uniform(0.5, 2, 600)
    t = np.concatenate([rng.standard_normal(300) * 3, np.linspace(-45, 45, 297), [0.0, 1e6, -1e6]])
    effect = t * np.sqrt(variance)
    reference = Contrast(effect[np.newaxis], variance, dim=1, dof=dof)
    z = reference.z_score()
    np.testing.assert_allclose(t_z_score_clipped(reference.stat(), dof), z, rtol=1e-13, atol=1e-14)
    assert np.abs(z).max() <= 37.0472


def test_clipped_z__agrees_with_the_exact_one_until_it_stops():
    t = np.concatenate([np.linspace(-30, -0.5, 50), np.linspace(0.5, 30, 50)])
    np.testing.assert_allclose(t_z_score_clipped(t, 300.0), t_z_score(t, 300.0), rtol=1e-12)
    assert t_z_score(1e4, 300.0) > 40 > float(t_z_score_clipped(1e4, 300.0))


@pytest.mark.parametrize(
    ("probability", "dof", "printed"),
    [
        (0.05, 5, 2.015),
        (0.025, 10, 2.228),
        (0.005, 20, 2.845),
        (0.0005, 10, 4.587),
        (0.0005, 60, 3.460),
        (0.005, 120, 2.617),
        (0.025, np.inf, 1.960),
    ],
)
def test_p__of_t_is_that_of_printed_tables(probability, dof, printed):
    below, above = t_p_value([printed - 0.00051, printed + 0.00051], dof)
    assert above < probability < below


@pytest.mark.parametrize(
    ("probability", "q", "dof", "printed"),
    [
        (0.05, 1, 10, 4.96),
        (0.05, 3, 20, 3.10),
        (0.05, 5, 60, 2.37),
        (0.05, 12, 30, 2.09),
        (0.05, 30, 120, 1.55),
        (0.05, 10, np.inf, 1.83),
        (0.01, 2, 10, 7.56),
        (0.01, 1, 20, 8.10),
        (0.01, 5, 30, 3.70),
        (0.01, 12, 60, 2.50),
        (0.01, 5, np.inf, 3.02),
        (0.001, 5, 60, 4.76),
        (0.001, 3, 20, 8.10),
        (0.001, 2, 10, 14.91),
        (0.001, 1, 30, 13.29),
    ],
)
def test_f_p__is_that_of_printed_tables(probability, q, dof, printed):
    below, above = f_p_value([printed - 0.0051, printed + 0.0051], q, dof)
    assert above < probability < below


def exact_f_tails(stat, q, dof):
    """P(F <= stat) and P(F >= stat), with digits enough for the smaller one; None where that is below 1e-2000."""
    a, b = mp.mpf(dof) / 2, mp.mpf(q) / 2
    mean = b * mp.mpf(stat)
    decay = mean if mp.isinf(a) else a * mp.log1p(mean / a)
    if decay > 4600:
        return None
    with mp.workdps(int(60 + decay / 2)):
        if mp.isinf(a):
            left = mp.gammainc(b, 0, mean, regularized=True)
            return left, 1 - left
        if mean < a:
            left = mp.betainc(b, a, 0, mean / (a + mean), regularized=True)
            return left, 1 - left
        right = mp.betainc(a, b, 0, a / (a + mean), regularized=True)
        return 1 - right, right


@pytest.mark.parametrize("dof", F_DOFS)
@pytest.mark.parametrize("q", [1, 2, 3, 5, 12, 30, 50])
def test_f_z_and_p__agree_with_mpmath(q, dof):
    compared = []
    with mp.workdps(40):
        for stat in F_STATS:
            tails = exact_f_tails(stat, q, dof)
            if tails is None:
                continue
            left, right = tails
            tail = min(left, right)
            size = exact_z(tail, start=mp.sqrt(-2 * mp.log(tail)) if tail < 0.05 else 0.5)
            expected = size if right < left else -size
            z = f_z_score(stat, q, dof)
            assert float(abs(z - expected)) < 1e-12 * max(1, float(size)), (stat, float(expected))
            assert float(abs(f_p_value(stat, q, dof) - right)) <= 5e-11 * float(right), stat
            compared.append(float(expected))
    assert min(compared) < (-26 if q == 1 else -37)
    assert max(compared) > (25 if dof == 1 else 35)


@pytest.mark.parametrize(
    ("stat", "q", "dof"),
    [
        (21.5, 79, 5000.0),
        (27.0, 60, 5000.0),
        (4.4, 500, 1e6),
        (3.72, 1000, 5000.0),
        (3.04, 1000, 1e6),
    ],
)
def test_f_p__where_factors_of_it_underflow(stat, q, dof):
    with mp.workdps(40):
        right = exact_f_tails(stat, q, dof)[1]
        assert 1e-300 < right < 1e-200
        assert float(abs(f_p_value(stat, q, dof) / right - 1)) < 2e-10


def test_f_z__both_sides_of_each_change_of_method_meet():
    for q in (1, 2, 4, 7, 30):
        for dof in (2.0, 4.5, 184.0, 5000.0, 1e6, np.inf):
            switches = [1e-100, 1.0, 1e100]
            for z_of_underflow in (-Z_OF_UNDERFLOW, Z_OF_UNDERFLOW):
                low, high = 1e-100, 1e100
                for _ in range(100):
                    middle = np.sqrt(low * high)
                    low, high = (
                        (low, middle) if f_z_score(middle, q, dof) >= z_of_underflow else (middle, high)
                    )
                switches.append(high)
            for switch in switches:
                stat = switch * (1 + np.linspace(-1e-9, 1e-9, 41))
                z = f_z_score(stat, q, dof)
                assert np.all(np.abs(np.diff(z)) < 2e-9 * np.maximum(1, np.abs(z[1:])))
                assert np.all(np.diff(z) > -1e-12 * np.maximum(1, np.abs(z[1:])))
    stat = np.geomspace(1e-3, 60, 30)
    for dof in (6000.0, 2e17):
        for q in (1, 4, 12, 18, 30):
            below, above = f_z_score(stat[:, np.newaxis], q, dof * np.array([1 - 1e-15, 1 + 1e-15])).T
            np.testing.assert_allclose(below, above, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("q", [4, 8, 12, 36])
def test_f_z__of_whole_halves_keeps_its_digits(q):
    """Where both halves are whole, scipy sums binomials with an error in proportion to the dof."""
    stat = np.linspace(0.1, 5, 50)
    for dof in (5000.0, 1e6, 1e9):
        around = (f_z_score(stat, q, dof * (1 - 1e-9)) + f_z_score(stat, q, dof * (1 + 1e-9))) / 2
        np.testing.assert_allclose(f_z_score(stat, q, dof), around, rtol=1e-12, atol=1e-12)


@given(sizes, dofs)
def test_f_p__of_one_row_is_that_of_t_on_both_sides(size, dof):
    np.testing.assert_allclose(f_p_value(size**2, 1, dof), 2 * t_p_value(size, dof), rtol=2e-11, atol=1e-307)


@given(st.floats(1e-150, 1e150), st.floats(1e-9, 10), rows, dofs)
def test_f_z_and_p__are_monotone_in_the_statistic(stat, growth, q, dof):
    low, high = f_z_score([stat, stat * (1 + growth)], q, dof)
    assert high >= low - 2e-12 * max(1, abs(low))
    low, high = f_p_value([stat, stat * (1 + growth)], q, dof)
    assert 0 <= high <= low * (1 + 5e-11) <= 1 + 5e-11


@given(st.floats(1e-90, 1e90), rows, dofs)
def test_f_z__changes_sign_with_the_two_dofs_and_the_statistic_inverted(stat, q, dof):
    np.testing.assert_allclose(f_z_score(stat, q, dof), -f_z_score(1 / stat, dof, q), rtol=2e-12, atol=2e-12)


@given(st.floats(0, 1e300), rows, dofs)
def test_f_z__has_the_probability_of_the_statistic(stat, q, dof):
    z, p = f_z_score(stat, q, dof), f_p_value(stat, q, dof)
    assert (z >= 0) == (p <= 0.5) or abs(p - 0.5) < 1e-12
    if abs(z) < 30:
        assert t_p_value(z, np.inf) == pytest.approx(float(p), rel=2e-11, abs=0)


def test_f_z_and_p__of_what_is_not_finite_or_not_a_dof():
    inf, nan = np.inf, np.nan
    stat = [0.0, -0.0, -1e-9, -3.0, -inf, inf, nan]
    for q in (1, 3, 30):
        for dof in (0.5, 12, 5000, 1e8, inf):
            np.testing.assert_array_equal(f_z_score(stat, q, dof), [-inf] * 5 + [inf, nan])
            np.testing.assert_array_equal(f_p_value(stat, q, dof), [1.0] * 5 + [0.0, nan])
    for function in (f_p_value, f_z_score, f_z_score_clipped):
        for some in (0.0, 0.3, 2.0, inf):
            np.testing.assert_array_equal(function(some, 3, [nan, 0.0, -3.0, -inf]), [nan] * 4)
            np.testing.assert_array_equal(function(some, [nan, 0.0, -3.0, -inf], 12), [nan] * 4)
    edges = f_z_score_clipped([0.0, -1.0, inf, nan], 3, [12, 12, 12, 12])
    np.testing.assert_allclose(edges, [-37.0471, -37.0471, 37.0471, nan], atol=1e-4)


def test_f_z__is_finite_for_every_finite_statistic():
    stat = np.array(
        [
            5e-324,
            1e-310,
            1e-300,
            1e-160,
            1e-30,
            0.01,
            1.0,
            3.0,
            1e30,
            1e154,
            1e200,
            1e300,
            np.finfo(float).max,
        ]
    )
    q = np.array([[0.01], [1.0], [2.0], [5.0], [30.0], [1000.0], [1e5]])
    dof = np.array([[[0.01]], [[1.0]], [[271.0]], [[1e5]], [[1e15]], [[1e30]], [[1e300]], [[np.inf]]])
    z = f_z_score(stat, q, dof)
    assert np.all(np.isfinite(z))
    assert np.all(np.diff(z, axis=2) >= 0)
    p = f_p_value(stat, q, dof)
    assert np.all((p >= 0) & (p <= 1))


def test_f__shapes_broadcast_and_dtype_is_float64():
    stat = np.concatenate([np.geomspace(1e-200, 0.5, 14), np.geomspace(0.6, 1e5, 18)]).reshape(1, 4, 8)
    q = np.array([[1], [2], [7], [30]])
    dof = np.array([4, 50, 700, 6000, 10**6, 10**18]).reshape(6, 1, 1)
    for function in (f_p_value, f_z_score, f_z_score_clipped):
        result = function(stat, q, dof)
        assert result.shape == (6, 4, 8)
        assert result.dtype == np.float64
        for i, j, k in np.ndindex(result.shape):
            one = function(stat[0, j, k], int(q[j, 0]), int(dof[i, 0, 0]))
            assert one.shape == ()
            assert one == pytest.approx(result[i, j, k], rel=1e-14, abs=1e-300)
        assert function(np.zeros((0, 2)), 3, 10).shape == (0, 2)
        assert function(np.float32(2.5), 3, 10) == function(2.5, 3.0, 10.0)
        assert function([[1, 2]], 3, 10).dtype == np.float64


@pytest.mark.parametrize("dof", [1.0, 12.5, 271.0, 5000.0, 1e10, 1e12])
@pytest.mark.parametrize("q", [1, 3, 12])
def test_f_clipped_z__is_that_of_nilearn(q, dof):
    rng = np.random.default_rng(4)
    variance = rng.uniform(0.5, 2, 600)
    size = np.concatenate([rng.chisquare(q, 300) / q, np.geomspace(1e-60, 2000, 297), [0.0, 1e6, 1e-300]])
    effect = np.sqrt(size * variance) * np.ones((q, 1))
    reference = Contrast(effect, variance, dim=q, dof=dof, stat_type="F")
    z = reference.z_score()
    np.testing.assert_allclose(f_z_score_clipped(reference.stat(), q, dof), z, rtol=1e-13, atol=1e-14)
    assert np.abs(z).max() <= 37.0472


def test_f_clipped_z__agrees_with_the_exact_one_until_it_stops():
    stat = np.concatenate([np.geomspace(1e-20, 0.5, 50), np.linspace(1.1, 100, 50)])
    for q in (1, 3, 5):
        np.testing.assert_allclose(f_z_score_clipped(stat, q, 300.0), f_z_score(stat, q, 300.0), rtol=1e-10)
    assert f_z_score(1e5, 3, 300.0) > 40 > float(f_z_score_clipped(1e5, 3, 300.0))
    assert f_z_score(1e-250, 3, 300.0) < -40 < float(f_z_score_clipped(1e-250, 3, 300.0))
