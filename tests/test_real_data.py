"""Real recordings, end to end; the reference on the same files."""

import json
import warnings

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nilearn.glm import compute_fixed_effects
from nilearn.glm.first_level import FirstLevelModel, make_first_level_design_matrix

import chunkglm as cg

pytestmark = pytest.mark.real_data

MAPS = {
    "effect": "effect_size",
    "variance": "effect_variance",
    "stat": "stat",
    "p_value": "p_value",
    "z_score": "z_score",
}
FIXED = ("effect", "variance", "stat", "z_score")


def in_mask(array, mask_image):
    """Values in the mask, (..., voxel), in the order of the image."""
    return array.transpose(..., "x", "y", "z").values[..., mask_image.get_fdata() > 0]


def by_nilearn(paths, mask_image, designs, definition, dofs, **options):
    """The reference's maps of each run, (run, voxel), and its fixed effects, (voxel)."""
    mask = mask_image.get_fdata() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = [
            FirstLevelModel(mask_img=mask_image, **options)
            .fit(str(path), design_matrices=design)
            .compute_contrast(definition, output_type="all")
            for path, design in zip(paths, designs, strict=True)
        ]
        fixed = compute_fixed_effects(
            [run["effect_size"] for run in runs],
            [run["effect_variance"] for run in runs],
            mask_image,
            dofs=dofs,
        )
    per_run = {name: np.stack([run[key].get_fdata()[mask] for run in runs]) for name, key in MAPS.items()}
    return per_run, {name: image.get_fdata()[mask] for name, image in zip(FIXED, fixed, strict=True)}


@pytest.fixture(scope="module")
def oneback(real_data):
    folder = real_data / "oneback"
    columns = (folder / "design_columns.txt").read_text().split()
    paths = [folder / f"run{number}.nii.gz" for number in (1, 2)]
    designs = [
        pd.DataFrame(np.load(folder / f"run{number}_design.npz")["X"], columns=columns) for number in (1, 2)
    ]
    return paths, nib.load(folder / "mask.nii.gz"), designs


@pytest.mark.parametrize("fwhm", [None, 5.0])
def test_oneback__compat_equals_nilearn(oneback, tmp_path, fwhm):
    paths, mask_image, designs = oneback
    runs = [
        cg.convert(path, tmp_path / "study.zarr" / f"run-{number}", mask=mask_image, smoothing_fwhm=fwhm)
        for number, path in enumerate(paths, start=1)
    ]
    result = cg.contrast(cg.fit(runs, designs, compat="nilearn"), "face - house").compute()
    fixed = cg.fixed_effects(result)
    assert list(result["dof"]) == [68, 68]
    expected, expected_fixed = by_nilearn(
        paths, mask_image, designs, "face - house", [68, 68], smoothing_fwhm=fwhm
    )
    got = {name: in_mask(result[name], mask_image) for name in MAPS}
    got_fixed = {name: in_mask(fixed[name], mask_image) for name in FIXED}
    alive = np.isfinite(got["stat"])
    assert alive.all()
    relative = np.abs(got["variance"] / expected["variance"] - 1)
    error = np.abs(got["effect"] - expected["effect"]) / np.sqrt(expected["variance"])
    if fwhm is None:
        assert error.max() < 1e-10
        assert relative.max() < 1e-10
        for name in ("stat", "z_score"):
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got["p_value"], expected["p_value"], rtol=1e-7)
        for name in FIXED:
            np.testing.assert_allclose(got_fixed[name], expected_fixed[name], rtol=1e-9, atol=1e-9)
        return
    # Smoothing makes the reference work in float32: a coefficient on the edge of a bin may fall into the next one.
    same_bin = relative < 1e-5
    assert (~same_bin).mean() <= 1e-3
    assert error[same_bin].max() < 5e-5
    assert error.max() < 0.05
    both = same_bin.all(axis=0)
    np.testing.assert_allclose(got_fixed["variance"][both], expected_fixed["variance"][both], rtol=1e-5)
    np.testing.assert_allclose(got_fixed["z_score"][both], expected_fixed["z_score"][both], atol=3e-4)


def test_oneback__default_finds_the_same_places(oneback, tmp_path):
    paths, mask_image, designs = oneback
    runs = [cg.convert(path, tmp_path / f"run-{n}", mask=mask_image) for n, path in enumerate(paths)]

    def peaks(**options):
        result = cg.contrast(cg.fit(runs, designs, **options), "face - house").compute()
        fixed = cg.fixed_effects(result)["stat"]
        per_run = np.abs(in_mask(result["stat"], mask_image)).max(axis=1)
        return in_mask(fixed, mask_image), per_run, fixed

    t, corrected, fixed = peaks()
    reference, per_run, _ = peaks(compat="nilearn")
    assert np.corrcoef(t, reference)[0, 1] > 0.99
    # The reference's peaks: 7.84 and 8.57 in the runs and 9.36 over both; without autocorrelation 9.28, 9.94, 11.45.
    np.testing.assert_allclose([*per_run, reference.max()], [7.84, 8.57, 9.36], rtol=1e-3)
    # With 78 volumes the bias of the autocorrelation is large: statistics are smaller when it is corrected.
    assert (corrected < per_run).all()
    assert np.argmax(t) in np.argsort(reference)[-5:]
    t_ols, per_run, _ = peaks(noise_model="ols")
    np.testing.assert_allclose([*per_run, t_ols.max()], [9.28, 9.94, 11.45], rtol=1e-3)
    image = cg.to_nifti(fixed)
    np.testing.assert_array_equal(image.affine, nib.load(paths[0]).affine)
    np.testing.assert_array_equal(image.get_fdata()[mask_image.get_fdata() > 0], t)


def events_of(path):
    return pd.read_csv(path, sep="\t")


def design_of(events, n_volumes, t_r, high_pass=0.01):
    frames = np.arange(n_volumes) * t_r
    options = {"hrf_model": "glover", "drift_model": "cosine", "high_pass": high_pass}
    return make_first_level_design_matrix(frames, events, **options)


def test_haxby__twelve_runs(real_data, tmp_path):
    folder = real_data / "haxby" / "sub-01" / "func"
    mask_image = nib.load(folder / "sub-01_task-objectviewing_desc-brain_mask.nii.gz")
    paths = sorted(folder.glob("*_bold.nii.gz"))
    assert len(paths) == 12
    designs, runs = [], {}
    for number, path in enumerate(paths, start=1):
        stem = path.name.removesuffix("_bold.nii.gz")
        t_r = json.loads((folder / f"{stem}_bold.json").read_text())["RepetitionTime"]
        assert t_r == 2.5
        designs.append(design_of(events_of(folder / f"{stem}_events.tsv"), nib.load(path).shape[3], t_r))
        runs[f"{number:02d}"] = cg.convert(path, tmp_path / f"run-{number:02d}", mask=mask_image, t_r=t_r)
    orders = {tuple(design.columns) for design in designs}
    assert len(orders) == 1  # nilearn sorts conditions; the events come in another order in each run
    # The reference's peaks: 8.89 with AR(1), 12.34 without autocorrelation.
    maps = {}
    for compat, noise_model, peak in (("nilearn", "ar1", 8.89), (None, "ols", 12.34), (None, "ar1", None)):
        fit = cg.fit(runs, dict(zip(runs, designs, strict=True)), noise_model=noise_model, compat=compat)
        fixed = cg.fixed_effects(cg.contrast(fit, "face - house")).compute()
        inside = in_mask(fixed["stat"], mask_image)
        assert inside.size == 530
        assert np.isfinite(inside).all()
        if peak is not None:
            np.testing.assert_allclose(np.abs(inside).max(), peak, rtol=1e-3)
        maps[compat, noise_model] = inside
        assert (in_mask(fixed["n_runs"], mask_image) == 12).all()
        dof, most = in_mask(fixed["dof"], mask_image), 12 * (121 - designs[0].shape[1])
        assert (dof == most).all() if compat or noise_model == "ols" else ((dof > 100) & (dof < most)).all()
    # Corrected for its bias, the autocorrelation is larger and the statistics are smaller, in the same places.
    assert np.corrcoef(maps[None, "ar1"], maps["nilearn", "ar1"])[0, 1] > 0.98
    assert maps[None, "ar1"].std() < maps["nilearn", "ar1"].std() < maps[None, "ols"].std()

    # Slow as the blocks of this experiment are, they need the drift model to stop at 1 / 128 Hz: "about 14".
    stems = [path.name.removesuffix("_bold.nii.gz") for path in paths]
    slow = [
        design_of(events_of(folder / f"{stem}_events.tsv"), 121, 2.5, high_pass=1 / 128) for stem in stems
    ]
    fit = cg.fit(runs, dict(zip(runs, slow, strict=True)), noise_model="ols")
    fixed = cg.fixed_effects(cg.contrast(fit, "face - house")).compute()
    assert 13.3 < np.abs(in_mask(fixed["stat"], mask_image)).max() < 14.7

    result = cg.contrast(cg.fit(list(runs.values()), designs, compat="nilearn"), "face - house").compute()
    dofs = [121 - design.shape[1] for design in designs]
    expected, expected_fixed = by_nilearn(paths, mask_image, designs, "face - house", dofs)
    got_fixed = {name: in_mask(cg.fixed_effects(result)[name], mask_image) for name in FIXED}
    scaled = nib.load(paths[0]).get_data_dtype() == np.float64 or nib.load(paths[0]).dataobj.slope != 1
    relative = np.abs(in_mask(result["variance"], mask_image) / expected["variance"] - 1)
    same_bin = relative < (1e-10 if scaled else 1e-5)
    assert (~same_bin).mean() <= (0 if scaled else 1e-3)
    error = np.abs(in_mask(result["effect"], mask_image) - expected["effect"]) / np.sqrt(expected["variance"])
    assert error[same_bin].max() < (1e-10 if scaled else 5e-5)
    both = same_bin.all(axis=0)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if scaled else {"rtol": 1e-4, "atol": 3e-4}
    for name in FIXED:
        np.testing.assert_allclose(got_fixed[name][both], expected_fixed[name][both], **tolerance)


def test_msc_motor__vertices_of_a_surface(real_data, tmp_path):
    folder = real_data / "msc-motor"
    runs, designs = [], []
    for number in (1, 2):
        path = folder / f"run{number}_bold.nii.gz"
        image = nib.load(path)
        assert image.get_data_dtype() == np.float32
        every = nib.Nifti1Image(np.ones(image.shape[:3], np.uint8), image.affine)
        runs.append(cg.convert(path, tmp_path / f"run-{number}", mask=every, t_r=2.2))
        designs.append(design_of(events_of(folder / f"run{number}_events.tsv"), image.shape[3], 2.2))
    names = [name for name in designs[0].columns if not name.startswith(("drift", "constant"))]
    fit = cg.fit(runs, designs)
    fixed = cg.fixed_effects(cg.contrast(fit, {name: name for name in names})).compute()
    assert fixed["stat"].shape == (len(names), 1, 1, 2652)
    assert np.isfinite(fixed["stat"]).mean() > 0.999
    assert np.abs(fixed["stat"]).max() > 5
    assert (fixed["n_runs"] <= 2).all()
    np.testing.assert_allclose(fit["frame_time"][0, :3], [0, 2.2, 4.4])
    # Through the saved fit, the same.
    cg.save(fit, tmp_path / "fit")
    from chunkglm.store import open_store

    again = cg.fixed_effects(cg.contrast(open_store(tmp_path / "fit"), {name: name for name in names}))
    assert again.compute().equals(fixed)
