"""The mask of the brain against nilearn.masking.compute_epi_mask."""

import warnings

import nibabel as nib
import numpy as np
import pytest
from nilearn.masking import compute_epi_mask

from chunkglm import convert
from chunkglm.errors import MaskError
from chunkglm.kernels.masking import epi_mask
from chunkglm.testing import simulate_run, write_simulated_run


def reference(image):
    """nilearn's mask, (z, y, x)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(compute_epi_mask(image).dataobj).T.astype(bool)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_reference_on_simulated_brains(tmp_path, seed):
    shape = [(20, 22, 18), (31, 25, 14), (16, 16, 16), (40, 30, 9), (24, 36, 20), (13, 17, 15)][seed]
    truth = write_simulated_run(tmp_path / "run.nii.gz", shape=shape, n_volumes=20, seed=seed)
    run = convert(tmp_path / "run.nii.gz", tmp_path / "run.zarr")
    expected = reference(tmp_path / "run.nii.gz")
    np.testing.assert_array_equal(run["mask"].values, expected)
    assert run.attrs["mask_source"] == "epi"
    # It is the brain: the overlap with the truth is large.
    inside = truth["mask"].values
    assert 2 * (expected & inside).sum() > 0.8 * (expected.sum() + inside.sum())


@pytest.mark.parametrize("kind", ["float32", "scaled", "nan", "two parts"])
def test_equals_the_reference_on_other_data(tmp_path, kind):
    bold = simulate_run(shape=(22, 24, 20), n_volumes=16, seed=3)["bold"].values.T
    if kind == "two parts":
        bold = np.concatenate([bold, np.full((6, *bold.shape[1:]), 20, bold.dtype), bold[:12]])
    header = nib.Nifti1Header()
    header.set_xyzt_units("mm", "sec")
    header["pixdim"][4] = 2
    if kind in {"float32", "nan"}:
        bold = bold.astype(np.float32)
        header.set_data_dtype(np.float32)
    if kind == "nan":
        bold[12:, :, :, 3] = np.nan  # one volume is enough
        bold[:, :, 0] = np.inf
    image = nib.Nifti1Image(bold, np.diag([3.0, 3, 3, 1]), header)
    if kind == "scaled":
        image.header.set_slope_inter(0.5, 12)
    nib.save(image, tmp_path / "run.nii")
    run = convert(tmp_path / "run.nii", tmp_path / "run.zarr")
    np.testing.assert_array_equal(run["mask"].values, reference(tmp_path / "run.nii"))
    if kind == "nan":
        assert run["mask"].values.T[:12].any()
        assert not run["mask"].values.T[14:].any()


def test_equals_the_reference_where_single_voxels_are_missing(tmp_path):
    # A dim brain with holes: what bleeds into a hole is above the threshold, but a hole is not brain.
    rng = np.random.default_rng(2)
    distance = np.linalg.norm(np.indices((24, 24, 24)) - 11.5, axis=0)
    mean = np.where(
        distance < 11,
        120 + 80 * (11 - distance) + rng.uniform(0, 5, distance.shape),
        rng.uniform(0, 10, distance.shape),
    )
    mean[(rng.uniform(size=mean.shape) < 0.03) & (distance < 11) & (np.indices(mean.shape)[0] > 11)] = np.nan
    expected = reference(nib.Nifti1Image(mean, np.eye(4))).T
    np.testing.assert_array_equal(epi_mask(mean), expected)
    assert expected[:12].sum() > 1.1 * expected[12:].sum() > 0


def test_mask_ignores_smoothing(tmp_path):
    write_simulated_run(tmp_path / "run.nii", shape=(20, 22, 18), n_volumes=20)
    plain = convert(tmp_path / "run.nii", tmp_path / "plain.zarr")
    smooth = convert(tmp_path / "run.nii", tmp_path / "smooth.zarr", smoothing_fwhm=9)
    np.testing.assert_array_equal(plain["mask"].values, smooth["mask"].values)
    np.testing.assert_array_equal(plain["mean_image"].values, smooth["mean_image"].values)


@pytest.mark.parametrize("run", ["run1", "run2"])
def test_equals_the_reference_on_a_real_recording(real_data, tmp_path, run):
    source = real_data / "oneback" / f"{run}.nii.gz"
    np.testing.assert_array_equal(convert(source, tmp_path / "run.zarr")["mask"].values, reference(source))


def test_one_slice_has_no_inside(real_data, tmp_path):
    # The reference erodes a single slice away as well; it says so in a warning only.
    source = real_data / "haxby" / "sub-01" / "func" / "sub-01_task-objectviewing_run-01_bold.nii.gz"
    assert not reference(source).any()
    with pytest.raises(MaskError, match="run-01_bold.nii.gz.*Give a mask"):
        convert(source, tmp_path / "run.zarr")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2652), (3, 3, 3), (2, 1, 1)])
def test_tiny_volumes_have_no_brain(shape):
    assert epi_mask(np.random.default_rng(0).normal(size=shape)).sum() == 0
    assert epi_mask(np.full(shape, np.nan)).sum() == 0


def test_keeps_its_input():
    mean = simulate_run(shape=(16, 16, 16), n_volumes=16)["bold"].values.mean(axis=0)
    mean[3, 3, 3] = np.nan
    before = mean.copy()
    epi_mask(mean)
    np.testing.assert_array_equal(mean, before)
