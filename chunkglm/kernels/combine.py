"""Fixed effects: combining the estimates of several runs at every voxel.

The first axis is the run. A run whose effect, variance or degrees of freedom is not a number at a voxel is left
out there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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
