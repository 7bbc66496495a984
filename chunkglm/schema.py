"""The variables of chunkglm's datasets: names, dims, units and meaning, in one place.

Everything that chunkglm writes, opens or returns is described here, and is checked against it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkglm.errors import FormatVersionError, InputError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    import xarray as xr

FORMAT_VERSION = "1"
"""Version of the layout of stores; a reader refuses versions that it does not know."""

NUMERICAL_VERSION = "6"
"""Changes whenever the same input and options would give other numbers, or the same in other chunks."""

SPACE = ("z", "y", "x")
"""The voxel dimensions, in memory order: a block ``(time, z, y, x)`` is the byte order of a NIfTI file."""


@dataclass(frozen=True)
class Variable:
    """What one variable of a dataset is."""

    name: str
    dims: tuple[str, ...]
    units: str
    meaning: str


def _variables(*variables: Variable) -> dict[str, Variable]:
    return {variable.name: variable for variable in variables}


RUN = _variables(
    Variable("bold", ("time", *SPACE), "", "BOLD signal"),
    Variable("mask", SPACE, "", "voxels to fit"),
    Variable("mean_image", SPACE, "", "temporal mean of the unsmoothed signal"),
)
"""A run: what :func:`chunkglm.open_run` opens."""

FIT = _variables(
    Variable("beta", ("run", "regressor", *SPACE), "", "regression coefficient"),
    Variable("sigma2", ("run", *SPACE), "", "variance of the innovations (of the noise, for OLS)"),
    Variable("rho", ("run", "lag", *SPACE), "", "autoregressive coefficient that was used"),
    Variable(
        "rho_at_limit",
        ("run", *SPACE),
        "",
        "residuals more autocorrelated than noise of any coefficient within bounds leaves",
    ),
    Variable("order", ("run",), "", "order of the autoregressive noise; 0: ordinary least squares"),
    Variable("dof", ("run",), "", "residual degrees of freedom"),
    Variable(
        "design",
        ("run", "volume", "regressor"),
        "",
        "design matrix; NaN where a run has no such row or column",
    ),
    Variable(
        "column",
        ("run", "regressor"),
        "",
        "place of the regressor among the columns of the run's design; -1: none",
    ),
    Variable("frame_time", ("run", "volume"), "s", "time of each volume"),
    Variable("sample_mask", ("run", "volume"), "", "volumes that were used"),
    Variable("n_volumes", ("run",), "", "number of volumes of the run"),
    Variable("mask", ("run", *SPACE), "", "voxels that were asked for"),
)
"""A fit: what :func:`chunkglm.fit` returns."""

STATISTICS = _variables(
    Variable("effect", SPACE, "", "contrast of the regression coefficients"),
    Variable("variance", SPACE, "", "variance of the effect"),
    Variable("covariance", ("row", "row_", *SPACE), "", "covariance of the rows of the effect"),
    Variable("n_rows", (), "", "number of rows that are tested together"),
    Variable("dof", (), "", "degrees of freedom"),
    Variable("stat", SPACE, "", "t statistic; F statistic where there are rows"),
    Variable("p_value", SPACE, "", "one-sided p value, right tail"),
    Variable("z_score", SPACE, "", "standard normal score with the p value of the statistic, signed"),
    Variable("estimable", (), "", "whether the run can estimate the contrast"),
    Variable("n_runs", SPACE, "", "number of runs that were combined"),
)
"""Contrasts (with ``run`` and perhaps ``contrast`` in front) and fixed effects."""


def annotate(ds: xr.Dataset, variables: Mapping[str, Variable]) -> xr.Dataset:
    """Give the variables of ``ds`` their meaning and units as attributes.

    Parameters
    ----------
    ds : Dataset
        Changed in place.
    variables : mapping of str to Variable
        Those of them that ``ds`` has are annotated.

    Returns
    -------
    Dataset
        ``ds``.
    """
    for name, variable in variables.items():
        if name in ds:
            ds[name].attrs["long_name"] = variable.meaning
            if variable.units:
                ds[name].attrs["units"] = variable.units
    return ds


def require(ds: xr.Dataset, variables: Mapping[str, Variable], names: Iterable[str], what: str) -> None:
    """Check that ``ds`` has the variables ``names`` with the dims that ``variables`` gives them.

    Raises
    ------
    InputError
        If one is missing or has other dims; ``what`` says what the dataset was taken for.
    """
    for name in names:
        if name not in ds.variables:
            have = ", ".join(repr(str(key)) for key in ds.variables) or "nothing"
            raise InputError(
                f"{what} needs a variable {name!r} ({variables[name].meaning}) with dims "
                f"{variables[name].dims}, but the dataset has only {have}."
            )
        got: tuple[Hashable, ...] = ds[name].dims
        if set(got) != set(variables[name].dims):
            raise InputError(
                f"{what} needs {name!r} with dims {variables[name].dims}, but it has dims {got}. Rename or select "
                "dimensions (Dataset.rename, Dataset.isel) until they agree."
            )


def check_format_version(attrs: Mapping[Any, Any], name: str) -> None:
    """Refuse a store written in a format that this version does not read.

    Raises
    ------
    FormatVersionError
        Naming the store and both versions.
    """
    version = str(attrs.get("format_version", "none"))
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{name} has format version {version}, and this chunkglm reads version {FORMAT_VERSION}. Open it with "
            "the release that wrote it, or convert the source again."
        )


def text_labels(labels: Iterable[object]) -> np.ndarray[Any, Any]:
    """Make an object array of str: the variable-length strings that Zarr v3 specifies.

    Returns
    -------
    ndarray, shape (N,), dtype object
    """
    values = [str(label) for label in labels]
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out


def canonical_json(value: Any) -> bytes:
    """Write the one JSON text of ``value`` that hashes are taken of: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")
