"""The mask of the brain from the temporal mean of an EPI run.

The histogram of an EPI mean has a gap between background and brain. The threshold lies in the middle of the
largest step between neighbouring sorted values, among the quantiles .2 to .85; then erosion, largest component,
dilation, erosion. It is the algorithm of the reference (nilearn 0.14.1, ``compute_epi_mask``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from chunkglm.kernels.smoothing import sigma_voxels, smooth_volume

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOWER, UPPER = 0.2, 0.85
"""Quantiles between which the gap is looked for."""

OPENING = 2
"""Iterations of erosion."""


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
    # A width of one voxel, whatever the voxel size.
    image = np.asarray(np.where(np.isfinite(mean), mean, 0), dtype=np.float64)
    image = smooth_volume(image, sigma_voxels(1.0, (1.0, 1.0, 1.0)))
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
