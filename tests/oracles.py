"""Natural forms of what the kernels do fast."""

import numpy as np
from scipy.ndimage import gaussian_filter1d

from chunkglm.kernels.smoothing import make_scratch, make_smoother, smooth_volume
from chunkglm.kernels.sums import Sums


def joined(tiles):
    """The sums of all voxels as one."""
    return Sums(*(np.concatenate(values, axis=-1) for values in zip(*tiles, strict=True)))


def convolved(volume, sigma_zyx):
    """A volume smoothed axis by axis with scipy, rounded to float32 after each where it is not 64 bits wide."""
    out = volume.astype(np.float64 if volume.itemsize == 8 else np.float32)
    for axis in (2, 1, 0):
        if sigma_zyx[axis] > 0:
            gaussian_filter1d(out, sigma_zyx[axis], axis=axis, output=out, mode="reflect", truncate=4.0)
    return out


def smoothed(volume, sigma_zyx, **options):
    """A volume smoothed by the kernel."""
    smoother = make_smoother(volume.shape, sigma_zyx, volume.dtype, **options)
    out = np.empty(smoother.shape, dtype=np.float32 if smoother.rounded else np.float64)
    smooth_volume(volume, smoother, make_scratch(smoother), out)
    return out
