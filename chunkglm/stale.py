"""What a job would make, and why: nothing is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from chunkglm import nifti
from chunkglm import store as stores
from chunkglm.convert import run_made_of
from chunkglm.maps import read_maps
from chunkglm.provenance import fit_made_of, maps_hash, run_parts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from chunkglm.request import Job, Models


class Product(NamedTuple):
    """A product of a job.

    Attributes
    ----------
    name : str
    state : {"up to date", "begun", "missing", "stale"}
        What is stale is made again, what was begun is continued.
    why : str
        What a stale product is not made of alike.
    """

    name: str
    state: str
    why: str = ""


def products(job: Job, models: Models) -> list[Product]:
    """Find out which products of a job are there, and of the others why they are not.

    Parameters
    ----------
    job : Job
    models : Models
        From :func:`chunkglm.preflight.check_job`.

    Returns
    -------
    list of Product
        Stores of the runs, the fit of every run, and the maps of every contrast.
    """
    sources = [nifti.source_sha256(run) for run in job.runs]
    found = []
    for label, run, source in zip(models.designs, job.runs, sources, strict=True):
        place = job.output / "runs.zarr" / f"run-{label}"
        expected = run_made_of(run, **job.run_options, sha256=source)
        found.append(_store(f"store of run {label}", place, expected))
    shared, parts = fit_made_of(job, models), run_parts(job, models, sources)
    found += [
        _fit(f"fit of run {label}", job.output / "fit.zarr", shared, number, part)
        for number, (label, part) in enumerate(zip(models.designs, parts, strict=True))
    ]
    # What is made anew from a fit that is, too, cannot be there.
    fitted = all(one.state == "up to date" for one in found if one.name.startswith("fit"))
    for name in job.contrasts:
        of = maps_hash(job, models, sources, name)
        there = [read_maps(job.output / "maps", name, label, of) for label in (None, *models.designs)]
        if all(one is not None for one in there):
            found.append(Product(f"maps of {name}", "up to date"))
            continue
        exists = any((job.output / "maps").glob(f"*contrast-{name}_*"))
        why = "the fit, or the contrast" if fitted else "the fit"
        found.append(Product(f"maps of {name}", "stale" if exists else "missing", why if exists else ""))
    return found


def _store(name: str, place: Path, expected: Mapping[str, Any]) -> Product:
    made_of = stores.made_of(place)
    if made_of is not None:
        others = stores.differences(made_of, expected)
        return Product(name, "stale" if others else "up to date", ", ".join(others))
    begun = stores.begun(place)
    if begun is None:
        return Product(name, "missing")
    others = [one for one in stores.differences(begun, expected) if one != "source"]
    return Product(name, "stale" if others else "begun", ", ".join(others))


def _fit(name: str, place: Path, shared: Mapping[str, Any], number: int, part: Mapping[str, Any]) -> Product:
    made_of = stores.made_of(place)
    if made_of is not None:
        runs = list(made_of.pop("runs", []))
        others = stores.differences(made_of, shared)
        if not others and number < len(runs):
            others = stores.differences(runs[number], part)
        return Product(name, "stale" if others else "up to date", ", ".join(others))
    begun = stores.begun(place)
    if begun is None:
        return Product(name, "missing")
    others = stores.differences(begun, shared)
    return Product(name, "stale" if others else "begun", ", ".join(others))
