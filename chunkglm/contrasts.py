"""Contrasts of a fit: no signal is needed, and nothing is fitted again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from chunkglm.blocks import map_rows, single_blas_thread, stack
from chunkglm.design import is_estimable
from chunkglm.errors import ChunkGLMWarning, ContrastError, InputError, NotAvailableError
from chunkglm.expressions import contrast_weights
from chunkglm.glm import designs_of
from chunkglm.kernels import distributions
from chunkglm.kernels.basis import Basis, make_basis
from chunkglm.kernels.glm import contrast_variance
from chunkglm.schema import FIT, FORMAT_VERSION, STATISTICS, annotate, canonical_json, require, text_labels

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
        From :func:`chunkglm.fit`, or saved and opened again; or some runs or voxels of it.
    definition : str, vector or mapping of names to them
        A linear expression over regressors such as ``"face - house"`` or ``"0.5*a + 0.5*b - c"`` (names that are
        no plain words in backticks), or weights in the order of the regressors; a vector that is too short is
        filled with zeros, with a warning. A mapping adds a dimension ``contrast``.
    stat_type : {None, "t"}
        F contrasts are not available yet.

    Returns
    -------
    Dataset
        ``effect``, ``variance``, ``stat``, ``p_value``, ``z_score`` with dims ``(run, z, y, x)`` and
        ``dof (run)``, float64. ``p_value`` is one-sided (right tail). A run that lacks a regressor of the
        contrast, or whose design cannot estimate it, is NaN, and named in a warning. ``weights (regressor)`` are
        those of the contrast.

    Raises
    ------
    InputError
        If ``fit`` is not a fit.
    ContrastError
        If the contrast is not a linear combination of regressors that at least one run can estimate.
    NotAvailableError
        For F contrasts.

    Notes
    -----
    The effect is ``c'b`` and its variance ``sigma2 c'(X'V^-1 X)^+ c`` with V at the voxel's own coefficient.
    """
    if stat_type == "F":
        raise NotAvailableError(
            "F contrasts are not available in this version; test the rows one by one as t contrasts."
        )
    if stat_type not in (None, "t"):
        raise InputError(f"There is no stat_type {stat_type!r}; accepted is 't'.")
    parts = _take_apart(fit)
    if not isinstance(definition, Mapping):
        return _contrast(parts, definition, None)
    if not definition:
        raise ContrastError(
            "There is no contrast in the mapping. Give at least one name with an expression or weights."
        )
    tests = []
    for name, one in definition.items():
        tests.append(_contrast(parts, one, str(name)))
    ds = xr.concat(
        [test.drop_attrs(deep=False) for test in tests],
        dim="contrast",
        data_vars="all",
        coords="minimal",
        compat="override",
        join="exact",
    )
    ds = ds.assign_coords(contrast=text_labels(definition))
    definitions = {str(name): _shown(one) for name, one in definition.items()}
    ds.attrs = {**tests[0].attrs, "definition": canonical_json(definitions).decode()}
    return annotate(ds, STATISTICS)


class _Design(NamedTuple):
    """The design of one run: its values, the names of its columns, their places in the fit, and its basis."""

    X: NDArray[np.float64]
    columns: list[str]
    places: list[int]
    basis: Basis


class _Parts(NamedTuple):
    """A fit, ready for contrasts."""

    fit: xr.Dataset
    regressors: list[str]
    designs: list[_Design]
    voxel_dims: tuple[Any, ...]
    dof: NDArray[np.float64]


def _take_apart(fit: xr.Dataset) -> _Parts:
    """Check a fit, and prepare what all contrasts share."""
    if "run" not in fit.dims:
        fit = fit.expand_dims("run")
    require(fit, FIT, ("dof", "design", "n_volumes"), "A contrast")
    for name in ("beta", "sigma2"):
        if name not in fit:
            require(fit, FIT, (name,), "A contrast")
    voxel_dims = tuple(dim for dim in fit["sigma2"].dims if dim != "run")
    for name, extra in (("beta", "regressor"), ("rho", "lag")):
        if name in fit and set(fit[name].dims) != {"run", extra, *voxel_dims}:
            raise InputError(
                f"A contrast needs {name!r} with the dims {('run', extra, *voxel_dims)}, those of 'sigma2' and its own, "
                f"but it has {fit[name].dims}."
            )
    # What is small is read at once, and before anything is built on it.
    small = [name for name in ("dof", "design", "column", "n_volumes") if name in fit]
    fit = fit.assign(fit[small].compute().data_vars)
    regressors = [str(name) for name in fit["regressor"].to_numpy()]
    designs = [_design_of(frame, regressors) for frame in designs_of(fit)]
    return _Parts(fit, regressors, designs, voxel_dims, fit["dof"].to_numpy().astype(np.float64))


def _design_of(frame: pd.DataFrame, regressors: list[str]) -> _Design:
    X = frame.to_numpy(dtype=np.float64)
    columns = [str(name) for name in frame.columns]
    with single_blas_thread():
        return _Design(X, columns, [regressors.index(name) for name in columns], make_basis(X))


def check_contrast(definition: Definition, designs: Sequence[pd.DataFrame], name: str) -> None:
    """Refuse a contrast that no run could estimate, before anything is fitted.

    Parameters
    ----------
    definition : str or vector
        As :func:`contrast` takes it.
    designs : sequence of DataFrame
        Design matrices of the runs.
    name : str
        Of the contrast, for messages.

    Raises
    ------
    ContrastError, NotAvailableError
    """
    regressors = list(dict.fromkeys(str(column) for design in designs for column in design.columns))
    parts = [_design_of(design, regressors) for design in designs]
    weights = _weights_by_name(definition, regressors, parts, name)
    _refuse_if_nowhere(weights, [_weights_of_run(weights, design) for design in parts], name)


def _refuse_if_nowhere(weights: dict[str, float], run_weights: list[Any], title: str) -> None:
    if all(w is None for w in run_weights):
        raise ContrastError(
            f"The contrast {title!r} cannot be estimated in any run: a regressor is missing or constant zero, or the "
            f"design cannot tell the regressors apart. The weights are {weights}."
        )


def _shown(definition: Definition) -> str | list[float]:
    if isinstance(definition, str):
        return definition
    weights: list[float] = np.asarray(definition, dtype=np.float64).ravel().tolist()
    return weights


def _contrast(parts: _Parts, definition: Definition, name: str | None) -> xr.Dataset:
    fit, designs = parts.fit, parts.designs
    weights = _weights_by_name(definition, parts.regressors, designs, name)
    title = name or (definition if isinstance(definition, str) else "the contrast")
    run_weights = [_weights_of_run(weights, design) for design in designs]
    labels = [str(label) for label in fit["run"].to_numpy()]
    lacking = [label for label, w in zip(labels, run_weights, strict=True) if w is None]
    _refuse_if_nowhere(weights, run_weights, title)
    if lacking:
        warnings.warn(
            f"The contrast {title!r} cannot be estimated in run {', '.join(lacking)}, where a regressor is missing or "
            "the design cannot tell regressors apart; it is NaN there, and left out of fixed effects.",
            ChunkGLMWarning,
            stacklevel=3,
        )
    estimates = [
        _estimate(fit.isel(run=number), parts.voxel_dims, design, w)
        for number, (design, w) in enumerate(zip(designs, run_weights, strict=True))
    ]
    dims = ("run", *parts.voxel_dims)
    ds = xr.Dataset(
        {key: (dims, stack([e[row] for e in estimates])) for row, key in enumerate(("effect", "variance"))}
    )
    ds = ds.assign_coords({key: value for key, value in fit.coords.items() if set(value.dims) <= set(dims)})
    ds["dof"] = ("run", np.where([w is None for w in run_weights], np.nan, parts.dof))
    ds["weights"] = ("regressor", np.array([weights.get(regressor, 0.0) for regressor in parts.regressors]))
    ds["weights"].attrs["long_name"] = "weights of the contrast"
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
    definition: Definition, regressors: list[str], designs: list[_Design], name: str | None
) -> dict[str, float]:
    """Find the non-zero weights of a contrast, by regressor."""
    weights = contrast_weights(definition, regressors, name=name)
    if not isinstance(definition, str):
        # Regressors behind the last weight need not agree.
        length = int(np.flatnonzero(weights)[-1]) + 1
        orders = {tuple(design.columns[:length]) for design in designs}
        if len(orders) > 1:
            first, second = (str(list(order)) for order in sorted(orders)[:2])
            raise ContrastError(
                f"The weights {_shown(definition)} are given by position, but the runs have other regressors there or "
                f"have them in another order: {first} and {second}. Give an expression over names instead, such as "
                "'face - house'."
            )
    return {regressor: float(w) for regressor, w in zip(regressors, weights, strict=True) if w != 0}


def _weights_of_run(weights: dict[str, float], design: _Design) -> NDArray[np.float64] | None:
    """Weights in the order of a run's columns, or None if the run cannot estimate the contrast."""
    if not set(weights) <= set(design.columns):
        return None
    vector = np.array([weights.get(column, 0.0) for column in design.columns])
    return vector if is_estimable(design.X, vector) else None


def _estimate(
    one: xr.Dataset, voxel_dims: tuple[Any, ...], design: _Design, weights: NDArray[np.float64] | None
) -> Any:
    """Effect and variance in one run, as an array (2, ...)."""
    chosen = (
        [] if weights is None else [(p, float(w)) for p, w in zip(design.places, weights, strict=True) if w]
    )
    arrays = [
        one["beta"].transpose("regressor", *voxel_dims).data,
        one["sigma2"].transpose(*voxel_dims).data[None],
    ]
    if "rho" in one:
        arrays.append(one["rho"].transpose("lag", *voxel_dims).data)
    kernel = partial(_effect_and_variance, basis=design.basis, weights=weights, chosen=chosen)
    return map_rows(kernel, *arrays, n_rows=2)


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
        # Only the regressors with a weight: those that the run lacks are NaN, and NaN times 0 is NaN.
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
    effect, variance, dof = (ds[name].variable for name in ("effect", "variance", "dof"))
    options: dict[str, Any] = {"dask": "parallelized", "output_dtypes": [np.float64], "keep_attrs": False}
    stat = xr.apply_ufunc(_t_by_reference if by_reference else _t, effect, variance, **options)
    z_of = distributions.t_z_score_clipped if by_reference else distributions.t_z_score
    ds = ds.assign(
        stat=stat,
        p_value=xr.apply_ufunc(distributions.t_p_value, stat, dof, **options),
        z_score=xr.apply_ufunc(z_of, stat, dof, **options),
    )
    return annotate(ds, STATISTICS)


@np.errstate(divide="ignore", invalid="ignore")
def _t(effect: NDArray[np.float64], variance: NDArray[np.float64]) -> NDArray[np.float64]:
    return effect / np.sqrt(np.where(variance > 0, variance, np.nan))


@np.errstate(invalid="ignore")
def _t_by_reference(effect: NDArray[np.float64], variance: NDArray[np.float64]) -> NDArray[np.float64]:
    return effect / np.sqrt(np.maximum(variance, LEAST_VARIANCE))
