"""Adding a run to a fit: what a fit of all runs together is, without the data of the others."""

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import chunkglm as cg
from chunkglm import grids
from chunkglm.errors import ChunkGLMWarning, DesignError, GridMismatchError, InputError, MaskError
from chunkglm.testing import raise_if_computes

SHAPE = (3, 4, 5)
SPATIAL = ("beta", "sigma2", "rho", "rho_at_limit", "mask")


def noisy(n, seed, rho=0.4):
    """A signal of autoregressive noise on a base, (n, z, y, x)."""
    rng = np.random.default_rng(seed)
    bold = rng.standard_normal((n, *SHAPE))
    for t in range(1, n):
        bold[t] += rho * bold[t - 1]
    return 500 + 10 * bold


@pytest.fixture
def runs(volume):
    """Three runs of unequal lengths, repetition times and masks."""
    rng = np.random.default_rng(5)
    masks = rng.random((3, *SHAPE)) < 0.8
    made = [
        volume(noisy(n, seed), mask, t_r)
        for seed, (n, mask, t_r) in enumerate(zip((50, 41, 60), masks, (2.0, 0.8, 1.5), strict=True))
    ]
    return dict(zip("123", made, strict=True))


@pytest.fixture
def designs(make_design):
    """Of other regressors in other orders; the last one is the longest and has one more."""
    third = make_design(60, names=("dog", "face"), seed=2)[["constant", "dog", "face", "drift_2", "drift_1"]]
    return {"1": make_design(50), "2": make_design(41, names=("cat", "face"), seed=1), "3": third}


def without(mapping, label):
    return {key: value for key, value in mapping.items() if key != label}


def check_equal(got, expected):
    """The same variables, dims, labels, attributes, types and bits."""
    xr.testing.assert_identical(got.compute(), expected.compute())
    for name in expected.variables:
        assert got[name].dtype == expected[name].dtype, name
        assert got[name].dims == expected[name].dims, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise_model": "ols", "signal_scaling": "run"},
        {"noise_model": "ar3", "signal_scaling": None},
        {"noise_model": "ar1", "compat": "nilearn"},
        {"noise_model": "ols", "compat": "nilearn", "signal_scaling": "run"},
    ],
    ids=str,
)
@pytest.mark.parametrize("censored", [False, True])
def test_append_run__is_the_fit_of_all_runs_to_the_last_bit(runs, designs, options, censored):
    masks = {"1": np.arange(50) != 7, "2": None, "3": np.delete(np.arange(60), [3, 4, 30])}
    given_masks = masks if censored else dict.fromkeys(masks)
    expected = cg.fit(runs, designs, sample_masks=given_masks, **options)
    fit = cg.fit(without(runs, "3"), without(designs, "3"), sample_masks=without(given_masks, "3"), **options)
    with raise_if_computes():
        got = cg.append_run(fit, runs["3"], designs["3"], sample_mask=given_masks["3"])
    check_equal(got, expected)
    assert list(got["regressor"].values)[-1] == "dog"
    assert {name: got[name].chunks for name in SPATIAL if name in got} == {
        name: expected[name].chunks for name in SPATIAL if name in expected
    }


def test_append_run__a_shorter_run_and_one_after_the_other(runs, designs):
    """Runs are added one by one to a fit of the longest; contrasts are those of all."""
    order = ["3", "1", "2"]
    expected = cg.fit({key: runs[key] for key in order}, {key: designs[key] for key in order})
    got = cg.fit({"3": runs["3"]}, {"3": designs["3"]})
    for label in order[1:]:
        got = cg.append_run(got, runs[label], designs[label], label=label)
    check_equal(got, expected)
    with pytest.warns(ChunkGLMWarning, match="run 3"):
        contrasts = [cg.contrast(fit, "face - cat") for fit in (got, expected)]
    xr.testing.assert_identical(*(one.compute() for one in contrasts))


@pytest.mark.parametrize("rhos", [(0.0, 0.0, 0.6), (0.6, 0.6, 0.0), (0.6, 0.6, 0.6)], ids=str)
@pytest.mark.parametrize("saved", [False, True])
def test_append_run__auto_chooses_the_order_of_that_run(volume, make_design, rhos, saved, tmp_path):
    """Also where the fit has no coefficients of the noise yet, or the new run has fewer."""
    mask = np.ones(SHAPE, bool)
    mask[0, 0] = False
    runs = [volume(noisy(120, seed, rho), mask) for seed, rho in enumerate(rhos)]
    designs = [make_design(120, seed=seed) for seed in range(3)]
    fit = cg.fit(runs[:2], designs[:2], noise_model="auto")
    if saved:
        fit = cg.save(fit, tmp_path / "fit.zarr")
    with raise_if_computes(1):
        got = cg.append_run(fit, runs[2], designs[2])
    expected = cg.fit(runs, designs, noise_model="auto")
    chosen = expected.attrs["noise_model_chosen"]
    assert [name == "ols" for name in chosen] == [rho == 0 for rho in rhos]
    assert got.attrs["noise_model_chosen"] == chosen
    check_equal(got.assign_attrs(expected.attrs).drop_attrs(), expected.drop_attrs())
    assert got["rho"].dtype == np.float64
    assert got["rho_at_limit"].dtype == bool
    dropped = cg.append_run(fit.isel(run=[1]), runs[2], designs[2])
    assert dropped.attrs["noise_model_chosen"] == chosen[1:]


def test_append_run__needs_no_data_of_other_runs_and_computes_none_of_them(runs, designs, tmp_path):
    """From a saved fit: the other runs' estimates are the stored ones, and it can be saved again."""
    cg.save(cg.fit(without(runs, "3"), without(designs, "3")), tmp_path / "fit.zarr")
    opened = cg.open_store(tmp_path / "fit.zarr")
    with raise_if_computes():
        got = cg.append_run(opened, runs["3"], designs["3"])
        assert all(got[name].chunks is not None for name in SPATIAL)
    saved = cg.save(got, tmp_path / "fit2.zarr")
    cg.verify(tmp_path / "fit2.zarr")
    expected = cg.fit(runs, designs)
    assert saved.attrs | expected.attrs == saved.attrs
    xr.testing.assert_identical(saved.compute().drop_attrs(), expected.compute().drop_attrs())
    # The same again is known to be there.
    with raise_if_computes():
        cg.save(
            cg.append_run(cg.open_store(tmp_path / "fit.zarr"), runs["3"], designs["3"]),
            tmp_path / "fit2.zarr",
        )
    # And to the saved one a fourth.
    four = cg.append_run(saved, runs["1"], designs["1"])
    assert list(four["run"].values) == ["1", "2", "3", "4"]
    np.testing.assert_array_equal(four["beta"].sel(run="4"), expected["beta"].sel(run="1"))


def test_append_run__fits_nothing_but_the_new_run(runs, designs):
    """Signals of the fit that cannot be read do not matter until they are asked for."""

    def broken(block):
        raise AssertionError("the signal of another run was read")

    first = runs["1"].chunk()
    unreadable = first["bold"].data.map_blocks(broken, dtype=float, meta=np.empty((0,) * 4))
    fit = cg.fit({"1": first.assign(bold=(first["bold"].dims, unreadable))}, {"1": designs["1"]})
    got = cg.append_run(fit, runs["2"], designs["2"])
    np.testing.assert_array_equal(
        got["sigma2"].sel(run="2"), cg.fit(runs["2"], designs["2"])["sigma2"].sel(run="1")
    )
    with pytest.raises(AssertionError, match="signal of another run"):
        got["sigma2"].compute()


@settings(max_examples=8)
@given(
    of_fit=st.one_of(st.none(), st.tuples(*(st.integers(2, n) for n in SHAPE))),
    of_run=st.tuples(st.integers(15, 60), *(st.integers(2, n) for n in SHAPE)),
    scattered=st.booleans(),
)
def test_append_run__any_chunks_of_fit_and_run(volume, make_design, of_fit, of_run, scattered):
    runs = [volume(noisy(n, seed)) for seed, n in enumerate((40, 45, 38))]
    designs = [make_design(len(run["time"]), seed=1) for run in runs]
    designs[2]["extra"] = np.linspace(-1, 1, 38)
    fit = cg.fit(runs[:2], designs[:2]).compute()
    if of_fit is not None:
        fit = fit.chunk(dict(zip("zyx", of_fit, strict=True)))
        if scattered:  # variables of one fit in other chunks, and along other dims
            fit["beta"] = fit["beta"].chunk(regressor=2, run=2)
            fit["sigma2"] = fit["sigma2"].chunk(z=1, y=3)
    # The sums of a block depend on its own time blocks in the last bit, those of another run not.
    new = runs[2].chunk(dict(zip(("time", "z", "y", "x"), of_run, strict=True)))
    with raise_if_computes():
        got = cg.append_run(fit, new, designs[2])
        assert got.chunks["run"] == (1, 1, 1)  # raises where variables have other chunks
    check_equal(got, cg.fit([*runs[:2], new], designs))


def test_append_run__works_with_some_runs_of_a_fit_and_with_one(runs, designs):
    fit = cg.fit(runs, designs)
    dropped = fit.drop_sel(run="2")
    got = cg.append_run(dropped, runs["2"], designs["2"], label="2")
    order = ["1", "3", "2"]
    xr.testing.assert_identical(got.compute(), fit.sel(run=order).compute())
    one = fit.sel(run="1")
    xr.testing.assert_identical(
        cg.append_run(one, runs["3"], designs["3"], label="3").compute(),
        fit.sel(run=["1", "3"]).compute(),
    )


def test_append_run__labels(runs, designs):
    fit = cg.fit(runs["1"], designs["1"])
    for labels, expected in [
        (["1"], "2"),
        (["7"], "8"),
        (["rest"], "2"),
        (["1", "3"], "4"),
        (["a", "b"], "3"),
        (["1", "5", "x"], "6"),
    ]:
        several = xr.concat([fit] * len(labels), "run", data_vars="minimal").assign_coords(run=labels)
        got = cg.append_run(several, runs["2"], designs["2"])
        assert list(got["run"].values) == [*labels, expected]
        assert got["run"].dtype == object
    assert cg.append_run(fit, runs["2"], designs["2"], label=5)["run"].values.tolist() == ["1", "5"]
    with pytest.raises(InputError, match=r"has a run '1' already; its runs are 1\. .*drop_sel\(run='1'\)"):
        cg.append_run(fit, runs["2"], designs["2"], label="1")
    with pytest.raises(InputError, match="has a run '1' already"):
        cg.append_run(fit, runs["2"], designs["2"], label=1)


def test_append_run__grids_that_differ_by_rounding_are_one(runs, designs):
    """The fit's labels are used; nothing is aligned, so nothing is lost."""
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = 2e-4
    moved = runs["2"].assign_coords(grids.grid_coords(affine, SHAPE, b"other"))
    assert not moved["x"].equals(runs["1"]["x"])
    fit = cg.fit(runs["1"], designs["1"])
    got = cg.append_run(fit, moved, designs["2"])
    check_equal(got, cg.fit([runs["1"], moved], [designs["1"], designs["2"]]))
    for name in ("x", "y", "z", "grid"):
        assert got[name].identical(fit[name])
    affine[:3, 3] = 0.5
    far = runs["2"].assign_coords(grids.grid_coords(affine, SHAPE, b""))
    with pytest.raises(GridMismatchError, match="Run 2 and the fit have the same shape, but their voxels"):
        cg.append_run(fit, far, designs["2"])
    with pytest.raises(GridMismatchError, match="Run 2 has .* and the fit has"):
        cg.append_run(fit, runs["2"].isel(z=[0]), designs["2"])
    # A slice of the fit takes the same slice of a run.
    part = cg.append_run(fit.isel(z=slice(1, None)), runs["2"].isel(z=slice(1, None)), designs["2"])
    expected = cg.append_run(fit, runs["2"], designs["2"]).isel(z=slice(1, None))
    xr.testing.assert_identical(part.compute(), expected.compute())


def test_append_run__takes_a_mask(runs, designs):
    rng = np.random.default_rng(0)
    mask = xr.DataArray(rng.random(SHAPE) < 0.5, dims=("z", "y", "x"))
    fit = cg.fit(runs["1"], designs["1"], mask=mask)
    got = cg.append_run(fit, runs["2"].drop_vars("mask"), designs["2"], mask=mask)
    check_equal(got, cg.fit([runs["1"], runs["2"]], [designs["1"], designs["2"]], mask=mask))
    with pytest.raises(MaskError, match="Run 2 has no mask"):
        cg.append_run(fit, runs["2"].drop_vars("mask"), designs["2"])


def test_append_run__keeps_what_else_the_fit_has(runs, designs):
    fit = cg.fit(runs["1"], designs["1"]).assign_attrs(author="me")
    fit["template"] = (("z", "y", "x"), np.ones(SHAPE))
    got = cg.append_run(fit, runs["2"], designs["2"])
    assert got.attrs["author"] == "me"
    assert got["template"].identical(fit["template"])
    for extra in (fit.assign(motion=("run", [0.1])), fit.assign_coords(subject=("run", ["s"]))):
        with pytest.raises(InputError, match=r"The fit has '(motion|subject)' over runs.*drop_vars"):
            cg.append_run(extra, runs["2"], designs["2"])


def test_append_run__refuses_what_is_no_fit_and_what_cannot_be_fitted(runs, designs):
    fit = cg.fit(runs["1"], designs["1"])
    run, design = runs["2"], designs["2"]
    for wrong, match in [
        (fit.drop_vars("sigma2"), "A fit to which a run is added needs a variable 'sigma2'"),
        (fit.drop_vars("design"), "needs a variable 'design'"),
        (fit.isel(z=0), "needs 'beta' with dims"),
        (fit.drop_attrs(), "no noise_model and no signal_scaling and no compat"),
        (fit.drop_vars("regressor"), "has no regressor"),
        (fit.drop_vars("run"), "has no run"),
        (fit.assign_attrs(numerical_version="0"), "numbers of version 0.*Fit all runs again"),
        (runs["1"], "needs a variable 'beta'"),
    ]:
        with pytest.raises(InputError, match=match):
            cg.append_run(wrong, run, design)
    for wrong_run, wrong_design, kind, match in [
        ([run], design, InputError, "Run 2 is a list"),
        (run.drop_vars("bold"), design, InputError, "Run 2 needs a variable 'bold'"),
        (run, designs["1"], DesignError, "50 .*41"),
    ]:
        with pytest.raises(kind, match=match):
            cg.append_run(fit, wrong_run, wrong_design)
    with pytest.raises(InputError, match="Run 2 has a sample mask of 3 values for 41 volumes"):
        cg.append_run(fit, run, design, sample_mask=[True] * 3)
    redundant = design.assign(again=design["face"])
    with pytest.warns(ChunkGLMWarning, match="design of run 2") as seen:
        cg.append_run(fit, run, redundant)
    assert seen[0].filename == __file__


def test_append_run__finds_the_truth(volume, make_design):
    """A run with an effect is added to one without: each has its own."""
    design = make_design(80)
    quiet, loud = (
        volume(noisy(80, seed, 0.2) + size * design["face"].to_numpy()[:, None, None, None])
        for seed, size in ((0, 0.0), (1, 100.0))
    )
    fit = cg.append_run(cg.fit(quiet, design, signal_scaling=None), loud, design)
    effect = cg.contrast(fit, "face").compute()
    error = effect["effect"] - xr.DataArray([0.0, 100.0], dims="run")
    assert float(abs(error.mean(("z", "y", "x"))).max()) < 3
    assert float((error / np.sqrt(effect["variance"])).std()) < 1.5


def test_append_run__graph_of_the_other_runs_stays(runs, designs):
    """Blocks of the fit are taken as they are: their keys are in the result's graph, with the same chunks."""
    fit = cg.fit(without(runs, "3"), {key: designs["1"].iloc[: len(designs[key])] for key in "12"})
    got = cg.append_run(fit, runs["1"], designs["1"], label="again")
    assert set(dict(fit["beta"].data.__dask_graph__())) <= set(dict(got["beta"].data.__dask_graph__()))
    assert isinstance(got["beta"].data, da.Array)
    (both,) = dask.compute(got["beta"])
    np.testing.assert_array_equal(both.sel(run="again"), both.sel(run="1"))
