"""What results are made of, as hashes by which they are found again, and the record of how they were made.

A hash is of whatever changes a number: content of recordings, masks and designs, options, and the numerical version; never
of paths, times, or settings of threads and memory.
"""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkglm import nifti
from chunkglm._version import __version__
from chunkglm.glm import noise_name
from chunkglm.schema import FORMAT_VERSION, NUMERICAL_VERSION, canonical_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import xarray as xr

    from chunkglm.job import Summary
    from chunkglm.request import Job, Models


def fit_made_of(job: Job, models: Models) -> dict[str, Any]:
    """What the fits of all runs share, besides their recordings and designs.

    Returns
    -------
    dict
        As :func:`chunkglm.store.made_of` gives it of the store of the fit.
    """
    regressors = dict.fromkeys(name for design in models.designs.values() for name in design.columns)
    return {
        "kind": "fit",
        "format version": FORMAT_VERSION,
        "numerical version": NUMERICAL_VERSION,
        "noise model": job.noise_model,
        "signal scaling": job.signal_scaling,
        "compat": job.compat,
        "smoothing": job.smoothing_fwhm,
        "repetition time": job.t_r,
        "mask": models.mask,
        "labels": list(models.designs),
        "regressors": list(regressors),
    }


def run_part(models: Models, label: str, source: str) -> dict[str, str]:
    """What the fit of a run is made of besides what it shares with others, from the hash of its recording."""
    design = models.designs[label]
    return {
        "recording": source,
        "design": hash_of([list(design.columns), _of_values(design.to_numpy(dtype=np.float64))]),
        "censored volumes": hash_of(np.flatnonzero(~models.kept[label]).tolist()),
    }


def run_parts(job: Job, models: Models, sources: Sequence[str]) -> list[dict[str, str]]:
    """For each run, what its fit is made of besides what all share.

    Parameters
    ----------
    job : Job
    models : Models
    sources : sequence of str
        Hashes of the recordings.

    Returns
    -------
    list of dict
        Hashes by what they are of.
    """
    parts = [run_part(models, label, source) for label, source in zip(models.designs, sources, strict=True)]
    if job.noise_model == "auto":
        # An order that is chosen for one run decides about the shape of the others' results.
        return [{**part, "other runs": hash_of(parts)} for part in parts]
    return parts


def maps_hash(job: Job, models: Models, sources: Sequence[str], name: str) -> str:
    """Hash of all that the maps of a contrast are made of."""
    definition = job.contrasts[name]
    return hash_of(
        [fit_made_of(job, models), run_parts(job, models, sources), name, definition, job.precision_weighted]
    )


def job_hash(job: Job, models: Models, sources: Sequence[str]) -> str:
    """Hash of all that the results of a job are made of."""
    return hash_of(
        [fit_made_of(job, models), run_parts(job, models, sources), job.contrasts, job.precision_weighted]
    )


def hash_of(value: Any) -> str:
    """Hash of anything that JSON holds."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _of_values(values: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _sha256(path: str) -> str:
    with open(path, "rb") as file:  # noqa: PTH123  (the path is text as it was given)
        return hashlib.file_digest(file, "sha256").hexdigest()


def picture_options(job: Job) -> dict[str, Any]:
    """What pictures are drawn with."""
    return {
        "threshold": job.threshold,
        "cut_coords": None if job.cut_coords is None else list(job.cut_coords),
    }


def peak_memory() -> int | None:
    """Largest resident memory of this process so far in bytes; None where the system does not tell."""
    try:
        import resource  # noqa: PLC0415  (not on every system)
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def record_of(
    job: Job,
    key: str,
    runs: Mapping[str, xr.Dataset],
    fitted: xr.Dataset,
    summary: Summary,
    *,
    about_fits: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Say how results were made, and what became of each run.

    Parameters
    ----------
    job : Job
    key : str
        From :func:`job_hash`.
    runs : mapping of str to Dataset
    fitted : Dataset
    summary : Summary
    about_fits : sequence of mapping
        From :func:`about_fit`, for each run.

    Returns
    -------
    dict
        For JSON.
    """
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
        "pictures": picture_options(job),
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
                **about_fits[number],
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


ABOUT_FIT = ("mask", "sigma2", "rho", "rho_at_limit", "column", "dof", "order")
"""Variables of a fit that :func:`about_fit` looks at, where they are there."""


def about_fit(
    fitted: xr.Dataset, run: xr.Dataset, *, signal_scaling: str | None, smoothing_fwhm: float | None
) -> dict[str, Any]:
    """Say what became of the voxels of a run, and why those that were left out were.

    Parameters
    ----------
    fitted : Dataset
        The variables ``ABOUT_FIT`` of the run.
    run : Dataset
        With its mean image.
    signal_scaling, smoothing_fwhm
        What it was fitted and converted with.

    Returns
    -------
    dict
        For JSON.
    """
    in_mask, alive = fitted["mask"].values.astype(bool), np.isfinite(fitted["sigma2"].values)
    lost = run["mean_image"].values[in_mask & ~alive]
    reasons = {"values that are not finite": ~np.isfinite(lost)}
    if signal_scaling == "voxel":
        before = "" if smoothing_fwhm is None else " (before smoothing)"
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
