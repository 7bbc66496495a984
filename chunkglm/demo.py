"""The reference example, from recordings to pictures: on simulated sessions with known truth, or on the original ones."""

from __future__ import annotations

import shlex
import shutil
import sys
import warnings
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkglm import nifti
from chunkglm.cluster import stage
from chunkglm.errors import ChunkGLMWarning, InputError, MissingDependencyError, StoreExistsError
from chunkglm.job import Summary, run_job
from chunkglm.maps import MEAN_IMAGE, PROVENANCE, map_name
from chunkglm.request import Job
from chunkglm.testing import write_simulated_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    import xarray as xr
    from numpy.typing import NDArray
    from rich.console import Console

CONTRAST = "DSt_minus_SSt"
WEIGHTS = [-1.0, -1.0, 1.0, 1.0]
SESSIONS = (1, 2)
SMOOTHING = 5.0

SIMULATED_CUTS = (-28.0, -8.0, 6.0)
"""A point from which the three cuts meet all the regions that respond to the contrast."""

FIAC_CUTS = (-129.0, -126.0, 49.0)
"""Where the reference cuts the maps of the original recordings."""

FIAC_T_R = 2.5
"""Seconds (Dehaene-Lambertz et al. 2006, Hum Brain Mapp 27:360-371); the designs are ready-made and do not depend on it."""


@dataclass(frozen=True)
class Outcome:
    """What the demo did and found."""

    about: str
    command: str
    summary: Summary
    lines: list[str]


def run_simulated(output: Path, console: Console, *, quiet: bool = False, overwrite: bool = False) -> Outcome:
    """Simulate two sessions, do the whole job on them, and hold the result against the truth.

    Parameters
    ----------
    output : Path
        Folder; the recordings go to ``data`` in it.
    console : rich.console.Console
        For progress.
    quiet, overwrite : bool

    Returns
    -------
    Outcome

    Raises
    ------
    ChunkGLMError
        As of the job.
    """
    data = _data_folder(output, overwrite=overwrite)
    truths = []
    with stage(console, "Simulating", "sessions", quiet=quiet) as progress:
        for session in SESSIONS:
            truths.append(_simulate(data, session))
            if progress is not None:
                progress(session, len(SESSIONS))
    job = _job(
        runs=tuple(str(data / f"session{s}.nii.gz") for s in SESSIONS),
        designs=tuple(str(data / f"session{s}_design.npz") for s in SESSIONS),
        mask=str(data / "mask.nii.gz"),
        cut_coords=SIMULATED_CUTS,
        output=output,
        overwrite=overwrite,
    )
    command, summary = _run(job, console, quiet=quiet)
    effect = nifti.read_map(output / "maps" / f"{map_name(CONTRAST, 'effect')}.nii.gz").values
    lines = [_recovery(truths[0], effect), _peaks(summary), *_what_next(output, summary, "DSt + DSp")]
    return Outcome(f"Two simulated sessions, smoothed by {SMOOTHING:g} mm.", command, summary, lines)


def run_fiac(output: Path, console: Console, *, quiet: bool = False, overwrite: bool = False) -> Outcome:
    """Do the whole job on the recordings of the reference example, which nilearn downloads once.

    Parameters
    ----------
    output : Path
        Folder; the designs go to ``data`` in it.
    console : rich.console.Console
        For progress.
    quiet, overwrite : bool

    Returns
    -------
    Outcome

    Raises
    ------
    MissingDependencyError
        If nilearn (extra ``nilearn``) is not installed.
    InputError
        If the recordings are not there and cannot be downloaded.
    ChunkGLMError
        As of the job.
    """
    fetched = _fetch_fiac(verbose=not quiet)
    data = _data_folder(output, overwrite=overwrite)
    designs = []
    for session in SESSIONS:
        designs.append(str(data / f"session{session}_design.csv"))
        _with_different_names(fetched[f"design_matrix{session}"]).to_csv(designs[-1], index=False)
    job = _job(
        runs=tuple(str(fetched[f"func{s}"]) for s in SESSIONS),
        designs=tuple(designs),
        mask=str(fetched["mask"]),
        t_r=FIAC_T_R,
        cut_coords=FIAC_CUTS,
        output=output,
        overwrite=overwrite,
    )
    command, summary = _run(job, console, quiet=quiet)
    about = f"The two sessions of the reference example (FIAC), smoothed by {SMOOTHING:g} mm."
    return Outcome(about, command, summary, [_peaks(summary), *_what_next(output, summary, "[0,0,1,1]")])


def program() -> str:
    """How this command line was called, as it can be typed again."""
    called, found = Path(sys.argv[0]), shutil.which("chunkglm")
    if called.name == "__main__.py":
        return f"{Path(sys.executable).name} -m chunkglm"
    elsewhere = called.stem == "chunkglm" and called.exists() and not (found and called.samefile(found))
    return shlex.quote(str(called)) if elsewhere else "chunkglm"


# --------------------------------------------------------------------------------------------------------- recordings


def _data_folder(output: Path, *, overwrite: bool) -> Path:
    """Make the folder for recordings in one that is new, or that an earlier demo left."""
    left_by_demo = (output / "runs.zarr").exists() or (output / PROVENANCE).exists()
    if output.exists() and not (overwrite or left_by_demo) and (not output.is_dir() or any(output.iterdir())):
        raise StoreExistsError(
            f"{output} exists and holds something else. Choose another --output, or say --overwrite to write into it."
        )
    data = output / "data"
    data.mkdir(parents=True, exist_ok=True)
    return data


def _simulate(data: Path, session: int) -> xr.Dataset:
    # The same bytes every time: what exists is made again, and is the same.
    return write_simulated_run(
        data / f"session{session}.nii.gz",
        data / f"session{session}_design.npz",
        data / "mask.nii.gz",
        overwrite=True,
        session=session,
    )


def _fetch_fiac(*, verbose: bool) -> Mapping[str, Any]:
    try:
        from nilearn.datasets import fetch_fiac_first_level  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise MissingDependencyError(
            "The original recordings are fetched by nilearn, which is not installed. Install it with: "
            "pip install 'chunkglm[nilearn]'"
        ) from error
    try:
        # nilearn prints what it does; standard output is for results.
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            fetched: Mapping[str, Any] = fetch_fiac_first_level(verbose=int(verbose))
    except (
        Exception
    ) as error:  # whatever urllib, requests, tarfile and nilearn raise where there is no network
        raise InputError(
            "The original recordings are not on this machine and could not be downloaded "
            f"({type(error).__name__}). Run this once where there is a network, or run `chunkglm demo`, which simulates "
            "its data."
        ) from error
    return fetched


def _with_different_names(design: pd.DataFrame) -> pd.DataFrame:
    """The design with a number behind the names that occur before."""
    seen: Counter[str] = Counter()
    names = []
    for name in map(str, design.columns):
        names.append(f"{name}_{seen[name] + 1}" if seen[name] else name)
        seen[name] += 1
    return design.set_axis(names, axis="columns")


# ------------------------------------------------------------------------------------------------------------ the job


def _job(**asked: Any) -> Job:
    """What the reference example asks of any two sessions."""
    return Job(smoothing_fwhm=SMOOTHING, contrasts={CONTRAST: WEIGHTS}, **asked)


def _run(job: Job, console: Console, *, quiet: bool) -> tuple[str, Summary]:
    """Do the job; returns the command that does the same, too."""
    words: list[str] = ["chunkglm", "run", *job.runs]
    for design in job.designs:
        words += ["--design", design]
    weights = ",".join(f"{w:g}" for w in WEIGHTS)
    words += [
        "--mask",
        str(job.mask),
        "--smoothing-fwhm",
        f"{SMOOTHING:g}",
        "--contrast",
        f"{CONTRAST}=[{weights}]",
    ]
    if job.t_r is not None:
        words += ["--t-r", f"{job.t_r:g}"]
    if job.cut_coords is not None:
        words += ["--cut-coords", *(f"{mm:g}" for mm in job.cut_coords)]
    words += ["--output", str(job.output)]
    with warnings.catch_warnings():
        # The four weights of the example are meant for the first four of the regressors.
        warnings.filterwarnings("ignore", ".*these get weight 0", ChunkGLMWarning)
        shown = f"{program()} {shlex.join(words[1:])}"
        return shown, run_job(replace(job, command=tuple(words)), console, quiet=quiet)


def _recovery(truth: xr.Dataset, effect: NDArray[Any]) -> str:
    """How well the truth was recovered, in words."""
    mask = truth["mask"].values
    true = np.tensordot(np.array(WEIGHTS), truth["true_effect"].values, axes=1)[mask]
    found = effect[mask]
    r = np.corrcoef(true, found)[0, 1]
    strong = np.abs(true) > 0.5 * np.abs(true).max()
    signs = np.mean(np.sign(found[strong]) == np.sign(true[strong]))
    return (
        f"Truth recovered: the effect correlates with the simulated one at r = {r:.2f} over {mask.sum():,} voxels; where the "
        f"simulated effect is strong ({strong.sum():,} voxels), its sign is right in {100 * signs:.1f} %, and it is "
        f"{np.mean(found[strong] * np.sign(true[strong])):.2f} % of the signal on average against "
        f"{np.mean(np.abs(true[strong])):.2f} % before smoothing."
    )


def _peaks(summary: Summary) -> str:
    """Whether combining sessions paid."""
    highest = {p["run"]: p["highest"]["z"] for p in summary.peaks if p["highest"] is not None}
    combined = highest.pop(None)
    shown = " and ".join(f"{z:.2f}" for z in highest.values())
    verdict = (
        "higher than either session"
        if combined > max(highest.values())
        else "not higher than the better session"
    )
    return f"Fixed effects peak at z = {combined:.2f}, {verdict} ({shown})."


def _what_next(output: Path, summary: Summary, question: str) -> list[str]:
    """Where to look, and three things to try."""
    me, folder = program(), shlex.quote(str(output))
    z_map = f"{folder}/maps/{map_name(CONTRAST, 'z')}.nii.gz"
    next_steps = (
        "Three things to try next:\n"
        "  1. every slice of the map\n"
        f"     {me} plot {z_map} --background {folder}/maps/{MEAN_IMAGE} --kind mosaic --output slices.png\n"
        "  2. another question of the same fit, without fitting again\n"
        f'     {me} contrast {folder}/fit.zarr --contrast "different={question}" --output different.zarr\n'
        "  3. your own runs\n"
        f"     {me} run --help"
    )
    if summary.report is None:
        return [next_steps]
    return [f"Look at the picture: {summary.pictures[0]}\nRead the report:     {summary.report}", next_steps]
