"""Draw what benchmarks printed: how many times faster and smaller than what they are compared with, beside the goals."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

PICTURE = Path(__file__).parent / "comparisons.png"


class Row(NamedTuple):
    """A row of a table: what was compared, the median ratio and its ends, and the two goals, where there are any."""

    name: str
    ratio: tuple[float, float, float]
    goal: tuple[float, float] | None


def read_rows(text: str) -> list[Row]:
    """Read the rows that have a ratio of times."""
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| ") or len(cells) < 6 or not cells[4] or cells[0] == "command":
            continue
        found = [float(number) for number in re.findall(r"\d+\.?\d*", cells[4])]
        middle, low, high = found if len(found) == 3 else (found[0],) * 3
        goal = re.match(r"([\d.]+) to ([\d.]+)", cells[6]) if len(cells) > 6 else None
        rows.append(
            Row(cells[0], (low, middle, high), None if goal is None else (float(goal[1]), float(goal[2])))
        )
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """One line a row: the ratio with its spread, and the goals as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.9 + 0.42 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        low, middle, high = row.ratio
        if row.goal is not None:
            ax.barh(place, row.goal[1] - row.goal[0], left=row.goal[0], height=0.62, color="#d8e3ee")
        ax.plot([low, high], [place, place], color="#0b5cad", linewidth=2)
        ax.plot(middle, place, "o", color="#0b5cad", markersize=6)
        ax.annotate(
            f"{middle:g}", (middle, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    ax.set_yticks(range(len(rows)), [row.name for row in reversed(rows)], fontsize=9)
    ax.set_ylim(-0.7, len(rows) - 0.2)
    ax.axvline(1, color="black", linewidth=0.7)
    ax.set_xscale("log")
    ax.set_xlabel(
        "times faster than what it is compared with, whole processes (shaded: the goals)", fontsize=9
    )
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(arguments: list[str]) -> None:
    """Draw the tables in some files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks picture", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="files with what benchmarks printed")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    rows = [row for path in options.results for row in read_rows(path.read_text(encoding="utf-8"))]
    draw(rows, options.picture)
