"""Fixed effects over runs, lazily."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import xarray as xr

from chunkglm.blocks import fold_rows, map_rows, take
from chunkglm.contrasts import add_statistics, by_number_of_rows
from chunkglm.errors import ChunkGLMWarning, ContrastError, InputError
from chunkglm.grids import check_no_voxel_twice
from chunkglm.kernels.combine import (
    add_rows,
    add_runs,
    combine_others,
    combine_rows_of_others,
    combined,
    combined_rows,
)
from chunkglm.schema import FORMAT_VERSION, STATISTICS, annotate, require
from chunkglm.trees import map_nodes

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from numpy.typing import NDArray

    from chunkglm.blocks import Rows

    Floats = NDArray[np.float64]

COMBINED = ("effect", "variance", "dof")
"""What is needed of each run."""

ROWS = {"effect": ("row",), "covariance": ("row", "row_")}
"""Dims of F contrasts besides those of t contrasts."""

LEFT_OUT = "left_out"
"""Dim of the maps without each run in turn."""


@overload
def fixed_effects(
    contrasts: xr.Dataset, *, dim: Hashable = ..., precision_weighted: bool = ...
) -> xr.Dataset: ...
@overload
def fixed_effects(
    contrasts: xr.DataTree, *, dim: Hashable = ..., precision_weighted: bool = ...
) -> xr.DataTree: ...
def fixed_effects(
    contrasts: xr.Dataset | xr.DataTree, *, dim: Hashable = "run", precision_weighted: bool = False
) -> xr.Dataset | xr.DataTree:
    """Combine the same contrast of several runs.

    Parameters
    ----------
    contrasts : Dataset, or DataTree of them
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
    Dataset, or DataTree of them for a tree
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
    if isinstance(contrasts, xr.DataTree):
        combine = partial(fixed_effects, dim=dim, precision_weighted=precision_weighted)
        return map_nodes(combine, contrasts)
    _check(contrasts, dim, precision_weighted=precision_weighted)
    return _fixed(contrasts, dim, precision_weighted=precision_weighted, each_left_out=False)


@overload
def leave_one_out(
    contrasts: xr.Dataset, *, dim: Hashable = ..., precision_weighted: bool = ...
) -> xr.Dataset: ...
@overload
def leave_one_out(
    contrasts: xr.DataTree, *, dim: Hashable = ..., precision_weighted: bool = ...
) -> xr.DataTree: ...
def leave_one_out(
    contrasts: xr.Dataset | xr.DataTree, *, dim: Hashable = "run", precision_weighted: bool = False
) -> xr.Dataset | xr.DataTree:
    """Combine the same contrast of all runs but one, for each run that can be left out.

    Parameters
    ----------
    contrasts : Dataset, or DataTree of them
        As :func:`fixed_effects` takes them, of two runs or more.
    dim : hashable
        Dimension to combine over.
    precision_weighted : bool
        See :func:`fixed_effects`.

    Returns
    -------
    Dataset, or DataTree of them for a tree
        The variables of :func:`fixed_effects`, lazy and float64, with the dim ``left_out`` in front in place of ``dim``,
        such as ``effect (left_out, z, y, x)``. Its labels are those of the runs, and say which one is left out. Without a
        run that lacks the contrast, or is NaN at a voxel, the rest is all there is; without the only run that has it,
        all is NaN and ``n_runs`` is 0. The attribute ``combined`` names the runs that have the contrast: each is in all
        maps but its own.

    Raises
    ------
    InputError
        If there are fewer than two runs, a variable or a dim is missing, or F contrasts of the reference are to be weighted
        by precision.
    ContrastError
        If no run has the contrast.

    Notes
    -----
    The formulas of :func:`fixed_effects`, with sums over the runs ``s != r`` (the omission of Cook 1977, Technometrics
    19:15-18, of a run in place of an observation): with n other runs, ``effect = sum(effect_s) / n`` and ``variance =
    sum(variance_s) / n**2``; weighted by precision, ``variance = 1 / sum(1 / variance_s)`` and ``effect = variance *
    sum(effect_s / variance_s)``. Each sum is that of the runs before plus that of the runs behind; nothing is subtracted,
    which would cost digits. A block of the data is read once, whatever the number of runs.
    """
    if isinstance(contrasts, xr.DataTree):
        combine = partial(leave_one_out, dim=dim, precision_weighted=precision_weighted)
        return map_nodes(combine, contrasts)
    _check(contrasts, dim, precision_weighted=precision_weighted)
    if contrasts.sizes[dim] < 2:
        raise InputError(
            f"Leaving one out needs two runs or more over {dim!r}, and there is {contrasts.sizes[dim]}. Combine several "
            "runs with xarray.concat first, or take the contrast of the one as it is."
        )
    return _fixed(contrasts, dim, precision_weighted=precision_weighted, each_left_out=True)


def _check(contrasts: xr.Dataset, dim: Hashable, *, precision_weighted: bool) -> None:
    """Refuse what cannot be combined."""
    check_no_voxel_twice(contrasts, "The runs cannot be combined")
    of_rows = "covariance" in contrasts
    if of_rows and contrasts.attrs.get("compat") == "nilearn" and precision_weighted:
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


def _fixed(
    contrasts: xr.Dataset, dim: Hashable, *, precision_weighted: bool, each_left_out: bool
) -> xr.Dataset:
    """Combine all runs, or all but each."""
    labels = [str(label) for label in contrasts[dim].to_numpy()]
    lacks = _lacks(contrasts, dim)
    _report(
        [label for label, one in zip(labels, lacks, strict=True) if one.any()], dim, none=bool(lacks.all())
    )
    attrs = {
        **contrasts.attrs,
        "kind": "leave_one_out" if each_left_out else "fixed_effects",
        "format_version": FORMAT_VERSION,
        "precision_weighted": int(precision_weighted),
        "combined": [label for label, one in zip(labels, lacks, strict=True) if not one.all()],
    }
    combine = _combine_rows if "covariance" in contrasts else _combine
    ds = combine(contrasts, dim, precision_weighted=precision_weighted, each_left_out=each_left_out)
    if each_left_out:
        ds = ds.assign_coords({LEFT_OUT: contrasts[dim].to_numpy()})
        ds[LEFT_OUT].attrs["long_name"] = f"{dim} that was left out"
    if "weights" in contrasts and dim not in contrasts["weights"].dims:
        ds["weights"] = contrasts["weights"]
    ds.attrs = attrs
    return annotate(ds, STATISTICS)


def _combine(
    contrasts: xr.Dataset, dim: Hashable, *, precision_weighted: bool, each_left_out: bool
) -> xr.Dataset:
    """Of effects with variances."""
    given = [contrasts[name].variable for name in COMBINED]
    dims = tuple(dict.fromkeys(one for variable in given for one in variable.dims if one != dim))
    by_reference = contrasts.attrs.get("compat") == "nilearn"
    options = {"precision_weighted": precision_weighted, "reference_rules": by_reference}
    n_maps = contrasts.sizes[dim] if each_left_out else None
    if n_maps is not None:
        others = partial(_combine_blocks, combine_others, **options)
        rows = map_rows(others, given, dims, n_rows=4 * n_maps, whole=(dim,))
    else:
        add = partial(_add_blocks, **options)
        finish = partial(_finish_blocks, precision_weighted=precision_weighted)
        rows = fold_rows(add, finish, given, dims, n_rows=4, whole=(dim,))

    def maps(user: str = "") -> dict[str, xr.Variable]:
        """What users get, or the same for what is computed of it."""
        return {
            name: _map_of(rows, dims, row, n_maps, f"{name}_for_{user}" if user else name)
            for row, name in enumerate((*COMBINED, "n_runs"))
        }

    ds = xr.Dataset(maps(), coords=_coords(contrasts["effect"], dim))
    ds.attrs = contrasts.attrs
    return add_statistics(ds, maps)


def _combine_blocks(combine: Callable[..., Floats], *blocks: NDArray[Any], **options: bool) -> Floats:
    return combine(*(block.astype(np.float64) for block in np.broadcast_arrays(*blocks)), **options)


def _add_blocks(before: Floats | None, /, *blocks: NDArray[Any], **options: bool) -> Floats:
    return _combine_blocks(partial(add_runs, before), *blocks, **options)


def _finish_blocks(sums: Floats, *_: NDArray[Any], precision_weighted: bool) -> Floats:
    return combined(sums, precision_weighted=precision_weighted)


def _coords(effect: xr.DataArray, dim: Hashable) -> Any:
    """Coordinates of what has one dim less."""
    return effect.coords.to_dataset().isel({dim: 0}, drop=True, missing_dims="ignore").coords


def _map_of(
    rows: Rows, dims: tuple[Hashable, ...], number: int, n_maps: int | None, name: str
) -> xr.Variable:
    """One row of what a kernel makes: a map, or a map without each of the runs, which lie one behind the other."""
    if n_maps is None:
        return take(rows, dims, number, name=name)
    which = slice(number * n_maps, (number + 1) * n_maps)
    return take(rows, (LEFT_OUT, *dims), which, sizes={LEFT_OUT: n_maps}, name=name)


def _combine_rows(
    contrasts: xr.Dataset, dim: Hashable, *, precision_weighted: bool, each_left_out: bool
) -> xr.Dataset:
    """Of effects of several rows with covariances; several contrasts may have other numbers of rows."""
    effect, covariance, dof = (contrasts[name].variable for name in ("effect", "covariance", "dof"))
    q = contrasts.sizes["row"]
    n_rows = contrasts["n_rows"].variable if "n_rows" in contrasts else xr.Variable((), q)
    dims = tuple(one for one in effect.dims if one not in (dim, "row"))
    lead = tuple(one for one in dims if one == "contrast")
    space = tuple(one for one in dims if one != "contrast")
    n_maps = contrasts.sizes[dim] if each_left_out else None
    n_each = q + q * q + 2
    given = [effect, covariance, dof, n_rows]
    whole = ("row", "row_", dim)
    if n_maps is not None:
        others = partial(_others_of_row_blocks, precision_weighted=precision_weighted)
        rows = map_rows(others, given, dims, n_rows=n_each * n_maps, whole=whole)
    else:
        add = partial(_add_row_blocks, precision_weighted=precision_weighted)
        finish = partial(_finish_row_blocks, precision_weighted=precision_weighted)
        rows = fold_rows(add, finish, given, dims, n_rows=n_each, whole=whole)
    front = lead if n_maps is None else (LEFT_OUT, *lead)
    left: dict[Hashable, int] = {} if n_maps is None else {LEFT_OUT: n_maps}
    n = n_maps or 1

    def maps(user: str = "") -> dict[str, xr.Variable]:
        """What users get, or the same for what is computed of it."""
        end = f"_for_{user}" if user else ""
        own: dict[str, tuple[Any, slice, dict[Hashable, int]]] = {
            "effect": ((*front, "row", *space), slice(0, q * n), {"row": q}),
            "covariance": (
                (*front, "row", "row_", *space),
                slice(q * n, (q + q * q) * n),
                {"row": q, "row_": q},
            ),
        }
        found = {
            name: take(rows, dims_of, which, sizes={**sizes, **left}, name=name + end)
            for name, (dims_of, which, sizes) in own.items()
        }
        return found | {"dof": _map_of(rows, dims, n_each - 2, n_maps, f"dof{end}")}

    n_runs = _map_of(rows, dims, n_each - 1, n_maps, "n_runs")
    ds = xr.Dataset({**maps(), "n_runs": n_runs, "n_rows": n_rows}, coords=_coords(contrasts["effect"], dim))
    if "row_" in contrasts.coords:
        ds = ds.assign_coords(row_=contrasts["row_"].variable)
    ds.attrs = contrasts.attrs
    return add_statistics(ds, maps)


def _others_of_row_blocks(
    effect: Floats, covariance: Floats, dof: Floats, n_rows: NDArray[np.intp], *, precision_weighted: bool
) -> Floats:
    """Combine all runs but each; blocks are (row, row_, run, ...). Rows that a contrast does not have are NaN in the result."""
    longest, n_maps = len(effect), dof.shape[2]

    def of_rows(q: int, *blocks: NDArray[Any]) -> Floats:
        made = combine_rows_of_others(*_run_after_run(q, *blocks), precision_weighted=precision_weighted)
        return _padded(made, q, longest, n_maps)

    return by_number_of_rows(of_rows, n_rows[0, 0, 0], effect, covariance, dof)


def _add_row_blocks(
    before: Floats | None,
    effect: Floats,
    covariance: Floats,
    dof: Floats,
    n_rows: NDArray[np.intp],
    *,
    precision_weighted: bool,
) -> Floats:
    """The same with sums over runs, and over those before."""
    longest = len(effect)

    def of_rows(q: int, e: NDArray[Any], V: NDArray[Any], d: NDArray[Any], *sums: Floats) -> Floats:
        start = sums[0][_rows_had(q, longest)] if sums else None
        made = add_rows(start, *_run_after_run(q, e, V, d), precision_weighted=precision_weighted)
        return _padded(made, q, longest)

    sums = () if before is None else (before,)
    return by_number_of_rows(of_rows, n_rows[0, 0, 0], effect, covariance, dof, *sums)


def _finish_row_blocks(
    sums: Floats,
    effect: Floats,
    _covariance: Floats,
    _dof: Floats,
    n_rows: NDArray[np.intp],
    *,
    precision_weighted: bool,
) -> Floats:
    """Combine all runs, from their sums."""
    longest = len(effect)

    def of_rows(q: int, sums: Floats) -> Floats:
        made = combined_rows(sums[_rows_had(q, longest)], q, precision_weighted=precision_weighted)
        return _padded(made, q, longest)

    return by_number_of_rows(of_rows, n_rows[0, 0, 0], sums)


def _run_after_run(
    q: int, e: NDArray[Any], V: NDArray[Any], d: NDArray[Any]
) -> tuple[Floats, Floats, Floats]:
    """Blocks of ``q`` rows as the kernels have them."""
    R, space = e.shape[2], e.shape[3:]
    return (
        np.moveaxis(e[:q, 0].astype(np.float64), 1, 0).reshape(R * q, *space),
        np.moveaxis(V[:q, :q].astype(np.float64), 2, 0).reshape(R * q * q, *space),
        np.broadcast_to(d[0, 0], (R, *d.shape[3:])).astype(np.float64),
    )


def _rows_had(q: int, longest: int) -> list[int]:
    """Which of the rows for ``longest`` effects, their covariances, dof and n_runs a contrast with ``q`` of them has."""
    square = [longest * (1 + i) + j for i in range(q) for j in range(q)]
    return [*range(q), *square, -2, -1]


def _padded(made: Floats, q: int, longest: int, n_maps: int = 1) -> Floats:
    """Rows of ``q`` effects as those of ``longest``, the others NaN."""
    made = made.reshape(-1, n_maps, *made.shape[1:])
    out = np.full((longest + longest**2 + 2, *made.shape[1:]), np.nan)
    out[_rows_had(q, longest)] = made
    return out.reshape(-1, *out.shape[2:])


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
            stacklevel=4,
        )
