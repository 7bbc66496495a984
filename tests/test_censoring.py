"""Censored volumes: as with a regressor for each of them, and nothing that they hold matters."""

import warnings

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from nilearn.glm.first_level import FirstLevelModel

import chunkglm as cg
from chunkglm.design import read_sample_mask
from chunkglm.errors import DesignError, InputError, SourceNotFoundError
from chunkglm.glm import kept_volumes
from chunkglm.testing import raise_if_computes

SPACE = ("z", "y", "x")
ESTIMATES = ("effect", "variance", "stat", "z_score", "dof")


def noisy(n=50, shape=(3, 4, 5), seed=0, rho=0.4):
    rng = np.random.default_rng(seed)
    e = rng.standard_normal((n, *shape))
    for t in range(1, n):
        e[t] += rho * e[t - 1]
    return 300 + 5 * e


def censored(n, seed=1):
    """A fifth of the volumes, the first two and the last among them, some in a row."""
    kept = np.random.default_rng(seed).random(n) > 0.2
    kept[[0, 1, n - 1, 10, 11, 12]] = False
    return kept


def with_indicators(design, kept):
    columns = {f"out{t}": (np.arange(len(design)) == t).astype(float) for t in np.flatnonzero(~kept)}
    return pd.concat([design, pd.DataFrame(columns)], axis=1)


@pytest.mark.parametrize("noise_model", ["ols", "ar1", "ar2", "ar3"])
def test_fit__is_that_with_a_regressor_for_each_censored_volume(noise_model, volume, make_design):
    run, design, kept = volume(noisy()), make_design(50), censored(50)
    options = {"noise_model": noise_model, "signal_scaling": None}
    got = cg.fit(run, design, sample_masks=[kept], **options).compute()
    full = cg.fit(run, with_indicators(design, kept), **options).compute()
    np.testing.assert_allclose(got["beta"], full["beta"].sel(regressor=list(design)), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(got["sigma2"], full["sigma2"], rtol=1e-9)
    assert got["dof"].item() == full["dof"].item() == kept.sum() - 6
    if noise_model != "ols":
        np.testing.assert_allclose(got["rho"], full["rho"], rtol=1e-8, atol=1e-9)
    for definition in ("face - house", ["face", "cat"]):
        one, other = cg.contrast(got, definition), cg.contrast(full, definition)
        for name in ("stat", "z_score", "dof"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("noise_model", ["ols", "ar1", "ar2"])
@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_fit__what_censored_volumes_hold_does_not_matter(noise_model, value, volume, make_design):
    bold, design, kept = noisy(), make_design(50), censored(50)
    other = bold.copy()
    other[~kept] = value
    for scaling in ("voxel", "run", None):
        options = {"noise_model": noise_model, "signal_scaling": scaling, "sample_masks": [kept]}
        one, two = cg.fit(volume(bold), design, **options), cg.fit(volume(other), design, **options)
        for name in ("beta", "sigma2"):
            np.testing.assert_array_equal(one[name], two[name])


def test_fit__percent_signal_change_refers_to_the_kept_volumes(volume, make_design):
    bold, design, kept = noisy(), make_design(50), censored(50)
    bold[~kept] += 1000
    level = bold[kept].mean(axis=0)
    by_voxel = cg.fit(volume(bold), design, sample_masks=[kept], noise_model="ols")
    scaled = cg.fit(
        volume(100 * (bold / level - 1)), design, sample_masks=[kept], noise_model="ols", signal_scaling=None
    )
    np.testing.assert_allclose(by_voxel["beta"], scaled["beta"], rtol=1e-8, atol=1e-8)
    by_run = cg.fit(volume(bold), design, sample_masks=[kept], noise_model="ols", signal_scaling="run")
    expected = by_voxel["sigma2"][0].values * (level / level.mean()) ** 2
    np.testing.assert_allclose(by_run["sigma2"][0], expected, rtol=1e-9)


def test_fit__sample_masks_in_every_form_are_the_same(volume, make_design):
    runs = {"a": volume(noisy()), "b": volume(noisy(40, seed=2))}
    designs = {"a": make_design(50), "b": make_design(40)}
    kept = censored(50)
    expected = cg.fit(runs, designs, sample_masks=[kept, None]).compute()
    numbers = np.flatnonzero(kept)
    for masks in (
        {"a": kept},
        {"a": numbers, "b": np.ones(40, dtype=bool)},
        (list(numbers[::-1]), None),
        [kept.tolist(), np.arange(40)],
    ):
        assert cg.fit(runs, designs, sample_masks=masks).compute().equals(expected)
    assert expected["sample_mask"].sum("volume").values.tolist() == [kept.sum(), 40]
    np.testing.assert_array_equal(expected["sample_mask"][0], kept)
    assert expected["n_volumes"].values.tolist() == [50, 40]
    alone = cg.fit(runs["a"], designs["a"], sample_masks=kept).compute()
    np.testing.assert_array_equal(alone["beta"][0], expected["beta"][0])
    plain = cg.fit(runs, designs).compute()
    assert cg.fit(runs, designs, sample_masks=[None, None]).compute().equals(plain)
    assert not plain["beta"][0].equals(expected["beta"][0])


def test_contrast__of_a_saved_censored_fit_needs_no_masks(volume, make_design, tmp_path):
    kept = censored(50)
    with raise_if_computes():
        fit = cg.fit(volume(noisy()).chunk(y=2), make_design(50), sample_masks=[kept], noise_model="ar2")
    cg.save(fit, tmp_path / "fit.zarr")
    got = cg.contrast(cg.open_store(tmp_path / "fit.zarr"), "face")
    for name in ESTIMATES:
        np.testing.assert_allclose(got[name], cg.contrast(fit.compute(), "face")[name], rtol=1e-12)


def test_contrast__what_only_censored_volumes_tell_cannot_be_estimated(volume, make_design):
    design = make_design(50).assign(spike=(np.arange(50) == 11).astype(float))
    with pytest.warns(cg.errors.ChunkGLMWarning, match="redundant"):
        fit = cg.fit(volume(noisy()), design, sample_masks=[censored(50)])
    with pytest.raises(cg.errors.ContrastError, match="cannot be estimated in any run"):
        cg.contrast(fit, "spike")
    assert np.isfinite(cg.contrast(fit, "face")["stat"]).all()


def test_fit__chunks_do_not_matter_with_gaps(volume, make_design):
    run, design, kept = volume(noisy()), make_design(50), censored(50)
    for noise_model in ("ar1", "ar3"):
        options = {"noise_model": noise_model, "sample_masks": [kept]}
        whole = cg.fit(run, design, **options).compute()
        for chunks in ({"time": 1, "z": 1}, {"time": 7, "x": 2}, {"time": (3, 20, 27), "y": 3}):
            parts = cg.fit(run.chunk(chunks), design, **options).compute()
            for name in ("beta", "sigma2", "rho"):
                np.testing.assert_allclose(parts[name], whole[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("noise_model", ["ols", "ar1"])
def test_compat__drops_censored_volumes_as_nilearn(noise_model, volume, make_design):
    import nibabel as nib

    runs = [noisy(50), noisy(44, seed=3)]
    designs = [make_design(50), make_design(44, seed=1)]
    kept = [censored(50), censored(44, seed=5)]
    images = [nib.Nifti1Image(np.asarray(run.T), np.diag([3.0, 3, 3, 1])) for run in runs]
    mask = nib.Nifti1Image(np.ones((5, 4, 3), np.uint8), np.diag([3.0, 3, 3, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FirstLevelModel(mask_img=mask, noise_model=noise_model).fit(
            images, design_matrices=designs, sample_masks=[np.flatnonzero(one) for one in kept]
        )
        theirs = model.compute_contrast("face - house", output_type="all")
    fit = cg.fit(
        [volume(run) for run in runs], designs, sample_masks=kept, noise_model=noise_model, compat="nilearn"
    )
    got = cg.fixed_effects(cg.contrast(fit, "face - house")).compute()
    for name, key in (
        ("effect", "effect_size"),
        ("variance", "effect_variance"),
        ("stat", "stat"),
        ("z_score", "z_score"),
    ):
        np.testing.assert_allclose(got[name].values.T, theirs[key].get_fdata(), rtol=1e-9, atol=1e-11)
    assert (got["dof"] == sum(one.sum() for one in kept) - 12).all()


def test_contrast__false_positives_of_a_censored_run_are_at_their_level(make_design):
    n, v, rho = 160, 6000, 0.5
    e = noisy(n, (1, 1, v), seed=9, rho=rho)
    space = {"bold": (("time", *SPACE), e), "mask": (SPACE, np.ones((1, 1, v), bool))}
    kept = np.random.default_rng(3).random(n) > 0.2
    got = cg.contrast(
        cg.fit(xr.Dataset(space), make_design(n), sample_masks=[kept]), "face - house"
    ).compute()
    for level in (0.05, 0.01):
        assert abs(float((got["p_value"] < level).mean()) - level) < 4 * np.sqrt(level / v) + 0.1 * level


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        ([], "0 sample masks for 1 runs"),
        ([None, None], "2 sample masks for 1 runs"),
        ({"2": None}, r"sample masks for \['2'\], and the runs are \['1'\]"),
        ([np.ones(49, dtype=bool)], "49 values for 50 volumes"),
        ([np.zeros(50, dtype=bool)], "keeps no volume"),
        ([[]], "dtype float64"),
        ([[0.5, 1.0]], "dtype float64"),
        ([np.ones((50, 1), dtype=bool)], r"shape \(50, 1\)"),
        ([[0, 1, 50]], "keeps volume 50, and there are 50"),
        ([[-1, 1]], "keeps volume -1"),
        ([[3, 3]], "names a volume twice"),
    ],
)
def test_fit__refuses_sample_masks(masks, match, volume, make_design):
    with pytest.raises(InputError, match=match):
        cg.fit(volume(noisy()), make_design(50), sample_masks=masks)


def test_fit__refuses_a_run_of_which_too_little_is_kept(volume, make_design):
    with pytest.raises(DesignError, match="for 6 volumes that are kept, which leaves no degrees"):
        cg.fit(volume(noisy()), make_design(50), sample_masks=[np.arange(6)])


def test_fit__needs_pairs_of_kept_volumes_for_every_lag(volume, make_design):
    run, design = volume(noisy()), make_design(50)
    every_other, pairs = np.arange(0, 50, 2), np.flatnonzero(np.arange(50) % 4 < 2)
    with pytest.raises(DesignError, match="no two volumes that are kept are 1 apart.*order 1 cannot be"):
        cg.fit(run, design, sample_masks=[every_other])
    with pytest.raises(DesignError, match="are 2 apart.*order 3 cannot be"):
        cg.fit(run, design, sample_masks=[pairs], noise_model="ar3")
    for masks, most in ((every_other, 0), (pairs, 1)):
        fit = cg.fit(run, design, sample_masks=[masks], noise_model="auto").compute()
        assert fit["order"].item() <= most
        assert np.isfinite(cg.contrast(fit, "face")["stat"]).all()


def test_read_sample_mask__flags_and_numbers(tmp_path):
    path = tmp_path / "mask.txt"
    path.write_text("1\n0\n1\n1\n")
    np.testing.assert_array_equal(kept_volumes(read_sample_mask(path), 4, "Run 1"), [True, False, True, True])
    path.write_text("0, 2, 3")
    np.testing.assert_array_equal(kept_volumes(read_sample_mask(path), 4, "Run 1"), [True, False, True, True])
    path.write_text("1 0")
    np.testing.assert_array_equal(kept_volumes(read_sample_mask(path), 3, "Run 1"), [True, True, False])
    for text in ("", "1 -1", "one", "1.0 0 1", "1e3", "9" * 30):
        path.write_text(text)
        with pytest.raises(InputError, match="mask.txt' holds"):
            read_sample_mask(path)
    with pytest.raises(SourceNotFoundError):
        read_sample_mask(tmp_path / "none.txt")
