"""The benchmarks run, at toy size, so that none rots."""

import importlib
import re
import sys
import time

import pytest

from benchmarks import (
    _compare,
    _limits,
    _study,
    ar_orders,
    calibration,
    larger_than_memory,
    memory,
    picture,
    scale,
    store_layouts,
)
from chunkglm.testing import write_simulated_run

SIZE = ["--shape", "12", "14", "10", "--volumes", "40", "--voxels", "300"]
ONCE = ["--repeats", "1", "--warmup", "0"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    pytest.importorskip("resource", reason="processes are measured on systems with getrusage")
    monkeypatch.setattr(_study, "CACHE", tmp_path)
    return tmp_path


def rows_of(text):
    """Cells of the tables in a text, without their headings, by the first cell."""
    lines = [line.strip("|").strip().split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {
        cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines if "wall s" not in cells[:2]
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "whole_job",
            ["nilearn", "chunkglm run --no-report", "... --memory 256MiB", "... with report and pictures"],
        ),
        # As refit, with other noise.
        ("ar_orders", ["nilearn ar2", "chunkglm fit ar2"]),
        ("new_contrasts", ["nilearn: fit and 20 contrasts", "chunkglm: 20 contrasts of a saved fit"]),
        (
            "convert",
            [
                "inflate alone",
                "chunkglm's imports, and inflate",
                "chunkglm convert",
                "chunkglm convert --smoothing-fwhm 5",
            ],
        ),
        ("mask_size", ["imports alone", "the whole mask", "one per cent of it"]),
        ("workers", ["one worker", "two workers"]),
    ],
)
def test_comparison__prints_a_row_for_every_command(name, expected, capsys, monkeypatch):
    monkeypatch.setattr(ar_orders, "NOISE_MODELS", ("ar2",))
    importlib.import_module(f"benchmarks.{name}").main([*SIZE, *ONCE])
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == expected
    for cells in rows.values():
        wall, cpu = float(cells[0]), float(cells[1])
        assert wall > 0
        # A decompressor alone is done in no time.
        assert 0 <= cpu < 3 * wall


def test_startup__prints_a_row_for_every_import(capsys):
    importlib.import_module("benchmarks.startup").main(["--repeats", "1"])
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 4
    assert all("MiB" in cells[2] for cells in rows.values())


def test_take_turns__pairs_the_runs_of_commands_and_says_what_failed(capsys):
    order = []
    commands = [
        _compare.Command(name, [_compare.PYTHON, "-c", "pass"], lambda name=name: order.append(name))
        for name in "ab"
    ]
    found = _compare.take_turns(commands, 2, warmup=1)
    assert order == list("ababab")
    assert {name: len(runs) for name, runs in found.items()} == {"a": 2, "b": 2}
    pairs = {
        "a": [_compare.Measured(8.0, 1.0, 40), _compare.Measured(9.0, 1.0, 40)],
        "b": [_compare.Measured(2.0, 1.0, 10), _compare.Measured(3.0, 1.0, 20)],
    }
    _compare.print_comparison(pairs, "a")
    assert "3.50 (3.00-4.00) | 3.00 (2.00-4.00)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no such thing"):
        _compare.measure([_compare.PYTHON, "-c", "raise SystemExit('no such thing')"])


def test_store_layouts__prints_a_table_for_every_layout(tmp_path, capsys):
    write_simulated_run(tmp_path / "run.nii.gz", shape=(12, 14, 10), n_volumes=40)
    store_layouts.main([str(tmp_path / "run.nii.gz"), "--repeats", "1"])
    out = capsys.readouterr().out
    for name in store_layouts.layouts((40, 10, 14, 12)):
        assert out.count(f"| {name} |") == 2


def test_memory__prints_a_row_for_every_job(capsys, monkeypatch):
    monkeypatch.setattr(memory, "CASES", memory.CASES[4:5])
    memory.main([*SIZE, "--repeats", "1"])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 3
    measured_of_projected = float(lines[1].split(" | ")[8])
    assert 0 < measured_of_projected <= 1
    least = int(re.search(r"smallest budget: (\d+) MiB; (\d+) MiB: Error: ", out)[1])
    assert lines[3].startswith(f"| {least}MiB | ")
    assert lines[4].startswith("| 2GiB | ")


def test_scale__multiplies_what_it_measures(capsys):
    pytest.importorskip("distributed", reason="distributed is not installed")
    n_runs = 2
    scale.main([*SIZE, "--runs", str(n_runs), "--subjects", "10", "500", "--small-tasks", "50"])
    out = capsys.readouterr().out
    rows = rows_of(out)
    # One block of voxels: no more than three tasks for each run in each stage, one for the maps, and what they share.
    assert rows["convert"][0] == str(n_runs)
    assert n_runs <= int(rows["fit"][0]) <= 3 * n_runs + 1
    assert n_runs + 1 <= int(rows["contrast and fixed effects"][0]) <= 3 * n_runs + 1 + 6
    assert 50 <= int(rows["small tasks"][0]) <= 102
    tasks = sum(int(rows[name][0]) for name in ("convert", "fit", "contrast and fixed effects"))
    assert rows["tasks"][:3] == [f"{tasks:,}", f"{10 * tasks:,}", f"{500 * tasks:,}"]
    assert all(
        float(rows[name][1]) > 0 and float(rows[name][2]) > 0 for name in ("convert", "fit", "small tasks")
    )
    assert len(rows) == 4 + 12 + 2


def test_calibration__prints_and_draws_every_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "LENGTHS", (60,))
    picture = tmp_path / "picture.png"
    words = [
        "--voxels",
        "200",
        "--designs",
        "1",
        "--volumes",
        "60",
        "--censored",
        "60",
        "--picture",
        str(picture),
    ]
    calibration.main(words)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 4 * len(calibration.NOISE)
    assert sum("20% censored" in row[1] for row in rows) == 2 * len(calibration.NOISE)
    assert all(0 <= float(cell.strip("| ")) <= 1 for row in rows for cell in row[3:])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_picture__draws_the_ratios_of_tables(tmp_path):
    table = (
        "| command | wall s | cpu s | peak memory | times faster | times smaller | goal |\n"
        "|---|---|---|---|---|---|---|\n"
        "| theirs | 9.0 | 9.0 | 3.0 GiB |  |  |  |\n"
        "| ours | 1.0 (0.9-1.2) | 1.0 | 300 MiB | 9.0 (8.5-9.5) | 10.0 | 8 to 12 times; a tenth |\n"
        "| once | 1.0 | 1.0 | 300 MiB | 0.6 | 10.0 |  |\n"
    )
    assert picture.read_rows(table) == [
        picture.Row("ours", (8.5, 9.0, 9.5), (8.0, 12.0)),
        picture.Row("once", (0.6, 0.6, 0.6), None),
    ]
    (tmp_path / "results.txt").write_text(table)
    picture.main([str(tmp_path / "results.txt"), "--picture", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def kinds_of_limits():
    """That which is made where nothing is said, and the other one, if there are two."""
    if not sys.platform.startswith("linux"):
        pytest.skip("a hard limit on memory takes Linux")
    with _limits.hard_limit(2**30) as limit:
        return list(dict.fromkeys((limit.kind, "rlimit")))


def test_larger_than_memory__runs_every_job_and_leaves_the_study(kinds_of_limits, cache, capsys):
    words = [*SIZE, "--repeats", "1", "--limit", "1GiB", "--size", "500KiB"]
    larger_than_memory.main(words)
    out = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [cells[0] for cells in lines] == [
        "chunkglm run, fits",
        "chunkglm run, larger than memory",
        "nilearn",
    ]
    assert [cells[-1] for cells in lines] == ["finished"] * 3
    assert larger_than_memory.KINDS[kinds_of_limits[0]] in out
    assert "Less than 6 times the limit" in out
    assert "the same maps, to the last bit" in out
    assert sorted(path.name for path in (cache / larger_than_memory.FOLDER).iterdir()) == [
        "12x14x10_300_mask.nii.gz",
        "12x14x10x40_1.nii.gz",
        "12x14x10x40_1_design.npz",
        "12x14x10x40_2.nii.gz",
        "12x14x10x40_2_design.npz",
    ]


def test_larger_than_memory__removes_what_is_large_and_compares_with_what_fits(
    kinds_of_limits, cache, capsys, monkeypatch
):
    monkeypatch.setattr(larger_than_memory, "KEPT", 1)
    # Half of this memory is one run.
    monkeypatch.setattr(larger_than_memory, "available_memory", lambda: 2 * 4 * 12 * 14 * 10 * 40)
    words = [*SIZE, "--repeats", "1", "--limit", "1GiB", "--size", "500KiB"]
    larger_than_memory.main([*words, "--limit-by", kinds_of_limits[-1]])
    out = capsys.readouterr().out
    assert larger_than_memory.KINDS[kinds_of_limits[-1]] in out
    assert "| chunkglm run, fits | 262 KiB |" in out
    assert "| chunkglm run, larger than memory | 525 KiB |" in out
    assert "the same maps" not in out
    assert sorted(path.name for path in (cache / larger_than_memory.FOLDER).iterdir()) == [
        "12x14x10_300_mask.nii.gz",
        "12x14x10x40_1.nii.gz",
        "12x14x10x40_1_design.npz",
    ]


def test_larger_than_memory__refuses_what_the_disk_cannot_hold(cache):
    with pytest.raises(SystemExit, match=r"A study of \d+ runs takes \d+\.\d TiB .* are free"):
        larger_than_memory.main([*SIZE, "--size", "100TiB"])
    assert not list(cache.glob("*/*_2.nii.gz"))


def test_larger_than_memory__ends_a_job_before_the_disk_is_full(cache, monkeypatch):
    monkeypatch.setattr(larger_than_memory, "disk_trouble", lambda: "nearly full")
    started = time.perf_counter()
    with pytest.raises(SystemExit, match="nearly full"):
        larger_than_memory.run_free([_compare.PYTHON, "-c", "import time; time.sleep(60)"])
    assert time.perf_counter() - started < 50


def test_hard_limit__ends_a_process_that_takes_more_and_no_other(kinds_of_limits):
    too_much = {"cgroup": "killed by the system: out of memory", "rlimit": "MemoryError"}
    for kind in kinds_of_limits:
        for mebibytes, expected in ((16, "finished"), (400, too_much[kind])):
            with _limits.hard_limit(128 * 2**20, kind) as limit:
                words = [*limit.words, _compare.PYTHON, "-c", f"bytearray({mebibytes} << 20)"]
                measured, code, message = _compare.run_to_end(words)
                assert larger_than_memory.how_it_ended(code, message, limit) == expected
                assert (code != 0) == (expected != "finished")
                assert (limit.peak() or 0) <= 128 * 2**20
            assert measured.memory < 256 * 2**20
            assert limit.folder is None or not limit.folder.exists()


def test_own_cgroup__reads_both_versions(monkeypatch):
    def read(text):
        monkeypatch.setattr(_limits.Path, "read_text", lambda self, encoding: text)
        return _limits.own_cgroup()

    root = _limits.CGROUPS
    assert read("9:cpu,cpuacct:/a\n4:memory:/job/b\n0::/\n") == (root / "memory" / "job" / "b", 1)
    assert read("0::/user.slice/c\n") == (root / "user.slice" / "c", 2)
