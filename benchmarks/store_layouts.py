"""Chunk shapes and codecs of a run store, on a real run.

Writes the run in each layout and reads it back as the fit does (time blocks of a slab, slab by slab, from two threads), one
voxel's time course and one volume. All layouts take turns, several times; the table has the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec, ZstdCodec

from chunkglm.kernels.smoothing import make_scratch, make_smoother, sigma_voxels, smooth_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


def _blosc(cname: str, level: int, shuffle: str) -> list[Any]:
    return [BloscCodec(cname=cname, clevel=level, shuffle=shuffle)]


def layouts(shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """The layouts to compare: arguments of zarr.create_array by name."""
    n_time, n_z, n_y, n_x = shape
    block = (min(32, n_time), min(16, n_z), n_y, n_x)
    crc = [Crc32cCodec()]
    return {
        "(32, 16, Y, X) lz4-1 bitshuffle + crc32c": {
            "chunks": block,
            "compressors": _blosc("lz4", 1, "bitshuffle") + crc,
        },
        "(32, 16, Y, X) lz4-1 bitshuffle": {"chunks": block, "compressors": _blosc("lz4", 1, "bitshuffle")},
        "(32, 16, Y, X) lz4-1 shuffle + crc32c": {
            "chunks": block,
            "compressors": _blosc("lz4", 1, "shuffle") + crc,
        },
        "(32, 16, Y, X) zstd-1 bitshuffle + crc32c": {
            "chunks": block,
            "compressors": _blosc("zstd", 1, "bitshuffle") + crc,
        },
        "(32, 16, Y, X) zstd-3, zarr's default": {"chunks": block, "compressors": [ZstdCodec(level=3)]},
        "(32, 8, Y, X) lz4-1 bitshuffle + crc32c": {
            "chunks": (block[0], min(8, n_z), n_y, n_x),
            "compressors": _blosc("lz4", 1, "bitshuffle") + crc,
        },
        "(64, 16, Y, X) lz4-1 bitshuffle + crc32c": {
            "chunks": (min(64, n_time), block[1], n_y, n_x),
            "compressors": _blosc("lz4", 1, "bitshuffle") + crc,
        },
        "(T, 16, 16, 16) lz4-1 bitshuffle + crc32c": {
            "chunks": (n_time, min(16, n_z), 16, 16),
            "compressors": _blosc("lz4", 1, "bitshuffle") + crc,
        },
        "(32, 16, Y, X) time last on disk, lz4-1 bitshuffle + crc32c": {
            "chunks": block,
            "filters": [TransposeCodec(order=(1, 2, 3, 0))],
            "compressors": _blosc("lz4", 1, "bitshuffle") + crc,
        },
    }


def _measure(data: NDArray[Any], options: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        array = zarr.create_array(folder, shape=data.shape, dtype=data.dtype, **options)
        n_time, n_slab = array.chunks[0], array.chunks[1]
        slabs = range(0, data.shape[1], n_slab)
        blocks = [(t, z) for t in range(0, data.shape[0], n_time) for z in slabs]

        def write(place: tuple[int, int]) -> None:
            where = (slice(place[0], place[0] + n_time), slice(place[1], place[1] + n_slab))
            array[where] = data[where]

        def read_slab(z: int) -> None:
            for t in range(0, data.shape[0], n_time):
                _ = array[t : t + n_time, z : z + n_slab]

        seconds = {
            "write": _time(lambda: list(pool.map(write, blocks))),
            "read": _time(lambda: list(pool.map(read_slab, slabs))),
            "voxel": _time(lambda: array[:, data.shape[1] // 2, data.shape[2] // 2, data.shape[3] // 2]),
            "volume": _time(lambda: array[data.shape[0] // 2]),
        }
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    megabytes = data.nbytes / 1e6
    return {
        "write MB/s": megabytes / seconds["write"],
        "read MB/s": megabytes / seconds["read"],
        "voxel ms": 1e3 * seconds["voxel"],
        "volume ms": 1e3 * seconds["volume"],
        "ratio": data.nbytes / stored,
    }


def _time(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _smoothed(data: NDArray[Any], sizes: Sequence[float]) -> NDArray[Any]:
    smoother = make_smoother(data.shape[1:], sigma_voxels(5.0, sizes), data.dtype)
    scratch, out = make_scratch(smoother), np.empty(data.shape, dtype=np.float32)
    for volume, made in zip(data, out, strict=True):
        smooth_volume(volume, smoother, scratch, made)
    return out


def main(arguments: list[str]) -> None:
    """Print the tables for the raw and for the smoothed run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks store_layouts", description=__doc__)
    real = os.environ.get("CHUNKGLM_REAL_DATA", ".")
    parser.add_argument(
        "run", nargs="?", default=str(Path(real) / "oneback" / "run1.nii.gz"), help="4-D NIfTI"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    image = nib.load(options.run)
    raw = np.ascontiguousarray(image.dataobj.get_unscaled().T)
    signals = {f"raw {raw.dtype}": raw, "smoothed float32": _smoothed(raw, image.header.get_zooms()[2::-1])}
    for title, data in signals.items():
        results: dict[str, list[dict[str, float]]] = {name: [] for name in layouts(data.shape)}
        for _ in range(options.repeats):
            for name, layout in layouts(data.shape).items():
                results[name].append(_measure(data, layout))
        print(
            f"\n{Path(options.run).name}, {title}, {data.shape}, {data.nbytes / 1e6:.0f} MB, {options.repeats} repeats\n"
        )
        columns = list(results[next(iter(results))][0])
        print("| layout | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
        for name, rows in results.items():
            medians = [statistics.median(row[column] for row in rows) for column in columns]
            print(
                f"| {name} | "
                + " | ".join(f"{m:.0f}" if m >= 20 else f"{m:.2g}" if m < 1 else f"{m:.1f}" for m in medians)
                + " |"
            )
