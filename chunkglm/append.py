"""Adding a run to a fit, without the data of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import xarray as xr

from chunkglm.blocks import as_chunked
from chunkglm.errors import InputError
from chunkglm.glm import (
    FIT_DIMS,
    assemble,
    check_same_voxels,
    label_runs,
    lazy_rows,
    noise_name,
    plan_fit,
    with_runs,
)
from chunkglm.schema import FIT, NUMERICAL_VERSION, SPACE, annotate, require, text_labels

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from chunkglm.glm import Design, SampleMask
    from chunkglm.nifti import ImageLike

# xarray annotates a part of what it exports.
_concat: Any = xr.Variable.concat

OPTIONS = ("noise_model", "signal_scaling", "compat")
"""Attributes of a fit that say how its runs were fitted."""

GROWING = ("run", "regressor", "volume", "lag")
"""Dims that may be longer with another run."""

PADDING: Mapping[str, Any] = {
    "beta": np.nan,
    "design": np.nan,
    "frame_time": np.nan,
    "column": -1,
    "sample_mask": False,
}
"""What a run has where it lacks a regressor or a volume."""


def append_run(
    fit: xr.Dataset,
    run: xr.Dataset,
    design: Design,
    *,
    label: str | None = None,
    mask: ImageLike | xr.DataArray | None = None,
    sample_mask: SampleMask = None,
) -> xr.Dataset:
    """Fit one more run as the runs of a fit were fitted, and add it to them, lazily.

    The data of the other runs is not needed, and their estimates stay as they are: the result is that of
    :func:`chunkglm.fit` of all runs together, to the last bit.

    Parameters
    ----------
    fit : Dataset
        From :func:`chunkglm.fit`, or saved and opened again; or some runs of it.
    run : Dataset
        ``bold (time, z, y, x)`` and ``mask (z, y, x)`` on the grid of the fit; of any length.
    design : DataFrame, array or path
        Its design matrix (volume, regressor). Columns are matched by name; new ones become the last regressors.
    label : str, optional
        Of the run. By default the next free number: one more than the largest number among the labels, and than the
        number of runs, with leading zeros where they have some.
    mask : path, nibabel image or DataArray, optional
        Used instead of the run's own mask.
    sample_mask : array or sequence, optional
        Volumes of the run to keep: bool, one a volume; or their numbers, from 0.

    Returns
    -------
    Dataset
        The variables of :func:`chunkglm.fit` with one more label along ``run``, the last. What is on voxels is lazy, in
        the spatial chunks of the fit (in those of the run where the fit is in memory); the coordinates are those of the
        fit. With ``noise_model="auto"`` the data of the new run is read once, at once, and it gets the order that is best
        for it.

    Raises
    ------
    InputError
        If ``fit`` is not a whole fit of this version's numbers, or has a run of this label.
    DesignError, GridMismatchError, MaskError
        If something about the run cannot be right.

    Notes
    -----
    Runs are fitted each on its own, so that a fit of several is their fits side by side: see :func:`chunkglm.fit` for the
    formulas.
    """
    fit = _as_fit(fit)
    labels = [str(one) for one in fit["run"].to_numpy()]
    label = _next_label(labels) if label is None else str(label)
    if label in labels:
        raise InputError(
            f"The fit has a run {label!r} already; its runs are {', '.join(labels)}. Give another label, or take that run "
            f"out first: fit.drop_sel(run={label!r})."
        )
    check_same_voxels(label_runs({label: run})[label], fit, f"Run {label}", "the fit")
    noise_model, signal_scaling, compat = (str(fit.attrs[name]) for name in OPTIONS)
    plan = plan_fit(
        {label: run},
        {label: design},
        noise_model=noise_model,
        signal_scaling=None if signal_scaling == "none" else signal_scaling,
        mask=mask,
        sample_masks={label: sample_mask},
        compat=None if compat == "none" else compat,
        regressors=[str(name) for name in fit["regressor"].to_numpy()],
    )
    return _joined(fit, assemble(plan, lazy_rows(plan)))


def _as_fit(fit: xr.Dataset) -> xr.Dataset:
    """Check a fit; one of a single run that was selected gets its dim back."""
    fit = with_runs(fit)
    what = "A fit to which a run is added"
    optional = ("rho", "rho_at_limit")
    require(fit, FIT, [name for name in FIT if name not in optional or name in fit], what)
    lacking = [name for name in OPTIONS if name not in fit.attrs]
    lacking += [name for name in ("run", "regressor") if name not in fit.coords]
    if lacking:
        raise InputError(
            f"{what} needs the attributes {', '.join(OPTIONS)} and the labels of runs and regressors, but has no "
            f"{' and no '.join(lacking)}. Give it as cg.fit made it; xarray.set_options(keep_attrs=True) keeps attributes."
        )
    version = str(fit.attrs.get("numerical_version", "unknown"))
    if version != NUMERICAL_VERSION:
        raise InputError(
            f"The fit has the numbers of version {version}, and this chunkglm computes those of version {NUMERICAL_VERSION}: "
            "its runs would not be comparable. Fit all runs again, or add the run with the release that made the fit."
        )
    growing = [
        name
        for name, variable in fit.variables.items()
        if name not in FIT and name not in fit.indexes and set(variable.dims) & set(GROWING)
    ]
    if growing:
        names = ", ".join(map(repr, growing))
        raise InputError(
            f"The fit has {names} over runs, regressors, volumes or lags, which no fit has, and what it is for the new run is "
            f"not known. Leave it out, with fit.drop_vars([{names}]), and assign it again."
        )
    return fit


def _next_label(labels: list[str]) -> str:
    numbers = [label for label in labels if label.isdecimal()]
    width = max((len(label) for label in numbers if label.startswith("0")), default=1)
    return str(max(len(labels), *map(int, numbers), 0) + 1).zfill(width)


def _joined(fit: xr.Dataset, new: xr.Dataset) -> xr.Dataset:
    """Put the fit of one run behind that of others. Regressors of ``new`` begin with those of ``fit``."""
    spatial = _spatial_chunks(fit) or _spatial_chunks(new)
    sizes = {dim: max(fit.sizes.get(dim, 0), new.sizes.get(dim, 0)) for dim in GROWING[1:]}
    variables = {}
    for name in FIT:
        if name in fit or name in new:
            parts = [_chunked(_variable(ds, name, sizes), spatial) for ds in (fit, new)]
            variables[name] = _concat(parts, dim="run")
    coords: dict[Hashable, Any] = {
        "run": text_labels([*fit["run"].to_numpy(), *new["run"].to_numpy()]),
        "regressor": new["regressor"].variable,
    }
    for dim in ("volume", "lag"):
        longer = fit if fit.sizes.get(dim, 0) >= new.sizes.get(dim, 0) else new
        if dim in longer.coords:
            coords[dim] = longer[dim].variable
    attrs = dict(fit.attrs)
    if "noise_model_chosen" in new.attrs:
        # Not from the attribute of the fit, which runs that were dropped leave as it is.
        attrs["noise_model_chosen"] = [noise_name(int(order)) for order in variables["order"].to_numpy()]
    others = fit.drop_dims(GROWING, errors="ignore")
    return annotate(others.assign(variables).assign_coords(coords).assign_attrs(attrs), FIT)


def _spatial_chunks(fit: xr.Dataset) -> dict[str, tuple[int, ...]]:
    """Chunks along z, y, x of what a fit has lazily; empty if that is nothing."""
    lazy = (fit[name] for name in (*FIT_DIMS, "mask") if name in fit and fit[name].chunks is not None)
    first = next(lazy, None)
    return {} if first is None else {dim: first.chunksizes[dim] for dim in SPACE}


def _variable(ds: xr.Dataset, name: str, sizes: Mapping[str, int]) -> xr.Variable:
    """A variable of one of two fits, filled up to the regressors, volumes and lags of both."""
    if name in ("rho", "rho_at_limit"):
        return _noise_variable(ds, name, sizes["lag"])
    variable = ds[name].variable.transpose(*FIT[name].dims)
    short = {dim: (0, n - ds.sizes[dim]) for dim, n in sizes.items() if dim in variable.dims}
    if any(n for _, n in short.values()):
        variable = variable.pad(cast("Any", short), constant_values=PADDING[name])
    return variable


def _noise_variable(ds: xr.Dataset, name: str, n_lags: int) -> xr.Variable:
    """The same of the coefficients of the noise: beyond the order of a run, they are 0 where the run has a voxel."""
    sigma2 = ds["sigma2"].variable.transpose(*FIT["sigma2"].dims)
    if name == "rho_at_limit":
        return ds[name].variable.transpose(*sigma2.dims) if name in ds else sigma2 < 0
    have = [ds["rho"].variable.transpose(*FIT["rho"].dims)] if "rho" in ds else []
    nothing = xr.Variable(FIT["rho"].dims, (sigma2 * 0).data[:, None])
    lacking = [nothing] * (n_lags - sum(one.sizes["lag"] for one in have))
    rho: xr.Variable = _concat([*have, *lacking], dim="lag") if lacking else have[0]
    return rho


def _chunked(variable: xr.Variable, spatial: Mapping[str, tuple[int, ...]]) -> xr.Variable:
    """Bring a variable into blocks as a fit has them: the given ones in space, and one for each run."""
    if variable.chunks is None and not set(variable.dims) & set(SPACE):
        return variable
    chunks: dict[Hashable, tuple[int, ...]] = {
        **{dim: (n,) for dim, n in variable.sizes.items()},
        **{dim: (1,) * variable.sizes[dim] for dim in ("run",) if dim in variable.dims},
        **{dim: sizes for dim, sizes in spatial.items() if dim in variable.dims},
    }
    return variable.copy(data=as_chunked(variable.data, tuple(chunks.values())))
