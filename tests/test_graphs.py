"""Graphs that scale: how many tasks there are, what is laid out before them, and what is computed at a time."""

import pickle
import time
from collections import Counter

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from dask._task_spec import Alias
from dask.callbacks import Callback

import chunkglm as cg
from chunkglm import blocks
from chunkglm.store import saving

SPACE = ("z", "y", "x")
N_VOLUMES, SIDE = 40, 4


class Stored:
    """An array as a store has them, which is made when it is asked for."""

    def __init__(self, key, shape, dtype, chunks):
        self.key, self.shape, self.dtype, self.ndim, self.chunks = (
            key,
            shape,
            np.dtype(dtype),
            len(shape),
            chunks,
        )

    def __dask_tokenize__(self):
        return self.key

    def __getitem__(self, index):
        seed = [self.key, *(part.start for part in index)]
        values = np.random.default_rng(seed).random([part.stop - part.start for part in index])
        return (values > -1 if self.dtype == bool else 100 + values).astype(self.dtype)


def study(n_runs, n_blocks, key=0):
    """Runs with so many voxel blocks, and their designs."""
    runs, designs = {}, {}
    for number in range(n_runs):
        bold = Stored(
            2 * number + 100 * key, (N_VOLUMES, n_blocks, SIDE, SIDE), np.float32, (20, 1, SIDE, SIDE)
        )
        mask = Stored(2 * number + 1 + 100 * key, (n_blocks, SIDE, SIDE), bool, (n_blocks, SIDE, SIDE))
        arrays = {
            name: (dims, blocks.from_source(one, f"{name}-{one.key}"))
            for name, dims, one in (("bold", ("time", *SPACE), bold), ("mask", SPACE, mask))
        }
        runs[f"run-{number + 1}"] = xr.Dataset(arrays)
        X = np.random.default_rng(number).standard_normal((N_VOLUMES, 4))
        X[:, -1] = 1
        designs[f"run-{number + 1}"] = pd.DataFrame(X, columns=["face", "house", "drift", "constant"])
    return runs, designs


def maps_of(n_runs, n_blocks, key=0):
    fit = cg.fit(*study(n_runs, n_blocks, key))
    contrasts = cg.contrast(fit, "face - house")
    return fit, contrasts, cg.fixed_effects(contrasts)


def n_tasks(graph):
    """Number of tasks, without names that only stand for another."""
    return sum(not isinstance(task, Alias) for task in dict(graph).values())


def optimized(*arrays):
    keys = [key for array in arrays for key in da.core.flatten(array.__dask_keys__())]
    merged = blocks.HighLevelGraph.merge(*(array.dask for array in arrays))
    return da.Array.__dask_optimize__(merged, keys)


@pytest.fixture
def computed(monkeypatch):
    """The graphs that are computed from here on, and the tasks asked for."""
    graphs = []
    run = blocks.run_tasks

    def run_tasks(graph, keys, **options):
        graphs.append((da.Array.__dask_optimize__(graph, list(keys)), list(keys)))
        run(graph, keys, **options)

    monkeypatch.setattr(blocks, "run_tasks", run_tasks)
    return graphs


@pytest.mark.parametrize("n_runs", [1, 2, 4])
def test_from_store_to_maps__in_at_most_three_tasks_a_voxel_block_and_run(n_runs, computed, tmp_path):
    n_blocks = 12
    fit, contrasts, fixed = maps_of(n_runs, n_blocks)
    n = n_runs * n_blocks
    # Beside them, what all blocks of a run share is there once.
    shared = 2 * n_runs + 1
    # A map in memory.
    assert n_tasks(optimized(fixed["z_score"].data)) <= n + n_blocks + shared
    # All maps, the statistics of every run, or the fit into a store.
    for number, (ds, most) in enumerate([(fixed, n + n_blocks), (contrasts, 2 * n), (fit, n)]):
        cg.save(ds, tmp_path / str(number))
        graph, keys = computed.pop()
        assert len(keys) == (n_blocks if ds is fixed else n)
        assert n_tasks(graph) <= most + shared
    # All of them, in memory: seven arrays have seven keys for each block.
    arrays = [one.data for one in fixed.variables.values() if one.chunks is not None]
    assert len(arrays) == 7
    assert n_tasks(optimized(*arrays)) <= n + 9 * n_blocks + shared


# Of F the statistic is made in a task of its own, as the rows are taken away.
@pytest.mark.parametrize(("definition", "more"), [("face - house", 0), (["face", "house"], 2)])
def test_what_is_there_of_a_block_does_not_grow_with_the_number_of_runs(definition, more):
    """Runs are combined some at a time: of the others neither estimates nor signal are in memory."""
    n_blocks = 3

    class Held(Callback):
        most = 0

        def _posttask(self, *given):
            state = given[3]
            now = sum(one.nbytes for one in arrays_of(list(state["cache"].values())))
            Held.most = max(Held.most, now)

    def arrays_of(value):
        if isinstance(value, np.ndarray):
            return [value]
        return [one for part in value for one in arrays_of(part)] if isinstance(value, list | tuple) else []

    most, tasks = {}, {}
    for n_runs in (8, 40):
        fixed = cg.fixed_effects(cg.contrast(cg.fit(*study(n_runs, n_blocks)), definition))
        Held.most = 0
        with Held():
            fixed["z_score"].data.compute(scheduler="sync")
        most[n_runs] = Held.most
        tasks[n_runs] = n_tasks(optimized(fixed["z_score"].data)) - 2 * n_runs - 1
    # Beside what waits, the sums over the runs before, and the blocks of the finished map.
    assert most[40] < 1.6 * most[8]
    assert tasks[8] <= (8 + 1 + more) * n_blocks
    assert tasks[40] <= (40 + 5 + 1 + more) * n_blocks


def test_from_a_stored_fit_to_maps__one_task_a_voxel_block_and_run(computed, tmp_path):
    fit = cg.save(maps_of(2, 5)[0], tmp_path / "fit")
    computed.clear()
    cg.save(cg.fixed_effects(cg.contrast(fit, {"a": "face", "b": "house - face"})), tmp_path / "fixed")
    ((graph, keys),) = computed
    names = Counter(
        str(key[0] if isinstance(key, tuple) else key).split("-")[0]
        for key, task in graph.items()
        if not isinstance(task, Alias)
    )
    assert len(keys) == 2 * 5
    assert names["write"] == 10
    # Both contrasts of a block and run are solved in one task; what is read for it is read in it.
    assert sum(names.values()) <= 2 * 5 * (1 + 2) + 10 + 2 * 3


def test_a_hundred_thousand_voxel_blocks_are_planned_without_laying_them_out():
    small, large = 10, 50_000
    sizes, seconds = {}, {}
    for n_blocks in (small, large):
        runs, designs = study(2, n_blocks)
        started = time.perf_counter()
        fit = cg.fit(runs, designs)
        contrasts = cg.contrast(fit, "face")
        fixed = cg.fixed_effects(contrasts)
        seconds[n_blocks] = time.perf_counter() - started
        layers = [
            layer
            for ds in (fit, contrasts, fixed)
            for one in ds.variables.values()
            if one.chunks is not None
            for name, layer in one.data.dask.layers.items()
        ]
        # What is in memory already are the things that blocks share.
        sizes[n_blocks] = sum(len(layer) for layer in layers if layer.is_materialized())
    assert sizes[large] == sizes[small]
    assert seconds[large] < 10 * seconds[small] + 5


def test_a_task_holds_no_design_and_no_manifest(tmp_path):
    """What is sent with every block does not grow with the design, the run or the store."""
    _, _, fixed = maps_of(2, 6)
    graph = optimized(fixed["z_score"].data)
    largest = max(
        len(pickle.dumps(task)) for key, task in graph.items() if not str(key[0]).startswith("shared-")
    )
    assert largest < 12_000
    runs, _ = study(1, 6)
    many = cg.save(runs["run-1"], tmp_path / "run-1")
    content = pickle.dumps(many["bold"].data.dask.layers[many["bold"].data.name].source)
    assert len(content) < 3000
    np.testing.assert_array_equal(pickle.loads(content)[0:20, 0:1, 0:4, 0:4], many["bold"][:20, :1])


def test_a_store_that_was_replaced_is_not_taken_for_the_one_that_was_opened(tmp_path):
    one, _ = study(1, 2, key=1)
    other, _ = study(1, 2, key=2)
    opened = cg.save(one["run-1"], tmp_path / "run-1")
    content = pickle.dumps(opened["bold"].data)
    cg.save(other["run-1"], tmp_path / "run-1", overwrite=True)
    with pytest.raises(cg.errors.StoreError, match="was replaced by another store"):
        pickle.loads(content)


def test_a_wave_holds_no_more_stores_than_files_may_be_open(monkeypatch):
    small = xr.Dataset({"a": ("x", da.ones(2, chunks=1))})
    monkeypatch.setattr(saving, "WAVE_STORES", 3)
    waves = list(saving._waves({str(number): small for number in range(7)}))
    assert [list(wave) for wave in waves] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]


def test_a_study_is_computed_some_subjects_at_a_time(computed, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "WAVE_BLOCKS", 40)
    expected = {}
    for n_subjects in (3, 9):
        tree, designs = {}, {}
        for subject in range(n_subjects):
            runs, of_runs = study(2, 6, key=subject)
            tree |= {f"sub-{subject:02d}/{label}": run for label, run in runs.items()}
            designs |= {f"sub-{subject:02d}/{label}": design for label, design in of_runs.items()}
        lazy = cg.fixed_effects(cg.contrast(cg.fit(xr.DataTree.from_dict(tree), designs), "face"))
        done = []
        saved = cg.save(
            lazy, tmp_path / str(n_subjects), progress=lambda *numbers, to=done: to.append(numbers)
        )
        expected[n_subjects] = max(n_tasks(graph) for graph, _ in computed)
        assert sum(len(keys) for _, keys in computed) == 6 * n_subjects
        assert len(computed) == -(-n_subjects // 6)
        assert done[-1][0] == done[-1][1]
        computed.clear()
        for subject in range(n_subjects):
            got = saved[f"sub-{subject:02d}"].to_dataset()
            alone = cg.fixed_effects(cg.contrast(cg.fit(*study(2, 6, key=subject)), "face"))
            np.testing.assert_array_equal(got["z_score"], alone["z_score"])
    # Three subjects are half a wave, and nine one and a half: no more than a whole one is in hand.
    assert expected[9] <= 2 * expected[3] + 10
