"""The study that benchmarks work on: simulated runs with designs and a mask, made once and kept in ``benchmarks/cache``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import nibabel as nib
import numpy as np
from scipy.ndimage import distance_transform_edt

from chunkglm.testing import write_simulated_run

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

CACHE = Path(__file__).parent / "cache"
SHAPE = (91, 109, 91)
N_REGRESSORS = 20


class Study(NamedTuple):
    """Files of runs, of a design for each, and of a mask."""

    runs: list[Path]
    designs: list[Path]
    mask: Path

    def words(self) -> list[str]:
        """Arguments of ``chunkglm run``."""
        return [*map(str, self.runs), *self.design_words(), "--mask", str(self.mask)]

    def design_words(self) -> list[str]:
        """The designs, as arguments of ``chunkglm run`` and ``fit``."""
        return [word for design in self.designs for word in ("--design", str(design))]


def make_study(
    n_runs: int = 2,
    n_volumes: int = 284,
    shape: Sequence[int] = SHAPE,
    n_voxels: int = 240_000,
    suffix: str = ".nii.gz",
) -> Study:
    """Make what is not there yet: int16 runs of 2 mm, designs of 20 regressors, the innermost voxels of the brain as mask."""
    CACHE.mkdir(exist_ok=True)
    stem = "x".join(map(str, (*shape, n_volumes)))
    runs = [CACHE / f"{stem}_{number}{suffix}" for number in range(1, n_runs + 1)]
    designs = [CACHE / f"{stem}_{number}_design.npz" for number in range(1, n_runs + 1)]
    mask = CACHE / f"{'x'.join(map(str, shape))}_{n_voxels}_mask.nii.gz"
    for session, (run, design) in enumerate(zip(runs, designs, strict=True)):
        if not (run.exists() and design.exists()):
            options: dict[str, Any] = {"shape": tuple(shape), "n_volumes": n_volumes, "voxel_size": 2.0}
            truth = write_simulated_run(run, **options, session=session, overwrite=True)
            write_design(design, truth)
    if not mask.exists():
        write_mask(mask, runs[0], n_voxels, tuple(shape))
    return Study(runs, designs, mask)


def write_design(path: Path, truth: Any) -> None:
    """The design of the simulation with as many drifts as make 20 regressors, or half the volumes."""
    X, names = truth["design"].values, [str(name) for name in truth["regressor"].values]
    n = len(X)
    # However long the run is: more regressors would be more work.
    few = [*range(min(X.shape[1], N_REGRESSORS) - 1), X.shape[1] - 1]
    X, names = X[:, few], [names[place] for place in few]
    while X.shape[1] < min(N_REGRESSORS, n // 2):
        k = X.shape[1] - 4
        drift = np.cos(np.pi * k * (np.arange(n) + 0.5) / n)
        X = np.insert(X, X.shape[1] - 1, drift, axis=1)
        names.insert(-1, f"drift_{k}")
    np.savez(path, X=X, conditions=np.array(names))


def write_mask(path: Path, run: Path, n_voxels: int, shape: tuple[int, ...]) -> None:
    """The innermost voxels of the brain."""
    truth_path = CACHE / f"{'x'.join(map(str, shape))}_anatomy.nii"
    truth = write_simulated_run(truth_path, shape=shape, n_volumes=20, voxel_size=2.0, overwrite=True)
    truth_path.unlink()
    brain = truth["mask"].values.T
    depth = distance_transform_edt(brain).ravel()
    inside = np.zeros(depth.size, dtype=np.uint8)
    inside[np.argsort(-depth, kind="stable")[: min(n_voxels, int(brain.sum()))]] = 1
    nib.Nifti1Image(inside.reshape(brain.shape), nib.load(run).affine).to_filename(path)


def add_options(parser: argparse.ArgumentParser, *, n_runs: int = 2) -> None:
    """Options that say how large the study is."""
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE)
    parser.add_argument("--volumes", type=int, default=284)
    parser.add_argument("--voxels", type=int, default=240_000, help="in the mask")
    parser.add_argument("--runs", type=int, default=n_runs)


def study_of(options: argparse.Namespace) -> Study:
    """The study that the options ask for."""
    return make_study(options.runs, options.volumes, options.shape, options.voxels)
