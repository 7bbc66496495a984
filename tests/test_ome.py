"""What is not ours opens a run: a reader of OME-Zarr, and plain xarray a whole study."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import xarray as xr
import zarr

from chunkglm import convert, open_run, save
from chunkglm.errors import DamagedStoreError
from chunkglm.testing import write_simulated_run

SHAPE, N_TIME, SIZES, T_R = (9, 10, 8), 40, (2.5, 3.0, 3.5), 1.25  # x, y, z

# Its releases are for some Pythons only.
v05 = pytest.importorskip("ome_zarr_models.v05.image", reason="ome-zarr-models is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ome")


@pytest.fixture(scope="module")
def source(folder):
    """A run whose voxels and volumes have a size of their own along each axis, and its mask."""
    write_simulated_run(folder / "plain.nii", mask_path=folder / "mask.nii", shape=SHAPE, n_volumes=N_TIME)
    for name in ("plain", "mask"):
        image = nib.load(folder / f"{name}.nii")
        new = nib.Nifti1Image(np.asarray(image.dataobj), np.diag([*SIZES, 1.0]))
        new.header.set_zooms((*SIZES, T_R)[: new.ndim])
        new.header.set_xyzt_units("mm", "sec")
        new.to_filename(folder / f"{name}-sized.nii")
    return folder / "plain-sized.nii"


@pytest.fixture(scope="module")
def stores(folder, source):
    """Run stores made in all ways; not to be changed."""
    mask = folder / "mask-sized.nii"
    ways = {
        "plain": {},
        "masked": {"mask": mask},
        "smoothed": {"smoothing_fwhm": 6},
        "both": {"mask": mask, "smoothing_fwhm": 6},
    }
    for name, options in ways.items():
        convert(source, folder / "study.zarr" / f"run-{name}", **options)
    run = open_run(folder / "study.zarr" / "run-plain")
    save(run.isel(time=slice(None, None, 2), x=slice(None, None, -2)), folder / "study.zarr" / "run-part")
    return folder / "study.zarr"


@pytest.fixture
def copied(stores, tmp_path):
    """A run store to be changed."""
    shutil.copytree(stores / "run-plain", tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


def read(place):
    """Open a store as an image of OME-Zarr 0.5; what is not one is refused."""
    return v05.Image.from_zarr(zarr.open_group(place, mode="r"))


def without_chunks(place):
    """Take all chunks of all arrays away."""
    chunks = list(place.glob("*/c"))
    assert place / "bold" / "c" in chunks
    for chunk in chunks:
        shutil.rmtree(chunk) if chunk.is_dir() else chunk.unlink()


@pytest.mark.parametrize("name", ["plain", "masked", "smoothed", "both", "part"])
def test_ome_reader__opens_and_validates_a_run(stores, name):
    image = read(stores / f"run-{name}")
    (multiscale,) = image.ome_attributes.multiscales
    assert [axis.name for axis in multiscale.axes] == ["time", "z", "y", "x"]
    assert [axis.type for axis in multiscale.axes] == ["time", "space", "space", "space"]
    assert [axis.unit for axis in multiscale.axes] == ["second", "millimeter", "millimeter", "millimeter"]
    (dataset,) = multiscale.datasets
    (scale,) = dataset.coordinateTransformations
    steps = (2, 1, 1, 2) if name == "part" else (1, 1, 1, 1)
    np.testing.assert_allclose(scale.scale, np.multiply((T_R, *SIZES[::-1]), steps), rtol=1e-6)
    # The path leads to the array whose axes these are.
    bold = image.members[dataset.path]
    expected = (20, 8, 10, 5) if name == "part" else (N_TIME, *SHAPE[::-1])
    assert tuple(bold.shape) == expected
    assert tuple(bold.dimension_names) == ("time", "z", "y", "x")
    assert bold.data_type == ("float32" if name in {"smoothed", "both"} else "int16")


def test_ome_reader__needs_only_metadata(stores, copied):
    whole = read(copied)
    without_chunks(copied)
    assert read(copied) == whole
    # For the voxels it would need them.
    with pytest.raises(DamagedStoreError):
        open_run(copied)["bold"].compute()


def space_first(image):
    image["axes"] = image["axes"][1:] + image["axes"][:1]


def no_scale(image):
    image["datasets"][0]["coordinateTransformations"] = []


def short_scale(image):
    image["datasets"][0]["coordinateTransformations"][0]["scale"].pop()


def two_of_a_name(image):
    image["axes"][1]["name"] = "x"


def no_array(image):
    image["datasets"][0]["path"] = "signal"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (space_first, "space axes must be at the end"),
        (no_scale, "coordinateTransformations"),
        (short_scale, "does not match the dimensionality"),
        (two_of_a_name, "must be unique"),
        (no_array, "signal"),
    ],
)
def test_ome_reader__refuses_metadata_that_are_wrong(copied, change, complaint):
    read(copied)
    metadata = json.loads((copied / "zarr.json").read_text())
    change(metadata["attributes"]["ome"]["multiscales"][0])
    (copied / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=complaint):
        read(copied)


def test_plain_xarray__opens_a_study(stores):
    with xr.open_datatree(stores, engine="zarr", consolidated=False) as tree:
        assert set(tree.children) == {"run-plain", "run-masked", "run-smoothed", "run-both", "run-part"}
        for name, child in tree.children.items():
            run = open_run(stores / name)
            xr.testing.assert_equal(child.to_dataset()[["bold", "mask", "mean_image"]], run)
