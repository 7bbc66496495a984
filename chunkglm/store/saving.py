"""Saving any dataset as a store: completely or not at all, and from where it was cut off."""

from __future__ import annotations

import math
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import xarray as xr
from dask.base import tokenize

from chunkglm import budget, grids, nifti, plan
from chunkglm._version import __version__
from chunkglm.blocks import task_bytes, write_blocks
from chunkglm.entities import ENTITIES, is_member
from chunkglm.errors import ChunkGLMError, InputError
from chunkglm.schema import FORMAT_VERSION, SPACE, canonical_json, text_labels
from chunkglm.store.manifest import HEADER, OWN_VARIABLES
from chunkglm.store.places import MADE_OF, is_url, store_name
from chunkglm.store.reading import made_of as _made_of
from chunkglm.store.reading import open_checked, open_store
from chunkglm.store.site import differences, hash_of, is_up_to_date
from chunkglm.store.writing import is_stored_as_it_is, writing
from chunkglm.trees import datasets_of, tree_of
from chunkglm.world import WORLD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from chunkglm.chunkfiles import Entry
    from chunkglm.store.places import StoreLike

    Progress = Callable[[int, int], None]

LARGEST_CHUNK = 2**30
"""Bytes; dask chunks that are larger are divided, because codecs take less than 2 GiB."""

WAVE_BLOCKS, WAVE_STORES = 4096, 128
"""Blocks of several datasets that are computed together, and datasets: enough for many workers, few for a scheduler. Each
store that is being made holds a lock, which is an open file, of which a process may have a thousand."""

_PACKAGES = ("dask", "nibabel", "numpy", "scipy", "xarray", "zarr")


@overload
def save(
    ds: xr.Dataset,
    store: StoreLike,
    *,
    memory: int | str | None = ...,
    overwrite: bool = ...,
    resume: bool = ...,
    progress: Callable[[int, int], None] | None = ...,
) -> xr.Dataset: ...
@overload
def save(
    ds: xr.DataTree,
    store: StoreLike,
    *,
    memory: int | str | None = ...,
    overwrite: bool = ...,
    resume: bool = ...,
    progress: Callable[[int, int], None] | None = ...,
) -> xr.DataTree: ...
def save(
    ds: xr.Dataset | xr.DataTree,
    store: StoreLike,
    *,
    memory: int | str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset | xr.DataTree:
    """Save a dataset completely or not at all; of a tree, each of its datasets.

    Everything lazy is computed, in one pass and block by block, on the scheduler that dask is set to. What was saved from
    the same content already is left as it is, and what was begun is continued: no block that is complete is computed again.

    Parameters
    ----------
    ds : Dataset or DataTree
        A run (or a slice of one), a fit, contrasts, fixed effects, or anything else. The content of lazy variables is known
        by their dask names, which for data from chunkglm's stores are hashes of it. World coordinates are left out. Of a
        tree, as of several subjects, every dataset gets a store of its own; they are computed some after another, so that
        neither graph nor scheduler grows with the number of subjects.
    store : path or URL
        For a tree, the folder of these stores, which :func:`chunkglm.open_study` opens; plain xarray does so too if it is
        named ``*.zarr``.
    memory : int or str, optional
        What may be used besides the interpreter, its imports and what is in memory already, such as ``"512MiB"``; by default
        what Dask's configuration ``chunkglm.memory`` says, or else 2 GiB. It decides how many blocks are worked on at a time,
        by threads of this process, and changes no result. Of data from elsewhere, only the size of its chunks is known. Where
        a cluster computes (a client of ``distributed`` is active), its workers keep to memory limits of their own.
    overwrite : bool
        Replace an existing store, also one of the same content.
    resume : bool
        Continue what was begun; otherwise start anew.
    progress : callable, optional
        Called with the number of blocks that are written, and of those that there are to write; for a tree, of some of its
        datasets after another: those whose blocks are computed together.

    Returns
    -------
    Dataset or DataTree
        The saved data, opened from ``store``.

    Raises
    ------
    StoreExistsError
        If something else is there, or was begun, and ``overwrite`` is not given.
    MemoryBudgetError
        If ``memory`` is too little for one block at a time.
    BusyStoreError, StoreError, InputError
    """
    if isinstance(ds, xr.DataTree):
        return _save_tree(ds, store, memory=memory, overwrite=overwrite, resume=resume, progress=progress)
    options: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "progress": progress}
    _save_together({store_name(store): ds}, memory=memory, **options)
    return open_store(store)


def _save_together(
    datasets: Mapping[str, xr.Dataset],
    *,
    memory: int | str | None,
    overwrite: bool,
    resume: bool,
    progress: Progress | None,
) -> None:
    """Save datasets in stores of their own, in one computation; those that are saved already are left as they are."""
    begun, needs = [], []
    with ExitStack() as stack:
        for store, given in datasets.items():
            if not overwrite and is_saved(given, store):
                continue
            ds = _encoded(savable(given))
            made_of = {"content": _content_hash(ds)}
            writer = stack.enter_context(writing(store, made_of, overwrite=overwrite, resume=resume))
            writer.create(ds, chunk_shapes(ds))
            begun.append((writer, writer.blocks(ds), made_of))
            needs.append(saving_memory(ds))
        if begun:
            what = f"Saving {' and '.join(list(datasets)[:2])}"
            with budget.tasks_within(memory, lambda n: max(one(n) for one in needs), what):
                write_blocks([blocks for _, blocks, _ in begun], progress=progress)
        for writer, _, made_of in begun:
            writer.finish(made_of)


def saving_memory(ds: xr.Dataset) -> Callable[[int], int]:
    """Project what computing and writing a dataset takes.

    Parameters
    ----------
    ds : Dataset

    Returns
    -------
    callable
        From a number of threads to bytes, above the imports and what is in memory already.
    """
    lazy = [variable for variable in ds.variables.values() if variable.chunks is not None]
    if not lazy:
        return lambda _: plan.OVERHEAD
    written = [_largest(variable) for variable in lazy]
    # A fit's task counts what it writes. Of data from elsewhere nothing is known but its chunks.
    each = task_bytes([variable.data for variable in lazy]) or 4 * sum(written) + 2 * max(written)
    if "effect" in ds and ds["effect"].chunks is not None:
        sizes = ds["effect"].sizes
        q, n_contrasts = sizes.get("row", 1), sizes.get("contrast", 1)
        voxels = math.prod(max(ds["effect"].chunksizes[dim]) for dim in SPACE if dim in sizes)
        n_runs = len(ds.attrs.get("combined", ()))
        combining = plan.leaving_out_memory if "left_out" in sizes else plan.combining_memory
        each += combining(voxels, (q + q * q + 1) * n_contrasts, n_runs, n_contrasts)
    return lambda n: plan.OVERHEAD + n * each


def _save_tree(
    tree: xr.DataTree, store: StoreLike, *, memory: int | str | None, **options: Any
) -> xr.DataTree:
    """Save the datasets of a tree, a bounded number of blocks at a time: what is computed does not grow with the study."""
    nodes = datasets_of(tree)
    if not nodes:
        raise InputError("There is no data in the tree, so there is nothing to save.")
    if nameless := [path for path in nodes if not all(is_member(part) for part in path.split("/"))]:
        raise InputError(
            f"The tree has data at {', '.join(map(repr, nameless))}. The datasets of a tree are saved under the names of its "
            f"nodes, which must begin with an entity: {', '.join(f'{key}-' for key in ENTITIES[:4])} and so on. Rename the "
            "nodes, or save each dataset by itself."
        )
    places = {f"{store_name(store)}/{path}": ds for path, ds in nodes.items()}
    for wave in _waves(places):
        _save_together(wave, memory=memory, **options)
    return tree_of({path: open_store(place) for path, place in zip(nodes, places, strict=True)})


def _waves(datasets: Mapping[str, xr.Dataset]) -> Iterator[dict[str, xr.Dataset]]:
    """Divide datasets into those that are computed together: as many as the bounds allow, at least one."""
    wave: dict[str, xr.Dataset] = {}
    n_blocks = 0
    for place, ds in datasets.items():
        own = max(
            (int(np.prod(one.data.numblocks)) for one in ds.variables.values() if one.chunks is not None),
            default=0,
        )
        if wave and (n_blocks + own > WAVE_BLOCKS or len(wave) == WAVE_STORES):
            yield wave
            wave, n_blocks = {}, 0
        wave[place] = ds
        n_blocks += own
    yield wave


def is_saved(ds: xr.Dataset, store: StoreLike) -> bool:
    """Whether saving a dataset would make again what is there.

    Parameters
    ----------
    ds : Dataset
    store : path or URL

    Returns
    -------
    bool
    """
    return _made_of(store) is not None and is_up_to_date(
        store, {"content": _content_hash(_encoded(savable(ds)))}
    )


def save_runs(
    ds: xr.Dataset,
    store: StoreLike,
    made_of: Mapping[str, Any],
    runs: Sequence[Mapping[str, str]],
    *,
    memory: int | str | None = None,
    overwrite: bool,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Save a dataset with a dimension ``run``, whose runs are known by what they are made of.

    Runs that the store held before, or that were begun, are kept as far as they are made of the same.

    Parameters
    ----------
    ds : Dataset
        Its lazy variables have ``run`` as first dimension, in chunks of one run.
    store : path or URL
    made_of : mapping
        Hashes of what all runs share.
    runs : sequence of mapping
        For each run, hashes of what else its values are made of.
    memory, overwrite, progress
        See :func:`save`.

    Returns
    -------
    Dataset
    """
    ds = _encoded(savable(ds))
    name = store_name(store)
    lazy = [str(key) for key, variable in ds.variables.items() if variable.chunks is not None]
    before = _runs_before(name) if overwrite else None
    with writing(store, made_of, overwrite=overwrite) as writer:
        writer.create(ds, chunk_shapes(ds))
        for number, part in enumerate(runs):
            writer.claim(number, part_hash(made_of, part), lazy)
            if before is not None and before.is_alike(number, made_of, part):
                writer.adopt(Path(name), before.files, number, lazy)
        with budget.tasks_within(memory, saving_memory(ds), f"Saving {name}"):
            write_blocks([writer.blocks(ds, by_run=True)], progress=progress)
        writer.finish({**made_of, "runs": [dict(part) for part in runs]})
    return open_store(store)


def part_hash(made_of: Mapping[str, Any], part: Mapping[str, str]) -> str:
    """Hash of all that a run of a store is made of: what it shares with others, and its own."""
    return hash_of(canonical_json([dict(made_of), dict(part)]))


class _Before(NamedTuple):
    """A store that is to be replaced: what it was made of, and its manifest."""

    made_of: dict[str, Any]
    files: Mapping[str, Entry]

    def is_alike(self, number: int, made_of: Mapping[str, Any], part: Mapping[str, str]) -> bool:
        """Whether a run of it is made of the same."""
        shared = {key: value for key, value in self.made_of.items() if key != "runs"}
        runs = self.made_of.get("runs", [])
        return number < len(runs) and not differences(shared, made_of) and not differences(runs[number], part)


def _runs_before(name: str) -> _Before | None:
    if is_url(name):
        return None
    try:
        checked, metadata = open_checked(name)
    except ChunkGLMError:
        return None
    made_of = metadata["attributes"].get(MADE_OF)
    return _Before(made_of, checked.manifest) if isinstance(made_of, dict) else None


def _encoded(ds: xr.Dataset) -> xr.Dataset:
    """A dataset whose lazy variables are stored as they lie in memory, which is how blocks are written."""
    unusual = {
        name: variable.compute()
        if not variable.ndim
        else xr.conventions.encode_cf_variable(variable, name=name)
        for name, variable in ds.variables.items()
        if variable.chunks is not None and not is_stored_as_it_is(variable)
    }
    return ds.assign(unusual) if unusual else ds


def _content_hash(ds: xr.Dataset) -> str:
    """Hash of what a dataset holds; of lazy variables, of the names that dask has for their content."""
    about = []
    for name, variable in sorted(ds.variables.items(), key=lambda item: str(item[0])):
        content = variable.data.name if variable.chunks is not None else tokenize(variable.values)
        chunks = None if variable.chunks is None else [list(sizes) for sizes in variable.chunks]
        form = [list(map(str, variable.dims)), list(variable.shape), str(variable.dtype), chunks]
        about.append([str(name), form, content, tokenize(variable.attrs)])
    return hash_of(canonical_json([FORMAT_VERSION, about, tokenize(ds.attrs)]))


def savable(ds: xr.Dataset) -> xr.Dataset:
    """Make a dataset fit the format: uniform chunks, variable-length strings, attributes, and what viewers need.

    Parameters
    ----------
    ds : Dataset

    Returns
    -------
    Dataset
        With the attributes ``format_version``, ``chunkglm_version`` and ``package_versions``; and, if it has
        ``bold`` on a grid, the OME-Zarr attribute ``ome`` and the binary header as the uint8 variable ``nifti``.

    Raises
    ------
    InputError
        If a name is taken, or values changed that carry the scale factor of their source.
    """
    if taken := set(OWN_VARIABLES) & set(ds.variables):
        raise InputError(
            f"The dataset has a variable {' and '.join(sorted(taken))!r}, a name that stores use themselves. Rename "
            "it with Dataset.rename."
        )
    ds = ds.drop_vars([name for name in WORLD if name in ds.coords])
    header, ome = _for_viewers(ds)
    for name, variable in ds.variables.items():
        fitting = _savable_variable(variable)
        if fitting is not variable:
            ds = ds.assign_coords({name: fitting}) if name in ds.coords else ds.assign({name: fitting})
    versions = [f"{package} {version(package)}" for package in _PACKAGES]
    ds = ds.assign_attrs(
        format_version=FORMAT_VERSION, chunkglm_version=__version__, package_versions=versions
    )
    if header is not None:
        ds[HEADER] = (f"{HEADER}_byte", np.frombuffer(header, dtype=np.uint8))
        ds.attrs["ome"] = ome
    return ds


def _savable_variable(variable: xr.Variable) -> xr.Variable:
    """Give a variable the form that the format has for it; the same object where it is so already."""
    values = variable.values if variable.dtype.kind in "UTO" else None
    if values is not None and all(isinstance(value, str) for value in values.flat):
        labels = text_labels(values.ravel().tolist()).reshape(variable.shape)
        return xr.Variable(variable.dims, labels, variable.attrs)
    packing = nifti.source_packing(variable)
    if packing is not None:
        variable = _packed(variable, packing)
    if variable.chunks is not None and not _is_uniform(variable.chunks):
        sizes = {dim: max(lengths) for dim, lengths in variable.chunksizes.items()}
        variable = variable.chunk(sizes)
    if variable.chunks is not None and _largest(variable) > LARGEST_CHUNK:
        variable = variable.chunk(dict(zip(variable.dims, _bounded_shape(variable), strict=True)))
    return variable


def _packed(variable: xr.Variable, packing: nifti.Packing) -> xr.Variable:
    """Turn values that were opened from integers into these integers, with their scale as attributes."""
    data: Any = variable.data if variable.chunks is not None else np.asarray(variable.data)
    data = (
        packing.pack(data) if variable.chunks is None else data.map_blocks(packing.pack, dtype=packing.dtype)
    )
    # Adding 0.0 would turn -0.0 into 0.0, adding -0.0 does not.
    scale = {"scale_factor": packing.slope, "add_offset": packing.intercept or -0.0}
    return xr.Variable(variable.dims, data, {**variable.attrs, **scale})


def _is_uniform(chunks: tuple[tuple[int, ...], ...]) -> bool:
    return all(len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0] for sizes in chunks)


def _largest(variable: xr.Variable) -> int:
    return int(np.prod([max(sizes) for sizes in variable.chunks or ()]) * variable.dtype.itemsize)


def chunk_shapes(ds: xr.Dataset) -> dict[str, tuple[int, ...]]:
    """Chunk shapes that the arrays of a dataset have in a store."""
    return {str(name): _chunk_shape(variable) for name, variable in ds.variables.items() if variable.ndim}


def _chunk_shape(variable: xr.Variable) -> tuple[int, ...]:
    """Chunk shape as dask has it; of an array in memory, chunks of bounded size along the first dimensions."""
    if variable.chunks is not None:
        return tuple(max(sizes[0], 1) for sizes in variable.chunks)
    return _bounded_shape(variable)


def _bounded_shape(variable: xr.Variable) -> tuple[int, ...]:
    shape = list(variable.shape)
    for axis in range(len(shape)):
        while shape[axis] > 1 and int(np.prod(shape)) * variable.dtype.itemsize > plan.CHUNK_BYTES:
            shape[axis] = (shape[axis] + 1) // 2
    return tuple(max(n, 1) for n in shape)


def _for_viewers(ds: xr.Dataset) -> tuple[bytes | None, dict[str, Any]]:
    """The header of ``bold`` and OME-Zarr 0.5 attributes over it, if it is a signal on an even grid."""
    if "bold" not in ds or ds["bold"].dims != ("time", *SPACE) or "grid" not in ds.coords:
        return None, {}
    try:
        header, affine = nifti.export_header(ds["bold"]), grids.slice_affine(ds["bold"])
    except InputError:
        return None, {}
    x, y, z = (float(size) for size in grids.voxel_sizes(affine))
    times = ds["time"].values
    step = abs(round(float(times[1] - times[0]), 6)) if times.size > 1 and times.dtype.kind in "iuf" else 0.0
    axes = [{"name": "time", "type": "time", "unit": "second"}]
    axes += [{"name": dim, "type": "space", "unit": "millimeter"} for dim in SPACE]
    transformations = [{"type": "scale", "scale": [step or 1.0, z, y, x]}]
    datasets = [{"path": "bold", "coordinateTransformations": transformations}]
    return header, {"version": "0.5", "multiscales": [{"name": "bold", "axes": axes, "datasets": datasets}]}
