"""What is asked for: a job, and the models of its runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from chunkglm import budget, plan
from chunkglm.design import read_sample_mask

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import pandas as pd

    from chunkglm.expressions import Parsed


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
    memory: str = field(default_factory=budget.configured)
    n_threads: int = field(default_factory=plan.available_cpus)
    threshold: float = 3.0
    cut_coords: tuple[float, float, float] | None = None
    report: bool = True
    overwrite: bool = False
    command: tuple[str, ...] = ()
    scheduler: str = "threads"
    workers: int | None = None
    performance_report: Path | None = None

    @property
    def run_options(self) -> dict[str, Any]:
        """What runs are converted with."""
        return {"mask": self.mask, "t_r": self.t_r, "smoothing_fwhm": self.smoothing_fwhm}

    @property
    def fit_options(self) -> dict[str, Any]:
        """What runs are fitted with."""
        return {
            "noise_model": self.noise_model,
            "signal_scaling": self.signal_scaling,
            "compat": self.compat,
        }


class Models(NamedTuple):
    """What the runs are fitted with, by label: their designs, and their volumes that are not censored."""

    designs: dict[str, pd.DataFrame]
    kept: dict[str, np.ndarray[Any, Any]]
    mask: str | None
    """Hash of the mask that is given."""


def sample_mask_of(path: str) -> np.ndarray[Any, Any] | None:
    """Read what ``--sample-mask`` names: a file, or ``all`` for a run that keeps all its volumes."""
    return None if path == "all" else read_sample_mask(path)


def names_for(path: str, names: list[str] | None) -> list[str] | None:
    """Names for a design's columns: ``--column-names`` is for designs that have none of their own."""
    return None if path.lower().endswith((".csv", ".tsv")) else names
