"""Zarr stores: layout, codecs, atomic creation, verification. The only module that knows zarr.

A store is one Zarr v3 group. Its root ``zarr.json`` is written last, so that a store without it is incomplete to every
reader. Before it comes a *manifest*: size and CRC32C of every other file, as the uint8 array ``manifest``. The root's
attribute ``chunkglm_seal`` holds the hash of the manifest and of the other attributes, so that any change to any file
shows. Locally a store is built beside its place (``<name>.partial``) and renamed; at a URL it is built in place.

Every chunk ends with the CRC32C of its bytes (the ``crc32c`` codec of Zarr, which any reader checks); reads through
chunkglm check against the manifest as well, because a missing chunk is zeros to Zarr, and a chunk from elsewhere is
sound in itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import google_crc32c
import numpy as np
import xarray as xr
import zarr
import zarr.abc.store
import zarr.core.sync
import zarr.storage
from dask.callbacks import Callback
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype

from chunkglm import nifti, plan
from chunkglm._version import __version__
from chunkglm.errors import (
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

ROOT = "zarr.json"
SEAL = "chunkglm_seal"
MANIFEST = "manifest"
HEADER = "nifti"
PARTIAL = ".partial"

_OWN_ATTRS = (SEAL, "ome")
_OWN_VARIABLES = (MANIFEST, HEADER)


class Entry(NamedTuple):
    """A file of a store in its manifest."""

    size: int
    crc32c: int


# --------------------------------------------------------------------------------------------------------- locations


def _is_url(store: StoreLike) -> bool:
    return "://" in os.fspath(store)


def _backend(store: StoreLike, *, read_only: bool) -> zarr.abc.store.Store:
    """The zarr store of a local path or a URL."""
    name = os.fspath(store)
    if not _is_url(name):
        return zarr.storage.LocalStore(name, read_only=read_only)
    try:
        return zarr.storage.FsspecStore.from_url(name, read_only=read_only)
    except ImportError as error:
        raise StoreError(
            f"{name} needs a package that is not installed: {error}. Install it with pip."
        ) from error


def _read(backend: zarr.abc.store.Store, key: str) -> bytes | None:
    buffer = zarr.core.sync.sync(backend.get(key, default_buffer_prototype()))
    return None if buffer is None else buffer.to_bytes()


def exists(store: StoreLike) -> bool:
    """Whether there is anything at ``store``."""
    if not _is_url(store):
        return os.path.lexists(store)
    return _read(_backend(store, read_only=True), ROOT) is not None


# ---------------------------------------------------------------------------------------------------------- manifest


def _list_keys(backend: zarr.abc.store.Store) -> list[str]:
    async def collect() -> list[str]:
        return sorted([key async for key in backend.list()])

    return zarr.core.sync.sync(collect())


def _is_metadata(key: str) -> bool:
    return key == ROOT or key.endswith(f"/{ROOT}")


def _entry(key: str, content: bytes) -> Entry:
    """Size and checksum of a file, as the manifest has them.

    A chunk ends with the CRC32C of what stands before it, and the CRC32C of a text followed by its own CRC32C is the
    same for every text; so it is the checksum inside that tells chunks apart.
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
    entries = {}
    for key in _list_keys(backend):
        if key != ROOT and not key.startswith(f"{MANIFEST}/"):
            entries[key] = _entry_at(backend, key)
    return entries


def _entry_at(backend: zarr.abc.store.Store, key: str) -> Entry:
    if _is_metadata(key):
        return _entry(key, _read(backend, key) or b"")
    tail = zarr.core.sync.sync(
        backend.get(key, default_buffer_prototype(), zarr.abc.store.SuffixByteRequest(4))
    )
    size = zarr.core.sync.sync(backend.getsize(key))
    return Entry(size, int.from_bytes(tail.to_bytes() if tail is not None else b"", "little"))


def _seal(attrs: Mapping[str, Any], manifest: bytes) -> dict[str, str]:
    rest = {key: value for key, value in attrs.items() if key != SEAL}
    return {
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "attributes_sha256": hashlib.sha256(canonical_json(rest)).hexdigest(),
    }


# ----------------------------------------------------------------------------------------------------------- reading


class _CheckedStore(zarr.storage.WrapperStore[Any]):
    """A store whose every read is held against the manifest."""

    def __init__(self, store: Any, name: str = "", manifest: Mapping[str, Entry] | None = None) -> None:
        super().__init__(store)
        self.name = name
        self.manifest = dict(manifest or {})

    def with_read_only(self, read_only: bool = False) -> _CheckedStore:  # noqa: FBT001, FBT002  (zarr's signature)
        return type(self)(self._store.with_read_only(read_only), self.name, self.manifest)

    def __dask_tokenize__(self) -> tuple[str, ...]:
        return ("chunkglm store", self.name, hashlib.sha256(canonical_json(self.manifest)).hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CheckedStore) and (self._store, self.manifest) == (
            other._store,
            other.manifest,
        )

    def __hash__(self) -> int:
        return hash(self.name)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        buffer = await self._store.get(key, prototype, byte_range)
        entry = self.manifest.get(key)
        if entry is not None and byte_range is None:
            if buffer is None:
                raise _damaged(self.name, [f"{key} is missing"])
            if not _is_whole(key, buffer.to_bytes(), entry):
                raise _damaged(self.name, [f"{key} was altered or cut off"])
        return buffer


def _damaged(name: str, problems: list[str]) -> DamagedStoreError:
    shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
    return DamagedStoreError(
        f"{name} is damaged: {shown}. Nothing of it can be trusted; make it again from its source (with overwrite), or copy it "
        "again from where it is whole."
    )


def _open_checked(store: StoreLike) -> tuple[_CheckedStore, dict[str, Any]]:
    """Open a complete store for checked reading; returns the store and the root's attributes."""
    name = os.fspath(store)
    if not _is_url(store) and not Path(name).is_dir():
        if Path(name + PARTIAL).is_dir():
            raise IncompleteStoreError(
                f"{name} was never finished: what was begun lies in {name + PARTIAL}. Run the same command again to make it."
            )
        raise SourceNotFoundError(
            f"There is no store {name}. Check the path; chunkglm convert makes run stores."
        )
    backend = _backend(store, read_only=True)
    root = _read(backend, ROOT)
    if root is None:
        raise IncompleteStoreError(
            f"{name} is incomplete, or is not a store: it has no {ROOT}, which is written last. Make it again with "
            "overwrite (chunkglm convert --overwrite)."
        )
    try:
        metadata = json.loads(root)
        attrs = metadata["attributes"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(name, [f"{ROOT} cannot be read ({error})"]) from error
    if SEAL not in attrs:
        raise IncompleteStoreError(_not_sealed(name, attrs, metadata))
    check_format_version(attrs, name)
    manifest = _read_manifest(backend, name)
    if _seal(attrs, manifest) != attrs[SEAL]:
        raise _damaged(name, [f"{ROOT} and {MANIFEST} do not belong together, or one was altered"])
    entries = {key: Entry(*entry) for key, entry in json.loads(manifest).items()}
    return _CheckedStore(backend, name, entries), attrs


def _not_sealed(name: str, attrs: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    if attrs.get("chunkglm_study"):
        return f"{name} is a study with several runs. Open it with open_study, or give one of its runs ({name}/run-...)."
    kind = metadata.get("node_type", "file")
    return (
        f"{name} is a Zarr {kind} that was not written by chunkglm (or only with plain to_zarr), so nothing says whether it is "
        "complete. Open it with xarray.open_zarr and pass the dataset, or save it with chunkglm.save."
    )


def _read_manifest(backend: zarr.abc.store.Store, name: str) -> bytes:
    try:
        array = zarr.open_array(backend, path=MANIFEST, mode="r")
        return bytes(np.asarray(array[:]).tobytes())
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
        Lazy, with dask chunks as they are stored. Chunk encodings are cleared, so that any slice can be saved again.

    Raises
    ------
    SourceNotFoundError, IncompleteStoreError, FormatVersionError, DamagedStoreError
        The last also later, when a chunk that is read is missing or altered.
    """
    checked, _ = _open_checked(store)
    ds = xr.open_zarr(cast("Any", checked), consolidated=False, chunks={}, drop_variables=_OWN_VARIABLES)
    for name in _OWN_ATTRS:
        ds.attrs.pop(name, None)
    for variable in ds.variables.values():
        for key in ("chunks", "preferred_chunks", "shards"):
            variable.encoding.pop(key, None)
    return ds


def open_run(store: StoreLike) -> xr.Dataset:
    """Open a run store.

    Parameters
    ----------
    store : path or URL
        As :func:`chunkglm.convert` wrote it.

    Returns
    -------
    Dataset
        ``bold (time, z, y, x)`` in physical units, ``mask (z, y, x)``, ``mean_image (z, y, x)``, lazily; coordinates
        ``time`` (s), ``z``, ``y``, ``x`` and ``grid``.

    Raises
    ------
    SourceNotFoundError, IncompleteStoreError, FormatVersionError, DamagedStoreError, InputError
    """
    ds = open_store(store)
    require(ds, RUN, RUN, f"{os.fspath(store)}, opened as a run,")
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
    name = os.fspath(store)
    if not _is_url(store) and not Path(name).is_dir():
        raise SourceNotFoundError(
            f"There is no study {name}. Check the path; chunkglm convert and run make studies."
        )

    async def members() -> list[str]:
        return [key async for key in _backend(store, read_only=True).list_dir("")]

    labels = [
        key.rstrip("/")
        for key in zarr.core.sync.sync(members())
        if key.startswith("run-") and not key.endswith(PARTIAL)
    ]
    if not labels:
        raise SourceNotFoundError(
            f"{name} holds no run stores (groups named run-<label>). Convert runs into it: chunkglm convert RUN.nii.gz "
            f"{name}/run-1."
        )
    return xr.DataTree.from_dict(
        {label: open_run(f"{name}/{label}") for label in sorted(labels, key=_natural)}
    )


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
    if is_study(store):
        for run in open_study(store):
            verify(f"{os.fspath(store)}/{run}")
        return
    checked, _ = _open_checked(store)
    backend = checked._store  # noqa: SLF001  (the wrapper of this module)
    found = {key for key in _list_keys(backend) if key != ROOT and not key.startswith(f"{MANIFEST}/")}
    problems = [f"{key} does not belong to it" for key in sorted(found - set(checked.manifest))]
    for key, entry in checked.manifest.items():
        content = _read(backend, key)
        if content is None:
            problems.append(f"{key} is missing")
        elif not _is_whole(key, content, entry):
            problems.append(f"{key} was altered or cut off")
    if problems:
        raise _damaged(os.fspath(store), sorted(problems))


def is_study(store: StoreLike) -> bool:
    """Whether ``store`` is a group of run stores."""
    if not _is_url(store) and not Path(store).is_dir():
        return False
    root = _read(_backend(store, read_only=True), ROOT)
    try:
        return root is not None and bool(json.loads(root)["attributes"].get("chunkglm_study"))
    except (ValueError, KeyError, AttributeError):
        return False


# ----------------------------------------------------------------------------------------------------------- writing


class _RootLastStore(zarr.storage.WrapperStore[Any]):
    """A store that keeps the root's metadata back until everything else is written."""

    def __init__(self, store: Any, root: Any = None) -> None:
        super().__init__(store)
        self.root = root

    def with_read_only(self, read_only: bool = False) -> _RootLastStore:  # noqa: FBT001, FBT002  (zarr's signature)
        return type(self)(self._store.with_read_only(read_only), self.root)

    async def set(self, key: str, value: Any) -> None:
        if key == ROOT:
            self.root = value
        else:
            await self._store.set(key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        if key == ROOT:
            self.root = self.root if self.root is not None else value
        else:
            await self._store.set_if_not_exists(key, value)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        if key == ROOT:
            return self.root
        return await self._store.get(key, prototype, byte_range)


class StoreWriter:
    """A store under construction; made by :func:`writing`."""

    def __init__(self, backend: zarr.abc.store.Store) -> None:
        self._store = _RootLastStore(backend)

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
        """
        encoding = {
            str(name): _encoding(variable, chunks.get(str(name))) for name, variable in ds.variables.items()
        }
        return ds.to_zarr(
            cast("Any", self._store),
            mode="w-",
            consolidated=False,
            zarr_format=3,
            compute=False,
            write_empty_chunks=True,
            encoding=encoding,
        )

    def array(self, name: str) -> Any:
        """The zarr array of a variable, to write blocks to."""
        return zarr.open_array(self._store, path=name, mode="r+", config={"write_empty_chunks": True})

    def finish(self, attrs: Mapping[str, Any]) -> None:
        """Write the manifest and then, last, the root with ``attrs`` added to its attributes."""
        backend = self._store._store  # noqa: SLF001  (the wrapper of this module)
        metadata = json.loads(self._store.root.to_bytes())
        metadata["attributes"].update(attrs)
        manifest = canonical_json(_make_manifest(backend))
        array = zarr.create_array(
            backend,
            name=MANIFEST,
            data=np.frombuffer(manifest, dtype=np.uint8),
            chunks=(len(manifest),),
            compressors=_compressors(np.dtype(np.uint8)),
            dimension_names=("manifest_byte",),
        )
        del array
        metadata["attributes"][SEAL] = _seal(metadata["attributes"], manifest)
        buffer = default_buffer_prototype().buffer.from_bytes(json.dumps(metadata, indent=1).encode())
        zarr.core.sync.sync(backend.set(ROOT, buffer))


def _compressors(dtype: np.dtype[Any]) -> list[Any]:
    """Codecs after the bytes: see ``benchmarks/README.md`` for why these."""
    shuffle = "bitshuffle" if dtype.kind in "iu" else "shuffle"
    return [
        BloscCodec(cname="lz4", clevel=1, shuffle=cast("Any", shuffle), typesize=dtype.itemsize),
        Crc32cCodec(),
    ]


def _encoding(variable: xr.Variable, chunks: tuple[int, ...] | None) -> dict[str, Any]:
    dtype = variable.dtype if variable.dtype.kind in "iufb" else np.dtype(np.uint8)
    encoding: dict[str, Any] = {"compressors": _compressors(dtype)}
    if chunks is not None:
        encoding["chunks"] = chunks
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
    name = os.fspath(store).rstrip("/")
    check_free(store, overwrite=overwrite)
    if _is_url(store):
        backend = _backend(store, read_only=False)
        if overwrite:
            zarr.core.sync.sync(backend.delete_dir(""))
        yield StoreWriter(backend)
        return
    target, partial = Path(name), Path(name + PARTIAL)
    try:
        _ensure_study(target.parent)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise StoreError(f"{name} cannot be written: {error}. Choose a place where you may write.") from error
    try:
        yield StoreWriter(_backend(partial, read_only=False))
        _move(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(store: StoreLike, *, overwrite: bool) -> None:
    """Refuse to write where something is, unless ``overwrite``; and never replace what is not a store.

    Raises
    ------
    StoreExistsError
    """
    name = os.fspath(store).rstrip("/")
    if not exists(name):
        return
    if not overwrite:
        raise StoreExistsError(
            f"{name} exists. Choose another place, or say overwrite (--overwrite) to replace it."
        )
    if (
        not _is_url(name)
        and not (Path(name) / ROOT).is_file()
        and any(Path(name).iterdir() if Path(name).is_dir() else [1])
    ):
        raise StoreExistsError(
            f"{name} exists and is not a Zarr store, so it is not replaced. Choose another place."
        )


def _move(partial: Path, target: Path) -> None:
    """Put a finished store in its place; what was there is removed only after."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _ensure_study(folder: Path) -> None:
    """Make the folder of a store; if it is named ``*.zarr``, make it a group that plain xarray can open."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.suffix == ".zarr" and not (folder / ROOT).exists():
        group = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"chunkglm_study": True, "format_version": FORMAT_VERSION},
        }
        (folder / ROOT).write_text(json.dumps(group, indent=1), encoding="utf-8")


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
    StoreExistsError, StoreError
    """
    check_free(store, overwrite=overwrite)
    ds = savable(ds)
    chunks = {str(name): _chunk_shape(variable) for name, variable in ds.variables.items() if variable.ndim}
    with writing(store, overwrite=overwrite) as writer:
        pending = writer.create(ds, chunks)
        with _Counting(progress) if progress else nullcontext():
            pending.compute()
        writer.finish({})
    return open_store(store)


def savable(ds: xr.Dataset) -> xr.Dataset:
    """Make a dataset fit the format: uniform chunks, variable-length strings, attributes, and for a run what viewers need.

    Parameters
    ----------
    ds : Dataset

    Returns
    -------
    Dataset
        With the attributes ``format_version`` and ``chunkglm_version``; and, if it has ``bold`` on a grid, the OME-Zarr
        attribute ``ome`` and the binary header as the uint8 variable ``nifti``.
    """
    ds = ds.copy()
    for name, variable in ds.variables.items():
        if variable.dtype.kind in "UT" or (variable.dtype.kind == "O" and variable.ndim == 1):
            values = (
                text_labels(variable.values.tolist())
                if variable.ndim == 1
                else variable.values.astype(object)
            )
            ds = (
                ds.assign_coords({name: (variable.dims, values, variable.attrs)})
                if name in ds.coords
                else ds.assign({name: (variable.dims, values, variable.attrs)})
            )
        elif variable.chunks is not None and not _is_uniform(variable.chunks):
            ds[name] = ds[name].chunk({dim: max(sizes) for dim, sizes in variable.chunksizes.items()})
        packing = nifti.source_packing(variable)
        if packing is not None:
            ds[name] = _packed(ds[name].variable, packing)
    ds.attrs.update(format_version=FORMAT_VERSION, chunkglm_version=__version__)
    if "bold" in ds and "grid" in ds.coords and set(ds["bold"].dims) == {"time", *SPACE}:
        ds[HEADER] = (
            f"{HEADER}_byte",
            np.frombuffer(base64.b64decode(ds["grid"].attrs["header"]), dtype=np.uint8),
        )
        ds.attrs["ome"] = _ome(ds)
    return ds


def _packed(variable: xr.Variable, packing: nifti.Packing) -> xr.Variable:
    """The stored integers of values that were opened from integers, with their scale as attributes."""
    data = variable.data
    if variable.chunks is None:
        data = packing.pack(np.asarray(data))
    else:
        data = data.map_blocks(packing.pack, dtype=packing.dtype)
    attrs = {**variable.attrs, "scale_factor": packing.slope, "add_offset": packing.intercept}
    return xr.Variable(variable.dims, data, attrs)


def _is_uniform(chunks: tuple[tuple[int, ...], ...]) -> bool:
    return all(len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0] for sizes in chunks)


def _chunk_shape(variable: xr.Variable) -> tuple[int, ...]:
    """As dask has it; of an array in memory, chunks of bounded size along the first dimensions."""
    if variable.chunks is not None:
        return tuple(sizes[0] for sizes in variable.chunks)
    shape = list(variable.shape)
    for axis in range(len(shape)):
        itemsize = variable.dtype.itemsize
        while shape[axis] > 1 and int(np.prod(shape)) * itemsize > plan.CHUNK_BYTES:
            shape[axis] = (shape[axis] + 1) // 2
    return tuple(max(n, 1) for n in shape)


def _ome(ds: xr.Dataset) -> dict[str, Any]:
    """OME-Zarr 0.5 attributes over ``bold``: axes, and voxel sizes and repetition time as a scale."""
    affine = np.asarray(ds["grid"].attrs["affine"], dtype=np.float64).reshape(4, 4)
    x, y, z = (float(v) for v in np.linalg.norm(affine[:3, :3], axis=0))
    times = ds["time"].values
    step = round(float(times[1] - times[0]), 6) if times.size > 1 else 1.0
    axes = [{"name": "time", "type": "time", "unit": "second"}]
    axes += [{"name": dim, "type": "space", "unit": "millimeter"} for dim in SPACE]
    transformations = [{"type": "scale", "scale": [step, z, y, x]}]
    datasets = [{"path": "bold", "coordinateTransformations": transformations}]
    return {"version": "0.5", "multiscales": [{"name": "bold", "axes": axes, "datasets": datasets}]}


class _Counting(Callback):  # type: ignore[misc]
    """Tells how many tasks of a computation are finished."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        super().__init__(start_state=self._begin, posttask=self._advance)
        self._progress = progress
        self._done = self._total = 0

    def _begin(self, dsk: Any, state: Any) -> None:  # noqa: ARG002  (dask's signature)
        self._done, self._total = 0, sum(len(state[key]) for key in ("ready", "waiting"))

    def _advance(self, key: Any, result: Any, dsk: Any, state: Any, worker: Any) -> None:  # noqa: ARG002
        self._done += 1
        self._progress(self._done, self._total)
