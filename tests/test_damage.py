"""Stores are complete and whole, or say that they are not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

import chunkglm as cg
from chunkglm.errors import (
    DamagedStoreError,
    FormatVersionError,
    IncompleteStoreError,
    InputError,
    NiftiError,
    SourceNotFoundError,
    StoreError,
    StoreExistsError,
)
from chunkglm.testing import write_simulated_run

OPTIONS = {"shape": (20, 22, 18), "n_volumes": 70}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "run.nii.gz"
    write_simulated_run(path, **OPTIONS)
    return path


@pytest.fixture(scope="module")
def pristine(source, tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "run-1"
    cg.convert(source, store)
    return store


@pytest.fixture
def run(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "run-1")


def chunks(run):
    return sorted(path for path in (run / "bold" / "c").rglob("*") if path.is_file())


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path, _: path.unlink(),
    "empty": lambda path, _: path.write_bytes(b""),
    "truncated": lambda path, _: path.write_bytes(path.read_bytes()[:-100]),
    "flipped at the start": lambda path, _: flip(path, 0),
    "flipped in the middle": lambda path, _: flip(path, path.stat().st_size // 2),
    "flipped in the checksum": lambda path, _: flip(path, -1),
    "a sound chunk from elsewhere": lambda path, other: shutil.copy(other, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_chunk__is_named_by_verify_and_never_read(damage, run):
    cg.verify(run)
    # The second time block of the first slab: the other slab has no brain, and the fit does not read it.
    victim, other = chunks(run)[2], chunks(run)[0]
    key = victim.relative_to(run).as_posix()
    DAMAGES[damage](victim, other)
    with pytest.raises(DamagedStoreError, match=key):
        cg.verify(run)
    ds = cg.open_run(run)
    with pytest.raises(DamagedStoreError, match=key):
        ds.bold.values  # noqa: B018  (reading is what must fail)
    with pytest.raises(DamagedStoreError, match=key):
        cg.fit(ds, np.ones((OPTIONS["n_volumes"], 1)), noise_model="ols").sigma2.compute()


@pytest.mark.parametrize(
    "file", ["bold/zarr.json", "mask/zarr.json", "manifest/zarr.json", "manifest/c/0", "zarr.json"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "edited"])
def test_damaged_metadata__is_found(file, damage, run):
    path = run / file
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        flip(path, path.stat().st_size // 2)
    with pytest.raises((DamagedStoreError, IncompleteStoreError, FormatVersionError)) as caught:
        cg.verify(run)
    assert str(run) in str(caught.value)


def test_edited_attribute__is_found(run):
    root = json.loads((run / "zarr.json").read_text())
    root["attributes"]["repetition_time"] = 1.0
    (run / "zarr.json").write_text(json.dumps(root))
    for read in (cg.verify, cg.open_run):
        with pytest.raises(DamagedStoreError):
            read(run)


def test_foreign_file__is_named(run):
    (run / "bold" / "c" / "9").mkdir()
    (run / "bold" / "c" / "9" / "0").write_bytes(b"foreign")
    with pytest.raises(DamagedStoreError, match="bold/c/9/0"):
        cg.verify(run)


def test_verify__names_every_damage_at_once(run):
    first, last = chunks(run)[0], chunks(run)[-1]
    first.unlink()
    flip(last, 3)
    with pytest.raises(DamagedStoreError) as caught:
        cg.verify(run)
    for path in (first, last):
        assert path.relative_to(run).as_posix() in str(caught.value)


def test_verify__of_a_saved_fit_and_of_a_study(pristine, tmp_path):
    study = tmp_path / "study.zarr"
    study.mkdir()
    shutil.copytree(pristine, study / "run-1")
    fit = cg.fit(cg.open_run(pristine), np.ones((OPTIONS["n_volumes"], 1)), noise_model="ols")
    cg.save(fit, tmp_path / "fit.zarr")
    cg.verify(tmp_path / "fit.zarr")
    victim = next(path for path in (tmp_path / "fit.zarr" / "beta" / "c").rglob("*") if path.is_file())
    flip(victim, 10)
    with pytest.raises(DamagedStoreError, match="beta/c"):
        cg.verify(tmp_path / "fit.zarr")


# ------------------------------------------------------------------------------------------------------------ incomplete


def test_interrupted_conversion__is_no_store(source, tmp_path):
    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cg.convert(source, tmp_path / "study.zarr" / "run-1", progress=stop)
    assert not (tmp_path / "study.zarr" / "run-1").exists()
    with pytest.raises((SourceNotFoundError, IncompleteStoreError)):
        cg.open_run(tmp_path / "study.zarr" / "run-1")


def test_truncated_source__leaves_nothing(source, tmp_path):
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(source.read_bytes()[:-2000])
    with pytest.raises(NiftiError, match=r"cut\.nii\.gz"):
        cg.convert(cut, tmp_path / "run-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.nii.gz"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_conversion__says_so_and_can_be_done_again(source, tmp_path):
    place = tmp_path / "run-1"
    code = (
        "import sys, time, chunkglm as cg\n"
        "def hold(done, total):\n"
        "    print('here', flush=True); time.sleep(60)\n"
        f"cg.convert({str(source)!r}, {str(place)!r}, progress=hold)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ})
    assert process.stdout.readline().strip() == b"here"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not place.exists()
    assert (tmp_path / "run-1.partial").is_dir()
    assert not (tmp_path / "run-1.partial" / "zarr.json").exists()
    with pytest.raises(IncompleteStoreError, match="never finished"):
        cg.open_run(place)
    with pytest.raises(FileNotFoundError):
        xr.open_zarr(tmp_path / "run-1.partial", consolidated=False)
    cg.convert(source, place)
    cg.verify(place)
    assert [path.name for path in tmp_path.iterdir()] == ["run-1"]


def test_store_without_its_root__is_incomplete(run):
    (run / "zarr.json").unlink()
    with pytest.raises(IncompleteStoreError, match="overwrite"):
        cg.open_run(run)


def test_overwrite__replaces_only_when_complete(source, run, tmp_path):
    before = (run / "zarr.json").read_bytes()
    with pytest.raises(StoreExistsError, match="overwrite"):
        cg.convert(source, run, smoothing_fwhm=5)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cg.convert(source, run, smoothing_fwhm=4, overwrite=True, progress=stop)
    assert (run / "zarr.json").read_bytes() == before
    cg.verify(run)
    cg.convert(source, run, smoothing_fwhm=4, overwrite=True)
    assert cg.open_run(run).attrs["smoothing_fwhm"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["run-1"]


def test_template__of_a_run_of_many_gigabytes_can_be_created(source, tmp_path):
    # Metadata only: what is written of such a run before its first block.
    from chunkglm import nifti, plan, store

    module = sys.modules["chunkglm.convert"]
    with nifti.open_reader(source) as reader:
        header = replace(reader.header, shape=(91, 109, 91, 4000), dtype=np.dtype(np.float32))
        long = SimpleNamespace(header=header, shape=(4000, 91, 109, 91))
        chunks = plan.bold_chunks(long.shape, 4)
        template = store.savable(module._template(long, 2.0, 5.0, chunks, masked=False))
        shapes = {"bold": tuple(chunks), "mask": long.shape[1:], "mean_image": long.shape[1:]}
        with suppress(KeyboardInterrupt), store.writing(tmp_path / "run-1", {}, overwrite=False) as writer:
            writer.create(template, shapes)
            assert writer.array("bold").chunks == tuple(chunks)
            with pytest.raises(StoreError, match="was not finished"):
                writer.finish({})
            raise KeyboardInterrupt


# ----------------------------------------------------------------------------------------------------------- other stores


def test_other_places__are_refused_in_words(run, tmp_path):
    xr.Dataset({"a": ("x", [1.0])}).to_zarr(tmp_path / "plain.zarr", consolidated=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for name, kind in (
        ("plain.zarr", IncompleteStoreError), ("folder", (IncompleteStoreError, SourceNotFoundError)),
        ("file", Exception), ("none", SourceNotFoundError),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            cg.open_run(tmp_path / name)
        assert isinstance(caught.value, cg.errors.ChunkGLMError)
        assert name in str(caught.value)


def test_save__keeps_slices_and_refuses_changed_values_in_the_old_packing(tmp_path):
    import nibabel as nib

    data = np.arange(6 * 5 * 4 * 40, dtype=np.int16).reshape(6, 5, 4, 40)
    image = nib.Nifti1Image(data, np.diag([-3.0, 3, 3.5, 1]))
    image.header.set_zooms((3, 3, 3.5, 2.0))
    image.to_filename(tmp_path / "plain.nii")
    raw = bytearray((tmp_path / "plain.nii").read_bytes())
    raw[112:120] = np.array([0.5, 7.0], dtype="<f4").tobytes()
    (tmp_path / "scaled.nii").write_bytes(raw)
    ds = cg.convert(
        tmp_path / "scaled.nii",
        tmp_path / "run",
        mask=nib.Nifti1Image(np.ones((6, 5, 4), np.uint8), image.affine),
    )
    np.testing.assert_array_equal(ds.bold.values.T, data * 0.5 + 7)
    part = ds.isel(time=slice(3, 30, 2), x=slice(None, None, -1), z=slice(1, 3))
    again = cg.save(part, tmp_path / "part")
    xr.testing.assert_identical(again.bold.load(), part.bold.load())
    cg.verify(tmp_path / "part")
    assert xr.open_zarr(tmp_path / "part", consolidated=False).bold.dtype == np.float64
    back = cg.to_nifti(again.bold)
    assert back.get_data_dtype() == np.int16
    np.testing.assert_allclose(back.affine @ [0, 0, 0, 1], image.affine @ [5, 0, 1, 1])
    changed = ds.assign(bold=ds.bold.copy(data=ds.bold.data + 0.25))
    with pytest.raises(InputError, match="drop_encoding"):
        cg.save(changed, tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_store__at_a_url(source):
    url = f"memory://damage-{time.time_ns()}/run-1"
    ds = cg.convert(source, url)
    cg.verify(url)
    fit = cg.save(cg.fit(ds, np.ones((OPTIONS["n_volumes"], 1)), noise_model="ols"), f"{url}-fit")
    assert np.isfinite(fit.sigma2).any()
    with pytest.raises(StoreExistsError):
        cg.convert(source, url, smoothing_fwhm=5)
