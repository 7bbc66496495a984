"""Time courses with the fitted model over the data: what is drawn is read back from the figure."""

import numpy as np
import pytest
import xarray as xr

import chunkglm as cg
from chunkglm import grids
from chunkglm.errors import GridMismatchError, InputError


def drawn(figure, panel=0):
    """What a panel shows: label of each line -> its values."""
    lines = figure.axes[panel].get_lines()
    return {line.get_label(): np.asarray(line.get_ydata(), dtype=float) for line in lines}


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [
        text.get_text() for text in figure.texts
    ]


@pytest.fixture
def point(two_runs):
    return [float(two_runs["a"][axis][4]) for axis in "xyz"]


def signals(two_runs):
    return {label: run["bold"].values[:, 4, 4, 4].astype(float) for label, run in two_runs.items()}


def test_time_course__without_a_fit_is_the_signal(two_runs, point):
    figure = cg.time_course(two_runs, *point)
    for number, (label, signal) in enumerate(signals(two_runs).items()):
        assert drawn(figure, number).keys() == {"signal"}
        np.testing.assert_array_equal(drawn(figure, number)["signal"], signal)
        assert f"run {label}" in texts(figure)


def test_time_course__percent_with_the_model_by_definition(two_runs, two_designs, point):
    fit = cg.fit(two_runs, two_designs, noise_model="ols")
    figure = cg.time_course(two_runs, *point, fit=fit)
    for number, (label, signal) in enumerate(signals(two_runs).items()):
        percent = 100 * (signal / signal.mean() - 1)
        X = two_designs[label].to_numpy()
        np.testing.assert_allclose(drawn(figure, number)["signal"], percent, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            drawn(figure, number)["fitted model"], X @ np.linalg.lstsq(X, percent, rcond=None)[0], atol=1e-10
        )
    assert "% of the voxel's mean" in texts(figure)
    where = ", ".join(f"{mm:g}" for mm in point)
    assert f"Voxel at ({where}) mm" in texts(figure)


@pytest.mark.parametrize("scaling", ["run", None])
def test_time_course__in_the_units_of_the_fit(two_runs, two_designs, point, scaling):
    chunked = {label: run.drop_vars("design").chunk(time=20, z=4) for label, run in two_runs.items()}
    fit = cg.fit(chunked, two_designs, noise_model="ols", signal_scaling=scaling)
    figure = cg.time_course(chunked, *point, fit=fit)
    for number, (label, signal) in enumerate(signals(two_runs).items()):
        if scaling == "run":
            mean = two_runs[label]["bold"].values[:, two_runs[label]["mask"].values].mean()
            signal = 100 * (signal / mean - 1)  # noqa: PLW2901
        X = two_designs[label].to_numpy()
        np.testing.assert_allclose(drawn(figure, number)["signal"], signal, rtol=1e-10)
        expected = X @ np.linalg.lstsq(X, signal, rcond=None)[0]
        np.testing.assert_allclose(drawn(figure, number)["fitted model"], expected, rtol=1e-8)


def test_time_course__volumes_that_were_left_out_are_marked(two_runs, two_designs, point):
    kept = np.ones(60, dtype=bool)
    kept[[3, 4, 40]] = False
    fit = cg.fit(two_runs, two_designs, sample_masks={"a": kept})
    figure = cg.time_course(two_runs, *point, fit=fit)
    signal = signals(two_runs)["a"]
    percent = 100 * (signal / signal[kept].mean() - 1)
    found = drawn(figure)
    np.testing.assert_allclose(found["left out"], percent[~kept], rtol=1e-12)
    np.testing.assert_allclose(found["signal"][kept], percent[kept], rtol=1e-12)
    assert np.isnan(found["signal"][~kept]).all()
    assert "left out" not in drawn(figure, 1)


def test_time_course__of_a_saved_fit_and_runs_with_other_regressors(two_runs, two_designs, point, tmp_path):
    designs = {"a": two_designs["a"], "b": two_designs["b"].rename(columns={"DSt": "other"})[::1]}
    designs["b"] = designs["b"][["other", *designs["b"].columns.drop("other")]]
    fit = cg.save(cg.fit(two_runs, designs, noise_model="ols"), tmp_path / "fit.zarr")
    figure = cg.time_course({"b": two_runs["b"]}, *point, fit=fit)
    signal = signals(two_runs)["b"]
    percent = 100 * (signal / signal.mean() - 1)
    X = designs["b"].to_numpy()
    np.testing.assert_allclose(
        drawn(figure)["fitted model"], X @ np.linalg.lstsq(X, percent, rcond=None)[0], atol=1e-10
    )


def test_time_course__outside_the_mask_only_the_data(two_runs, two_designs):
    run = two_runs["a"]
    outside = np.argwhere(~run["mask"].values)[0]
    point = [float(run[axis][number]) for axis, number in zip("zyx", outside, strict=True)][::-1]
    figure = cg.time_course(two_runs, *point, fit=cg.fit(two_runs, two_designs))
    assert "fitted model" not in drawn(figure)
    assert "not fitted here" in texts(figure)


def test_time_course__reads_the_chunks_of_the_voxel_only(two_runs, point):
    import dask.array as da

    seen = []

    def block(values, block_info=None):
        seen.append(block_info[0]["chunk-location"])
        return values

    run = two_runs["a"][["bold", "mask"]].chunk(time=20, z=3, y=5)
    run["bold"] = run["bold"].copy(
        data=da.map_blocks(
            block, run["bold"].data, dtype=run["bold"].dtype, meta=np.empty((0,) * 4, run["bold"].dtype)
        )
    )
    cg.time_course(run, *point)
    assert sorted(set(seen)) == [(0, 1, 0, 0), (1, 1, 0, 0), (2, 1, 0, 0)]


def test_time_course__refuses_a_fit_of_others(two_runs, two_designs, point):
    fit = cg.fit(two_runs, two_designs)
    with pytest.raises(InputError, match="has the runs a, b, and none labelled 1"):
        cg.time_course(two_runs["a"], *point, fit=fit)
    with pytest.raises(InputError, match="46 volumes and was fitted with 60"):
        cg.time_course({"a": two_runs["b"]}, *point, fit=fit)
    with pytest.raises(InputError, match="no 'beta' over labelled runs"):
        cg.time_course(two_runs, *point, fit=cg.contrast(fit, "DSt"))
    with pytest.raises(InputError, match="outside of the grid"):
        cg.time_course(two_runs, 1e4, 0, 0)
    with pytest.raises(GridMismatchError, match="The fit has 9 voxels|The fit has"):
        cg.time_course(two_runs, *point, fit=fit.isel(z=slice(2, 5)))


def test_time_course__one_run_of_several_must_say_which_it_is(two_runs, two_designs, point):
    """Its label would be 1, which is that of another run."""
    fit = cg.fit(list(two_runs.values()), list(two_designs.values()))
    with pytest.raises(InputError, match="which of them is given is not known"):
        cg.time_course(two_runs["b"], *point, fit=fit)
    assert len(cg.time_course(list(two_runs.values()), *point, fit=fit).axes) == 2
    figure = cg.time_course({"2": two_runs["b"]}, *point, fit=fit.sel(run="2"))
    X, percent = two_designs["b"].to_numpy(), drawn(figure)["signal"]
    assert np.corrcoef(drawn(figure)["fitted model"], percent)[0, 1] > 0.3
    assert len(drawn(figure)["fitted model"]) == len(X)


def test_time_course__names_are_text_and_constant_voxels_are_drawn(volume):
    run = volume(np.full((12, 2, 2, 2), 7.0))
    figure = cg.time_course({"$x_1$ <b>": run}, 0, 0, 0, title="$T^")
    figure._repr_png_()
    assert "run $x_1$ <b>" in texts(figure)
    assert "$T^" in texts(figure)


def test_time_course__on_an_oblique_grid(volume):
    run = volume(np.arange(12.0 * 8).reshape(12, 2, 2, 2))
    turned = np.array([[0, -3.0, 0, 5], [3, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    run = run.assign_coords(grids.grid_coords(turned, (2, 2, 2), b""))
    figure = cg.time_course(run, 2, 9, 7)  # the voxel x = 1, y = 1, z = 0
    np.testing.assert_array_equal(drawn(figure)["signal"], run.bold.values[:, 0, 1, 1])
    assert "Voxel at (2, 9, 7) mm" in texts(figure)


def test_time_course__in_a_dataset_of_xarray_alone(two_runs, point):
    run = two_runs["a"].drop_vars("time", errors="ignore")
    assert isinstance(run, xr.Dataset)
    figure = cg.time_course(run, *point)
    np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_xdata(), np.arange(60))
    assert figure.axes[0].get_xlabel() == "volume"
    assert (
        cg.time_course(two_runs["a"].assign_coords(time=2.0 * np.arange(60)), *point).axes[0].get_xlabel()
        == "s"
    )


def test_time_course__of_one_volume(volume):
    figure = cg.time_course(volume(np.ones((1, 2, 2, 2))), 0, 0, 0)
    figure._repr_png_()
