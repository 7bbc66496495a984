"""The stages of a job: what is in flight in each of them, and the memory that it takes.

The job decides by these functions, ``chunkglm check`` and the first step of ``chunkglm run`` refuse by them, and
``chunkglm run --plan`` prints what they say.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from chunkglm import plan
from chunkglm import store as stores
from chunkglm.chunkfiles import PARTIAL
from chunkglm.errors import ChunkGLMWarning
from chunkglm.expressions import contrast_rows
from chunkglm.glm import LARGEST_AUTO_ORDER, check_options, plan_fit
from chunkglm.plan import FitSize, StatisticsSize
from chunkglm.schema import SPACE
from chunkglm.streamed import spatial_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import xarray as xr

    from chunkglm.convert import Description
    from chunkglm.glm import FitPlan
    from chunkglm.request import Job, Models

MAPS_AT_A_TIME = 2
"""Runs, or fixed effects, whose maps are computed together, where the memory holds them."""


class Stage(NamedTuple):
    """A stage of a job.

    Attributes
    ----------
    name : str
    of : str
        What its tasks are.
    tasks : int
    at_a_time : int
        Tasks that are worked on at a time.
    peak : int
        Projected bytes, above the imports.
    """

    name: str
    of: str
    tasks: int
    at_a_time: int
    peak: int


# ------------------------------------------------------------------------------------------------ fitting from stores


def _order(job: Job) -> int:
    order = check_options(job.noise_model, job.signal_scaling, job.compat)
    return LARGEST_AUTO_ORDER if order is None else order


def _n_regressors(models: Models) -> int:
    return len({name for design in models.designs.values() for name in design.columns})


def _size(job: Job, models: Models, label: str, run: xr.Dataset) -> FitSize:
    """What the memory depends on that it takes to fit a run."""
    sizes = run["bold"].chunksizes
    chunks = plan.Chunks(*(max(sizes[dim]) for dim in ("time", *SPACE)))
    # What carries a scale is opened as physical values.
    itemsize = 8 if "scale_factor" in run["bold"].encoding else run["bold"].dtype.itemsize
    censored = int((~models.kept[label]).sum())
    return FitSize(chunks, itemsize, _n_regressors(models), _order(job), censored, run.sizes["time"])


def fit_memory(job: Job, runs: Mapping[str, xr.Dataset], models: Models) -> Callable[[int], int]:
    """From a number of voxel blocks at a time to what it takes to fit runs from their stores."""
    each = 0
    for label, run in runs.items():
        one = _size(job, models, label, run)
        needed = plan.fit_memory_per_thread(
            one.chunks, one.itemsize, one.n_regressors, order=one.order, n_censored=one.n_censored
        )
        each = max(each, needed)
    return lambda n: plan.OVERHEAD + n * each


def fit_threads(job: Job, runs: Mapping[str, xr.Dataset], models: Models) -> int:
    """Voxel blocks that are fitted at a time."""
    needed = fit_memory(job, runs, models)
    return plan.most_threads(plan.parse_memory(job.memory), needed, job.n_threads, "Fitting")


# ------------------------------------------------------------------------------------------- fitting while converting


class OnePass(NamedTuple):
    """How runs are fitted while they are converted.

    Attributes
    ----------
    fit_plan : FitPlan
    chunks : tuple of tuple of int
        Along z, y, x.
    converting, estimating : list of int
        For each run the threads that convert and add up, and those that estimate afterwards.
    """

    fit_plan: FitPlan
    chunks: tuple[tuple[int, ...], ...]
    converting: list[int]
    estimating: list[int]


def one_pass(job: Job, models: Models, described: Mapping[str, Description]) -> OnePass | None:
    """Decide how the runs are fitted while they are converted.

    Parameters
    ----------
    job : Job
    models : Models
    described : mapping of str to Description
        What the runs will be.

    Returns
    -------
    OnePass or None
        None where they are to be converted first, and fitted from their stores: if something is there already, more than one
        pass over each of them is needed, or the sums of the fit do not fit beside as many threads as convert without them.
        With fewer it would take longer than reading the stores once more.
    """
    place = job.output / "fit.zarr"
    if any(stores.exists(one) for one in (job.output / "runs.zarr", place, f"{place}{PARTIAL}")):
        return None
    if job.mask is None or job.noise_model == "auto":
        return None
    recordings = {label: one.run for label, one in described.items()}
    fit_plan = plan_fit(recordings, models.designs, mask=None, sample_masks=models.kept, **job.fit_options)
    chunks = spatial_chunks(fit_plan)
    if chunks is None:
        return None
    memory, converting, estimating = plan.parse_memory(job.memory), [], []
    for label, one in described.items():
        n = plan.most_threads(memory, one.needed, job.n_threads, "Converting")
        adding, solving = one_pass_memory(job, models, label, one)
        if adding(n) > memory or solving(1) > memory:
            return None
        converting.append(n)
        estimating.append(plan.most_threads(memory, solving, job.n_threads, "Fitting"))
    return OnePass(fit_plan, chunks, converting, estimating)


def one_pass_memory(
    job: Job, models: Models, label: str, one: Description
) -> tuple[Callable[[int], int], Callable[[int], int]]:
    """From a number of threads to what converting takes with the sums of the fit; and to what estimating takes then."""
    size = _size(job, models, label, one.run)
    sums = plan.sums_memory(size, int(one.run["mask"].sum()))
    adding = plan.adding_memory(size) + one.scaled * 8 * math.prod(size.chunks)
    solving = max(plan.estimating_memory(size), plan.writing_memory(size))
    return (
        lambda n: one.needed(n) + sums + n * adding,
        lambda n: plan.OVERHEAD + sums + n * solving,
    )


# ---------------------------------------------------------------------------------------------------------------- maps


class Maps(NamedTuple):
    """How the maps of a contrast are made: runs, or fixed effects, together; and voxel blocks at a time."""

    together: int
    n_threads: int


def maps_memory(
    job: Job, runs: Mapping[str, xr.Dataset], models: Models, name: str
) -> Callable[[int, int], int]:
    """From what is computed together, and a number of threads, to what the maps of a contrast take."""
    sizes = [_size(job, models, label, run) for label, run in runs.items()]
    n_voxels = next(iter(runs.values()))["mask"].size
    q, n_weighted = _weights(job, models, name)
    statistics = StatisticsSize(
        max(one.voxels for one in sizes),
        sizes[0].n_regressors,
        sizes[0].order,
        max(one.n_volumes for one in sizes),
        n_weighted,
        q + q * q + 1,
        len(runs),
    )
    # Effects, and besides them variance, degrees of freedom, statistic, p value, z score and number of runs.
    map_bytes = 8 * (q + 6) * n_voxels
    return lambda together, n: plan.maps_memory(statistics, n_voxels, map_bytes, together, n)


def _weights(job: Job, models: Models, name: str) -> tuple[int, int]:
    """Rows of a contrast, and regressors that it gives a weight."""
    regressors = list(dict.fromkeys(str(one) for design in models.designs.values() for one in design.columns))
    with warnings.catch_warnings():
        # The contrast itself will say what is filled up or left out.
        warnings.simplefilter("ignore", ChunkGLMWarning)
        weights = contrast_rows(job.contrasts[name], regressors).weights
    return len(weights), int(weights.any(axis=0).sum())


def maps_at_a_time(job: Job, runs: Mapping[str, xr.Dataset], models: Models, name: str) -> Maps:
    """Decide how the maps of a contrast are made."""
    memory, needed = plan.parse_memory(job.memory), maps_memory(job, runs, models, name)
    together = MAPS_AT_A_TIME if needed(MAPS_AT_A_TIME, job.n_threads) <= memory else 1
    n = plan.most_threads(memory, partial(needed, together), job.n_threads, "Computing maps")
    return Maps(together, n)


# ---------------------------------------------------------------------------------------------------------- all stages


def least_memory(job: Job, models: Models, described: Mapping[str, Description]) -> dict[str, int]:
    """What each stage of a job takes with one task at a time, in bytes, by what is done."""
    runs = {label: one.run for label, one in described.items()}
    least = {
        "Looking at volumes": max(one.examining for one in described.values()),
        "Converting": max(one.needed(1) for one in described.values()),
        "Fitting": fit_memory(job, runs, models)(1),
        "Computing maps": max(maps_memory(job, runs, models, name)(1, 1) for name in job.contrasts),
    }
    if job.report:
        least["Drawing"] = plan.report_memory(_n_voxels(runs))
    return least


def check_memory(job: Job, models: Models, described: Mapping[str, Description]) -> None:
    """Refuse a job that does not fit into its memory.

    Raises
    ------
    MemoryBudgetError
        With what the stage that needs most needs at least.
    """
    least = least_memory(job, models, described)
    what = max(least, key=least.__getitem__)
    plan.most_threads(plan.parse_memory(job.memory), lambda _: least[what], 1, what)


def stages_of(job: Job, models: Models, described: Mapping[str, Description]) -> list[Stage]:
    """Plan a job: its stages in their order.

    Parameters
    ----------
    job : Job
    models : Models
    described : mapping of str to Description
        What the runs will be.

    Returns
    -------
    list of Stage
        All of them; what is there and up to date is not made again. Whether runs are fitted while they are converted depends
        on what is there.

    Raises
    ------
    MemoryBudgetError
        If one of them does not fit into the memory.
    """
    check_memory(job, models, described)
    runs = {label: one.run for label, one in described.items()}
    examining = max(one.examining for one in described.values())
    found = [Stage("examine inputs", "runs", len(runs), 1, examining)]
    streamed = one_pass(job, models, described)
    if streamed is None:
        found += _convert_and_then_fit(job, models, described)
    else:
        for (label, one), converting, estimating in zip(
            described.items(), streamed.converting, streamed.estimating, strict=True
        ):
            adding, solving = one_pass_memory(job, models, label, one)
            number, length = _time_blocks(one.run)
            name = f"convert and fit run {label}"
            found.append(Stage(name, f"blocks of {length} volumes", number, converting, adding(converting)))
            n_blocks = _n_voxel_blocks(one.run)
            name = f"estimate run {label}"
            found.append(Stage(name, "voxel blocks", n_blocks, estimating, solving(estimating)))
    for contrast in job.contrasts:
        together, n = maps_at_a_time(job, runs, models, contrast)
        needed = maps_memory(job, runs, models, contrast)
        of = "voxel blocks of each map" if together == 1 else f"voxel blocks, {together} runs together"
        n_blocks = _n_voxel_blocks(next(iter(runs.values())))
        found.append(Stage(f"maps of {contrast}", of, n_blocks * (len(runs) + 1), n, needed(together, n)))
    if job.report:
        n_pictures = len(job.contrasts) * (len(runs) + 2) + len(runs)
        found.append(Stage("draw the report", "pictures", n_pictures, 1, plan.report_memory(_n_voxels(runs))))
    return found


def _convert_and_then_fit(job: Job, models: Models, described: Mapping[str, Description]) -> list[Stage]:
    memory, found = plan.parse_memory(job.memory), []
    runs = {label: one.run for label, one in described.items()}
    for label, one in described.items():
        number, length = _time_blocks(one.run)
        n = plan.most_threads(memory, one.needed, job.n_threads, "Converting")
        found.append(Stage(f"convert run {label}", f"blocks of {length} volumes", number, n, one.needed(n)))
    n = fit_threads(job, runs, models)
    n_blocks = sum(_n_voxel_blocks(run) for run in runs.values())
    found.append(Stage("fit", "voxel blocks", n_blocks, n, fit_memory(job, runs, models)(n)))
    return found


def _n_voxels(runs: Mapping[str, xr.Dataset]) -> int:
    return max(int(run["mask"].size) for run in runs.values())


def _time_blocks(run: xr.Dataset) -> tuple[int, int]:
    """Number of time blocks of a run, and volumes in one."""
    sizes = run["bold"].chunksizes["time"]
    return len(sizes), sizes[0]


def _n_voxel_blocks(run: xr.Dataset) -> int:
    return math.prod(len(run["bold"].chunksizes[dim]) for dim in SPACE)
