"""Student's t and F in the tails: p values and z scores that neither saturate nor underflow.

The z score of a t statistic is the standard-normal quantile with the same tail probability. Going through
that probability loses everything below 1e-308 (z about 37.5), and nearly everything about t = 0, where
it is a half minus something small. So three ways are taken, each where it is accurate: near 0 through the
central probability, then through the tail probability, and far out through the logarithm of the latter.

The z score of an F statistic is that of its right tail, and negative where the left tail is the smaller. It
goes through the tail on the statistic's own side, or far out through the logarithm of that.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import special

FloatArray: TypeAlias = npt.NDArray[np.float64]

CENTRAL = 1.0
"""Statistics smaller than this (absolute value) go through the central probability."""

LINEAR = 1e-7
"""Below this the z score is proportional to the statistic, to a relative error of about its square."""

UNDERFLOW = 1e-200
"""Tail probabilities smaller than this are computed as logarithms.

That of F with 79 and 5000 degrees of freedom is wrong in scipy 1.17 from 1e-253 on: its factors underflow.
"""

N_FRACTION_TERMS = 8
"""Terms of the continued fraction; so far out, five are exact to rounding error up to 10,000 rows."""

LARGE_GAMMA_ARGUMENT = 100.0
"""From here the asymptotic series of the gamma ratio is exact to rounding error."""

F_MIDDLE = 1.0
"""F statistics smaller than this go through the left tail; at 1 neither tail is next to 0."""

F_LARGE = 1e100
"""More degrees of freedom count as this, so infinitely many too; larger statistics go through logarithms.

With as many in the denominator, F is the chi-square divided by its dof, for every statistic below 1e80.
"""

LARGE_HALF = 3000.0
"""From this ``a`` on, I_x(a, b) is computed as the complement of I_y(b, a).

The rounding of x, raised to this power, would cost more than 1e-12.
"""

CANCELLED = 0.01
"""Complements smaller than this are not computed by subtraction, but by scipy's `betaincc`.

That takes ten times as long, and scipy 1.17 has an error of 3e-12 there about 1/2, for 24 to 38 rows.
"""

INFINITE_HALF = 1e17
"""From this ``a`` on, I_x(a, b) is the incomplete gamma function to rounding error, where it does not underflow."""

REFERENCE_MAX_DOF = 1e10
REFERENCE_MIN_PROBABILITY = 1e-300
REFERENCE_MAX_PROBABILITY = 1.0 - 1e-16


def t_p_value(stat: npt.ArrayLike, dof: npt.ArrayLike) -> FloatArray:
    """Survival function of Student's t: the one-sided p value of the right tail.

    Parameters
    ----------
    stat : array_like of float
        t statistics, of any shape.
    dof : array_like of float
        Degrees of freedom, positive, not necessarily whole; infinity is the normal distribution. Broadcast
        with `stat`.

    Returns
    -------
    ndarray of float64
        ``P(T >= stat)`` in [0, 1], in the common shape. NaN where `stat` or `dof` is NaN or `dof` is not
        positive.

    Notes
    -----
    ``P(T >= t) = I_x(dof / 2, 1 / 2) / 2`` with ``x = dof / (dof + t^2)`` for t >= 0 [1]_, and the complement
    for t < 0.

    References
    ----------
    .. [1] NIST Digital Library of Mathematical Functions, 8.17.
    """
    stat_, dof_ = _as_broadcast(stat, dof)
    size = np.abs(stat_)
    tail = np.asarray(special.stdtr(dof_, -size), dtype=np.float64)
    # For dof = 1, scipy 1.17 is wrong by 1e-10 about 0.
    central = (size < CENTRAL) & np.isfinite(dof_)
    tail[central] = 0.5 - 0.5 * _central_probability(size[central], dof_[central])
    # scipy squares the statistic, and so gives 0 from 1e154 on even where the tail is heavy.
    far = (tail < UNDERFLOW) & np.isfinite(dof_)
    tail[far] = np.exp(_t_log_tail(size[far], dof_[far]))
    return np.where(stat_ < 0, 1.0 - tail, tail)


def t_z_score(stat: npt.ArrayLike, dof: npt.ArrayLike) -> FloatArray:
    """Standard-normal quantile with the tail probability of a t statistic, signed as the statistic.

    Accurate to a relative error of about 1e-12 in both tails and about 0, and finite wherever the statistic
    is: it does not stop where probabilities underflow.

    Parameters
    ----------
    stat : array_like of float
        t statistics, of any shape.
    dof : array_like of float
        Degrees of freedom, positive, not necessarily whole; infinity gives `stat` itself. Broadcast with
        `stat`.

    Returns
    -------
    ndarray of float64
        z with ``P(Z >= z) = P(T >= stat)``, in the common shape: odd in `stat`. Infinite where `stat` is, NaN
        where `stat` or `dof` is NaN or `dof` is not positive.

    Notes
    -----
    By the size of the statistic:

    * about 0, ``z = sqrt(2) erfinv(I_y(1 / 2, dof / 2))`` with ``y = t^2 / (dof + t^2)``, and next to 0 its
      tangent ``z = t sqrt(2 / dof) Gamma((dof + 1) / 2) / Gamma(dof / 2)``;
    * else ``z = -ndtri(P(T >= t))``;
    * where that probability underflows, the same with logarithms, by the continued fraction of the incomplete
      beta function.
    """
    stat_, dof_ = _as_broadcast(stat, dof)
    size = np.abs(stat_)
    z = np.full(size.shape, np.nan)

    usable = ~np.isnan(size) & ~np.isnan(dof_)
    normal = usable & (np.isinf(size) | np.isinf(dof_))
    z[normal] = size[normal]

    student = usable & ~normal
    central = student & (size < CENTRAL)
    z[central] = _z_of_central(size[central], dof_[central])

    outer = student & (size >= CENTRAL)
    z[outer] = _z_of_outer(size[outer], dof_[outer])
    return np.asarray(np.copysign(z, stat_), dtype=np.float64)


def t_z_score_clipped(stat: npt.ArrayLike, dof: npt.ArrayLike) -> FloatArray:
    """Z score of a t statistic by the definition of nilearn 0.14.1, which stops at z = 37.05.

    Parameters
    ----------
    stat : array_like of float
        t statistics, of any shape.
    dof : array_like of float
        Degrees of freedom; more than 1e10 count as 1e10. Broadcast with `stat`.

    Returns
    -------
    ndarray of float64
        z scores in the common shape, between -37.047 and 37.047; NaN where `stat` or `dof` is NaN.

    Notes
    -----
    ``p = P(T >= t)`` and ``q = P(T <= t)`` are each clipped to [1e-300, 1 - 1e-16]; z is the normal quantile
    of p from the right and, where that is negative, of q from the left (``nilearn.glm._utils.z_score``).
    """
    stat_, dof_ = _as_broadcast(stat, dof)
    dof_ = np.minimum(dof_, REFERENCE_MAX_DOF)
    return _z_of_clipped(special.stdtr(dof_, -stat_), special.stdtr(dof_, stat_))


def f_p_value(stat: npt.ArrayLike, dof_1: npt.ArrayLike, dof_2: npt.ArrayLike) -> FloatArray:
    """Survival function of the F distribution: the p value of an F test.

    Parameters
    ----------
    stat : array_like of float
        F statistics, of any shape; negative ones count as 0.
    dof_1 : array_like of float
        Degrees of freedom of the numerator, positive: the number of rows of the contrast.
    dof_2 : array_like of float
        Degrees of freedom of the denominator, positive, not necessarily whole; infinity is the chi-square
        distribution of `dof_1` times `stat`. All three are broadcast.

    Returns
    -------
    ndarray of float64
        ``P(F >= stat)`` in [0, 1], in the common shape. NaN where an argument is NaN or a dof not positive.

    Notes
    -----
    ``P(F >= f) = I_x(dof_2 / 2, dof_1 / 2)`` with ``x = dof_2 / (dof_2 + dof_1 f)`` [1]_, for f below 1 as the
    complement of ``P(F <= f) = I_(1 - x)(dof_1 / 2, dof_2 / 2)``.

    References
    ----------
    .. [1] NIST Digital Library of Mathematical Functions, 8.17.
    """
    lower, tail, far, log_tail = _f_tails(*_as_f_broadcast(stat, dof_1, dof_2))
    tail[far] = np.exp(log_tail)
    return np.where(lower, 1.0 - tail, tail)


def f_z_score(stat: npt.ArrayLike, dof_1: npt.ArrayLike, dof_2: npt.ArrayLike) -> FloatArray:
    """Standard-normal quantile with the tail probability of an F statistic, negative where that is above 1/2.

    Accurate to a relative error of about 1e-12 in both tails, and to as much absolutely about 0. Finite
    wherever the statistic is positive and finite (for dofs of at least 0.01, and `dof_1` to 1e5): it does not
    stop where probabilities underflow.

    Parameters
    ----------
    stat : array_like of float
        F statistics, of any shape; negative ones count as 0.
    dof_1 : array_like of float
        Degrees of freedom of the numerator, positive: the number of rows of the contrast.
    dof_2 : array_like of float
        Degrees of freedom of the denominator, positive, not necessarily whole; infinity is the chi-square
        distribution of `dof_1` times `stat`. All three are broadcast.

    Returns
    -------
    ndarray of float64
        z with ``P(Z >= z) = P(F >= stat)``, in the common shape. Negative infinity where `stat` is 0, infinity
        where it is infinite, NaN where an argument is NaN or a dof not positive.

    Notes
    -----
    ``z = -ndtri(P(F >= f))`` for f of 1 and more and ``z = ndtri(P(F <= f))`` below, so that neither
    probability is next to 1; where it underflows, the same with logarithms, by the continued fraction of the
    incomplete beta function.
    """
    lower, tail, far, log_tail = _f_tails(*_as_f_broadcast(stat, dof_1, dof_2))
    z = np.asarray(-special.ndtri(tail), dtype=np.float64)
    z[far] = -special.ndtri_exp(log_tail)
    return np.where(lower, -z, z)


def f_z_score_clipped(stat: npt.ArrayLike, dof_1: npt.ArrayLike, dof_2: npt.ArrayLike) -> FloatArray:
    """Z score of an F statistic by the definition of nilearn 0.14.1, which stops at z = 37.05 on either side.

    Parameters
    ----------
    stat : array_like of float
        F statistics, of any shape; negative ones count as 0.
    dof_1 : array_like of float
        Degrees of freedom of the numerator, positive: the number of rows of the contrast.
    dof_2 : array_like of float
        Degrees of freedom of the denominator; more than 1e10 count as 1e10. All three are broadcast.

    Returns
    -------
    ndarray of float64
        z scores in the common shape, between -37.047 and 37.047; NaN where an argument is NaN or a dof not positive.

    Notes
    -----
    ``p = P(F >= f)`` and ``q = P(F <= f)``, clipped as those of t: see `t_z_score_clipped`.
    """
    stat_, dof_1_, dof_2_ = _as_f_broadcast(stat, dof_1, dof_2)
    dof_2_ = np.minimum(dof_2_, REFERENCE_MAX_DOF)
    return _z_of_clipped(special.fdtrc(dof_1_, dof_2_, stat_), special.fdtr(dof_1_, dof_2_, stat_))


def _as_broadcast(stat: npt.ArrayLike, *dofs: npt.ArrayLike) -> tuple[FloatArray, ...]:
    """All as float64 arrays of one shape; degrees of freedom that are not positive become NaN."""
    arrays = [np.asarray(dof, dtype=np.float64) for dof in dofs]
    usable = [np.where(array > 0, array, np.nan) for array in arrays]
    return np.broadcast_arrays(np.asarray(stat, dtype=np.float64), *usable)


def _as_f_broadcast(
    stat: npt.ArrayLike, dof_1: npt.ArrayLike, dof_2: npt.ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The same for F, with the statistics and the degrees of freedom brought into their ranges."""
    stat_, dof_1_, dof_2_ = _as_broadcast(stat, dof_1, dof_2)
    return np.maximum(stat_, 0.0), np.minimum(dof_1_, F_LARGE), np.minimum(dof_2_, F_LARGE)


def _z_of_clipped(right: FloatArray, left: FloatArray) -> FloatArray:
    """Z scores of a right tail and its complement, as ``nilearn.glm._utils.z_score``."""
    right = np.clip(right, REFERENCE_MIN_PROBABILITY, REFERENCE_MAX_PROBABILITY)
    left = np.clip(left, REFERENCE_MIN_PROBABILITY, REFERENCE_MAX_PROBABILITY)
    z = -special.ndtri(right)
    return np.asarray(np.where(z < 0, special.ndtri(left), z), dtype=np.float64)


def _central_probability(size: FloatArray, dof: FloatArray) -> FloatArray:
    """P(-size < T < size) for 0 <= size < 1."""
    squared = size * size
    return np.asarray(special.betainc(0.5, 0.5 * dof, squared / (dof + squared)), dtype=np.float64)


def _z_of_central(size: FloatArray, dof: FloatArray) -> FloatArray:
    """Z scores of small statistics, 0 <= size < 1."""
    z = np.sqrt(2.0) * special.erfinv(_central_probability(size, dof))
    slope = np.exp(_log_gamma_ratio(0.5 * dof, 0.5)) * np.sqrt(2.0 / dof)
    return np.asarray(np.where(size < LINEAR, size * slope, z), dtype=np.float64)


def _z_of_outer(size: FloatArray, dof: FloatArray) -> FloatArray:
    """Z scores of statistics of 1 and more, through the tail probability or its logarithm."""
    tail = special.stdtr(dof, -size)
    far = tail < UNDERFLOW
    z = -special.ndtri(np.where(far, 0.5, tail))
    z[far] = -special.ndtri_exp(_t_log_tail(size[far], dof[far]))
    return np.asarray(z, dtype=np.float64)


def _f_tails(
    stat: FloatArray, dof_1: FloatArray, dof_2: FloatArray
) -> tuple[npt.NDArray[np.bool_], FloatArray, npt.NDArray[np.bool_], FloatArray]:
    """Tail probabilities on the statistics' own sides, and logarithms of those that are too small.

    Returns where the tail is the left one, the tails, where they underflow, and the logarithms of only those.
    """
    lower = np.asarray(stat < F_MIDDLE, dtype=np.bool_)
    clipped = np.clip(stat, 1.0 / F_LARGE, F_LARGE)
    numerator, total = dof_1 * clipped, dof_1 * clipped + dof_2
    x, y = np.where(lower, numerator, dof_2) / total, np.where(lower, dof_2, numerator) / total
    # Where both halves are whole, scipy sums a binomial, to an error of 3e-17 times dof_2. So it gets the next
    # floating-point number, whose half is not whole, and which changes less than rounding does.
    a, b = _halves(lower, dof_1, np.nextafter(dof_2, np.inf))
    tail = np.full(stat.shape, np.nan)
    # By index: with `where`, scipy before 1.18 may crash (github.com/scipy/xsf, pull request 146).
    usual, large, infinite = a < LARGE_HALF, (a >= LARGE_HALF) & (a < INFINITE_HALF), a >= INFINITE_HALF
    tail[usual] = special.betainc(a[usual], b[usual], x[usual])
    tail[large] = 1.0 - special.betainc(b[large], a[large], y[large])
    large &= tail < CANCELLED
    tail[large] = special.betaincc(b[large], a[large], y[large])
    tail[infinite] = special.gammaincc(b[infinite], a[infinite] * y[infinite])
    far = np.asarray(((tail < UNDERFLOW) | (stat != clipped)) & ~np.isnan(tail), dtype=np.bool_)
    with np.errstate(divide="ignore"):
        log_stat = np.log(stat[far])
    return lower, tail, far, _log_tail(log_stat, dof_1[far], dof_2[far], lower[far])


def _halves(
    lower: npt.NDArray[np.bool_], dof_1: FloatArray, dof_2: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Both parameters of I_x(a, b): dof_2 / 2 and dof_1 / 2 for the right tail, exchanged for the left one."""
    return 0.5 * np.where(lower, dof_1, dof_2), 0.5 * np.where(lower, dof_2, dof_1)


def _t_log_tail(size: FloatArray, dof: FloatArray) -> FloatArray:
    """Logarithm of P(T >= size), for statistics so large that the probability underflows."""
    both = _log_tail(2.0 * np.log(size), np.ones_like(dof), dof, np.zeros(size.shape, dtype=np.bool_))
    return np.asarray(both - np.log(2.0), dtype=np.float64)


def _log_tail(
    log_stat: FloatArray, dof_1: FloatArray, dof_2: FloatArray, lower: npt.NDArray[np.bool_]
) -> FloatArray:
    """Logarithm of P(F <= stat) where `lower`, else of P(F >= stat), where that underflows.

    ``I_x(a, b) = x^a y^b / B(a, b) / G`` with ``y = 1 - x``, ``y / x = stat * dof_1 / dof_2``, ``a = dof_2 / 2``,
    ``b = dof_1 / 2`` for the right tail, all four exchanged for the left one, and G the continued fraction of
    DiDonato and Morris (1992, ACM Transactions on Mathematical Software 18:360-373), evaluated backwards.
    Everything is a function of log(y / x), so that no product overflows and neither x nor y is found by
    subtraction.
    """
    a, b = _halves(lower, dof_1, dof_2)
    log_odds = np.where(lower, -1.0, 1.0) * (log_stat + np.log(dof_1) - np.log(dof_2))
    x, y = special.expit(-log_odds), special.expit(log_odds)
    excess = a * y - b * x
    fraction = np.zeros_like(a)
    for n in range(N_FRACTION_TERMS, 0, -1):
        step = a + 2 * n - 1
        numerator = (a + n - 1) / step * ((a + b + n - 1) / step) * n * (b - n) * x * x
        denominator = n + n * (b - n) * x / step + (a + n) / (step + 2) * (excess + 1 + n * (1 + y))
        fraction = numerator / (denominator + fraction)
    fraction += a / (a + 1) * (excess + 1)
    smaller = np.minimum(a, b)
    log_beta = special.gammaln(smaller) - _log_gamma_ratio(np.maximum(a, b), smaller)
    log_powers = -a * np.logaddexp(0.0, log_odds) - b * np.logaddexp(0.0, -log_odds)
    return np.asarray(log_powers - log_beta - np.log(fraction), dtype=np.float64)


def _log_gamma_ratio(a: FloatArray, b: FloatArray | float) -> FloatArray:
    """log(Gamma(a + b) / Gamma(a)), without the cancellation of two large logarithms where a is large."""
    small = np.minimum(a, LARGE_GAMMA_ARGUMENT)
    direct = special.gammaln(small + b) - special.gammaln(small)
    large = np.maximum(a, LARGE_GAMMA_ARGUMENT)
    powers = b * np.log(large) + (large + b - 0.5) * np.log1p(b / large) - b
    series = powers + _stirling_series(large + b) - _stirling_series(large)
    return np.where(a < LARGE_GAMMA_ARGUMENT, direct, series)


def _stirling_series(a: FloatArray) -> FloatArray:
    """What Stirling's formula lacks to log(Gamma(a))."""
    inverse = 1.0 / a
    return inverse / 12.0 - inverse**3 / 360.0 + inverse**5 / 1260.0
