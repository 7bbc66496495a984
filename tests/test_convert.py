"""From NIfTI to a run store and back: nothing lost, read once, within memory, and wrong input refused."""

import contextlib
import gzip
import hashlib
import io
import math
import os
import shutil
import struct
import sys
import warnings

import fsspec
import nibabel as nib
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkglm import convert, nifti, open_run, plan, to_nifti, verify
from chunkglm.errors import (
    ChunkGLMError,
    ChunkGLMWarning,
    GridMismatchError,
    InputError,
    MaskError,
    MemoryBudgetError,
    NiftiError,
    SourceNotFoundError,
    StoreError,
)
from chunkglm.testing import peak_rss, write_simulated_run

RNG = np.random.default_rng(11)
SHAPE = (5, 4, 3, 7)
AFFINE = np.array([[-2.5, 0, 0, 40.0], [0, 2.5, 0, -60.2], [0, 0, 3.3, 11.7], [0, 0, 0, 1]])
OBLIQUE = np.array([[2.9, -0.4, 0.2, -90.0], [0.5, 2.8, -0.7, -120.0], [0.1, 0.6, 3.5, -60.0], [0, 0, 0, 1]])


def values(dtype, shape=SHAPE, seed=0):
    """Values that use the whole range of a dtype, and what is special in it."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        data = rng.normal(1000, 300, shape).astype(dtype)
        data.flat[:6] = [np.nan, np.inf, -np.inf, -0.0, 0.0, np.finfo(dtype).tiny / 2]
        bits = data.reshape(-1).view(f"u{dtype.itemsize}")
        bits[6] = bits[0] | 0x5A  # a NaN that carries something
        return data
    info = np.iinfo(dtype)
    data = rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
    data.flat[:2] = info.min, info.max
    return data


def header_bytes(
    data, *, affine=AFFINE, order="<", kind="single", version=1, forms="both", extensions=b"", **fields
):
    """Bytes of a header as other programs write it, with everything set that could get lost."""
    classes = {
        (1, "single"): nib.Nifti1Header,
        (2, "single"): nib.Nifti2Header,
        (1, "pair"): nib.nifti1.Nifti1PairHeader,
        (2, "pair"): nib.nifti2.Nifti2PairHeader,
    }
    header = classes[version, kind](endianness=order)
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    header.set_xyzt_units("mm", "sec")
    if forms in {"both", "qform"}:
        header.set_qform(affine, 1)
    if forms in {"both", "sform"}:
        header.set_sform(affine, 4 if forms == "sform" else 2)
    header["pixdim"][1:5] = [*np.linalg.norm(affine[:3, :3], axis=0), 2.2]
    header["descrip"] = b"made by a scanner"
    header["aux_file"] = b"none"
    header["intent_name"] = b"bold"
    header["cal_max"], header["toffset"], header["slice_duration"] = 3000, 1.5, 0.06
    header["slice_code"], header["slice_end"], header["dim_info"] = 3, 2, 0b111001
    for field, value in fields.items():
        header[field] = value
    flag = b"\1\0\0\0" if extensions else b"\0\0\0\0"
    tail = flag + extensions
    if kind == "single" and "vox_offset" not in fields:
        header["vox_offset"] = len(header.binaryblock) + len(tail)
    return header.binaryblock + tail


def file_bytes(data, **options):
    order = options.get("order", "<")
    return header_bytes(data, **options) + data.astype(data.dtype.newbyteorder(order)).tobytes(order="F")


def extension(order, code, content):
    length = math.ceil((8 + len(content)) / 16) * 16
    return struct.pack(f"{order}ii", length, code) + content.ljust(length - 8, b"\0")


def full_mask(shape=SHAPE, affine=AFFINE):
    return nib.Nifti1Image(np.ones(shape[:3], np.uint8), affine)


def write(path, content):
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.name.lower().endswith(".gz") else content)
    return path


EXTENSIONS = extension("<", 6, b"a comment") + extension("<", 4, b"<xml/>" * 20)
VARIANTS = {
    **{
        name: (name, {})
        for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    },
    "float32": ("float32", {}),
    "float64": ("float64", {}),
    "big-endian": ("int16", {"order": ">"}),
    "big-endian float": ("float64", {"order": ">"}),
    "slope and intercept": ("int16", {"scl_slope": 75.4876, "scl_inter": -1024.0}),
    "slope only": ("uint16", {"scl_slope": 0.1}),
    "negative slope": ("int32", {"scl_slope": -3e-5, "scl_inter": 1.0}),
    "intercept only": ("uint8", {"scl_slope": 1.0, "scl_inter": 128.0}),
    "int64 with slope": ("int64", {"scl_slope": 0.3}),
    "float32 with slope": ("float32", {"scl_slope": 0.1}),
    "float32 with intercept": ("float32", {"scl_slope": 1.0, "scl_inter": 3.0}),
    "slope 0": ("int16", {"scl_slope": 0.0, "scl_inter": 5.0}),
    "slope NaN": ("int16", {"scl_slope": np.nan, "scl_inter": np.nan}),
    "sform only": ("int16", {"forms": "sform"}),
    "qform only": ("int16", {"forms": "qform"}),
    "no form": ("int16", {"forms": "none"}),
    "oblique": ("int16", {"affine": OBLIQUE, "forms": "sform"}),
    "NIfTI-2": ("int16", {"version": 2}),
    "NIfTI-2 big-endian": ("float32", {"version": 2, "order": ">", "scl_slope": 2.0}),
    "extensions": ("int16", {"extensions": EXTENSIONS}),
    "NIfTI-2 extensions": ("int16", {"version": 2, "extensions": EXTENSIONS}),
    "big-endian extensions": ("int16", {"order": ">", "extensions": extension(">", 6, b"a comment")}),
    "late data": ("int16", {"vox_offset": 512}),
    "milliseconds": ("int16", {"xyzt_units": 2 | 16, "pixdim": [1, 2.5, 2.5, 3.3, 2200, 0, 0, 0]}),
    "five dimensions": ("int16", {"dim": [5, *SHAPE, 1, 1, 1]}),
}


def variant_bytes(name):
    dtype, options = VARIANTS[name]
    data = values(dtype)
    if name == "int64 with slope":
        data //= 2**12  # float64, in which scaled values are opened, holds 53 bits
    if name == "float32 with intercept":
        data[np.abs(data) < 1e-30] = 0.0  # tiny numbers and the sign of 0 are lost in a sum
    content = file_bytes(data, **options)
    if "vox_offset" in options:
        content = content[:352] + b"\7" * (options["vox_offset"] - 352) + content[352:]
    return content


def convert_variant(source, store, **options):
    affine = nib.load(source).affine
    return convert(source, store, mask=full_mask(affine=affine), **options)


def expected_values(path):
    return nib.load(path).get_fdata(dtype=np.float64).reshape(SHAPE).T


# --------------------------------------------------------------------------------------------------- lossless


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_comes_back_bit_for_bit(tmp_path, name):
    source = write(tmp_path / "run.nii", variant_bytes(name))
    run = convert_variant(source, tmp_path / "run.zarr")
    to_nifti(run["bold"], tmp_path / "back.nii")
    assert (tmp_path / "back.nii").read_bytes() == source.read_bytes()
    # The values are those that nibabel reads, through chunkglm, plain xarray, and in the file's dtype.
    expected = expected_values(source)
    np.testing.assert_array_equal(run["bold"].values.astype(np.float64), expected)
    assert run["bold"].dtype == np.float64 or run["bold"].dtype == np.dtype(VARIANTS[name][0])
    plain = xr.open_zarr(tmp_path / "run.zarr", consolidated=False)["bold"]
    np.testing.assert_array_equal(plain.values.astype(np.float64), expected)
    assert zarr.open_array(tmp_path / "run.zarr", path="bold", mode="r").dtype == VARIANTS[name][0]
    np.testing.assert_allclose(run["time"].values, 2.2 * np.arange(7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_scaled_values_finer_than_float64_keep_their_physical_values(tmp_path, dtype):
    source = write(tmp_path / "run.nii", file_bytes(values(dtype), scl_slope=0.3, scl_inter=7.7))
    run = convert(source, tmp_path / "run.zarr", mask=full_mask())
    np.testing.assert_array_equal(run["bold"].values, expected_values(source))
    np.testing.assert_array_equal(to_nifti(run["bold"]).get_fdata().T, expected_values(source))


@pytest.mark.parametrize(
    "name", ["int16", "big-endian", "slope and intercept", "NIfTI-2 extensions", "float64"]
)
@pytest.mark.parametrize(
    ("given", "back"), [("run.nii.gz", "back.nii.gz"), ("RUN.NII.GZ", "back.nii"), ("run.NII", "BACK.NII.GZ")]
)
@pytest.mark.parametrize("isal", [True, False])
def test_compressed_files_come_back(tmp_path, monkeypatch, name, given, back, isal):
    if not isal:
        monkeypatch.setitem(sys.modules, "isal", None)
    content = variant_bytes(name)
    source = write(tmp_path / given, content)
    run = convert(source, tmp_path / "run.zarr", mask=full_mask())
    to_nifti(run["bold"], tmp_path / back)
    written = (tmp_path / back).read_bytes()
    assert (gzip.decompress(written) if back.lower().endswith(".gz") else written) == content


@pytest.mark.parametrize("name", ["int16", "float64"])
def test_export_to_gzip_does_not_depend_on_name_and_time_and_extras(tmp_path, monkeypatch, name):
    source = write(tmp_path / "run.nii", variant_bytes(name))
    run = convert(source, tmp_path / "run.zarr", mask=full_mask())
    for target in ("a.nii.gz", "b.nii.gz"):
        to_nifti(run["bold"], tmp_path / target)
        os.utime(tmp_path / target, (0, 0))
        monkeypatch.setitem(sys.modules, "isal", None)
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    # The flags and the time of the header: no name in it.
    assert content[:8] == b"\x1f\x8b\x08" + bytes(5)


def test_several_gzip_members_are_one_file(tmp_path):
    content = variant_bytes("int16")
    parts = [content[:100], content[100:400], content[400:]]
    (tmp_path / "run.nii.gz").write_bytes(b"".join(gzip.compress(part) for part in parts))
    run = convert(tmp_path / "run.nii.gz", tmp_path / "run.zarr", mask=full_mask())
    to_nifti(run["bold"], tmp_path / "back.nii")
    assert (tmp_path / "back.nii").read_bytes() == content


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("header_name", "data_name"),
    [("run.hdr", "run.img"), ("run.hdr.gz", "run.img.gz"), ("RUN.HDR", "RUN.IMG")],
)
@pytest.mark.parametrize("given", ["header", "data"])
def test_pairs(tmp_path, version, header_name, data_name, given):
    data = values("int16")
    options = {"version": version, "kind": "pair", "scl_slope": 0.5, "extensions": EXTENSIONS}
    write(tmp_path / header_name, header_bytes(data, **options))
    write(tmp_path / data_name, data.tobytes(order="F"))
    source = tmp_path / (header_name if given == "header" else data_name)
    run = convert(source, tmp_path / "run.zarr", mask=full_mask())
    assert run.attrs["source_name"] == data_name
    assert run.attrs["source_sha256"] == hashlib.sha256((tmp_path / data_name).read_bytes()).hexdigest()
    np.testing.assert_array_equal(run["bold"].values, data.T * 0.5)
    back = to_nifti(run["bold"], tmp_path / "back.nii")
    content = (tmp_path / "back.nii").read_bytes()
    assert content[int(back.dataobj.offset) :] == data.tobytes(order="F")
    assert isinstance(back, nib.Nifti2Image if version == 2 else nib.Nifti1Image)
    original = nib.nifti1.Nifti1PairHeader if version == 1 else nib.nifti2.Nifti2PairHeader
    original = original(header_bytes(data, **options)[: back.header.sizeof_hdr])
    written = type(back.header)(content[: back.header.sizeof_hdr])
    for field in set(original.keys()) - {"magic", "vox_offset"}:
        np.testing.assert_array_equal(written[field], original[field], err_msg=field)
    np.testing.assert_array_equal(back.affine, AFFINE if version == 2 else AFFINE.astype(np.float32))
    assert [e.get_code() for e in back.header.extensions] == [6, 4]


def test_half_a_pair(tmp_path):
    data = values("int16")
    write(tmp_path / "a.hdr", header_bytes(data, kind="pair"))
    write(tmp_path / "b.img", data.tobytes(order="F"))
    for source, missing in (("a.hdr", "a.img"), ("b.img", "b.hdr")):
        with pytest.raises(SourceNotFoundError, match=missing):
            convert(tmp_path / source, tmp_path / "run.zarr", mask=full_mask())


def test_one_slice(tmp_path):
    data = values("int16", (6, 5, 1, 40))
    source = write(tmp_path / "run.nii", file_bytes(data))
    run = convert(source, tmp_path / "run.zarr", mask=full_mask(data.shape))
    to_nifti(run["bold"], tmp_path / "back.nii")
    assert (tmp_path / "back.nii").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", ["slope and intercept", "NIfTI-2 extensions", "big-endian", "float32"])
def test_image_backed_by_a_file(tmp_path, name):
    source = write(tmp_path / "run.nii.gz", variant_bytes(name))
    run = convert(nib.load(source), tmp_path / "run.zarr", mask=full_mask())
    assert run.attrs["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    to_nifti(run["bold"], tmp_path / "back.nii")
    assert (tmp_path / "back.nii").read_bytes() == variant_bytes(name)


@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float32", "float64"])
@pytest.mark.parametrize("layout", ["F", "C"])
def test_image_in_memory(tmp_path, image_class, dtype, layout):
    data = np.array(values(dtype), order=layout)
    image = image_class(data, OBLIQUE, dtype=dtype)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = 1.5
    image.header["descrip"] = b"in memory"
    run = convert(image, tmp_path / "run.zarr", mask=full_mask(affine=OBLIQUE))
    np.testing.assert_array_equal(run["bold"].values, data.T)
    assert run["bold"].dtype == dtype
    assert float(run["time"][1]) == 1.5
    back = to_nifti(run["bold"])
    if image_class is not nib.Nifti1Pair:
        assert type(back) is image_class
        if np.dtype(dtype).kind in "iu":
            assert back.to_bytes() == image.to_bytes()
    assert back.header["descrip"] == b"in memory"
    np.testing.assert_array_equal(back.affine, image.header.get_best_affine())


def test_image_whose_header_was_changed(tmp_path):
    source = write(tmp_path / "run.nii", variant_bytes("slope and intercept"))
    image = nib.load(source)
    image.header["pixdim"][4] = 3.5
    run = convert(image, tmp_path / "run.zarr", mask=full_mask())
    assert run.attrs["repetition_time"] == 3.5
    np.testing.assert_array_equal(run["bold"].values, expected_values(source))
    moved = AFFINE + np.diag([0, 0, 0, 0])
    moved[0, 3] += 5
    again = nib.load(source)
    again.set_sform(moved)
    with pytest.raises(GridMismatchError):
        convert(again, tmp_path / "moved.zarr", mask=full_mask())


def test_images_of_bool_and_unusable_types_in_memory(tmp_path):
    header = nib.Nifti1Header()
    header["pixdim"][4] = 2
    image = nib.Nifti1Image(np.ones(SHAPE, np.uint8), AFFINE, header)
    image._dataobj = np.ones(SHAPE, bool)
    assert convert(image, tmp_path / "bool.zarr", mask=full_mask())["bold"].dtype == np.uint8
    image._dataobj = np.ones(SHAPE, np.float16)
    with pytest.raises(NiftiError, match="image in memory"):
        convert(image, tmp_path / "half.zarr", mask=full_mask())
    with pytest.raises(NiftiError, match="MGHImage"):
        convert(nib.MGHImage(np.ones(SHAPE, np.float32), AFFINE), tmp_path / "mgh.zarr")


def test_a_real_recording_comes_back(real_data, tmp_path):
    for number, path in enumerate(["oneback/run1.nii.gz", "msc-motor/run1_bold.nii.gz"]):
        source = real_data / path
        shape = nib.load(source).shape
        mask = full_mask(shape, nib.load(source).affine)
        run = convert(source, tmp_path / f"{number}.zarr", mask=mask)
        to_nifti(run["bold"], tmp_path / f"{number}.nii")
        assert (tmp_path / f"{number}.nii").read_bytes() == gzip.decompress(source.read_bytes())
        np.testing.assert_array_equal(run["bold"][7].values, nib.load(source).dataobj[..., 7].T)


# ---------------------------------------------------------------------------------------------------- one pass


@pytest.fixture
def counted(monkeypatch):
    """Every file that is opened: its name and how many bytes of it were read."""
    opened = []
    original = nifti._open_binary

    def open_counted(name):
        file = original(name)
        entry = [name, 0, True]
        opened.append(entry)
        read = file.read

        def counting(n=-1):
            data = read(n)
            entry[1] += len(data)
            return data

        monkeypatch.setattr(type(file), "seek", None, raising=False) if isinstance(file, io.BytesIO) else None
        return _Forward(file, counting, entry)

    monkeypatch.setattr(nifti, "_open_binary", open_counted)
    return opened


class _Forward:
    """A file that can be read from its beginning to its end, and nothing else."""

    def __init__(self, file, read, entry):
        self._file, self.read, self._entry = file, read, entry

    def fileno(self):
        return self._file.fileno()

    def close(self):
        self._entry[2] = False
        self._file.close()


@pytest.mark.parametrize("name", ["run.nii", "run.nii.gz"])
@pytest.mark.parametrize("fwhm", [None, 5.0])
def test_the_file_is_read_once_in_bounded_blocks(tmp_path, monkeypatch, counted, name, fwhm):
    write_simulated_run(tmp_path / name, shape=(16, 18, 14), n_volumes=75)
    blocks = []
    original = nifti.RunReader.read

    def watched(self, block, start):
        blocks.append((start, len(block)))
        original(self, block, start)

    monkeypatch.setattr(nifti.RunReader, "read", watched)
    run = convert(tmp_path / name, tmp_path / "run.zarr", smoothing_fwhm=fwhm)
    content = (tmp_path / name).read_bytes()
    assert counted == [[str(tmp_path / name), len(content), False]]
    assert run.attrs["source_sha256"] == hashlib.sha256(content).hexdigest()
    assert run.attrs["source_size"] == len(content)
    assert run.attrs["source_name"] == name
    assert plan.bold_chunks((75, 14, 18, 16), 4 if fwhm else 2).time == 32
    assert blocks == [(0, 32), (32, 32), (64, 11)]


@pytest.mark.parametrize("dtype", ["int16", "float32", "uint64", "float64"])
def test_mean_image(tmp_path, dtype):
    data = np.abs(RNG.normal(20000, 4000, (5, 4, 3, 90))).astype(dtype)
    source = write(tmp_path / "run.nii", file_bytes(data, scl_slope=0.7, scl_inter=-11.0))
    with nifti.open_reader(source) as reader:
        mean = sum(block.astype(np.float64).sum(axis=0) for _, block in reader.blocks(32)) / 90
    run = convert(source, tmp_path / "run.zarr", mask=full_mask())
    exact = np.mean(data.astype(np.longdouble), axis=-1).T
    np.testing.assert_allclose(mean, exact.astype(np.float64), rtol=1e-12)
    slope, intercept = float(np.float32(0.7)), -11.0
    np.testing.assert_allclose(
        run["mean_image"].values, (exact * slope + intercept).astype(np.float32), rtol=1.2e-7
    )
    assert run["mean_image"].dtype == np.float32


def test_progress_counts_volumes(tmp_path):
    write_simulated_run(tmp_path / "run.nii", shape=(16, 18, 14), n_volumes=75)
    seen = []
    convert(
        tmp_path / "run.nii", tmp_path / "run.zarr", progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(32, 75), (64, 75), (75, 75)]


@pytest.mark.parametrize("fwhm", [None, 4.0])
def test_results_do_not_depend_on_threads_and_memory(tmp_path, monkeypatch, fwhm):
    write_simulated_run(tmp_path / "run.nii.gz", shape=(20, 22, 40), n_volumes=70)
    trees = []
    for n_cpus, memory in ((1, "64MiB"), (2, "1GiB"), (7, "8GiB")):
        monkeypatch.setattr(plan, "available_cpus", lambda n=n_cpus: n)
        store = tmp_path / f"{n_cpus}.zarr"
        convert(tmp_path / "run.nii.gz", store, memory=memory, smoothing_fwhm=fwhm)
        trees.append(
            {path.relative_to(store): path.read_bytes() for path in store.rglob("*") if path.is_file()}
        )
    assert trees[0] == trees[1] == trees[2]
    assert len(trees[0]) > 20


def test_a_url_is_read_like_a_file(tmp_path):
    content = variant_bytes("slope and intercept")
    with fsspec.open("memory://somewhere/run.nii.gz", "wb") as file:
        file.write(gzip.compress(content))
    run = convert("memory://somewhere/run.nii.gz", tmp_path / "run.zarr", mask=full_mask())
    assert run.attrs["source_name"] == "run.nii.gz"
    to_nifti(run["bold"], tmp_path / "back.nii")
    assert (tmp_path / "back.nii").read_bytes() == content
    with pytest.raises(SourceNotFoundError, match="memory://nowhere/run.nii"):
        convert("memory://nowhere/run.nii", tmp_path / "no.zarr")
    with pytest.raises(NiftiError, match="noprotocol://run.nii"):
        convert("noprotocol://run.nii", tmp_path / "no.zarr")


# ------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("name", "budget", "fwhm"),
    [("run.nii", "80MiB", None), ("run.nii.gz", "1GiB", None), ("run.nii.gz", "128MiB", 6.0)],
)
def test_memory_stays_below_the_projection(tmp_path, name, budget, fwhm):
    shape, n_volumes = (64, 64, 40), 300
    write_simulated_run(tmp_path / name, shape=shape, n_volumes=n_volumes)
    setup = "import dask.array, zarr, chunkglm as cg\nfrom chunkglm.testing import write_simulated_run\n"
    small = tmp_path / "small.nii.gz"
    write_simulated_run(small, shape=(12, 14, 12), n_volumes=30)
    setup += f"cg.convert({str(small)!r}, {str(tmp_path / 'small.zarr')!r}, smoothing_fwhm=4)"
    statements = f"cg.convert({str(tmp_path / name)!r}, {str(tmp_path / 'run.zarr')!r}, memory={budget!r}, smoothing_fwhm={fwhm})"
    base, peak = peak_rss(statements, setup=setup)
    run_shape = (n_volumes, *shape[::-1])
    stored, smoothed = (2, None) if fwhm is None else (4, run_shape[1:])
    threads = [
        n
        for n in range(1, plan.available_cpus() + 1)
        if plan.convert_memory(run_shape, 2, n, smoothed=smoothed) <= plan.parse_memory(budget)
    ]
    projected = plan.convert_memory(run_shape, 2, max(threads), smoothed=smoothed)
    assert peak - base < projected <= plan.parse_memory(budget)
    # That is less than the data, and the projection is of the right size.
    assert peak - base < 0.9 * math.prod(run_shape) * stored
    assert projected < 4 * (peak - base)
    verify(tmp_path / "run.zarr")


def test_too_little_memory_is_refused_with_both_numbers(tmp_path):
    write_simulated_run(tmp_path / "run.nii", shape=(40, 48, 36), n_volumes=40)
    with pytest.raises(MemoryBudgetError, match=r"run\.nii.* MiB of memory .*5\.0 MiB are allowed") as caught:
        convert(tmp_path / "run.nii", tmp_path / "study.zarr" / "run-1", memory="5MiB")
    needed = plan.convert_memory((40, 36, 48, 40), 2, 1)
    assert plan.format_bytes(needed) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run.nii"]
    convert(tmp_path / "run.nii", tmp_path / "study.zarr" / "run-1", memory=needed)


# ------------------------------------------------------------------------------------------------- wrong input


@pytest.fixture
def refused(tmp_path):
    """Convert something that must be refused: with the right error, and with nothing left behind."""

    def check(source, error, match, **options):
        before = sorted(tmp_path.rglob("*"))
        options.setdefault("mask", full_mask())
        with pytest.raises(error, match=match) as caught:
            convert(source, tmp_path / "study.zarr" / "run-1", **options)
        assert isinstance(caught.value, ChunkGLMError)
        assert sorted(tmp_path.rglob("*")) == before
        return str(caught.value)

    return check


def broken(tmp_path, content, name="broken.nii"):
    return write(tmp_path / name, content)


def with_fields(**fields):
    return file_bytes(values("int16"), **fields)


def test_no_such_file(tmp_path, refused):
    refused(tmp_path / "nothing.nii.gz", SourceNotFoundError, "no file .*nothing.nii.gz")
    refused(str(tmp_path / "nothing.nii"), FileNotFoundError, "nothing.nii")


def test_things_that_are_no_nifti(tmp_path, refused):
    (tmp_path / "folder.nii").mkdir()
    refused(tmp_path / "folder.nii", NiftiError, "folder.nii is a folder")
    (tmp_path / "text.nii.gz").write_text("not compressed at all\n" * 100)
    refused(tmp_path / "text.nii.gz", NiftiError, "text.nii.gz")
    (tmp_path / "text.nii").write_text("no header at all\n" * 100)
    refused(tmp_path / "text.nii", NiftiError, "text.nii is not a NIfTI file")
    (tmp_path / "empty.nii").touch()
    refused(tmp_path / "empty.nii", NiftiError, "empty.nii")
    (tmp_path / "empty.nii.gz").touch()
    refused(tmp_path / "empty.nii.gz", NiftiError, "empty.nii.gz")
    (tmp_path / "run.mgz").touch()
    refused(tmp_path / "run.mgz", NiftiError, r"run.mgz .*\.nii\.gz")
    refused(write(tmp_path / "gz.nii", gzip.compress(variant_bytes("int16"))), NiftiError, "gz.nii")


def test_file_that_may_not_be_read(tmp_path, refused, monkeypatch):
    source = write(tmp_path / "run.nii", variant_bytes("int16"))

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(source), "open", refuse)
    refused(source, NiftiError, "run.nii cannot be opened: .*Permission denied")


@pytest.mark.parametrize("isal", [True, False])
def test_cut_off_gzip(tmp_path, refused, monkeypatch, isal):
    if not isal:
        monkeypatch.setitem(sys.modules, "isal", None)
    content = gzip.compress(variant_bytes("int16"), mtime=0)
    for length in sorted({*range(0, len(content), 101), *range(len(content) - 12, len(content))}):
        (tmp_path / "cut.nii.gz").write_bytes(content[:length])
        refused(tmp_path / "cut.nii.gz", NiftiError, "cut.nii.gz")


@pytest.mark.parametrize("isal", [True, False])
def test_damaged_gzip(tmp_path, refused, monkeypatch, isal):
    if not isal:
        monkeypatch.setitem(sys.modules, "isal", None)
    content = gzip.compress(variant_bytes("int16"), mtime=0)
    # Bytes 4 to 9 are a time and two hints, without meaning for the data.
    for place in [0, 1, 2, *range(10, len(content), 97), *range(len(content) - 8, len(content))]:
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        (tmp_path / "damaged.nii.gz").write_bytes(damaged)
        refused(tmp_path / "damaged.nii.gz", NiftiError, "damaged.nii.gz")


@pytest.mark.parametrize("kind", ["single", "gzip", "pair"])
def test_cut_off_files_say_how_many_volumes_they_hold(tmp_path, refused, kind):
    data = RNG.integers(0, 2**15, (9, 8, 7, 50)).astype(np.int16)
    volume = 9 * 8 * 7 * 2
    if kind == "pair":
        write(tmp_path / "cut.hdr", header_bytes(data, kind="pair"))
        source = write(tmp_path / "cut.img", data.tobytes(order="F")[: 20 * volume + 3])
    else:
        source = write(
            tmp_path / ("cut.nii.gz" if kind == "gzip" else "cut.nii"),
            file_bytes(data)[: 352 + 20 * volume + 3],
        )
    message = refused(source, NiftiError, "50 volumes.* 20", mask=full_mask(data.shape))
    assert "Copy or download it again" in message


def test_trailing_bytes_are_named(tmp_path):
    for name in ("run.nii", "run.nii.gz"):
        content = variant_bytes("int16")
        source = write(tmp_path / name, content + b"\0" * 200_000)
        with pytest.warns(ChunkGLMWarning, match=f"{name} has 200000 bytes behind the 7 volumes"):
            run = convert(source, tmp_path / f"{name}.zarr", mask=full_mask())
        assert run.attrs["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_damage_behind_the_data_is_seen(tmp_path, refused):
    # The gzip checksum comes after everything, however much there is.
    content = bytearray(gzip.compress(variant_bytes("int16") + bytes(200_000), mtime=0))
    content[-6] ^= 1
    (tmp_path / "run.nii.gz").write_bytes(content)
    refused(tmp_path / "run.nii.gz", NiftiError, "run.nii.gz is cut off or damaged")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda: file_bytes(values("int16", (5, 4, 3))), "3-D image"),
        (lambda: file_bytes(values("int16", (5, 4, 3, 2, 7))), "5-D image"),
        (lambda: with_fields(datatype=32, bitpix=64), "type code 32.*real types"),
        (lambda: with_fields(datatype=128, bitpix=24), "type code 128"),
        (lambda: with_fields(datatype=1536, bitpix=128), "type code 1536"),
        (lambda: with_fields(datatype=1, bitpix=1), "type code 1;"),
        (lambda: with_fields(datatype=4096), "type code 4096"),
        (lambda: with_fields(magic=b"\0\0\0\0"), "Analyze"),
        (lambda: with_fields(magic=b"n+7"), "magic"),
        (
            lambda: with_fields(dim=[4, 1000, 1000, 1000, 1000, 1, 1, 1]),
            "1000, 1000, 1000, 1000.*cannot be right",
        ),
        (lambda: with_fields(dim=[4, 1000, 1000, 1000, 1, 1, 1, 1]), "1 volumes.*bytes"),
        (lambda: with_fields(dim=[4, 5, 4, 3, 30000, 1, 1, 1]), "30000 volumes"),
        (lambda: with_fields(dim=[4, 5, -4, 3, 7, 1, 1, 1]), "-4.*cannot be right"),
        (lambda: with_fields(dim=[4, 5, 4, 0, 7, 1, 1, 1]), "cannot be right"),
        (lambda: with_fields(dim=[0, 5, 4, 3, 7, 1, 1, 1]), "cannot be right"),
        (lambda: with_fields(dim=[9, 5, 4, 3, 7, 1, 1, 1]), "cannot be right"),
        (lambda: with_fields(srow_x=[np.nan, 0, 0, 1]), "affine"),
        (lambda: with_fields(srow_x=[0, 0, 0, 0]), "affine"),
        (lambda: with_fields(srow_y=[3e38, 3e38, 3e38, 0]), "affine"),
        (lambda: with_fields(forms="qform", quatern_b=5.0), "header that cannot be used"),
        (lambda: with_fields(forms="qform", qoffset_x=np.inf), "affine"),
        (lambda: with_fields(scl_slope=2.0, scl_inter=np.nan), "header that cannot be used.*intercept"),
        (lambda: with_fields(vox_offset=0), "begins at byte 0"),
        (lambda: with_fields(vox_offset=-1), "begins at byte -1"),
        (lambda: with_fields(vox_offset=348), "begins at byte 348"),
        (lambda: with_fields(vox_offset=np.nan), "begins at byte nan"),
        (lambda: with_fields(vox_offset=np.inf), "begins at byte inf"),
        (lambda: with_fields(vox_offset=1e6), "ends before its data"),
        (lambda: with_fields(vox_offset=1e9), "begins at byte 1e"),
        (lambda: with_fields(version=2, vox_offset=2**62), "begins at byte 4.6"),
        (lambda: with_fields(extensions=struct.pack("<ii", 1600, 6) + bytes(8)), "extension of 1600 bytes"),
        (lambda: with_fields(extensions=struct.pack("<ii", -16, 6) + bytes(8)), "extension of -16 bytes"),
        (lambda: with_fields(extensions=bytes(16)), "extension of 0 bytes"),
        (lambda: variant_bytes("int16")[:200], "cut off|does not begin"),
        (lambda: variant_bytes("NIfTI-2")[:400], "540-byte header"),
    ],
)
@pytest.mark.parametrize("name", ["broken.nii", "broken.nii.gz"])
def test_headers_that_cannot_be_right(tmp_path, refused, content, match, name):
    message = refused(broken(tmp_path, content(), name), NiftiError, match)
    assert name in message


def test_repetition_times(tmp_path, refused):
    def source(**fields):
        return broken(tmp_path, with_fields(**fields))

    unknown, seconds, milli, micro, hertz = 2, 2 | 8, 2 | 16, 2 | 24, 2 | 32

    def pixdim(t_r):
        return [1, 2.5, 2.5, 3.3, t_r, 0, 0, 0]

    refused(source(pixdim=pixdim(0)), InputError, "broken.nii has no repetition time.*t_r=")
    refused(source(pixdim=pixdim(-2)), InputError, "no repetition time")
    refused(source(pixdim=pixdim(np.nan)), InputError, "no repetition time")
    refused(source(xyzt_units=hertz), InputError, "no repetition time")
    refused(source(pixdim=pixdim(2000), xyzt_units=unknown), InputError, "2000 s in its header.*t_r=")
    refused(source(pixdim=pixdim(2000), xyzt_units=seconds), InputError, "2000 s in its header")
    refused(source(pixdim=pixdim(2), xyzt_units=milli), InputError, "0.002 s in its header")
    for t_r in (0, -1, np.nan, np.inf):
        refused(source(), InputError, "repetition time is .* s; it must be positive", t_r=t_r)
    for number, (t_r, unit, expected) in enumerate(
        [
            (2.2, unknown, 2.2),
            (2200, milli, 2.2),
            (720, milli, 0.72),
            (1.3e6, micro, 1.3),
            (0.8, seconds, 0.8),
        ]
    ):
        run = convert(
            source(pixdim=pixdim(t_r), xyzt_units=unit), tmp_path / f"{number}.zarr", mask=full_mask()
        )
        assert run.attrs["repetition_time"] == expected
        np.testing.assert_array_equal(run["time"].values, expected * np.arange(7))
    given_by_hand = convert(source(pixdim=pixdim(2000)), tmp_path / "given.zarr", mask=full_mask(), t_r=2)
    assert given_by_hand.attrs["repetition_time"] == 2.0
    assert given_by_hand["time"].attrs["units"] == "s"


def test_masks_that_cannot_be_right(tmp_path, refused):
    source = write(tmp_path / "run.nii", variant_bytes("int16"))
    inside = np.zeros(SHAPE[:3], np.int16)

    def save(name, data, affine=AFFINE, **options):
        nib.save(nib.Nifti1Image(data, affine, **options), tmp_path / name)
        return tmp_path / name

    refused(source, SourceNotFoundError, "nomask.nii", mask=tmp_path / "nomask.nii")
    refused(source, MaskError, "empty.nii is empty", mask=save("empty.nii", inside))
    inside[1:3, 1:3, 1:2] = 1
    grids = "lie on the same grid: resample"
    refused(
        source, GridMismatchError, f"small.nii has .*run.nii.*{grids}", mask=save("small.nii", inside[1:])
    )
    shifted = AFFINE.copy()
    shifted[:3, 3] += [0.03, 0, 0]  # 1.2 % of a voxel
    refused(
        source, GridMismatchError, "shifted.nii.*apart.*Resample", mask=save("shifted.nii", inside, shifted)
    )
    turned = AFFINE @ np.diag([-1, 1, 1, 1])
    refused(source, GridMismatchError, "turned.nii", mask=save("turned.nii", inside, turned))
    three = inside.copy()
    three[0, 0, 0] = 2
    refused(source, MaskError, "three.nii has the values 0, 1, 2;.*Threshold", mask=save("three.nii", three))
    refused(source, MaskError, "levels.nii", mask=save("levels.nii", np.where(inside, 2, 1).astype(np.uint8)))
    refused(
        source, MaskError, "nan.nii has the values 0, nan", mask=save("nan.nii", np.where(inside, np.nan, 0))
    )
    refused(source, MaskError, "allnan.nii", mask=save("allnan.nii", np.full(SHAPE[:3], np.nan)))
    refused(
        source,
        MaskError,
        "four.nii.*a mask is a 3-D image",
        mask=save("four.nii", np.stack([inside] * 2, -1)),
    )
    refused(source, NiftiError, "complex.nii", mask=save("complex.nii", inside.astype(np.complex64)))
    (tmp_path / "cut.nii").write_bytes((tmp_path / "three.nii").read_bytes()[:-2])
    refused(source, NiftiError, "cut.nii", mask=tmp_path / "cut.nii")
    (tmp_path / "text.nii").write_text("mask" * 200)
    refused(source, NiftiError, "text.nii", mask=tmp_path / "text.nii")
    refused(source, NiftiError, "MGHImage", mask=nib.MGHImage(inside.astype(np.float32), AFFINE))
    flat = xr.DataArray(inside.astype(bool), dims=("a", "b", "c"))
    refused(source, MaskError, "dims", mask=flat)
    refused(source, InputError, "no voxel grid", mask=flat.rename(a="x", b="y", c="z"))


def test_masks_that_are_right(tmp_path):
    source = write(tmp_path / "run.nii", variant_bytes("int16"))
    inside = RNG.uniform(size=SHAPE[:3]) < 0.5
    near = AFFINE.copy()
    near[:3, 3] += [0.02, 0, 0]  # 0.8 % of a voxel
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    scaled = nib.Nifti1Image(np.where(inside, 200.0, 0), AFFINE, header)
    nib.save(scaled, tmp_path / "scaled.nii.gz")
    first = convert(source, tmp_path / "first.zarr", mask=nib.Nifti1Image(inside.astype(np.uint8), AFFINE))
    masks = {
        "near": nib.Nifti1Image(inside.astype(np.int32), near),
        "float": nib.Nifti1Image(np.where(inside, 0.3, 0), AFFINE),
        "negative": nib.Nifti1Image(np.where(inside, -7, 0).astype(np.int16), AFFINE),
        "four": nib.Nifti1Image(inside[..., None].astype(np.uint8), AFFINE),
        "path": tmp_path / "scaled.nii.gz",
        "array": first["mask"],
        "transposed": first["mask"].transpose("x", "z", "y").astype(np.float32),
    }
    for name, mask in masks.items():
        run = convert(source, tmp_path / f"{name}.zarr", mask=mask)
        np.testing.assert_array_equal(run["mask"].values, inside.T, err_msg=name)
        assert run["mask"].dtype == bool
        assert run.attrs["mask_source"] == "given"
    full = convert(source, tmp_path / "full.zarr", mask=full_mask())
    assert full["mask"].values.all()


def test_no_brain_leaves_nothing(tmp_path, refused):
    source = write(tmp_path / "run.nii", file_bytes(np.full(SHAPE, 7, np.int16)))
    refused(source, MaskError, "No brain was found in .*run.nii.*--mask", mask=None)


def test_a_place_that_cannot_be_written(tmp_path, refused, monkeypatch):
    source = write(tmp_path / "run.nii", variant_bytes("int16"))
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file/run.zarr was not written"):
        convert(source, tmp_path / "file" / "run.zarr", mask=full_mask())

    async def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr.storage.LocalStore, "set", full)
    refused(source, StoreError, "run-1 was not written: .*No space left")
    with pytest.raises(StoreError, match="noprotocol://x.zarr cannot be reached"):
        convert(source, "noprotocol://x.zarr", mask=full_mask())


# --------------------------------------------------------------------------------------------------- any bytes


@contextlib.contextmanager
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def attempt(folder, content, name):
    """Convert bytes: either it works, and gives a whole store, or it is refused with one of our errors.

    A header may promise less than there is, of which we warn.
    """
    source = write(folder / name, content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ChunkGLMWarning)
            run = convert(source, folder / "run.zarr")
    except ChunkGLMError as error:
        assert len(str(error)) > 20
        assert sorted(path.name for path in folder.iterdir()) == [name]
        return False
    verify(folder / "run.zarr")
    to_nifti(run["bold"], folder / "back.nii")
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(nib.load(folder / "back.nii").get_fdata(), nib.load(source).get_fdata())
    return True


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    path = tmp_path_factory.mktemp("brain") / "run.nii"
    write_simulated_run(path, shape=(14, 15, 13), n_volumes=14)
    return path


def test_the_untouched_file_is_converted(tmp_path, brain):
    assert attempt(tmp_path, brain.read_bytes(), "run.nii")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_to_a_header(tmp_path_factory, brain, changes):
    content = bytearray(brain.read_bytes())
    for place, value in changes:
        content[place] = value
    with scratch(tmp_path_factory) as folder, np.errstate(all="raise"):
        attempt(folder, bytes(content), "run.nii")


_FLOATS = st.one_of(
    st.floats(width=32), st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-30, 1e30, 3.4e38])
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(
        [
            "pixdim",
            "srow_x",
            "srow_y",
            "srow_z",
            "quatern_b",
            "qoffset_z",
            "scl_slope",
            "scl_inter",
            "vox_offset",
            "toffset",
        ]
    ),
    values=st.lists(_FLOATS, min_size=1, max_size=4),
    forms=st.tuples(st.integers(-2, 7), st.integers(-2, 7)),
)
def test_any_numbers_in_a_header(tmp_path_factory, brain, field, values, forms):
    header = nib.Nifti1Header(brain.read_bytes()[:348], check=False)
    header["qform_code"], header["sform_code"] = forms
    if header[field].ndim:
        for place, value in enumerate(values):
            header[field][place] = value
    else:
        header[field] = values[0]
    with scratch(tmp_path_factory) as folder:
        attempt(folder, header.binaryblock + brain.read_bytes()[348:], "run.nii")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=1200), start=st.sampled_from(["nothing", "NIfTI-1", "NIfTI-2", "gzip"]))
def test_any_bytes(tmp_path_factory, content, start):
    name = "run.nii.gz" if start == "gzip" else "run.nii"
    begin = {
        "nothing": b"",
        "NIfTI-1": struct.pack("<i", 348),
        "NIfTI-2": struct.pack(">i", 540),
        "gzip": b"",
    }[start]
    with scratch(tmp_path_factory) as folder:
        (folder / name).write_bytes(begin + content)
        with pytest.raises(ChunkGLMError):
            convert(folder / name, folder / "run.zarr")
        assert [path.name for path in folder.iterdir()] == [name]


def test_opened_run_is_what_convert_returns(tmp_path):
    source = write(tmp_path / "run.nii", variant_bytes("slope and intercept"))
    run = convert(source, tmp_path / "run.zarr", mask=full_mask())
    xr.testing.assert_identical(run.compute(), open_run(tmp_path / "run.zarr").compute())
    assert list(run) == ["bold", "mask", "mean_image"]
    assert set(run.coords) == {"time", "z", "y", "x", "grid"}
    assert run["bold"].attrs["long_name"] == "BOLD signal"
    assert run.attrs["numerical_version"]
    assert any(entry.startswith("zarr ") for entry in run.attrs["package_versions"])
