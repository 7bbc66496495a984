"""F statistics, and fixed effects: combining the estimates of several runs at every voxel.

The first axis is the run. A run whose effect, variance or degrees of freedom is not a number at a voxel is left
out there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chunkglm.kernels.precision import factorise, invert

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEAST_VARIANCE = 1e-16
"""Variances below this count as this in the reference (nilearn 0.14.1, ``compute_fixed_effects``)."""


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def add_runs(
    before: Floats | None,
    effect: Floats,
    variance: Floats,
    dof: Floats,
    *,
    precision_weighted: bool,
    reference_rules: bool,
) -> Floats:
    """Add runs to the sums that :func:`combined` needs.

    One after another, so that it does not matter how many are added at a time.

    Parameters
    ----------
    before : ndarray, shape (4, ...), or None
        The sums over other runs.
    effect, variance, dof : ndarray, shape (R, ...)
        Broadcast against each other.
    precision_weighted, reference_rules : bool

    Returns
    -------
    ndarray, shape (4, ...), float64
        For :func:`combined`.
    """
    options = {"precision_weighted": precision_weighted, "reference_rules": reference_rules}
    summands = _summands(effect, variance, dof, **options)
    starts = [None] * len(summands) if before is None else list(before)
    return np.stack([_sum_of_all(*pair) for pair in zip(summands, starts, strict=True)]).astype(np.float64)


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def combined(sums: Floats, *, precision_weighted: bool) -> Floats:
    """Combine runs, from their sums.

    With n runs at a voxel: the mean of the effects with variance ``sum(V_r) / n**2``; or, weighted by precision,
    the effect ``V * sum(effect_r / V_r)`` with variance ``V = 1 / sum(1 / V_r)``. Degrees of freedom add up.

    Parameters
    ----------
    sums : ndarray, shape (4, ...)
        From :func:`add_runs`.
    precision_weighted : bool

    Returns
    -------
    ndarray, shape (4, ...), float64
        Effect, variance, degrees of freedom and number of runs: NaN, NaN, NaN and 0 where no run is left.
    """
    return _combined(*sums, precision_weighted=precision_weighted)


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def combine_others(
    effect: Floats, variance: Floats, dof: Floats, *, precision_weighted: bool, reference_rules: bool
) -> Floats:
    """Combine all runs but one, for each that can be left out, as :func:`combined` does.

    Parameters
    ----------
    effect, variance, dof : ndarray, shape (R, ...)
        Broadcast against each other.
    precision_weighted, reference_rules : bool

    Returns
    -------
    ndarray, shape (4 R, ...), float64
        The effects without each run, then the variances, the degrees of freedom, and the numbers of runs.
    """
    options = {"precision_weighted": precision_weighted, "reference_rules": reference_rules}
    summands = _summands(effect, variance, dof, **options)
    out = _combined(*map(_sums_of_others, summands), precision_weighted=precision_weighted)
    return out.reshape(-1, *out.shape[2:])


def _summands(
    effect: Floats, variance: Floats, dof: Floats, *, precision_weighted: bool, reference_rules: bool
) -> tuple[NDArray[Any], ...]:
    """What is added up over runs, each (R, ...): weighted effects, precisions or variances, degrees of freedom, 1."""
    used = np.isfinite(effect) & np.isfinite(variance) & np.isfinite(dof)
    if reference_rules:
        variance = np.maximum(variance, LEAST_VARIANCE)
    effect = np.where(used, effect, 0)
    spread = np.where(used, 1 / variance if precision_weighted else variance, 0)
    return spread * effect if precision_weighted else effect, spread, np.where(used, dof, 0), used


def _combined(
    effect: Floats, spread: Floats, dof: Floats, n_runs: NDArray[Any], *, precision_weighted: bool
) -> Floats:
    """Effect, variance, degrees of freedom and number of runs, (4, ...), from sums of what :func:`_summands` makes."""
    variance = 1 / spread if precision_weighted else spread / n_runs**2
    combined = variance * effect if precision_weighted else effect / n_runs
    out = np.stack([combined, variance, dof, n_runs]).astype(np.float64)
    out[:3, n_runs == 0] = np.nan
    return out


def _sum_of_all(summands: NDArray[Any], before: NDArray[Any] | None) -> NDArray[Any]:
    """The sum over runs, and of others before them, shape (...).

    One after another: numpy adds many runs of a lone voxel in another order than those of several.
    """
    first, *others = summands
    total: NDArray[Any] = sum(others, start=first + (0 if before is None else before))
    return total


def _sums_of_others(summands: NDArray[Any]) -> NDArray[Any]:
    """For each run the sum over all others, shape (R, ...).

    Sums of those before it and of those behind it: subtracted from the sum of all, a large one would take the digits of
    the others along, and one that is infinite everything.
    """
    numbers = summands.astype(np.intp) if summands.dtype == bool else summands
    out = np.zeros_like(numbers)
    np.cumsum(numbers[:-1], axis=0, out=out[1:])
    out[:-1] += np.cumsum(numbers[:0:-1], axis=0)[::-1]
    return out


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def add_rows(
    before: Floats | None, effect: Floats, covariance: Floats, dof: Floats, *, precision_weighted: bool
) -> Floats:
    """Add runs of contrasts of several rows to the sums that :func:`combined_rows` needs, as :func:`add_runs` does.

    Parameters
    ----------
    before : ndarray, shape (q + q q + 2, ...), or None
        The sums over other runs.
    effect : ndarray, shape (R q, ...)
        The rows of each run, run after run.
    covariance : ndarray, shape (R q q, ...)
    dof : ndarray, shape (R, ...)
    precision_weighted : bool

    Returns
    -------
    ndarray, shape (q + q q + 2, ...), float64
        For :func:`combined_rows`.
    """
    q = len(effect) // len(dof)
    summands = _summands_of_rows(effect, covariance, dof, precision_weighted=precision_weighted)
    starts = [None] * len(summands) if before is None else list(_parts_of_rows(before, q))
    sums = [_sum_of_all(*pair) for pair in zip(summands, starts, strict=True)]
    space = np.broadcast_shapes(*(one.shape[n:] for one, n in zip(sums, (1, 2, 0, 0), strict=True)))
    out = np.empty((q + q * q + 2, *space))
    for part, one in zip(_parts_of_rows(out, q), sums, strict=True):
        part[...] = one
    return out


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def combined_rows(sums: Floats, q: int, *, precision_weighted: bool) -> Floats:
    """Combine runs of contrasts of several rows, from their sums.

    With n runs at a voxel: the mean of the effects with covariance ``sum(V_r) / n**2``; or, weighted by precision,
    the effect ``V * sum(V_r^-1 effect_r)`` with covariance ``V = (sum V_r^-1)^-1``. Degrees of freedom add up.

    Parameters
    ----------
    sums : ndarray, shape (q + q q + 2, ...)
        From :func:`add_rows`.
    q : int
        Number of rows.
    precision_weighted : bool

    Returns
    -------
    ndarray, shape (q + q q + 2, ...), float64
        Effects, covariances, degrees of freedom and number of runs: NaN and 0 where no run is left.
    """
    return _combined_rows(*_parts_of_rows(sums, q), precision_weighted=precision_weighted)


def _parts_of_rows(rows: Floats, q: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Effects (q, ...), covariances or precisions (q, q, ...), degrees of freedom, and number of runs: views."""
    return rows[:q], rows[q:-2].reshape(q, q, *rows.shape[1:]), rows[-2], rows[-1]


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def combine_rows_of_others(
    effect: Floats, covariance: Floats, dof: Floats, *, precision_weighted: bool
) -> Floats:
    """Combine all runs but one, for each that can be left out, as :func:`combined_rows` does.

    Parameters
    ----------
    effect : ndarray, shape (R q, ...)
        The rows of each run, run after run.
    covariance : ndarray, shape (R q q, ...)
    dof : ndarray, shape (R, ...)
    precision_weighted : bool

    Returns
    -------
    ndarray, shape ((q + q q + 2) R, ...), float64
        The first effects without each run, then the second ones, and so on in the order of :func:`combined_rows`.
    """
    summands = _summands_of_rows(effect, covariance, dof, precision_weighted=precision_weighted)
    e, V, total_dof, n_runs = map(_sums_of_others, summands)
    e, V = np.moveaxis(e, 0, 1), np.moveaxis(V, 0, 2)
    out = _combined_rows(e, V, total_dof, n_runs, precision_weighted=precision_weighted)
    return out.reshape(-1, *out.shape[2:])


def _summands_of_rows(
    effect: Floats, covariance: Floats, dof: Floats, *, precision_weighted: bool
) -> tuple[NDArray[Any], ...]:
    """What is added up over runs: weighted effects (R, q, ...), precisions or covariances (R, q, q, ...), and so on."""
    R = len(dof)
    q = len(effect) // R
    shape = np.broadcast_shapes(effect.shape[1:], covariance.shape[1:], dof.shape[1:])
    e, V = effect.reshape(R, q, *effect.shape[1:]), covariance.reshape(R, q, q, *covariance.shape[1:])
    used = np.isfinite(e).all(axis=1) & np.isfinite(V).all(axis=(1, 2)) & np.isfinite(dof)
    e = np.where(used[:, None], e, 0.0)
    if not precision_weighted:
        return e, np.where(used[:, None, None], V, 0.0), np.where(used, dof, 0.0), used
    unit = np.eye(q).reshape(q, q, *(1,) * len(shape))
    precision = np.empty((R, q, q, *shape))
    for r in range(R):
        precision[r] = np.where(used[r], invert(np.where(used[r], V[r], unit)), 0.0)
    weighted = np.einsum("rij...,rj...->ri...", precision, e)
    return weighted, precision, np.where(used, dof, 0.0), used


def _combined_rows(
    effect: Floats, spread: Floats, dof: Floats, n_runs: NDArray[Any], *, precision_weighted: bool
) -> Floats:
    """Combine sums of what :func:`_summands_of_rows` makes: effects, covariances, dof and n_runs, (q + q q + 2, ...)."""
    q, *shape = effect.shape
    V = invert(spread) if precision_weighted else spread / n_runs**2
    out = np.empty((q + q * q + 2, *shape))
    out[:q] = np.einsum("ij...,j...->i...", V, effect) if precision_weighted else effect / n_runs
    out[q:-2] = V.reshape(q * q, *shape)
    out[-2], out[-1] = dof, n_runs
    out[:-1, n_runs == 0] = np.nan
    return out


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def f_statistic(effect: Floats, covariance: Floats) -> Floats:
    """F statistic of effects with their covariance: ``e' V^-1 e / q``.

    Parameters
    ----------
    effect : ndarray, shape (q, ...)
    covariance : ndarray, shape (q q, ...)

    Returns
    -------
    ndarray, shape (1, ...)
        NaN where the covariance is not positive definite.
    """
    q = len(effect)
    shape = np.broadcast_shapes(effect.shape[1:], covariance.shape[1:])
    block = np.empty((q + 1, q, *shape))
    block[:q], block[q] = covariance.reshape(q, q, *covariance.shape[1:]), effect
    whitened = factorise(block)[q]
    F: Floats = (whitened**2).sum(axis=0, keepdims=True) / q
    return F
