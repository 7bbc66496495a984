"""Work that is cut off goes on where it was, and gives the bytes of work that was not.

More evidence: ``python -m pytest tests/test_resume.py --kills 200 --flips 1000``.
"""

import errno
import gzip
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
from rich.console import Console

import chunkglm as cg
from chunkglm import job, request
from chunkglm import store as stores
from chunkglm.errors import BusyStoreError, ChunkGLMError, NiftiError, StoreExistsError
from chunkglm.store.places import MADE_OF
from chunkglm.testing import write_simulated_run

converting = importlib.import_module("chunkglm.convert")

CONSOLE = Console(quiet=True)
SHAPE = (14, 16, 38)

ESTIMATES = ("bold", "beta", "sigma2", "rho", "rho_at_limit")
"""Arrays that take time to make."""

TIMES = ("finished", "seconds", "peak_memory_bytes", "command", "working_directory")
"""What a record of results has that differs from one time to the next."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three sessions with more slices than a chunk has."""
    folder = tmp_path_factory.mktemp("data")
    for session, volumes in ((1, 70), (2, 45), (3, 50)):
        write_simulated_run(
            folder / f"run{session}.nii",
            folder / f"design{session}.npz",
            folder / "mask.nii.gz",
            shape=SHAPE,
            n_volumes=volumes,
            session=session,
            overwrite=True,
        )
        cg.read_design(folder / f"design{session}.npz").to_csv(folder / f"design{session}.csv", index=False)
        (folder / f"run{session}.nii.gz").write_bytes(
            gzip.compress((folder / f"run{session}.nii").read_bytes(), 1, mtime=0)
        )
    return folder


def job_of(data, output, *, n_runs=2, **options):
    """A job without report."""
    first = cg.read_design(data / "design1.csv").columns[0]
    given = {
        "mask": str(data / "mask.nii.gz"),
        "smoothing_fwhm": 5.0,
        "n_threads": 2,
        "contrasts": {"a": first},
        "report": False,
        **options,
    }
    numbers = range(1, n_runs + 1)
    runs = tuple(str(data / f"run{n}.nii.gz") for n in numbers)
    designs = given.pop("designs", tuple(str(data / f"design{n}.csv") for n in numbers))
    return request.Job(runs=runs, designs=designs, output=output, **given)


def do(asked):
    return job.run_job(asked, CONSOLE, quiet=True)


def contents(folder):
    """Every file with its bytes, and of the record what does not depend on time."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    if "provenance.json" in found:
        record = json.loads(found["provenance.json"])
        found["provenance.json"] = {key: value for key, value in record.items() if key not in TIMES}
    return found


def finished_chunks(folder):
    """When every chunk of a signal or an estimate was written, by its place in the finished results."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix().replace(".partial/store/", "/")
        array = name.split("/c/")[0].rpartition("/")[2]
        if "/c/" in name and array in ESTIMATES and path.is_file() and not name.endswith(".partial"):
            found[name] = path.stat().st_mtime_ns
    return found


# ------------------------------------------------------------------------------------------------------------- killed

WORK = {
    "convert": (
        "import sys; from pathlib import Path; import chunkglm as cg\n"
        "print('go', flush=True)\n"
        "data, output = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "cg.convert(data / 'run1.nii.gz', output / 'study.zarr' / 'run-1', mask=data / 'mask.nii.gz', smoothing_fwhm=5)\n"
    ),
    "run": (
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[3])\n"
        "import test_resume\n"
        "print('go', flush=True)\n"
        "test_resume.do(test_resume.job_of(Path(sys.argv[1]), Path(sys.argv[2])))\n"
    ),
}


def work(kind, data, output):
    """A process at work; it has begun when this returns."""
    words = [sys.executable, "-W", "ignore", "-c", WORK[kind], data, output, Path(__file__).parent]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ})
    assert process.stdout.readline().strip() == b"go", process.stderr.read()
    return process


def finish(process):
    _, error = process.communicate(timeout=120)
    return process.returncode, error.decode()


def wait_for_chunks(process, folder, n_chunks):
    """Until so many chunks are there or the process has ended: a measure of its work that does not change with the machine."""
    found = 0
    while process.poll() is None and found < n_chunks:
        # A store is moved to its place while it is looked at.
        with suppress(FileNotFoundError):
            found = len(finished_chunks(folder))
        time.sleep(0.001)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("kind", WORK)
def test_killed_at_any_instant__the_same_command_goes_on_to_the_same_bytes(kind, data, tmp_path, n_kills):
    whole = tmp_path / "whole"
    assert finish(work(kind, data, whole)) == (0, "")
    expected, n_chunks = contents(whole), len(finished_chunks(whole))
    assert n_chunks > 5
    chance = random.Random(2)
    killed = during = kept = 0
    while killed < n_kills // 2:
        output = tmp_path / "output"
        for _ in range(chance.randint(1, 3)):
            process = work(kind, data, output)
            wait_for_chunks(process, output, chance.uniform(-0.2, 0.9) * n_chunks)
            time.sleep(chance.uniform(0, 0.01))
            process.send_signal(signal.SIGKILL)
            code, _ = finish(process)
            killed += 1
            during += code == -signal.SIGKILL
            before = finished_chunks(output)
            kept += bool(before)
            assert not any(
                name.endswith((".nii.gz", ".json", "zarr.json")) and not content
                for name, content in contents(output).items()
            )
        assert finish(work(kind, data, output)) == (0, "")
        assert contents(output) == expected
        after = finished_chunks(output)
        assert {name: after[name] for name in before} == before
        shutil.rmtree(output)
    print(f"\n{kind}: {killed} kills, {during} of them before the end, {kept} with chunks to keep")
    # Not all too early and not all too late.
    assert during > killed / 3
    assert kept > killed / 5


# -------------------------------------------------------------------------------------------------- nothing made twice


def counted(monkeypatch):
    """Chunks that are encoded and volumes that are smoothed, as they are counted from here on."""
    from chunkglm import chunkfiles

    counts = {"chunks": 0, "volumes": 0}
    write, smooth = chunkfiles.write_chunk, converting.smooth_volume

    def write_chunk(path, *arguments):
        counts["chunks"] += "/bold/c/" in str(path)
        write(path, *arguments)

    def smooth_volume(*arguments):
        counts["volumes"] += 1
        return smooth(*arguments)

    monkeypatch.setattr(chunkfiles, "write_chunk", write_chunk)
    monkeypatch.setattr(converting, "smooth_volume", smooth_volume)
    return counts


class Stop:
    """A progress that interrupts after some volumes."""

    def __init__(self, after, kind=KeyboardInterrupt):
        self.after, self.kind = after, kind

    def __call__(self, done, _):
        if done >= self.after:
            raise self.kind


def test_a_conversion_goes_on_behind_what_is_complete(data, tmp_path, monkeypatch):
    options = {"mask": data / "mask.nii.gz", "smoothing_fwhm": 5.0}
    whole = cg.convert(data / "run1.nii", tmp_path / "whole", **options)
    n_chunks = whole["bold"].data.npartitions
    with pytest.raises(KeyboardInterrupt):
        cg.convert(data / "run1.nii", tmp_path / "run-1", **options, progress=Stop(32))
    there = len(finished_chunks(tmp_path / "run-1.partial"))
    assert 0 < there < n_chunks
    counts = counted(monkeypatch)
    cg.convert(data / "run1.nii", tmp_path / "run-1", **options)
    assert counts["chunks"] == n_chunks - there
    assert counts["volumes"] < 70
    assert contents(tmp_path / "run-1") == contents(tmp_path / "whole")
    # Now it is there.
    cg.convert(data / "run1.nii", tmp_path / "run-1", **options)
    assert counts["chunks"] == n_chunks - there
    # Without resuming, everything is made again.
    with pytest.raises(KeyboardInterrupt):
        cg.convert(data / "run1.nii", tmp_path / "run-2", **options, progress=Stop(32))
    counts["chunks"] = 0
    cg.convert(data / "run1.nii", tmp_path / "run-2", **options, resume=False)
    assert counts["chunks"] == n_chunks


@pytest.mark.parametrize("damage", ["cut off", "altered", "empty"])
def test_a_chunk_that_is_not_whole_is_made_again(data, tmp_path, damage):
    cg.convert(data / "run1.nii", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        cg.convert(data / "run1.nii", tmp_path / "run-1", progress=Stop(32))
    chunk = next(
        path for path in (tmp_path / "run-1.partial" / "store" / "bold" / "c").rglob("*") if path.is_file()
    )
    content = bytearray(chunk.read_bytes())
    if damage == "altered":
        content[len(content) // 2] ^= 1
    chunk.write_bytes({"cut off": content[:-50], "altered": content, "empty": b""}[damage])
    # What was being written when the process was killed is no part of the store.
    (chunk.parent / "9.partial").write_bytes(b"half")
    cg.convert(data / "run1.nii", tmp_path / "run-1")
    assert contents(tmp_path / "run-1") == contents(tmp_path / "whole")


def test_what_was_begun_from_something_else_is_not_continued(data, tmp_path):
    place = tmp_path / "run-1"
    with pytest.raises(KeyboardInterrupt):
        cg.convert(data / "run1.nii", place, smoothing_fwhm=5, progress=Stop(32))
    before = contents(tmp_path)
    with pytest.raises(StoreExistsError, match=r"run-1 was begun with other smoothing"):
        cg.convert(data / "run1.nii", place, smoothing_fwhm=6)
    # The same header, but other values from the 40th volume on.
    content = bytearray((data / "run1.nii").read_bytes())
    place_of_volume = 352 + 30 * int(np.prod(SHAPE)) * 2
    content[place_of_volume] ^= 1
    (tmp_path / "other.nii").write_bytes(content)
    with pytest.raises(StoreExistsError, match="begun from other data"):
        cg.convert(tmp_path / "other.nii", place, smoothing_fwhm=5)
    (tmp_path / "other.nii").rename(tmp_path.parent / "other.nii")
    assert {name: content for name, content in contents(tmp_path).items() if "lock" not in name} == {
        name: content for name, content in before.items() if "lock" not in name
    }
    cg.convert(tmp_path.parent / "other.nii", place, smoothing_fwhm=5, overwrite=True)
    cg.convert(tmp_path.parent / "other.nii", tmp_path / "whole", smoothing_fwhm=5)
    assert contents(place) == contents(tmp_path / "whole")


def test_another_decompressor_goes_on(data, tmp_path, monkeypatch):
    """Which reads ahead in other steps, as where the extra ``fast`` is not installed."""
    from chunkglm import nifti

    pytest.importorskip("isal")
    cg.convert(data / "run1.nii.gz", tmp_path / "whole", smoothing_fwhm=5)
    with pytest.raises(KeyboardInterrupt):
        cg.convert(data / "run1.nii.gz", tmp_path / "run-1", smoothing_fwhm=5, progress=Stop(32))
    monkeypatch.setattr(nifti, "_gunzip", lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"))
    monkeypatch.setattr(nifti, "PIECE", 2**12)
    cg.convert(data / "run1.nii.gz", tmp_path / "run-1", smoothing_fwhm=5)
    assert contents(tmp_path / "run-1") == contents(tmp_path / "whole")


def test_a_source_that_was_copied_to_another_place_is_the_same(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cg.convert(data / "run1.nii.gz", tmp_path / "run-1", progress=Stop(32))
    before = finished_chunks(tmp_path / "run-1.partial")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(data / "run1.nii.gz", tmp_path / "elsewhere" / "run1.nii.gz")
    cg.convert(tmp_path / "elsewhere" / "run1.nii.gz", tmp_path / "run-1", memory="4GiB")
    after = finished_chunks(tmp_path / "run-1")
    assert before
    assert {name.replace("store/", ""): after[name.replace("store/", "")] for name in before} == {
        name.replace("store/", ""): value for name, value in before.items()
    }


@pytest.mark.parametrize("where", ["local", "url"])
def test_a_saved_dataset_goes_on_behind_what_is_complete(data, tmp_path, where):
    run = cg.convert(data / "run1.nii", tmp_path / "run-1", mask=data / "mask.nii.gz")
    place = tmp_path / "fit.zarr" if where == "local" else f"memory://resume-{time.time_ns()}/fit.zarr"

    def lazy():
        return cg.fit(cg.open_run(tmp_path / "run-1"), data / "design1.csv")

    n_blocks = run["bold"].data.numblocks[1]
    assert n_blocks > 1
    with dask.config.set(scheduler="synchronous"), pytest.raises(KeyboardInterrupt):
        cg.save(lazy(), place, progress=Stop(n_blocks - 1))
    with pytest.raises(ChunkGLMError):
        cg.open_store(place)
    tasks = []
    with dask.config.set(scheduler="synchronous"):
        saved = cg.save(lazy(), place, progress=lambda done, total: tasks.append(total))
    again = []
    with dask.config.set(scheduler="synchronous"):
        cg.save(lazy(), f"{place}-2", progress=lambda done, total: again.append(total))
    assert tasks[0] < again[0]
    xr.testing.assert_identical(saved.load(), cg.open_store(f"{place}-2").load())
    cg.verify(place)
    # Now it is up to date: nothing is computed.
    cg.save(lazy(), place, progress=lambda done, total: pytest.fail("computed again"))
    with pytest.raises(StoreExistsError):
        cg.save(cg.fit(run, data / "design1.csv", noise_model="ols"), place)


def test_names_of_content_are_the_same_in_another_process(data, tmp_path):
    """Else nothing that was begun would ever be known again."""
    cg.convert(data / "run1.nii", tmp_path / "run-1", mask=data / "mask.nii.gz")
    code = (
        "import sys, chunkglm as cg\n"
        f"fit = cg.fit(cg.open_run({str(tmp_path / 'run-1')!r}), {str(data / 'design1.csv')!r}, noise_model='ar2')\n"
        "maps = cg.fixed_effects(cg.contrast(fit, {'a': [1.0, 0, 0], 'b': [0.0, 1, 0]}))\n"
        "print(fit.beta.data.name, maps.z_score.data.name, maps.effect.data.name)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(set(runs[0].stdout.split())) == 3


# --------------------------------------------------------------------------------------------------------------- one job


def test_a_run_whose_fit_was_cut_off_is_fitted_from_its_store(data, tmp_path, monkeypatch):
    """The runs before it are not fitted again, and those behind it as always."""
    do(job_of(data, tmp_path / "whole", n_runs=3))
    from chunkglm import streamed

    original = streamed.StreamedRun._write_block

    def interrupt(self, writer, number):
        if self._number == 1 and number == 1:
            raise KeyboardInterrupt
        original(self, writer, number)

    monkeypatch.setattr(streamed.StreamedRun, "_write_block", interrupt)
    output = tmp_path / "output"
    with pytest.raises(KeyboardInterrupt):
        do(job_of(data, output, n_runs=3))
    monkeypatch.undo()
    before = finished_chunks(output)
    assert any("/beta/c/0/" in name for name in before)
    assert any("/beta/c/1/" in name for name in before)
    do(job_of(data, output, n_runs=3))
    assert contents(output) == contents(tmp_path / "whole")
    after = finished_chunks(output)
    assert {name: after[name] for name in before} == before


def test_one_design_value_makes_exactly_that_run_again(data, tmp_path):
    output = tmp_path / "output"
    do(job_of(data, output, n_runs=3))
    runs, fits = finished_chunks(output / "runs.zarr"), finished_chunks(output / "fit.zarr")
    design = cg.read_design(data / "design2.csv")
    design.iloc[7, 0] += 0.25
    design.to_csv(tmp_path / "changed.csv", index=False)
    designs = (str(data / "design1.csv"), str(tmp_path / "changed.csv"), str(data / "design3.csv"))
    asked = {"n_runs": 3, "designs": designs}
    with pytest.raises(StoreExistsError, match="another job"):
        do(job_of(data, output, **asked))
    do(job_of(data, output, **asked, overwrite=True))
    assert finished_chunks(output / "runs.zarr") == runs
    after = finished_chunks(output / "fit.zarr")
    for name, stamp in fits.items():
        assert (after[name] == stamp) == ("/c/1/" not in name), name
    do(job_of(data, tmp_path / "whole", **asked))
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize("what", ["runs.zarr/run-2/bold/c/0/0/0/0", "fit.zarr/beta/c/1/0/0/0/0"])
def test_overwriting_mends_what_is_damaged(data, tmp_path, what):
    output = tmp_path / "output"
    do(job_of(data, output))
    expected = contents(output)
    victim = output / what
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(cg.errors.DamagedStoreError):
        cg.verify(output / what.split("/")[0])
    do(job_of(data, output, contrasts={"b": "SSp"}, overwrite=True))
    do(job_of(data, output, overwrite=True))
    assert contents(output) == expected


def test_a_new_contrast_makes_nothing_but_its_maps(data, tmp_path):
    output = tmp_path / "output"
    do(job_of(data, output))
    names = list(cg.read_design(data / "design1.csv").columns)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    both = {"a": names[0], "b": f"{names[1]} - {names[0]}"}
    summary = do(job_of(data, output, contrasts=both, overwrite=True))
    assert {entry["contrast"] for entry in summary.peaks} == {"a", "b"}
    written = {path for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert {path.name for path in written} <= {"provenance.json", "mean_image.nii.gz"}
    do(job_of(data, tmp_path / "whole", contrasts=both))
    assert contents(output) == contents(tmp_path / "whole")
    # Without the old contrast its maps go.
    do(job_of(data, output, contrasts={"b": both["b"]}, overwrite=True))
    assert not list((output / "maps").glob("*contrast-a_*"))
    assert list((output / "maps").glob("*contrast-b_*"))


def test_threads_and_memory_change_nothing(data, tmp_path):
    output = tmp_path / "output"
    do(job_of(data, output))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    summary = do(job_of(data, output, n_threads=1, memory="4GiB"))
    assert summary.up_to_date
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_maps_that_were_cut_off_are_no_result(data, tmp_path, monkeypatch):
    """A job that replaces another one leaves neither under the name of the other."""
    output = tmp_path / "output"
    first = job_of(data, output)
    do(first)
    names = list(cg.read_design(data / "design1.csv").columns)
    second = job_of(data, output, contrasts={"a": names[1]}, overwrite=True)
    calls = []
    original = job.write_maps

    def interrupt(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(job, "write_maps", interrupt)
    with pytest.raises(KeyboardInterrupt):
        do(second)
    monkeypatch.undo()
    with pytest.raises(StoreExistsError, match="the beginning of another job"):
        do(first)
    with pytest.raises(ChunkGLMError, match="not finished"):
        cg.report(output)
    do(job_of(data, output, contrasts={"a": names[1]}))
    do(job_of(data, tmp_path / "whole", contrasts={"a": names[1]}))
    assert contents(output) == contents(tmp_path / "whole")


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("results") / "output"
    do(job_of(data, output))
    return output


def test_flipped_bits_are_found(results, tmp_path, n_flips):
    """In every file of run and fit stores; what is not found changes nothing that is read."""
    chance = random.Random(5)
    found = harmless = 0
    for store in ("runs.zarr/run-1", "fit.zarr"):
        place = tmp_path / store.replace("/", "-")
        shutil.copytree(results / store, place)
        expected = cg.open_store(place).load()
        files = sorted(path for path in place.rglob("*") if path.is_file())
        for _ in range(n_flips // 2):
            path = chance.choice(files)
            content = path.read_bytes()
            flipped = bytearray(content)
            bit = chance.randrange(8 * len(content))
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            verified = read = None
            try:
                cg.verify(place)
            except ChunkGLMError as error:
                verified = str(error)
            try:
                read = cg.open_store(place).load()
            except ChunkGLMError as error:
                assert str(place) in str(error)
            where = f"{path.relative_to(place)}, bit {bit}"
            if verified is None:
                # Such as a space of the root's text that became another one.
                assert read is not None, where
                xr.testing.assert_identical(read, expected)
                harmless += 1
            else:
                assert str(place) in verified, where
                found += 1
                if read is not None:
                    xr.testing.assert_identical(read, expected)
            path.write_bytes(content)
        cg.verify(place)
    print(f"\n{found} of {found + harmless} flips found, {harmless} harmless")
    assert found > 0.9 * (found + harmless)


# --------------------------------------------------------------------------------------------------------------- faults


def test_two_processes__one_writes_and_the_other_says_so(data, tmp_path):
    place = tmp_path / "study.zarr" / "run-1"
    code = (
        "import sys, time, chunkglm as cg\n"
        "def hold(done, total):\n"
        "    print('here', flush=True); sys.stdin.readline()\n"
        f"cg.convert({str(data / 'run1.nii')!r}, {str(place)!r}, progress=hold)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert first.stdout.readline().strip() == b"here"
    with pytest.raises(
        BusyStoreError, match=r"run-1\.partial is in use: another process is writing .*run-1\. Wait"
    ):
        cg.convert(data / "run1.nii", place)
    with pytest.raises(BusyStoreError):
        cg.convert(data / "run1.nii", place, overwrite=True)
    first.communicate(b"\n" * 50, timeout=60)
    assert first.returncode == 0
    assert sorted(path.name for path in place.parent.iterdir()) == ["run-1", "zarr.json"]
    cg.verify(place)
    cg.convert(data / "run1.nii", place)  # up to date


def test_a_lock_that_a_killed_process_left_is_no_obstacle(data, tmp_path):
    folder = tmp_path / "run-1.partial"
    folder.mkdir()
    (folder / "lock").touch()
    cg.convert(data / "run1.nii", tmp_path / "run-1")
    assert [path.name for path in tmp_path.iterdir()] == ["run-1"]


def test_a_file_system_without_locks(data, tmp_path, monkeypatch):
    """Then a file says whose it is, and is there while the owner works."""
    import filelock

    def refuse(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", refuse)
    folder, seen = tmp_path / "run-1.partial", []

    def look(done, total):
        seen.append((folder / "lock.owner").exists())
        if len(seen) == 1:
            with pytest.raises(BusyStoreError, match=r"remove .*lock\.owner"):
                cg.convert(data / "run1.nii", tmp_path / "run-1")

    cg.convert(data / "run1.nii", tmp_path / "run-1", progress=look)
    assert seen
    assert all(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["run-1"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT")
@pytest.mark.parametrize("stage", ["Converting", "maps"])
def test_ctrl_c_once__stops_cleanly_and_says_how_to_go_on(data, tmp_path, stage):
    names = list(cg.read_design(data / "design1.csv").columns)
    words = ["run", data / "run1.nii.gz", data / "run2.nii.gz", "--design", data / "design1.csv"]
    words += ["--design", data / "design2.csv", "--mask", data / "mask.nii.gz", "--smoothing-fwhm", "5"]
    words += ["--contrast", f"a={names[0]}", "--output", tmp_path / "output", "--no-report"]
    module, function = (
        ("chunkglm.convert", "_Pipeline._advance")
        if stage == "Converting"
        else ("chunkglm.job", "write_maps")
    )
    code = (
        "import os, signal, sys, time, importlib\n"
        "from chunkglm import cli\n"
        f"module = importlib.import_module({module!r})\n"
        f"holder, name = (module, {function!r}) if '.' not in {function!r} else (module._Pipeline, '_advance')\n"
        "original, calls = getattr(holder, name), []\n"
        "def interrupt(*arguments, **options):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2)\n"
        "    return original(*arguments, **options)\n"
        "setattr(holder, name, interrupt)\n"
        "cli.main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Stopped: ")
    assert "same command again" in last
    assert "Traceback" not in done.stderr
    before = finished_chunks(tmp_path / "output")
    assert before
    again = subprocess.run(
        [sys.executable, "-m", "chunkglm", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert again.returncode == 0, again.stderr
    after = finished_chunks(tmp_path / "output")
    assert {name: after[name] for name in before} == before
    cg.verify(tmp_path / "output" / "runs.zarr")


def test_a_source_that_changes_while_it_is_read_is_refused(data, tmp_path):
    source = tmp_path / "run1.nii"
    shutil.copy(data / "run1.nii", source)

    def touch(done, total):
        os.utime(source)

    with pytest.raises(NiftiError, match=r"run1\.nii changed while it was read"):
        cg.convert(source, tmp_path / "run-1", progress=touch)
    assert [path.name for path in tmp_path.iterdir()] == ["run1.nii"]


def test_a_source_that_the_system_cannot_read_any_more(data, tmp_path, monkeypatch):
    """As when a network drive goes away: what was read of it stays good."""
    from chunkglm import nifti

    original, calls = nifti._Hashing.readinto, []

    def fail(self, buffer):
        calls.append(1)
        if len(calls) > 4:
            raise OSError(5, "Input/output error")
        return original(self, buffer)

    monkeypatch.setattr(nifti._Hashing, "readinto", fail)
    with pytest.raises(
        cg.errors.SourceReadError,
        match=r"run1\.nii could not be read beyond volume \d+.*run the same command",
    ):
        cg.convert(data / "run1.nii", tmp_path / "run-1")
    monkeypatch.undo()
    before = finished_chunks(tmp_path / "run-1.partial")
    assert before
    cg.convert(data / "run1.nii", tmp_path / "run-1")
    after = finished_chunks(tmp_path / "run-1")
    assert {name.replace("store/", "") for name in before} <= set(after)


def test_a_source_that_is_removed_while_it_is_read_is_read_to_its_end(data, tmp_path):
    source = tmp_path / "run1.nii"
    shutil.copy(data / "run1.nii", source)
    cg.convert(source, tmp_path / "run-1", progress=lambda done, total: source.unlink(missing_ok=True))
    assert cg.open_run(tmp_path / "run-1").attrs["source_size"] == (data / "run1.nii").stat().st_size


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 400 kB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(data, full_disk):
    words = [sys.executable, "-m", "chunkglm", "convert", data / "run1.nii", full_disk / "run-1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "No space left on device" in last
    assert "run the same command again" in last
    assert "Traceback" not in done.stderr
    before = finished_chunks(full_disk / "run-1.partial")
    assert before
    with pytest.raises(ChunkGLMError):
        cg.open_run(full_disk / "run-1")
    subprocess.run(["mount", "-o", "remount,size=64m", full_disk], check=True)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cg.verify(full_disk / "run-1")
    after = finished_chunks(full_disk / "run-1")
    assert {name.replace("store/", ""): stamp for name, stamp in before.items()}.items() <= after.items()


def test_a_disk_that_is_only_for_reading(data, full_disk):
    subprocess.run(["mount", "-o", "remount,ro", full_disk], check=True)
    words = [sys.executable, "-m", "chunkglm", "convert", data / "run1.nii", full_disk / "run-1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert str(full_disk / "run-1") in last
    assert "Read-only file system" in last
    assert "Traceback" not in done.stderr


def test_a_store_that_lacks_a_chunk_is_never_called_complete(data, tmp_path, monkeypatch):
    """As if the file system had lost it on the way."""
    from chunkglm import chunkfiles

    original, lost = chunkfiles.write_chunk, []

    def lose(path, *arguments):
        original(path, *arguments)
        if not lost and str(path).endswith("bold/c/1/0/0/0"):
            lost.append(path)
            path.unlink()

    monkeypatch.setattr(chunkfiles, "write_chunk", lose)
    with pytest.raises(
        cg.errors.StoreError, match=r"run-1 was not finished: its chunk bold/c/1/0/0/0 was not written"
    ):
        cg.convert(data / "run1.nii", tmp_path / "run-1")
    assert lost
    assert not (tmp_path / "run-1").exists()
    cg.convert(data / "run1.nii", tmp_path / "run-1")
    cg.verify(tmp_path / "run-1")


def test_a_conversion_at_a_url_goes_on(data, tmp_path, monkeypatch):
    url = f"memory://resume-{time.time_ns()}/run-1"
    with pytest.raises(KeyboardInterrupt):
        cg.convert(data / "run1.nii", url, smoothing_fwhm=5, progress=Stop(32))
    with pytest.raises(ChunkGLMError):
        cg.open_run(url)
    with pytest.raises(StoreExistsError, match="begun with other smoothing"):
        cg.convert(data / "run1.nii", url)
    counts = counted(monkeypatch)
    cg.convert(data / "run1.nii", url, smoothing_fwhm=5)
    assert 0 < counts["volumes"] <= 70 - 32
    cg.verify(url)
    whole = cg.convert(data / "run1.nii", tmp_path / "whole", smoothing_fwhm=5)
    xr.testing.assert_identical(cg.open_run(url).load(), whole.load())


def test_a_place_that_cannot_be_written(data, tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(ChunkGLMError, match=r"file/run-1"):
        cg.convert(data / "run1.nii", place / "run-1")
    assert place.read_text() == ""


def test_a_store_that_was_being_replaced_is_put_back(data, tmp_path):
    """When the process was killed after the old store was moved away."""
    place = tmp_path / "run-1"
    cg.convert(data / "run1.nii", place)
    with pytest.raises(KeyboardInterrupt):
        cg.convert(data / "run2.nii", place, overwrite=True, progress=Stop(16))
    place.rename(tmp_path / "run-1.partial" / "old")
    with pytest.raises(StoreExistsError):
        cg.convert(data / "run1.nii", place, smoothing_fwhm=7)
    cg.verify(place)
    assert stores.made_of(place)["source"] == cg.open_run(place).attrs["source_sha256"]


def test_what_a_store_is_made_of_tells_no_place_and_no_time(data, tmp_path):
    cg.convert(data / "run1.nii", tmp_path / "run-1", memory="3GiB")
    root = json.loads((tmp_path / "run-1" / "zarr.json").read_text())
    text = json.dumps(root["attributes"][MADE_OF])
    assert str(tmp_path) not in text
    assert "run1.nii" not in text
    assert set(root["attributes"][MADE_OF]) == {
        "kind", "format version", "numerical version", "header", "repetition time", "smoothing", "mask", "source",
    }  # fmt: skip
