"""Whole processes that take turns: their time and memory, and the ratios pair by pair."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from chunkglm.plan import available_cpus, format_bytes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

PYTHON = sys.executable
ROOT = Path(__file__).parents[1]

INTERVAL = 0.01
"""Seconds between looks at the memory of a process."""


class Measured(NamedTuple):
    """One run of a command: seconds of wall and of processors, peak resident bytes, with those of its children."""

    wall: float
    cpu: float
    memory: int


class Command(NamedTuple):
    """A command, and what is done before each of its runs."""

    name: str
    words: Sequence[str]
    prepare: Callable[[], object] | None = None


def measure(words: Sequence[str]) -> Measured:
    """Run a command to its end; a failure ends the benchmark with its message."""
    measured, code, message = run_to_end(words)
    if code:
        sys.exit(f"{' '.join(words)} ended with {code}:\n{message}")
    return measured


def run_to_end(
    words: Sequence[str], trouble: Callable[[], str | None] | None = None
) -> tuple[Measured, int, str]:
    """Run a command to its end, whatever that is.

    Parameters
    ----------
    words : sequence of str
        The command.
    trouble : callable, optional
        Asked about once a second. A text that it returns ends the command, and the benchmark with it.

    Returns
    -------
    measured : Measured
    code : int
        As :attr:`subprocess.Popen.returncode`: minus the number of the signal that ended the command.
    message : str
        The end of what the command wrote to its standard error.
    """
    # Compiled modules, as users have them.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as errors:
        started = asked = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT, env=environment)
        memory = 0
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                memory = max(memory, _peak_memory(process.pid))
                time.sleep(INTERVAL)
                if trouble is not None and time.perf_counter() - asked > 1:
                    asked = time.perf_counter()
                    if text := trouble():
                        sys.exit(text)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        message = errors.read().decode(errors="replace")[-2000:]
    if not memory:
        memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured(wall, usage.ru_utime + usage.ru_stime, memory), process.returncode, message


def _peak_memory(pid: int) -> int:
    """Peak resident bytes of a process and its children so far; 0 where the system does not tell.

    What the system tells at the end of a process is no less than the peak of the one that started it.
    """
    total = 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
        for one in (str(pid), *children):
            with Path(f"/proc/{one}/status").open(encoding="utf-8") as lines:
                total += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
    except OSError:
        pass
    return total


def take_turns(
    commands: Sequence[Command], repeats: int, *, warmup: int = 1, touch: float = 0.0
) -> dict[str, list[Measured]]:
    """Measure commands in turn, ``repeats`` times after a round that is not counted."""
    found: dict[str, list[Measured]] = {command.name: [] for command in commands}
    for number in range(-warmup, repeats):
        for command in commands:
            if command.prepare is not None:
                command.prepare()
            touch_memory(touch)
            measured = measure(command.words)
            if number >= 0:
                found[command.name].append(measured)
    return found


def touch_memory(gibibytes: float) -> None:
    """Write to so much memory, and free it.

    A virtual machine may have to ask its host for every page that was not used before, or not for a while, which makes any
    program slower that is the first to use it. After this, none is.
    """
    if gibibytes:
        measure([PYTHON, "-c", f"import numpy; numpy.zeros(int({gibibytes} * 2**27)).fill(1.0)"])


def add_options(parser: argparse.ArgumentParser, *, repeats: int = 3) -> None:
    """Options of every comparison."""
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument(
        "--touch", type=float, default=0.0, help="GiB of memory to touch before each run: see the README"
    )


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, with the smallest and the largest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def print_comparison(
    found: dict[str, list[Measured]], reference: str, goals: dict[str, str] | None = None
) -> None:
    """A row for each command, with its ratios to the reference, pair by pair.

    Parameters
    ----------
    found : dict
        From :func:`take_turns`.
    reference : str
        Name of the command that the others are compared with.
    goals : dict, optional
        By the name of a command.
    """
    print("| command | wall s | cpu s | peak memory | times faster | times smaller | goal |")
    print("|---|---|---|---|---|---|---|")
    base = found[reference]
    for name, runs in found.items():
        faster = smaller = ""
        if name != reference:
            faster = spread([b.wall / a.wall for a, b in zip(runs, base, strict=True)], 2)
            smaller = spread([b.memory / a.memory for a, b in zip(runs, base, strict=True)], 2)
        cells = [
            name,
            spread([one.wall for one in runs], 2),
            spread([one.cpu for one in runs], 2),
            format_bytes(statistics.median(one.memory for one in runs)),
            faster,
            smaller,
            (goals or {}).get(name, ""),
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def describe_machine() -> str:
    """One line about the machine and the packages."""
    packages = ("chunkglm", "nilearn", "numpy", "scipy", "zarr", "xarray", "dask")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    machine = f"{available_cpus()} processors ({_processor()}), {platform.system()}"
    return f"{machine}, Python {platform.python_version()}; {versions}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
    wide = " with AVX-512" if "avx512f" in names.get("flags", "") else ""
    return f"{names.get('model name', platform.machine())}{wide}"
