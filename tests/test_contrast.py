"""Contrasts: their numbers, of saved fits, of ragged runs, and what is refused."""

import base64
import json
import pickle
import warnings

import dask
import numpy as np
import pytest
import statsmodels.api as sm
import xarray as xr
from dask.local import get_sync
from scipy import stats

import chunkglm as cg
from chunkglm.contrasts import add_statistics, check_contrast
from chunkglm.errors import ChunkGLMWarning, ContrastError, InputError
from chunkglm.store import open_store
from chunkglm.testing import raise_if_computes, simulate_run

SPACE = ("z", "y", "x")
MAPS = ("effect", "variance", "stat", "p_value", "z_score")


@pytest.fixture(scope="module")
def lazy_fit(two_runs, two_designs):
    runs = {label: run.chunk(time=20, z=3, x=5) for label, run in two_runs.items()}
    return cg.fit(runs, two_designs)


@pytest.fixture(scope="module")
def fit(lazy_fit):
    return lazy_fit.compute()


# -------------------------------------------------------------------------------------------------- the numbers


def test_contrast__ols_equals_statsmodels(two_runs, two_designs):
    fit = cg.fit(two_runs, two_designs, noise_model="ols")
    got = cg.contrast(fit, "DSt - 0.5*SSt").compute()
    for number, (label, run) in enumerate(two_runs.items()):
        X = two_designs[label]
        c = np.array([-0.5, 0, 1] + [0] * (X.shape[1] - 3))
        for place in np.argwhere(run["mask"].values)[::60]:
            y = run["bold"].values[:, *place].astype(float)
            test = sm.OLS(100 * (y / y.mean() - 1), X.to_numpy()).fit().t_test(c)
            one = got.isel(run=number, **dict(zip(SPACE, place, strict=True)))
            np.testing.assert_allclose(one["effect"], test.effect.item(), rtol=1e-9)
            np.testing.assert_allclose(one["variance"], test.sd.item() ** 2, rtol=1e-9)
            np.testing.assert_allclose(one["stat"], test.tvalue.item(), rtol=1e-9)
            assert one["dof"] == test.df_denom
            np.testing.assert_allclose(
                one["p_value"], stats.t.sf(test.tvalue.item(), test.df_denom), rtol=1e-7
            )
            np.testing.assert_allclose(stats.norm.sf(one["z_score"]), one["p_value"], rtol=1e-9)


def test_contrast__ar1_is_the_formula(fit):
    got = cg.contrast(fit, "face" if "face" in fit["regressor"] else "SSt - SSp")
    for number in range(2):
        n = int(fit["n_volumes"][number])
        X = fit["design"].values[number, :n]
        c = np.array([1.0, -1] + [0] * (X.shape[1] - 2))
        one = fit.isel(run=number)
        for place in np.argwhere(np.isfinite(one["sigma2"].values))[::60]:
            rho = one["rho"].values[0, *place]
            W = np.eye(n) - rho * np.eye(n, k=-1)
            unit = c @ np.linalg.inv(X.T @ W.T @ W @ X) @ c
            values = got.isel(run=number, **dict(zip(SPACE, place, strict=True)))
            np.testing.assert_allclose(values["effect"], c @ one["beta"].values[:, *place], rtol=1e-9)
            np.testing.assert_allclose(values["variance"], one["sigma2"].values[*place] * unit, rtol=1e-9)
            np.testing.assert_allclose(
                values["stat"], values["effect"] / np.sqrt(values["variance"]), rtol=1e-12
            )


def test_contrast__has_the_documented_layout(lazy_fit, two_runs, two_designs):
    got = cg.contrast(lazy_fit, "DSt - SSt")
    shape = tuple(lazy_fit["mask"].shape)
    for name in MAPS:
        assert got[name].dims == ("run", *SPACE)
        assert got[name].shape == shape
        assert got[name].dtype == np.float64
        assert got[name].attrs["long_name"]
    assert got["dof"].dims == ("run", *SPACE)
    assert got["estimable"].values.tolist() == [True, True]
    for options in ({"noise_model": "ols"}, {"compat": "nilearn"}):
        plain = cg.contrast(cg.fit(two_runs, two_designs, **options), "DSt - SSt")
        assert plain["dof"].dims == ("run",)
        np.testing.assert_array_equal(plain["dof"], lazy_fit["dof"])
    assert got["weights"].sel(regressor="DSt") == 1
    assert got["weights"].sel(regressor="SSt") == -1
    assert np.abs(got["weights"]).sum() == 2
    for name in ("run", "grid", *SPACE):
        assert got[name].identical(lazy_fit[name])
    assert json.loads(got.attrs["definition"]) == {"": "DSt - SSt"}
    assert (got.attrs["kind"], got.attrs["stat_type"], got.attrs["compat"]) == ("contrast", "t", "none")
    assert all(isinstance(value, str | int | float) for value in got.attrs.values())
    computed = got.compute()
    fitted = np.isfinite(lazy_fit["sigma2"].compute())
    np.testing.assert_array_equal(np.isfinite(computed["dof"]), fitted)
    assert (computed["dof"].where(fitted, 1) <= lazy_fit["dof"]).all()
    for name in MAPS:
        assert computed[name].shape == shape
        assert computed[name].dtype == np.float64


def test_contrast__vectors_and_expressions_are_the_same(fit):
    expected = cg.contrast(fit, "DSt - 0.5*SSt - 0.5*SSp")
    P = fit.sizes["regressor"]
    vector = [-0.5, -0.5, 1.0] + [0.0] * (P - 3)
    for definition in (vector, np.array(vector), np.array([vector]), tuple(vector)):
        got = cg.contrast(fit, definition)
        assert got.drop_attrs().equals(expected.drop_attrs())
    with pytest.warns(ChunkGLMWarning, match=f"has 3 weights, but the design has {P} columns"):
        short = cg.contrast(fit, vector[:3])
    assert short.equals(expected)


def test_contrast__several_are_those_of_one(lazy_fit):
    definitions = {"one": "DSt - SSt", "two": "SSp", "three": np.eye(lazy_fit.sizes["regressor"])[2]}
    got = cg.contrast(lazy_fit, definitions)
    assert got["stat"].dims == ("contrast", "run", *SPACE)
    assert list(got["contrast"].values) == list(definitions)
    assert got["contrast"].dtype == object
    assert got["weights"].dims == ("contrast", "regressor")
    assert {name: got.attrs[name] for name in ("kind", "compat", "stat_type")} == {
        "kind": "contrast",
        "compat": "none",
        "stat_type": "t",
    }
    assert list(json.loads(got.attrs["definition"])) == sorted(definitions)
    got = got.compute()
    for name, definition in definitions.items():
        one = cg.contrast(lazy_fit, definition).compute()
        assert got.sel(contrast=name, drop=True).equals(one)
    fixed = cg.fixed_effects(got)
    assert fixed["stat"].dims == ("contrast", *SPACE)
    for name, definition in definitions.items():
        one = cg.fixed_effects(cg.contrast(lazy_fit, definition)).compute()
        for key in (*MAPS, "dof", "n_runs"):
            np.testing.assert_array_equal(fixed[key].sel(contrast=name), one[key])
        np.testing.assert_array_equal(fixed["weights"].sel(contrast=name), one["weights"])


def test_contrast__the_reference_clips_z_and_the_default_does_not(volume, make_design):
    rng = np.random.default_rng(0)
    design = make_design(400)
    Y = 1000 + 300 * design["face"].to_numpy()[:, None, None, None] + rng.standard_normal((400, 1, 1, 40))
    default, reference = (
        cg.contrast(cg.fit(volume(Y), design, noise_model="ols", compat=compat), "face")
        for compat in (None, "nilearn")
    )
    np.testing.assert_allclose(default["stat"], reference["stat"], rtol=1e-9)
    assert (default["stat"] > 100).all()
    assert (reference["z_score"] < 37.1).all()
    assert (default["z_score"] > 37.1).all()
    assert np.isfinite(default["z_score"]).all()
    assert np.isfinite(cg.contrast(cg.fit(volume(Y), design, noise_model="ols"), "-face")["z_score"]).all()


def test_add_statistics__variances_that_are_next_to_nothing():
    ds = xr.Dataset(
        {
            "effect": ("v", [1e-30, 1.0, 1.0, 1.0], {"units": "%"}),
            "variance": ("v", [1e-60, 0.0, -1.0, np.nan]),
            "dof": 10,
        }
    )
    default, reference = (add_statistics(ds.assign_attrs(compat=compat)) for compat in ("none", "nilearn"))
    np.testing.assert_allclose(default["stat"], [1.0, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(reference["stat"], [1e-5, 1e25, 1e25, np.nan])
    assert "units" not in default["stat"].attrs
    assert default["effect"].attrs["units"] == "%"


# ----------------------------------------------------------------------------------------------- simulated truth


def null_t(n, v, rho, design, seed=0, **options):
    """Statistics of noise that holds no effect."""
    rng = np.random.default_rng(seed)
    e = rng.standard_normal((n, v)) * np.sqrt(1 - rho**2)
    e[0] /= np.sqrt(1 - rho**2)
    for t in range(1, n):
        e[t] += rho * e[t - 1]
    bold = (1000 + 10 * e).reshape(n, 1, 1, v)
    space = {"bold": (("time", *SPACE), bold), "mask": (SPACE, np.ones((1, 1, v), bool))}
    fit = cg.fit(xr.Dataset(space), design, **options).compute()
    return cg.contrast(fit, "face - house"), fit


@pytest.mark.parametrize(("noise_model", "rho"), [("ols", 0.0), ("ar1", 0.0), ("ar1", 0.4)])
def test_contrast__t_distribution_under_the_null(noise_model, rho, make_design):
    n, v = 150, 6000
    got, _ = null_t(n, v, rho, make_design(n), noise_model=noise_model)
    assert (got["dof"] <= n - 6).all()
    assert (got["dof"] == n - 6).all() == (noise_model == "ols")
    p = got["p_value"].values.ravel()
    assert np.abs(got["stat"].mean()) < 0.05
    for level in (0.05, 0.01):
        rate = (p < level).mean()
        # Four standard errors, and for AR(1) what the approximation of the degrees of freedom leaves.
        allowed = 4 * np.sqrt(level / v) + (0.1 * level if noise_model == "ar1" else 0)
        assert abs(rate - level) < allowed, (level, rate)
    if noise_model == "ols":
        assert stats.kstest(got["stat"].values.ravel(), stats.t(n - 6).cdf).pvalue > 1e-3
    # OLS does not know of the autocorrelation, so that this test can fail.
    if rho:
        wrong, _ = null_t(n, v, 0.6, make_design(n), noise_model="ols")
        assert (wrong["p_value"] < 0.05).mean() > 0.1


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.3, 0.6])
def test_fit__recovers_the_coefficient_and_the_innovations(rho, make_design):
    n = 300
    _, fit = null_t(n, 2000, rho, make_design(n))
    # Yule-Walker on residuals is biased by about (regressors / volumes).
    assert abs(float(fit["rho"].mean()) - rho) < 2.5 * 6 / n
    np.testing.assert_allclose(fit["sigma2"].mean(), (1 - rho**2), rtol=0.02)


def test_contrast__effects_of_a_simulated_recording_are_unbiased():
    """Effects and their errors over sessions of one brain agree with the truth and with the variance."""
    runs = [simulate_run(shape=(11, 12, 10), n_volumes=200, seed=2, session=session) for session in range(6)]
    truth = runs[0]["true_effect"].sel(condition="DSt") - runs[0]["true_effect"].sel(condition="SSt")
    fit = cg.fit(runs, [run["design"].to_pandas() for run in runs])
    got = cg.contrast(fit, "DSt - SSt").compute()
    inside = runs[0]["mask"].values
    error = (got["effect"] - truth).values[:, inside]
    se = np.sqrt(got["variance"].values[:, inside])
    assert truth.values[inside].max() > 0.3
    z = error / se
    assert abs(z.mean()) < 0.05
    # More than 1 by the degrees of freedom, and by the bias of the coefficient, which is left in.
    assert 0.97 < z.std() < 1.15
    assert np.isnan(got["effect"].values[:, ~inside]).all()
    slope = np.polyfit(truth.values[inside], got["effect"].mean("run").values[inside], 1)[0]
    assert abs(slope - 1) < 0.08


# ------------------------------------------------------------------------------------- saved, opened, cut, carried


def only_small(limit=50_000):
    """A scheduler that refuses to compute maps."""

    def get(graph, keys, **kwargs):
        results = get_sync(graph, keys, **kwargs)

        def size(value):
            return sum(map(size, value)) if isinstance(value, list | tuple) else getattr(value, "nbytes", 0)

        if size(results) > limit:
            raise AssertionError(f"{size(results)} bytes were computed")
        return results

    return dask.config.set(scheduler=get)


def test_contrast__of_a_saved_fit_is_equal_to_the_last_bit_and_needs_no_signal(lazy_fit, tmp_path):
    cg.save(lazy_fit, tmp_path / "fit.zarr")
    opened = open_store(tmp_path / "fit.zarr")
    assert opened["beta"].nbytes > 50_000
    with only_small():
        result = cg.contrast(opened, {"a": "DSt - SSt", "b": "SSp"})
        fixed = cg.fixed_effects(result)
        for ds in (result, fixed):
            for name in MAPS:
                assert ds[name].chunks is not None
    with only_small(), pytest.raises(AssertionError, match="bytes were computed"):
        opened["beta"].compute()
    expected = cg.contrast(lazy_fit, {"a": "DSt - SSt", "b": "SSp"})
    assert result.compute().equals(expected.compute())
    assert fixed.compute().equals(cg.fixed_effects(expected).compute())
    # Plain xarray opens and saves it as well, and contrasts are saved like fits.
    plain = xr.open_zarr(tmp_path / "fit.zarr", consolidated=False)
    assert cg.contrast(plain, "SSp")["z_score"].equals(expected["z_score"].sel(contrast="b", drop=True))
    cg.save(result, tmp_path / "contrast.zarr")
    cg.verify(tmp_path / "contrast.zarr")
    reopened = open_store(tmp_path / "contrast.zarr")
    assert reopened.attrs["definition"] == result.attrs["definition"]
    with only_small():
        again = cg.fixed_effects(reopened)
    assert again.compute().equals(fixed.compute())
    cg.save(fixed, tmp_path / "fixed.zarr")
    assert open_store(tmp_path / "fixed.zarr").attrs["combined"] == ["a", "b"]


def test_contrast__a_fit_in_memory_stays_in_memory(fit):
    with raise_if_computes():
        got = cg.contrast(fit, "DSt - SSt")
        fixed = cg.fixed_effects(got)
    for ds in (got, fixed):
        assert all(isinstance(variable.data, np.ndarray) for variable in ds.data_vars.values())


def test_contrast__lazy_results_are_picklable(lazy_fit):
    expected = cg.fixed_effects(cg.contrast(lazy_fit, "DSt - SSt"))
    got = pickle.loads(pickle.dumps(expected))
    assert got["stat"].chunks == expected["stat"].chunks
    assert got.equals(expected)


def test_contrast__names_of_tasks_are_those_of_the_content(lazy_fit):
    first, again, other = (cg.contrast(lazy_fit, definition) for definition in ("SSt", "SSt", "SSp"))
    assert first["stat"].data.name == again["stat"].data.name
    assert first["stat"].data.name != other["stat"].data.name


def test_contrast__of_some_runs_and_voxels(lazy_fit, fit):
    expected = cg.contrast(fit, "DSt - SSt")
    for cut in (
        {"run": [1]},
        {"run": slice(0, 1)},
        {"z": slice(2, 5), "x": slice(None, None, -1)},
        {"run": 1},
        {"z": 4},
        {"z": 4, "y": 5, "x": 4},
        {"run": 0, "z": 4, "y": 5, "x": 4},
    ):
        keeps_run = {
            dim: [index] if (dim, index) in (("run", 0), ("run", 1)) else index for dim, index in cut.items()
        }
        part = expected.isel(keeps_run)
        for one in (lazy_fit, fit):
            got = cg.contrast(one.isel(cut), "DSt - SSt")
            for name in (*MAPS, "dof"):
                xr.testing.assert_allclose(got[name], part[name], rtol=1e-11)
    got = cg.contrast(lazy_fit.sel(run="b", z=fit["z"][3]), "DSt - SSt")
    xr.testing.assert_allclose(got["stat"], expected["stat"].sel(run=["b"]).isel(z=3), rtol=1e-11)
    stacked = cg.contrast(fit.stack(voxel=SPACE), "DSt - SSt")
    np.testing.assert_allclose(stacked["stat"], expected["stat"].values.reshape(2, -1), rtol=1e-11)
    turned = cg.contrast(lazy_fit.transpose("x", "regressor", "run", ...), "DSt - SSt")
    xr.testing.assert_allclose(turned["stat"].transpose("run", *SPACE), expected["stat"], rtol=1e-11)


def test_contrast__of_runs_that_were_put_together(two_runs, two_designs, fit):
    apart = [cg.fit({label: run}, {label: two_designs[label]}) for label, run in two_runs.items()]
    joined = xr.concat(apart, dim="run", join="outer", data_vars="all", coords="minimal", compat="override")
    got = cg.contrast(joined, "DSt - SSt")
    expected = cg.contrast(fit, "DSt - SSt")
    np.testing.assert_allclose(got["stat"], expected["stat"], rtol=1e-9)
    np.testing.assert_allclose(got["dof"], expected["dof"], rtol=1e-9)


def test_to_nifti__of_results_has_the_affine_of_the_run(two_runs, lazy_fit, tmp_path):
    affine = np.array(two_runs["a"].attrs["affine"])
    result = cg.contrast(lazy_fit, {"a": "DSt - SSt"})
    fixed = cg.fixed_effects(result)
    header = base64.b64decode(lazy_fit["grid"].attrs["header"])
    assert header == b""
    for array in (
        fixed["stat"].sel(contrast="a"),
        result["z_score"].isel(contrast=0, run=1),
        fixed["n_runs"][0],
    ):
        image = cg.to_nifti(array, tmp_path / "map.nii.gz", overwrite=True)
        np.testing.assert_allclose(image.affine, affine, atol=1e-5)
        np.testing.assert_array_equal(image.get_fdata(), array.transpose("x", "y", "z").values)
    cut = cg.to_nifti(fixed["stat"][0].isel(x=slice(2, None), z=slice(3, 5)))
    np.testing.assert_allclose(cut.affine[:3, 3], (affine @ [2, 0, 3, 1])[:3], atol=1e-5)


# ---------------------------------------------------------------------------------------------------- ragged runs


@pytest.fixture(scope="module")
def ragged(volume, make_design):
    """Three runs: the second lacks the house, the third has its columns in another order."""
    rng = np.random.default_rng(7)
    designs = [
        make_design(50),
        make_design(40, names=("face", "cat"), seed=1),
        make_design(45, seed=2)[["constant", "cat", "house", "face", "drift_2", "drift_1"]],
    ]
    runs = [volume(500 + rng.standard_normal((len(design), 2, 3, 4)).cumsum(axis=0)) for design in designs]
    return cg.fit(runs, designs), runs, designs


def test_ragged__a_run_without_the_condition_is_nan_named_and_left_out(ragged):
    fit, runs, designs = ragged
    with (
        raise_if_computes(),
        pytest.warns(ChunkGLMWarning, match="'face - house' cannot be estimated in run 2,") as seen,
    ):
        got = cg.contrast(fit, "face - house")
    assert seen[0].filename == __file__
    assert got["estimable"].values.tolist() == [True, False, True]
    for name in (*MAPS, "dof"):
        assert np.isnan(got[name][1]).all()
        assert np.isfinite(got[name][[0, 2]]).all()
    with pytest.warns(ChunkGLMWarning, match="Left out of the fixed effects.*run 2.") as seen:
        fixed = cg.fixed_effects(got)
    assert seen[0].filename == __file__
    assert (fixed["n_runs"] == 2).all()
    np.testing.assert_allclose(fixed["dof"], got["dof"][[0, 2]].sum("run"))
    assert fixed.attrs["combined"] == ["1", "3"]
    pair = cg.fit([runs[0], runs[2]], [designs[0], designs[2]])
    expected = cg.fixed_effects(cg.contrast(pair, "face - house"))
    for name in (*MAPS, "dof"):
        np.testing.assert_array_equal(fixed[name], expected[name])
    # A contrast that all runs have is not touched by what a run lacks.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_three = cg.contrast(fit, "face - cat")
    for number, (run, design) in enumerate(zip(runs, designs, strict=True)):
        alone = cg.contrast(cg.fit(run, design), "face - cat")
        for name in MAPS:
            np.testing.assert_allclose(all_three[name][number], alone[name][0], rtol=1e-10)


def test_ragged__saved_and_opened_again(ragged, tmp_path):
    fit, *_ = ragged
    cg.save(fit, tmp_path / "fit.zarr")
    with only_small(), pytest.warns(ChunkGLMWarning, match="cannot be estimated in run 2,"):
        got = cg.contrast(open_store(tmp_path / "fit.zarr"), "face - house")
    with pytest.warns(ChunkGLMWarning):
        expected = cg.contrast(fit, "face - house").compute()
    assert got.compute().equals(expected)
    cg.save(got, tmp_path / "contrast.zarr")
    with only_small(), pytest.warns(ChunkGLMWarning, match="Left out of the fixed effects.*run 2."):
        cg.fixed_effects(open_store(tmp_path / "contrast.zarr"))


def test_ragged__several_contrasts_say_which_lacks_which_run(ragged):
    fit, *_ = ragged
    with pytest.warns(ChunkGLMWarning, match="'second' cannot be estimated in run 2") as seen:
        got = cg.contrast(fit, {"first": "face", "second": "house"})
    assert seen[0].filename == __file__
    with pytest.warns(ChunkGLMWarning, match="run 2"):
        fixed = cg.fixed_effects(got)
    np.testing.assert_array_equal(fixed["n_runs"][:, 0, 0, 0], [3, 2])
    np.testing.assert_allclose(fixed["dof"], got["dof"].sum("run"))
    assert fixed.attrs["combined"] == ["1", "2", "3"]


def test_ragged__a_column_that_the_run_cannot_estimate_is_missing_there(volume, make_design):
    rng = np.random.default_rng(8)
    runs = [volume(500 + rng.standard_normal((40, 1, 2, 3)).cumsum(axis=0)) for _ in range(3)]
    designs = [make_design(40, seed=seed) for seed in range(3)]
    designs[1]["house"] = 0.0
    designs[2]["house"] = designs[2]["face"]
    with pytest.warns(ChunkGLMWarning, match="some are redundant"):
        fit = cg.fit(runs, designs)
    with pytest.warns(ChunkGLMWarning, match="in run 2, 3,"):
        got = cg.contrast(fit, "face - house")
    np.testing.assert_array_equal(np.isnan(got["stat"]).all(SPACE), [False, True, True])
    with pytest.warns(ChunkGLMWarning, match="in run 2,"):
        both = cg.contrast(fit, "face + house")
    # In run 3 the data tell the sum of the two.
    alone = cg.contrast(cg.fit(runs[2], designs[2].drop(columns="house")), "2*face")
    np.testing.assert_allclose(both["stat"][2], alone["stat"][0] * np.sign(1), rtol=1e-9)


def test_ragged__weights_by_position_are_refused_where_positions_differ(ragged, volume, make_design):
    fit, *_ = ragged
    with pytest.raises(ContrastError, match=r"given by position.*'face'.*Give an expression over names"):
        cg.contrast(fit, [1, -1, 0, 0, 0, 0])
    run, design = volume(500 + np.random.default_rng(0).standard_normal((40, 1, 2, 3))), make_design(40)
    swapped = cg.fit([run, run], [design, design[["house", "face", "cat", "drift_1", "drift_2", "constant"]]])
    vector = [1, -1, 0, 0, 0, 0]
    for one in (swapped, swapped.compute(), swapped.isel(z=[0])):
        with pytest.raises(ContrastError, match="by position"):
            cg.contrast(one, vector)
    named = cg.contrast(swapped, "face - house")
    np.testing.assert_allclose(named["stat"][0], named["stat"][1], rtol=1e-9)
    assert np.isfinite(cg.contrast(swapped.isel(run=[0]), vector)["stat"]).all()
    tail = cg.fit([run, run], [design, design[["face", "house", "cat", "drift_2", "drift_1", "constant"]]])
    with pytest.warns(ChunkGLMWarning, match="get weight 0"):
        got = cg.contrast(tail, [1, -1, 0])
    np.testing.assert_allclose(got["stat"], cg.contrast(tail, "face - house")["stat"])


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("definition", "kind", "match"),
    [
        ("nose - house", ContrastError, "names 'nose', which is no column"),
        ("a * b", ContrastError, "no column"),
        ("SSt - SSt", ContrastError, "no weight left|no weight other than zero"),
        ("", ContrastError, "is empty"),
        ([0, 0, 0, 0, 0, 0], ContrastError, "only weights of 0"),
        ([1] * 40, ContrastError, "40 weights, but the design has 6 columns"),
        ([1, np.nan], ContrastError, "not finite"),
        (None, ContrastError, "of type NoneType"),
        (3.0, ContrastError, "of type float"),
        ([[1, -1], [1]], ContrastError, "no vector"),
        ({}, ContrastError, "no contrast in the mapping"),
        ({"a": "SSt", "b": "nose"}, ContrastError, "nose"),
        (["SSt - SSp", "nose"], ContrastError, "'nose'"),
        ({"f": np.eye(6)[:2], "t": "SSt"}, InputError, "'f' has several rows and other contrasts have one"),
        ({"f": {}}, ContrastError, "has no rows"),
    ],
)
def test_contrast__refuses_definitions(fit, definition, kind, match):
    with pytest.raises(kind, match=match):
        cg.contrast(fit, definition)


def test_contrast__refuses_what_no_run_can_estimate(volume, make_design):
    run = volume(500 + np.random.default_rng(0).standard_normal((40, 1, 2, 3)))
    design = make_design(40).assign(twice=lambda d: 2 * d["face"], none=0.0)
    with pytest.warns(ChunkGLMWarning, match="redundant"):
        fit = cg.fit(run, design)
    for definition in ("face - 2*twice", "face", "none", [1, -1, 0, 0, 0, 0, 0, 0]):
        with pytest.raises(ContrastError, match="cannot be estimated in any run"):
            cg.contrast(fit, definition)
    assert np.isfinite(cg.contrast(fit, "face + 2*twice")["stat"]).all()


def test_check_contrast__refuses_before_the_fit_what_the_contrast_would(make_design):
    designs = [make_design(40), make_design(30, names=("face", "cat"))]
    kept = [np.ones(len(design), dtype=bool) for design in designs]
    for definition in ("face - house", "face", [1, 0, 0, 0, 0, 0], ["face", "house"]):
        check_contrast(definition, designs, kept, "name")
    for definition, kind, match in [
        ("nose", ContrastError, "nose"),
        ([1, -1, 0, 0, 0, 0], ContrastError, "by position"),
        (np.eye(6)[:2], ContrastError, "by position"),
    ]:
        with pytest.raises(kind, match=match):
            check_contrast(definition, designs, kept, "name")
    with pytest.raises(ContrastError, match="'name' cannot be estimated in any run"):
        check_contrast("house", [designs[0].assign(house=0.0), designs[1]], kept, "name")
    only = designs[0].assign(house=(np.arange(40) == 7).astype(float))
    check_contrast("house", [only], kept[:1], "name")
    with pytest.raises(ContrastError, match="'name' cannot be estimated in any run"):
        check_contrast("house", [only], [np.arange(40) != 7], "name")


def test_contrast__refuses_options_and_what_is_no_fit(fit, two_runs):
    with pytest.raises(InputError, match="several rows, which only an F contrast"):
        cg.contrast(fit, ["SSt", "SSp"], stat_type="t")
    with pytest.raises(InputError, match="accepted are 't' and 'F'"):
        cg.contrast(fit, "SSt", stat_type="z")
    assert cg.contrast(fit, "SSt", stat_type="t").equals(cg.contrast(fit, "SSt"))
    for wrong, match in [
        (two_runs["a"], "A contrast needs a variable"),
        (fit.drop_vars("sigma2"), "needs a variable 'sigma2'"),
        (fit.drop_vars("design"), "needs a variable 'design'"),
        (fit.isel(regressor=0), "needs 'design'|needs 'beta'"),
        (fit.assign(beta=fit["beta"].isel(x=0, drop=True)), "needs 'beta'"),
        (fit.assign(rho=fit["rho"].isel(x=0, drop=True)), "needs 'rho'"),
    ]:
        with pytest.raises(InputError, match=match):
            cg.contrast(wrong, "SSt")
