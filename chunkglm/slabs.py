"""Slabs of NIfTI files, read in any order without the bytes between them.

The slices of a run lie behind each other in its file, each in one piece, so what is picked along time and z is a
list of slice numbers, and those that follow one another are one read. Of a compressed file copies of the decompressor
are kept from places that it came by, and reading goes on from the last one before what is asked for.
"""

from __future__ import annotations

import os
import threading
import weakref
import zlib
from collections import OrderedDict
from contextlib import contextmanager
from functools import partial
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chunkglm.nifti import PIECE, cut_off

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from chunkglm.nifti import Location

    Array = NDArray[Any]
    Read = Callable[[int, memoryview], None]

READ = 8 * 2**20
"""Bytes that are read at a time, but at least one slice."""

SPACING, POINTS = 2**20, 256
"""Bytes between the copies of a decompressor, unless that makes more copies than this; each takes some 42 KiB."""

OPEN_FILES = 8
"""Compressed files that a process keeps open, with their copies."""


def read_slab(place: Location, key: Sequence[int | slice | Array]) -> Array:
    """Read a part of an image.

    Only the slices that are asked for are read; of a compressed file, what lies a little before them is decompressed as
    well, and, the first time, all that lies before. Any number of threads may read at the same time.

    Parameters
    ----------
    place : Location
        Where the image lies.
    key : sequence
        Along time, z, y and x a number, a slice or a sorted array of numbers, each by itself (outer indexing).

    Returns
    -------
    ndarray
        Physical values: float64 where the header scales, else the dtype of the file in native byte order. Along a
        number there is no dimension.

    Raises
    ------
    SourceNotFoundError, SourceReadError, NiftiError
        If the file is gone, changed since it was located, is cut off or damaged.
    """
    times, slices, rows, columns = (
        np.atleast_1d(np.arange(length)[one]) for length, one in zip(place.shape, key, strict=True)
    )
    numbers = (times[:, np.newaxis] * place.shape[1] + slices).ravel()
    values = np.empty((numbers.size, rows.size, columns.size), dtype=values_dtype(place))
    if values.size:
        _read_slices(place, numbers, (_span(rows), _span(columns)), values)
    shape = (times.size, slices.size, rows.size, columns.size)
    kept = [length for length, one in zip(shape, key, strict=True) if not isinstance(one, (int, np.integer))]
    return values.reshape(kept)


def values_dtype(place: Location) -> np.dtype[Any]:
    """Dtype of physical values: the one that nibabel gives them, in native byte order."""
    return np.dtype(np.float64) if place.header.scaled else place.header.dtype.newbyteorder("=")


def release(place: Location) -> None:
    """Close the decompressors of a file in this process; they are opened again when they are needed."""
    with _opening:
        _inflaters.pop(_key(place), None)


def _span(numbers: Array) -> slice | Array:
    """A slice in place of numbers that follow one another, which costs numpy no copy."""
    if numbers.size and np.array_equal(numbers, np.arange(numbers[0], numbers[0] + numbers.size)):
        return slice(int(numbers[0]), int(numbers[0]) + numbers.size)
    return numbers


def _read_slices(place: Location, numbers: Array, inside: Sequence[slice | Array], values: Array) -> None:
    """Fill ``values`` with a part of the slices ``numbers`` of the file, counted through all volumes."""
    n_y, n_x = place.shape[2:]
    itemsize = place.header.dtype.itemsize
    slice_bytes = max(n_y * n_x * itemsize, 1)
    longest = max(READ // slice_bytes, 1)
    buffer = np.empty((min(longest, numbers.size), n_y, n_x), dtype=place.header.dtype)
    with place.open() as file, _reading(place, file) as read:
        for part in _pieces(numbers, longest):
            piece = buffer[: part.stop - part.start]
            read(place.header.data_offset + int(numbers[part.start]) * slice_bytes, _bytes_of(piece))
            _scale(piece[:, inside[0]][:, :, inside[1]], place, values[part])
        place.check(file)


def _bytes_of(array: Array) -> memoryview:
    view: Any = array.reshape(-1).view(np.uint8)
    return memoryview(view)


def _pieces(numbers: Array, longest: int) -> Iterator[slice]:
    """Yield parts of ``numbers`` that follow one another, at most ``longest`` of them."""
    start = 0
    for stop in [*(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]:
        for first in range(start, stop, longest):
            yield slice(first, min(first + longest, stop))
        start = stop


def _scale(stored: Array, place: Location, values: Array) -> None:
    """Write physical values, as nibabel makes them."""
    slope, intercept = place.header.slope, place.header.intercept
    if not place.header.scaled:
        values[...] = stored
        return
    with np.errstate(all="ignore"):
        np.multiply(stored, slope, out=values, dtype=np.float64)
        # Adding zero would make zero of a negative zero.
        if intercept:
            values += intercept


# ------------------------------------------------------------------------------------------------ bytes of a file


@contextmanager
def _reading(place: Location, file: IO[bytes]) -> Iterator[Read]:
    """Give a function that fills a buffer with what begins at a byte of the data, decompressed where it is not."""
    if not place.compressed:
        yield partial(_read_plain, place, file)
        return
    inflater = _inflater(place)
    with inflater.lock:
        yield inflater.read


def _read_plain(place: Location, file: Any, start: int, view: memoryview) -> None:
    done = 0
    try:
        file.seek(start)
        while done < len(view) and (got := file.readinto(view[done:])):
            done += got
    except OSError as error:
        raise _cut_off(place, start + done, error) from error
    if done < len(view):
        raise _cut_off(place, start + done, None)


def _cut_off(place: Location, position: int, error: Exception | None) -> Exception:
    volumes = max(position - place.header.data_offset, 0) // place.header.volume_bytes
    return cut_off(place.name, place.header, volumes, error)


class _Point(NamedTuple):
    """A place in a gzip file where decompression can begin.

    Attributes
    ----------
    position : int
        Bytes that were decompressed before.
    offset : int
        Bytes of the file that were taken in for them.
    decompressor : zlib.Decompress
        As it was there.
    """

    position: int
    offset: int
    decompressor: Any


class _Inflater:
    """The decompressed bytes of a file, from any place; for one thread at a time, the one that holds ``lock``."""

    def __init__(self, place: Location) -> None:
        self.lock = threading.Lock()
        self._place = place
        self._end = place.header.data_offset + place.header.n_volumes * place.header.volume_bytes
        self._spacing = max(SPACING, self._end // POINTS)
        self._points = [_Point(0, 0, _new_decompressor())]
        self._file = place.open()
        weakref.finalize(self, self._file.close)
        # What the decompressor has come to, and what was read of the file beyond that.
        self._position = 0
        self._decompressor = self._points[0].decompressor.copy()
        self._input = b""

    def read(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``start`` on."""
        done = 0
        try:
            self._go_to(start)
            while self._position < start and self._next(start - self._position):
                pass
            while done < len(view) and (data := self._next(len(view) - done)):
                view[done : done + len(data)] = data
                done += len(data)
            if self._position == self._end:
                # The checksum lies behind the data.
                self._next(1)
        except (EOFError, OSError, zlib.error) as error:
            raise _cut_off(self._place, self._position, error) from error
        except BaseException:
            # The decompressor may have gone on without the count of its bytes: begin at a known place next time.
            self._position = -1
            raise
        if done < len(view):
            raise _cut_off(self._place, self._position, None)

    def _go_to(self, start: int) -> None:
        """Stand at the last place before ``start`` that is known, unless that is where decompression has come to."""
        point = next(point for point in reversed(self._points) if point.position <= start)
        if not point.position <= self._position <= start:
            self._position = point.position
            self._decompressor = point.decompressor.copy()
            self._file.seek(point.offset)
            self._input = b""

    def _next(self, length: int) -> bytes:
        """Decompress some bytes, ``length`` at most; none at the end of the file."""
        while True:
            data: bytes = self._decompressor.decompress(self._input, min(length, PIECE))
            self._input = self._decompressor.unconsumed_tail
            if data:
                self._position += len(data)
                self._remember()
                return data
            if self._decompressor.eof:
                # A gzip file may consist of several streams, and be filled up with zeros.
                self._input = self._decompressor.unused_data.lstrip(b"\0")
                self._input = self._input or self._file.read(PIECE).lstrip(b"\0")
                if not self._input:
                    return b""
                self._decompressor = _new_decompressor()
            elif not self._input:
                self._input = self._file.read(PIECE)
                if not self._input:
                    raise EOFError("it ends inside its compressed data")

    def _remember(self) -> None:
        if self._position >= self._points[-1].position + self._spacing and not self._decompressor.eof:
            offset = self._file.tell() - len(self._input)
            self._points.append(_Point(self._position, offset, self._decompressor.copy()))


def _new_decompressor() -> Any:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


_inflaters: OrderedDict[tuple[Any, ...], _Inflater] = OrderedDict()
"""What is open in this process, the last used at the end."""

_opening = threading.Lock()


def _key(place: Location) -> tuple[Any, ...]:
    # A forked process has the files of its parent, where both would read from one place.
    return os.getpid(), place.name, place.state


def _inflater(place: Location) -> _Inflater:
    """Find what is open of a file. What is forgotten for it is closed when its last reader is done with it."""
    with _opening:
        inflater = _inflaters.pop(_key(place), None) or _Inflater(place)
        _inflaters[_key(place)] = inflater
        while len(_inflaters) > OPEN_FILES:
            _inflaters.popitem(last=False)
    return inflater
