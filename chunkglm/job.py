"""The whole job: runs to stores, fit, contrasts, fixed effects, maps with sidecars, provenance, report.

What exists is kept where it was made from the same content with the same options, made again where it was not. What
content and options are is said by keys: hashes of whatever changes a number, never of paths, times or settings of memory.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkglm import nifti, plan
from chunkglm import store as stores
from chunkglm.blocks import compute
from chunkglm.chunkfiles import PARTIAL
from chunkglm.cluster import check_paths, computing, describe_workers, stage, threads
from chunkglm.convert import convert_run, describe_run
from chunkglm.errors import (
    ChunkGLMWarning,
    MemoryBudgetError,
    MissingDependencyError,
    StoreError,
    StoreExistsError,
)
from chunkglm.glm import fit
from chunkglm.jobplan import fit_threads, maps_at_a_time, one_pass
from chunkglm.maps import MEAN_IMAGE, PROVENANCE, Written, read_maps, write_json, write_maps
from chunkglm.preflight import check_job
from chunkglm.provenance import (
    fit_made_of,
    job_hash,
    maps_hash,
    peak_memory,
    picture_options,
    record_of,
    run_part,
    run_parts,
)
from chunkglm.report import PICTURES, REPORT, picture_names, report
from chunkglm.stages import (
    WRITING,
    convert_there,
    is_done,
    is_trusted,
    look_at_fit,
    look_at_fits_there,
    maps_of,
    maps_workplace,
    write_maps_there,
    write_mean,
)
from chunkglm.streamed import StreamedRun, create_fit
from chunkglm.tasks import active_client

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import xarray as xr
    from rich.console import Console

    from chunkglm.convert import Consumer
    from chunkglm.request import Job, Models


MANY_AT_LIMIT = 0.01
"""Part of the voxels whose autocorrelation is at its limit, above which it is worth a warning."""


@dataclass(frozen=True)
class Summary:
    """What came of it."""

    up_to_date: bool
    outputs: list[str]
    """Maps with their sidecars, relative to the folder of the results."""
    peaks: list[dict[str, Any]]
    seconds: float
    peak_memory: int | None
    report: Path | None = None
    pictures: list[Path] = field(default_factory=list)


def run_job(job: Job, console: Console, *, quiet: bool = False) -> Summary:
    """Do the whole job.

    Parameters
    ----------
    job : Job
    console : rich.console.Console
        For progress.
    quiet : bool
        Show no progress.

    Returns
    -------
    Summary

    Raises
    ------
    ChunkGLMError
        Of the kind that fits what is wrong; what can be checked without the data is checked first.
    """
    summary = _do_job(job, console, quiet=quiet)
    return _with_report(job, summary, console, quiet=quiet) if job.report else summary


def _do_job(job: Job, console: Console, *, quiet: bool) -> Summary:
    """Everything but the report; the provenance is written last and says that the numbers are complete."""
    started = time.monotonic()
    models = check_job(job)
    previous = _previous(job.output)
    hashes = (
        [nifti.source_sha256(run) for run in job.runs]
        if previous or (job.output / "runs.zarr").exists()
        else None
    )
    key = None if hashes is None else job_hash(job, models, hashes)
    if previous and key is not None and previous.get("key") == key and _is_there(job, previous):
        return Summary(True, previous["outputs"], previous["peaks"], time.monotonic() - started, None)
    _check_output(job, previous, key)
    with computing(
        job.scheduler,
        n_threads=job.n_threads,
        workers=job.workers,
        memory=plan.parse_memory(job.memory),
        console=console,
        quiet=quiet,
        performance_report=job.performance_report,
    ):
        if active_client() is not None:
            _check_places(job)
        runs = _convert_and_fit(job, models, console, quiet=quiet)
        if runs is None:
            runs = _convert_all(job, models, hashes, console, quiet=quiet)
        with _within_memory(job, runs, models):
            fitted = _fit_all(job, runs, models, console, quiet=quiet)
            sources = [run.attrs["source_sha256"] for run in runs.values()]
            key = job_hash(job, models, sources)
            old = _begin_maps(job, previous, key)
            hashes_of = {name: maps_hash(job, models, sources, name) for name in job.contrasts}
            outputs, peaks = _write_all(job, fitted, runs, hashes_of, console, models=models, quiet=quiet)
            about = _look_at_fits(job, fitted, runs)
    for name in sorted(set(old) - set(outputs)):
        _inside(job.output, name).unlink(missing_ok=True)
    summary = Summary(False, outputs, peaks, time.monotonic() - started, peak_memory())
    record = record_of(job, key, runs, fitted, summary, about_fits=about)
    write_json(job.output / PROVENANCE, record)
    _warn_of_limits(record["runs"])
    return summary


def _warn_of_limits(runs: Sequence[Mapping[str, Any]]) -> None:
    for run in runs:
        if run["voxels_at_ar_limit"] > MANY_AT_LIMIT * run["voxels_fitted"]:
            share = f"{run['voxels_at_ar_limit']:,} of {run['voxels_fitted']:,} voxels"
            warnings.warn(
                f"In run {run['label']}, {share} are more autocorrelated than any noise model within bounds leaves under this "
                "design, and were fitted with the nearest. So many mean drift that the design does not hold: add drift "
                "regressors.",
                ChunkGLMWarning,
                stacklevel=2,
            )


def _begin_maps(job: Job, previous: dict[str, Any] | None, key: str) -> list[str]:
    """Say that maps are being written, remove the report of other ones, and give the names of what was there."""
    outputs = list((previous or {}).get("outputs", []))
    names = [REPORT]
    for entry in (previous or {}).get("peaks", []):
        names += [f"{PICTURES}/{name}" for name in picture_names(entry["contrast"], entry["run"])]
    job.output.mkdir(parents=True, exist_ok=True)
    # Workers of a command that was killed, should they wake, write no map any more.
    shutil.rmtree(job.output / "maps" / WRITING, ignore_errors=True)
    # From here on, until all is written, these are the results of no job.
    write_json(job.output / PROVENANCE, {"key": None, "begun": key, "outputs": outputs})
    for name in names:
        _inside(job.output, name).unlink(missing_ok=True)
    return outputs


def _with_report(job: Job, summary: Summary, console: Console, *, quiet: bool) -> Summary:
    """Draw pictures and report where they are not there, or other cuts are asked for."""
    provenance = _previous(job.output) or {}
    asked = picture_options(job)
    names = [f"{PICTURES}/{name}" for e in summary.peaks for name in picture_names(e["contrast"], e["run"])]
    wanted = [job.output / name for name in (REPORT, *names)]
    if provenance.get("pictures") != asked or not all(path.is_file() for path in wanted):
        # What is drawn otherwise must not stay if drawing is cut off.
        wanted[0].unlink(missing_ok=True)
        write_json(job.output / PROVENANCE, {**provenance, "pictures": asked})
        try:
            with stage(console, "Drawing", "pictures", quiet=quiet) as progress:
                report(job.output, progress=progress)
        except MissingDependencyError as error:
            warnings.warn(
                f"The maps are complete, but there are no pictures and no report. {error} Then: chunkglm report {job.output}",
                ChunkGLMWarning,
                stacklevel=2,
            )
            return summary
    return replace(summary, report=wanted[0], pictures=wanted[1:])


# ----------------------------------------------------------------------------------------------------- what is there


def _previous(output: Path) -> dict[str, Any] | None:
    """The provenance of a finished job, if there is one."""
    try:
        found = json.loads((output / PROVENANCE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{output / PROVENANCE} cannot be read: {error}. Remove {output}, or choose another output."
        ) from error
    return found if isinstance(found, dict) else {}


def _is_there(job: Job, previous: dict[str, Any]) -> bool:
    """Whether every map of a finished job is still in its place."""
    return all(_inside(job.output, name).is_file() for name in previous["outputs"])


def _check_output(job: Job, previous: dict[str, Any] | None, key: str | None) -> None:
    if job.overwrite:
        return
    known_keys = {(previous or {}).get(name) for name in ("key", "begun")} - {None}
    if previous is not None and key not in known_keys:
        what = "the result" if previous.get("key") else "the beginning"
        raise StoreExistsError(
            f"{job.output} holds {what} of another job (other data, designs, contrasts or options). Choose another "
            f"--output, or say --overwrite, which keeps what is the same: chunkglm run --dry-run tells. For a new contrast "
            f"alone there is also chunkglm contrast {job.output}/fit.zarr."
        )
    known = {"runs.zarr", "fit.zarr", "maps", f"fit.zarr{PARTIAL}", "data"}
    if previous is not None:
        known |= {PICTURES, REPORT, PROVENANCE}
    strangers = (
        [entry.name for entry in job.output.iterdir() if entry.name not in known]
        if job.output.is_dir()
        else []
    )
    if job.output.exists() and not job.output.is_dir():
        raise StoreExistsError(f"{job.output} is a file; the output is a folder. Choose another --output.")
    if strangers:
        raise StoreExistsError(
            f"{job.output} exists and holds something else ({', '.join(sorted(strangers)[:5])}). Choose another --output, "
            "or say --overwrite to write into it."
        )


def _inside(folder: Path, name: str) -> Path:
    """A path within ``folder``, never outside of it."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise StoreError(
            f"{folder / PROVENANCE} names a file outside of its folder ({name}); it was altered. Remove it."
        )
    return path


# -------------------------------------------------------------------------------------------------------------- stages


def _convert_and_fit(
    job: Job, models: Models, console: Console, *, quiet: bool
) -> dict[str, xr.Dataset] | None:
    """Fit the runs while they are converted, if nothing is there yet and one pass over each of them is enough.

    Otherwise nothing is done here, and they are to be converted first, and fitted from their stores.
    """
    if active_client() is not None:
        return None
    described = {str(n): describe_run(run, **job.run_options) for n, run in enumerate(job.runs, start=1)}
    streaming = one_pass(job, models, described)
    if streaming is None:
        return None
    place, (fit_plan, chunks, converting, estimating) = job.output / "fit.zarr", streaming
    runs: dict[str, xr.Dataset] = {}
    parts: list[dict[str, str]] = []
    shared = fit_made_of(job, models)
    with (
        stores.writing(place, shared, overwrite=False, keep=True) as writer,
        ThreadPoolExecutor(1) as beside,
    ):
        created = beside.submit(create_fit, writer, fit_plan, chunks)
        for number, (label, source) in enumerate(zip(models.designs, job.runs, strict=True)):
            streamed = StreamedRun(fit_plan, number, chunks)
            runs[label] = _convert(
                job,
                source,
                number + 1,
                console,
                quiet=quiet,
                n_threads=converting[number],
                consume=streamed.add,
            )
            created.result()
            parts.append(run_part(models, label, runs[label].attrs["source_sha256"]))
            streamed.write(writer, stores.part_hash(shared, parts[-1]), estimating[number])
        writer.finish({**shared, "runs": parts})
    return runs


def _convert_all(
    job: Job, models: Models, hashes: list[str] | None, console: Console, *, quiet: bool
) -> dict[str, xr.Dataset]:
    """The run stores; those that are there and current, as the fit of this command left them, are only opened."""
    wanted = {
        number: (source, _run_place(job, number))
        for number, source in enumerate(job.runs, start=1)
        if hashes is None
        or not is_done(
            source,
            _run_place(job, number),
            overwrite=job.overwrite,
            sha256=hashes[number - 1],
            **job.run_options,
        )
    }
    client = active_client()
    if client is None:
        for number, (source, _) in wanted.items():
            _convert(job, source, number, console, quiet=quiet, n_threads=job.n_threads)
    else:
        volumes = {number: len(models.designs[str(number)]) for number in wanted}
        title = f"Converting {len(wanted)} {'run' if len(wanted) == 1 else 'runs'}"
        n_bytes = sum(_signal_bytes(source) for source, _ in wanted.values())
        with stage(console, title, "volumes", n_bytes=n_bytes, quiet=quiet or not wanted) as progress:
            convert_there(client, job, wanted, volumes, progress)
    return {str(number): stores.open_run(_run_place(job, number)) for number in range(1, len(job.runs) + 1)}


def _signal_bytes(source: str) -> int:
    """Bytes of the values of a recording, as they are in its file when it is decompressed."""
    with nifti.open_reader(source) as reader:
        return reader.shape[0] * reader.header.volume_bytes


def _check_places(job: Job) -> None:
    """Refuse a cluster that does not see the inputs and the folder of the results."""
    named = (*job.runs, *([job.mask] if job.mask else []))
    inputs = [Path(stores.absolute(one)) for one in named if not stores.is_url(one)]
    folder = job.output.absolute() / "maps"
    try:
        with maps_workplace(folder) as probe:
            check_paths(active_client(), [*inputs, probe])
    finally:
        # Nothing is left if the job is refused.
        for one in (folder, folder.parent):
            with suppress(OSError):
                one.rmdir()


@contextmanager
def _within_memory(job: Job, runs: Mapping[str, xr.Dataset], models: Models) -> Iterator[None]:
    """As many voxel blocks at a time as the memory holds; a cluster has the threads that it has."""
    client = active_client()
    if client is None:
        with threads(fit_threads(job, runs, models)):
            yield
        return
    there = describe_workers(client)
    fitting = fit_threads(replace(job, n_threads=there.most_threads), runs, models)
    if fitting < there.most_threads:
        raise MemoryBudgetError(
            f"Workers have {there.most_threads} threads, and {job.memory} for each worker hold {fitting} voxel blocks at a "
            f"time. Give more --memory, if the machines have it, or start workers with fewer threads: --nthreads {fitting}."
        )
    yield


def _run_place(job: Job, number: int) -> Path:
    return job.output / "runs.zarr" / f"run-{number}"


def _convert(
    job: Job,
    source: str,
    number: int,
    console: Console,
    *,
    quiet: bool,
    n_threads: int,
    consume: Consumer | None = None,
) -> xr.Dataset:
    title = f"{'Converting' if consume is None else 'Converting and fitting'} {Path(source).name}"
    with stage(console, title, "volumes", n_bytes=_signal_bytes(source), quiet=quiet) as progress:
        return convert_run(
            source,
            _run_place(job, number),
            **job.run_options,
            memory=plan.parse_memory(job.memory),
            n_threads=n_threads,
            overwrite=job.overwrite,
            progress=progress,
            consume=consume,
        )


def _fit_all(
    job: Job,
    runs: Mapping[str, xr.Dataset],
    models: Models,
    console: Console,
    *,
    quiet: bool,
) -> xr.Dataset:
    place, shared = job.output / "fit.zarr", fit_made_of(job, models)
    parts = run_parts(job, models, [run.attrs["source_sha256"] for run in runs.values()])
    if stores.is_up_to_date(place, {**shared, "runs": parts}) and is_trusted(place, overwrite=job.overwrite):
        return stores.open_store(place)
    lazy = fit(dict(runs), models.designs, sample_masks=models.kept, **job.fit_options)
    n_bytes = sum(run["bold"].size * run["bold"].dtype.itemsize for run in runs.values())
    with stage(console, "Fitting", "blocks", n_bytes=n_bytes, quiet=quiet) as progress:
        return stores.save_runs(
            lazy, place, shared, parts, memory=job.memory, overwrite=job.overwrite, progress=progress
        )


def _write_all(
    job: Job,
    fitted: xr.Dataset,
    runs: Mapping[str, xr.Dataset],
    hashes: Mapping[str, str],
    console: Console,
    *,
    models: Models,
    quiet: bool,
) -> tuple[list[str], list[dict[str, Any]]]:
    """Maps of every contrast for every run and of the fixed effects, one at a time in memory."""
    folder = job.output / "maps"
    folder.mkdir(parents=True, exist_ok=True)
    inputs = [run.attrs["source_name"] for run in runs.values()]
    made: dict[tuple[str, str | None], Written] = {}
    wanted: dict[str, dict[str | None, xr.Dataset]] = {}
    for name, definition in job.contrasts.items():
        entries = maps_of(fitted, name, definition, precision_weighted=job.precision_weighted)
        for label in list(entries):
            kept = read_maps(folder, name, label, hashes[name])
            if kept is not None:
                made[name, label] = kept
                del entries[label]
        wanted[name] = entries
    about: dict[tuple[str, str | None], dict[str, Any]] = {
        (name, label): {
            "inputs": inputs if label is None else [inputs[list(runs).index(label)]],
            "made_of": hashes[name],
        }
        for name, entries in wanted.items()
        for label in entries
    }
    order = [(name, label) for name in job.contrasts for label in (None, *runs)]
    with stage(console, "Writing maps", "contrasts", quiet=quiet) as progress:
        for which, one in _written(job, wanted, about, runs, models):
            made[which] = one
            if progress is not None:
                progress(len(made), len(order))
    paths = [folder / MEAN_IMAGE, *(path for which in order for path in made[which].paths)]
    return [os.path.relpath(path, job.output) for path in paths], [made[which].peaks for which in order]


def _written(
    job: Job,
    wanted: Mapping[str, dict[str | None, xr.Dataset]],
    about: Mapping[tuple[str, str | None], dict[str, Any]],
    runs: Mapping[str, xr.Dataset],
    models: Models,
) -> Iterator[tuple[tuple[str, str | None], Written]]:
    """Write the mean image and the maps that are not there, here or on a cluster; each as it is done."""
    client = active_client()
    if client is not None:
        yield from write_maps_there(
            client, job, [(*which, {**options, "n_threads": 1}) for which, options in about.items()]
        )
        return
    folder = job.output / "maps"
    write_mean(list(runs.values()), folder)
    for name, entries in wanted.items():
        together, n_threads = maps_at_a_time(job, runs, models, name)
        missing = list(entries.items())
        for some in (missing[start : start + together] for start in range(0, len(missing), together)):
            # Together, so that what they share is read and solved once.
            with threads(n_threads):
                computed = compute([one for _, one in some])
            for (label, _), maps in zip(some, computed, strict=True):
                written = write_maps(maps, folder, name, run=label, **about[name, label], n_threads=n_threads)
                yield (name, label), written


def _look_at_fits(job: Job, fitted: xr.Dataset, runs: Mapping[str, xr.Dataset]) -> list[dict[str, Any]]:
    """What became of each run, for the record."""
    client = active_client()
    if client is not None:
        return look_at_fits_there(client, job)
    options: dict[str, Any] = {
        "signal_scaling": job.signal_scaling,
        "smoothing_fwhm": job.smoothing_fwhm,
    }
    return [look_at_fit(fitted, run, number, **options) for number, run in enumerate(runs.values())]
