"""The report: what it says, that it says it to a browser without complaint, and that names stay text."""

import base64
import json
import os
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import browser
import nibabel as nib
import numpy as np
import pytest
import xarray as xr

import chunkglm as cg
from chunkglm import demo as demonstration
from chunkglm.cli import main
from chunkglm.errors import ChunkGLMWarning
from chunkglm.report import page
from chunkglm.testing import write_simulated_run

ROOT = Path(__file__).parents[1]
SHAPE = (16, 18, 12)
HOSTILE = "<img src=x onerror=alert(1)> & 'x' \"y\""
SCRIPT = "<script>alert(1)</script>"
WIDTHS = {"desktop": 1280, "phone": 390}


def call(*arguments):
    with pytest.raises(SystemExit) as exit_:
        main([os.fspath(argument) for argument in arguments])
    return exit_.value.code


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sessions with hostile names of files and regressors, and voxels that cannot be fitted."""
    folder = tmp_path_factory.mktemp("data")
    for n in (1, 2):
        path = folder / f"{HOSTILE}{n}.nii.gz"
        write_simulated_run(
            path, folder / f"design{n}.npz", folder / "mask.nii.gz", shape=SHAPE, n_volumes=66, session=n,
            effect_percent=4.0, overwrite=True,
        )  # fmt: skip
        design = cg.read_design(folder / f"design{n}.npz").rename(columns={"DSt": SCRIPT, "SSt": "$\\frac{"})
        design.to_csv(folder / f"design{n}.csv", index=False)
        image = nib.load(path)
        values = image.get_fdata(dtype=np.float32)
        inside = np.argwhere(nib.load(folder / "mask.nii.gz").get_fdata() > 0)
        for place in inside[:3]:
            values[tuple(place)] = np.nan
        for place in inside[3:5]:
            values[tuple(place)] -= 2 * values[tuple(place)].mean()
        if n == 2:
            values[tuple(inside[5])] = 700.0
        changed = nib.Nifti1Image(values, image.affine)
        changed.header.set_zooms(image.header.get_zooms())
        changed.header.set_xyzt_units("mm", "sec")
        changed.to_filename(path)
    return folder


def job(data, *more, contrasts=(f"hot=`{SCRIPT}` - DSp", "all=[1,1,1,1]")):
    words = ["run", *(data / f"{HOSTILE}{n}.nii.gz" for n in (1, 2))]
    for n in (1, 2):
        words += ["--design", data / f"design{n}.csv"]
    for contrast in contrasts:
        words += ["--contrast", contrast]
    return [*words, "--mask", data / "mask.nii.gz", *more]


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "results"
    assert call(*job(data), "--output", output) == 0
    return output


class Parsed(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(Path(path).read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


# -------------------------------------------------------------------------------------------------------- what it says


def test_report__is_one_file_that_needs_nothing(results):
    parsed = Parsed(results / "report.html")
    assert not parsed.all("script")
    assert not [attrs for tag, attrs in parsed.elements if any(name.startswith("on") for name in attrs)]
    assert [link["href"] for link in parsed.all("link")] == ["data:,"]
    assert all(link["href"].startswith("#") for link in parsed.all("a"))
    pictures = parsed.all("img")
    assert len(pictures) == 2 * (2 + 2) + 2, (
        "of each contrast two of the fixed effects and one a run; and the designs"
    )
    for picture in pictures:
        kind, content = picture["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content).startswith(b"\x89PNG")
        assert picture["alt"]
    policy = next(meta for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_report__shows_hostile_names_as_text(results):
    parsed = Parsed(results / "report.html")
    for name in (f"{HOSTILE}1.nii.gz", f"{HOSTILE}2.nii.gz", f"`{SCRIPT}` - DSp"):
        assert name in parsed.text


def test_report__has_its_sections_in_order(results):
    parsed = Parsed(results / "report.html")
    anchors = [attrs["id"] for attrs in parsed.all("section")]
    assert anchors == [section.anchor for section in page.SECTIONS]
    assert [attrs["href"] for attrs in parsed.all("a")] == [f"#{anchor}" for anchor in anchors]
    maps = (results / "report.html").read_text("utf-8").split('id="maps"')[1]
    first, second, third = (
        re.search(f'alt="hot, {of}', maps).start() for of in ("fixed effects", "run 1", "run 2")
    )
    assert first < second < third


def test_report__pictures_lie_beside_it(results):
    parsed = Parsed(results / "report.html")
    embedded = {base64.b64decode(picture["src"].split(",", 1)[1]) for picture in parsed.all("img")}
    files = sorted((results / "pictures").iterdir())
    assert [path.name for path in files] == sorted(
        name
        for contrast in ("hot", "all")
        for run in (None, "1", "2")
        for name in page.picture_names(contrast, run)
    )
    assert {path.read_bytes() for path in files} < embedded


def test_report__table_of_runs_is_that_of_the_fit(results, data):
    told = json.loads((results / "provenance.json").read_text())["runs"]
    lazy = cg.fit(cg.open_study(results / "runs.zarr"), [data / f"design{n}.csv" for n in (1, 2)])
    with pytest.warns(ChunkGLMWarning, match="0 or less"):
        fit = lazy.compute()
    inside = int((nib.load(data / "mask.nii.gz").get_fdata() > 0).sum())
    reasons = {"values that are not finite": 3, "temporal mean of 0 or less": 2}
    expected = [reasons, reasons | {"no variance in time": 1}]
    text = Parsed(results / "report.html").text
    for number, (run, left_out) in enumerate(zip(told, expected, strict=True)):
        one = fit.isel(run=number)
        assert run["voxels_left_out"] == left_out
        assert run["voxels_in_mask"] == inside
        assert run["voxels_fitted"] == inside - sum(left_out.values()) == int(one.sigma2.notnull().sum())
        assert run["regressors"] == 7
        assert run["dof"] == 59.0
        np.testing.assert_allclose(run["ar_median"], np.nanmedian(one.rho), rtol=1e-12)
        for words in (f"{run['ar_median']:.2f}", run["sha256"], run["design_sha256"], "59", "66"):
            assert words in text
        for reason, count in left_out.items():
            assert f"{count}: {reason}" in text


def test_report__repeats_the_command(results):
    told = json.loads((results / "provenance.json").read_text())
    text = Parsed(results / "report.html").text
    assert told["command"] in text
    assert told["working_directory"] in text
    for package, version in told["versions"].items():
        assert package in text
        assert version in text


@pytest.mark.parametrize(
    ("more", "said", "unsaid"),
    [
        ((), "corrected for the bias", "nilearn"),
        (("--compat", "nilearn"), "in steps of .01, not corrected", "corrected for the bias"),
        (("--noise-model", "ols", "--signal-scaling", "none"), "was not scaled", "autoregressive"),
        (("--noise-model", "ols", "--compat", "nilearn"), "ordinary least squares", "autoregressive"),
        (("--precision-weighted", "--smoothing-fwhm", "4"), "inverse of their variance", "equal weights"),
    ],
)
def test_report__says_what_was_asked_and_nothing_else(more, said, unsaid, data, tmp_path):
    assert call(*job(data, *more, contrasts=["DSp"]), "--output", tmp_path / "results") == 0
    text = Parsed(tmp_path / "results" / "report.html").text
    asked = text[text.rindex("What was asked") : text.rindex("z scores beyond")]
    assert said in asked
    assert unsaid not in asked


def test_report__draws_runs_and_fixed_effects_on_one_scale(data, tmp_path, monkeypatch):
    drawn = []

    def spy(array, *arguments, **options):
        drawn.append((str(array.name), arguments, options["vmax"]))
        return cg.plot(array, *arguments, **options)

    monkeypatch.setattr(page, "plot", spy)
    assert call(*job(data, "--threshold", "4", contrasts=["DSt=DSp"]), "--output", tmp_path / "results") == 0
    images = [nib.load(path) for path in sorted((tmp_path / "results" / "maps").glob("*stat-z*.nii.gz"))]
    assert {vmax for _, _, vmax in drawn} == {max(np.abs(image.get_fdata()).max() for image in images)}
    assert {arguments[1] for _, arguments, _ in drawn} == {4.0}
    fixed = nib.load(tmp_path / "results" / "maps" / "contrast-DSt_stat-z_statmap.nii.gz")
    z = np.abs(fixed.get_fdata())
    mm = nib.affines.apply_affine(fixed.affine, np.unravel_index(z.argmax(), z.shape))
    ortho = [arguments[2] for _, arguments, _ in drawn if arguments[3] == "ortho"]
    assert len(ortho) == 3
    for coords in ortho:
        np.testing.assert_allclose(coords, mm, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ again and again


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_run__other_cuts_draw_again_and_compute_nothing(results, data, tmp_path, capsys):
    output = tmp_path / "results"
    shutil.copytree(results, output)
    before = files_of(output)
    assert call(*job(data, "--threshold", "5", "--cut-coords", "0", "0", "0"), "--output", output) == 0
    assert "up to date" in capsys.readouterr().out
    changed = {
        path.relative_to(output).parts[0]
        for path, when in files_of(output).items()
        if before.get(path) != when
    }
    assert changed == {"pictures", "report.html", "provenance.json"}
    assert "beyond ±5" in (output / "report.html").read_text("utf-8")
    before = files_of(output)
    assert call(*job(data, "--threshold", "5", "--cut-coords", "0", "0", "0"), "--output", output) == 0
    assert files_of(output) == before
    assert call("report", output, "--threshold", "2") == 0
    assert "beyond ±2" in (output / "report.html").read_text("utf-8")


def test_run__makes_a_lost_report_again(results, data, tmp_path):
    output = tmp_path / "results"
    shutil.copytree(results, output)
    (output / "report.html").unlink()
    lost = output / "pictures" / "run-1_contrast-hot_stat-z_ortho.png"
    lost.unlink()
    assert call(*job(data), "--output", output) == 0
    assert lost.read_bytes() == (results / "pictures" / lost.name).read_bytes()
    assert (output / "report.html").read_bytes() == (results / "report.html").read_bytes()


def test_run__another_job_leaves_no_picture_of_the_old_one(results, data, tmp_path):
    output = tmp_path / "results"
    shutil.copytree(results, output)
    (output / "pictures" / "mine.png").write_bytes(b"precious")
    assert call(*job(data, "--overwrite", contrasts=["new=DSp"]), "--output", output) == 0
    names = {path.name for path in (output / "pictures").iterdir()}
    assert names == {"mine.png"} | {
        name for run in (None, "1", "2") for name in page.picture_names("new", run)
    }


def test_run__cuts_outside_of_the_data_are_refused_before_any_work(data, tmp_path, capsys):
    assert call(*job(data, "--cut-coords", "900", "0", "0"), "--output", tmp_path / "results") == 1
    assert "x = 900 mm lies outside" in capsys.readouterr().err
    assert call(*job(data, "--threshold", "-1"), "--output", tmp_path / "results") == 1
    assert not (tmp_path / "results").exists()


def test_run__without_the_extra_gives_maps_and_says_what_to_install(
    data, results, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "results"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "jinja2", None)
        assert call(*job(data, "--json"), "--output", output) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["report"] is None
        (warning,) = [line for line in err.splitlines() if "report" in line]
        assert warning.startswith("Warning: The maps are complete")
        assert "pip install 'chunkglm[report]'" in warning
        assert f"chunkglm report {output}" in warning
    assert (output / "maps" / "contrast-hot_stat-z_statmap.nii.gz").is_file()
    assert call("report", output) == 0
    for picture in (results / "pictures").iterdir():
        assert (output / "pictures" / picture.name).read_bytes() == picture.read_bytes()


def test_report__refuses_what_is_no_finished_job(tmp_path, results, capsys):
    assert call("report", tmp_path) == 1
    assert "not the folder of a finished job" in capsys.readouterr().err
    shutil.copytree(results, tmp_path / "old")
    for lost, whose in (("pictures", None), ("noise_model", "runs")):
        told = json.loads((results / "provenance.json").read_text())
        del (told if whose is None else told[whose][1])[lost]
        (tmp_path / "old" / "provenance.json").write_text(json.dumps(told))
        assert call("report", tmp_path / "old") == 1
        err = capsys.readouterr().err
        assert lost in err
        assert "run the job again" in err


def test_run__a_file_name_that_is_no_text_does_no_harm(data, tmp_path):
    """A name of bytes that are not UTF-8, as old archives hold."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/run\xff.nii.gz")
    try:
        shutil.copy(data / f"{HOSTILE}1.nii.gz", name)
    except OSError:
        pytest.skip("this file system holds names in UTF-8 only")
    words = [
        "run",
        name,
        "--design",
        data / "design1.csv",
        "--mask",
        data / "mask.nii.gz",
        "--contrast",
        "DSp",
    ]
    assert call(*words, "--output", tmp_path / "results") == 0
    told = json.loads((tmp_path / "results" / "provenance.json").read_text("utf-8"))
    assert told["runs"][0]["path"] == name
    parsed = Parsed(tmp_path / "results" / "report.html")
    assert "run?.nii.gz" in parsed.text
    assert "fixed effects of 1 run" in parsed.text
    assert "1 runs" not in parsed.text


# ------------------------------------------------------------------------------------------------------------ plot verb


def test_plot__writes_a_picture_and_replaces_none_unasked(results, tmp_path, capsys):
    z_map = results / "maps" / "contrast-hot_stat-z_statmap.nii.gz"
    for kind in (
        ["--cut-coords", "-12", "6", "3"],
        ["--kind", "mosaic", "--slices", "-3,0,3"],
        ["--kind", "mosaic"],
    ):
        for background in (results / "maps" / "mean_image.nii.gz", results / "runs.zarr" / "run-1"):
            words = [
                "plot",
                z_map,
                "--background",
                background,
                *kind,
                "--output",
                tmp_path / "a.png",
                "--overwrite",
            ]
            assert call(*words) == 0
            assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for name, start in (("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        assert call("plot", z_map, "--title", "$x", "--output", tmp_path / name) == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    capsys.readouterr()
    for more, words in (
        (["--output", tmp_path / "a.png"], "--overwrite"),
        (["--output", tmp_path / "a.docx"], ".png, .svg, .pdf"),
        (["--output", tmp_path / "b.png", "--slices", "1,2"], "--kind mosaic"),
        (["--output", tmp_path / "b.png", "--kind", "mosaic", "--slices", "1;2"], "commas"),
        (["--output", tmp_path / "b.png", "--kind", "mosaic", "--cut-coords", "1", "2", "3"], "--slices"),
        (["--output", tmp_path / "none" / "b.png"], "not written"),
    ):
        assert call("plot", z_map, *more) == 1
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png", "a.svg"]
    assert call("plot", results / "fit.zarr", "--output", tmp_path / "b.png") == 1
    assert "chunkglm export" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- browser


@pytest.mark.parametrize("width", WIDTHS)
def test_browser__finds_nothing_wrong(results, width):
    with browser.browser(WIDTHS[width]) as chrome:
        assert browser.problems(chrome, results / "report.html") == []
        assert browser.screenshot(chrome).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def oneback(real_data, tmp_path_factory):
    folder, output = real_data / "oneback", tmp_path_factory.mktemp("oneback") / "results"
    designs = [word for n in (1, 2) for word in ("--design", folder / f"run{n}_design.npz")]
    assert (
        call(
            "run", folder / "run1.nii.gz", folder / "run2.nii.gz", *designs, "--mask", folder / "mask.nii.gz",
            "--column-names", folder / "design_columns.txt", "--smoothing-fwhm", "5", "--contrast",
            "face_minus_house=face - house", "--output", output,
        )
        == 0
    )  # fmt: skip
    return output


@pytest.mark.parametrize("width", WIDTHS)
def test_browser__finds_nothing_wrong_with_real_recordings(oneback, width):
    with browser.browser(WIDTHS[width]) as chrome:
        assert browser.problems(chrome, oneback / "report.html") == []


def test_oneback__peaks_are_told_and_drawn_where_nibabel_finds_them(oneback):
    told = json.loads((oneback / "provenance.json").read_text())
    image = nib.load(oneback / "maps" / "contrast-face_minus_house_stat-z_statmap.nii.gz")
    z = image.get_fdata()
    (fixed,) = [entry for entry in told["peaks"] if entry["run"] is None]
    for end, number in (("highest", z.argmax()), ("lowest", z.argmin())):
        mm = nib.affines.apply_affine(image.affine, np.unravel_index(number, z.shape))
        np.testing.assert_allclose(fixed[end]["mm"], mm, atol=1e-3)
    place = np.unravel_index(np.abs(z).argmax(), z.shape)
    mm = nib.affines.apply_affine(image.affine, place)
    figure = cg.plot(oneback / "maps" / "contrast-face_minus_house_stat-z_statmap.nii.gz")
    for axis, (right, up) in enumerate(((1, 2), (0, 2), (0, 1))):
        axes = next(axes for axes in figure.axes if axes.get_label() == "xyz"[axis])
        assert axes.texts[0].get_text() == f"{'xyz'[axis]} = {round(mm[axis], 1) + 0.0:g}"
        shown = axes.images[-1]
        left, right_end, bottom, top = shown.get_extent()
        rows, columns = shown.get_array().shape
        row = int((mm[up] - bottom) / (top - bottom) * rows)
        column = int((mm[right] - left) / (right_end - left) * columns)
        assert shown.get_array()[row, column] == z[place]


BAD_PAGES = [
    (
        "<p style='position:absolute;top:0;left:0'>one</p><p style='position:absolute;top:2px;left:0'>two</p>",
        "overlap",
    ),
    ("<p style='width:2000px'>wide</p>", "outside"),
    (
        "<p style='width:50px;overflow:hidden;white-space:nowrap'>much too long for its place</p>",
        "clipped",
    ),
    ("<img alt='lost' src='file:///none.png'>", "no picture: lost"),
    ("<img alt='lost' src='http://127.0.0.1:9/x.png'>", "request: http"),
    ("<script>console.error('oh')</script>", "console: "),
    ("<script>fetch('http://127.0.0.1:9/')</script>", "request: http"),
]


def test_browser__the_check_can_fail(tmp_path):
    bad = tmp_path / "bad.html"
    with browser.browser(800) as chrome:
        for body, words in BAD_PAGES:
            head = "<head><link rel='icon' href='data:,'></head>"
            bad.write_text(f"<!DOCTYPE html><html>{head}<body>{body}</body></html>")
            assert any(words in problem for problem in browser.problems(chrome, bad)), words


# -------------------------------------------------------------------------------------------------------------- the demo


def test_demo__ends_with_picture_report_and_three_things_that_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("demo") == 0
    out = capsys.readouterr().out
    ending = out[out.index("Look at the picture") :]
    picture, report = (re.search(f"{words}: +(.*)", ending)[1] for words in ("picture", "report"))
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert "DSt_minus_SSt" in Parsed(report).text
    steps = re.findall(r"^  \d\. .*\n     (.*)$", ending, flags=re.MULTILINE)
    assert len(steps) == 3
    for step in steps:
        words = shlex.split(step)
        start = words.index("-m") + 2 if "-m" in words else 1
        assert call(*words[start:]) == 0, step
    assert Path("slices.png").is_file()
    assert xr.open_zarr("different.zarr").z_score.sizes["run"] == 2
    command = re.search(r"^  .*(chunkglm run .*)$", out, flags=re.MULTILINE)[1]
    assert call(*shlex.split(command)[1:]) == 0
    assert "up to date" in capsys.readouterr().out, "the command that is shown is the job that was done"


def test_readme__shows_the_picture_of_the_demo(tmp_path):
    """Up to what another version of matplotlib does to letters."""
    from matplotlib.image import imread

    assert call("-q", "demo", "--output", tmp_path / "demo") == 0
    shown = imread(ROOT / re.search(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text("utf-8"))[1])
    made = imread(tmp_path / "demo" / "pictures" / "contrast-DSt_minus_SSt_stat-z_ortho.png")
    assert shown.shape == made.shape
    assert np.abs(shown - made).mean() < 0.01


@pytest.fixture
def fiac_folder(tmp_path, monkeypatch):
    """A folder such as nilearn's fetcher leaves, with simulated recordings at the place of the original ones."""
    folder = tmp_path / "nilearn_data" / "fiac_nilearn.glm" / "nipy-data-0.2" / "data" / "fiac" / "fiac0"
    folder.mkdir(parents=True)
    monkeypatch.setenv("NILEARN_DATA", str(tmp_path / "nilearn_data"))
    for n in (1, 2):
        source = tmp_path / f"simulated{n}.nii.gz"
        write_simulated_run(
            source, tmp_path / f"d{n}.npz", tmp_path / "m.nii.gz", session=n, shape=SHAPE, overwrite=True
        )
        design = cg.read_design(tmp_path / f"d{n}.npz")
        names = np.array([b"SSt", b"SSp", b"DSt", b"DSp", *([b"drift"] * (design.shape[1] - 5)), b"constant"])
        np.savez(folder / f"run{n}_design.npz", X=design.to_numpy(), conditions=names)
        moved(source, folder / f"run{n}.nii.gz")
    moved(tmp_path / "m.nii.gz", folder / "mask.nii.gz")
    return folder


def moved(source, target):
    """The image around the point at which the reference cuts, without a repetition time."""
    image = nib.load(source)
    affine = image.affine.copy()
    affine[:3, 3] += demonstration.FIAC_CUTS
    nib.Nifti1Image(np.asarray(image.dataobj), affine).to_filename(target)


def test_demo__fiac_runs_on_what_the_fetcher_leaves(fiac_folder, tmp_path, capsys):
    assert call("demo", "--data", "fiac", "--output", tmp_path / "fiac") == 0
    out = capsys.readouterr().out
    assert "reference example" in out
    assert "fetch" not in out
    assert "Read the report" in out
    told = json.loads((tmp_path / "fiac" / "provenance.json").read_text())
    assert told["pictures"] == {"threshold": 3.0, "cut_coords": [-129.0, -126.0, 49.0]}
    assert [run["path"] for run in told["runs"]] == [str(fiac_folder / f"run{n}.nii.gz") for n in (1, 2)]
    expected = np.load(fiac_folder / "run1_design.npz")["X"]
    np.testing.assert_array_equal(
        cg.read_design(tmp_path / "fiac" / "data" / "session1_design.csv"), expected
    )
    picture = (tmp_path / "fiac" / "pictures" / "contrast-DSt_minus_SSt_stat-z_ortho.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    command = re.search(r"^  .*(chunkglm run .*)$", out, flags=re.MULTILINE)[1]
    assert call(*shlex.split(command)[1:]) == 0
    assert "up to date" in capsys.readouterr().out


def test_demo__fiac_without_network_is_one_sentence(tmp_path, monkeypatch, capsys):
    from nilearn.datasets import func

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(func, "fetch_single_file", unreachable)
    monkeypatch.setenv("NILEARN_DATA", str(tmp_path / "empty"))
    assert call("-q", "demo", "--data", "fiac", "--output", tmp_path / "fiac") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        "Error: The original recordings are not on this machine and could not be downloaded"
    )
    assert "chunkglm demo" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "fiac").exists()


def test_demo__fiac_without_nilearn_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nilearn.datasets", None)
    assert call("demo", "--data", "fiac", "--output", tmp_path / "fiac") == 1
    assert "chunkglm[nilearn]" in capsys.readouterr().err
