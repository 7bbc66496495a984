"""Mapping over voxel blocks: what a task reads, holds and leaves alone."""

import gc
import pickle
import threading
import weakref

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from dask.callbacks import Callback
from threadpoolctl import threadpool_info, threadpool_limits

from chunkglm.blocks import as_blocks, as_chunked, map_rows, map_voxel_blocks, mean, single_blas_thread, stack
from chunkglm.errors import NotAvailableError
from chunkglm.testing import raise_if_computes

SPACE = ("z", "y", "x")


def signal(shape=(12, 4, 5, 6), chunks=(5, 2, 5, 3), seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return xr.DataArray(da.from_array(values, chunks=chunks), dims=("time", *SPACE)), values


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
    (optimized,) = dask.optimize(got)
    assert len(optimized.__dask_graph__()) == 4
    assert all(key[0].startswith("mean_and_length-") for key in optimized.__dask_graph__())


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


def from_source(source, chunks):
    meta = np.empty((0,) * len(source.shape))
    array = da.from_array(source, chunks=chunks, asarray=False, name=False, inline_array=True, meta=meta)
    return xr.DataArray(array, dims=("time", *SPACE))


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_task__holds_one_time_block_at_a_time(scheduler):
    from chunkglm.kernels.basis import make_basis
    from chunkglm.kernels.glm import Model, fit_voxels
    from chunkglm.kernels.sums import mean_voxels

    source = Source((40, 4, 5, 6))
    bold = from_source(source, (8, 2, 5, 6))
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
    bold = from_source(source, (6, 2, 5, 3))
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
    got = map_voxel_blocks(mean_and_length, from_source(source, (6, 2, 5, 3)), all_voxels(), 2)
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
    assert {key[1:] for key in seen if isinstance(key, tuple)} == {
        (0, i, 0, j) for i in range(2) for j in range(2)
    }
    assert len(seen) <= 5
    # Nor does a task that outlives a failed computation take the callbacks away.
    seen.clear()
    task = next(iter(dict(got.__dask_graph__()).values()))[0]
    with Callback(posttask=lambda *args: seen.append(args[0])):
        task()
    assert not seen


def test_as_blocks__memory_gets_the_chunks_of_a_store_and_dask_keeps_its_own():
    values = np.zeros((70, 20, 3, 4), np.int16)
    plain = xr.DataArray(values.T, dims=("x", "y", "z", "time"))
    got = as_blocks(plain)
    assert got.dims == ("time", *SPACE)
    assert got.chunks == ((32, 32, 6), (16, 4), (3,), (4,))
    own = plain.chunk({"time": (1, 69), "x": 3})
    assert as_blocks(own).chunks == ((1, 69), (20,), (3,), (3, 1))


# -------------------------------------------------------------------------------------------------------- rows


def add(a, b):
    return np.stack([a[0] + b[0], a[-1] * b[-1]])


def test_map_rows__blocks_that_do_not_match_are_made_to():
    rng = np.random.default_rng(3)
    a, b = rng.random((3, 5, 7)), rng.random((2, 5, 7))
    expected = add(a, b)
    np.testing.assert_array_equal(map_rows(add, a, b, n_rows=2), expected)
    for one, other in [
        (da.from_array(a, chunks=(1, 2, 7)), da.from_array(b, chunks=(2, 5, 3))),
        (da.from_array(a, chunks=(3, (1, 4), 2)), b),
        (a, da.from_array(b, chunks=(1, 4, 4))),
    ]:
        with raise_if_computes():
            got = map_rows(add, one, other, n_rows=2)
        assert got.shape == (2, 5, 7)
        assert got.numblocks[0] == 1
        np.testing.assert_array_equal(got.compute(), expected)


@pytest.mark.parametrize("order", [1, -1])
def test_map_rows__length_1_is_broadcast(order):
    rng = np.random.default_rng(4)
    a, b = rng.random((3, 5, 7)), rng.random((3, 1, 1))
    for one in (a, da.from_array(a, chunks=(1, 2, 7)), da.from_array(a, chunks=-1)):
        for other in (b, da.from_array(b, chunks=1)):
            got = map_rows(add, *(one, other)[::order], n_rows=2)
            assert got.shape == (2, 5, 7)
            if isinstance(got, da.Array):
                assert got[:, 4:].compute().shape == (2, 1, 7)
            np.testing.assert_array_equal(np.asarray(got), add(a, b))


def test_small_helpers():
    a = np.arange(6.0).reshape(2, 3)
    assert isinstance(stack([a, a]), np.ndarray)
    lazy = stack([a, da.from_array(a, chunks=1)])
    assert isinstance(lazy, da.Array)
    np.testing.assert_array_equal(lazy.compute(), [a, a])
    assert as_chunked(a, ((1, 2),)).chunks == ((2,), (1, 2))
    with raise_if_computes():
        average = mean(da.from_array(np.array([[1.0, np.nan], [4.0, 7.0]]), chunks=1))
    assert average.compute() == 4
    assert np.isnan(mean(da.full((2, 2), np.nan)).compute())


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
