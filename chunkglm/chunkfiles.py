"""Chunks of local stores as files: encoded and decoded where they lie, without the copies between.

A chunk is Zarr's: values in C order, little-endian, through Blosc (lz4 at level 1, byte shuffle), with the CRC32C of the
compressed bytes behind them. What is written here, any reader of Zarr reads, and the other way round; through this module,
a thread reads into memory that it has already, checks once, and decompresses into the array that it hands out.
"""

from __future__ import annotations

import math
import sys
import threading
import uuid
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import google_crc32c
import numpy as np
from numcodecs import blosc

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CNAME, CLEVEL, SHUFFLE = "lz4", 1, "shuffle"
"""See ``benchmarks/README.md`` for why these."""

CHECKSUM_BYTES = 4
PARTIAL = ".partial"

_scratch = threading.local()


class Entry(NamedTuple):
    """A file of a store in its manifest."""

    size: int
    crc32c: int


class ChunkProblemError(Exception):
    """What is wrong with a chunk; the caller knows of which store."""


def is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether values of a dtype lie in a chunk as they lie in memory."""
    return dtype.kind in "biuf" and dtype.isnative and sys.byteorder == "little"


def write_chunk(path: Path, values: NDArray[Any], shape: tuple[int, ...], workplace: Path) -> None:
    """Write one chunk; its file has its name when it is complete.

    Parameters
    ----------
    path : Path
        Of the file; its folder is made, within that of the array, if it is not there.
    values : ndarray
        At most of the chunk's shape; zeros fill the rest, which lies outside of the array.
    shape : tuple of int
        Of the chunk.
    workplace : Path
        Folder on the same file system where the file is written, under a name of its own, before it gets its place. It is
        never made here: who takes it away stops every writer, also one that was stopped in the middle and goes on later.

    Raises
    ------
    FileNotFoundError
        If the workplace, or the array, is not there any more.
    """
    compressed, checksum = (
        _encode_constant(values, shape) if not any(values.strides) else _encode(values, shape)
    )
    partial = workplace / f"{uuid.uuid4().hex}{PARTIAL}"
    with partial.open("wb", buffering=0) as file:
        for content in (compressed, checksum):
            view = memoryview(content)
            while view:
                view = view[file.write(view) :]
    try:
        partial.replace(path)
    except FileNotFoundError:
        _make_folder(path.parent)
        partial.replace(path)


def _make_folder(folder: Path) -> None:
    """Make the folder of a chunk, but not that of its array: that is not there any more if the store was moved or removed."""
    upwards = [folder, *folder.parents]
    top = next((number for number, one in enumerate(upwards) if one.name == "c"), 0)
    for one in reversed(upwards[: top + 1]):
        one.mkdir(exist_ok=True)


def _encode(values: NDArray[Any], shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Compressed bytes of a chunk, and their checksum."""
    if values.shape != shape:
        whole = np.zeros(shape, dtype=values.dtype)
        whole[tuple(slice(n) for n in values.shape)] = values
        values = whole
    values = np.ascontiguousarray(values)
    compressed = blosc.compress(values, CNAME.encode(), CLEVEL, blosc.SHUFFLE, 0, values.itemsize)
    return compressed, google_crc32c.value(compressed).to_bytes(CHECKSUM_BYTES, "little")


def _encode_constant(values: NDArray[Any], shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """The same of one value that was broadcast: blocks without a voxel are many, and all alike."""
    return _encoded_constant(values.flat[0].tobytes(), values.dtype.str, values.shape, shape)


@lru_cache(maxsize=16)
def _encoded_constant(
    value: bytes, dtype: str, inside: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[bytes, bytes]:
    return _encode(np.broadcast_to(np.frombuffer(value, dtype=dtype), inside), shape)


def read_chunk(path: Path, entry: Entry | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Read one chunk.

    Parameters
    ----------
    path : Path
    entry : Entry or None
        What the manifest says of the file, to hold it against.
    shape : tuple of int
        Of the chunk.
    dtype : numpy.dtype

    Returns
    -------
    ndarray
        A new array.

    Raises
    ------
    ChunkProblemError
        If the file is missing, or is not the one that was written.
    OSError
        If it cannot be read.
    """
    return _decode(_read(path, entry), shape, dtype, None if entry is None else entry.crc32c)


def decode_chunk(content: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Decode the bytes of one chunk.

    Parameters
    ----------
    content : bytes
    shape : tuple of int
        Of the chunk.
    dtype : numpy.dtype

    Returns
    -------
    ndarray
        A new array.

    Raises
    ------
    ChunkProblemError
        If the bytes are not a chunk of this shape.
    """
    if len(content) <= CHECKSUM_BYTES + 16:
        raise ChunkProblemError("was altered or cut off")
    return _decode(np.frombuffer(content, dtype=np.uint8), shape, dtype, None)


def _decode(
    content: NDArray[np.uint8], shape: tuple[int, ...], dtype: np.dtype[Any], expected: int | None
) -> NDArray[Any]:
    checksum = int.from_bytes(content[-CHECKSUM_BYTES:].tobytes(), "little")
    body = content[:-CHECKSUM_BYTES]
    if (expected is not None and checksum != expected) or google_crc32c.value(body) != checksum:
        raise ChunkProblemError("was altered or cut off")
    n_bytes = int.from_bytes(body[4:8].tobytes(), "little")
    if n_bytes != math.prod(shape) * dtype.itemsize:
        raise ChunkProblemError("has the wrong length")
    values = np.empty(shape, dtype=dtype)
    blosc.decompress(body, values)
    return values


def _read(path: Path, entry: Entry | None) -> NDArray[np.uint8]:
    """The bytes of a file, in this thread's scratch."""
    try:
        with path.open("rb", buffering=0) as file:
            size = path.stat().st_size if entry is None else entry.size
            buffer: NDArray[np.uint8] | None = getattr(_scratch, "buffer", None)
            if buffer is None or len(buffer) <= size:
                buffer = _scratch.buffer = np.empty(size + size // 4 + 1, dtype=np.uint8)
            # One byte more than there should be: a longer file shows.
            view, done = memoryview(cast("Any", buffer))[: size + 1], 0
            while got := file.readinto(view[done:]):
                done += got
    except FileNotFoundError as error:
        raise ChunkProblemError("is missing") from error
    if done != size or size <= CHECKSUM_BYTES + 16:
        raise ChunkProblemError("was altered or cut off")
    return buffer[:size]


def encode_chunk(values: NDArray[Any], shape: tuple[int, ...]) -> bytes:
    """Encode one chunk, for places that are no files.

    Parameters
    ----------
    values : ndarray
        At most of the chunk's shape; zeros fill the rest, which lies outside of the array.
    shape : tuple of int
        Of the chunk.

    Returns
    -------
    bytes
    """
    compressed, checksum = _encode(values, shape)
    return bytes(compressed) + checksum


def is_whole(path: Path, entry: Entry | None = None) -> bool:
    """Whether there is a chunk file that is whole in itself, and the one that an entry of a manifest tells of."""
    try:
        content = _read(path, entry)
    except (ChunkProblemError, OSError):
        return False
    checksum = int.from_bytes(content[-CHECKSUM_BYTES:].tobytes(), "little")
    return (entry is None or checksum == entry.crc32c) and google_crc32c.value(
        content[:-CHECKSUM_BYTES]
    ) == checksum


def is_whole_content(content: bytes) -> bool:
    """Whether the bytes of a chunk are whole in themselves."""
    checksum = int.from_bytes(content[-CHECKSUM_BYTES:], "little")
    return len(content) > CHECKSUM_BYTES and google_crc32c.value(content[:-CHECKSUM_BYTES]) == checksum
