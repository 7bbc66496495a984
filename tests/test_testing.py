import inspect
import io
import itertools
import sys

import dask.array as da
import nibabel as nib
import numpy as np
import pytest
import xarray as xr

from chunkglm.errors import InputError, StoreExistsError
from chunkglm.testing import peak_rss, raise_if_computes, simulate_run, simulate_volumes, write_simulated_run

SMALL = {"shape": (13, 15, 11), "n_volumes": 40}
needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def percent_signal(run):
    """100 (Y / mean - 1) in the mask, (time, voxel)."""
    signal = run["bold"].values[:, run["mask"].values].astype(float)
    return 100 * (signal / signal.mean(axis=0) - 1)


def ols(run):
    """Estimates (regressor, voxel) and residuals (time, voxel)."""
    X = run["design"].values
    signal = percent_signal(run)
    beta = np.linalg.lstsq(X, signal, rcond=None)[0]
    return beta, signal - X @ beta


def ar1_covariance(rho, n):
    return rho ** np.abs(np.subtract.outer(np.arange(n), np.arange(n)))


def test_run__has_the_documented_layout():
    run = simulate_run(**SMALL, t_r=1.5, voxel_size=2.5, seed=3, session=2)
    assert run["bold"].dims == ("time", "z", "y", "x")
    assert run["bold"].shape == (40, 11, 15, 13)
    assert run["bold"].dtype == np.int16
    assert run["mask"].dtype == bool
    assert run["true_effect"].dims == ("condition", "z", "y", "x")
    assert run["design"].dims == ("volume", "regressor")
    for name in ("true_effect", "true_rho", "design"):
        assert run[name].dtype == np.float64
    for name in ("condition", "regressor"):
        assert run[name].dtype == object
        assert all(type(label) is str for label in run[name].values)
    assert list(run["condition"].values) == ["SSt", "SSp", "DSt", "DSp"]
    assert list(run["regressor"].values) == ["SSt", "SSp", "DSt", "DSp", "drift_1", "constant"]
    np.testing.assert_allclose(run["time"], np.arange(40) * 1.5)
    assert {name: run.attrs[name] for name in ("t_r", "voxel_size", "seed", "session")} == {
        "t_r": 1.5,
        "voxel_size": 2.5,
        "seed": 3,
        "session": 2,
    }
    centre = (np.array(SMALL["shape"]) - 1) / 2
    np.testing.assert_allclose(np.array(run.attrs["affine"]) @ [*centre, 1], [0, 0, 0, 1])
    np.testing.assert_allclose(np.array(run.attrs["affine"])[:3, :3], 2.5 * np.eye(3))


def test_run__looks_like_a_recording():
    run = simulate_run()
    mask = run["mask"].values
    mean = run["bold"].mean("time").values
    assert 0.2 < mask.mean() < 0.5
    assert 600 < mean[mask].min() < mean[mask].max() < 1200
    assert run["bold"].values.min() > 0
    assert mean[~mask].max() < 60
    assert not run["true_effect"].values[:, ~mask].any()
    rho = run["true_rho"].values
    assert rho.min() == pytest.approx(0.1)
    assert rho.max() == pytest.approx(0.5)
    assert max(np.abs(np.diff(rho, axis=axis)).max() for axis in range(3)) < 0.1


def test_design__columns_are_responses_of_peak_1_drift_and_constant():
    run = simulate_run(n_volumes=200)
    X = run["design"]
    for name in run["condition"].values:
        assert X.sel(regressor=name).max() == pytest.approx(1)
        assert X.sel(regressor=name).min() > -0.5
    drifts = X.values[:, 4:-1]
    assert drifts.shape[1] == 6
    np.testing.assert_allclose(drifts.T @ drifts, 100 * np.eye(6), atol=1e-9)
    np.testing.assert_allclose(drifts.sum(axis=0), 0, atol=1e-9)
    assert (X.sel(regressor="constant") == 1).all()
    assert np.linalg.cond(X.values) < 10


def test_true_effect__the_contrast_is_positive_in_two_regions_and_negative_in_one():
    run = simulate_run(effect_percent=2.0)
    weights = xr.DataArray([-1.0, -1.0, 1.0, 1.0], coords={"condition": run["condition"]})
    effect = (run["true_effect"] * weights).sum("condition").values
    n_x = effect.shape[2]
    positive, negative = effect > 0.5, effect < -0.5
    assert min(positive[..., : n_x // 2].sum(), positive[..., n_x // 2 :].sum(), negative.sum()) > 200
    assert not positive[..., n_x // 2 - 3 : n_x // 2 + 3].any()
    assert positive.any(axis=(0, 2))[np.flatnonzero(negative.any(axis=(0, 2)))].sum() == 0
    assert run["true_effect"].max() == pytest.approx(2.0, rel=0.05)


def test_truth_is_recovered__without_noise_to_rounding():
    run = simulate_run(**SMALL, noise_percent=0, effect_percent=2.0)
    beta, residuals = ols(run)
    truth = run["true_effect"].values[:, run["mask"].values]
    # The truth is in percent of the baseline, the signal in percent of its mean in time.
    mean_response = run["design"].values[:, :4].mean(axis=0) @ truth / 100
    errors = beta[:4] - truth / (1 + mean_response)
    rounding = 100 / np.sqrt(12) / 600
    assert errors.std() < rounding
    assert np.abs(errors).max() < 4 * rounding
    assert np.abs(residuals).max() < 3 * rounding


def test_truth_is_recovered__within_standard_errors():
    run = simulate_run(n_volumes=150, effect_percent=8.0, seed=5)
    beta, _ = ols(run)
    mask = run["mask"].values
    truth = run["true_effect"].values[:, mask]
    rho = run["true_rho"].values[mask]
    X = run["design"].values
    mean_response = X[:, :4].mean(axis=0) @ truth / 100
    pinv = np.linalg.pinv(X)
    grid = np.linspace(0.1, 0.5, 41)
    variances = [np.diag(pinv @ ar1_covariance(value, 150) @ pinv.T) for value in grid]
    variance = np.array([np.interp(rho, grid, np.array(variances)[:, k]) for k in range(4)])
    z = (beta[:4] - truth / (1 + mean_response)) / (1.5 * np.sqrt(variance))
    n_voxels = mask.sum()
    assert np.all(np.abs(z.mean(axis=1)) < 5 / np.sqrt(n_voxels))
    np.testing.assert_allclose(z.std(axis=1), 1, atol=0.04)
    responding = truth[2] > 4
    assert responding.sum() > 200
    assert np.all(np.abs(z[:, responding].mean(axis=1)) < 5 / np.sqrt(responding.sum()))


def test_noise__has_the_true_autocorrelation_from_the_first_volume_on():
    run = simulate_run(n_volumes=400, effect_percent=0, noise_percent=3.0, seed=1)
    mask = run["mask"].values
    _, residuals = ols(run)
    rho = run["true_rho"].values[mask]
    observed = (residuals[1:] * residuals[:-1]).sum(axis=0) / (residuals**2).sum(axis=0)
    X = run["design"].values
    R = np.eye(400) - X @ np.linalg.pinv(X)
    edges = np.quantile(rho, np.linspace(0, 1, 6))
    for low, high in itertools.pairwise(edges):
        inside = (rho >= low) & (rho <= high)
        # What a design takes away of the slow noise lowers the autocorrelation of the residuals.
        covariance = R @ ar1_covariance(rho[inside].mean(), 400) @ R
        expected = np.diag(covariance, 1).sum() / np.trace(covariance)
        assert observed[inside].mean() == pytest.approx(expected, abs=0.005)
        assert (residuals[:, inside] ** 2).mean() == pytest.approx(9 * np.trace(covariance) / 400, rel=0.01)
    spread = residuals.std(axis=1)
    assert spread[:5].mean() == pytest.approx(spread[5:].mean(), rel=0.1)


def test_noise__is_spatially_independent():
    run = simulate_run(n_volumes=200, effect_percent=0)
    residuals = np.full(run["bold"].shape, np.nan)
    residuals[:, run["mask"].values] = ols(run)[1]
    product = residuals[:, :, :, 1:] * residuals[:, :, :, :-1]
    assert abs(np.nanmean(product) / np.nanmean(residuals**2)) < 0.01


def test_seed_and_session__decide_everything():
    first, again = (simulate_run(**SMALL, seed=4, session=1) for _ in range(2))
    xr.testing.assert_identical(first, again)
    assert first["bold"].values.tobytes() == again["bold"].values.tobytes()

    other = simulate_run(**SMALL, seed=4, session=2)
    for name in ("mask", "true_effect", "true_rho"):
        xr.testing.assert_identical(first[name], other[name])
    assert not np.allclose(first["design"], other["design"])
    assert not np.array_equal(first["bold"], other["bold"])
    mean, other_mean = (ds["bold"].mean("time").values[ds["mask"].values] for ds in (first, other))
    assert np.corrcoef(mean, other_mean)[0, 1] > 0.99

    stranger = simulate_run(**SMALL, seed=5, session=1)
    assert not np.allclose(first["true_rho"], stranger["true_rho"])


def test_anatomy__does_not_depend_on_the_length_or_noise():
    first = simulate_run(**SMALL)
    other = simulate_run(shape=SMALL["shape"], n_volumes=60, t_r=0.8, noise_percent=4.0)
    for name in ("mask", "true_effect", "true_rho"):
        xr.testing.assert_identical(first[name], other[name])


def test_volumes__are_those_of_the_run_and_come_one_by_one():
    run = simulate_run(**SMALL, seed=2)
    volumes = simulate_volumes(**SMALL, seed=2)
    np.testing.assert_array_equal(next(volumes), run["bold"][0])
    rest = np.stack(list(volumes))
    assert rest.dtype == np.int16
    np.testing.assert_array_equal(rest, run["bold"][1:])


def test_options__defaults_are_the_same_everywhere():
    parameters = inspect.signature(simulate_run).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    volume = next(simulate_volumes())
    np.testing.assert_array_equal(volume, next(simulate_volumes(**defaults)))
    np.testing.assert_array_equal(volume, simulate_run()["bold"][0])
    with pytest.raises(TypeError, match="n_volume"):
        simulate_volumes(n_volume=3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("shape", (4, 5)),
        ("shape", (4, 0, 5)),
        ("t_r", 0.0),
        ("voxel_size", -1.0),
        ("conditions", ("a", "a")),
        ("conditions", ()),
        ("n_volumes", 11),
        ("noise_percent", -0.1),
        ("seed", -1),
        ("session", -1),
    ],
)
def test_options__that_cannot_be_right_are_refused(option, value):
    with pytest.raises(InputError, match=option):
        simulate_run(**{option: value})


@pytest.mark.parametrize("conditions", [["only"], [f"c{k}" for k in range(9)]])
def test_conditions__may_be_any_number(conditions):
    run = simulate_run(shape=(9, 9, 9), n_volumes=100, conditions=conditions)
    assert list(run["regressor"].values[: len(conditions)]) == conditions
    assert run["true_effect"].sizes["condition"] == len(conditions)
    assert np.linalg.matrix_rank(run["design"].values) == run.sizes["regressor"]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_file__holds_the_run(tmp_path, ending):
    options = {**SMALL, "t_r": 1.25, "voxel_size": 3.5, "seed": 6, "session": 1}
    run = simulate_run(**options)
    path, design, mask = tmp_path / f"bold{ending}", tmp_path / "design.npz", tmp_path / f"mask{ending}"
    truth = write_simulated_run(path, design, mask, **options)
    xr.testing.assert_identical(truth, run.drop_vars(["bold", "time"]))

    image = nib.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, run["bold"])
    np.testing.assert_allclose(image.affine, run.attrs["affine"])
    header = image.header
    assert header.get_data_dtype() == np.dtype("<i2")
    assert header.get_slope_inter() == (None, None)
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(header.get_zooms(), (3.5, 3.5, 3.5, 1.25))
    assert header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_allclose(header.get_qform(), run.attrs["affine"], atol=1e-5)

    with np.load(design) as archive:
        np.testing.assert_array_equal(archive["X"], run["design"])
        assert archive["conditions"].dtype.kind == "U"
        assert list(archive["conditions"]) == list(run["regressor"].values)
    mask_image = nib.load(mask)
    assert mask_image.header.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(mask_image.dataobj).T, run["mask"])
    np.testing.assert_allclose(mask_image.affine, image.affine)
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(
        item.name for item in (path, design, mask)
    )


def test_file__is_byte_for_byte_what_nibabel_writes(tmp_path):
    path = tmp_path / "bold.nii"
    write_simulated_run(path, **SMALL)
    image = nib.load(path)
    copy = io.BytesIO()
    nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header).to_stream(copy)
    assert path.read_bytes() == copy.getvalue()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_file__same_options_give_the_same_bytes(tmp_path, ending):
    paths = [tmp_path / name / f"bold{ending}" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        write_simulated_run(path, path.parent / "x.npz", path.parent / "mask.nii.gz", **SMALL)
    for name in (paths[0].name, "x.npz", "mask.nii.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_file__is_not_overwritten_unless_asked(tmp_path):
    path, design = tmp_path / "bold.nii", tmp_path / "x.npz"
    design.write_bytes(b"mine")
    with pytest.raises(StoreExistsError, match=r"x\.npz"):
        write_simulated_run(path, design, **SMALL)
    assert not path.exists()
    assert design.read_bytes() == b"mine"
    write_simulated_run(path, design, overwrite=True, **SMALL)
    assert path.exists()
    for bad in (
        {"path": tmp_path / "b.img"},
        {"path": tmp_path / "c.nii", "design_path": tmp_path / "x.csv"},
    ):
        with pytest.raises(InputError, match="end in"):
            write_simulated_run(**bad, **SMALL)


@needs_proc
def test_file__of_a_long_run_is_written_in_the_memory_of_a_few_volumes(tmp_path):
    path = tmp_path / "bold.nii"
    statements = f"write_simulated_run({str(path)!r}, shape=(64, 64, 40), n_volumes=300)"
    base, peak = peak_rss(statements, setup="from chunkglm.testing import write_simulated_run")
    assert path.stat().st_size > 98e6
    assert peak - base < 40e6


def test_raise_if_computes__passes_what_is_lazy():
    with raise_if_computes():
        lazy = da.ones((4, 4), chunks=2).sum() + 1
    assert lazy.compute() == 17


def test_raise_if_computes__counts():
    array = xr.DataArray(da.arange(6, chunks=2))
    with raise_if_computes(max_computes=2):
        assert int(array.sum()) == 15
        np.testing.assert_array_equal(array.compute(), np.arange(6))
    with (
        raise_if_computes(max_computes=1),
        pytest.raises(AssertionError, match="computation 2 began, 1 allowed"),
    ):
        [array.compute() for _ in range(2)]
    with pytest.raises(AssertionError, match="lazy"), raise_if_computes():
        array.values  # noqa: B018
    assert int(array.sum()) == 15


def test_peak_rss__sees_what_is_allocated_and_given_back():
    base, peak = peak_rss("a = np.ones(25_000_000); del a", setup="import numpy as np")
    assert peak - base == pytest.approx(200e6, rel=0.1)
    base, peak = peak_rss("pass", setup="import numpy as np")
    assert peak - base < 10e6


@needs_proc
def test_peak_rss__is_disturbed_neither_by_a_fat_parent_nor_by_a_fat_setup():
    fat = np.ones(62_500_000)
    base, peak = peak_rss(
        "a = np.ones(12_500_000)", setup="import numpy as np\nb = np.ones(62_500_000); del b"
    )
    assert fat.nbytes == 500e6
    assert base < 150e6
    assert peak - base == pytest.approx(100e6, rel=0.1)


def test_peak_rss__shows_why_the_code_failed():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        peak_rss("print('some output')\n1 / 0")
    base, peak = peak_rss("print('some output', end='')")
    assert 0 < base <= peak
