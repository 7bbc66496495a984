"""Contrasts of a fit: no signal is needed, and nothing is fitted again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import xarray as xr

from chunkglm.blocks import map_rows, single_blas_thread, stack
from chunkglm.design import is_estimable
from chunkglm.errors import ChunkGLMWarning, ContrastError, InputError
from chunkglm.expressions import Rows, contrast_rows
from chunkglm.glm import designs_of, kept_of, with_runs
from chunkglm.kernels import distributions
from chunkglm.kernels.autocorrelation import Correction, make_correction
from chunkglm.kernels.basis import Basis, make_basis
from chunkglm.kernels.combine import f_statistic
from chunkglm.kernels.glm import contrast_covariances, effective_dofs, whitener
from chunkglm.kernels.uncertainty import Frequencies, make_frequencies
from chunkglm.schema import FIT, FORMAT_VERSION, STATISTICS, annotate, canonical_json, require, text_labels
from chunkglm.trees import map_nodes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from chunkglm.expressions import Definition

KEPT_ATTRIBUTES = ("noise_model", "noise_model_chosen", "signal_scaling", "compat")
"""What contrasts say of the fit that they are made from."""

LEAST_VARIANCE = 1e-50
"""Variances below this count as this in the reference's statistic (nilearn 0.14.1)."""


@overload
def contrast(
    fit: xr.Dataset, definition: Definition | Mapping[str, Definition], *, stat_type: str | None = ...
) -> xr.Dataset: ...
@overload
def contrast(
    fit: xr.DataTree, definition: Definition | Mapping[str, Definition], *, stat_type: str | None = ...
) -> xr.DataTree: ...
def contrast(
    fit: xr.Dataset | xr.DataTree,
    definition: Definition | Mapping[str, Definition],
    *,
    stat_type: str | None = None,
) -> xr.Dataset | xr.DataTree:
    """Test linear combinations of the regressors in every run, lazily.

    Parameters
    ----------
    fit : Dataset or DataTree
        From :func:`chunkglm.fit`, or saved and opened again; or some runs or voxels of it. Or a tree of fits.
    definition : str, vector, matrix, sequence of str, or mapping of names to any of these
        For a t contrast a linear expression over regressors such as ``"face - house"`` or ``"0.5*a + 0.5*b - c"`` (names
        that are no plain words in backticks), or weights in the order of the regressors; a vector that is too
        short is filled with zeros, with a warning. For an F contrast several rows of them: a matrix of weights, a
        list of expressions, or, as the value of a name, a mapping of names of rows to expressions or weights. Rows
        that follow from others are left out, with a warning. A mapping adds a dimension ``contrast``.
    stat_type : {None, "t", "F"}
        By default, one row is a t contrast and several are an F contrast. One call is all t or all F: ``"F"`` makes
        F contrasts of single rows too.

    Returns
    -------
    Dataset or DataTree
        For a tree, a tree of what follows. ``effect``, ``variance``, ``stat``, ``p_value``, ``z_score`` with dims
        ``(run, z, y, x)`` and ``dof (run)``, float64; where coefficients of the noise are estimated, ``dof (run, z, y, x)``.
        Of F contrasts, ``effect (run, row, ...)`` and ``covariance (run, row, row_, ...)`` in place of ``variance``, and
        ``n_rows``; contrasts of fewer rows are filled up with NaN. ``p_value`` is one-sided (right tail). A run that lacks a
        regressor of the contrast, or whose design cannot estimate it, is NaN, and named in a warning.
        ``weights (regressor)`` or ``(row, regressor)`` are those of the contrast.

    Raises
    ------
    InputError
        If ``fit`` is not a fit, or t and F contrasts are asked for together.
    ContrastError
        If the contrast is not a linear combination of regressors that at least one run can estimate.

    Notes
    -----
    The effect is ``c'b`` and its variance ``sigma2 c'(X'V^-1 X)^+ c`` with V at the voxel's own coefficients;
    ``t = c'b / sqrt(variance)``. With the rows of a matrix C, ``F = (Cb)' (sigma2 C(X'V^-1 X)^+C')^-1 (Cb) / q`` on q and dof
    degrees of freedom (Seber and Lee 2003, Linear Regression Analysis, chapters 3 and 4). Degrees of freedom are those
    of the residuals, reduced for the uncertainty of the coefficients (see
    :func:`chunkglm.kernels.glm.effective_dof`). Under ``compat="nilearn"`` they are not, and the effect of an F contrast
    is that of the reference, whitened by the symmetric root of its precision.
    """
    if stat_type not in (None, "t", "F"):
        raise InputError(f"There is no stat_type {stat_type!r}; accepted are 't' and 'F'.")
    if isinstance(fit, xr.DataTree):
        return map_nodes(lambda one: contrast(one, definition, stat_type=stat_type), fit)
    parts = _take_apart(fit)
    if not isinstance(definition, Mapping):
        (ds,) = _contrasts(parts, [_test(definition, parts, None, stat_type)])
        return ds
    if not definition:
        raise ContrastError(
            "There is no contrast in the mapping. Give at least one name with an expression or weights."
        )
    tests = []
    for name, one in definition.items():
        tests.append(_test(one, parts, str(name), stat_type))  # no comprehension: warnings count frames
    kinds = {test.stat_type for test in tests}
    if len(kinds) > 1:
        several = [test.name for test in tests if test.stat_type == "F"]
        raise InputError(
            f"{', '.join(map(repr, several))} has several rows and other contrasts have one. Ask for t and F contrasts in "
            "calls of their own, or say stat_type='F' for all of them."
        )
    tested = _contrasts(parts, tests)
    n_rows = max(len(test.rows.names) for test in tests)
    ds = xr.concat(
        [filled_up(one, n_rows).drop_attrs(deep=False) for one in tested],
        dim="contrast",
        data_vars="all",
        coords="different",
        compat="equals",
        join="exact",
    )
    ds = ds.assign_coords(contrast=text_labels(definition))
    ds.attrs = _attributes(parts, tests)
    return annotate(ds, STATISTICS)


class _Test(NamedTuple):
    """A contrast as it was asked for, and as weights over the regressors of the fit."""

    name: str | None
    definition: Definition
    rows: Rows
    stat_type: str

    @property
    def title(self) -> str:
        """What to call it in messages."""
        return self.name or (self.definition if isinstance(self.definition, str) else "the contrast")


class _Design(NamedTuple):
    """The design of one run over its kept volumes: its values, the names of its columns and their places in the fit.

    For contrasts of a fit also its basis, and the uncertainty of autoregressive coefficients.
    """

    X: NDArray[np.float64]
    columns: list[str]
    places: list[int]
    basis: Basis | None = None
    uncertainty: Correction | Frequencies | None = None


class _Parts(NamedTuple):
    """A fit, ready for contrasts."""

    fit: xr.Dataset
    regressors: list[str]
    designs: list[_Design]
    voxel_dims: tuple[Any, ...]
    dof: NDArray[np.float64]

    @property
    def by_reference(self) -> bool:
        """Whether the rules are the reference's."""
        return self.fit.attrs.get("compat") == "nilearn"


def _take_apart(fit: xr.Dataset) -> _Parts:
    """Check a fit, and prepare what all contrasts share."""
    fit = with_runs(fit)
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
    small = [name for name in ("dof", "design", "column", "n_volumes", "sample_mask", "order") if name in fit]
    fit = fit.assign(fit[small].compute().data_vars)
    regressors = [str(name) for name in fit["regressor"].to_numpy()]
    n_lags = fit.sizes["lag"] if "rho" in fit else 0
    orders = fit["order"].to_numpy() if "order" in fit else np.full(fit.sizes["run"], n_lags)
    by_reference = fit.attrs.get("compat") == "nilearn"
    designs = [
        _design_of(frame, kept, regressors, order=int(order), by_reference=by_reference)
        for frame, kept, order in zip(designs_of(fit), kept_of(fit), orders, strict=True)
    ]
    return _Parts(fit, regressors, designs, voxel_dims, fit["dof"].to_numpy().astype(np.float64))


def _design_of(
    frame: pd.DataFrame, kept: NDArray[np.bool_], regressors: list[str], *, order: int, by_reference: bool
) -> _Design:
    X = np.ascontiguousarray(frame.to_numpy(dtype=np.float64))
    # The reference drops censored volumes, and filters across the gaps.
    used, left = (X[kept], kept[kept]) if by_reference else (X, kept)
    basis, uncertainty = _decomposed(used.tobytes(), used.shape, left.tobytes(), order, by_reference)
    return _columns_of(frame, kept, regressors)._replace(basis=basis, uncertainty=uncertainty)


@lru_cache(maxsize=64)
def _decomposed(
    content: bytes, shape: tuple[int, int], kept: bytes, order: int, by_reference: bool
) -> tuple[Basis, Correction | Frequencies | None]:
    """Basis of a design, and uncertainty of the noise under it.

    They take a tenth of a second for a long run, and are the same for its next contrast.
    """
    X, left = np.frombuffer(content).reshape(shape), np.frombuffer(kept, dtype=bool)
    with single_blas_thread():
        basis = make_basis(X, left, order=order)
        if order == 0 or by_reference:
            return basis, None
        return basis, make_correction(basis) if order == 1 else make_frequencies(basis)


def _columns_of(frame: pd.DataFrame, kept: NDArray[np.bool_], regressors: list[str]) -> _Design:
    columns = [str(name) for name in frame.columns]
    places = [regressors.index(name) for name in columns]
    return _Design(frame.to_numpy(dtype=np.float64)[kept], columns, places)


def check_contrast(
    definition: Definition, designs: Sequence[pd.DataFrame], kept: Sequence[NDArray[np.bool_]], name: str
) -> None:
    """Refuse a contrast that no run could estimate, before anything is fitted.

    Parameters
    ----------
    definition : str, vector, or rows of them
        As :func:`contrast` takes it.
    designs : sequence of DataFrame
        Design matrices of the runs.
    kept : sequence of ndarray of bool
        Volumes of each run that are not censored.
    name : str
        Of the contrast, for messages.

    Raises
    ------
    ContrastError
    """
    regressors = list(dict.fromkeys(str(column) for design in designs for column in design.columns))
    parts = [_columns_of(design, one, regressors) for design, one in zip(designs, kept, strict=True)]
    with warnings.catch_warnings():
        # The contrast itself will say what is filled up or left out.
        warnings.simplefilter("ignore", ChunkGLMWarning)
        rows = contrast_rows(definition, regressors, name=name)
    _refuse_other_places(definition, rows, parts)
    _refuse_if_nowhere(rows, regressors, [_weights_of_run(rows, regressors, one) for one in parts], name)


def _refuse_if_nowhere(rows: Rows, regressors: list[str], run_weights: list[Any], title: str) -> None:
    if all(w is None for w in run_weights):
        weights = [
            {name: float(w) for name, w in zip(regressors, row, strict=True) if w} for row in rows.weights
        ]
        raise ContrastError(
            f"The contrast {title!r} cannot be estimated in any run: a regressor is missing or constant zero, or the "
            f"design cannot tell the regressors apart. The weights are {', '.join(map(str, weights))}."
        )


def _refuse_other_places(definition: Definition, rows: Rows, designs: list[_Design]) -> None:
    """Refuse weights that are given by position where positions differ between runs."""
    if not _by_position(definition):
        return
    # Regressors behind the last weight need not agree.
    length = int(np.flatnonzero(rows.weights.any(axis=0))[-1]) + 1
    orders = {tuple(design.columns[:length]) for design in designs}
    if len(orders) > 1:
        first, second = (str(list(order)) for order in sorted(orders)[:2])
        raise ContrastError(
            f"The weights {_shown(definition)} are given by position, but the runs have other regressors there or "
            f"have them in another order: {first} and {second}. Give an expression over names instead, such as "
            "'face - house'."
        )


def _by_position(definition: Definition) -> bool:
    if isinstance(definition, Mapping):
        return any(_by_position(one) for one in definition.values())
    return not isinstance(definition, str) and not any(isinstance(one, str) for one in definition)


def _shown(definition: Definition) -> Any:
    """A definition as JSON holds it."""
    if isinstance(definition, str):
        return definition
    if isinstance(definition, Mapping):
        return {str(name): _shown(one) for name, one in definition.items()}
    if any(isinstance(one, str) for one in definition):
        return [str(one) for one in definition]
    weights: list[Any] = np.asarray(definition, dtype=np.float64).tolist()
    # One row in brackets of its own is that row.
    return weights[0] if len(weights) == 1 and isinstance(weights[0], list) else weights


def _test(definition: Definition, parts: _Parts, name: str | None, stat_type: str | None) -> _Test:
    rows = contrast_rows(definition, parts.regressors, name=name)
    _refuse_other_places(definition, rows, parts.designs)
    # Several rows remain an F contrast, even if all but one follow from that one.
    several = len(rows.names) > 1 or (not isinstance(definition, str) and _n_given(definition) > 1)
    if several and stat_type == "t":
        title = "The contrast" if name is None else f"The contrast {name!r}"
        raise InputError(
            f"{title} has several rows, which only an F contrast tests together. Leave stat_type out."
        )
    return _Test(name, definition, rows, "F" if several or stat_type == "F" else "t")


def _n_given(definition: Any) -> int:
    if isinstance(definition, Mapping) or any(isinstance(one, str) for one in definition):
        return len(definition)
    return len(np.atleast_2d(np.asarray(definition, dtype=np.float64)))


def _attributes(parts: _Parts, tests: list[_Test]) -> dict[str, Any]:
    attrs = parts.fit.attrs
    return {
        "kind": "contrast",
        "format_version": FORMAT_VERSION,
        "stat_type": tests[0].stat_type,
        "definition": canonical_json({test.name or "": _shown(test.definition) for test in tests}).decode(),
        **{key: attrs[key] for key in KEPT_ATTRIBUTES if key in attrs},
    }


def _contrasts(parts: _Parts, tests: list[_Test]) -> list[xr.Dataset]:
    """Contrasts of a fit, which share what is read and solved for them."""
    weights_of = []
    for test in tests:
        weights_of.append(_weights_of_runs(parts, test))  # noqa: PERF401  (warnings count frames)
    fit = parts.fit
    run_rows = [
        _estimates(fit.isel(run=number), parts, tests, [weights[number] for weights in weights_of], number)
        for number in range(len(parts.designs))
    ]
    out, place = [], 0
    for test, weights in zip(tests, weights_of, strict=True):
        n_rows = _n_estimates(test)
        out.append(_label(parts, test, weights, [rows[place : place + n_rows] for rows in run_rows]))
        place += n_rows
    return out


def _weights_of_runs(parts: _Parts, test: _Test) -> list[NDArray[np.float64] | None]:
    """Weights of a contrast in every run; None, with a warning, where it cannot be estimated."""
    run_weights = [_weights_of_run(test.rows, parts.regressors, design) for design in parts.designs]
    _refuse_if_nowhere(test.rows, parts.regressors, run_weights, test.title)
    labels = [str(label) for label in parts.fit["run"].to_numpy()]
    lacking = [label for label, w in zip(labels, run_weights, strict=True) if w is None]
    if lacking:
        warnings.warn(
            f"The contrast {test.title!r} cannot be estimated in run {', '.join(lacking)}, where a regressor is missing or "
            "the design cannot tell regressors apart; it is NaN there, and left out of fixed effects.",
            ChunkGLMWarning,
            stacklevel=4,
        )
    return run_weights


def _label(
    parts: _Parts, test: _Test, run_weights: list[NDArray[np.float64] | None], estimates: list[Any]
) -> xr.Dataset:
    """Put labels on the estimates of a contrast, rows (effects, covariances, degrees of freedom) of each run."""
    fit, rows = parts.fit, test.rows
    q = len(rows.names)
    dims = ("run", *parts.voxel_dims)
    if test.stat_type == "t":
        ds = xr.Dataset(
            {
                key: (dims, stack([e[row] for e in estimates]))
                for row, key in enumerate(("effect", "variance"))
            }
        )
        ds["weights"] = ("regressor", rows.weights[0])
    else:
        covariances = [stack([e[q + i * q : q + (i + 1) * q] for i in range(q)]) for e in estimates]
        ds = xr.Dataset(
            {
                "effect": (("run", "row", *parts.voxel_dims), stack([e[:q] for e in estimates])),
                "covariance": (("run", "row", "row_", *parts.voxel_dims), stack(covariances)),
                "n_rows": q,
                "weights": (("row", "regressor"), rows.weights),
            }
        )
        numbers = np.arange(1, q + 1)
        ds = ds.assign_coords(row=numbers, row_=numbers, row_name=("row", text_labels(rows.names)))
    ds = ds.assign_coords({key: value for key, value in fit.coords.items() if set(value.dims) <= set(dims)})
    if any(design.uncertainty is not None for design in parts.designs):
        ds["dof"] = (dims, stack([e[-1] for e in estimates]))
    else:
        ds["dof"] = ("run", np.where([w is None for w in run_weights], np.nan, parts.dof))
    ds["estimable"] = ("run", np.array([w is not None for w in run_weights]))
    ds["weights"].attrs["long_name"] = "weights of the contrast"
    ds = ds.assign_coords(regressor=fit["regressor"].variable)
    ds.attrs = _attributes(parts, [test])
    return add_statistics(ds)


def filled_up(ds: xr.Dataset, n_rows: int) -> xr.Dataset:
    """Give an F contrast as many rows as the longest of several has, of NaN."""
    if ds.sizes.get("row", n_rows) == n_rows:
        return ds
    numbers = np.arange(1, n_rows + 1)
    return ds.reindex(row=numbers, row_=numbers, fill_value={"row_name": ""})


def _weights_of_run(rows: Rows, regressors: list[str], design: _Design) -> NDArray[np.float64] | None:
    """Weights (q, P) in the order of a run's columns, or None if the run cannot estimate every row."""
    needed = {regressors[place] for place in np.flatnonzero(rows.weights.any(axis=0))}
    if not needed <= set(design.columns):
        return None
    weights = rows.weights[:, design.places]
    return weights if all(is_estimable(design.X, row) for row in weights) else None


def _n_estimates(test: _Test) -> int:
    """Rows that a contrast of q rows has: effects, covariances, degrees of freedom."""
    q = len(test.rows.names)
    return q + q * q + 1


def _estimates(
    one: xr.Dataset,
    parts: _Parts,
    tests: list[_Test],
    weights: list[NDArray[np.float64] | None],
    number: int,
) -> Any:
    """Estimates of all contrasts in one run, contrast after contrast, as an array (rows, ...)."""
    arrays = [
        one["beta"].transpose("regressor", *parts.voxel_dims).data,
        one["sigma2"].transpose(*parts.voxel_dims).data[None],
    ]
    if "rho" in one:
        arrays.append(one["rho"].transpose("lag", *parts.voxel_dims).data)
    sizes = [_n_estimates(test) for test in tests]
    kernel = partial(
        _estimate_voxels,
        design=parts.designs[number],
        weights=weights,
        sizes=sizes,
        whiten=[parts.by_reference and test.stat_type == "F" for test in tests],
        dof=float(parts.dof[number]),
    )
    return map_rows(kernel, *arrays, n_rows=sum(sizes))


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def _estimate_voxels(
    beta: NDArray[np.float64],
    sigma2: NDArray[np.float64],
    *rho: NDArray[np.float64],
    design: _Design,
    weights: list[NDArray[np.float64] | None],
    sizes: list[int],
    whiten: list[bool],
    dof: float,
) -> NDArray[np.float64]:
    """Effects, covariances and degrees of freedom of each contrast, one behind the other."""
    space = sigma2.shape[1:]
    out = np.full((sum(sizes), *space), np.nan)
    basis = design.basis
    # sigma2 is NaN where the residual says nothing, and then neither does anything else.
    alive = np.flatnonzero(~np.isnan(sigma2[0]))
    given = [one for one in weights if one is not None]
    if basis is None or not given or not alive.size:
        return out
    used = rho[0].reshape(len(rho[0]), -1)[: basis.order, alive] if rho else np.empty((0, alive.size))
    variance = sigma2.reshape(-1)[alive]
    # Only the regressors with a weight: those that the run lacks are NaN, and NaN times 0 is NaN.
    chosen = np.flatnonzero(np.concatenate(given).any(axis=0))
    coefficients = {c: beta[design.places[c]].reshape(-1)[alive] for c in chosen}
    covariances = iter(contrast_covariances(basis, given, used))
    dofs = iter(
        [np.full(alive.size, dof)] * len(given)
        if design.uncertainty is None
        else effective_dofs(basis, given, used, design.uncertainty, dof)
    )
    rows = out.reshape(len(out), -1)
    place = 0
    for one, size, white in zip(weights, sizes, whiten, strict=True):
        if one is not None:
            rows[place : place + size, alive] = _estimate(
                one, coefficients, next(covariances), variance, white
            )
            rows[place + size - 1, alive] = next(dofs)
        place += size
    return out


def _estimate(
    weights: NDArray[np.float64],
    coefficients: Mapping[Any, NDArray[np.float64]],
    covariance: NDArray[np.float64],
    variance: NDArray[np.float64],
    whiten: bool,
) -> NDArray[np.float64]:
    """Effects and covariances (q + q q + 1, V) of one contrast; the last row is left for the degrees of freedom."""
    q, V = len(weights), len(variance)
    out = np.empty((q + q * q + 1, V))
    for row in range(q):
        out[row] = sum(weights[row, c] * coefficients[c] for c in np.flatnonzero(weights[row]))
    if whiten:
        out[:q] = np.einsum("ij...,j...->i...", whitener(covariance), out[:q])
        covariance = np.eye(q)
    if covariance.ndim == 2:  # the same for all voxels
        covariance = covariance[..., None]
    out[q:-1] = (covariance * variance).reshape(q * q, V)
    return out


def add_statistics(ds: xr.Dataset) -> xr.Dataset:
    """Add ``stat``, ``p_value`` and ``z_score`` to effects with their variances and degrees of freedom.

    Parameters
    ----------
    ds : Dataset
        With ``effect``, ``variance`` and ``dof``, or with ``effect (row, ...)``, ``covariance (row, row_, ...)``, ``n_rows``
        and ``dof``; the attribute ``compat`` says by whose rules.

    Returns
    -------
    Dataset
    """
    by_reference = ds.attrs.get("compat") == "nilearn"
    options: dict[str, Any] = {"dask": "parallelized", "output_dtypes": [np.float64], "keep_attrs": False}
    of: tuple[xr.Variable, ...]
    p_of: Any
    z_of: Any
    z_by_reference: Any
    if "covariance" in ds:
        stat, of = _f_of(ds), (ds["n_rows"].variable, ds["dof"].variable)
        p_of, z_of = distributions.f_p_value, distributions.f_z_score
        z_by_reference = distributions.f_z_score_clipped
    else:
        effect, variance = ds["effect"].variable, ds["variance"].variable
        stat = xr.apply_ufunc(_t_by_reference if by_reference else _t, effect, variance, **options)
        of = (ds["dof"].variable,)
        p_of, z_of = distributions.t_p_value, distributions.t_z_score
        z_by_reference = distributions.t_z_score_clipped
    ds = ds.assign(
        stat=stat,
        p_value=xr.apply_ufunc(p_of, stat, *of, **options),
        z_score=xr.apply_ufunc(z_by_reference if by_reference else z_of, stat, *of, **options),
    )
    annotate(ds, STATISTICS)["stat"].attrs["long_name"] = f"{'F' if 'covariance' in ds else 't'} statistic"
    return ds


def _f_of(ds: xr.Dataset) -> xr.Variable:
    """F statistics of effects and covariances that all have the same number of rows."""
    rest = [dim for dim in ds["effect"].dims if dim != "row"]
    effect = ds["effect"].transpose("row", *rest)
    covariance = ds["covariance"].transpose("row", "row_", *rest)
    flat = covariance.data.reshape(len(effect) ** 2, *covariance.shape[2:])
    return xr.Variable(rest, map_rows(f_statistic, effect.data, flat, n_rows=1)[0])


@np.errstate(divide="ignore", invalid="ignore")
def _t(effect: NDArray[np.float64], variance: NDArray[np.float64]) -> NDArray[np.float64]:
    return effect / np.sqrt(np.where(variance > 0, variance, np.nan))


@np.errstate(invalid="ignore")
def _t_by_reference(effect: NDArray[np.float64], variance: NDArray[np.float64]) -> NDArray[np.float64]:
    return effect / np.sqrt(np.maximum(variance, LEAST_VARIANCE))
