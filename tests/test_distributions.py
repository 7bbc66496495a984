import mpmath as mp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nilearn.glm.contrasts import Contrast

from chunkglm.kernels.distributions import t_p_value, t_z_score, t_z_score_clipped

DOFS = [0.5, 1.0, 2.0, 3.7, 10.0, 30.0, 100.5, 199.0, 201.0, 271.0, 1000.0, 5000.0, 1e5, 1e6]
SIZES = [1e-12, 9e-8, 1.1e-7, 1e-4, 0.03, 0.4, 0.999, 1.0, 1.7, 3.1, 6.0, 12.0, 25.0, 35.0, 36.3, 36.6, 37.0]

dofs = st.floats(0.5, 1e7)
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
            low, high = (middle, high) if t_p_value(middle, dof) >= 1e-290 else (low, middle)
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
