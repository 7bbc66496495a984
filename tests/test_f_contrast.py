"""F contrasts: in each run, over runs, and under the reference's definition."""

import json
import warnings

import numpy as np
import pytest
import statsmodels.api as sm
import xarray as xr
from nilearn.glm.contrasts import compute_contrast, compute_fixed_effect_contrast
from nilearn.glm.first_level import run_glm
from scipy import stats

import chunkglm as cg
from chunkglm.errors import ChunkGLMWarning, InputError
from chunkglm.kernels.combine import add_rows, combined_rows, f_statistic
from chunkglm.testing import raise_if_computes

SPACE = ("z", "y", "x")
MAPS = ("effect", "covariance", "stat", "p_value", "z_score", "dof")
PAIRS = ["SSt - SSp", "DSt - DSp"]


@pytest.fixture(scope="module")
def lazy_fit(two_runs, two_designs):
    return cg.fit(two_runs, two_designs)


@pytest.fixture(scope="module")
def fit(lazy_fit):
    return lazy_fit.compute()


def scaled(run):
    Y = run["bold"].values.astype(float)[:, run["mask"].values]
    return 100 * (Y / Y.mean(axis=0) - 1)


# -------------------------------------------------------------------------------------------------- in each run


def test_f__ols_equals_statsmodels(two_runs, two_designs):
    got = cg.contrast(cg.fit(two_runs, two_designs, noise_model="ols"), PAIRS).compute()
    for number, label in enumerate("ab"):
        X, mask = two_designs[label], two_runs[label]["mask"].values
        M = np.zeros((2, X.shape[1]))
        for row, (one, other) in enumerate([("SSt", "SSp"), ("DSt", "DSp")]):
            M[row, X.columns.get_loc(one)], M[row, X.columns.get_loc(other)] = 1, -1
        Y = scaled(two_runs[label])
        assert got["dof"][number] == len(X) - X.shape[1]
        for v in range(0, Y.shape[1], 17):
            test = sm.OLS(Y[:, v], X.to_numpy()).fit().f_test(M)
            one = {name: got[name][number].values[..., mask][..., v] for name in MAPS[:-1]}
            np.testing.assert_allclose(one["stat"], test.fvalue, rtol=1e-9)
            np.testing.assert_allclose(one["p_value"], test.pvalue, rtol=1e-7)
            np.testing.assert_allclose(one["z_score"], stats.norm.isf(test.pvalue), rtol=1e-7, atol=1e-9)


def test_f__is_the_formula_at_the_coefficients_of_the_fit(fit):
    got = cg.contrast(fit, PAIRS)
    for number in range(2):
        n = int(fit["n_volumes"][number])
        X = fit["design"][number, :n].values
        M = got["weights"].values
        for z, y, x in np.argwhere(fit["mask"][number].values)[::29]:
            voxel = {"z": z, "y": y, "x": x, "run": number}
            W = np.eye(n) - fit["rho"].isel(voxel).item() * np.eye(n, k=-1)
            C = M @ np.linalg.inv(X.T @ W.T @ W @ X) @ M.T * fit["sigma2"].isel(voxel).item()
            e = M @ fit["beta"].isel(voxel).values
            np.testing.assert_allclose(got["effect"].isel(voxel), e, rtol=1e-10)
            np.testing.assert_allclose(got["covariance"].isel(voxel), C, rtol=1e-8, atol=1e-12)
            F = e @ np.linalg.solve(C, e) / 2
            np.testing.assert_allclose(got["stat"].isel(voxel), F, rtol=1e-8)
            np.testing.assert_allclose(
                got["p_value"].isel(voxel), stats.f.sf(F, 2, got["dof"].isel(voxel)), rtol=1e-7, atol=1e-300
            )


def test_f__has_the_documented_layout(lazy_fit):
    with raise_if_computes():
        got = cg.contrast(lazy_fit, PAIRS)
    assert got["effect"].dims == ("run", "row", *SPACE)
    assert got["covariance"].dims == ("run", "row", "row_", *SPACE)
    assert "variance" not in got
    for name in ("stat", "p_value", "z_score", "dof"):
        assert got[name].dims == ("run", *SPACE)
        assert got[name].dtype == np.float64
        assert got[name].attrs["long_name"]
    assert got["stat"].attrs["long_name"] == "F statistic"
    assert got["n_rows"].item() == 2
    assert got["row"].values.tolist() == got["row_"].values.tolist() == [1, 2]
    assert got["row_name"].values.tolist() == PAIRS
    assert got["weights"].dims == ("row", "regressor")
    assert (got.attrs["kind"], got.attrs["stat_type"]) == ("contrast", "F")
    assert json.loads(got.attrs["definition"]) == {"": PAIRS}
    for name in ("run", "grid", *SPACE):
        assert got[name].identical(lazy_fit[name])


@pytest.mark.parametrize("options", [{}, {"noise_model": "ols"}, {"noise_model": "ar2"}])
def test_f__of_one_row_is_t_squared(options, two_runs, two_designs):
    fit = cg.fit(two_runs, two_designs, **options).compute()
    t, F = cg.contrast(fit, "DSt - SSt"), cg.contrast(fit, "DSt - SSt", stat_type="F")
    np.testing.assert_allclose(F["stat"], t["stat"] ** 2, rtol=1e-9)
    np.testing.assert_allclose(F["effect"].isel(row=0), t["effect"])
    np.testing.assert_allclose(F["covariance"].isel(row=0, row_=0), t["variance"])
    np.testing.assert_array_equal(F["dof"], t["dof"])
    two_sided = 2 * t["p_value"].where(t["stat"] > 0, 1 - t["p_value"])
    np.testing.assert_allclose(F["p_value"], two_sided, rtol=1e-9, atol=1e-14)


def test_f__belongs_to_the_space_of_its_rows(fit):
    expected = cg.contrast(fit, PAIRS)
    mixed = cg.contrast(fit, {"f": {"sum": "SSt - SSp + DSt - DSp", "other": "1e6*DSt - 1e6*DSp"}}).isel(
        contrast=0
    )
    assert mixed["row_name"].values.tolist() == ["sum", "other"]
    for name in ("stat", "z_score", "dof"):
        np.testing.assert_allclose(mixed[name], expected[name], rtol=1e-7)
    weights = expected["weights"].values
    np.testing.assert_array_equal(cg.contrast(fit, weights)["stat"], expected["stat"])
    np.testing.assert_array_equal(cg.contrast(fit, weights[::-1])["n_rows"], 2)


def test_f__redundant_rows_change_nothing_and_are_told(fit):
    three = ["SSt - SSp", "SSp - DSt", "SSt - DSt"]
    with pytest.warns(ChunkGLMWarning, match="follow from others and change nothing: 'SSt - DSt'") as seen:
        got = cg.contrast(fit, three)
    assert len(seen) == 1
    assert got["n_rows"] == 2
    expected = cg.contrast(fit, three[:2])
    for name in MAPS:
        np.testing.assert_array_equal(got[name], expected[name])
    with pytest.warns(ChunkGLMWarning, match="follow from others"):
        alone = cg.contrast(fit, ["SSt", "2*SSt"])
    assert alone.attrs["stat_type"] == "F"
    assert alone["n_rows"] == 1


def test_f__several_contrasts_of_several_rows(lazy_fit, tmp_path):
    definitions = {"pairs": PAIRS, "all": ["SSt", "SSp", "DSt", "DSp"], "one": "SSt"}
    got = cg.contrast(lazy_fit, definitions, stat_type="F")
    assert got["effect"].dims[:3] == ("contrast", "run", "row")
    assert got["n_rows"].values.tolist() == [2, 4, 1]
    assert got["row_name"].values.tolist() == [[*PAIRS, "", ""], definitions["all"], ["SSt", "", "", ""]]
    fixed = cg.fixed_effects(got).compute()
    assert fixed["effect"].dims == ("contrast", "row", *SPACE)
    assert fixed["covariance"].dims == ("contrast", "row", "row_", *SPACE)
    computed = got.compute()
    for number, (name, definition) in enumerate(definitions.items()):
        alone = cg.contrast(lazy_fit, definition, stat_type="F")
        q = int(alone["n_rows"])
        for whole, one in ((computed, alone.compute()), (fixed, cg.fixed_effects(alone).compute())):
            for key in ("stat", "p_value", "z_score", "dof"):
                np.testing.assert_array_equal(whole[key].sel(contrast=name), one[key])
            np.testing.assert_array_equal(whole["effect"][number].isel(row=slice(q)), one["effect"])
            assert np.isnan(whole["effect"][number].isel(row=slice(q, None))).all()
            assert np.isnan(whole["covariance"][number].isel(row=slice(q, None))).all()
    cg.save(got, tmp_path / "f.zarr")
    again = cg.open_store(tmp_path / "f.zarr")
    np.testing.assert_array_equal(cg.fixed_effects(again)["stat"], fixed["stat"])


def test_f__chunks_do_not_matter(two_runs, two_designs):
    whole = cg.fixed_effects(cg.contrast(cg.fit(two_runs, two_designs), PAIRS), precision_weighted=True)
    cut = {label: run.chunk({"z": 2, "y": 3, "x": 4, "time": 7}) for label, run in two_runs.items()}
    parts = cg.fixed_effects(cg.contrast(cg.fit(cut, two_designs), PAIRS), precision_weighted=True)
    for name in (*MAPS, "n_runs"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-9, atol=1e-12)


def test_f__distribution_under_the_null(make_design):
    """In noise of known autocorrelation the rates are those of F on the degrees of freedom that are told."""
    n, v, rho = 160, 8000, 0.4
    rng = np.random.default_rng(4)
    e = rng.standard_normal((n, v))
    for t in range(1, n):
        e[t] += rho * e[t - 1]
    space = {
        "bold": (("time", *SPACE), (1000 + 10 * e).reshape(n, 1, 1, v)),
        "mask": (SPACE, np.ones((1, 1, v), bool)),
    }
    got = cg.contrast(cg.fit(xr.Dataset(space), make_design(n)), ["face", "house", "cat"]).compute()
    for level in (0.05, 0.01):
        assert abs(float((got["p_value"] < level).mean()) - level) < 4 * np.sqrt(level / v) + 0.1 * level
    assert abs(got["z_score"].mean()) < 0.06
    assert abs(got["z_score"].std() - 1) < 0.05


# ------------------------------------------------------------------------------------------------------ over runs


def estimates(q=3, runs=4, shape=(5, 6), seed=0):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((runs, q, q + 2, *shape))
    ds = xr.Dataset(
        {
            "effect": (("run", "row", "v", "w"), rng.standard_normal((runs, q, *shape))),
            "covariance": (("run", "row", "row_", "v", "w"), np.einsum("rik...,rjk...->rij...", A, A)),
            "dof": ("run", np.array([50.0, 60, 70, 45])[:runs]),
        }
    )
    return ds.assign_coords(run=list("abcd"[:runs]))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("precision_weighted", [False, True])
def test_fixed_effects__of_rows_are_the_formulas(precision_weighted, lazy):
    ds = estimates()
    given = ds.chunk({"v": 2, "run": 1}).assign(dof=ds["dof"]) if lazy else ds
    with raise_if_computes():
        got = cg.fixed_effects(given, precision_weighted=precision_weighted)
    e, V = ds["effect"].values, ds["covariance"].values
    for v, w in np.ndindex(5, 6):
        if precision_weighted:
            P = [np.linalg.inv(V[r, :, :, v, w]) for r in range(4)]
            C = np.linalg.inv(sum(P))
            effect = C @ sum(P[r] @ e[r, :, v, w] for r in range(4))
        else:
            C, effect = V[..., v, w].sum(axis=0) / 16, e[..., v, w].mean(axis=0)
        one = got.isel(v=v, w=w)
        np.testing.assert_allclose(one["effect"], effect, rtol=1e-9)
        np.testing.assert_allclose(one["covariance"], C, rtol=1e-9, atol=1e-12)
        F = effect @ np.linalg.solve(C, effect) / 3
        np.testing.assert_allclose(one["stat"], F, rtol=1e-9)
        np.testing.assert_allclose(one["p_value"], stats.f.sf(F, 3, 225), rtol=1e-9)
    assert (got["dof"] == 225).all()
    assert (got["n_runs"] == 4).all()


@pytest.mark.parametrize("precision_weighted", [False, True])
def test_fixed_effects__of_rows_leave_out_runs_that_are_nan(precision_weighted):
    ds = estimates()
    ds["effect"][0, 1, 2, 3] = np.nan
    ds["covariance"][1, 0, 0, 1, 1] = np.inf
    ds["effect"][:, :, 4, 4] = np.nan
    got = cg.fixed_effects(ds, precision_weighted=precision_weighted)
    for place, without in (((2, 3), "a"), ((1, 1), "b")):
        v, w = place
        expected = cg.fixed_effects(ds.drop_sel(run=without), precision_weighted=precision_weighted).isel(
            v=v, w=w
        )
        for name in ("effect", "covariance", "stat", "dof", "n_runs"):
            np.testing.assert_allclose(got[name].isel(v=v, w=w), expected[name])
    assert got["n_runs"][4, 4] == 0
    assert all(
        np.isnan(got[name].isel(v=4, w=4)).all()
        for name in ("effect", "covariance", "stat", "z_score", "dof")
    )
    assert np.isfinite(got["stat"]).sum() == 29


@pytest.mark.parametrize("precision_weighted", [False, True])
def test_fixed_effects__of_one_row_are_those_of_t(precision_weighted, fit):
    options = {"precision_weighted": precision_weighted}
    t = cg.fixed_effects(cg.contrast(fit, "DSt - SSt"), **options)
    F = cg.fixed_effects(cg.contrast(fit, "DSt - SSt", stat_type="F"), **options)
    np.testing.assert_allclose(F["stat"], t["stat"] ** 2, rtol=1e-9)
    np.testing.assert_allclose(F["dof"], t["dof"])
    assert F.attrs["stat_type"] == "F"


def test_fixed_effects__of_a_run_given_twice_halve_the_covariance(fit):
    """Two identical halves of the information: the effect of either, half its covariance, twice its degrees of freedom."""
    one = cg.contrast(fit.isel(run=[0]), PAIRS)
    twice = xr.concat(
        [one, one.assign_coords(run=["again"])],
        dim="run",
        data_vars="minimal",
        coords="minimal",
        compat="override",
    )
    single = one.isel(run=0)
    for precision_weighted in (False, True):
        got = cg.fixed_effects(twice, precision_weighted=precision_weighted)
        np.testing.assert_allclose(got["effect"], single["effect"], rtol=1e-9)
        np.testing.assert_allclose(got["covariance"], single["covariance"] / 2, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(got["stat"], 2 * single["stat"], rtol=1e-8)
        np.testing.assert_allclose(got["dof"], 2 * single["dof"])


def test_ragged__an_f_contrast_needs_all_its_rows_in_a_run(volume, make_design):
    rng = np.random.default_rng(7)
    designs = [make_design(50), make_design(40, names=("face", "cat"), seed=1), make_design(45, seed=2)]
    runs = [volume(500 + rng.standard_normal((len(design), 2, 3, 4)).cumsum(axis=0)) for design in designs]
    fit = cg.fit(runs, designs)
    with pytest.warns(ChunkGLMWarning, match="cannot be estimated in run 2,"):
        got = cg.contrast(fit, ["face", "house"])
    assert np.isnan(got["stat"][1]).all()
    with pytest.warns(ChunkGLMWarning, match="Left out of the fixed effects.*run 2."):
        fixed = cg.fixed_effects(got)
    pair = cg.contrast(fit.isel(run=[0, 2]), ["face", "house"])
    np.testing.assert_array_equal(fixed["stat"], cg.fixed_effects(pair)["stat"])
    assert (fixed["n_runs"] == 2).all()


def test_f_statistic__is_nan_where_the_covariance_is_singular():
    covariance = np.stack([np.eye(2), np.ones((2, 2)), np.full((2, 2), np.nan)], axis=-1).reshape(4, 3)
    got = f_statistic(np.ones((2, 3)), covariance)
    np.testing.assert_array_equal(got, [[1.0, np.nan, np.nan]])
    sums = add_rows(None, np.ones((2, 3)), covariance, np.full((1, 1), 9.0), precision_weighted=True)
    rows = combined_rows(sums, 2, precision_weighted=True)
    assert np.isnan(rows[:2, 1:]).all()
    np.testing.assert_array_equal(rows[:, 0], [1, 1, 1, 0, 0, 1, 9, 1])


# -------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("noise_model", ["ols", "ar1"])
def test_compat__equals_nilearn(noise_model, volume, make_design):
    """Whitened effects and the dispersion, in each run and averaged over them."""
    rng = np.random.default_rng(3)
    designs = [make_design(57), make_design(44, seed=1)]
    Y = [600 + 10 * rng.standard_normal((len(design), 4, 3, 5)).cumsum(axis=0) for design in designs]
    M = np.array([[1, -1, 0, 0, 0, 0], [0, 1, -0.5, 0, 0, 0]])
    fit = cg.fit(
        [volume(y) for y in Y], designs, noise_model=noise_model, signal_scaling=None, compat="nilearn"
    )
    got = cg.contrast(fit, M).compute()
    assert got["dof"].values.tolist() == [51, 38]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [
            run_glm(y.reshape(len(y), -1), X.to_numpy(), noise_model=noise_model)
            for y, X in zip(Y, designs, strict=True)
        ]
        for number, (labels, results) in enumerate(theirs):
            _same(got.isel(run=number), compute_contrast(labels, results, M, stat_type="F"))
        labels, results = ([one[place] for one in theirs] for place in (0, 1))
        combined = compute_fixed_effect_contrast(labels, results, [M, M], stat_type="F")
    fixed = cg.fixed_effects(got)
    _same(fixed, combined)
    assert (fixed["dof"] == 51 + 38).all()
    with pytest.raises(InputError, match="nilearn cannot do it"):
        cg.fixed_effects(got, precision_weighted=True)


def _same(got, theirs):
    def flat(array):
        return array.values.reshape(*array.shape[:-3], -1)

    np.testing.assert_allclose(flat(got["effect"]), theirs.effect_size(), rtol=1e-8, atol=1e-10)
    variance = theirs.effect_variance()
    np.testing.assert_allclose(flat(got["covariance"])[0, 0], variance, rtol=1e-10)
    np.testing.assert_allclose(flat(got["covariance"])[1, 1], variance, rtol=1e-10)
    np.testing.assert_array_equal(flat(got["covariance"])[0, 1], 0)
    np.testing.assert_allclose(flat(got["stat"]), theirs.stat(), rtol=1e-9)
    np.testing.assert_allclose(flat(got["z_score"]), theirs.z_score(), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(flat(got["p_value"]), theirs.p_value(), rtol=1e-7, atol=1e-15)
