"""Pictures of maps: where things are drawn, how much is loaded, what is refused."""

import itertools
import sys
import warnings

import dask.array as da
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import chunkglm as cg
from chunkglm import grids
from chunkglm.errors import InputError, MissingDependencyError, NiftiError
from chunkglm.report import cuts, figures
from chunkglm.report.designs import plot_design

SPACE = ("z", "y", "x")
SHAPE = (14, 17, 11)  # x, y, z
MARKER = (10, 4, 7)


def rotated(degrees, axis):
    """A rotation by `degrees` about world axis `axis`."""
    turn = np.deg2rad(degrees)
    a, b = [i for i in range(3) if i != axis]
    out = np.eye(3)
    out[a, a] = out[b, b] = np.cos(turn)
    out[a, b], out[b, a] = -np.sin(turn), np.sin(turn)
    return out


def affine_of(linear, origin=(-31.0, 12.0, 5.0)):
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = origin
    return affine


GRIDS = {
    "ascending": affine_of(np.diag([3.0, 3.0, 3.0])),
    "x descending": affine_of(np.diag([-3.0, 3.0, 3.0])),
    "all descending, unequal": affine_of(np.diag([-2.0, -3.5, -4.0])),
    "axes permuted": affine_of(np.array([[0, 0, -3.0], [2.0, 0, 0], [0, 2.5, 0]])),
    "oblique": affine_of(rotated(17, 0) @ rotated(-9, 2) @ np.diag([3.0, 3.0, 3.3])),
    "oblique, x descending": affine_of(rotated(25, 1) @ rotated(12, 0) @ np.diag([-2.5, 2.0, 3.0])),
}


def marked(affine, value=10.0):
    """An image with one voxel that is not 0, and its millimetres by nibabel."""
    data = np.zeros(SHAPE)
    data[MARKER] = value
    return nib.Nifti1Image(data, affine), nib.affines.apply_affine(affine, MARKER)


def on_grid(values, affine):
    """A map (z, y, x) with the coordinates of its grid."""
    values = np.asarray(values) if not isinstance(values, da.Array) else values
    return xr.DataArray(
        values, dims=SPACE, coords=grids.grid_coords(affine, values.shape, b""), name="z_score"
    )


def panels(figure):
    """The cuts of a figure by axis, x, y and z."""
    return {axes.get_label(): axes for axes in figure.axes if axes.get_label() in tuple("xyz")}


def pixels(figure, *, hot=True):
    """Millimetres (right, up) of every pixel of the finished picture that is coloured hot or cold, by cut."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rgba = np.asarray(canvas.buffer_rgba()).astype(float)[::-1, :, :3]  # upwards, as the display counts
    red, blue = rgba[..., 0], rgba[..., 2]
    coloured = red > blue + 40 if hot else blue > red + 40
    found = {}
    for name, axes in panels(figure).items():
        box = axes.get_window_extent()
        up, right = np.nonzero(coloured)
        inside = (right >= box.x0) & (right < box.x1) & (up >= box.y0) & (up < box.y1)
        points = np.column_stack([right[inside] + 0.5, up[inside] + 0.5])
        found[name] = axes.transData.inverted().transform(points) if len(points) else np.empty((0, 2))
    return found


# ------------------------------------------------------------------------------------------------------------ where


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("hot", [True, False])
def test_marker__is_drawn_at_its_millimetre(name, hot):
    """The oracle is nibabel's affine, and what is looked at are the pixels of the finished picture."""
    image, mm = marked(GRIDS[name], 10.0 if hot else -10.0)
    figure = cg.plot(image)
    half = np.abs(GRIDS[name][:3, :3]).sum(axis=1) / 2  # of the voxel's box along x, y, z
    drawn = pixels(figure, hot=hot)
    for axis, (right, up) in enumerate(cuts.IN_PLANE):
        points = drawn["xyz"[axis]]
        assert len(points) > 20, "the marker must be seen in every cut"
        apart = np.abs(points - mm[[right, up]])
        assert (apart <= half[[right, up]] + 0.5).all()
        np.testing.assert_allclose(points.mean(axis=0), mm[[right, up]], atol=0.5)
    assert not any(len(points) for points in pixels(figure, hot=not hot).values())


@pytest.mark.parametrize("name", GRIDS)
def test_left_is_left(name):
    """A marker in the left half of the head lies nearer to the L, whichever way the file runs."""
    image, mm = marked(GRIDS[name])
    box = cuts.bounds(grids.Grid(SHAPE[::-1], GRIDS[name]))
    background = nib.Nifti1Image(np.ones(SHAPE, np.float32), GRIDS[name])
    figure = cg.plot(image, background)
    for label in "yz":
        axes = panels(figure)[label]
        places = {text.get_text(): text.get_position()[0] for text in axes.texts}
        assert places["L"] < 0.5 < places["R"]
        left, right = axes.get_xlim()
        assert left < right, "x grows to the right: neurological"
    assert not {"L", "R"} & {text.get_text() for text in panels(figure)["x"].texts}
    drawn = pixels(figure)["z"]
    assert (drawn[:, 0].mean() < box[0].mean()) == (mm[0] < box[0].mean())


@pytest.mark.parametrize("name", GRIDS)
def test_cut_coords__are_the_peak_when_none_are_given(name):
    rng = np.random.default_rng(3)
    data = rng.standard_normal(SHAPE)
    data[3, 11, 5] = -9.0
    data[0, 0, 0] = np.nan
    mm = nib.affines.apply_affine(GRIDS[name], (3, 11, 5))
    figure = cg.plot(nib.Nifti1Image(data, GRIDS[name]), threshold=8.5)
    texts = {label: axes.texts[0].get_text() for label, axes in panels(figure).items()}
    assert texts == {
        label: f"{label} = {round(value, 1) + 0.0:g}" for label, value in zip("xyz", mm, strict=True)
    }
    place, value = cuts.largest(on_grid(data.T, GRIDS[name]))
    np.testing.assert_allclose(place, mm, atol=1e-9)
    assert value == -9.0


@pytest.mark.parametrize("name", GRIDS)
def test_cuts__show_the_voxel_around_each_point(name):
    """Every pixel against the voxel that nibabel's inverse affine names."""
    rng = np.random.default_rng(4)
    data = rng.standard_normal(SHAPE)
    affine = GRIDS[name]
    at = nib.affines.apply_affine(affine, (6.2, 8.9, 4.1))
    for axis, cut in enumerate(cuts.take_cuts(on_grid(data.T, affine), list(enumerate(at)))):
        right, up = cuts.IN_PLANE[axis]
        n_up, n_right = cut.values.shape
        left, right_end, bottom, top = cut.extent
        for i, j in itertools.product(range(0, n_up, 3), range(0, n_right, 3)):
            mm = np.empty(3)
            mm[axis] = cut.mm
            mm[right] = left + (j + 0.5) * (right_end - left) / n_right
            mm[up] = bottom + (i + 0.5) * (top - bottom) / n_up
            place = nib.affines.apply_affine(np.linalg.inv(affine), mm)
            number = np.rint(place).astype(int)
            if np.abs(np.abs(place - number) - 0.5).min() < 1e-6:
                continue  # on the face between two voxels
            if ((number < 0) | (number >= SHAPE)).any():
                assert np.isnan(cut.values[i, j])
            else:
                assert cut.values[i, j] == data[tuple(number)]


@pytest.mark.parametrize("length", [30, 300, 700])
def test_oblique_grid__has_pixels_enough_and_not_more(length):
    """At least one for each voxel, at most three, and not more than a picture shows."""
    affine = affine_of(rotated(10, 2))
    array = on_grid(da.zeros((2, length, length), chunks=(1, 50, 50)), affine)
    (cut,) = cuts.take_cuts(array, [(2, 5.0)])
    per_voxel = cut.values.shape[1] / (cut.extent[1] - cut.extent[0])
    assert 0.999 < per_voxel <= 3.02
    assert max(cut.values.shape) <= max(500, length * 1.2, 3 * 45)


def test_aligned_grid__a_pixel_is_a_voxel():
    data = np.arange(np.prod(SHAPE), dtype=float).reshape(SHAPE)
    (cut,) = cuts.take_cuts(on_grid(data.T, GRIDS["x descending"]), [(2, 5.0 + 3 * 4)])
    np.testing.assert_array_equal(cut.values, data[::-1, :, 4].T)


def test_background__may_lie_on_another_grid():
    """A bright voxel of the background, on a finer oblique grid, is drawn at its own millimetre."""
    image, mm = marked(GRIDS["ascending"])
    fine = GRIDS["oblique"].copy()
    fine[:3, :3] /= 2
    shape = (40, 40, 40)
    number = np.rint(nib.affines.apply_affine(np.linalg.inv(fine), mm + np.array([6.0, 0, 0]))).astype(int)
    data = np.zeros(shape, np.float32)
    data[tuple(number)] = 100
    centre = nib.affines.apply_affine(fine, number)
    figure = cg.plot(image, nib.Nifti1Image(data, fine), cut_coords=centre)
    shown = panels(figure)["z"].images[0]
    up, right = np.argwhere(np.asarray(shown.get_array()) == 100).mean(axis=0)
    left, right_end, bottom, top = shown.get_extent()
    n_up, n_right = shown.get_array().shape
    found = [left + (right + 0.5) * (right_end - left) / n_right, bottom + (up + 0.5) * (top - bottom) / n_up]
    np.testing.assert_allclose(found, centre[:2], atol=0.6)


def test_oneback__the_peak_that_is_drawn_is_the_peak_of_the_map(real_data):
    """On an oblique grid of a real scanner."""
    folder = real_data / "oneback"
    mean = nib.load(folder / "run1.nii.gz")
    values = np.asarray(mean.dataobj[..., 0], dtype=np.float64) * (
        nib.load(folder / "mask.nii.gz").get_fdata() > 0
    )
    image = nib.Nifti1Image(values, mean.affine)
    peak = np.unravel_index(np.abs(values).argmax(), values.shape)
    mm = nib.affines.apply_affine(mean.affine, peak)
    figure = cg.plot(image, threshold=values[peak])
    drawn = pixels(figure)
    half = np.abs(mean.affine[:3, :3]).sum(axis=1) / 2
    for axis, (right, up) in enumerate(cuts.IN_PLANE):
        points = drawn["xyz"[axis]]
        assert len(points) > 4
        assert (np.abs(points - mm[[right, up]]) <= half[[right, up]] + 0.5).all()


# ------------------------------------------------------------------------------------------------------- properties


def noisy(seed=0, affine=GRIDS["oblique"]):
    return on_grid(3 * np.random.default_rng(seed).standard_normal(SHAPE[::-1]), affine)


@pytest.mark.parametrize("kind", ["ortho", "mosaic"])
@pytest.mark.parametrize("chunks", [(1, 17, 14), (11, 4, 3), (5, 5, 5)])
def test_picture__does_not_depend_on_chunks(kind, chunks):
    one = figures.png(cg.plot(noisy(), kind=kind))
    other = figures.png(cg.plot(noisy().chunk(dict(zip(SPACE, chunks, strict=True))), kind=kind))
    assert one == other


def test_picture__does_not_depend_on_the_order_of_voxels_in_the_file():
    """The same head stored from right to left and from top to bottom gives the same picture."""
    image = nib.Nifti1Image(noisy().values.T, GRIDS["ascending"])
    turned = image.as_reoriented([[0, -1], [2, 1], [1, -1]])
    assert (np.diag(turned.affine)[:3] <= 0).any()
    assert figures.png(cg.plot(image)) == figures.png(cg.plot(turned))


def test_picture__of_a_reversed_or_stepped_array_is_right():
    array = noisy()
    assert figures.png(cg.plot(array)) == figures.png(cg.plot(array[::-1, :, ::-1].transpose("x", "z", "y")))
    straight = noisy(affine=GRIDS["x descending"])
    z = 5.0 + 3 * 5
    (whole,), (part,) = (cuts.take_cuts(one, [(2, z)]) for one in (straight, straight[:, ::2, 3:]))
    np.testing.assert_array_equal(part.values, whole.values[::2, :-3])
    assert part.extent[:2] == (whole.extent[0], whole.extent[1] - 9)


def counted(array, chunks):
    """The array as a lazy one that counts how often each chunk is computed."""
    calls = []

    def touch(block, block_info=None):
        calls.append(tuple(block_info[0]["chunk-location"]))
        return block

    lazy = da.from_array(array.values, chunks=chunks).map_blocks(
        touch, dtype=array.dtype, meta=np.empty((0, 0, 0))
    )
    return array.copy(data=lazy), calls


def test_lazy_map__loads_only_the_chunks_of_its_cuts():
    array, calls = counted(noisy(affine=GRIDS["ascending"]), (1, 1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", da.PerformanceWarning)
        cg.plot(array, cut_coords=nib.affines.apply_affine(GRIDS["ascending"], (3, 4, 5)))
    met = {(z, y, x) for z, y, x in np.ndindex(SHAPE[::-1]) if x == 3 or y == 4 or z == 5}
    assert sorted(calls) == sorted(met), "each voxel of the planes once, and no other"


def test_lazy_map__on_an_oblique_grid_loads_what_the_planes_meet():
    array, calls = counted(noisy(), (1, 17, 14))
    z = float(nib.affines.apply_affine(GRIDS["oblique"], (7, 8, 0))[2])
    cg.plot(array, kind="mosaic", cut_coords=[z])
    assert len(calls) == len(set(calls)) < SHAPE[2]


def test_lazy_statistics__are_drawn_from_a_fit(two_runs, two_designs):
    """From the functions of the package, and of a run that was selected by its label."""
    contrasts = cg.contrast(cg.fit(two_runs, two_designs), "DSt - SSt")
    for lazy in (
        contrasts.z_score.sel(run="a"),
        contrasts.z_score.isel(run=[1]),
        cg.fixed_effects(contrasts).z_score,
    ):
        figure = cg.plot(lazy, threshold=1.0)
        peak = float(np.abs(lazy).max())
        bar = next(axes for axes in figure.axes if axes.get_label() == "colour bar")
        np.testing.assert_allclose(bar.get_ylim(), (-peak, peak))
        assert bar.get_title() == "z"
    with pytest.raises(InputError, match=r"'run': 2.*isel\(run=0\)"):
        cg.plot(contrasts.z_score)
    with pytest.raises(InputError, match="z_score"):
        cg.plot(contrasts)


# ------------------------------------------------------------------------------------------------------------- looks


def test_scale__is_symmetric_and_shared():
    array = noisy()
    for vmax, end in ((None, float(np.abs(array).max())), (20.0, 20.0)):
        figure = cg.plot(array, vmax=vmax)
        for axes in panels(figure).values():
            assert axes.images[-1].get_clim() == (-end, end)
        bar = next(axes for axes in figure.axes if axes.get_label() == "colour bar")
        ticks = [float(label.get_text()) for label in bar.get_yticklabels()]
        assert ticks == [float(f"{tick:.3g}") for tick in (-end, -3, 3, end)]


def test_threshold__holds_for_both_signs_and_keeps_what_equals_it():
    values = np.array([-3.5, -3.0, -2.999, 0.0, 2.999, 3.0, np.nan, np.inf])[None, None]
    figure = cg.plot(on_grid(values, np.diag([3.0, 3, 3, 1])), cut_coords=(0, 0, 0))
    shown = panels(figure)["z"].images[-1].get_array()
    assert shown.compressed().tolist() == [-3.5, -3.0, 3.0]
    figure = cg.plot(on_grid(values, np.diag([3.0, 3, 3, 1])), cut_coords=(0, 0, 0), threshold=0)
    assert panels(figure)["z"].images[-1].get_array().compressed().tolist() == [
        -3.5,
        -3.0,
        -2.999,
        2.999,
        3.0,
    ]


def test_nothing_beyond_the_threshold__is_said():
    texts = [text.get_text() for text in cg.plot(noisy(), threshold=90).texts]
    assert "nothing beyond ±90" in texts
    assert "nothing beyond ±3" not in [text.get_text() for text in cg.plot(noisy()).texts]


def test_mosaic__shows_the_slices_asked_for():
    figure = cg.plot(noisy(affine=GRIDS["ascending"]), kind="mosaic", cut_coords=[8.0, 20.0, 11.0])
    labels = [axes.texts[0].get_text() for axes in figure.axes if axes.get_label() == "z"]
    assert labels == ["z = 8", "z = 20", "z = 11"]


@pytest.mark.parametrize("name", GRIDS)
def test_mosaic__spreads_over_what_the_map_holds(name):
    data = np.zeros(SHAPE)
    data[3:9, 5:12, 2:8] = 5.0
    low, high = cuts.occupied(on_grid(data.T, GRIDS[name]), 2)
    corners = np.array(list(itertools.product((2.5, 8.5), (4.5, 11.5), (1.5, 7.5))))
    z = nib.affines.apply_affine(GRIDS[name], corners)[:, 2]
    np.testing.assert_allclose([low, high], [z.min(), z.max()])
    figure = cg.plot(nib.Nifti1Image(data, GRIDS[name]), kind="mosaic")
    drawn = [float(axes.texts[0].get_text()[4:]) for axes in figure.axes if axes.get_label() == "z"]
    assert drawn == sorted(drawn)
    assert len(drawn) >= 5
    assert low < drawn[0] < drawn[-1] < high


def test_one_slice__is_drawn():
    """As the recordings of one slice are."""
    figure = cg.plot(on_grid(np.full((1, 20, 40), 4.0), np.diag([3.0, 3, 3, 1])), title="one slice")
    assert len(panels(figure)) == 3
    assert cg.plot(noisy().isel(z=3), kind="mosaic").axes


@pytest.mark.parametrize(
    "title", ["$\\frac{1}{", "<b>bold</b> & more", "多字节 \U0001f9e0", "a" * 300, "line\nline"]
)
def test_title__is_text_whatever_it_holds(title):
    picture = figures.png(cg.plot(noisy(), title=title))
    assert picture.startswith(b"\x89PNG")
    assert picture != figures.png(cg.plot(noisy()))


def test_glass__is_drawn_by_nilearn():
    pytest.importorskip("nilearn.plotting")
    image, _ = marked(affine_of(np.diag([5.0, 5, 5]), origin=(-30.0, -40, -20)))
    figure = cg.plot(image, kind="glass", title="glass $")
    assert "glass $" in [text.get_text() for text in figure.texts]
    assert "nothing beyond ±3" not in [text.get_text() for text in figure.texts]
    empty = cg.plot(image, kind="glass", threshold=11)
    assert "nothing beyond ±11" in [text.get_text() for text in empty.texts]
    assert figures.png(figure) != figures.png(empty)


def test_notebook__shows_the_figure_and_keeps_none():
    import matplotlib.pyplot as plt

    figure = cg.plot(noisy())
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert plt.get_fignums() == []


def test_design__is_drawn_with_weights_and_any_names():
    names = ["$x$", "<script>", "c" * 80, "constant"]
    design = pd.DataFrame(np.random.default_rng(0).standard_normal((1000, 4)), columns=names)
    figure = plot_design(design, {"first": {"$x$": 1.0, "<script>": -1.0}, "n" * 60: {"constant": 0.25}})
    matrix, weights = figure.axes
    assert [label.get_text() for label in matrix.get_xticklabels()][:2] == ["$x$", "<script>"]
    np.testing.assert_array_equal(weights.images[0].get_array(), [[1, -1, 0, 0], [0, 0, 0, 0.25]])
    assert sorted(text.get_text() for text in weights.texts) == ["-1", "0.25", "1"]
    assert figures.png(figure).startswith(b"\x89PNG")


def test_design__averages_rows_so_that_no_event_is_lost():
    design = pd.DataFrame({"event": np.zeros(1000), "constant": 1.0})
    design.loc[501, "event"] = 1.0
    shown = plot_design(design, {}).axes[0].images[0]
    assert shown.get_array().shape[0] <= 300
    assert np.count_nonzero(shown.get_array()[:, 0]) == 1
    assert shown.get_extent() == (-0.5, 1.5, 999.5, -0.5) or list(shown.get_extent()) == [
        -0.5,
        1.5,
        999.5,
        -0.5,
    ]


# ------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "sphere"}, "ortho, mosaic, glass"),
        ({"threshold": -1.0}, "0 or more"),
        ({"threshold": np.nan}, "0 or more"),
        ({"vmax": 0.0}, "positive"),
        ({"cut_coords": (1.0, 2.0)}, "x, y and z"),
        ({"cut_coords": (1.0, 2.0, np.inf)}, "x, y and z"),
        ({"cut_coords": ("a", "b", "c")}, "x, y and z"),
        ({"cut_coords": (500.0, 20.0, 10.0)}, "x = 500 mm lies outside"),
        ({"cut_coords": (), "kind": "mosaic"}, "z of each slice"),
        ({"cut_coords": [900.0], "kind": "mosaic"}, "z = 900 mm lies outside"),
        ({"cut_coords": (0.0, 20.0, 10.0), "kind": "glass"}, "Leave them out"),
        ({"background": noisy(1), "kind": "glass"}, "Leave them out"),
    ],
)
def test_wrong_options__are_refused(options, words):
    with pytest.raises(InputError, match=words):
        cg.plot(noisy(), **options)


def test_wrong_maps__are_refused(tmp_path):
    four = nib.Nifti1Image(np.zeros((3, 4, 5, 6), np.float32), np.eye(4))
    with pytest.raises(NiftiError, match="one volume"):
        cg.plot(four)
    with pytest.raises(cg.errors.SourceNotFoundError, match=r"none\.nii"):
        cg.plot(tmp_path / "none.nii")
    with pytest.raises(InputError, match="no finite value"):
        cg.plot(noisy() * np.nan)
    with pytest.raises(InputError, match="no voxel grid"):
        cg.plot(noisy().drop_vars("grid"))
    with pytest.raises(InputError, match="background"):
        cg.plot(noisy(), noisy().expand_dims(run=2))


def test_missing_packages__are_named_with_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn.plotting", None)
    with pytest.raises(MissingDependencyError, match=r"chunkglm\[nilearn\]"):
        cg.plot(noisy(), kind="glass")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    figures.figure_class.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"chunkglm\[report\]"):
        cg.plot(noisy())
    figures.figure_class.cache_clear()
