"""Fixed effects over runs, lazily."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from chunkglm.blocks import map_rows
from chunkglm.contrasts import add_statistics
from chunkglm.errors import ChunkGLMWarning, ContrastError, InputError, NotAvailableError
from chunkglm.kernels.combine import combine_runs
from chunkglm.schema import FORMAT_VERSION, STATISTICS, annotate, require

if TYPE_CHECKING:
    from collections.abc import Hashable

    from numpy.typing import NDArray

COMBINED = ("effect", "variance", "dof")
"""What is needed of each run."""


def fixed_effects(
    contrasts: xr.Dataset, *, dim: Hashable = "run", precision_weighted: bool = False
) -> xr.Dataset:
    """Combine the same contrast of several runs.

    Parameters
    ----------
    contrasts : Dataset
        ``effect``, ``variance`` and ``dof`` over ``dim``, from :func:`chunkglm.contrast` or any other origin and
        with any further dims. ``dof`` may vary between voxels.
    dim : hashable
        Dimension to combine over.
    precision_weighted : bool
        Weight each run by the inverse of its variance, voxel by voxel. Otherwise all runs count the same.

    Returns
    -------
    Dataset
        ``effect``, ``variance``, ``dof``, ``stat``, ``p_value``, ``z_score`` and ``n_runs`` (runs that were
        combined) without ``dim``, lazy and float64. A run that is NaN at a voxel is left out there, so ``dof``
        and ``n_runs`` have the voxel dims too; no run left gives NaN.

    Raises
    ------
    InputError
        If a variable or ``dim`` is missing.
    ContrastError
        If no run has the contrast.

    Notes
    -----
    With n runs: ``effect = mean(effect_r)`` and ``variance = sum(variance_r) / n**2``; weighted by precision,
    ``variance = 1 / sum(1 / variance_r)`` and ``effect = variance * sum(effect_r / variance_r)``. Degrees of
    freedom add up. The attribute ``compat`` of the contrasts is followed.
    """
    if "covariance" in contrasts:
        raise NotAvailableError("Fixed effects of F contrasts are not available in this version.")
    for name in COMBINED:
        if name not in contrasts:
            require(contrasts, STATISTICS, (name,), "Fixed effects")
        if dim not in contrasts[name].dims:
            raise InputError(
                f"Fixed effects are over {dim!r}, but {name!r} has only the dims {contrasts[name].dims}. Give dim=, or "
                "combine several runs with xarray.concat first."
            )
    labels = [str(label) for label in contrasts[dim].to_numpy()]
    lacks = _lacks(contrasts["dof"], dim)
    _report(
        [label for label, one in zip(labels, lacks, strict=True) if one.any()], dim, none=bool(lacks.all())
    )
    arrays = _aligned(contrasts, dim)
    combine = partial(
        combine_runs,
        precision_weighted=precision_weighted,
        reference_rules=contrasts.attrs.get("compat") == "nilearn",
    )
    rows = map_rows(combine, *(array.data for array in arrays), n_rows=4)
    one = arrays[0].isel({dim: 0}, drop=True).drop_attrs(deep=False)
    ds = xr.Dataset({name: one.copy(data=rows[row]) for row, name in enumerate((*COMBINED, "n_runs"))})
    if "weights" in contrasts and dim not in contrasts["weights"].dims:
        ds["weights"] = contrasts["weights"]
    ds.attrs = {
        **contrasts.attrs,
        "kind": "fixed_effects",
        "format_version": FORMAT_VERSION,
        "precision_weighted": int(precision_weighted),
        "combined": [label for label, one in zip(labels, lacks, strict=True) if not one.all()],
    }
    return annotate(add_statistics(ds), STATISTICS)


def _aligned(contrasts: xr.Dataset, dim: Hashable) -> list[xr.DataArray]:
    """Effect, variance and degrees of freedom as float64 with the same dims, ``dim`` first.

    Degrees of freedom that do not vary between voxels have length 1 along them.
    """
    effect, variance, dof = (contrasts[name].astype(np.float64) for name in COMBINED)
    if set(dof.dims) <= set(effect.dims) | set(variance.dims):
        effect, variance = xr.broadcast(effect, variance)
        dof = xr.DataArray(dof.variable).expand_dims(
            [other for other in effect.dims if other not in dof.dims]
        )
    else:
        effect, variance, dof = xr.broadcast(effect, variance, dof)
    dims = (dim, *(other for other in effect.dims if other != dim))
    return [array.transpose(*dims) for array in (effect, variance, dof)]


def _lacks(dof: xr.DataArray, dim: Hashable) -> NDArray[np.bool_]:
    """Tell which runs (and which of several contrasts there) have no degrees of freedom, shape (R, ...)."""
    voxel_dims = [other for other in dof.dims if other not in (dim, "contrast")]
    if voxel_dims and dof.chunks is not None:
        # A number for each run is read, but maps are not computed for the sake of a warning.
        return np.zeros(dof.sizes[dim], dtype=bool)
    lacks: NDArray[np.bool_] = ~dof.notnull().any(voxel_dims).transpose(dim, ...).to_numpy()
    return lacks


def _report(missing: list[str], dim: Hashable, *, none: bool) -> None:
    if none:
        raise ContrastError(f"No run has the contrast: it is missing in {dim} {', '.join(missing)}.")
    if missing:
        warnings.warn(
            "Left out of the fixed effects, because the contrast cannot be estimated there: "
            f"{dim} {', '.join(missing)}.",
            ChunkGLMWarning,
            stacklevel=3,
        )
