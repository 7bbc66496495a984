"""Studies: folders of stores, opened as trees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chunkglm import grids
from chunkglm.entities import tree_path
from chunkglm.errors import InputError, StoreError
from chunkglm.schema import RUN, SPACE
from chunkglm.store.places import store_name, study_members
from chunkglm.store.reading import open_store
from chunkglm.trees import tree_of

if TYPE_CHECKING:
    import xarray as xr

    from chunkglm.store.places import StoreLike


def open_study(store: StoreLike) -> xr.DataTree:
    """Open a study: all stores in a folder.

    Parameters
    ----------
    store : path or URL
        A folder of stores whose names begin with BIDS entities: ``run-1``, ``sub-01_ses-2_task-rest_run-1``, or in folders
        of their own, ``sub-01/run-1`` or ``sub-01/func/sub-01_run-1``. What else lies there is no part of it, nor is a
        store that is being written.

    Returns
    -------
    DataTree
        Levels for subjects, sessions and tasks, as far as names carry them, and below these the runs: the node
        ``sub-01/ses-2/task-rest/run-1`` is what :func:`open_run` opens. In natural order of the names. Other stores than
        runs, such as the fits that :func:`chunkglm.save` wrote of a tree, are as :func:`open_store` opens them. Only
        metadata is read. Runs on grids that differ by rounding have the labels of the first.

    Raises
    ------
    SourceNotFoundError, IncompleteStoreError, DamagedStoreError
    StoreError
        If the names of two stores mean the same place.

    Examples
    --------
    >>> study = cg.open_study("study.zarr")  # doctest: +SKIP
    >>> study["sub-01/task-rest/run-1"].bold  # doctest: +SKIP
    """
    name = store_name(store)
    place_of: dict[str, str] = {}
    for place in study_members(name):
        path = tree_path(place)
        if path in place_of:
            raise StoreError(
                f"{name}/{place_of[path]} and {name}/{place} are both {path!r} in the study. Rename or move one of them."
            )
        place_of[path] = place
    for path, place in place_of.items():
        parts = path.split("/")
        above = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        if parent := next((one for one in above if one in place_of), None):
            raise StoreError(
                f"{name}/{place} would lie in the study inside of {name}/{place_of[parent]}, which is a store itself. "
                "Give both a name that tells them apart, such as run-1 and run-2."
            )
    opened = {path: _open_member(f"{name}/{place}") for path, place in place_of.items()}
    return tree_of(_with_equal_labels(opened))


def _with_equal_labels(opened: dict[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Give grids that differ by rounding the labels of the first, so that xarray leaves out no voxel between two runs."""
    firsts: list[tuple[grids.Grid, xr.Dataset]] = []
    made = {}
    for path, ds in opened.items():
        try:
            grid = grids.grid_of(ds)
        except InputError:  # a table of points, or anything else
            made[path] = ds
            continue
        first = next((one for known, one in firsts if grids.same_grid(grid, known)), None)
        if first is None:
            firsts.append((grid, ds))
        made[path] = ds if first is None else _with_labels_of(first, ds)
    return made


def _with_labels_of(first: xr.Dataset, ds: xr.Dataset) -> xr.Dataset:
    different = [dim for dim in SPACE if not np.array_equal(first[dim].values, ds[dim].values)]
    return ds.assign_coords({dim: first[dim].variable for dim in different})


def _open_member(name: str) -> xr.Dataset:
    """A run as :func:`open_run` opens it, or anything else."""
    ds = open_store(name)
    return ds[list(RUN)] if set(RUN) <= set(ds.variables) else ds
