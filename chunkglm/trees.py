"""Functions over the datasets of a tree, and which of its runs belong together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import xarray as xr

from chunkglm.entities import fit_and_label
from chunkglm.errors import ChunkGLMError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    RunsByFit = dict[str, dict[str, tuple[str, xr.Dataset]]]


def map_nodes(function: Callable[[xr.Dataset], xr.Dataset], tree: xr.DataTree) -> xr.DataTree:
    """Apply a function to every dataset of a tree; what it raises or warns of names the place in the tree.

    Parameters
    ----------
    function : callable
    tree : DataTree

    Returns
    -------
    DataTree
        Its results at the same places.

    Raises
    ------
    InputError
        If there is no data in the tree.
    """
    nodes = datasets_of(tree)
    if not nodes:
        raise InputError("There is no data in the tree. Give a tree of datasets, as open_study opens it.")
    return tree_of({path: named(path, function, ds) for path, ds in nodes.items()})


def datasets_of(tree: xr.DataTree) -> dict[str, xr.Dataset]:
    """Find the datasets of a tree by their paths in it; all below one node before those of the next."""
    found = {".": tree.to_dataset()} if tree.has_data else {}
    for name, child in tree.children.items():
        for path, ds in datasets_of(child).items():
            found[name if path == "." else f"{name}/{path}"] = ds
    return found


def tree_of(datasets: Mapping[str, xr.Dataset]) -> xr.DataTree:
    """Make a tree of datasets by path, in their order; ``.`` is its root."""
    found: dict[str, xr.Dataset] = {}
    for path, ds in datasets.items():
        parts = [] if path == "." else path.split("/")
        # xarray puts what is nearer to the root first, unless all levels are named.
        for depth in range(1, len(parts)):
            found.setdefault("/".join(parts[:depth]), xr.Dataset())
        found["/".join(parts) or "/"] = ds
    return xr.DataTree.from_dict(found)


def named(path: str, function: Callable[[Any], xr.Dataset], ds: Any) -> xr.Dataset:
    """Apply a function; errors and warnings begin with the place in a tree."""
    seen: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            return function(ds)
    except ChunkGLMError as error:
        raise type(error)(f"{path}: {error}") from error
    finally:
        for one in seen:
            warnings.warn(f"{path}: {one.message}", one.category, stacklevel=4)


def runs_by_fit(tree: xr.DataTree) -> RunsByFit:
    """Sort the runs of a tree by the fits that they belong to.

    Parameters
    ----------
    tree : DataTree
        With runs as its datasets.

    Returns
    -------
    dict
        Path of each fit -> label of each run -> (path, run).

    Raises
    ------
    InputError
        If two runs would have the same label in one fit, or runs stand at different levels.
    """
    found: RunsByFit = {}
    for path, run in datasets_of(tree).items():
        fit, label = fit_and_label(path)
        if label in found.setdefault(fit, {}):
            raise InputError(
                f"The runs {found[fit][label][0]!r} and {path!r} of the tree would both be run {label}. Rename one of them."
            )
        found[fit][label] = path, run
    for fit in found:
        if above := [one for one in found if one != fit and (not one or fit.startswith(f"{one}/"))]:
            first, second = (next(iter(found[one].values()))[0] for one in (above[0], fit))
            raise InputError(
                f"The tree has runs at other levels than others: {first!r} and {second!r}. Fit each part of it by itself, or "
                "name the runs alike."
            )
    return found


def for_runs(given: Any, groups: RunsByFit, paths: list[str], what: str) -> Any:
    """What is given for the runs of a tree, by the path of the fit and the label of each run; not if it is for one run."""
    name_of = {
        path: f"{place}/{label}".strip("/")
        for place, runs in groups.items()
        for label, (path, _) in runs.items()
    }
    if isinstance(given, Mapping):
        found = _flat(given)
        if strangers := set(found) - set(name_of) - set(name_of.values()):
            raise InputError(
                f"There are {what} for {', '.join(map(repr, sorted(strangers)))}, and the runs of the tree are "
                f"{', '.join(map(repr, paths))}. Use these as keys."
            )
        return {name_of.get(path, path): one for path, one in found.items()}
    if set(groups) <= {""}:
        return given
    if not isinstance(given, list | tuple) or len(given) != len(paths):
        raise InputError(
            f"For a tree of {len(paths)} runs, the {what} are a mapping by path ({paths[0]!r}, ...) or a list in the order of "
            "the runs in it, one for each."
        )
    return {name_of[path]: one for path, one in zip(paths, given, strict=True)}


def _flat(given: Mapping[Any, Any]) -> dict[str, Any]:
    """Flatten nested mappings to one by path: ``{"sub-01": {"run-1": a}}`` becomes ``{"sub-01/run-1": a}``."""
    flat: dict[str, Any] = {}
    for key, value in given.items():
        inner = _flat(value) if isinstance(value, Mapping) else {"": value}
        flat |= {f"{str(key).strip('/')}/{path}".strip("/"): one for path, one in inner.items()}
    return flat
