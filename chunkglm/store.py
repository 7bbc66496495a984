"""Zarr stores: layout, codecs, atomic creation, verification. The only module that knows zarr.

A store is one Zarr v3 group. Its root ``zarr.json`` is written last, so that a store without it is incomplete to
every reader. Before it comes a *manifest*: size and CRC32C of every other file, as the uint8 array ``manifest``.
The root's attribute ``chunkglm_seal`` holds hashes of the manifest and of the rest of the root, so that any
change to any file shows. Locally a store is built beside its place (``<name>.partial``) and renamed; at a URL it
is built in place.

Every chunk ends with the CRC32C of its bytes (the ``crc32c`` codec of Zarr, which any reader checks); reads
through chunkglm check against the manifest as well, because a missing chunk is zeros to Zarr, and a chunk from
elsewhere is sound in itself.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import dask.array
import google_crc32c
import numpy as np
import xarray as xr
import zarr
import zarr.abc.store
import zarr.core.sync
import zarr.storage
from dask.base import tokenize
from dask.callbacks import Callback
from dask.local import get_sync
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype

from chunkglm import chunkfiles, grids, nifti, plan
from chunkglm._version import __version__
from chunkglm.chunkfiles import PARTIAL, Entry
from chunkglm.errors import (
    ChunkGLMError,
    DamagedStoreError,
    IncompleteStoreError,
    InputError,
    SourceNotFoundError,
    StoreError,
    StoreExistsError,
)
from chunkglm.schema import (
    FORMAT_VERSION,
    RUN,
    SPACE,
    canonical_json,
    check_format_version,
    require,
    text_labels,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    StoreLike = str | os.PathLike[str]

# dask annotates a part of what it exports.
da: Any = dask.array

ROOT = "zarr.json"
SEAL = "chunkglm_seal"
STUDY = "chunkglm_study"
MANIFEST = "manifest"
HEADER = "nifti"

LARGEST_CHUNK = 2**30
"""Bytes; dask chunks that are larger are divided, because codecs take less than 2 GiB."""

_PACKAGES = ("dask", "nibabel", "numpy", "scipy", "xarray", "zarr")
_OWN_ATTRS = (SEAL, "ome")
_OWN_VARIABLES = (MANIFEST, HEADER)
_MANIFEST_FILES = (f"{MANIFEST}/{ROOT}", f"{MANIFEST}/c/0")


# -------------------------------------------------------------------------------------------------- locations


def _name(store: StoreLike) -> str:
    return os.fspath(store).removeprefix("file://").rstrip("/") or "/"


def _is_url(name: str) -> bool:
    return "://" in name


def _backend(name: str, *, read_only: bool) -> zarr.abc.store.Store:
    """Make the zarr store of a local path or a URL."""
    if not _is_url(name):
        return zarr.storage.LocalStore(name, read_only=read_only)
    try:
        return zarr.storage.FsspecStore.from_url(name, read_only=read_only)
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"{name} cannot be reached: {error}. Check the URL; other protocols than files need a package, which "
            "pip installs."
        ) from error


def _read(backend: zarr.abc.store.Store, key: str) -> bytes | None:
    buffer = zarr.core.sync.sync(backend.get(key, default_buffer_prototype()))
    return None if buffer is None else buffer.to_bytes()


def _list(backend: zarr.abc.store.Store, *, top: bool = False) -> list[str]:
    """List every file of a store, or the files and folders at its top."""

    async def collect() -> list[str]:
        found = backend.list_dir("") if top else backend.list()
        return sorted([key.strip("/") async for key in found])

    return zarr.core.sync.sync(collect())


def _root_attributes(name: str) -> dict[str, Any]:
    """Attributes of the group at ``name``, as far as there is one."""
    if not _is_url(name) and not Path(name).is_dir():
        return {}
    try:
        attributes = json.loads(_read(_backend(name, read_only=True), ROOT) or b"")["attributes"]
    except (ValueError, KeyError, TypeError):
        return {}
    return attributes if isinstance(attributes, dict) else {}


def _looks_like_store(backend: zarr.abc.store.Store) -> bool:
    """Whether there is a group, or only the arrays of one that has lost its root, or nothing at all."""
    return _read(backend, ROOT) is not None or all(
        _read(backend, f"{member}/{ROOT}") is not None for member in _list(backend, top=True)
    )


def exists(store: StoreLike) -> bool:
    """Whether there is anything at ``store``."""
    name = _name(store)
    if not _is_url(name):
        return os.path.lexists(name)
    return bool(_list(_backend(name, read_only=True), top=True))


# --------------------------------------------------------------------------------------------------- manifest


def _is_metadata(key: str) -> bool:
    return key == ROOT or key.endswith(f"/{ROOT}")


def _entry(key: str, content: bytes) -> Entry:
    """Size and checksum of a file, as the manifest has them.

    A chunk ends with the CRC32C of what stands before it, and the CRC32C of a text followed by its own CRC32C is
    the same for every text; so it is the checksum inside that tells chunks apart.
    """
    if _is_metadata(key) or len(content) < 4:
        return Entry(len(content), google_crc32c.value(content))
    return Entry(len(content), int.from_bytes(content[-4:], "little"))


def _is_whole(key: str, content: bytes, entry: Entry) -> bool:
    """Whether a file is the one that the manifest was made of."""
    if _entry(key, content) != entry:
        return False
    return _is_metadata(key) or google_crc32c.value(content[:-4]) == entry.crc32c


def _make_manifest(backend: zarr.abc.store.Store) -> dict[str, Entry]:
    """List every file with size and checksum; of chunks only the last four bytes are read."""
    return {key: _entry_at(backend, key) for key in _list(backend) if key != ROOT}


def _entry_at(backend: zarr.abc.store.Store, key: str) -> Entry:
    if _is_metadata(key):
        return _entry(key, _read(backend, key) or b"")
    if isinstance(backend, zarr.storage.LocalStore):
        with (backend.root / key).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 4, 0))
            return Entry(size, int.from_bytes(file.read(), "little"))
    last_four = zarr.abc.store.SuffixByteRequest(4)
    tail = zarr.core.sync.sync(backend.get(key, default_buffer_prototype(), last_four))
    size = zarr.core.sync.sync(backend.getsize(key))
    return Entry(size, int.from_bytes(tail.to_bytes() if tail is not None else b"", "little"))


def _seal(metadata: Mapping[str, Any], manifest: bytes, manifest_metadata: bytes) -> dict[str, str]:
    """Hashes of the manifest, of its own metadata, and of everything in the root but the seal."""
    attributes = {key: value for key, value in metadata["attributes"].items() if key != SEAL}
    parts = {
        "manifest": manifest,
        "manifest_metadata": manifest_metadata,
        "root": canonical_json({**metadata, "attributes": attributes}),
    }
    return {f"{part}_sha256": hashlib.sha256(content).hexdigest() for part, content in parts.items()}


# ---------------------------------------------------------------------------------------------------- reading


class _CheckedStore(zarr.storage.WrapperStore[Any]):
    """A store whose every read is held against the manifest."""

    # Newer releases of zarr have synchronous reads beside get; without them every read passes here.
    _supports_sync_io = False

    def __init__(self, store: Any, name: str = "", manifest: Mapping[str, Entry] | None = None) -> None:
        super().__init__(store)
        self.name = name
        self.manifest = dict(manifest or {})

    def with_read_only(self, read_only: bool = False) -> _CheckedStore:
        return type(self)(self._store.with_read_only(read_only), self.name, self.manifest)

    def __dask_tokenize__(self) -> tuple[str, ...]:
        return ("chunkglm store", self.name, hashlib.sha256(canonical_json(self.manifest)).hexdigest())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _CheckedStore):
            return NotImplemented
        return (self._store, self.manifest) == (other._store, other.manifest)

    def __hash__(self) -> int:
        return hash(self.name)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        buffer = await self._store.get(key, prototype, byte_range)
        entry = self.manifest.get(key)
        if entry is not None and byte_range is None:
            problem = _problem(key, None if buffer is None else buffer.to_bytes(), entry)
            if problem:
                raise _damaged(self.name, [problem])
        return buffer

    @property
    def backend(self) -> zarr.abc.store.Store:
        """The store without checks."""
        return cast("zarr.abc.store.Store", self._store)


def _problem(key: str, content: bytes | None, entry: Entry) -> str | None:
    if content is None:
        return f"{key} is missing"
    return None if _is_whole(key, content, entry) else f"{key} was altered or cut off"


def _damaged(name: str, problems: list[str]) -> DamagedStoreError:
    return DamagedStoreError(
        f"{name} is damaged: {'; '.join(problems)}. Nothing of it can be trusted; make it again from its source "
        "(with overwrite), or copy it again from where it is whole."
    )


def _open_checked(store: StoreLike) -> tuple[_CheckedStore, dict[str, Any]]:
    """Open a complete store for checked reading; returns the store and the root's attributes."""
    name = _name(store)
    if not _is_url(name) and not Path(name).is_dir():
        raise _not_a_folder(name)
    backend = _backend(name, read_only=True)
    root = _read(backend, ROOT)
    if root is None:
        raise _without_root(name, backend)
    try:
        metadata = json.loads(root)
        attrs = dict(metadata["attributes"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(name, [f"{ROOT} cannot be read ({error})"]) from error
    if SEAL not in attrs:
        raise _not_sealed(name, metadata, backend)
    check_format_version(attrs, name)
    manifest, manifest_metadata = _read_manifest(backend, name)
    if _seal(metadata, manifest, manifest_metadata) != attrs[SEAL]:
        raise _damaged(name, [f"{ROOT} and {MANIFEST} do not belong together, or one was altered"])
    entries = {key: Entry(*entry) for key, entry in json.loads(manifest).items()}
    return _CheckedStore(backend, name, entries), attrs


def _not_a_folder(name: str) -> StoreError | SourceNotFoundError:
    if Path(name + PARTIAL).is_dir():
        return IncompleteStoreError(
            f"{name} was never finished: what was begun lies in {name + PARTIAL}. Run the same command again to "
            "make it."
        )
    if Path(name).exists():
        return StoreError(
            f"{name} is a file; a store is a folder. Convert a NIfTI file with chunkglm convert."
        )
    return SourceNotFoundError(
        f"There is no store {name}. Check the path; chunkglm convert makes run stores."
    )


def _without_root(name: str, backend: zarr.abc.store.Store) -> StoreError | SourceNotFoundError:
    if _is_url(name) and not _list(backend, top=True):
        return SourceNotFoundError(f"There is no store {name}. Check the URL.")
    if not _looks_like_store(backend) or not _list(backend, top=True):
        return IncompleteStoreError(
            f"{name} is not a store: it is a folder without {ROOT}. Check the path; chunkglm convert makes stores."
        )
    return IncompleteStoreError(
        f"{name} is incomplete: it has no {ROOT}, which is written last. Make it again with overwrite (chunkglm "
        "convert --overwrite)."
    )


def _not_sealed(name: str, metadata: dict[str, Any], backend: zarr.abc.store.Store) -> StoreError:
    if metadata["attributes"].get(STUDY):
        return StoreError(
            f"{name} is a study with several runs. Open it with open_study, or give one of its runs "
            f"({name}/run-...)."
        )
    if _read(backend, _MANIFEST_FILES[0]) is not None:
        return _damaged(name, [f"{ROOT} has no attribute {SEAL} any more"])
    kind = metadata.get("node_type", "file")
    return IncompleteStoreError(
        f"{name} is a Zarr {kind} that was not written by chunkglm (or only with plain to_zarr), so nothing says "
        "whether it is complete. Open it with xarray.open_zarr and pass the dataset, or save it with chunkglm.save."
    )


def _read_manifest(backend: zarr.abc.store.Store, name: str) -> tuple[bytes, bytes]:
    if missing := [f"{key} is missing" for key in _MANIFEST_FILES if _read(backend, key) is None]:
        raise _damaged(name, missing)
    try:
        array = cast("Any", zarr.open_array(backend, path=MANIFEST, mode="r"))
        return np.asarray(array[:]).tobytes(), _read(backend, _MANIFEST_FILES[0]) or b""
    except Exception as error:  # zarr and its codecs raise many kinds for a broken array
        raise _damaged(name, [f"the array {MANIFEST} cannot be read ({error})"]) from error


def open_store(store: StoreLike) -> xr.Dataset:
    """Open anything that chunkglm saved.

    Parameters
    ----------
    store : path or URL

    Returns
    -------
    Dataset
        Lazy, with dask chunks as they are stored; what is small and not on voxels (designs, degrees of freedom) is
        read. Chunk encodings are cleared, so that any slice can be saved again.

    Raises
    ------
    SourceNotFoundError, IncompleteStoreError, FormatVersionError, DamagedStoreError
        The last also later, when a chunk that is read is missing or altered.
    """
    checked, _ = _open_checked(store)
    ds: xr.Dataset = xr.open_zarr(
        cast("Any", checked), consolidated=False, chunks={}, drop_variables=_OWN_VARIABLES
    )
    arrays = {key.removesuffix(f"/{ROOT}") for key in checked.manifest if key.endswith(f"/{ROOT}")}
    if missing := arrays - set(ds.variables) - set(_OWN_VARIABLES):
        raise _damaged(checked.name, [f"{array}/{ROOT} is missing" for array in sorted(missing)])
    for name in _OWN_ATTRS:
        ds.attrs.pop(name, None)
    for variable in ds.variables.values():
        for key in ("chunks", "preferred_chunks", "shards"):
            variable.encoding.pop(key, None)
    if not _is_url(checked.name):
        ds = ds.assign({name: _read_directly(ds[name], str(name), checked) for name in ds.data_vars})
    small = [
        name
        for name, variable in ds.variables.items()
        if variable.chunks is not None
        and not set(variable.dims) & set(SPACE)
        and variable.nbytes <= plan.CHUNK_BYTES
    ]
    # Not on the user's scheduler: opening is not computing.
    return ds.assign({name: ds[name].compute(scheduler=get_sync) for name in small})


class StoredArray:
    """An array of a local store, whose chunks are read without zarr, and checked.

    Attributes
    ----------
    shape, dtype, ndim
        Of the values, in physical units.
    """

    def __init__(
        self, array: Any, name: str, store: _CheckedStore, scale: tuple[float, float] | None
    ) -> None:
        self.shape, self.ndim = array.shape, array.ndim
        self.dtype = np.dtype(np.float64) if scale is not None else array.dtype
        self._array, self._name, self._store, self._scale = array, name, store, scale

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return (self._store.__dask_tokenize__(), self._name)

    def __getitem__(self, key: tuple[Any, ...]) -> np.ndarray[Any, Any]:
        place = self._within_a_chunk(key)
        values = np.asarray(self._array[key]) if place is None else self._read(place[0])[place[1]]
        if self._scale is not None:
            # As xarray decodes it.
            values = values.astype(np.float64)
            values *= self._scale[0]
            values += self._scale[1]
        return values

    def _within_a_chunk(self, key: tuple[Any, ...]) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
        """Index of the chunk that holds all that is asked for, and the place in it; None if none does."""
        if len(key) != self.ndim:
            return None
        index, inside = [], []
        for part, length, n in zip(key, self._array.chunks, self.shape, strict=True):
            if isinstance(part, slice) and part.step in {None, 1}:
                start, stop, _ = part.indices(n)
                number = start // length
                if not start < stop <= (number + 1) * length:
                    return None
                inside.append(slice(start - number * length, stop - number * length))
            elif isinstance(part, int | np.integer) and 0 <= part < n:
                number = int(part) // length
                inside.append(int(part) - number * length)
            else:
                return None
            index.append(number)
        return tuple(index), tuple(inside)

    def _read(self, index: tuple[int, ...]) -> np.ndarray[Any, Any]:
        key = _chunk_key(self._name, index)
        path, entry = Path(self._store.name) / key, self._store.manifest.get(key)
        try:
            return chunkfiles.read_chunk(path, entry, self._array.chunks, self._array.dtype)
        except chunkfiles.ChunkProblemError as error:
            raise _damaged(self._store.name, [f"{key} {error}"]) from error


def _chunk_key(name: str, index: tuple[int, ...]) -> str:
    return "/".join([name, "c", *map(str, index)])


def _read_directly(variable: xr.DataArray, name: str, store: _CheckedStore) -> xr.DataArray:
    """Have the chunks of a large variable read without zarr; as it is where it is decoded in any unusual way."""
    encoding = variable.encoding
    if variable.chunks is None or not set(variable.dims) & set(SPACE):
        return variable
    array = cast("Any", zarr.open_array(cast("Any", store), path=name, mode="r"))
    packing = nifti.source_packing(variable)
    usual = array.dtype == variable.dtype if packing is None else variable.dtype == np.float64
    codecs, ours = (
        [one.to_dict() for one in some] for some in (array.metadata.codecs[1:], _compressors(array.dtype))
    )
    if not usual or not chunkfiles.is_plain(array.dtype) or codecs != ours:
        return variable
    if "_FillValue" in encoding and not np.isnan(encoding["_FillValue"]):
        return variable
    # Not from the packing, for which -0.0 is 0.0: that would turn -0.0 in the data into 0.0.
    scale = None if packing is None else (encoding.get("scale_factor", 1.0), encoding.get("add_offset", -0.0))
    stored = StoredArray(array, name, store, scale)
    meta = np.empty((0,) * stored.ndim, dtype=stored.dtype)
    data = da.from_array(stored, chunks=array.chunks, name=f"{name}-{tokenize(stored)}", meta=meta)
    return variable.copy(data=data)


def open_run(store: StoreLike) -> xr.Dataset:
    """Open a run store.

    Parameters
    ----------
    store : path or URL
        As :func:`chunkglm.convert` wrote it.

    Returns
    -------
    Dataset
        ``bold (time, z, y, x)`` in physical units, ``mask (z, y, x)``, ``mean_image (z, y, x)``, lazily;
        coordinates ``time`` (s), ``z``, ``y``, ``x`` and ``grid``.

    Raises
    ------
    SourceNotFoundError, IncompleteStoreError, FormatVersionError, DamagedStoreError, InputError
    """
    ds = open_store(store)
    require(ds, RUN, RUN, f"{_name(store)}, opened as a run,")
    return ds[list(RUN)]


def open_study(store: StoreLike) -> xr.DataTree:
    """Open a study: all run stores in a group.

    Parameters
    ----------
    store : path or URL
        A group with run stores ``run-<label>``.

    Returns
    -------
    DataTree
        One child a run, named as its store, in natural order of the labels.

    Raises
    ------
    SourceNotFoundError, IncompleteStoreError, DamagedStoreError
    """
    name = _name(store)
    return xr.DataTree.from_dict({label: open_run(f"{name}/{label}") for label in _run_names(name)})


def _run_names(name: str) -> list[str]:
    """Names of the run stores in a study, in natural order."""
    if not _is_url(name) and not Path(name).is_dir():
        raise SourceNotFoundError(
            f"There is no study {name}. Check the path; chunkglm convert and run make studies."
        )
    members = _list(_backend(name, read_only=True), top=True)
    names = [key for key in members if key.startswith("run-") and not key.endswith(PARTIAL)]
    if not names:
        raise SourceNotFoundError(
            f"{name} holds no run stores (groups named run-<label>). Convert runs into it: chunkglm convert "
            f"RUN.nii.gz {name}/run-1."
        )
    return sorted(names, key=_natural)


def _natural(label: str) -> tuple[Any, ...]:
    number = label.removeprefix("run-")
    return (0, int(number), label) if number.isdecimal() else (1, 0, label)


def verify(store: StoreLike) -> None:
    """Read every file of a store and hold it against the manifest.

    Parameters
    ----------
    store : path or URL
        A run, fit or other store that chunkglm wrote, or a study of run stores.

    Raises
    ------
    DamagedStoreError
        Naming every file that is missing, altered, cut off or foreign.
    SourceNotFoundError, IncompleteStoreError, FormatVersionError
    """
    name = _name(store)
    damage = []
    for place in [f"{name}/{label}" for label in _run_names(name)] if is_study(name) else [name]:
        try:
            _verify(place)
        except DamagedStoreError as error:
            damage.append(str(error))
    if damage:
        raise DamagedStoreError("\n".join(damage))


def _verify(name: str) -> None:
    checked, _ = _open_checked(name)
    foreign = set(_list(checked.backend)) - set(checked.manifest) - {ROOT, *_MANIFEST_FILES}
    problems = [f"{key} does not belong to it" for key in foreign]
    for key, entry in checked.manifest.items():
        problem = _problem(key, _read(checked.backend, key), entry)
        problems += [problem] if problem else []
    if problems:
        raise _damaged(name, sorted(problems))


def is_study(store: StoreLike) -> bool:
    """Whether ``store`` is a group of run stores."""
    return bool(_root_attributes(_name(store)).get(STUDY))


# ---------------------------------------------------------------------------------------------------- writing


class _RootLastStore(zarr.storage.WrapperStore[Any]):
    """A store that keeps the root's metadata back until everything else is written."""

    _supports_sync_io = False

    def __init__(self, store: Any, root: Any = None) -> None:
        super().__init__(store)
        self.root = root
        self._lock = threading.Lock()
        self._n_writing = 0
        self._stopped = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._store, self.root)

    def stop(self) -> None:
        """Wait for what is being written, and write nothing any more.

        When a computation fails, dask raises while other tasks are still running.
        """
        with self._lock:
            self._stopped = True
        while self._n_writing:
            time.sleep(0.001)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write something, unless the store was given up."""
        with self._lock:
            if self._stopped:
                raise StoreError("The store was given up; nothing is written to it any more.")
            self._n_writing += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_writing -= 1

    def with_read_only(self, read_only: bool = False) -> _RootLastStore:
        return type(self)(self._store.with_read_only(read_only), self.root)

    async def set(self, key: str, value: Any) -> None:
        if key == ROOT:
            self.root = value
            return
        with self.writing():
            await self._store.set(key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        if key == ROOT:
            self.root = self.root if self.root is not None else value
            return
        with self.writing():
            await self._store.set_if_not_exists(key, value)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        if key == ROOT:
            return self.root
        return await self._store.get(key, prototype, byte_range)


class StoreWriter:
    """A store under construction; made by :func:`writing`."""

    def __init__(self, backend: zarr.abc.store.Store) -> None:
        self._backend = backend
        self._store = _RootLastStore(backend)
        self._chunks: dict[str, tuple[int, ...]] = {}

    def create(self, ds: xr.Dataset, chunks: Mapping[str, tuple[int, ...]]) -> Any:
        """Write metadata, attributes and everything that is in memory.

        Parameters
        ----------
        ds : Dataset
        chunks : mapping of str to tuple of int
            Chunk shapes of its arrays.

        Returns
        -------
        dask.Delayed
            Computing it writes the lazy variables.

        Raises
        ------
        InputError
            If Zarr has no form for something in it.
        """
        self._chunks.update(chunks)
        encoding = {
            str(name): _encoding(variable, chunks.get(str(name))) for name, variable in ds.variables.items()
        }
        try:
            return ds.to_zarr(
                cast("Any", self._store),
                mode="w-",
                consolidated=False,
                zarr_format=3,
                compute=False,
                write_empty_chunks=True,
                encoding=encoding,
            )
        except ChunkGLMError:
            raise
        except (TypeError, ValueError, NotImplementedError) as error:
            raise InputError(
                f"The dataset cannot be saved: {error}. Change or drop what is named."
            ) from error

    def stop(self) -> None:
        """Wait for what is being written, and write no array any more."""
        self._store.stop()

    def array(self, name: str) -> Any:
        """Open the zarr array of a variable, to write blocks to."""
        return zarr.open_array(self._store, path=name, mode="r+", config={"write_empty_chunks": True})

    def write_chunk(self, name: str, index: tuple[int, ...], values: np.ndarray[Any, Any]) -> None:
        """Write one chunk of an array.

        Parameters
        ----------
        name : str
            Of the array.
        index : tuple of int
            Of the chunk.
        values : ndarray
            In the dtype of the array; all of the chunk that lies in the array.
        """
        shape = self._chunks[name]
        if isinstance(self._backend, zarr.storage.LocalStore):
            with self._store.writing():
                chunkfiles.write_chunk(self._backend.root / _chunk_key(name, index), values, shape)
            return
        starts = [i * length for i, length in zip(index, shape, strict=True)]
        place = tuple(slice(start, start + n) for start, n in zip(starts, values.shape, strict=True))
        self.array(name)[place] = values

    def write_block(self, name: str, start: tuple[int, ...], values: np.ndarray[Any, Any]) -> None:
        """Write a part of an array that is made of whole chunks.

        Parameters
        ----------
        name : str
            Of the array.
        start : tuple of int
            Where the part begins.
        values : ndarray
        """
        shape = self._chunks[name]
        numbers = [range(0, n, length) for n, length in zip(values.shape, shape, strict=True)]
        for place in itertools.product(*numbers):
            index = tuple((s + p) // length for s, p, length in zip(start, place, shape, strict=True))
            part = values[tuple(slice(p, p + length) for p, length in zip(place, shape, strict=True))]
            self.write_chunk(name, index, part)

    def compute(self, ds: xr.Dataset, pending: Any) -> None:
        """Compute and write what is lazy.

        Parameters
        ----------
        ds : Dataset
            As it was given to :meth:`create`.
        pending : dask.Delayed
            What that gave back.
        """
        lazy = {str(name): variable for name, variable in ds.variables.items() if variable.chunks is not None}
        local = isinstance(self._backend, zarr.storage.LocalStore)
        if local and all(map(_is_stored_as_it_is, lazy.values())):
            targets = [_ChunkTarget(self, name) for name in lazy]
            da.store([variable.data for variable in lazy.values()], targets, lock=False)
        else:
            pending.compute()

    def finish(self, attrs: Mapping[str, Any]) -> None:
        """Write the manifest and then, last, the root with ``attrs`` added to its attributes."""
        manifest = canonical_json(_make_manifest(self._backend))
        zarr.create_array(
            self._store,
            name=MANIFEST,
            data=np.frombuffer(manifest, dtype=np.uint8),
            chunks=(len(manifest),),
            compressors=_compressors(np.dtype(np.uint8)),
            dimension_names=("manifest_byte",),
        )
        metadata = json.loads(self._store.root.to_bytes())
        metadata["attributes"].update(attrs)
        metadata["consolidated_metadata"] = self._consolidated()
        manifest_metadata = _read(self._backend, _MANIFEST_FILES[0]) or b""
        metadata["attributes"][SEAL] = _seal(metadata, manifest, manifest_metadata)
        buffer = default_buffer_prototype().buffer.from_bytes(json.dumps(metadata, indent=1).encode())
        zarr.core.sync.sync(self._backend.set(ROOT, buffer))

    def _consolidated(self) -> dict[str, Any]:
        """The metadata of all arrays once more, where plain xarray and zarr look for them first."""
        arrays = [key for key in _list(self._backend) if key.endswith(f"/{ROOT}")]
        found = {
            key.removesuffix(f"/{ROOT}"): json.loads(_read(self._backend, key) or b"{}")
            for key in sorted(arrays)
        }
        return {"kind": "inline", "must_understand": False, "metadata": found}


class _ChunkTarget:
    """An array of a store under construction, to which dask writes chunk by chunk."""

    def __init__(self, writer: StoreWriter, name: str) -> None:
        self._writer, self._name = writer, name

    def __setitem__(self, key: tuple[slice, ...], values: np.ndarray[Any, Any]) -> None:
        self._writer.write_block(self._name, tuple(part.start for part in key), values)


def _is_stored_as_it_is(variable: xr.Variable) -> bool:
    """Whether xarray would write the values of a variable as they lie in memory."""
    encoding = variable.encoding
    fill = encoding.get("_FillValue")
    return (
        variable.ndim > 0
        and chunkfiles.is_plain(variable.dtype)
        and encoding.get("dtype", variable.dtype) == variable.dtype
        and not {"scale_factor", "add_offset", "missing_value"} & set(encoding)
        and (fill is None or bool(np.isnan(fill)))
    )


def _compressors(dtype: np.dtype[Any]) -> list[Any]:
    """Codecs after the bytes, those of :mod:`chunkglm.chunkfiles`."""
    blosc = BloscCodec(
        cname=cast("Any", chunkfiles.CNAME),
        clevel=chunkfiles.CLEVEL,
        shuffle=cast("Any", chunkfiles.SHUFFLE),
        typesize=dtype.itemsize,
    )
    return [blosc, Crc32cCodec()]


def _encoding(variable: xr.Variable, chunks: tuple[int, ...] | None) -> dict[str, Any]:
    dtype = variable.dtype if variable.dtype.kind in "iufb" else np.dtype(np.uint8)
    encoding: dict[str, Any] = {"compressors": _compressors(dtype)}
    if chunks is not None:
        encoding["chunks"] = chunks
    if "scale_factor" in variable.attrs:
        # With a fill value xarray decodes scaled float32 in float32, not in float64.
        encoding["_FillValue"] = None
    return encoding


@contextmanager
def writing(store: StoreLike, *, overwrite: bool) -> Iterator[StoreWriter]:
    """Build a store so that it is complete or is not there.

    Parameters
    ----------
    store : path or URL
    overwrite : bool
        Replace what is there, once the new store is complete (at a URL: at once).

    Yields
    ------
    StoreWriter
        ``finish`` must be called on it.

    Raises
    ------
    StoreExistsError
        If something is there and ``overwrite`` is not given.
    StoreError
        If the place cannot be written.
    """
    name = _name(store)
    check_free(name, overwrite=overwrite)
    try:
        with _at_url(name) if _is_url(name) else _beside(Path(name)) as writer:
            try:
                yield writer
            finally:
                writer.stop()
    except ChunkGLMError:
        raise
    except OSError as error:
        raise StoreError(
            f"{name} was not written: {error}. Check that the place has space and that you may write there."
        ) from error


@contextmanager
def _at_url(name: str) -> Iterator[StoreWriter]:
    backend = _backend(name, read_only=False)
    zarr.core.sync.sync(backend.delete_dir(""))
    try:
        yield StoreWriter(backend)
        parent = name.rpartition("/")[0]
        if parent.endswith(".zarr"):
            buffer = default_buffer_prototype().buffer.from_bytes(_study_root())
            zarr.core.sync.sync(_backend(parent, read_only=False).set_if_not_exists(ROOT, buffer))
    except BaseException:
        with suppress(OSError):
            zarr.core.sync.sync(backend.delete_dir(""))
        raise


@contextmanager
def _beside(target: Path) -> Iterator[StoreWriter]:
    target = target.resolve() if target.is_symlink() else target
    partial = target.with_name(target.name + PARTIAL)
    folders = [target.parent, *target.parent.parents]
    made = [folder for folder in folders if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(partial)
        partial.mkdir()
        try:
            yield StoreWriter(_backend(str(partial), read_only=False))
            _make_study(target.parent)
            _move(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _remove_unfinished(partial: Path) -> None:
    """Remove what an earlier attempt left, and nothing else."""
    if not os.path.lexists(partial):
        return
    if not partial.is_dir() or not all(_is_unfinished_member(member) for member in partial.iterdir()):
        raise StoreExistsError(f"{partial} is in the way, and is no unfinished store. Move it away.")
    shutil.rmtree(partial)


def _is_unfinished_member(path: Path) -> bool:
    """Whether a path is an array that is being written, or a file that zarr is writing."""
    if path.is_dir():
        return all(child.name == "c" or _is_unfinished_member(child) for child in path.iterdir())
    return path.name == ROOT or path.name.endswith(PARTIAL)


def check_free(store: StoreLike, *, overwrite: bool) -> None:
    """Refuse to write where something is, unless ``overwrite``; and never replace what is not one store.

    Raises
    ------
    StoreExistsError
    """
    name = _name(store)
    if SEAL in _root_attributes(name.rpartition("/")[0]):
        raise StoreExistsError(f"{name} would lie inside another store. Choose a place beside it.")
    if not exists(name):
        return
    if not overwrite:
        raise StoreExistsError(
            f"{name} exists. Choose another place, or say overwrite (--overwrite) to replace it."
        )
    if is_study(name):
        raise StoreExistsError(
            f"{name} is a study with several runs, so it is not replaced. Write to one of its runs "
            f"({name}/run-...), or remove it."
        )
    is_folder = _is_url(name) or Path(name).is_dir()
    if not is_folder or not _looks_like_store(_backend(name, read_only=True)):
        raise StoreExistsError(
            f"{name} exists and is not a Zarr store, so it is not replaced. Choose another place."
        )


def _move(partial: Path, target: Path) -> None:
    """Put a finished store in its place; what was there is removed only after."""
    if not target.exists():
        partial.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        target.rename(aside / target.name)
        try:
            partial.rename(target)
        except OSError:
            (aside / target.name).rename(target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _make_study(folder: Path) -> None:
    """Make the folder of a store, if it is named ``*.zarr``, a group that plain xarray can open."""
    if folder.suffix == ".zarr" and not (folder / ROOT).exists() and not (folder / ".zgroup").exists():
        (folder / ROOT).write_bytes(_study_root())


def _study_root() -> bytes:
    attributes = {STUDY: True, "format_version": FORMAT_VERSION}
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(group, indent=1).encode()


def save(
    ds: xr.Dataset,
    store: StoreLike,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Save a dataset completely or not at all.

    Everything lazy is computed, in one pass and block by block, on the scheduler that dask is set to.

    Parameters
    ----------
    ds : Dataset
        A run (or a slice of one), a fit, contrasts, fixed effects, or anything else.
    store : path or URL
    overwrite : bool
        Replace an existing store.
    progress : callable, optional
        Called with the number of finished tasks and of all tasks.

    Returns
    -------
    Dataset
        The saved data, opened from ``store``.

    Raises
    ------
    StoreExistsError, StoreError, InputError
    """
    check_free(store, overwrite=overwrite)
    ds = savable(ds)
    with writing(store, overwrite=overwrite) as writer:
        pending = writer.create(ds, chunk_shapes(ds))
        with _Counting(progress) if progress else nullcontext():
            writer.compute(ds, pending)
        writer.finish({})
    return open_store(store)


def savable(ds: xr.Dataset) -> xr.Dataset:
    """Make a dataset fit the format: uniform chunks, variable-length strings, attributes, and what viewers need.

    Parameters
    ----------
    ds : Dataset

    Returns
    -------
    Dataset
        With the attributes ``format_version``, ``chunkglm_version`` and ``package_versions``; and, if it has
        ``bold`` on a grid, the OME-Zarr attribute ``ome`` and the binary header as the uint8 variable ``nifti``.

    Raises
    ------
    InputError
        If a name is taken, or values changed that carry the scale factor of their source.
    """
    if taken := set(_OWN_VARIABLES) & set(ds.variables):
        raise InputError(
            f"The dataset has a variable {' and '.join(sorted(taken))!r}, a name that stores use themselves. Rename "
            "it with Dataset.rename."
        )
    header, ome = _for_viewers(ds)
    for name, variable in ds.variables.items():
        fitting = _savable_variable(variable)
        if fitting is not variable:
            ds = ds.assign_coords({name: fitting}) if name in ds.coords else ds.assign({name: fitting})
    versions = [f"{package} {version(package)}" for package in _PACKAGES]
    ds = ds.assign_attrs(
        format_version=FORMAT_VERSION, chunkglm_version=__version__, package_versions=versions
    )
    if header is not None:
        ds[HEADER] = (f"{HEADER}_byte", np.frombuffer(header, dtype=np.uint8))
        ds.attrs["ome"] = ome
    return ds


def _savable_variable(variable: xr.Variable) -> xr.Variable:
    """Give a variable the form that the format has for it; the same object where it is so already."""
    values = variable.values if variable.dtype.kind in "UTO" else None
    if values is not None and all(isinstance(value, str) for value in values.flat):
        labels = text_labels(values.ravel().tolist()).reshape(variable.shape)
        return xr.Variable(variable.dims, labels, variable.attrs)
    packing = nifti.source_packing(variable)
    if packing is not None:
        variable = _packed(variable, packing)
    if variable.chunks is not None and not _is_uniform(variable.chunks):
        sizes = {dim: max(lengths) for dim, lengths in variable.chunksizes.items()}
        variable = variable.chunk(sizes)
    if variable.chunks is not None and _largest(variable) > LARGEST_CHUNK:
        variable = variable.chunk(dict(zip(variable.dims, _bounded_shape(variable), strict=True)))
    return variable


def _packed(variable: xr.Variable, packing: nifti.Packing) -> xr.Variable:
    """Turn values that were opened from integers into these integers, with their scale as attributes."""
    data: Any = variable.data if variable.chunks is not None else np.asarray(variable.data)
    data = (
        packing.pack(data) if variable.chunks is None else data.map_blocks(packing.pack, dtype=packing.dtype)
    )
    # Adding 0.0 would turn -0.0 into 0.0, adding -0.0 does not.
    scale = {"scale_factor": packing.slope, "add_offset": packing.intercept or -0.0}
    return xr.Variable(variable.dims, data, {**variable.attrs, **scale})


def _is_uniform(chunks: tuple[tuple[int, ...], ...]) -> bool:
    return all(len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0] for sizes in chunks)


def _largest(variable: xr.Variable) -> int:
    return int(np.prod([max(sizes) for sizes in variable.chunks or ()]) * variable.dtype.itemsize)


def chunk_shapes(ds: xr.Dataset) -> dict[str, tuple[int, ...]]:
    """Chunk shapes that the arrays of a dataset have in a store."""
    return {str(name): _chunk_shape(variable) for name, variable in ds.variables.items() if variable.ndim}


def _chunk_shape(variable: xr.Variable) -> tuple[int, ...]:
    """Chunk shape as dask has it; of an array in memory, chunks of bounded size along the first dimensions."""
    if variable.chunks is not None:
        return tuple(max(sizes[0], 1) for sizes in variable.chunks)
    return _bounded_shape(variable)


def _bounded_shape(variable: xr.Variable) -> tuple[int, ...]:
    shape = list(variable.shape)
    for axis in range(len(shape)):
        while shape[axis] > 1 and int(np.prod(shape)) * variable.dtype.itemsize > plan.CHUNK_BYTES:
            shape[axis] = (shape[axis] + 1) // 2
    return tuple(max(n, 1) for n in shape)


def _for_viewers(ds: xr.Dataset) -> tuple[bytes | None, dict[str, Any]]:
    """The header of ``bold`` and OME-Zarr 0.5 attributes over it, if it is a signal on an even grid."""
    if "bold" not in ds or ds["bold"].dims != ("time", *SPACE) or "grid" not in ds.coords:
        return None, {}
    try:
        header, affine = nifti.export_header(ds["bold"]), grids.slice_affine(ds["bold"])
    except InputError:
        return None, {}
    x, y, z = (float(size) for size in grids.voxel_sizes(affine))
    times = ds["time"].values
    step = abs(round(float(times[1] - times[0]), 6)) if times.size > 1 and times.dtype.kind in "iuf" else 0.0
    axes = [{"name": "time", "type": "time", "unit": "second"}]
    axes += [{"name": dim, "type": "space", "unit": "millimeter"} for dim in SPACE]
    transformations = [{"type": "scale", "scale": [step or 1.0, z, y, x]}]
    datasets = [{"path": "bold", "coordinateTransformations": transformations}]
    return header, {"version": "0.5", "multiscales": [{"name": "bold", "axes": axes, "datasets": datasets}]}


class _Counting(Callback):  # type: ignore[misc, unused-ignore]
    """Tells how many tasks of a computation are finished."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        cast("Any", super()).__init__(start_state=self._begin, posttask=self._advance)
        self._progress = progress
        self._done = self._total = 0

    def _begin(self, dsk: Any, state: Any) -> None:  # noqa: ARG002  (dask's signature)
        self._done, self._total = 0, sum(len(state[key]) for key in ("ready", "waiting"))

    def _advance(self, key: Any, result: Any, dsk: Any, state: Any, worker: Any) -> None:  # noqa: ARG002
        self._done += 1
        self._progress(self._done, self._total)
