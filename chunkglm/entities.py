"""BIDS entities in the names of stores: where a run stands in a study, and which runs are fitted together."""

from __future__ import annotations

import re

ENTITIES = (
    "sub", "ses", "task", "run", "acq", "ce", "trc", "rec", "dir", "echo", "part", "space", "res", "den", "desc",
)  # fmt: skip
"""Entities of BIDS that the name of a functional recording can carry."""

LEVELS = ("sub", "ses", "task")
"""Those that are levels of a study; the others together name a run."""

VARIANTS = ("echo", "part", "space", "res", "den", "desc")
"""Those that tell apart versions of one recording, which are not combined as if they were runs."""

FUNCTIONAL = "func"
"""Folder of BIDS for functional recordings; no level of a study."""

_SPLIT = re.compile(rf"_(?=(?:{'|'.join(ENTITIES)})-)")
_ENDING = re.compile(r"(?:_bold)?(?:\.zarr)?$")


def is_member(name: str) -> bool:
    """Whether a file name is that of a part of a study: it begins with an entity, as ``sub-01_run-1`` does."""
    return name.partition("-")[0] in ENTITIES and "-" in name


def tree_path(place: str) -> str:
    """Find the path in a study's tree for the place of a store in its folder.

    Parameters
    ----------
    place : str
        Such as ``sub-01_task-rest_run-1_bold.zarr`` or ``sub-01/ses-2/run-1``.

    Returns
    -------
    str
        Subject, session, task and the rest of the name, as far as they are there: ``sub-01/task-rest/run-1``.
    """
    parts = [_ENDING.sub("", part) for part in place.split("/") if part != FUNCTIONAL]
    entities = [one for part in parts for one in _SPLIT.split(part)]
    levels = {key: one for one in entities for key in LEVELS if one.startswith(f"{key}-")}
    rest = [one for one in entities if one not in levels.values()]
    return "/".join([*(levels[key] for key in LEVELS if key in levels), *(["_".join(rest)] if rest else [])])


def fit_and_label(path: str) -> tuple[str, str]:
    """Find which runs of a tree are fitted together: those of one subject and task, of all sessions.

    Versions of the recordings (``echo``, ``part``, ``space``, ``res``, ``den``, ``desc``) have fits of their own.

    Parameters
    ----------
    path : str
        Of a run in a tree, such as ``sub-01/ses-2/task-rest/run-1``.

    Returns
    -------
    fit, label : str
        Path of the fit in a tree of fits (``sub-01/task-rest``; empty where the path names neither), and the label of the
        run in it (``ses-2_run-1``; without sessions ``1``).
    """
    parts = [part for part in path.split("/") if part not in {"", "."}]
    own: list[str] = []
    if parts and parts[-1].partition("-")[0] not in LEVELS:
        own = _SPLIT.split(parts.pop())
    version = [one for one in own if one.partition("-")[0] in VARIANTS]
    of_run = [part for part in parts if part.startswith("ses-")] + [one for one in own if one not in version]
    fit = [part for part in parts if part not in of_run] + (["_".join(version)] if version else [])
    label = of_run[0].removeprefix("run-") if len(of_run) == 1 else "_".join(of_run)
    return "/".join(fit), label or "1"


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Key by which names sort as people count: ``run-2`` before ``run-10``."""
    return tuple((int(piece) if piece.isdecimal() else -1, piece) for piece in re.split(r"(\d+)", name))
