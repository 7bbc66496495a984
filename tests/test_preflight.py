"""What is known of a job before any work: everything that is wrong with it, and what it would make."""

import json
import shutil
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

import chunkglm as cg
from chunkglm import job, preflight, request, stale
from chunkglm.cli import main
from chunkglm.design import estimable_regressors, variance_inflation
from chunkglm.errors import ChunkGLMWarning, PreflightError
from chunkglm.testing import write_simulated_run

SHAPE = (14, 16, 12)
MASK_VOXELS = slice(4, 10), slice(4, 12), slice(3, 9)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for n, volumes in ((1, 50), (2, 46)):
        write_simulated_run(
            folder / f"run{n}.nii.gz", folder / f"design{n}.npz", shape=SHAPE, n_volumes=volumes, session=n
        )
        design = cg.read_design(folder / f"design{n}.npz")
        design.columns = ["face", "house", *design.columns[2:]]
        design.to_csv(folder / f"design{n}.csv", index=False)
    mask = np.zeros(SHAPE, np.uint8)
    mask[MASK_VOXELS] = 1
    nib.Nifti1Image(mask, nib.load(folder / "run1.nii.gz").affine).to_filename(folder / "mask.nii.gz")
    return folder


@pytest.fixture
def data(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "data")


def job_of(data, **options):
    given = {
        "runs": tuple(str(data / f"run{n}.nii.gz") for n in (1, 2)),
        "designs": tuple(str(data / f"design{n}.csv") for n in (1, 2)),
        "contrasts": {"diff": "face - house"},
        "mask": str(data / "mask.nii.gz"),
        "output": data.parent / "output",
        "report": False,
        **options,
    }
    return request.Job(**given)


def told(data, level, **options):
    """The findings of a level, as ``file: text``."""
    found = preflight.examine(job_of(data, **options)).findings
    return [f"{one.subject.rpartition('/')[2]}: {one.text}" for one in found if one.level == level]


def changed(path, change, **fields):
    """An image with other values, and other fields in its header."""
    image = nib.load(path)
    values = change(np.asarray(image.dataobj).astype(np.float32))
    new = nib.Nifti1Image(values, image.affine, image.header)
    new.header.set_data_dtype(np.float32)
    for name, value in fields.items():
        new.header[name] = value
    new.to_filename(path)


def test_a_job_that_can_be_done(data):
    found, models, _ = preflight.examine(job_of(data, smoothing_fwhm=5.0))
    assert {one.level for one in found} == {"ok"}
    assert [len(design) for design in models.designs.values()] == [50, 46]
    text = " ".join(one.text for one in found)
    assert "14 x 16 x 12 voxels of 3 x 3 x 3 mm, 50 volumes of 2 s" in text
    assert "a combination of face, house" in text
    assert {one.subject for one in found} >= {"memory", "disk", "contrast diff"}
    assert not (data.parent / "output").exists()


SIDECARS = [
    ({"RepetitionTime": 2.5}, "the repetition time there is 2.5 s, and 2 s in the header"),
    ({"RepetitionTime": 2000}, "which is hardly meant"),
    ({"SliceTiming": [0.0] * 11}, "times of 11 slices, but the image has 12"),
    ({"dcmmeta_shape": [14, 16, 12, 49]}, "the shape there is [14, 16, 12, 49]"),
    ({"dcmmeta_affine": np.eye(4).tolist()}, "the affine there"),
    ({"dcmmeta_affine": "nonsense"}, "the affine there"),
    ([1, 2], "no object"),
]


@pytest.mark.parametrize(("content", "expected"), SIDECARS, ids=str)
def test_a_sidecar_that_says_something_else(content, expected, data):
    (data / "run1.json").write_text(json.dumps(content))
    (message,) = told(data, "warning")
    assert message.startswith("run1.json: ")
    assert expected in message


def test_a_sidecar_that_agrees_or_is_overruled(data):
    affine = nib.load(data / "run1.nii.gz").affine.tolist()
    sidecar = {
        "RepetitionTime": 2.0,
        "SliceTiming": [0.0] * 12,
        "dcmmeta_shape": [14, 16, 12, 50],
        "dcmmeta_affine": affine,
    }
    (data / "run1.json").write_text(json.dumps(sidecar))
    assert told(data, "warning") == []
    (data / "run1.json").write_text('{"RepetitionTime": 3.0}')
    assert told(data, "warning", t_r=3.0) == []
    (data / "run1.json").write_text("{broken")
    assert "cannot be read" in told(data, "warning")[0]


def test_repetition_times_that_differ(data):
    changed(data / "run2.nii.gz", lambda values: values, pixdim=[1, 3, 3, 3, 1.5, 0, 0, 0])
    assert told(data, "warning") == [
        "runs: their repetition times differ (1.5, 2 s). Check that the designs were made for them"
    ]


def test_lengths_that_are_not_in_millimetres(data):
    changed(data / "run2.nii.gz", lambda values: values, xyzt_units=1 | 8)
    assert told(data, "warning") == [
        "run2.nii.gz: its header says that lengths are in metres; they are read as millimetres"
    ]


def test_the_same_run_twice(data):
    twice = (str(data / "run1.nii.gz"),) * 2
    assert told(data, "warning", runs=twice, designs=(str(data / "design1.csv"),) * 2) == [
        "runs: the same file is given more than once"
    ]


def test_voxels_that_say_nothing(data):
    def spoil(values):
        values[5, 5, 4, 2] = np.nan
        values[6, 5:8, 4:8] = 100.0
        return values

    changed(data / "run1.nii.gz", spoil)
    messages = told(data, "warning")
    n = np.zeros(SHAPE, bool)[MASK_VOXELS].size
    assert f"run1.nii.gz: 1 of {n} voxels in the mask are not finite in the first volumes" in messages
    assert any(f"12 of {n} voxels in the mask do not vary" in message for message in messages)
    changed(data / "run2.nii.gz", np.zeros_like)
    assert any("run2.nii.gz: the first 4 volumes are zero" in message for message in told(data, "warning"))


def test_designs_that_tell_nothing_apart(data):
    design = cg.read_design(data / "design1.csv")
    design["sum"] = 2 * design["face"] + design["house"]
    design.to_csv(data / "design1.csv", index=False)
    (message,) = [one for one in told(data, "warning") if "told apart" in one]
    assert message.startswith("design1.csv: face, house, sum cannot be told apart from each other (rank ")
    # What needs to tell them apart is refused, where no other run can.
    (message,) = told(data, "error", contrasts={"b": "face", "c": "sum"})
    assert message.startswith("contrast c: The contrast 'c' cannot be estimated in any run")


def test_regressors_that_share_their_variance(data):
    design = cg.read_design(data / "design1.csv")
    rng = np.random.default_rng(0)
    design["house"] = design["face"] + 0.05 * design["face"].std() * rng.standard_normal(len(design))
    design.to_csv(data / "design1.csv", index=False)
    messages = told(data, "warning")
    assert any("design1.csv: the variance of face is inflated" in one for one in messages)
    assert any("design1.csv: the variance of house is inflated" in one for one in messages)
    # Not if no contrast asks for them.
    assert told(data, "warning", contrasts={"c": "constant"}) == []


def test_a_run_that_lacks_a_regressor(data):
    design = cg.read_design(data / "design2.csv").rename(columns={"house": "place"})
    design.to_csv(data / "design2.csv", index=False)
    assert told(data, "note") == ["design2.csv: lacks house, so run 2 is left out of the contrast diff"]
    assert told(data, "warning") == []


def test_variance_inflation_is_that_of_statsmodels():
    from statsmodels.stats.outliers_influence import variance_inflation_factor

    rng = np.random.default_rng(3)
    X = np.column_stack(
        [
            rng.standard_normal((80, 3)) @ rng.standard_normal((3, 3)),
            rng.standard_normal(80) * 1e6,
            np.ones(80),
        ]
    )
    expected = [variance_inflation_factor(X, column) for column in range(4)]
    np.testing.assert_allclose(variance_inflation(X)[:4], expected, rtol=1e-9)
    assert variance_inflation(X)[4] == 1
    assert np.isinf(variance_inflation(np.column_stack([X, X[:, 0] + X[:, 1]]))[[0, 1, 5]]).all()
    assert estimable_regressors(np.column_stack([X, X[:, 0], 0 * X[:, 0]])) == [
        False,
        True,
        True,
        True,
        True,
        False,
        False,
    ]


def test_room(data, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: usage)
    (message,) = told(data, "error")
    assert message.startswith("disk: The results take about ")
    assert "Make room" in message
    usage.free = 10**9
    usage.free = int(0.8 * preflight.disk_needed(job_of(data), *described(data)))
    assert [one.partition(":")[0] for one in told(data, "warning")] == ["disk"]
    usage.free = 10**9
    monkeypatch.setattr(preflight.plan, "available_memory", lambda: 10**9)
    (message,) = told(data, "warning")
    assert message.startswith("memory: 2.0 GiB are allowed, of 954 MiB that are free")
    assert "needs about" in told(data, "error", memory="2MiB")[0]


def described(data):
    found = preflight._Found()
    runs = preflight._examine_runs(job_of(data), found)
    return preflight.examine(job_of(data)).models, runs


@pytest.mark.parametrize("smoothing", [None, 5.0])
def test_the_disk_that_is_needed_is_about_what_is_used(data, smoothing):
    asked = job_of(data, smoothing_fwhm=smoothing)
    needed = preflight.disk_needed(asked, *described(data))
    job.run_job(asked, Console(quiet=True), quiet=True)
    used = sum(path.stat().st_size for path in asked.output.rglob("*") if path.is_file())
    # Small results have more of what is not counted: metadata and sidecars.
    assert 0.2 * used < needed < 5 * used


def test_warnings_are_given_by_the_job(data):
    (data / "run1.json").write_text('{"RepetitionTime": 2.5}')
    with pytest.warns(ChunkGLMWarning, match="repetition time there is 2.5 s"):
        job.run_job(job_of(data), Console(quiet=True), quiet=True)


def test_all_errors_are_told_and_nothing_is_done(data):
    (data / "run2.nii.gz").write_bytes((data / "run2.nii.gz").read_bytes()[:-200])
    asked = job_of(data, noise_model="nonsense", contrasts={"a": "nose", "b": "face * house"})
    with pytest.raises(PreflightError) as caught:
        job.run_job(asked, Console(quiet=True), quiet=True)
    for words in (
        "4 things are wrong",
        "(4)",
        "nonsense",
        "run2.nii.gz",
        "nose",
        "face * house",
        "Nothing was done",
    ):
        assert words in str(caught.value)
    assert not asked.output.exists()


def test_several_gzip_streams_are_no_cut_off_file(data):
    """As bgzip and concatenation write them: the last length is not that of all."""
    import gzip

    content = gzip.decompress((data / "run1.nii.gz").read_bytes())
    parts = (content[:1000], content[1000:40000], content[40000:])
    (data / "run1.nii.gz").write_bytes(b"".join(gzip.compress(part) for part in parts))
    assert told(data, "error") == []


def test_check__takes_every_option_of_a_job():
    """So that a command can be examined as it stands."""
    from chunkglm.cli import cli

    names = {verb: {one.name for one in cli.commands[verb].params} for verb in ("run", "check")}
    assert names["run"] - names["check"] == {"dry_run", "plan_only"}


def test_check__on_the_command_line(data, capsys):
    words = ["check", *map(str, sorted(data.glob("run*.nii.gz")))]
    for n in (1, 2):
        words += ["--design", str(data / f"design{n}.csv")]
    words += ["--mask", str(data / "mask.nii.gz"), "--contrast", "diff=face - house"]
    with pytest.raises(SystemExit) as status:
        main(words)
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert "finding" in out.splitlines()[0]
    assert max(map(len, out.splitlines())) <= 80
    assert "warning" not in out
    with pytest.raises(SystemExit) as status:
        main([*words, "--contrast", "b=nose", "--json"])
    assert status.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["subject"] for one in found if one["level"] == "error"] == ["contrast b"]


# -------------------------------------------------------------------------------------------------------------- dry runs


def states(data, **options):
    asked = job_of(data, **options)
    found = stale.products(asked, preflight.check_job(asked))
    return {one.name: (one.state, one.why) for one in found}


def test_a_dry_run_tells_what_is_stale_and_why(data):
    assert {state for state, _ in states(data).values()} == {"missing"}
    job.run_job(job_of(data), Console(quiet=True), quiet=True)
    current = states(data)
    assert list(current) == [
        "store of run 1",
        "store of run 2",
        "fit of run 1",
        "fit of run 2",
        "maps of diff",
    ]
    assert set(current.values()) == {("up to date", "")}
    assert states(data, n_threads=1, memory="4GiB", threshold=5.0) == current
    # A contrast: nothing but its maps.
    more = states(data, contrasts={"diff": "face - house", "b": "face"})
    assert more == {**current, "maps of b": ("missing", "")}
    assert states(data, contrasts={"diff": "face"}) == {
        **current,
        "maps of diff": ("stale", "the fit, or the contrast"),
    }
    # One design value: that run.
    design = cg.read_design(data / "design2.csv")
    design.iloc[3, 0] += 0.5
    design.to_csv(data / "design2.csv", index=False)
    assert states(data) == {
        **current,
        "fit of run 2": ("stale", "design"),
        "maps of diff": ("stale", "the fit"),
    }
    # Options.
    smoothed = states(data, smoothing_fwhm=4.0)
    assert smoothed["store of run 1"] == ("stale", "smoothing")
    assert smoothed["fit of run 1"] == ("stale", "smoothing")
    assert states(data, noise_model="ols")["fit of run 1"] == ("stale", "noise model")
    assert states(data, noise_model="ols")["store of run 1"] == ("up to date", "")


def test_a_dry_run_tells_another_recording_and_what_was_begun(data, monkeypatch):
    job.run_job(job_of(data), Console(quiet=True), quiet=True)
    changed(data / "run1.nii.gz", lambda values: values + 1)
    found = states(data)
    assert found["store of run 1"] == ("stale", "header, source")
    assert found["fit of run 1"] == ("stale", "recording")
    assert found["fit of run 2"] == ("up to date", "")
    shutil.rmtree(data.parent / "output")

    def interrupt(*_):
        raise KeyboardInterrupt

    from chunkglm import streamed

    monkeypatch.setattr(streamed.StreamedRun, "_write_block", interrupt)
    with pytest.raises(KeyboardInterrupt):
        job.run_job(job_of(data), Console(quiet=True), quiet=True)
    found = states(data)
    assert found["store of run 1"] == ("up to date", "")
    assert found["store of run 2"] == ("missing", "")
    assert found["fit of run 1"] == ("begun", "")


def test_a_dry_run__on_the_command_line(data, capsys):
    words = ["run", str(data / "run1.nii.gz"), "--design", str(data / "design1.csv"), "--contrast", "a=face"]
    words += ["--output", str(data.parent / "output"), "--dry-run"]
    with pytest.raises(SystemExit):
        main(words)
    assert "store of run 1  missing" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words, "--json"])
    assert {one["state"] for one in json.loads(capsys.readouterr().out)} == {"missing"}
    assert not (data.parent / "output").exists()
