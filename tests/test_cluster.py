"""Clusters: a real scheduler and worker processes over TCP give the bytes of one process, whatever happens to a worker.

More evidence: ``python -m pytest tests/test_cluster.py -k any_instant --worker-kills 20``.
"""

import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from count_bytes import counted
from rich.console import Console
from test_resume import contents, finished_chunks
from workers import ROOT, cluster_of

import chunkglm as cg
from chunkglm import cli, job, stages, tasks
from chunkglm import cluster as clusters
from chunkglm import store as stores
from chunkglm.blocks import write_blocks
from chunkglm.convert import convert_run
from chunkglm.errors import (
    BusyStoreError,
    ClusterError,
    InputError,
    MissingDependencyError,
    StoreError,
    StoreExistsError,
)
from chunkglm.testing import write_simulated_run

distributed = pytest.importorskip("distributed", reason="distributed is not installed")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL and no SIGSTOP")

SHAPE = (14, 16, 38)

CLIENT = (
    "import json, sys, count_bytes\n"
    "from chunkglm import cli\n"
    "try:\n"
    "    cli.main(sys.argv[1:])\n"
    "except SystemExit as end:\n"
    "    print('counted', json.dumps(count_bytes.counted()))\n"
    "    raise\n"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three sessions with more slices than a chunk has."""
    folder = tmp_path_factory.mktemp("data")
    for session, volumes in ((1, 70), (2, 45), (3, 50)):
        simulate(folder, session, SHAPE, volumes)
    return folder


def simulate(folder, session, shape, volumes):
    paths = (folder / f"run{session}.nii.gz", folder / f"design{session}.npz", folder / "mask.nii.gz")
    write_simulated_run(*paths, shape=shape, n_volumes=volumes, session=session, overwrite=True)
    cg.read_design(paths[1]).iloc[:, :5].to_csv(folder / f"design{session}.csv", index=False)


def words(output, *more, n_runs=3):
    """A job, with paths as a user types them, in the folder of the data."""
    runs = [word for n in range(1, n_runs + 1) for word in (f"run{n}.nii.gz", "--design", f"design{n}.csv")]
    options = ["--mask", "mask.nii.gz", "--smoothing-fwhm", "5", "--no-report"]
    options += ["--contrast", "a=SSt - SSp", "--contrast", "any=SSt; SSp", "--output", str(output)]
    return ["run", *runs, *options, *map(str, more)]


def start(data, *arguments):
    """The command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CLIENT, *map(str, arguments)],
        cwd=data,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def local(data, tmp_path_factory):
    """The results of one process."""
    output = tmp_path_factory.mktemp("local") / "results"
    code, _, err = finish(start(data, *words(output)))
    assert code == 0, err
    return output


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A scheduler and three workers, which forget a worker that is silent for three seconds."""
    with cluster_of(tmp_path_factory.mktemp("cluster"), worker_ttl="3s") as cluster:
        yield cluster


@pytest.fixture
def client(three):
    with distributed.Client(three.address) as client:
        client.wait_for_workers(len(three.processes), timeout=60)
        yield client


def assert_same(found, expected):
    """The same files with the same bytes, but for times."""
    ours, theirs = contents(found), contents(expected)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


# ------------------------------------------------------------------------------------------------------- the whole job


def test_the_job_on_workers__the_bytes_of_one_process(data, local, three, tmp_path):
    report = tmp_path / "report.html"
    options = ["--scheduler", three.address, "--workers", "3", "--performance-report", report]
    # As a user types it, and from where workers are not.
    output = os.path.relpath(tmp_path / "there", data)
    code, out, err = finish(start(data, *words(output, *options)))
    assert code == 0, err + three.logs()
    assert_same(tmp_path / "there", local)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "there"]
    assert "Dashboard: http://127.0.0.1:" in err
    for line in ("Converting 3 runs: 165 of 165 volumes", "Fitting: ", "Writing maps: 8 of 8 contrasts"):
        assert line in err
    assert "bokeh" in report.read_text().lower()
    # Again, there is nothing to do.
    code, out, _ = finish(start(data, *words(output, *options)))
    assert (code, "up to date" in out) == (0, True)


def test_a_report_that_cannot_be_written_costs_no_result(data, local, three, tmp_path):
    (tmp_path / "report.html").mkdir()
    options = ["--scheduler", three.address, "--performance-report", tmp_path / "report.html", "-q"]
    code, _, err = finish(start(data, *words(tmp_path / "there", *options)))
    assert code == 0, err
    assert "Warning: The performance report" in err
    assert_same(tmp_path / "there", local)


def test_the_job_on_processes_of_this_machine(data, local, tmp_path):
    code, _, err = finish(
        start(data, *words(tmp_path / "there", "--scheduler", "processes", "--workers", "2", "-q"))
    )
    assert code == 0, err
    assert_same(tmp_path / "there", local)
    assert err == ""


def test_steps_on_workers(local, data, three, tmp_path):
    """fit, contrast and combine, as verbs, from another working directory than the workers'."""
    runs = [local / "runs.zarr" / f"run-{n}" for n in (1, 2, 3)]
    designs = [word for n in (1, 2, 3) for word in ("--design", data / f"design{n}.csv")]
    steps = [
        ["fit", *runs, *designs, "--output", "fit.zarr"],
        ["contrast", "fit.zarr", "--contrast", "a=SSt - SSp", "--output", "a.zarr"],
        ["combine", "a.zarr", "--output", "fixed.zarr"],
    ]
    for name, more in (("here", []), ("there", ["--scheduler", three.address])):
        (tmp_path / name).mkdir()
        for step in steps:
            code, _, err = finish(start(tmp_path / name, *step, *more))
            assert code == 0, err
    assert_same(tmp_path / "there", tmp_path / "here")


def test_saving_uses_the_client_that_is_there(local, client, tmp_path, monkeypatch):
    fit = cg.open_store(local / "fit.zarr")
    lazy = cg.contrast(fit, "SSt - SSp")
    seen = []
    # Workers have other working directories.
    monkeypatch.chdir(tmp_path)
    saved = cg.save(lazy, "there", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, len(seen)) for n in range(1, len(seen) + 1)]
    ran = {key.split("-")[0] if isinstance(key, str) else key[0].split("-")[0] for key in ran_on(client)}
    assert any("write" in name for name in ran)
    with dask.config.set(scheduler="synchronous"):
        cg.save(lazy, tmp_path / "here")
    assert_same(tmp_path / "there", tmp_path / "here")
    xr.testing.assert_identical(saved.load(), cg.open_store(tmp_path / "here").load())


def ran_on(client):
    """Names of tasks that workers did."""
    logs = client.run(
        lambda dask_worker: [key for key, *_ in dask_worker.state.log if not isinstance(key, bytes)]
    )
    return {key if isinstance(key, str) else str(key) for keys in logs.values() for key in keys} | {
        str(key[0]) for keys in logs.values() for key in keys if isinstance(key, tuple)
    }


def test_the_same_arrays_are_saved_in_two_places_at_once(client, tmp_path):
    """What is written in one place is not taken for written in the other."""

    def slowly(block):
        time.sleep(0.2)
        return block

    values = da.arange(24, chunks=6).reshape(2, 3, 4).astype(float).map_blocks(slowly, dtype=float)
    ds = xr.Dataset({"a": (("z", "y", "x"), values)})
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: cg.save(ds, tmp_path / name), ("one", "two")))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_task_that_saves(client, tmp_path):
    """It waits for others in no worker's way: with as many of them as there are threads, too."""

    def work(number):
        import dask.array
        import xarray

        import chunkglm

        values = dask.array.full((4, 4, 4), number, chunks=(2, 4, 4))
        chunkglm.save(xarray.Dataset({"a": (("z", "y", "x"), values)}), f"{tmp_path}/{number}")

    client.gather(client.map(work, [1.0, 2.0, 3.0], pure=False))
    assert [float(cg.open_store(tmp_path / f"{n}")["a"].max()) for n in (1.0, 2.0, 3.0)] == [1, 2, 3]


def test_what_a_task_raises_reaches_the_caller_and_leaves_nothing_at_work(client, tmp_path):
    def slow_or_wrong(block):
        if len(list(tmp_path.glob("done-*"))) >= 3:
            with suppress(FileExistsError):
                (tmp_path / "failed").mkdir()
                raise ArithmeticError("this block cannot be made")
        time.sleep(0.3)
        (tmp_path / f"done-{time.time_ns()}").touch()
        return block

    array = da.ones((40, 4, 4), chunks=(1, 4, 4)).map_blocks(slow_or_wrong, dtype=float)
    with pytest.raises(ArithmeticError, match="cannot be made"):
        cg.save(xr.Dataset({"a": (("z", "y", "x"), array)}), tmp_path / "store")
    done = len(list(tmp_path.iterdir()))
    assert done < 10
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) == done
    assert not (tmp_path / "store.partial").exists()


def test_a_long_task_that_is_taken_back_ends(client, tmp_path):
    def work(number):
        from chunkglm.tasks import current_task

        task = current_task()
        (tmp_path / f"begun-{number}").touch()
        for _ in range(600 * number):
            time.sleep(0.05)
            try:
                task.refuse_if_taken_back()
            except ConnectionError:
                (tmp_path / f"ended-{number}").touch()
                raise

    calls = tasks.run_calls(client, work, [{"number": 0}, {"number": 1}])
    assert next(calls) == (0, None)
    while not (tmp_path / "begun-1").exists():
        time.sleep(0.01)
    calls.close()
    assert (tmp_path / "ended-1").exists()


def test_a_client_is_found_by_dask_s_own_rule(client):
    assert tasks.active_client() is client
    for scheduler in ("threads", "synchronous", dask.threaded.get):
        with dask.config.set(scheduler=scheduler):
            assert tasks.active_client() is None
    for scheduler in ("distributed", client, client.get):
        with dask.config.set(scheduler=scheduler):
            assert tasks.active_client() is client


# --------------------------------------------------------------------------------------------------- what passes through


def test_nothing_but_designs_and_messages_passes_through_client_and_scheduler(three, client, tmp_path):
    """At the sockets of both, for blocks of one size and four times that."""
    through = {}
    for times in (1, 4):
        folder = tmp_path / str(times)
        folder.mkdir()
        # The voxel blocks grow with the image, and the time blocks shrink with them: as many tasks, larger blocks.
        shape = (24 * (2 if times > 1 else 1), 28 * (2 if times > 1 else 1), 24)
        for session in (1, 2):
            simulate(folder, session, shape, 60)
        before = client.run_on_scheduler(counted)
        code, out, err = finish(start(folder, *words(folder / "out", "--scheduler", three.address, n_runs=2)))
        assert code == 0, err
        after = client.run_on_scheduler(counted)
        by_client = json.loads(out.partition("counted ")[2])
        by_scheduler = {kind: after[kind] - before[kind] for kind in after}
        runs = [cg.open_run(folder / "out" / "runs.zarr" / f"run-{n}") for n in (1, 2)]
        raw = sum(run["bold"].nbytes for run in runs)
        n_tasks = sum(run["bold"].data.npartitions for run in runs)
        through[times] = (sum(by_client.values()), sum(by_scheduler.values()), raw, n_tasks)
        print(
            f"\n{raw / 1e6:.1f} MB of signal in {n_tasks} chunks: {by_client} at the client, {by_scheduler} at the scheduler"
        )
    for by_client, by_scheduler, raw, _ in through.values():
        assert by_client < 0.1 * raw
        assert by_scheduler < 0.3 * raw
    (first_client, first, raw, n_tasks), (client_, second, more_raw, more_tasks) = through[1], through[4]
    assert more_raw > 3.5 * raw
    assert client_ < 1.5 * first_client * max(1, more_tasks / n_tasks)
    assert second < 1.5 * first * max(1, more_tasks / n_tasks)


# ------------------------------------------------------------------------------------------------------ lost and stopped


def happen(cluster, chance, what):
    """Something happens to a worker; it is there again when this returns."""
    name = chance.choice(list(cluster.processes))
    if what == "paused":
        cluster.signal(name, signal.SIGSTOP)
        # Shorter than the scheduler waits, or so long that it gives the work to others.
        time.sleep(chance.choice([0.3, 4.5]))
        cluster.signal(name, signal.SIGCONT)
        return
    cluster.signal(name, signal.SIGKILL if what == "killed" else signal.SIGTERM)
    try:
        # A worker that is asked to end waits for its task.
        cluster.processes[name].wait(2)
    except subprocess.TimeoutExpired:
        cluster.signal(name, signal.SIGKILL)
        cluster.processes[name].wait()
    cluster.start_worker(name)


def test_killed_paused_or_restarted_at_any_instant__no_bit_is_another(
    data, local, three, tmp_path, n_worker_kills
):
    chance = random.Random(3)
    n_chunks = len(finished_chunks(local))
    during = 0
    for number in range(n_worker_kills):
        what, output = ("killed", "paused", "restarted")[number % 3], tmp_path / "output"
        process = start(data, *words(output, "--scheduler", three.address))
        # From the start of the conversion to the maps.
        wanted = chance.uniform(-0.1, 1.0) * n_chunks
        while process.poll() is None:
            found = 0
            with suppress(FileNotFoundError):
                found = len(finished_chunks(output))
            if (output / "runs.zarr").exists() and found >= wanted:
                break
            time.sleep(0.002)
        during += process.poll() is None
        happen(three, chance, what)
        code, _, err = finish(process)
        assert code == 0, f"{what} with {found} of {n_chunks} chunks: {err}\n{three.logs()}"
        assert_same(output, local)
        shutil.rmtree(output)
        # One that was taken for dead ends when it finds out.
        for name, one in three.processes.items():
            if one.poll() is not None:
                three.start_worker(name)
    assert during > n_worker_kills / 2


def test_a_worker_that_sleeps_while_another_does_its_work(data, three, tmp_path):
    """A conversion is done again on another site; the one that sleeps finds its store there, and drops its own."""
    output = tmp_path / "study.zarr" / "run-1"
    options = {"mask": None, "t_r": None, "smoothing_fwhm": 5.0, "memory": 2**30, "n_threads": 1}
    code = (
        "import sys\n"
        "from chunkglm.convert import convert_run\n"
        "def hold(done, total):\n"
        "    print('here', flush=True); sys.stdin.readline()\n"
        f"convert_run({str(data / 'run1.nii.gz')!r}, {str(output)!r}, **{options}, overwrite=False, progress=hold, aside=True)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    sleeping = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], **pipes)
    assert sleeping.stdout.readline().strip() == b"here"
    with pytest.raises(BusyStoreError):
        stores.check_idle(output)
    convert_run(data / "run1.nii.gz", output, **options, overwrite=False, progress=None, aside=True)
    finished = contents(output)
    there = output.stat().st_ino
    stores.remove_abandoned(output)
    _, error = sleeping.communicate(b"\n" * 50, timeout=60)
    assert sleeping.returncode == 0, error
    assert output.stat().st_ino == there
    assert contents(output) == finished
    assert sorted(path.name for path in output.parent.iterdir()) == ["run-1", "zarr.json"]
    cg.verify(output)


def test_what_others_made_of_something_else_is_not_taken_for_ones_own(tmp_path):
    values = xr.Dataset({"a": (("z", "y", "x"), np.ones((2, 2, 2)))})
    place = tmp_path / "store"
    refused = pytest.raises(StoreExistsError, match="made by another process in the meantime")
    with refused, stores.writing(place, {"content": "mine"}, overwrite=False) as writer:
        writer.create(values, stores.chunk_shapes(values))
        writer.finish({"content": "mine"})
        shutil.copytree(tmp_path / "store.partial" / "store", place)
        root = json.loads((place / "zarr.json").read_text())
        root["attributes"]["chunkglm_made_of"] = {"content": "another's"}
        (place / "zarr.json").write_text(json.dumps(root))


def test_a_task_of_a_store_that_was_given_up_writes_nothing(tmp_path):
    """As on a worker that slept: neither in the folder of the unfinished store, nor in that of the finished one."""
    values = stores.savable(xr.Dataset({"a": (("z", "y", "x"), da.ones((2, 2, 2), chunks=(1, 2, 2)))}))
    place = tmp_path / "store"
    cut_off = pytest.raises(KeyboardInterrupt)
    with cut_off, stores.writing(place, {"content": "1"}, overwrite=False) as writer:
        writer.create(values, stores.chunk_shapes(values))
        late = pickle.dumps(writer._target("a"))
        raise KeyboardInterrupt
    before = contents(tmp_path)
    with pytest.raises(StoreError, match="given up or finished meanwhile"):
        pickle.loads(late).write_block((0, 0, 0), np.full((1, 2, 2), 7.0))
    assert contents(tmp_path) == before
    # Nor while the same store, or another one, is built there again.
    with stores.writing(place, {"content": "2"}, overwrite=True) as writer:
        writer.create(values, stores.chunk_shapes(values))
        with pytest.raises(StoreError):
            pickle.loads(late).write_block((0, 0, 0), np.full((1, 2, 2), 7.0))
        write_blocks([writer.blocks(values)])
        writer.finish({"content": "2"})
    with pytest.raises(StoreError):
        pickle.loads(late).write_block((0, 0, 0), np.full((1, 2, 2), 7.0))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert float(cg.open_store(place)["a"].max()) == 1


def test_maps_of_a_job_that_is_over_do_not_get_their_place(local, tmp_path):
    folder = tmp_path / "maps"
    with stages.maps_workplace(folder) as workplace:
        assert workplace.is_dir()
    asked = {"fit": str(local / "fit.zarr"), "folder": str(folder), "workplace": str(workplace)}
    with pytest.raises(StoreError, match="given up or finished meanwhile"):
        stages._maps_task(
            **asked, name="a", definition="SSt", label=None, precision_weighted=False, options={}
        )
    assert list(folder.iterdir()) == []


def test_a_client_that_is_interrupted_takes_its_work_back(data, local, three, client, tmp_path):
    """Workers stop within a moment, so that the same command can go on at once."""
    output = tmp_path / "output"
    process = start(data, *words(output, "--scheduler", three.address))
    while process.poll() is None and not list(output.glob("runs.zarr/*.partial/store/bold/c/*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 1
    assert "Stopped: nothing that was complete is lost" in err
    end = time.monotonic() + 30
    while any(client.run(lambda dask_worker: len(dask_worker.state.executing)).values()):
        assert time.monotonic() < end
        time.sleep(0.05)
    code, _, err = finish(start(data, *words(output, "--scheduler", three.address)))
    assert code == 0, err
    assert_same(output, local)


# ------------------------------------------------------------------------------------------------------------- wrong use


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in arguments])
    assert end.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--scheduler", "sloth"], r"'sloth'; it must be threads, processes, slurm, or the address"),
        (["--workers", "2"], r"--n-threads\), or have worker processes: --scheduler processes"),
        (["--performance-report", "x.html"], "threads have none"),
        (["--scheduler", "processes", "--n-threads", "2"], "Give the number of processes with --workers"),
    ],
)
def test_options_that_cannot_be_meant(options, says, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(data)
    assert re.search(says, fails(capsys, *words(tmp_path / "x", *options)))
    assert re.search(
        says, fails(capsys, "contrast", tmp_path / "fit", "--contrast", "a", "--output", "y", *options)
    )
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_that_is_not_there(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(data)
    monkeypatch.setattr(clusters, "SECONDS_TO_CONNECT", 0.5)
    message = fails(capsys, *words(tmp_path / "x", "--scheduler", "tcp://127.0.0.1:1"))
    assert "The scheduler tcp://127.0.0.1:1 cannot be reached" in message


def test_a_scheduler_without_workers(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(data)
    monkeypatch.setattr(clusters, "SECONDS_TO_WAIT", 0.5)
    with cluster_of(tmp_path / "cluster", 0) as lonely:
        message = fails(capsys, *words(tmp_path / "x", "--scheduler", lonely.address))
    assert f"has 0 workers after 0 s, and 1 are needed. Start some: dask worker {lonely.address}" in message


def test_workers_that_are_not_alike_or_see_other_files(client, tmp_path, monkeypatch):
    clusters.check_versions(client)
    monkeypatch.setattr(clusters, "__version__", "0.0.1")
    with pytest.raises(
        ClusterError, match=r"has chunkglm .*, and this command chunkglm 0\.0\.1\. Results could"
    ):
        clusters.check_versions(client)
    clusters.check_paths(client, [tmp_path])
    with pytest.raises(ClusterError, match=r"does not see .*not-there and 1 more\. Workers read"):
        clusters.check_paths(client, [tmp_path, tmp_path / "not-there", tmp_path / "nor-that"])


def test_workers_with_more_threads_than_the_memory_holds(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(data)
    monkeypatch.setattr(job, "fit_threads", lambda asked, runs, models: min(asked.n_threads, 2))
    with cluster_of(tmp_path / "cluster", 1, n_threads=3) as wide:
        message = fails(capsys, *words(tmp_path / "x", "--scheduler", wide.address))
    assert "Workers have 3 threads, and 2GiB for each worker hold 2 voxel blocks at a time" in message
    assert "--nthreads 2" in message


@pytest.mark.parametrize(
    ("package", "scheduler", "extra"),
    [
        ("distributed", "processes", "cluster"),
        ("dask_jobqueue", "slurm", "hpc"),
        ("bokeh", "processes", "cluster"),
    ],
)
def test_a_package_that_is_missing(package, scheduler, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    report = tmp_path / "x.html" if package == "bokeh" else None
    computing = clusters.computing(
        scheduler, n_threads=1, memory=2**30, console=Console(quiet=True), performance_report=report
    )
    with pytest.raises(MissingDependencyError, match=rf"pip install 'chunkglm\[{extra}\]'"):
        computing.__enter__()


# ---------------------------------------------------------------------------------------------------------------- Slurm


def configured(**options):
    return dask.config.set({f"jobqueue.slurm.{key}": value for key, value in options.items()})


SLURM_LINES = {"queue": "short", "account": "imaging", "walltime": "02:00:00"}


def test_slurm__the_job_script_asks_for_what_was_said():
    pytest.importorskip("dask_jobqueue")
    with configured(**SLURM_LINES), clusters.slurm_cluster(4, 6 * 2**30) as cluster:
        script = cluster.job_script()
    lines = script.splitlines()
    assert {"#SBATCH -p short", "#SBATCH -A imaging", "#SBATCH -t 02:00:00", "#SBATCH -n 1"} <= set(lines)
    assert "#SBATCH --cpus-per-task=4" in lines
    (memory,) = (
        int(line.split("=")[1].removesuffix("G")) for line in lines if line.startswith("#SBATCH --mem=")
    )
    assert 6 < memory <= 7
    (command,) = (line for line in lines if "dask_worker" in line)
    assert command.startswith(sys.executable)
    assert "--nthreads 4" in command
    assert "--nworkers" not in command
    assert "tcp://" in command


def test_slurm__dask_s_own_configuration_comes_first():
    pytest.importorskip("dask_jobqueue")
    options = {"cores": 8, "processes": 8, "memory": "32GiB"}
    with configured(**SLURM_LINES, **options), clusters.slurm_cluster(1, 2**30) as cluster:
        script = cluster.job_script()
    assert "#SBATCH --cpus-per-task=8" in script
    assert "#SBATCH --mem=32G" in script
    assert "--nthreads 1" in script
    assert "--nworkers 8" in script
    assert "--memory-limit 4.00GiB" in script


def test_slurm__what_cannot_be_asked_for():
    pytest.importorskip("dask_jobqueue")
    refused = pytest.raises(ClusterError, match=r"Slurm jobs cannot be prepared: .*jobqueue\.yaml")
    with configured(memory="much"), refused:
        clusters.slurm_cluster(1, 2**30)


# ------------------------------------------------------------------------------------------------------------- watching


def lines_of(work, **options):
    """What a stage prints where there is no terminal."""
    console = Console(file=io.StringIO(), width=200, force_terminal=False, force_jupyter=False)
    with clusters.stage(console, "Fitting", "blocks", **options) as progress:
        work(progress)
    return console.file.getvalue().splitlines()


def test_progress_in_a_log__a_line_soon_and_then_at_intervals_and_one_at_the_end(monkeypatch):
    monkeypatch.setattr(clusters, "FIRST_LINE", 0.05)
    monkeypatch.setattr(clusters, "SECONDS_BETWEEN_LINES", 0.2)

    def work(progress):
        time.sleep(0.1)
        progress(1, 4)
        time.sleep(0.6)
        progress(4, 4)
        time.sleep(0.3)

    lines = lines_of(work, n_bytes=400 * 2**20)
    assert lines[0].startswith("Fitting: begun 0 s ago")
    assert all("Fitting: 1 of 4 blocks, about " in line for line in lines[1:-1])
    assert lines[-1].startswith("Fitting: 4 of 4 blocks, ")
    assert 3 <= len(lines) <= 6
    assert all("MiB in use" in line for line in lines)
    assert all("MiB/s" in line for line in lines[1:])
    (rate,) = (float(part.split()[0]) for part in lines[-1].split(", ") if part.endswith("MiB/s"))
    assert 100 < rate < 400 / 0.7 + 1


def test_progress_of_units_without_a_size():
    lines = lines_of(lambda progress: progress(3, 3))
    assert len(lines) == 1
    assert " blocks/s" in lines[0]


def test_progress_on_a_terminal_is_a_bar():
    console = Console(force_terminal=True, width=160, file=io.StringIO(), record=True)
    with clusters.stage(console, "Fitting", "blocks") as progress:
        progress(1, 2)
        progress(2, 2)
    shown = console.export_text()
    assert "2/2" in shown
    assert "in use" in shown


def test_progress_in_a_notebook_is_one_line_that_changes(monkeypatch):
    display = pytest.importorskip("IPython.display", reason="IPython is not installed")
    shown = []

    class Handle:
        def update(self, content, raw):
            assert raw
            shown[-1] = content["text/plain"]

    def show(content, raw, display_id):
        assert raw
        assert display_id
        shown.append(content["text/plain"])
        return Handle()

    monkeypatch.setattr(display, "display", show)
    with clusters.stage(Console(force_jupyter=True), "Fitting", "blocks") as progress:
        assert re.fullmatch(r"Fitting: begun \d+ s ago, .* in use", shown[0])
        progress(1, 3)
        progress(3, 3)
    assert len(shown) == 1
    assert shown[0].startswith("Fitting: 3 of 3 blocks")


def test_memory_is_that_of_the_workers(client):
    there = clusters.memory_in_use()
    with dask.config.set(scheduler="threads"):
        here = clusters.memory_in_use()
    assert there > 3 * 50e6
    assert here > 50e6
    resident = sum(client.run(lambda dask_worker: dask_worker.monitor.get_process_memory()).values())
    assert there == pytest.approx(resident, rel=0.3)


def test_watch__for_notebooks(tmp_path, capsys):
    ds = xr.Dataset({"a": (("z", "y", "x"), da.ones((4, 2, 2), chunks=(1, 2, 2)))})
    with cg.watch("Saving") as progress:
        cg.save(ds, tmp_path / "store", progress=progress)
    assert "Saving: 4 of 4 blocks" in capsys.readouterr().err


def test_check_scheduler_names_what_is_accepted():
    clusters.check_scheduler("tls://host:8786", None, None)
    with pytest.raises(InputError, match="at least 1"):
        clusters.check_scheduler("processes", 0, None)
