"""Fitting: the numbers, the reference, laziness, labels and refusals."""

import gc
import itertools
import warnings
import weakref

import dask
import dask.array as da
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from dask._task_spec import Alias
from hypothesis import given
from hypothesis import strategies as st
from nilearn.glm import compute_contrast, compute_fixed_effects
from nilearn.glm.first_level import FirstLevelModel, mean_scaling, run_glm
from scipy.optimize import brentq

import chunkglm as cg
from chunkglm import grids
from chunkglm.errors import (
    ChunkGLMWarning,
    DesignError,
    GridMismatchError,
    InputError,
    MaskError,
    NotAvailableError,
)
from chunkglm.testing import raise_if_computes

SPACE = ("z", "y", "x")
MAPS = ("effect", "variance", "stat", "p_value", "z_score")
REFERENCE_MAPS = ("effect_size", "effect_variance", "stat", "p_value", "z_score")


def voxels(array, mask):
    """Values in the mask, (..., voxel)."""
    return np.asarray(array)[..., np.asarray(mask)]


def coefficient_of(observed, X):
    """The coefficient of noise whose residuals are expected to have this autocorrelation, by dense matrices."""
    n = len(X)
    R = np.eye(n) - X @ np.linalg.pinv(X)
    RDR = R @ ((np.eye(n, k=1) + np.eye(n, k=-1)) / 2) @ R
    apart = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))

    def excess(rho):
        V = float(rho) ** apart
        return (RDR * V).sum() / (R * V).sum() - observed

    if excess(0.99) < 0:
        return 0.99
    return brentq(excess, -0.99, 0.99, xtol=1e-12)


def scaled(run):
    Y = voxels(run["bold"].values.astype(float), run["mask"])
    return 100 * (Y / Y.mean(axis=0) - 1)


def coefficients(run, design):
    """Brute force: the coefficient of AR(1), voxel by voxel."""
    X, Y = design.to_numpy(), scaled(run)
    e = Y - X @ np.linalg.lstsq(X, Y, rcond=None)[0]
    observed = (e[1:] * e[:-1]).sum(axis=0) / (e**2).sum(axis=0)
    return np.array([coefficient_of(value, X) for value in observed])


def gls(run, design, rho):
    """Brute force: regression coefficients and innovation variance at given coefficients, voxel by voxel."""
    X, Y = design.to_numpy(), scaled(run)
    beta, sigma2 = np.empty((X.shape[1], Y.shape[1])), np.empty(Y.shape[1])
    for v in range(Y.shape[1]):
        W = np.eye(len(X)) - rho[v] * np.eye(len(X), k=-1)
        beta[:, v] = np.linalg.lstsq(W @ X, W @ Y[:, v], rcond=None)[0]
        sigma2[v] = ((W @ (Y[:, v] - X @ beta[:, v])) ** 2).sum() / (len(X) - np.linalg.matrix_rank(X))
    return beta, sigma2


# -------------------------------------------------------------------------------------------------- the numbers


def test_fit__is_exact_ar1_at_the_coefficient_of_each_voxel(two_runs, two_designs):
    fit = cg.fit(two_runs, two_designs)
    for label, run in two_runs.items():
        one = fit.sel(run=label)
        rho = coefficients(run, two_designs[label])
        used = voxels(one["rho"][0], run["mask"])
        # The table is interpolated; what follows is exact at the coefficient that was used.
        np.testing.assert_allclose(used, rho, atol=1e-5)
        beta, sigma2 = gls(run, two_designs[label], used)
        np.testing.assert_allclose(voxels(one["sigma2"], run["mask"]), sigma2, rtol=1e-9)
        np.testing.assert_allclose(voxels(one["beta"], run["mask"]), beta, rtol=1e-8, atol=1e-9)
        assert one["dof"] == run.sizes["time"] - two_designs[label].shape[1]
        assert len(np.unique(rho[rho < 0.99])) == (rho < 0.99).sum()


def test_fit__ols_and_scalings(two_runs, two_designs):
    run, X = two_runs["a"], two_designs["a"].to_numpy()
    Y = voxels(run["bold"].values.astype(float), run["mask"])
    for scaling, scaled in [
        ("voxel", 100 * (Y / Y.mean(axis=0) - 1)),
        ("run", 100 * (Y / Y.mean() - 1)),
        (None, Y),
    ]:
        fit = cg.fit(run, two_designs["a"], noise_model="ols", signal_scaling=scaling)
        assert "rho" not in fit
        assert "lag" not in fit.coords
        beta, rss, *_ = np.linalg.lstsq(X, scaled, rcond=None)
        np.testing.assert_allclose(voxels(fit["beta"][0], run["mask"]), beta, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(voxels(fit["sigma2"][0], run["mask"]), rss / (60 - X.shape[1]), rtol=1e-9)


def test_fit__redundant_columns_count_once_and_are_told(two_runs, two_designs):
    design = two_designs["a"]
    redundant = design.assign(both=design["SSt"] + 2 * design["DSp"], nothing=0.0)
    with pytest.warns(
        ChunkGLMWarning, match=f"run 1 has {redundant.shape[1]} regressors of rank {design.shape[1]}"
    ) as seen:
        fit = cg.fit(two_runs["a"], redundant)
    assert seen[0].filename == __file__
    plain = cg.fit(two_runs["a"], design)
    assert fit["dof"].item() == plain["dof"].item()
    np.testing.assert_allclose(fit["sigma2"], plain["sigma2"], rtol=1e-9)
    np.testing.assert_allclose(fit["rho"], plain["rho"], rtol=1e-9, atol=1e-11)


def test_fit__has_the_documented_layout(two_runs, two_designs):
    fit = cg.fit(two_runs, two_designs)
    P = two_designs["a"].shape[1]
    space = tuple(two_runs["a"]["mask"].shape)
    shapes = {
        "beta": (("run", "regressor", *SPACE), (2, P, *space), np.float64),
        "sigma2": (("run", *SPACE), (2, *space), np.float64),
        "rho": (("run", "lag", *SPACE), (2, 1, *space), np.float64),
        "rho_at_limit": (("run", *SPACE), (2, *space), np.bool_),
        "order": (("run",), (2,), np.int64),
        "dof": (("run",), (2,), np.float64),
        "design": (("run", "volume", "regressor"), (2, 60, P), np.float64),
        "column": (("run", "regressor"), (2, P), np.int64),
        "frame_time": (("run", "volume"), (2, 60), np.float64),
        "sample_mask": (("run", "volume"), (2, 60), np.bool_),
        "n_volumes": (("run",), (2,), np.int64),
        "mask": (("run", *SPACE), (2, *space), np.bool_),
    }
    assert set(fit.data_vars) == set(shapes)
    for name, (dims, shape, dtype) in shapes.items():
        assert (fit[name].dims, fit[name].shape, fit[name].dtype) == (dims, shape, dtype), name
        assert fit[name].attrs["long_name"]
    computed = fit.compute()
    for name, (dims, shape, dtype) in shapes.items():
        assert (computed[name].dims, computed[name].shape, computed[name].dtype) == (dims, shape, dtype), name
    assert list(fit["run"].values) == ["a", "b"]
    assert fit["run"].dtype == fit["regressor"].dtype == object
    assert fit["volume"].dtype.kind == "i"
    assert list(fit["n_volumes"]) == [60, 46]
    assert fit["sample_mask"].sum("volume").values.tolist() == [60, 46]
    np.testing.assert_array_equal(fit["frame_time"][1, :46], two_runs["b"]["time"])
    assert np.isnan(fit["frame_time"][1, 46:]).all()
    np.testing.assert_array_equal(fit["design"][1, :46], two_designs["b"])
    assert np.isnan(fit["design"][1, 46:]).all()
    for name in (*SPACE, "grid"):
        assert fit[name].identical(two_runs["a"][name])
    assert fit.attrs["compat"] == "none"
    assert fit.attrs["noise_model"] == "ar1"
    assert fit.attrs["signal_scaling"] == "voxel"
    assert all(isinstance(value, str | int | float) for value in fit.attrs.values())


# ------------------------------------------------------------------------------------------------------- nilearn


def images(tmp_path, kind, seed=0, nan=False, level=800.0):
    """Two unequal runs as NIfTI files, with a mask image and designs."""
    rng = np.random.default_rng(seed)
    shape, lengths = (6, 5, 4), (62, 45)
    affine = np.diag([-3.0, 3.0, 3.5, 1.0])
    mask = rng.random(shape) < 0.8
    paths, designs = [], []
    for number, n in enumerate(lengths):
        noise = rng.standard_normal((*shape, n))
        rho = rng.uniform(-0.2, 0.7, shape)
        for t in range(1, n):
            noise[..., t] += rho * noise[..., t - 1]
        y = level * (1 + 0.3 * rng.random((*shape, 1)) + 0.02 * noise)
        if nan:
            y[1, 1, 1, 3] = y[2, 2, 2, 0] = y[3, 3, 3, -1] = np.nan
        header = nib.Nifti1Header()
        if kind == "int16":
            y = np.rint(y)
        image = nib.Nifti1Image(y.astype(kind if kind != "scaled int16" else "f8"), affine, header)
        image.header.set_data_dtype(np.int16 if "int16" in kind else kind)
        image.header["pixdim"][4] = 2
        image.header.set_xyzt_units("mm", "sec")
        path = tmp_path / f"{kind}-{nan}-{number}.nii"
        image.to_filename(path)
        loaded = nib.load(path)
        assert (loaded.dataobj.slope != 1) == (kind == "scaled int16")
        paths.append(path)
        t = np.arange(n)
        design = pd.DataFrame(
            {"a": np.sin(t / 3.0), "b": np.cos(t / 4.1) ** 3, "drift": t / n, "constant": 1.0}
        )
        designs.append(design)
    mask_image = nib.Nifti1Image(mask.astype(np.uint8), affine)
    return paths, mask_image, designs


def reference(paths, mask_image, designs, definition, *, noise_model, scaling):
    """Maps of every run by FirstLevelModel, (run, voxel), and its own combination of the runs."""
    model = FirstLevelModel(mask_img=mask_image, noise_model=noise_model, signal_scaling=scaling)
    mask = mask_image.get_fdata() > 0

    def values(result):
        return {name: result[name].get_fdata()[mask] for name in REFERENCE_MAPS}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        per_run = []
        for path, design in zip(paths, designs, strict=True):
            fitted = model.fit([str(path)], design_matrices=[design])
            per_run.append(fitted.compute_contrast(definition, output_type="all"))
        both = model.fit([str(path) for path in paths], design_matrices=designs)
        combined = values(both.compute_contrast(definition, output_type="all"))
    runs = {name: np.stack([values(one)[name] for one in per_run]) for name in REFERENCE_MAPS}
    return runs, combined, per_run


def assert_same_maps(got, expected, mask, rtol=1e-10):
    """Equal to ``rtol``: effects in standard errors, variances relative, statistics as their size allows."""
    got = {name: voxels(got[name].transpose(..., "x", "y", "z"), mask) for name in MAPS}
    expected = dict(zip(MAPS, (expected[name] for name in REFERENCE_MAPS), strict=True))
    se = np.sqrt(expected["variance"])
    assert np.isfinite(got["stat"]).all()
    assert (np.abs(got["effect"] - expected["effect"]) <= rtol * se).all()
    np.testing.assert_allclose(got["variance"], expected["variance"], rtol=rtol)
    size = 1 + np.abs(expected["stat"])
    assert (np.abs(got["stat"] - expected["stat"]) <= 2 * rtol * size).all()
    assert (np.abs(got["z_score"] - expected["z_score"]) <= 2 * rtol * size + 1e-12).all()
    np.testing.assert_allclose(
        got["p_value"], expected["p_value"], rtol=4 * rtol * size.max() ** 2, atol=1e-15
    )


@pytest.mark.parametrize("kind", ["float64", "scaled int16"])
@pytest.mark.parametrize("noise_model", ["ols", "ar1"])
@pytest.mark.parametrize(("scaling", "theirs"), [("voxel", 0), ("run", (0, 1)), (None, False)])
def test_compat__equals_nilearn(tmp_path, kind, noise_model, scaling, theirs):
    paths, mask_image, designs = images(tmp_path, kind, nan=kind == "float64")
    runs = [cg.convert(path, tmp_path / f"{path.stem}.zarr", mask=mask_image) for path in paths]
    fit = cg.fit(runs, designs, noise_model=noise_model, signal_scaling=scaling, compat="nilearn")
    got = cg.contrast(fit, "a - 0.5*b")
    expected, combined, per_run = reference(
        paths, mask_image, designs, "a - 0.5*b", noise_model=noise_model, scaling=theirs
    )
    mask = mask_image.get_fdata() > 0
    assert_same_maps(got, expected, mask)
    assert list(got["dof"]) == [58, 41]
    assert_same_maps(cg.fixed_effects(got), combined, mask)
    for precision_weighted in (False, True):
        fixed = cg.fixed_effects(got, precision_weighted=precision_weighted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = compute_fixed_effects(
                [one["effect_size"] for one in per_run],
                [one["effect_variance"] for one in per_run],
                mask_image,
                precision_weighted=precision_weighted,
                dofs=[58, 41],
            )
        for name, image in zip(("effect", "variance", "stat", "z_score"), theirs, strict=True):
            values = voxels(fixed[name].transpose("x", "y", "z"), mask)
            np.testing.assert_allclose(values, image.get_fdata()[mask], rtol=1e-9, atol=1e-10)
        assert (voxels(fixed["dof"].transpose("x", "y", "z"), mask) == 99).all()


@pytest.mark.parametrize("kind", ["float32", "int16"])
@pytest.mark.parametrize("noise_model", ["ols", "ar1"])
def test_compat__where_nilearn_is_in_float32_equals_to_its_precision(tmp_path, kind, noise_model):
    paths, mask_image, designs = images(tmp_path, kind)
    runs = [cg.convert(path, tmp_path / f"{path.stem}.zarr", mask=mask_image) for path in paths]
    fit = cg.fit(runs, designs, noise_model=noise_model, compat="nilearn")
    got = cg.contrast(fit, "a - b")
    expected, _, _ = reference(paths, mask_image, designs, "a - b", noise_model=noise_model, scaling=0)
    mask = mask_image.get_fdata() > 0
    effect, variance = (
        voxels(got[name].transpose(..., "x", "y", "z"), mask) for name in ("effect", "variance")
    )
    same_bin = np.abs(variance / expected["effect_variance"] - 1) < 1e-5
    assert (~same_bin).mean() < 0.02  # a bin's edge; the promise of 0.1 % is held against real data
    error = np.abs(effect - expected["effect_size"]) / np.sqrt(expected["effect_variance"])
    assert error[same_bin].max() < 5e-5


def by_arrays(Y, X, noise_model, scaling, weights):
    """Nilearn on arrays (T, V): maps and the coefficients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if scaling is not False:
            Y, _ = mean_scaling(Y, scaling)
        labels, results = run_glm(Y, X, noise_model=noise_model)
        result = compute_contrast(labels, results, weights, stat_type="t")
        maps = (
            result.effect_size(),
            result.effect_variance(),
            result.stat(),
            result.p_value(),
            result.z_score(),
        )
    return dict(zip(REFERENCE_MAPS, maps, strict=True)), labels.astype(float), result.dof


@pytest.mark.parametrize("noise_model", ["ols", "ar1"])
@pytest.mark.parametrize(
    "case", ["small means", "mixed means", "redundant", "no column is constant", "few volumes"]
)
def test_compat__equals_nilearn_on_difficult_data(case, noise_model, volume, make_design):
    rng = np.random.default_rng(3)
    n = 14 if case == "few volumes" else 57
    Y = 600 + 10 * rng.standard_normal((n, 4, 3, 5)).cumsum(axis=0)
    design = make_design(n, names=("face", "house"))
    weights, definition = np.array([1.0, -1, 0, 0, 0]), "face - house"
    if case == "small means":
        Y = Y / 1e3
    elif case == "mixed means":
        Y = Y - Y.mean(axis=0) + np.linspace(-5, 5, 60).reshape(4, 3, 5)
    elif case == "redundant":
        design = design.assign(sum=design["face"] + design["house"], again=design["drift_1"])
        weights = np.append(weights, [0, 0])
    elif case == "no column is constant":
        on = (np.arange(n) % 11 < 5).astype(float)
        design = design.assign(face=on, house=1 - on).drop(columns="constant")
        weights = weights[:4]
    for scaling, theirs in (("voxel", 0), ("run", (0, 1)), (None, False)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*some are redundant")
            fit = cg.fit(volume(Y), design, noise_model=noise_model, signal_scaling=scaling, compat="nilearn")
        got = cg.contrast(fit, definition)
        expected, labels, dof = by_arrays(Y.reshape(n, -1), design.to_numpy(), noise_model, theirs, weights)
        assert got["dof"].item() == dof
        if noise_model == "ar1":
            np.testing.assert_allclose(fit["rho"].values.ravel(), labels, atol=1e-15)
        flat = got.stack(voxel=SPACE).isel(run=0)
        for name, theirs_name in zip(MAPS, REFERENCE_MAPS, strict=True):
            np.testing.assert_allclose(flat[name], expected[theirs_name], rtol=1e-8, atol=1e-9)
        se = np.sqrt(expected["effect_variance"])
        assert (np.abs(flat["effect"] - expected["effect_size"]) <= 1e-10 * se).all()
        np.testing.assert_allclose(flat["variance"], expected["effect_variance"], rtol=1e-10)


def test_compat__a_design_that_spans_no_constant_is_refused(volume, make_design):
    run = volume(100 + np.random.default_rng(0).standard_normal((30, 2, 2, 2)))
    design = make_design(30).drop(columns="constant")
    with pytest.raises(DesignError, match="run 1 does not span a constant"):
        cg.fit(run, design, compat="nilearn")
    assert np.isfinite(cg.fit(run, design)["sigma2"]).all()


# --------------------------------------------------------------------------------------- bad voxels, masks, levels


def noisy(shape=(50, 3, 4, 5), seed=0, level=300.0):
    return level + np.random.default_rng(seed).standard_normal(shape).cumsum(axis=0)


@pytest.mark.parametrize("compat", [None, "nilearn"])
@pytest.mark.parametrize("noise_model", ["ols", "ar1"])
def test_fit__voxels_without_variance_or_outside_the_mask_are_nan(volume, make_design, noise_model, compat):
    Y = noisy()
    bad = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 1, 1), (2, 3, 4)]
    for place, value in zip(bad, [0.0, 1.0, 1 / 3, 12345.678, 1e-9], strict=True):
        Y[:, *place] = value
    mask = np.ones(Y.shape[1:], bool)
    mask[1, 2] = False
    dead = ~mask
    for place in bad:
        dead[place] = True
    for scaling in ("voxel", "run", None):
        options = {"noise_model": noise_model, "signal_scaling": scaling, "compat": compat}
        fit = cg.fit(volume(Y, mask), make_design(50), **options)
        result = cg.contrast(fit, "face - house")
        fixed = cg.fixed_effects(result)
        for name in (*MAPS, "dof"):
            assert np.array_equal(np.isnan(fixed[name]), dead), name
        for name in MAPS:
            assert np.array_equal(np.isnan(result[name][0]), dead), name
        assert np.array_equal(fixed["n_runs"], ~dead)
        assert np.array_equal(np.isnan(fit["sigma2"][0]), dead)


def test_fit__a_nan_sample_stays_in_its_voxel(volume, make_design):
    Y = noisy()
    clean = cg.fit(volume(Y), make_design(50)).compute()
    Y[7, 1, 1, 1], Y[0, 2, 2, 2], Y[-1, 0, 0, 0] = np.nan, np.inf, -np.inf
    for scaling in ("voxel", None):
        got = cg.fit(volume(Y), make_design(50), signal_scaling=scaling).compute()
        bad = np.isnan(got["sigma2"][0].values)
        assert bad.sum() == 3
        assert bad[1, 1, 1]
        assert bad[2, 2, 2]
        assert bad[0, 0, 0]
        if scaling == "voxel":
            for name in ("beta", "sigma2", "rho"):
                np.testing.assert_array_equal(got[name].values[..., ~bad], clean[name].values[..., ~bad])
    # Scaling by the mean of the run leaves such voxels out of the mean.
    got = cg.fit(volume(Y), make_design(50), signal_scaling="run")
    expected = cg.fit(volume(Y, mask=~bad), make_design(50), signal_scaling="run")
    np.testing.assert_allclose(got["sigma2"], expected["sigma2"], rtol=1e-12)
    assert (~bad).sum() == np.isfinite(got["sigma2"]).sum()


@pytest.mark.parametrize("noise_model", ["ols", "ar1"])
def test_contrast__of_a_perfect_fit_has_no_statistic(volume, make_design, noise_model):
    rng = np.random.default_rng(4)
    design = make_design(50)
    Y = noisy()
    Y[:, 0] = 100 + (design.to_numpy() @ rng.standard_normal((6, 20))).reshape(50, 4, 5)
    result = cg.contrast(cg.fit(volume(Y), design, noise_model=noise_model), "face - house")
    for name in MAPS:
        assert np.isnan(result[name][0, 0]).all(), name
        assert np.isfinite(result[name][0, 1:]).all(), name


def test_fit__means_of_0_or_less_are_nan_and_told_once(volume, make_design):
    Y = noisy((50, 40, 4, 5), level=0.0)
    Y = Y - Y.mean(axis=0) + np.where(np.arange(20).reshape(4, 5) % 2, 30.0, -30.0)
    design = make_design(50)
    run = volume(Y).chunk(z=1)
    fit = cg.fit(run, design)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        sigma2 = fit["sigma2"].compute(scheduler="sync")
    assert len(seen) == 1
    assert seen[0].category is ChunkGLMWarning
    np.testing.assert_array_equal(np.isnan(sigma2[0]), Y.mean(axis=0) < 0)
    # The way to count them that the message gives.
    text = str(seen[0].message)
    count = "(run.mask & (run.bold.mean('time') <= 0)).sum()"
    assert count in text
    assert eval(count, {"run": run}) == 400
    with pytest.warns(ChunkGLMWarning, match="They are NaN"):
        assert np.isnan(cg.fit(volume(-abs(Y)), design, signal_scaling="run")["sigma2"]).all()
    assert np.isfinite(cg.fit(run, design, signal_scaling=None)["sigma2"]).all()
    assert np.isfinite(cg.fit(run, design, compat="nilearn")["sigma2"]).all()
    # Of a voxel that never varies, NaN is no news.
    Y[:] = np.where(Y.mean(axis=0) < 0, 0.0, Y)
    cg.fit(volume(Y), design)["sigma2"].compute()


def test_fit__an_empty_mask_gives_nan(volume, make_design):
    run = volume(noisy(), np.zeros((3, 4, 5), bool))
    for scaling in ("voxel", "run"):
        assert np.isnan(cg.fit(run, make_design(50), signal_scaling=scaling)["beta"]).all()


# ------------------------------------------------------------------------------------------- chunks, threads, order


def split(draw, n):
    """Chunks that add up to n."""
    cuts = draw(st.lists(st.integers(1, n - 1), unique=True, max_size=min(n - 1, 6))) if n > 1 else []
    edges = [0, *sorted(cuts), n]
    return tuple(stop - start for start, stop in itertools.pairwise(edges))


@st.composite
def chunkings(draw, shape):
    if draw(st.booleans()):
        return ((1,) * shape[0], *(split(draw, n) for n in shape[1:]))
    return tuple(split(draw, n) for n in shape)


CHUNKED = (40, 3, 4, 5)


@given(
    chunks=chunkings(CHUNKED),
    mask_chunks=st.none() | chunkings((1, *CHUNKED[1:])),
    scheduler=st.sampled_from(["sync", 1, 2, 3, 5]),
    options=st.fixed_dictionaries(
        {
            "noise_model": st.sampled_from(["ar1", "ols"]),
            "signal_scaling": st.sampled_from(["voxel", "run", None]),
            "compat": st.sampled_from([None, "nilearn"]),
        }
    ),
)
def test_fit__chunks_and_threads_do_not_matter(
    volume, make_design, *, chunks, mask_chunks, scheduler, options
):
    mask = np.random.default_rng(1).random(CHUNKED[1:]) < 0.7
    run, design = volume(noisy(CHUNKED), mask), make_design(40)
    whole = cg.fit(run.chunk(time=-1), design, **options).compute(scheduler="sync")
    other = run.assign(bold=run["bold"].chunk(dict(zip(("time", *SPACE), chunks, strict=True))))
    if mask_chunks is not None:
        other["mask"] = other["mask"].chunk(dict(zip(SPACE, mask_chunks[1:], strict=True)))
    threads = (
        {"scheduler": "sync"} if scheduler == "sync" else {"scheduler": "threads", "num_workers": scheduler}
    )
    fit = cg.fit(other, design, **options)
    got, result = dask.compute(fit, cg.contrast(fit, "face - cat"), **threads)
    expected = cg.contrast(whole, "face - cat")
    for name in ("sigma2", "beta"):
        scale = np.nanmax(np.abs(whole[name]), axis=(-1, -2, -3), keepdims=True)
        np.testing.assert_allclose(got[name] / scale, whole[name] / scale, rtol=1e-12, atol=1e-12)
    if "rho" in whole:
        np.testing.assert_allclose(got["rho"], whole["rho"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result["stat"], expected["stat"], rtol=1e-11, atol=1e-11)


@given(seed=st.integers(0, 2**32 - 1))
def test_fit__order_of_voxels_does_not_matter(volume, make_design, seed):
    Y = noisy((40, 1, 1, 60))
    order = np.random.default_rng(seed).permutation(60)
    design = make_design(40)
    for compat in (None, "nilearn"):
        whole = cg.fit(volume(Y), design, compat=compat).compute()
        other = cg.fit(volume(Y[..., order]), design, compat=compat).compute()
        for name in ("beta", "sigma2", "rho"):
            np.testing.assert_allclose(
                other[name].values, whole[name].values[..., order], rtol=1e-11, atol=1e-12
            )


@pytest.mark.parametrize(
    "how", ["numpy", "dask", "transposed", "big endian", "float32", "strided", "lazy file"]
)
def test_fit__any_origin_gives_the_same_numbers(how, volume, make_design, tmp_path):
    Y = np.rint(noisy(CHUNKED))
    run, design = volume(Y), make_design(40)
    expected = cg.fit(run, design).compute()
    if how == "dask":
        run = run.chunk(time=7, x=2)
    elif how == "transposed":
        run = run.transpose("x", "time", "z", "y").chunk(time=11)
    elif how == "big endian":
        run = run.assign(bold=run["bold"].astype(">i2"))
    elif how == "float32":
        run = run.assign(bold=run["bold"].astype("f4"))
    elif how == "strided":
        doubled = volume(np.repeat(np.repeat(Y, 2, axis=0), 2, axis=3))
        run = doubled.isel(time=slice(None, None, 2), x=slice(None, None, 2))
    elif how == "lazy file":
        run.to_zarr(tmp_path / "run.zarr", consolidated=False)
        run = xr.open_zarr(tmp_path / "run.zarr", consolidated=False, chunks=None)
        with raise_if_computes():
            cg.fit(run, design)
    got = cg.fit(run, design).compute()
    for name in ("beta", "sigma2", "rho"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-11, atol=1e-11)


@pytest.fixture(scope="module")
def study(tmp_path_factory, two_runs, volume):
    """A study on disk with the runs of two_runs, three times as high: several slabs and time blocks."""
    folder = tmp_path_factory.mktemp("stores") / "study.zarr"
    for label, run in two_runs.items():
        tall = volume(np.tile(run["bold"], (1, 5, 1, 1)), np.tile(run["mask"], (5, 1, 1)))
        tall = tall.assign(mean_image=tall["bold"].mean("time").astype("f4"))
        cg.save(tall.chunk(time=32, z=16), folder / f"run-{label}")
    return folder


@pytest.fixture(scope="module")
def store(study):
    return cg.open_study(study)


@pytest.mark.parametrize("compat", [None, "nilearn"])
def test_fit__from_a_store_is_the_same_to_the_last_bit_with_any_threads(store, two_designs, compat):
    fit = cg.fit(store, two_designs, compat=compat, signal_scaling="run")
    results = [fit, cg.contrast(fit, "SSt - DSp"), cg.fixed_effects(cg.contrast(fit, "SSt - DSp"))]
    expected = dask.compute(*results, scheduler="sync")
    for workers in (1, 2, 4, 4):
        got = dask.compute(*results, scheduler="threads", num_workers=workers)
        for one, other in zip(got, expected, strict=True):
            assert one.equals(other)
    # One after the other, and some voxels only, too.
    assert results[2].compute(num_workers=2).equals(expected[2])
    assert results[2].isel(z=slice(20, 23)).compute().equals(expected[2].isel(z=slice(20, 23)))


# ------------------------------------------------------------------------------------------------- laziness, tasks


def test_fit__contrast_and_fixed_effects_are_lazy(store, two_designs):
    never = {}
    for name, run in store.items():
        broken = run["bold"].data.map_blocks(fail, dtype="i2", meta=np.empty((0,) * 4, "i2"))
        never[name.removeprefix("run-")] = run.to_dataset().assign(bold=run["bold"].copy(data=broken))
    with raise_if_computes():
        fit = cg.fit(never, two_designs, signal_scaling="run")
        result = cg.contrast(fit, {"one": "SSt - DSp", "two": "SSt"})
        fixed = cg.fixed_effects(result)
    for ds in (fit, result, fixed):
        for name, variable in ds.data_vars.items():
            assert variable.chunks is not None or not set(SPACE) & set(variable.dims), name
    with pytest.raises(ArithmeticError, match="computed"):
        fixed["stat"].compute()


def fail(block):
    raise ArithmeticError("computed")


def test_fit__one_task_a_voxel_block(store, two_designs):
    fit = cg.fit(store, two_designs)
    blocks = sum(np.prod(run["bold"].data.numblocks[1:]) for run in store.values())
    assert blocks == 6
    (graph,) = (dict(one.__dask_graph__()) for one in dask.optimize(fit))
    tasks = [
        key
        for key, task in graph.items()
        if str(key[0]).startswith("fit_block-") and not isinstance(task, Alias)
    ]
    assert len(tasks) == blocks
    # Nothing outside these tasks touches the signal: the zarr array is named in them only.
    names = {str(key[0]) if isinstance(key, tuple) else str(key) for key in graph}
    assert not [name for name in names if "bold" in name]


class Source:
    """An array that makes its blocks on demand, and knows how many of them are alive in each voxel block."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.ndim = values, values.shape, values.dtype, values.ndim
        self.alive, self.most, self.reads = {}, {}, 0

    def __getitem__(self, index):
        block = self.values[index].copy()
        place = tuple(s.start for s in index[1:])
        self.alive[place] = self.alive.get(place, 0) + 1
        self.most[place] = max(self.most.get(place, 0), self.alive[place])
        self.reads += 1
        weakref.finalize(block, self.forget, place)
        return block

    def forget(self, place):
        self.alive[place] -= 1


def test_fit__holds_one_decoded_time_block_a_task(volume, make_design):
    source = Source(noisy((48, 4, 4, 5)))
    lazy = da.from_array(source, chunks=(6, 2, 4, 5), asarray=False, name=False, meta=np.empty((0,) * 4))
    run = volume(source.values)
    run = run.assign(bold=(("time", *SPACE), lazy))
    gc.disable()
    try:
        for scheduler in ("sync", "threads"):
            cg.fit(run, make_design(48), signal_scaling="run").compute(scheduler=scheduler)
    finally:
        gc.enable()
    assert source.reads == 2 * 2 * 16
    assert source.most == {(0, 0, 0): 1, (2, 0, 0): 1}


def test_fit__blocks_without_mask_are_not_read(volume, make_design):
    source = Source(noisy((48, 4, 4, 5)))
    lazy = da.from_array(source, chunks=(6, 1, 4, 5), asarray=False, name=False, meta=np.empty((0,) * 4))
    mask = np.zeros((4, 4, 5), bool)
    mask[2, 1, 1] = True
    run = volume(source.values, mask).assign(bold=(("time", *SPACE), lazy))
    cg.fit(run, make_design(48)).compute()
    assert set(source.most) == {(2, 0, 0)}


def test_fit__several_results_in_one_computation_read_once(volume, make_design):
    source = Source(noisy((48, 4, 4, 5)))
    lazy = da.from_array(source, chunks=(6, 2, 4, 5), asarray=False, name=False, meta=np.empty((0,) * 4))
    run = volume(source.values).assign(bold=(("time", *SPACE), lazy))
    fit = cg.fit([run, run], [make_design(48), make_design(48, seed=1)])
    result = cg.contrast(fit, "face")
    got = dask.compute(fit, result, cg.fixed_effects(result), fit["mask"].sum(), scheduler="threads")
    assert source.reads == 2 * 16
    assert isinstance(got[2], xr.Dataset)
    np.testing.assert_array_equal(got[1]["effect"][0], got[0]["beta"][0, 0])


def test_fit__works_on_a_cluster(store, two_designs, cluster):
    fit = cg.fit(store, two_designs, signal_scaling="run")
    lazy = cg.fixed_effects(cg.contrast(fit, "SSt - DSp"))
    assert lazy.compute().equals(lazy.compute(scheduler="sync"))
    persisted = store["run-a"].to_dataset().persist()
    with pytest.raises(NotAvailableError, match="before persist"):
        cg.fit(persisted, two_designs["a"])


# ------------------------------------------------------------------------------------- runs, designs, masks, labels


def test_fit__takes_runs_as_dataset_list_mapping_or_tree(two_runs, two_designs):
    a, b = two_runs.values()
    expected = cg.fit(two_runs, two_designs).compute()
    names = ["a", "b"]
    tree = xr.DataTree.from_dict({"run-a": a, "run-b": b})
    lone = cg.fit(a, two_designs["a"])
    assert list(lone["run"].values) == ["1"]
    xr.testing.assert_equal(
        lone["beta"].compute().drop_vars("run"), expected["beta"].isel(run=[0]).drop_vars("run")
    )
    designs = list(two_designs.values())
    for runs, given_designs, labels in [
        ([a, b], designs, ["1", "2"]),
        ((a, b), tuple(designs), ["1", "2"]),
        (tree, two_designs, names),
        (tree, designs, names),
        ({1: a, 2: b}, {1: designs[0], 2: designs[1]}, ["1", "2"]),
        ({"a": a, "b": b}, {"b": designs[1], "a": designs[0]}, names),
        (xr.DataTree(a), designs[0], ["1"]),
        ([a], designs[0], ["1"]),
        (a, [designs[0]], ["1"]),
        (a, {"1": designs[0]}, ["1"]),
        (a, designs[0].to_numpy(), ["1"]),
    ]:
        fit = cg.fit(runs, given_designs)
        assert list(fit["run"].values) == labels
        sigma2 = expected["sigma2"].values[: len(labels)]
        np.testing.assert_allclose(fit["sigma2"], sigma2, rtol=1e-12)
    assert list(fit["regressor"].values) == [f"x{i}" for i in range(designs[0].shape[1])]


def test_fit__reads_designs_from_disk(store, two_designs, tmp_path):
    paths = {}
    for label, design in two_designs.items():
        paths[label] = tmp_path / f"{label}.csv"
        design.to_csv(paths[label], index=False)
    expected = cg.fit(store, two_designs)["sigma2"].compute()
    for designs in (paths, [str(path) for path in paths.values()]):
        np.testing.assert_allclose(cg.fit(store, designs)["sigma2"], expected, rtol=1e-10)


def test_fit__ragged_runs(volume, make_design):
    first, second = volume(noisy((50, 2, 3, 4)), t_r=2.0), volume(noisy((31, 2, 3, 4), seed=1), t_r=0.8)
    full = make_design(50)
    other = make_design(31, names=("cat", "face", "dog"), n_drifts=1)[
        ["dog", "constant", "face", "cat", "drift_1"]
    ]
    fit = cg.fit({"one": first, "two": second}, {"one": full, "two": other})
    assert list(fit["regressor"].values) == ["face", "house", "cat", "drift_1", "drift_2", "constant", "dog"]
    assert fit["column"].values.tolist() == [[0, 1, 2, 3, 4, 5, -1], [2, -1, 3, 4, -1, 1, 0]]
    np.testing.assert_array_equal(fit["frame_time"][1, :31], 0.8 * np.arange(31))
    got = fit.compute()
    for label, run, design in (("one", first, full), ("two", second, other)):
        alone = cg.fit(run, design).compute()
        one = got.sel(run=label)
        for regressor in got["regressor"].values:
            if regressor in design:
                expected = alone["beta"].sel(run="1", regressor=regressor)
                np.testing.assert_allclose(one["beta"].sel(regressor=regressor), expected, rtol=1e-12)
                column = one["design"].sel(regressor=regressor).values
                np.testing.assert_array_equal(column[: len(design)], design[regressor])
                assert np.isnan(column[len(design) :]).all()
            else:
                assert np.isnan(one["beta"].sel(regressor=regressor)).all()
                assert np.isnan(one["design"].sel(regressor=regressor)).all()
        np.testing.assert_array_equal(one["sigma2"], alone["sigma2"][0])
        np.testing.assert_array_equal(one["rho"], alone["rho"][0])
        assert one["dof"] == alone["dof"].item()


def test_fit__runs_may_have_other_chunks(volume, make_design):
    Y = noisy((40, 4, 4, 5))
    one, two = volume(Y).chunk(z=1, time=9), volume(Y).chunk(z=3, x=2)
    fit = cg.fit([one, two], [make_design(40)] * 2).compute()
    np.testing.assert_allclose(fit["beta"][0], fit["beta"][1], rtol=1e-11)


def test_fit__a_mask_for_all_runs(volume, make_design, tmp_path):
    Y = noisy((40, 4, 4, 5))
    mask = np.random.default_rng(5).random((4, 4, 5)) < 0.5
    run, design = volume(Y, np.zeros((4, 4, 5), bool)), make_design(40)
    image = nib.Nifti1Image(mask.T.astype(np.uint8), np.diag([3.0, 3, 3, 1]))
    path = tmp_path / "mask.nii.gz"
    image.to_filename(path)
    labelled = run["mask"].copy(data=mask)
    expected = cg.fit([volume(Y, mask)] * 2, [design] * 2)["sigma2"].compute()
    for given_mask in (
        image,
        path,
        str(path),
        labelled,
        labelled.astype(int),
        labelled.transpose("x", "z", "y"),
    ):
        fit = cg.fit([run, run.drop_vars("mask")], [design] * 2, mask=given_mask)
        assert fit["sigma2"].equals(expected)
        np.testing.assert_array_equal(fit["mask"], [mask, mask])
    with raise_if_computes():
        fit = cg.fit(run, design, mask=labelled.chunk(z=1))
    assert fit["sigma2"].compute().equals(expected.isel(run=[0]))
    with pytest.raises(GridMismatchError, match="voxels"):
        cg.fit(run, design, mask=labelled.isel(z=slice(0, 3)))
    with pytest.raises(GridMismatchError, match="mm apart"):
        cg.fit(run, design, mask=nib.Nifti1Image(mask.T.astype(np.uint8), np.diag([3.1, 3, 3, 1])))
    with pytest.raises(MaskError, match="empty"):
        cg.fit(run, design, mask=labelled.astype(int) * 0)
    with pytest.raises(MaskError, match="dims"):
        cg.fit(run, design, mask=labelled.expand_dims("t"))
    with pytest.raises(MaskError, match="Run 2 has no mask"):
        cg.fit([run, run.drop_vars("mask")], [design] * 2)


def test_fit__data_without_a_grid_is_fitted_too(make_design):
    Y = noisy((40, 1, 1, 30))
    run = xr.Dataset({"bold": (("time", *SPACE), Y), "mask": (SPACE, np.ones((1, 1, 30), bool))})
    fit = cg.fit([run, run], [make_design(40)] * 2)
    assert np.isfinite(fit["sigma2"]).all()
    assert np.isnan(fit["frame_time"]).all()
    with pytest.raises(GridMismatchError, match="Run 2 has"):
        cg.fit([run, run.isel(x=slice(0, 20))], [make_design(40)] * 2)


def test_fit__runs_on_other_grids_are_refused(volume, make_design):
    run, design = volume(noisy()), make_design(50)
    moved = volume(noisy())
    moved = moved.assign_coords(x=moved["x"] + 1.0)
    with pytest.raises(InputError, match="not evenly spaced voxels"):
        cg.fit([run, moved], [design] * 2)
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[0, 3] = 1.0

    moved = volume(noisy()).assign_coords(grids.grid_coords(affine, (3, 4, 5), b""))
    with pytest.raises(GridMismatchError, match="Run b and run a"):
        cg.fit({"a": run, "b": moved}, [design] * 2)
    with pytest.raises(GridMismatchError, match="Run 2"):
        cg.fit([run, run.isel(x=slice(1, None))], [design] * 2)
    cut = run.isel(x=slice(1, None))
    assert np.isfinite(cg.fit([cut, cut], [design] * 2)["sigma2"]).all()


def test_fit__refuses_what_are_no_runs(volume, make_design):
    run, design = volume(noisy()), make_design(50)
    for runs, match in [
        ([], "no run"),
        ({}, "no run"),
        (xr.DataTree(), "no run"),
        ("run.nii.gz", "is a str"),
        ([run["bold"]], "is a DataArray"),
        (3, "of type int"),
        (run["bold"], "of type DataArray"),
        (run.drop_vars("bold"), "needs a variable 'bold'"),
        (run.isel(x=0), "with dims"),
        (run.assign(bold=run["bold"] * 1j), "dtype complex128"),
        (run.assign(bold=run["bold"].astype(object)), "dtype object"),
        (run.assign(mask=run["mask"].isel(x=0, drop=True)), "needs 'mask'"),
    ]:
        with pytest.raises(InputError, match=match):
            cg.fit(runs, design)


def test_fit__refuses_designs_that_do_not_fit(volume, make_design):
    run, design = volume(noisy()), make_design(50)
    for runs, designs, match in [
        ([run, run], design, "1 designs for 2 runs"),
        ([run, run], [design], "1 designs for 2 runs"),
        (run, [design, design], "2 designs for 1 runs"),
        ({"a": run}, {"b": design}, r"labelled \['b'\] and the runs \['a'\]"),
        ({"a": run, "b": run}, {"a": design}, "Every run needs"),
        ({"a": run, "b": run}, [design, make_design(49)], "run 'b' has 49 rows, but the run has 50 volumes"),
        (run, np.random.default_rng(0).standard_normal((50, 50)), "no degrees of freedom"),
        (run, design * 0, "zero in all columns"),
        (run, design.assign(face=np.nan), "run '1' holds nan"),
        (run, xr.DataArray(design), "of type DataArray"),
    ]:
        with pytest.raises(DesignError, match=match):
            cg.fit(runs, designs)
    many = np.column_stack([np.ones(50), *(np.eye(50)[i] for i in range(20))] * 3)
    with pytest.raises(DesignError, match="no degrees of freedom"):
        cg.fit(run, many, compat="nilearn")


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"noise_model": "ar2", "compat": "nilearn"}, InputError, "'ar2' is not there with compat"),
        ({"noise_model": "auto", "compat": "nilearn"}, InputError, "'auto' is not there with compat"),
        ({"noise_model": "ar44"}, DesignError, "order 44 cannot be estimated in run 1"),
        ({"noise_model": "ar"}, InputError, "'ar'"),
        ({"noise_model": "ar01"}, InputError, "'ar01'"),
        ({"noise_model": "ar²"}, InputError, "'ar²'"),
        ({"noise_model": "ar0"}, InputError, "'ar0'"),
        ({"noise_model": "AR1"}, InputError, "accepted are"),
        ({"noise_model": None}, InputError, "accepted are"),
        ({"signal_scaling": 0}, InputError, "accepted are 'voxel', 'run' and None"),
        ({"signal_scaling": False}, InputError, "accepted are"),
        ({"signal_scaling": "none"}, InputError, "accepted are"),
        ({"compat": "spm"}, InputError, "accepted are None and 'nilearn'"),
        ({"compat": True}, InputError, "accepted are"),
    ],
)
def test_fit__refuses_options(volume, make_design, options, kind, match):
    with pytest.raises(kind, match=match):
        cg.fit(volume(noisy()), make_design(50), **options)
