"""Writing stores: arrays chunk by chunk, then the manifest, and the root last."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import zarr
import zarr.abc.store
import zarr.core.sync
import zarr.storage
from zarr.core.buffer import default_buffer_prototype

from chunkglm import chunkfiles
from chunkglm.blocks import Writing, placeholder
from chunkglm.errors import ChunkGLMError, InputError, StoreError
from chunkglm.schema import canonical_json
from chunkglm.store.manifest import (
    MANIFEST,
    MANIFEST_FILES,
    chunk_key,
    compressors,
    make_manifest,
    make_seal,
)
from chunkglm.store.places import (
    MADE_OF,
    ROOT,
    SEAL,
    check_free,
    list_files,
    read_file,
    store_name,
    write_file,
)
from chunkglm.store.site import building

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import xarray as xr

    from chunkglm.chunkfiles import Entry
    from chunkglm.store.places import StoreLike
    from chunkglm.store.site import Site


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


class _Target:
    """An array of a store under construction, to which chunks are written; it can be sent to other processes."""

    def __init__(
        self,
        backend: zarr.abc.store.Store,
        guard: _RootLastStore,
        name: str,
        chunks: tuple[int, ...],
        *,
        workplace: Path | None,
        kept: frozenset[int] | None,
    ) -> None:
        self._backend, self._guard, self._name, self._chunks = backend, guard, name, chunks
        self._workplace = workplace
        # First indices of chunks that are left as they are where they are there; None for all.
        self._kept = kept
        self._local = Path(backend.root) if isinstance(backend, zarr.storage.LocalStore) else None

    def has(self, index: tuple[int, ...]) -> bool:
        """Whether a chunk is there and whole in itself."""
        key = chunk_key(self._name, index)
        if self._local is not None:
            return chunkfiles.is_whole(self._local / key)
        content = read_file(self._backend, key)
        return content is not None and chunkfiles.is_whole_content(content)

    def keeps(self, index: tuple[int, ...]) -> bool:
        """Whether a chunk is there from before, and stays."""
        return (self._kept is None or index[0] in self._kept) and self.has(index)

    def write_chunk(self, index: tuple[int, ...], values: np.ndarray[Any, Any]) -> None:
        """Write one chunk: all of it that lies in the array."""
        key = chunk_key(self._name, index)
        with self._guard.writing():
            if self._local is not None and self._workplace is not None:
                try:
                    chunkfiles.write_chunk(self._local / key, values, self._chunks, self._workplace)
                except FileNotFoundError as error:
                    raise StoreError(
                        f"{self._workplace} is not there: the store was given up or finished meanwhile, or this machine does "
                        "not see that folder. Every worker must have the folder of the results, under the same path."
                    ) from error
            else:
                write_file(self._backend, key, chunkfiles.encode_chunk(values, self._chunks))

    def write_block(self, start: tuple[int, ...], values: np.ndarray[Any, Any]) -> None:
        """Write a part of the array that is made of whole chunks, from ``start`` on; what is kept is not written again."""
        numbers = [range(0, n, length) for n, length in zip(values.shape, self._chunks, strict=True)]
        for place in itertools.product(*numbers):
            index = tuple((s + p) // length for s, p, length in zip(start, place, self._chunks, strict=True))
            part = values[tuple(slice(p, p + length) for p, length in zip(place, self._chunks, strict=True))]
            if not self.keeps(index):
                self.write_chunk(index, part)


class StoreWriter:
    """A store under construction; made by :func:`writing`."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._backend = site.backend
        self._store = _RootLastStore(site.backend)
        self._chunks: dict[str, tuple[int, ...]] = {}
        self._trusted: set[int] = set()

    @property
    def continued(self) -> bool:
        """Whether there may be chunks that were finished earlier."""
        return self._site.continued

    def create(self, ds: xr.Dataset, chunks: Mapping[str, tuple[int, ...]]) -> None:
        """Write metadata, attributes and everything that is in memory.

        Parameters
        ----------
        ds : Dataset
            Its lazy variables are to be written by chunks; they must be stored as they lie in memory.
        chunks : mapping of str to tuple of int
            Chunk shapes of its arrays.

        Raises
        ------
        InputError
            If Zarr has no form for something in it.
        """
        self._chunks.update(chunks)
        if self._site.root is not None:
            self._store.root = default_buffer_prototype().buffer.from_bytes(self._site.root)
            return
        encoding = {
            str(name): _encoding(variable, chunks.get(str(name))) for name, variable in ds.variables.items()
        }
        # Not the arrays themselves, whose graphs xarray would lay out for a computation that nobody wants.
        lazy = {name: one for name, one in ds.variables.items() if one.chunks is not None}
        blank = {name: one.copy(data=placeholder(one.shape, one.dtype)) for name, one in lazy.items()}
        coords = {name: one for name, one in blank.items() if name in ds.coords}
        ds = ds.assign({name: one for name, one in blank.items() if name not in coords}).assign_coords(coords)
        try:
            ds.to_zarr(
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
        self._site.begin(self._store.root.to_bytes())

    def stop(self) -> None:
        """Wait for what is being written, and write no array any more."""
        self._store.stop()
        self._site.close()

    def array(self, name: str) -> Any:
        """Open the zarr array of a variable, to write to any part of it."""
        return zarr.open_array(self._store, path=name, mode="r+", config={"write_empty_chunks": True})

    def _target(self, name: str, kept: frozenset[int] | None = frozenset()) -> _Target:
        workplace = self._site.workplace
        return _Target(self._backend, self._store, name, self._chunks[name], workplace=workplace, kept=kept)

    def claim(self, number: int, content: str, arrays: Sequence[str]) -> None:
        """Say what a part of some arrays is made of, before any of it is written.

        Parameters
        ----------
        number : int
            First index of the chunks of the part.
        content : str
            Hash of what it is made of. Chunks that are there count as written only if it is the same.
        arrays : sequence of str
        """
        if self._site.claim(number, content, arrays):
            self._trusted.add(number)

    def has(self, name: str, index: tuple[int, ...]) -> bool:
        """Whether a chunk was written earlier, of what its part is said to be made of."""
        return index[0] in self._trusted and self._target(name).has(index)

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
        self._target(name).write_chunk(index, values)

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
        self._target(name).write_block(start, values)

    def adopt(self, other: Path, entries: Mapping[str, Entry], number: int, arrays: Sequence[str]) -> None:
        """Take the chunks of a part over from another store, which has them at the same places.

        Parameters
        ----------
        other : Path
            A complete local store.
        entries : mapping
            Its manifest. What does not agree with it is not taken.
        number : int
            First index of the chunks.
        arrays : sequence of str
        """
        if not isinstance(self._backend, zarr.storage.LocalStore):
            return
        for key, entry in entries.items():
            if not any(key.startswith(f"{name}/c/{number}/") for name in arrays):
                continue
            target = self._backend.root / key
            if not target.exists() and chunkfiles.is_whole(other / key, entry):
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(other / key, target)
        self._trusted.add(number)

    def blocks(self, ds: xr.Dataset, *, by_run: bool = False) -> Writing:
        """What is lazy, to be computed and written by :func:`chunkglm.blocks.write_blocks`; not what was written earlier.

        Parameters
        ----------
        ds : Dataset
            As it was given to :meth:`create`.
        by_run : bool
            Chunks count as written only where their run was claimed; otherwise all that are there do.

        Returns
        -------
        Writing
        """
        lazy = {str(name): variable for name, variable in ds.variables.items() if variable.chunks is not None}
        everything = None if self.continued else frozenset[int]()
        kept = frozenset(self._trusted) if by_run else everything
        targets = [self._target(name, kept) for name in lazy]
        return Writing(
            list(lazy.values()),
            [one.write_block for one in targets],
            lambda number, index: targets[number].keeps(index),
        )

    def finish(self, made_of: Mapping[str, Any], attrs: Mapping[str, Any] | None = None) -> None:
        """Write the manifest and then, last, the root, with what the store is made of and more attributes."""
        self._site.close()
        entries = make_manifest(self._backend)
        _refuse_gaps(self._site.name, self._metadata(), entries)
        manifest = canonical_json(entries)
        zarr.create_array(
            self._store,
            name=MANIFEST,
            data=np.frombuffer(manifest, dtype=np.uint8),
            chunks=(len(manifest),),
            compressors=compressors(np.dtype(np.uint8)),
            dimension_names=("manifest_byte",),
        )
        metadata = json.loads(self._store.root.to_bytes())
        metadata["attributes"].update({**(attrs or {}), MADE_OF: dict(made_of)})
        metadata["consolidated_metadata"] = self._consolidated()
        manifest_metadata = read_file(self._backend, MANIFEST_FILES[0]) or b""
        metadata["attributes"][SEAL] = make_seal(metadata, manifest, manifest_metadata)
        write_file(self._backend, ROOT, json.dumps(metadata, indent=1).encode())

    def _consolidated(self) -> dict[str, Any]:
        """The metadata of all arrays once more, where plain xarray and zarr look for them first."""
        return {"kind": "inline", "must_understand": False, "metadata": self._metadata()}

    def _metadata(self) -> dict[str, Any]:
        """Metadata of all arrays, by name."""
        arrays = [key for key in list_files(self._backend) if key.endswith(f"/{ROOT}")]
        return {
            key.removesuffix(f"/{ROOT}"): json.loads(read_file(self._backend, key) or b"{}")
            for key in sorted(arrays)
        }


def _refuse_gaps(name: str, arrays: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Refuse to call a store complete that lacks a chunk: to Zarr it would be zeros."""
    for array, about in arrays.items():
        lengths = about["chunk_grid"]["configuration"]["chunk_shape"]
        counts = [-(-n // length) for n, length in zip(about["shape"], lengths, strict=True)]
        for index in itertools.product(*map(range, counts)):
            if chunk_key(array, index) not in entries:
                raise StoreError(
                    f"{name} was not finished: its chunk {chunk_key(array, index)} was not written. Run the same command again "
                    "to go on."
                )


def _link(source: Path, target: Path) -> None:
    """Have the same file in another place; a copy where links are not possible."""
    try:
        os.link(source, target)
    except OSError:
        partial = target.with_name(target.name + chunkfiles.PARTIAL)
        shutil.copyfile(source, partial)
        partial.replace(target)


def is_stored_as_it_is(variable: xr.Variable) -> bool:
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


def _encoding(variable: xr.Variable, chunks: tuple[int, ...] | None) -> dict[str, Any]:
    dtype = variable.dtype if variable.dtype.kind in "iufb" else np.dtype(np.uint8)
    encoding: dict[str, Any] = {"compressors": compressors(dtype)}
    if chunks is not None:
        encoding["chunks"] = chunks
    if "scale_factor" in variable.attrs:
        # With a fill value xarray decodes scaled float32 in float32, not in float64.
        encoding["_FillValue"] = None
    return encoding


@contextmanager
def writing(
    store: StoreLike,
    made_of: Mapping[str, Any],
    *,
    overwrite: bool,
    resume: bool = True,
    keep: bool = False,
    aside: bool = False,
) -> Iterator[StoreWriter]:
    """Build a store so that it is complete or is not there.

    Parameters
    ----------
    store : path or URL
    made_of : mapping
        Hashes of content and options; what was begun of the same is continued.
    overwrite : bool
        Replace what is there, once the new store is complete (at a URL: at once).
    resume : bool
        Continue what was begun; otherwise start anew.
    keep : bool
        Keep what was finished also when an input turns out to be wrong.
    aside : bool
        Do not mind another process that is building the same: see :func:`chunkglm.store.site.building`.

    Yields
    ------
    StoreWriter
        ``finish`` must be called on it.

    Raises
    ------
    StoreExistsError
        If something is there, or was begun, and ``overwrite`` is not given.
    BusyStoreError
        If another process is writing there.
    StoreError
        If the place cannot be written.
    """
    name = store_name(store)
    check_free(name, overwrite=overwrite)
    kept = ""
    try:
        with building(name, made_of, overwrite=overwrite, resume=resume, keep=keep, aside=aside) as site:
            writer = StoreWriter(site)
            try:
                yield writer
            except OSError:
                kept = f" What was finished is kept in {site.folder}." if site.is_kept else ""
                raise
            finally:
                writer.stop()
    except ChunkGLMError:
        raise
    except OSError as error:
        raise StoreError(
            f"{name} was not written: {error}.{kept} Check that the place has space and that you may write there, and run "
            "the same command again to go on."
        ) from error
