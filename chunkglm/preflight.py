"""Everything that can be known of a job before any work: what is wrong with its inputs, and what it will take.

All of it is found at once, in seconds: of the recordings the headers, the ends of the files, and a few volumes are read.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chunkglm import grids, nifti, plan
from chunkglm.cluster import check_scheduler
from chunkglm.contrasts import check_contrast
from chunkglm.convert import SAMPLE, describe_run, mask_sha256
from chunkglm.design import as_design, estimable_regressors, read_design, variance_inflation
from chunkglm.errors import (
    ChunkGLMError,
    ChunkGLMWarning,
    DesignError,
    InputError,
    PreflightError,
    StoreError,
)
from chunkglm.expressions import contrast_rows
from chunkglm.glm import LARGEST_AUTO_ORDER, check_options, kept_volumes
from chunkglm.jobplan import Stage, check_memory, least_memory, stages_of
from chunkglm.report.cuts import check_within
from chunkglm.request import Models, names_for, sample_mask_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import pandas as pd
    import xarray as xr

    from chunkglm.convert import Description
    from chunkglm.expressions import Definition
    from chunkglm.request import Job

MANY = 0.01
"""Part of a mask whose voxels say nothing, from which it is worth a warning."""

LARGE_INFLATION = 10.0
"""Variance inflation from which a regressor of a contrast is worth a warning (Marquardt 1970, Technometrics 12:591-612)."""

LONG_T_R = 100.0
"""Repetition times of sidecars that are larger are meant in milliseconds."""

SAME_T_R = 1e-3
"""Seconds by which repetition times may differ."""

STORED, MADE = 1.5, 1.1
"""How much smaller signals and statistics are in files: measured, see ``benchmarks/README.md``."""


class Finding(NamedTuple):
    """Something that was found out about an input.

    Attributes
    ----------
    level : {"ok", "note", "warning", "error"}
        A note is a warning that the work itself will give.
    subject : str
        A file, or what it is about.
    text : str
    error : ChunkGLMError or None
        What an error is raised as.
    """

    level: str
    subject: str
    text: str
    error: ChunkGLMError | None = None


class Examination(NamedTuple):
    """What :func:`examine` found; ``models`` is None where there are errors; ``described`` is what the runs will be."""

    findings: list[Finding]
    models: Models | None
    described: dict[str, Description]


class _Found(list[Finding]):
    """Findings, as they are made."""

    def add(self, level: str, subject: str, text: str) -> None:
        self.append(Finding(level, subject, text))

    @contextmanager
    def errors_of(self, subject: str) -> Iterator[None]:
        """Take down what is raised, and go on behind it."""
        try:
            yield
        except ChunkGLMError as error:
            # A mask that is wrong is so for every run.
            if str(error) not in [one.text for one in self]:
                self.append(Finding("error", subject, str(error), error))

    def failed(self) -> bool:
        """Whether there is an error so far."""
        return any(one.level == "error" for one in self)


def check_job(job: Job) -> Models:
    """Refuse a job that cannot be done, and warn of what is doubtful.

    Raises
    ------
    PreflightError
        If there are several errors; if there is one, that.
    """
    return _without_errors(examine(job))


class Room(NamedTuple):
    """Disk: bytes that the results still take, those that are free, and where."""

    needed: int
    free: int
    place: str


def plan_job(job: Job) -> tuple[list[Stage], Room]:
    """Plan a job, and compute nothing: its stages, and the disk that it takes.

    Raises
    ------
    ChunkGLMError
        As :func:`check_job`.
    """
    found = examine(job)
    models = _without_errors(found)
    return stages_of(job, models, found.described), _room_on_disk(job, models, found.described)


def _without_errors(examination: Examination) -> Models:
    """The models of a job without errors; warns of what is doubtful."""
    findings, models, _ = examination
    errors = [one for one in findings if one.error is not None]
    if len(errors) == 1 and errors[0].error is not None:
        raise errors[0].error
    if errors or models is None:
        listed = "; ".join(f"({number}) {one.text.rstrip('.')}" for number, one in enumerate(errors, start=1))
        raise PreflightError(
            f"{len(errors)} things are wrong with what is asked for: {listed}. Nothing was done. chunkglm check, with the "
            "same options, tells them in a table."
        )
    for one in findings:
        if one.level == "warning":
            warnings.warn(f"{one.subject}: {one.text}", ChunkGLMWarning, stacklevel=4)
    return models


def examine(job: Job) -> Examination:
    """Find out everything about a job that can be known in seconds.

    Parameters
    ----------
    job : Job

    Returns
    -------
    Examination
        With all problems, not only the first.
    """
    found = _Found()
    with found.errors_of("options"):
        check_options(job.noise_model, job.signal_scaling, job.compat)
    with found.errors_of("options"):
        plan.parse_memory(job.memory)
    with found.errors_of("options"):
        check_scheduler(job.scheduler, job.workers, job.performance_report)
    with found.errors_of("options"):
        _check_threshold(job)
    with found.errors_of("options"):
        _check_numbers(job)
    described = _examine_runs(job, found)
    designs = _examine_designs(job, described, found)
    _compare_runs(job, described, found)
    if len(designs) < len(job.runs) or len(job.sample_masks) not in {0, len(designs)}:
        # Which belongs to which is not known.
        return Examination(found, None, described)
    kept: dict[str, np.ndarray[Any, Any]] = {}
    with found.errors_of("sample masks"):
        kept = _kept(job, designs)
    if len(kept) == len(designs):
        _examine_contrasts(job, designs, kept, found)
    if found.failed():
        return Examination(found, None, described)
    mask = next(iter(described.values())).run["mask"]
    models = Models(designs, kept, None if job.mask is None else mask_sha256(mask.to_numpy()))
    _examine_room(job, models, described, found)
    return Examination(found, None if found.failed() else models, described)


def _check_threshold(job: Job) -> None:
    if not (np.isfinite(job.threshold) and job.threshold >= 0):
        raise InputError(f"The threshold of the pictures is {job.threshold}; it must be 0 or more.")


def _check_numbers(job: Job) -> None:
    if len(job.designs) != len(job.runs):
        raise InputError(
            f"There are {len(job.runs)} runs and {len(job.designs)} designs. Give --design once for each run, in their order."
        )
    if job.sample_masks and len(job.sample_masks) != len(job.runs):
        raise InputError(
            f"There are {len(job.runs)} runs and {len(job.sample_masks)} sample masks. Give --sample-mask once for each run, "
            "in their order, 'all' for a run that keeps all its volumes."
        )


# ----------------------------------------------------------------------------------------------------------------- runs


def _examine_runs(job: Job, found: _Found) -> dict[str, Description]:
    """Describe what the runs will be, by label; those that are wrong are left out."""
    described = {}
    for number, run in enumerate(job.runs, start=1):
        with found.errors_of(run):
            one = describe_run(run, **{**job.run_options, "mask": None})
            check_within(grids.grid_of(one.run), list(enumerate(job.cut_coords or ())))
            _check_end(run)
            described[str(number)] = one
            found.add("ok", run, _about(one.run))
            _examine_sidecar(run, one.run, found, given=job.t_r is not None)
            if job.mask is None:
                _examine_sample(run, None, found)
        if job.mask is None or str(number) not in described:
            continue
        with found.errors_of(job.mask):
            described[str(number)] = one = describe_run(run, **job.run_options)
            _examine_sample(run, one.run["mask"].to_numpy(), found)
    return described


def _about(run: xr.Dataset) -> str:
    sizes = run.sizes
    voxel = " x ".join(f"{size:.3g}" for size in grids.voxel_sizes(np.array(grids.grid_of(run).affine)))
    return (
        f"{sizes['x']} x {sizes['y']} x {sizes['z']} voxels of {voxel} mm, {sizes['time']} volumes of "
        f"{run.attrs['repetition_time']:g} s"
    )


def _check_end(run: str) -> None:
    """Refuse a gzip file whose end does not tell of as many bytes as its header promises.

    That is what a copy that was cut off looks like; or several gzip streams in one file, so that is read to its end.
    """
    if nifti.ends_as_promised(run):
        return
    with nifti.open_reader(run) as reader:
        for _ in reader.blocks(max(1, (1 << 24) // reader.header.volume_bytes)):
            pass


def _examine_sidecar(run: str, ds: xr.Dataset, found: _Found, *, given: bool) -> None:
    """Hold a JSON sidecar of BIDS, or of dcmstack, against the header."""
    path = nifti.sidecar_of(run)
    if path is None or not path.is_file():
        return
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found.add("warning", str(path), f"the sidecar cannot be read: {error}")
        return
    if not isinstance(sidecar, dict):
        found.add("warning", str(path), "the sidecar holds no object of JSON")
        return
    for problem in _sidecar_problems(sidecar, ds, given=given):
        found.add("warning", str(path), problem)


def _sidecar_problems(sidecar: dict[str, Any], ds: xr.Dataset, *, given: bool) -> Iterator[str]:
    t_r, says = ds.attrs["repetition_time"], sidecar.get("RepetitionTime")
    if isinstance(says, int | float) and not isinstance(says, bool) and not given:
        if says > LONG_T_R:
            yield f"the repetition time there is {says:g} s, which is hardly meant: BIDS counts seconds"
        elif abs(says - t_r) > SAME_T_R:
            yield (
                f"the repetition time there is {says:g} s, and {t_r:g} s in the header, which is used. Give the right one: "
                "--t-r"
            )
    timing = sidecar.get("SliceTiming")
    if isinstance(timing, list) and len(timing) not in {ds.sizes[dim] for dim in ("x", "y", "z")}:
        yield f"there are times of {len(timing)} slices, but the image has {ds.sizes['z']}"
    shape = sidecar.get("dcmmeta_shape")
    expected = [ds.sizes[dim] for dim in ("x", "y", "z", "time")]
    if isinstance(shape, list) and shape != expected:
        yield f"the shape there is {shape}, and {expected} in the header"
    affine = sidecar.get("dcmmeta_affine")
    if affine is not None:
        try:
            same = np.allclose(np.asarray(affine, dtype=np.float64), grids.grid_of(ds).affine, atol=1e-3)
        except (ValueError, TypeError):
            same = False
        if not same:
            yield "the affine there is not that of the header"


def _examine_sample(run: str, mask: np.ndarray[Any, Any] | None, found: _Found) -> None:
    """Look at the first volumes: voxels that are not finite, or that do not vary."""
    with nifti.open_reader(run) as reader:
        block = np.empty((min(SAMPLE, reader.shape[0]), *reader.shape[1:]), dtype=reader.native_dtype)
        reader.read(block, 0)
    unit = reader.header.space_unit
    if unit not in {None, "millimetres"}:
        found.add("warning", run, f"its header says that lengths are in {unit}; they are read as millimetres")
    values = block.reshape(len(block), -1) if mask is None else block[:, mask]
    n = values.shape[1]
    where = "image" if mask is None else "mask"
    lost = int((~np.isfinite(values)).any(axis=0).sum()) if values.dtype.kind == "f" else 0
    if lost:
        found.add(
            "warning", run, f"{lost:,} of {n:,} voxels in the {where} are not finite in the first volumes"
        )
    still = int((values == values[0]).all(axis=0).sum()) if len(values) > 1 else 0
    if still > MANY * n and mask is not None:
        found.add(
            "warning",
            run,
            f"{still:,} of {n:,} voxels in the mask do not vary over the first {len(values)} volumes; where they never do, "
            "they are NaN",
        )
    if not np.any(values):
        found.add("warning", run, f"the first {len(values)} volumes are zero")


def _compare_runs(job: Job, described: Mapping[str, Description], found: _Found) -> None:
    """Hold the headers of the runs against each other."""
    runs = {label: one.run for label, one in described.items()}
    if not runs:
        return
    first, *others = runs
    for label in others:
        name = job.runs[int(label) - 1]
        with found.errors_of(name):
            grids.check_same_grid(
                grids.grid_of(runs[label]), grids.grid_of(runs[first]), name, job.runs[int(first) - 1]
            )
    times = {run.attrs["repetition_time"] for run in runs.values()}
    if max(times) - min(times) > SAME_T_R:
        listed = ", ".join(f"{time:g}" for time in sorted(times))
        found.add(
            "warning",
            "runs",
            f"their repetition times differ ({listed} s). Check that the designs were made for them",
        )
    doubled = len(set(job.runs)) < len(job.runs)
    if doubled:
        found.add("warning", "runs", "the same file is given more than once")


# -------------------------------------------------------------------------------------------------------------- designs


def _examine_designs(
    job: Job, described: Mapping[str, Description], found: _Found
) -> dict[str, pd.DataFrame]:
    """Designs by label of their run, each held against its run."""
    designs: dict[str, pd.DataFrame] = {}
    for number, path in enumerate(job.designs, start=1):
        label = str(number)
        with found.errors_of(path):
            design = read_design(path, columns=names_for(path, job.column_names))
            designs[label] = as_design(design, n_volumes=len(design), run=label)
            n_volumes = described[label].run.sizes["time"] if label in described else len(design)
            if len(design) != n_volumes:
                raise DesignError(
                    f"{path} has {len(design)} rows and {job.runs[number - 1]} has {n_volumes} volumes. A design has one row "
                    "for each volume; check that they belong together, in this order."
                )
            found.add("ok", path, f"{len(design)} volumes, {design.shape[1]} regressors")
    return designs


def _kept(job: Job, designs: Mapping[str, pd.DataFrame]) -> dict[str, np.ndarray[Any, Any]]:
    """Volumes that are not censored, by run label."""
    paths = job.sample_masks or ("all",) * len(job.runs)
    return {
        label: kept_volumes(sample_mask_of(path), len(design), path)
        for (label, design), path in zip(designs.items(), paths, strict=True)
    }


def _examine_contrasts(
    job: Job, designs: Mapping[str, pd.DataFrame], kept: Mapping[str, np.ndarray[Any, Any]], found: _Found
) -> None:
    """Whether each contrast can be estimated, and how well the design tells its regressors apart."""
    regressors = list(dict.fromkeys(str(name) for design in designs.values() for name in design.columns))
    used: dict[str, list[str]] = {}
    for name, definition in job.contrasts.items():
        with found.errors_of(f"contrast {name}"):
            check_contrast(definition, list(designs.values()), list(kept.values()), name)
            used[name] = _weighted(definition, regressors)
            found.add("ok", f"contrast {name}", "a combination of " + ", ".join(used[name]))
    for path, (label, design) in zip(job.designs, designs.items(), strict=True):
        columns = [str(name) for name in design.columns]
        for name, needed in used.items():
            if lacking := [one for one in needed if one not in columns]:
                text = f"lacks {', '.join(lacking)}, so run {label} is left out of the contrast {name}"
                found.add("note", path, text)
        left = design.to_numpy(dtype=np.float64)[kept[label]]
        together = [name for name, one in zip(columns, estimable_regressors(left), strict=True) if not one]
        if together:
            found.add(
                "warning",
                path,
                f"{', '.join(together)} cannot be told apart from each other (rank {np.linalg.matrix_rank(left)} of "
                f"{len(columns)}); contrasts that need that are refused",
            )
        inflation = dict(zip(columns, variance_inflation(left), strict=True))
        for name in sorted({one for needed in used.values() for one in needed if one in columns}):
            if inflation[name] > LARGE_INFLATION and name not in together:
                found.add(
                    "warning",
                    path,
                    f"the variance of {name} is inflated {inflation[name]:.0f} times by what other regressors share with it",
                )


def _weighted(definition: Definition, regressors: list[str]) -> list[str]:
    """Regressors that a contrast gives a weight."""
    with warnings.catch_warnings():
        # The contrast itself will say what is filled up or left out.
        warnings.simplefilter("ignore", ChunkGLMWarning)
        weights = contrast_rows(definition, regressors).weights
    return [regressors[number] for number in np.flatnonzero(weights.any(axis=0))]


# ----------------------------------------------------------------------------------------------------------------- room


def _examine_room(job: Job, models: Models, described: Mapping[str, Description], found: _Found) -> None:
    """Hold memory and disk that are needed against what there is."""
    memory = plan.parse_memory(job.memory)
    with found.errors_of("memory"):
        check_memory(job, models, described)
        available = plan.available_memory()
        about = "" if available is None else f", of {plan.format_bytes(available)} that are free"
        level = "warning" if available is not None and available < memory else "ok"
        least = plan.format_bytes(max(least_memory(job, models, described).values()))
        text = f"{plan.format_bytes(memory)} are allowed{about}; at least about {least} are needed"
        found.add(level, "memory", text)
    needed, free, where = _room_on_disk(job, models, described)
    text = f"the results take about {plan.format_bytes(needed)}, and {plan.format_bytes(free)} are free at {where}"
    if needed > 2 * free:
        error = StoreError(f"{text[0].upper()}{text[1:]}. Make room, or choose another --output.")
        found.append(Finding("error", "disk", str(error), error))
    else:
        found.add("warning" if needed > free else "ok", "disk", text)


def _room_on_disk(job: Job, models: Models, described: Mapping[str, Description]) -> Room:
    needed = disk_needed(job, models, described) - _bytes_of(job.output)
    place = next(one for one in (job.output.absolute(), *job.output.absolute().parents) if one.exists())
    return Room(max(needed, 0), shutil.disk_usage(place).free, str(place))


def disk_needed(job: Job, models: Models, described: Mapping[str, Description]) -> int:
    """Estimate the bytes that the results of a job take."""
    runs = [one.run for one in described.values()]
    voxels = runs[0]["mask"].size if job.mask is None else int(runs[0]["mask"].sum())
    # A smoothed run holds the voxels of a mask, and noise in all bits of them.
    smoothed = job.smoothing_fwhm is not None and job.mask is not None
    stored = sum(
        4 * voxels * one.sizes["time"] / MADE
        if smoothed
        else one["bold"].size * one["bold"].dtype.itemsize / STORED
        for one in runs
    )
    columns = {name for design in models.designs.values() for name in design.columns}
    order = check_options(job.noise_model, job.signal_scaling, job.compat)
    per_voxel = len(columns) + 2 + (LARGEST_AUTO_ORDER if order is None else order)
    maps = 5 * len(job.contrasts) * (len(runs) + 1)
    return math.ceil(stored + 8 * voxels * (per_voxel * len(runs) + maps) / MADE)


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
