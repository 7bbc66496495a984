"""Smoothing against nilearn.image.smooth_img."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nilearn.image import smooth_img
from oracles import convolved
from oracles import smoothed as smoothed_by_kernel

from chunkglm import convert
from chunkglm.errors import InputError
from chunkglm.kernels.smoothing import make_smoother, sigma_voxels

RNG = np.random.default_rng(5)
ISOTROPIC = np.diag([3.0, 3.0, 3.0, 1.0])
ANISOTROPIC = np.diag([-2.0, 2.5, 4.0, 1.0])
OBLIQUE = np.array([[2.9, -0.4, 0.2, -90.0], [0.5, 2.8, -0.7, -120.0], [0.1, 0.6, 3.5, -60.0], [0, 0, 0, 1]])


def write(path, data, affine, dtype, slope=1.0, intercept=0.0):
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(data.shape)
    header.set_sform(affine, 1)
    header["scl_slope"], header["scl_inter"] = slope, intercept
    header["pixdim"][4] = 2.0
    header.set_xyzt_units("mm", "sec")
    header["vox_offset"] = 352
    path.write_bytes(header.binaryblock + b"\0" * 4 + data.astype(dtype).tobytes(order="F"))
    return nib.Nifti1Image(np.ones(data.shape[:3], np.uint8), affine)


def smoothed(path, tmp_path, mask, fwhm, **options):
    run = convert(path, tmp_path / "run.zarr", mask=mask, smoothing_fwhm=fwhm, **options)
    return run, np.asarray(run["bold"]).T


@pytest.mark.parametrize(
    "affine", [ISOTROPIC, ANISOTROPIC, OBLIQUE], ids=["isotropic", "anisotropic", "oblique"]
)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32"])
def test_equals_the_reference(tmp_path, affine, dtype):
    data = RNG.integers(0, 200, (9, 8, 7, 35)).astype(dtype)
    mask = write(tmp_path / "run.nii", data, affine, dtype)
    run, got = smoothed(tmp_path / "run.nii", tmp_path, mask, 5.0)
    expected = smooth_img(tmp_path / "run.nii", 5.0).get_fdata(dtype=np.float32)
    assert run["bold"].dtype == np.float32
    # Where a sum lies next to the middle of two values of float32, its last bit in float64 decides on the rounding.
    np.testing.assert_allclose(got, expected, rtol=2.5e-7)
    assert (got != expected).mean() < 1e-3
    assert np.abs(got - data).max() > 10  # it did smooth


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [("int16", 0.37, 100.0), ("float32", 75.5, -3.0), ("float64", 1.0, 0.0), ("int64", 1.0, 0.0)],
)
def test_equals_the_reference_in_float64(tmp_path, dtype, slope, intercept):
    data = RNG.integers(0, 20000, (9, 8, 7, 5)).astype(dtype)
    mask = write(tmp_path / "run.nii", data, OBLIQUE, dtype, slope, intercept)
    _, got = smoothed(tmp_path / "run.nii", tmp_path, mask, 6.5)
    expected = smooth_img(tmp_path / "run.nii", 6.5).get_fdata()
    np.testing.assert_array_equal(got, expected.astype(np.float32))


def test_non_finite_values_count_as_zero_and_stay_nan(tmp_path):
    data = RNG.normal(100, 10, (9, 8, 7, 4)).astype(np.float32)
    data[2, 3, 4, 1] = np.nan
    data[5, 5, 5, :] = np.inf
    data[:, :, 0, 2] = -np.inf
    mask = write(tmp_path / "run.nii", data, ANISOTROPIC, "float32")
    run, got = smoothed(tmp_path / "run.nii", tmp_path, mask, 5.0)
    expected = smooth_img(tmp_path / "run.nii", 5.0).get_fdata(dtype=np.float32)
    bad = ~np.isfinite(data)
    assert np.isnan(got[bad]).all()
    np.testing.assert_array_equal(got[~bad], expected[~bad])
    # The mean image is of the unsmoothed signal.
    with np.errstate(invalid="ignore"):
        mean = data.astype(np.float64).mean(axis=-1).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(run["mean_image"]).T, mean)


def test_one_slice(tmp_path):
    data = RNG.integers(0, 2000, (12, 11, 1, 6)).astype(np.int16)
    mask = write(tmp_path / "run.nii", data, ANISOTROPIC, "int16")
    _, got = smoothed(tmp_path / "run.nii", tmp_path, mask, 8.0)
    np.testing.assert_array_equal(got, smooth_img(tmp_path / "run.nii", 8.0).get_fdata(dtype=np.float32))


def test_real_recording(real_data, tmp_path):
    source = real_data / "haxby" / "sub-01" / "func" / "sub-01_task-objectviewing_run-01_bold.nii.gz"
    mask = source.with_name("sub-01_task-objectviewing_desc-brain_mask.nii.gz")
    _, got = smoothed(source, tmp_path, mask, 5.0)
    expected = smooth_img(source, 5.0).get_fdata()
    inside = np.asarray(nib.load(mask).dataobj) != 0
    np.testing.assert_allclose(got[inside], expected[inside], rtol=3e-7)


def test_smoothing_is_written_down(tmp_path):
    data = RNG.integers(0, 2000, (5, 6, 7, 4)).astype(np.int16)
    mask = write(tmp_path / "run.nii", data, ISOTROPIC, "int16", slope=2.0)
    run, _ = smoothed(tmp_path / "run.nii", tmp_path, mask, 5)
    assert run.attrs["smoothing_fwhm"] == 5.0
    assert run.attrs["processing"] == [
        "smoothed by a Gaussian of 5 mm full width at half maximum, in the mask"
    ]
    assert not {"scale_factor", "add_offset"} & {*run["bold"].attrs, *run["bold"].encoding}
    plain = convert(tmp_path / "run.nii", tmp_path / "plain.zarr", mask=mask)
    assert plain.attrs["processing"] == []
    assert "smoothing_fwhm" not in plain.attrs


@pytest.mark.parametrize("fwhm", [0, -1.0, np.nan, np.inf])
def test_widths_that_cannot_be_right(tmp_path, fwhm):
    with pytest.raises(InputError, match="smoothing width"):
        convert(tmp_path / "run.nii", tmp_path / "run.zarr", smoothing_fwhm=fwhm)


def test_kernel_leaves_its_input_and_flat_axes_alone():
    volume = RNG.normal(size=(4, 5, 6))
    before = volume.copy()
    out = smoothed_by_kernel(volume, (0.0, 1.0, 0.0))
    np.testing.assert_array_equal(volume, before)
    # Only y is smoothed, and the mean over it stays with reflected borders.
    np.testing.assert_allclose(out.mean(axis=1), volume.mean(axis=1), rtol=0, atol=1e-12)
    assert not np.allclose(out, volume)
    np.testing.assert_array_equal(smoothed_by_kernel(volume, (0.0, 0.0, 0.0)), volume)
    assert sigma_voxels(5.0, (2.0, 4.0)) == pytest.approx(
        (5 / 2.354820045 / 2, 5 / 2.354820045 / 4), rel=1e-9
    )


SIGMAS = st.tuples(*[st.sampled_from([0.0, 0.3, 0.9, 1.7, 4.0])] * 3)


@given(st.tuples(*[st.integers(1, 40)] * 3), SIGMAS, st.sampled_from(["int16", "float32", "float64"]))
def test_kernel_equals_convolution_with_reflected_borders(shape, sigma, dtype):
    volume = np.random.default_rng(shape).normal(100, 20, shape).astype(dtype)
    got, expected = smoothed_by_kernel(volume, sigma), convolved(volume, sigma)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=2e-7 if got.dtype == np.float32 else 1e-13)


@given(st.tuples(*[st.integers(1, 40)] * 3), SIGMAS, st.data())
def test_kernel_makes_a_box_as_it_makes_the_whole(shape, sigma, data):
    volume = np.random.default_rng(shape).normal(100, 20, shape)
    starts = [data.draw(st.integers(0, n - 1)) for n in shape]
    box = tuple(
        slice(start, data.draw(st.integers(start + 1, n))) for start, n in zip(starts, shape, strict=True)
    )
    got = smoothed_by_kernel(volume, sigma, box=box)
    np.testing.assert_allclose(got, convolved(volume, sigma)[box], rtol=1e-13)
    # What lies beyond the reach of the kernel is not looked at.
    window = make_smoother(shape, sigma, volume.dtype, box=box).window
    other = np.full(shape, np.nan)
    other[window] = volume[window]
    np.testing.assert_array_equal(smoothed_by_kernel(other, sigma, box=box), got)


def test_kernel_does_not_round_scaled_values():
    volume = RNG.integers(0, 20000, (9, 8, 7)).astype(np.int16)
    got = smoothed_by_kernel(volume, (1.0, 1.2, 0.8), slope=0.37, intercept=-100.0)
    np.testing.assert_allclose(got, convolved(volume * 0.37 - 100.0, (1.0, 1.2, 0.8)), rtol=1e-13)
