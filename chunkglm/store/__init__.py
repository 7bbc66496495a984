"""Zarr stores: layout, codecs, atomic creation, verification. The only part that knows zarr.

A store is one Zarr v3 group. Its root ``zarr.json`` is written last, so that a store without it is incomplete to
every reader. Before it comes a *manifest*: size and CRC32C of every other file, as the uint8 array ``manifest``.
The root's attribute ``chunkglm_seal`` holds hashes of the manifest and of the rest of the root, so that any
change to any file shows; ``chunkglm_made_of`` says from what content and with which options it was made.

A store is built at a *site* beside its place (``<name>.partial``) and then moved; at a URL it is built in place. The site
keeps what was finished when the work is cut off, and says what it was made of, so that the same work goes on there.

Every chunk ends with the CRC32C of its bytes (the ``crc32c`` codec of Zarr, which any reader checks); reads
through chunkglm check against the manifest as well, because a missing chunk is zeros to Zarr, and a chunk from
elsewhere is sound in itself.
"""

from chunkglm.store.places import absolute, check_free, exists, is_study, is_url
from chunkglm.store.reading import is_whole, made_of, open_run, open_store, verify
from chunkglm.store.saving import chunk_shapes, is_saved, part_hash, savable, save, save_runs
from chunkglm.store.site import begun, check_idle, differences, is_up_to_date, remove_abandoned
from chunkglm.store.studies import open_study
from chunkglm.store.writing import StoreWriter, writing

__all__ = [
    "StoreWriter",
    "absolute",
    "begun",
    "check_free",
    "check_idle",
    "chunk_shapes",
    "differences",
    "exists",
    "is_saved",
    "is_study",
    "is_up_to_date",
    "is_url",
    "is_whole",
    "made_of",
    "open_run",
    "open_store",
    "open_study",
    "part_hash",
    "remove_abandoned",
    "savable",
    "save",
    "save_runs",
    "verify",
    "writing",
]
