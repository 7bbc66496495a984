"""The manifest of a store: every file with its size and checksum, and the seal that holds it to the root."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any, cast

import google_crc32c
import zarr.abc.store
import zarr.core.sync
import zarr.storage
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype

from chunkglm import chunkfiles
from chunkglm.chunkfiles import Entry
from chunkglm.schema import canonical_json
from chunkglm.store.places import MADE_OF, ROOT, SEAL, list_files, read_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

MANIFEST, HEADER = "manifest", "nifti"
OWN_VARIABLES = (MANIFEST, HEADER)
"""Arrays that belong to a store itself."""

OWN_ATTRS = (SEAL, MADE_OF, "ome")
MANIFEST_FILES = (f"{MANIFEST}/{ROOT}", f"{MANIFEST}/c/0")


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


def is_whole_file(key: str, content: bytes, entry: Entry) -> bool:
    """Whether a file is the one that the manifest was made of."""
    if _entry(key, content) != entry:
        return False
    return _is_metadata(key) or google_crc32c.value(content[:-4]) == entry.crc32c


def make_manifest(backend: zarr.abc.store.Store) -> dict[str, Entry]:
    """List every file with size and checksum; of chunks only the last four bytes are read."""
    return {key: _entry_at(backend, key) for key in list_files(backend) if key != ROOT}


def _entry_at(backend: zarr.abc.store.Store, key: str) -> Entry:
    if _is_metadata(key):
        return _entry(key, read_file(backend, key) or b"")
    if isinstance(backend, zarr.storage.LocalStore):
        with (backend.root / key).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 4, 0))
            return Entry(size, int.from_bytes(file.read(), "little"))
    last_four = zarr.abc.store.SuffixByteRequest(4)
    tail = zarr.core.sync.sync(backend.get(key, default_buffer_prototype(), last_four))
    size = zarr.core.sync.sync(backend.getsize(key))
    return Entry(size, int.from_bytes(tail.to_bytes() if tail is not None else b"", "little"))


def make_seal(metadata: Mapping[str, Any], manifest: bytes, manifest_metadata: bytes) -> dict[str, str]:
    """Hashes of the manifest, of its own metadata, and of everything in the root but the seal."""
    attributes = {key: value for key, value in metadata["attributes"].items() if key != SEAL}
    parts = {
        "manifest": manifest,
        "manifest_metadata": manifest_metadata,
        "root": canonical_json({**metadata, "attributes": attributes}),
    }
    return {f"{part}_sha256": hashlib.sha256(content).hexdigest() for part, content in parts.items()}


def chunk_key(name: str, index: tuple[int, ...]) -> str:
    """Name of the file of a chunk."""
    return "/".join([name, "c", *map(str, index)])


def compressors(dtype: np.dtype[Any]) -> list[Any]:
    """Codecs after the bytes, those of :mod:`chunkglm.chunkfiles`."""
    blosc = BloscCodec(
        cname=cast("Any", chunkfiles.CNAME),
        clevel=chunkfiles.CLEVEL,
        shuffle=cast("Any", chunkfiles.SHUFFLE),
        typesize=dtype.itemsize,
    )
    return [blosc, Crc32cCodec()]
