"""Fixed effects over runs, lazily."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from chunkglm.blocks import map_rows, stack
from chunkglm.contrasts import add_statistics, filled_up
from chunkglm.errors import ChunkGLMWarning, ContrastError, InputError
from chunkglm.kernels.combine import combine_rows, combine_runs
from chunkglm.schema import FORMAT_VERSION, STATISTICS, annotate, require

if TYPE_CHECKING:
    from collections.abc import Hashable

    from numpy.typing import NDArray

COMBINED = ("effect", "variance", "dof")
"""What is needed of each run."""

ROWS = {"effect": ("row",), "covariance": ("row", "row_")}
"""Dims of F contrasts besides those of t contrasts."""


def fixed_effects(
    contrasts: xr.Dataset, *, dim: Hashable = "run", precision_weighted: bool = False
) -> xr.Dataset:
    """Combine the same contrast of several runs.

    Parameters
    ----------
    contrasts : Dataset
        ``effect``, ``variance`` and ``dof`` over ``dim``, from :func:`chunkglm.contrast` or any other origin and
        with any further dims. ``dof`` may vary between voxels. Or an F contrast: ``effect`` with a dim ``row``, and
        ``covariance`` with ``row`` and ``row_`` in place of ``variance``.
    dim : hashable
        Dimension to combine over.
    precision_weighted : bool
        Weight each run by the inverse of its variance (of an F contrast: of its covariance of rows), voxel by voxel.
        Otherwise all runs count the same.

    Returns
    -------
    Dataset
        ``effect``, ``variance``, ``dof``, ``stat``, ``p_value``, ``z_score`` and ``n_runs`` (runs that were
        combined) without ``dim``, lazy and float64. A run that is NaN at a voxel is left out there, so ``dof``
        and ``n_runs`` have the voxel dims too; no run left gives NaN. Of F contrasts ``covariance`` in place of
        ``variance``, and ``n_rows``.

    Raises
    ------
    InputError
        If a variable or a dim is missing, or F contrasts of the reference are to be weighted by precision.
    ContrastError
        If no run has the contrast.

    Notes
    -----
    With n runs: ``effect = mean(effect_r)`` and ``variance = sum(variance_r) / n**2``; weighted by precision,
    ``variance = 1 / sum(1 / variance_r)`` and ``effect = variance * sum(effect_r / variance_r)`` (Cochran 1954, Biometrics
    10:101-129); ``t = effect / sqrt(variance)``. Of F contrasts the same with covariances: ``V = sum(V_r) / n**2``, or
    ``V = (sum V_r^-1)^-1`` and ``effect = V sum(V_r^-1 effect_r)``; ``F = effect' V^-1 effect / q``. Degrees of freedom add
    up. The attribute ``compat`` of the contrasts is followed.
    """
    of_rows = "covariance" in contrasts
    by_reference = contrasts.attrs.get("compat") == "nilearn"
    if of_rows and by_reference and precision_weighted:
        raise InputError(
            "F contrasts cannot be weighted by precision with compat='nilearn', as nilearn cannot do it. Leave "
            "precision_weighted out, or fit without compat."
        )
    needed = ("effect", "covariance" if of_rows else "variance", "dof")
    for name in needed:
        if name not in contrasts:
            require(contrasts, STATISTICS, (name,), "Fixed effects")
        lacking = [row for row in ROWS.get(name, ()) if of_rows and row not in contrasts[name].dims]
        if lacking:
            raise InputError(
                f"Fixed effects of F contrasts need {name!r} with the dim {lacking[0]!r}, but it has {contrasts[name].dims}."
            )
        if dim not in contrasts[name].dims:
            raise InputError(
                f"Fixed effects are over {dim!r}, but {name!r} has only the dims {contrasts[name].dims}. Give dim=, or "
                "combine several runs with xarray.concat first."
            )
    labels = [str(label) for label in contrasts[dim].to_numpy()]
    lacks = _lacks(contrasts, dim)
    _report(
        [label for label, one in zip(labels, lacks, strict=True) if one.any()], dim, none=bool(lacks.all())
    )
    attrs = {
        **contrasts.attrs,
        "kind": "fixed_effects",
        "format_version": FORMAT_VERSION,
        "precision_weighted": int(precision_weighted),
        "combined": [label for label, one in zip(labels, lacks, strict=True) if not one.all()],
    }
    if of_rows:
        ds = _combine_rows(contrasts, dim, precision_weighted=precision_weighted)
    else:
        ds = _combine(contrasts, dim, precision_weighted=precision_weighted, by_reference=by_reference)
    if "weights" in contrasts and dim not in contrasts["weights"].dims:
        ds["weights"] = contrasts["weights"]
    ds.attrs = attrs
    return annotate(ds, STATISTICS)


def _combine(
    contrasts: xr.Dataset, dim: Hashable, *, precision_weighted: bool, by_reference: bool
) -> xr.Dataset:
    """Of effects with variances."""
    arrays = _aligned(contrasts, dim)
    combine = partial(combine_runs, precision_weighted=precision_weighted, reference_rules=by_reference)
    rows = map_rows(combine, *(array.data for array in arrays), n_rows=4)
    one = arrays[0].isel({dim: 0}, drop=True).drop_attrs(deep=False)
    ds = xr.Dataset({name: one.copy(data=rows[row]) for row, name in enumerate((*COMBINED, "n_runs"))})
    ds.attrs = contrasts.attrs
    return add_statistics(ds)


def _combine_rows(contrasts: xr.Dataset, dim: Hashable, *, precision_weighted: bool) -> xr.Dataset:
    """Of effects of several rows with covariances, contrast by contrast: they may have other numbers of rows."""
    if "contrast" in contrasts["effect"].dims:
        parts = [
            _combine_rows(
                contrasts.isel(contrast=[number]).squeeze("contrast"),
                dim,
                precision_weighted=precision_weighted,
            )
            for number in range(contrasts.sizes["contrast"])
        ]
        return xr.concat(
            [filled_up(one, contrasts.sizes["row"]) for one in parts],
            dim="contrast",
            data_vars="all",
            coords="different",
            compat="equals",
            join="exact",
        )
    q = int(contrasts["n_rows"]) if "n_rows" in contrasts else contrasts.sizes["row"]
    contrasts = contrasts.isel(row=slice(q), row_=slice(q))
    rest = [other for other in contrasts["effect"].dims if other not in (dim, "row")]
    effect = contrasts["effect"].transpose(dim, "row", *rest)
    covariance = contrasts["covariance"].transpose(dim, "row", "row_", *rest)
    dof = xr.DataArray(contrasts["dof"].variable)
    dof = dof.expand_dims([other for other in rest if other not in dof.dims]).transpose(dim, *rest)
    arrays = (
        effect.data.reshape(-1, *effect.shape[2:]),
        covariance.data.reshape(-1, *covariance.shape[3:]),
        dof.data.astype(np.float64),
    )
    combine = partial(combine_rows, precision_weighted=precision_weighted)
    rows = map_rows(combine, *arrays, n_rows=q + q * q + 2)
    one = effect.isel({dim: 0}, drop=True).drop_attrs(deep=False)
    ds = xr.Dataset({"effect": one.copy(data=rows[:q])})
    covariances = stack([rows[q + row * q : q + (row + 1) * q] for row in range(q)])
    ds["covariance"] = (("row", "row_", *rest), covariances)
    ds["dof"], ds["n_runs"] = (rest, rows[-2]), (rest, rows[-1])
    ds["n_rows"] = q
    if "row_" in contrasts.coords:
        ds = ds.assign_coords(row_=contrasts["row_"].variable)
    ds.attrs = contrasts.attrs
    return add_statistics(ds)


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


def _lacks(contrasts: xr.Dataset, dim: Hashable) -> NDArray[np.bool_]:
    """Tell which runs (and which of several contrasts there) do not have the contrast, shape (R, ...)."""
    lacks: NDArray[np.bool_]
    if "estimable" in contrasts and dim in contrasts["estimable"].dims:
        lacks = ~contrasts["estimable"].transpose(dim, ...).to_numpy().astype(bool)
        return lacks
    dof = contrasts["dof"]
    voxel_dims = [other for other in dof.dims if other not in (dim, "contrast")]
    if voxel_dims and dof.chunks is not None:
        # A number for each run is read, but maps are not computed for the sake of a warning.
        return np.zeros(dof.sizes[dim], dtype=bool)
    lacks = ~dof.notnull().any(voxel_dims).transpose(dim, ...).to_numpy()
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
