"""Contrasts of a fit: no signal is needed, and nothing is fitted again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from chunkglm.blocks import map_rows, stack
from chunkglm.design import contrast_weights, is_estimable
from chunkglm.errors import ChunkGLMWarning, ContrastError, InputError, NotAvailableError
from chunkglm.glm import design_of_run
from chunkglm.kernels import distributions
from chunkglm.kernels.glm import Basis, contrast_variance, make_basis
from chunkglm.schema import FIT, FORMAT_VERSION, SPACE, STATISTICS, annotate, canonical_json, require, text_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

    Definition = str | Sequence[float] | NDArray[Any]

LEAST_VARIANCE = 1e-50
"""Variances below this count as this in the reference's statistic (nilearn 0.14.1)."""


def contrast(
    fit: xr.Dataset, definition: Definition | Mapping[str, Definition], *, stat_type: str | None = None
) -> xr.Dataset:
    """Test a linear combination of the regressors in every run, lazily.

    Parameters
    ----------
    fit : Dataset
        From :func:`chunkglm.fit`, or saved and opened again.
    definition : str, vector or mapping of names to them
        A linear expression over regressors such as ``"face - house"`` or ``"0.5*a + 0.5*b - c"`` (names that are no plain
        words in backticks), or weights in the order of the regressors; a vector that is too short is filled with zeros, with
        a warning. A mapping adds a dimension ``contrast``.
    stat_type : {None, "t"}
        F contrasts are not available yet.

    Returns
    -------
    Dataset
        ``effect``, ``variance``, ``stat``, ``p_value``, ``z_score`` with dims ``(run, z, y, x)`` and ``dof (run)``, float64.
        ``p_value`` is one-sided (right tail). A run that lacks a regressor of the contrast, or whose design cannot
        estimate it, is NaN, and named in a warning. ``weights (regressor)`` are those of the contrast.

    Raises
    ------
    ContrastError
        If the contrast is not a linear combination of regressors that at least one run can estimate.
    NotAvailableError
        For F contrasts.

    Notes
    -----
    The effect is ``c'b`` and its variance ``sigma2 c'(X'V^-1 X)^+ c`` with V at the voxel's own coefficient.
    """
    require(fit, FIT, ("beta", "sigma2", "dof", "design", "n_volumes"), "A contrast")
    if stat_type == "F":
        raise NotAvailableError("F contrasts are not available in this version; test the rows one by one as t contrasts.")
    if stat_type not in (None, "t"):
        raise InputError(f"There is no stat_type {stat_type!r}; accepted is 't'.")
    designs = [design_of_run(fit, number) for number in range(fit.sizes["run"])]
    if not isinstance(definition, Mapping):
        return _contrast(fit, designs, definition, None)
    if not definition:
        raise ContrastError("There is no contrast in the mapping. Give at least one name with an expression or weights.")
    parts = [_contrast(fit, designs, one, str(name)) for name, one in definition.items()]
    attrs = parts[0].attrs
    labels = xr.Variable("contrast", text_labels(definition))
    ds = xr.concat([part.drop_attrs(deep=False) for part in parts], dim="contrast", join="exact", coords="minimal",
                   compat="override", data_vars="all")
    ds = ds.assign_coords(contrast=labels)
    definitions = {str(name): _shown(one) for name, one in definition.items()}
    ds.attrs = {**attrs, "definition": canonical_json(definitions).decode()}
    return annotate(ds, STATISTICS)


def _shown(definition: Definition) -> str | list[float]:
    return definition if isinstance(definition, str) else np.asarray(definition, dtype=np.float64).ravel().tolist()


def _contrast(fit: xr.Dataset, designs: list[pd.DataFrame], definition: Definition, name: str | None) -> xr.Dataset:
    weights = _weights_by_name(definition, designs, [str(r) for r in fit["regressor"].values], name)
    title = name or (definition if isinstance(definition, str) else "the contrast")
    run_weights = [_weights_of_run(weights, design) for design in designs]
    lacking = [str(label) for label, w in zip(fit["run"].values, run_weights, strict=True) if w is None]
    if len(lacking) == len(designs):
        raise ContrastError(
            f"The contrast {title!r} cannot be estimated in any run: a regressor is missing or constant zero, or the design "
            f"cannot tell the regressors apart. The weights are {weights}."
        )
    if lacking:
        warnings.warn(
            f"The contrast {title!r} cannot be estimated in run {', '.join(lacking)}, where a regressor is missing or the design "
            "cannot tell regressors apart; it is NaN there, and left out of fixed effects.",
            ChunkGLMWarning,
            stacklevel=4,
        )
    estimates = [
        _estimate(fit.isel(run=number), make_basis(design.to_numpy(dtype=np.float64)), w)
        for number, (design, w) in enumerate(zip(designs, run_weights, strict=True))
    ]
    dof = np.where([w is None for w in run_weights], np.nan, fit["dof"].values)
    dims = ("run", *SPACE)
    ds = xr.Dataset({key: (dims, stack([e[row] for e in estimates])) for row, key in enumerate(("effect", "variance"))})
    ds = ds.assign_coords({key: value for key, value in fit.coords.items() if set(value.dims) <= {"run", *SPACE}})
    ds["dof"] = ("run", dof)
    ds["weights"] = ("regressor", np.array([weights.get(str(r), 0.0) for r in fit["regressor"].values]))
    ds = ds.assign_coords(regressor=fit["regressor"].variable)
    ds.attrs = {
        "kind": "contrast",
        "format_version": FORMAT_VERSION,
        "stat_type": "t",
        "definition": canonical_json({name or "": _shown(definition)}).decode(),
        **{key: fit.attrs[key] for key in ("noise_model", "signal_scaling", "compat") if key in fit.attrs},
    }
    return add_statistics(ds)


def _weights_by_name(
    definition: Definition, designs: list[pd.DataFrame], regressors: list[str], name: str | None
) -> dict[str, float]:
    """The non-zero weights of a contrast, by regressor."""
    if not isinstance(definition, str):
        length = np.asarray(definition).shape[-1] if np.ndim(definition) else 0
        orders = {tuple(design.columns[:length]) for design in designs}
        if len(orders) > 1:
            raise ContrastError(
                f"The weights {_shown(definition)} are given by position, but the runs have their regressors in different orders "
                f"(the first are {' and '.join(str(list(order)) for order in sorted(orders)[:2])}). Give an expression over "
                "names instead, such as 'face - house'."
            )
    weights = contrast_weights(definition, regressors, name=name)
    return {regressor: float(w) for regressor, w in zip(regressors, weights, strict=True) if w != 0}


def _weights_of_run(weights: dict[str, float], design: pd.DataFrame) -> NDArray[np.float64] | None:
    """Weights in the order of a run's regressors, or None if the run cannot estimate the contrast."""
    if not set(weights) <= set(design.columns):
        return None
    vector = np.array([weights.get(column, 0.0) for column in design.columns])
    return vector if is_estimable(design.to_numpy(dtype=np.float64), vector) else None


def _estimate(one: xr.Dataset, basis: Basis, weights: NDArray[np.float64] | None) -> Any:
    """Effect and variance in one run, as an array (2, z, y, x)."""
    present = np.flatnonzero(one["design"].notnull().any("volume").values)
    chosen = [] if weights is None else [(int(p), float(w)) for p, w in zip(present, weights, strict=True) if w != 0]
    arrays = [one["beta"].transpose("regressor", *SPACE).data, one["sigma2"].transpose(*SPACE).data[None]]
    if "rho" in one:
        arrays.append(one["rho"].transpose("lag", *SPACE).data)
    return map_rows(partial(_effect_and_variance, basis=basis, weights=weights, chosen=chosen), *arrays, n_rows=2)


def _effect_and_variance(
    beta: NDArray[np.float64],
    sigma2: NDArray[np.float64],
    *rho: NDArray[np.float64],
    basis: Basis,
    weights: NDArray[np.float64] | None,
    chosen: list[tuple[int, float]],
) -> NDArray[np.float64]:
    out = np.full((2, *sigma2.shape[1:]), np.nan)
    if weights is not None:
        # Only the regressors with a weight, because those that the run lacks are NaN and must not be multiplied by 0.
        out[0] = sum(weight * beta[place] for place, weight in chosen)
        out[1] = sigma2[0] * contrast_variance(basis, weights, rho[0][0] if rho else np.zeros(1))
        # sigma2 is NaN where the residual says nothing, and then neither does the effect.
        out[0, np.isnan(out[1])] = np.nan
    return out


def add_statistics(ds: xr.Dataset) -> xr.Dataset:
    """Add ``stat``, ``p_value`` and ``z_score`` to effects with their variances and degrees of freedom.

    Parameters
    ----------
    ds : Dataset
        With ``effect``, ``variance`` and ``dof``; the attribute ``compat`` says by whose rules.

    Returns
    -------
    Dataset
    """
    by_reference = ds.attrs.get("compat") == "nilearn"
    effect, variance, dof = ds["effect"], ds["variance"], ds["dof"].astype(np.float64)
    options: dict[str, Any] = {"dask": "parallelized", "output_dtypes": [np.float64], "join": "exact"}
    stat = xr.apply_ufunc(_t_by_reference if by_reference else _t, effect, variance, **options)
    z_of = distributions.t_z_score_clipped if by_reference else distributions.t_z_score
    ds = ds.assign(
        stat=stat,
        p_value=xr.apply_ufunc(distributions.t_p_value, stat, dof, **options),
        z_score=xr.apply_ufunc(z_of, stat, dof, **options),
    )
    return annotate(ds, STATISTICS)


def _t(effect: NDArray[np.float64], variance: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return effect / np.sqrt(np.where(variance > 0, variance, np.nan))


def _t_by_reference(effect: NDArray[np.float64], variance: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return effect / np.sqrt(np.maximum(variance, LEAST_VARIANCE))
