"""Studies: stores whose names carry BIDS entities, opened as trees, saved as trees."""

import shutil

import nibabel as nib
import numpy as np
import pytest
import xarray as xr

import chunkglm as cg
from chunkglm import grids
from chunkglm.entities import fit_and_label, natural, tree_path
from chunkglm.errors import (
    ChunkGLMWarning,
    ContrastError,
    DesignError,
    GridMismatchError,
    IncompleteStoreError,
    InputError,
    SourceNotFoundError,
    StoreError,
    StoreExistsError,
)
from chunkglm.testing import raise_if_computes, write_simulated_run
from chunkglm.trees import datasets_of, tree_of


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One small run store."""
    folder = tmp_path_factory.mktemp("one")
    write_simulated_run(folder / "run.nii.gz", None, folder / "mask.nii.gz", shape=(5, 6, 7), n_volumes=30)
    cg.convert(folder / "run.nii.gz", folder / "run-1.zarr", mask=folder / "mask.nii.gz")
    return folder / "run-1.zarr"


@pytest.fixture
def study(store, tmp_path):
    """A function that makes a study with these places."""

    def make(*places):
        folder = tmp_path / "study.zarr"
        for place in places:
            shutil.copytree(store, folder / place)
        return folder

    return make


def data_paths(tree):
    return list(datasets_of(tree))


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("run-1", "run-1"),
        ("run-face task", "run-face task"),
        ("run-a_b", "run-a_b"),
        ("sub-01", "sub-01"),
        ("sub-01_run-2", "sub-01/run-2"),
        ("sub-01_ses-test_task-oneback_run-1_bold.zarr", "sub-01/ses-test/task-oneback/run-1"),
        ("sub-01_task-rest_acq-fast_run-1", "sub-01/task-rest/acq-fast_run-1"),
        ("task-rest_run-1", "task-rest/run-1"),
        ("sub-01/ses-2/run-10.zarr", "sub-01/ses-2/run-10"),
        ("sub-01/sub-01_task-rest", "sub-01/task-rest"),
        ("sub-01/func/sub-01_task-rest_run-2_bold", "sub-01/task-rest/run-2"),
        ("sub-01_task-a_run-1_space-MNI_desc-preproc_bold", "sub-01/task-a/run-1_space-MNI_desc-preproc"),
    ],
)
def test_tree_path__subject_session_task_and_the_rest(place, path):
    assert tree_path(place) == path


@pytest.mark.parametrize(
    ("path", "fit", "label"),
    [
        ("run-1", "", "1"),
        (".", "", "1"),
        ("faces", "", "faces"),
        ("sub-01/run-2", "sub-01", "2"),
        ("sub-01/ses-2/task-rest/run-1", "sub-01/task-rest", "ses-2_run-1"),
        ("sub-01/ses-2", "sub-01", "ses-2"),
        ("sub-01/task-rest", "sub-01/task-rest", "1"),
        ("patients/mary/run-3", "patients/mary", "3"),
        ("run-a_b", "", "a_b"),
        ("sub-01/task-a/acq-x_run-1", "sub-01/task-a", "acq-x_run-1"),
        ("sub-01/task-a/run-1_space-MNI_desc-preproc", "sub-01/task-a/space-MNI_desc-preproc", "1"),
        ("sub-01/task-a/run-1_echo-2", "sub-01/task-a/echo-2", "1"),
        ("run-1_desc-smooth", "desc-smooth", "1"),
    ],
)
def test_fit_and_label__runs_of_one_subject_and_task(path, fit, label):
    assert fit_and_label(path) == (fit, label)


def test_natural__numbers_count():
    names = ["run-10", "run-2", "sub-2/run-1", "sub-10/run-1", "run-1b", "run-1"]
    assert sorted(names, key=natural) == ["run-1", "run-1b", "run-2", "run-10", "sub-2/run-1", "sub-10/run-1"]


def test_open_study__levels_of_names(study):
    folder = study(
        "sub-2_ses-a_task-rest_run-1",
        "sub-10_task-rest_run-2",
        "sub-2_ses-a_task-rest_run-10",
        "sub-2_ses-a_task-rest_run-2",
    )
    with raise_if_computes():
        tree = cg.open_study(folder)
    assert data_paths(tree) == [
        "sub-2/ses-a/task-rest/run-1",
        "sub-2/ses-a/task-rest/run-2",
        "sub-2/ses-a/task-rest/run-10",
        "sub-10/task-rest/run-2",
    ]
    assert set(tree["sub-2/ses-a/task-rest/run-2"].data_vars) == {"bold", "mask", "mean_image"}


def test_open_study__flat_names_and_folders_give_the_same_tree(study, tmp_path):
    names = ["sub-1_task-a_run-1", "sub-2_task-a_run-1"]
    flat = cg.open_study(study(*names)).load()
    shutil.rmtree(tmp_path / "study.zarr")
    folder = study(*(name.replace("_", "/") for name in names))
    for inner in (
        folder,
        folder / "sub-1",
        folder / "sub-1" / "task-a",
        folder / "sub-2",
        folder / "sub-2" / "task-a",
    ):
        (inner / "zarr.json").write_text(
            '{"zarr_format": 3, "node_type": "group", "attributes": {"chunkglm_study": true}}'
        )
    xr.testing.assert_identical(cg.open_study(folder), flat)
    assert data_paths(cg.open_study(folder / "sub-2")) == ["task-a/run-1"]


def test_convert__into_folders_of_a_study(tmp_path):
    mask = tmp_path / "mask.nii.gz"
    write_simulated_run(tmp_path / "run.nii.gz", None, mask, shape=(5, 6, 7), n_volumes=30)
    for place in ("sub-1/ses-1/run-1", "sub-1/ses-2/run-1"):
        cg.convert(tmp_path / "run.nii.gz", tmp_path / "study.zarr" / place, mask=mask)
    assert data_paths(cg.open_study(tmp_path / "study.zarr")) == ["sub-1/ses-1/run-1", "sub-1/ses-2/run-1"]
    # Plain xarray sees the same groups.
    with xr.open_datatree(tmp_path / "study.zarr", engine="zarr", consolidated=False) as plain:
        assert "bold" in plain["sub-1/ses-2/run-1"].data_vars
    cg.verify(tmp_path / "study.zarr")
    with pytest.raises(StoreExistsError, match="study"):
        cg.convert(tmp_path / "run.nii.gz", tmp_path / "study.zarr" / "sub-1", overwrite=True)
    with pytest.raises(StoreExistsError, match="inside another store"):
        cg.convert(tmp_path / "run.nii.gz", tmp_path / "study.zarr/sub-1/ses-1/run-1/run-2")


def test_open_study__what_else_lies_there_is_no_part(study):
    folder = study("run-1")
    (folder / "notes.txt").write_text("later")
    (folder / "run-2.partial").mkdir()
    (folder / "other").mkdir()
    (folder / "sub-01_task-x_bold.json").write_text("{}")
    (folder / "sub-02" / "anat").mkdir(parents=True)
    (folder / "sub-03" / "run-1.partial").mkdir(parents=True)
    assert data_paths(cg.open_study(folder)) == ["run-1"]


def test_open_study__a_run_that_is_not_complete_is_named(study):
    folder = study("sub-1_run-1", "sub-1_run-2")
    (folder / "sub-1_run-2" / "zarr.json").unlink()
    with pytest.raises(IncompleteStoreError, match="sub-1_run-2"):
        cg.open_study(folder)


def test_open_study__two_names_for_one_place(study):
    with pytest.raises(StoreError, match="sub-1_run-1_bold.zarr.*both 'sub-1/run-1'"):
        cg.open_study(study("sub-1_run-1", "sub-1_run-1_bold.zarr"))


def test_open_study__a_run_cannot_hold_runs(study):
    with pytest.raises(StoreError, match="inside of .*sub-1_task-a, which is a store itself"):
        cg.open_study(study("sub-1_task-a", "sub-1_task-a_run-2"))


def test_open_study__nothing_there(tmp_path):
    with pytest.raises(SourceNotFoundError, match="holds no run stores"):
        cg.open_study(tmp_path)
    with pytest.raises(SourceNotFoundError, match="no study"):
        cg.open_study(tmp_path / "nowhere.zarr")


def test_open_study__opening_reads_no_data(study):
    """No chunk of a variable on voxels is needed: not even its file."""
    folder = study("sub-1_run-1", "sub-2_run-1")
    for place in ("sub-1_run-1", "sub-2_run-1"):
        for name in ("bold", "mask", "mean_image"):
            shutil.rmtree(folder / place / name / "c")
    tree = cg.open_study(folder)
    assert tree["sub-2/run-1"].bold.shape == (30, 7, 6, 5)


def test_save__of_a_tree(tmp_path, study):
    tree = cg.open_study(study("sub-1_run-1", "sub-2_run-1"))
    means = tree.map_over_datasets(
        lambda ds: ds[["bold"]].mean("time", keep_attrs=True) if "bold" in ds else ds
    )
    saved = cg.save(means, tmp_path / "means.zarr")
    assert data_paths(saved) == ["sub-1/run-1", "sub-2/run-1"]
    np.testing.assert_array_equal(saved["sub-2/run-1"].bold, means["sub-2/run-1"].bold)
    with xr.open_datatree(tmp_path / "means.zarr", engine="zarr", consolidated=False) as plain:
        assert plain["sub-1/run-1"].bold.shape == (7, 6, 5)
    # The same again is up to date; other content is refused.
    cg.save(means, tmp_path / "means.zarr")
    with pytest.raises(StoreExistsError):
        cg.save(means.map_over_datasets(lambda ds: ds + 1), tmp_path / "means.zarr")


def test_save__of_a_tree_whose_names_could_not_be_found_again(tmp_path):
    tree = xr.DataTree.from_dict({"mary": xr.Dataset({"a": 1})})
    with pytest.raises(InputError, match="'mary'.*sub-, ses-"):
        cg.save(tree, tmp_path / "a.zarr")
    with pytest.raises(InputError, match="no data"):
        cg.save(xr.DataTree(), tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


# ---------------------------------------------------------------------------------------------------------------- fits


@pytest.fixture(scope="module")
def tree(two_runs):
    """Two subjects, one of them with two sessions."""
    runs = {label: run[["bold", "mask"]].chunk(z=4) for label, run in two_runs.items()}
    return tree_of(
        {
            "sub-2/ses-1/task-a/run-1": runs["a"],
            "sub-2/ses-2/task-a/run-1": runs["b"],
            "sub-10/task-a/run-3": runs["b"],
        }
    )


@pytest.fixture(scope="module")
def designs(two_designs):
    return {
        "sub-2/ses-1/task-a/run-1": two_designs["a"],
        "sub-2/ses-2/task-a/run-1": two_designs["b"],
        "sub-10/task-a/run-3": two_designs["b"],
    }


def test_fit__of_a_study_is_that_of_each_subject_and_task(tree, designs, two_runs, two_designs):
    with raise_if_computes():
        fits = cg.fit(tree, designs)
        combined = cg.fixed_effects(cg.contrast(fits, {"a": "DSt - SSt", "b": "DSp"}))
    assert data_paths(fits) == ["sub-2/task-a", "sub-10/task-a"]
    assert fits["sub-2/task-a"].run.values.tolist() == ["ses-1_run-1", "ses-2_run-1"]
    assert fits["sub-10/task-a"].run.values.tolist() == ["3"]
    runs = {
        f"ses-{n}_run-1": run[["bold", "mask"]].chunk(z=4) for n, run in enumerate(two_runs.values(), start=1)
    }
    alone = cg.fit(runs, list(two_designs.values()))
    xr.testing.assert_identical(fits["sub-2/task-a"].to_dataset().compute(), alone.compute())
    expected = cg.fixed_effects(cg.contrast(alone, {"a": "DSt - SSt", "b": "DSp"}))
    xr.testing.assert_identical(combined["sub-2/task-a"].to_dataset().compute(), expected.compute())
    others = cg.leave_one_out(cg.contrast(fits["sub-2/task-a"].to_dataset(), "DSt"))
    assert others.sizes["left_out"] == 2


def test_fit__of_a_study_is_saved_and_asked_again(tree, designs, tmp_path):
    fits = cg.save(cg.fit(tree, designs), tmp_path / "fits.zarr")
    assert data_paths(cg.open_study(tmp_path / "fits.zarr")) == ["sub-2/task-a", "sub-10/task-a"]
    z = cg.contrast(fits, "DSt - SSt")["sub-10/task-a"].z_score
    fresh = cg.contrast(cg.fit(tree, designs), "DSt - SSt")["sub-10/task-a"].z_score
    xr.testing.assert_identical(z.compute(), fresh.compute())


def test_fit__of_one_subject_of_a_study(tree, two_designs):
    fits = cg.fit(tree["sub-10"], [two_designs["b"]])
    assert data_paths(fits) == ["task-a"]
    one = cg.fit(tree["sub-10/task-a"], [two_designs["b"]])
    xr.testing.assert_identical(one.compute(), fits["task-a"].to_dataset().compute())


def test_fit__designs_in_order_or_nested(tree, designs):
    listed = cg.fit(tree, list(designs.values()))
    nested = cg.fit(
        tree,
        {
            "sub-2": {
                "ses-1": {"task-a/run-1": designs["sub-2/ses-1/task-a/run-1"]},
                "ses-2/task-a/run-1": designs["sub-2/ses-2/task-a/run-1"],
            },
            "sub-10/task-a": {"run-3": designs["sub-10/task-a/run-3"]},
        },
    )
    for path in ("sub-2/task-a", "sub-10/task-a"):
        np.testing.assert_array_equal(listed[path].design, nested[path].design)


def test_fit__sample_masks_of_a_study(tree, designs):
    fits = cg.fit(tree, designs, sample_masks={"sub-10/task-a/run-3": np.arange(40)})
    assert fits["sub-10/task-a"].sample_mask.values.sum() == 40
    assert fits["sub-2/task-a"].sample_mask.values.sum() == 60 + 46


def test_fit__what_is_missing_or_strange_is_named(tree, designs):
    with pytest.raises(DesignError, match="no design for 'sub-10/task-a/run-3'"):
        cg.fit(tree, {path: one for path, one in designs.items() if "sub-2" in path})
    with pytest.raises(InputError, match="designs for 'sub-3'.*Use these as keys"):
        cg.fit(tree, designs | {"sub-3": next(iter(designs.values()))})
    with pytest.raises(InputError, match="tree of 3 runs"):
        cg.fit(tree, list(designs.values())[:2])
    with pytest.raises(InputError, match="sample masks for 'sub-3'"):
        cg.fit(tree, designs, sample_masks={"sub-3": [1]})


def test_fit__errors_and_warnings_say_of_whom(tree, designs):
    path = "sub-10/task-a/run-3"
    with pytest.raises(DesignError, match="^sub-10/task-a: .*run '3'"):
        cg.fit(tree, designs | {path: designs[path][:-1]})
    doubled = designs[path].assign(again=designs[path]["DSt"])
    with pytest.warns(ChunkGLMWarning, match="^sub-10/task-a: The design of run 3 .* redundant"):
        cg.fit(tree, designs | {path: doubled})
    fits = cg.fit(tree, designs)
    with pytest.raises(ContrastError, match="^sub-2/task-a: "):
        cg.contrast(fits, "nothing")
    with pytest.raises(InputError, match="no data in the tree"):
        cg.contrast(xr.DataTree(), "DSt")


def test_fit__two_runs_of_one_label(two_runs, two_designs):
    tree = xr.DataTree.from_dict({"run-1": two_runs["a"], "1": two_runs["a"]})
    with pytest.raises(InputError, match="'run-1' and '1' of the tree would both be run 1"):
        cg.fit(tree, [two_designs["a"]] * 2)


def test_open_study__grids_that_differ_by_rounding_have_one_set_of_labels(tmp_path):
    mask = tmp_path / "mask.nii.gz"
    write_simulated_run(tmp_path / "run.nii", None, mask, shape=(5, 6, 7), n_volumes=30)
    image = nib.load(tmp_path / "run.nii")
    for number, nudge in enumerate((0.0, 1e-4, 0.5), start=1):
        affine = image.affine.copy()
        affine[0, 3] += nudge
        moved = nib.Nifti1Image(np.asarray(image.dataobj), affine, image.header)
        moved.set_qform(affine, 1)
        moved.set_sform(affine, 1)
        nib.save(moved, tmp_path / f"moved-{number}.nii")
        cg.convert(
            tmp_path / f"moved-{number}.nii",
            tmp_path / "study.zarr" / f"run-{number}",
            mask=xr.DataArray(
                np.asarray(nib.load(mask).dataobj).T,
                dims=("z", "y", "x"),
                coords=grids.grid_coords(affine, (7, 6, 5), b""),
            ),
        )
    study = cg.open_study(tmp_path / "study.zarr")
    alone = [cg.open_run(tmp_path / "study.zarr" / f"run-{number}").bold for number in (1, 2)]
    first, second, third = (study[f"run-{number}"].bold for number in (1, 2, 3))
    assert (alone[0] - alone[1]).shape == (30, 7, 6, 0)  # what xarray does with labels that differ
    assert (first - second).shape == first.shape
    # The affine is still its own, and other grids are still others.
    assert cg.to_nifti(second[0]).affine[0, 3] == pytest.approx(image.affine[0, 3] + 1e-4, abs=1e-6)
    assert float(third.x[0]) == pytest.approx(image.affine[0, 3] + 0.5)


def test_fixed_effects__of_runs_that_xarray_joined_outer_are_refused(two_runs, two_designs):
    contrasts = [
        cg.contrast(cg.fit(two_runs[label], two_designs[label]), "DSt").assign_coords(run=[label])
        for label in two_runs
    ]
    moved = contrasts[1].assign_coords(x=contrasts[1].x.copy(data=contrasts[1].x.values + 1e-4))
    joined = xr.concat([contrasts[0], moved], "run", join="outer", data_vars="all")
    with pytest.raises(GridMismatchError, match=r"two labels \(18 for 9 voxels\)"):
        cg.fixed_effects(joined)
    fine = xr.concat([contrasts[0], moved], "run", join="override", data_vars="all")
    assert int(cg.fixed_effects(fine).n_runs.max()) == 2


# ------------------------------------------------------------------------------------------------------- plain folders


@pytest.mark.parametrize(
    "name", ["sub-01.zarr", "task-rest.zarr", "plain", "plain/sub-01", "memory://bucket/sub-01.zarr"]
)
def test_convert__a_folder_of_stores_is_a_study_whatever_its_name(tmp_path, name):
    mask = tmp_path / "mask.nii.gz"
    write_simulated_run(tmp_path / "run.nii.gz", None, mask, shape=(5, 6, 7), n_volumes=30)
    folder = name if "://" in name else tmp_path / name
    for number in (1, 2):
        cg.convert(tmp_path / "run.nii.gz", f"{folder}/run-{number}", mask=mask)
    assert data_paths(cg.open_study(folder)) == ["run-1", "run-2"]
    cg.verify(folder)
    with pytest.raises(StoreError, match="study with several runs"):
        cg.open_run(folder)
    with pytest.raises(StoreExistsError, match="stores of its own, so it is not replaced"):
        cg.convert(tmp_path / "run.nii.gz", folder, mask=mask, overwrite=True)
    assert data_paths(cg.open_study(folder)) == ["run-1", "run-2"]


def test_convert__a_study_named_after_a_subject_opens_with_plain_xarray(tmp_path, store):
    write_simulated_run(
        tmp_path / "run.nii.gz", None, tmp_path / "mask.nii.gz", shape=(5, 6, 7), n_volumes=30
    )
    cg.convert(
        tmp_path / "run.nii.gz", tmp_path / "sub-01.zarr" / "ses-1" / "run-1", mask=tmp_path / "mask.nii.gz"
    )
    with xr.open_datatree(tmp_path / "sub-01.zarr", engine="zarr", consolidated=False) as plain:
        assert "bold" in plain["ses-1/run-1"].data_vars


@pytest.mark.parametrize("target", ["fits", "fits.zarr", "memory://trees/fits"])
def test_save__of_a_tree_anywhere_gives_what_was_saved(tmp_path, target):
    place = target if "://" in target else str(tmp_path / target)
    first = cg.save(tree_of({"task-x/sub-01": xr.Dataset({"a": 1})}), place)
    second = cg.save(tree_of({"task-x/sub-02": xr.Dataset({"a": 2})}), place)
    assert (data_paths(first), data_paths(second)) == (["task-x/sub-01"], ["task-x/sub-02"])
    assert data_paths(cg.open_study(place)) == ["sub-01/task-x", "sub-02/task-x"]


def test_open_study__a_table_of_points_is_no_obstacle(two_runs, tmp_path):
    run = two_runs["a"][["mask"]]
    x = xr.DataArray([run.x[0], run.x[3], run.x[4]], dims="point")
    cg.save(cg.at(run, x, float(run.y[2]), float(run.z[2])), tmp_path / "maps.zarr" / "sub-1_desc-peaks")
    cg.save(run.isel(x=[0, 1, 4]), tmp_path / "maps.zarr" / "sub-1_desc-some")
    assert data_paths(cg.open_study(tmp_path / "maps.zarr")) == ["sub-1/desc-peaks", "sub-1/desc-some"]


def test_open_study__no_store_lies_in_another_however_deep(study):
    with pytest.raises(StoreError, match="inside of .*sub-01, which is a store itself"):
        cg.open_study(study("sub-01", "sub-01_ses-1_task-x_run-1"))


def test_fit__lists_are_in_the_order_of_the_tree(two_runs, make_design):
    runs = [two_runs["a"][["bold", "mask"]].isel(time=slice(n)) for n in (60, 58, 56, 54)]
    paths = [f"sub-1/ses-{session}/task-{task}/run-1" for session in (1, 2) for task in "xy"]
    tree = tree_of(dict(zip(paths, runs, strict=True)))
    designs = [make_design(n, seed=n) for n in (60, 58, 56, 54)]
    listed = cg.fit(tree, designs, sample_masks=[np.arange(50 - k) for k in range(4)])
    by_path = cg.fit(tree, dict(zip(paths, designs, strict=True)))
    assert data_paths(listed) == ["sub-1/task-x", "sub-1/task-y"]
    for path in data_paths(listed):
        np.testing.assert_array_equal(listed[path].design, by_path[path].design)
    assert listed["sub-1/task-y"].sample_mask.sum("volume").values.tolist() == [49, 47]


def test_fit__designs_of_a_flat_tree_by_path_or_label(two_runs, two_designs):
    tree = tree_of({f"run-{label}": run[["bold", "mask"]] for label, run in two_runs.items()})
    by_label = cg.fit(tree, two_designs)
    by_path = cg.fit(tree, {f"run-{label}": design for label, design in two_designs.items()})
    xr.testing.assert_identical(by_label.compute(), by_path.compute())
    assert by_label.run.values.tolist() == ["a", "b"]


def test_fit__versions_of_one_recording_are_not_combined(two_runs, two_designs):
    run, design = two_runs["a"][["bold", "mask"]], two_designs["a"]
    tree = tree_of({f"sub-1/task-x/run-1_echo-{echo}": run for echo in (1, 2)})
    fits = cg.fit(tree, [design, design])
    assert data_paths(fits) == ["sub-1/task-x/echo-1", "sub-1/task-x/echo-2"]
    assert fits["sub-1/task-x/echo-1"].sizes["run"] == 1


def test_fit__runs_at_different_levels_are_refused(two_runs, two_designs):
    tree = tree_of({"run-1": two_runs["a"], "sub-1/run-1": two_runs["b"]})
    with pytest.raises(InputError, match="'run-1' and 'sub-1/run-1'"):
        cg.fit(tree, list(two_designs.values()))


def test_fit__warnings_are_not_lost_with_an_error(tree, designs):
    path = "sub-10/task-a/run-3"
    doubled = designs[path].assign(again=designs[path]["DSt"])
    with pytest.warns(ChunkGLMWarning, match="^sub-10/task-a"):
        fits = cg.fit(tree, designs | {path: doubled})
    with pytest.raises(ContrastError, match="^task-a: "):
        cg.contrast(fits["sub-10"], "again")
