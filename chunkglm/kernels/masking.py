"""The mask of the brain from the temporal mean of an EPI run.

The histogram of an EPI mean has a gap between background and brain. The threshold lies in the middle of the
largest step between neighbouring sorted values, among the quantiles .2 to .85; then erosion, largest component,
dilation, erosion. It is the algorithm of the reference (nilearn 0.14.1, ``compute_epi_mask``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chunkglm.kernels.smoothing import make_scratch, make_smoother, sigma_voxels, smooth_volume

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOWER, UPPER = 0.2, 0.85
"""Quantiles between which the gap is looked for."""

OPENING = 2
"""Iterations of erosion."""


def box_of(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The smallest box that holds a mask.

    Parameters
    ----------
    mask : ndarray of bool, shape (z, y, x)
        Not empty.

    Returns
    -------
    tuple of slice
        Along z, y, x.
    """
    parts = []
    for axis in range(3):
        (inside,) = np.nonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        parts.append(slice(int(inside[0]), int(inside[-1]) + 1))
    z, y, x = parts
    return z, y, x


def epi_mask(mean: NDArray[Any]) -> NDArray[np.bool_]:
    """Find the brain in a temporal mean.

    Parameters
    ----------
    mean : ndarray, shape (z, y, x)
        Temporal mean of the unsmoothed run; non-finite values count as 0, and NaN is outside.

    Returns
    -------
    ndarray of bool, shape (z, y, x)
        All False where nothing was found.
    """
    from scipy import ndimage  # noqa: PLC0415  (where a mask is given, it is not needed)

    values = np.asarray(np.where(np.isfinite(mean), mean, 0), dtype=np.float64)
    # A width of one voxel, whatever the voxel size.
    n_z, n_y, n_x = values.shape
    smoother = make_smoother((n_z, n_y, n_x), sigma_voxels(1.0, (1.0, 1.0, 1.0)), values.dtype)
    image = np.empty_like(values)
    smooth_volume(values, smoother, make_scratch(smoother), image)
    image[np.isnan(mean)] = 0
    mask = image >= _threshold(np.sort(image, axis=None))
    mask = ndimage.binary_erosion(mask, iterations=OPENING)
    if mask.any():
        labels, _ = ndimage.label(mask)
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        mask = labels == sizes.argmax()
    mask = ndimage.binary_dilation(mask, iterations=2 * OPENING)
    eroded: NDArray[np.bool_] = ndimage.binary_erosion(mask, iterations=OPENING)
    return eroded


def _threshold(values: NDArray[np.float64]) -> float:
    lower = int(np.floor(LOWER * values.size))
    upper = min(int(np.floor(UPPER * values.size)), values.size - 1)
    if upper <= lower:
        return np.inf
    gap = lower + int(np.diff(values[lower : upper + 1]).argmax())
    return float(0.5 * (values[gap] + values[gap + 1]))
