"""Opening stores, with every read held against the manifest, and verifying them."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import xarray as xr
import zarr
import zarr.abc.store
import zarr.storage
from dask.base import tokenize
from dask.local import get_sync

from chunkglm import chunkfiles, nifti, plan
from chunkglm.blocks import from_source
from chunkglm.chunkfiles import PARTIAL, Entry
from chunkglm.errors import (
    DamagedStoreError,
    IncompleteStoreError,
    SourceNotFoundError,
    StoreError,
)
from chunkglm.schema import RUN, SPACE, canonical_json, check_format_version, require
from chunkglm.store.manifest import (
    MANIFEST,
    MANIFEST_FILES,
    OWN_ATTRS,
    OWN_VARIABLES,
    chunk_key,
    compressors,
    is_whole_file,
    make_seal,
)
from chunkglm.store.places import (
    MADE_OF,
    ROOT,
    SEAL,
    STUDY,
    absolute,
    backend_of,
    is_study,
    is_url,
    list_files,
    looks_like_store,
    read_file,
    root_attributes,
    store_name,
    study_members,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chunkglm.store.places import StoreLike

DATA_TYPES = {
    "bool", "string", "float32", "float64", *(f"{sign}int{8 * n}" for sign in ("", "u") for n in (1, 2, 4, 8)),
}  # fmt: skip
CODECS = {"bytes", "vlen-utf8", "blosc", "crc32c"}
"""What arrays of a store are made of."""


class _CheckedStore(zarr.storage.WrapperStore[Any]):
    """A store whose every read is held against the manifest."""

    # Newer releases of zarr have synchronous reads beside get; without them every read passes here.
    _supports_sync_io = False

    def __init__(
        self, store: Any, name: str = "", manifest: Mapping[str, Entry] | None = None, seal: str = ""
    ) -> None:
        super().__init__(store)
        self.name, self.seal = name, seal
        self.manifest = dict(manifest or {})
        self._root = os.path.realpath(name) if name and not is_url(name) else None

    def with_read_only(self, read_only: bool = False) -> _CheckedStore:
        return type(self)(self._store.with_read_only(read_only), self.name, self.manifest, self.seal)

    def __reduce__(self) -> tuple[Any, ...]:
        # A manifest has an entry for every chunk: other processes read it from the store, each once.
        return _reopen, (absolute(self.name), self.seal)

    def __dask_tokenize__(self) -> tuple[str, ...]:
        return ("chunkglm store", self.name, hashlib.sha256(canonical_json(self.manifest)).hexdigest())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _CheckedStore):
            return NotImplemented
        return (self._store, self.manifest) == (other._store, other.manifest)

    def __hash__(self) -> int:
        return hash(self.name)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        self.refuse_link(key)
        buffer = await self._store.get(key, prototype, byte_range)
        entry = self.manifest.get(key)
        if entry is not None and byte_range is None:
            problem = _problem(key, None if buffer is None else buffer.to_bytes(), entry)
            if problem:
                raise _damaged(self.name, [problem])
        return buffer

    @property
    def root(self) -> str:
        """Where a local store is, for processes in any working directory."""
        return self._root or self.name

    def leaves(self, key: str) -> bool:
        """Whether a file of a local store is a link to somewhere else."""
        root = self._root
        return root is not None and not os.path.realpath(f"{root}/{key}").startswith(f"{root}/")

    def refuse_link(self, key: str) -> None:
        """Refuse a file that is a link to somewhere else."""
        if self.leaves(key):
            raise _damaged(self.name, [f"{key} is a link that leaves it"])

    @property
    def backend(self) -> zarr.abc.store.Store:
        """The store without checks."""
        return cast("zarr.abc.store.Store", self._store)


def _problem(key: str, content: bytes | None, entry: Entry) -> str | None:
    if content is None:
        return f"{key} is missing"
    return None if is_whole_file(key, content, entry) else f"{key} was altered or cut off"


def _damaged(name: str, problems: list[str]) -> DamagedStoreError:
    return DamagedStoreError(
        f"{name} is damaged: {'; '.join(problems)}. Nothing of it can be trusted; make it again from its source "
        "(with overwrite), or copy it again from where it is whole."
    )


def open_checked(store: StoreLike) -> tuple[_CheckedStore, dict[str, Any]]:
    """Open a complete store for checked reading; returns the store and the root's metadata."""
    name = store_name(store)
    if not is_url(name) and not Path(name).is_dir():
        raise _not_a_folder(name)
    backend = backend_of(absolute(name), read_only=True)
    root = read_file(backend, ROOT)
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
    if make_seal(metadata, manifest, manifest_metadata) != attrs[SEAL]:
        raise _damaged(name, [f"{ROOT} and {MANIFEST} do not belong together, or one was altered"])
    entries = {key: Entry(*entry) for key, entry in json.loads(manifest).items()}
    if outside := [key for key in entries if ".." in key.split("/") or key.startswith("/")]:
        raise _damaged(name, [f"{key} lies outside of it" for key in outside])
    _refuse_unknown_arrays(name, metadata["consolidated_metadata"]["metadata"])
    seal = canonical_json(attrs[SEAL]).decode()
    return _CheckedStore(backend, name, entries, seal), metadata


@lru_cache(maxsize=1024)
def _reopen(name: str, seal: str) -> _CheckedStore:
    """The store that another process opened."""
    checked, _ = open_checked(name)
    if checked.seal != seal:
        raise StoreError(
            f"{name} was replaced by another store since it was opened. Open it again, and compute from there."
        )
    return checked


def _refuse_unknown_arrays(name: str, arrays: Mapping[str, Any]) -> None:
    """Refuse types and codecs that chunkglm never writes: they may be anything, also programs."""
    for array, about in arrays.items():
        codecs = [str(codec["name"]) for codec in about["codecs"]]
        if str(about["data_type"]) not in DATA_TYPES or not set(codecs) <= CODECS:
            raise _damaged(
                name, [f"{array} has the type {about['data_type']} and the codecs {', '.join(codecs)}"]
            )


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
    if is_url(name) and not list_files(backend, top=True):
        return SourceNotFoundError(f"There is no store {name}. Check the URL.")
    if is_study(name):
        return _is_a_study(name)
    if not looks_like_store(backend) or not list_files(backend, top=True):
        return IncompleteStoreError(
            f"{name} is not a store: it is a folder without {ROOT}. Check the path; chunkglm convert makes stores."
        )
    return IncompleteStoreError(
        f"{name} is incomplete: it has no {ROOT}, which is written last. Make it again with overwrite (chunkglm "
        "convert --overwrite)."
    )


def _is_a_study(name: str) -> StoreError:
    return StoreError(
        f"{name} is a study with several runs. Open it with open_study, or give one of its runs ({name}/run-...)."
    )


def _not_sealed(name: str, metadata: dict[str, Any], backend: zarr.abc.store.Store) -> StoreError:
    if metadata["attributes"].get(STUDY):
        return _is_a_study(name)
    if read_file(backend, MANIFEST_FILES[0]) is not None:
        return _damaged(name, [f"{ROOT} has no attribute {SEAL} any more"])
    kind = metadata.get("node_type", "file")
    return IncompleteStoreError(
        f"{name} is a Zarr {kind} that was not written by chunkglm (or only with plain to_zarr), so nothing says "
        "whether it is complete. Open it with xarray.open_zarr and pass the dataset, or save it with chunkglm.save."
    )


def _read_manifest(backend: zarr.abc.store.Store, name: str) -> tuple[bytes, bytes]:
    metadata, content = (read_file(backend, key) for key in MANIFEST_FILES)
    if metadata is None or content is None:
        both = zip(MANIFEST_FILES, (metadata, content), strict=True)
        raise _damaged(name, [f"{key} is missing" for key, found in both if found is None])
    try:
        (length,) = json.loads(metadata)["shape"]
        manifest = chunkfiles.decode_chunk(content, (length,), np.dtype(np.uint8)).tobytes()
    except (chunkfiles.ChunkProblemError, ValueError, KeyError, TypeError) as error:
        raise _damaged(name, [f"the array {MANIFEST} cannot be read ({error})"]) from error
    return manifest, metadata


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
    checked, metadata = open_checked(store)
    # All metadata lies in the root, which the seal holds.
    ds: xr.Dataset = xr.open_zarr(
        cast("Any", checked), consolidated=True, chunks={}, drop_variables=OWN_VARIABLES
    )
    arrays = metadata["consolidated_metadata"]["metadata"]
    for name in OWN_ATTRS:
        ds.attrs.pop(name, None)
    for variable in ds.variables.values():
        for key in ("chunks", "preferred_chunks", "shards"):
            variable.encoding.pop(key, None)
    if not is_url(checked.name):
        ds = ds.assign({name: _read_directly(ds[name], arrays[str(name)], checked) for name in ds.data_vars})
    small = [
        name
        for name, variable in ds.variables.items()
        if variable.chunks is not None
        and not set(variable.dims) & set(SPACE)
        and variable.nbytes <= plan.CHUNK_BYTES
    ]
    # Not on the user's scheduler: opening is not computing.
    ds = ds.assign({name: ds[name].compute(scheduler=get_sync) for name in small})
    for variable in ds.variables.values():
        if not variable.dims:
            variable.load()
    # Labels as they were before they were saved: numpy's own strings cannot be compared or filled up with anything else.
    texts = {
        name: variable.astype(object) for name, variable in ds.variables.items() if variable.dtype.kind == "T"
    }
    return ds.assign_coords({name: one for name, one in texts.items() if name in ds.coords}).assign(
        {name: one for name, one in texts.items() if name not in ds.coords}
    )


class StoredArray:
    """An array of a local store, whose chunks are read without zarr, and checked.

    Attributes
    ----------
    shape, dtype, ndim
        Of the values, in physical units.
    """

    def __init__(
        self, name: str, about: Mapping[str, Any], store: _CheckedStore, scale: tuple[float, float] | None
    ) -> None:
        self.shape, self.ndim = tuple(about["shape"]), len(about["shape"])
        self.chunks = tuple(about["chunk_grid"]["configuration"]["chunk_shape"])
        self._stored_dtype = np.dtype(about["data_type"])
        self.dtype = np.dtype(np.float64) if scale is not None else self._stored_dtype
        self._name, self._store, self._scale = name, store, scale

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return (self._store.__dask_tokenize__(), self._name)

    def __getitem__(self, key: tuple[Any, ...]) -> np.ndarray[Any, Any]:
        place = self._within_a_chunk(key)
        values = self._read_by_zarr(key) if place is None else self._read(place[0])[place[1]]
        if self._scale is not None:
            # As xarray decodes it.
            values = values.astype(np.float64)
            values *= self._scale[0]
            values += self._scale[1]
        return values

    def _read_by_zarr(self, key: tuple[Any, ...]) -> np.ndarray[Any, Any]:
        array = cast("Any", zarr.open_array(cast("Any", self._store), path=self._name, mode="r"))
        return np.asarray(array[key])

    def _within_a_chunk(self, key: tuple[Any, ...]) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
        """Index of the chunk that holds all that is asked for, and the place in it; None if none does."""
        if len(key) != self.ndim:
            return None
        index, inside = [], []
        for part, length, n in zip(key, self.chunks, self.shape, strict=True):
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
        key = chunk_key(self._name, index)
        # From wherever the process is that reads.
        path, entry = Path(self._store.root) / key, self._store.manifest.get(key)
        self._store.refuse_link(key)
        try:
            return chunkfiles.read_chunk(path, entry, self.chunks, self._stored_dtype)
        except chunkfiles.ChunkProblemError as error:
            raise _damaged(self._store.name, [f"{key} {error}"]) from error


def _read_directly(variable: xr.DataArray, about: Mapping[str, Any], store: _CheckedStore) -> xr.DataArray:
    """Have the chunks of a large variable read without zarr; as it is where it is decoded in any unusual way."""
    encoding = variable.encoding
    if variable.chunks is None or not set(variable.dims) & set(SPACE):
        return variable
    dtype = np.dtype(about["data_type"])
    packing = nifti.source_packing(variable)
    usual = dtype == variable.dtype if packing is None else variable.dtype == np.float64
    ours = json.loads(canonical_json([one.to_dict() for one in compressors(dtype)]))
    if not usual or not chunkfiles.is_plain(dtype) or about["codecs"][1:] != ours:
        return variable
    if "_FillValue" in encoding and not np.isnan(encoding["_FillValue"]):
        return variable
    # Not from the packing, for which -0.0 is 0.0: that would turn -0.0 in the data into 0.0.
    scale = None if packing is None else (encoding.get("scale_factor", 1.0), encoding.get("add_offset", -0.0))
    stored = StoredArray(str(variable.name), about, store, scale)
    return variable.copy(data=from_source(stored, f"{variable.name}-{tokenize(stored)}"))


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
    require(ds, RUN, RUN, f"{store_name(store)}, opened as a run,")
    return ds[list(RUN)]


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
    name = store_name(store)
    damage = []
    for place in [f"{name}/{place}" for place in study_members(name)] if is_study(name) else [name]:
        try:
            _verify(place)
        except DamagedStoreError as error:
            damage.append(str(error))
    if damage:
        raise DamagedStoreError("\n".join(damage))


def is_whole(store: StoreLike) -> bool:
    """Whether a store is complete, and every file of it as it was written; all of it is read.

    Parameters
    ----------
    store : path or URL

    Returns
    -------
    bool
    """
    try:
        verify(store)
    except (StoreError, SourceNotFoundError):
        return False
    return True


def _verify(name: str) -> None:
    checked, _ = open_checked(name)
    foreign = set(list_files(checked.backend)) - set(checked.manifest) - {ROOT, *MANIFEST_FILES}
    problems = [f"{key} does not belong to it" for key in foreign]
    problems += [f"{key} is a link that leaves it" for key in checked.manifest if checked.leaves(key)]
    for key, entry in checked.manifest.items():
        problem = _problem(key, read_file(checked.backend, key), entry)
        problems += [problem] if problem else []
    if problems:
        raise _damaged(name, sorted(problems))


def made_of(store: StoreLike) -> dict[str, Any] | None:
    """What a complete store says that it was made of; None if there is no such store.

    Parameters
    ----------
    store : path or URL

    Returns
    -------
    dict or None
        Hashes of content and options, by what they are.
    """
    found = root_attributes(store_name(store)).get(MADE_OF)
    return found if isinstance(found, dict) else None
