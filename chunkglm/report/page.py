"""The report of a job: one HTML file that holds everything it shows and asks nothing of a network.

The page is a list of sections. A section is a title, a template, and a function from the results to what the template
shows; another part of the report is another entry of ``SECTIONS``. Every text is escaped by the template engine, and the
page forbids itself to load anything, so that a name cannot become markup.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chunkglm import nifti
from chunkglm import store as stores
from chunkglm._version import __version__
from chunkglm.errors import InputError, MissingDependencyError
from chunkglm.glm import designs_of
from chunkglm.maps import MEAN_IMAGE, PROVENANCE, map_name, write_whole
from chunkglm.report.cuts import largest, millimetres
from chunkglm.report.designs import plot_design
from chunkglm.report.figures import figure_class, png
from chunkglm.report.pictures import plot

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    import xarray as xr

REPORT, PICTURES = "report.html", "pictures"

OF_RUN = frozenset({"noise_model", "volumes_kept", "sample_mask", "voxels_at_ar_limit"})
"""What earlier versions did not tell of a run."""

SCALING = {
    "voxel": "The signal is in percent of each voxel's mean.",
    "run": "The signal is in percent of the run's mean.",
    None: "The signal was not scaled.",
}


class Results(NamedTuple):
    """The folder of a finished job, and how its maps are drawn."""

    folder: Path
    provenance: dict[str, Any]
    background: xr.DataArray
    threshold: float
    cut_coords: tuple[float, float, float] | None
    advance: Callable[[], None]


class Section(NamedTuple):
    """A part of the report."""

    anchor: str
    title: str
    template: str
    content: Callable[[Results], dict[str, Any]]


def report(
    results: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    cut_coords: Sequence[float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draw the pictures of a finished job and write its report.

    Parameters
    ----------
    results : path
        Folder that ``chunkglm run`` left.
    threshold : float, optional
        Absolute z below which nothing is drawn; by default what the job was asked for.
    cut_coords : sequence of float, optional
        x, y and z in millimetres of the point where the cuts of every map meet; by default what the job was asked for, or
        else the largest absolute z of the fixed effects of each contrast.
    progress : callable, optional
        Called with the number of pictures drawn and of all pictures.

    Returns
    -------
    Path
        ``report.html`` in the folder, self-contained. The pictures of the maps are in ``pictures`` as well.

    Raises
    ------
    InputError
        If the folder does not hold a finished job, or cut coordinates lie outside of its maps.
    MissingDependencyError
        If matplotlib or jinja2 (extra ``report``) is not installed.
    """
    figure_class()
    page = _template()
    folder = Path(results)
    provenance = _provenance_of(folder)
    asked = provenance["pictures"]
    coords = asked["cut_coords"] if cut_coords is None else cut_coords
    total = len(provenance["peaks"]) + len(provenance["options"]["contrasts"]) + len(provenance["runs"])
    found = Results(
        folder,
        provenance,
        nifti.read_map(folder / "maps" / MEAN_IMAGE),
        asked["threshold"] if threshold is None else threshold,
        None if coords is None else tuple(coords),
        _counter(total, progress),
    )
    (folder / PICTURES).mkdir(exist_ok=True)
    sections = [(section, section.content(found)) for section in SECTIONS]
    text = page.render(title=_title(provenance), sections=sections, version=__version__)
    # A file name that is not UTF-8 is shown with the sign for an unknown character.
    write_whole(folder / REPORT, text.encode("utf-8", errors="replace"))
    return folder / REPORT


def picture_names(contrast: str, run: str | None) -> list[str]:
    """Names of the picture files of a map, in the folder of pictures; the first shows orthogonal cuts."""
    kinds = ("ortho",) if run is not None else ("ortho", "mosaic")
    return [f"{map_name(contrast, 'z', run).removesuffix('_statmap')}_{kind}.png" for kind in kinds]


def _provenance_of(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        missing = {"pictures", "peaks", "options", "runs"} - set(found)
        missing |= {name for run in found.get("runs", []) for name in OF_RUN - set(run)}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{folder} is not the folder of a finished job: {error}. Give the --output of chunkglm run, after it has ended."
        ) from error
    if found.get("key") is None and "begun" in found:
        raise InputError(
            f"{folder} holds a job that was not finished, so there is nothing to report yet. Run its command again to go on."
        )
    if missing:
        raise InputError(
            f"{folder / PROVENANCE} does not tell all that a report needs ({', '.join(sorted(missing))}). It was made by an "
            "older version: run the job again."
        )
    return found


def _template() -> Any:
    try:
        import jinja2  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise MissingDependencyError(
            "Reports need jinja2, which is not installed. Install it with: pip install 'chunkglm[report]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("chunkglm.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    environment.filters["millimetres"] = lambda place: f"{', '.join(millimetres(place))} mm"
    return environment.get_template("page.html")


def _counter(total: int, progress: Callable[[int, int], None] | None) -> Callable[[], None]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return advance


def _title(provenance: Mapping[str, Any]) -> str:
    names = ", ".join(provenance["options"]["contrasts"])
    return f"{names}: {_count(provenance['runs'])}"


def _count(runs: Sequence[Any]) -> str:
    return f"fixed effects of {len(runs)} run{'s' if len(runs) > 1 else ''}"


def _uri(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _name_of(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1]


# ----------------------------------------------------------------------------------------------------------- sections


def _asked(results: Results) -> dict[str, Any]:
    """What was asked for, in sentences."""
    provenance, options = results.provenance, results.provenance["options"]
    runs, fwhm = provenance["runs"], options["smoothing_fwhm"]
    mask = provenance["mask"]
    weighting = (
        "weighted by the inverse of their variance at each voxel"
        if options["precision_weighted"]
        else "with equal weights"
    )
    sentences = [
        f"{len(runs)} runs were fitted, each with its own design."
        if len(runs) > 1
        else "One run was fitted.",
        "Runs were not smoothed."
        if fwhm is None
        else f"Runs were smoothed by {fwhm:g} mm (full width at half maximum).",
        "The brain was found in each run's temporal mean."
        if mask is None
        else f"The mask is {_name_of(mask['path'])}.",
        _noise(provenance),
        _censored(provenance),
        SCALING[options["signal_scaling"]],
        f"Fixed effects combine the runs {weighting}; their degrees of freedom add up.",
    ]
    if options["compat"]:
        sentences.append(f"Numbers are those of {options['compat']} (compat).")
    contrasts = [
        {"name": name, "formula": _formula(definition)} for name, definition in options["contrasts"].items()
    ]
    return {"sentences": [sentence for sentence in sentences if sentence], "contrasts": contrasts}


def _noise(provenance: Mapping[str, Any]) -> str:
    """The noise models of all runs, in a sentence or two."""
    models = [run["noise_model"] for run in provenance["runs"]]
    asked, compat = provenance["options"]["noise_model"], provenance["options"]["compat"]
    if asked == "auto":
        found = ", ".join(
            f"{run['label']}: {model}" for run, model in zip(provenance["runs"], models, strict=True)
        )
        return (
            f"The order of the noise of each run was chosen by the Bayesian information criterion ({found})."
        )
    if asked == "ols":
        return "Noise is white (ordinary least squares)."
    model = f"Noise is autoregressive of order {asked.removeprefix('ar')}, with"
    if compat:
        return f"{model} coefficients in steps of .01, not corrected."
    return (
        f"{model} each voxel's own coefficient{'' if asked == 'ar1' else 's'}, corrected for the bias that the design leaves. "
        "What is uncertain about them takes degrees of freedom from the contrasts."
    )


def _censored(provenance: Mapping[str, Any]) -> str:
    """How many volumes were censored, if any."""
    lost = {run["label"]: run["volumes"] - run["volumes_kept"] for run in provenance["runs"]}
    if not any(lost.values()):
        return ""
    return "Censored volumes: " + ", ".join(f"{n} of run {label}" for label, n in lost.items() if n) + "."


def _formula(definition: Any) -> str:
    """A definition as text; the rows of an F contrast with semicolons."""
    if isinstance(definition, str):
        return definition
    if isinstance(definition[0], str):
        return "; ".join(definition)
    rows = definition if isinstance(definition[0], list) else [definition]
    return "[" + "; ".join(", ".join(f"{w:g}" for w in row) for row in rows) + "]"


def _maps(results: Results) -> dict[str, Any]:
    """For each contrast the fixed effects, and every run on the same scale, cut at the same place."""
    contrasts = []
    for name in results.provenance["options"]["contrasts"]:
        entries = [entry for entry in results.provenance["peaks"] if entry["contrast"] == name]
        ends = [abs(e[end]["z"]) for e in entries for end in ("highest", "lowest") if e[end] is not None]
        vmax = max(ends, default=0.0) or None
        coords = results.cut_coords
        shown = []
        for entry in entries:
            array = nifti.read_map(results.folder / "maps" / f"{map_name(name, 'z', entry['run'])}.nii.gz")
            if _suffix(results, name) == "F":
                # Where z is negative, F is smaller than noise alone makes it: nothing to see.
                array = array.clip(min=0)
            coords = largest(array)[0] if coords is None else coords
            shown.append(_drawn(results, entry, array, coords, vmax))
        contrasts.append({"name": name, "fixed": shown[0], "runs": shown[1:], "at": coords})
    return {"contrasts": contrasts, "threshold": results.threshold}


def _suffix(results: Results, contrast: str) -> str:
    """The kind of a contrast, t or F, by the map that lies there."""
    return "F" if (results.folder / "maps" / f"{map_name(contrast, 'F')}.nii.gz").is_file() else "t"


def _drawn(
    results: Results, entry: Mapping[str, Any], array: xr.DataArray, coords: Any, vmax: float | None
) -> dict[str, Any]:
    """Draw one map into files, and give it with its numbers to the page."""
    run, name = entry["run"], entry["contrast"]
    of = _count(results.provenance["runs"]) if run is None else f"run {run}"
    pictures = []
    for file_name in picture_names(name, run):
        kind = "ortho" if file_name.endswith("_ortho.png") else "mosaic"
        picture = png(
            plot(
                array,
                results.background,
                results.threshold,
                coords if kind == "ortho" else None,
                kind,  # type: ignore[arg-type]
                f"{name}: {of}",
                vmax=vmax,
            )
        )
        write_whole(results.folder / PICTURES / file_name, picture)
        pictures.append(_uri(picture))
        results.advance()
    return {"of": of, "pictures": pictures, **entry}


def _designs(results: Results) -> dict[str, Any]:
    """The design of every run with the weights of the contrasts over it."""
    weights: dict[str, Any] = {}
    for name in results.provenance["options"]["contrasts"]:
        sidecar = results.folder / "maps" / f"{map_name(name, 'z')}.json"
        about = json.loads(sidecar.read_text(encoding="utf-8"))
        rows = about["Weights"] if "Rows" in about else {"": about["Weights"]}
        weights |= {f"{name}: {row}" if row else name: one for row, one in rows.items()}
    designs = []
    fit = stores.open_store(results.folder / "fit.zarr")
    for run, design in zip(results.provenance["runs"], designs_of(fit), strict=True):
        designs.append({"label": run["label"], "picture": _uri(png(plot_design(design, weights), dpi=120))})
        results.advance()
    return {"designs": designs}


def _runs(results: Results) -> dict[str, Any]:
    """What became of each run."""
    return {"runs": results.provenance["runs"]}


def _made(results: Results) -> dict[str, Any]:
    """Inputs, options, versions and the command: what is needed to repeat it."""
    provenance = results.provenance
    inputs = []
    for run in provenance["runs"]:
        for what, key in (("run", ""), ("design", "design"), ("sample mask", "sample_mask")):
            path, sha256 = run[key or "path"], run[f"{key}_sha256".removeprefix("_")]
            if sha256 is not None:
                inputs.append({"what": f"{what} {run['label']}", "path": path, "sha256": sha256})
    if provenance["mask"]:
        inputs.append({"what": "mask", **provenance["mask"]})
    memory = provenance["peak_memory_bytes"]
    options = {k: v for k, v in provenance["options"].items() if k != "contrasts"}
    return {
        "inputs": inputs,
        "options": {
            name.replace("_", " "): "none" if value is None else value for name, value in options.items()
        },
        "versions": provenance["versions"],
        "command": provenance["command"],
        "working_directory": provenance["working_directory"],
        "finished": provenance["finished"],
        "seconds": provenance["seconds"],
        "peak_memory": None if memory is None else f"{memory / 1e6:.0f} MB",
    }


SECTIONS = (
    Section("asked", "What was asked", "asked.html", _asked),
    Section("maps", "Maps", "maps.html", _maps),
    Section("designs", "Designs", "designs.html", _designs),
    Section("runs", "Runs", "runs.html", _runs),
    Section("made", "How it was made", "made.html", _made),
)
"""The report, from its top."""
