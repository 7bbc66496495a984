"""NIfTI: headers, streaming reads, masks and maps, export. The only module that knows nibabel.

NIfTI data is x-fastest and time-slowest, so a C-ordered array ``(time, z, y, x)`` has the bytes of the file.
A run is read once from its first byte to its last, in blocks of whole volumes; the hash of the file falls out
of that pass.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import logging
import math
import os
import stat
import warnings
import zlib
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakValueDictionary

import nibabel as nib
import numpy as np
import xarray as xr

from chunkglm.errors import (
    ChunkGLMError,
    ChunkGLMWarning,
    InputError,
    MaskError,
    NiftiError,
    SourceNotFoundError,
    SourceReadError,
    StoreError,
    StoreExistsError,
)
from chunkglm.grids import (
    Grid,
    check_same_grid,
    grid_coords,
    grid_of,
    slice_affine,
    voxel_sizes,
    with_space,
)
from chunkglm.schema import SPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    Array = NDArray[Any]
    ImageLike = str | os.PathLike[str] | nib.spatialimages.SpatialImage

SUFFIXES = (".nii.gz", ".hdr.gz", ".img.gz", ".nii", ".hdr", ".img")

HEADER_LIMIT = 16 * 2**20
"""Bytes of header and extensions beyond which a file is not believed."""

VOXEL_LIMIT = 10**11
"""Values in an image beyond which a header is not believed."""

PIECE = 2**18
"""Bytes that are read from a file at a time."""

DEFLATE_LIMIT = 1032
"""How many bytes one byte of a gzip file can stand for, at most."""

_TIME_UNITS = {0: 1.0, 8: 1.0, 16: 1e3, 24: 1e6}
"""Per second, by the header's code: none, s, ms, us."""

_HEADERS: dict[tuple[int, str], Any] = {
    (348, "single"): nib.Nifti1Header,
    (348, "pair"): nib.nifti1.Nifti1PairHeader,
    (540, "single"): nib.nifti2.Nifti2Header,
    (540, "pair"): nib.nifti2.Nifti2PairHeader,
}
_MAGIC = {b"n+1\0": "single", b"ni1\0": "pair", b"n+2\0": "single", b"ni2\0": "pair"}
_SINGLE_MAGIC = {348: b"n+1", 540: b"n+2"}

_silent = logging.getLogger("chunkglm.nibabel")
_silent.disabled = True


# ---------------------------------------------------------------------------------------------------- headers


@dataclass(frozen=True)
class Header:
    """What a NIfTI header says, and its bytes.

    Attributes
    ----------
    raw : bytes
        The header with its extensions, exactly as in the file.
    shape : tuple of int
        Lengths along the file's dimensions: x, y, z, time.
    dtype : numpy.dtype
        Of the stored values, with the file's byte order.
    slope, intercept : float
        A stored value ``v`` means ``slope * v + intercept``; 1 and 0 where the header gives none.
    affine : ndarray, shape (4, 4)
        From voxel numbers to millimetres (RAS+): sform, else qform, else voxel sizes.
    t_r : float or None
        Repetition time in seconds, if the header has one.
    data_offset : int
        First byte of the data.
    """

    raw: bytes
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    slope: float
    intercept: float
    affine: NDArray[np.float64]
    t_r: float | None
    data_offset: int

    @property
    def scaled(self) -> bool:
        """Whether physical values differ from the stored ones."""
        return (self.slope, self.intercept) != (1.0, 0.0)

    @property
    def space_unit(self) -> str | None:
        """Unit of lengths that the header names; None if it names none."""
        code = int(parse_header(self.raw, "")["xyzt_units"]) & 7
        return {1: "metres", 2: "millimetres", 3: "micrometres"}.get(code)

    @property
    def volume_bytes(self) -> int:
        """Bytes of one volume."""
        return math.prod(self.shape[:3]) * self.dtype.itemsize

    @property
    def n_volumes(self) -> int:
        """Volumes behind each other in the file."""
        return math.prod(self.shape[3:])


def parse_header(raw: bytes, name: str) -> Any:
    """Make the nibabel header of the bytes ``raw``, unrepaired, in the class that fits version and kind.

    Raises
    ------
    NiftiError
        If the bytes are not a NIfTI header.
    """
    size, order = _header_size(raw, name)
    magic = raw[344:348] if size == 348 else raw[4:8]
    kind = _MAGIC.get(magic)
    if kind is None:
        old = " (it looks like Analyze 7.5, which has no reliable orientation)" if size == 348 else ""
        raise NiftiError(
            f"{name} is not a NIfTI file: its header has the magic {magic!r}{old}. Accepted are NIfTI-1 and "
            "NIfTI-2, as .nii, .nii.gz or a .hdr/.img pair. Convert the file, for example with nibabel or "
            "mrconvert."
        )
    return _HEADERS[size, kind](raw[:size], endianness=order, check=False)


def _header_size(raw: bytes, name: str) -> tuple[int, str]:
    """Length of the header, 348 for NIfTI-1 and 540 for NIfTI-2, and its byte order."""
    for order, byteorder in (("<", "little"), (">", "big")):
        size = int.from_bytes(raw[:4], cast("Any", byteorder))
        if size in {348, 540}:
            if len(raw) < size:
                raise NiftiError(
                    f"{name} is cut off: it ends inside its {size}-byte header. Copy or download it again."
                )
            return size, order
    raise NiftiError(
        f"{name} is not a NIfTI file: it does not begin with a NIfTI header. Accepted are NIfTI-1 and NIfTI-2, "
        "as .nii, .nii.gz or a .hdr/.img pair."
    )


def _describe(raw: bytes, name: str) -> Header:
    """Read and check the fields of a header that matter for a run."""
    header = parse_header(raw, name)
    n_dims = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : n_dims + 1]) if 1 <= n_dims <= 7 else ()
    if not shape or min(shape) < 1 or math.prod(shape) > VOXEL_LIMIT:
        raise NiftiError(
            f"{name} has the dimensions {[int(n) for n in header['dim']]} in its header, which cannot be right: "
            f"there must be 1 to 7, each positive, and at most {VOXEL_LIMIT:.0e} values. The header is damaged; "
            "export the image again."
        )
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    try:
        dtype = np.dtype(header.get_data_dtype())
    except (nib.spatialimages.HeaderDataError, KeyError):
        dtype = np.dtype(object)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise NiftiError(
            f"{name} holds values of NIfTI type code {int(header['datatype'])}; accepted are the real types of "
            "up to 64 bits (int8 to int64, uint8 to uint64, float32, float64). Convert the image to one of these."
        )
    try:
        with np.errstate(all="ignore"):
            # The field's readers repair small mistakes before they use a header; the bytes are kept as they are.
            fixed = header.copy()
            fixed.check_fix(logger=_silent, error_level=40)
            affine = np.asarray(fixed.get_best_affine(), dtype=np.float64)
            slope, intercept = fixed.get_slope_inter()
            data_offset = int(header["vox_offset"])
    except (nib.spatialimages.HeaderDataError, ValueError, OverflowError) as error:
        raise NiftiError(
            f"{name} has a header that cannot be used: {error}. Repair it or export the image again."
        ) from error
    _check_affine(affine, name)
    _check_extensions(raw, header, name)
    return Header(
        raw=raw,
        shape=shape,
        dtype=dtype,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if slope is None or intercept is None else float(intercept),
        affine=affine,
        t_r=_repetition_time(header, len(shape)),
        data_offset=data_offset,
    )


def _check_affine(affine: NDArray[np.float64], name: str) -> None:
    with np.errstate(all="ignore"):
        sizes = voxel_sizes(affine)
        usable = np.isfinite(affine).all() and sizes.min() > 1e-4 and sizes.max() < 1e5
        usable = usable and np.abs(affine[:3, 3]).max() < 1e7
        usable = usable and abs(np.linalg.det(affine[:3, :3] / sizes)) > 1e-6
    if not usable:
        raise NiftiError(
            f"{name} has an affine that is not finite, not invertible or beyond all measure: "
            f"{np.round(affine, 4).tolist()}. Set its sform or qform, for example with nibabel."
        )


def _check_extensions(raw: bytes, header: Any, name: str) -> None:
    place = header.sizeof_hdr + 4
    if len(raw) < place or raw[header.sizeof_hdr] == 0:
        return
    while len(raw) - place >= 16:
        length = int(np.frombuffer(raw, dtype=f"{header.endianness}i4", count=1, offset=place)[0])
        if length < 8 or place + length > len(raw):
            raise NiftiError(
                f"{name} has a header extension of {length} bytes where {len(raw) - place} are left before the "
                "data. The header is damaged; export the image again, or remove its extensions."
            )
        place += length


def _repetition_time(header: Any, n_dims: int) -> float | None:
    """Repetition time in seconds, or None where the header has none."""
    step = float(header["pixdim"][4]) if n_dims >= 4 else 0.0
    per_second = _TIME_UNITS.get(int(header["xyzt_units"]) & 0x38)
    if per_second is None or not math.isfinite(step) or step <= 0:
        return None
    # float32 holds 2.2 as 2.2000000477: the shortest decimal that gives the same float32 is what was meant.
    return float(str(np.float32(step))) / per_second


# ---------------------------------------------------------------------------------------------------- streams


class _Hashing(io.RawIOBase):
    """A raw file that hashes and counts what is read from it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.state = state_of(raw)
        self.sha256 = hashlib.sha256()
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # In pieces: what is read here exists twice.
        data = self._raw.read(min(len(buffer), PIECE))
        buffer[: len(data)] = data
        self.add(data)
        return len(data)

    def add(self, data: Any) -> None:
        self.sha256.update(data)
        self.size += len(data)

    def has_changed(self) -> bool:
        """Whether the file was written to since it was opened."""
        return state_of(self._raw) != self.state

    def drain(self) -> None:
        """Read what is left, for the hash."""
        while self.read(PIECE):
            pass

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def _gunzip(raw: _Hashing) -> IO[bytes]:
    """Decompress a stream: with igzip where the ``fast`` extra is installed, else with zlib."""
    kind: Any = gzip.GzipFile
    with suppress(ImportError):
        from isal import igzip  # noqa: PLC0415  (optional, and only needed here)

        kind = cast("Any", igzip).IGzipFile
    return cast("IO[bytes]", kind(fileobj=io.BufferedReader(raw, PIECE), mode="rb"))


@cache
def _read_errors() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    errors: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error)
    try:
        from isal import isal_zlib  # noqa: PLC0415
    except ImportError:
        return errors
    return (*errors, cast("Any", isal_zlib).error)


def _image_errors() -> tuple[type[Exception], ...]:
    """What nibabel raises for an image that it cannot read or write."""
    return (*_read_errors(), ValueError, nib.spatialimages.HeaderDataError)


class RunReader:
    """One sequential pass over a NIfTI file.

    Use :func:`open_reader`. ``blocks`` can be consumed once; afterwards ``sha256`` and ``size`` are those of the
    file. ``name`` is the source as it was given, ``file_name`` the name of the file with the data.
    """

    def __init__(self, name: str, file_name: str, header: Header, stream: IO[bytes], raw: _Hashing) -> None:
        self.name = name
        self.file_name = file_name
        self.header = header
        self._stream = stream
        self._raw = raw

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(time, z, y, x)``."""
        n_x, n_y, n_z = (*self.header.shape[:3], 1, 1)[:3]
        return self.header.n_volumes, n_z, n_y, n_x

    def blocks(self, length: int) -> Iterator[tuple[int, Array]]:
        """Read the run in blocks of volumes.

        Parameters
        ----------
        length : int
            Volumes in a block; the last one may be shorter.

        Yields
        ------
        start : int
            Number of the block's first volume.
        block : ndarray, shape (n, z, y, x)
            Stored values, unscaled, in native byte order. Each block is a new array.

        Raises
        ------
        NiftiError
            If the file ends early or its compression is damaged.
        """
        n_time = self.shape[0]
        for start in range(0, n_time, length):
            block = np.empty((min(length, n_time - start), *self.shape[1:]), dtype=self.native_dtype)
            self.read(block, start)
            yield start, block
        self.finish()

    @property
    def native_dtype(self) -> np.dtype[Any]:
        """Dtype of the stored values, in the byte order of this machine."""
        return self.header.dtype.newbyteorder("=")

    def read(self, block: Array, start: int) -> None:
        """Read the next volumes.

        Parameters
        ----------
        block : ndarray, shape (n, z, y, x), C-ordered
            For stored values, unscaled, of ``native_dtype``.
        start : int
            Number of the first of them, for messages.

        Raises
        ------
        NiftiError
            If the file ends early or its compression is damaged.
        """
        self._fill(block.view(self.header.dtype), start)
        if not self.header.dtype.isnative:
            block.byteswap(inplace=True)

    def _fill(self, block: Array, start: int) -> None:
        view = memoryview(cast("Any", block.reshape(-1).view(np.uint8)))
        done = 0
        try:
            # In pieces: decompressed bytes exist twice.
            while got := cast("Any", self._stream).readinto(view[done : done + PIECE]):
                done += got
        except _read_errors() as error:
            raise self._cut_off(start + done // self.header.volume_bytes, error) from error
        if done < len(view):
            raise self._cut_off(start + done // self.header.volume_bytes, None)

    @property
    def state(self) -> tuple[int, int] | None:
        """Size of the file and when it was last written to, as it was opened."""
        return self._raw.state

    def read_so_far(self) -> str:
        """How many bytes of the file were read, and their hash: ``size:sha256``.

        After the same volume it depends on how far a decompressor reads ahead.
        """
        return f"{self._raw.size}:{self._raw.sha256.copy().hexdigest()}"

    def finish(self) -> None:
        """Read to the end: a gzip stream has its checksum behind the data, and the hash is of the whole file.

        Raises
        ------
        NiftiError
            If the compression is damaged, or the file changed since it was opened.
        SourceReadError
            If the system cannot read it.
        """
        behind = 0
        try:
            while rest := self._stream.read(PIECE):
                behind += len(rest)
        except _read_errors() as error:
            raise self._cut_off(self.shape[0], error) from error
        self._raw.drain()
        if self._raw.has_changed():
            raise NiftiError(
                f"{self.name} changed while it was read, so what was read of it is neither the old file nor the new one. Wait "
                "until nothing writes to it, and run the same command again."
            )
        if behind:
            warnings.warn(
                f"{self.name} has {behind} bytes behind the {self.shape[0]} volumes that its header promises; "
                "they are left out. Check the number of volumes in the header.",
                ChunkGLMWarning,
                stacklevel=2,
            )

    def _cut_off(self, volumes: int, error: BaseException | None) -> NiftiError | SourceReadError:
        return cut_off(self.name, self.header, volumes, error)

    @property
    def sha256(self) -> str:
        """Hash of the file's bytes, once all blocks were read."""
        return self._raw.sha256.hexdigest()

    @property
    def size(self) -> int:
        """Bytes of the file, once all blocks were read."""
        return self._raw.size


def cut_off(
    name: str, header: Header, volumes: int, error: BaseException | None
) -> NiftiError | SourceReadError:
    """Make the error for a file that could be read up to volume ``volumes`` only, because of ``error`` or its end."""
    if isinstance(error, OSError) and error.errno is not None:
        # The system's own words, not those of a decompressor.
        return SourceReadError(
            f"{name} could not be read beyond volume {volumes}: {error}. Make it available again, and run the same "
            "command again to go on."
        )
    reason = f" ({error})" if error else ""
    return NiftiError(
        f"{name} is cut off or damaged: its header promises {header.n_volumes} volumes, and it ends after "
        f"{volumes}{reason}. Copy or download it again."
    )


class _MemoryReader(RunReader):
    """A reader over an image that lives in memory: its values as they are, in the dtype that they have."""

    def __init__(self, image: Any) -> None:
        name = "the image in memory"
        if not isinstance(image, nib.Nifti1Pair):
            raise NiftiError(
                f"The image is a {type(image).__name__}; accepted are NIfTI images and paths of NIfTI files."
            )
        try:
            data = np.asanyarray(image.dataobj)
            data = data.view(np.uint8) if data.dtype == bool else data
            header: Any = cast("Any", image).header.copy()
            header.set_data_dtype(data.dtype)
            header.set_slope_inter(1, 0)
            buffer = io.BytesIO()
            cast("Any", type(image))(data, image.affine, header).header.write_to(buffer)
        except _image_errors() as error:
            raise NiftiError(
                f"The values of {name} cannot be read as NIfTI: {error}. Accepted are the real types of up to 64 "
                "bits; convert the image to one of these, or save it and give its path."
            ) from error
        super().__init__(name, name, _describe(buffer.getvalue(), name), io.BytesIO(), _Hashing(io.BytesIO()))
        self._volumes = data.T.reshape(self.shape)

    def _fill(self, block: Array, start: int) -> None:
        block[...] = self._volumes[start : start + len(block)]
        self._raw.add(block.reshape(-1).view(np.uint8))


@contextmanager
def open_reader(source: ImageLike) -> Iterator[RunReader]:
    """Open a run for one pass.

    Parameters
    ----------
    source : path, URL or nibabel image
        A 4-D image: ``.nii``, ``.nii.gz`` or either file of a ``.hdr``/``.img`` pair; NIfTI-1 or NIfTI-2. Of a
        nibabel image that is backed by a file and was not altered, the file is read.

    Yields
    ------
    RunReader

    Raises
    ------
    SourceNotFoundError, NiftiError
        If there is no such file, or it is not a 4-D NIfTI image of a real type.
    """
    with _open_image(source) as reader:
        shape = reader.header.shape
        if len(shape) != 4:
            raise NiftiError(
                f"{reader.name} is a {len(shape)}-D image of shape {shape} (x, y, z, ...); a run has four "
                "dimensions, the fourth being time. Merge the volumes of a run into one 4-D image first."
            )
        yield reader


@contextmanager
def _open_image(source: ImageLike) -> Iterator[RunReader]:
    if isinstance(source, (str, os.PathLike)):
        with _open_file(os.fspath(source)) as reader:
            yield reader
        return
    name = _file_of(source)
    if name is not None:
        with _open_file(name) as reader:
            if _is_unaltered(source, reader.header):
                yield reader
                return
    yield _MemoryReader(source)


def _file_of(image: Any) -> str | None:
    """Name the file behind a nibabel image whose data was not replaced."""
    if not (isinstance(image, nib.Nifti1Pair) and isinstance(image.dataobj, nib.arrayproxy.ArrayProxy)):
        return None
    filename = image.file_map["image"].filename
    name = None if filename is None else os.fspath(filename)
    return name if name is not None and name.lower().endswith(SUFFIXES) else None


def _is_unaltered(image: Any, header: Header) -> bool:
    """Whether the image still says what its file says."""
    fixed = parse_header(header.raw, "")
    fixed.check_fix(logger=_silent, error_level=100)
    fields = ("dim", "pixdim", "xyzt_units", "qform_code", "sform_code")
    same = all(np.array_equal(image.header[field], fixed[field], equal_nan=True) for field in fields)
    return same and np.array_equal(image.affine, header.affine)


@contextmanager
def _open_file(name: str) -> Iterator[RunReader]:
    header_name, data_name = _pair_names(name)
    file = _open_binary(data_name)
    raw = _Hashing(file)
    try:
        compressed = data_name.lower().endswith(".gz")
        stream = _gunzip(raw) if compressed else cast("IO[bytes]", io.BufferedReader(raw, PIECE))
        try:
            if header_name == data_name:
                header = _describe(_read_header(stream, name), name)
            else:
                header = _describe(_read_all(header_name, HEADER_LIMIT), header_name)
                _skip(stream, header.data_offset, data_name)
        except ChunkGLMError:
            raise
        except _read_errors() as error:
            raise NiftiError(
                f"{name} cannot be read as a NIfTI file: {error}. It is damaged, or not what its name says; copy "
                "or download it again."
            ) from error
        _check_length(header, _length(file), data_name, compressed=compressed)
        yield RunReader(name, os.path.basename(data_name), header, stream, raw)  # noqa: PTH119  (URLs too)
    finally:
        raw.close()


class Location(NamedTuple):
    """Where the values of an image lie.

    Attributes
    ----------
    name : str
        Path of the file with the values.
    header : Header
        What says how they lie in it.
    shape : tuple of int
        ``(time, z, y, x)``.
    state : tuple of int
        Size of the file and when it was last written to, as it was looked at.
    """

    name: str
    header: Header
    shape: tuple[int, int, int, int]
    state: tuple[int, int] | None

    @property
    def compressed(self) -> bool:
        """Whether the file is a gzip file."""
        return self.name.lower().endswith(".gz")

    def open(self) -> IO[bytes]:
        """Open the file; raises NiftiError if it is not what was located, SourceNotFoundError if it is gone."""
        file = _open_binary(self.name)
        try:
            self.check(file)
        except NiftiError:
            file.close()
            raise
        return file

    def check(self, file: IO[bytes]) -> None:
        """Refuse an open file that was written to, or is another one by now."""
        if state_of(file) != self.state:
            raise NiftiError(
                f"{self.name} changed since it was opened, so what is read of it is not what its header was read for. "
                "Wait until nothing writes to it, and open it again."
            )


def locate(source: str) -> Location:
    """Find the values of an image, reading only its header.

    Parameters
    ----------
    source : str
        Path of ``.nii``, ``.nii.gz`` or either file of a ``.hdr``/``.img`` pair.

    Raises
    ------
    SourceNotFoundError, NiftiError
        If there is no such file, it is not a NIfTI image of a real type, or it is too short for what its header promises.
    """
    with _open_file(source) as reader:
        return Location(_pair_names(source)[1], reader.header, reader.shape, reader.state)


def _check_length(header: Header, length: int | None, name: str, *, compressed: bool) -> None:
    """Refuse a file that is too short for what its header promises, before anything is made of it."""
    volumes = header.n_volumes
    promised = header.data_offset + volumes * header.volume_bytes
    if length is None or promised <= length * (DEFLATE_LIMIT if compressed else 1):
        return
    held = "" if compressed else f", enough for {max(length - header.data_offset, 0) // header.volume_bytes}"
    raise NiftiError(
        f"{name} is cut off or damaged: its header promises {volumes} volumes of {header.volume_bytes} bytes, and "
        f"the file has {length} bytes{held}. Copy or download it again."
    )


def state_of(file: Any) -> tuple[int, int] | None:
    """Size of an open file and when it was last written to, where that is known."""
    try:
        status = os.fstat(file.fileno())
    except (AttributeError, OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _length(file: Any) -> int | None:
    """Bytes of an open file, where they are known."""
    try:
        status = os.fstat(file.fileno())
    except (AttributeError, OSError, ValueError):
        size = getattr(file, "size", None)
        return size if isinstance(size, int) else None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _pair_names(name: str) -> tuple[str, str]:
    """Names of the header file and the data file."""
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), None)
    if suffix is None:
        raise NiftiError(f"{name} is not a NIfTI file by its name; accepted are {', '.join(SUFFIXES)}.")
    if suffix.startswith(".nii"):
        return name, name
    stem, own, gz = name[: -len(suffix)], name[-len(suffix) :][:4], name[-len(suffix) :][4:]
    header, data = (".HDR", ".IMG") if own.isupper() else (".hdr", ".img")
    return f"{stem}{header}{gz}", f"{stem}{data}{gz}"


def _open_binary(name: str) -> IO[bytes]:
    try:
        if "://" in name:
            import fsspec  # type: ignore[import-untyped]  # noqa: PLC0415  (for URLs only)

            return cast("IO[bytes]", fsspec.open(name, "rb").open())
        return Path(name).open("rb")
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"There is no file {name}. Check the path.") from error
    except IsADirectoryError as error:
        raise NiftiError(f"{name} is a folder; give the NIfTI file in it.") from error
    except (OSError, ValueError, ImportError) as error:
        raise NiftiError(f"{name} cannot be opened: {error}. Check the name and your permissions.") from error


def sidecar_of(source: ImageLike) -> Path | None:
    """Where the JSON sidecar of an image is, if it has one; None for what is no local file."""
    if isinstance(source, nib.spatialimages.SpatialImage) or "://" in os.fspath(source):
        return None
    name = os.fspath(source)
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), "")
    return Path(name[: len(name) - len(suffix)] + ".json")


def ends_as_promised(source: str) -> bool:
    """Whether a gzip file ends with the length that its header promises, modulo 2^32; True for what is not compressed.

    The last four bytes of a gzip stream are the length of what it holds (RFC 1952). A file that was cut off ends with others;
    but so does a file of several streams.

    Parameters
    ----------
    source : str
        Path or URL.

    Raises
    ------
    NiftiError, SourceNotFoundError
    """
    _, data_name = _pair_names(source)
    if not data_name.lower().endswith(".gz"):
        return True
    with open_reader(source) as reader:
        header = reader.header
    with _open_binary(data_name) as file:
        if not file.seekable() or file.seek(0, os.SEEK_END) < 4:
            return False
        file.seek(-4, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
    return length == (header.data_offset + header.n_volumes * header.volume_bytes) % 2**32


def source_sha256(source: ImageLike) -> str:
    """Hash of the file that holds the data of an image, as a conversion records it.

    Parameters
    ----------
    source : path, URL or nibabel image
        Of a pair, either file.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    NiftiError, SourceNotFoundError
    """
    if isinstance(source, nib.spatialimages.SpatialImage):
        with open_reader(source) as reader:
            reader.finish()
            return reader.sha256
    with _open_binary(_pair_names(os.fspath(source))[1]) as file:
        return hashlib.file_digest(cast("Any", file), "sha256").hexdigest()


def _read_all(name: str, limit: int) -> bytes:
    with _open_binary(name) as file:
        return gzip.GzipFile(fileobj=file).read(limit) if name.lower().endswith(".gz") else file.read(limit)


def _read_header(stream: IO[bytes], name: str) -> bytes:
    """Header and extensions of a single-file NIfTI; leaves the stream at the data."""
    start = stream.read(348)
    if len(start) == 348:
        size, _ = _header_size(start.ljust(540, b"\0"), name)
        start += stream.read(size - 348)
    header = parse_header(start, name)
    size, offset = header.sizeof_hdr, float(header["vox_offset"])
    if not size + 4 <= offset <= HEADER_LIMIT:
        raise NiftiError(
            f"{name} says that its data begins at byte {offset:g}, which cannot be right for a single file with a "
            f"header of {size} bytes. The header is damaged; export the image again."
        )
    rest = stream.read(int(offset) - size)
    if len(rest) < int(offset) - size:
        raise NiftiError(f"{name} is cut off: it ends before its data begins. Copy or download it again.")
    return start + rest


def _skip(stream: IO[bytes], offset: int, name: str) -> None:
    if not 0 <= offset <= HEADER_LIMIT or len(stream.read(offset)) < offset:
        raise NiftiError(
            f"{name} is cut off: its header says that the data begins at byte {offset}. Copy or download it again."
        )


# ------------------------------------------------------------------------------------------------------ masks and maps


def read_map(image: ImageLike) -> xr.DataArray:
    """Read a 3-D image.

    Parameters
    ----------
    image : path, URL or nibabel image
        3-D (a fourth dimension of length 1 is dropped), of any real dtype.

    Returns
    -------
    DataArray, dims (z, y, x)
        In physical units (float64 where the header scales, else the dtype of the file), on its grid; named after the file.

    Raises
    ------
    SourceNotFoundError, NiftiError
        If there is no such image, or it is not one volume.
    """
    return _read_volume(image, "a map", NiftiError)


def _read_volume(
    image: ImageLike, what: str, refusal: type[InputError], check: Callable[[Grid, str], None] | None = None
) -> xr.DataArray:
    with _open_image(image) as reader:
        header = reader.header
        if check is not None:
            check(Grid(reader.shape[1:], header.affine), reader.name)
        if header.n_volumes > 1:
            raise refusal(
                f"{reader.name} has the shape {header.shape}; {what} is a 3-D image. Give one volume."
            )
        ((_, block),) = reader.blocks(1)
        values = block[0] * np.float64(header.slope) + header.intercept if header.scaled else block[0].copy()
        coords = grid_coords(header.affine, reader.shape[1:], header.raw)
        return xr.DataArray(values, dims=SPACE, coords=coords, name=reader.name)


_masks: WeakValueDictionary[tuple[tuple[int, ...], bytes], NDArray[np.bool_]] = WeakValueDictionary()
"""Those in use, by shape and hash: a mask that all runs of a study have is in memory once."""


def read_mask(mask: ImageLike | xr.DataArray, grid: Grid, run_name: str) -> NDArray[np.bool_]:
    """Read a mask and check it against the grid of a run.

    Parameters
    ----------
    mask : path, nibabel image or DataArray
        3-D (a fourth dimension of length 1 is dropped), of any real dtype, with at most two distinct values, one
        of them 0.
    grid : Grid
        Grid of the run.
    run_name : str
        For messages.

    Returns
    -------
    ndarray of bool, shape (z, y, x)
        Read-only; the same array as long as an equal one is in use.

    Raises
    ------
    MaskError, GridMismatchError, SourceNotFoundError, NiftiError
    """
    if isinstance(mask, xr.DataArray):
        name, mask = "the mask", _checked_mask(mask)
    else:
        # Before its data is read, which can be of any size.
        mask = _read_volume(
            mask, "a mask", MaskError, lambda got, name: check_same_grid(got, grid, name, run_name)
        )
        name = str(mask.name)
    check_same_grid(grid_of(mask), grid, name, run_name)
    levels = np.unique(mask)
    if not np.isfinite(levels).all() or levels.size > 2 or (levels.size == 2 and 0 not in levels):
        shown = ", ".join(f"{float(level):g}" for level in levels[:5])
        raise MaskError(
            f"{name} has the values {shown}{', ...' if levels.size > 5 else ''}; a mask has 0 outside and one other "
            "finite value inside. Threshold it first."
        )
    inside: NDArray[np.bool_] = np.ascontiguousarray(mask.values != 0)
    if not inside.any():
        raise MaskError(f"{name} is empty: no voxel is inside. Give the mask of the brain.")
    inside.flags.writeable = False
    return _masks.setdefault((inside.shape, hashlib.sha256(np.packbits(inside).tobytes()).digest()), inside)


def _checked_mask(mask: xr.DataArray) -> xr.DataArray:
    if set(mask.dims) != set(SPACE) or mask.dtype.kind not in "biuf":
        raise MaskError(
            f"The mask has dims {mask.dims} and dtype {mask.dtype}; a mask has dims {SPACE} and real values."
        )
    return mask.transpose(*SPACE)


# ----------------------------------------------------------------------------------------------------- export


class NotLosslessError(InputError):
    """Values changed since they were opened, so that the integers of their source do not hold them any more."""


class Packing(NamedTuple):
    """How values are stored: ``value = slope * stored + intercept``, with ``stored`` of ``dtype``."""

    dtype: np.dtype[Any]
    slope: float
    intercept: float

    def pack(self, values: Array) -> Array:
        """Find the stored values of ``values``; raises NotLosslessError where they are not exact."""
        if (self.slope, self.intercept) == (1.0, 0.0):
            return values.astype(self.dtype, copy=False)
        with np.errstate(invalid="ignore", over="ignore"):
            stored = (values - self.intercept) / self.slope
            packed = (np.rint(stored) if self.dtype.kind in "iu" else stored).astype(self.dtype)
            again = packed.astype(np.float64) * self.slope + self.intercept
        if not np.array_equal(again, values, equal_nan=True):
            raise NotLosslessError(
                "The data carries the scale factor of its source file, but its values were changed, so that the "
                "source's dtype does not hold them. Say that it is new data with drop_encoding()."
            )
        return packed


def to_nifti(
    array: xr.DataArray, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False
) -> nib.Nifti1Image:
    """Write an array on a voxel grid as NIfTI. No value is changed.

    An array as it was opened from a run store is written in the dtype of its source, with its scale slope, header
    fields and extensions: the whole run comes back bit for bit. Anything computed is written in the dtype that it
    has (bool as uint8), with the affine of its slice.

    Parameters
    ----------
    array : DataArray, dims (..., z, y, x)
        Spatial dims may have been selected to a scalar; up to four others (such as ``time`` or ``run``) become the
        dimensions of the image behind x, y, z.
    path : path, optional
        ``.nii`` or ``.nii.gz``. The data is streamed there block by block. Without it the image is made in memory.
    overwrite : bool
        Replace an existing file.

    Returns
    -------
    nibabel.Nifti1Image
        Of class Nifti2Image where the source is NIfTI-2, or a dimension is too long for NIfTI-1.

    Raises
    ------
    StoreExistsError
        If the file exists and ``overwrite`` is not given.
    StoreError
        If the file cannot be written.
    InputError
        If the array has no grid, is not an evenly spaced slice of it, or has a dtype that NIfTI does not hold.
    """
    array = _with_space_last(array)
    if path is None:
        buffer = io.BytesIO()
        made: nib.Nifti1Image = _write_lossless(array, lambda _: _emptied(buffer)).from_bytes(
            buffer.getvalue()
        )
        return made
    target = Path(path)
    if not target.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"{target} cannot be written: the name of a NIfTI file ends with .nii or .nii.gz.")
    if target.is_dir() or (os.path.lexists(target) and not overwrite):
        raise StoreExistsError(
            f"{target} exists. Choose another name, or say overwrite=True to replace a file."
        )
    partial = target.with_name(f".{target.name}.partial")
    compress = target.name.lower().endswith(".gz")
    try:
        image_class = _write_lossless(array, lambda dtype: _create(partial, dtype, compress=compress))
        partial.replace(target)
    except ChunkGLMError:
        raise
    except OSError as error:
        raise StoreError(
            f"{target} was not written: {error}. Check the folder and its free space."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    written: nib.Nifti1Image = image_class.from_filename(target)
    return written


def export_header(array: xr.DataArray) -> bytes:
    """Make the header, with extensions, that :func:`to_nifti` writes for ``array``.

    Raises
    ------
    InputError
        If the array cannot be written as NIfTI.
    """
    array = _with_space_last(array)
    header, tail = _header_for(array, source_packing(array) or _plain_packing(array))
    return cast("bytes", header.binaryblock) + tail


def _with_space_last(array: xr.DataArray) -> xr.DataArray:
    """The dims in the order of a NIfTI file, whose fourth dimension is the last one here that is not spatial."""
    if not isinstance(array, xr.DataArray):
        raise InputError(
            f"A {type(array).__name__} cannot be written as NIfTI; give one variable of it, a DataArray."
        )
    array = with_space(array)
    other = [dim for dim in array.dims if dim not in SPACE]
    if set(SPACE) - set(array.dims) or len(other) > 4 or 0 in array.shape:
        # Arithmetic between grids of other labels leaves nothing, and says nothing.
        empty = " xarray keeps only labels that all arrays have in common: compare their x, y and z."
        raise InputError(
            f"An array with dims {dict(array.sizes)} cannot be written as NIfTI: it needs z, y and x, at most four "
            f"others, and at least one value.{empty if 0 in array.shape else ''}"
        )
    return array.transpose(*other, *SPACE)


@contextmanager
def _emptied(buffer: io.BytesIO) -> Iterator[IO[bytes]]:
    buffer.seek(0)
    buffer.truncate()
    yield buffer


@contextmanager
def _create(path: Path, dtype: np.dtype[Any], *, compress: bool) -> Iterator[IO[bytes]]:
    with path.open("wb") as file:
        if compress:
            with closing(_Compressed(file, dtype)) as stream:
                yield cast("IO[bytes]", stream)
        else:
            yield file


class _Compressed:
    """A gzip file that is written, with no name and no time in it: the same values give the same file.

    By zlib. igzip is four times as fast for maps, but of a thousand of them it compressed four to other bytes than before.
    """

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any]) -> None:
        # In floats nothing but what is outside of a mask comes again: looking for more takes twice as long and finds less.
        strategy = zlib.Z_RLE if dtype.kind == "f" else zlib.Z_DEFAULT_STRATEGY
        self._file = file
        self._zlib = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)

    def write(self, content: bytes) -> None:
        self._file.write(self._zlib.compress(content))

    def close(self) -> None:
        self._file.write(self._zlib.flush())


def _write_lossless(
    array: xr.DataArray, create: Callable[[np.dtype[Any]], AbstractContextManager[IO[bytes]]]
) -> Any:
    """Write in the source's packing if that holds the values exactly, else as they are; returns the class.

    ``create``: opens the file, for values of a dtype.
    """
    packing = source_packing(array)
    if packing is not None:
        try:
            with create(packing.dtype) as stream:
                return _write(array, packing, stream)
        except NotLosslessError:
            pass
    packing = _plain_packing(array)
    with create(packing.dtype) as stream:
        return _write(array, packing, stream)


def source_packing(array: xr.DataArray | xr.Variable) -> Packing | None:
    """Find the packing that the array was opened with; xarray forgets it as soon as something is computed."""
    encoding = array.encoding
    if "dtype" not in encoding or not {"scale_factor", "add_offset"} & set(encoding):
        return None
    return Packing(
        np.dtype(encoding["dtype"]).newbyteorder("="),
        float(encoding.get("scale_factor", 1.0)),
        float(encoding.get("add_offset", 0.0)) + 0.0,
    )


def _plain_packing(array: xr.DataArray) -> Packing:
    wider = {"bool": "uint8", "float16": "float32"}
    dtype = np.dtype(wider.get(array.dtype.name, array.dtype))
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(
            f"Values of dtype {array.dtype} cannot be written as NIfTI. Convert them with .astype('float64')."
        )
    return Packing(dtype.newbyteorder("="), 1.0, 0.0)


def _write(array: xr.DataArray, packing: Packing, stream: IO[bytes]) -> Any:
    header, tail = _header_for(array, packing)
    stream.write(header.binaryblock + tail)
    dtype = packing.dtype.newbyteorder(header.endianness)
    for block in _volume_blocks(array, packing):
        stream.write(block.astype(dtype, copy=False).tobytes())
    return nib.Nifti1Image if header.sizeof_hdr == 348 else nib.Nifti2Image


def _volume_blocks(array: xr.DataArray, packing: Packing) -> Iterator[Array]:
    """Yield the stored values in file order, some whole volumes at a time."""
    if array.ndim == 3:
        yield packing.pack(np.asarray(array))
        return
    lead = array.dims[0]
    length = array.chunksizes[lead][0] if array.chunks else 1
    slabs = array.chunksizes["z"] if array.chunks else (array.sizes["z"],)
    stops = np.cumsum(slabs)
    for start in range(0, array.sizes[lead], length):
        volumes = array.isel({lead: slice(start, start + length)})
        block = np.empty(volumes.shape, dtype=packing.dtype)
        for z_start, z_stop in zip(stops - np.array(slabs), stops, strict=True):
            # Decoding a slab at a time keeps the unpacked values of a whole block out of memory.
            slab = np.asarray(volumes.isel(z=slice(z_start, z_stop)))
            block[..., z_start:z_stop, :, :] = packing.pack(slab)
        yield block


def _header_for(array: xr.DataArray, packing: Packing) -> tuple[Any, bytes]:
    """Make the header of an export and the bytes between it and the data."""
    affine = slice_affine(array)
    shape = _image_shape(array)
    raw = base64.b64decode(array.coords["grid"].attrs.get("header", ""))
    source = _describe(raw, "the stored header") if raw else None
    header = parse_header(raw, "the stored header") if raw else _new_header()
    tail = raw[header.sizeof_hdr :] if _is_signal(array) else b""
    whole = source is not None and _is_signal(array) and _holds(source, shape, packing, affine)
    if whole and _is_single(header):
        return header, tail
    header = _single_header(header, shape)
    if not whole:
        _change_fields(header, array, packing, source)
    tail += b"\0" * max(4 - len(tail), 0)
    tail += b"\0" * (-(header.sizeof_hdr + len(tail)) % 16)
    header["vox_offset"] = header.sizeof_hdr + len(tail)
    return header, tail


def _image_shape(array: xr.DataArray) -> tuple[int, ...]:
    return tuple(array.sizes[dim] for dim in (*SPACE[::-1], *reversed(array.dims[:-3])))


def _is_signal(array: xr.DataArray) -> bool:
    """Whether the fourth dimension of the image is time."""
    return array.dims[-4:-3] == ("time",)


def _holds(source: Header, shape: tuple[int, ...], packing: Packing, affine: Array) -> bool:
    """Whether the source's header is that of the array as well."""
    stored = (source.shape, source.dtype.newbyteorder("="), source.slope, source.intercept)
    return stored == (shape, *packing) and np.array_equal(source.affine, affine)


def _new_header() -> Any:
    header = _HEADERS[348, "single"](endianness="<")
    header.set_xyzt_units("mm", "sec")
    return header


def _is_single(header: Any) -> bool:
    return bool(header["magic"].item()[:3] == _SINGLE_MAGIC[header.sizeof_hdr])


def _single_header(header: Any, shape: tuple[int, ...]) -> Any:
    """Copy the fields to the header of a single file; NIfTI-2 where a dimension is too long for NIfTI-1."""
    size = 540 if max(shape) > np.iinfo(np.int16).max else header.sizeof_hdr
    new = _HEADERS[size, "single"](endianness=header.endianness)
    for field in set(header.keys()) & set(new.keys()) - {"sizeof_hdr", "magic", "eol_check"}:
        new[field] = header[field]
    return new


def _change_fields(header: Any, array: xr.DataArray, packing: Packing, source: Header | None) -> None:
    """Make the header of a source that of an array that is not the whole of it."""
    affine, shape = slice_affine(array), _image_shape(array)
    header["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    header.set_data_dtype(packing.dtype)
    header["scl_slope"], header["scl_inter"] = packing.slope, packing.intercept
    forgotten = []
    # Which slice was acquired when is not known of other slices, or of these in reverse.
    slices_kept = (
        source is not None
        and source.shape[2] == shape[2]
        and np.array_equal(source.affine[:, 2], affine[:, 2])
    )
    if not _is_signal(array) or not slices_kept:
        forgotten += ["slice_code", "slice_start", "slice_end", "slice_duration"]
    if not _is_signal(array):
        forgotten += ["cal_max", "cal_min", "intent_code", "intent_p1", "intent_p2", "intent_p3"]
        header["intent_name"] = b""
    for field in forgotten:
        header[field] = 0
    if source is None or not np.array_equal(source.affine, affine):
        _set_affine(header, affine)
    _set_time_step(header, array, source.t_r if source is not None else None)


def _set_affine(header: Any, affine: Array) -> None:
    """Say the affine in the form that the source used: sform, qform or both."""
    # nibabel takes an unknown code for none.
    q_code, s_code = (
        code if 0 <= code <= 5 else 0 for code in (int(header["qform_code"]), int(header["sform_code"]))
    )
    header.set_qform(affine, q_code, strip_shears=True)
    if s_code or not q_code:
        header.set_sform(affine, s_code or 2)
    elif not np.allclose(header.get_best_affine(), affine, atol=1e-3 * voxel_sizes(affine).min()):
        header.set_sform(affine, q_code)


def _set_time_step(header: Any, array: xr.DataArray, source_step: float | None) -> None:
    """Set the steps behind x, y, z: seconds if the fourth dimension is time in even steps, else 0 or 1."""
    n_other = array.ndim - 3
    if not _is_signal(array):
        header["pixdim"][4:] = [1.0] * n_other + [0.0] * (4 - n_other)
        return
    header["pixdim"][5:] = [1.0] * (n_other - 1) + [0.0] * (4 - n_other)
    # Without this look, xarray would make up a coordinate that counts.
    if "time" not in array.coords or array["time"].size < 2 or array["time"].dtype.kind not in "iuf":
        return
    # Microseconds are finer than any repetition time; the difference of two coordinates is not exact.
    steps = np.unique(np.round(np.diff(array["time"].values.astype(np.float64)), 6))
    step = abs(float(steps[0])) if steps.size == 1 else 0.0
    if step != source_step:
        header["pixdim"][4] = step
        header["xyzt_units"] = (int(header["xyzt_units"]) & 0x07) | 8
