"""What holds for every statistic: special voxels, invariances, redundant designs, and the choice of the noise model."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from nilearn.glm.regression import ARModel

import chunkglm as cg
from chunkglm.errors import ChunkGLMWarning, ContrastError

SPACE = ("z", "y", "x")
STATISTICS = ("effect", "variance", "dof", "stat", "p_value", "z_score")
MODELS = ["ols", "ar1", "ar2"]


def noisy(n=60, shape=(3, 4, 5), seed=0, rho=0.4):
    rng = np.random.default_rng(seed)
    e = rng.standard_normal((n, *shape))
    for t in range(1, n):
        e[t] += rho * e[t - 1]
    return 300 + 5 * e


def everything(runs, designs, definition="face - house", **options):
    """Contrasts of each run, and both ways of fixed effects."""
    fit = cg.fit(runs, designs, **options).compute()
    got = cg.contrast(fit, definition)
    return got, cg.fixed_effects(got), cg.fixed_effects(got, precision_weighted=True)


# ------------------------------------------------------------------------------------------------------- special voxels


@pytest.mark.parametrize("definition", ["face - house", ["face", "house"]], ids=["t", "F"])
@pytest.mark.parametrize("noise_model", MODELS)
def test_special_voxels_are_nan_where_they_should_be_and_touch_no_neighbour(
    noise_model, definition, volume, make_design
):
    """Constant, zero, NaN, infinite and one-sample-different voxels in one image, side by side, in one of two runs."""
    first, second = noisy(), noisy(50, seed=1)
    special = first.copy()
    special[:, 0, 0, 0] = 250.0
    special[:, 0, 0, 1] = 0.0
    special[17, 0, 1, 0] = np.nan
    special[3, 0, 1, 1] = np.inf
    special[5, 1, 1, 1] = -np.inf
    special[:, 1, 0, 0] = np.nan
    special[:, 2, 0, 0] = 250.0
    special[30, 2, 0, 0] = 251.0
    dead = np.zeros(first.shape[1:], dtype=bool)
    for place in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 1, 1), (1, 0, 0)):
        dead[place] = True
    other = dead.copy()
    other[2, 0, 0] = True
    designs = [make_design(60), make_design(50, seed=1)]
    options = {"definition": definition, "noise_model": noise_model}
    clean = everything([volume(first), volume(second)], designs, **options)
    got = everything([volume(special), volume(second)], designs, **options)
    for name in ("stat", "p_value", "z_score", "effect"):
        values, expected = (ds[0][name].transpose("run", ..., *SPACE).values for ds in (got, clean))
        nan = np.isnan(values[0])
        assert (nan == dead).all(), name
        np.testing.assert_allclose(values[0][..., ~other], expected[0][..., ~other], rtol=1e-11)
        np.testing.assert_array_equal(values[1], expected[1])
    # One sample that differs is a signal, and the statistic of it an ordinary number.
    assert np.abs(got[0]["z_score"][0, 2, 0, 0]) < 5
    alone = cg.contrast(cg.fit(volume(second), designs[1], noise_model=noise_model).compute(), definition)
    for fixed, untouched in zip(got[1:], clean[1:], strict=True):
        np.testing.assert_array_equal(fixed["n_runs"], np.where(dead, 1, 2))
        assert np.isfinite(fixed["stat"]).all()
        for name in ("stat", "z_score", "dof"):
            np.testing.assert_allclose(fixed[name].values[~other], untouched[name].values[~other], rtol=1e-11)
            expected = np.broadcast_to(alone[name].isel(run=0), dead.shape)
            np.testing.assert_allclose(fixed[name].values[dead], expected[dead], rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("noise_model", MODELS)
def test_scale_and_sign_of_data_and_contrast(noise_model, volume, make_design):
    bold, design = noisy(), make_design(60)
    options = {"noise_model": noise_model, "signal_scaling": None}
    one, fixed, _ = everything(volume(bold), design, **options)
    for factor in (-3.0, 1e-3, 7e5):
        other, also, _ = everything(volume(factor * bold), design, **options)
        np.testing.assert_allclose(
            other["effect"], factor * one["effect"], rtol=1e-8, atol=abs(factor) * 1e-9
        )
        np.testing.assert_allclose(other["variance"], factor**2 * one["variance"], rtol=1e-8)
        for name in ("stat", "z_score"):
            np.testing.assert_allclose(other[name], np.sign(factor) * one[name], rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(also["dof"], fixed["dof"], rtol=1e-7)
    turned, *_ = everything(volume(bold), design, "-2*face + 2*house", **options)
    np.testing.assert_allclose(turned["effect"], -2 * one["effect"], rtol=1e-12)
    np.testing.assert_allclose(turned["variance"], 4 * one["variance"], rtol=1e-10)
    np.testing.assert_allclose(turned["z_score"], -one["z_score"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(turned["dof"], one["dof"], rtol=1e-9)
    np.testing.assert_allclose(turned["p_value"], 1 - one["p_value"], atol=1e-12)


@pytest.mark.parametrize("noise_model", MODELS)
def test_a_level_in_the_data_and_another_basis_of_the_design_change_nothing(noise_model, volume, make_design):
    bold, design = noisy(), make_design(60)
    options = {"noise_model": noise_model, "signal_scaling": None}
    one, *_ = everything(volume(bold), design, **options)
    raised, *_ = everything(volume(bold + 4000.0), design, **options)
    mixed = design.assign(face=design["face"] + 3 * design["constant"] - design["drift_1"])[
        list(design)[::-1]
    ]
    other, *_ = everything(volume(bold), mixed, **options)
    for name in STATISTICS:
        np.testing.assert_allclose(raised[name], one[name], rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(other[name], one[name], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("noise_model", ["ar2", "ar3"])
@given(seed=st.integers(0, 1000))
def test_order_of_voxels_and_chunks_do_not_matter(noise_model, seed, volume, make_design):
    rng = np.random.default_rng(seed)
    # Voxels in any order are no grid.
    run, design = volume(noisy(seed=seed % 7)).drop_vars([*SPACE, "grid"]), make_design(60)
    whole = cg.fit(run, design, noise_model=noise_model).compute()
    order = rng.permutation(5)
    parts = run.isel(x=order).chunk({"time": int(rng.integers(1, 61)), "y": int(rng.integers(1, 5)), "z": 1})
    got = cg.fit(parts, design, noise_model=noise_model).compute()
    for name in ("beta", "sigma2", "rho"):
        np.testing.assert_allclose(got[name], whole[name].isel(x=order), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("noise_model", [*MODELS, "auto"])
def test_threads_change_no_bit(noise_model, volume, make_design):
    import dask

    run, design = volume(noisy()).chunk({"time": 16, "z": 1, "y": 2}), make_design(60)
    results = []
    for n in (1, 2, 4):
        with dask.config.set(scheduler="threads", num_workers=n):
            results.append(cg.contrast(cg.fit(run, design, noise_model=noise_model), "face").compute())
    assert results[0].equals(results[1])
    assert results[0].equals(results[2])


@pytest.mark.parametrize("noise_model", MODELS)
def test_two_identical_halves_are_one_half_with_half_the_variance(noise_model, volume, make_design):
    bold, design = noisy(), make_design(60)
    one = cg.contrast(cg.fit(volume(bold), design, noise_model=noise_model).compute(), "face - house").isel(
        run=0
    )
    pair = {"first": volume(bold), "second": volume(bold)}
    got = everything(pair, {"first": design, "second": design}, noise_model=noise_model)
    for fixed in got[1:]:
        np.testing.assert_allclose(fixed["effect"], one["effect"], rtol=1e-10)
        np.testing.assert_allclose(fixed["variance"], one["variance"] / 2, rtol=1e-10)
        np.testing.assert_allclose(fixed["stat"], np.sqrt(2) * one["stat"], rtol=1e-10)
        np.testing.assert_allclose(fixed["dof"], 2 * one["dof"], rtol=1e-12)


# --------------------------------------------------------------------------------------------------- redundant designs


@pytest.mark.parametrize("noise_model", MODELS)
def test_a_redundant_design_estimates_what_its_reduced_one_does_and_refuses_the_rest(
    noise_model, volume, make_design
):
    run, reduced = volume(noisy()), make_design(60)
    redundant = reduced.assign(sum=reduced["face"] + reduced["house"], again=reduced["cat"], nothing=0.0)
    with pytest.warns(ChunkGLMWarning, match="9 regressors of rank 6"):
        fit = cg.fit(run, redundant, noise_model=noise_model).compute()
    plain = cg.fit(run, reduced, noise_model=noise_model).compute()
    assert fit["dof"].item() == plain["dof"].item() == 54
    pairs = [
        ("face - house", "face - house"),
        ("0.5*cat + 0.5*again", "0.5*cat"),
        ("face + sum", "face + face + house"),
        (["face - house", "cat + again"], ["face - house", "cat"]),
    ]
    for ours, theirs in pairs[:1] + pairs[3:]:
        one, other = cg.contrast(fit, ours), cg.contrast(plain, theirs)
        for name in ("stat", "z_score", "dof"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-7, atol=1e-9)
    for definition in ("face", "sum", "cat - again", "nothing", ["face - house", "cat"]):
        with pytest.raises(ContrastError, match="cannot be estimated in any run"):
            cg.contrast(fit, definition)


# ------------------------------------------------------------------------------------------------------- noise models


@pytest.mark.parametrize("order", [1, 2, 4])
def test_fit__is_nilearns_model_at_the_coefficients_of_each_voxel(order, volume, make_design):
    run, design = volume(noisy(80)), make_design(80)
    fit = cg.fit(run, design, noise_model=f"ar{order}", signal_scaling=None).compute()
    assert fit["rho"].dims == ("run", "lag", *SPACE)
    assert fit["lag"].values.tolist() == list(range(1, order + 1))
    got = cg.contrast(fit, "face - house")
    c = np.array([1.0, -1, 0, 0, 0, 0])
    for place in [(0, 0, 0), (1, 2, 3), (2, 3, 4)]:
        model = ARModel(design.to_numpy(), fit["rho"][0].values[(slice(None), *place)])
        theirs = model.fit(run["bold"].values[(slice(None), *place)][:, None])
        ours = {name: fit[name][0].values[(..., *place)] for name in ("beta", "sigma2")}
        np.testing.assert_allclose(ours["beta"], theirs.theta[:, 0], rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(ours["sigma2"], theirs.dispersion.item(), rtol=1e-8)
        np.testing.assert_allclose(got["stat"][0].values[place], theirs.Tcontrast(c).t.item(), rtol=1e-8)


def test_fit__auto_takes_the_order_of_the_smallest_criterion_of_each_run(volume, make_design):
    rng = np.random.default_rng(5)
    runs, designs = {}, {}
    for label, rho in {"white": (), "first": (0.5,), "second": (0.4, 0.3)}.items():
        e = rng.standard_normal((300, 3, 4, 5))
        for t in range(300):
            for lag, c in enumerate(rho, 1):
                if t >= lag:
                    e[t] += c * e[t - lag]
        runs[label], designs[label] = volume(300 + 5 * e).chunk(z=1), make_design(300)
    fit = cg.fit(runs, designs, noise_model="auto")
    assert fit["order"].values.tolist() == [0, 1, 2]
    assert fit.attrs["noise_model"] == "auto"
    assert fit.attrs["noise_model_chosen"] == ["ols", "ar1", "ar2"]
    fit = fit.compute()
    assert fit["rho"].sizes["lag"] == 2
    assert (fit["rho"].sel(run="white") == 0).all()
    assert (fit["rho"].sel(run="first", lag=2) == 0).all()
    got = cg.contrast(fit, "face - house")
    for number, (label, model) in enumerate(zip(runs, ("ols", "ar1", "ar2"), strict=True)):
        alone = cg.fit({label: runs[label]}, {label: designs[label]}, noise_model=model).compute()
        np.testing.assert_array_equal(fit["beta"][number], alone["beta"][0])
        expected = cg.contrast(alone, "face - house")
        for name in ("stat", "z_score", "dof"):
            reference = np.broadcast_to(expected[name][0], got[name][number].shape)
            np.testing.assert_array_equal(got[name][number], reference)


def test_fit__auto_of_an_empty_mask_is_nan(volume, make_design):
    run = volume(noisy(), mask=np.zeros((3, 4, 5), dtype=bool))
    fit = cg.fit(run, make_design(60), noise_model="auto").compute()
    assert fit["order"].item() == 0
    assert np.isnan(fit["sigma2"]).all()


def test_fit__auto_of_few_volumes_looks_at_fewer_orders(volume, make_design):
    fit = cg.fit(volume(noisy(10)), make_design(10), noise_model="auto").compute()
    assert fit["order"].item() <= 3
    assert np.isfinite(fit["sigma2"]).all()


def test_fit__says_where_no_coefficient_explains_the_residuals(volume, make_design):
    bold = noisy()
    bold[:, 0] = 300 + np.cumsum(np.random.default_rng(1).standard_normal((60, 4, 5)), axis=0)
    for noise_model in ("ar1", "ar2"):
        mask = np.ones((3, 4, 5), dtype=bool)
        mask[2] = False
        fit = cg.fit(volume(bold, mask=mask), make_design(60), noise_model=noise_model).compute()
        at_limit = fit["rho_at_limit"][0].values
        assert at_limit[0].any()
        assert not at_limit[1:].any()
        assert np.isfinite(fit["rho"][0].values[:, mask]).all()
    assert "rho_at_limit" not in cg.fit(volume(bold), make_design(60), compat="nilearn")


def test_contrast__of_a_fit_without_masks_and_orders_is_of_all_volumes_and_lags(volume, make_design):
    """Such as a version that had neither saved, or one that somebody else made."""
    for noise_model in ("ols", "ar2"):
        fit = cg.fit(volume(noisy()), make_design(60), noise_model=noise_model).compute()
        bare = fit.drop_vars(["sample_mask", "order"])
        assert cg.contrast(bare, "face")["stat"].equals(cg.contrast(fit, "face")["stat"])


def test_contrast__keeps_the_place_of_every_dim(volume, make_design):
    """Statistics of a fit whose voxels were stacked."""
    fit = cg.fit(volume(noisy()), make_design(60), noise_model="ar2").compute()
    stacked = cg.contrast(fit.stack(voxel=SPACE), ["face", "house"])
    expected = cg.contrast(fit, ["face", "house"])
    np.testing.assert_array_equal(stacked["stat"], expected["stat"].values.reshape(1, -1))
    assert isinstance(stacked, xr.Dataset)
