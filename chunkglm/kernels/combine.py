"""Fixed effects: combining the estimates of several runs at every voxel.

The first axis is the run. A run whose effect, variance or degrees of freedom is not a number at a voxel is left out there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEAST_VARIANCE = 1e-16
"""Variances below this count as this in the reference's precision weighting (nilearn 0.14.1)."""


def combine_runs(
    effect: Floats, variance: Floats, dof: Floats, *, precision_weighted: bool, reference_rules: bool
) -> Floats:
    """Combine runs.

    With n runs at a voxel: the mean of the effects with variance ``sum(V_r) / n**2``; or, weighted by precision, the effect
    ``V * sum(effect_r / V_r)`` with variance ``V = 1 / sum(1 / V_r)``. Degrees of freedom add up.

    Parameters
    ----------
    effect, variance, dof : ndarray, shape (R, ...)
    precision_weighted, reference_rules : bool

    Returns
    -------
    ndarray, shape (4, ...)
        Effect, variance, degrees of freedom and number of runs: NaN, NaN, NaN and 0 where no run is left.
    """
    used = np.isfinite(effect) & np.isfinite(variance) & np.isfinite(dof)
    n_runs = used.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        if precision_weighted:
            floor = LEAST_VARIANCE if reference_rules else 0.0
            precision = np.where(used, 1 / np.maximum(np.where(used, variance, 1), floor), 0)
            combined_variance = 1 / precision.sum(axis=0)
            combined = combined_variance * (precision * np.where(used, effect, 0)).sum(axis=0)
        else:
            combined = np.where(used, effect, 0).sum(axis=0) / n_runs
            combined_variance = np.where(used, variance, 0).sum(axis=0) / n_runs**2
    out = np.stack([combined, combined_variance, np.where(used, dof, 0).sum(axis=0), n_runs]).astype(np.float64)
    out[:3, n_runs == 0] = np.nan
    return out
