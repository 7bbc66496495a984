"""Fixed effects: of contrasts, and of data of any other origin."""

import warnings

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from nilearn.glm import compute_fixed_effects
from nilearn.glm.contrasts import _compute_fixed_effects_params
from scipy import stats

import chunkglm as cg
from chunkglm.errors import ChunkGLMWarning, ContrastError, InputError
from chunkglm.testing import raise_if_computes

MAPS = ("effect", "variance", "stat", "p_value", "z_score")


def estimates(shape=(4, 6, 5), dims=("run", "v", "w"), seed=0, dof=(50.0, 60.0, 70.0, 45.0)):
    rng = np.random.default_rng(seed)
    return xr.Dataset(
        {
            "effect": (dims, rng.standard_normal(shape)),
            "variance": (dims, 0.2 + rng.random(shape)),
            "dof": (dims[0], np.array(dof[: shape[0]])),
        },
        coords={dims[0]: [f"s{number}" for number in range(shape[0])]},
    )


def combine(ds, precision_weighted=False):
    """The formulas, on complete data."""
    effect, variance = ds["effect"].values, ds["variance"].values
    n = len(effect)
    if precision_weighted:
        w = 1 / variance
        return (w * effect).sum(axis=0) / w.sum(axis=0), 1 / w.sum(axis=0)
    return effect.mean(axis=0), variance.sum(axis=0) / n**2


@pytest.mark.parametrize("precision_weighted", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_fixed_effects__are_the_formulas(precision_weighted, lazy):
    ds = estimates()
    given_ds = ds.chunk(v=4, run=3).assign(dof=ds["dof"]) if lazy else ds
    with raise_if_computes():
        got = cg.fixed_effects(given_ds, precision_weighted=precision_weighted)
    assert (got["stat"].chunks is not None) == lazy
    effect, variance = combine(ds, precision_weighted)
    t = effect / np.sqrt(variance)
    np.testing.assert_allclose(got["effect"], effect, rtol=1e-12)
    np.testing.assert_allclose(got["variance"], variance, rtol=1e-12)
    np.testing.assert_allclose(got["stat"], t, rtol=1e-12)
    np.testing.assert_allclose(got["p_value"], stats.t.sf(t, 225), rtol=1e-9)
    np.testing.assert_allclose(got["z_score"], stats.norm.isf(stats.t.sf(t, 225)), rtol=1e-9, atol=1e-12)
    assert (got["dof"] == 225).all()
    assert (got["n_runs"] == 4).all()
    for name in (*MAPS, "dof", "n_runs"):
        assert got[name].dims == ("v", "w")
        assert got[name].dtype == np.float64
        assert got[name].attrs["long_name"]
    assert "run" not in got.coords
    assert got.attrs["combined"] == ["s0", "s1", "s2", "s3"]
    assert got.attrs["precision_weighted"] == int(precision_weighted)
    assert got.attrs["kind"] == "fixed_effects"


@pytest.mark.parametrize("precision_weighted", [False, True])
def test_fixed_effects__by_the_reference_equal_nilearn(precision_weighted):
    ds = estimates(seed=3)
    ds["effect"][:, 0] *= 40
    ds["variance"][:, 1] = 1e-17
    got = cg.fixed_effects(ds.assign_attrs(compat="nilearn"), precision_weighted=precision_weighted)
    flat = (ds[name].values.reshape(4, -1) for name in ("effect", "variance"))
    expected = _compute_fixed_effects_params(*flat, precision_weighted, ds["dof"].values)
    for name, values in zip(("effect", "variance", "stat", "z_score"), expected, strict=True):
        np.testing.assert_allclose(got[name].values.ravel(), values.ravel(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("precision_weighted", [False, True])
def test_fixed_effects__a_run_that_is_nan_somewhere_is_left_out_there(precision_weighted):
    ds = estimates()
    ds["effect"][0, 0] = np.nan
    ds["variance"][1, 1] = np.inf
    ds["effect"][:, 2] = np.nan
    got = cg.fixed_effects(ds, precision_weighted=precision_weighted)
    for row, runs in ((0, [1, 2, 3]), (1, [0, 2, 3]), (3, [0, 1, 2, 3])):
        effect, variance = combine(ds.isel(run=runs, v=row), precision_weighted)
        np.testing.assert_allclose(got["effect"][row], effect)
        np.testing.assert_allclose(got["variance"][row], variance)
        assert (got["dof"][row] == ds["dof"].values[runs].sum()).all()
        assert (got["n_runs"][row] == len(runs)).all()
    for name in (*MAPS, "dof"):
        assert np.isnan(got[name][2]).all()
    assert (got["n_runs"][2] == 0).all()


def test_fixed_effects__of_one_run_are_that_run():
    ds = estimates((1, 6, 5))
    got = cg.fixed_effects(ds)
    np.testing.assert_array_equal(got["effect"], ds["effect"][0])
    np.testing.assert_array_equal(got["variance"], ds["variance"][0])
    assert (got["dof"] == 50).all()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("dims", [("run", "vertex"), ("vertex", "session"), ("a", "b", "run", "c", "d")])
def test_fixed_effects__take_any_dims(dims, lazy):
    dim = "session" if "session" in dims else "run"
    ordered = (dim, *(other for other in dims if other != dim))
    ds = estimates((3, 4, 2, 3, 2)[: len(dims)], ordered)
    given_ds = ds.transpose(*dims)
    given_ds["variance"] = given_ds["variance"].transpose(*dims[::-1])
    got = cg.fixed_effects(given_ds.chunk() if lazy else given_ds, dim=dim)
    effect, variance = combine(ds)
    assert got["effect"].dims == ordered[1:]
    np.testing.assert_allclose(got["effect"], effect)
    np.testing.assert_allclose(got["variance"], variance)
    assert (got["dof"] == 180).all()


@pytest.mark.parametrize("effect_is_lazy", [False, True])
@pytest.mark.parametrize("dof_is_lazy", [False, True])
@pytest.mark.parametrize("dof_dims", [("run",), ("w", "run"), ("run", "v", "w")])
def test_fixed_effects__dof_may_vary_between_voxels(dof_dims, dof_is_lazy, effect_is_lazy):
    ds = estimates()
    sizes = [ds.sizes[dim] for dim in dof_dims]
    dof = xr.DataArray(np.random.default_rng(1).integers(20, 90, sizes), dims=dof_dims)
    if effect_is_lazy:
        ds = ds.chunk(v=2)
    ds["dof"] = dof.chunk() if dof_is_lazy else dof
    # A number for each run may be read to name those that have none; maps are not.
    with raise_if_computes(1 if dof_is_lazy and dof_dims == ("run",) else 0):
        got = cg.fixed_effects(ds)
    expected = dof.sum("run").broadcast_like(got["effect"]).transpose(*got["effect"].dims)
    np.testing.assert_array_equal(got["dof"], expected)
    np.testing.assert_allclose(got["p_value"], stats.t.sf(got["stat"], expected), rtol=1e-9)
    assert got["stat"].shape == (6, 5)


def test_fixed_effects__small_dof_are_not_blown_up():
    """Degrees of freedom of a run are not made an array of the size of the maps before its blocks are there."""
    ds = xr.Dataset(
        {
            "effect": (("run", "v"), da.ones((3, 2_000_000), chunks=(1, 10_000))),
            "variance": (("run", "v"), da.ones((3, 2_000_000), chunks=(1, 10_000))),
            "dof": ("run", np.array([5.0, 6, 7])),
        }
    )
    got = cg.fixed_effects(ds)
    held = [getattr(value, "nbytes", 0) for value in dict(got["dof"].data.__dask_graph__()).values()]
    assert max(held, default=0) < 1000
    assert got["dof"][:10].compute().values.tolist() == [18] * 10
    assert got["dof"].data.numblocks == (200,)


def test_fixed_effects__integers_and_other_attributes():
    ds = estimates()
    ds["effect"] = (ds["effect"] * 10).astype(int).assign_attrs(units="%", history="mine")
    ds["dof"] = ds["dof"].astype(int)
    ds = ds.assign_attrs(author="me").drop_vars("run")
    got = cg.fixed_effects(ds)
    np.testing.assert_allclose(got["effect"], ds["effect"].mean("run"))
    assert "units" not in got["variance"].attrs
    assert "units" not in got["stat"].attrs
    assert got.attrs["author"] == "me"
    assert got.attrs["combined"] == ["0", "1", "2", "3"]


def test_fixed_effects__zero_variance_gives_no_statistic():
    ds = estimates()
    ds["variance"][:, 0] = 0.0
    ds["variance"][0, 1] = 0.0
    for precision_weighted in (False, True):
        got = cg.fixed_effects(ds, precision_weighted=precision_weighted)
        assert np.isnan(got["stat"][0]).all()
        assert np.isfinite(got["stat"][2:]).all()


@given(
    seed=st.integers(0, 1000),
    chunks=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5)),
    precision_weighted=st.booleans(),
    compat=st.sampled_from(["none", "nilearn"]),
)
def test_fixed_effects__chunks_and_order_do_not_matter(seed, chunks, precision_weighted, compat):
    ds = estimates(seed=seed).assign_attrs(compat=compat)
    expected = cg.fixed_effects(ds, precision_weighted=precision_weighted)
    lazy = ds.chunk(dict(zip(("run", "v", "w"), chunks, strict=True)))
    assert cg.fixed_effects(lazy, precision_weighted=precision_weighted).compute().equals(expected)
    order = np.random.default_rng(seed).permutation(4)
    other = cg.fixed_effects(ds.isel(run=order), precision_weighted=precision_weighted)
    for name in MAPS:
        np.testing.assert_allclose(other[name], expected[name], rtol=1e-10, atol=1e-13)


@given(
    seed=st.integers(0, 1000),
    n_runs=st.integers(9, 30),
    chunks=st.tuples(st.integers(1, 12), st.integers(1, 3), st.integers(1, 2)),
    precision_weighted=st.booleans(),
    of_rows=st.booleans(),
)
def test_fixed_effects__of_many_runs_are_those_of_all_at_once(
    seed, n_runs, chunks, precision_weighted, of_rows
):
    shape, dof = (3, 2), np.arange(30.0, 30.0 + n_runs)
    ds = f_estimates(n_runs, 2, shape, seed) if of_rows else estimates((n_runs, *shape), seed=seed, dof=dof)
    # Some have nothing at a voxel, and nobody has anything at another one.
    ds["effect"].values[seed % n_runs, ..., 0, 0] = np.nan
    ds["effect"].values[..., 1, 1] = np.nan
    options = {"precision_weighted": precision_weighted}
    lazy = ds.chunk(dict(zip(("run", "v", "w"), chunks, strict=True)))
    with raise_if_computes():
        got = cg.fixed_effects(lazy.assign(dof=ds["dof"]), **options)
    got = got.compute()
    assert got.equals(cg.fixed_effects(ds, **options))
    if not of_rows:
        effect, variance = combine(ds, precision_weighted)
        np.testing.assert_allclose(got["effect"][2], effect[2], rtol=1e-12)
        np.testing.assert_allclose(got["variance"][2], variance[2], rtol=1e-12)
    assert got["n_runs"].values[:2, :2].tolist() == [[n_runs - 1, n_runs], [n_runs, 0]]
    np.testing.assert_array_equal(got["dof"][2], ds["dof"].sum())


def test_fixed_effects__of_many_runs_and_f_contrasts_of_unequal_rows(two_runs, two_designs):
    definition = {"both": ["SSt", "DSp"], "all": ["SSt", "SSp", "DSp"]}
    contrasts = cg.contrast(cg.fit(two_runs, two_designs), definition).compute()
    many = xr.concat(
        [contrasts.assign(effect=k + contrasts["effect"]) for k in range(10)],
        "run",
        data_vars=["effect", "covariance", "dof", "estimable"],
    )
    many = many.assign_coords(run=[f"s{number}" for number in range(20)])
    for options in ({}, {"precision_weighted": True}):
        got = cg.fixed_effects(many.chunk(run=1, z=3), **options).compute()
        assert got.equals(cg.fixed_effects(many, **options))
        few = cg.fixed_effects(many.sel(contrast="both").isel(row=[0, 1], row_=[0, 1]), **options)
        for name in ("effect", "covariance", "stat"):
            both = got[name].sel(contrast="both")
            both = both.isel({dim: [0, 1] for dim in ("row", "row_") if dim in both.dims})
            np.testing.assert_allclose(both, few[name].transpose(*both.dims), rtol=1e-12)


def test_fixed_effects__a_run_without_the_contrast_is_named():
    ds = estimates()
    ds["dof"][2] = np.nan
    ds["effect"][2] = np.nan
    for one in (ds, ds.chunk()):
        with pytest.warns(ChunkGLMWarning, match="cannot be estimated there: run s2.") as seen:
            got = cg.fixed_effects(one)
        assert seen[0].filename == __file__
        assert got.attrs["combined"] == ["s0", "s1", "s3"]
        assert (got["dof"] == 155).all()
    with pytest.raises(ContrastError, match=r"No run has the contrast.*run s0, s1, s2, s3"):
        cg.fixed_effects(ds.assign(dof=ds["dof"] * np.nan))
    # Degrees of freedom that vary between voxels may be missing in some.
    dof = ds["dof"].fillna(9.0).broadcast_like(ds["effect"]).copy()
    dof[2, 0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cg.fixed_effects(ds.assign(dof=dof))
        cg.fixed_effects(ds.chunk().assign(dof=dof.chunk()))
    dof[2] = np.nan
    with pytest.warns(ChunkGLMWarning, match="run s2"):
        cg.fixed_effects(ds.assign(dof=dof))


def test_fixed_effects__refuse_what_is_incomplete():
    ds = estimates()
    for wrong, kind, match in [
        (ds.drop_vars("variance"), InputError, "Fixed effects needs a variable 'variance'"),
        (ds.drop_vars("dof"), InputError, "needs a variable 'dof'"),
        (ds.assign(dof=225.0), InputError, "'dof' has only the dims"),
        (ds.isel(run=0), InputError, "'effect' has only the dims"),
        (ds.assign(covariance=ds["variance"]), InputError, "need 'effect' with the dim 'row'"),
        (
            ds.expand_dims(row=[1]).assign(covariance=ds["variance"].expand_dims(row=[1])),
            InputError,
            "need 'covariance' with the dim 'row_'",
        ),
    ]:
        with pytest.raises(kind, match=match):
            cg.fixed_effects(wrong)
    with pytest.raises(InputError, match="over 'subject'"):
        cg.fixed_effects(ds, dim="subject")


# ------------------------------------------------------------------------------------------- from fits, and truth


def test_fixed_effects__of_contrasts_keep_the_grid_and_weights(two_runs, two_designs):
    result = cg.contrast(cg.fit(two_runs, two_designs), "DSt - SSt")
    fixed = cg.fixed_effects(result)
    assert fixed["stat"].dims == ("z", "y", "x")
    for name in ("x", "y", "z", "grid"):
        assert fixed[name].identical(two_runs["a"][name])
    assert fixed["weights"].identical(result["weights"])
    for key in ("definition", "compat", "noise_model", "signal_scaling", "stat_type"):
        assert fixed.attrs[key] == result.attrs[key]
    inside = two_runs["a"]["mask"].values
    effect, variance = combine(result.compute())
    np.testing.assert_allclose(fixed["effect"].values[inside], effect[inside])
    np.testing.assert_allclose(fixed["variance"].values[inside], variance[inside])
    assert np.array_equal(fixed["n_runs"], np.where(inside, 2, 0))


def test_fixed_effects__masks_of_runs_may_differ(volume, make_design):
    rng = np.random.default_rng(2)
    masks = rng.random((3, 2, 3, 4)) < 0.6
    runs = [volume(500 + rng.standard_normal((40, 2, 3, 4)).cumsum(axis=0), mask) for mask in masks]
    fit = cg.fit(runs, [make_design(40)] * 3)
    per_run = cg.contrast(fit, "face").compute()
    fixed = cg.fixed_effects(per_run)
    np.testing.assert_allclose(fixed["dof"], per_run["dof"].sum("run", min_count=1))
    fixed = cg.fixed_effects(cg.contrast(cg.fit(runs, [make_design(40)] * 3, noise_model="ols"), "face"))
    np.testing.assert_array_equal(fixed["n_runs"], masks.sum(axis=0))
    np.testing.assert_array_equal(np.isnan(fixed["stat"]), ~masks.any(axis=0))
    np.testing.assert_array_equal(fixed["dof"], np.where(masks.any(axis=0), 34.0 * masks.sum(axis=0), np.nan))


@pytest.mark.parametrize("precision_weighted", [False, True])
def test_fixed_effects__intervals_cover_the_truth(make_design, precision_weighted):
    """Unequal runs with unequal noise, one true effect: 95 % intervals hold it in 95 % of the voxels."""
    rng = np.random.default_rng(11)
    v, truth = 4000, 0.7
    runs, designs = [], []
    for number, (n, sd) in enumerate([(120, 5.0), (90, 12.0), (70, 8.0)]):
        design = make_design(n, seed=number)
        bold = 1000 * (1 + truth / 100 * design["face"].to_numpy()[:, None]) + sd * rng.standard_normal(
            (n, v)
        )
        space = ("z", "y", "x")
        run = {
            "bold": (("time", *space), bold.reshape(n, 1, 1, v)),
            "mask": (space, np.ones((1, 1, v), bool)),
        }
        runs.append(xr.Dataset(run))
        designs.append(design)
    fit = cg.fit(runs, designs, noise_model="ols", signal_scaling=None)
    fixed = cg.fixed_effects(cg.contrast(fit, "face"), precision_weighted=precision_weighted).compute()
    assert (fixed["dof"] == 120 + 90 + 70 - 18).all()
    error = fixed["effect"] - 1000 * truth / 100
    half = stats.t.isf(0.025, 262) * np.sqrt(fixed["variance"])
    assert abs(float((np.abs(error) < half).mean()) - 0.95) < 0.015
    assert abs(float(error.mean() / error.std())) < 0.06
    np.testing.assert_allclose(error.var(), fixed["variance"].mean(), rtol=0.08)


# ------------------------------------------------------------------------------------------------ without each run


def without_each(ds, dim="run", **options):
    """The natural form: fixed effects of all runs but one, again and again."""
    parts = []
    for number in range(ds.sizes[dim]):
        others = [other for other in range(ds.sizes[dim]) if other != number]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ChunkGLMWarning)
            parts.append(cg.fixed_effects(ds.isel({dim: others}), dim=dim, **options))
    varying = [name for name in parts[0].data_vars if name not in ("n_rows", "weights")]
    joined = xr.concat(parts, "left_out", data_vars=varying, coords="minimal", compat="override")
    return joined.assign_coords(left_out=ds[dim].values)


def check_close(got, expected):
    assert set(got.variables) == set(expected.variables)
    for name in expected.variables:
        if expected[name].dtype.kind != "f":
            assert got[name].equals(expected[name])
            continue
        assert got[name].dims == expected[name].transpose("left_out", ..., missing_dims="ignore").dims
        values = expected[name].transpose(*got[name].dims)
        np.testing.assert_allclose(got[name], values, rtol=1e-9, atol=1e-12, err_msg=name)


def f_estimates(n_runs=4, q=2, shape=(5, 3), seed=0):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((n_runs, q, q + 2, *shape))
    space = ("v", "w")
    return xr.Dataset(
        {
            "effect": (("run", "row", *space), rng.standard_normal((n_runs, q, *shape))),
            "covariance": (
                ("run", "row", "row_", *space),
                np.einsum("rik...,rjk...->rij...", factor, factor),
            ),
            "dof": ("run", 40.0 + np.arange(n_runs)),
        },
        coords={
            "run": [f"s{number}" for number in range(n_runs)],
            "row": np.arange(q) + 1,
            "row_": np.arange(q) + 1,
        },
    )


@pytest.mark.parametrize("compat", ["none", "nilearn"])
@pytest.mark.parametrize("precision_weighted", [False, True])
@pytest.mark.parametrize("make", [estimates, f_estimates])
@pytest.mark.parametrize("lazy", [False, True])
def test_leave_one_out__is_fixed_effects_without_each_run(make, precision_weighted, compat, lazy):
    ds = make().assign_attrs(compat=compat, stat_type="t", author="me")
    ds["effect"][0, 0] = np.nan
    ds["effect"][:, ..., 2, :] = np.nan  # no run has the voxel
    ds["effect"][1:, ..., 3, :] = np.nan  # one run has it
    given_ds = ds.chunk(v=2, run=1).assign(dof=ds["dof"]) if lazy else ds
    if make is f_estimates and precision_weighted and compat == "nilearn":
        with pytest.raises(InputError, match="cannot be weighted by precision"):
            cg.leave_one_out(given_ds, precision_weighted=True)
        return
    with raise_if_computes():
        got = cg.leave_one_out(given_ds, precision_weighted=precision_weighted)
    assert (got["stat"].chunks is not None) == lazy
    check_close(got, without_each(ds, precision_weighted=precision_weighted))
    assert got["left_out"].values.tolist() == ["s0", "s1", "s2", "s3"]
    assert got["left_out"].attrs["long_name"] == "run that was left out"
    whole = cg.fixed_effects(given_ds, precision_weighted=precision_weighted)
    assert got.attrs == whole.attrs | {"kind": "leave_one_out"}
    assert set(got.data_vars) == set(whole.data_vars)
    for name in whole.data_vars:
        assert got[name].dtype == whole[name].dtype
        assert got[name].attrs == whole[name].attrs
        if name != "n_rows":
            assert got[name].dims == ("left_out", *whole[name].dims)


@pytest.mark.parametrize("definition", ["DSt - SSt", {"a": "DSt - SSt", "b": "SSp"}, ["SSt", "DSp"]])
@pytest.mark.parametrize("precision_weighted", [False, True])
def test_leave_one_out__of_contrasts(two_runs, two_designs, definition, precision_weighted):
    runs = {**two_runs, "c": two_runs["a"].isel(time=slice(5, None))}
    designs = {**two_designs, "c": two_designs["a"].iloc[5:]}
    result = cg.contrast(cg.fit(runs, designs), definition)
    with raise_if_computes():
        got = cg.leave_one_out(result, precision_weighted=precision_weighted)
    assert got["stat"].dims == (
        "left_out",
        *(["contrast"] if isinstance(definition, dict) else []),
        "z",
        "y",
        "x",
    )
    for name in ("x", "y", "z", "grid"):
        assert got[name].identical(two_runs["a"][name])
    check_close(got.compute(), without_each(result, precision_weighted=precision_weighted).compute())


def test_leave_one_out__f_contrasts_of_unequal_rows(two_runs, two_designs):
    result = cg.contrast(
        cg.fit(two_runs, two_designs), {"one": "SSt", "two": ["SSp", "DSp"]}, stat_type="F"
    ).compute()
    got = cg.leave_one_out(result)
    assert got["effect"].dims[:3] == ("left_out", "contrast", "row")
    check_close(got, without_each(result))
    # Of two runs, what is left is the other one.
    np.testing.assert_allclose(got["stat"].sel(left_out="a"), result["stat"].sel(run="b"), rtol=1e-9)


def test_leave_one_out__equals_nilearn_on_subsets(volume, make_design):
    rng = np.random.default_rng(4)
    runs = [volume(500 + rng.standard_normal((40, 2, 3, 4)).cumsum(axis=0)) for _ in range(3)]
    fit = cg.fit(runs, [make_design(40, seed=seed) for seed in range(3)], compat="nilearn")
    result = cg.contrast(fit, "face - house").compute()
    images = {
        name: [cg.to_nifti(result[name].isel(run=number)) for number in range(3)]
        for name in ("effect", "variance")
    }
    mask = cg.to_nifti(xr.ones_like(result["effect"][0]).astype(np.uint8))
    for precision_weighted in (False, True):
        got = cg.leave_one_out(result, precision_weighted=precision_weighted)
        for number in range(3):
            others = [other for other in range(3) if other != number]
            expected = compute_fixed_effects(
                *([images[name][other] for other in others] for name in ("effect", "variance")),
                mask,
                precision_weighted=precision_weighted,
                dofs=result["dof"].values[others].tolist(),
            )
            for name, image in zip(("effect", "variance", "stat", "z_score"), expected, strict=True):
                values = got[name][number].transpose("x", "y", "z")
                np.testing.assert_allclose(values, image.get_fdata(), rtol=1e-5, atol=1e-6, err_msg=name)


def test_leave_one_out__a_run_without_the_contrast_is_named_once():
    ds = estimates()
    ds["dof"][2] = np.nan
    ds["effect"][2] = np.nan
    with pytest.warns(ChunkGLMWarning, match="cannot be estimated there: run s2.") as seen:
        got = cg.leave_one_out(ds)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert got.attrs["combined"] == ["s0", "s1", "s3"]
    check_close(got, without_each(ds))
    with pytest.warns(ChunkGLMWarning, match="run s2"):
        whole = cg.fixed_effects(ds)
    for name in (*MAPS, "dof", "n_runs"):
        np.testing.assert_allclose(got[name].sel(left_out="s2"), whole[name])


def test_leave_one_out__without_the_only_run_that_has_the_contrast_nothing_is_left():
    ds = estimates((3, 6, 5))
    ds["dof"][1:] = np.nan
    with pytest.warns(ChunkGLMWarning, match="run s1, s2"):
        got = cg.leave_one_out(ds)
    assert got["n_runs"].isel(v=0, w=0).values.tolist() == [0, 1, 1]
    for name in (*MAPS, "dof"):
        assert np.isnan(got[name].sel(left_out="s0")).all()
        assert np.isfinite(got[name].sel(left_out=["s1", "s2"])).all()
    with pytest.raises(ContrastError, match=r"No run has the contrast"):
        cg.leave_one_out(ds.assign(dof=ds["dof"] * np.nan))


def test_leave_one_out__refuses_what_leaves_nothing():
    for n in (0, 1):
        with pytest.raises(InputError, match=f"needs two runs or more over 'run', and there is {n}"):
            cg.leave_one_out(estimates().isel(run=slice(n)))
    with pytest.raises(InputError, match="over 'subject'"):
        cg.leave_one_out(estimates(), dim="subject")
    with pytest.raises(InputError, match="needs a variable 'dof'"):
        cg.leave_one_out(estimates().drop_vars("dof"))


@pytest.mark.parametrize("dof_dims", [("run",), ("w", "run"), ("run", "v", "w")])
def test_leave_one_out__takes_any_dims_and_dof_that_vary(dof_dims):
    ds = estimates()
    sizes = [ds.sizes[dim] for dim in dof_dims]
    ds["dof"] = xr.DataArray(np.random.default_rng(1).integers(20, 90, sizes), dims=dof_dims)
    for one in (ds, ds.chunk(v=2)):
        check_close(cg.leave_one_out(one), without_each(ds))
    ds = ds.rename(run="session").assign_coords(session=[3, 1, 4, 5]).transpose("v", "session", "w")
    got = cg.leave_one_out(ds, dim="session")
    check_close(got, without_each(ds, "session"))
    assert got["left_out"].values.tolist() == [3, 1, 4, 5]
    assert "session" not in got.coords


@given(
    seed=st.integers(0, 1000),
    chunks=st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 2)),
    precision_weighted=st.booleans(),
    of_rows=st.booleans(),
)
def test_leave_one_out__chunks_and_order_do_not_matter(seed, chunks, precision_weighted, of_rows):
    shape = (3, 2)
    of_one_row = estimates((9, *shape), seed=seed, dof=np.arange(30.0, 39.0))
    ds = f_estimates(9, 2, shape, seed) if of_rows else of_one_row
    options = {"precision_weighted": precision_weighted}
    expected = cg.leave_one_out(ds, **options)
    lazy = ds.chunk(dict(zip(("run", "v", "w"), chunks, strict=True)))
    assert cg.leave_one_out(lazy, **options).compute().equals(expected)
    assert cg.fixed_effects(lazy, **options).compute().equals(cg.fixed_effects(ds, **options))
    order = np.random.default_rng(seed).permutation(9)
    other = cg.leave_one_out(ds.isel(run=order), **options).sel(left_out=expected["left_out"])
    for name in ("effect", "stat", "z_score", "dof", "n_runs"):
        np.testing.assert_allclose(other[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision_weighted", [False, True])
def test_leave_one_out__a_run_of_any_size_leaves_no_trace_where_it_is_left_out(precision_weighted):
    """The sum of all less that of one would have no digits left here, or be NaN."""
    ds = estimates()
    ds["effect"][1, 0] = 1e25
    ds["variance"][1, 0] = 1e-25
    ds["variance"][1, 1] = 0.0
    got = cg.leave_one_out(ds, precision_weighted=precision_weighted)
    check_close(got, without_each(ds, precision_weighted=precision_weighted))
    assert np.isfinite(got["stat"].sel(left_out="s1")).all()


@pytest.mark.parametrize("make", [estimates, f_estimates])
def test_leave_one_out__tasks_do_not_grow_with_runs_and_a_block_is_read_once(make):
    """Besides the tasks that bring the blocks of the runs."""

    def n_tasks(n_runs):
        ds = xr.concat([make()] * (n_runs // 4), "run")
        got = cg.leave_one_out(
            ds.assign(run=np.arange(n_runs)).chunk(v=2).assign(dof=ds["dof"].drop_vars("run"))
        )
        return len(dict(got["z_score"].data.__dask_graph__()))

    assert n_tasks(40) == n_tasks(4)
    reads = []

    def count(block):
        reads.append(block.shape)
        return block

    ds = make()
    effect = ds["effect"].chunk(run=1, v=2)
    counted = effect.data.map_blocks(count, dtype=float, meta=np.empty((0,) * effect.ndim))
    cg.leave_one_out(ds.assign(effect=(effect.dims, counted))).compute(scheduler="sync")
    assert len(reads) == 4 * len(effect.chunksizes["v"])


def test_leave_one_out__shows_the_run_that_stands_out(volume, make_design):
    """One of five runs has a large effect of its own: without it, the map changes most, and tells the truth."""
    truth, outlier = 3.0, "4"
    runs, designs = {}, {}
    rng = np.random.default_rng(8)
    for number in range(1, 6):
        design = make_design(60, seed=number)
        size = truth + (20.0 if str(number) == outlier else 0.0)
        signal = 500 + size * design["face"].to_numpy()[:, None, None, None]
        runs[str(number)] = volume(signal + 2 * rng.standard_normal((60, 2, 5, 6)))
        designs[str(number)] = design
    result = cg.contrast(cg.fit(runs, designs, signal_scaling=None), "face").compute()
    whole, got = cg.fixed_effects(result), cg.leave_one_out(result)
    change = abs(got["effect"] - whole["effect"]).mean(("z", "y", "x"))
    assert change.idxmax("left_out") == outlier
    assert float(change.max()) > 3 * float(change.sortby(change)[-2])
    error = got["effect"].sel(left_out=outlier) - truth
    assert abs(float(error.mean())) < 0.3
    assert abs(float(got["effect"].sel(left_out="1").mean()) - truth - 20 / 4) < 0.3
