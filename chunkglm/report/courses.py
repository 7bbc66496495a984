"""Time courses of a voxel, with the fitted model over the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from chunkglm.errors import InputError
from chunkglm.glm import check_same_voxels, designs_of, kept_of, label_runs, with_runs
from chunkglm.grids import grid_of, world_of
from chunkglm.report.cuts import millimetres
from chunkglm.report.figures import figure_class
from chunkglm.world import at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from chunkglm.glm import Runs

WIDTH, ROW, HEAD, FOOT = 8.0, 1.25, 0.45, 0.5
"""Inches: of the figure, a run, the title and the time axis."""

DATA, MODEL = "#8a9099", "#c8102e"

UNITS = {"voxel": "% of the voxel's mean", "run": "% of the run's mean"}


class Course(NamedTuple):
    """A voxel in one run: seconds, signal, fitted signal (None without a fit), and whether a volume was kept; each (time,)."""

    label: str
    time: NDArray[np.float64]
    signal: NDArray[np.float64]
    fitted: NDArray[np.float64] | None
    kept: NDArray[np.bool_]


def time_course(
    runs: Runs, x: float, y: float, z: float, *, fit: xr.Dataset | None = None, title: str | None = None
) -> Figure:
    """Draw the signal of one voxel in every run, with the fitted model over it.

    Parameters
    ----------
    runs : Dataset, sequence, mapping or DataTree
        As :func:`chunkglm.fit` takes them; only the chunks of the voxel are read.
    x, y, z : float
        World millimetres; the voxel in which the point lies is drawn.
    fit : Dataset, optional
        A fit of these runs, with their labels, perhaps saved and opened again. The signal is then in the units of the fit:
        percent of the voxel's or the run's mean over the kept volumes (for the run's mean, all of the run is read). Of
        fewer runs than the fit has, give a mapping or tree with their labels.
    title : str, optional
        By default where the voxel lies.

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each run: the data in grey, volumes that were left out as open circles, the model ``X b`` in red.

    Raises
    ------
    InputError
        If the point lies outside of the grid, or the fit has no run of that label.
    GridMismatchError
        If fit and runs lie on different grids.
    MissingDependencyError
        If matplotlib (extra ``report``) is not installed.
    """
    figure_class()
    labelled = label_runs(runs)
    if fit is not None:
        fit = with_runs(fit)
        _check_fit(runs, labelled, fit)
    courses = [_course(label, run, (x, y, z), fit) for label, run in labelled.items()]
    if not isinstance(runs, xr.Dataset):
        courses = [course._replace(label=f"run {course.label}") for course in courses]
    where = world_of(grid_of(at(next(iter(labelled.values())), x, y, z)), (0, 0, 0))
    place = f"({', '.join(millimetres(where))}) mm"
    scaling = "" if fit is None else str(fit.attrs.get("signal_scaling", ""))
    unit_of_time = "s" if all(map(_has_times, labelled.values())) else "volume"
    return _draw(courses, title or f"Voxel at {place}", (unit_of_time, UNITS.get(scaling, "signal")))


def _check_fit(given: Runs, runs: dict[str, xr.Dataset], fit: xr.Dataset) -> None:
    """Refuse a fit of other runs, of another grid, or whose runs cannot be told apart."""
    if "beta" not in fit or "run" not in fit.coords:
        raise InputError("The fit has no 'beta' over labelled runs. Give a fit, as chunkglm.fit makes it.")
    have = [str(label) for label in fit["run"].values]
    if missing := [label for label in runs if label not in have]:
        raise InputError(
            f"The fit has the runs {', '.join(have)}, and none labelled {', '.join(missing)}. Give the runs as a mapping with "
            "the labels of the fit: time_course({'2': run}, x, y, z, fit=fit)."
        )
    labelled = isinstance(given, Mapping | xr.DataTree) and not isinstance(given, xr.Dataset)
    if not labelled and len(runs) < len(have):
        raise InputError(
            f"The fit has the runs {', '.join(have)}, and which of them is given is not known. Give a mapping with its label: "
            f"time_course({{{have[-1]!r}: run}}, x, y, z, fit=fit)."
        )
    first = next(iter(runs))
    check_same_voxels(fit, runs[first], "The fit", f"run {first}")


def _course(label: str, run: xr.Dataset, point: tuple[float, float, float], fit: xr.Dataset | None) -> Course:
    """Read the voxel in one run."""
    signal = at(run[["bold"]], *point)["bold"].values.astype(np.float64)
    n = len(signal)
    time = run["time"].values.astype(np.float64) if _has_times(run) else np.arange(n, dtype=np.float64)
    if fit is None:
        return Course(label, time, signal, None, np.ones(n, dtype=bool))
    one = fit.sel(run=[label])
    (design,), (kept,) = designs_of(one), kept_of(one)
    if len(design) != n:
        raise InputError(
            f"Run {label} has {n} volumes and was fitted with {len(design)}. Give the runs that the fit was made of."
        )
    beta = at(one[["beta"]], *point)["beta"].isel(run=0).to_series()
    fitted = design.to_numpy(dtype=np.float64) @ beta[list(design.columns)].to_numpy()
    mean = _mean_of(str(fit.attrs.get("signal_scaling")), run, one, kept, signal)
    return Course(label, time, signal if mean is None else 100 * (signal / mean - 1), fitted, kept)


def _has_times(run: xr.Dataset) -> bool:
    return "time" in run.coords and run["time"].dtype.kind in "iuf"


def _mean_of(scaling: str, run: xr.Dataset, fit: xr.Dataset, kept: Any, signal: Any) -> float | None:
    """What the signal was scaled by; None for nothing."""
    if scaling == "voxel":
        return float(signal[kept].mean())
    if scaling == "run":
        mask = xr.DataArray(fit["mask"].isel(run=0).variable)
        kept_bold = xr.DataArray(run["bold"].variable).isel(time=np.flatnonzero(kept)).astype(np.float64)
        return float(kept_bold.where(mask).mean())
    return None


def _draw(courses: list[Course], title: str, units: tuple[str, str]) -> Figure:
    row = ROW if len(courses) > 2 else 1.6 * ROW
    height = HEAD + FOOT + row * len(courses)
    figure = figure_class()(figsize=(WIDTH, height), facecolor="white")
    figure.text(0.02, 1 - 0.1 / height, title, va="top", fontsize=11, parse_math=False)
    low, high = _limits(courses)
    longest = max(float(course.time[-1]) for course in courses) or 1.0
    for number, course in enumerate(courses):
        bottom = FOOT + row * (len(courses) - 1 - number)
        box = (0.09, (bottom + 0.05) / height, 0.89, (row - 0.12) / height)
        axes = figure.add_axes(box)
        _draw_course(axes, course)
        axes.set_xlim(-0.01 * longest, 1.01 * longest)
        axes.set_ylim(low, high)
        last = number == len(courses) - 1
        axes.tick_params(labelsize=7, length=2, labelbottom=last)
        if last:
            axes.set_xlabel(units[0], fontsize=8)
        if number == 0:
            _legend(figure, axes, height)
    figure.text(
        0.012, (FOOT + row * len(courses) / 2) / height, units[1], rotation=90, va="center", fontsize=8
    )
    return figure


def _limits(courses: list[Course]) -> tuple[float, float]:
    """The same for every run: those of the kept volumes and of the model."""
    shown = np.concatenate([course.signal[course.kept] for course in courses])
    shown = np.concatenate([shown, *(course.fitted for course in courses if course.fitted is not None)])
    shown = shown[np.isfinite(shown)]
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 1.0)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _draw_course(axes: Axes, course: Course) -> None:
    axes.plot(
        course.time,
        np.where(course.kept, course.signal, np.nan),
        color=DATA,
        linewidth=0.8,
        marker=".",
        markersize=3,
        label="signal",
    )
    left_out = ~course.kept
    if left_out.any():
        axes.plot(
            course.time[left_out],
            course.signal[left_out],
            "o",
            color=DATA,
            fillstyle="none",
            markersize=4,
            label="left out",
        )
    if course.fitted is not None and np.isfinite(course.fitted).any():
        axes.plot(course.time, course.fitted, color=MODEL, linewidth=1.5, label="fitted model")
    elif course.fitted is not None:
        axes.text(0.5, 0.5, "not fitted here", transform=axes.transAxes, ha="center", color=MODEL, fontsize=9)
    axes.text(
        0.006, 0.95, course.label, transform=axes.transAxes, va="top", fontsize=8, parse_math=False,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Axes, height: float) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper right",
        bbox_to_anchor=(0.99, 1 - 0.02 / height),
        ncols=3,
        frameon=False,
        fontsize=8,
    )
