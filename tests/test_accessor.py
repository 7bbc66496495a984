"""The accessor .glm: functions as methods, and a summary that people can read."""

import inspect
import pickle
import re

import numpy as np
import pytest
import xarray as xr

import chunkglm as cg
from chunkglm.accessor import DataArrayGLM, DatasetGLM, DataTreeGLM
from chunkglm.testing import raise_if_computes


@pytest.fixture(scope="module")
def fit(two_runs, two_designs):
    return cg.fit(two_runs, two_designs)


def test_chain__gives_what_the_functions_give(two_runs, two_designs):
    run, design = two_runs["a"], two_designs["a"]
    z = run.glm.fit(design).glm.contrast("DSt - SSt").glm.fixed_effects().z_score
    expected = cg.fixed_effects(cg.contrast(cg.fit(run, design), "DSt - SSt")).z_score
    xr.testing.assert_identical(z, expected)
    image = z.glm.to_nifti()
    np.testing.assert_array_equal(image.affine, cg.to_nifti(expected).affine)
    np.testing.assert_array_equal(np.asarray(image.dataobj), expected.values.T)


def test_options_are_passed_on(two_runs, two_designs, fit, tmp_path):
    run, design = two_runs["a"], two_designs["a"]
    ols = run.glm.fit(design, noise_model="ols", signal_scaling=None)
    assert ols.attrs["noise_model"] == "ols"
    xr.testing.assert_identical(
        fit.glm.contrast("DSt").glm.fixed_effects(precision_weighted=True),
        cg.fixed_effects(cg.contrast(fit, "DSt"), precision_weighted=True),
    )
    xr.testing.assert_identical(
        fit.glm.contrast("DSt").glm.leave_one_out(), cg.leave_one_out(cg.contrast(fit, "DSt"))
    )
    xr.testing.assert_identical(
        ols.glm.append_run(two_runs["b"], two_designs["b"], label="b"),
        cg.append_run(ols, two_runs["b"], two_designs["b"], label="b"),
    )
    saved = fit.glm.save(tmp_path / "fit.zarr")
    xr.testing.assert_equal(saved.compute(), fit.compute())


def test_places(two_runs):
    run = two_runs["a"]
    point = [float(run[axis][3]) for axis in "xyz"]
    assert float(run.bold[5].glm.at(*point)) == float(run.bold[5, 3, 3, 3])
    xr.testing.assert_identical(run.glm.at(*point), cg.at(run, *point))
    assert "x_mm" in run.glm.world().coords
    assert "x_mm" in run.mask.glm.world().coords


def test_pictures(two_runs, two_designs, fit):
    run = two_runs["a"]
    z = cg.contrast(fit, "DSt").z_score
    figure = z.sel(run="a").glm.plot(run.bold[0], threshold=1.0, title="here")
    assert "here" in [text.get_text() for text in figure.texts]
    point = [float(run[axis][4]) for axis in "xyz"]
    assert len(run.glm.time_course(*point).axes) == 1
    tree = xr.DataTree.from_dict(
        {f"run-{label}": one.drop_dims("regressor", errors="ignore") for label, one in two_runs.items()}
    )
    assert len(tree.glm.time_course(*point, fit=fit).axes) == 2


def test_trees(two_runs, two_designs):
    tree = xr.DataTree.from_dict(
        {f"sub-{label}/run-1": run[["bold", "mask"]] for label, run in two_runs.items()}
    )
    designs = {f"sub-{label}": {"run-1": design} for label, design in two_designs.items()}
    combined = tree.glm.fit(designs).glm.contrast("DSt - SSt").glm.fixed_effects()
    for label in two_runs:
        expected = cg.fixed_effects(cg.contrast(cg.fit(two_runs[label], two_designs[label]), "DSt - SSt"))
        xr.testing.assert_identical(combined[f"sub-{label}"].to_dataset(), expected)


@pytest.mark.parametrize(
    ("accessor", "names"),
    [
        (
            DatasetGLM,
            [
                "fit",
                "contrast",
                "fixed_effects",
                "leave_one_out",
                "append_run",
                "at",
                "world",
                "time_course",
                "save",
            ],
        ),
        (DataArrayGLM, ["at", "world", "plot", "to_nifti"]),
        (DataTreeGLM, ["fit", "contrast", "fixed_effects", "leave_one_out", "time_course", "save"]),
    ],
)
def test_methods__have_the_signature_and_the_text_of_their_functions(accessor, names):
    assert [name for name in vars(accessor) if not name.startswith("_")] == names
    for name in names:
        method, function = getattr(accessor, name), getattr(cg, name)
        assert method.__doc__ == function.__doc__
        assert (
            list(inspect.signature(method).parameters)[1:] == list(inspect.signature(function).parameters)[1:]
        )
        # Bound, as a notebook's help shows it.
        assert (
            list(inspect.signature(getattr(accessor(None), name)).parameters)
            == list(inspect.signature(function).parameters)[1:]
        )


def test_accessor__keeps_nothing(two_runs):
    run = two_runs["a"]
    run.glm  # noqa: B018
    assert vars(run.glm) == {"_obj": run}
    xr.testing.assert_identical(pickle.loads(pickle.dumps(run)), run)


# ---------------------------------------------------------------------------------------------------------------- repr


def lines(obj):
    return {line.split("  ")[1]: line for line in repr(obj.glm).splitlines()[1:]}


def test_repr__of_a_run(two_runs):
    run = two_runs["a"].assign_attrs(
        repetition_time=2.0, source_name="a.nii.gz", processing=["smoothed 5 mm"]
    )
    assert repr(run.glm).startswith("chunkglm: run\n")
    found = repr(run.glm)
    for expected in (
        "60, one every 2 s",
        "9 x 10 x 8 of 3 x 3 x 3 mm",
        "int16, 0.1 MiB",
        "a.nii.gz",
        "smoothed 5 mm",
    ):
        assert expected in found
    assert "oblique" not in found
    assert ".glm" in found


def test_repr__of_fit_contrast_and_fixed_effects(fit):
    with raise_if_computes():
        found = repr(fit.glm)
        for expected in ("chunkglm: fit", "a, b", "DSt", "ar1", "percent of the voxel's mean", "dof"):
            assert expected in found
        contrasts = fit.glm.contrast({"first": "DSt - SSt", "second": "DSp"})
        found = repr(contrasts.glm)
        for expected in ("chunkglm: t contrast", "first = DSt - SSt, second = DSp", "a, b"):
            assert expected in found
        assert "t fixed effects" in repr(contrasts.glm.fixed_effects().glm)
        assert "F fixed effects" in repr(fit.glm.contrast(["DSt", "SSt"]).glm.fixed_effects().glm)
        assert "without each run" in repr(contrasts.glm.leave_one_out().glm)
        assert "z_score: standard normal" in repr(contrasts.z_score.glm)


def test_repr__of_what_chunkglm_did_not_make():
    assert repr(xr.Dataset({"a": 1}).glm).startswith("chunkglm: dataset\n")
    assert "voxels" not in repr(xr.DataArray(np.zeros(3)).glm)
    assert "2 x 3 x 4" in repr(xr.DataArray(np.zeros((4, 3, 2)), dims=("z", "y", "x")).glm)
    assert "2 x 1 x 4" in repr(xr.DataArray(np.zeros((4, 2)), dims=("z", "x")).glm)


def test_repr__of_a_tree(two_runs):
    tree = xr.DataTree.from_dict({f"run-{n}": two_runs["a"][["bold"]] for n in range(20)})
    assert "tree of 20 datasets" in repr(tree.glm)
    assert "and 8 more" in repr(tree.glm)


def test_repr__in_a_notebook_is_a_table_in_which_names_are_text(two_runs):
    run = two_runs["a"].assign_attrs(source_name="<script>alert(1)</script>.nii")
    page = run.glm._repr_html_()
    assert "<table>" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert len(re.findall("<tr>", page)) == len(repr(run.glm).splitlines()) - 1
