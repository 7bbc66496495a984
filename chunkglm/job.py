"""The whole job: runs to stores, fit, contrasts, fixed effects, maps with sidecars, provenance.

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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkglm import grids, nifti, plan
from chunkglm import store as stores
from chunkglm._version import __version__
from chunkglm.cluster import stage, threads
from chunkglm.contrasts import check_contrast, contrast
from chunkglm.convert import convert
from chunkglm.design import as_design, read_design
from chunkglm.errors import InputError, StoreError, StoreExistsError
from chunkglm.fixed_effects import fixed_effects
from chunkglm.glm import check_options, fit
from chunkglm.maps import peak, write_json, write_maps
from chunkglm.schema import FORMAT_VERSION, NUMERICAL_VERSION, SPACE, canonical_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    import xarray as xr
    from rich.console import Console

    Definition = str | Sequence[float]

PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Job:
    """What is asked for."""

    runs: tuple[str, ...]
    designs: tuple[str, ...]
    contrasts: dict[str, Definition]
    output: Path
    mask: str | None = None
    column_names: list[str] | None = None
    t_r: float | None = None
    smoothing_fwhm: float | None = None
    noise_model: str = "ar1"
    signal_scaling: str | None = "voxel"
    compat: str | None = None
    precision_weighted: bool = False
    memory: str = "2GiB"
    n_threads: int = field(default_factory=plan.available_cpus)
    overwrite: bool = False
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """What came of it."""

    up_to_date: bool
    outputs: list[str]
    peaks: list[dict[str, Any]]
    seconds: float
    peak_memory: int | None


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
    started = time.monotonic()
    designs = _check_inputs(job)
    previous = _previous(job.output)
    hashes = (
        [nifti.source_sha256(run) for run in job.runs]
        if previous or (job.output / "runs.zarr").exists()
        else None
    )
    current = bool(previous and hashes and previous.get("key") == _job_key(job, designs, hashes))
    if previous and current and _is_there(job, previous):
        return Summary(True, previous["outputs"], previous["peaks"], time.monotonic() - started, None)
    _check_output(job, previous, current=current)
    runs = _convert_all(job, hashes, console, quiet=quiet)
    sources = [run.attrs["source_sha256"] for run in runs.values()]
    with threads(_fit_threads(job, runs, designs)):
        fitted = _fit_all(job, runs, designs, console, quiet=quiet)
        for old in (previous or {}).get("outputs", []):
            _inside(job.output, old).unlink(missing_ok=True)
        outputs, peaks = _write_all(job, fitted, runs, console, quiet=quiet)
    summary = Summary(False, outputs, peaks, time.monotonic() - started, peak_memory())
    write_json(
        job.output / PROVENANCE, _provenance(job, _job_key(job, designs, sources), runs, fitted, summary)
    )
    return summary


# ----------------------------------------------------------------------------------------------------------- checking


def _check_inputs(job: Job) -> dict[str, pd.DataFrame]:
    """Everything that can be known before the data is read; returns the designs by run label."""
    check_options(job.noise_model, job.signal_scaling, job.compat)
    plan.parse_memory(job.memory)
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
        design = read_design(path, columns=names_for(path, job.column_names))
        if len(design) != n_volumes:
            raise InputError(
                f"{path} has {len(design)} rows and {run} has {n_volumes} volumes. A design has one row for each volume; check "
                "that they belong together, in this order."
            )
        designs[str(number)] = as_design(design, n_volumes=n_volumes, run=str(number))
    for name, definition in job.contrasts.items():
        check_contrast(definition, list(designs.values()), name)
    return designs


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
            "--output, or say --overwrite."
        )
    known = {"runs.zarr", "fit.zarr", "maps", "fit.zarr.partial", "data", PROVENANCE}
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


def _fit_key(job: Job, designs: Mapping[str, pd.DataFrame], sources: Sequence[str]) -> str:
    content = [
        [
            label,
            list(design.columns),
            hashlib.sha256(np.ascontiguousarray(design.to_numpy()).tobytes()).hexdigest(),
        ]
        for label, design in designs.items()
    ]
    mask = None if job.mask is None else nifti.source_sha256(job.mask)
    options = [job.t_r, job.smoothing_fwhm, job.noise_model, job.signal_scaling, job.compat]
    return _key([FORMAT_VERSION, NUMERICAL_VERSION, list(sources), mask, content, options])


def _job_key(job: Job, designs: Mapping[str, pd.DataFrame], sources: Sequence[str]) -> str:
    return _key([_fit_key(job, designs, sources), job.contrasts, job.precision_weighted])


# -------------------------------------------------------------------------------------------------------------- stages


def _convert_all(
    job: Job, hashes: list[str] | None, console: Console, *, quiet: bool
) -> dict[str, xr.Dataset]:
    runs = {}
    for number, source in enumerate(job.runs, start=1):
        place = job.output / "runs.zarr" / f"run-{number}"
        if hashes is not None and place.is_dir() and _is_current(place, job, hashes[number - 1]):
            runs[str(number)] = stores.open_run(place)
            continue
        with stage(console, f"Converting {Path(source).name}", "volumes", quiet=quiet) as progress:
            runs[str(number)] = convert(
                source,
                place,
                mask=job.mask,
                t_r=job.t_r,
                smoothing_fwhm=job.smoothing_fwhm,
                memory=job.memory,
                overwrite=job.overwrite,
                progress=progress,
            )
    return runs


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


def _fit_threads(job: Job, runs: Mapping[str, xr.Dataset], designs: Mapping[str, pd.DataFrame]) -> int:
    """Voxel blocks that fit into the memory at a time."""
    columns = {name for design in designs.values() for name in design.columns}
    per_thread = 0
    for run in runs.values():
        sizes = plan.Chunks(*(max(sizes) for sizes in run["bold"].chunks))  # type: ignore[union-attr]
        per_thread = max(
            per_thread, plan.fit_memory_per_thread(sizes, run["bold"].dtype.itemsize, len(columns))
        )
    return plan.threads_within(plan.parse_memory(job.memory), 0, per_thread, job.n_threads, "Fitting")


def _fit_all(
    job: Job,
    runs: Mapping[str, xr.Dataset],
    designs: Mapping[str, pd.DataFrame],
    console: Console,
    *,
    quiet: bool,
) -> xr.Dataset:
    place = job.output / "fit.zarr"
    key = _fit_key(job, designs, [run.attrs["source_sha256"] for run in runs.values()])
    if place.is_dir():
        existing = stores.open_store(place)
        if existing.attrs.get("key") == key:
            return existing
        stores.check_free(place, overwrite=job.overwrite)
    lazy = fit(
        dict(runs),
        dict(designs),
        noise_model=job.noise_model,
        signal_scaling=job.signal_scaling,  # type: ignore[arg-type]
        compat=job.compat,  # type: ignore[arg-type]
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
    outputs, peaks = [], []
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
            for label, one, of in entries:
                maps = one.compute()
                outputs += write_maps(maps, folder, name, run=label, inputs=of)
                peaks.append({"contrast": name, "run": label, **peak(maps)})
                done += 1
                if progress is not None:
                    progress(done, total)
    return [os.path.relpath(path, job.output) for path in outputs], peaks


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
    fitted_voxels = fitted["sigma2"].notnull().sum(SPACE).values
    asked = fitted["mask"].sum(SPACE).values
    return {
        "key": key,
        "command": shlex.join(job.command),
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
        "mask": None if job.mask is None else {"path": job.mask, "sha256": nifti.source_sha256(job.mask)},
        "runs": [
            {
                "label": label,
                "path": path,
                "sha256": run.attrs["source_sha256"],
                "design": design,
                "design_sha256": _sha256(design),
                "volumes": run.sizes["time"],
                "repetition_time": run.attrs["repetition_time"],
                "dof": float(dof),
                "voxels_in_mask": int(in_mask),
                "voxels_fitted": int(n_fitted),
            }
            for (label, run), path, design, dof, in_mask, n_fitted in zip(
                runs.items(), job.runs, job.designs, fitted["dof"].values, asked, fitted_voxels, strict=True
            )
        ],
        "peaks": summary.peaks,
        "outputs": summary.outputs,
    }
