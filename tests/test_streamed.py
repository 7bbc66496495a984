"""Runs that are fitted while they are converted: the same as from their stores, to the last bit."""

import importlib

import nibabel as nib
import numpy as np
import pytest
import xarray as xr
from rich.console import Console

import chunkglm as cg
from chunkglm import job, jobplan, nifti, preflight, request
from chunkglm.errors import NiftiError
from chunkglm.testing import write_simulated_run

SHAPE = (14, 16, 38)
ESTIMATED = ("beta", "sigma2", "rho", "rho_at_limit", "mask")
CONSOLE = Console(quiet=True)

converting = importlib.import_module("chunkglm.convert")


def scaled(source, target, slope=0.37, intercept=100.0):
    """The same stored values with a scale."""
    content = bytearray(source.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]))
    header["scl_slope"], header["scl_inter"] = slope, intercept
    content[:348] = header.binaryblock
    target.write_bytes(content)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sessions of 70 and 45 volumes, more slices than a chunk has, as int16 with and without a scale."""
    folder = tmp_path_factory.mktemp("data")
    for session, volumes in ((1, 70), (2, 45)):
        write_simulated_run(
            folder / f"run{session}.nii",
            folder / f"design{session}.npz",
            folder / "mask.nii.gz",
            shape=SHAPE,
            n_volumes=volumes,
            session=session,
            overwrite=True,
        )
        scaled(folder / f"run{session}.nii", folder / f"scaled{session}.nii")
    kept = np.ones(70, dtype=int)
    kept[[0, 20, 31, 32, 33, 69]] = 0
    (folder / "censored.txt").write_text("\n".join(map(str, kept)))
    return folder


def job_of(data, output, stem="run", **options):
    """A whole job without report."""
    given = {"mask": str(data / "mask.nii.gz"), "n_threads": 2, **options}
    return request.Job(
        runs=tuple(str(data / f"{stem}{n}.nii") for n in (1, 2)),
        designs=tuple(str(data / f"design{n}.npz") for n in (1, 2)),
        contrasts={"a": [1.0, -1.0]},
        output=output,
        report=False,
        **given,
    )


def fitted_from_stores(data, output, **options):
    """The fit that the stores of a job give."""
    masks = [None, None]
    if options.pop("sample_masks", None):
        masks = [request.sample_mask_of(str(data / "censored.txt")), None]
    runs = [cg.open_run(output / "runs.zarr" / f"run-{n}") for n in (1, 2)]
    designs = [cg.read_design(data / f"design{n}.npz") for n in (1, 2)]
    for key in ("smoothing_fwhm", "n_threads", "memory"):
        options.pop(key, None)
    return cg.fit(runs, designs, sample_masks=masks, **options).compute()


@pytest.fixture
def no_second_pass(monkeypatch):
    """A job that fits from stores fails."""

    def refuse(*_, **__):
        raise AssertionError("fitted from the stores")

    monkeypatch.setattr(job, "fit", refuse)


@pytest.mark.filterwarnings("ignore:The contrast 'a' has 2 weights")
@pytest.mark.parametrize(
    ("stem", "options"),
    [
        ("run", {}),
        ("run", {"smoothing_fwhm": 6.0}),
        ("scaled", {}),
        ("scaled", {"smoothing_fwhm": 6.0, "noise_model": "ols"}),
        ("run", {"noise_model": "ar2", "signal_scaling": None}),
        ("run", {"sample_masks": True}),
        ("run", {"smoothing_fwhm": 6.0, "compat": "nilearn", "n_threads": 5}),
    ],
    ids=str,
)
def test_the_fit_is_that_from_the_stores_to_the_last_bit(data, tmp_path, no_second_pass, stem, options):
    asked = dict(options)
    if asked.get("sample_masks"):
        asked["sample_masks"] = (str(data / "censored.txt"), "all")
    output = tmp_path / "results"
    job.run_job(job_of(data, output, stem, **asked), CONSOLE, quiet=True)
    cg.verify(output / "fit.zarr")
    got = cg.open_store(output / "fit.zarr").compute()
    expected = fitted_from_stores(data, output, **options)
    assert set(got.data_vars) == set(expected.data_vars)
    for name in ESTIMATED:
        if name in expected:
            np.testing.assert_array_equal(got[name].values, expected[name].values, err_msg=name)
    assert np.isfinite(got["sigma2"]).sum() > 1000
    xr.testing.assert_identical(
        got.drop_vars(ESTIMATED, errors="ignore").drop_attrs(deep=False),
        expected.drop_vars(ESTIMATED, errors="ignore").drop_attrs(deep=False),
    )
    attrs = {key: got.attrs[key] for key in expected.attrs}
    assert attrs == expected.attrs


@pytest.mark.filterwarnings("ignore:The contrast 'a' has 2 weights")
def test_any_number_of_threads_leaves_the_same_bytes(data, tmp_path):
    trees = []
    for n_threads in (1, 4):
        output = tmp_path / str(n_threads)
        job.run_job(job_of(data, output, n_threads=n_threads, smoothing_fwhm=6.0), CONSOLE, quiet=True)
        stores = [output / "fit.zarr", *(output / "runs.zarr").iterdir()]
        files = [path for store in stores for path in [store, *store.rglob("*")] if path.is_file()]
        trees.append({path.relative_to(output): path.read_bytes() for path in files})
    assert len(trees[0]) > 40
    assert trees[0] == trees[1]


@pytest.mark.filterwarnings(
    "ignore:The contrast 'a' has 2 weights", "ignore:In run .* are more autocorrelated"
)
@pytest.mark.parametrize(
    "options",
    [
        {"mask": None},
        {"noise_model": "auto"},
        {"signal_scaling": "run"},
        {"memory": "tight"},
        {"sample_masks": True, "compat": "nilearn"},
    ],
    ids=str,
)
def test_where_one_pass_is_not_enough_the_fit_is_from_the_stores(data, tmp_path, monkeypatch, options):
    called = []
    original = job.fit

    def watched(*arguments, **given):
        called.append(True)
        return original(*arguments, **given)

    monkeypatch.setattr(job, "fit", watched)
    if options.get("memory") == "tight":
        # Enough for each stage by itself, and for so many threads that convert, but not with the sums of the fit beside them.
        _, models, described = preflight.examine(job_of(data, tmp_path / "none"))
        least = max(jobplan.least_memory(job_of(data, tmp_path / "none"), models, described).values())
        needed = min((one.needed for one in described.values()), key=lambda one: one(1))
        n_threads = next(n for n in range(1, 100) if needed(n) >= least)
        options = {"memory": str(needed(n_threads)), "n_threads": n_threads}
    output = tmp_path / "results"
    masks = {"sample_masks": (str(data / "censored.txt"), "all")} if "sample_masks" in options else {}
    job.run_job(job_of(data, output, **{**options, **masks}), CONSOLE, quiet=True)
    assert called == [True]
    got = cg.open_store(output / "fit.zarr")
    expected = fitted_from_stores(data, output, **{k: v for k, v in options.items() if k != "mask"})
    np.testing.assert_array_equal(got["beta"], expected["beta"])


def test_what_a_plan_holds_of_a_run_is_not_its_mask(data, tmp_path):
    """That of all runs is there once, however many there are."""
    asked = job_of(data, tmp_path / "results")
    _, models, described = preflight.examine(asked)
    planned = jobplan.one_pass(asked, models, described)
    masks = [one.mask.values for one in planned.fit_plan.runs]
    masks += [one.run["mask"].values for one in described.values()]
    assert len(masks) == 4
    assert all(np.shares_memory(masks[0], one) for one in masks)


def test_smoothed_values_are_those_of_the_whole_volume_and_missing_outside_the_mask(tmp_path):
    write_simulated_run(tmp_path / "run.nii", shape=(20, 22, 37), n_volumes=40)
    run = nib.load(tmp_path / "run.nii")
    inside = np.zeros(run.shape[:3], dtype=np.uint8)
    inside[3:9, 5:17, 14:19] = 1
    inside[4, 6, 30] = 1
    mask = nib.Nifti1Image(inside, run.affine)
    full = nib.Nifti1Image(np.ones_like(inside), run.affine)
    part = cg.convert(tmp_path / "run.nii", tmp_path / "part.zarr", mask=mask, smoothing_fwhm=7.0)
    whole = cg.convert(tmp_path / "run.nii", tmp_path / "whole.zarr", mask=full, smoothing_fwhm=7.0)
    free = cg.convert(tmp_path / "run.nii", tmp_path / "free.zarr", smoothing_fwhm=7.0)
    expected = whole["bold"].where(part["mask"]).values
    np.testing.assert_allclose(part["bold"], expected, rtol=2.5e-7)
    np.testing.assert_array_equal(part["bold"].notnull(), np.broadcast_to(inside.T == 1, part["bold"].shape))
    np.testing.assert_array_equal(free["bold"], whole["bold"])
    assert part.attrs["processing"][0].endswith(", in the mask")
    assert free.attrs["processing"][0].endswith("half maximum")
    np.testing.assert_array_equal(part["mean_image"], whole["mean_image"])


def test_the_volumes_of_a_voxel_block_come_in_order_whatever_the_threads(tmp_path):
    write_simulated_run(tmp_path / "run.nii.gz", shape=(12, 14, 40), n_volumes=150)
    blocks = {}
    options = {"mask": None, "t_r": None, "smoothing_fwhm": None, "overwrite": False, "progress": None}
    converting.convert_run(
        tmp_path / "run.nii.gz",
        tmp_path / "run.zarr",
        memory=2**30,
        n_threads=6,
        consume=lambda number, block: blocks.setdefault(number, []).append(block.copy()),
        **options,
    )
    data = np.asarray(nib.load(tmp_path / "run.nii.gz").dataobj).T
    assert sorted(blocks) == [0, 1, 2]
    for number, parts in blocks.items():
        np.testing.assert_array_equal(np.concatenate(parts), data[:, 16 * number : 16 * number + 16])


def test_a_failure_of_one_thread_ends_all_and_leaves_nothing(tmp_path, monkeypatch):
    write_simulated_run(tmp_path / "run.nii.gz", shape=(12, 14, 40), n_volumes=150)
    options = {"mask": None, "t_r": None, "smoothing_fwhm": None, "overwrite": False, "progress": None}

    def fails(number, block):
        if number == 1:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        converting.convert_run(
            tmp_path / "run.nii.gz",
            tmp_path / "run.zarr",
            memory=2**30,
            n_threads=4,
            consume=fails,
            **options,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["run.nii.gz"]
    original = nifti.RunReader.read

    def breaks(self, block, start):
        if start >= 64:
            raise NiftiError("cut off")
        original(self, block, start)

    monkeypatch.setattr(nifti.RunReader, "read", breaks)
    with pytest.raises(NiftiError, match="cut off"):
        cg.convert(tmp_path / "run.nii.gz", tmp_path / "run.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["run.nii.gz"]


def test_a_job_that_fails_in_its_second_run_leaves_no_fit_and_goes_on_from_the_first(data, tmp_path):
    output = tmp_path / "results"
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in data.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    whole = (broken / "run2.nii").read_bytes()
    (broken / "run2.nii").write_bytes(whole)
    asked = job_of(broken, output)
    with pytest.MonkeyPatch.context() as patch:
        original = nifti.RunReader.read

        def breaks(self, block, start):
            if "run2" in self.name and start:
                raise NiftiError("cut off")
            original(self, block, start)

        patch.setattr(nifti.RunReader, "read", breaks)
        with pytest.raises(NiftiError, match="cut off"):
            job.run_job(asked, CONSOLE, quiet=True)
    assert sorted(path.name for path in output.rglob("*.zarr")) == ["runs.zarr"]
    assert [path.name for path in (output / "runs.zarr").glob("run-*")] == ["run-1"]
    with pytest.warns(match="2 weights"):
        job.run_job(asked, CONSOLE, quiet=True)
    other = tmp_path / "other"
    with pytest.warns(match="2 weights"):
        job.run_job(job_of(data, other), CONSOLE, quiet=True)
    first, second = (cg.open_store(one / "fit.zarr") for one in (output, other))
    for name in ESTIMATED:
        np.testing.assert_array_equal(first[name], second[name])


def test_the_linear_algebra_of_scipy_is_not_used(monkeypatch, data, tmp_path):
    """Its threads are not held to one, as those of numpy's are (the linter bans the import, too)."""
    import scipy.linalg

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("scipy.linalg was called")

    for name in scipy.linalg.__all__:
        if callable(getattr(scipy.linalg, name)) and not isinstance(getattr(scipy.linalg, name), type):
            monkeypatch.setattr(scipy.linalg, name, refuse)
    run = cg.convert(data / "run1.nii", tmp_path / "run.zarr", mask=data / "mask.nii.gz", smoothing_fwhm=5)
    for noise in ("ols", "ar1", "ar3"):
        cg.fit(run, data / "design1.npz", noise_model=noise).compute()
