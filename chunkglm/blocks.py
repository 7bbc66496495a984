"""Mapping kernels over voxel blocks. The only module that makes dask graphs.

The unit of work is a voxel block: one task takes the block's time blocks one after another, each computed inside
the task and dropped before the next, so that the decoded block of all time points never exists. It does not
matter where the signal comes from: what a task holds is the part of the signal's own graph that makes its blocks.
"""

from __future__ import annotations

import threading
import uuid
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import dask.array
import dask.base
import dask.blockwise
import numpy as np
import xarray as xr
from dask.base import optimize, tokenize
from dask.blockwise import BlockIndex, BlockwiseDep
from dask.highlevelgraph import HighLevelGraph
from dask.local import get_sync
from dask.optimization import cull
from threadpoolctl import ThreadpoolController

from chunkglm import plan
from chunkglm.errors import NotAvailableError
from chunkglm.schema import SPACE
from chunkglm.tasks import run_tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

# dask annotates a part of what it exports.
da: Any = dask.array
_optimize: Any = optimize
_cull: Any = cull
_core_blockwise: Any = dask.blockwise.blockwise
_compute: Any = dask.base.compute


class _Recipe(NamedTuple):
    """One block of a dask array: the tasks that make it, and the key of the last of them."""

    graph: dict[Any, Any]
    key: Any

    def make(self) -> Array:
        # A callback such as a progress bar counts the tasks of the computation around this one.
        return np.asarray(get_sync(self.graph, self.key, callbacks=()))


class _Work:
    """What all voxel blocks of a run share: the function with its arguments. It is sent to a process once, not with each block.

    A class of its own, and no tuple, so that dask does not look for tasks in what it holds.
    """

    def __init__(self, function: Callable[..., Array], arguments: tuple[Any, ...], n_rows: int) -> None:
        self.function, self.arguments, self.n_rows = function, arguments, n_rows

    def __dask_tokenize__(self) -> Any:
        return tokenize(self.function, self.arguments, self.n_rows)

    def do(self, mask: Array, time_blocks: Iterator[Array], computed: Sequence[Any]) -> Array:
        """Apply the function where the mask is, leave NaN elsewhere; shape (n_rows, z, y, x)."""
        voxels = np.flatnonzero(mask)
        if not voxels.size:
            return nothing(self.n_rows, mask.shape)
        with single_blas_thread():
            return scatter(self.function(time_blocks, voxels, *self.arguments, *computed), mask)


class _VoxelBlock:
    """One voxel block of any dask arrays: recipes of the mask and of the time blocks."""

    def __init__(self, mask: _Recipe, signal: list[_Recipe]) -> None:
        self.mask, self.signal = mask, signal

    def __call__(self, work: _Work, *computed: Any) -> Array:
        """The rows of the block, shape (n_rows, 1, z, y, x)."""
        return work.do(self.mask.make(), (recipe.make() for recipe in self.signal), computed)[:, None]


class _Stored:
    """An array of which a task takes a block by the number of it. It is sent to a process once, as all that blocks share."""

    def __init__(self, source: Any, chunks: Sequence[Sequence[int]]) -> None:
        self.source, self.slices = source, [_slices(sizes) for sizes in chunks]

    def __dask_tokenize__(self) -> Any:
        return tokenize(self.source, self.slices)

    def block(self, index: Sequence[int]) -> Array:
        place = tuple(along[i] for along, i in zip(self.slices, index, strict=True))
        return np.asarray(self.source[place])


class _StoredWork(_Work):
    """The same with the arrays that hold signal and mask."""

    def __init__(
        self,
        function: Callable[..., Array],
        arguments: tuple[Any, ...],
        n_rows: int,
        *,
        signal: Any,
        mask: Any,
        chunks: tuple[tuple[int, ...], ...],
    ) -> None:
        super().__init__(function, arguments, n_rows)
        self.signal, self.mask = _Stored(signal, chunks), _Stored(mask, chunks[1:])

    def __dask_tokenize__(self) -> Any:
        return tokenize(super().__dask_tokenize__(), self.signal, self.mask)

    def block(self, index: tuple[int, ...], *computed: Any) -> Array:
        """The block of an index (run, z, y, x), shape (n_rows, 1, z, y, x)."""
        _, *place = index
        signal = (self.signal.block((t, *place)) for t in range(len(self.signal.slices[0])))
        return self.do(self.mask.block(place), signal, computed)[:, None]


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def from_source(source: Any, name: str) -> Any:
    """Make a dask array of an array that is read block by block.

    Parameters
    ----------
    source : array-like
        With ``shape``, ``dtype``, ``ndim`` and ``chunks`` (the length of a chunk along each dimension); must be picklable, and
        indexed by slices from several threads.
    name : str
        Of the dask array; a hash of the content is part of it.

    Returns
    -------
    dask array
        A task that maps voxel blocks of it reads them itself.
    """
    meta = np.empty((0,) * source.ndim, dtype=source.dtype)
    array = da.from_array(source, chunks=source.chunks, name=name, meta=meta)
    # Kept where it is lost with what it stands for, as when the array is persisted.
    array.dask.layers[name].source = source
    return array


def _source_of(array: Any) -> Any:
    """What is read for a dask array, if it is known; an array in memory is that itself."""
    if not isinstance(array, da.Array):
        return array
    return getattr(array.dask.layers.get(array.name), "source", None)


def nothing(n_rows: int, shape: tuple[int, ...]) -> Array:
    """Rows of a voxel block without a voxel in the mask: one NaN, broadcast, which costs little to make and to store."""
    return np.broadcast_to(np.float64(np.nan), (n_rows, *shape))


def scatter(values: Array, mask: Array) -> Array:
    """Put rows (rows, V) of the voxels of a mask into their places, (rows, z, y, x); NaN elsewhere."""
    out = np.full((len(values), *mask.shape), np.nan)
    out.reshape(len(values), -1)[:, np.flatnonzero(mask)] = values
    return out


def as_blocks(bold: xr.DataArray) -> xr.DataArray:
    """Bring a signal into blocks.

    Parameters
    ----------
    bold : DataArray
        With the dims time, z, y, x in any order; numpy, dask or lazily read.

    Returns
    -------
    DataArray, dims (time, z, y, x)
        With its own dask chunks, or with those of a store if it had none.
    """
    bold = bold.transpose("time", *SPACE)
    if bold.chunks is None:
        n_time, n_z, n_y, n_x = bold.shape
        chunks = plan.bold_chunks((n_time, n_z, n_y, n_x), bold.dtype.itemsize)
        bold = bold.chunk(dict(zip(bold.dims, chunks, strict=True)))
    return bold


class RunBlocks(NamedTuple):
    """A run whose voxel blocks are mapped.

    Attributes
    ----------
    bold : DataArray, dims (time, z, y, x)
        From :func:`as_blocks`. Its spatial chunks are the voxel blocks, its time chunks the time blocks.
    mask : DataArray of bool, dims (z, y, x)
    arguments : tuple
        Further arguments of the function.
    computed : sequence of dask arrays of no dimension
        Computed once, before all blocks, and passed as numbers behind the arguments.
    task_bytes : int
        Projected memory of a task, for :func:`task_bytes`.
    """

    bold: xr.DataArray
    mask: xr.DataArray
    arguments: tuple[Any, ...] = ()
    computed: Sequence[Any] = ()
    task_bytes: int = 0


def map_voxel_blocks(function: Callable[..., Array], runs: Sequence[RunBlocks], n_rows: int) -> Rows:
    """Apply a function to the voxels of every voxel block of runs, lazily.

    Parameters
    ----------
    function : callable
        ``function(time_blocks, voxels, *arguments, *computed)`` with an iterator of arrays (n, z, y, x), and the
        numbers of the block's voxels that are in the mask. It returns (n_rows, V) float64, and must be picklable.
    runs : sequence of RunBlocks
        Of as many voxels, and with as many computed arguments.
    n_rows : int
        Rows of the function's result.

    Returns
    -------
    Rows, dims (run, z, y, x)
        NaN outside the mask, in the blocks of the first run. One task a voxel block; one without a voxel in the mask reads no
        signal. Of arrays from :func:`from_source`, or masks in memory, nothing is laid out before it is computed.

    Raises
    ------
    NotAvailableError
        If the signal is held by a cluster.
    """
    spatial = runs[0].bold.data.chunks[1:]
    if any(one.bold.data.chunks[1:] != spatial for one in runs):
        # Each in its own blocks: others would change its sums in the last bit.
        parts = [_in_chunks(map_voxel_blocks(function, [one], n_rows), spatial) for one in runs]
        return Rows(da.concatenate(parts), ("run", *SPACE), n_rows)
    chunks = ((1,) * len(runs), *spatial)
    works = [_stored_work(function, one, n_rows) for one in runs]
    if any(work is None for work in works):
        data = _map_any(function, runs, n_rows, chunks)
    else:
        dims = range(4)
        inputs: list[tuple[Any, Sequence[int]]] = [
            (_shared(works), dims[:1]),
            (BlockIndex(tuple(len(sizes) for sizes in chunks)), dims),
        ]
        inputs += [(da.stack(each), dims[:1]) for each in zip(*(one.computed for one in runs), strict=True)]
        name = f"{_name_of(function)}-{tokenize([_content(one) for one, _ in inputs], chunks)}"
        data = _blockwise(_do_stored, name, dims, inputs, chunks)
    rows = Rows(data, ("run", *SPACE), n_rows)
    set_task_bytes(rows, max(one.task_bytes for one in runs))
    return rows


def _in_chunks(rows: Rows, spatial: tuple[tuple[int, ...], ...]) -> Any:
    """Rows of a run in other chunks along z, y, x; their data."""
    if rows.data.chunks[1:] == spatial:
        return rows.data
    whole = take(rows, ("row", *rows.dims), slice(0, rows.n_rows), sizes={"row": rows.n_rows}).data
    array = as_chunked(whole, spatial)
    name = f"rows-{tokenize(array.name)}"
    return _blockwise(_only, name, range(1, array.ndim), [(array, range(array.ndim))], array.chunks[1:])


def _only(block: Any) -> Any:
    """What is in lists of one."""
    while isinstance(block, list):
        (block,) = block
    return block


def _do_stored(work: _StoredWork, index: tuple[int, ...], *computed: Any) -> Array:
    return work.block(index, *(np.asarray(one).item() for one in computed))


def _name_of(function: Any) -> str:
    inner = function.func if isinstance(function, partial) else function
    return str(getattr(inner, "__name__", type(inner).__name__)).strip("_<>")


def _stored_work(function: Callable[..., Array], run: RunBlocks, n_rows: int) -> _StoredWork | None:
    """The work on a run whose arrays are known; None otherwise."""
    signal, mask = run.bold.data, run.mask.transpose(*SPACE).data
    known, held = _source_of(signal), _source_of(mask)
    if known is None or held is None:
        return None
    return _StoredWork(function, run.arguments, n_rows, signal=known, mask=held, chunks=signal.chunks)


def _map_any(
    function: Callable[..., Array],
    runs: Sequence[RunBlocks],
    n_rows: int,
    chunks: tuple[tuple[int, ...], ...],
) -> Any:
    """Map the blocks of any dask arrays."""
    shared = _shared([_Work(function, one.arguments, n_rows) for one in runs])
    arrays = [(one.bold.data, as_chunked(one.mask.transpose(*SPACE).data, chunks[1:])) for one in runs]
    names = [[one.name for one in (*pair, *run.computed)] for pair, run in zip(arrays, runs, strict=True)]
    name = f"{_name_of(function)}-{tokenize(shared.name, names)}"
    layer: dict[Any, Any] = {}
    for number, (pair, run) in enumerate(zip(arrays, runs, strict=True)):
        for array in pair:
            _refuse_futures(array)
        signal, mask = _optimize(*pair)
        graphs = [dict(array.__dask_graph__()) for array in (signal, mask)]
        for index in np.ndindex(*(len(sizes) for sizes in chunks[1:])):
            blocks = [_recipe(graphs[0], (signal.name, t, *index)) for t in range(signal.numblocks[0])]
            block = _VoxelBlock(_recipe(graphs[1], (mask.name, *index)), blocks)
            layer[name, number, *index] = (
                block,
                (shared.name, number),
                *((one.name,) for one in run.computed),
            )
    computed = [one for run in runs for one in run.computed]
    graph = HighLevelGraph.from_collections(name, layer, dependencies=[shared, *computed])
    return da.Array(graph, name, chunks=chunks, dtype=np.float64)


def _shared(objects: Sequence[Any], name: str | None = None) -> Any:
    """Objects as a dask array of one of them in each block: what many tasks need is sent to a process once."""
    name = name or f"shared-{tokenize(list(objects))}"
    graph = HighLevelGraph.from_collections(name, {(name, i): one for i, one in enumerate(objects)})
    return da.Array(graph, name, chunks=((1,) * len(objects),), dtype=object)


def _blockwise(
    function: Callable[..., Any],
    name: str,
    index: Sequence[int],
    inputs: Sequence[tuple[Any, Sequence[int]]],
    chunks: tuple[tuple[int, ...], ...],
    *,
    dtype: type = float,
) -> Any:
    """A dask array, one task a block, of which nothing is laid out before it is computed.

    Parameters
    ----------
    function : callable
        From the blocks of the inputs. Along what is not in ``index`` it gets all blocks, in lists.
    name : str
    index : sequence of int
        Letters of the dimensions.
    inputs : sequence of (dask array or BlockwiseDep, letters)
    chunks : tuple of tuple of int
    dtype : type
    """
    arrays = [one for one, _ in inputs if isinstance(one, da.Array)]
    pairs: list[Any] = []
    for one, letters in inputs:
        pairs += [one.name if isinstance(one, da.Array) else one, tuple(letters)]
    known = {letter for letters in pairs[1::2] for letter in letters}
    layer = _core_blockwise(
        function,
        name,
        tuple(index),
        *pairs,
        numblocks={one.name: one.numblocks for one in arrays},
        new_axes={letter: 1 for letter in index if letter not in known},
        dependencies=arrays,
    )
    graph = HighLevelGraph.from_collections(name, layer, dependencies=arrays)
    return da.Array(graph, name, chunks=chunks, meta=np.empty((0,) * len(chunks), dtype=dtype))


TASK_BYTES = "task_bytes"


def set_task_bytes(rows: Rows, n_bytes: int) -> None:
    """Say what memory a task needs that makes a block of rows, for :func:`task_bytes`."""
    if isinstance(rows.data, da.Array):
        rows.data.dask.layers[rows.data.name].collection_annotations = {TASK_BYTES: n_bytes}


def task_bytes(arrays: Sequence[Any]) -> int:
    """The memory that the largest task in the graph of lazy arrays needs, as far as that is known.

    Parameters
    ----------
    arrays : sequence of dask arrays

    Returns
    -------
    int
        Bytes; 0 if nothing is known.
    """
    layers = [layer for array in arrays for layer in array.dask.layers.values()]
    return max((int((one.collection_annotations or {}).get(TASK_BYTES, 0)) for one in layers), default=0)


# -------------------------------------------------------------------------------------------------------- rows


class Rows(NamedTuple):
    """Rows of numbers at every voxel, of which variables are parts.

    Attributes
    ----------
    data : numpy or dask array
        A numpy array has the rows and then the dims. A dask array has the dims; its blocks have the rows in front, which dask
        does not know of: what takes rows away is then joined with what makes them.
    dims : tuple of hashable
    n_rows : int
    """

    data: Any
    dims: tuple[Hashable, ...]
    n_rows: int


def map_rows(
    function: Callable[..., Array] | Sequence[Callable[..., Array]],
    variables: Sequence[xr.Variable],
    dims: Sequence[Hashable],
    *,
    n_rows: int,
    whole: Sequence[Hashable] = (),
) -> Rows:
    """Apply a function block by block to variables.

    Parameters
    ----------
    function : callable, or a sequence of them
        From an array of each variable, (*whole, *dims), with length 1 along what a variable lacks, to one of (n_rows, *dims).
        Several of them, which must be picklable, are one for each label along the first of ``dims``.
    variables : sequence of Variable
        Numpy or dask, with any of ``dims`` and ``whole``, in any order.
    dims : sequence of hashable
        Dims of the result.
    n_rows : int
        Rows of the result.
    whole : sequence of hashable
        Dims that the function takes away: it gets all that lies along them.

    Returns
    -------
    Rows
        float64; a dask array, in the chunks of the first variable that has any along a dim, where one of ``variables`` is.
        One task a block. Where ``whole`` has several blocks, one more for each of them.
    """
    dims, order = tuple(dims), (*whole, *dims)
    variables, places = _in_order(variables, order)
    if all(variable.chunks is None for variable in variables):
        blocks = [_spread(one.values, place) for one, place in zip(variables, places, strict=True)]
        return Rows(_apply_at_once(function, blocks, len(whole)), dims, n_rows)
    chunks = _common_chunks(variables)
    if not callable(function):
        chunks[dims[0]] = (1,) * sum(chunks[dims[0]])
    letters = {dim: number for number, dim in enumerate(order)}
    inputs = [_input(variable, chunks, letters) for variable in variables]
    divided = any(len(chunks[dim]) > 1 for dim in whole)
    gone: tuple[Hashable, ...] = () if divided else tuple(whole)
    token = tokenize(function, [_content(one) for one, _ in inputs], places, order, chunks, n_rows)
    if divided:
        inputs = [(_pack(inputs, [chunks[dim] for dim in order], token), tuple(letters.values()))]
    made: Any = partial(_apply, places, len(whole) if divided else 0, len(gone))
    if callable(function):
        made = partial(made, function)
    else:
        inputs.insert(0, (_shared(function), (letters[dims[0]],)))
    index = tuple(letters[dim] for dim in (*dims, *gone))
    lengths = (*(chunks[dim] for dim in dims), *(((1,),) * len(gone)))
    name = f"{_name_of(function if callable(function) else function[0])}-{token}"
    data = _blockwise(made, name, index, inputs, lengths)
    if gone:
        # As a layer of its own: dask joins what takes dims away with what is behind it, but with nothing before it.
        n = len(dims)
        data = _blockwise(_without, f"without-{token}", range(n), [(data, range(data.ndim))], lengths[:n])
    return Rows(data, dims, n_rows)


def fold_rows(
    function: Callable[..., Array],
    finish: Callable[..., Array],
    variables: Sequence[xr.Variable],
    dims: Sequence[Hashable],
    *,
    n_rows: int,
    whole: Sequence[Hashable],
) -> Rows:
    """Apply a function block by block to variables, to some of the labels along a dim after others.

    What the memory has to hold of a block does not grow with the number of labels.

    Parameters
    ----------
    function : callable
        As that of :func:`map_rows`, with what it returned for the labels before in front of its arguments, None at first. It
        must not matter how many labels it gets at a time; must be picklable.
    finish : callable
        From the last of what ``function`` returned, and what that got, to the rows.
    variables, dims, n_rows
        See :func:`map_rows`.
    whole : sequence of hashable
        Dims that the function takes away. The last of them is that of the labels.

    Returns
    -------
    Rows
        As of :func:`map_rows`. Where there are more than ``RUNS_TOGETHER`` labels in several blocks, tasks that take away the
        last dim for so many each.
    """
    dims, order = tuple(dims), (*whole, *dims)
    chunks = _common_chunks(variables)
    groups = _groups(chunks[whole[-1]], plan.RUNS_TOGETHER)
    if all(variable.chunks is None for variable in variables) or len(groups) == 1:
        return map_rows(partial(_fold_once, function, finish), variables, dims, n_rows=n_rows, whole=whole)
    variables, places = _in_order(variables, order)
    letters = {dim: number for number, dim in enumerate(order)}
    inputs = [_input(variable, chunks, letters) for variable in variables]
    token = tokenize(function, finish, [_content(one) for one, _ in inputs], places, order, chunks, n_rows)
    packed = _pack(inputs, [chunks[dim] for dim in order], token)
    fold = partial(_fold, places, len(whole), function)
    fold_last = partial(_fold, places, len(whole), partial(_fold_last, function, finish))
    name = f"{_name_of(function)}-{token}"
    layer: dict[Any, Any] = {}
    around = [range(len(chunks[dim])) for dim in whole[:-1]]
    for index in np.ndindex(*(len(chunks[dim]) for dim in dims)):
        before: Any = None
        for number, group in enumerate(groups):
            last = number == len(groups) - 1
            key: Any = (name, *index) if last else (f"{name}-before", number, *index)
            layer[key] = (
                fold_last if last else fold,
                before,
                _nested_keys(packed.name, [*around, group], index),
            )
            before = key
    graph = HighLevelGraph.from_collections(name, layer, dependencies=[packed])
    data = da.Array(graph, name, chunks=tuple(chunks[dim] for dim in dims), dtype=np.float64)
    return Rows(data, dims, n_rows)


def _fold_last(
    function: Callable[..., Array], finish: Callable[..., Array], before: Array | None, *blocks: Array
) -> Array:
    return finish(function(before, *blocks), *blocks)


def _fold_once(function: Callable[..., Array], finish: Callable[..., Array], *blocks: Array) -> Array:
    return _fold_last(function, finish, None, *blocks)


def _groups(sizes: Sequence[int], together: int) -> list[range]:
    """Divide blocks of some sizes into as few groups of at most ``together`` labels as consecutive blocks allow."""
    groups, total = [range(0)], 0
    for number, size in enumerate(sizes):
        if len(groups[-1]) and total + size > together:
            groups.append(range(number, number))
            total = 0
        groups[-1] = range(groups[-1].start, number + 1)
        total += size
    return groups


def _nested_keys(
    name: str, ranges: Sequence[range], index: tuple[int, ...], found: tuple[int, ...] = ()
) -> Any:
    """Keys of blocks, in lists of lists along the first of their axes."""
    if not ranges:
        return (name, *found, *index)
    return [_nested_keys(name, ranges[1:], index, (*found, number)) for number in ranges[0]]


def _in_order(
    variables: Sequence[xr.Variable], order: Sequence[Hashable]
) -> tuple[list[xr.Variable], list[tuple[Any, ...]]]:
    """Variables with their dims in order, and how each is indexed to have length 1 along the others."""
    found = [one.transpose(*(dim for dim in order if dim in one.dims)) for one in variables]
    return found, [_places_of(one.dims, order) for one in found]


def _pack(inputs: Sequence[tuple[Any, Sequence[int]]], chunks: Sequence[tuple[int, ...]], token: str) -> Any:
    """Have all that is needed of a block made by one task."""
    return _blockwise(_together, f"together-{token}", range(len(chunks)), inputs, tuple(chunks))


def _apply_at_once(
    function: Callable[..., Array] | Sequence[Callable[..., Array]], blocks: list[Array], axis: int
) -> Array:
    """Apply a function to arrays in memory, or one of several to each label along an axis."""
    if callable(function):
        return function(*blocks)
    parts = [
        one(*(_cut_out(block, axis, slice(i, i + 1)) for block in blocks)) for i, one in enumerate(function)
    ]
    return np.concatenate(parts, axis=1)


def _without(block: Any) -> Array:
    """A block without its last axes, of length 1, one for each list that it is in."""
    n = 0
    while isinstance(block, list):
        (block,), n = block, n + 1
    out: Array = block.reshape(block.shape[: block.ndim - n])
    return out


def as_row(function: Callable[..., Array], *blocks: Array) -> Array:
    """Apply a function that makes one row."""
    return function(*blocks)[None]


def take(
    rows: Rows,
    dims: Sequence[Hashable],
    which: int | slice,
    *,
    sizes: Mapping[Hashable, int] | None = None,
    along: tuple[Hashable, int, int] | None = None,
    dtype: type = float,
    name: str = "take",
) -> xr.Variable:
    """Take some of the rows as a variable.

    Parameters
    ----------
    rows : Rows
    dims : sequence of hashable
        Dims of the variable: those of the rows, and more, in any order.
    which : int or slice
        The rows.
    sizes : mapping, optional
        Dims over which the rows of a slice are spread, with their sizes, the last changing fastest.
    along : (dim, n, step), optional
        A further dim with n labels, each a block of its own: the rows of each lie ``step`` behind those of the one before.
    dtype : type
        Float, or bool for rows of 0 and 1 (NaN is False).
    name : str
        What dask calls it. What others are computed of should not be called as what a user gets: ``dask.compute`` of a dataset
        fails if one of its arrays is needed by another (pydata/xarray#11329).

    Returns
    -------
    Variable
        As lazy as the rows.
    """
    sizes = dict(sizes or {})
    # The block has the new dims first, then those of the rows.
    have = (*(() if along is None else (along[0],)), *sizes, *rows.dims)
    axes = tuple(have.index(dim) for dim in dims)
    about = (which, tuple(sizes.values()), axes, None if along is None else along[2], dtype)
    if not isinstance(rows.data, da.Array):
        numbers = [None] if along is None else [(i,) for i in range(along[1])]
        parts = [_taken(about, rows.data, number) for number in numbers]
        return xr.Variable(dims, parts[0] if along is None else np.concatenate(parts, axis=axes.index(0)))
    lengths: dict[Hashable, tuple[int, ...]] = dict(zip(rows.dims, rows.data.chunks, strict=True))
    lengths |= {dim: (n,) for dim, n in sizes.items()}
    n_new = len(have) - len(rows.dims)
    letters = dict(
        zip(have, [*range(rows.data.ndim, rows.data.ndim + n_new), *range(len(rows.dims))], strict=True)
    )
    inputs: list[tuple[Any, Sequence[int]]] = [(rows.data, range(rows.data.ndim))]
    if along is not None:
        lengths[along[0]] = (1,) * along[1]
        inputs.append((BlockIndex((along[1],)), (letters[along[0]],)))
    index = tuple(letters[dim] for dim in dims)
    name = f"{name}-{tokenize(rows.data.name, about, dims, lengths)}"
    chunks = tuple(lengths[dim] for dim in dims)
    return xr.Variable(dims, _blockwise(partial(_taken, about), name, index, inputs, chunks, dtype=dtype))


def _taken(about: tuple[Any, ...], block: Any, number: tuple[int, ...] | None = None) -> Array:
    which, sizes, axes, step, dtype = about
    first = 0 if step is None or number is None else step * number[0]
    if isinstance(which, slice):
        part = block[which.start + first : which.stop + first].reshape(*sizes, *block.shape[1:])
    else:
        part = block[which + first]
    if dtype is bool:
        part = part == 1
    elif 2 * part.nbytes < block.nbytes:
        # A view would hold all rows as long as there is a map.
        part = part.copy()
    out: Array = (part if step is None else part[None]).transpose(axes)
    return out


def _places_of(dims: Sequence[Hashable], order: Sequence[Hashable]) -> tuple[Any, ...]:
    """How an array of some dims, in order, is indexed to have length 1 along the others."""
    return tuple(slice(None) if dim in dims else None for dim in order)


def _spread(block: Any, place: tuple[Any, ...]) -> Array:
    out: Array = np.asarray(block)[place]
    return out


def _common_chunks(variables: Sequence[xr.Variable]) -> dict[Hashable, tuple[int, ...]]:
    chunks: dict[Hashable, tuple[int, ...]] = {}
    for variable in variables:
        for dim, sizes in variable.chunksizes.items():
            chunks.setdefault(dim, sizes)
    for variable in variables:
        for dim, n in variable.sizes.items():
            chunks.setdefault(dim, (n,))
    return chunks


class _Pieces(BlockwiseDep):  # type: ignore[misc, unused-ignore]
    """A small array in memory, of which each task has its part."""

    def __init__(self, values: Array, chunks: tuple[tuple[int, ...], ...]) -> None:
        self.values, self.chunks = values, chunks
        self.numblocks = tuple(len(sizes) for sizes in chunks)
        self.produces_tasks = False

    def __getitem__(self, index: tuple[int, ...]) -> Array:
        places = [_slices(sizes)[i] for sizes, i in zip(self.chunks, index, strict=True)]
        part: Array = self.values[tuple(places)]
        return part

    def __dask_tokenize__(self) -> Any:
        return tokenize(self.values, self.chunks)


SMALL = 2**14
"""Bytes up to which an array in memory is handed out in pieces."""


def _input(
    variable: xr.Variable, chunks: Mapping[Hashable, tuple[int, ...]], letters: Mapping[Hashable, int]
) -> tuple[Any, Sequence[int]]:
    wanted = tuple(chunks[dim] for dim in variable.dims)
    index = [letters[dim] for dim in variable.dims]
    if variable.chunks is None and variable.nbytes <= SMALL:
        return _Pieces(variable.values, wanted), index
    array = da.asarray(variable.data)
    return array if array.chunks == wanted else _rechunk(array, dict(enumerate(wanted))), index


def _content(source: Any) -> Any:
    return source.name if isinstance(source, da.Array) else source


def _together(*blocks: Any) -> Any:
    return blocks


def _gather(
    nested: Any, places: Sequence[tuple[Any, ...]], depth: int, cut: tuple[int, slice], axis: int = 0
) -> list[Array]:
    """A part of blocks that lie in lists of lists of tuples, as one array of each member of the tuples."""
    if axis == depth:
        return [_cut_out(_spread(one, place), *cut) for one, place in zip(nested, places, strict=True)]
    parts = [_gather(one, places, depth, cut, axis + 1) for one in nested]
    return [
        each[0] if place[axis] is None else np.concatenate(each, axis=axis)
        for place, each in zip(places, zip(*parts, strict=True), strict=True)
    ]


def _cut_out(block: Array, axis: int, part: slice) -> Array:
    whole = axis >= block.ndim or block.shape[axis] == 1
    out: Array = block if whole else block[(*[slice(None)] * axis, part)]
    return out


def _leaves(nested: Any, depth: int) -> list[Any]:
    """What is in lists of lists, in one."""
    return [leaf for one in nested for leaf in _leaves(one, depth - 1)] if depth else [nested]


def _combine(
    places: Sequence[tuple[Any, ...]], depth: int, function: Callable[..., Array], nested: Any
) -> Array:
    """Apply a function to what :func:`_together` made of blocks along ``depth`` dims.

    A few voxels at a time: of all others, what lies along these dims is not there twice.
    """
    cuts = _cuts(places, depth, nested)
    parts = [function(*_gather(nested, places, depth, cut)) for cut in cuts]
    return _joined(parts, depth, cuts)


def _fold(
    places: Sequence[tuple[Any, ...]],
    depth: int,
    function: Callable[..., Array],
    before: Array | None,
    nested: Any,
) -> Array:
    """The same for a function that gets in front what it made of the blocks before these."""
    cuts = _cuts(places, depth, nested)
    parts = []
    for axis, part in cuts:
        made = None if before is None else _cut_out(before, 1 + axis - depth, part)
        parts.append(function(made, *_gather(nested, places, depth, (axis, part))))
    return _joined(parts, depth, cuts)


def _cuts(places: Sequence[tuple[Any, ...]], depth: int, nested: Any) -> list[tuple[int, slice]]:
    """Divide blocks along their longest dim behind the first ``depth``: its axis, and parts of it."""
    leaves = _leaves(nested, depth)
    shapes = [_spread(one, place).shape for one, place in zip(leaves[0], places, strict=True)]
    # With no dim left there is nothing to cut.
    lengths = np.broadcast_shapes(*(shape[depth:] for shape in shapes)) or (1,)
    axis = int(np.argmax(lengths))
    n_bytes = sum(np.asarray(one).nbytes for leaf in leaves for one in leaf)
    n = max(lengths[axis] // max(-(-n_bytes // plan.COMBINED_BYTES), 1), 1)
    return [(depth + axis, slice(start, start + n)) for start in range(0, max(lengths[axis], 1), n)]


def _joined(parts: list[Array], depth: int, cuts: list[tuple[int, slice]]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1 + cuts[0][0] - depth)


def _apply(
    places: Sequence[tuple[Any, ...]], depth: int, n_gone: int, function: Callable[..., Array], *blocks: Any
) -> Array:
    """Apply a function to blocks; where ``depth`` is not 0, to what :func:`_together` made of them along as many dims."""
    if depth:
        return _combine(places, depth, function, blocks[0])
    out = function(*(_spread(one, place) for one, place in zip(blocks, places, strict=True)))
    return out.reshape(out.shape + (1,) * n_gone)


def mask_blocks(masks: Sequence[xr.DataArray], spatial: tuple[tuple[int, ...], ...]) -> xr.Variable:
    """Stack the masks of runs, lazily, in the given chunks along z, y, x and one for each run."""
    arrays = [one.transpose(*SPACE).data for one in masks]
    chunks = ((1,) * len(arrays), *spatial)
    sources = [_source_of(array) for array in arrays]
    if any(source is None for source in sources):
        return xr.Variable(("run", *SPACE), da.stack([as_chunked(array, spatial) for array in arrays]))
    dims = range(4)
    shared = _shared([_Stored(source, spatial) for source in sources])
    inputs = [(shared, dims[:1]), (BlockIndex(tuple(len(sizes) for sizes in chunks)), dims)]
    name = f"mask-{tokenize([_content(one) for one, _ in inputs], chunks)}"
    return xr.Variable(("run", *SPACE), _blockwise(_block_of, name, dims, inputs, chunks, dtype=bool))


def _block_of(stored: _Stored, index: tuple[int, ...]) -> Array:
    """The block of an index (run, z, y, x), with length 1 along the run."""
    return stored.block(index[1:])[None]


def as_chunked(array: Any, chunks: tuple[tuple[int, ...], ...]) -> Any:
    """Make a dask array with the given chunks along its last axes."""
    array = da.asarray(array)
    first = array.ndim - len(chunks)
    return _rechunk(array, {first + axis: sizes for axis, sizes in enumerate(chunks)})


def _rechunk(array: Any, chunks: dict[int, Any]) -> Any:
    """Change chunks by tasks. To choose between ways of doing that, dask would import all of distributed."""
    return array.rechunk(chunks, method="tasks")


class Writing(NamedTuple):
    """Lazy variables that are to be written.

    Attributes
    ----------
    variables : sequence of Variable
    writers : sequence of callable
        For each variable what writes a block, from the place where it starts and its values; must be picklable.
    is_written : callable
        From the number of a variable and the index of a block to whether it is written already. What only such blocks need is
        not computed.
    """

    variables: Sequence[xr.Variable]
    writers: Sequence[Callable[[tuple[int, ...], Array], None]]
    is_written: Callable[[int, tuple[int, ...]], bool]


class _Group:
    """What the tasks share that write variables with the same blocks: writers, and where blocks start along each dim."""

    def __init__(self, writers: Sequence[Any], starts: list[list[list[int]]], axes: list[list[int]]) -> None:
        self.writers, self.starts, self.axes = writers, starts, axes

    def write(self, index: tuple[int, ...], *blocks: Array) -> None:
        for write, starts, axes, block in zip(self.writers, self.starts, self.axes, blocks, strict=True):
            write(tuple(along[index[axis]] for along, axis in zip(starts, axes, strict=True)), block)


def _write(group: _Group, index: tuple[int, ...], *blocks: Array) -> None:
    group.write(index, *blocks)


def write_blocks(datasets: Sequence[Writing], *, progress: Callable[[int, int], None] | None = None) -> None:
    """Compute lazy variables and write them block by block, on the scheduler that dask is set to.

    One task writes all variables of a dataset that have the same blocks.

    Parameters
    ----------
    datasets : sequence of Writing
    progress : callable, optional
        Called with the number of blocks that are written, and of those that there are to write.
    """
    layers, keys = [], []
    for ds in datasets:
        groups: dict[Any, list[int]] = {}
        for number, variable in enumerate(ds.variables):
            divided = {dim: sizes for dim, sizes in variable.chunksizes.items() if len(sizes) > 1}
            groups.setdefault(frozenset(divided.items()), []).append(number)
        for members in groups.values():
            layer, found = _write_layer(ds, members)
            layers.append(layer)
            keys += found
    if keys:
        graph = HighLevelGraph.merge(*(layer.dask for layer in layers))
        run_tasks(graph, keys, progress=progress)


def _write_layer(ds: Writing, members: list[int]) -> tuple[Any, list[Any]]:
    """The tasks that write variables with the same blocks, as a dask array, and the keys of those that are to be done."""
    variables = [ds.variables[number] for number in members]
    n_blocks = {dim: len(sizes) for one in variables for dim, sizes in one.chunksizes.items()}
    dims = list(n_blocks)
    axes = [[dims.index(dim) for dim in one.dims] for one in variables]
    starts = [[np.cumsum((0, *sizes[:-1])).tolist() for sizes in one.data.chunks] for one in variables]
    # Unlike what is computed, what is written has no name of its own: the same arrays may be written in two places.
    token = uuid.uuid4().hex
    group = _shared([_Group([ds.writers[number] for number in members], starts, axes)], f"writers-{token}")
    letters = range(len(dims))
    extra = len(dims)
    inputs: list[tuple[Any, Sequence[int]]] = [
        (group, (extra,)),
        (BlockIndex(tuple(n_blocks.values())), letters),
        *((one.data, own) for one, own in zip(variables, axes, strict=True)),
    ]
    name = f"write-{token}"
    # The group is one block along a dim of its own.
    layer = _blockwise(
        _write, name, (*letters, extra), inputs, (*((1,) * n for n in n_blocks.values()), (1,))
    )
    todo = [
        (name, *index, 0)
        for index in np.ndindex(*n_blocks.values())
        if not all(
            ds.is_written(number, tuple(index[axis] for axis in own))
            for number, own in zip(members, axes, strict=True)
        )
    ]
    return layer, todo


def placeholder(shape: tuple[int, ...], dtype: np.dtype[Any] | type, chunks: Any = -1) -> Any:
    """A lazy array in the place of one that is made elsewhere; never to be computed."""
    return da.zeros(shape, dtype=dtype, chunks=chunks)


def blank(n_rows: int, n_runs: int, chunks: tuple[tuple[int, ...], ...]) -> Rows:
    """Rows with the dims run, z, y, x, in the place of what is computed elsewhere; never to be computed."""
    shape = n_runs, *(sum(sizes) for sizes in chunks)
    return Rows(placeholder(shape, float, ((1,) * n_runs, *chunks)), ("run", *SPACE), n_rows)


def compute(datasets: Sequence[xr.Dataset], *, here: bool = False) -> tuple[xr.Dataset, ...]:
    """Compute datasets together: what they share is computed once.

    ``here``: in this thread, as in a task that a scheduler runs already.
    """
    computed: tuple[xr.Dataset, ...] = _compute(*datasets, **({"scheduler": get_sync} if here else {}))
    return computed


def mean(rows: Rows) -> Any:
    """Average one row over all that is not NaN, lazily, as a dask array of no dimension; NaN if nothing is left."""
    return da.nanmean(take(rows, rows.dims, 0).data)


def mean_rows(rows: Rows) -> Array:
    """Average each row over all that is not NaN, at once; NaN for a row where nothing is left."""
    each = take(rows, ("row", *rows.dims), slice(0, rows.n_rows), sizes={"row": rows.n_rows}).data
    axes = tuple(range(1, each.ndim))
    total, count = da.compute(da.nansum(each, axis=axes), da.isfinite(each).sum(axis=axes))
    with np.errstate(invalid="ignore"):
        averages: Array = total / count
    return averages


def _recipe(graph: dict[Any, Any], key: Any) -> _Recipe:
    needed, _ = _cull(graph, [key])
    return _Recipe(dict(needed), key)


def _refuse_futures(array: Any) -> None:
    """Blocks that a cluster holds cannot be reached from inside a task."""
    for node in dict(array.__dask_graph__()).values():
        kind = type(node)
        if kind.__name__ == "Future" and kind.__module__.startswith("distributed"):
            raise NotAvailableError(
                "The signal or the mask was persisted on a cluster, and chunkglm reads blocks inside its tasks. Pass "
                "the dataset as it was before persist(), for example as open_run opened it."
            )


# -------------------------------------------------------------------------------------------------------- BLAS

_blas_lock = threading.Lock()
_blas_users = 0
_blas_limit: _SingleBlasThread | None = None


@cache
def _blas() -> Any:
    return ThreadpoolController().select(user_api="blas")


class _SingleBlasThread:
    """Hold BLAS at one thread, from a thread made for it.

    To threadpoolctl, a limit belongs to the thread that set it: from any other one it is, silently, not taken back.
    The task that ends last is seldom the one that began first.
    """

    def __init__(self) -> None:
        self._set, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, name="chunkglm-blas", daemon=True)
        self._thread.start()
        self._set.wait()

    def _hold(self) -> None:
        try:
            with _blas().limit(limits=1):
                self._set.set()
                self._over.wait()
        finally:
            self._set.set()

    def release(self) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Hold BLAS at one thread while any task runs.

    The tasks themselves fill the processors, and sums do not depend on how BLAS would have divided them. The
    limit is one for the whole process, so tasks share it: the first one sets it, the last one takes it back. A
    limit that the caller holds stays as it is.
    """
    global _blas_users, _blas_limit  # noqa: PLW0603  (it is the process's state)
    with _blas_lock:
        if _blas_limit is None:
            _blas_limit = _SingleBlasThread()
        _blas_users += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if _blas_users == 0:
                _blas_limit.release()
                _blas_limit = None
