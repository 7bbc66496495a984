"""Mapping kernels over voxel blocks. The only module that makes dask graphs.

The unit of work is a voxel block: one task takes the block's time blocks one after another, each computed inside the task
and dropped before the next, so that the decoded block of all time points never exists. It does not matter where the
signal comes from: what a task holds is the part of the signal's own graph that makes its blocks.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import dask
import dask.array as da
import numpy as np
from dask.highlevelgraph import HighLevelGraph
from dask.local import get_sync
from dask.optimization import cull
from threadpoolctl import ThreadpoolController

from chunkglm import plan
from chunkglm.errors import NotAvailableError
from chunkglm.schema import SPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import xarray as xr
    from numpy.typing import NDArray

    Array = NDArray[Any]


class _Recipe(NamedTuple):
    """One block of a dask array: the tasks that make it, and the key of the last of them."""

    graph: dict[Any, Any]
    key: Any

    def make(self) -> Array:
        return np.asarray(get_sync(self.graph, self.key))


class _VoxelBlock:
    """Recipes of the mask and of the time blocks of one voxel block.

    A class of its own, and no tuple, so that dask does not look for tasks in it.
    """

    def __init__(self, mask: _Recipe, signal: list[_Recipe]) -> None:
        self.mask = mask
        self.signal = signal

    def time_blocks(self) -> Iterator[Array]:
        for recipe in self.signal:
            yield recipe.make()


def as_blocks(bold: xr.DataArray) -> xr.DataArray:
    """The signal as a dask array with dims ``(time, z, y, x)``; of one that is in memory, with the chunks of a store."""
    bold = bold.transpose("time", *SPACE)
    if bold.chunks is None:
        chunks = plan.bold_chunks(tuple(bold.shape), bold.dtype.itemsize)  # type: ignore[arg-type]
        bold = bold.chunk(dict(zip(bold.dims, chunks, strict=True)))
    return bold


def map_voxel_blocks(
    function: Callable[..., Array], bold: xr.DataArray, mask: xr.DataArray, n_rows: int, *arguments: Any
) -> da.Array:
    """Apply a function to the voxels of every voxel block, lazily.

    Parameters
    ----------
    function : callable
        ``function(time_blocks, voxels, *arguments)`` with an iterator of arrays (n, z, y, x), and the numbers of the block's
        voxels that are in the mask. It returns (n_rows, V) float64, and must be picklable.
    bold : DataArray, dims (time, z, y, x)
        From :func:`as_blocks`. Its spatial chunks are the voxel blocks, its time chunks the time blocks.
    mask : DataArray of bool, dims (z, y, x)
    n_rows : int
        Rows of the function's result.
    *arguments
        Further arguments; dask arrays of no dimension are computed first and passed as numbers.

    Returns
    -------
    dask array, shape (n_rows, z, y, x), float64
        NaN outside the mask. One task a voxel block.

    Raises
    ------
    NotAvailableError
        If the signal is held by a cluster.
    """
    spatial = bold.data.chunks[1:]
    mask_data = da.asarray(mask.transpose(*SPACE).data).rechunk(spatial)
    signal, mask_data = dask.optimize(bold.data, mask_data)
    graphs = [dict(array.__dask_graph__()) for array in (signal, mask_data)]
    _refuse_futures(graphs[0])
    token = dask.base.tokenize(function, bold.data.name, mask_data.name, n_rows, arguments)
    name = f"{function.__name__}-{token}"
    lazy = [argument for argument in arguments if isinstance(argument, da.Array)]
    passed = [(argument.name,) if isinstance(argument, da.Array) else argument for argument in arguments]
    layer = {}
    for index in np.ndindex(*(len(sizes) for sizes in spatial)):
        blocks = [_recipe(graphs[0], (signal.name, t, *index)) for t in range(signal.numblocks[0])]
        block = _VoxelBlock(_recipe(graphs[1], (mask_data.name, *index)), blocks)
        layer[name, 0, *index] = (_run, function, block, n_rows, *passed)
    graph = HighLevelGraph.from_collections(name, layer, dependencies=lazy)
    return da.Array(graph, name, chunks=((n_rows,), *spatial), dtype=np.float64)


def map_rows(function: Callable[..., Array], *arrays: Any, n_rows: int) -> Any:
    """Apply a function block by block to arrays that differ in their first axis only.

    Parameters
    ----------
    function : callable
        From arrays ``(rows_i, ...)`` to one ``(n_rows, ...)``, float64.
    *arrays : numpy or dask arrays, shape (rows_i, ...)
        Equal in shape behind the first axis.
    n_rows : int
        Rows of the result.

    Returns
    -------
    dask array, shape (n_rows, ...), float64
        A numpy array where all of ``arrays`` are.
    """
    if not any(isinstance(array, da.Array) for array in arrays):
        return function(*arrays)
    lazy = next(array for array in arrays if isinstance(array, da.Array))
    chunks = dict(enumerate(lazy.chunks[1:], start=1))
    # The first axis keeps its letter and changes its length: contracting it would keep blocks from being fused.
    index = tuple(range(lazy.ndim))
    pairs: list[Any] = []
    for array in arrays:
        pairs += [da.asarray(array).rechunk({0: -1, **chunks}), index]
    return da.blockwise(
        function, index, *pairs, adjust_chunks={0: n_rows}, align_arrays=False, dtype=np.float64, meta=np.empty((0,) * lazy.ndim)
    )


def stack(arrays: list[Any]) -> Any:
    """Stack arrays along a new first axis; lazily if one of them is lazy."""
    return da.stack(arrays) if any(isinstance(array, da.Array) for array in arrays) else np.stack(arrays)


def _recipe(graph: dict[Any, Any], key: Any) -> _Recipe:
    needed, _ = cull(graph, [key])
    return _Recipe(dict(needed), key)


def _run(function: Callable[..., Array], block: _VoxelBlock, n_rows: int, *arguments: Any) -> Array:
    """The task: apply the function where the mask is, leave NaN elsewhere."""
    mask = block.mask.make()
    out = np.full((n_rows, *mask.shape), np.nan)
    voxels = np.flatnonzero(mask)
    if voxels.size:
        with single_blas_thread():
            out.reshape(n_rows, -1)[:, voxels] = function(block.time_blocks(), voxels, *arguments)
    return out


def _refuse_futures(graph: dict[Any, Any]) -> None:
    """Blocks that a cluster holds cannot be reached from inside a task."""
    for node in graph.values():
        kind = type(getattr(node, "value", node))
        if kind.__name__ == "Future" and kind.__module__.startswith("distributed"):
            raise NotAvailableError(
                "The signal was persisted on a cluster, and chunkglm reads blocks inside its tasks. Pass the dataset as it was "
                "before persist(), for example as open_run opened it."
            )


# -------------------------------------------------------------------------------------------------------------- BLAS

_blas_lock = threading.Lock()
_blas_users = 0
_blas_limit: Any = None


@cache
def _blas() -> Any:
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Hold BLAS at one thread while any task runs: the tasks themselves fill the processors.

    The limit is one for the whole process, so tasks share it: the first one sets it, the last one takes it back.
    """
    global _blas_users, _blas_limit  # noqa: PLW0603  (it is the process's state)
    with _blas_lock:
        if _blas_users == 0:
            _blas_limit = _blas().limit(limits=1)
        _blas_users += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if _blas_users == 0:
                _blas_limit.restore_original_limits()
