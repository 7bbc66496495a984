"""Gaussian smoothing of volumes.

Along each axis in turn a Gaussian of standard deviation ``fwhm / (sqrt(8 ln 2) * voxel size)`` voxels is
applied, cut off at four standard deviations, with the volume reflected at its borders. Nothing is normalised by
a mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import gaussian_filter1d

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def sigma_voxels(fwhm: float, sizes: Sequence[float]) -> tuple[float, ...]:
    """Find the standard deviation of the smoothing kernel in voxels.

    Parameters
    ----------
    fwhm : float
        Full width at half maximum, in mm.
    sizes : sequence of float
        Voxel size along each axis, in mm.

    Returns
    -------
    tuple of float
    """
    return tuple(float(fwhm / (np.sqrt(8 * np.log(2)) * size)) for size in sizes)


def smooth_volume(volume: NDArray[Any], sigma_zyx: Sequence[float]) -> NDArray[Any]:
    """Smooth one volume.

    Parameters
    ----------
    volume : ndarray, shape (z, y, x)
        Any real dtype. Non-finite values count as 0, and are NaN in the result.
    sigma_zyx : sequence of float
        Standard deviation along z, y, x in voxels; 0 leaves an axis alone.

    Returns
    -------
    ndarray, shape (z, y, x)
        float64 for float64 and 64-bit integers, else float32. Between the axes values are rounded to that
        dtype, and x comes first, as in the reference (nilearn 0.14.1, ``smooth_img``).
    """
    kind, size = volume.dtype.kind, volume.dtype.itemsize
    out = volume.astype(np.float64 if size == 8 else np.float32)
    bad = ~np.isfinite(out) if kind == "f" else None
    if bad is not None and bad.any():
        out[bad] = 0
    else:
        bad = None
    for axis in (2, 1, 0):
        if sigma_zyx[axis] > 0:
            gaussian_filter1d(out, sigma_zyx[axis], axis=axis, output=out, mode="reflect", truncate=4.0)
    if bad is not None:
        out[bad] = np.nan
    return out
