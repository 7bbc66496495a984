"""NIfTI: headers, affines and grids, streaming reads, export. The only module that knows nibabel.

NIfTI data is x-fastest and time-slowest, so a C-ordered array ``(time, z, y, x)`` has the bytes of the file. A run is
read once from its first byte to its last, in blocks of whole volumes; the hash of the file falls out of that pass.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import math
import os
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import nibabel as nib
import numpy as np
import xarray as xr
from nibabel.wrapstruct import WrapStructError

from chunkglm.errors import (
    GridMismatchError,
    InputError,
    MaskError,
    NiftiError,
    SourceNotFoundError,
    StoreExistsError,
)
from chunkglm.schema import SPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    Array = NDArray[Any]
    ImageLike = str | os.PathLike[str] | nib.spatialimages.SpatialImage

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz")

HEADER_LIMIT = 16 * 2**20
"""Bytes of header and extensions beyond which a file is not believed."""

VOXEL_LIMIT = 2**40
"""Values in an image beyond which a header is not believed."""

SAME_GRID = 0.01
"""Grids whose corners lie closer than this part of a voxel are the same grid."""

_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6, "unknown": 1.0}
_HEADERS = {
    (348, "single"): nib.Nifti1Header,
    (348, "pair"): nib.nifti1.Nifti1PairHeader,
    (540, "single"): nib.nifti2.Nifti2Header,
    (540, "pair"): nib.nifti2.Nifti2PairHeader,
}
_MAGIC = {b"n+1": "single", b"ni1": "pair", b"n+2": "single", b"ni2": "pair"}
_SINGLE_MAGIC = {348: b"n+1", 540: b"n+2"}


# ---------------------------------------------------------------------------------------------------------- headers


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


def parse_header(raw: bytes, name: str) -> Any:
    """The nibabel header of the bytes ``raw``, unrepaired, in the class that fits version and kind.

    Raises
    ------
    NiftiError
        If the bytes are not a NIfTI header.
    """
    size = _header_size(raw, name)
    magic = raw[344:347] if size == 348 else raw[4:7]
    kind = _MAGIC.get(magic)
    if kind is None:
        old = " (it looks like Analyze 7.5, which has no reliable orientation)" if size == 348 else ""
        raise NiftiError(
            f"{name} is not a NIfTI file: its header has the magic {magic!r}{old}. Accepted are NIfTI-1 and NIfTI-2, as "
            ".nii, .nii.gz or a .hdr/.img pair. Convert the file, for example with nibabel or mrconvert."
        )
    return _HEADERS[size, kind](raw[:size], check=False)


def _header_size(raw: bytes, name: str) -> int:
    """348 for NIfTI-1, 540 for NIfTI-2, in either byte order."""
    for order in ("little", "big"):
        size = int.from_bytes(raw[:4], cast("Any", order))
        if size in (348, 540):
            if len(raw) < size:
                raise NiftiError(f"{name} is cut off: it ends inside its {size}-byte header. Copy it again.")
            return size
    raise NiftiError(
        f"{name} is not a NIfTI file: it does not begin with a NIfTI header. Accepted are NIfTI-1 and NIfTI-2, as .nii, "
        ".nii.gz or a .hdr/.img pair."
    )


def _describe(raw: bytes, name: str) -> Header:
    """Read and check the fields of a header that matter for a run."""
    header = parse_header(raw, name)
    n_dims = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : n_dims + 1]) if 1 <= n_dims <= 7 else ()
    if not shape or min(shape) < 1 or math.prod(shape) > VOXEL_LIMIT:
        raise NiftiError(
            f"{name} has the dimensions {[int(n) for n in header['dim']]} in its header, which cannot be right: there "
            "must be 1 to 7, each positive. The header is damaged; export the image again."
        )
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    try:
        dtype = np.dtype(header.get_data_dtype())
    except (nib.spatialimages.HeaderDataError, KeyError):
        dtype = np.dtype(object)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise NiftiError(
            f"{name} holds values of NIfTI type code {int(header['datatype'])}; accepted are the real types of up to 64 "
            "bits (int8 to int64, uint8 to uint64, float32, float64). Convert the image to one of these."
        )
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        slope, intercept = header.get_slope_inter()
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise NiftiError(
            f"{name} has a header that cannot be used: {error}. Export the image again."
        ) from error
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise NiftiError(
            f"{name} has an affine that is not finite or not invertible: {np.round(affine, 4).tolist()}. Set its sform or "
            "qform, for example with nibabel."
        )
    return Header(
        raw=raw,
        shape=shape,
        dtype=dtype,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if slope is None or intercept is None else float(intercept),
        affine=affine,
        t_r=_repetition_time(header, len(shape)),
        data_offset=int(header["vox_offset"]),
    )


def _repetition_time(header: Any, n_dims: int) -> float | None:
    """Repetition time in seconds, or None where the header has none."""
    step = float(header["pixdim"][4]) if n_dims >= 4 else 0.0
    unit = {8: "sec", 16: "msec", 24: "usec", 0: "unknown"}.get(int(header["xyzt_units"]) & 0x38)
    if unit is None or not math.isfinite(step) or step <= 0:
        return None
    # float32 holds 2.2 as 2.2000000477: the shortest decimal that gives the same float32 is what was meant.
    return float(str(np.float32(step))) * _SECONDS[unit]


def header_from_image(image: Any) -> bytes:
    """The header bytes, with extensions, that a nibabel NIfTI image would be written with."""
    buffer = io.BytesIO()
    header = image.header.copy()
    header.write_to(buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------- streams


class _Hashing(io.RawIOBase):
    """A raw file that hashes and counts what is read from it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.sha256 = hashlib.sha256()
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self.sha256.update(data)
        self.size += len(data)
        return len(data)

    def drain(self) -> None:
        """Read what is left, for the hash."""
        while self.read(2**20):
            pass

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def _gunzip(raw: _Hashing) -> IO[bytes]:
    """A decompressing stream: igzip where the ``fast`` extra is installed, else zlib."""
    try:
        from isal import igzip  # noqa: PLC0415  (optional, and only needed here)
    except ImportError:
        return cast("IO[bytes]", gzip.GzipFile(fileobj=io.BufferedReader(raw, 2**20), mode="rb"))
    return cast("IO[bytes]", igzip.GzipFile(fileobj=io.BufferedReader(raw, 2**20), mode="rb"))


class RunReader:
    """One sequential pass over a 4-D NIfTI file.

    Use :func:`open_reader`. ``blocks`` can be consumed once; afterwards ``sha256`` and ``size`` are those of the file.
    """

    def __init__(self, name: str, header: Header, stream: IO[bytes], raw: _Hashing) -> None:
        self.name = name
        self.header = header
        self._stream = stream
        self._raw = raw

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(time, z, y, x)``."""
        n_x, n_y, n_z, n_time = self.header.shape
        return n_time, n_z, n_y, n_x

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
            block = np.empty((min(length, n_time - start), *self.shape[1:]), dtype=self.header.dtype)
            self._fill(block, start)
            yield start, block.astype(block.dtype.newbyteorder("="), copy=False)
        self._finish()

    def _fill(self, block: Array, start: int) -> None:
        view = memoryview(block.reshape(-1).view(np.uint8))
        done = 0
        try:
            while done < len(view) and (got := self._stream.readinto(view[done:])):  # type: ignore[attr-defined]
                done += got
        except (EOFError, OSError, zlib.error) as error:
            raise self._cut_off(start + done // block[0].nbytes, error) from error
        if done < len(view):
            raise self._cut_off(start + done // block[0].nbytes, None)

    def _finish(self) -> None:
        """Read to the end: the checksum of the gzip stream is behind the data, and the hash is of the whole file."""
        try:
            self._stream.read(2**16)
        except (EOFError, OSError, zlib.error) as error:
            raise self._cut_off(self.shape[0], error) from error
        self._raw.drain()

    def _cut_off(self, volumes: int, error: BaseException | None) -> NiftiError:
        reason = f" ({error})" if error else ""
        return NiftiError(
            f"{self.name} is cut off or damaged: its header promises {self.shape[0]} volumes, and it ends after "
            f"{volumes}{reason}. Copy or download it again."
        )

    @property
    def sha256(self) -> str:
        """Hash of the file's bytes, once all blocks were read."""
        return self._raw.sha256.hexdigest()

    @property
    def size(self) -> int:
        """Bytes of the file, once all blocks were read."""
        return self._raw.size


@contextmanager
def open_reader(source: ImageLike) -> Iterator[RunReader]:
    """Open a run for one pass.

    Parameters
    ----------
    source : path, URL or nibabel image
        A 4-D image: ``.nii``, ``.nii.gz`` or either file of a ``.hdr``/``.img`` pair; NIfTI-1 or NIfTI-2. Of a nibabel
        image that is backed by a file, the file is read.

    Yields
    ------
    RunReader

    Raises
    ------
    SourceNotFoundError, NiftiError
        If there is no such file, or it is not a 4-D NIfTI image of a real type.
    """
    if not isinstance(source, (str, os.PathLike)):
        on_disk = _file_of(source)
        if on_disk is None:
            yield _memory_reader(source)
            return
        source = on_disk
    name = os.fspath(source)
    header_name, data_name = _pair_names(name)
    raw = _Hashing(_open_binary(data_name))
    try:
        stream: IO[bytes] = (
            _gunzip(raw) if data_name.endswith(".gz") else cast("IO[bytes]", io.BufferedReader(raw, 2**20))
        )
        try:
            if header_name == data_name:
                header = _describe(_read_header(stream, name), name)
            else:
                with _open_maybe_gzip(header_name) as file:
                    header = _describe(file.read(HEADER_LIMIT), header_name)
                _skip(stream, header.data_offset, data_name)
        except (EOFError, OSError, zlib.error) as error:
            raise NiftiError(
                f"{name} cannot be read as a NIfTI file: {error}. It is damaged, or not what its name says; copy it again."
            ) from error
        _check_run(header, name)
        yield RunReader(name, header, stream, raw)
    finally:
        raw.close()


def _check_run(header: Header, name: str) -> None:
    if len(header.shape) != 4:
        raise NiftiError(
            f"{name} is a {len(header.shape)}-D image of shape {header.shape} (x, y, z, ...); a run has four dimensions, "
            "the fourth being time. Merge the volumes of a run into one 4-D image first."
        )


def _file_of(image: Any) -> str | None:
    """The file behind a nibabel image whose data was not replaced, or None."""
    if nib.is_proxy(image.dataobj) and isinstance(image, nib.Nifti1Pair):
        filename = image.file_map["image"].filename
        return None if filename is None else os.fspath(filename)
    return None


def _memory_reader(image: Any) -> RunReader:
    """A reader over an image that lives in memory: its values as they are, without scaling."""
    if not isinstance(image, nib.Nifti1Pair):
        raise NiftiError(
            f"The image is a {type(image).__name__}; accepted are NIfTI images and paths of NIfTI files."
        )
    data = np.asanyarray(image.dataobj)
    header = image.header.copy()
    header.set_data_dtype(data.dtype)
    header.set_slope_inter(1, 0)
    described = _describe(
        header_from_image(nib.Nifti1Pair(data, image.affine, header)), "the image in memory"
    )
    _check_run(described, "the image in memory")
    buffer = np.ascontiguousarray(data.T.astype(described.dtype, copy=False))
    raw = _Hashing(io.BytesIO(buffer.tobytes()))
    return RunReader("the image in memory", described, cast("IO[bytes]", io.BufferedReader(raw)), raw)


def _pair_names(name: str) -> tuple[str, str]:
    """Names of the header file and the data file."""
    lower = name.lower()
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if lower.endswith(s)), None)
    if suffix is None:
        raise NiftiError(f"{name} is not a NIfTI file by its name; accepted are {', '.join(SUFFIXES)}.")
    if suffix.startswith(".nii"):
        return name, name
    stem, gz = name[: -len(suffix)], (".gz" if suffix.endswith(".gz") else "")
    return f"{stem}.hdr{gz}", f"{stem}.img{gz}"


def _open_binary(name: str) -> IO[bytes]:
    if "://" in name:
        import fsspec  # noqa: PLC0415  (a dependency of dask, needed for URLs only)

        try:
            return cast("IO[bytes]", fsspec.open(name, "rb").open())
        except FileNotFoundError as error:
            raise SourceNotFoundError(f"{name} does not exist.") from error
    path = Path(name)
    if path.is_dir():
        raise NiftiError(f"{name} is a folder; give the NIfTI file in it.")
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"There is no file {name}. Check the path.") from error


def _open_maybe_gzip(name: str) -> IO[bytes]:
    file = _open_binary(name)
    return cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if name.endswith(".gz") else file


def _read_header(stream: IO[bytes], name: str) -> bytes:
    """Header and extensions of a single-file NIfTI; leaves the stream at the data."""
    start = stream.read(348)
    size = _header_size(start.ljust(540, b"\0") if len(start) == 348 else start, name)
    start += stream.read(size - len(start))
    offset = int(parse_header(start, name)["vox_offset"])
    if not size <= offset <= HEADER_LIMIT:
        raise NiftiError(
            f"{name} says that its data begins at byte {offset}, which cannot be right for a header of {size} bytes. The "
            "header is damaged; export the image again."
        )
    rest = stream.read(offset - size)
    if len(rest) < offset - size:
        raise NiftiError(f"{name} is cut off: it ends before its data begins. Copy it again.")
    return start + rest


def _skip(stream: IO[bytes], offset: int, name: str) -> None:
    if not 0 <= offset <= HEADER_LIMIT or len(stream.read(offset)) < offset:
        raise NiftiError(
            f"{name} is cut off: its header says that the data begins at byte {offset}. Copy it again."
        )


# ------------------------------------------------------------------------------------------------------------ grids


class Grid(NamedTuple):
    """A voxel grid: lengths along z, y, x, and the affine from voxel numbers (x, y, z) to millimetres."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]


def grid_coords(affine: Array, shape: Sequence[int], header: bytes) -> dict[Hashable, xr.Variable]:
    """Coordinates of a voxel grid.

    Parameters
    ----------
    affine : ndarray, shape (4, 4)
        From voxel numbers (x, y, z) to millimetres (RAS+).
    shape : sequence of int
        Lengths along z, y, x.
    header : bytes
        The source's header, kept for export.

    Returns
    -------
    dict
        ``x``, ``y``, ``z`` (millimetres rounded to 1e-4 where the affine is diagonal, else voxel numbers; ``units``
        says which) and the scalar ``grid`` with the attributes ``affine`` (16 numbers, row by row) and ``header``
        (base64).
    """
    aligned = np.count_nonzero(affine[:3, :3] - np.diag(np.diag(affine[:3, :3]))) == 0
    coords: dict[Hashable, xr.Variable] = {}
    for axis, (dim, length) in enumerate(zip(SPACE[::-1], tuple(shape)[::-1], strict=True)):
        numbers = np.arange(length, dtype=np.float64)
        # Adding 0.0 turns -0.0 into 0.0.
        values = np.round(affine[axis, axis] * numbers + affine[axis, 3], 4) + 0.0 if aligned else numbers
        coords[dim] = xr.Variable(dim, values, {"units": "mm" if aligned else "voxel"})
    attrs = {"affine": [float(v) for v in np.ravel(affine)], "header": base64.b64encode(header).decode()}
    coords["grid"] = xr.Variable((), np.int64(0), attrs)
    return coords


def source_affine(obj: xr.Dataset | xr.DataArray) -> NDArray[np.float64]:
    """The affine of the grid that ``obj`` was cut from, shape (4, 4).

    Raises
    ------
    InputError
        If ``obj`` has no ``grid`` coordinate.
    """
    values = obj.coords["grid"].attrs.get("affine") if "grid" in obj.coords else None
    if values is None or np.size(values) != 16:
        raise InputError(
            "The data has no voxel grid: the scalar coordinate 'grid' with its attribute 'affine' is missing. Data opened "
            "by chunkglm has it; give it back with data.assign_coords(grid=run.grid)."
        )
    return np.asarray(values, dtype=np.float64).reshape(4, 4)


def slice_affine(obj: xr.Dataset | xr.DataArray) -> NDArray[np.float64]:
    """The affine of ``obj`` itself, which may be a slice (also strided or reversed) of its source grid.

    Returns
    -------
    ndarray, shape (4, 4)

    Raises
    ------
    InputError
        If the voxels of ``obj`` are not evenly spaced voxels of the source grid, or coordinates are missing.
    """
    affine = source_affine(obj)
    out = affine.copy()
    for axis, dim in enumerate(SPACE[::-1]):
        first, step = _first_and_step(obj, dim, affine, axis)
        out[:3, axis] = affine[:3, axis] * step
        out[:3, 3] += affine[:3, axis] * first
    return out


def _first_and_step(obj: xr.Dataset | xr.DataArray, dim: str, affine: Array, axis: int) -> tuple[int, int]:
    """Voxel number of the first voxel along ``dim`` in the source grid, and the step to the next."""
    if dim not in obj.coords:
        raise InputError(
            f"The data has no coordinate {dim!r}, so its place in the grid is not known. Keep the coordinates x, y and z "
            "(no drop=True when selecting)."
        )
    coordinate = obj.coords[dim]
    values = np.atleast_1d(np.asarray(coordinate.values, dtype=np.float64))
    if coordinate.attrs.get("units") == "mm":
        values = (values - affine[axis, 3]) / affine[axis, axis]
    numbers = np.rint(values)
    steps = np.unique(np.diff(numbers))
    if np.abs(values - numbers).max(initial=0.0) > 0.05 or steps.size > 1 or 0 in steps:
        raise InputError(
            f"The voxels along {dim!r} are not evenly spaced voxels of the source grid, so no affine describes them. "
            "Select with a slice, or export before selecting."
        )
    return int(numbers[0]), int(steps[0]) if steps.size else 1


def grid_of(obj: xr.Dataset | xr.DataArray) -> Grid:
    """The voxel grid of ``obj``; a spatial dimension that was selected away has length 1."""
    sizes = cast("Any", obj.sizes)
    return Grid((sizes.get("z", 1), sizes.get("y", 1), sizes.get("x", 1)), slice_affine(obj))


def check_same_grid(got: Grid, expected: Grid, got_name: str, expected_name: str) -> None:
    """Refuse two grids that differ by more than rounding.

    Raises
    ------
    GridMismatchError
        If the shapes differ, or a corner lies further away than 1 % of a voxel.
    """
    if got.shape != expected.shape:
        raise GridMismatchError(
            f"{got_name} has {got.shape[::-1]} voxels along x, y, z and {expected_name} has {expected.shape[::-1]}. They must "
            "lie on the same grid: resample one to the other first (for example nilearn.image.resample_to_img)."
        )
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in expected.shape[::-1]], [1], indexing="ij")).reshape(
        4, -1
    )
    apart = np.linalg.norm(((got.affine - expected.affine) @ corners)[:3], axis=0).max()
    voxel = np.linalg.norm(expected.affine[:3, :3], axis=0).min()
    if apart > SAME_GRID * voxel:
        raise GridMismatchError(
            f"{got_name} and {expected_name} have the same shape, but their voxels lie up to {apart:.3g} mm apart (affines "
            f"{np.round(got.affine, 3).tolist()} and {np.round(expected.affine, 3).tolist()}). Resample one to the other, or "
            "correct the header that is wrong."
        )


def voxel_sizes(affine: Array) -> NDArray[np.float64]:
    """Voxel size along x, y, z in millimetres: the norms of the affine's columns."""
    sizes: NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    return sizes


def read_mask(mask: ImageLike | xr.DataArray, grid: Grid, run_name: str) -> NDArray[np.bool_]:
    """Read a mask and check it against the grid of a run.

    Parameters
    ----------
    mask : path, nibabel image or DataArray
        3-D (a fourth dimension of length 1 is dropped), of any dtype, with at most two distinct values, one of them 0.
    grid : Grid
        Grid of the run.
    run_name : str
        For messages.

    Returns
    -------
    ndarray of bool, shape (z, y, x)

    Raises
    ------
    MaskError, GridMismatchError, SourceNotFoundError, NiftiError
    """
    if isinstance(mask, xr.DataArray):
        name = "the mask"
        values = np.asarray(mask.transpose(*SPACE))
        mask_grid = grid_of(mask)
    else:
        image = _load_image(mask)
        name = os.fspath(mask) if isinstance(mask, (str, os.PathLike)) else "the mask image"
        values = np.asanyarray(image.dataobj).T
        while values.ndim > 3 and values.shape[0] == 1:
            values = values[0]
        if values.ndim != 3:
            raise MaskError(f"{name} has the shape {image.shape}; a mask is a 3-D image. Give one volume.")
        mask_grid = Grid(cast("Any", values.shape), np.asarray(image.affine, dtype=np.float64))
    check_same_grid(mask_grid, grid, name, run_name)
    levels = np.unique(values)
    if levels.size > 2 or (levels.size == 2 and 0 not in levels):
        shown = ", ".join(f"{float(level):g}" for level in levels[:5])
        raise MaskError(
            f"{name} has {levels.size} distinct values ({shown}{', ...' if levels.size > 5 else ''}); a mask has 0 outside and "
            "one other value inside. Threshold it first."
        )
    inside: NDArray[np.bool_] = values.astype(bool)
    if not inside.any():
        raise MaskError(f"{name} is empty: no voxel is inside. Give the mask of the brain.")
    return np.ascontiguousarray(inside)


def _load_image(image: ImageLike) -> Any:
    if not isinstance(image, (str, os.PathLike)):
        return image
    name = os.fspath(image)
    try:
        return nib.load(name)
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"There is no file {name}. Check the path.") from error
    except (nib.filebasedimages.ImageFileError, WrapStructError, OSError, EOFError, ValueError) as error:
        raise NiftiError(
            f"{name} cannot be read as an image: {error}. Accepted are {', '.join(SUFFIXES)}."
        ) from error


# ----------------------------------------------------------------------------------------------------------- export


class NotLosslessError(InputError):
    """Values changed since they were opened, so that the integers of their source do not hold them any more."""


class Packing(NamedTuple):
    """How values are stored: ``value = slope * stored + intercept``, with ``stored`` of ``dtype``."""

    dtype: np.dtype[Any]
    slope: float
    intercept: float

    def pack(self, values: Array) -> Array:
        """The stored values of ``values``; raises NotLosslessError where they are not exact."""
        if (self.slope, self.intercept) == (1.0, 0.0):
            return values.astype(self.dtype, copy=False)
        stored = (values - self.intercept) / self.slope
        packed = (np.rint(stored) if self.dtype.kind in "iu" else stored).astype(self.dtype)
        if not np.array_equal(packed * self.slope + self.intercept, values, equal_nan=True):
            raise NotLosslessError(
                "The data carries the scale factor of its source file, but its values were changed, so that the source's "
                "dtype does not hold them. Say that it is new data with drop_encoding()."
            )
        return packed


def to_nifti(
    array: xr.DataArray, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False
) -> nib.Nifti1Image:
    """Write an array on a voxel grid as NIfTI. No value is changed.

    An array as it was opened from a run store is written in the dtype of its source, with its scale slope, header fields
    and extensions: the whole run comes back bit for bit. Anything computed is written in the dtype that it has (bool as
    uint8), with the affine of its slice.

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
    InputError
        If the array has no grid, is not an evenly spaced slice of it, or has a dtype that NIfTI does not hold.
    """
    for dim in SPACE:
        if dim not in array.dims and dim in array.coords:
            array = array.expand_dims(dim)
    other = [dim for dim in array.dims if dim not in SPACE]
    if set(SPACE) - set(array.dims) or len(other) > 4:
        raise InputError(
            f"An array with dims {array.dims} cannot be written as NIfTI: it needs z, y and x, and at most four others."
        )
    # NIfTI is fastest in x; its fourth dimension is the last one here that is not spatial.
    array = array.transpose(*other, *SPACE)
    if path is None:
        buffer = io.BytesIO()
        image_class = _write_lossless(array, lambda: _emptied(buffer))
        return image_class.from_bytes(buffer.getvalue())
    target = Path(path)
    if not target.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"{target} cannot be written: the name of a NIfTI file ends with .nii or .nii.gz.")
    if target.exists() and not overwrite:
        raise StoreExistsError(f"{target} exists. Choose another name, or say overwrite=True.")
    partial = target.with_name(f".{target.name}.partial")
    try:
        image_class = _write_lossless(
            array, lambda: _create(partial, compress=target.name.lower().endswith(".gz"))
        )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return image_class.from_filename(target)


@contextmanager
def _emptied(buffer: io.BytesIO) -> Iterator[IO[bytes]]:
    buffer.seek(0)
    buffer.truncate()
    yield buffer


@contextmanager
def _create(path: Path, *, compress: bool) -> Iterator[IO[bytes]]:
    with path.open("wb") as file:
        if compress:
            # No name and no time in the gzip header: the same values give the same file.
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=3, mtime=0) as stream:
                yield cast("IO[bytes]", stream)
        else:
            yield file


def _write_lossless(array: xr.DataArray, create: Callable[[], AbstractContextManager[IO[bytes]]]) -> Any:
    """Write in the source's packing if that holds the values exactly, else as they are; returns the image class."""
    packing = source_packing(array)
    if packing is not None:
        try:
            with create() as stream:
                return _write(array, packing, stream)
        except NotLosslessError:
            pass
    dtype = {np.dtype(bool): np.dtype(np.uint8), np.dtype(np.float16): np.dtype(np.float32)}.get(
        array.dtype, array.dtype
    )
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(
            f"Values of dtype {array.dtype} cannot be written as NIfTI. Convert them with .astype('float64')."
        )
    with create() as stream:
        return _write(array, Packing(dtype, 1.0, 0.0), stream)


def source_packing(array: xr.DataArray | xr.Variable) -> Packing | None:
    """The packing that the array was opened with; xarray forgets it as soon as something is computed."""
    encoding = array.encoding
    if "dtype" not in encoding or not {"scale_factor", "add_offset"} & set(encoding):
        return None
    return Packing(
        np.dtype(encoding["dtype"]).newbyteorder("="),
        float(encoding.get("scale_factor", 1.0)),
        float(encoding.get("add_offset", 0.0)),
    )


def _write(array: xr.DataArray, packing: Packing, stream: IO[bytes]) -> Any:
    header, tail = _header_for(array, packing)
    stream.write(header.binaryblock + tail)
    dtype = packing.dtype.newbyteorder(header.endianness)
    for block in _volume_blocks(array, packing):
        stream.write(block.astype(dtype, copy=False).tobytes())
    single = nib.Nifti1Image if header.sizeof_hdr == 348 else nib.Nifti2Image
    return single


def _volume_blocks(array: xr.DataArray, packing: Packing) -> Iterator[Array]:
    """The stored values in file order, some whole volumes at a time."""
    if array.ndim == 3:
        yield packing.pack(np.asarray(array))
        return
    lead = array.dims[0]
    length = array.chunksizes[lead][0] if array.chunks else 1
    for start in range(0, array.sizes[lead], length):
        volumes = array.isel({lead: slice(start, start + length)})
        block = np.empty(volumes.shape, dtype=packing.dtype)
        slabs = array.chunksizes["z"] if array.chunks else (array.sizes["z"],)
        stops = np.cumsum(slabs)
        for z_start, z_stop in zip(stops - np.array(slabs), stops, strict=True):
            # Decoding a slab at a time keeps the unpacked values of a whole block out of memory.
            block[..., z_start:z_stop, :, :] = packing.pack(
                np.asarray(volumes.isel(z=slice(z_start, z_stop)))
            )
        yield block


def _header_for(array: xr.DataArray, packing: Packing) -> tuple[Any, bytes]:
    """The header of an export and the bytes between it and the data."""
    affine = slice_affine(array)
    shape = tuple(array.sizes[dim] for dim in (*SPACE[::-1], *reversed(array.dims[: array.ndim - 3])))
    raw = base64.b64decode(array.coords["grid"].attrs.get("header", ""))
    is_signal = array.dims[0] == "time"
    if raw:
        header = parse_header(raw, "the stored header")
        described = _describe(raw, "the stored header")
        same = described.shape == shape and described.dtype.newbyteorder("=") == packing.dtype
        same = same and (described.slope, described.intercept) == (packing.slope, packing.intercept)
        if is_signal and same and np.array_equal(described.affine, affine) and _is_single(header):
            return header, raw[header.sizeof_hdr :]
        tail = raw[header.sizeof_hdr :] if is_signal else b"\0\0\0\0"
        moved = not np.array_equal(described.affine, affine)
    else:
        header, tail, moved = nib.Nifti1Header(), b"\0\0\0\0", True
    if header.sizeof_hdr == 348 and max(shape) > 32767:
        header, moved = nib.nifti2.Nifti2Header(endianness=header.endianness), True
    header = _as_single(header)
    _set_fields(header, array, shape, packing, affine if moved else None)
    tail += b"\0" * (-(header.sizeof_hdr + len(tail)) % 16)
    header["vox_offset"] = header.sizeof_hdr + len(tail)
    return header, tail


def _is_single(header: Any) -> bool:
    return bool(header["magic"].item()[:3] == _SINGLE_MAGIC[header.sizeof_hdr])


def _as_single(header: Any) -> Any:
    """The same fields as the header of a single file."""
    fields = header.structarr.copy()
    fields["magic"] = _SINGLE_MAGIC[header.sizeof_hdr] + fields["magic"].item()[3:]
    return _HEADERS[header.sizeof_hdr, "single"](fields.tobytes(), endianness=header.endianness, check=False)


def _set_fields(
    header: Any, array: xr.DataArray, shape: tuple[int, ...], packing: Packing, affine: Array | None
) -> None:
    pixdim = header["pixdim"].copy()
    header.set_data_shape(shape)
    header.set_data_dtype(packing.dtype)
    header["scl_slope"], header["scl_inter"] = packing.slope, packing.intercept
    header["cal_max"] = header["cal_min"] = 0
    header["pixdim"] = pixdim
    if affine is not None:
        header.set_qform(affine, int(header["qform_code"]) or 1, strip_shears=True)
        header.set_sform(affine, int(header["sform_code"]) or 1)
    if "time" in array.coords and array.sizes.get("time", 1) > 1:
        # Microseconds are finer than any repetition time; the difference of two coordinates is not exact.
        header["pixdim"][4] = round(float(array.coords["time"][1] - array.coords["time"][0]), 6)
        header.set_xyzt_units("mm", "sec")
    elif "time" not in array.dims:
        header["pixdim"][4] = 0 if len(shape) < 4 else 1
