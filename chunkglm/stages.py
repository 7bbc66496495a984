"""The stages of a job on a cluster: what its tasks do, and how they are handed out.

A task is given names and numbers, opens what it needs and writes what it makes, and hands back a few more: signals and maps
pass through neither client nor scheduler. Any of them may be done twice, by a worker that was taken for dead and by another
one: a run is then built on two sites, maps in two folders, and what is finished second is dropped, or replaces its like.
"""

from __future__ import annotations

import shutil
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkglm import nifti, plan
from chunkglm import store as stores
from chunkglm.blocks import compute
from chunkglm.cluster import describe_workers
from chunkglm.contrasts import contrast
from chunkglm.convert import convert_run, is_converted
from chunkglm.errors import StoreError, StoreExistsError
from chunkglm.fixed_effects import fixed_effects
from chunkglm.maps import MEAN_IMAGE, Written, write_maps
from chunkglm.provenance import ABOUT_FIT, about_fit
from chunkglm.tasks import current_task, listening, run_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import xarray as xr

    from chunkglm.expressions import Parsed
    from chunkglm.request import Job

    Progress = Callable[[int, int], None]

SECONDS_BETWEEN_NEWS = 1.0
"""Between messages of a worker about its progress."""

WRITING = ".writing"
"""In the folder of the maps, what is there until they are complete."""


# ------------------------------------------------------------------------------------------------- what is done anywhere


def is_trusted(place: Path, *, overwrite: bool) -> bool:
    """Whether a store that is there is kept: where it may be replaced, only if it is undamaged."""
    return not overwrite or stores.is_whole(place)


def is_done(source: str, place: Path, *, overwrite: bool, sha256: str | None, **options: Any) -> bool:
    """Whether a run is converted, and its store kept."""
    return is_converted(source, place, sha256=sha256, **options) and is_trusted(place, overwrite=overwrite)


def maps_of(
    fitted: xr.Dataset, name: str, definition: Parsed, *, precision_weighted: bool
) -> dict[str | None, xr.Dataset]:
    """The statistics of a contrast, lazily: of the fixed effects (None) and of every run, by its label."""
    lazy = contrast(fitted, {name: definition}).isel(contrast=0, drop=True)
    combined = fixed_effects(lazy, precision_weighted=precision_weighted)
    # Of covariances there are no maps.
    lazy, combined = (one.drop_vars("covariance", errors="ignore") for one in (lazy, combined))
    found: dict[str | None, xr.Dataset] = {None: combined}
    for number, label in enumerate(lazy["run"].values):
        found[str(label)] = lazy.isel(run=number)
    return found


def write_mean(runs: Sequence[xr.Dataset], folder: Path) -> Path:
    """Write the mean of the runs' mean images, with one of them in memory at a time."""
    first, *others = (run[["mean_image"]] for run in runs)
    total = compute([first], here=True)[0]["mean_image"].astype(np.float64)
    for other in others:
        total = total.copy(data=total.values + compute([other], here=True)[0]["mean_image"].values)
    nifti.to_nifti((total / len(runs)).astype(np.float32), folder / MEAN_IMAGE, overwrite=True)
    return folder / MEAN_IMAGE


def look_at_fit(
    fitted: xr.Dataset,
    run: xr.Dataset,
    number: int,
    *,
    signal_scaling: str | None,
    smoothing_fwhm: float | None,
) -> dict[str, Any]:
    """What became of a run, for the record."""
    known = [name for name in ABOUT_FIT if name in fitted]
    one, image = compute([fitted[known].isel(run=number), run[["mean_image"]]], here=True)
    return about_fit(one, image, signal_scaling=signal_scaling, smoothing_fwhm=smoothing_fwhm)


# --------------------------------------------------------------------------------------------------------------- tasks


def _convert_task(
    *,
    topic: str,
    number: int,
    source: str,
    place: str,
    options: Mapping[str, Any],
    limits: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """Convert a run, unless a worker did so that was lost before it could tell."""

    def done() -> bool:
        return is_done(source, Path(place), overwrite=overwrite, sha256=None, **options)

    if done():
        return
    task = current_task()
    told = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal told
        task.refuse_if_taken_back()
        if done == total or time.monotonic() - told >= SECONDS_BETWEEN_NEWS:
            told = time.monotonic()
            task.tell(topic, [number, done])

    try:
        convert_run(source, place, **options, **limits, overwrite=overwrite, progress=progress, aside=True)
    except StoreExistsError:
        # By a worker that was lost, in this moment.
        if not done():
            raise


@contextmanager
def _own_folder(workplace: str) -> Iterator[Path]:
    """A folder for files until they are complete; there is none any more if the work was given up."""
    folder = Path(workplace) / uuid.uuid4().hex
    try:
        folder.mkdir()
        yield folder
        folder.rmdir()
    except FileNotFoundError as error:
        raise StoreError(
            f"{workplace} is not there: the job was given up or finished meanwhile, or this machine does not see that folder."
        ) from error


def _maps_task(
    *,
    fit: str,
    folder: str,
    workplace: str,
    name: str,
    definition: Parsed,
    label: str | None,
    precision_weighted: bool,
    options: Mapping[str, Any],
) -> tuple[list[str], dict[str, Any]]:
    """Compute and write the maps of a contrast for a run or for the fixed effects; their names, and where they peak."""
    lazy = maps_of(stores.open_store(fit), name, definition, precision_weighted=precision_weighted)[label]
    with _own_folder(workplace) as own:
        written = write_maps(compute([lazy], here=True)[0], own, name, run=label, **options)
        for path in written.paths:
            path.replace(Path(folder) / path.name)
    return [path.name for path in written.paths], written.peaks


def _mean_task(places: Sequence[str], folder: str, workplace: str) -> None:
    with _own_folder(workplace) as own:
        path = write_mean([stores.open_run(place) for place in places], own)
        path.replace(Path(folder) / path.name)


def _look_task(fit: str, place: str, number: int, options: Mapping[str, Any]) -> dict[str, Any]:
    return look_at_fit(stores.open_store(fit), stores.open_run(place), number, **options)


# ------------------------------------------------------------------------------------------------------------ handed out


def convert_there(
    client: Any,
    job: Job,
    wanted: Mapping[int, tuple[str, Path]],
    n_volumes: Mapping[int, int],
    progress: Progress | None,
) -> None:
    """Convert runs on the workers, one run a task.

    Parameters
    ----------
    client : distributed.Client
    job : Job
    wanted : mapping
        Recording and place of the store, by the number of the run.
    n_volumes : mapping
        Volumes of the runs, by their numbers.
    progress : callable, optional
        Called with the number of volumes that are done, of all.
    """
    if not wanted:
        return
    for _, place in wanted.values():
        stores.check_idle(place)
    limits = _limits(client, job, len(wanted))
    # Workers have other working directories.
    mask = None if job.mask is None else stores.absolute(job.mask)
    options = {**job.run_options, "mask": mask}
    topic = f"chunkglm-{uuid.uuid4().hex}"
    done, total = dict.fromkeys(wanted, 0), sum(n_volumes[number] for number in wanted)

    def hear(news: Sequence[int]) -> None:
        # A run that is begun again has been further before.
        done[news[0]] = max(done[news[0]], news[1])
        if progress is not None and sum(done.values()) < total:
            progress(sum(done.values()), total)

    items = [
        {
            "topic": topic,
            "number": number,
            "source": stores.absolute(source),
            "place": stores.absolute(str(place)),
            "options": options,
            "limits": limits,
            "overwrite": job.overwrite,
        }
        for number, (source, place) in wanted.items()
    ]
    numbers = list(wanted)
    with listening(client, topic, hear):
        for which, _ in run_calls(client, _convert_task, items):
            done[numbers[which]] = n_volumes[numbers[which]]
            if progress is not None:
                progress(sum(done.values()), total)
    for _, place in wanted.values():
        stores.remove_abandoned(place)


def _limits(client: Any, job: Job, n_tasks: int) -> dict[str, int]:
    """Threads and memory of a conversion: all of a worker where each has one to do, else a thread's part of it."""
    there = describe_workers(client)
    n_threads = max(1, min(there.most_threads, there.total_threads // n_tasks))
    memory = plan.parse_memory(job.memory)
    if there.memory is not None:
        memory = min(memory, there.memory)
    return {"memory": memory * n_threads // there.most_threads, "n_threads": n_threads}


def write_maps_there(
    client: Any,
    job: Job,
    wanted: Sequence[tuple[str, str | None, Mapping[str, Any]]],
) -> Iterator[tuple[tuple[str, str | None], Written]]:
    """Compute and write maps on the workers, a task for the maps of each contrast and run, or fixed effects.

    Parameters
    ----------
    client : distributed.Client
    job : Job
        Whose fit and runs are there.
    wanted : sequence of tuple
        Name of the contrast, label of the run or None, and further options of :func:`chunkglm.maps.write_maps`.

    Yields
    ------
    (name, label), Written
        In any order.
    """
    folder = job.output.absolute() / "maps"
    with maps_workplace(folder) as workplace:
        where = {"folder": str(folder), "workplace": str(workplace)}
        places = [str(job.output.absolute() / "runs.zarr" / f"run-{n}") for n in range(1, len(job.runs) + 1)]
        for _ in run_calls(client, _mean_task, [{"places": places, **where}]):
            pass
        items = [
            {
                **where,
                "fit": str(job.output.absolute() / "fit.zarr"),
                "name": name,
                "definition": job.contrasts[name],
                "label": label,
                "precision_weighted": job.precision_weighted,
                "options": options,
            }
            for name, label, options in wanted
        ]
        for number, (names, peaks) in run_calls(client, _maps_task, items):
            name, label, _ = wanted[number]
            yield (name, label), Written([job.output / "maps" / one for one in names], peaks)


@contextmanager
def maps_workplace(folder: Path) -> Iterator[Path]:
    """Where workers write maps before they get their place; without it, none that was given up can write any more."""
    around = folder / WRITING
    shutil.rmtree(around, ignore_errors=True)
    workplace = around / uuid.uuid4().hex
    workplace.mkdir(parents=True)
    try:
        yield workplace
    finally:
        shutil.rmtree(around, ignore_errors=True)


def look_at_fits_there(client: Any, job: Job) -> list[dict[str, Any]]:
    """What became of each run, for the record; looked at by the workers."""
    output = job.output.absolute()
    options = {"signal_scaling": job.signal_scaling, "smoothing_fwhm": job.smoothing_fwhm}
    items = [
        {
            "fit": str(output / "fit.zarr"),
            "place": str(output / "runs.zarr" / f"run-{number + 1}"),
            "number": number,
            "options": options,
        }
        for number in range(len(job.runs))
    ]
    return [about for _, about in sorted(run_calls(client, _look_task, items), key=lambda one: one[0])]
