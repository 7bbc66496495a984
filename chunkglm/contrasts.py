"""Contrasts of a fit: no signal is needed, and nothing is fitted again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import xarray as xr

from chunkglm import plan
from chunkglm.blocks import as_row, map_rows, set_task_bytes, single_blas_thread, take
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
    from collections.abc import Callable, Hashable, Sequence

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
        return _contrasts(parts, [_test(definition, parts, None, stat_type)])
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
    return _contrasts(parts, tests)


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


def _contrasts(parts: _Parts, tests: list[_Test]) -> xr.Dataset:
    """Contrasts of a fit, which share what is read and solved for them; with a dim ``contrast`` where they have names."""
    weights_of = []
    for test in tests:
        weights_of.append(_weights_of_runs(parts, test))  # noqa: PERF401  (warnings count frames)
    named = [str(test.name) for test in tests if test.name is not None]
    lead = ("contrast",) if named else ()
    is_f = tests[0].stat_type == "F"
    q = max(len(test.rows.names) for test in tests)
    n_each = q + q * q + 1
    uncertain = any(design.uncertainty is not None for design in parts.designs)
    fit = parts.fit
    kernels = [
        partial(
            _estimate_voxels,
            design=design,
            weights=[weights[number] for weights in weights_of],
            n_each=n_each,
            whiten=parts.by_reference and is_f,
            dof=float(parts.dof[number]),
        )
        for number, design in enumerate(parts.designs)
    ]
    given = [fit[name].variable for name in ("beta", "sigma2", "rho") if name in fit]
    whole = ("regressor", "lag") if "rho" in fit else ("regressor",)
    dims = ("run", *parts.voxel_dims)
    rows = map_rows(kernels, given, dims, n_rows=n_each * len(tests), whole=whole)
    set_task_bytes(rows, _task_bytes(parts, tests, n_each))
    along = ("contrast", len(tests), n_each) if named else None

    def parts_of(user: str = "") -> dict[str, xr.Variable]:
        """What users get, or the same for what is computed of it."""

        def of(name: str, extra: tuple[str, ...], which: int | slice) -> xr.Variable:
            own = (*lead, "run", *extra, *parts.voxel_dims)
            sizes: dict[Hashable, int] = dict.fromkeys(extra, q)
            return take(
                rows, own, which, sizes=sizes, along=along, name=f"{name}_for_{user}" if user else name
            )

        if is_f:
            found = {
                "effect": of("effect", ("row",), slice(0, q)),
                "covariance": of("covariance", ("row", "row_"), slice(q, q + q * q)),
            }
        else:
            found = {"effect": of("effect", (), 0), "variance": of("variance", (), 1)}
        return found | ({"dof": of("dof", (), n_each - 1)} if uncertain else {})

    ds = _labelled_rows(tests, named, q) if is_f else xr.Dataset()
    ds = ds.assign(parts_of())
    estimable = np.array([[w is not None for w in weights] for weights in weights_of])
    numbers = {
        "weights": ((*lead, "row", "regressor"), _stacked_weights(tests, q)),
        "estimable": ((*lead, "run"), estimable),
    }
    if is_f:
        numbers["n_rows"] = (lead, np.array([len(test.rows.names) for test in tests]))
    if not uncertain:
        numbers["dof"] = ((*lead, "run"), np.where(estimable, parts.dof, np.nan))
    for name, (own, values) in numbers.items():
        ds[name] = (own, values if named else values[0])
    if not is_f:
        ds["weights"] = ds["weights"].isel(row=0)
    ds["weights"].attrs["long_name"] = "weights of the contrast"
    ds = ds.assign_coords({key: value for key, value in fit.coords.items() if set(value.dims) <= set(dims)})
    ds = ds.assign_coords(regressor=fit["regressor"].variable)
    if named:
        ds = ds.assign_coords(contrast=text_labels(named))
    ds.attrs = _attributes(parts, tests)
    return add_statistics(ds, parts_of)


def _task_bytes(parts: _Parts, tests: list[_Test], n_each: int) -> int:
    """Projected memory of a task that makes the estimates of all contrasts at a voxel block of a run."""
    sigma2 = parts.fit["sigma2"]
    largest = {dim: max(sizes) for dim, sizes in sigma2.chunksizes.items()} or dict(sigma2.sizes)
    return plan.statistics_memory_per_thread(
        plan.StatisticsSize(
            math.prod(largest[dim] for dim in parts.voxel_dims),
            len(parts.regressors),
            parts.fit.sizes.get("lag", 0),
            parts.fit.sizes["volume"],
            int(np.any([test.rows.weights.any(axis=0) for test in tests], axis=0).sum()),
            n_each * len(tests),
            0,
            len(tests),
        )
    )


def _labelled_rows(tests: list[_Test], named: list[str], q: int) -> xr.Dataset:
    """Labels of the rows of F contrasts; those of fewer rows are filled up."""
    names = [[*test.rows.names, *[""] * (q - len(test.rows.names))] for test in tests]
    numbers = np.arange(1, q + 1)
    alike = all(one == names[0] for one in names)
    row_name = xr.Variable("row", text_labels(names[0]))
    if named and not alike:
        row_name = xr.Variable(("contrast", "row"), np.stack([text_labels(one) for one in names]))
    return xr.Dataset(coords={"row": numbers, "row_": numbers, "row_name": row_name})


def _stacked_weights(tests: list[_Test], q: int) -> NDArray[np.float64]:
    """Weights (contrast, row, regressor); NaN in rows that a contrast does not have."""
    out = np.full((len(tests), q, tests[0].rows.weights.shape[1]), np.nan)
    for number, test in enumerate(tests):
        out[number, : len(test.rows.names)] = test.rows.weights
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


def _weights_of_run(rows: Rows, regressors: list[str], design: _Design) -> NDArray[np.float64] | None:
    """Weights (q, P) in the order of a run's columns, or None if the run cannot estimate every row."""
    needed = {regressors[place] for place in np.flatnonzero(rows.weights.any(axis=0))}
    if not needed <= set(design.columns):
        return None
    weights = rows.weights[:, design.places]
    return weights if all(is_estimable(design.X, row) for row in weights) else None


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def _estimate_voxels(
    beta: NDArray[np.float64],
    sigma2: NDArray[np.float64],
    rho: NDArray[np.float64] | None = None,
    *,
    design: _Design,
    weights: list[NDArray[np.float64] | None],
    n_each: int,
    whiten: bool,
    dof: float,
) -> NDArray[np.float64]:
    """Effects, covariances and degrees of freedom of each contrast in a run, one behind the other.

    Parameters
    ----------
    beta, sigma2, rho : ndarray, shape (regressor, lag, run, ...)
        With length 1 along the run, and along what they do not have; without ``rho``, no dim of lags.
    design : _Design
    weights : list of ndarray, shape (q, P), or None
        Of each contrast; None where the run cannot estimate it.
    n_each : int
        Rows of each contrast: q effects, q q covariances and the degrees of freedom, with q that of the longest.
    whiten : bool
        Whiten effects, as the reference does.
    dof : float
        Of the residuals.

    Returns
    -------
    ndarray, shape (rows, 1, ...)
    """
    space = sigma2.shape[1 if rho is None else 2 :]
    out = np.full((n_each * len(weights), *space), np.nan)
    basis = design.basis
    # sigma2 is NaN where the residual says nothing, and then neither does anything else.
    variances = sigma2.reshape(-1)
    alive = np.flatnonzero(~np.isnan(variances))
    given = [one for one in weights if one is not None]
    if basis is None or not given or not alive.size:
        return out
    used = np.empty((0, alive.size)) if rho is None else rho.reshape(rho.shape[1], -1)[: basis.order, alive]
    # Only the regressors with a weight: those that the run lacks are NaN, and NaN times 0 is NaN.
    chosen = np.flatnonzero(np.concatenate(given).any(axis=0))
    coefficients = {c: beta[design.places[c]].reshape(-1)[alive] for c in chosen}
    covariances = iter(contrast_covariances(basis, given, used))
    dofs = iter(
        [np.full(alive.size, dof)] * len(given)
        if design.uncertainty is None
        else effective_dofs(basis, given, used, design.uncertainty, dof)
    )
    rows = out.reshape(len(weights), n_each, -1)
    for own, one in zip(rows, weights, strict=True):
        if one is not None:
            effects, covariance = _estimate(one, coefficients, next(covariances), variances[alive], whiten)
            q, longest = len(effects), math.isqrt(n_each)
            own[:q, alive] = effects
            square = own[longest:-1].reshape(longest, longest, -1)
            square[:q, :q, alive] = covariance
            own[-1, alive] = next(dofs)
    return out


def _estimate(
    weights: NDArray[np.float64],
    coefficients: Mapping[Any, NDArray[np.float64]],
    covariance: NDArray[np.float64],
    variance: NDArray[np.float64],
    whiten: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Effects (q, V) and covariances (q, q, V) of one contrast."""
    effects = np.empty((len(weights), len(variance)))
    for row, own in enumerate(weights):
        effects[row] = sum(own[c] * coefficients[c] for c in np.flatnonzero(own))
    if whiten:
        effects = np.einsum("ij...,j...->i...", whitener(covariance), effects)
        covariance = np.eye(len(weights))
    if covariance.ndim == 2:  # the same for all voxels
        covariance = covariance[..., None]
    return effects, covariance * variance


def add_statistics(
    ds: xr.Dataset, given: Callable[[str], Mapping[str, xr.Variable]] = lambda _: {}
) -> xr.Dataset:
    """Add ``stat``, ``p_value`` and ``z_score`` to effects with their variances and degrees of freedom.

    Parameters
    ----------
    ds : Dataset
        With ``effect``, ``variance`` and ``dof``, or with ``effect (row, ...)``, ``covariance (row, row_, ...)``, ``n_rows``
        and ``dof``; the attribute ``compat`` says by whose rules.
    given : callable
        From the name of a statistic to those of these variables that are lazy, under a name of their own for dask: see
        :func:`chunkglm.blocks.take`.

    Returns
    -------
    Dataset
    """
    by_reference = ds.attrs.get("compat") == "nilearn"
    is_f = "covariance" in ds
    spread = "covariance" if is_f else "variance"
    own = given("stat")
    of_stat = {name: own.get(name, ds[name].variable) for name in ("effect", spread)}
    dims = tuple(
        dict.fromkeys(dim for one in of_stat.values() for dim in one.dims if dim not in ("row", "row_"))
    )
    pair = [of_stat["effect"], of_stat[spread]]
    n_rows = [ds["n_rows"].variable] if is_f else []
    if is_f:
        stat = map_rows(_f, [*pair, *n_rows], dims, n_rows=1, whole=("row", "row_"))
        z_of: Any = distributions.f_z_score_clipped if by_reference else distributions.f_z_score
        p_of: Any = distributions.f_p_value
    else:
        stat = map_rows(partial(as_row, _t_by_reference if by_reference else _t), pair, dims, n_rows=1)
        z_of = distributions.t_z_score_clipped if by_reference else distributions.t_z_score
        p_of = distributions.t_p_value
    every = tuple(dict.fromkeys([*dims, *ds["dof"].dims]))

    def value(name: str, function: Any) -> xr.Variable:
        inputs = [
            take(stat, dims, 0, name=f"stat_for_{name}"),
            *n_rows,
            given(name).get("dof", ds["dof"].variable),
        ]
        return take(map_rows(partial(as_row, function), inputs, every, n_rows=1), every, 0, name=name)

    ds = ds.assign(
        stat=take(stat, dims, 0, name="stat"),
        p_value=value("p_value", p_of),
        z_score=value("z_score", z_of),
    )
    annotate(ds, STATISTICS)["stat"].attrs["long_name"] = f"{'F' if is_f else 't'} statistic"
    return ds


def _f(
    effect: NDArray[np.float64], covariance: NDArray[np.float64], n_rows: NDArray[np.intp]
) -> NDArray[np.float64]:
    """F statistics, shape (1, ...), of effects (row, 1, ...) and covariances (row, row, ...)."""

    def of_rows(q: int, e: NDArray[np.float64], V: NDArray[np.float64]) -> NDArray[np.float64]:
        return f_statistic(e[:q, 0], V[:q, :q].reshape(q * q, *V.shape[2:]))

    return by_number_of_rows(of_rows, n_rows[0, 0], effect, covariance)


def by_number_of_rows(
    function: Callable[..., NDArray[np.float64]],
    n_rows: NDArray[np.intp],
    *arrays: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Apply a function to contrasts of several rows, which may have other numbers of them.

    Parameters
    ----------
    function : callable
        ``function(q, *arrays)``.
    n_rows : ndarray of int
        Of the last dims of ``arrays``; of length 1 along all but that of the contrasts, if there is one.
    *arrays : ndarray

    Returns
    -------
    ndarray
    """
    if n_rows.size == 1:
        return function(int(n_rows.item()), *arrays)
    place = int(np.argmax(n_rows.shape)) - n_rows.ndim
    parts = [
        function(
            int(q),
            *(array.take([number], axis=place) if array.shape[place] > 1 else array for array in arrays),
        )
        for number, q in enumerate(n_rows.ravel())
    ]
    return np.concatenate(parts, axis=place)


@np.errstate(divide="ignore", invalid="ignore")
def _t(effect: NDArray[np.float64], variance: NDArray[np.float64]) -> NDArray[np.float64]:
    return effect / np.sqrt(np.where(variance > 0, variance, np.nan))


@np.errstate(invalid="ignore")
def _t_by_reference(effect: NDArray[np.float64], variance: NDArray[np.float64]) -> NDArray[np.float64]:
    return effect / np.sqrt(np.maximum(variance, LEAST_VARIANCE))
