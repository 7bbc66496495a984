"""Stores: complete or not there, every damage named, everything saved comes back."""

import contextlib
import gzip
import json
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time

import dask
import dask.array as da
import nibabel as nib
import numpy as np
import pytest
import xarray as xr
import zarr

from chunkglm import convert, grids, open_run, open_study, save, store, to_nifti, verify
from chunkglm.errors import (
    ChunkGLMError,
    DamagedStoreError,
    FormatVersionError,
    IncompleteStoreError,
    InputError,
    NiftiError,
    SourceNotFoundError,
    StoreError,
    StoreExistsError,
)
from chunkglm.nifti import NotLosslessError
from chunkglm.testing import raise_if_computes, write_simulated_run

SHAPE, N_TIME = (14, 16, 18), 40  # x, y, z


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def source(folder):
    """A run with two blocks of volumes and two slabs of slices, with a scale slope."""
    write_simulated_run(folder / "plain.nii", shape=SHAPE, n_volumes=N_TIME)
    content = bytearray((folder / "plain.nii").read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]))
    header["scl_slope"], header["scl_inter"] = 0.25, -3
    content[:348] = header.binaryblock
    (folder / "run.nii").write_bytes(content)
    return folder / "run.nii"


@pytest.fixture(scope="module")
def whole(folder, source):
    """A whole run store; not to be changed."""
    convert(source, folder / "run.zarr")
    return folder / "run.zarr"


@pytest.fixture
def run(whole):
    return open_run(whole)


@pytest.fixture
def copy(whole, tmp_path):
    """A whole run store, to be changed."""
    shutil.copytree(whole, tmp_path / "copy.zarr")
    return tmp_path / "copy.zarr"


def files(place):
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())


def left_in(place):
    return sorted(path.name for path in place.iterdir())


# ------------------------------------------------------------------------------- complete, or not there at all


class StopError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("kind", [StopError, KeyboardInterrupt])
def test_a_conversion_that_is_cut_off_is_no_store(source, whole, tmp_path, after, kind):
    """After an interrupt it goes on where it was; after an error of another kind nothing is left."""
    target = tmp_path / "study.zarr" / "run-1"
    calls = []

    def interrupt(done, total):
        calls.append(done)
        with pytest.raises(
            IncompleteStoreError, match=r"run-1 was never finished.*Run the same command again"
        ):
            open_run(target)
        for place in (target, target.with_name("run-1.partial")):
            with pytest.raises(FileNotFoundError):
                xr.open_zarr(place, consolidated=False)
        if len(calls) == after:
            raise kind

    with pytest.raises(kind):
        convert(source, target, progress=interrupt)
    if kind is StopError:
        assert left_in(tmp_path) == []
        with pytest.raises(SourceNotFoundError):
            open_run(target)
        return
    assert left_in(target.parent) == ["run-1.partial"]
    before = stamps(target.with_name("run-1.partial") / "store")
    assert any(name.startswith("bold/c/") for name in before)
    convert(source, target)
    assert left_in(target.parent) == ["run-1", "zarr.json"]
    assert contents(target) == contents(whole)
    # What was complete was not written again.
    after = stamps(target)
    assert {name: after[name] for name in before} == before


def stamps(place):
    return {name: (place / name).stat().st_mtime_ns for name in files(place)}


def contents(place):
    return {name: (place / name).read_bytes() for name in files(place)}


def test_a_failure_at_any_write_leaves_what_can_be_continued(source, whole, tmp_path, monkeypatch):
    original = zarr.storage.LocalStore.set
    n_writes = len(files(whole)) + 10  # some are written twice
    failed = 0
    for fatal in range(0, n_writes, 3):
        counter = iter(range(10**6))

        async def failing(self, key, value, counter=counter, fatal=fatal):
            if next(counter) == fatal:
                raise OSError(28, "No space left on device")
            await original(self, key, value)

        monkeypatch.setattr(zarr.storage.LocalStore, "set", failing)
        try:
            convert(source, tmp_path / "run.zarr")
        except StoreError as error:
            failed += 1
            assert "No space left" in str(error)
            left = left_in(tmp_path)
            assert left in ([], ["run.zarr.partial"])
            assert ("is kept in" in str(error)) == bool(left)
            monkeypatch.setattr(zarr.storage.LocalStore, "set", original)
            convert(source, tmp_path / "run.zarr")
            assert left_in(tmp_path) == ["run.zarr"]
            assert contents(tmp_path / "run.zarr") == contents(whole)
            shutil.rmtree(tmp_path / "run.zarr")
        else:
            break
    assert failed > 5


def test_a_truncated_source_leaves_nothing(source, tmp_path):
    content = gzip.compress(source.read_bytes())
    (tmp_path / "cut.nii.gz").write_bytes(content[: len(content) * 7 // 8])
    with pytest.raises(NiftiError, match=r"cut\.nii\.gz"):
        convert(tmp_path / "cut.nii.gz", tmp_path / "study.zarr" / "run-1")
    assert left_in(tmp_path) == ["cut.nii.gz"]


@pytest.mark.parametrize("where", ["local", "url"])
@pytest.mark.parametrize("how", ["convert", "save"])
def test_the_root_is_written_last(source, run, tmp_path, monkeypatch, where, how):
    written = []
    store_class = zarr.storage.LocalStore if where == "local" else zarr.storage.FsspecStore
    original = store_class.set

    async def recorded(self, key, value):
        written.append(key)
        await original(self, key, value)

    monkeypatch.setattr(store_class, "set", recorded)
    target = str(tmp_path / "run.zarr") if where == "local" else f"memory://last/{how}.zarr"
    if how == "convert":
        convert(source, target)
    else:
        save(run, target)
    assert written[-1] == "zarr.json"
    assert written.count("zarr.json") == 1
    assert written[-3:-1] == ["manifest/zarr.json", "manifest/c/0"]
    assert len(written) > 20


KILLED = """
import os, signal, sys
from chunkglm import convert
from chunkglm.store import site
def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "stream":
    convert(sys.argv[1], sys.argv[2], progress=kill)
else:
    site._move = kill
    convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("when", ["stream", "finished but not in place"])
def test_a_killed_conversion(source, tmp_path, when):
    target = tmp_path / "study.zarr" / "run-1"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, source, target, when], check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "run-1.partial" in left_in(target.parent)
    assert not target.exists()
    with pytest.raises(FileNotFoundError):
        xr.open_zarr(target, consolidated=False)
    with pytest.raises(IncompleteStoreError, match=r"run-1\.partial\. Run the same command again"):
        open_run(target)
    with pytest.raises(SourceNotFoundError, match="holds no run stores"):
        open_study(target.parent)
    convert(source, target)
    verify(target.parent)
    assert left_in(target.parent) == ["run-1", "zarr.json"]


def test_a_folder_in_the_way_of_the_unfinished_store_is_spared(source, tmp_path):
    mine = tmp_path / "run.zarr.partial"
    (mine / "important").mkdir(parents=True)
    (mine / "important" / "notes.txt").write_text("keep me")
    with pytest.raises(StoreExistsError, match=r"run\.zarr\.partial is in the way"):
        convert(source, tmp_path / "run.zarr")
    shutil.rmtree(mine)
    mine.write_text("a file")
    with pytest.raises(StoreExistsError, match="in the way"):
        convert(source, tmp_path / "run.zarr")
    assert mine.read_text() == "a file"


# -------------------------------------------------------------------------------------------------- overwriting


def test_what_exists_is_refused(source, copy, run):
    before = {name: (copy / name).read_bytes() for name in files(copy)}
    other = run.isel(time=slice(20))
    for action in (
        lambda: convert(source, copy, smoothing_fwhm=5),
        lambda: save(other, copy),
        lambda: save(other, f"{copy}/"),
    ):
        with pytest.raises(StoreExistsError, match=r"copy\.zarr exists.*--overwrite"):
            action()
    assert {name: (copy / name).read_bytes() for name in files(copy)} == before


def test_what_exists_is_replaced_only_when_the_new_store_is_complete(source, run, copy):
    def stop(done, total):
        verify(copy)  # still there, and whole
        raise StopError

    for action in (
        lambda: convert(source, copy, overwrite=True, progress=stop),
        lambda: save(run, copy, overwrite=True, progress=stop),
    ):
        with pytest.raises(StopError):
            action()
        verify(copy)
        assert left_in(copy.parent) == ["copy.zarr"]
    convert(source, copy, overwrite=True, smoothing_fwhm=4)
    assert open_run(copy).attrs["smoothing_fwhm"] == 4
    assert left_in(copy.parent) == ["copy.zarr"]


def test_a_dataset_can_replace_the_store_that_it_is_read_from(copy, run):
    save(open_run(copy).isel(time=slice(3, 30)), copy, overwrite=True)
    verify(copy)
    xr.testing.assert_equal(open_run(copy).load(), run.isel(time=slice(3, 30)).load())


def test_a_failed_rename_puts_the_old_store_back(source, copy, monkeypatch):
    original = type(copy).rename

    def fail(self, target):
        if self.name == "store":
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(type(copy), "rename", fail)
    with pytest.raises(StoreError, match="was not written"):
        convert(source, copy, overwrite=True)
    verify(copy)
    assert left_in(copy.parent) == ["copy.zarr", "copy.zarr.partial"]
    monkeypatch.setattr(type(copy), "rename", original)
    convert(source, copy, overwrite=True)
    verify(copy)
    assert left_in(copy.parent) == ["copy.zarr"]


def test_only_stores_are_replaced(source, run, tmp_path):
    (tmp_path / "folder" / "work").mkdir(parents=True)
    (tmp_path / "folder" / "work" / "notes.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    convert(source, tmp_path / "study.zarr" / "run-1")
    for place, message in (
        ("folder", "not a Zarr store"),
        ("file", "not a Zarr store"),
        ("study.zarr", "study with stores of its own"),
    ):
        for action in (convert, save):
            with pytest.raises(StoreExistsError, match=message):
                action(source if action is convert else run, tmp_path / place, overwrite=True)
    with pytest.raises(StoreExistsError, match="inside another store"):
        convert(source, tmp_path / "study.zarr" / "run-1" / "run-2")
    verify(tmp_path / "study.zarr")
    assert (tmp_path / "folder" / "work" / "notes.txt").read_text() == "keep me"
    # Empty folders, other Zarr stores and stores that lost their root are.
    (tmp_path / "empty").mkdir()
    run[["mask"]].drop_vars("grid").to_zarr(tmp_path / "other", consolidated=False)
    shutil.copytree(tmp_path / "study.zarr" / "run-1", tmp_path / "rootless")
    (tmp_path / "rootless" / "zarr.json").unlink()
    for place in ("empty", "other", "rootless"):
        convert(source, tmp_path / place, overwrite=True)
        verify(tmp_path / place)


def test_a_link_is_followed(source, copy):
    link = copy.with_name("link.zarr")
    link.symlink_to(copy)
    convert(source, link, overwrite=True, smoothing_fwhm=4)
    assert link.is_symlink()
    assert open_run(copy).attrs["smoothing_fwhm"] == 4


# -------------------------------------------------------------------------------------------------------- damage


@contextlib.contextmanager
def damaged(path, content):
    """The file with other content, or without it."""
    before = path.read_bytes() if path.exists() else None
    if content is None:
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    try:
        yield
    finally:
        if before is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(before)


def flipped(content, place, bit=0):
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def damages(content, other):
    """Content of a file that is not what it was: missing, cut off, altered, from elsewhere."""
    yield "missing", None
    yield "empty", b""
    yield "cut", content[:-1]
    yield "half", content[: len(content) // 2]
    yield "longer", content + b"\0"
    for place in {0, 5, len(content) // 2, len(content) - 5, len(content) - 1}:
        yield f"bit {place}", flipped(content, place % len(content), place % 8)
    if other is not None and other != content:
        yield "foreign", other


@pytest.fixture(scope="module")
def other(folder):
    """Another whole store, of the same shape with other values."""
    write_simulated_run(folder / "other.nii", shape=SHAPE, n_volumes=N_TIME, seed=4)
    convert(folder / "other.nii", folder / "other.zarr")
    return folder / "other.zarr"


def test_verify_names_every_damage(copy, other):
    verify(copy)
    names = files(copy)
    assert {"bold/c/1/1/0/0", "mask/zarr.json", "x/c/0", "grid/c", "nifti/c/0"} <= set(names)
    n_cases = 0
    for name in names:
        if name == "zarr.json" or name.startswith("manifest/"):
            continue
        content, path = (copy / name).read_bytes(), copy / name
        foreign = (other / name).read_bytes() if (other / name).exists() else None
        for kind, changed in damages(content, foreign):
            n_cases += 1
            with damaged(path, changed), pytest.raises(DamagedStoreError) as caught:
                verify(copy)
            expected = "is missing" if kind == "missing" else "was altered or cut off"
            assert f"copy.zarr is damaged: {name} {expected}." in str(caught.value), (name, kind)
    assert n_cases > 200
    verify(copy)


def test_verify_names_all_damages_at_once(copy, other):
    (copy / "bold/c/0/0/0/0").unlink()
    (copy / "bold/c/1/0/0/0").write_bytes((other / "bold/c/1/0/0/0").read_bytes())
    (copy / "mask/c/0/0/0").write_bytes(b"")
    (copy / "bold/c/9").mkdir()
    (copy / "bold/c/9/0").write_bytes(b"new")
    (copy / "notes.txt").write_text("new")
    with pytest.raises(DamagedStoreError) as caught:
        verify(copy)
    for expected in (
        "bold/c/0/0/0/0 is missing",
        "bold/c/1/0/0/0 was altered",
        "mask/c/0/0/0 was altered",
        "bold/c/9/0 does not belong to it",
        "notes.txt does not belong to it",
    ):
        assert expected in str(caught.value)
    assert str(caught.value).count(";") == 5  # one behind "can be trusted"


def test_verify_sees_swapped_chunks(copy):
    first, second = copy / "bold/c/0/0/0/0", copy / "bold/c/1/0/0/0"
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(DamagedStoreError, match=r"bold/c/0/0/0/0 was altered.*bold/c/1/0/0/0 was altered"):
        verify(copy)


def test_verify_sees_every_damage_to_the_manifest(copy, other):
    for name in ("manifest/zarr.json", "manifest/c/0"):
        content = (copy / name).read_bytes()
        for _, changed in damages(content, (other / name).read_bytes()):
            for action in (verify, open_run):
                with damaged(copy / name, changed), pytest.raises(DamagedStoreError, match="manifest"):
                    action(copy)
    metadata = (copy / "manifest/zarr.json").read_bytes()
    for place in range(0, len(metadata), 7):
        with damaged(copy / "manifest/zarr.json", flipped(metadata, place)), pytest.raises(DamagedStoreError):
            verify(copy)
    with (
        damaged(copy / "manifest" / "c" / "1", b"new"),
        pytest.raises(DamagedStoreError, match="manifest/c/1 does not"),
    ):
        verify(copy)


def test_verify_sees_every_damage_to_the_root(copy, other):
    content = (copy / "zarr.json").read_bytes()
    for changed in (b"", content[:-2], content[: len(content) // 2], (other / "zarr.json").read_bytes()):
        with damaged(copy / "zarr.json", changed), pytest.raises(DamagedStoreError, match=r"zarr\.json"):
            verify(copy)
    for place in range(0, len(content), 5):
        with damaged(copy / "zarr.json", flipped(content, place)), pytest.raises(StoreError) as caught:
            verify(copy)
        # What the version says cannot be held against anything.
        assert isinstance(caught.value, (DamagedStoreError, FormatVersionError))
    with (
        damaged(copy / "zarr.json", None),
        pytest.raises(IncompleteStoreError, match=r"no zarr\.json.*overwrite"),
    ):
        verify(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: root["attributes"].update(source_name="other.nii"),
        lambda root: root["attributes"].pop("mask_source"),
        lambda root: root["attributes"].update(new=1),
        lambda root: root["attributes"].update(repetition_time=2),
        lambda root: root["attributes"].update(chunkglm_seal={}),
        lambda root: root["attributes"].pop("chunkglm_seal"),
        lambda root: root["attributes"]["ome"]["multiscales"].clear(),
        lambda root: root.update(consolidated_metadata=None),
    ],
)
def test_changed_attributes_are_damage(copy, change):
    root = json.loads((copy / "zarr.json").read_text())
    change(root)
    (copy / "zarr.json").write_text(json.dumps(root))
    for action in (verify, open_run):
        with pytest.raises(DamagedStoreError, match=r"zarr\.json"):
            action(copy)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"1", b"null", b'"text"', b'{"attributes": 1}', b'{"attributes": null}', b"{}", b"\xff\xfe"],
)
def test_a_root_that_is_no_root(copy, content):
    (copy / "zarr.json").write_bytes(content)
    for action in (verify, open_run):
        with pytest.raises(StoreError, match=r"copy\.zarr"):
            action(copy)
    assert store.is_study(copy) is False


PIPELINES = ["zarr.core.codec_pipeline.BatchedCodecPipeline"]
if hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
    PIPELINES.append("zarr.core.codec_pipeline.FusedCodecPipeline")


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_reading_a_damaged_chunk_names_it(copy, other, pipeline):
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        intact = open_run(copy)["bold"].values
        for key, region in (
            ("bold/c/0/0/0/0", {"time": slice(0, 1), "z": slice(0, 1)}),
            ("bold/c/1/1/0/0", {"time": slice(-1, None), "z": slice(-1, None)}),
        ):
            for _, changed in damages((copy / key).read_bytes(), (other / key).read_bytes()):
                run = open_run(copy)
                with damaged(copy / key, changed):
                    for ds in (run, open_run(copy), pickle.loads(pickle.dumps(run))):
                        with pytest.raises(DamagedStoreError, match=key):
                            ds["bold"].isel(region).compute()
                    # What is not damaged can be read.
                    np.testing.assert_array_equal(run["bold"][0, 17].values, intact[0, 17])
        for name, key in (("mask", "mask/c/0/0/0"), ("mean_image", "mean_image/c/0/0/0")):
            with damaged(copy / key, None), pytest.raises(DamagedStoreError, match=f"{key} is missing"):
                open_run(copy)[name].compute()
        for key in ("x/c/0", "time/c/0"):
            with damaged(copy / key, None), pytest.raises(DamagedStoreError, match=f"{key} is missing"):
                open_run(copy)


def test_damaged_metadata_of_an_array_is_named_and_not_used(copy, other, run):
    """A store is opened by its root, which holds all metadata once more under the seal."""
    expected = run.load()
    for name in [
        name for name in files(copy) if name.endswith("/zarr.json") and not name.startswith("manifest")
    ]:
        for _, changed in damages((copy / name).read_bytes(), (other / name).read_bytes()):
            with damaged(copy / name, changed):
                with pytest.raises(DamagedStoreError, match=name):
                    verify(copy)
                xr.testing.assert_identical(open_run(copy).load(), expected)
    shutil.rmtree(copy / "mask")
    with pytest.raises(DamagedStoreError, match=r"mask/zarr\.json is missing"):
        verify(copy)
    with pytest.raises(DamagedStoreError, match=r"mask/c/0/0/0 is missing"):
        open_run(copy)["mask"].load()


def test_damage_in_a_study(source, tmp_path):
    for label in ("run-1", "run-2", "run-10"):
        convert(source, tmp_path / "study.zarr" / label)
    (tmp_path / "study.zarr/run-2/bold/c/0/0/0/0").unlink()
    (tmp_path / "study.zarr/run-10/x/c/0").write_bytes(b"")
    with pytest.raises(
        DamagedStoreError, match=r"(?s)run-2 is damaged: bold/c/0/0/0/0 is missing.*run-10 is damaged: x/c/0"
    ):
        verify(tmp_path / "study.zarr")


# ------------------------------------------------------------------------------------------------------ opening


def test_opening_other_things(source, run, whole, tmp_path):
    cases = [
        ("nothing", SourceNotFoundError, "no store .*nothing"),
        ("file", StoreError, "file is a file"),
        ("folder", IncompleteStoreError, "folder is not a store"),
        ("empty", IncompleteStoreError, "empty is not a store"),
        ("plain.zarr", IncompleteStoreError, "not written by chunkglm.*open_zarr"),
        ("study.zarr", StoreError, "study with several runs.*open_study"),
        ("array.zarr", IncompleteStoreError, "Zarr array that was not written"),
        ("rootless.zarr", IncompleteStoreError, "incomplete: it has no zarr.json.*overwrite"),
        (
            "newer.zarr",
            FormatVersionError,
            "newer.zarr has format version 2, and this chunkglm reads version 1",
        ),
        ("map.zarr", InputError, "map.zarr, opened as a run, needs a variable 'bold'"),
    ]
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    run[["mask"]].to_zarr(tmp_path / "plain.zarr", consolidated=False)
    convert(source, tmp_path / "study.zarr" / "run-1")
    zarr.create_array(tmp_path / "array.zarr", shape=(3,), dtype="int16")
    shutil.copytree(whole, tmp_path / "rootless.zarr")
    (tmp_path / "rootless.zarr" / "zarr.json").unlink()
    shutil.copytree(whole, tmp_path / "newer.zarr")
    root = json.loads((whole / "zarr.json").read_text())
    root["attributes"]["format_version"] = "2"
    (tmp_path / "newer.zarr" / "zarr.json").write_text(json.dumps(root))
    save(run["mean_image"].to_dataset(), tmp_path / "map.zarr")
    for name, error, message in cases:
        for place in (tmp_path / name, f"{tmp_path / name}/", f"file://{tmp_path / name}"):
            with pytest.raises(error, match=message) as caught:
                open_run(place)
            assert isinstance(caught.value, ChunkGLMError)


def test_study(source, tmp_path):
    study = tmp_path / "study.zarr"
    labels = ["run-10", "run-2", "run-1", "run-rest"]
    for label in labels:
        convert(source, study / label)
    (study / "notes").mkdir()
    (study / "run-3.partial").mkdir()
    tree = open_study(study)
    assert list(tree.children) == ["run-1", "run-2", "run-10", "run-rest"]
    xr.testing.assert_identical(tree["run-2"].to_dataset(), open_run(study / "run-2"))
    assert store.is_study(study)
    assert not store.is_study(study / "run-1")
    assert not store.is_study(tmp_path / "nothing")
    verify(study)
    for place, message in (
        (tmp_path / "nothing", "no study"),
        (tmp_path, "holds no run stores"),
        (study / "run-1", "holds no run"),
    ):
        with pytest.raises(SourceNotFoundError, match=message):
            open_study(place)


def test_plain_xarray_opens_everything(source, run, tmp_path):
    # Warnings are errors in these tests.
    study = tmp_path / "study.zarr"
    for label in ("run-1", "run-2"):
        convert(source, study / label)
    plain = xr.open_zarr(study / "run-1")
    for name in run.variables:
        xr.testing.assert_equal(plain[name].load(), run[name].load())
    tree = xr.open_datatree(study, engine="zarr", consolidated=False)
    assert set(tree.children) == {"run-1", "run-2"}
    xr.testing.assert_equal(tree["run-2"]["bold"].load(), run["bold"].load())
    assert tree.attrs["chunkglm_study"]
    save(run, tmp_path / "saved.zarr")
    assert xr.open_zarr(tmp_path / "saved.zarr", consolidated=False)["bold"].dtype == np.float64


def test_opening_is_lazy_and_deterministic(whole):
    with raise_if_computes():
        first, second = open_run(whole), open_run(whole)
    assert first["bold"].data.name == second["bold"].data.name
    assert first["bold"].chunks == ((32, 8), (16, 2), (16,), (14,))
    for variable in first.variables.values():
        assert not {"chunks", "preferred_chunks", "shards"} & set(variable.encoding)
    assert "chunkglm_seal" not in first.attrs
    assert "ome" not in first.attrs
    assert first["mask"].sum().compute() == second["mask"].values.sum()


# ------------------------------------------------------------------------------------------------------- saving


def same(saved, ds, place):
    """What was saved is what is opened: by chunkglm and by plain xarray, and it is whole."""
    xr.testing.assert_identical(saved.drop_attrs(deep=False).load(), ds.drop_attrs(deep=False).load())
    verify(place)
    for name, value in ds.attrs.items():
        assert saved.attrs[name] == value
    plain = xr.open_zarr(place, consolidated=False)
    for name in ds.variables:
        xr.testing.assert_equal(plain[name].load(), ds[name].load())


SLICES = {
    "all": {},
    "time": {"time": slice(5, 37)},
    "uneven": {"time": slice(3, None), "z": slice(1, None)},
    "strided": {"time": slice(None, None, 3), "x": slice(1, None, 2)},
    "reversed": {"time": slice(None, None, -1), "z": slice(None, None, -2)},
    "one slice": {"z": 5},
    "one volume": {"time": 7},
    "one voxel": {"x": 3, "y": 4, "z": 5},
    "list": {"time": [1, 5, 6, 39]},
}


@pytest.mark.parametrize("name", SLICES)
def test_slices_of_a_run_are_saved(run, tmp_path, name):
    part = run.isel(SLICES[name])
    saved = save(part, tmp_path / "part.zarr")
    same(saved, part, tmp_path / "part.zarr")
    raw = zarr.open_array(tmp_path / "part.zarr", path="bold", mode="r")
    assert raw.dtype == np.int16
    if "bold" in saved and saved["bold"].ndim == 4 and name != "list":
        # It is still on its grid, and can be cut and saved again.
        np.testing.assert_allclose(grids.slice_affine(saved), grids.slice_affine(part))
        again = saved.isel(time=slice(1, -1), y=slice(None, None, -1))
        same(save(again, tmp_path / "again.zarr"), again, tmp_path / "again.zarr")
        np.testing.assert_array_equal(to_nifti(saved["bold"]).get_fdata(), to_nifti(part["bold"]).get_fdata())


def test_a_slice_keeps_bits_of_the_whole(run, whole, tmp_path):
    saved = save(run, tmp_path / "all.zarr")
    for key in files(whole):
        if "/c" in key and not key.startswith("manifest"):
            assert (tmp_path / "all.zarr" / key).read_bytes() == (whole / key).read_bytes(), key
    assert saved.attrs["source_sha256"] == run.attrs["source_sha256"]


# xarray says that it rounds: that the values are those of integers is not known to it.
@pytest.mark.filterwarnings("ignore:saving variable:xarray.coding.common.SerializationWarning")
@pytest.mark.parametrize("name", ["all", "time", "one slice", "strided", "one voxel"])
def test_plain_to_zarr_works_on_slices(run, tmp_path, name):
    # xarray asks for even chunks, however they came about; within a chunk and at its borders any slice has them.
    part = run.isel(SLICES[name]).chunk()
    part.to_zarr(tmp_path / "plain.zarr", consolidated=False)
    plain = xr.open_zarr(tmp_path / "plain.zarr", consolidated=False)
    xr.testing.assert_equal(plain.load(), part.load())
    aligned = run.isel(time=slice(0, 32), z=slice(16, None), x=slice(2, 9))
    aligned.to_zarr(tmp_path / "aligned.zarr", consolidated=False)
    xr.testing.assert_equal(
        xr.open_zarr(tmp_path / "aligned.zarr", consolidated=False).load(), aligned.load()
    )


def test_a_saved_slice_exports_like_the_slice(run, tmp_path):
    part = run["bold"].isel(time=slice(2, 20), x=slice(None, None, -1), z=slice(3, 11, 2))
    saved = save(part.to_dataset(), tmp_path / "part.zarr")
    to_nifti(part, tmp_path / "a.nii")
    to_nifti(saved["bold"], tmp_path / "b.nii")
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()
    # So does the header that viewers read.
    header = xr.open_zarr(tmp_path / "part.zarr", consolidated=False)["nifti"].values.tobytes()
    assert (tmp_path / "a.nii").read_bytes()[: len(header)] == header


def test_uneven_chunks_and_strings(tmp_path):
    labels = ["a", "", "ein Wort", "日本", "x" * 400]
    ds = xr.Dataset(
        {
            "effect": (
                ("run", "x"),
                da.random.default_rng(0).normal(size=(5, 10), chunks=((1, 3, 1), (2, 5, 3))),
            ),
            "lazy": ("run", da.from_array(np.array(labels), chunks=2)),
            "text": (("run", "part"), np.array([[label, label * 2] for label in labels], dtype=object)),
            "flag": ("run", np.array([True, False, True, True, False])),
            "when": (
                "run",
                np.array(["2020-01-01", "2021-01-01"] * 2 + ["2022-02-02"], dtype="datetime64[ns]"),
            ),
            "empty": ("nothing", np.empty(0)),
            "whole": ((), 3),
        },
        coords={"run": np.array(labels), "one": "only", "fixed": ("run", np.array(labels, dtype="U"))},
    )
    ds = ds.compute().assign(effect=ds["effect"])
    saved = save(ds, tmp_path / "a.zarr")
    verify(tmp_path / "a.zarr")
    for name in ds.variables:
        assert saved[name].values.tolist() == ds[name].values.tolist(), name
        assert saved[name].dims == ds[name].dims
    assert bool(saved.sel(run="日本")["flag"])
    assert xr.open_zarr(tmp_path / "a.zarr", consolidated=False)["run"].values.tolist() == labels
    metadata = json.loads((tmp_path / "a.zarr" / "run" / "zarr.json").read_text())
    assert metadata["data_type"] == "string"
    # What was opened can be saved again, as often as one likes.
    again = save(saved.isel(run=slice(1, 4)), tmp_path / "b.zarr")
    assert again["text"].values.tolist() == ds["text"].values[1:4].tolist()


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int64", "uint64", "float32", "float64"])
def test_values_are_kept_to_the_bit(tmp_path, dtype):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (37, 11, np.dtype(dtype).itemsize), dtype=np.uint8)
    values = bits.reshape(37, -1).view(dtype) if dtype != "bool" else bits[..., 0] > 127
    ds = xr.Dataset({"a": (("i", "j"), values), "b": (("i", "j"), da.from_array(values, chunks=(10, 4)))})
    saved = save(ds, tmp_path / "a.zarr")
    for name in "ab":
        assert saved[name].dtype == dtype
        assert saved[name].values.tobytes() == values.tobytes()


def test_arrays_in_memory_get_chunks_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(store.saving.plan, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(store.saving, "LARGEST_CHUNK", 9000)
    values = np.arange(30 * 40 * 7.0).reshape(30, 40, 7)
    ds = xr.Dataset(
        {"a": (("i", "j", "k"), values), "b": (("i", "j", "k"), da.from_array(values, chunks=(30, 40, 4)))}
    )
    saved = save(ds, tmp_path / "a.zarr")
    for name in "ab":
        chunks = zarr.open_array(tmp_path / "a.zarr", path=name, mode="r").chunks
        assert np.prod(chunks) * 8 <= 4000
        np.testing.assert_array_equal(saved[name].values, values)


def test_changed_values_with_a_stale_scale_are_refused(run, tmp_path):
    changed = run["bold"].copy(data=run["bold"].data * 1.001)
    eager = changed.compute()
    missing = run["bold"].copy(data=np.where(run["mask"].values, run["bold"].values, np.nan))
    too_large = run["bold"].copy(data=run["bold"].values * 1000)
    for stale in (changed, eager, missing, too_large):
        assert "scale_factor" in stale.encoding
        with pytest.raises(NotLosslessError, match="drop_encoding"):
            save(stale.to_dataset(), tmp_path / "a.zarr")
        assert left_in(tmp_path) == []
        fresh = stale.drop_encoding().to_dataset()
        saved = save(fresh, tmp_path / "a.zarr")
        np.testing.assert_array_equal(saved["bold"].values, stale.values)
        shutil.rmtree(tmp_path / "a.zarr")
    # What xarray computes has no scale any more, and needs no word.
    computed = (run["bold"] * 1.001).to_dataset()
    same(save(computed, tmp_path / "a.zarr"), computed, tmp_path / "a.zarr")


def test_stale_encodings_do_not_harm(tmp_path):
    values = np.linspace(0, 1, 50)
    ds = xr.Dataset({"a": ("x", values)})
    ds["a"].encoding = {
        "dtype": "int8",
        "chunks": (7,),
        "preferred_chunks": {"x": 7},
        "_FillValue": 3,
        "compressor": None,
        "zlib": True,
    }
    np.testing.assert_array_equal(save(ds, tmp_path / "a.zarr")["a"].values, values)


def test_attributes(tmp_path):
    attrs = {
        "text": "ä",
        "number": 1.5,
        "list": [1, "a", None],
        "nested": {"a": [1.0]},
        "array": np.arange(3),
        "flag": True,
    }
    ds = xr.Dataset({"a": ("x", np.arange(3), {"units": "mm"})}, attrs=attrs)
    saved = save(ds, tmp_path / "a.zarr")
    assert {**saved.attrs, "array": None} == {**saved.attrs, **attrs, "array": None}
    assert saved.attrs["array"] == [0, 1, 2]
    assert saved["a"].attrs["units"] == "mm"
    assert saved.attrs["format_version"] == "1"
    bare = save(xr.Dataset({"a": ("x", np.arange(3))}), tmp_path / "bare.zarr")
    assert set(bare.attrs) == {"format_version", "chunkglm_version", "package_versions"}
    save(xr.Dataset({"a": ("x", np.arange(3))}, attrs={"nan": float("nan")}), tmp_path / "nan.zarr")
    verify(tmp_path / "nan.zarr")
    assert ds.attrs.keys() == attrs.keys()  # the caller's dataset stays as it was


@pytest.mark.parametrize(
    "ds",
    [
        xr.Dataset({"a": ("x", np.array([1, "b", None], dtype=object))}),
        xr.Dataset({"a": ("x", np.arange(3))}, attrs={"function": print}),
        xr.Dataset({"a": (("x", "y"), np.ones((2, 3)))}).stack(z=("x", "y")),
        xr.Dataset({"manifest": ("x", np.arange(3))}),
        xr.Dataset({"nifti": ("x", np.arange(3))}),
    ],
)
def test_what_cannot_be_saved(tmp_path, ds):
    with pytest.raises(InputError, match=r"cannot be saved|Rename"):
        save(ds, tmp_path / "study.zarr" / "a.zarr")
    assert left_in(tmp_path) == []


def test_a_computation_that_fails_leaves_nothing(tmp_path):
    def fail(block):
        raise StopError

    lazy = da.ones((4, 4), chunks=2).map_blocks(fail, dtype=float, meta=np.empty((0, 0)))
    with pytest.raises(StopError):
        save(xr.Dataset({"a": (("x", "y"), lazy)}), tmp_path / "a.zarr")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("kind", [StopError, KeyboardInterrupt])
def test_tasks_that_still_run_write_nothing_any_more(tmp_path, kind):
    began = threading.Event()

    def slow(block):
        began.set()
        time.sleep(0.05)
        return block + 1

    def stop(done, total):
        began.wait()
        raise kind

    ds = xr.Dataset(
        {
            "a": (
                ("x", "y"),
                da.zeros((400, 50), chunks=(2, 50)).map_blocks(slow, dtype=float, meta=np.empty((0, 0))),
            )
        }
    )
    with dask.config.set(scheduler="threads", num_workers=8), pytest.raises(kind):
        save(ds, tmp_path / "a.zarr", progress=stop)
    before = files(tmp_path)
    time.sleep(0.2)
    assert files(tmp_path) == before
    assert left_in(tmp_path) == ([] if kind is StopError else ["a.zarr.partial"])


def test_saving_from_other_processes(run, tmp_path):
    part = run.isel(time=slice(3, None))
    with dask.config.set(scheduler="processes", num_workers=2):
        saved = save(part, tmp_path / "a.zarr")
        assert int(saved["mask"].sum().compute()) == int(run["mask"].values.sum())
    same(saved, part, tmp_path / "a.zarr")


def test_saving_computes_once_and_reports(tmp_path):
    lazy = da.ones((40, 4), chunks=(10, 4)) + 1
    seen = []
    ds = xr.Dataset({"a": (("x", "y"), lazy), "b": (("x", "y"), lazy * 2)})
    with raise_if_computes(1):
        save(ds, tmp_path / "a.zarr", progress=lambda done, total: seen.append((done, total)))
    done, total = zip(*seen, strict=True)
    assert done == tuple(range(1, total[0] + 1))
    assert len(set(total)) == 1


# ---------------------------------------------------------------------------------------------------------- URLs


def test_stores_at_urls(source, run, whole):
    url = "memory://bucket/study.zarr/run-1"
    with pytest.raises(SourceNotFoundError, match="no store memory://"):
        open_run(url)
    converted = convert(source, url)
    xr.testing.assert_identical(converted.load(), run.load())
    verify(url)
    backend = store.places.backend_of(url, read_only=True)
    assert store.places.list_files(backend) == files(whole)
    assert list(open_study("memory://bucket/study.zarr").children) == ["run-1"]
    verify("memory://bucket/study.zarr")
    tree = xr.open_datatree("memory://bucket/study.zarr", engine="zarr", consolidated=False)
    np.testing.assert_array_equal(tree["run-1"]["mask"].values, run["mask"].values)
    with pytest.raises(StoreExistsError, match="--overwrite"):
        convert(source, url, smoothing_fwhm=5)
    with pytest.raises(StoreExistsError, match="stores of its own"):
        save(run, "memory://bucket/study.zarr", overwrite=True)
    part = run.isel(time=slice(3, 20), z=slice(None, None, -1))
    saved = save(part, url, overwrite=True)
    xr.testing.assert_equal(saved.load(), part.load())
    verify(url)


def test_interruption_and_damage_at_urls(source, run, whole):
    url = "memory://other/run.zarr"

    def stop(done, total):
        with pytest.raises(IncompleteStoreError, match=r"no zarr\.json"):
            open_run(url)
        with pytest.raises(FileNotFoundError):
            xr.open_zarr(url, consolidated=False)
        raise StopError

    with pytest.raises(StopError):
        convert(source, url, progress=stop)
    with pytest.raises(SourceNotFoundError):
        open_run(url)
    convert(source, url)
    import fsspec

    fs = fsspec.filesystem("memory")
    key = "bold/c/1/0/0/0"
    content = fs.cat(f"other/run.zarr/{key}")
    for changed in (None, content[:-1], flipped(content, 40), content[4:]):
        fs.rm(f"other/run.zarr/{key}")
        if changed is not None:
            fs.pipe(f"other/run.zarr/{key}", changed)
        with pytest.raises(DamagedStoreError, match=key):
            verify(url)
        with pytest.raises(DamagedStoreError, match=key):
            open_run(url)["bold"][-1].compute()
        fs.pipe(f"other/run.zarr/{key}", content)
    verify(url)
    # What is no store at a URL is not deleted either.
    fs.pipe("mine/notes.txt", b"keep me")
    with pytest.raises(StoreExistsError, match="not a Zarr store"):
        save(run, "memory://mine", overwrite=True)
    assert fs.cat("mine/notes.txt") == b"keep me"


def test_a_url_of_a_file_is_a_path(source, tmp_path, run):
    convert(source, f"file://{tmp_path}/run.zarr")
    verify(tmp_path / "run.zarr")
    xr.testing.assert_identical(open_run(f"file://{tmp_path}/run.zarr").load(), run.load())


def test_urls_that_cannot_be_reached(run):
    for action in (open_run, verify, lambda url: save(run, url)):
        with pytest.raises(StoreError, match="noprotocol://a.zarr cannot be reached"):
            action("noprotocol://a.zarr")


# ------------------------------------------------------------------------------------------------------- viewers


def check_ome(place, scale):
    """The rules of OME-Zarr 0.5 for images, by hand: https://ngff.openmicroscopy.org/0.5/."""
    root = json.loads((place / "zarr.json").read_text())
    assert root["zarr_format"] == 3
    ome = root["attributes"]["ome"]
    assert ome["version"] == "0.5"
    (image,) = ome["multiscales"]
    axes = image["axes"]
    assert 2 <= len(axes) <= 5
    assert len({axis["name"] for axis in axes}) == len(axes)
    kinds = [axis["type"] for axis in axes]
    # Time first, then at most one channel, then two or three in space, in the order zyx.
    assert kinds == ["time"] * kinds.count("time") + ["space"] * kinds.count("space")
    assert kinds.count("time") <= 1
    assert 2 <= kinds.count("space") <= 3
    assert [axis["name"] for axis in axes if axis["type"] == "space"] == ["z", "y", "x"]
    assert {axis["unit"] for axis in axes} == {"second", "millimeter"}
    (dataset,) = image["datasets"]
    array = json.loads((place / dataset["path"] / "zarr.json").read_text())
    assert array["node_type"] == "array"
    assert array["dimension_names"] == [axis["name"] for axis in axes]
    assert len(array["shape"]) == len(axes)
    (transformation,) = dataset["coordinateTransformations"]
    assert transformation["type"] == "scale"
    assert len(transformation["scale"]) == len(axes)
    np.testing.assert_allclose(transformation["scale"], scale, rtol=1e-6)


def test_viewers_find_an_image(source, run, whole, tmp_path):
    check_ome(whole, [2.0, 3, 3, 3])
    header = xr.open_zarr(whole, consolidated=False)["nifti"]
    assert header.dtype == np.uint8
    assert header.values.tobytes() == source.read_bytes()[:352]
    save(run.isel(time=slice(None, None, 2), z=slice(None, None, -3)), tmp_path / "part.zarr")
    check_ome(tmp_path / "part.zarr", [4.0, 9, 3, 3])
    smooth = convert(source, tmp_path / "smooth.zarr", smoothing_fwhm=4)
    check_ome(tmp_path / "smooth.zarr", [2.0, 3, 3, 3])
    header = nib.Nifti1Header(
        xr.open_zarr(tmp_path / "smooth.zarr", consolidated=False)["nifti"].values[:348].tobytes()
    )
    assert header.get_data_dtype() == smooth["bold"].dtype == np.float32
    assert header.get_slope_inter() == (1, 0)
    # Where no image is, nothing says so.
    for number, other in enumerate(
        (run.transpose("x", "y", "z", "time"), run.isel(z=3), run.isel(x=[0, 1, 5]), run.drop_vars("grid"))
    ):
        saved = save(other, tmp_path / f"{number}.zarr")
        assert "ome" not in json.loads((tmp_path / f"{number}.zarr" / "zarr.json").read_text())["attributes"]
        xr.testing.assert_equal(saved["bold"].load(), other["bold"].load())


def test_real_recording(real_data, tmp_path):
    run = convert(
        real_data / "oneback" / "run1.nii.gz",
        tmp_path / "run.zarr",
        mask=real_data / "oneback" / "mask.nii.gz",
    )
    verify(tmp_path / "run.zarr")
    assert int(run["mask"].sum()) == 48751
    check_ome(tmp_path / "run.zarr", [2.0, 3.3, 3, 3])
    part = run.isel(time=slice(40, 60, 3), y=slice(10, 50), x=slice(None, None, -1))
    saved = save(part, tmp_path / "part.zarr")
    xr.testing.assert_equal(saved.load(), part.load())
    stored = sum(path.stat().st_size for path in (tmp_path / "run.zarr").rglob("*") if path.is_file())
    assert stored < run["bold"].size * 2
