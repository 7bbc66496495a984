"""Mapping kernels over voxel blocks. The only module that makes dask graphs.

The unit of work is a voxel block: one task takes the block's time blocks one after another, each computed inside
the task and dropped before the next, so that the decoded block of all time points never exists. It does not
matter where the signal comes from: what a task holds is the part of the signal's own graph that makes its blocks.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import dask.array
import dask.base
import numpy as np
from dask.base import optimize, tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.local import get_sync
from dask.optimization import cull
from threadpoolctl import ThreadpoolController

from chunkglm import plan
from chunkglm.errors import NotAvailableError
from chunkglm.schema import SPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import xarray as xr
    from numpy.typing import NDArray

    Array = NDArray[Any]

# dask annotates a part of what it exports.
da: Any = dask.array
_optimize: Any = optimize
_cull: Any = cull
_compute: Any = dask.base.compute
_compute_keys: Any = dask.base.compute_as_if_collection


class _Recipe(NamedTuple):
    """One block of a dask array: the tasks that make it, and the key of the last of them."""

    graph: dict[Any, Any]
    key: Any

    def make(self) -> Array:
        # A callback such as a progress bar counts the tasks of the computation around this one.
        return np.asarray(get_sync(self.graph, self.key, callbacks=()))


class _VoxelBlock:
    """The task that computes one voxel block: the function, and recipes of the mask and of the time blocks.

    A class of its own, and no tuple, so that dask does not look for tasks in what it holds.
    """

    def __init__(
        self,
        function: Callable[..., Array],
        arguments: tuple[Any, ...],
        n_rows: int,
        mask: _Recipe,
        signal: list[_Recipe],
    ) -> None:
        self.function = function
        self.arguments = arguments
        self.n_rows = n_rows
        self.mask = mask
        self.signal = signal

    def __call__(self, *computed: Any) -> Array:
        """Apply the function where the mask is, leave NaN elsewhere."""
        mask = self.mask.make()
        voxels = np.flatnonzero(mask)
        if not voxels.size:
            return nothing(self.n_rows, mask.shape)
        with single_blas_thread():
            return scatter(self.function(self.time_blocks(), voxels, *self.arguments, *computed), mask)

    def time_blocks(self) -> Iterator[Array]:
        for recipe in self.signal:
            yield recipe.make()


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


def map_voxel_blocks(
    function: Callable[..., Array],
    bold: xr.DataArray,
    mask: xr.DataArray,
    n_rows: int,
    *arguments: Any,
    computed: Sequence[Any] = (),
) -> Any:
    """Apply a function to the voxels of every voxel block, lazily.

    Parameters
    ----------
    function : callable
        ``function(time_blocks, voxels, *arguments, *computed)`` with an iterator of arrays (n, z, y, x), and the
        numbers of the block's voxels that are in the mask. It returns (n_rows, V) float64, and must be picklable.
    bold : DataArray, dims (time, z, y, x)
        From :func:`as_blocks`. Its spatial chunks are the voxel blocks, its time chunks the time blocks.
    mask : DataArray of bool, dims (z, y, x)
    n_rows : int
        Rows of the function's result.
    *arguments
        Further arguments.
    computed : sequence of dask arrays of no dimension
        Computed once, before all blocks, and passed as numbers.

    Returns
    -------
    dask array, shape (n_rows, z, y, x), float64
        NaN outside the mask. One task a voxel block; one without a voxel in the mask reads no signal.

    Raises
    ------
    NotAvailableError
        If the signal is held by a cluster.
    """
    spatial = bold.data.chunks[1:]
    mask_data = as_chunked(mask.transpose(*SPACE).data, spatial)
    for array in (bold.data, mask_data):
        _refuse_futures(array)
    signal, mask_data = _optimize(bold.data, mask_data)
    graphs = [dict(array.__dask_graph__()) for array in (signal, mask_data)]
    token = tokenize(
        function, bold.data.name, mask_data.name, n_rows, arguments, [one.name for one in computed]
    )
    name = f"{function.__name__.strip('_')}-{token}"
    layer: dict[Any, Any] = {}
    for index in np.ndindex(*(len(sizes) for sizes in spatial)):
        blocks = [_recipe(graphs[0], (signal.name, t, *index)) for t in range(signal.numblocks[0])]
        block = _VoxelBlock(function, arguments, n_rows, _recipe(graphs[1], (mask_data.name, *index)), blocks)
        layer[name, 0, *index] = (block, *((one.name,) for one in computed))
    graph = HighLevelGraph.from_collections(name, layer, dependencies=list(computed))
    return da.Array(graph, name, chunks=((n_rows,), *spatial), dtype=np.float64)


def map_rows(function: Callable[..., Array], *arrays: Any, n_rows: int) -> Any:
    """Apply a function block by block to arrays that differ in their first axis only.

    Parameters
    ----------
    function : callable
        From arrays ``(rows_i, ...)`` to one ``(n_rows, ...)``, float64.
    *arrays : numpy or dask arrays, shape (rows_i, ...)
        Of the same number of dimensions; behind the first axis equal in shape, or 1 to be broadcast by the
        function.
    n_rows : int
        Rows of the result.

    Returns
    -------
    dask array, shape (n_rows, ...), float64
        With the chunks of the first array that has any. A numpy array where all of ``arrays`` are.
    """
    if not any(isinstance(array, da.Array) for array in arrays):
        return function(*arrays)
    shape = np.broadcast_shapes(*(array.shape[1:] for array in arrays))
    chunks: dict[int, tuple[int, ...]] = {axis: (length,) for axis, length in enumerate(shape, start=1)}
    for array in reversed(arrays):
        if isinstance(array, da.Array):
            chunks |= {axis: array.chunks[axis] for axis in chunks if array.shape[axis] == shape[axis - 1]}
    # The first axis keeps its letter and changes its length: contracting it would keep blocks from being fused.
    index = tuple(range(len(shape) + 1))
    pairs: list[Any] = []
    for array in arrays:
        full = {axis: sizes for axis, sizes in chunks.items() if array.shape[axis] == shape[axis - 1]}
        pairs += [_rechunk(da.asarray(array), {0: -1, **full}), index]
    return da.blockwise(
        function,
        index,
        *pairs,
        adjust_chunks={0: n_rows, **chunks},
        align_arrays=False,
        dtype=np.float64,
        meta=np.empty((0,) * len(index)),
    )


def stack(arrays: list[Any]) -> Any:
    """Stack arrays along a new first axis; lazily if one of them is lazy."""
    return da.stack(arrays) if any(isinstance(array, da.Array) for array in arrays) else np.stack(arrays)


def as_chunked(array: Any, chunks: tuple[tuple[int, ...], ...]) -> Any:
    """Make a dask array with the given chunks along its last axes."""
    array = da.asarray(array)
    first = array.ndim - len(chunks)
    return _rechunk(array, {first + axis: sizes for axis, sizes in enumerate(chunks)})


def _rechunk(array: Any, chunks: dict[int, Any]) -> Any:
    """Change chunks by tasks. To choose between ways of doing that, dask would import all of distributed."""
    return array.rechunk(chunks, method="tasks")


class _WriteBlock:
    """The task that writes one block; a class of its own, so that dask does not look for tasks in it."""

    def __init__(self, write: Callable[[tuple[int, ...], Array], None], start: tuple[int, ...]) -> None:
        self.write, self.start = write, start

    def __call__(self, block: Array) -> None:
        self.write(self.start, block)


def write_blocks(
    arrays: Sequence[Any],
    writers: Sequence[Callable[[tuple[int, ...], Array], None]],
    is_written: Callable[[int, tuple[int, ...]], bool],
) -> None:
    """Compute dask arrays and write them block by block, on the scheduler that dask is set to.

    Parameters
    ----------
    arrays : sequence of dask arrays
    writers : sequence of callable
        For each array what writes a block, from the place where it starts and its values; must be picklable.
    is_written : callable
        From the number of an array and the index of a block to whether it is written already. What only such blocks need
        is not computed.
    """
    token = tokenize([array.name for array in arrays])
    layer: dict[Any, Any] = {}
    for number, (array, write) in enumerate(zip(arrays, writers, strict=True)):
        starts = [np.cumsum((0, *sizes[:-1])).tolist() for sizes in array.chunks]
        for index in np.ndindex(*array.numblocks):
            if not is_written(number, index):
                start = tuple(along[i] for along, i in zip(starts, index, strict=True))
                layer[f"write-{token}", number, *index] = (_WriteBlock(write, start), (array.name, *index))
    if layer:
        graph = HighLevelGraph.from_collections(f"write-{token}", layer, dependencies=list(arrays))
        _compute_keys(da.Array, graph, list(layer))


def blank(n_rows: int, chunks: tuple[tuple[int, ...], ...]) -> Any:
    """Rows (n_rows, z, y, x) of NaN, lazily, in the place of what will be computed elsewhere."""
    shape = n_rows, *(sum(sizes) for sizes in chunks)
    return da.full(shape, np.nan, chunks=((n_rows,), *chunks))


def compute(datasets: Sequence[xr.Dataset]) -> tuple[xr.Dataset, ...]:
    """Compute datasets together: what they share is computed once."""
    computed: tuple[xr.Dataset, ...] = _compute(*datasets)
    return computed


def mean(array: Any) -> Any:
    """Average a dask array over all that is not NaN, lazily; NaN if nothing is left."""
    return da.nanmean(array)


def mean_rows(rows: Any) -> Array:
    """Average each row of a dask array over all that is not NaN, at once; NaN for a row where nothing is left."""
    axes = tuple(range(1, rows.ndim))
    total, count = da.compute(da.nansum(rows, axis=axes), da.isfinite(rows).sum(axis=axes))
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
