"""False positives of every noise model on noise alone.

Noise of known autocorrelation is fitted with designs of events or of blocks, and the two-sided rates of a contrast of two
conditions are counted at three levels. A rate should be the level itself; one that is larger finds effects where there are
none, one that is smaller misses some.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats
from scipy.signal import lfilter

from chunkglm.kernels import glm
from chunkglm.kernels.autocorrelation import Correction, lag_expectations, make_correction
from chunkglm.kernels.basis import make_basis
from chunkglm.kernels.uncertainty import make_frequencies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEVELS = (0.05, 0.01, 0.001)
NOISE = {
    "AR(1) 0": (0.0,),
    "AR(1) .2": (0.2,),
    "AR(1) .4": (0.4,),
    "AR(1) .6": (0.6,),
    "AR(1) .8": (0.8,),
    "AR(2) .5 .2": (0.5, 0.2),
}
"""Coefficients of the noise, by what the table calls them."""

LENGTHS = (100, 200, 400)
CENSORED = 0.2
"""Part of the volumes that are left out at random, in the rows that say so."""

MODELS = ("ols", "compat", "default", "ar2")
N_REGRESSORS = 16
T_R = 2.0
BATCH = 20_000
PICTURE = Path(__file__).parent / "calibration.png"


def make_design(kind: str, n_volumes: int, seed: int) -> Floats:
    """Four conditions of events or blocks with nilearn's response, cosine drift, constant: (volume, 16)."""
    import pandas as pd
    from nilearn.glm.first_level import make_first_level_design_matrix

    rng = np.random.default_rng(seed)
    spacing, duration = (8.0, 1.0) if kind == "events" else (30.0, 15.0)
    onsets = np.arange(4.0, n_volumes * T_R - 20, spacing)
    onsets += rng.uniform(0, spacing / 4, onsets.size)
    conditions = rng.permutation(np.arange(onsets.size) % 4)
    events = pd.DataFrame(
        {"onset": onsets, "duration": duration, "trial_type": [f"condition{c}" for c in conditions]}
    )
    n_drifts = N_REGRESSORS - 5
    options: dict[str, Any] = {"drift_model": "cosine", "high_pass": (n_drifts + 0.5) / (2 * n_volumes * T_R)}
    made = make_first_level_design_matrix(np.arange(n_volumes) * T_R, events, **options)
    return np.asarray(made, dtype=np.float64)


def make_noise(
    rng: np.random.Generator, n_volumes: int, n_voxels: int, coefficients: Sequence[float]
) -> Floats:
    """Stationary noise (volume, voxel); what came before the first volume is run through and dropped."""
    before = 200
    white = rng.standard_normal((n_volumes + before, n_voxels))
    noise: Floats = lfilter([1.0], [1.0, *(-c for c in coefficients)], white, axis=0)[before:]
    return noise


def p_values(noise: Floats, weights: Floats, models: dict[str, glm.Model]) -> dict[str, Floats]:
    """Two-sided p values of a contrast at every voxel, by model."""
    found = {}
    for name, model in models.items():
        # The reference drops censored volumes.
        data = noise[models["ols"].basis.kept] if model.reference_rules else noise
        fit = glm.fit_voxels([data], np.arange(noise.shape[1]), model)
        covariance = glm.contrast_covariance(model.basis, weights[None], fit.rho)[0, 0]
        t = weights @ fit.beta / np.sqrt(fit.sigma2 * covariance)
        dof: Any = model.dof
        if model.correction is not None:
            known = (
                model.correction
                if isinstance(model.correction, Correction)
                else make_frequencies(model.basis)
            )
            (dof,) = glm.effective_dofs(model.basis, [weights[None]], fit.rho, known, model.dof)
        found[name] = 2 * stats.t.sf(np.abs(t), dof)
    return found


def models_of(X: Floats, kept: NDArray[np.bool_]) -> dict[str, glm.Model]:
    """Every noise model for one design."""
    bases = {
        "ols": make_basis(X, kept, order=0),
        "compat": make_basis(X[kept]),
        "default": make_basis(X, kept),
        "ar2": make_basis(X, kept, order=2),
    }
    corrections: dict[str, Any] = {
        "default": make_correction(bases["default"]),
        "ar2": lag_expectations(bases["ar2"]),
    }
    return {
        name: glm.Model(basis, basis.n_kept - basis.rank, "none", name == "compat", corrections.get(name))
        for name, basis in bases.items()
    }


def rates(
    kind: str, n_volumes: int, coefficients: Sequence[float], n_voxels: int, n_designs: int, *, censored: bool
) -> dict[str, Floats]:
    """Rates at every level, by model, over several designs."""
    counts: dict[str, Floats] = {}
    total = 0
    for seed in range(n_designs):
        X = make_design(kind, n_volumes, seed)
        weights = np.zeros(X.shape[1])
        weights[:2] = 1.0, -1.0
        rng = np.random.default_rng([seed, n_volumes, *(int(1000 * c) for c in coefficients)])
        kept = rng.random(n_volumes) >= CENSORED if censored else np.ones(n_volumes, dtype=bool)
        models = models_of(X, kept)
        for start in range(0, n_voxels, BATCH):
            noise = make_noise(rng, n_volumes, min(BATCH, n_voxels - start), coefficients)
            total += noise.shape[1]
            for name, p in p_values(noise, weights, models).items():
                counts[name] = counts.get(name, np.zeros(len(LEVELS))) + [
                    (p < level).sum() for level in LEVELS
                ]
    return {name: count / total for name, count in counts.items()}


def draw(table: list[tuple[str, str, str, dict[str, Floats]]], path: Path) -> None:
    """The rates at the smallest level, in units of that level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, len(LENGTHS), sharey=True, squeeze=False)[0]
    colours = {"ols": "#c8553d", "compat": "#e0a030", "default": "#0b5cad", "ar2": "#4f9d69"}
    for ax, n_volumes in zip(axes, LENGTHS, strict=True):
        for model, colour in colours.items():
            for kind, line in (("events", "-"), ("blocks", "--")):
                rows = [r for k, n, _, r in table if n == str(n_volumes) and k == kind]
                ax.plot(
                    [r[model][-1] / LEVELS[-1] for r in rows], line, color=colour, marker="o", markersize=3
                )
        ax.axhline(1, color="black", linewidth=0.7)
        ax.set_yscale("log")
        ax.set_title(f"{n_volumes} volumes", fontsize=10)
        ax.set_xticks(range(len(NOISE)), list(NOISE), rotation=60, fontsize=8)
    axes[0].set_ylabel("false positives at .001, times .001", fontsize=9)
    handles = [axes[0].plot([], [], color=colour, label=model)[0] for model, colour in colours.items()]
    handles += [
        axes[0].plot([], [], line, color="grey", label=kind)[0]
        for kind, line in (("events", "-"), ("blocks", "--"))
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(arguments: Sequence[str]) -> None:
    """Print the table, and draw it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks calibration", description=__doc__)
    parser.add_argument("--voxels", type=int, default=40_000, help="of noise, for each design")
    parser.add_argument("--designs", type=int, default=5, help="random orders of events, for each row")
    parser.add_argument("--volumes", type=int, nargs="*", default=list(LENGTHS))
    parser.add_argument(
        "--censored", type=int, default=200, help="volumes of the rows with censoring; 0: none"
    )
    parser.add_argument("--picture", type=Path, help="file to draw to; needs all lengths")
    given = parser.parse_args(arguments)
    head = " | ".join(f"{model} {level:g}".replace("0.", ".") for model in MODELS for level in LEVELS)
    print(f"| design | volumes | noise | {head} |")
    print("|---|---|---|" + "---|" * (len(MODELS) * len(LEVELS)))
    table = []
    kinds = [(kind, n, False) for kind in ("events", "blocks") for n in given.volumes]
    kinds += [(kind, given.censored, True) for kind in ("events", "blocks") if given.censored]
    for kind, n_volumes, censored in kinds:
        for name, coefficients in NOISE.items():
            found = rates(kind, n_volumes, coefficients, given.voxels, given.designs, censored=censored)
            shown = f"{n_volumes}, {CENSORED:.0%} censored" if censored else str(n_volumes)
            table.append((kind, shown, name, found))
            cells = " | ".join(f"{rate:.4f}".lstrip("0") for model in MODELS for rate in found[model])
            print(f"| {kind} | {shown} | {name} | {cells} |", flush=True)
    if given.picture is not None:
        draw(table, given.picture)


if __name__ == "__main__":
    main(sys.argv[1:])
