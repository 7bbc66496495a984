"""A hard limit on the memory of a process and its children, set by the system."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CGROUPS = Path("/sys/fs/cgroup")

ENTER = """
import os, sys
kind, value, *words = sys.argv[1:]
if kind == "cgroup":
    with open(value + "/cgroup.procs", "w") as processes:
        processes.write(str(os.getpid()))
else:
    import resource
    resource.setrlimit(resource.RLIMIT_DATA, (int(value), int(value)))
os.execv(words[0], words)
"""
"""A program that puts itself under a limit, and becomes the one that is named after it."""

FILES: Mapping[int, tuple[str, str, str, str]] = {
    1: (
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.oom_control",
    ),
    2: ("memory.max", "memory.swap.max", "memory.peak", "memory.events"),
}
"""Names in the two versions of control groups: the limit, the one with swap, the peak, the count of kills."""


class Limit(NamedTuple):
    """A limit that a command can be put under."""

    kind: str
    """``"cgroup"``: everything that the kernel counts, page cache included, over all processes. ``"rlimit"``: private
    writable memory that a process has asked for, used or not (``RLIMIT_DATA``), each process on its own."""
    words: list[str]
    """What stands before the words of the command."""
    folder: Path | None
    version: int

    def peak(self) -> int | None:
        """Bytes counted against the limit at most, page cache included; None where the system does not tell."""
        if self.folder is None or not (file := self.folder / FILES[self.version][2]).exists():
            return None
        return int(file.read_text(encoding="ascii"))

    def n_killed(self) -> int:
        """Processes that the system killed because of the limit."""
        if self.folder is None:
            return 0
        lines = (self.folder / FILES[self.version][3]).read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def own_cgroup() -> tuple[Path, int] | None:
    """Folder of the control group that counts the memory of this process, and the version; None without one."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    places = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for controllers, path in places.items():
        if "memory" in controllers.split(","):
            return CGROUPS / controllers / path.lstrip("/"), 1
    return (CGROUPS / places[""].lstrip("/"), 2) if "" in places else None


@contextmanager
def hard_limit(n_bytes: int, kind: str | None = None) -> Iterator[Limit]:
    """Make a limit, and take it away at the end.

    Parameters
    ----------
    n_bytes : int
        The limit.
    kind : "cgroup" or "rlimit", optional
        A control group where this process may make one, else ``RLIMIT_DATA``.

    Yields
    ------
    Limit
        A control group is new and empty: what other processes have read does not count, nor help.
    """
    folder, version = (None, 0) if kind == "rlimit" else _make_cgroup(n_bytes)
    if folder is None:
        if kind == "cgroup":
            sys.exit(
                "No control group can be made here: that takes its folder to be writable. Try --limit-by rlimit."
            )
        if not sys.platform.startswith("linux"):
            sys.exit("A hard limit on memory takes Linux: other systems ignore it.")
        yield Limit("rlimit", [sys.executable, "-c", ENTER, "rlimit", str(n_bytes)], None, 0)
        return
    try:
        yield Limit("cgroup", [sys.executable, "-c", ENTER, "cgroup", str(folder)], folder, version)
    finally:
        _remove(folder)


def _make_cgroup(n_bytes: int) -> tuple[Path | None, int]:
    """A new group within the one of this process, so that limits that are there already go on to hold."""
    own = own_cgroup()
    if own is None:
        return None, 0
    folder, version = own[0] / f"chunkglm-benchmark-{os.getpid()}-{time.monotonic_ns()}", own[1]
    limit, with_swap, *_ = FILES[version]
    try:
        folder.mkdir()
    except OSError:
        return None, 0
    try:
        (folder / limit).write_text(str(n_bytes), encoding="ascii")
        if (folder / with_swap).exists():
            (folder / with_swap).write_text(str(n_bytes) if version == 1 else "0", encoding="ascii")
    except OSError:
        _remove(folder)
        return None, 0
    return folder, version


def _remove(folder: Path) -> None:
    """Remove a group; its last process may take a moment to be gone."""
    for _ in range(50):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return
    print(f"The control group {folder} could not be removed: a process is left in it.", file=sys.stderr)
