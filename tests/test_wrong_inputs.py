"""What cannot be right is refused before any work: status 1, one paragraph that names the file, nothing left behind."""

import gzip
import json
import shutil
import subprocess
import sys
import warnings
import zipfile
import zlib

import nibabel as nib
import numpy as np
import pytest

import chunkglm as cg
from chunkglm.cli import main
from chunkglm.testing import write_simulated_run

SHAPE = (16, 18, 12)


def call(*arguments):
    """Exit status of a command."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code


def fails(capsys, *arguments):
    """The one paragraph that a command gives which must fail."""
    assert call(*arguments) == 1
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in err
    assert out == ""
    assert len(errors) == 1, err
    return errors[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two small sessions with designs and a mask, and stores of them."""
    folder = tmp_path_factory.mktemp("data")
    for session, volumes in ((1, 66), (2, 72)):
        write_simulated_run(
            folder / f"run{session}.nii.gz",
            folder / f"run{session}_design.npz",
            folder / "mask.nii.gz",
            shape=SHAPE,
            n_volumes=volumes,
            session=session,
            overwrite=True,
        )
        (folder / f"run{session}.nii").write_bytes(
            gzip.decompress((folder / f"run{session}.nii.gz").read_bytes())
        )
    cg.convert(folder / "run1.nii.gz", folder / "run-1", mask=folder / "mask.nii.gz")
    return folder


def altered(data, **changes):
    """The whole job with other values of options; a list is given several times."""
    words = {
        "runs": [data / "run1.nii.gz", data / "run2.nii.gz"],
        "design": [data / "run1_design.npz", data / "run2_design.npz"],
        "mask": data / "mask.nii.gz",
        "contrast": "diff=DSt - SSt",
    } | changes
    arguments = ["run", *words.pop("runs")]
    for option, values in words.items():
        for value in values if isinstance(values, list) else [values]:
            arguments += [f"--{option}", value]
    return arguments


def write_image(path, data, affine=None, t_r=2.0):
    image = nib.Nifti1Image(data, np.eye(4) if affine is None else affine)
    if data.ndim == 4:
        image.header.set_zooms((*image.header.get_zooms()[:3], t_r))
        image.header.set_xyzt_units("mm", "sec")
    image.to_filename(path)
    return path


def nameless(design, path):
    np.savez(path, X=np.load(design)["X"])
    return path


def with_header(source, path, **fields):
    """The run with other fields in its header; compressed if its name says so."""
    content = bytearray(source.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


def with_extension(source, path, length):
    """The run with a header extension that says to be of another length than it is."""
    content = source.read_bytes()
    header = bytearray(content[:348])
    header[108:112] = np.float32(368).tobytes()
    extension = b"\1\0\0\0" + int(length).to_bytes(4, "little", signed=True) + b"\6\0\0\0" + bytes(8)
    path.write_bytes(bytes(header) + extension + content[352:])
    return path


def zeros_in_gzip(path, head, n):
    """A gzip file of a head and very many zeros, made without having them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    with path.open("wb") as file:
        file.write(packer.compress(head))
        block = bytes(2**24)
        for _ in range(n // 2**24):
            file.write(packer.compress(block))
        file.write(packer.flush())
    return path


def bomb(path, shape):
    """A mask whose header claims, and whose file holds, very many voxels."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.uint8)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header.set_sform(np.eye(4), 1)
    return zeros_in_gzip(path, header.binaryblock + bytes(4), int(np.prod(shape)))


def npz_of(path, name, descr, shape, n_bytes):
    """An archive whose array says to have a shape and a type, with so many zeros."""
    head = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w") as member,
    ):
        member.write(b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head)
        for _ in range(n_bytes // 2**20):
            member.write(bytes(2**20))
    return path


def text(path, content):
    path.write_text(content)
    return path


def wrong_inputs(data, folder):
    """Changes to the job, and what the message must say, by name; each is made when it is asked for."""
    good = nib.load(data / "run1.nii.gz")
    plain, second = data / "run1.nii", data / "run2.nii.gz"
    one, two = data / "run1_design.npz", data / "run2_design.npz"
    names = cg.read_design(one).columns

    def values():
        return np.asarray(good.dataobj)

    def run(path):
        return {"runs": [path, second]}

    def mask(array, affine=good.affine):
        return {"mask": write_image(folder / "other.nii.gz", array, affine)}

    def table(change):
        design = cg.read_design(one)
        return {"design": [text(folder / "table.csv", change(design.to_csv(index=False))), two]}

    def cut(path, keep):
        (folder / "cut.nii.gz").write_bytes(path.read_bytes()[:keep])
        return folder / "cut.nii.gz"

    ones = np.ones(SHAPE, dtype=np.uint8)
    shift = good.affine + np.array([[0, 0, 0, 9.0], [0] * 4, [0] * 4, [0] * 4])
    size = (data / "run1.nii.gz").stat().st_size
    return {
        # Recordings.
        "no such file": (lambda: run(folder / "none.nii.gz"), ["none.nii.gz"]),
        "a folder": (lambda: run(data), ["data", "not a NIfTI"]),
        "not a NIfTI": (lambda: run(text(folder / "text.nii.gz", "this is not an image")), ["text.nii.gz"]),
        "empty file": (lambda: run(text(folder / "empty.nii", "")), ["empty.nii", "begin"]),
        "truncated gzip": (lambda: run(cut(data / "run1.nii.gz", size - 5000)), ["cut.nii.gz", "again"]),
        "gzip without its end": (lambda: run(cut(data / "run1.nii.gz", size - 4)), ["cut.nii.gz", "again"]),
        "truncated header": (lambda: run(cut(data / "run1.nii.gz", 200)), ["cut.nii.gz"]),
        "3-D image": (
            lambda: run(write_image(folder / "flat.nii.gz", values()[..., 0])),
            ["flat.nii.gz", "3-D"],
        ),
        "no repetition time": (
            lambda: run(write_image(folder / "timeless.nii.gz", values(), good.affine, t_r=0.0)),
            ["timeless.nii.gz", "--t-r"],
        ),
        "10^12 voxels": (
            lambda: run(
                with_header(plain, folder / "huge.nii.gz", dim=[4, 10000, 10000, 10000, 60, 1, 1, 1])
            ),
            ["huge.nii.gz", "cannot be right"],
        ),
        "more than the file can hold": (
            lambda: run(with_header(plain, folder / "huge.nii.gz", dim=[4, 2000, 2000, 300, 66, 1, 1, 1])),
            ["huge.nii.gz", "its header promises"],
        ),
        "negative dims": (
            lambda: run(with_header(plain, folder / "minus.nii", dim=[4, -16, 18, 12, 66, 1, 1, 1])),
            ["minus.nii", "positive"],
        ),
        "NaN affine": (
            lambda: run(with_header(plain, folder / "nan.nii", srow_x=[np.nan] * 4, sform_code=1)),
            ["nan.nii", "affine"],
        ),
        "affine of a plane": (
            lambda: run(with_header(plain, folder / "plane.nii", srow_z=[0, 0, 0, 0], sform_code=1)),
            ["plane.nii", "affine"],
        ),
        "extension past the end": (
            lambda: run(with_extension(plain, folder / "extension.nii", 2**30)),
            ["extension.nii", "extension"],
        ),
        "extension of negative length": (
            lambda: run(with_extension(plain, folder / "extension.nii", -16)),
            ["extension.nii", "extension"],
        ),
        "data before the header": (
            lambda: run(with_header(plain, folder / "offset.nii", vox_offset=-1000)),
            ["offset.nii"],
        ),
        "complex values": (
            lambda: run(with_header(plain, folder / "complex.nii", datatype=32, bitpix=64)),
            ["complex.nii", "type code 32"],
        ),
        "unknown type": (
            lambda: run(with_header(plain, folder / "type.nii", datatype=999)),
            ["type.nii", "999"],
        ),
        "runs on different grids": (
            lambda: run(write_image(folder / "shifted.nii.gz", values(), shift)),
            ["shifted.nii.gz", "mm"],
        ),
        # Masks.
        "mask on another grid": (lambda: mask(np.ones((4, 4, 4), np.uint8)), ["other.nii.gz", "(4, 4, 4)"]),
        "mask shifted": (lambda: mask(ones, shift), ["other.nii.gz", "mm"]),
        "empty mask": (lambda: mask(ones * 0), ["other.nii.gz", "empty"]),
        "mask of many values": (
            lambda: mask(np.arange(ones.size).reshape(SHAPE).astype(np.int16)),
            ["other.nii.gz", "Threshold"],
        ),
        "mask of NaN": (lambda: mask(np.full(SHAPE, np.nan, np.float32)), ["other.nii.gz", "nan"]),
        "mask of several volumes": (lambda: mask(np.ones((*SHAPE, 3), np.uint8)), ["other.nii.gz", "3-D"]),
        "no such mask": (lambda: {"mask": folder / "none.nii"}, ["none.nii"]),
        "gzip bomb as mask": (
            lambda: {"mask": bomb(folder / "bomb.nii.gz", (1024, 1024, 1024))},
            ["bomb.nii.gz", "(1024, 1024, 1024)"],
        ),
        # Designs.
        "rows and volumes": (lambda: {"design": [two, two]}, ["run2_design.npz", "72", "66"]),
        "one design": (lambda: {"design": [one]}, ["2 runs", "1 design"]),
        "no such design": (lambda: {"design": [folder / "none.csv", two]}, ["none.csv"]),
        "a word in a design": (
            lambda: table(lambda csv: csv.replace("1.0\n", "one\n", 1)),
            ["table.csv", "'one'", "row 1"],
        ),
        "a gap in a design": (lambda: table(lambda csv: csv.replace("1.0\n", "\n", 1)), ["table.csv", "''"]),
        "twice the same name": (
            lambda: table(lambda csv: csv.replace(names[0], names[1], 1)),
            ["table.csv", names[1]],
        ),
        "10^6 columns": (
            lambda: table(lambda _: ",".join(map(str, range(10**6))) + "\n"),
            ["table.csv", "columns"],
        ),
        "pickled design": (
            lambda: {"design": [pickled(folder / "pickle.npz"), two]},
            ["pickle.npz", "object"],
        ),
        "zip bomb as design": (
            lambda: {"design": [npz_of(folder / "bomb.npz", "X", "<f8", (10**9, 7), 2**20), two]},
            ["bomb.npz", "values are accepted"],
        ),
        "no names": (
            lambda: {"design": [nameless(one, folder / "a.npz"), nameless(two, folder / "b.npz")]},
            ["'x0'", "--column-names"],
        ),
        # Contrasts and options.
        "unknown regressor": (lambda: {"contrast": "diff=DSt - typo"}, ["typo", "DSt"]),
        "constant": (lambda: {"contrast": "diff=DSt - SSt + 2"}, ["constant"]),
        "product": (lambda: {"contrast": "diff=DSt * SSt"}, ["DSt * SSt"]),
        "a program": (lambda: {"contrast": "diff=__import__('os').system('touch hacked')"}, ["__import__"]),
        "deep brackets": (lambda: {"contrast": "diff=" + "(" * 10**5 + "DSt" + ")" * 10**5}, ["expression"]),
        "a path as name": (lambda: {"contrast": "../x=DSt"}, ["../x"]),
        "a script as name": (lambda: {"contrast": "<script>alert(1)</script>=DSt"}, ["<script>"]),
        "too many weights": (lambda: {"contrast": "diff=[1,2,3,4,5,6,7,8,9,10]"}, ["10"]),
        "two of a name": (lambda: {"contrast": ["a=DSt", "a=SSt"]}, ["'a'"]),
        "noise model": (lambda: {"noise-model": "arma"}, ["arma", "ar2"]),
        "sample masks": (lambda: {"sample-mask": one}, ["1 sample masks", "once for each run"]),
        "one sample mask": (
            lambda: {"sample-mask": text(folder / "kept.txt", "1\n" * 66)},
            ["There are 2 runs and 1 sample masks"],
        ),
        "too many designs": (
            lambda: {"design": [one, two, two], "sample-mask": ["all", "all"]},
            ["There are 2 runs and 3 designs"],
        ),
        "memory": (lambda: {"memory": "1MiB"}, ["memory", "1.0 MiB"]),
        "no amount of memory": (lambda: {"memory": "lots"}, ["lots"]),
        "negative smoothing": (lambda: {"smoothing-fwhm": "-5"}, ["-5"]),
        "cuts outside": (lambda: {"cut-coords": None}, ["9999"]),
    }


class Hostile:
    """Something that would run when it is unpickled."""

    def __reduce__(self):
        return (open, ("hacked", "w"))


def pickled(path):
    array = np.empty((66, 1), dtype=object)
    array[:] = Hostile()
    np.savez(path, X=array)
    return path


WRONG = [
    "no such file", "a folder", "not a NIfTI", "empty file", "truncated gzip", "gzip without its end", "truncated header", "3-D image",
    "no repetition time", "10^12 voxels", "more than the file can hold", "negative dims", "NaN affine", "affine of a plane",
    "extension past the end", "extension of negative length", "data before the header", "complex values", "unknown type",
    "runs on different grids", "mask on another grid", "mask shifted", "empty mask", "mask of many values", "mask of NaN",
    "mask of several volumes", "no such mask", "gzip bomb as mask", "rows and volumes", "one design", "no such design",
    "a word in a design", "a gap in a design", "twice the same name", "10^6 columns", "pickled design", "zip bomb as design", "no names",
    "unknown regressor", "constant", "product", "a program", "deep brackets", "a path as name", "a script as name", "too many weights",
    "two of a name", "noise model", "sample masks", "one sample mask", "too many designs", "memory", "no amount of memory", "negative smoothing", "cuts outside",
]  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_input_is_one_paragraph(what, data, tmp_path, capsys, monkeypatch):
    make, expected = wrong_inputs(data, tmp_path)[what]
    arguments = altered(data, **make())
    if what == "cuts outside":
        arguments[arguments.index("--cut-coords") + 1 :] = ["9999", "0", "0"]
    before = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    message = fails(capsys, *arguments, "--output", tmp_path / "results")
    for words in expected:
        assert words in message
    assert len(message) < 1500
    assert not list((tmp_path / "here").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "here"]), (
        "nothing is left behind"
    )


def test_wrong_inputs_are_all_tested(data, tmp_path):
    assert sorted(wrong_inputs(data, tmp_path)) == sorted(WRONG)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize(
    "what",
    [
        "10^12 voxels",
        "more than the file can hold",
        "gzip bomb as mask",
        "10^6 columns",
        "zip bomb as design",
    ],
)
def test_what_is_too_large_is_refused_in_little_memory(what, data, tmp_path):
    """In 400 MB of data beside the imports, where the inputs claim from 1 GB to 100 TB."""
    make, _ = wrong_inputs(data, tmp_path)[what]
    words = [str(word) for word in altered(data, **make())]
    code = (
        "import resource, sys\n"
        "from chunkglm.cli import main\n"
        "used = int(open('/proc/self/status').read().split('VmData:')[1].split()[0]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + 400_000_000,) * 2)\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--output", tmp_path / "results"],
        capture_output=True,
        text=True,
        check=False,
        env={"OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1
    assert "MemoryError" not in done.stderr
    assert done.stderr.count("Error: ") == 1


def test_several_wrong_inputs_are_told_at_once(data, tmp_path, capsys):
    arguments = altered(
        data,
        runs=[tmp_path / "none.nii.gz", data / "run2.nii.gz"],
        design=[tmp_path / "none.csv", data / "run1_design.npz"],
        mask=tmp_path / "none-mask.nii",
    )
    message = fails(capsys, *arguments, "--output", tmp_path / "results")
    for words in ("none.nii.gz", "none.csv", "none-mask.nii", "run1_design.npz"):
        assert words in message
    assert not (tmp_path / "results").exists()
    # The same in a table, for people and for programs.
    assert call("check", *arguments[1:], "--json") == 1
    found = json.loads(capsys.readouterr().out)
    subjects = {one["subject"] for one in found if one["level"] == "error"}
    assert {str(tmp_path / "none.nii.gz"), str(tmp_path / "none.csv")} <= subjects


# --------------------------------------------------------------------------------------------------------------- stores


@pytest.fixture
def store(data, tmp_path):
    return shutil.copytree(data / "run-1", tmp_path / "run-1")


def sealed_again(store, change):
    """The store with other metadata, and a seal that fits: what only malice does."""
    from chunkglm.store.manifest import MANIFEST_FILES, make_seal
    from chunkglm.store.places import SEAL
    from chunkglm.store.reading import _read_manifest

    root = json.loads((store / "zarr.json").read_text())
    change(root)
    backend = __import__("zarr").storage.LocalStore(store)
    manifest, metadata = _read_manifest(backend, str(store))
    assert MANIFEST_FILES
    root["attributes"][SEAL] = make_seal(root, manifest, metadata)
    (store / "zarr.json").write_text(json.dumps(root))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_type", "object"),
        ("data_type", {"name": "null_terminated_bytes", "configuration": {"length_bytes": 10}}),
        ("codecs", [{"name": "numcodecs.pickle"}]),
        ("codecs", [{"name": "vlen-bytes"}, {"name": "numcodecs.zlib", "configuration": {}}]),
    ],
)
def test_a_store_with_types_that_may_be_programs(key, value, store, capsys):
    def change(root):
        root["consolidated_metadata"]["metadata"]["mask"][key] = value

    sealed_again(store, change)
    message = fails(capsys, "info", store)
    assert str(store) in message
    assert "mask has the type" in message


@pytest.mark.parametrize("what", ["a chunk", "a folder of chunks", "an array in memory"])
def test_a_store_with_links_that_leave_it(what, store, tmp_path, capsys):
    name = {"a chunk": "bold/c/0/0/0/0", "a folder of chunks": "bold/c/0", "an array in memory": "time/c/0"}[
        what
    ]
    # The same bytes, so that no checksum tells.
    (store / name).rename(tmp_path / "outside")
    (store / name).symlink_to(tmp_path / "outside")
    message = fails(capsys, "verify", store)
    assert "is a link that leaves it" in message
    with pytest.raises(cg.errors.DamagedStoreError, match="is a link that leaves it"):
        cg.open_run(store).bold.load()


def test_a_manifest_with_names_that_leave_the_store(store):
    from chunkglm import chunkfiles
    from chunkglm.schema import canonical_json
    from chunkglm.store.manifest import make_seal
    from chunkglm.store.places import SEAL

    root = json.loads((store / "zarr.json").read_text())
    about = json.loads((store / "manifest" / "zarr.json").read_text())
    (length,) = about["shape"]
    content = chunkfiles.decode_chunk(
        (store / "manifest" / "c" / "0").read_bytes(), (length,), np.dtype(np.uint8)
    )
    entries = json.loads(content.tobytes()) | {"../../secret": [3, 5]}
    manifest = canonical_json(entries)
    about["shape"] = [len(manifest)]
    about["chunk_grid"]["configuration"]["chunk_shape"] = [len(manifest)]
    (store / "manifest" / "zarr.json").write_text(json.dumps(about))
    values = np.frombuffer(manifest, dtype=np.uint8)
    (store / "manifest" / "c" / "0").write_bytes(chunkfiles.encode_chunk(values, values.shape))
    root["attributes"][SEAL] = make_seal(root, manifest, (store / "manifest" / "zarr.json").read_bytes())
    (store / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(cg.errors.DamagedStoreError, match=r"\.\./\.\./secret lies outside"):
        cg.verify(store)


def test_a_link_to_a_whole_store_is_no_fault(store, tmp_path):
    (tmp_path / "link").symlink_to(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cg.verify(tmp_path / "link")
        assert cg.open_run(tmp_path / "link").mask.any()
