"""Simulated recordings with known truth, and checks of laziness and memory; for users' tests too.

A simulated recording has an anatomy (brain mask, tissues, responding regions, autocorrelation), which depends
on the seed alone, and a session (order of events, drift, noise). Two sessions of one seed are the same brain.
"""

import gzip
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import dask
import nibabel as nib
import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.local import get_sync
from scipy import special

from chunkglm.errors import InputError, StoreExistsError

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]

REGIONS = (
    ((-0.55, -0.10, -0.10), 0.36, (0.3, 0.2, 1.0, 0.9)),
    ((0.55, -0.15, -0.05), 0.33, (0.2, 0.3, 0.8, 0.9)),
    ((0.05, 0.55, 0.30), 0.33, (0.9, 0.8, 0.3, 0.2)),
    ((0.00, -0.62, 0.00), 0.32, (0.7, 0.7, 0.7, 0.7)),
)
"""Responding regions: centre (x, y, z) and radius in units of the brain's half axes, and the response of each
condition relative to ``effect_percent``. The last two conditions minus the first two: positive in the first
two regions (temporal), negative in the third (frontal), 0 in the fourth (occipital)."""

BRAIN_HALF_AXES = (0.80, 0.90, 0.85)  # x, y, z, in units of half the volume
BACKGROUND_LEVEL, BACKGROUND_SD = 25.0, 5.0
EVENT_SPACING, EVENT_DURATION, SHORTEST_DRIFT_PERIOD = 18.0, 10.0, 128.0  # seconds
HRF_STEP, HRF_LENGTH = 0.1, 32.0  # seconds


def simulate_run(
    *,
    shape: tuple[int, int, int] = (40, 48, 36),
    n_volumes: int = 120,
    t_r: float = 2.0,
    voxel_size: float = 3.0,
    conditions: Sequence[str] = ("SSt", "SSp", "DSt", "DSp"),
    seed: int = 0,
    effect_percent: float = 1.5,
    noise_percent: float = 1.5,
    session: int = 0,
) -> xr.Dataset:
    """Simulate one brain-shaped recording with known truth, in memory.

    Parameters
    ----------
    shape : tuple of int
        Number of voxels along x, y and z.
    n_volumes : int
        Number of volumes; at least twice the regressors (conditions, drift, constant).
    t_r : float
        Repetition time in seconds.
    voxel_size : float
        Edge of the cubic voxels in millimetres.
    conditions : sequence of str
        Names of the conditions. The response profiles of the regions repeat after four.
    seed : int
        Decides the anatomy, and together with `session` everything else.
    effect_percent : float
        Response of the strongest condition at the centre of the strongest region, in percent of the baseline.
    noise_percent : float
        Standard deviation of the noise inside the brain, in percent of the baseline.
    session : int
        Decides the order of the events, the drift and the noise.

    Returns
    -------
    Dataset
        ``bold`` (time, z, y, x) int16, ``mask`` (z, y, x) bool, ``true_effect`` (condition, z, y, x) float64
        in percent of the voxel's baseline, ``true_rho`` (z, y, x) float64, the lag-1 autocorrelation of the
        noise, and ``design`` (volume, regressor) float64: the conditions (peak 1), ``drift_1`` ... and
        ``constant``. ``time`` is in seconds. Attributes: ``t_r``, ``voxel_size``, ``seed``, ``session`` and
        ``affine`` (nested lists): voxel numbers (x, y, z) to mm, RAS+, with 0 at the centre of the volume.

    Notes
    -----
    ``bold = baseline (1 + sum_c effect_c x_c(t) / 100 + drift(t) / 100) + e(t)``, rounded, where x_c are the
    columns of the design, the drift lies in their span, and ``e(t) = rho e(t - 1) + w(t)`` is stationary from
    the first volume on.
    """
    run = _Run(shape, n_volumes, t_r, voxel_size, conditions, seed, effect_percent, noise_percent, session)
    bold = np.empty((n_volumes, *shape[::-1]), dtype=np.int16)
    for index, volume in enumerate(run.volumes()):
        bold[index] = volume
    time = ("time", np.arange(n_volumes) * t_r, {"units": "s"})
    return run.truth().assign_coords(time=time).assign(bold=(("time", "z", "y", "x"), bold))


def simulate_volumes(**options: Any) -> Iterator[npt.NDArray[np.int16]]:
    """Yield the volumes of a simulated recording one after another, without holding them.

    Parameters
    ----------
    **options
        As of :func:`simulate_run`, which gives the same volumes.

    Returns
    -------
    iterator of ndarray of int16
        `n_volumes` arrays (z, y, x).
    """
    return _Run(**options).volumes()


def write_simulated_run(
    path: str | os.PathLike[str],
    design_path: str | os.PathLike[str] | None = None,
    mask_path: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    **options: Any,
) -> xr.Dataset:
    """Write a simulated recording as NIfTI-1, volume by volume: it may be larger than memory.

    Parameters
    ----------
    path : path-like
        File to write, ``.nii`` or ``.nii.gz``, int16 without scaling. The same options give the same bytes.
    design_path : path-like, optional
        Where to write the design, an ``.npz`` archive of ``X`` (volume, regressor) and ``conditions``, the
        names of its columns.
    mask_path : path-like, optional
        Where to write the brain mask, NIfTI-1 of uint8.
    overwrite : bool
        Whether to replace files that exist; else they raise StoreExistsError.
    **options
        As of :func:`simulate_run`.

    Returns
    -------
    Dataset
        What :func:`simulate_run` returns, without ``bold`` and ``time``.
    """
    run = _Run(**options)
    bold_to = _output_path(path, ".nii", ".nii.gz", overwrite=overwrite)
    design_to = None if design_path is None else _output_path(design_path, ".npz", overwrite=overwrite)
    mask_to = None if mask_path is None else _output_path(mask_path, ".nii", ".nii.gz", overwrite=overwrite)
    truth = run.truth()
    if design_to is not None:
        np.savez(design_to, X=run.design, conditions=np.array(run.regressors))
    if mask_to is not None:
        _write_nifti(mask_to, run.header(np.uint8), [truth["mask"].values])
    _write_nifti(bold_to, run.header(np.int16, run.n_volumes), run.volumes())
    return truth


@dataclass(frozen=True)
class _Anatomy:
    """What the seed decides. All maps are (z, y, x)."""

    mask: npt.NDArray[np.bool_]
    baseline: FloatArray
    response: FloatArray  # (condition, z, y, x), percent of the baseline
    rho: FloatArray
    drift: FloatArray  # strength of the drift, percent of the baseline


@dataclass(frozen=True)
class _Run:
    """One simulated recording; the defaults are those of :func:`simulate_run`."""

    shape: Sequence[int] = (40, 48, 36)
    n_volumes: int = 120
    t_r: float = 2.0
    voxel_size: float = 3.0
    conditions: Sequence[str] = ("SSt", "SSp", "DSt", "DSp")
    seed: int = 0
    effect_percent: float = 1.5
    noise_percent: float = 1.5
    session: int = 0

    def __post_init__(self) -> None:
        least = 2 * len(self.regressors)
        for name, good, accepted in (
            ("shape", len(self.shape) == 3 and min(self.shape) > 0, "three positive numbers (x, y, z)"),
            ("t_r", self.t_r > 0, "a positive number of seconds"),
            ("voxel_size", self.voxel_size > 0, "a positive number of millimetres"),
            ("conditions", 0 < len(set(self.conditions)) == len(self.conditions), "different names"),
            ("n_volumes", self.n_volumes >= least, f"at least {least}, twice the number of regressors"),
            ("noise_percent", self.noise_percent >= 0, "0 or more"),
            ("seed", self.seed >= 0, "0 or more"),
            ("session", self.session >= 0, "0 or more"),
        ):
            if not good:
                raise InputError(f"{name} is {getattr(self, name)!r}; accepted is: {accepted}.")

    @cached_property
    def regressors(self) -> list[str]:
        n_drifts = max(1, int(2 * self.n_volumes * self.t_r / SHORTEST_DRIFT_PERIOD))
        return [*map(str, self.conditions), *(f"drift_{k + 1}" for k in range(n_drifts)), "constant"]

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        affine = np.diag([self.voxel_size] * 3 + [1.0])
        affine[:3, 3] = -self.voxel_size * (np.array(self.shape) - 1) / 2
        return affine

    def header(self, dtype: npt.DTypeLike, *series: int) -> Any:
        """Header of the whole series, or of one volume if the number of volumes is not given."""
        new: Any = nib.Nifti1Header
        header = new(endianness="<")
        header.set_data_dtype(dtype)
        header.set_data_shape((*self.shape, *series))
        header.set_sform(self.affine, code="scanner")
        header.set_qform(self.affine, code="scanner")
        header.set_xyzt_units("mm", "sec")
        header.set_zooms([self.voxel_size] * 3 + [self.t_r] * len(series))
        return header

    @cached_property
    def anatomy(self) -> _Anatomy:
        rng = np.random.default_rng([self.seed, 0])
        halves = zip(self.shape, BRAIN_HALF_AXES, strict=True)
        x, y, z = ((2 * np.arange(n) + 1 - n) / (n * half) for n, half in halves)
        z, y, x = np.meshgrid(z, y, x, indexing="ij", sparse=True)
        radius = np.sqrt(x**2 + y**2 + z**2)
        mask = radius < 1
        folds = np.sin(14 * x + rng.uniform(0, 6)) * np.sin(14 * y + rng.uniform(0, 6)) * np.sin(14 * z)
        level = np.where(radius * (1 + 0.12 * folds) > 0.8, 1040.0, 880.0)
        ventricles = ((np.abs(x) - 0.14) / 0.1) ** 2 + (y / 0.35) ** 2 + ((z - 0.1) / 0.2) ** 2 < 1
        level[ventricles] = 700.0
        level *= 0.88 + 0.24 * _smooth_field(rng, (z, y, x))
        baseline = np.where(mask, level, BACKGROUND_LEVEL)
        rho = 0.1 + 0.4 * _smooth_field(rng, (z, y, x))
        drift = 2.0 * _smooth_field(rng, (z, y, x)) * mask
        response = np.zeros((len(self.conditions), *mask.shape))
        for centre, size, profile in REGIONS:
            shift = rng.uniform(-0.04, 0.04, 3)
            squares = [((u - c - s) / size) ** 2 for u, c, s in zip((x, y, z), centre, shift, strict=True)]
            blob = np.maximum(1 - sum(squares) ** 2, 0) ** 2 * (mask & ~ventricles)
            for index in range(len(self.conditions)):
                response[index] += self.effect_percent * profile[index % len(profile)] * blob
        return _Anatomy(mask, baseline, response, rho, drift)

    @cached_property
    def design(self) -> npt.NDArray[np.float64]:
        """(volume, regressor): conditions, drift, constant."""
        rng = np.random.default_rng([self.seed, 1, self.session])
        duration = self.n_volumes * self.t_r
        # One slot of every cycle is rest, without which the responses would add up to a constant.
        n_slots = len(self.conditions) + 1
        n_cycles = max(1, int(duration / (n_slots * EVENT_SPACING)))
        order = np.concatenate([rng.permutation(n_slots) for _ in range(n_cycles)])
        spacing = duration / order.size
        length = spacing * EVENT_DURATION / EVENT_SPACING
        onsets = (np.arange(order.size) + rng.uniform(0, 0.2, order.size)) * spacing
        frames = np.arange(self.n_volumes) * self.t_r
        responses = [_response(onsets[order == index], length, frames) for index in range(n_slots - 1)]
        angles = np.pi * (np.arange(self.n_volumes) + 0.5) / self.n_volumes
        drifts = [np.cos(k * angles) for k in range(1, len(self.regressors) - len(self.conditions))]
        return np.column_stack([*responses, *drifts, np.ones(self.n_volumes)])

    def truth(self) -> xr.Dataset:
        """Return the dataset without the recorded volumes."""
        space = ("z", "y", "x")
        labels = np.array(self.regressors, dtype=object)
        return xr.Dataset(
            {
                "mask": (space, self.anatomy.mask),
                "true_effect": (("condition", *space), self.anatomy.response, {"units": "%"}),
                "true_rho": (space, self.anatomy.rho),
                "design": (("volume", "regressor"), self.design),
            },
            coords={"condition": labels[: len(self.conditions)], "regressor": labels},
            attrs={name: getattr(self, name) for name in ("t_r", "voxel_size", "seed", "session")}
            | {"affine": self.affine.tolist()},
        )

    def volumes(self) -> Iterator[npt.NDArray[np.int16]]:
        """(z, y, x) int16 arrays, one for each time point."""
        anatomy, design = self.anatomy, self.design.astype(np.float32)
        baseline, rho = anatomy.baseline.astype(np.float32), anatomy.rho.astype(np.float32)
        sd = np.where(anatomy.mask, baseline * self.noise_percent / 100, BACKGROUND_SD).astype(np.float32)
        innovation_sd = sd * np.sqrt(1 - rho**2)
        drift = (anatomy.drift / 100 * anatomy.baseline).astype(np.float32)
        responding = np.flatnonzero(anatomy.response.any(axis=0))
        response = anatomy.response.reshape(len(self.conditions), -1)[:, responding] / 100
        response = (response * anatomy.baseline.reshape(-1)[responding]).astype(np.float32)

        rng = np.random.default_rng([self.seed, 2, self.session])
        drift_columns = design[:, len(self.conditions) : -1]
        drift_course = drift_columns @ rng.standard_normal(drift_columns.shape[1], dtype=np.float32)
        drift_course /= np.abs(drift_course).max()

        noise = sd * rng.standard_normal(sd.shape, dtype=np.float32)
        work = np.empty_like(sd)
        for index in range(self.n_volumes):
            np.multiply(drift, drift_course[index], out=work)
            work += baseline
            work += noise
            work.reshape(-1)[responding] += design[index, : len(self.conditions)] @ response
            np.rint(work, out=work)
            np.clip(work, 1, np.iinfo(np.int16).max, out=work)
            yield work.astype(np.int16)
            noise *= rho
            rng.standard_normal(dtype=np.float32, out=work)
            work *= innovation_sd
            noise += work


def _smooth_field(rng: np.random.Generator, grid: Sequence[FloatArray], n_waves: int = 5) -> FloatArray:
    """Sum of random plane waves over the grid, from 0 to 1."""
    field: FloatArray = np.zeros(np.broadcast_shapes(*(axis.shape for axis in grid)))
    for _ in range(n_waves):
        rates = rng.normal(0, 2.0, 3)
        field += np.cos(sum((rate * axis for rate, axis in zip(rates, grid, strict=True)), rng.uniform(0, 6)))
    field -= field.min()
    field /= max(float(field.max()), 1e-12)
    return field


def _response(onsets: FloatArray, duration: float, frames: FloatArray) -> FloatArray:
    """Response to equal events at the frame times (all in seconds), with peak 1.

    The response to an impulse is the double gamma density with SPM's parameters: a peak at 5 s, and an
    undershoot at 15 s of a sixth of its area.
    """
    delay = np.arange(0, HRF_LENGTH, HRF_STEP)
    impulse = _gamma_density(delay, 6) - _gamma_density(delay, 16) / 6
    time = np.arange(0, frames[-1] + HRF_STEP, HRF_STEP)
    active = ((time >= onsets[:, None]) & (time < onsets[:, None] + duration)).any(axis=0)
    course = np.interp(frames, time, np.convolve(active, impulse)[: time.size])
    return np.asarray(course / np.abs(course).max(), dtype=np.float64)


def _gamma_density(x: FloatArray, shape: float) -> FloatArray:
    density: FloatArray = np.exp(special.xlogy(shape - 1, x) - x - special.gammaln(shape))
    return density


def _output_path(path: str | os.PathLike[str], *endings: str, overwrite: bool) -> Path:
    """Check a file to be written."""
    path = Path(path)
    if not path.name.endswith(endings):
        raise InputError(f"Cannot write {path}: the name has to end in {' or '.join(endings)}.")
    if path.exists() and not overwrite:
        raise StoreExistsError(f"{path} exists. Choose another name, or replace it with overwrite=True.")
    return path


def _write_nifti(path: Path, header: Any, volumes: Iterable[npt.NDArray[Any]]) -> None:
    """Write (z, y, x) volumes, the order of NIfTI itself; the file has its name when it is complete."""
    partial = path.with_name(path.name + ".partial")
    with ExitStack() as stack:
        file: Any = stack.enter_context(partial.open("wb"))
        if path.suffix == ".gz":
            # Neither name nor time in the gzip header, so that equal images are equal files.
            file = stack.enter_context(gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0))
        # Compression takes as long as the simulation, so one volume is written while the next is made.
        pool = stack.enter_context(ThreadPoolExecutor(1))
        written = pool.submit(header.write_to, file)
        for volume in volumes:
            content = np.asarray(volume, header.get_data_dtype()).tobytes()
            written.result()
            written = pool.submit(file.write, content)
        written.result()
    partial.replace(path)


@contextmanager
def raise_if_computes(max_computes: int = 0) -> Iterator[None]:
    """Fail when dask computes more often than allowed: a check that code is lazy.

    A computation that is given its scheduler by argument, ``x.compute(scheduler="threads")``, is not seen.

    Parameters
    ----------
    max_computes : int
        How many computations are allowed. They run on the calling thread.

    Raises
    ------
    AssertionError
        At the first computation too many.
    """
    count = 0

    def get(graph: Any, keys: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > max_computes:
            raise AssertionError(f"This should be lazy: computation {count} began, {max_computes} allowed.")
        return get_sync(graph, keys, **kwargs)

    with dask.config.set(scheduler=get):
        yield


def peak_rss(statements: str, *, setup: str = "", timeout: float = 600) -> tuple[int, int]:
    """Measure the memory that code needs, in a fresh Python process.

    If the code fails, so does this, with a RuntimeError that shows what it wrote to standard error.

    Parameters
    ----------
    statements : str
        Python code to measure.
    setup : str
        Python code to run before, such as imports; its names are seen by `statements`.
    timeout : float
        Seconds until the process is killed and ``subprocess.TimeoutExpired`` raised.

    Returns
    -------
    base, peak : int
        Resident memory in bytes after `setup`, and the most there was while `statements` ran.
    """
    command = [sys.executable, "-c", _MEASURE, setup, statements]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"The measured code ended with status {done.returncode}:\n{done.stderr}")
    base, peak = done.stdout.splitlines()[-1].split()
    return int(base), int(peak)


# A new process takes over the peak of the one that started it in ru_maxrss, on Linux; VmHWM is its own.
_MEASURE = """
import resource, sys

def peak():
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

names = {"__name__": "__main__"}
exec(sys.argv[1], names)
try:
    with open("/proc/self/clear_refs", "w") as references:
        references.write("5")  # the peak starts again from what is held now
except OSError:
    pass
base = peak()
exec(sys.argv[2], names)
print(f"\\n{base} {peak()}")
"""
