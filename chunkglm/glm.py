"""Fitting: from runs and designs to a labelled fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr

from chunkglm import nifti
from chunkglm.blocks import as_blocks, map_voxel_blocks
from chunkglm.design import as_design
from chunkglm.errors import ChunkGLMWarning, DesignError, InputError, MaskError, NotAvailableError
from chunkglm.kernels import glm as kernel
from chunkglm.schema import FIT, FORMAT_VERSION, NUMERICAL_VERSION, RUN, SPACE, annotate, require, text_labels

if TYPE_CHECKING:
    import os
    from collections.abc import Hashable, Sequence

    from numpy.typing import NDArray

    from chunkglm.nifti import ImageLike

    Runs = xr.Dataset | Sequence[xr.Dataset] | Mapping[str, xr.Dataset] | xr.DataTree
    Design = pd.DataFrame | NDArray[Any] | str | os.PathLike[str]
    Designs = Design | Sequence[Design] | Mapping[str, Design]

NOISE_MODELS = ("ols", "ar1")
SCALINGS = ("voxel", "run", None)


def fit(
    runs: Runs,
    designs: Designs,
    *,
    noise_model: str = "ar1",
    signal_scaling: Literal["voxel", "run"] | None = "voxel",
    mask: ImageLike | xr.DataArray | None = None,
    sample_masks: None = None,
    compat: Literal["nilearn"] | None = None,
) -> xr.Dataset:
    """Fit a linear model to every voxel of every run, lazily.

    Parameters
    ----------
    runs : Dataset, sequence, mapping or DataTree
        Runs with ``bold (time, z, y, x)`` and ``mask (z, y, x)`` on one grid, as :func:`chunkglm.open_run` opens them; of
        any length, and with any dask chunks or in memory. The keys of a mapping and the names of a tree (less ``run-``)
        are the labels of the runs; otherwise they are ``1``, ``2``, ...
    designs : DataFrame, array or path, or a sequence or mapping of them
        A design matrix (volume, regressor) for each run, in the order of the runs or with their labels. Columns are matched
        by name; runs may have different ones.
    noise_model : {"ar1", "ols"}
        AR(1) noise at each voxel's own coefficient (Yule-Walker on the least squares residuals; Prais-Winsten without
        rescaling the first sample), or ordinary least squares.
    signal_scaling : {"voxel", "run", None}
        Percent change against the voxel's temporal mean, against the mean over the mask and time, or none.
    mask : path, nibabel image or DataArray, optional
        Used for every run instead of the runs' own masks.
    sample_masks : None
        Censoring of volumes is not available yet.
    compat : {None, "nilearn"}
        ``"nilearn"`` gives the numbers of nilearn 0.14.1.

    Returns
    -------
    Dataset
        ``beta (run, regressor, z, y, x)``, ``sigma2 (run, z, y, x)``, ``rho (run, lag, z, y, x)`` (not for OLS), float64 and
        lazy; ``dof (run)``, ``design (run, volume, regressor)``, ``frame_time`` and ``sample_mask (run, volume)``,
        ``n_volumes (run)``, ``mask (run, z, y, x)``. NaN outside the mask, in voxels without variance in time, and in
        columns that a run does not have.

    Raises
    ------
    InputError, DesignError, GridMismatchError, MaskError
        If something about the input cannot be right.
    NotAvailableError
        For noise models and options that are not there yet.
    """
    _check_options(noise_model, signal_scaling, sample_masks, compat)
    run_of = label_runs(runs)
    design_of = _label_designs(designs, run_of)
    regressors = list(dict.fromkeys(name for design in design_of.values() for name in design.columns))
    grid = nifti.grid_of(next(iter(run_of.values())))
    options = {"noise_model": noise_model, "signal_scaling": signal_scaling, "compat": compat}
    fits = [
        _fit_run(label, run, design_of[label], _mask_of(run, mask, grid, label), regressors, **options)
        for label, run in run_of.items()
    ]
    ds = _assemble(run_of, design_of, regressors, fits, autoregressive=noise_model != "ols")
    ds.attrs = {
        "kind": "fit",
        "format_version": FORMAT_VERSION,
        "numerical_version": NUMERICAL_VERSION,
        **{key: "none" if value is None else value for key, value in options.items()},
    }
    return annotate(ds, FIT)


def _check_options(noise_model: str, signal_scaling: str | None, sample_masks: object, compat: str | None) -> None:
    if noise_model not in NOISE_MODELS:
        order = str(noise_model).removeprefix("ar")
        if noise_model == "auto" or (order.isdecimal() and int(order) > 1):
            raise NotAvailableError(
                f"The noise model {noise_model!r} is not available in this version. Available are 'ar1' and 'ols'."
            )
        raise InputError(f"There is no noise model {noise_model!r}; accepted are 'ar1' and 'ols'.")
    if signal_scaling not in SCALINGS:
        raise InputError(f"There is no signal scaling {signal_scaling!r}; accepted are 'voxel', 'run' and None.")
    if sample_masks is not None:
        raise NotAvailableError(
            "Censoring by sample_masks is not available in this version. Add a column to the design for each volume to be "
            "censored, 1 there and 0 elsewhere: with noise_model='ols' that is the same."
        )
    if compat not in (None, "nilearn"):
        raise InputError(f"There is no compat {compat!r}; accepted are None and 'nilearn'.")


# -------------------------------------------------------------------------------------------------------------- runs


def label_runs(runs: Runs) -> dict[str, xr.Dataset]:
    """Runs by label.

    Parameters
    ----------
    runs : Dataset, sequence, mapping or DataTree

    Returns
    -------
    dict of str to Dataset

    Raises
    ------
    InputError, GridMismatchError
        If there is no run, one is not a run, or they lie on different grids.
    """
    if isinstance(runs, xr.Dataset):
        labelled = {"1": runs}
    elif isinstance(runs, xr.DataTree):
        labelled = {name.removeprefix("run-"): child.to_dataset() for name, child in runs.children.items()}
        if not labelled and runs.has_data:
            labelled = {"1": runs.to_dataset()}
    elif isinstance(runs, Mapping):
        labelled = {str(label): run for label, run in runs.items()}
    else:
        labelled = {str(number): run for number, run in enumerate(runs, start=1)}
    if not labelled:
        raise InputError("There is no run to fit. Give one Dataset, a list or mapping of them, or a study's DataTree.")
    first = next(iter(labelled))
    for label, run in labelled.items():
        if not isinstance(run, xr.Dataset):
            raise InputError(f"Run {label} is a {type(run).__name__}; a run is a Dataset, as open_run opens it.")
        require(run, RUN, ("bold",), f"Run {label}")
        nifti.check_same_grid(nifti.grid_of(run), nifti.grid_of(labelled[first]), f"Run {label}", f"run {first}")
    return labelled


def _label_designs(designs: Designs, runs: dict[str, xr.Dataset]) -> dict[str, pd.DataFrame]:
    """Designs by the labels of their runs, each checked against its run."""
    if isinstance(designs, Mapping):
        missing, unknown = set(runs) - set(designs), set(designs) - set(runs)
        if missing or unknown:
            raise DesignError(
                f"The designs are labelled {sorted(map(str, designs))} and the runs {sorted(runs)}. Every run needs a design "
                "with its label."
            )
        by_label: dict[str, Any] = {label: designs[label] for label in runs}
    else:
        single = isinstance(designs, (pd.DataFrame, np.ndarray, str)) or hasattr(designs, "__fspath__")
        several = [designs] if single else list(cast("Sequence[Any]", designs))
        if len(several) != len(runs):
            raise DesignError(
                f"There are {len(several)} designs for {len(runs)} runs. Give one design matrix for each run, in their order."
            )
        by_label = dict(zip(runs, several, strict=True))
    return {
        label: as_design(design, n_volumes=runs[label].sizes["time"], run=label) for label, design in by_label.items()
    }


def _mask_of(
    run: xr.Dataset, mask: ImageLike | xr.DataArray | None, grid: nifti.Grid, label: str
) -> xr.DataArray:
    if mask is not None:
        return xr.DataArray(nifti.read_mask(mask, grid, f"run {label}"), dims=SPACE)
    if "mask" not in run:
        raise MaskError(f"Run {label} has no mask. Give one (mask=), or add a variable 'mask' of bool with dims {SPACE}.")
    return run["mask"].astype(bool)


# --------------------------------------------------------------------------------------------------------------- fit


class _RunFit:
    """The lazy estimates of one run (regressors, sigma2, rho as rows), its degrees of freedom and its mask."""

    def __init__(self, rows: da.Array, dof: int, mask: xr.DataArray) -> None:
        self.rows = rows
        self.dof = dof
        self.mask = mask


def _fit_run(
    label: str,
    run: xr.Dataset,
    design: pd.DataFrame,
    mask: xr.DataArray,
    regressors: list[str],
    *,
    noise_model: str,
    signal_scaling: str | None,
    compat: str | None,
) -> _RunFit:
    X = design.to_numpy(dtype=np.float64)
    basis = kernel.make_basis(X)
    reference_rules = compat == "nilearn"
    _check_design(X, basis, label, reference_rules=reference_rules)
    dof = len(X) - (kernel.reference_rank(X) if reference_rules else basis.rank)
    model = kernel.Model(
        basis=basis,
        # The reference divides by the number of columns, also where they are redundant.
        dof=len(X) - X.shape[1] if reference_rules else dof,
        autoregressive=noise_model == "ar1",
        scaling=signal_scaling or "none",
        reference_rules=reference_rules,
    )
    places = np.array([regressors.index(name) for name in design.columns])
    bold = as_blocks(run["bold"])
    arguments: list[Any] = [model, places, len(regressors)]
    if signal_scaling == "run":
        means = map_voxel_blocks(kernel.mean_voxels, bold, mask, 1, model)
        arguments.append(da.nanmean(means))
    rows = map_voxel_blocks(_fit_block, bold, mask, len(regressors) + 2, *arguments)
    return _RunFit(rows, dof, mask)


def _check_design(X: NDArray[np.float64], basis: kernel.Basis, label: str, *, reference_rules: bool) -> None:
    T, P = X.shape
    if basis.rank >= T or (reference_rules and P >= T):
        raise DesignError(
            f"The design of run {label} has {P} regressors of rank {basis.rank} for {T} volumes, which leaves no degrees of "
            "freedom for the noise. Use fewer regressors, or more volumes."
        )
    if basis.rank < P:
        warnings.warn(
            f"The design of run {label} has {P} regressors of rank {basis.rank}: some are redundant. Contrasts that the data "
            "cannot tell apart will be refused.",
            ChunkGLMWarning,
            stacklevel=4,
        )
    if reference_rules and not basis.spans_constant:
        raise DesignError(
            f"The design of run {label} does not span a constant, and then nilearn's noise model depends on which voxels are "
            "fitted together. Add a column of ones, or leave compat='nilearn' out."
        )


def _fit_block(
    blocks: Any, voxels: NDArray[np.intp], model: kernel.Model, places: NDArray[np.intp], n_regressors: int, *run_mean: float
) -> NDArray[np.float64]:
    """Fit the voxels of a block, with its coefficients at their places among those of all runs; shape (P + 2, V)."""
    fitted = kernel.fit_voxels(blocks, voxels, model, *(float(mean) for mean in run_mean))
    out = np.full((n_regressors + 2, len(voxels)), np.nan)
    out[places], out[n_regressors:] = fitted[:-2], fitted[-2:]
    return out


def _assemble(
    runs: dict[str, xr.Dataset],
    designs: dict[str, pd.DataFrame],
    regressors: list[str],
    fits: list[_RunFit],
    *,
    autoregressive: bool,
) -> xr.Dataset:
    """Put labels on."""
    P = len(regressors)
    spatial = fits[0].rows.chunks[1:]
    rows = [fit.rows if fit.rows.chunks[1:] == spatial else fit.rows.rechunk({1: spatial[0], 2: spatial[1], 3: spatial[2]})
            for fit in fits]
    n_volumes = [run.sizes["time"] for run in runs.values()]
    ds = xr.Dataset(
        {
            "beta": (("run", "regressor", *SPACE), da.stack([r[:P] for r in rows])),
            "sigma2": (("run", *SPACE), da.stack([r[P] for r in rows])),
            "dof": ("run", np.array([fit.dof for fit in fits], dtype=np.float64)),
            "n_volumes": ("run", np.array(n_volumes)),
            **_stack_designs(runs, designs, regressors),
            "mask": (("run", *SPACE), da.stack([da.asarray(f.mask.transpose(*SPACE).data).rechunk(spatial) for f in fits])),
        }
    )
    if autoregressive:
        ds["rho"] = (("run", "lag", *SPACE), da.stack([r[P + 1 : P + 2] for r in rows]))
        ds = ds.assign_coords(lag=[1])
    first = next(iter(runs.values()))
    coords: dict[Hashable, Any] = {name: first.coords[name].variable for name in (*SPACE, "grid") if name in first.coords}
    coords |= {"run": text_labels(runs), "regressor": text_labels(regressors), "volume": np.arange(max(n_volumes))}
    return ds.assign_coords(coords)


def _stack_designs(
    runs: dict[str, xr.Dataset], designs: dict[str, pd.DataFrame], regressors: list[str]
) -> dict[str, Any]:
    """Designs and times of all runs, filled up with NaN to the longest run and all regressors."""
    longest = max(run.sizes["time"] for run in runs.values())
    stacked = np.full((len(runs), longest, len(regressors)), np.nan)
    times = np.full((len(runs), longest), np.nan)
    kept = np.zeros((len(runs), longest), dtype=bool)
    for number, (label, run) in enumerate(runs.items()):
        n = run.sizes["time"]
        places = [regressors.index(name) for name in designs[label].columns]
        stacked[number, :n, places] = designs[label].to_numpy(dtype=np.float64).T
        kept[number, :n] = True
        if "time" in run.coords:
            times[number, :n] = run.coords["time"].values
    return {
        "design": (("run", "volume", "regressor"), stacked),
        "frame_time": (("run", "volume"), times),
        "sample_mask": (("run", "volume"), kept),
    }


def design_of_run(fit: xr.Dataset, run: int) -> pd.DataFrame:
    """The design matrix that a run was fitted with.

    Parameters
    ----------
    fit : Dataset
    run : int
        Number of the run, from 0.

    Returns
    -------
    DataFrame
        Only the volumes and regressors that the run has.
    """
    one = fit["design"].isel(run=run, volume=slice(0, int(fit["n_volumes"][run])))
    frame = pd.DataFrame(one.values, columns=[str(name) for name in fit["regressor"].values])
    return frame.loc[:, frame.notna().any()]
