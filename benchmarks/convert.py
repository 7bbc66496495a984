"""Conversion against inflating the file alone, with what the hash of the file takes, and nothing else."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks import _compare, _study


def inflate(path: str) -> None:
    """Read a compressed file to its end, as fast as the installed decompressor allows."""
    try:
        from isal import igzip
    except ImportError:
        import gzip as igzip  # type: ignore[no-redef]
    buffer = bytearray(2**18)
    with igzip.open(path, "rb") as stream:
        while stream.readinto(buffer):
            pass


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks convert", description=__doc__)
    _study.add_options(parser, n_runs=1)
    _compare.add_options(parser, repeats=5)
    options = parser.parse_args(arguments)
    study = _study.study_of(options)
    with tempfile.TemporaryDirectory(dir=_study.CACHE) as folder:
        place = Path(folder)
        ours = [_compare.PYTHON, "-m", "chunkglm", "-q", "convert", str(study.runs[0]), f"{place}/run.zarr"]
        ours += ["--mask", str(study.mask)]

        def clear() -> None:
            shutil.rmtree(place / "run.zarr", ignore_errors=True)

        smoothed = [*ours, "--smoothing-fwhm", "5"]
        imports = "import chunkglm.cli, benchmarks.convert as c; c.inflate"
        commands = [
            _compare.Command(
                "inflate alone", [_compare.PYTHON, "-m", "benchmarks.convert", str(study.runs[0])], clear
            ),
            _compare.Command(
                "chunkglm's imports and inflate",
                [_compare.PYTHON, "-c", f"{imports}({str(study.runs[0])!r})"],
            ),
            _compare.Command("chunkglm convert", ours, clear),
            _compare.Command("chunkglm convert --smoothing-fwhm 5", smoothed, clear),
        ]
        found = _compare.take_turns(commands, options.repeats, warmup=options.warmup, touch=options.touch)
    print(_compare.describe_machine() + "\n")
    _compare.print_comparison(found, "inflate alone", {"chunkglm convert": "0.5 to 0.8 (its time over ours)"})


if __name__ == "__main__":
    inflate(sys.argv[1])
