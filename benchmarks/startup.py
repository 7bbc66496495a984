"""Starting up: ``import chunkglm`` against importing what it stands on."""

from __future__ import annotations

import argparse

from benchmarks import _compare


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks startup", description=__doc__)
    _compare.add_options(parser, repeats=15)
    options = parser.parse_args(arguments)
    statements = {
        "xarray, dask.array, zarr, nibabel": "import xarray, dask.array, zarr, nibabel",
        "chunkglm": "import chunkglm",
        "the command line": "import chunkglm.cli",
        "nilearn.glm.first_level": "import nilearn.glm.first_level",
    }
    commands = [_compare.Command(name, [_compare.PYTHON, "-c", code]) for name, code in statements.items()]
    found = _compare.take_turns(commands, options.repeats, warmup=max(options.warmup, 1))
    print(_compare.describe_machine() + "\n")
    base = "xarray, dask.array, zarr, nibabel"
    _compare.print_comparison(found, base, {"chunkglm": "0.83 to 0.95 (their time over ours)"})
