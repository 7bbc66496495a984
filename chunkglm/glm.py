"""Fitting: from runs and designs to a labelled fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

import numpy as np
import pandas as pd
import xarray as xr

from chunkglm import budget, grids, nifti
from chunkglm import plan as memory
from chunkglm.blocks import (
    RunBlocks,
    as_blocks,
    map_voxel_blocks,
    mask_blocks,
    mean,
    mean_rows,
    single_blas_thread,
    take,
)
from chunkglm.design import as_design
from chunkglm.errors import (
    ChunkGLMWarning,
    DesignError,
    GridMismatchError,
    InputError,
    MaskError,
)
from chunkglm.kernels import glm as kernel
from chunkglm.kernels.autocorrelation import lag_expectations, make_correction
from chunkglm.kernels.basis import Basis, make_basis, reference_rank
from chunkglm.kernels.sums import mean_voxels
from chunkglm.schema import (
    FIT,
    FORMAT_VERSION,
    NUMERICAL_VERSION,
    RUN,
    SPACE,
    annotate,
    require,
    text_labels,
)
from chunkglm.trees import datasets_of, for_runs, named, runs_by_fit, tree_of

if TYPE_CHECKING:
    import os
    from collections.abc import Hashable

    from numpy.typing import NDArray

    from chunkglm.blocks import Rows
    from chunkglm.nifti import ImageLike
    from chunkglm.trees import RunsByFit

    Runs = xr.Dataset | Sequence[xr.Dataset] | Mapping[str, xr.Dataset] | xr.DataTree
    Design = pd.DataFrame | NDArray[Any] | str | os.PathLike[str]
    Designs = Design | Sequence[Design] | Mapping[str, Design]
    SampleMask = NDArray[Any] | Sequence[int] | Sequence[bool] | None
    SampleMasks = NDArray[Any] | Sequence[SampleMask] | Mapping[str, SampleMask]

SCALINGS = ("voxel", "run", None)

LARGEST_AUTO_ORDER = 6
"""Orders of the noise model that ``"auto"`` chooses from end here."""

# Without numbers, so that Python shows it once and not for every voxel block.
_NO_PERCENT = (
    "There are voxels in the mask that vary in time, but whose percent signal change does not exist, because the "
    "mean it refers to (of the voxel, or of the run if signal_scaling='run') is 0 or less. They are NaN. To count "
    "them, compute (run.mask & (run.bold.mean('time') <= 0)).sum(); to fit such data as it is, use "
    "signal_scaling=None."
)


@overload
def fit(
    runs: xr.Dataset | Sequence[xr.Dataset] | Mapping[str, xr.Dataset],
    designs: Designs,
    *,
    noise_model: str = ...,
    signal_scaling: Literal["voxel", "run"] | None = ...,
    mask: ImageLike | xr.DataArray | None = ...,
    sample_masks: SampleMasks | None = ...,
    compat: Literal["nilearn"] | None = ...,
) -> xr.Dataset: ...
@overload
def fit(
    runs: xr.DataTree,
    designs: Designs,
    *,
    noise_model: str = ...,
    signal_scaling: Literal["voxel", "run"] | None = ...,
    mask: ImageLike | xr.DataArray | None = ...,
    sample_masks: SampleMasks | None = ...,
    compat: Literal["nilearn"] | None = ...,
) -> xr.Dataset | xr.DataTree: ...
def fit(
    runs: Runs,
    designs: Designs,
    *,
    noise_model: str = "ar1",
    signal_scaling: Literal["voxel", "run"] | None = "voxel",
    mask: ImageLike | xr.DataArray | None = None,
    sample_masks: SampleMasks | None = None,
    compat: Literal["nilearn"] | None = None,
) -> xr.Dataset | xr.DataTree:
    """Fit a linear model to every voxel of every run, lazily.

    Parameters
    ----------
    runs : Dataset, sequence, mapping or DataTree
        Runs with ``bold (time, z, y, x)`` and ``mask (z, y, x)`` on one grid, as :func:`chunkglm.open_run` opens
        them; of any length, and with any dask chunks or in memory. The keys of a mapping and the names of a tree
        (less ``run-``) are the labels of the runs; otherwise they are ``1``, ``2``, ... A tree with subjects or tasks
        is fitted subject by subject and task by task; sessions (``ses-``) of a subject are runs of one fit.
    designs : DataFrame, array or path, or a sequence or mapping of them
        A design matrix (volume, regressor) for each run, in the order of the runs or with their labels; for a tree, with
        their paths in it (``"sub-01/run-1"``, or mappings in mappings). Columns are matched by name; runs may have different
        ones.
    noise_model : {"ar1", "ols", "ar2", "ar3", ..., "auto"}
        Autoregressive noise of order N at each voxel's own coefficients, or ordinary least squares. The coefficients
        are those that explain the autocorrelation of the least squares residuals, given the bias that the design
        leaves in it (see :mod:`chunkglm.kernels.autocorrelation`; ``compat="nilearn"`` corrects nothing, and has
        order 1 only). Where no coefficients within bounds explain it, the nearest ones are used, and
        ``rho_at_limit`` says so. Whitening leaves the first sample as it is (not that of Prais and Winsten).
        ``"auto"`` reads the data of each run once, at once, and takes the order from 0 to 6 of the smallest
        Bayesian information criterion, averaged over voxels; within the memory of Dask's configuration ``chunkglm.memory``.
    signal_scaling : {"voxel", "run", None}
        Percent change against the voxel's temporal mean, against the mean over the mask and time, or none. Where
        that mean is 0 or less, the voxel is NaN, and the computation warns once.
    mask : path, nibabel image or DataArray, optional
        Used for every run instead of the runs' own masks.
    sample_masks : sequence or mapping of them by label; or one array for one run
        For each run the volumes to keep: bool, one a volume; or their numbers, from 0; or None for all. What is left
        out is censored as by a regressor for each such volume, whatever it holds: the noise goes on during a gap.
    compat : {None, "nilearn"}
        ``"nilearn"`` gives the numbers of nilearn 0.14.1, which joins what is on both sides of censored volumes.

    Returns
    -------
    Dataset, or DataTree of them for a tree with subjects or tasks
        ``beta (run, regressor, z, y, x)``, ``sigma2 (run, z, y, x)``, ``rho (run, lag, z, y, x)`` (not for OLS),
        float64 and lazy; ``dof (run)``, ``design (run, volume, regressor)``, ``column (run, regressor)`` (the
        place of a regressor among the columns of the run's design, -1 where it has none), ``frame_time`` and
        ``sample_mask (run, volume)``, ``n_volumes (run)``, ``order (run)`` of the noise, ``mask (run, z, y, x)``; with a
        corrected autocorrelation ``rho_at_limit (run, z, y, x)``. NaN outside the mask, in voxels without variance in
        time, and in columns that a run does not have; 0 in lags beyond the order of a run.

    Raises
    ------
    InputError, DesignError, GridMismatchError, MaskError
        If something about the input cannot be right.

    Notes
    -----
    Generalised least squares (Aitken 1935, Proceedings of the Royal Society of Edinburgh 55:42-48):
    ``b = (X'V^-1 X)^+ X'V^-1 y`` and ``sigma2 = (y - Xb)'V^-1 (y - Xb) / dof`` with V the covariance of the noise, in units of
    the variance of its innovations, over the kept volumes, and ``dof`` their number less the rank of X. How: see
    :mod:`chunkglm.kernels.glm` and :mod:`chunkglm.kernels.precision`.
    """
    options: dict[str, Any] = {
        "noise_model": noise_model,
        "signal_scaling": signal_scaling,
        "mask": mask,
        "compat": compat,
    }
    if isinstance(runs, xr.DataTree):
        groups, paths = runs_by_fit(runs), list(datasets_of(runs))
        given: Any = for_runs(designs, groups, paths, "designs")
        sample_masks = None if sample_masks is None else for_runs(sample_masks, groups, paths, "sample masks")
        if set(groups) - {""}:
            return _fit_tree(groups, given, cast("Any", sample_masks) or {}, options)
        designs = given
        runs = {label: run for label, (_, run) in groups.get("", {}).items()}
    plan = plan_fit(runs, designs, sample_masks=sample_masks, **options)
    return assemble(plan, lazy_rows(plan))


def _fit_tree(
    groups: RunsByFit,
    design_of: Mapping[str, Any],
    mask_of: Mapping[str, Any],
    options: dict[str, Any],
) -> xr.DataTree:
    """Fit the runs of each subject and task together; designs and masks have their labels behind the path of the fit."""
    fits = {}
    for place, runs in groups.items():
        names = {label: f"{place}/{label}".strip("/") for label in runs}
        lacking = [path for label, (path, _) in runs.items() if names[label] not in design_of]
        if lacking:
            raise DesignError(
                f"There is no design for {', '.join(map(repr, lacking))}. Give one for every run of the tree, with its path "
                "as the key."
            )
        run_designs = {label: design_of[name] for label, name in names.items()}
        run_masks = {label: mask_of.get(name) for label, name in names.items()}
        make = partial(fit, designs=run_designs, sample_masks=run_masks, **options)
        fits[place] = named(place, make, {label: run for label, (_, run) in runs.items()})
    return tree_of(fits)


class RunPlan(NamedTuple):
    """How one run is fitted.

    Attributes
    ----------
    label : str
    run : Dataset
        Without the volumes that the reference drops.
    drops : bool
        Whether there are such volumes.
    mask : DataArray
    model : Model
    columns : ndarray of int, shape (P,)
        Place of every regressor of the fit among those of the run; -1 where it has none.
    dof : int
        Residual degrees of freedom.
    """

    label: str
    run: xr.Dataset
    drops: bool
    mask: xr.DataArray
    model: kernel.Model
    columns: NDArray[np.intp]
    dof: int

    @property
    def order(self) -> int:
        """Order of the noise."""
        return self.model.basis.order


class FitPlan(NamedTuple):
    """How all runs are fitted, and what is known of the fit without their data."""

    regressors: list[str]
    runs: list[RunPlan]
    recordings: dict[str, xr.Dataset]
    designs: dict[str, pd.DataFrame]
    kept: dict[str, NDArray[np.bool_]]
    attrs: dict[str, Any]

    @property
    def n_lags(self) -> int:
        """The highest order of the noise of any run."""
        return max(one.order for one in self.runs)

    @property
    def n_rows(self) -> int:
        """Rows of the estimates: regressors, sigma2, rho, whether that is at its limit."""
        return len(self.regressors) + 2 + self.n_lags

    @property
    def corrected(self) -> bool:
        """Whether autocorrelations are corrected for the bias of residuals."""
        return bool(self.attrs["compat"] == "none")


def plan_fit(
    runs: Runs,
    designs: Designs,
    *,
    noise_model: str,
    signal_scaling: str | None,
    mask: ImageLike | xr.DataArray | None,
    sample_masks: SampleMasks | None,
    compat: str | None,
    regressors: Sequence[str] = (),
) -> FitPlan:
    """Check what is asked of :func:`fit`, and prepare everything but the data.

    Parameters
    ----------
    runs, designs, noise_model, signal_scaling, mask, sample_masks, compat
        See :func:`fit`. The data is read for the noise model "auto" only.
    regressors : sequence of str
        Regressors that the fit has before those of the designs, from other runs.

    Returns
    -------
    FitPlan
    """
    order = check_options(noise_model, signal_scaling, compat)
    run_of = label_runs(runs)
    kept_of = _label_sample_masks(sample_masks, {label: run.sizes["time"] for label, run in run_of.items()})
    design_of = _label_designs(designs, run_of)
    names = [name for design in design_of.values() for name in design.columns]
    regressors = list(dict.fromkeys([*regressors, *names]))
    given_mask = None if mask is None else _given_mask(mask, next(iter(run_of.values())))
    plans = []
    for label, run in run_of.items():
        design, kept = design_of[label], kept_of[label]
        X = design.to_numpy(dtype=np.float64)
        drops = compat == "nilearn" and not kept.all()
        if drops:
            # The reference drops censored volumes, and filters across the gaps.
            run, X, kept = run.isel(time=np.flatnonzero(kept)), X[kept], kept[kept]  # noqa: PLW2901
        run_mask = _own_mask(run, label) if given_mask is None else given_mask
        chosen = order
        if chosen is None:
            highest = _highest_order(kept, X.shape[1])
            largest, _ = _model_of(label, X, kept, highest, scaling=signal_scaling, compat=None)
            chosen = _best_order(run, run_mask, largest)
        model, dof = _model_of(label, X, kept, chosen, scaling=signal_scaling, compat=compat)
        plans.append(RunPlan(label, run, drops, run_mask, model, _columns(design, regressors), dof))
    attrs: dict[str, Any] = {
        "kind": "fit",
        "format_version": FORMAT_VERSION,
        "numerical_version": NUMERICAL_VERSION,
        "noise_model": noise_model,
        "signal_scaling": signal_scaling or "none",
        "compat": compat or "none",
    }
    if order is None:
        attrs["noise_model_chosen"] = [noise_name(one.order) for one in plans]
    return FitPlan(regressors, plans, run_of, design_of, kept_of, attrs)


def noise_name(order: int) -> str:
    """Name the noise model of an order."""
    return f"ar{order}" if order else "ols"


def check_options(noise_model: str, signal_scaling: str | None, compat: str | None) -> int | None:
    """Refuse options of :func:`fit` that do not exist.

    Returns
    -------
    int or None
        Order of the noise model; None if it is to be chosen.

    Raises
    ------
    InputError
    """
    order = None
    if noise_model != "auto":
        number = str(noise_model).removeprefix("ar")
        if noise_model != "ols" and not (
            noise_model == f"ar{number}" and number.isdecimal() and noise_name(int(number)) == noise_model
        ):
            raise InputError(
                f"There is no noise model {noise_model!r}; accepted are 'ols', 'ar1', 'ar2' and so on, and 'auto'."
            )
        order = 0 if noise_model == "ols" else int(number)
    if signal_scaling not in SCALINGS:
        raise InputError(
            f"There is no signal scaling {signal_scaling!r}; accepted are 'voxel', 'run' and None."
        )
    if compat not in (None, "nilearn"):
        raise InputError(f"There is no compat {compat!r}; accepted are None and 'nilearn'.")
    if compat == "nilearn" and order not in (0, 1):
        raise InputError(
            f"The noise model {noise_model!r} is not there with compat='nilearn': nilearn's own depends on which voxels are "
            "fitted together, and on chance. Use 'ar1' or 'ols', or leave compat out."
        )
    return order


# -------------------------------------------------------------------------------------------------------- runs


def label_runs(runs: Runs) -> dict[str, xr.Dataset]:
    """Give every run its label, and check that they are runs on one grid.

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
    labelled: dict[str, xr.Dataset]
    if isinstance(runs, xr.Dataset):
        labelled = {"1": runs}
    elif isinstance(runs, xr.DataTree):
        groups = runs_by_fit(runs)
        if set(groups) - {""}:
            raise InputError(
                f"The tree holds runs of {', '.join(map(repr, groups))}. Choose one, such as tree[{next(iter(groups))!r}]."
            )
        labelled = {label: run for label, (_, run) in groups.get("", {}).items()}
    elif isinstance(runs, Mapping):
        labelled = {str(label): run for label, run in cast("Mapping[str, xr.Dataset]", runs).items()}
    elif isinstance(runs, Sequence):
        labelled = {str(number): run for number, run in enumerate(runs, start=1)}
    else:
        raise InputError(
            f"The runs are of type {type(runs).__name__}; accepted are a Dataset as open_run opens it, a list or "
            "mapping of them, or a study's DataTree."
        )
    if not labelled:
        raise InputError(
            "There is no run to fit. Give one Dataset, a list or mapping of them, or a study's DataTree."
        )
    first = next(iter(labelled))
    for label, run in labelled.items():
        if not isinstance(run, xr.Dataset):
            raise InputError(
                f"Run {label} is a {type(run).__name__}; a run is a Dataset, as open_run opens it."
            )
        require(run, RUN, ("bold",), f"Run {label}")
        if run["bold"].dtype.kind not in "biuf":
            raise InputError(
                f"Run {label} has a bold of dtype {run['bold'].dtype}; accepted are real numbers."
            )
        check_same_voxels(run, labelled[first], f"Run {label}", f"run {first}")
    return labelled


def check_same_voxels(
    got: xr.Dataset | xr.DataArray, expected: xr.Dataset, got_name: str, expected_name: str
) -> None:
    """Compare voxel grids; of data that carries none, the number of voxels.

    Parameters
    ----------
    got, expected : Dataset or DataArray
    got_name, expected_name : str
        What they are, for messages.

    Raises
    ------
    GridMismatchError
    """
    if "grid" in got.coords and "grid" in expected.coords:
        grids.check_same_grid(grids.grid_of(got), grids.grid_of(expected), got_name, expected_name)
    shapes = [tuple(obj.sizes[dim] for dim in SPACE) for obj in (got, expected)]
    if shapes[0] != shapes[1]:
        raise GridMismatchError(
            f"{got_name} has {shapes[0]} voxels along z, y, x and {expected_name} has {shapes[1]}. They must lie on "
            "the same grid: resample one to the other first."
        )


def _label_designs(designs: Designs, runs: dict[str, xr.Dataset]) -> dict[str, pd.DataFrame]:
    """Designs by the labels of their runs, each checked against its run."""
    by_label: dict[str, Any]
    if isinstance(designs, Mapping):
        by_label = {str(label): design for label, design in designs.items()}
        if set(by_label) != set(runs):
            raise DesignError(
                f"The designs are labelled {sorted(by_label)} and the runs {sorted(runs)}. Every run needs a design "
                "with its label."
            )
    else:
        several = (
            list(designs) if isinstance(designs, Sequence) and not isinstance(designs, str) else [designs]
        )
        if len(several) != len(runs):
            raise DesignError(
                f"There are {len(several)} designs for {len(runs)} runs. Give one design matrix for each run, in "
                "their order."
            )
        by_label = dict(zip(runs, several, strict=True))
    return {
        label: as_design(by_label[label], n_volumes=run.sizes["time"], run=label)
        for label, run in runs.items()
    }


def _label_sample_masks(
    sample_masks: SampleMasks | None, n_volumes: Mapping[str, int]
) -> dict[str, NDArray[np.bool_]]:
    """Kept volumes by the labels of their runs, as bool."""
    masks: list[Any]
    if sample_masks is None:
        masks = [None] * len(n_volumes)
    elif isinstance(sample_masks, Mapping):
        strangers = {str(label) for label in sample_masks} - set(n_volumes)
        if strangers:
            raise InputError(
                f"There are sample masks for {sorted(strangers)}, and the runs are {sorted(n_volumes)}. Label them as the runs."
            )
        by_label = {str(label): mask for label, mask in sample_masks.items()}
        masks = [by_label.get(label) for label in n_volumes]
    else:
        single = (
            isinstance(sample_masks, np.ndarray) and sample_masks.dtype != object and sample_masks.ndim == 1
        )
        masks = [sample_masks] if single else list(sample_masks)
        if len(masks) != len(n_volumes):
            raise InputError(
                f"There are {len(masks)} sample masks for {len(n_volumes)} runs. Give one for each run, in their order, None "
                "for a run that keeps all its volumes."
            )
    return {
        label: kept_volumes(mask, n, f"Run {label}")
        for (label, n), mask in zip(n_volumes.items(), masks, strict=True)
    }


def kept_volumes(mask: SampleMask, n_volumes: int, what: str) -> NDArray[np.bool_]:
    """Make one sample mask bool.

    Parameters
    ----------
    mask : array or sequence of bool or int, or None
        One bool a volume, or the numbers of the volumes to keep, or None for all.
    n_volumes : int
    what : str
        Whose mask it is, for messages.

    Returns
    -------
    ndarray of bool, shape (n_volumes,)

    Raises
    ------
    InputError
        If it is neither, or keeps nothing.
    """
    if mask is None:
        return np.ones(n_volumes, dtype=bool)
    values = np.asarray(mask)
    accepted = "Accepted are one bool a volume, or the numbers of the volumes to keep, each once, from 0."
    if values.ndim != 1 or values.dtype.kind not in "biu":
        raise InputError(
            f"{what} has a sample mask of shape {values.shape} and dtype {values.dtype}. {accepted}"
        )
    if values.dtype == bool:
        if len(values) != n_volumes:
            raise InputError(
                f"{what} has a sample mask of {len(values)} values for {n_volumes} volumes. {accepted}"
            )
        kept = values.copy()
    else:
        wrong = values[(values < 0) | (values >= n_volumes)]
        if wrong.size or len(np.unique(values)) < len(values):
            found = (
                f"keeps volume {wrong[0]}, and there are {n_volumes}"
                if wrong.size
                else "names a volume twice"
            )
            raise InputError(f"{what} has a sample mask that {found}. {accepted}")
        kept = np.zeros(n_volumes, dtype=bool)
        kept[values.astype(np.intp)] = True
    if not kept.any():
        raise InputError(
            f"{what} has a sample mask that keeps no volume. {accepted} To leave a run out, do not give it."
        )
    return kept


def _given_mask(mask: ImageLike | xr.DataArray, run: xr.Dataset) -> xr.DataArray:
    """The one mask of all runs. A bool DataArray stays as lazy as it is; anything else is read and checked."""
    if isinstance(mask, xr.DataArray) and mask.dtype == bool:
        if set(mask.dims) != set(SPACE):
            raise MaskError(f"The mask has the dims {mask.dims}; accepted is one volume with {SPACE}.")
        check_same_voxels(mask, run, "The mask", "the first run")
        return xr.DataArray(mask.transpose(*SPACE).variable)
    return xr.DataArray(nifti.read_mask(mask, grids.grid_of(run), "the first run"), dims=SPACE)


def _own_mask(run: xr.Dataset, label: str) -> xr.DataArray:
    if "mask" not in run:
        raise MaskError(
            f"Run {label} has no mask. Give one (mask=), or add a variable 'mask' of bool with dims {SPACE}."
        )
    require(run, RUN, ("mask",), f"Run {label}")
    return xr.DataArray(run["mask"].astype(bool, copy=False).variable)


# --------------------------------------------------------------------------------------------------------- fit


def _model_of(
    label: str,
    X: NDArray[np.float64],
    kept: NDArray[np.bool_],
    order: int,
    *,
    scaling: str | None,
    compat: str | None,
) -> tuple[kernel.Model, int]:
    """Everything that a run is fitted with, and its residual degrees of freedom."""
    used = X[kept]
    with single_blas_thread():
        basis = make_basis(X, kept, order=order)
        by_reference = reference_rank(used)
        reference_rules = compat == "nilearn"
        _check_design(used, basis, label, reference_rules=reference_rules)
        correction = None
        if order and not reference_rules:
            correction = make_correction(basis) if order == 1 else lag_expectations(basis)
    model = kernel.Model(
        basis=basis,
        # The reference divides by the number of columns, also where they are redundant.
        dof=len(used) - (X.shape[1] if reference_rules else basis.rank),
        scaling=scaling or "none",
        reference_rules=reference_rules,
        correction=correction,
    )
    return model, len(used) - (by_reference if reference_rules else basis.rank)


def _highest_order(kept: NDArray[np.bool_], n_regressors: int) -> int:
    """The largest order that ``"auto"`` looks at: one that degrees of freedom and pairs of kept volumes allow."""
    allowed = int(np.clip(kept.sum() - n_regressors - 1, 0, LARGEST_AUTO_ORDER))
    lags = range(1, allowed + 1)
    return next((lag - 1 for lag in lags if not (kept[lag:] & kept[:-lag]).any()), allowed)


def _check_design(X: NDArray[np.float64], basis: Basis, label: str, *, reference_rules: bool) -> None:
    T, P = X.shape
    if basis.rank >= T or (reference_rules and P >= T):
        raise DesignError(
            f"The design of run {label} has {P} regressors of rank {basis.rank} for {T} volumes that are kept, which leaves "
            "no degrees of freedom for the noise. Use fewer regressors, or more volumes."
        )
    if basis.order >= T - basis.rank:
        raise DesignError(
            f"Noise of order {basis.order} cannot be estimated in run {label}, whose design leaves {T - basis.rank} degrees of "
            "freedom. Use a smaller order, fewer regressors, or more volumes."
        )
    pairs = basis.totals[len(basis.totals) - basis.order :]
    if not pairs.all():
        lag = int(np.flatnonzero(pairs == 0)[0]) + 1
        raise DesignError(
            f"In run {label} no two volumes that are kept are {lag} apart, so that noise of order {basis.order} cannot be "
            "estimated. Keep more volumes, or use a smaller order or noise_model='ols'."
        )
    if basis.rank == 0:
        raise DesignError(
            f"The design of run {label} is zero in all columns, so that there is nothing to fit."
        )
    if basis.rank < P:
        warnings.warn(
            f"The design of run {label} has {P} regressors of rank {basis.rank}: some are redundant. Contrasts that "
            "the data cannot tell apart will be refused.",
            ChunkGLMWarning,
            stacklevel=5,
        )
    if reference_rules and not basis.spans_constant:
        raise DesignError(
            f"The design of run {label} does not span a constant, and then nilearn's noise model depends on which "
            "voxels are fitted together. Add a column of ones, or leave compat='nilearn' out."
        )


def _columns(design: pd.DataFrame, regressors: list[str]) -> NDArray[np.intp]:
    """Place of each regressor among the columns of a design; -1 where it has none."""
    place = {name: number for number, name in enumerate(design.columns)}
    return np.array([place.get(name, -1) for name in regressors])


def lazy_rows(plan: FitPlan) -> Rows:
    """Estimates of all runs, lazily, with the dims run, z, y, x."""
    runs = []
    for one in plan.runs:
        bold = as_blocks(one.run["bold"])
        computed = _run_mean(bold, one.mask, one.model)
        runs.append(
            RunBlocks(
                bold, one.mask, (one.model, one.columns, plan.n_lags), computed, _task_bytes(bold, one.model)
            )
        )
    return map_voxel_blocks(_fit_block, runs, plan.n_rows)


def _task_bytes(bold: xr.DataArray, model: kernel.Model) -> int:
    """Projected memory of a task that fits a block of a run."""
    chunks = memory.Chunks(*(max(sizes) for sizes in bold.data.chunks))
    basis = model.basis
    censored = int((~basis.kept).sum())
    return memory.fit_memory_per_thread(
        chunks, bold.dtype.itemsize, len(basis.to_beta), order=basis.order, n_censored=censored
    )


def _run_mean(bold: xr.DataArray, mask: xr.DataArray, model: kernel.Model) -> list[Any]:
    """The mean over mask and time, lazily, if the model needs it."""
    if model.scaling != "run":
        return []
    arguments = (model.basis.kept, model.reference_rules)
    return [mean(map_voxel_blocks(_average_block, [RunBlocks(bold, mask, arguments)], 1))]


def _average_block(
    blocks: Any, voxels: NDArray[np.intp], kept: NDArray[np.bool_], reference_rules: bool
) -> NDArray[np.float64]:
    """Average the voxels of a block over time, shape (1, V)."""
    return mean_voxels(blocks, voxels, kept, finite=reference_rules)


def _best_order(run: xr.Dataset, mask: xr.DataArray, model: kernel.Model) -> int:
    """The order of the smallest information criterion, averaged over the voxels of a run; reads its data."""
    bold = as_blocks(run["bold"])
    G = lag_expectations(model.basis)
    computed = _run_mean(bold, mask, model)
    rows = map_voxel_blocks(_criteria_block, [RunBlocks(bold, mask, (model, G), computed)], len(G))
    needs = _task_bytes(bold, model)
    with budget.tasks_within(None, lambda n: memory.OVERHEAD + n * needs, "Choosing the order of the noise"):
        criteria = mean_rows(rows)
    return int(np.argmin(criteria)) if np.isfinite(criteria).all() else 0


def _criteria_block(
    blocks: Any,
    voxels: NDArray[np.intp],
    model: kernel.Model,
    G: NDArray[np.float64],
    run_mean: float = np.nan,
) -> NDArray[np.float64]:
    """Information criteria of the voxels of a block, shape (N + 1, V)."""
    return kernel.information_criteria(blocks, voxels, model, G, float(run_mean))


def _fit_block(  # noqa: PLR0917  (a task's arguments)
    blocks: Any,
    voxels: NDArray[np.intp],
    model: kernel.Model,
    columns: NDArray[np.intp],
    n_lags: int,
    run_mean: float = np.nan,
) -> NDArray[np.float64]:
    """Fit the voxels of a block; shape (P + 2 + n_lags, V), with NaN for the regressors that have no column."""
    return rows_of(kernel.fit_voxels(blocks, voxels, model, float(run_mean)), columns, n_lags)


def rows_of(estimates: kernel.Estimates, columns: NDArray[np.intp], n_lags: int) -> NDArray[np.float64]:
    """Put the estimates of V voxels into rows: regressors, sigma2, rho, whether that is at its limit.

    Returns
    -------
    ndarray, shape (P + 2 + n_lags, V)
        Lags beyond the order of the run are 0 where the run has a voxel, and NaN elsewhere.
    """
    if estimates.n_unscaled:
        warnings.warn(_NO_PERCENT, ChunkGLMWarning, stacklevel=1)
    P, (N, V) = len(columns), estimates.rho.shape
    out = np.full((P + 2 + n_lags, V), np.nan)
    for regressor, column in enumerate(columns):
        if column >= 0:
            out[regressor] = estimates.beta[column]
    out[P], out[P + 1 : P + 1 + N], out[-1] = estimates.sigma2, estimates.rho, estimates.at_limit
    out[P + 1 + N : -1] = estimates.sigma2 * 0
    return out


def estimates_of(rows: Rows, plan: FitPlan) -> dict[str, xr.Variable]:
    """Take the rows of runs apart, into the variables of the fit."""
    P, n_lags = len(plan.regressors), plan.n_lags

    def of(name: str, which: int | slice, **options: Any) -> xr.Variable:
        return take(rows, FIT_DIMS[name], which, name=name, **options)

    found = {"beta": of("beta", slice(0, P), sizes={"regressor": P}), "sigma2": of("sigma2", P)}
    if n_lags:
        found["rho"] = of("rho", slice(P + 1, P + 1 + n_lags), sizes={"lag": n_lags})
        if plan.corrected:
            found["rho_at_limit"] = of("rho_at_limit", P + 1 + n_lags, dtype=bool)
    return found


FIT_DIMS = {
    "beta": ("run", "regressor", *SPACE),
    "sigma2": ("run", *SPACE),
    "rho": ("run", "lag", *SPACE),
    "rho_at_limit": ("run", *SPACE),
}
"""Dims of what is estimated at every voxel."""


def assemble(plan: FitPlan, rows: Rows) -> xr.Dataset:
    """Put labels on the rows of all runs.

    Parameters
    ----------
    plan : FitPlan
    rows : Rows
        As :func:`lazy_rows` makes them.

    Returns
    -------
    Dataset
        The fit.
    """
    spatial = rows.data.chunks[1:]
    n_volumes = [run.sizes["time"] for run in plan.recordings.values()]
    ds = xr.Dataset(
        {
            **estimates_of(rows, plan),
            "dof": ("run", np.array([one.dof for one in plan.runs], dtype=np.float64)),
            "order": ("run", np.array([one.order for one in plan.runs])),
            "n_volumes": ("run", np.array(n_volumes)),
            "column": (("run", "regressor"), np.stack([one.columns for one in plan.runs])),
            **_stack_designs(plan.recordings, plan.designs, plan.kept, plan.regressors),
            "mask": mask_blocks([one.mask for one in plan.runs], spatial),
        }
    )
    if plan.n_lags:
        ds = ds.assign_coords(lag=np.arange(1, plan.n_lags + 1))
    first = next(iter(plan.recordings.values()))
    coords: dict[Hashable, Any] = {
        name: first.coords[name].variable for name in (*SPACE, "grid") if name in first.coords
    }
    coords |= {
        "run": text_labels(plan.recordings),
        "regressor": text_labels(plan.regressors),
        "volume": np.arange(max(n_volumes)),
    }
    ds = ds.assign_coords(coords)
    ds.attrs = plan.attrs
    return annotate(ds, FIT)


def _stack_designs(
    runs: dict[str, xr.Dataset],
    designs: dict[str, pd.DataFrame],
    kept_of: dict[str, NDArray[np.bool_]],
    regressors: list[str],
) -> dict[str, Any]:
    """Designs, times and kept volumes of all runs, filled up with NaN to the longest run and all regressors."""
    longest = max(run.sizes["time"] for run in runs.values())
    stacked = np.full((len(runs), longest, len(regressors)), np.nan)
    times = np.full((len(runs), longest), np.nan)
    kept = np.zeros((len(runs), longest), dtype=bool)
    for number, (label, run) in enumerate(runs.items()):
        n = run.sizes["time"]
        places = [regressors.index(name) for name in designs[label].columns]
        stacked[number, :n, places] = designs[label].to_numpy(dtype=np.float64).T
        kept[number, :n] = kept_of[label]
        if "time" in run.coords and run.coords["time"].dtype.kind in "iuf":
            times[number, :n] = run.coords["time"].to_numpy()
    return {
        "design": (("run", "volume", "regressor"), stacked),
        "frame_time": (("run", "volume"), times),
        "sample_mask": (("run", "volume"), kept),
    }


def with_runs(fit: xr.Dataset) -> xr.Dataset:
    """Give a fit of one run that was selected its dim ``run`` back."""
    return fit if "run" in fit.dims else fit.expand_dims("run")


def designs_of(fit: xr.Dataset) -> list[pd.DataFrame]:
    """Take the design matrices of a fit apart.

    Parameters
    ----------
    fit : Dataset
        With the dim ``run``.

    Returns
    -------
    list of DataFrame
        The design that each run was fitted with: its own volumes and columns, these in their own order.
    """
    regressors = [str(name) for name in fit["regressor"].to_numpy()]
    names = [name for name in ("design", "column", "n_volumes") if name in fit]
    designs = []
    for number in range(fit.sizes["run"]):
        one = fit[names].isel(run=number)
        values = one["design"].transpose("volume", "regressor").to_numpy()[: int(one["n_volumes"])]
        present = np.flatnonzero(np.isfinite(values).any(axis=0))
        if "column" in one:
            present = present[np.argsort(one["column"].to_numpy()[present], kind="stable")]
        designs.append(pd.DataFrame(values[:, present], columns=[regressors[place] for place in present]))
    return designs


def kept_of(fit: xr.Dataset) -> list[NDArray[np.bool_]]:
    """Take the sample masks of a fit apart.

    Parameters
    ----------
    fit : Dataset
        With the dim ``run``.

    Returns
    -------
    list of ndarray of bool
        The kept volumes of each run; all of its volumes if ``fit`` has no sample mask.
    """
    lengths = [int(n) for n in fit["n_volumes"].to_numpy()]
    if "sample_mask" not in fit:
        return [np.ones(n, dtype=bool) for n in lengths]
    masks = fit["sample_mask"].transpose("run", "volume").to_numpy().astype(bool)
    return [mask[:n] for mask, n in zip(masks, lengths, strict=True)]
