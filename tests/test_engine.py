"""``xr.open_dataset(path, engine="nifti")``: what nibabel reads, in any order, and only what is asked for."""

import gzip
import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import nibabel as nib
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkglm import convert, fit, nifti, slabs, to_nifti
from chunkglm.errors import ChunkGLMWarning, InputError, NiftiError, SourceNotFoundError
from chunkglm.schema import SPACE
from chunkglm.testing import raise_if_computes
from chunkglm.xarray_plugin import NiftiBackend

SHAPE = (6, 5, 4, 7)  # x, y, z, time
OBLIQUE = np.array([[2.9, -0.4, 0.2, -90.0], [0.5, 2.8, -0.7, -120.0], [0.1, 0.6, 3.5, -60.0], [0, 0, 0, 1]])
ALIGNED = np.array([[-2.0, 0, 0, 30.5], [0, 2.5, 0, -40], [0, 0, 3.3, -20.2], [0, 0, 0, 1]])
DTYPES = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)] + ["float32", "float64"]


def write(
    path,
    *,
    shape=SHAPE,
    dtype="int16",
    order="<",
    version=1,
    scale=(np.nan, np.nan),
    affine=ALIGNED,
    t_r=2.2,
    units="sec",
    values=None,
):
    """Write an image byte by byte, so that any header and any stored value is possible."""
    path = Path(path)
    pair = ".img" in path.name or ".hdr" in path.name
    kinds = {(1, False): nib.Nifti1Header, (1, True): nib.nifti1.Nifti1PairHeader}
    kinds |= {(2, False): nib.nifti2.Nifti2Header, (2, True): nib.nifti2.Nifti2PairHeader}
    header = kinds[version, pair](endianness=order)
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header.set_sform(affine, 2)
    header["pixdim"][1:5] = [*np.linalg.norm(affine[:3, :3], axis=0), t_r]
    header.set_xyzt_units("mm", units)
    header["scl_slope"], header["scl_inter"] = scale
    header["descrip"], header["cal_max"] = b"made by a scanner", 3000
    header["vox_offset"] = 0 if pair else header.sizeof_hdr + 4
    stored = np.dtype(dtype).newbyteorder(order)
    if values is None:
        size = int(np.prod(shape)) * stored.itemsize
        values = np.random.default_rng(3).integers(0, 256, size, np.uint8).tobytes()
        values = np.frombuffer(values, stored).copy()
        if stored.kind == "f":
            # Quiet NaNs only: what a processor makes of others is its own.
            values[~np.isfinite(values)] = -0.0
    body = np.asarray(values, stored).tobytes()
    pack = gzip.compress if path.name.endswith(".gz") else bytes
    if pair:
        head = path.with_name(path.name.replace(".img", ".hdr"))
        head.write_bytes(pack(header.binaryblock + b"\0" * 4))
        path.with_name(path.name.replace(".hdr", ".img")).write_bytes(pack(body))
    else:
        path.write_bytes(pack(header.binaryblock + b"\0" * 4 + body))
    return path


def oracle(path):
    """What nibabel reads, in this machine's byte order, as (time, z, y, x)."""
    with np.errstate(all="ignore"):
        values = np.asanyarray(nib.load(path).dataobj)
    return np.array(values, values.dtype.newbyteorder("=")).T


def assert_same_bits(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(expected).tobytes()


def opened(path, **options):
    return xr.open_dataset(path, engine="nifti", **options)


@pytest.fixture(autouse=True)
def nothing_open():
    yield
    slabs._inflaters.clear()


@pytest.fixture
def inflated(monkeypatch):
    """Bytes that were decompressed."""
    counted = [0]

    class Counting:
        def __init__(self, decompressor):
            self._decompressor = decompressor

        def __getattr__(self, name):
            return getattr(self._decompressor, name)

        def copy(self):
            return Counting(self._decompressor.copy())

        def decompress(self, *args):
            data = self._decompressor.decompress(*args)
            counted[0] += len(data)
            return data

    original = slabs._new_decompressor
    monkeypatch.setattr(slabs, "_new_decompressor", lambda: Counting(original()))
    return counted


# ------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("version", [1, 2])
def test_values__are_those_of_nibabel(tmp_path, dtype, order, version):
    for number, scale in enumerate([(np.nan, np.nan), (0, 5), (1, 0), (-0.37, 0), (75.5, -3.25), (1, 12.5)]):
        suffix = (".nii", ".nii.gz", ".img", ".img.gz")[(number + version) % 4]
        path = write(tmp_path / f"{number}{suffix}", dtype=dtype, order=order, version=version, scale=scale)
        ds = opened(path)
        assert ds["bold"].dims == ("time", *SPACE)
        assert_same_bits(ds["bold"], oracle(path))
        assert_same_bits(opened(path, chunks={"time": -1, "z": 3})["bold"], oracle(path))
        back = tmp_path / "back.nii"
        with np.errstate(all="ignore"):
            image = to_nifti(ds["bold"], back, overwrite=True)
        if np.dtype(dtype).kind == "f" and number > 2:
            # The stored values of scaled floats cannot be found again in general.
            with np.errstate(all="ignore"):
                np.testing.assert_array_equal(np.asarray(image.dataobj).T, ds["bold"].values)
        elif np.dtype(dtype).itemsize < 8 and suffix.startswith(".nii"):
            whole = path.read_bytes() if suffix == ".nii" else gzip.decompress(path.read_bytes())
            assert back.read_bytes() == whole


@pytest.mark.parametrize(
    "suffix", [".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz", ".NII", ".Nii.GZ"]
)
def test_open__every_kind_of_file(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix.lower()}")
    values = oracle(path)
    path = path.rename(tmp_path / f"a{suffix}")
    for source in (path, str(path)):
        assert_same_bits(opened(source)["bold"], values)
        # Without an engine, it is found by the ending.
        assert_same_bits(xr.open_dataset(source)["bold"], values)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_open__three_dimensions_are_an_image(tmp_path, suffix):
    path = write(tmp_path / f"map{suffix}", shape=SHAPE[:3], scale=(0.5, 2), affine=OBLIQUE)
    ds = opened(path)
    assert list(ds.data_vars) == ["image"]
    assert_same_bits(ds["image"].transpose(*SPACE), oracle(path))
    assert "time" not in ds.coords
    for z in (2, slice(3, None, -2), [3, 1]):
        assert_same_bits(opened(path)["image"].isel(z=z), oracle(path)[z])
    image = to_nifti(ds["image"])
    np.testing.assert_array_equal(np.asarray(image.dataobj.get_unscaled()).T * 0.5 + 2, oracle(path))
    np.testing.assert_array_equal(image.affine, nib.load(path).affine)


def test_open__dimensions(tmp_path):
    path = write(tmp_path / "five.nii", shape=(*SHAPE, 1))
    assert_same_bits(opened(path)["bold"], oracle(path)[0])
    path = write(tmp_path / "single.nii", shape=(*SHAPE[:3], 1))
    assert opened(path)["bold"].shape == (1, 4, 5, 6)
    path = write(tmp_path / "vectors.nii.gz", shape=(3, 3, 3, 1, 3))
    with pytest.raises(NiftiError, match=r"vectors.nii.gz is a 5-D image.*Split"):
        opened(path)


@pytest.mark.parametrize("affine", [ALIGNED, OBLIQUE])
def test_open__coordinates_and_encoding_are_those_of_a_run_store(tmp_path, affine):
    values = np.random.default_rng(0).normal(1000, 200, np.prod(SHAPE)).astype(np.int16)
    path = write(tmp_path / "a.nii.gz", affine=affine, t_r=2200, units="msec", scale=(0.5, 3), values=values)
    run = convert(path, tmp_path / "a.zarr", mask=nib.Nifti1Image(np.ones(SHAPE[:3], np.uint8), affine))
    ds = opened(path)
    assert set(ds.coords) == set(run.coords)
    for name in ds.coords:
        xr.testing.assert_identical(ds[name].variable, run[name].variable)
    xr.testing.assert_identical(ds["bold"], run["bold"])
    assert nifti.source_packing(ds["bold"]) == nifti.source_packing(run["bold"]) is not None
    cut = {"time": slice(1, 5), "z": slice(None, None, -1), "x": 2}
    for selection in ({}, cut):
        one, other = (to_nifti(each["bold"].isel(selection)) for each in (ds, run))
        assert one.to_bytes() == other.to_bytes()
    # Saved with plain xarray it is packed as the file is.
    with pytest.warns(xr.SerializationWarning, match="without any _FillValue"):
        ds.to_zarr(tmp_path / "plain.zarr", zarr_format=3, consolidated=False)
    stored = xr.open_zarr(tmp_path / "plain.zarr", consolidated=False, mask_and_scale=False)["bold"]
    assert_same_bits(stored, values.reshape(SHAPE, order="F").T)


@pytest.mark.parametrize(
    ("t_r", "units", "expected"), [(2.2, "sec", 2.2), (720, "msec", 0.72), (0, "sec", None)]
)
def test_time__is_in_seconds_where_the_header_says(tmp_path, t_r, units, expected):
    ds = opened(write(tmp_path / "a.nii", t_r=t_r, units=units))
    if expected is None:
        assert "time" not in ds.coords
    else:
        np.testing.assert_array_equal(ds["time"], expected * np.arange(7))
        assert ds["time"].attrs["units"] == "s"
    to_nifti(ds["bold"], tmp_path / "b.nii")
    assert (tmp_path / "b.nii").read_bytes() == (tmp_path / "a.nii").read_bytes()


def test_time__that_cannot_be_meant_is_left_out(tmp_path):
    path = write(tmp_path / "a.nii", t_r=2200, units="sec")
    with pytest.warns(ChunkGLMWarning, match=r"a.nii has a repetition time of 2200 s.*assign_coords"):
        ds = opened(path)
    assert "time" not in ds.coords


def test_open__drop_variables(tmp_path):
    path = write(tmp_path / "a.nii")
    assert "time" not in opened(path, drop_variables="time").coords
    assert list(opened(path, drop_variables=["bold", "nothing"]).data_vars) == []


def test_open__a_relative_path_is_found_from_other_folders(tmp_path, monkeypatch):
    write(tmp_path / "a.nii")
    monkeypatch.chdir(tmp_path)
    ds = opened("a.nii")
    monkeypatch.chdir("/")
    assert_same_bits(ds["bold"], oracle(tmp_path / "a.nii"))


# ---------------------------------------------------------------------------------------------------- indexing


def keys(length):
    bounds = st.none() | st.integers(-length - 2, length + 2)
    steps = st.none() | st.sampled_from([-3, -2, -1, 1, 2, 3])
    numbers = st.integers(-length, length - 1)
    return st.one_of(
        numbers,
        # xarray itself fails on a slice that goes backwards and has nothing in it.
        st.builds(slice, bounds, bounds, steps).filter(
            lambda s: (s.step or 1) > 0 or len(range(length)[s]) > 0
        ),
        st.lists(numbers, min_size=0, max_size=length + 3).map(lambda n: np.array(n, dtype=int)),
    )


@pytest.fixture(scope="module")
def one_image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    paths = [
        write(folder / "a.nii", scale=(0.5, 3), order=">"),
        write(folder / "a.nii.gz", scale=(0.5, 3), order=">"),
    ]
    return paths, oracle(paths[0])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_indexing__orthogonal_equals_numpy(one_image, monkeypatch, data):
    paths, values = one_image
    slice_bytes = values.shape[-1] * values.shape[-2] * 2
    monkeypatch.setattr(slabs, "READ", data.draw(st.sampled_from([1, 3 * slice_bytes, 2**23])))
    chosen = [data.draw(keys(length)) for length in values.shape]
    expected = values
    for axis in reversed(range(4)):
        expected = expected[(*[slice(None)] * axis, chosen[axis])]
    for path in paths:
        picked = opened(path)["bold"].isel(dict(zip(("time", *SPACE), chosen, strict=True)))
        assert_same_bits(picked, expected)


def test_indexing__of_a_selection_and_along_points(one_image):
    paths, values = one_image
    for path in paths:
        bold = opened(path)["bold"]
        assert_same_bits(bold[1:6:2][::-1, 1:][:, [0, 2]], values[1:6:2][::-1, 1:][:, [0, 2]])
        at = {
            dim: xr.DataArray(numbers, dims="point")
            for dim, numbers in zip("zyx", ([3, 0, 3], [1, 1, 4], [5, 0, 2]), strict=True)
        }
        assert_same_bits(bold.isel(at).transpose("time", "point"), values[:, [3, 0, 3], [1, 1, 4], [5, 0, 2]])
        assert_same_bits(
            bold.isel(time=xr.DataArray([[6, 0], [0, 3]], dims=("a", "b"))), values[[[6, 0], [0, 3]]]
        )
        assert bold.isel(time=slice(0, 0)).values.shape == (0, 4, 5, 6)


@pytest.mark.parametrize(
    "chunks", [{}, "auto", 2, {"time": -1, "z": 1}, {"y": 2}, {"time": (7,), "x": (1, 5)}]
)
@pytest.mark.filterwarnings("ignore:The specified chunks separate")
def test_chunks__any_give_the_same(one_image, chunks):
    for path in one_image[0]:
        assert_same_bits(opened(path, chunks=chunks)["bold"], one_image[1])


def test_chunks__are_blocks_of_whole_volumes(tmp_path):
    path = write(tmp_path / "a.nii", shape=(64, 64, 20, 60), values=np.zeros(64 * 64 * 20 * 60, np.int16))
    bold = opened(path, chunks={})["bold"]
    assert bold.chunksizes["z"] == (20,)
    assert len(bold.chunksizes["y"]) == len(bold.chunksizes["x"]) == 1
    assert bold.chunksizes["time"][0] * bold[0].nbytes <= 2**25
    assert bold.chunksizes["time"] == (32, 28)
    bold = opened(write(tmp_path / "b.nii", shape=(100, 100, 20, 60), scale=(2, 0)), chunks={})["bold"]
    assert bold.chunksizes["time"] == (20, 20, 20)
    assert bold.chunksizes["time"][0] * bold[0].nbytes <= 2**25


# ------------------------------------------------------------------------------------------- only what is asked for


def test_open__reads_no_values(tmp_path):
    path = write(tmp_path / "a.nii.gz", shape=(30, 30, 30, 40))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with raise_if_computes():
        ds = opened(path, chunks={})
        lazy = opened(path)["bold"].isel(time=slice(1, None), x=3).transpose("z", ...)
        ds["bold"].mean("time")
    assert not slabs._inflaters
    assert lazy.shape == (30, 39, 30)
    for one in (lazy, ds["bold"]):
        with pytest.raises(
            NiftiError,
            match=r"a.nii.gz is cut off or damaged: its header promises 40 volumes, and it ends after (19|20)",
        ):
            one.compute()
    assert opened(path)["bold"][3, 4].values.size == 900


@pytest.fixture
def bytes_read(monkeypatch):
    """Bytes that were read of the files."""
    counted = [0]

    class Counting(io.FileIO):
        def readinto(self, buffer):
            got = super().readinto(buffer)
            counted[0] += got
            return got

        def read(self, size=-1):
            data = super().read(size)
            counted[0] += len(data)
            return data

    monkeypatch.setattr(nifti, "_open_binary", lambda name: Counting(name, "rb"))
    return counted


@pytest.mark.parametrize("suffix", [".nii", ".img"])
def test_read__takes_only_the_slices(tmp_path, bytes_read, suffix):
    shape = (20, 30, 10, 50)
    path = write(tmp_path / f"a{suffix}", shape=shape)
    values, bold = oracle(path), opened(path, cache=False)["bold"]
    for key in [
        (3,),
        (slice(None), 4),
        (slice(7, 30, 5), slice(2, 5)),
        ([40, 2, 2, 9], [1, 8], 3, [4, 1]),
        (slice(None), 2, 3, 4),
    ]:
        bytes_read[0] = 0
        picked = bold[key]
        expected = values
        for axis in reversed(range(len(key))):
            expected = expected[(*[slice(None)] * axis, key[axis])]
        assert_same_bits(picked, expected)
        times, slices = (
            np.unique(np.arange(n)[k]).size for n, k in zip((50, 10), (*key, slice(None))[:2], strict=True)
        )
        assert bytes_read[0] == times * slices * 20 * 30 * 2


def test_read__holds_little_beside_the_result(tmp_path):
    import tracemalloc

    path = write(tmp_path / "a.nii", shape=(64, 64, 30, 200), values=np.zeros(64 * 64 * 30 * 200, np.int16))
    bold = opened(path)["bold"]
    tracemalloc.start()
    assert bold.isel(y=3).values.size == 64 * 30 * 200
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < slabs.READ + 8 * 2**20 < bold.nbytes / 2


ORDERS = {
    "forwards": range,
    "backwards": lambda n: reversed(range(n)),
    "every third, then the others": lambda n: [k for first in range(3) for k in range(first, n, 3)],
    "shuffled": lambda n: np.random.default_rng(0).permutation(n).tolist(),
}


@pytest.mark.parametrize("order", ORDERS)
def test_read__a_compressed_file_in_any_order_without_beginning_anew(tmp_path, monkeypatch, inflated, order):
    monkeypatch.setattr(slabs, "SPACING", 2**13)
    monkeypatch.setattr(slabs, "PIECE", 2**11)
    n = 120
    path = write(tmp_path / "a.nii.gz", shape=(16, 16, 8, n))
    values, bold = oracle(path), opened(path, cache=False)["bold"]
    for k in ORDERS[order](n):
        assert_same_bits(bold[k], values[k])
    # Once to get there, once to read it, and from the last known place to each volume. From the start it would be n / 2 times.
    known = slabs._inflater(nifti.locate(str(path)))._points
    assert inflated[0] <= 2 * values.nbytes + n * (2**13 + 2**12) + 2**12
    assert 30 < len(known) < 62
    if order == "forwards":
        assert inflated[0] < values.nbytes + 2**12


def test_read__memory_of_what_is_known_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(slabs, "SPACING", 1)
    monkeypatch.setattr(slabs, "PIECE", 2**9)
    monkeypatch.setattr(slabs, "POINTS", 20)
    path = write(tmp_path / "a.nii.gz", shape=(16, 16, 8, 60))
    assert_same_bits(opened(path)["bold"], oracle(path))
    assert 10 < len(slabs._inflater(nifti.locate(str(path)))._points) <= 21


def test_read__of_a_file_of_several_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(slabs, "SPACING", 2**10)
    monkeypatch.setattr(slabs, "PIECE", 2**9)
    path = write(tmp_path / "a.nii.gz", shape=(16, 16, 8, 20))
    values, content = oracle(path), gzip.decompress(path.read_bytes())
    path.write_bytes(
        b"".join(gzip.compress(content[k : k + 5000]) for k in range(0, len(content), 5000)) + b"\0" * 700
    )
    for k in (19, 3, 4, 0, 11, 19):
        assert_same_bits(opened(path)["bold"][k], values[k])


# --------------------------------------------------------------------------------------- threads, processes, files


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_threads__read_the_same(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(slabs, "SPACING", 2**13)
    monkeypatch.setattr(slabs, "OPEN_FILES", 2)
    paths = [write(tmp_path / f"{k}{suffix}", shape=(8, 8, 8, 40), scale=(k + 1, 0)) for k in range(4)]
    values, bolds = [oracle(path) for path in paths], [opened(path, cache=False)["bold"] for path in paths]

    def check(seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
            file, t, z = rng.integers([4, 40, 8])
            assert_same_bits(bolds[file][t, z], values[file][t, z])
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(8)))
    assert len(slabs._inflaters) == (2 if suffix.endswith(".gz") else 0)
    with dask.config.set(scheduler="threads", num_workers=8):
        assert_same_bits(opened(paths[3], chunks={"time": -1, "z": 1})["bold"].compute(), values[3])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_pickle__reads_on(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}")
    for options in ({}, {"chunks": {}}):
        ds = opened(path, **options)
        ds["bold"][2].compute()
        again = pickle.loads(pickle.dumps(ds))
        assert_same_bits(again["bold"], oracle(path))
        assert_same_bits(ds["bold"], oracle(path))


def test_distributed__worker_processes(tmp_path):
    distributed = pytest.importorskip("distributed")
    path = write(tmp_path / "a.nii.gz", scale=(0.5, 3))
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as local, distributed.Client(local):
        ds = opened(path, chunks={"time": -1, "z": 1})
        assert_same_bits(ds["bold"].compute(), oracle(path))
        np.testing.assert_allclose(ds["bold"].mean("time").compute(), oracle(path).mean(0))
    assert not slabs._inflaters


def open_files(folder):
    return [name for name in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if str(folder) in name]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_files__are_few_and_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(slabs, "OPEN_FILES", 3)
    datasets = []
    for k in range(6):
        for suffix in (".nii", ".nii.gz"):
            datasets.append(opened(write(tmp_path / f"{k}{suffix}"), cache=False))
            datasets[-1]["bold"].load()
            opened(tmp_path / f"{k}{suffix}")["bold"][0].load()
    assert len(open_files(tmp_path)) == 3
    for ds in datasets:
        ds.close()
    assert open_files(tmp_path) == []
    # As with every file of xarray, what was closed is opened again when it is needed.
    assert_same_bits(opened(tmp_path / "0.nii.gz")["bold"], oracle(tmp_path / "0.nii.gz"))


# ------------------------------------------------------------------------------------------------------ refusals


def test_open__what_is_not_an_image(tmp_path):
    with pytest.raises(SourceNotFoundError, match="There is no file .*gone.nii"):
        opened(tmp_path / "gone.nii")
    (tmp_path / "text.nii").write_text("no image" * 100)
    with pytest.raises(NiftiError, match=r"text.nii is not a NIfTI file"):
        opened(tmp_path / "text.nii")
    path = write(tmp_path / "pair.img")
    path.unlink()
    with pytest.raises(SourceNotFoundError, match=r"pair.img"):
        opened(tmp_path / "pair.hdr")
    path = write(tmp_path / "short.nii")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(NiftiError, match=r"short.nii is cut off or damaged: .* enough for 6"):
        opened(path)


@pytest.mark.parametrize("source", ["s3://bucket/bold.nii.gz", "https://example.org/bold.nii"])
def test_open__urls_are_refused(source):
    for engine in ("nifti", None):
        with pytest.raises(InputError, match=r"reads local files.*Download it"):
            xr.open_dataset(source, engine=engine)


def test_open__file_objects_are_refused(tmp_path):
    path = write(tmp_path / "a.nii")
    with path.open("rb") as file, pytest.raises(InputError, match=r"BufferedReader cannot.*path of a .nii"):
        opened(file)
    with pytest.raises(InputError, match="bytes cannot"):
        opened(path.read_bytes())


def test_guess__goes_by_the_ending_and_of_a_pair_by_its_header(tmp_path):
    backend = NiftiBackend()
    for name in ("a.nii", "b/A.NII.GZ", Path("a.nii")):
        assert backend.guess_can_open(name)
    write(tmp_path / "x.img")
    for name in ("x.hdr", "x.img"):
        assert backend.guess_can_open(tmp_path / name)
    # Other formats have files of these names.
    (tmp_path / "map.img").write_bytes(b"EHFA_HEADER_TAG" + bytes(500))
    (tmp_path / "map.hdr").write_text("ENVI\ndescription = {}")
    for name in ("map.img", "map.hdr", "absent.img"):
        assert not backend.guess_can_open(tmp_path / name)
    for name in ("a.nc", "a.nii.zip", "nii", "", "a.zarr", b"a.nii", 3, None, io.BytesIO(), Path()):
        assert not backend.guess_can_open(name)
    assert "nifti" in xr.backends.list_engines()
    assert "NIfTI" in repr(xr.backends.list_engines()["nifti"])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("read_before", [False, True])
def test_read__a_file_that_changed(tmp_path, suffix, read_before):
    path = write(tmp_path / f"a{suffix}")
    ds = opened(path, cache=False)
    if read_before:
        ds["bold"][3].load()
    os.utime(path, ns=(1, 1))
    with pytest.raises(NiftiError, match=rf"a{suffix} changed since it was opened.*open it again"):
        ds["bold"][3].load()
    assert_same_bits(opened(path)["bold"], oracle(path))
    path.unlink()
    with pytest.raises(SourceNotFoundError, match=rf"There is no file .*a{suffix}"):
        ds["bold"][0].load()


def test_read__files_are_told_apart_by_their_names(tmp_path):
    random, even = (write(tmp_path / f"{name}.nii.gz") for name in ("random", "even"))
    write(even, values=np.arange(840))
    even.write_bytes(even.read_bytes().ljust(random.stat().st_size, b"\0"))
    for path in (random, even):
        os.utime(path, ns=(10**18, 10**18))
    for path in (random, even):
        assert_same_bits(opened(path)["bold"][3], oracle(path)[3])


def test_read__a_plain_file_that_ends_too_early(tmp_path):
    path = write(tmp_path / "a.nii")
    ds = opened(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(NiftiError, match="a.nii changed since"):
        ds["bold"].load()
    place = nifti.locate(str(write(path)))
    os.truncate(path, path.stat().st_size - 300)
    # As if it had been so when it was opened.
    place = place._replace(state=(path.stat().st_size, path.stat().st_mtime_ns))
    with pytest.raises(NiftiError, match="promises 7 volumes, and it ends after 5"):
        slabs.read_slab(place, (slice(None),) * 4)


@pytest.mark.parametrize("together", [True, False])
def test_read__damage_is_found_by_the_checksum(tmp_path, monkeypatch, together):
    path = write(tmp_path / "a.nii.gz", shape=(16, 16, 8, 20))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    ds = opened(path, cache=False)
    # The checksum is read with the data, or after it.
    monkeypatch.setattr(slabs, "PIECE", len(content) - (0 if together else 8))
    for _ in range(2):
        with pytest.raises(NiftiError, match=r"a.nii.gz is cut off or damaged.*incorrect data check"):
            ds["bold"][-1].load()
    with pytest.raises(NiftiError, match="incorrect data check"):
        opened(path, chunks={})["bold"].compute()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_read__damage_never_passes_for_data(tmp_path, place, bit):
    path = write(tmp_path / "a.nii.gz", dtype="int8")
    values, content = oracle(path), bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        got = opened(path)["bold"].values
    except (NiftiError, ChunkGLMWarning):
        return
    # Not all bits of a gzip file's own header mean something.
    assert_same_bits(got, values)


# --------------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("chunks", [{}, None, {"time": -1, "z": 2}])
def test_fit__is_that_of_the_run_store(tmp_path, make_design, chunks):
    n = 40
    rng = np.random.default_rng(1)
    values = rng.normal(1000, 50, (8, 7, 6, n)).astype(np.int16).ravel(order="F")
    path = write(tmp_path / "a.nii.gz", shape=(8, 7, 6, n), values=values, scale=(0.5, 2))
    mask = nib.Nifti1Image((rng.random((8, 7, 6)) > 0.3).astype(np.uint8), ALIGNED)
    nib.save(mask, tmp_path / "mask.nii")
    run = convert(path, tmp_path / "a.zarr", mask=mask)
    design = make_design(n)
    inside = run["mask"].compute()
    expected = fit(run, design, mask=inside).compute()
    got = fit(opened(path, chunks=chunks), design, mask=inside).compute()
    (xr.testing.assert_equal if chunks == {} else xr.testing.assert_allclose)(got, expected)
    assert np.isfinite(expected["beta"]).any()
    by_path = opened(tmp_path / "mask.nii")["image"]
    xr.testing.assert_equal(fit(opened(path, chunks=chunks), design, mask=by_path).compute(), got)


@pytest.mark.real_data
def test_real_recordings(real_data, tmp_path):
    for number, name in enumerate(["oneback/run1.nii.gz", "msc-motor/run1_bold.nii.gz"]):
        source = real_data / name
        ds = opened(source, chunks={})
        values = oracle(source)
        assert_same_bits(ds["bold"], values)
        assert_same_bits(opened(source)["bold"].isel(z=0, time=slice(None, None, -3)), values[::-3, 0])
        to_nifti(ds["bold"], tmp_path / f"{number}.nii")
        assert (tmp_path / f"{number}.nii").read_bytes() == gzip.decompress(source.read_bytes())


@pytest.mark.parametrize("stop_at", [1, 2, 5, 9])
def test_read__goes_on_right_after_it_was_interrupted(tmp_path, monkeypatch, stop_at):
    """Ctrl-C arrives when the decompressor has gone on, and nothing has been counted yet."""
    path = tmp_path / "a.nii.gz"
    values = np.random.default_rng(0).integers(-999, 999, (64, 64, 40, 12)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    array = opened(path)["bold"]
    calls = 0

    class Interrupted:
        def __init__(self, inner):
            self.inner = inner

        def decompress(self, *arguments):
            nonlocal calls
            calls += 1
            data = self.inner.decompress(*arguments)
            if calls == stop_at:
                raise KeyboardInterrupt
            return data

        def copy(self):
            return Interrupted(self.inner.copy())

        def __getattr__(self, name):
            return getattr(self.inner, name)

    new = slabs._new_decompressor
    monkeypatch.setattr(slabs, "_new_decompressor", lambda: Interrupted(new()))
    with pytest.raises(KeyboardInterrupt):
        array[:10].compute()
    np.testing.assert_array_equal(array[11].values, values[..., 11].T)
    np.testing.assert_array_equal(opened(path)["bold"][4:].values, values[..., 4:].T)
