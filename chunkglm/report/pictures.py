"""Pictures of maps.

Left is left and right is right, on every grid: cuts are taken in world millimetres. Names are drawn as text, whatever
they hold.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import xarray as xr

from chunkglm import nifti
from chunkglm.errors import InputError, MissingDependencyError
from chunkglm.grids import grid_of, with_space
from chunkglm.maps import MAPS
from chunkglm.report.cuts import AXES, IN_PLANE, Cut, check_within, largest, millimetres, occupied, take_cuts
from chunkglm.report.figures import figure_class
from chunkglm.schema import SPACE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from chunkglm.nifti import ImageLike

Kind = Literal["ortho", "mosaic", "glass"]
KINDS = ("ortho", "mosaic", "glass")

WIDTH = 8.0
"""Inches."""

TALLEST = 3.2
"""Height of a cut in inches, at most."""

BAR = 0.95
"""Inches for the colour bar with its numbers."""

N_SLICES = 18
"""Slices of a mosaic when none are asked for."""

COLD = ((0.0, "#00004d"), (0.3, "#1a3fe0"), (0.65, "#00a8ff"), (1.0, "#c8ffff"))
HOT = ((0.0, "#4d0000"), (0.3, "#e0261a"), (0.65, "#ff9f00"), (1.0, "#ffffb0"))
"""Colours from 0 to the end of the scale, dark to light on both sides: readable without telling red from green."""


def plot(  # noqa: PLR0917  (the promised order)
    map: xr.DataArray | ImageLike,  # noqa: A002  (the field's word, and the promised one)
    background: xr.DataArray | ImageLike | None = None,
    threshold: float = 3.0,
    cut_coords: Sequence[float] | None = None,
    kind: Kind = "ortho",
    title: str | None = None,
    *,
    vmax: float | None = None,
) -> Figure:
    """Draw a map on a symmetric colour scale.

    Parameters
    ----------
    map : DataArray with dims (z, y, x), path or nibabel image
        On any grid, also oblique or descending. Of a lazy array only the chunks that the cuts meet are computed, if
        ``cut_coords`` are given; without them all of it is reduced, chunk by chunk, to find the peak.
    background : DataArray, path or nibabel image, optional
        Image to draw it on, such as ``run.mean_image``; on any grid.
    threshold : float
        Values whose absolute value is less are not drawn; nor are 0 and NaN, which say that there is no statistic.
    cut_coords : sequence of float, optional
        Millimetres. For ``"ortho"`` x, y and z of the point where the cuts meet, by default the largest absolute value.
        For ``"mosaic"`` the z of each slice, by default 18 from the lowest to the highest voxel of the map.
    kind : {"ortho", "mosaic", "glass"}
        Three orthogonal cuts; axial slices; or the largest values along each axis in the outline of the MNI brain
        (drawn by nilearn, extra ``nilearn``; takes no background and no cut coordinates).
    title : str, optional
    vmax : float, optional
        End of the colour scale, for pictures that are to be compared. By default the largest absolute value that is drawn
        (for ``"ortho"`` without ``cut_coords``: of the map).

    Returns
    -------
    matplotlib.figure.Figure
        Notebooks show it; ``figure.savefig(path)`` writes it.

    Raises
    ------
    InputError
        If the map is not one volume, cut coordinates lie outside of it, or an option is none of the above.
    MissingDependencyError
        If matplotlib (extra ``report``), or nilearn for ``"glass"``, is not installed.
    """
    figure_class()
    array = _volume(map, "map")
    _check_options(kind, threshold, cut_coords, background, vmax)
    if kind == "glass":
        return _glass(array, threshold, title, vmax)
    under = None if background is None else _volume(background, "background")
    if kind == "mosaic":
        places = [
            (2, mm) for mm in (_slices(array) if cut_coords is None else [float(mm) for mm in cut_coords])
        ]
    else:
        peak = None
        if cut_coords is None:
            cut_coords, peak = largest(array)
        places = [(axis, float(cut_coords[axis])) for axis in (1, 0, 2)]
        vmax = abs(peak) if vmax is None and peak else vmax
    check_within(grid_of(array), places)
    return _draw(
        take_cuts(array, places),
        None if under is None else take_cuts(under, places),
        _Look(threshold, vmax, title, _label(array)),
        mosaic=kind == "mosaic",
    )


# ----------------------------------------------------------------------------------------------------------- checking


def _volume(image: xr.DataArray | ImageLike, what: str) -> xr.DataArray:
    """One volume with dims (z, y, x); a spatial dim that was selected away has length 1."""
    if isinstance(image, xr.Dataset):
        raise InputError(
            f"The {what} is a whole Dataset; give one variable of it: {', '.join(str(name) for name in image.data_vars)}."
        )
    if not isinstance(image, xr.DataArray):
        return nifti.read_map(image)
    image = with_space(image)
    image = image.squeeze(
        [dim for dim in image.dims if dim not in SPACE and image.sizes[dim] == 1], drop=True
    )
    if set(image.dims) != set(SPACE) or image.dtype.kind not in "biuf":
        more = [dim for dim in image.dims if dim not in SPACE]
        mend = f" Choose one along {more[0]!r}: for example array.isel({more[0]}=0)." if more else ""
        raise InputError(
            f"The {what} has dims {dict(image.sizes)} and dtype {image.dtype}; a picture needs one volume (z, y, x) of real "
            f"numbers.{mend}"
        )
    return image.transpose(*SPACE)


def _check_options(
    kind: str, threshold: float, cut_coords: Sequence[float] | None, background: object, vmax: float | None
) -> None:
    if kind not in KINDS:
        raise InputError(f"There is no kind of picture {kind!r}; there are {', '.join(KINDS)}.")
    if not (np.isfinite(threshold) and threshold >= 0):
        raise InputError(f"The threshold is {threshold}; it must be 0 or more (it holds for both signs).")
    if vmax is not None and not (np.isfinite(vmax) and vmax > 0):
        raise InputError(f"vmax is {vmax}; the end of the colour scale must be positive.")
    if kind == "glass" and (cut_coords is not None or background is not None):
        raise InputError(
            "A glass brain shows all of the map in an outline of the brain: it takes neither cut coordinates nor a "
            "background. Leave them out, or choose kind='ortho' or 'mosaic'."
        )
    if cut_coords is None:
        return
    wanted = "x, y and z of a point" if kind == "ortho" else "the z of each slice"
    numbers = np.asarray(cut_coords, dtype=object).ravel()
    right = numbers.size == 3 if kind == "ortho" else numbers.size > 0
    if not right or not all(isinstance(n, (int, float, np.number)) and math.isfinite(n) for n in numbers):
        raise InputError(f"The cut coordinates are {cut_coords!r}; they must be {wanted}, in millimetres.")


def _slices(array: xr.DataArray) -> list[float]:
    """Heights of slices spread evenly over the part of the map that holds values."""
    low, high = occupied(array, 2)
    step = np.abs(grid_of(array).affine[2, :3]).max()
    number = max(1, min(N_SLICES, int((high - low) / step)))
    edges = np.linspace(low, high, number + 1)
    return [float(middle) for middle in (edges[:-1] + edges[1:]) / 2]


def _label(array: xr.DataArray) -> str:
    """What the numbers of a map are, as far as its name tells."""
    name = "" if array.name is None else str(array.name)
    entity = re.search(r"_stat-([a-zA-Z]+)_", os.path.basename(name))  # noqa: PTH119  (may be a URL)
    kind = "F" if str(array.attrs.get("long_name", "")).startswith("F ") else "t"
    return entity[1] if entity else MAPS[kind].get(name, "")


# ------------------------------------------------------------------------------------------------------------ drawing


class _Look(NamedTuple):
    """How values are drawn."""

    threshold: float
    vmax: float | None
    title: str | None
    label: str


def _colours(unused: float = 0.0) -> Colormap:
    """Cold below, hot above; grey in the inner part of the scale, from 0 to 1, that is not used."""
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap  # noqa: PLC0415

    n = 512
    values = np.linspace(-1, 1, 2 * n)
    cold = LinearSegmentedColormap.from_list("cold", COLD)
    hot = LinearSegmentedColormap.from_list("hot", HOT)
    colours = np.where(values[:, None] < 0, cold(np.abs(values)), hot(np.abs(values)))
    colours[np.abs(values) < unused] = (0.35, 0.35, 0.35, 1.0)
    return ListedColormap(colours, name="cold_hot")


def _draw(cuts: list[Cut], under: list[Cut] | None, look: _Look, *, mosaic: bool) -> Figure:
    """Lay out the cuts on one scale of millimetres, with title and colour bar."""
    drawn = [_beyond(cut.values, look.threshold) for cut in cuts]
    highest = max((float(np.abs(v).max()) for v in (d.compressed() for d in drawn) if v.size), default=0.0)
    vmax = look.vmax or highest or max(2 * look.threshold, 1.0)
    box = _view(cuts, under, drawn)
    size = box[:, 1] - box[:, 0]
    n_columns = _columns(len(cuts), size) if mosaic else 3
    rows = [range(start, min(start + n_columns, len(cuts))) for start in range(0, len(cuts), n_columns)]
    widest = max(sum(size[IN_PLANE[cuts[i].axis][0]] for i in row) for row in rows)
    tallest = [max(size[IN_PLANE[cuts[i].axis][1]] for i in row) for row in rows]
    gap, below = 0.06, 0.2
    room = WIDTH - BAR - gap * (n_columns + 1)
    scale = min(room / widest, TALLEST / (max(tallest) if not mosaic else max(tallest) * 0.5))
    width = max(widest * scale + gap * (n_columns + 1) + BAR, 4.0)
    lines = textwrap.wrap(look.title, max(10, int(width * 11))) if look.title else []
    head = 0.12 + 0.22 * len(lines)
    height = max(head + sum(tallest) * scale + below * len(rows), head + 1.2)
    figure = figure_class()(figsize=(width, height), facecolor="black")
    for number, line in enumerate(lines):
        _write(figure, gap / width, 1 - (0.08 + 0.22 * number) / height, line, size=11)

    colours = _colours()
    top = head
    for row, row_height in zip(rows, tallest, strict=True):
        left = gap
        for i in row:
            right_axis, up_axis = IN_PLANE[cuts[i].axis]
            w, h = size[right_axis] * scale, size[up_axis] * scale
            y = top + (row_height * scale - h) / 2
            axes = figure.add_axes((left / width, 1 - (y + h) / height, w / width, h / height))
            _draw_cut(
                axes, cuts[i], None if under is None else under[i], drawn[i], colours=colours, vmax=vmax
            )
            axes.set_xlim(*box[right_axis])
            axes.set_ylim(*box[up_axis])
            left += w + gap
        top += row_height * scale + below
    if not mosaic:
        _cross(figure, cuts)
    _colour_bar(figure, look, vmax, nothing=highest == 0.0)
    return figure


def _beyond(values: NDArray[Any], threshold: float) -> Any:
    """The values that are drawn, as a masked array."""
    with np.errstate(invalid="ignore"):
        shown = np.isfinite(values) & (np.abs(values) >= threshold) & (values != 0)
    return np.ma.masked_array(values, ~shown)


def _view(cuts: list[Cut], under: list[Cut] | None, drawn: list[Any]) -> NDArray[np.float64]:
    """The box of millimetres to show, shape (3, 2): the head, or without a background the voxels with values."""
    box = np.array([[np.inf, -np.inf]] * 3)
    # What a cut shows decides; an axis that only the place of a cut tells of is included with that place.
    for index, cut in enumerate(cuts):
        _include(box, cut, ~np.ma.getmaskarray(drawn[index]))
        if under is None:
            _include(box, cut, np.isfinite(cut.values) & (cut.values != 0))
    for cut in under or []:
        finite = np.abs(cut.values[np.isfinite(cut.values)])
        level = 0.15 * np.percentile(finite, 98) if finite.size else 0.0
        with np.errstate(invalid="ignore"):
            _include(box, cut, np.abs(cut.values) > level)
    for cut in cuts:
        box[cut.axis] = min(box[cut.axis, 0], cut.mm), max(box[cut.axis, 1], cut.mm)
    empty = ~np.isfinite(box).all(axis=1)
    for cut in cuts:
        for axis, ends in zip(IN_PLANE[cut.axis], (cut.extent[:2], cut.extent[2:]), strict=True):
            if empty[axis]:
                box[axis] = min(box[axis, 0], ends[0]), max(box[axis, 1], ends[1])
    size = box[:, 1] - box[:, 0]
    margin = np.maximum(0.03 * size.max(), (0.2 * size.max() - size) / 2)
    view: NDArray[np.float64] = box + np.column_stack([-margin, margin])
    return view


def _include(box: NDArray[np.float64], cut: Cut, shown: NDArray[np.bool_]) -> None:
    """Grow the box by the pixels of a cut that are shown."""
    for axis, ends, along in zip(IN_PLANE[cut.axis], (cut.extent[:2], cut.extent[2:]), (1, 0), strict=True):
        used = np.flatnonzero(shown.any(axis=1 - along))
        if used.size:
            step = (ends[1] - ends[0]) / shown.shape[along]
            low, high = ends[0] + used[0] * step, ends[0] + (used[-1] + 1) * step
            box[axis] = min(box[axis, 0], low), max(box[axis, 1], high)


def _columns(number: int, size: NDArray[np.float64]) -> int:
    """Slices in a row of a mosaic, for a picture about twice as wide as high."""
    return max(1, min(number, round(math.sqrt(2.2 * number * size[1] / size[0]))))


def _draw_cut(axes: Axes, cut: Cut, under: Cut | None, drawn: Any, *, colours: Colormap, vmax: float) -> None:
    axes.set_axis_off()
    axes.set_label(AXES[cut.axis])
    if under is not None:
        finite = under.values[np.isfinite(under.values)]
        low, high = (
            (min(0.0, float(finite.min())), float(np.percentile(finite, 99.5))) if finite.size else (0.0, 1.0)
        )
        axes.imshow(
            under.values, extent=under.extent, origin="lower", cmap="gray", vmin=low, vmax=(high - low) * 1.1 + low or 1.0,
            interpolation="nearest", aspect="auto",
        )  # fmt: skip
    axes.imshow(
        drawn, extent=cut.extent, origin="lower", cmap=colours, vmin=-vmax, vmax=vmax, interpolation="nearest",
        aspect="auto",
    )  # fmt: skip
    marks: dict[str, Any] = {"color": "white", "fontsize": 8, "parse_math": False}
    place = f"{AXES[cut.axis]} = {millimetres([cut.mm])[0]}"
    axes.annotate(
        place, (0, 0), (2, -2), xycoords="axes fraction", textcoords="offset points", va="top", **marks
    )
    marks["transform"] = axes.transAxes
    if cut.axis != 0:
        axes.text(0.02, 0.985, "L", ha="left", va="top", **marks)
        axes.text(0.98, 0.985, "R", ha="right", va="top", **marks)


def _cross(figure: Figure, cuts: list[Cut]) -> None:
    """Lines through the point where the cuts meet, open around it so that it can be seen."""
    place = {cut.axis: cut.mm for cut in cuts}
    for axes, cut in zip(figure.axes, cuts, strict=True):
        right, up = IN_PLANE[cut.axis]
        hole = 0.04 * max(np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim()))
        style: dict[str, Any] = {"color": "white", "linewidth": 0.6, "alpha": 0.7}
        for low, high in (
            (axes.get_xlim()[0], place[right] - hole),
            (place[right] + hole, axes.get_xlim()[1]),
        ):
            axes.plot([low, high], [place[up]] * 2, scalex=False, scaley=False, **style)
        for low, high in ((axes.get_ylim()[0], place[up] - hole), (place[up] + hole, axes.get_ylim()[1])):
            axes.plot([place[right]] * 2, [low, high], scalex=False, scaley=False, **style)


def _colour_bar(figure: Figure, look: _Look, vmax: float, *, nothing: bool) -> None:
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415
    from matplotlib.colors import Normalize  # noqa: PLC0415

    width, height = figure.get_size_inches()
    axes = figure.add_axes((1 - 0.8 / width, 0.14, 0.13 / width, 0.72))
    axes.set_label("colour bar")
    bar = figure.colorbar(ScalarMappable(Normalize(-vmax, vmax), _colours(look.threshold / vmax)), cax=axes)
    least = 0.22 / (0.72 * height) * 2 * vmax
    ticks = [-vmax, 0.0, vmax]
    if 2 * look.threshold >= least and vmax - look.threshold >= least:
        ticks = [-vmax, -look.threshold, look.threshold, vmax]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.tick_params(colors="white", labelsize=8, length=2)
    bar.outline.set_edgecolor("white")
    bar.outline.set_linewidth(0.5)
    axes.set_title(look.label, color="white", fontsize=9, parse_math=False)
    if nothing:
        _say_nothing(figure, look.threshold)


def _say_nothing(figure: Figure, threshold: float) -> None:
    _write(figure, 0.5, 0.02, f"nothing beyond ±{threshold:g}", size=8, ha="center", va="bottom")


def _write(figure: Figure, x: float, y: float, text: str, *, size: float, **options: Any) -> None:
    options = {"ha": "left", "va": "top", "color": "white"} | options
    figure.text(x, y, text, fontsize=size, parse_math=False, **options)


def _glass(array: xr.DataArray, threshold: float, title: str | None, vmax: float | None) -> Figure:
    try:
        from nilearn.plotting import plot_glass_brain  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise MissingDependencyError(
            "A glass brain is drawn by nilearn, which is not installed. Install it with: pip install 'chunkglm[nilearn]'"
        ) from error
    values = array.astype(np.float64).fillna(0).compute()
    vmax = vmax or float(np.abs(values).max()) or max(2 * threshold, 1.0)
    figure = figure_class()(figsize=(WIDTH, 3.0), facecolor="black")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "empty mask")
        plot_glass_brain(
            nifti.to_nifti(values), figure=figure, threshold=threshold or None, plot_abs=False, vmin=-vmax, vmax=vmax,
            symmetric_cbar=True, black_bg=True, colorbar=True, cmap=_colours(), alpha=0.7,
        )  # fmt: skip
    if not _beyond(values.values, threshold).count():
        _say_nothing(figure, threshold)
    if title:
        _write(figure, 0.01, 0.985, title, size=11)
    return figure
