"""The site of a store under construction: a lock, what the store is made of, and what was begun there.

Locally the store is built in ``<name>.partial/store`` and moved to its place when it is complete; at a URL it is built in
place. A local chunk is written in a workplace of this one build, and moved into the store when it is complete: whoever takes
the workplace away has stopped every writer, on any machine, also one that sleeps and wakes later.

Beside the store the site holds records: what it is made of, with the root that it will have; and for each part, as soon as a
chunk of it may be written, a hash of what that part is made of. A chunk file has its name when it is complete, so these
records are all that is needed to go on after the process was killed at any instant.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr.abc.store
import zarr.core.sync

from chunkglm.chunkfiles import PARTIAL
from chunkglm.errors import BusyStoreError, StoreExistsError
from chunkglm.schema import canonical_json
from chunkglm.store.manifest import MANIFEST
from chunkglm.store.places import (
    MADE_OF,
    ROOT,
    absolute,
    backend_of,
    is_url,
    list_files,
    read_file,
    root_attributes,
    store_name,
    study_folders,
    study_root,
    write_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chunkglm.store.places import StoreLike

BEGUN, CLAIMS, LOCK, STORE, OLD, WRITING = "begun.json", "claims", "lock", "store", "old", "writing"
SOFT_LOCK = "lock.owner"
MEMBERS = {BEGUN, CLAIMS, LOCK, SOFT_LOCK, STORE, OLD, WRITING}

WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What file systems without locks answer, such as some of clusters."""

ATTEMPTS = 100
"""To take a lock whose file another process is just removing."""


def differences(made_of: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of what two stores are not made of alike.

    Parameters
    ----------
    made_of, other : mapping
        Values that JSON holds, by name.

    Returns
    -------
    list of str
    """
    # Through JSON, as one of them comes from there.
    first, second = (json.loads(canonical_json(dict(one))) for one in (made_of, other))
    names = dict.fromkeys([*first, *second])
    return [name for name in names if first.get(name) != second.get(name)]


def begun(store: StoreLike) -> dict[str, Any] | None:
    """What an unfinished store is made of, as far as that is known before it is complete; None if there is none.

    Parameters
    ----------
    store : path or URL

    Returns
    -------
    dict or None
    """
    name = store_name(store)
    if not is_url(name) and not Path(name + PARTIAL).is_dir():
        return None
    record = _read_record(backend_of(name + PARTIAL, read_only=True))
    return None if record is None else dict(record["made_of"])


def _read_record(records: zarr.abc.store.Store) -> dict[str, Any] | None:
    try:
        record = json.loads(read_file(records, BEGUN) or b"")
    except ValueError:
        return None
    known = isinstance(record, dict) and {"made_of", "root"} <= set(record)
    return record if known and isinstance(record["made_of"], dict) else None


class Site:
    """A store under construction; made by :func:`building`.

    Attributes
    ----------
    name : str
        Where the store will be.
    backend : zarr.abc.store.Store
        Where it is built.
    root : bytes or None
        Metadata of its root, if the store was begun earlier and is to be continued.
    folder : str
        Where the site is.
    workplace : Path or None
        Where chunks are written before they are moved into the store; None at a URL, where they are written in place.
    """

    def __init__(self, name: str, made_of: Mapping[str, Any], *, overwrite: bool, folder: str = "") -> None:
        self.name, self.folder = name, folder or name + PARTIAL
        self.root: bytes | None = None
        # Workers that write there have other working directories.
        there = absolute(self.folder)
        self.backend = backend_of(name if is_url(name) else f"{there}/{STORE}", read_only=False)
        self.workplace = None if is_url(name) else Path(there) / WRITING / uuid.uuid4().hex
        self._before: tuple[int, int] | None = None
        self._records = backend_of(self.folder, read_only=False)
        self._made_of, self._overwrite = dict(made_of), overwrite
        self._is_kept = False

    @property
    def continued(self) -> bool:
        """Whether there may be chunks that were finished earlier."""
        return self.root is not None

    def prepare(self, *, resume: bool) -> None:
        """Find out what is there to continue, and remove what is not.

        Raises
        ------
        StoreExistsError
            If something else was begun there.
        """
        self.close()
        if not is_url(self.name):
            self._give_back()
            self._before = _identity(self.name)
        self._find(resume=resume)
        if self.workplace is not None:
            self.workplace.mkdir(parents=True)

    def close(self) -> None:
        """Let nobody write a chunk any more."""
        shutil.rmtree(Path(self.folder) / WRITING, ignore_errors=True)

    def _find(self, *, resume: bool) -> None:
        record = self._begun()
        if record is None or not resume:
            self.clear()
            return
        if others := differences(record["made_of"], self._made_of):
            if not self._overwrite:
                raise self._in_the_way(f"with other {', '.join(others)}")
            self.clear()
            return
        self._is_kept = True
        self.root = str(record["root"]).encode()
        # What ends a store is made anew, and files that were being written are none.
        for key in list_files(self.backend):
            if key == ROOT or key.startswith(f"{MANIFEST}/") or key.endswith(PARTIAL):
                zarr.core.sync.sync(self.backend.delete(key))

    def _give_back(self) -> None:
        """Put a store back that was being replaced when the process was killed."""
        old = Path(self.folder) / OLD
        if old.exists() and not Path(self.name).exists():
            old.rename(self.name)

    def _begun(self) -> dict[str, Any] | None:
        """What is recorded of an unfinished store."""
        if is_url(self.name) and read_file(self.backend, ROOT) is not None:
            return None
        return _read_record(self._records)

    def _in_the_way(self, how: str) -> StoreExistsError:
        return StoreExistsError(
            f"{self.name} was begun {how}, and what was finished of it lies in {self.folder}. Run the command that began it "
            "to go on, say overwrite (--overwrite) to start anew, or choose another place."
        )

    def begin(self, root: bytes) -> None:
        """Record what the store is made of; from here on it can be continued."""
        content = {"made_of": self._made_of, "root": root.decode()}
        write_file(self._records, BEGUN, canonical_json(content))
        self._is_kept = True

    def claim(self, number: int, content: str, arrays: Sequence[str]) -> bool:
        """Record what a part is made of, before any of it is written.

        Parameters
        ----------
        number : int
            Of the part, the first index of its chunks.
        content : str
            Hash of what it is made of; or, of what is read from a stream, ``size:hash`` of all that was read until then.
        arrays : sequence of str
            Names of the arrays with chunks of it.

        Returns
        -------
        bool
            Whether chunks of this content may be there.

        Raises
        ------
        StoreExistsError
            If it was begun with other content.
        """
        key = f"{CLAIMS}/{number}"
        if self.continued:
            known = read_file(self._records, key)
            if known == content.encode():
                return True
            if known is not None:
                # Hashes of more and of less say nothing of each other: then the part is only made again.
                comparable = (
                    known.decode().partition(":")[0] == content.partition(":")[0] or ":" not in content
                )
                if comparable and not self._overwrite:
                    raise self._in_the_way("from other data")
                for name in arrays:
                    zarr.core.sync.sync(self.backend.delete_dir(f"{name}/c/{number}"))
        write_file(self._records, key, content.encode())
        return False

    def move(self) -> None:
        """Put the finished store in its place; what was there is removed only after."""
        parent = self.name.rpartition("/")[0]
        if is_url(self.name):
            for folder in study_folders(parent):
                study = backend_of(folder, read_only=False)
                if read_file(study, ROOT) is None:
                    write_file(study, ROOT, study_root())
        else:
            target = Path(self.name)
            for folder in study_folders(str(target.parent)):
                _make_study(Path(folder))
            self._move(Path(self.folder) / STORE, target, Path(self.folder) / OLD)
        self._is_kept = False

    def _move(self, built: Path, target: Path, old: Path) -> None:
        try:
            # What has come there since, another worker made, that was given the same work.
            if _identity(self.name) == self._before:
                _move(built, target, old)
                return
        except OSError:
            if _identity(self.name) == self._before:
                raise
        if differences(root_attributes(self.name).get(MADE_OF) or {}, root_attributes(str(built))[MADE_OF]):
            raise StoreExistsError(
                f"{self.name} was made by another process in the meantime, of something else. Choose another place, or say "
                "overwrite (--overwrite) to replace it."
            )

    def clear(self) -> None:
        """Remove the store and all records."""
        self.close()
        if is_url(self.name):
            zarr.core.sync.sync(self.backend.delete_dir(""))
            zarr.core.sync.sync(self._records.delete_dir(""))
            return
        for member in MEMBERS - {LOCK, SOFT_LOCK, WRITING}:
            path = Path(self.folder) / member
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

    @property
    def is_kept(self) -> bool:
        """Whether there is something that the same work can continue."""
        return self._is_kept


@contextmanager
def building(
    name: str,
    made_of: Mapping[str, Any],
    *,
    overwrite: bool,
    resume: bool = True,
    keep: bool = False,
    aside: bool = False,
) -> Iterator[Site]:
    """Open the site of a store, alone.

    The store is moved to its place at the end. If the work is cut off by the system or by the user, what is finished is
    kept; after any other failure, such as an input that turns out to be wrong, nothing is.

    Parameters
    ----------
    name : str
        Path or URL of the store.
    made_of : mapping
        Hashes of content and options.
    overwrite : bool
        Also continue where something else was begun, by removing that.
    resume : bool
        Continue what was begun; otherwise start anew.
    keep : bool
        Keep what was finished after any failure.
    aside : bool
        Where another process holds the site, build on another one. Of several processes that build the same, the first to
        finish has its store in the place, and the others drop theirs.

    Yields
    ------
    Site

    Raises
    ------
    BusyStoreError
        If another process is building the same store.
    StoreExistsError
        If something else was begun, or the site is in use for something else.
    """
    if not is_url(name) and Path(name).is_symlink():
        name = str(Path(name).resolve())
    with _alone(name, aside=aside) as folder:
        site = Site(name, made_of, overwrite=overwrite, folder=folder)
        site.prepare(resume=resume)
        try:
            yield site
            site.move()
        except BaseException as error:
            cut_off = isinstance(error, OSError | MemoryError | KeyboardInterrupt)
            site.close()
            if not site.is_kept or not (cut_off or keep):
                site.clear()
            raise
        site.clear() if not is_url(name) else _forget(site)


def _forget(site: Site) -> None:
    """Remove the records of a store that was built in place."""
    zarr.core.sync.sync(backend_of(site.folder, read_only=False).delete_dir(""))


@contextmanager
def _alone(name: str, *, aside: bool = False) -> Iterator[str]:
    """Hold the lock of a local site, and remove its folder at the end if nothing is left in it."""
    folder = Path(name + PARTIAL)
    if is_url(name):
        yield name + PARTIAL
        return
    folders = [folder.parent, *folder.parent.parents]
    made = [one for one in folders if not one.exists()]
    try:
        try:
            lock = _lock(folder)
        except BusyStoreError:
            if not aside:
                raise
            folder = folder.with_name(f"{Path(name).name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
            lock = _lock(folder)
        try:
            yield str(folder)
        finally:
            _leave(folder, lock)
    finally:
        for one in made:
            with suppress(OSError):
                one.rmdir()


def _lock(folder: Path) -> Any:
    """Take the lock of a site, which is let go when the process ends, however it ends."""
    _refuse_others(folder)
    for _ in range(ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = _take_lock(folder / LOCK)
        except FileNotFoundError:
            continue
        # The process that had it may have removed its file.
        if Path(lock.lock_file).exists():
            return lock
        lock.release()
    raise BusyStoreError(f"{folder} cannot be locked: its lock file vanishes. Choose another place.")


def _take_lock(path: Path) -> Any:
    """Take a lock of the system; where a file system has none, one that is a file with the name of its owner."""
    from filelock import FileLock, SoftFileLock, Timeout  # noqa: PLC0415  (only where a store is written)

    lock: Any = FileLock(path, timeout=0)
    try:
        try:
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in WITHOUT_LOCKS:
                raise
            lock = SoftFileLock(path.with_name(SOFT_LOCK), timeout=0)
            lock.acquire()
    except Timeout as error:
        place = str(path.parent).removesuffix(PARTIAL)
        raise BusyStoreError(
            f"{path.parent} is in use: another process is writing {place}. Wait until it has finished, and run the same "
            f"command again, or choose another place. If none is running any more, on no computer, remove {error.lock_file}."
        ) from error
    return lock


def _refuse_others(folder: Path) -> None:
    """Refuse a site that holds anything that no site holds."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or {member.name for member in folder.iterdir()} - MEMBERS:
        raise StoreExistsError(f"{folder} is in the way, and is no unfinished store. Move it away.")


def _leave(folder: Path, lock: Any) -> None:
    """Let a site go; its folder stays if there is something to continue."""
    if any(member.name not in {LOCK, SOFT_LOCK} for member in folder.iterdir()):
        lock.release()
        return
    (folder / LOCK).unlink(missing_ok=True)
    lock.release()
    with suppress(OSError):
        folder.rmdir()


def _identity(name: str) -> tuple[int, int] | None:
    """What tells a local store from another one at the same place; None where there is none."""
    try:
        found = Path(name).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def check_idle(store: StoreLike) -> None:
    """Refuse a place where another process is writing.

    Parameters
    ----------
    store : path or URL

    Raises
    ------
    BusyStoreError
    """
    if Path(store_name(store) + PARTIAL).is_dir():
        with _alone(store_name(store)):
            pass


def remove_abandoned(store: StoreLike) -> None:
    """Remove what processes that are gone left of a store that others have finished.

    Parameters
    ----------
    store : path
        Of a complete store.
    """
    place = Path(store_name(store))
    for folder in [place.with_name(place.name + PARTIAL), *place.parent.glob(f"{place.name}.*{PARTIAL}")]:
        if folder.is_dir():
            with suppress(BusyStoreError, StoreExistsError), _alone(str(folder).removesuffix(PARTIAL)):
                Site(str(folder).removesuffix(PARTIAL), {}, overwrite=True).clear()


def _move(built: Path, target: Path, old: Path) -> None:
    if not target.exists():
        built.rename(target)
        return
    target.rename(old)
    try:
        built.rename(target)
    except OSError:
        old.rename(target)
        raise


def _make_study(folder: Path) -> None:
    """Make the folder of a store a group that plain xarray can open."""
    if not (folder / ROOT).exists() and not (folder / ".zgroup").exists():
        (folder / ROOT).write_bytes(study_root())


def is_up_to_date(store: StoreLike, made_of: Mapping[str, Any]) -> bool:
    """Whether there is a complete store made of exactly this.

    What a process left that was killed after it had finished is removed.

    Parameters
    ----------
    store : path or URL
    made_of : mapping
        Hashes of content and options.

    Returns
    -------
    bool
    """
    name = store_name(store)
    found = root_attributes(name).get(MADE_OF)
    if not isinstance(found, dict) or differences(found, made_of):
        return False
    folder = Path(name + PARTIAL)
    if not is_url(name) and folder.is_dir() and not (folder / STORE).exists():
        with suppress(BusyStoreError, StoreExistsError), _alone(name):
            for member in (BEGUN, CLAIMS, OLD, WRITING):
                shutil.rmtree(folder / member, ignore_errors=True)
                with suppress(OSError):
                    (folder / member).unlink()
    return True


def hash_of(*contents: bytes) -> str:
    """Hash of a sequence of texts, with their lengths."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()
