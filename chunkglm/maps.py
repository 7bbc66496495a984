"""Statistics as NIfTI maps with sidecars, and where they peak."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chunkglm import grids, nifti
from chunkglm._version import __version__
from chunkglm.contrasts import KEPT_ATTRIBUTES
from chunkglm.errors import StoreError
from chunkglm.expressions import contrast_name
from chunkglm.schema import SPACE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import xarray as xr

PROVENANCE, MEAN_IMAGE = "provenance.json", "mean_image.nii.gz"
"""In the folder of results, and in its ``maps``."""

MAPS = {
    "t": {"effect": "effect", "variance": "variance", "stat": "t", "p_value": "p", "z_score": "z"},
    "F": {"effect": "effect", "stat": "F", "p_value": "p", "z_score": "z"},
}
"""Variables that are written as maps of t and F contrasts, and what they are called in file names."""

MEANING = {
    "effect": "contrast of the regression coefficients",
    "variance": "variance of the effect",
    "t": "t statistic",
    "F": "F statistic",
    "p": "one-sided p value (right tail)",
    "z": "signed standard normal score with the p value of the statistic",
}


class Written(NamedTuple):
    """Maps with their sidecars, and where they peak: see :func:`peaks`; with the names of contrast and run."""

    paths: list[Path]
    peaks: dict[str, Any]


def map_name(contrast: str, suffix: str, run: str | None = None) -> str:
    """File name, without its ending, of a map (``suffix`` t, z, ...) of a run or of the fixed effects."""
    return f"{'' if run is None else f'run-{run}_'}contrast-{contrast}_stat-{suffix}_statmap"


def write_maps(
    maps: xr.Dataset,
    folder: Path,
    name: str,
    *,
    run: str | None = None,
    inputs: Sequence[str] = (),
    made_of: str | None = None,
    n_threads: int = 1,
) -> Written:
    """Write the statistics of one contrast as NIfTI maps with JSON sidecars.

    Parameters
    ----------
    maps : Dataset
        Statistics with dims ``(z, y, x)``, of one run or of the fixed effects.
    folder : Path
    name : str
        Name of the contrast.
    run : str, optional
        Label of the run; none for the fixed effects.
    inputs : sequence of str
        Names of the recordings, for the sidecars.
    made_of : str, optional
        Hash of all that the maps are made of, by which :func:`read_maps` finds them again.
    n_threads : int
        Maps that are written at a time.

    Returns
    -------
    Written
        Where the maps peak, and everything that was written: a map for effect, variance, t, p and z, or of F contrasts
        for effect (a volume a row), F, p and z (0 where the statistic is not a number), a sidecar for each, and the mask
        of the voxels that have a statistic.
    """
    found = {"contrast": name, "run": run, **peaks(maps)}
    common = {**_about(maps, name, run, inputs), "Peaks": found}
    if made_of is not None:
        common["MadeOf"] = made_of
    mask_path = _mask_path(folder, name, run)
    nifti.to_nifti(maps["stat"].notnull(), mask_path, overwrite=True)

    def write(item: tuple[str, str]) -> list[Path]:
        variable, suffix = item
        path = folder / f"{map_name(name, suffix, run)}.nii.gz"
        nifti.to_nifti(maps[variable].fillna(0), path, overwrite=True)
        side_path = _side_path(path)
        described = f"{MEANING[suffix]}; {'fixed effects' if run is None else f'run {run}'}"
        write_json(side_path, {"Description": described, **common})
        return [path, side_path]

    # Compression takes longest, and leaves other threads alone.
    with ThreadPoolExecutor(n_threads) as pool:
        written = [path for paths in pool.map(write, MAPS[maps.attrs["stat_type"]].items()) for path in paths]
    return Written([*written, mask_path], found)


def _side_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


def _mask_path(folder: Path, name: str, run: str | None) -> Path:
    return folder / f"{'' if run is None else f'run-{run}_'}contrast-{name}_mask.nii.gz"


def read_maps(folder: Path, name: str, run: str | None, made_of: str) -> Written | None:
    """Find the maps of a contrast that were written before.

    Parameters
    ----------
    folder : Path
    name : str
        Name of the contrast.
    run : str or None
        Label of the run; None for the fixed effects.
    made_of : str
        Hash of all that they are made of.

    Returns
    -------
    Written or None
        None if one of them is not there, or is made of something else. A sidecar is written after its map.
    """
    for suffixes in MAPS.values():
        paths = [folder / f"{map_name(name, suffix, run)}.nii.gz" for suffix in suffixes.values()]
        sides = [_read_json(_side_path(path)) for path in paths]
        there = [*paths, _mask_path(folder, name, run)]
        if all(side.get("MadeOf") == made_of for side in sides) and all(path.is_file() for path in there):
            both = [path for one in paths for path in (one, _side_path(one))]
            return Written([*both, there[-1]], sides[0]["Peaks"])
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _about(maps: xr.Dataset, name: str, run: str | None, inputs: Sequence[str]) -> dict[str, Any]:
    """What the sidecars of all maps of a contrast say."""
    definitions = json.loads(maps.attrs["definition"])
    about = {
        "Contrast": name,
        "Formula": definitions.get(name, next(iter(definitions.values()))),
        "Weights": _weights(maps),
        **_degrees_of_freedom(maps),
        "Inputs": list(inputs),
        "Model": {key: maps.attrs[key] for key in KEPT_ATTRIBUTES if key in maps.attrs},
        "GeneratedBy": {"Name": "chunkglm", "Version": __version__},
    }
    if run is None:
        about["PrecisionWeighted"] = bool(maps.attrs["precision_weighted"])
        about["Runs"] = list(maps.attrs["combined"])
    return about


def _weights(maps: xr.Dataset) -> dict[str, Any]:
    """The weights other than 0 by regressor; of an F contrast, for each row."""
    names = [str(name) for name in maps["regressor"].values]
    rows = maps["weights"].transpose(..., "regressor").values
    found = [{name: float(w) for name, w in zip(names, row, strict=True) if w} for row in np.atleast_2d(rows)]
    if "row" not in maps["weights"].dims:
        return found[0]
    return {str(name): one for name, one in zip(maps["row_name"].values, found, strict=True)}


def _degrees_of_freedom(maps: xr.Dataset) -> dict[str, Any]:
    """Of the voxels; the median, and the range where they differ."""
    dof = maps["dof"].values[np.isfinite(maps["dof"].values)]
    about: dict[str, Any] = {"DegreesOfFreedom": float(np.median(dof)) if dof.size else None}
    if dof.size and dof.min() < dof.max():
        about["DegreesOfFreedomRange"] = [float(dof.min()), float(dof.max())]
    if "n_rows" in maps:
        about["Rows"] = int(maps["n_rows"])
    return about


def export_maps(ds: xr.Dataset, folder: Path) -> list[Path]:
    """Write the maps of contrasts or fixed effects, one at a time in memory.

    Parameters
    ----------
    ds : Dataset
        Statistics, perhaps with the dims ``contrast`` and ``run``.
    folder : Path

    Returns
    -------
    list of Path
        What was written.
    """
    definitions = json.loads(ds.attrs["definition"])
    if "contrast" in ds.dims:
        named = [(str(name), _own_rows(ds.sel(contrast=name))) for name in ds["contrast"].values]
    else:
        name = next(iter(definitions)) or contrast_name(str(next(iter(definitions.values()))))
        named = [(name, ds)]
    written = []
    for name, one in named:
        if "run" not in one.dims:
            written += write_maps(one.compute(), folder, name).paths
            continue
        for number, label in enumerate(one["run"].values):
            written += write_maps(one.isel(run=number).compute(), folder, name, run=str(label)).paths
    return written


def _own_rows(ds: xr.Dataset) -> xr.Dataset:
    """One of several F contrasts, without the rows that others have more."""
    return ds.isel(row=slice(int(ds["n_rows"])), row_=slice(int(ds["n_rows"]))) if "n_rows" in ds else ds


def peaks(maps: xr.Dataset) -> dict[str, Any]:
    """Where the z score is highest and where it is lowest.

    Returns
    -------
    dict
        ``voxels`` with a statistic, and ``highest`` and ``lowest``: dicts of ``z``, ``t`` or ``F``, ``dof`` and ``mm`` (x, y, z
        in millimetres), None where there is no statistic. An F statistic has no ``lowest``: a small one says nothing.
    """
    z = maps["z_score"].transpose(*SPACE).values
    voxels = int(np.isfinite(z).sum())
    if not voxels:
        return {"voxels": 0, "highest": None, "lowest": None}
    stat, dof = maps["stat"].transpose(*SPACE).values, maps["dof"].values
    kind = str(maps.attrs["stat_type"])
    grid = grids.grid_of(maps)

    def at(number: np.intp) -> dict[str, Any]:
        place = np.unravel_index(number, z.shape)
        return {
            "z": float(z[place]),
            kind: float(stat[place]),
            "dof": float(dof[place] if dof.ndim else dof),
            "mm": [round(mm, 3) for mm in grids.world_of(grid, place)],
        }

    lowest = at(np.nanargmin(z)) if kind == "t" else None
    return {"voxels": voxels, "highest": at(np.nanargmax(z)), "lowest": lowest}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file completely or not at all."""
    # A file name that is not UTF-8 becomes an escape of JSON.
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8", errors="backslashreplace"))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all.

    Raises
    ------
    StoreError
        If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"{path} was not written: {error}. Check the folder and its free space.") from error
    finally:
        partial.unlink(missing_ok=True)
