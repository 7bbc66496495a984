"""The whole job: runs to stores, fit, contrasts, fixed effects, maps with sidecars, provenance, report.

What exists is kept where it was made from the same content with the same options, made again where it was not. What
content and options are is said by keys: hashes of whatever changes a number, never of paths, times or settings of memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chunkglm import grids, nifti, plan
from chunkglm import store as stores
from chunkglm._version import __version__
from chunkglm.blocks import compute
from chunkglm.cluster import stage, threads
from chunkglm.contrasts import check_contrast, contrast
from chunkglm.convert import convert_run, describe_run
from chunkglm.design import as_design, read_design, read_sample_mask
from chunkglm.errors import ChunkGLMWarning, InputError, MissingDependencyError, StoreError, StoreExistsError
from chunkglm.fixed_effects import fixed_effects
from chunkglm.glm import LARGEST_AUTO_ORDER, check_options, fit, kept_volumes, noise_name, plan_fit
from chunkglm.maps import MEAN_IMAGE, PROVENANCE, peaks, write_json, write_maps
from chunkglm.report import PICTURES, REPORT, picture_names, report
from chunkglm.report.cuts import check_within
from chunkglm.schema import FORMAT_VERSION, NUMERICAL_VERSION, canonical_json
from chunkglm.streamed import StreamedRun, create_fit, spatial_chunks, sums_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pandas as pd
    import xarray as xr
    from rich.console import Console

    from chunkglm.convert import Consumer
    from chunkglm.expressions import Parsed


class Models(NamedTuple):
    """What the runs are fitted with, by label: their designs, and their volumes that are not censored."""

    designs: dict[str, pd.DataFrame]
    kept: dict[str, np.ndarray[Any, Any]]


MAPS_AT_A_TIME, MAPS_SHARE = 2, 0.25
"""Runs, or fixed effects, whose maps are computed together, if this part of the memory holds them."""

MANY_AT_LIMIT = 0.01
"""Part of the voxels whose autocorrelation is at its limit, above which it is worth a warning."""


@dataclass(frozen=True)
class Job:
    """What is asked for."""

    runs: tuple[str, ...]
    designs: tuple[str, ...]
    contrasts: dict[str, Parsed]
    output: Path
    mask: str | None = None
    sample_masks: tuple[str, ...] = ()
    column_names: list[str] | None = None
    t_r: float | None = None
    smoothing_fwhm: float | None = None
    noise_model: str = "ar1"
    signal_scaling: str | None = "voxel"
    compat: str | None = None
    precision_weighted: bool = False
    memory: str = "2GiB"
    n_threads: int = field(default_factory=plan.available_cpus)
    threshold: float = 3.0
    cut_coords: tuple[float, float, float] | None = None
    report: bool = True
    overwrite: bool = False
    command: tuple[str, ...] = ()


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
    models = _check_inputs(job)
    previous = _previous(job.output)
    hashes = (
        [nifti.source_sha256(run) for run in job.runs]
        if previous or (job.output / "runs.zarr").exists()
        else None
    )
    current = bool(previous and hashes and previous.get("key") == _job_key(job, models, hashes))
    if previous and current and _is_there(job, previous):
        return Summary(True, previous["outputs"], previous["peaks"], time.monotonic() - started, None)
    _check_output(job, previous, current=current)
    runs = _convert_and_fit(job, models, console, quiet=quiet)
    if runs is None:
        runs = _convert_all(job, hashes, console, quiet=quiet)
    sources = [run.attrs["source_sha256"] for run in runs.values()]
    with threads(_fit_threads(job, runs, models)):
        fitted = _fit_all(job, runs, models, console, quiet=quiet)
        _remove_old(job, previous)
        outputs, peaks = _write_all(job, fitted, runs, console, quiet=quiet)
    summary = Summary(False, outputs, peaks, time.monotonic() - started, peak_memory())
    provenance = _provenance(job, _job_key(job, models, sources), runs, fitted, summary)
    write_json(job.output / PROVENANCE, provenance)
    _warn_of_limits(provenance["runs"])
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


def _remove_old(job: Job, previous: dict[str, Any] | None) -> None:
    """Remove the maps, pictures and report of the job that is replaced."""
    names = [*(previous or {}).get("outputs", []), REPORT]
    for entry in (previous or {}).get("peaks", []):
        names += [f"{PICTURES}/{name}" for name in picture_names(entry["contrast"], entry["run"])]
    for name in names:
        _inside(job.output, name).unlink(missing_ok=True)


def _with_report(job: Job, summary: Summary, console: Console, *, quiet: bool) -> Summary:
    """Draw pictures and report where they are not there, or other cuts are asked for."""
    provenance = _previous(job.output) or {}
    asked = _picture_options(job)
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


def _picture_options(job: Job) -> dict[str, Any]:
    return {
        "threshold": job.threshold,
        "cut_coords": None if job.cut_coords is None else list(job.cut_coords),
    }


# ----------------------------------------------------------------------------------------------------------- checking


def _check_inputs(job: Job) -> Models:
    """Everything that can be known before the data is read."""
    check_options(job.noise_model, job.signal_scaling, job.compat)
    plan.parse_memory(job.memory)
    if not (np.isfinite(job.threshold) and job.threshold >= 0):
        raise InputError(f"The threshold of the pictures is {job.threshold}; it must be 0 or more.")
    if len(job.designs) != len(job.runs):
        raise InputError(
            f"There are {len(job.runs)} runs and {len(job.designs)} designs. Give --design once for each run, in their order."
        )
    designs = {}
    for number, (run, path) in enumerate(zip(job.runs, job.designs, strict=True), start=1):
        with nifti.open_reader(run) as reader:
            n_volumes = reader.shape[0]
            grid = grids.Grid(reader.shape[1:], reader.header.affine)
        if job.mask is not None:
            nifti.read_mask(job.mask, grid, run)
        check_within(grid, list(enumerate(job.cut_coords or ())))
        design = read_design(path, columns=names_for(path, job.column_names))
        if len(design) != n_volumes:
            raise InputError(
                f"{path} has {len(design)} rows and {run} has {n_volumes} volumes. A design has one row for each volume; check "
                "that they belong together, in this order."
            )
        designs[str(number)] = as_design(design, n_volumes=n_volumes, run=str(number))
    kept = _kept(job, designs)
    for name, definition in job.contrasts.items():
        check_contrast(definition, list(designs.values()), list(kept.values()), name)
    return Models(designs, kept)


def sample_mask_of(path: str) -> np.ndarray[Any, Any] | None:
    """Read what ``--sample-mask`` names: a file, or ``all`` for a run that keeps all its volumes."""
    return None if path == "all" else read_sample_mask(path)


def _kept(job: Job, designs: Mapping[str, pd.DataFrame]) -> dict[str, np.ndarray[Any, Any]]:
    """Volumes that are not censored, by run label."""
    if job.sample_masks and len(job.sample_masks) != len(job.runs):
        raise InputError(
            f"There are {len(job.runs)} runs and {len(job.sample_masks)} sample masks. Give --sample-mask once for each run, "
            "in their order, 'all' for a run that keeps all its volumes."
        )
    paths = job.sample_masks or ("all",) * len(job.runs)
    return {
        label: kept_volumes(sample_mask_of(path), len(design), path)
        for (label, design), path in zip(designs.items(), paths, strict=True)
    }


def names_for(path: str, names: list[str] | None) -> list[str] | None:
    """Names for a design's columns: ``--column-names`` is for designs that have none of their own."""
    return None if path.lower().endswith((".csv", ".tsv")) else names


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


def _check_output(job: Job, previous: dict[str, Any] | None, *, current: bool) -> None:
    if job.overwrite:
        return
    if previous is not None and not current:
        raise StoreExistsError(
            f"{job.output} holds the result of another job (other data, designs, contrasts or options). Choose another "
            f"--output, or say --overwrite. A new contrast needs no new fit: chunkglm contrast {job.output}/fit.zarr, or "
            "this command with --overwrite, which then keeps runs and fit."
        )
    known = {"runs.zarr", "fit.zarr", "maps", "fit.zarr.partial", "data"}
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


# --------------------------------------------------------------------------------------------------------------- keys


def _key(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _sha256(path: str) -> str:
    with open(path, "rb") as file:  # noqa: PTH123  (the path is text as it was given)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fit_key(job: Job, models: Models, sources: Sequence[str]) -> str:
    content = [
        [
            label,
            list(design.columns),
            hashlib.sha256(np.ascontiguousarray(design.to_numpy()).tobytes()).hexdigest(),
        ]
        for label, design in models.designs.items()
    ]
    mask = None if job.mask is None else nifti.source_sha256(job.mask)
    censored = [np.flatnonzero(~kept).tolist() for kept in models.kept.values()]
    options = [censored, job.t_r, job.smoothing_fwhm, job.noise_model, job.signal_scaling, job.compat]
    return _key([FORMAT_VERSION, NUMERICAL_VERSION, list(sources), mask, content, options])


def _job_key(job: Job, models: Models, sources: Sequence[str]) -> str:
    return _key([_fit_key(job, models, sources), job.contrasts, job.precision_weighted])


# -------------------------------------------------------------------------------------------------------------- stages


def _convert_and_fit(
    job: Job, models: Models, console: Console, *, quiet: bool
) -> dict[str, xr.Dataset] | None:
    """Fit the runs while they are converted, if nothing is there yet and one pass over each of them is enough.

    Otherwise nothing is done here, and they are to be converted first, and fitted from their stores.
    """
    place = job.output / "fit.zarr"
    if any(stores.exists(one) for one in (job.output / "runs.zarr", place)):
        return None
    if job.mask is None or job.noise_model == "auto":
        return None
    described = [
        describe_run(run, mask=job.mask, t_r=job.t_r, smoothing_fwhm=job.smoothing_fwhm) for run in job.runs
    ]
    recordings = {str(number): one.run for number, one in enumerate(described, start=1)}
    fit_plan = plan_fit(recordings, models.designs, mask=None, sample_masks=models.kept, **_fit_options(job))
    chunks = spatial_chunks(fit_plan)
    memory, sums = plan.parse_memory(job.memory), [sums_bytes(one) for one in fit_plan.runs]
    if chunks is None or not all(
        _fits_beside(one.needed, extra, memory, job.n_threads)
        for one, extra in zip(described, sums, strict=True)
    ):
        return None
    runs = {}
    with stores.writing(place, overwrite=False) as writer, ThreadPoolExecutor(1) as beside:
        created = beside.submit(create_fit, writer, fit_plan, chunks)
        for number, (source, extra) in enumerate(zip(job.runs, sums, strict=True)):
            streamed = StreamedRun(fit_plan, number, chunks)
            runs[str(number + 1)] = _convert(
                job, source, number + 1, console, quiet=quiet, memory=memory - extra, consume=streamed.add
            )
            created.result()
            streamed.write(writer, job.n_threads)
        sources = [run.attrs["source_sha256"] for run in runs.values()]
        writer.finish({"key": _fit_key(job, models, sources)})
    return runs


def _fits_beside(needed: Callable[[int], int], extra: int, memory: int, wanted: int) -> bool:
    """Whether a conversion has room for the sums of the fit with as many threads as without them.

    With fewer it would take longer than reading the store once more.
    """
    return needed(plan.most_threads(memory, needed, wanted, "Converting")) + extra <= memory


def _convert_all(
    job: Job, hashes: list[str] | None, console: Console, *, quiet: bool
) -> dict[str, xr.Dataset]:
    """The run stores; those that are there and current, as the fit of this command left them, are only opened."""
    runs = {}
    for number, source in enumerate(job.runs, start=1):
        place = _run_place(job, number)
        if hashes is not None and place.is_dir() and _is_current(place, job, hashes[number - 1]):
            runs[str(number)] = stores.open_run(place)
        else:
            memory = plan.parse_memory(job.memory)
            runs[str(number)] = _convert(job, source, number, console, quiet=quiet, memory=memory)
    return runs


def _run_place(job: Job, number: int) -> Path:
    return job.output / "runs.zarr" / f"run-{number}"


def _convert(
    job: Job,
    source: str,
    number: int,
    console: Console,
    *,
    quiet: bool,
    memory: int,
    consume: Consumer | None = None,
) -> xr.Dataset:
    title = f"{'Converting' if consume is None else 'Converting and fitting'} {Path(source).name}"
    with stage(console, title, "volumes", quiet=quiet) as progress:
        return convert_run(
            source,
            _run_place(job, number),
            mask=job.mask,
            t_r=job.t_r,
            smoothing_fwhm=job.smoothing_fwhm,
            memory=memory,
            n_threads=job.n_threads,
            overwrite=job.overwrite,
            progress=progress,
            consume=consume,
        )


def _fit_options(job: Job) -> dict[str, Any]:
    return {"noise_model": job.noise_model, "signal_scaling": job.signal_scaling, "compat": job.compat}


def _is_current(place: Path, job: Job, source_sha256: str) -> bool:
    """Whether a run store is what converting would make again."""
    run = stores.open_run(place)
    same = run.attrs.get("source_sha256") == source_sha256
    same = same and run.attrs.get("smoothing_fwhm") == job.smoothing_fwhm
    same = same and run.attrs.get("numerical_version") == NUMERICAL_VERSION
    same = same and (job.t_r is None or run.attrs.get("repetition_time") == job.t_r)
    if job.mask is None or not same:
        return same and run.attrs.get("mask_source") == "epi"
    return bool(np.array_equal(run["mask"].values, nifti.read_mask(job.mask, grids.grid_of(run), str(place))))


def _fit_threads(job: Job, runs: Mapping[str, xr.Dataset], models: Models) -> int:
    """Voxel blocks that fit into the memory at a time."""
    columns = {name for design in models.designs.values() for name in design.columns}
    order = check_options(job.noise_model, job.signal_scaling, job.compat)
    order = LARGEST_AUTO_ORDER if order is None else order
    per_thread = 0
    for label, run in runs.items():
        sizes = plan.Chunks(*(max(sizes) for sizes in run["bold"].chunks))  # type: ignore[union-attr]
        n_censored = int((~models.kept[label]).sum())
        needed = plan.fit_memory_per_thread(
            sizes, run["bold"].dtype.itemsize, len(columns), order=order, n_censored=n_censored
        )
        per_thread = max(per_thread, needed)
    return plan.threads_within(plan.parse_memory(job.memory), 0, per_thread, job.n_threads, "Fitting")


def _fit_all(
    job: Job,
    runs: Mapping[str, xr.Dataset],
    models: Models,
    console: Console,
    *,
    quiet: bool,
) -> xr.Dataset:
    place = job.output / "fit.zarr"
    key = _fit_key(job, models, [run.attrs["source_sha256"] for run in runs.values()])
    if place.is_dir():
        existing = stores.open_store(place)
        if existing.attrs.get("key") == key:
            return existing
        stores.check_free(place, overwrite=job.overwrite)
    lazy = fit(
        dict(runs),
        models.designs,
        sample_masks=models.kept,
        **_fit_options(job),
    )
    lazy.attrs["key"] = key
    with stage(console, "Fitting", "tasks", quiet=quiet) as progress:
        return stores.save(lazy, place, overwrite=job.overwrite, progress=progress)


def _write_all(
    job: Job, fitted: xr.Dataset, runs: Mapping[str, xr.Dataset], console: Console, *, quiet: bool
) -> tuple[list[str], list[dict[str, Any]]]:
    """Maps of every contrast for every run and of the fixed effects, one at a time in memory."""
    folder = job.output / "maps"
    folder.mkdir(parents=True, exist_ok=True)
    inputs = [run.attrs["source_name"] for run in runs.values()]
    nifti.to_nifti(_mean_of(runs), folder / MEAN_IMAGE, overwrite=True)
    outputs, found = [folder / MEAN_IMAGE], []
    total, done = len(job.contrasts) * (len(runs) + 1), 0
    with stage(console, "Writing maps", "contrasts", quiet=quiet) as progress:
        for name, definition in job.contrasts.items():
            lazy = contrast(fitted, {name: definition}).isel(contrast=0, drop=True)
            combined = fixed_effects(lazy, precision_weighted=job.precision_weighted)
            entries: list[tuple[str | None, xr.Dataset, list[str]]] = [(None, combined, inputs)]
            entries += [
                (str(label), lazy.isel(run=n), inputs[n : n + 1])
                for n, label in enumerate(lazy["run"].values)
            ]
            for some in _batches(entries, plan.parse_memory(job.memory)):
                # Together, so that what they share is read and solved once.
                computed = compute([one for _, one, _ in some])
                for (label, _, of), maps in zip(some, computed, strict=True):
                    outputs += write_maps(maps, folder, name, run=label, inputs=of, n_threads=job.n_threads)
                    found.append({"contrast": name, "run": label, **peaks(maps)})
                    done += 1
                    if progress is not None:
                        progress(done, total)
    return [os.path.relpath(path, job.output) for path in outputs], found


def _batches(
    entries: list[tuple[str | None, xr.Dataset, list[str]]], memory: int
) -> Iterator[list[tuple[str | None, xr.Dataset, list[str]]]]:
    """Divide maps into those that are computed at a time: two, if a part of the memory holds them."""
    largest = max(one.nbytes for _, one, _ in entries)
    size = MAPS_AT_A_TIME if MAPS_AT_A_TIME * largest <= MAPS_SHARE * memory else 1
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def _mean_of(runs: Mapping[str, xr.Dataset]) -> xr.DataArray:
    """Mean of the runs' mean images, with one of them in memory at a time."""
    first, *others = (run["mean_image"] for run in runs.values())
    total = first.astype(np.float64).compute()
    for other in others:
        total = total.copy(data=total.values + other.values)
    return (total / len(runs)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- provenance


def peak_memory() -> int | None:
    """Largest resident memory of this process so far in bytes; None where the system does not tell."""
    try:
        import resource  # noqa: PLC0415  (not on every system)
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _provenance(
    job: Job, key: str, runs: Mapping[str, xr.Dataset], fitted: xr.Dataset, summary: Summary
) -> dict[str, Any]:
    packages = ("numpy", "scipy", "xarray", "dask", "zarr", "nibabel", "pandas")
    return {
        "key": key,
        "command": shlex.join(job.command),
        "working_directory": str(Path.cwd()),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(summary.seconds, 2),
        "peak_memory_bytes": summary.peak_memory,
        "versions": {
            "chunkglm": __version__,
            "python": platform.python_version(),
            **{p: version(p) for p in packages},
        },
        "options": {
            "contrasts": job.contrasts,
            "smoothing_fwhm": job.smoothing_fwhm,
            "noise_model": job.noise_model,
            "signal_scaling": job.signal_scaling,
            "compat": job.compat,
            "precision_weighted": job.precision_weighted,
            "memory": job.memory,
            "n_threads": job.n_threads,
        },
        "pictures": _picture_options(job),
        "mask": None if job.mask is None else {"path": job.mask, "sha256": nifti.source_sha256(job.mask)},
        "runs": [
            {
                "label": label,
                "path": path,
                "sha256": run.attrs["source_sha256"],
                "design": design,
                "design_sha256": _sha256(design),
                **_about_sample_mask(job, number),
                "volumes": run.sizes["time"],
                "volumes_kept": int(fitted["sample_mask"].isel(run=number).sum()),
                "repetition_time": run.attrs["repetition_time"],
                **_about_fit(fitted.isel(run=number), run, job),
            }
            for number, ((label, run), path, design) in enumerate(
                zip(runs.items(), job.runs, job.designs, strict=True)
            )
        ],
        "peaks": summary.peaks,
        "outputs": summary.outputs,
    }


def _about_sample_mask(job: Job, number: int) -> dict[str, Any]:
    path = job.sample_masks[number] if job.sample_masks else "all"
    return {"sample_mask": path, "sample_mask_sha256": None if path == "all" else _sha256(path)}


def _about_fit(fitted: xr.Dataset, run: xr.Dataset, job: Job) -> dict[str, Any]:
    """What became of the voxels of a run, and why those that were left out were."""
    in_mask, alive = fitted["mask"].values.astype(bool), np.isfinite(fitted["sigma2"].values)
    lost = run["mean_image"].values[in_mask & ~alive]
    reasons = {"values that are not finite": ~np.isfinite(lost)}
    if job.signal_scaling == "voxel":
        before = "" if job.smoothing_fwhm is None else " (before smoothing)"
        with np.errstate(invalid="ignore"):
            reasons[f"temporal mean of 0 or less{before}"] = lost <= 0
    reasons["no variance in time"] = ~np.any(list(reasons.values()), axis=0)
    return {
        "regressors": int((fitted["column"].values >= 0).sum()),
        "dof": float(fitted["dof"]),
        **_about_noise(fitted, alive),
        "voxels_in_mask": int(in_mask.sum()),
        "voxels_fitted": int((in_mask & alive).sum()),
        "voxels_left_out": {reason: int(which.sum()) for reason, which in reasons.items() if which.any()},
    }


def _about_noise(fitted: xr.Dataset, alive: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The noise model of a run, its first coefficient, and how many voxels no model within bounds explains."""
    order = int(fitted["order"])
    about: dict[str, Any] = {"noise_model": noise_name(order), "ar_median": None, "voxels_at_ar_limit": 0}
    if order and alive.any():
        about["ar_median"] = float(np.median(fitted["rho"].isel(lag=0).values[alive]))
    if "rho_at_limit" in fitted:
        about["voxels_at_ar_limit"] = int((fitted["rho_at_limit"].values.astype(bool) & alive).sum())
    return about
