"""Student's t in the tails: p values and z scores that neither saturate nor underflow.

The z score of a t statistic is the standard-normal quantile with the same tail probability. Going through
that probability loses everything below 1e-308 (z about 37.5), and nearly everything about t = 0, where
it is a half minus something small. So three ways are taken, each where it is accurate: near 0 through the
central probability, then through the tail probability, and far out through the logarithm of the latter.
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

UNDERFLOW = 1e-290
"""Tail probabilities smaller than this are computed as logarithms."""

N_FRACTION_TERMS = 8
"""Terms of the continued fraction; so far out, four are already exact to rounding error."""

LARGE_GAMMA_ARGUMENT = 100.0
"""From here the asymptotic series of the gamma ratio is exact to rounding error."""

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
    tail[far] = np.exp(_log_tail(size[far], dof_[far]))
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
    bounds = (REFERENCE_MIN_PROBABILITY, REFERENCE_MAX_PROBABILITY)
    right = np.clip(special.stdtr(dof_, -stat_), *bounds)
    left = np.clip(special.stdtr(dof_, stat_), *bounds)
    z = -special.ndtri(right)
    return np.asarray(np.where(z < 0, special.ndtri(left), z), dtype=np.float64)


def _as_broadcast(stat: npt.ArrayLike, dof: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both as float64 arrays of one shape; degrees of freedom that are not positive become NaN."""
    dof_ = np.asarray(dof, dtype=np.float64)
    dof_ = np.where(dof_ > 0, dof_, np.nan)
    stat_, dof_ = np.broadcast_arrays(np.asarray(stat, dtype=np.float64), dof_)
    return stat_, dof_


def _central_probability(size: FloatArray, dof: FloatArray) -> FloatArray:
    """P(-size < T < size) for 0 <= size < 1."""
    squared = size * size
    return np.asarray(special.betainc(0.5, 0.5 * dof, squared / (dof + squared)), dtype=np.float64)


def _z_of_central(size: FloatArray, dof: FloatArray) -> FloatArray:
    """Z scores of small statistics, 0 <= size < 1."""
    z = np.sqrt(2.0) * special.erfinv(_central_probability(size, dof))
    slope = np.exp(_log_gamma_ratio(0.5 * dof)) * np.sqrt(2.0 / dof)
    return np.asarray(np.where(size < LINEAR, size * slope, z), dtype=np.float64)


def _z_of_outer(size: FloatArray, dof: FloatArray) -> FloatArray:
    """Z scores of statistics of 1 and more, through the tail probability or its logarithm."""
    tail = special.stdtr(dof, -size)
    far = tail < UNDERFLOW
    z = -special.ndtri(np.where(far, 0.5, tail))
    z[far] = -special.ndtri_exp(_log_tail(size[far], dof[far]))
    return np.asarray(z, dtype=np.float64)


def _log_tail(size: FloatArray, dof: FloatArray) -> FloatArray:
    """Logarithm of P(T >= size), for statistics so large that the probability underflows.

    ``I_x(a, b) = x^a y^b / B(a, b) * F`` with ``a = dof / 2``, ``b = 1 / 2``, ``x = dof / (dof + t^2)``,
    ``y = 1 - x`` and F the continued fraction of DiDonato and Morris (1992, ACM Transactions on Mathematical
    Software 18:360-373), evaluated backwards. Everything is a function of log(t^2 / dof), so that no square
    overflows and neither x nor y is found by subtraction.
    """
    a, b = 0.5 * dof, 0.5
    log_odds = 2.0 * np.log(size) - np.log(dof)
    x, y = special.expit(-log_odds), special.expit(log_odds)
    excess = a * y - b * x
    fraction = np.zeros_like(a)
    for n in range(N_FRACTION_TERMS, 0, -1):
        step = a + 2 * n - 1
        numerator = (a + n - 1) / step * ((a + b + n - 1) / step) * n * (b - n) * x * x
        denominator = n + n * (b - n) * x / step + (a + n) / (step + 2) * (excess + 1 + n * (1 + y))
        fraction = numerator / (denominator + fraction)
    fraction += a / (a + 1) * (excess + 1)
    log_beta = 0.5 * np.log(np.pi) - _log_gamma_ratio(a)
    log_powers = -a * np.logaddexp(0.0, log_odds) - b * np.logaddexp(0.0, -log_odds)
    return np.asarray(log_powers - log_beta - np.log(fraction) - np.log(2.0), dtype=np.float64)


def _log_gamma_ratio(a: FloatArray) -> FloatArray:
    """log(Gamma(a + 1/2) / Gamma(a)), without the cancellation of two large logarithms."""
    small = np.minimum(a, LARGE_GAMMA_ARGUMENT)
    direct = special.gammaln(small + 0.5) - special.gammaln(small)
    large = np.maximum(a, LARGE_GAMMA_ARGUMENT)
    inverse = 1.0 / large
    series = 0.5 * np.log(large) - inverse / 8.0 + inverse**3 / 192.0 - inverse**5 / 640.0
    return np.where(a < LARGE_GAMMA_ARGUMENT, direct, series)
