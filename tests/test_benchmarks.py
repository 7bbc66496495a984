"""The benchmarks run, at toy size, so that none rots."""

import importlib

import pytest

from benchmarks import _compare, _study, calibration, memory, picture, store_layouts
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
        ("refit", ["nilearn ar1", "chunkglm fit ar1"]),
        ("ar_orders", [f"{what} ar{n}" for n in (1, 2, 3) for what in ("nilearn", "chunkglm fit")]),
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
def test_comparison__prints_a_row_for_every_command(name, expected, capsys):
    importlib.import_module(f"benchmarks.{name}").main([*SIZE, *ONCE])
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == expected
    for cells in rows.values():
        wall, cpu = float(cells[0]), float(cells[1])
        assert wall > 0
        # A decompressor alone is done in no time.
        assert 0 <= cpu < 3 * wall


def test_startup__prints_a_row_for_every_import(capsys):
    importlib.import_module("benchmarks.startup").main(["--repeats", "2"])
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
    monkeypatch.setattr(memory, "CASES", memory.CASES[2:5])
    memory.main(SIZE)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 4


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
