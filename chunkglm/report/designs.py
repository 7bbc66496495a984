"""Pictures of design matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chunkglm.report.figures import figure_class

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from matplotlib.figure import Figure


MOST_ROWS = 300
"""Rows of a design in a picture."""


def plot_design(design: pd.DataFrame, contrasts: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw a design matrix with the weights of contrasts over it.

    Parameters
    ----------
    design : DataFrame
        A row for each volume, a column for each regressor. Each column is drawn in units of its largest absolute value.
    contrasts : mapping
        Name of each contrast to its weights by regressor; regressors that are not named have weight 0.

    Returns
    -------
    matplotlib.figure.Figure
    """
    values = design.to_numpy(dtype=np.float64)
    n_regressors = values.shape[1]
    names = [_shortened(str(name)) for name in design.columns]
    weights = np.array([[w.get(str(c), 0.0) for c in design.columns] for w in contrasts.values()])
    cell = min(0.42, max(0.12, 6.6 / n_regressors))
    below = 0.25 + 0.075 * max(len(name) for name in names)
    left = 0.75 + 0.07 * min(24, max((len(name) for name in contrasts), default=0))
    width, strip, matrix = left + cell * n_regressors + 0.15, 0.26 * len(contrasts), 2.6
    height = 0.1 + strip + 0.08 + matrix + below
    figure = figure_class()(figsize=(width, height), facecolor="white")
    inner = (cell * n_regressors) / width

    axes = figure.add_axes((left / width, below / height, inner, matrix / height))
    scale = np.abs(values).max(axis=0)
    shown = values / np.where(scale > 0, scale, 1.0)
    starts = np.arange(0, len(shown), -(-len(shown) // MOST_ROWS))
    # A long design is averaged to the rows that a picture has, so that no event falls between two of them.
    shown = np.add.reduceat(shown, starts) / np.diff([*starts, len(shown)])[:, None]
    axes.imshow(
        shown, extent=(-0.5, n_regressors - 0.5, len(values) - 0.5, -0.5), cmap="gray", vmin=-1, vmax=1,
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axes.set_ylabel("volume", fontsize=8)
    axes.tick_params(labelsize=7, length=2)
    axes.set_xticks(
        range(n_regressors), names, rotation=90, fontsize=7 if cell > 0.15 else 5, parse_math=False
    )
    if len(contrasts):
        over = figure.add_axes((left / width, 1 - (0.1 + strip) / height, inner, strip / height))
        largest_weight = np.abs(weights).max() or 1.0
        over.imshow(
            weights, cmap="RdBu_r", vmin=-1.6 * largest_weight, vmax=1.6 * largest_weight, aspect="auto"
        )
        over.set_xticks([])
        over.set_yticks(
            range(len(contrasts)), [_shortened(name) for name in contrasts], fontsize=8, parse_math=False
        )
        over.tick_params(length=0)
        for row, column in zip(*np.nonzero(weights), strict=True):
            text = f"{weights[row, column]:.3g}"
            if cell >= 0.075 * len(text):
                over.text(column, row, text, ha="center", va="center", fontsize=7)
    return figure


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
