"""The reference example with nothing to download: two simulated sessions with known truth."""

from __future__ import annotations

import shlex
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from chunkglm.cluster import stage
from chunkglm.errors import ChunkGLMWarning
from chunkglm.job import Job, Summary, run_job
from chunkglm.testing import write_simulated_run

if TYPE_CHECKING:
    from pathlib import Path

    import xarray as xr
    from numpy.typing import NDArray
    from rich.console import Console

CONTRAST = "DSt_minus_SSt"
WEIGHTS = [-1.0, -1.0, 1.0, 1.0]
SESSIONS = (1, 2)


@dataclass(frozen=True)
class Outcome:
    """What the demo did and found."""

    command: str
    summary: Summary
    lines: list[str]


def run_demo(output: Path, console: Console, *, quiet: bool = False, overwrite: bool = False) -> Outcome:
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
    data = output / "data"
    data.mkdir(parents=True, exist_ok=True)
    truths = []
    with stage(console, "Simulating", "sessions", quiet=quiet) as progress:
        for session in SESSIONS:
            truths.append(_simulate(data, session))
            if progress is not None:
                progress(session, len(SESSIONS))
    job = Job(
        runs=tuple(str(data / f"session{s}.nii.gz") for s in SESSIONS),
        designs=tuple(str(data / f"session{s}_design.npz") for s in SESSIONS),
        mask=str(data / "mask.nii.gz"),
        smoothing_fwhm=5.0,
        contrasts={CONTRAST: WEIGHTS},
        output=output,
        overwrite=overwrite,
    )
    command = _command(job)
    with warnings.catch_warnings():
        # The four weights of the example are meant for the first four of the regressors.
        warnings.filterwarnings("ignore", ".*these get weight 0", ChunkGLMWarning)
        summary = run_job(job, console, quiet=quiet)
    image: Any = nib.load(output / "maps" / f"contrast-{CONTRAST}_stat-effect_statmap.nii.gz")
    return Outcome(command, summary, [_recovery(truths[0], image.get_fdata().T), _peaks(summary)])


def _simulate(data: Path, session: int) -> xr.Dataset:
    # The same bytes every time: what exists is made again, and is the same.
    return write_simulated_run(
        data / f"session{session}.nii.gz",
        data / f"session{session}_design.npz",
        data / "mask.nii.gz",
        overwrite=True,
        session=session,
    )


def _command(job: Job) -> str:
    words: list[str] = ["chunkglm", "run", *job.runs]
    for design in job.designs:
        words += ["--design", design]
    weights = ",".join(f"{w:g}" for w in WEIGHTS)
    words += ["--mask", str(job.mask), "--smoothing-fwhm", "5", "--contrast", f"{CONTRAST}=[{weights}]"]
    return shlex.join([*words, "--output", str(job.output)])


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
    combined = next(p["z"] for p in summary.peaks if p["run"] is None)
    sessions = [p["z"] for p in summary.peaks if p["run"] is not None]
    shown = " and ".join(f"{z:.2f}" for z in sessions)
    verdict = (
        "higher than either session" if combined > max(sessions) else "not higher than the better session"
    )
    return f"Fixed effects peak at z = {combined:.2f}, {verdict} ({shown})."
