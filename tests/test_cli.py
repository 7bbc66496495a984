"""The command line, from the outside."""

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import dask
import nibabel as nib
import numpy as np
import pytest

import chunkglm as cg
from chunkglm import glm
from chunkglm.cli import cli, main
from chunkglm.testing import write_simulated_run

ROOT = Path(__file__).parents[1]
SHAPE = (16, 18, 12)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two small sessions with designs and a mask."""
    folder = tmp_path_factory.mktemp("data")
    for session, volumes in ((1, 66), (2, 72)):
        write_simulated_run(
            folder / f"run{session}.nii.gz",
            folder / f"run{session}_design.npz",
            folder / "mask.nii.gz",
            shape=SHAPE,
            n_volumes=volumes,
            session=session,
            effect_percent=4.0,
            overwrite=True,
        )
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The output of a whole job."""
    output = tmp_path_factory.mktemp("job") / "results"
    assert call(*job(data), "--output", output) == 0
    return output


def call(*arguments):
    """Exit status of a command."""
    before = warnings.showwarning
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert warnings.showwarning is before, "the command line must not leave its ways to the process"
    return exit_.value.code


def job(data, contrast="diff=[-1,-1,1,1,0,0,0]"):
    return (
        "run", data / "run1.nii.gz", data / "run2.nii.gz",
        "--design", data / "run1_design.npz", "--design", data / "run2_design.npz",
        "--mask", data / "mask.nii.gz", "--smoothing-fwhm", "5", "--contrast", contrast,
    )  # fmt: skip


def fails(capsys, *arguments, status=1):
    """The message of a command that must fail: one paragraph, no traceback, nothing on standard output."""
    assert call(*arguments) == status
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in err
    assert out == ""
    if status == 1:
        assert len(errors) == 1, err
        return errors[0]
    return err


def write_image(path, data, affine):
    image = nib.Nifti1Image(data, affine)
    image.header.set_zooms((*image.header.get_zooms()[:3], 2.0))
    image.header.set_xyzt_units("mm", "sec")
    image.to_filename(path)
    return path


# ------------------------------------------------------------------------------------------------------------- whole job


def test_run__leaves_stores_maps_sidecars_and_provenance(finished, data):
    maps = finished / "maps"
    for prefix in ("", "run-1_", "run-2_"):
        for stat in ("effect", "variance", "t", "p", "z"):
            image = nib.load(maps / f"{prefix}contrast-diff_stat-{stat}_statmap.nii.gz")
            assert image.shape == SHAPE
            assert np.isfinite(image.get_fdata()).all()
            sidecar = json.loads((maps / f"{prefix}contrast-diff_stat-{stat}_statmap.json").read_text())
            assert sidecar["Formula"] == [-1, -1, 1, 1, 0, 0, 0]
            assert sidecar["Weights"] == {"SSt": -1, "SSp": -1, "DSt": 1, "DSp": 1}
            low, high = sidecar["DegreesOfFreedomRange"]
            most = {"": 124, "run-1_": 59, "run-2_": 65}[prefix]
            assert 2 < low < sidecar["DegreesOfFreedom"] < high <= most
            assert len(sidecar["Inputs"]) == (1 if prefix else 2)
    cg.verify(finished / "runs.zarr")
    cg.verify(finished / "fit.zarr")
    provenance = json.loads((finished / "provenance.json").read_text())
    assert [run["volumes"] for run in provenance["runs"]] == [66, 72]
    assert provenance["mask"]["path"] == str(data / "mask.nii.gz")
    assert all((finished / name).is_file() for name in provenance["outputs"])
    assert len(provenance["outputs"]) == 3 * 11 + 1
    means = [
        run["mean_image"].values for run in map(cg.open_run, sorted((finished / "runs.zarr").glob("run-*")))
    ]
    mean = nib.load(maps / "mean_image.nii.gz").get_fdata().T
    np.testing.assert_allclose(mean, np.mean(means, axis=0, dtype=np.float64), rtol=1e-6)


def test_run__is_the_api(finished, data):
    runs = cg.open_study(finished / "runs.zarr")
    fit = cg.fit(runs, [data / "run1_design.npz", data / "run2_design.npz"])
    contrasts = cg.contrast(fit, [-1, -1, 1, 1, 0, 0, 0])
    combined = cg.fixed_effects(contrasts)
    for prefix, expected in (
        ("", combined),
        ("run-1_", contrasts.isel(run=0)),
        ("run-2_", contrasts.isel(run=1)),
    ):
        for stat, name in (
            ("effect", "effect"),
            ("variance", "variance"),
            ("t", "stat"),
            ("z", "z_score"),
            ("p", "p_value"),
        ):
            image = nib.load(finished / "maps" / f"{prefix}contrast-diff_stat-{stat}_statmap.nii.gz")
            np.testing.assert_array_equal(image.get_fdata().T, expected[name].fillna(0).values)
    inside = nib.load(finished / "maps" / "contrast-diff_mask.nii.gz").get_fdata().T.astype(bool)
    np.testing.assert_array_equal(inside, combined.stat.notnull().values)


def test_run__same_bits_whatever_threads_and_memory(finished, data, tmp_path):
    assert call(*job(data), "--output", tmp_path / "other", "--n-threads", "1", "--memory", "150MiB") == 0
    one, other = (sorted((folder / "maps").glob("*.nii.gz")) for folder in (finished, tmp_path / "other"))
    assert [path.name for path in one] == [path.name for path in other]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_run__again_is_up_to_date(finished, data, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert call(*job(data), "--output", finished, "--n-threads", "1") == 0
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_run__refuses_another_output_and_overwrites_when_told(finished, data, tmp_path, capsys):
    output = tmp_path / "results"
    shutil.copytree(finished, output)
    other = job(data, "other=DSt - SSt")
    message = fails(capsys, *other, "--output", output)
    assert str(output) in message
    assert "--overwrite" in message
    assert "chunkglm contrast" in message
    fit_before = (output / "fit.zarr" / "zarr.json").stat().st_mtime_ns
    assert call(*other, "--output", output, "--overwrite") == 0
    assert (output / "fit.zarr" / "zarr.json").stat().st_mtime_ns == fit_before, (
        "another contrast needs no other fit"
    )
    assert (output / "maps" / "contrast-other_stat-z_statmap.nii.gz").is_file()
    assert not list((output / "maps").glob("*contrast-diff*")), (
        "maps of the job that was replaced must not linger"
    )


def test_run__makes_lost_maps_again(finished, data, tmp_path):
    output = tmp_path / "results"
    shutil.copytree(finished, output)
    lost = output / "maps" / "contrast-diff_stat-z_statmap.nii.gz"
    lost.unlink()
    assert call(*job(data), "--output", output) == 0
    assert lost.read_bytes() == (finished / "maps" / lost.name).read_bytes()


def test_run__goes_on_where_it_stopped(finished, data, tmp_path):
    output = tmp_path / "results"
    shutil.copytree(finished, output)
    for name in ("provenance.json", "report.html"):
        (output / name).unlink()
    for name in ("maps", "pictures"):
        shutil.rmtree(output / name)
    shutil.rmtree(output / "runs.zarr" / "run-2")
    kept = (output / "runs.zarr" / "run-1" / "zarr.json").stat().st_mtime_ns
    assert call(*job(data), "--output", output) == 0
    assert (output / "runs.zarr" / "run-1" / "zarr.json").stat().st_mtime_ns == kept
    for path in (finished / "maps").glob("*.nii.gz"):
        assert (output / "maps" / path.name).read_bytes() == path.read_bytes()


def test_run__never_touches_a_foreign_folder(data, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.tex").write_text("precious")
    message = fails(capsys, *job(data), "--output", tmp_path / "results")
    assert "thesis.tex" in message
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["thesis.tex"]


def test_run__its_own_report_is_no_excuse_to_write_into_a_folder(data, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "report.html").write_text("precious")
    assert "report.html" in fails(capsys, *job(data), "--output", tmp_path / "results")
    assert (tmp_path / "results" / "report.html").read_text() == "precious"


def test_demo__never_touches_a_foreign_folder(tmp_path, capsys):
    mine = tmp_path / "mine" / "data" / "session1.nii.gz"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    assert "mine" in fails(capsys, "demo", "--output", tmp_path / "mine")
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("terminal", [True, False])
def test_names__with_marks_of_the_terminal_library_are_shown_as_they_are(
    terminal, data, tmp_path, capsys, monkeypatch
):
    from rich.console import Console

    from chunkglm import cli as module

    monkeypatch.setattr(module, "ERR", Console(stderr=True, markup=False, force_terminal=terminal, width=200))
    source = tmp_path / "[red]run[bold].nii.gz"
    shutil.copy(data / "run1.nii.gz", source)
    monkeypatch.chdir(tmp_path)
    assert call("convert", source, "[b]store.zarr") == 0
    out, err = capsys.readouterr()
    assert "Wrote [b]store.zarr" in out
    assert "Converting [red]run[bold].nii.gz" in err


def test_run__prints_dof_peak_time_and_memory(data, tmp_path, capsys):
    assert call("-q", *job(data), "--output", tmp_path / "results") == 0
    out, err = capsys.readouterr()
    (entry, *_) = json.loads((tmp_path / "results" / "provenance.json").read_text())["peaks"]
    assert f"{entry['highest']['dof']:.4g}" in out
    assert "fixed effects" in out
    assert re.search(r"\d+\.\d s, peak memory \d+ MB", out)
    assert err == ""


def test_run__says_a_warning_once_in_words(data, tmp_path, capsys):
    assert call(*job(data, "diff=[-1,-1,1,1]"), "--output", tmp_path / "results") == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "Warning" in line]
    assert len(warned) == 1
    assert warned[0].startswith("Warning: ")
    assert "weight 0" in warned[0]


def test_run__drift_that_the_design_lacks_is_told_and_counted(data, tmp_path, capsys):
    """A design of a constant and one condition, and voxels that drift far."""
    image = nib.load(data / "run1.nii.gz")
    values = image.get_fdata()
    values += 4000 * np.linspace(0, 1, 66) ** 2
    write_image(tmp_path / "drifting.nii.gz", values.astype(np.float32), image.affine)
    X = np.load(data / "run1_design.npz")["X"]
    np.savez(tmp_path / "design.npz", X=X[:, [0, -1]])
    words = [
        "run",
        tmp_path / "drifting.nii.gz",
        "--design",
        tmp_path / "design.npz",
        "--mask",
        data / "mask.nii.gz",
    ]
    assert call(*words, "--contrast", "x0", "--output", tmp_path / "results") == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Warning: ")]
    assert len(warned) == 1
    (run,) = json.loads((tmp_path / "results" / "provenance.json").read_text())["runs"]
    rho = cg.open_store(tmp_path / "results" / "fit.zarr").rho.values
    assert run["voxels_at_ar_limit"] == (rho >= 0.99).sum() > 0.5 * run["voxels_fitted"]
    assert f"{run['voxels_at_ar_limit']:,} of {run['voxels_fitted']:,} voxels" in warned[0]
    assert "voxels at the limit" in (tmp_path / "results" / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def censored(data, tmp_path_factory):
    """A job with an F contrast, censored volumes and an order of the noise that is chosen."""
    output = tmp_path_factory.mktemp("censored") / "results"
    mask = output.parent / "mask.txt"
    mask.write_text(" ".join("0" if volume in (0, 1, 30) else "1" for volume in range(66)))
    words = job(data, "any=[1,0,0,0,0,0,0; 0,1,0,0,0,0,0]")
    more = ("--sample-mask", mask, "--sample-mask", "all", "--noise-model", "auto")
    assert call(*words, *more, "--contrast", "diff=[1,-1,0,0,0,0,0]", "--output", output) == 0
    return output, (*words, *more)


def test_run__f_contrasts_have_their_own_maps(censored):
    output, _ = censored
    maps = output / "maps"
    for prefix in ("", "run-1_", "run-2_"):
        names = {path.name for path in maps.glob(f"{prefix}contrast-any_*.nii.gz")}
        assert names == {
            f"{prefix}contrast-any_{end}.nii.gz"
            for end in ("mask", *(f"stat-{stat}_statmap" for stat in ("effect", "F", "p", "z")))
        }
        assert nib.load(maps / f"{prefix}contrast-any_stat-effect_statmap.nii.gz").shape == (*SHAPE, 2)
        sidecar = json.loads((maps / f"{prefix}contrast-any_stat-F_statmap.json").read_text())
        assert sidecar["Description"].startswith("F statistic")
        assert sidecar["Rows"] == 2
        assert sidecar["Weights"] == {"1": {"SSt": 1}, "2": {"SSp": 1}}
        assert sidecar["Model"]["noise_model_chosen"] == [
            run["noise_model"] for run in json.loads((output / "provenance.json").read_text())["runs"]
        ]
    fit = cg.open_store(output / "fit.zarr")
    expected = cg.fixed_effects(cg.contrast(fit, ["SSt", "SSp"])).compute()
    F = nib.load(maps / "contrast-any_stat-F_statmap.nii.gz").get_fdata()
    np.testing.assert_allclose(F, expected["stat"].fillna(0).values.T, rtol=1e-9)


def test_run__an_f_contrast_has_no_lowest_and_the_report_says_so(censored):
    output, _ = censored
    provenance = json.loads((output / "provenance.json").read_text())
    for entry in provenance["peaks"]:
        if entry["contrast"] == "any":
            assert entry["lowest"] is None
            assert entry["highest"]["F"] > 1
        else:
            assert entry["lowest"]["z"] < entry["highest"]["z"]
    text = (output / "report.html").read_text("utf-8")
    assert "[1, 0, 0, 0, 0, 0, 0; 0, 1, 0, 0, 0, 0, 0]" in text
    assert "Bayesian information criterion" in text
    assert "Censored volumes: 3 of run 1." in text
    assert "66, 63 kept" in text
    assert "sample mask 1" in text
    assert "sample mask 2" not in text


def test_run__censored_volumes_are_part_of_what_the_fit_is_made_of(censored, capsys):
    output, words = censored
    provenance = json.loads((output / "provenance.json").read_text())
    assert [run["volumes_kept"] for run in provenance["runs"]] == [63, 72]
    assert [run["sample_mask"] for run in provenance["runs"]] == [str(output.parent / "mask.txt"), "all"]
    fit = cg.open_store(output / "fit.zarr")
    np.testing.assert_array_equal(np.flatnonzero(~fit["sample_mask"][0, :66].values), [0, 1, 30])
    assert call(*words, "--contrast", "diff=[1,-1,0,0,0,0,0]", "--output", output) == 0
    assert "up to date" in capsys.readouterr().out
    numbers = output.parent / "numbers.txt"
    numbers.write_text("\n".join(str(volume) for volume in range(66) if volume not in (0, 1, 30)))
    same = [numbers if str(word).endswith("mask.txt") else word for word in words]
    assert call(*same, "--contrast", "diff=[1,-1,0,0,0,0,0]", "--output", output) == 0
    assert "up to date" in capsys.readouterr().out
    numbers.write_text("\n".join(str(volume) for volume in range(2, 66)))
    assert "holds the result of another job" in fails(
        capsys, *same, "--contrast", "diff=[1,-1,0,0,0,0,0]", "--output", output
    )


def test_steps__f_contrasts_go_from_fit_to_maps(censored, tmp_path, capsys):
    output, _ = censored
    names = ["--contrast", "any=SSt; SSp", "--contrast", "three=SSt; SSp; DSt"]
    assert call("contrast", output / "fit.zarr", *names, "--output", tmp_path / "c.zarr") == 0
    assert call("combine", tmp_path / "c.zarr", "--precision-weighted", "--output", tmp_path / "f.zarr") == 0
    assert call("export", tmp_path / "f.zarr", "--output", tmp_path / "maps") == 0
    for name, q in (("any", 2), ("three", 3)):
        effect = nib.load(tmp_path / "maps" / f"contrast-{name}_stat-effect_statmap.nii.gz")
        assert effect.shape == (*SHAPE, q)
        assert np.isfinite(effect.get_fdata()).all()
        assert (tmp_path / "maps" / f"contrast-{name}_stat-F_statmap.nii.gz").is_file()
    capsys.readouterr()
    mixed = [*names, "--contrast", "t=SSt"]
    err = fails(capsys, "contrast", output / "fit.zarr", *mixed, "--output", tmp_path / "m.zarr")
    assert "calls of their own" in err


def test_run__compat_and_precision_weighting_are_followed(data, tmp_path):
    from nilearn.glm import compute_fixed_effects

    output = tmp_path / "results"
    assert (
        call(
            *job(data),
            "--output",
            output,
            "--compat",
            "nilearn",
            "--noise-model",
            "ols",
            "--precision-weighted",
        )
        == 0
    )
    maps = output / "maps"
    effects, variances = (
        [str(maps / f"run-{n}_contrast-diff_stat-{stat}_statmap.nii.gz") for n in (1, 2)]
        for stat in ("effect", "variance")
    )
    expected = compute_fixed_effects(
        effects, variances, str(data / "mask.nii.gz"), precision_weighted=True, dofs=[59, 65]
    )
    for stat, image in zip(("effect", "variance", "t", "z"), expected, strict=True):
        got = nib.load(maps / f"contrast-diff_stat-{stat}_statmap.nii.gz").get_fdata()
        np.testing.assert_allclose(got, image.get_fdata(), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- single verbs


def test_fit__what_is_read_to_choose_the_order_keeps_to_what_is_said(finished, data, tmp_path, monkeypatch):
    told = []
    mean_rows = glm.mean_rows

    def look(rows):
        told.append((dask.config.get("num_workers"), dask.config.get("chunkglm.memory")))
        return mean_rows(rows)

    monkeypatch.setattr(glm, "mean_rows", look)
    designs = [item for n in (1, 2) for item in ("--design", data / f"run{n}_design.npz")]
    options = ("--noise-model", "auto", "--n-threads", "1", "--memory", "900MiB")
    assert call("fit", finished / "runs.zarr", *designs, *options, "--output", tmp_path / "fit.zarr") == 0
    assert told == [(1, "900MiB")] * 2


def test_verbs__one_by_one_give_the_maps_of_run(finished, data, tmp_path):
    study = tmp_path / "study.zarr"
    for n in (1, 2):
        source, store = data / f"run{n}.nii.gz", study / f"run-{n}"
        assert call("convert", source, store, "--mask", data / "mask.nii.gz", "--smoothing-fwhm", "5") == 0
    designs = [item for n in (1, 2) for item in ("--design", data / f"run{n}_design.npz")]
    assert call("fit", study, *designs, "--output", tmp_path / "fit.zarr") == 0
    contrast = ("--contrast", "diff=[-1,-1,1,1,0,0,0]")
    assert call("contrast", tmp_path / "fit.zarr", *contrast, "--output", tmp_path / "con.zarr") == 0
    assert call("combine", tmp_path / "con.zarr", "--output", tmp_path / "fixed.zarr") == 0
    for store in ("con.zarr", "fixed.zarr"):
        assert call("export", tmp_path / store, "--output", tmp_path / "maps", "--overwrite") == 0
    for path in (finished / "maps").glob("*contrast*.nii.gz"):
        np.testing.assert_array_equal(
            nib.load(tmp_path / "maps" / path.name).get_fdata(), nib.load(path).get_fdata()
        )


def test_export__gives_a_run_back(data, tmp_path):
    assert call("convert", data / "run1.nii.gz", tmp_path / "run.zarr") == 0
    assert call("export", tmp_path / "run.zarr", "--output", tmp_path / "back.nii.gz") == 0
    source, back = (
        gzip.decompress(path.read_bytes()) for path in (data / "run1.nii.gz", tmp_path / "back.nii.gz")
    )
    assert source == back


def test_info__is_json_for_programs(finished, capsys):
    assert call("info", finished / "runs.zarr", "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["run-2"]["sizes"]["time"] == 72
    assert call("info", finished / "fit.zarr") == 0
    assert "sigma2" in capsys.readouterr().out


def test_verify__names_the_damage(finished, tmp_path, capsys):
    run = tmp_path / "run-1"
    shutil.copytree(finished / "runs.zarr" / "run-1", run)
    assert call("verify", run) == 0
    capsys.readouterr()
    chunk = next(path for path in (run / "bold" / "c").rglob("*") if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    assert chunk.relative_to(run).as_posix() in fails(capsys, "verify", run)


def test_demo__recovers_the_truth_and_combines_to_a_higher_peak(tmp_path, capsys):
    assert call("demo", "--output", tmp_path / "demo") == 0
    out = capsys.readouterr().out
    assert "higher than either session" in out
    assert float(re.search(r"r = (\d\.\d+)", out)[1]) > 0.6
    assert (tmp_path / "demo" / "maps" / "contrast-DSt_minus_SSt_stat-z_statmap.nii.gz").is_file()
    command = re.search(r"^  .*(chunkglm run .*)$", out, flags=re.MULTILINE)[1]
    assert "--contrast 'DSt_minus_SSt=[-1,-1,1,1]'" in command


VERBS = [
    "convert",
    "info",
    "check",
    "run",
    "verify",
    "fit",
    "contrast",
    "combine",
    "export",
    "plot",
    "report",
    "demo",
]
"""In an order in which each finds what its example names."""


def example(verb, capsys):
    """The example of a verb, from its help, as arguments."""
    assert call(verb, "--help") == 0
    text = capsys.readouterr().out
    assert "\\b" not in text
    words = shlex.split(
        re.search(r"Example: (chunkglm .*?)\n\n", text, flags=re.DOTALL)[1].replace("\\\n", "")
    )
    assert words[:2] == ["chunkglm", verb]
    return words[1:]


def with_names(data, folder):
    """The sessions as the help and the README call them: run1.nii.gz, ..., with regressors face and house."""
    for n in (1, 2):
        shutil.copy(data / f"run{n}.nii.gz", folder)
        design = cg.read_design(data / f"run{n}_design.npz").rename(columns={"DSt": "face", "SSt": "house"})
        for name in (f"run{n}_design.csv", f"design{n}.csv"):
            design.to_csv(folder / name, index=False)
    shutil.copy(data / "mask.nii.gz", folder)


def test_help__every_example_runs_as_it_stands(data, tmp_path, monkeypatch, capsys):
    assert sorted(VERBS) == sorted(cli.commands)
    with_names(data, tmp_path)
    monkeypatch.chdir(tmp_path)
    for verb in VERBS:
        assert call(*example(verb, capsys)) == 0, verb
        if verb == "convert":
            assert call("convert", "run2.nii.gz", "study.zarr/run-2", "--mask", "mask.nii.gz") == 0
    made = {path.name for path in tmp_path.iterdir()}
    assert made > {
        "study.zarr",
        "fit.zarr",
        "contrasts.zarr",
        "fixed.zarr",
        "maps",
        "results",
        "diff.png",
        "demo-results",
    }


def test_help__lists_the_verbs_in_whole_sentences(capsys):
    assert call("--help") == 0
    lines = capsys.readouterr().out.split("Commands:")[1].strip().splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["run", "check", "demo"]
    assert len(lines) == len(VERBS)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_no_verb__says_what_to_do_first(capsys):
    assert call() == 0
    out, err = capsys.readouterr()
    assert "chunkglm demo" in out
    assert "chunkglm run run1.nii.gz" in out
    assert err == ""


@pytest.mark.parametrize("before", [True, False])
def test_quiet__before_and_behind_the_verb(before, data, tmp_path, capsys):
    words = ["convert", data / "run1.nii.gz", tmp_path / "run.zarr"]
    words.insert(0 if before else 1, "-q")
    assert call(*words) == 0
    assert capsys.readouterr().err == ""
    assert call("verify", tmp_path / "run.zarr", "-q") == 0
    assert call("convert", data / "run2.nii.gz", tmp_path / "run-2.zarr") == 0
    assert "72 of 72 volumes" in capsys.readouterr().err, "quiet is for one command"


def test_run__json_is_all_that_goes_to_standard_output(data, tmp_path, capsys):
    words = [*job(data, "diff=[-1,-1,1,1]"), "--output", tmp_path / "results", "--json"]
    for again in (False, True):
        assert call(*words) == 0
        out, err = capsys.readouterr()
        told = json.loads(out)
        assert told["up_to_date"] is again
        assert told["report"] == str(tmp_path / "results" / "report.html")
        assert [(peak["run"], peak["contrast"]) for peak in told["peaks"]] == [
            (n, "diff") for n in (None, "1", "2")
        ]
        assert all((tmp_path / "results" / name).is_file() for name in told["outputs"])
        assert all(Path(name).is_file() for name in told["pictures"])
        assert "\x1b" not in err, "no terminal, no colours"


def test_run__tells_the_peaks_of_its_maps(finished, capsys, data):
    assert call(*job(data), "--output", finished, "--json") == 0
    for entry in json.loads(capsys.readouterr().out)["peaks"]:
        prefix = "" if entry["run"] is None else f"run-{entry['run']}_"
        image = nib.load(finished / "maps" / f"{prefix}contrast-diff_stat-z_statmap.nii.gz")
        z = image.get_fdata()
        for end, place in (("highest", z.argmax()), ("lowest", z.argmin())):
            index = np.unravel_index(place, z.shape)
            assert entry[end]["z"] == z[index]
            np.testing.assert_allclose(
                entry[end]["mm"], nib.affines.apply_affine(image.affine, index), atol=1e-3
            )


def test_module_and_script__are_the_command_line():
    for command in ([sys.executable, "-m", "chunkglm"], [str(Path(sys.executable).with_name("chunkglm"))]):
        if not Path(command[0]).exists():
            pytest.skip("the chunkglm script is not installed beside this Python")
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"chunkglm, version {cg.__version__}"


# ----------------------------------------------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["nonsense"], ["run", "a.nii", "--output", "x"], ["fit", "x", "--n-threads", "0"], ["run", "--no-such-option"],
     ["run", "a.nii", "--design", "d", "--contrast", "c", "--output", "x", "--compat", "spm"]],
)  # fmt: skip
def test_usage__is_status_two(arguments, capsys):
    fails(capsys, *arguments, status=2)


@pytest.mark.parametrize("verb", ["fit", "contrast", "combine", "export", "info", "verify"])
def test_verbs__missing_store_is_one_paragraph(verb, tmp_path, capsys):
    more = {
        "fit": ["--design", tmp_path / "none.csv", "--output", tmp_path / "o"],
        "contrast": ["--contrast", "a", "--output", tmp_path / "o"],
        "combine": ["--output", tmp_path / "o"],
        "export": ["--output", tmp_path / "o"],
    }.get(verb, [])
    assert "none" in fails(capsys, verb, tmp_path / "none.zarr", *more)


@pytest.mark.parametrize("content", ["{}", "[]", '{"key": null}'])
def test_run__a_record_that_says_nothing_is_no_licence(content, data, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "provenance.json").write_text(content)
    message = fails(capsys, *job(data), "--output", tmp_path / "results")
    assert "another job" in message
    assert (tmp_path / "results" / "provenance.json").read_text() == content


def test_convert__refuses_what_exists(data, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("precious")
    for more in ([], ["--overwrite"]):
        message = fails(capsys, "convert", data / "run1.nii.gz", tmp_path / "there", *more)
        assert "there" in message
    assert (tmp_path / "there" / "file").read_text() == "precious"


def test_verbose__gives_the_traceback(tmp_path):
    with pytest.raises(cg.errors.SourceNotFoundError):
        main(["-v", "info", str(tmp_path / "none.zarr")])


# ---------------------------------------------------------------------------------------------------------------- README


def readme_command(name):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {name} -->\n```bash\n(.*?)\n```", text, flags=re.DOTALL)[1]


def test_readme__has_two_commands_of_one_line_from_a_bare_python():
    for name in ("demo", "tests"):
        command = readme_command(name)
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
        assert "\n" not in command


def test_readme__runs_as_it_stands_from_top_to_bottom(data, tmp_path, monkeypatch):
    """All its commands and all its Python, in one folder."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with_names(data, tmp_path)
    kinds, again = [], None
    for kind, code in re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        if kind == "python":
            names = {"__name__": "__main__"}
            exec(compile(code, "README.md", "exec"), names)
            again = names if "z-again" in code else again
        elif not code.startswith("python3 -m venv"):
            for line in code.replace("\\\n", " ").splitlines():
                assert call(*shlex.split(line)[1:]) == 0, line
        kinds.append(kind)
    assert kinds == ["bash"] * 7 + ["python"] * 5
    for name in ("results/report.html", "faces.png", "face-house.png"):
        assert Path(name).is_file()
    z = nib.load("z.nii.gz").get_fdata()
    np.testing.assert_array_equal(z, nib.load("z-again.nii.gz").get_fdata())
    inside = np.isfinite(z)
    in_maps = nib.load("results/maps/contrast-face_minus_house_stat-z_statmap.nii.gz").get_fdata()
    np.testing.assert_array_equal(z[inside], in_maps[inside])
    np.testing.assert_array_equal(z.T, again["combined"].z_score.values)


def test_readme__names_every_file_of_the_results(finished):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in finished.iterdir():
        assert path.name in text


def test_no_trace_is_left_by_failures(data, tmp_path, capsys):
    fails(capsys, "convert", data / "run1.nii.gz", tmp_path / "s.zarr", "--memory", "1MiB")
    assert list(tmp_path.iterdir()) == []
