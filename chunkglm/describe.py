"""What a dataset is, in a few lines for people."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from chunkglm.errors import InputError
from chunkglm.grids import grid_of, voxel_sizes
from chunkglm.schema import SPACE
from chunkglm.trees import datasets_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    Labelled = xr.Dataset | xr.DataArray | xr.DataTree

MOST_NAMES = 12
"""Names of a list that are shown."""

KINDS = {"fixed_effects": "fixed effects", "leave_one_out": "fixed effects without each run in turn"}

SCALINGS = {"voxel": "percent of the voxel's mean", "run": "percent of the run's mean", "none": "as recorded"}


def describe(obj: Labelled) -> dict[str, str]:
    """Say what a dataset, array or tree is, from what is known without its data.

    Parameters
    ----------
    obj : Dataset, DataArray or DataTree

    Returns
    -------
    dict of str to str
        The first entry, without a key, says what it is; the others tell of its parts.
    """
    if isinstance(obj, xr.DataTree):
        return _tree(obj)
    kind = str(obj.attrs.get("kind", ""))
    if isinstance(obj, xr.DataArray):
        meaning = obj.attrs.get("long_name", "")
        about = {"": f"{'array' if obj.name is None else obj.name}{f': {meaning}' if meaning else ''}"}
    elif "bold" in obj:
        about = _run(obj)
    elif "beta" in obj and "design" in obj:
        about = _fit(obj)
    elif "z_score" in obj:
        about = _statistics(obj, kind)
    else:
        about = {"": "dataset", "variables": _names(obj.data_vars)}
    about |= _voxels(obj)
    return about


def _run(ds: xr.Dataset) -> dict[str, str]:
    about = {"": "run"}
    if "time" in ds["bold"].dims:
        step = ds.attrs.get("repetition_time")
        every = f", one every {step:g} s" if isinstance(step, int | float) else ""
        about["volumes"] = f"{ds.sizes['time']}{every}"
    about["signal"] = f"{ds['bold'].dtype}, {ds['bold'].nbytes / 2**20:,.1f} MiB"
    for key, name in (("source_name", "source"), ("processing", "processing")):
        if ds.attrs.get(key):
            about[name] = _names(np.atleast_1d(ds.attrs[key]))
    return about


def _fit(ds: xr.Dataset) -> dict[str, str]:
    about = {"": "fit", **_runs(ds)}
    about["regressors"] = _names(ds["regressor"].values)
    scaling = str(ds.attrs.get("signal_scaling", ""))
    about["noise"] = str(ds.attrs.get("noise_model", "unknown"))
    about["signal"] = SCALINGS.get(scaling, scaling)
    if ds["dof"].ndim <= 1:
        about["residual dof"] = _names(f"{value:g}" for value in np.atleast_1d(ds["dof"].values))
    return about


def _statistics(ds: xr.Dataset, kind: str) -> dict[str, str]:
    stat = str(ds.attrs.get("stat_type", ""))
    about = {"": f"{stat} {KINDS.get(kind, 'contrast')}".strip()}
    definitions = json.loads(ds.attrs["definition"]) if "definition" in ds.attrs else {}
    about["contrast"] = _names(f"{name} = {one}" if name else str(one) for name, one in definitions.items())
    if "combined" in ds.attrs and "run" not in ds.dims:
        about["runs"] = _names(np.atleast_1d(ds.attrs["combined"]))
    return about | _runs(ds)


def _runs(ds: xr.Dataset) -> dict[str, str]:
    return {"runs": _names(np.atleast_1d(ds["run"].values))} if "run" in ds.coords else {}


def _voxels(obj: xr.Dataset | xr.DataArray) -> dict[str, str]:
    lengths = [obj.sizes.get(dim, 1) for dim in SPACE[::-1]]
    try:
        sizes = voxel_sizes(grid_of(obj).affine)
    except InputError:
        return {"voxels": _by(lengths)} if set(obj.dims) & set(SPACE) else {}
    turned = ", oblique" if obj.coords["x"].attrs.get("units") == "voxel" else ""
    return {"voxels": f"{_by(lengths)} of {_by(f'{size:.4g}' for size in sizes)} mm{turned}"}


def _by(lengths: Iterable[object]) -> str:
    return " x ".join(str(length) for length in lengths)


def _names(names: Iterable[object]) -> str:
    """Names with commas between, the first of them if there are many."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - MOST_NAMES} more" if len(texts) > MOST_NAMES else ""
    return ", ".join(texts[:MOST_NAMES]) + more


def _tree(tree: xr.DataTree) -> dict[str, str]:
    nodes = datasets_of(tree)
    kinds = sorted({describe(ds)[""] for ds in nodes.values()})
    return {"": f"tree of {len(nodes)} datasets", "each": ", ".join(kinds), "nodes": _names(nodes)}
