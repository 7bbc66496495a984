"""Arithmetic of chunks and memory."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkglm import convert, open_run, plan
from chunkglm.errors import InputError, MemoryBudgetError
from chunkglm.testing import write_simulated_run

SHAPES = st.tuples(
    st.integers(1, 5000),
    st.integers(1, 400),
    st.integers(1, 2000),
    st.one_of(st.integers(1, 2000), st.just(200_000)),
)
ITEMSIZES = st.sampled_from([1, 2, 4, 8])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1024, 1024),
        ("1024", 1024),
        ("1B", 1),
        ("1K", 1024),
        ("1kB", 1024),
        ("1KiB", 1024),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        (" 2 GiB ", 2 * 2**30),
        ("1.5G", 3 * 2**29),
        ("0.25 MiB", 2**18),
        ("1TiB", 2**40),
    ],
)
def test_parse_memory(text, expected):
    assert plan.parse_memory(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "much",
        "0",
        0,
        -1,
        "-1GiB",
        "0.4",
        "1e9",
        "1,5G",
        "1 PiB",
        "GiB",
        "1 2",
        "inf",
        "nan",
        None,
        True,
        "9" * 400,
    ],
)
def test_parse_memory_refuses(text):
    with pytest.raises(InputError, match="512MiB"):
        plan.parse_memory(text)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 2**20, "1.5 GiB"),
        (300 * 2**20, "300 MiB"),
        (2**51, "2048.0 TiB"),
    ],
)
def test_format_bytes(n, text):
    assert plan.format_bytes(n) == text


@settings(max_examples=300)
@given(SHAPES, ITEMSIZES)
def test_chunks_fit_the_run_and_the_bounds(shape, itemsize):
    chunks = plan.bold_chunks(shape, itemsize)
    assert all(1 <= length <= n for length, n in zip(chunks, shape, strict=True))
    assert math.prod(chunks) * itemsize <= plan.CHUNK_BYTES or math.prod(chunks) == 1
    block = chunks.time * math.prod(shape[1:]) * itemsize
    assert block <= plan.TIME_BLOCK_BYTES or chunks.time == 1
    assert chunks.time <= plan.TIME_BLOCK
    assert chunks.z <= plan.SLAB
    # Slices stay whole unless one of them is too much.
    if chunks.time * shape[2] * shape[3] * itemsize <= plan.CHUNK_BYTES:
        assert (chunks.y, chunks.x) == shape[2:]


def test_chunks_of_usual_runs():
    assert plan.bold_chunks((284, 91, 109, 91), 2) == (32, 16, 109, 91)
    assert plan.bold_chunks((78, 35, 80, 80), 2) == (32, 16, 80, 80)
    assert plan.bold_chunks((121, 1, 20, 40), 2) == (32, 1, 20, 40)
    assert plan.bold_chunks((5, 3, 4, 2), 4) == (5, 3, 4, 2)


def test_chunks_do_not_depend_on_memory(tmp_path):
    source = tmp_path / "run.nii"
    write_simulated_run(source, shape=(20, 22, 18), n_volumes=40)
    chunks = []
    for memory in ("64MiB", "8GiB"):
        convert(source, tmp_path / f"{memory}.zarr", memory=memory)
        chunks.append(open_run(tmp_path / f"{memory}.zarr")["bold"].chunks)
    assert chunks[0] == chunks[1] == ((32, 8), (16, 2), (22,), (20,))


@settings(max_examples=200)
@given(SHAPES, ITEMSIZES, st.integers(1, 64), st.booleans())
def test_projected_memory_holds_the_blocks_and_grows_with_threads(shape, itemsize, n_threads, smooth):
    smoothed = shape[1:] if smooth else None
    needed = plan.convert_memory(shape, itemsize, n_threads, smoothed=smoothed)
    chunks = plan.bold_chunks(shape, 4 if smooth else itemsize)
    voxels = math.prod(shape[1:])
    assert needed >= n_threads * chunks.time * voxels * (itemsize + 4 * smooth) + 8 * voxels
    assert needed >= plan.convert_memory(shape, itemsize, n_threads - 1, smoothed=smoothed)
    # It does not depend on the number of volumes beyond a block.
    long, longer = (
        plan.convert_memory((n, *shape[1:]), itemsize, n_threads, smoothed=smoothed) for n in (10_000, 20_000)
    )
    assert long == longer


@given(st.tuples(*[st.integers(1, 60)] * 3), st.tuples(st.just(8), *[st.integers(1, 60)] * 3))
def test_voxel_blocks_cover_the_volume_once_in_the_order_of_chunks(shape, chunks):
    seen = np.zeros(shape, dtype=int)
    places = plan.voxel_blocks(shape, plan.Chunks(*chunks))
    for place in places:
        seen[place] += 1
        assert all(part.stop - part.start <= most for part, most in zip(place, chunks[1:], strict=True))
    assert (seen == 1).all()
    assert places == sorted(places, key=lambda place: [part.start for part in place])


@given(st.integers(1, 10**9), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 64))
def test_threads_within_a_budget(memory, fixed, per_thread, wanted):
    def needed(n):
        return fixed + n * per_thread

    if fixed + per_thread > memory:
        with pytest.raises(MemoryBudgetError, match="memory") as caught:
            plan.most_threads(memory, needed, wanted, "Fitting")
        assert plan.format_bytes(memory) in str(caught.value)
        assert plan.format_bytes(fixed + per_thread) in str(caught.value)
        return
    n = plan.most_threads(memory, needed, wanted, "Fitting")
    assert 1 <= n <= wanted
    assert fixed + n * per_thread <= memory
    assert n == wanted or fixed + (n + 1) * per_thread > memory


def test_fit_memory_counts_the_decoded_block():
    chunks = plan.Chunks(32, 16, 80, 80)
    voxels = 16 * 80 * 80
    assert plan.fit_memory_per_thread(chunks, 2, 10) > 32 * voxels * (8 + 2)
    assert np.diff([plan.fit_memory_per_thread(chunks, 2, p) for p in (5, 10, 20)]).min() > 0


# ------------------------------------------------------------------------------------------------- projected memory

SIZES = st.tuples(st.integers(1, 64), st.integers(1, 40), st.integers(1, 120), st.integers(1, 120))
FIT = st.builds(
    plan.FitSize,
    SIZES.map(lambda sizes: plan.Chunks(*sizes)),
    ITEMSIZES,
    st.integers(1, 300),
    st.integers(0, 6),
    st.integers(0, 100),
    st.integers(0, 2000),
)
STATISTICS = st.builds(
    plan.StatisticsSize,
    st.integers(1, 10**6),
    st.integers(1, 300),
    st.integers(0, 6),
    st.integers(10, 2000),
    st.integers(1, 20),
    st.integers(3, 200),
    st.integers(0, 50),
    st.integers(1, 20),
)


def grown(size):
    """The same with one more of each number in turn."""
    for name, value in size._asdict().items():
        if isinstance(value, plan.Chunks):
            for dim, length in value._asdict().items():
                yield f"{name}.{dim}", size._replace(**{name: value._replace(**{dim: length + 1})})
        else:
            yield name, size._replace(**{name: value + 1})


def fit_task(size):
    return plan.fit_memory_per_thread(
        size.chunks, size.itemsize, size.n_regressors, order=size.order, n_censored=size.n_censored
    )


@settings(max_examples=100)
@given(FIT, st.integers(1, 10**6))
def test_memory_of_a_fit_grows_with_every_size(size, n_voxels):
    for name, larger in grown(size):
        for needed in (
            fit_task,
            plan.adding_memory,
            plan.writing_memory,
            lambda one: plan.sums_memory(one, n_voxels),
        ):
            assert needed(larger) >= needed(size), name
        # How many voxels are solved for at a time depends on the number of regressors, in steps.
        if name != "n_regressors":
            assert plan.estimating_memory(larger) >= plan.estimating_memory(size), name
    assert plan.sums_memory(size, n_voxels + 1) > plan.sums_memory(size, n_voxels)


@settings(max_examples=100)
@given(STATISTICS, st.integers(1, 10**7), st.integers(1, 10**9), st.integers(1, 4), st.integers(1, 16))
def test_memory_of_maps_grows_with_every_size_and_with_threads(
    size, n_voxels, map_bytes, together, n_threads
):
    needed = plan.maps_memory(size, n_voxels, map_bytes, together, n_threads)
    for name, larger in grown(size):
        if name != "n_regressors":
            assert plan.maps_memory(larger, n_voxels, map_bytes, together, n_threads) >= needed, name
    assert plan.maps_memory(size, n_voxels + 1, map_bytes, together, n_threads) >= needed
    assert plan.maps_memory(size, n_voxels, map_bytes + 1, together, n_threads) >= needed
    assert plan.maps_memory(size, n_voxels, map_bytes, together + 1, n_threads) >= needed
    assert plan.maps_memory(size, n_voxels, map_bytes, together, n_threads + 1) >= needed


@settings(max_examples=200)
@given(SHAPES, ITEMSIZES, st.integers(1, 64), st.integers(1, 2**36), st.booleans())
def test_as_many_threads_convert_as_fit_and_what_is_asked_for_is_enough(
    shape, itemsize, wanted, memory, found
):
    def needed(n):
        return plan.convert_memory(shape, itemsize, n, found=found)

    if needed(1) > memory:
        with pytest.raises(MemoryBudgetError) as refused:
            plan.most_threads(memory, needed, wanted, "Converting")
        memory = plan.parse_memory(re.search(r"Allow (\w+) or more", str(refused.value))[1])
    n = plan.most_threads(memory, needed, wanted, "Converting")
    assert needed(n) <= memory
    assert n == wanted or needed(n + 1) > memory


def test_sizes_are_those_of_the_kernels():
    """The plan knows no kernels; it repeats how much they work on at a time."""
    from chunkglm.kernels import autocorrelation, glm, sums

    assert plan.VOXEL_TILE == sums.VOXEL_TILE
    assert (plan.TILE, plan.SOLVE_BYTES) == (glm.TILE, glm.SOLVE_BYTES)
    assert plan.SOLVE_TILE == autocorrelation.SOLVE_TILE


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("n_censored", [0, 5])
def test_rows_that_are_summed_are_those_that_the_kernel_keeps(order, n_censored):
    from chunkglm.kernels.basis import make_basis
    from chunkglm.kernels.sums import Accumulator

    kept = np.ones(60, dtype=bool)
    # Apart from each other, which is what most samples about them are kept for.
    kept[8 : 8 + 9 * n_censored : 9] = False
    X = np.random.default_rng(0).normal(size=(60, 7))
    accumulator = Accumulator(make_basis(X, kept, order=order), np.arange(11))
    accumulator.add(np.ones((60, 11)))
    held = sum(values.nbytes for values in accumulator.sums()[0])
    size = plan.FitSize(plan.Chunks(32, 1, 1, 11), 2, 7, order, n_censored)
    assert held <= plan.sums_memory(size, 11) <= 1.4 * held
