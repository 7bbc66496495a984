"""Mapping over voxel blocks: what a task reads, holds and leaves alone."""

import gc
import pickle
import threading
import weakref
from functools import partial

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from dask._task_spec import Alias
from dask.callbacks import Callback
from dask.local import get_sync
from threadpoolctl import threadpool_info, threadpool_limits

from chunkglm import blocks as block_module
from chunkglm.blocks import (
    RunBlocks,
    as_blocks,
    as_chunked,
    from_source,
    map_rows,
    mean,
    single_blas_thread,
    take,
    task_bytes,
)
from chunkglm.errors import NotAvailableError
from chunkglm.testing import raise_if_computes

SPACE = ("z", "y", "x")


def signal(shape=(12, 4, 5, 6), chunks=(5, 2, 5, 3), seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return xr.DataArray(da.from_array(values, chunks=chunks), dims=("time", *SPACE)), values


def map_voxel_blocks(function, bold, mask, n_rows, *arguments, computed=()):
    """The rows of one run, as a dask array (n_rows, z, y, x)."""
    rows = block_module.map_voxel_blocks(function, [RunBlocks(bold, mask, arguments, computed)], n_rows)
    return take(rows, ("row", "run", *SPACE), slice(0, n_rows), sizes={"row": n_rows}).data[:, 0]


def all_voxels(shape=(4, 5, 6)):
    return xr.DataArray(np.ones(shape, bool), dims=SPACE)


def mean_and_length(blocks, voxels, factor=1.0, *computed):
    """Rows: mean over time, and number of volumes."""
    total, n = np.zeros(len(voxels)), 0
    for block in blocks:
        total += block.reshape(len(block), -1)[:, voxels].sum(axis=0)
        n += len(block)
    return np.stack([factor * total / n + sum(map(float, computed)), np.full(len(voxels), float(n))])


def test_map__applies_the_function_inside_the_mask():
    bold, values = signal()
    mask = np.random.default_rng(1).random((4, 5, 6)) < 0.4
    got = map_voxel_blocks(mean_and_length, bold, xr.DataArray(mask, dims=SPACE), 2, 3.0)
    assert got.chunks == ((2,), (2, 2), (5,), (3, 3))
    assert got.dtype == np.float64
    got = got.compute()
    np.testing.assert_allclose(got[0][mask], 3 * values.mean(axis=0)[mask])
    assert (got[1][mask] == 12).all()
    assert np.isnan(got[:, ~mask]).all()


def test_map__is_lazy_and_one_task_a_voxel_block():
    bold, _ = signal()
    with raise_if_computes():
        got = map_voxel_blocks(mean_and_length, bold, all_voxels(), 2)
    assert len([name for name in tasks_of(got) if name.startswith("mean_and_length-")]) == 4


def tasks_of(*arrays):
    """Names of the tasks that computing some arrays takes, without those that only stand for another."""
    graphs = [dict(one.__dask_graph__()) for one in dask.optimize(*arrays)]
    keys = {key for graph in graphs for key, task in graph.items() if not isinstance(task, Alias)}
    return [key[0] if isinstance(key, tuple) else key for key in keys]


def test_map__computed_arguments_come_as_numbers():
    bold, values = signal()
    ten = da.full((3,), 5.0).sum() - 5
    got = map_voxel_blocks(mean_and_length, bold, all_voxels(), 2, 1.0, computed=[ten, ten + 1])
    np.testing.assert_allclose(got[0], values.mean(axis=0) + 21)


def test_map__names_are_those_of_the_content():
    bold, _ = signal()
    name = map_voxel_blocks(mean_and_length, bold, all_voxels(), 2).name
    assert map_voxel_blocks(mean_and_length, bold, all_voxels(), 2).name == name
    mask = all_voxels()
    mask[0, 0, 0] = False
    others = [
        map_voxel_blocks(mean_and_length, signal(seed=1)[0], all_voxels(), 2),
        map_voxel_blocks(mean_and_length, bold, mask, 2),
        map_voxel_blocks(mean_and_length, bold, all_voxels(), 2, 2.0),
        map_voxel_blocks(mean_and_length, bold, all_voxels(), 2, computed=[da.ones(()).sum()]),
        map_voxel_blocks(mean_and_length, bold.chunk(time=3), all_voxels(), 2),
    ]
    assert len({name, *(other.name for other in others)}) == 6


class Source:
    """An array that makes its blocks on demand, and counts how many of them are alive."""

    def __init__(self, shape):
        self.shape, self.dtype, self.ndim = shape, np.dtype(np.float64), len(shape)
        self.alive, self.most, self.reads = {}, {}, []

    def __getitem__(self, index):
        block = np.full([s.stop - s.start for s in index], float(index[0].start))
        place = tuple(s.start for s in index[1:])
        self.reads.append(place)
        alive = self.alive.setdefault(place, weakref.WeakSet())
        alive.add(_Alive.of(block))
        self.most[place] = max(self.most.get(place, 0), len(alive))
        return block


class _Alive:
    """Lives as long as an array."""

    def __init__(self):
        self.__weakref = None

    @classmethod
    def of(cls, array):
        token = cls()
        weakref.finalize(array, lambda _: None, token)
        return token


def from_any(source, chunks):
    meta = np.empty((0,) * len(source.shape))
    array = da.from_array(source, chunks=chunks, asarray=False, name=False, inline_array=True, meta=meta)
    return xr.DataArray(array, dims=("time", *SPACE))


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_task__holds_one_time_block_at_a_time(scheduler):
    from chunkglm.kernels.basis import make_basis
    from chunkglm.kernels.glm import Model, fit_voxels
    from chunkglm.kernels.sums import mean_voxels

    source = Source((40, 4, 5, 6))
    bold = from_any(source, (8, 2, 5, 6))
    X = np.column_stack([np.sin(np.arange(40.0)), np.ones(40)])
    of = Model(make_basis(X), 38, "voxel", False)

    def estimate(blocks, voxels):
        return fit_voxels(blocks, voxels, of).beta

    def average(blocks, voxels):
        return mean_voxels(blocks, voxels, np.ones(40, dtype=bool), finite=False)

    gc.disable()
    try:
        for function, rows in ((mean_and_length, 2), (estimate, 2), (average, 1)):
            source.most.clear(), source.reads.clear()
            map_voxel_blocks(function, bold, all_voxels(), rows).compute(scheduler=scheduler)
            assert len(source.reads) == 10
            assert set(source.most) == {(0, 0, 0), (2, 0, 0)}
            # The loop of this file's own function still names a block while the next is made.
            assert set(source.most.values()) == {2 if function is mean_and_length else 1}
    finally:
        gc.enable()


def test_task__reads_nothing_where_the_mask_is_empty():
    source = Source((12, 4, 5, 6))
    bold = from_any(source, (6, 2, 5, 3))
    mask = all_voxels()
    mask[:2] = False
    mask[:, :, 3:] = False
    map_voxel_blocks(mean_and_length, bold, mask, 2).compute(scheduler="sync")
    assert source.reads == [(2, 0, 0)] * 2
    mask[:] = False
    source.reads.clear()
    assert np.isnan(map_voxel_blocks(mean_and_length, bold, mask, 2).compute()).all()
    assert not source.reads


def test_task__computing_some_voxels_reads_only_their_blocks():
    source = Source((12, 4, 5, 6))
    got = map_voxel_blocks(mean_and_length, from_any(source, (6, 2, 5, 3)), all_voxels(), 2)
    got[:, 0, 0, 0].compute(scheduler="sync")
    assert source.reads == [(0, 0, 0)] * 2


def test_map__mask_may_be_lazy_and_chunked_otherwise():
    bold, values = signal()
    mask = np.random.default_rng(2).random((4, 5, 6)) < 0.5
    lazy = xr.DataArray(da.from_array(mask.transpose(2, 0, 1), chunks=(1, 3, 2)), dims=("x", "z", "y"))
    got = map_voxel_blocks(mean_and_length, bold, lazy, 2).compute()
    np.testing.assert_allclose(got[0], np.where(mask, values.mean(axis=0), np.nan))


def test_map__takes_signals_with_a_graph_of_their_own():
    bold, values = signal()
    changed = ((bold.rename(x="u").rename(u="x") * 2).astype("f4") + 1).isel(
        time=slice(1, None), x=slice(None, None, 2)
    )
    got = map_voxel_blocks(mean_and_length, as_blocks(changed), all_voxels((4, 5, 3)), 2)
    np.testing.assert_allclose(got[0], 2 * values[1:, :, :, ::2].mean(axis=0) + 1, rtol=1e-5)


def test_map__results_and_tasks_are_picklable():
    bold, values = signal()
    got = pickle.loads(pickle.dumps(map_voxel_blocks(mean_and_length, bold, all_voxels(), 2)))
    np.testing.assert_allclose(got[0].compute(scheduler="sync"), values.mean(axis=0))


def test_map__errors_of_a_source_are_its_own():
    def broken(block):
        raise OSError("the disk is gone")

    bold, _ = signal()
    lazy = bold.copy(data=bold.data.map_blocks(broken, dtype=float, meta=np.empty((0,) * 4)))
    got = map_voxel_blocks(mean_and_length, lazy, all_voxels(), 2)
    with pytest.raises(OSError, match="the disk is gone"):
        got.compute(scheduler="sync")


def test_map__callbacks_count_tasks_not_what_they_read():
    seen = []
    bold, _ = signal()
    got = map_voxel_blocks(mean_and_length, bold, all_voxels(), 2)
    with Callback(posttask=lambda *args: seen.append(args[0])):
        got.compute(scheduler="threads")
        assert len(Callback.active) == 1
    read = [
        key
        for key in seen
        if not str(key).startswith(("('mean_and_length-", "('take-", "('getitem-", "finalize-", "('shared-"))
    ]
    assert not read
    assert len([key for key in seen if str(key).startswith("('mean_and_length-")]) == 4


def test_as_blocks__memory_gets_the_chunks_of_a_store_and_dask_keeps_its_own():
    values = np.zeros((70, 20, 3, 4), np.int16)
    plain = xr.DataArray(values.T, dims=("x", "y", "z", "time"))
    got = as_blocks(plain)
    assert got.dims == ("time", *SPACE)
    assert got.chunks == ((32, 32, 6), (16, 4), (3,), (4,))
    own = plain.chunk({"time": (1, 69), "x": 3})
    assert as_blocks(own).chunks == ((1, 69), (20,), (3,), (3, 1))


def test_map__of_stored_arrays_lays_nothing_out_and_gives_the_same():
    _, values = signal((12, 4, 5, 6), seed=3)
    mask = np.random.default_rng(2).random((4, 5, 6)) < 0.5
    bold = xr.DataArray(from_source(Stored(values, (5, 2, 5, 3)), "bold-1"), dims=("time", *SPACE))
    inside = xr.DataArray(from_source(Stored(mask, (4, 5, 6)), "mask-1"), dims=SPACE)
    plain = xr.DataArray(da.from_array(values, chunks=(5, 2, 5, 3)), dims=("time", *SPACE))
    for masked in (inside, xr.DataArray(mask, dims=SPACE)):
        rows = block_module.map_voxel_blocks(mean_and_length, [RunBlocks(bold, masked, (2.0,))], 2)
        assert not any(layer.is_materialized() and len(layer) > 1 for layer in rows.data.dask.layers.values())
        got = take(rows, ("run", "row", *SPACE), slice(0, 2), sizes={"row": 2}).data[0]
        np.testing.assert_array_equal(
            got, map_voxel_blocks(mean_and_length, plain, xr.DataArray(mask, dims=SPACE), 2, 2.0)
        )
    # What was brought into memory is not read again.
    held = xr.DataArray(bold.data.persist(scheduler="sync"), dims=bold.dims)
    assert block_module._source_of(held.data) is None
    assert block_module._source_of((bold * 1).data) is None


class Stored:
    """An array with chunks, as in a store."""

    def __init__(self, values, chunks):
        self.values, self.shape, self.dtype, self.ndim, self.chunks = (
            values,
            values.shape,
            values.dtype,
            values.ndim,
            chunks,
        )

    def __getitem__(self, index):
        return self.values[index]


def test_map__runs_in_other_blocks_keep_their_own():
    bold, values = signal(seed=1)
    other, others = signal(chunks=(3, 1, 2, 6), seed=2)
    runs = [RunBlocks(bold, all_voxels()), RunBlocks(other, all_voxels())]
    rows = block_module.map_voxel_blocks(mean_and_length, runs, 2)
    got = take(rows, ("run", *SPACE), 0)
    assert got.chunks == ((1, 1), (2, 2), (5,), (3, 3))
    for number, one in enumerate((bold, other)):
        alone = map_voxel_blocks(mean_and_length, one, all_voxels(), 2)[0]
        np.testing.assert_array_equal(got[number], alone.compute())
    np.testing.assert_allclose(got, [values.mean(axis=0), others.mean(axis=0)])


def test_task_bytes__is_that_of_the_largest_task():
    bold, _ = signal()
    rows = block_module.map_voxel_blocks(
        mean_and_length, [RunBlocks(bold, all_voxels(), task_bytes=n) for n in (5, 7)], 2
    )
    assert task_bytes([(take(rows, ("run", *SPACE), 0).data + 1)[:1], da.ones(3)]) == 7
    assert task_bytes([da.ones(3)]) == 0


# -------------------------------------------------------------------------------------------------------- rows


def add(a, b):
    """Rows: sum and product; without the first axis, over which both are summed."""
    a, b = a.sum(axis=0), b.sum(axis=0)
    return np.stack([a + b, a * b])


@pytest.mark.parametrize(
    ("chunks", "others"),
    [
        (None, None),
        ((3, 2, 7), (2, 5, 3)),
        ((1, 2, 7), None),
        (None, (1, 4, 4)),
        ((3, (1, 4), 2), (2, 1, 1)),
        ((2, 5, 2), (1, 5, 7)),
    ],
)
def test_map_rows__any_chunks_give_the_same(chunks, others):
    rng = np.random.default_rng(3)
    a, b = rng.random((3, 5, 7)), rng.random((7, 5, 3))
    expected = add(a, b.T)
    one, other = xr.Variable(("k", "y", "x"), a), xr.Variable(("x", "y", "k"), b)
    if chunks is not None:
        one = one.chunk(dict(zip(("k", "y", "x"), chunks, strict=True)))
    if others is not None:
        other = other.chunk(dict(zip(("k", "y", "x"), (3, *others[1:]), strict=True)))
    with raise_if_computes():
        rows = map_rows(add, [one, other], ("y", "x"), n_rows=2, whole=("k",))
    total, product = take(rows, ("y", "x"), 0), take(rows, ("x", "y"), 1)
    np.testing.assert_allclose(total, expected[0], rtol=1e-14)
    np.testing.assert_allclose(product, expected[1].T, rtol=1e-14)
    assert (total.chunks is None) == (chunks is None and others is None)


def test_map_rows__what_is_combined_some_voxels_at_a_time_is_the_same(monkeypatch):
    rng = np.random.default_rng(7)
    a, b = rng.random((6, 9, 4)), rng.random(6)
    one, other = xr.Variable(("run", "y", "x"), a).chunk(run=1, y=5), xr.Variable("run", b)
    sizes = set()

    def weigh(block, number):
        sizes.add(block.shape)
        return np.stack([(block * number).sum(axis=0), block.max(axis=0)])

    for n_bytes, largest in ((2**20, 5), (6 * 8 * 4 * 3, 2), (1, 1)):
        sizes.clear()
        monkeypatch.setattr(block_module.plan, "COMBINED_BYTES", n_bytes)
        rows = map_rows(weigh, [one, other], ("y", "x"), n_rows=2, whole=("run",))
        np.testing.assert_allclose(take(rows, ("y", "x"), 0), (a * b[:, None, None]).sum(axis=0))
        np.testing.assert_array_equal(take(rows, ("x", "y"), 1), a.max(axis=0).T)
        assert max(shape[1] for shape in sizes) == largest
    total = map_rows(
        lambda block: block.sum(axis=0, keepdims=True), [other.chunk(run=2)], (), n_rows=1, whole=("run",)
    )
    np.testing.assert_allclose(take(total, (), 0), b.sum())


def test_map_rows__what_a_variable_lacks_has_length_1_and_each_label_may_have_a_function_of_its_own():
    rng = np.random.default_rng(4)
    a, b = rng.random((3, 5, 7)), rng.random(3)
    shapes = set()

    def times(factor, block, number):
        shapes.add((block.shape, number.shape))
        return np.broadcast_to(factor * block * number, block.shape)[None]

    kernels = [partial(times, factor) for factor in (1.0, 10.0, 100.0)]
    one, other = xr.Variable(("run", "y", "x"), a), xr.Variable("run", b)
    expected = a * b[:, None, None] * np.array([1.0, 10.0, 100.0])[:, None, None]
    for given in (one, one.chunk(run=2, y=2)):
        rows = map_rows(kernels, [given, other], ("run", "y", "x"), n_rows=1)
        np.testing.assert_allclose(take(rows, ("run", "y", "x"), 0), expected)
    assert shapes == {((1, 5, 7), (1, 1, 1)), ((1, 2, 7), (1, 1, 1)), ((1, 1, 7), (1, 1, 1))}


@pytest.mark.parametrize("lazy", [False, True])
def test_take__spreads_rows_over_new_dims(lazy):
    values = np.random.default_rng(5).random((12, 4, 6))
    given = xr.Variable(("k", "y", "x"), values)
    rows = map_rows(
        lambda block: block,
        [given.chunk(k=12, y=3, x=2) if lazy else given],
        ("y", "x"),
        n_rows=12,
        whole=("k",),
    )
    np.testing.assert_array_equal(take(rows, ("x", "y"), 3), values[3].T)
    got = take(rows, ("a", "y", "b", "x"), slice(4, 10), sizes={"a": 3, "b": 2})
    np.testing.assert_array_equal(got, values[4:10].reshape(3, 2, 4, 6).transpose(0, 2, 1, 3))
    got = take(rows, ("y", "each", "x"), 1, along=("each", 3, 4))
    np.testing.assert_array_equal(got, values[1::4].transpose(1, 0, 2))
    got = take(rows, ("each", "a", "y", "x"), slice(0, 2), sizes={"a": 2}, along=("each", 3, 4))
    np.testing.assert_array_equal(got, values.reshape(3, 4, 4, 6)[:, :2])
    flags = take(
        map_rows(
            lambda block: np.where(block > 0.5, 1, np.nan), [given], ("y", "x"), n_rows=12, whole=("k",)
        ),
        ("y", "x"),
        0,
        dtype=bool,
    )
    assert flags.dtype == bool
    np.testing.assert_array_equal(flags, values[0] > 0.5)


def test_take__a_map_does_not_keep_the_rows_that_it_was_made_of():
    values = xr.Variable(("k", "y", "x"), np.random.default_rng(5).random((12, 4, 6))).chunk(k=12, y=4, x=6)
    rows = map_rows(lambda block: block + 1, [values], ("y", "x"), n_rows=12, whole=("k",))
    for taken in (
        take(rows, ("y", "x"), 3),
        take(rows, ("a", "y", "x"), slice(2, 5), sizes={"a": 3}),
        take(rows, ("each", "y", "x"), 1, along=("each", 2, 6)),
    ):
        found = held = get_sync(taken.data.__dask_graph__(), (taken.data.name, *(0,) * taken.ndim))
        while held.base is not None:
            held = held.base
        assert held.nbytes == found.nbytes


def test_small_helpers():
    assert as_chunked(np.arange(6.0).reshape(2, 3), ((1, 2),)).chunks == ((2,), (1, 2))
    values = xr.Variable(("k", "x"), np.array([[1.0, np.nan], [4.0, 7.0]])).chunk(x=1)
    rows = map_rows(
        lambda block: block.reshape(1, -1, block.shape[-1]).sum(axis=1),
        [values[:1]],
        ("x",),
        n_rows=1,
        whole=("k",),
    )
    with raise_if_computes():
        average = mean(rows)
    assert average.compute() == 1
    nothing = map_rows(lambda block: block * np.nan, [values[:1]], ("x",), n_rows=1, whole=("k",))
    assert np.isnan(mean(nothing).compute())


# -------------------------------------------------------------------------------------------------------- BLAS


def blas_threads():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture
def two_blas_threads():
    """BLAS at two threads, whatever the machine has, and no one in control of it."""

    def set_to(number):
        thread = threading.Thread(target=threadpool_limits, args=(number, "blas"))
        thread.start()
        thread.join()

    before = max(blas_threads())
    set_to(2)
    yield
    set_to(before)


def test_single_blas_thread__is_shared_and_given_back(two_blas_threads):
    inside, leave = threading.Barrier(4), threading.Event()
    seen = []

    def work(waits):
        with single_blas_thread():
            inside.wait(5)
            seen.append(blas_threads())
            if waits:
                leave.wait(5)
            seen.append(blas_threads())

    assert blas_threads() == {2}
    for first_leaves in (True, False):
        seen.clear(), leave.clear()
        # Whether the one that set the limit leaves first or last.
        threads = [threading.Thread(target=work, args=((number > 0) == first_leaves,)) for number in range(3)]
        for thread in threads:
            thread.start()
        inside.wait(5)
        for thread in threads:
            thread.join(0.05)
        assert blas_threads() == {1}
        leave.set()
        for thread in threads:
            thread.join(5)
        assert seen == [{1}] * 6
        assert blas_threads() == {2}
    with threadpool_limits(1, user_api="blas"):
        assert blas_threads() == {1}
    assert blas_threads() == {2}


def test_single_blas_thread__nests_survives_errors_and_leaves_a_callers_limit(two_blas_threads):
    with single_blas_thread():
        with single_blas_thread():
            assert blas_threads() == {1}
        assert blas_threads() == {1}
    with pytest.raises(KeyError), single_blas_thread():
        raise KeyError
    assert blas_threads() == {2}
    with threadpool_limits(1, user_api="blas"):
        with single_blas_thread():
            assert blas_threads() == {1}
        assert blas_threads() == {1}
    assert blas_threads() == {2}


def test_tasks__run_with_a_single_blas_thread(two_blas_threads):
    seen = []

    def look(blocks, voxels):
        seen.append(blas_threads())
        return mean_and_length(blocks, voxels)

    map_voxel_blocks(look, signal()[0], all_voxels(), 2).compute(scheduler="threads", num_workers=4)
    assert seen == [{1}] * 4
    assert blas_threads() == {2}


def test_map__futures_of_a_cluster_are_refused(cluster):
    bold, _ = signal()
    mask = all_voxels().chunk(z=2)
    for one, other in ((bold.persist() * 2, mask), (bold, mask.persist())):
        with pytest.raises(NotAvailableError, match="before persist"):
            map_voxel_blocks(mean_and_length, one, other, 2)
