"""Conversion against inflating the file alone."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks import _compare, _study

INFLATE = """
import sys
try:
    from isal import igzip as gzip
except ImportError:
    import gzip
buffer = bytearray(2**18)
with gzip.open(sys.argv[1], "rb") as stream:
    while stream.readinto(buffer):
        pass
"""
"""A program that reads a compressed file to its end, as fast as the installed decompressor allows."""


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
        commands = [
            _compare.Command("inflate alone", [_compare.PYTHON, "-c", INFLATE, str(study.runs[0])], clear),
            _compare.Command(
                "chunkglm's imports, and inflate",
                [_compare.PYTHON, "-c", f"import chunkglm.cli\n{INFLATE}", str(study.runs[0])],
            ),
            _compare.Command("chunkglm convert", ours, clear),
            _compare.Command("chunkglm convert --smoothing-fwhm 5", smoothed, clear),
        ]
        found = _compare.take_turns(commands, options.repeats, warmup=options.warmup, touch=options.touch)
    print(_compare.describe_machine() + "\n")
    _compare.print_comparison(found, "inflate alone", {"chunkglm convert": "0.5 to 0.8 (its time over ours)"})
