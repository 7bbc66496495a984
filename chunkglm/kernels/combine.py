"""F statistics, and fixed effects: combining the estimates of several runs at every voxel.

The first axis is the run. A run whose effect, variance or degrees of freedom is not a number at a voxel is left
out there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chunkglm.kernels.precision import factorise, invert

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEAST_VARIANCE = 1e-16
"""Variances below this count as this in the reference (nilearn 0.14.1, ``compute_fixed_effects``)."""


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def combine_runs(
    effect: Floats, variance: Floats, dof: Floats, *, precision_weighted: bool, reference_rules: bool
) -> Floats:
    """Combine runs.

    With n runs at a voxel: the mean of the effects with variance ``sum(V_r) / n**2``; or, weighted by precision,
    the effect ``V * sum(effect_r / V_r)`` with variance ``V = 1 / sum(1 / V_r)``. Degrees of freedom add up.

    Parameters
    ----------
    effect, variance, dof : ndarray, shape (R, ...)
        Broadcast against each other.
    precision_weighted, reference_rules : bool

    Returns
    -------
    ndarray, shape (4, ...), float64
        Effect, variance, degrees of freedom and number of runs: NaN, NaN, NaN and 0 where no run is left.
    """
    used = np.isfinite(effect) & np.isfinite(variance) & np.isfinite(dof)
    n_runs = used.sum(axis=0)
    if reference_rules:
        variance = np.maximum(variance, LEAST_VARIANCE)
    if precision_weighted:
        precision = np.where(used, 1 / variance, 0)
        combined_variance = 1 / precision.sum(axis=0)
        combined = combined_variance * (precision * np.where(used, effect, 0)).sum(axis=0)
    else:
        combined = np.where(used, effect, 0).sum(axis=0) / n_runs
        combined_variance = np.where(used, variance, 0).sum(axis=0) / n_runs**2
    total_dof = np.where(used, dof, 0).sum(axis=0)
    out = np.stack([combined, combined_variance, total_dof, n_runs]).astype(np.float64)
    out[:3, n_runs == 0] = np.nan
    return out


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def combine_rows(effect: Floats, covariance: Floats, dof: Floats, *, precision_weighted: bool) -> Floats:
    """Combine runs of contrasts of several rows.

    With n runs at a voxel: the mean of the effects with covariance ``sum(V_r) / n**2``; or, weighted by precision,
    the effect ``V * sum(V_r^-1 effect_r)`` with covariance ``V = (sum V_r^-1)^-1``. Degrees of freedom add up.

    Parameters
    ----------
    effect : ndarray, shape (R q, ...)
        The rows of each run, run after run.
    covariance : ndarray, shape (R q q, ...)
    dof : ndarray, shape (R, ...)
    precision_weighted : bool

    Returns
    -------
    ndarray, shape (q + q q + 2, ...), float64
        Effects, covariances, degrees of freedom and number of runs: NaN and 0 where no run is left.
    """
    R = len(dof)
    q = len(effect) // R
    shape = np.broadcast_shapes(effect.shape[1:], covariance.shape[1:], dof.shape[1:])
    e, V = effect.reshape(R, q, *effect.shape[1:]), covariance.reshape(R, q, q, *covariance.shape[1:])
    used = np.isfinite(e).all(axis=1) & np.isfinite(V).all(axis=(1, 2)) & np.isfinite(dof)
    n_runs = used.sum(axis=0)
    e = np.where(used[:, None], e, 0.0)
    if precision_weighted:
        unit = np.eye(q).reshape(q, q, *(1,) * len(shape))
        precision = np.zeros((q, q, *shape))
        weighted = np.zeros((q, *shape))
        for r in range(R):
            P = np.where(used[r], invert(np.where(used[r], V[r], unit)), 0.0)
            precision += P
            weighted += np.einsum("ij...,j...->i...", P, e[r])
        combined_V = invert(precision)
        combined = np.einsum("ij...,j...->i...", combined_V, weighted)
    else:
        combined = e.sum(axis=0) / n_runs
        combined_V = np.where(used[:, None, None], V, 0.0).sum(axis=0) / n_runs**2
    total_dof = np.where(used, dof, 0.0).sum(axis=0)
    out = np.empty((q + q * q + 2, *shape))
    out[:q], out[q:-2] = combined, combined_V.reshape(q * q, *shape)
    out[-2], out[-1] = total_dof, n_runs
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
