"""Where stores are: local paths and URLs, what lies there, and whether it may be replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr.abc.store
import zarr.core.sync
import zarr.storage
from zarr.core.buffer import default_buffer_prototype

from chunkglm import chunkfiles
from chunkglm.entities import FUNCTIONAL, is_member, natural
from chunkglm.errors import SourceNotFoundError, StoreError, StoreExistsError
from chunkglm.schema import FORMAT_VERSION

if TYPE_CHECKING:
    StoreLike = str | os.PathLike[str]

ROOT = "zarr.json"
SEAL, MADE_OF, STUDY = "chunkglm_seal", "chunkglm_made_of", "chunkglm_study"
"""Attributes of the root of a store, and of a study."""


def store_name(store: StoreLike) -> str:
    """Text of a path or URL."""
    return os.fspath(store).removeprefix("file://").rstrip("/") or "/"


def is_url(name: str) -> bool:
    """Whether a name is that of something that is no local path."""
    return "://" in name


def absolute(name: str) -> str:
    """The name that means the same to a process in another working directory."""
    return name if is_url(name) else os.path.abspath(name)  # noqa: PTH100  (links stay)


def backend_of(name: str, *, read_only: bool) -> zarr.abc.store.Store:
    """Make the zarr store of a local path or a URL."""
    if not is_url(name):
        return zarr.storage.LocalStore(name, read_only=read_only)
    try:
        return zarr.storage.FsspecStore.from_url(name, read_only=read_only)
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"{name} cannot be reached: {error}. Check the URL; other protocols than files need a package, which "
            "pip installs."
        ) from error


def write_file(backend: zarr.abc.store.Store, key: str, content: bytes) -> None:
    """Write a file of a store at once."""
    zarr.core.sync.sync(backend.set(key, default_buffer_prototype().buffer.from_bytes(content)))


def read_file(backend: zarr.abc.store.Store, key: str) -> bytes | None:
    """Read a file of a store; None if it is not there."""
    buffer = zarr.core.sync.sync(backend.get(key, default_buffer_prototype()))
    return None if buffer is None else buffer.to_bytes()


def list_files(backend: zarr.abc.store.Store, *, top: bool = False) -> list[str]:
    """List every file of a store, or the files and folders at its top."""

    async def collect() -> list[str]:
        found = backend.list_dir("") if top else backend.list()
        return sorted([key.strip("/") async for key in found])

    return zarr.core.sync.sync(collect())


def root_attributes(name: str) -> dict[str, Any]:
    """Attributes of the group at ``name``, as far as there is one."""
    if not is_url(name) and not Path(name).is_dir():
        return {}
    try:
        attributes = json.loads(read_file(backend_of(name, read_only=True), ROOT) or b"")["attributes"]
    except (ValueError, KeyError, TypeError):
        return {}
    return attributes if isinstance(attributes, dict) else {}


def looks_like_store(backend: zarr.abc.store.Store) -> bool:
    """Whether there is a group, or only the arrays of one that has lost its root, or nothing at all."""
    if read_file(backend, ROOT) is not None:
        return True
    return all(_is_array(backend, member) for member in list_files(backend, top=True))


def _is_array(backend: zarr.abc.store.Store, member: str) -> bool:
    try:
        return bool(json.loads(read_file(backend, f"{member}/{ROOT}") or b"")["node_type"] == "array")
    except (ValueError, KeyError, TypeError):
        return False


def exists(store: StoreLike) -> bool:
    """Whether there is anything at ``store``."""
    name = store_name(store)
    if not is_url(name):
        return os.path.lexists(name)
    return bool(list_files(backend_of(name, read_only=True), top=True))


def is_study(store: StoreLike) -> bool:
    """Whether ``store`` is a folder of stores: a group that says so, or a plain folder with stores in it."""
    name = store_name(store)
    if STUDY in root_attributes(name):
        return True
    there = is_url(name) or Path(name).is_dir()
    return there and read_file(backend_of(name, read_only=True), ROOT) is None and bool(members(name))


def members(name: str) -> list[str]:
    """List the places of all stores below a folder, also of those that lost their root or have another.

    Folders for entities are looked into, whether or not they are groups; what is not a store is passed over.
    """
    places = []
    for member in list_files(backend_of(name, read_only=True), top=True):
        child = f"{name}/{member}"
        if not (is_member(member) or member == FUNCTIONAL) or member.endswith(chunkfiles.PARTIAL):
            continue
        if not is_url(child) and not Path(child).is_dir():
            continue
        backend, attributes = backend_of(child, read_only=True), root_attributes(child)
        has_root = read_file(backend, ROOT) is not None
        if STUDY not in attributes and (
            has_root or any(_is_array(backend, one) for one in list_files(backend, top=True))
        ):
            places.append(member)
        else:
            places += [f"{member}/{place}" for place in members(child)]
    return places


def study_members(store: StoreLike) -> list[str]:
    """List the stores of a study.

    Parameters
    ----------
    store : path or URL

    Returns
    -------
    list of str
        Their places in its folder, in natural order.

    Raises
    ------
    SourceNotFoundError
        If there is none.
    """
    name = store_name(store)
    if not is_url(name) and not Path(name).is_dir():
        raise SourceNotFoundError(
            f"There is no study {name}. Check the path; chunkglm convert and run make studies."
        )
    places = members(name)
    if not places:
        raise SourceNotFoundError(
            f"{name} holds no run stores (groups named run-<label>, or by other BIDS entities). Convert runs into it: "
            f"chunkglm convert RUN.nii.gz {name}/run-1."
        )
    return sorted(places, key=natural)


def check_free(store: StoreLike, *, overwrite: bool) -> None:
    """Refuse to write where something is, unless ``overwrite``; and never replace what is not one store.

    Raises
    ------
    StoreExistsError
    """
    name = store_name(store)
    parent = name.rpartition("/")[0]
    if any(SEAL in root_attributes(folder) for folder in (parent, *study_folders(parent))):
        raise StoreExistsError(f"{name} would lie inside another store. Choose a place beside it.")
    if not exists(name) or _is_being_built(name):
        return
    if not overwrite:
        raise StoreExistsError(
            f"{name} exists. Choose another place, or say overwrite (--overwrite) to replace it."
        )
    if is_study(name):
        raise StoreExistsError(
            f"{name} is a study with stores of its own, so it is not replaced. Write to one of its runs "
            f"({name}/run-...), or remove it."
        )
    is_folder = is_url(name) or Path(name).is_dir()
    if not is_folder or not looks_like_store(backend_of(name, read_only=True)):
        raise StoreExistsError(
            f"{name} exists and is not a Zarr store, so it is not replaced. Choose another place."
        )


def _is_being_built(name: str) -> bool:
    """Whether what is at a URL is a store under construction."""
    return (
        is_url(name)
        and read_file(backend_of(name, read_only=True), ROOT) is None
        and exists(name + chunkfiles.PARTIAL)
    )


def study_folders(parent: str) -> list[str]:
    """Folders that become groups with a store in ``parent``: ``*.zarr``, and those for entities that lie between."""
    between = []
    while is_member(parent.rpartition("/")[2]) and not parent.endswith(".zarr"):
        between.append(parent)
        parent = parent.rpartition("/")[0]
    return [*between, parent] if parent.endswith(".zarr") else []


def study_root() -> bytes:
    """Root metadata of a study."""
    attributes = {STUDY: True, "format_version": FORMAT_VERSION}
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(group, indent=1).encode()
