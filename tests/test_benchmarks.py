"""The benchmarks run, at toy size, so that none rots."""

import pytest

from benchmarks import calibration, memory, store_layouts
from chunkglm.testing import write_simulated_run


def test_store_layouts__prints_a_table_for_every_layout(tmp_path, capsys):
    write_simulated_run(tmp_path / "run.nii.gz", shape=(12, 14, 10), n_volumes=40)
    store_layouts.main([str(tmp_path / "run.nii.gz"), "--repeats", "1"])
    out = capsys.readouterr().out
    for name in store_layouts.layouts((40, 10, 14, 12)):
        assert out.count(f"| {name} |") == 2


def test_memory__prints_a_row_for_every_job(tmp_path, capsys, monkeypatch):
    pytest.importorskip("resource", reason="peak memory is measured on systems with getrusage")
    monkeypatch.setattr(memory, "CACHE", tmp_path)
    memory.main(["--shape", "12", "14", "10", "--volumes", "40"])
    assert capsys.readouterr().out.count("\n| ") == 6


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
