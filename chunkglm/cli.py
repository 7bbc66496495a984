"""The command line: the same verbs and names as in Python."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import dask
from rich.console import Console
from rich.table import Table

from chunkglm import budget, nifti, plan
from chunkglm import demo as demonstration
from chunkglm import job as jobs
from chunkglm import store as stores
from chunkglm._version import __version__
from chunkglm.cluster import SLURM, THREADS, check_scheduler, computing, share_freed_memory, stage
from chunkglm.contrasts import contrast as compute_contrast
from chunkglm.convert import convert as convert_run
from chunkglm.convert import is_converted
from chunkglm.design import read_column_names, read_design
from chunkglm.errors import ChunkGLMError, ChunkGLMWarning, InputError, StoreExistsError
from chunkglm.expressions import contrast_name, parse_definition
from chunkglm.fixed_effects import fixed_effects
from chunkglm.glm import fit as fit_runs
from chunkglm.maps import PROVENANCE, export_maps
from chunkglm.preflight import check_job, examine, plan_job
from chunkglm.report import PICTURES, REPORT, save_figure
from chunkglm.report import plot as draw
from chunkglm.report import report as write_report
from chunkglm.report.cuts import millimetres
from chunkglm.report.pictures import KINDS
from chunkglm.request import Job, names_for, sample_mask_of
from chunkglm.stale import products
from chunkglm.trees import datasets_of, runs_by_fit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import xarray as xr

# No markup: a name may hold anything.
OUT = Console(highlight=False, markup=False)
ERR = Console(stderr=True, highlight=False, markup=False)


PICTURE_TYPES = (".png", ".svg", ".pdf")

EXISTING = click.Path()
"""Paths are checked where they are used: the messages there say more."""


class _State:
    """What holds for every verb."""

    quiet = False
    verbose = False
    arguments: tuple[str, ...] = ()


# -------------------------------------------------------------------------------------------------------------- options


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_json = click.option("--json", "as_json", is_flag=True, help="For programs.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace what exists.")
_memory = click.option(
    "--memory",
    default=budget.configured,
    help="Memory to use, on a cluster by each worker, besides the interpreter and its imports (about 130 MiB).  [default: "
    f"chunkglm.memory of Dask's configuration, or {budget.DEFAULT}]",
)
_where = _options(
    click.option(
        "--n-threads",
        type=click.IntRange(1),
        help="Voxel blocks at a time on this machine, or in each job of slurm.  [default: all processors; 1 in a job]",
    ),
    click.option(
        "--scheduler",
        default=THREADS,
        show_default=True,
        metavar="threads|processes|slurm|tcp://HOST:PORT",
        help="Where to compute: threads or worker processes of this machine, Slurm jobs, or a running Dask cluster.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        help="Number of processes or of Slurm jobs; of a running cluster, how many workers to wait for.",
    ),
    click.option(
        "--performance-report",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="HTML file for Dask's own report of what a cluster did.",
    ),
)
_mask = click.option(
    "--mask", type=EXISTING, help="Mask image. Without it the brain is found in the temporal mean."
)
_t_r = click.option(
    "--t-r", type=float, help="Repetition time in seconds, where the header has none or a wrong one."
)
_smoothing = click.option(
    "--smoothing-fwhm", type=float, help="Gaussian smoothing, full width at half maximum in mm."
)
_column_names = click.option(
    "--column-names",
    type=EXISTING,
    help="File with the names of the design's columns, one a line, for designs without names.",
)
_design = click.option(
    "--design",
    "designs",
    multiple=True,
    required=True,
    type=EXISTING,
    help="Design matrix of a run; once for each run.",
)
_model = _options(
    click.option(
        "--noise-model",
        default="ar1",
        show_default=True,
        metavar="ols|ar1|ar2|...|auto",
        help="Autoregressive noise with each voxel's own coefficients; auto chooses the order of each run.",
    ),
    click.option(
        "--signal-scaling",
        type=click.Choice(["voxel", "run", "none"]),
        default="voxel",
        show_default=True,
        help="Percent of the voxel's mean, of the run's mean, or no scaling.",
    ),
    click.option("--compat", type=click.Choice(["nilearn"]), help="The numbers of nilearn 0.14.1."),
    click.option(
        "--sample-mask",
        "sample_masks",
        multiple=True,
        metavar="FILE|all",
        help="Volumes of a run to keep: 1 or 0 for each, or their numbers from 0; once for each run, in their order.",
    ),
)
_contrasts = click.option(
    "--contrast",
    "contrasts",
    multiple=True,
    required=True,
    metavar="NAME=EXPRESSION",
    help="NAME=EXPRESSION, NAME=[weights], or a bare expression; semicolons separate the rows of an F contrast; may be "
    "repeated.",
)


def _threshold(default: float | None) -> Callable[[Any], Any]:
    shown = "as the job was asked for" if default is None else f"{default:g}"
    what = "Absolute value below which pictures show nothing; corrects for nothing."
    return click.option("--threshold", type=float, default=default, help=f"{what}  [default: {shown}]")


_cut_coords = click.option(
    "--cut-coords",
    type=float,
    nargs=3,
    metavar="X Y Z",
    help="Millimetres of the point where cuts meet.  [default: the largest absolute value]",
)
_precision_weighted = click.option(
    "--precision-weighted", is_flag=True, help="Weight runs by the inverse of their variance at each voxel."
)


_job_options = _options(
    _design,
    _contrasts,
    _mask,
    _column_names,
    _t_r,
    _smoothing,
    _model,
    _precision_weighted,
    _threshold(3.0),
    _cut_coords,
    _memory,
    _where,
    click.option(
        "--report/--no-report",
        "report",
        default=True,
        help="Draw pictures and the report, or leave it to a later chunkglm report.",
    ),
    _overwrite,
    _json,
)
"""Options of a whole job, which is done or only examined."""


def _scaling(text: str) -> Any:
    return None if text == "none" else text


def _read_contrasts(texts: tuple[str, ...]) -> dict[str, Any]:
    contrasts: dict[str, Any] = {}
    for text in texts:
        name, definition = parse_definition(text)
        if name is None:
            name = contrast_name(definition if isinstance(definition, str) else text)
        if name in contrasts:
            raise InputError(f"Two contrasts are named {name!r}. Give each its own name: NAME=EXPRESSION.")
        contrasts[name] = definition
    return contrasts


def _open_runs(paths: tuple[str, ...]) -> dict[str, xr.Dataset]:
    """Run stores by label; a study stands for all its runs."""
    runs: dict[str, xr.Dataset] = {}
    for path in paths:
        if stores.is_study(path):
            groups = runs_by_fit(stores.open_study(path))
            if len(groups) > 1:
                raise InputError(
                    f"{path} holds runs of {', '.join(groups)}, which are not fitted together. Give the runs of one of them."
                )
            found = {label: run for label, (_, run) in next(iter(groups.values())).items()}
        else:
            found = {Path(path).name.removeprefix("run-").removesuffix(".zarr"): stores.open_run(path)}
        if doubled := set(found) & set(runs):
            raise InputError(
                f"Two runs are labelled {', '.join(sorted(doubled))}. Rename a store: its name is its label."
            )
        runs |= found
    return runs


def _print_json(content: Any) -> None:
    """For programs: nothing else goes to standard output with it."""
    click.echo(json.dumps(content, indent=2, default=str))


# ---------------------------------------------------------------------------------------------------------------- verbs


def _remember(context: click.Context, option: click.Parameter, given: bool) -> None:  # noqa: ARG001  (click's)
    if given and option.name is not None:
        setattr(_State, option.name, True)


def _talk(command: Any) -> Any:
    """Have -q and -v, before the verb and behind it."""
    quiet = click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_remember, help="No progress."
    )
    verbose = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_remember,
        help="A traceback with every error.",
    )
    return quiet(verbose(command))


class _Verbs(click.Group):
    """Verbs, each with -q and -v: first those that do the whole job, then its steps in their order."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(_talk(cmd), name)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's)
        return sorted(self.commands, key=lambda name: name not in ("run", "check", "demo"))


FIRST_STEPS = """\
chunkglm fits fMRI runs that do not fit into memory, and combines them by fixed effects.

See it work on simulated data (seconds, no network):
  {program} demo

Do it with your own runs:
  {program} run run1.nii.gz run2.nii.gz --design design1.csv --design design2.csv \\
      --mask mask.nii.gz --smoothing-fwhm 5 --contrast "diff=face - house" --output results
  then open results/report.html

All verbs: {program} --help; one of them: {program} run --help
"""


@click.group(
    cls=_Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="chunkglm")
@_talk
@click.pass_context
def cli(context: click.Context) -> None:
    """First-level fMRI models and fixed effects on data larger than memory.

    The whole job is `chunkglm run`; `chunkglm demo` shows it on simulated data.
    """
    if context.invoked_subcommand is None:
        click.echo(FIRST_STEPS.format(program=demonstration.program()), nl=False)


@cli.command()
@click.argument("source", type=EXISTING)
@click.argument("store", type=EXISTING)
@_mask
@_t_r
@_smoothing
@_memory
@_overwrite
@click.option(
    "--no-resume",
    "resume",
    is_flag=True,
    default=True,
    flag_value=False,
    help="Start anew where it was cut off.",
)
def convert(source: str, store: str, *, overwrite: bool, resume: bool, memory: str, **options: Any) -> None:
    """Convert the NIfTI run SOURCE to the run store STORE.

    Example: chunkglm convert run1.nii.gz study.zarr/run-1 --mask mask.nii.gz
    """
    if not overwrite and is_converted(source, store, **options):
        OUT.print(f"{store} is up to date: made from the same data with the same options.", soft_wrap=True)
        return
    with stage(ERR, f"Converting {Path(source).name}", "volumes", quiet=_State.quiet) as progress:
        convert_run(
            source, store, memory=memory, overwrite=overwrite, resume=resume, progress=progress, **options
        )
    OUT.print(f"Wrote {store}", soft_wrap=True)


@cli.command()
@click.argument("store", type=EXISTING)
@_json
def info(store: str, *, as_json: bool) -> None:
    """Say what is in STORE.

    It may be a run, a study of runs, a fit, contrasts or fixed effects.

    Example: chunkglm info study.zarr/run-1
    """
    if stores.is_study(store):
        described = {path: _describe(ds) for path, ds in datasets_of(stores.open_study(store)).items()}
    else:
        described = {Path(store).name: _describe(stores.open_store(store))}
    if as_json:
        _print_json(described)
        return
    for name, about in described.items():
        table = Table(title=name, show_header=False, title_justify="left")
        for key, value in about.items():
            shown = (
                "\n".join(f"{k} {tuple(v)}" for k, v in value.items()) if key == "variables" else str(value)
            )
            table.add_row(key, shown)
        OUT.print(table)


def _describe(ds: xr.Dataset) -> dict[str, Any]:
    about: dict[str, Any] = dict(ds.attrs)
    about["sizes"] = {str(dim): int(size) for dim, size in ds.sizes.items()}
    if "mask" in ds and "run" not in ds["mask"].dims:
        about["voxels_in_mask"] = int(ds["mask"].sum())
    if "run" in ds.coords:
        about["runs"] = [str(label) for label in ds["run"].values]
    if "regressor" in ds.coords:
        about["regressors"] = [str(name) for name in ds["regressor"].values]
    about["variables"] = {str(name): [str(dim) for dim in ds[name].dims] for name in ds.data_vars}
    return about


@cli.command()
@click.argument("stores_", metavar="STORE...", nargs=-1, required=True, type=EXISTING)
def verify(stores_: tuple[str, ...]) -> None:
    """Read all of STORE and check it against its checksums.

    Example: chunkglm verify results/runs.zarr results/fit.zarr
    """
    for store in stores_:
        stores.verify(store)
        OUT.print(f"{store} is whole", soft_wrap=True)


@cli.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=EXISTING)
@_design
@click.option("--output", required=True, type=EXISTING, help="Store for the fit.")
@_column_names
@_mask
@_model
@_memory
@_where
@_overwrite
def fit(
    runs: tuple[str, ...],
    designs: tuple[str, ...],
    output: str,
    column_names: str | None,
    *,
    sample_masks: tuple[str, ...],
    signal_scaling: str,
    mask: str | None,
    noise_model: str,
    compat: str | None,
    **options: Any,
) -> None:
    """Fit the run stores RUN (or all runs of a study).

    Example: chunkglm fit study.zarr --design design1.csv --design design2.csv --output fit.zarr
    """
    names = read_column_names(column_names) if column_names else None
    frames = [read_design(path, columns=names_for(path, names)) for path in designs]
    masks = [sample_mask_of(path) for path in sample_masks] or None
    scaling = _scaling(signal_scaling)
    model: dict[str, Any] = {"noise_model": noise_model, "compat": compat, "mask": mask}

    def lazy() -> xr.Dataset:
        return fit_runs(_open_runs(runs), frames, sample_masks=masks, signal_scaling=scaling, **model)

    # To choose the order of the noise, all data is read.
    _save(lazy, output, "Fitting", reads=noise_model == "auto", **options)


@cli.command()
@click.argument("fit_store", metavar="FIT", type=EXISTING)
@_contrasts
@click.option("--output", required=True, type=EXISTING, help="Store for the contrasts.")
@_memory
@_where
@_overwrite
def contrast(fit_store: str, contrasts: tuple[str, ...], output: str, **options: Any) -> None:
    """Test contrasts of the regressors of FIT in every run.

    Example: chunkglm contrast fit.zarr --contrast "diff=face - house" --output contrasts.zarr
    """
    asked = _read_contrasts(contrasts)

    def lazy() -> xr.Dataset:
        return compute_contrast(stores.open_store(fit_store), asked)

    _save(lazy, output, "Computing contrasts", **options)


@cli.command()
@click.argument("contrast_store", metavar="CONTRASTS", type=EXISTING)
@_precision_weighted
@click.option("--output", required=True, type=EXISTING, help="Store for the fixed effects.")
@_memory
@_where
@_overwrite
def combine(contrast_store: str, output: str, *, precision_weighted: bool, **options: Any) -> None:
    """Combine the runs in CONTRASTS by fixed effects.

    Example: chunkglm combine contrasts.zarr --output fixed.zarr
    """

    def lazy() -> xr.Dataset:
        return fixed_effects(stores.open_store(contrast_store), precision_weighted=precision_weighted)

    _save(lazy, output, "Combining runs", **options)


def _save(
    lazy: Callable[[], xr.Dataset],
    output: str,
    title: str,
    *,
    memory: str,
    overwrite: bool,
    reads: bool = False,
    **where: Any,
) -> None:
    """Make a dataset, which ``reads`` data or does not, and save it."""
    where["n_threads"] = _threads_of(where["scheduler"], where["n_threads"])
    check_scheduler(where["scheduler"], where["workers"], where["performance_report"])
    cluster = computing(**where, memory=plan.parse_memory(memory), console=ERR, quiet=_State.quiet)
    with ExitStack() as stack:
        stack.enter_context(dask.config.set({budget.KEY: memory}))
        if reads:
            stack.enter_context(cluster)
        ds = lazy()
        if not overwrite and stores.is_saved(ds, output):
            OUT.print(
                f"{output} is up to date: made from the same data with the same options.", soft_wrap=True
            )
            return
        if not reads:
            # Only now: a cluster is not bothered if there is nothing to do.
            stack.enter_context(cluster)
        progress = stack.enter_context(stage(ERR, title, "blocks", quiet=_State.quiet))
        stores.save(ds, output, overwrite=overwrite, progress=progress)
    OUT.print(f"Wrote {output}", soft_wrap=True)


def _threads_of(scheduler: str, given: int | None) -> int:
    """Threads of this machine, or of a job."""
    if given is not None and scheduler not in {THREADS, SLURM}:
        raise InputError(
            "--n-threads is for threads of this machine and for jobs of slurm. Give the number of processes with --workers; "
            "the workers of a running cluster have the threads that they were started with (dask worker --nthreads)."
        )
    return given or (1 if scheduler == SLURM else plan.available_cpus())


@cli.command()
@click.argument("store", type=EXISTING)
@click.option(
    "--output", required=True, type=EXISTING, help="Folder for maps; a .nii or .nii.gz file for a run."
)
@_overwrite
def export(store: str, output: str, *, overwrite: bool) -> None:
    """Write STORE as NIfTI.

    Contrasts and fixed effects become maps with sidecars in a folder, a run the file that it was.

    Example: chunkglm export fixed.zarr --output maps
    """
    ds = stores.open_store(store)
    if "bold" in ds:
        nifti.to_nifti(ds["bold"], output, overwrite=overwrite)
        OUT.print(f"Wrote {output}", soft_wrap=True)
        return
    if "effect" not in ds:
        raise InputError(
            f"{store} holds {ds.attrs.get('kind', 'something')}, which has no maps to export. Export contrasts or "
            "fixed effects (chunkglm contrast, chunkglm combine), or a run."
        )
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise StoreExistsError(f"{folder} exists. Choose another --output, or say --overwrite.")
    folder.mkdir(parents=True, exist_ok=True)
    written = export_maps(ds, folder)
    OUT.print(f"Wrote {len(written)} files to {folder}", soft_wrap=True)


@cli.command()
@click.argument("map_", metavar="MAP", type=EXISTING)
@click.option(
    "--background",
    type=EXISTING,
    help="Image to draw it on, such as the mean image; or a run store, for its mean image.",
)
@_threshold(3.0)
@_cut_coords
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default="ortho",
    show_default=True,
    help="Cuts, axial slices, or a glass brain.",
)
@click.option("--slices", metavar="Z,Z,...", help="Millimetres of the slices of a mosaic, with commas.")
@click.option("--title", help="A line over the picture.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="File: .png, .svg or .pdf.")
@_overwrite
def plot(
    map_: str,
    output: Path,
    *,
    background: str | None,
    cut_coords: tuple[float, float, float] | None,
    slices: str | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Draw the NIfTI map MAP.

    \b
    Example: chunkglm plot results/maps/contrast-diff_stat-z_statmap.nii.gz \\
                 --background results/maps/mean_image.nii.gz --threshold 3 --output diff.png
    """  # noqa: D301  (click wants the character)
    if Path(map_).is_dir():
        raise InputError(
            f"{map_} is a folder; a picture is made of a NIfTI map. Of a store, write the maps first: chunkglm export."
        )
    if output.suffix.lower() not in PICTURE_TYPES:
        raise InputError(
            f"{output} is no picture that can be written: its name ends with {', '.join(PICTURE_TYPES)}."
        )
    if output.exists() and not overwrite:
        raise StoreExistsError(f"{output} exists. Choose another --output, or say --overwrite.")
    if slices is not None and (cut_coords is not None or options["kind"] != "mosaic"):
        raise InputError("--slices is for --kind mosaic; orthogonal cuts take --cut-coords X Y Z.")
    if cut_coords is not None and options["kind"] == "mosaic":
        raise InputError(
            "--cut-coords is for orthogonal cuts; a mosaic takes --slices Z,Z,... in millimetres."
        )
    under = (
        stores.open_run(background)["mean_image"] if background and Path(background).is_dir() else background
    )
    figure = draw(
        map_,
        under,
        cut_coords=cut_coords if slices is None else _numbers(slices),
        **options,
    )
    save_figure(figure, output)
    OUT.print(f"Wrote {output}", soft_wrap=True)


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"--slices is {text!r}; it must be numbers with commas between them: -20,0,20."
        ) from error


@cli.command()
@click.argument("results", type=click.Path(path_type=Path))
@_threshold(None)
@_cut_coords
def report(results: Path, threshold: float | None, cut_coords: tuple[float, float, float] | None) -> None:
    """Draw the report of a finished job again.

    RESULTS is the folder that chunkglm run left; what was computed stays as it is.

    Example: chunkglm report results --threshold 4
    """
    with stage(ERR, "Drawing", "pictures", quiet=_State.quiet) as progress:
        path = write_report(results, threshold=threshold, cut_coords=cut_coords, progress=progress)
    OUT.print(f"Wrote {path}", soft_wrap=True)


@cli.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=EXISTING)
@_job_options
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option(
    "--dry-run", is_flag=True, help="Compute nothing: say what is up to date, what would be made, and why."
)
@click.option(
    "--plan",
    "plan_only",
    is_flag=True,
    help="Compute nothing: say what would be in flight in each stage, and the memory and disk that it takes.",
)
def run(
    contrasts: tuple[str, ...],
    column_names: str | None,
    signal_scaling: str,
    *,
    as_json: bool,
    dry_run: bool,
    plan_only: bool,
    **options: Any,
) -> None:
    """Do the whole job for the NIfTI runs RUN.

    It leaves stores, fit, maps of every run and of the fixed effects, and a report. Start with report.html. What is there
    already from the same data and options is kept, and what was cut off goes on.

    \b
    Example: chunkglm run run1.nii.gz run2.nii.gz --design design1.csv --design design2.csv \\
                 --mask mask.nii.gz --smoothing-fwhm 5 --contrast "diff=face - house" --output results
    """  # noqa: D301  (click wants the character)
    job = _job(contrasts, column_names, signal_scaling, options)
    if dry_run:
        found = products(job, check_job(job))
        _print_rows([one._asdict() for one in found], ("product", "state", "why"), as_json=as_json)
        return
    if plan_only:
        _print_plan(job, as_json=as_json)
        return
    summary = jobs.run_job(job, ERR, quiet=_State.quiet)
    if as_json:
        _print_json({"output": job.output, **asdict(summary)})
    else:
        _show(summary, job.output)


def _print_plan(job: Job, *, as_json: bool) -> None:
    """The stages of a job with their projected memory, and the disk that it takes."""
    stages, room = plan_job(job)
    allowed = plan.parse_memory(job.memory)
    if as_json:
        _print_json(
            {
                "memory": allowed,
                "peak": max(one.peak for one in stages),
                "stages": [one._asdict() for one in stages],
                "disk": room._asdict(),
            }
        )
        return
    rows = [
        {
            "stage": one.name,
            "tasks": f"{one.tasks:,}",
            "of": one.of,
            "at a time": str(one.at_a_time),
            "projected peak": plan.format_bytes(one.peak),
        }
        for one in stages
    ]
    _print_rows(rows, tuple(rows[0]), as_json=False)
    peak = plan.format_bytes(max(one.peak for one in stages))
    OUT.print(
        f"\nMemory: {peak} at most, of {plan.format_bytes(allowed)} that are allowed, above the interpreter and its imports.",
        soft_wrap=True,
    )
    OUT.print(
        f"Disk: about {plan.format_bytes(room.needed)}, of {plan.format_bytes(room.free)} that are free at {room.place}.",
        soft_wrap=True,
    )
    OUT.print(
        "Nothing was computed; what is up to date already, chunkglm run --dry-run tells.", soft_wrap=True
    )


def _job(
    contrasts: tuple[str, ...], column_names: str | None, signal_scaling: str, options: dict[str, Any]
) -> Job:
    options = {**options, "n_threads": _threads_of(options["scheduler"], options["n_threads"])}
    return Job(
        contrasts=_read_contrasts(contrasts),
        column_names=read_column_names(column_names) if column_names else None,
        signal_scaling=_scaling(signal_scaling),
        command=("chunkglm", *_State.arguments),
        **options,
    )


def _print_rows(rows: list[dict[str, str]], headings: tuple[str, ...], *, as_json: bool) -> None:
    """A table for people, or a list for programs."""
    if as_json:
        _print_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    # The last column tells most.
    for heading in headings:
        table.add_column(heading, overflow="fold", max_width=None if heading == headings[-1] else 32)
    for row in rows:
        table.add_row(*row.values())
    OUT.print(table)


@cli.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=EXISTING)
@_job_options
@click.option(
    "--output",
    default=Path(),
    type=click.Path(path_type=Path),
    help="Folder that the results would have, for the space there.",
)
def check(
    contrasts: tuple[str, ...],
    column_names: str | None,
    signal_scaling: str,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Examine all inputs of a job in seconds, before any work.

    It takes the options of chunkglm run, and looks at headers against each other and against their sidecars, ends of files,
    designs, contrasts, a few volumes, memory and disk. All problems are told. The exit status is 1 if something is wrong.

    \b
    Example: chunkglm check run1.nii.gz run2.nii.gz --design design1.csv --design design2.csv \\
                 --mask mask.nii.gz --smoothing-fwhm 5 --contrast "diff=face - house"
    """  # noqa: D301  (click wants the character)
    found = examine(_job(contrasts, column_names, signal_scaling, options)).findings
    rows = [{"level": one.level, "subject": one.subject, "text": one.text} for one in found]
    _print_rows(rows, ("", "what", "finding"), as_json=as_json)
    if any(one.level == "error" for one in found):
        raise click.exceptions.Exit(1)


@cli.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo-results"),
    show_default=True,
    help="Folder.",
)
@click.option(
    "--data",
    type=click.Choice(["simulated", "fiac"]),
    default="simulated",
    show_default=True,
    help="fiac: the recordings of the reference example, which nilearn downloads once (about 100 MB) to the folder that "
    "NILEARN_DATA names, by default nilearn_data in the home folder.",
)
@_overwrite
def demo(output: Path, data: str, *, overwrite: bool) -> None:
    """See the whole job done on two simulated sessions.

    They need no data and no network, and their truth is known.

    Example: chunkglm demo --output demo-results
    """
    act = demonstration.run_fiac if data == "fiac" else demonstration.run_simulated
    outcome = act(output, ERR, quiet=_State.quiet, overwrite=overwrite)
    OUT.print(f"{outcome.about} The same as this command:", soft_wrap=True)
    OUT.print(f"  {outcome.command}\n", soft_wrap=True)
    _show(outcome.summary, output)
    for line in outcome.lines:
        OUT.print(f"\n{line}", soft_wrap=True)


def _show(summary: jobs.Summary, output: Path) -> None:
    """What was found, and where it is."""
    if summary.up_to_date:
        OUT.print(
            f"{output} is up to date: made from the same data with the same options.",
            soft_wrap=True,
            markup=False,
        )
    for name in dict.fromkeys(entry["contrast"] for entry in summary.peaks):
        OUT.print(_peak_table(name, [entry for entry in summary.peaks if entry["contrast"] == name]))
    places = [("maps", "maps"), ("fit", "fit.zarr"), ("runs", "runs.zarr"), ("provenance", PROVENANCE)]
    if summary.report is not None:
        places = [("report", REPORT), ("pictures", PICTURES), *places]
    OUT.print()
    for what, where in places:
        OUT.print(f"{what:>10}: {output / where}", soft_wrap=True)
    memory = "" if summary.peak_memory is None else f", peak memory {summary.peak_memory / 1e6:.0f} MB"
    OUT.print(f"{summary.seconds:.1f} s{memory}")


def _peak_table(contrast: str, entries: list[dict[str, Any]]) -> Table:
    """Where the maps of a contrast are highest and lowest."""
    table = Table(title=contrast, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("dof", "highest z", "at x, y, z mm", "lowest z", "at x, y, z mm"):
        table.add_column(heading, justify="right", overflow="fold")
    for entry in entries:
        cells = ["-"] * 5
        if entry["highest"] is not None:
            cells = [f"{entry['highest']['dof']:.4g}"]
            for end in (entry["highest"], entry["lowest"]):
                cells += ["-", "-"] if end is None else [f"{end['z']:.2f}", ", ".join(millimetres(end["mm"]))]
        table.add_row("fixed effects" if entry["run"] is None else f"run {entry['run']}", *cells)
    return table


# --------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def _warnings_in_words() -> Iterator[None]:
    """Warnings of chunkglm as sentences on standard error, each once."""
    seen = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            _say("Warning", str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", ChunkGLMWarning)
        warnings.showwarning = show
        yield


def _say(kind: str, message: str) -> None:
    """One paragraph on standard error."""
    text = " ".join(f"{kind}: {message}".split())
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else 10**6
    click.echo(textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False), err=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, with 1 on failure, with 2 on wrong usage."""
    share_freed_memory()
    _State.quiet, _State.verbose = False, False
    _State.arguments = tuple(sys.argv[1:] if arguments is None else arguments)
    try:
        with _warnings_in_words():
            status = cli.main(args=arguments, prog_name="chunkglm", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("Stopped", "nothing that was complete is lost; run the same command again to go on.")
        status = 1
    except (ChunkGLMError, OSError, MemoryError) as error:
        if _State.verbose:
            raise
        name = f"{type(error).__name__}: " if not isinstance(error, ChunkGLMError) else ""
        _say("Error", f"{name}{error}")
        status = 1
    sys.stdout.flush()
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
