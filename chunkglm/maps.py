"""Statistics as NIfTI maps with sidecars, and where they peak."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkglm import grids, nifti
from chunkglm._version import __version__
from chunkglm.expressions import contrast_name
from chunkglm.schema import SPACE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import xarray as xr

MAPS = {"effect": "effect", "variance": "variance", "stat": "t", "p_value": "p", "z_score": "z"}
"""Variables that are written as maps, and what they are called in file names."""

MEANING = {
    "effect": "contrast of the regression coefficients",
    "variance": "variance of the effect",
    "stat": "t statistic",
    "p_value": "one-sided p value (right tail)",
    "z_score": "signed standard normal score with the p value of the statistic",
}


def write_maps(
    maps: xr.Dataset, folder: Path, name: str, *, run: str | None = None, inputs: Sequence[str] = ()
) -> list[Path]:
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

    Returns
    -------
    list of Path
        Everything that was written: a map for effect, variance, t, p and z (0 where the statistic is not a number), a
        sidecar for each, and the mask of the voxels that have a statistic.
    """
    prefix = "" if run is None else f"run-{run}_"
    written = []
    definitions = json.loads(maps.attrs["definition"])
    dof = maps["dof"].values[np.isfinite(maps["dof"].values)]
    for variable, suffix in MAPS.items():
        path = folder / f"{prefix}contrast-{name}_stat-{suffix}_statmap.nii.gz"
        nifti.to_nifti(maps[variable].fillna(0), path, overwrite=True)
        sidecar = {
            "Description": f"{MEANING[variable]}; {'fixed effects' if run is None else f'run {run}'}",
            "Contrast": name,
            "Formula": definitions.get(name, next(iter(definitions.values()))),
            "Weights": {
                str(r): float(w)
                for r, w in zip(maps["regressor"].values, maps["weights"].values, strict=True)
                if w
            },
            "DegreesOfFreedom": float(dof.max()) if dof.size else None,
            "Inputs": list(inputs),
            "Model": {key: maps.attrs.get(key) for key in ("noise_model", "signal_scaling", "compat")},
            "GeneratedBy": {"Name": "chunkglm", "Version": __version__},
        }
        if run is None:
            sidecar["PrecisionWeighted"] = bool(maps.attrs["precision_weighted"])
            sidecar["Runs"] = list(maps.attrs["combined"])
        side_path = path.with_name(path.name.removesuffix(".nii.gz") + ".json")
        write_json(side_path, sidecar)
        written += [path, side_path]
    mask_path = folder / f"{prefix}contrast-{name}_mask.nii.gz"
    nifti.to_nifti(maps["stat"].notnull(), mask_path, overwrite=True)
    return [*written, mask_path]


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
        named = [(str(name), ds.sel(contrast=name)) for name in ds["contrast"].values]
    else:
        name = next(iter(definitions)) or contrast_name(str(next(iter(definitions.values()))))
        named = [(name, ds)]
    written = []
    for name, one in named:
        if "run" not in one.dims:
            written += write_maps(one.compute(), folder, name)
            continue
        for number, label in enumerate(one["run"].values):
            written += write_maps(one.isel(run=number).compute(), folder, name, run=str(label))
    return written


def peak(maps: xr.Dataset) -> dict[str, Any]:
    """Where the z score is largest.

    Returns
    -------
    dict
        ``z``, ``t``, ``dof``, ``mm`` (x, y, z in millimetres), ``voxels`` with a statistic; the first four None where there
        is none.
    """
    z = maps["z_score"].transpose(*SPACE).values
    if not np.isfinite(z).any():
        return {"z": None, "t": None, "dof": None, "mm": None, "voxels": 0}
    place = np.unravel_index(np.nanargmax(z), z.shape)
    mm = grids.slice_affine(maps) @ [*place[::-1], 1]
    dof = maps["dof"].values
    return {
        "z": float(z[place]),
        "t": float(maps["stat"].transpose(*SPACE).values[place]),
        "dof": float(dof[place] if dof.ndim else dof),
        "mm": [round(float(v), 1) for v in mm[:3]],
        "voxels": int(np.isfinite(z).sum()),
    }


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file completely or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
