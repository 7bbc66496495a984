"""Chunks as files: Zarr's own bytes, read as Zarr reads them, and nothing that is damaged."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec

import chunkglm as cg
from chunkglm import chunkfiles
from chunkglm.chunkfiles import ChunkProblemError, Entry, is_whole, read_chunk, write_chunk

DTYPES = ["int16", "uint8", "float32", "float64", "int64", "bool"]


def values_of(dtype, shape, seed=0):
    return (np.random.default_rng(seed).normal(0, 50, shape)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_are_those_of_zarr(tmp_path, dtype):
    values = values_of(dtype, (7, 10, 9))
    codec = BloscCodec(cname="lz4", clevel=1, shuffle="shuffle", typesize=values.itemsize)
    options = {"compressors": [codec, Crc32cCodec()], "config": {"write_empty_chunks": True}}
    array = zarr.create_array(tmp_path / "a.zarr", shape=(7, 10, 9), chunks=(4, 5, 9), dtype=dtype, **options)
    array[...] = values
    (tmp_path / "own").mkdir()
    for t in (0, 1):
        for y in (0, 1):
            part = values[4 * t : 4 * t + 4, 5 * y : 5 * y + 5]
            write_chunk(tmp_path / "own" / "c" / f"{t}{y}", part, (4, 5, 9), tmp_path)
            theirs = (tmp_path / "a.zarr" / "c" / str(t) / str(y) / "0").read_bytes()
            assert (tmp_path / "own" / "c" / f"{t}{y}").read_bytes() == theirs
            entry = Entry(len(theirs), int.from_bytes(theirs[-4:], "little"))
            for expected in (entry, None):
                got = read_chunk(tmp_path / "own" / "c" / f"{t}{y}", expected, (4, 5, 9), np.dtype(dtype))
                np.testing.assert_array_equal(got[tuple(slice(n) for n in part.shape)], part)
    assert sorted(path.name for path in (tmp_path / "own" / "c").iterdir()) == ["00", "01", "10", "11"]


def test_one_value_that_was_broadcast_is_written_as_any_other(tmp_path):
    for value, dtype in ((np.nan, "float64"), (7, "int16"), (True, "bool")):
        one = np.broadcast_to(np.array(value, dtype=dtype), (3, 4))
        write_chunk(tmp_path / "constant", one, (4, 4), tmp_path)
        write_chunk(tmp_path / "plain", np.array(one), (4, 4), tmp_path)
        assert (tmp_path / "constant").read_bytes() == (tmp_path / "plain").read_bytes()
        got = read_chunk(tmp_path / "constant", None, (4, 4), np.dtype(dtype))
        np.testing.assert_array_equal(got[:3], one)


def test_every_damage_is_told(tmp_path):
    path, values = tmp_path / "0", values_of("float32", (8, 9))
    write_chunk(path, values, (8, 9), tmp_path)
    whole = path.read_bytes()
    entry = Entry(len(whole), int.from_bytes(whole[-4:], "little"))

    def read(content, expected=entry):
        path.write_bytes(content)
        return read_chunk(path, expected, (8, 9), values.dtype)

    np.testing.assert_array_equal(read(whole), values)
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        for expected in (entry, None):
            with pytest.raises(ChunkProblemError, match="altered"):
                read(bytes(flipped), expected)
    for content in (whole[:-1], whole + b"\0", b"", whole[:10]):
        with pytest.raises(ChunkProblemError, match="altered"):
            read(content)
    # A sound chunk from elsewhere, and one of another shape.
    write_chunk(path, values + 1, (8, 9), tmp_path)
    with pytest.raises(ChunkProblemError, match="altered"):
        read_chunk(path, entry, (8, 9), values.dtype)
    with pytest.raises(ChunkProblemError, match="length"):
        read_chunk(path, None, (8, 8), values.dtype)
    path.unlink()
    with pytest.raises(ChunkProblemError, match="missing"):
        read_chunk(path, entry, (8, 9), values.dtype)


def test_what_cannot_be_written_leaves_no_chunk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunkfiles.google_crc32c, "value", full)
    with pytest.raises(OSError, match="No space"):
        write_chunk(tmp_path / "0", np.zeros(3), (3,), tmp_path)
    assert list(tmp_path.iterdir()) == []


@given(st.data())
def test_any_selection_is_that_of_the_values(tmp_path_factory, data):
    """Slices within a chunk are read from its file, all others through zarr."""
    shape = (9, 8, 7)
    values = values_of("float32", shape)
    place = tmp_path_factory.mktemp("store") / "a.zarr"
    ds = xr.Dataset({"a": (("z", "y", "x"), values)}).chunk(z=4, y=5, x=7)
    opened = cg.save(ds, place)
    key = {}
    for dim, n in zip("zyx", shape, strict=True):
        whole, some = st.just(slice(None)), st.builds(slice, st.integers(0, n), st.integers(0, n))
        strided = st.builds(slice, st.integers(0, n), st.none(), st.integers(1, 3))
        key[dim] = data.draw(st.one_of(whole, some, strided, st.integers(-n, n - 1)))
    np.testing.assert_array_equal(opened["a"].isel(key), values[tuple(key.values())])


@pytest.mark.parametrize("slope", [None, 0.5])
def test_chunks_of_opened_stores_are_read_without_zarr_and_once(tmp_path, monkeypatch, slope):
    values = values_of("int16", (6, 4, 5, 3))
    dims = ("time", "z", "y", "x")
    ds = xr.Dataset({"bold": (dims, values), "beta": (dims[1:], values[0] * 0.5)}).chunk(time=2, z=4)
    if slope is not None:
        ds["bold"].encoding = {"dtype": np.dtype(np.int16), "scale_factor": slope, "add_offset": 1.0}
        ds["bold"] = ds["bold"].astype(np.float64) * slope + 1.0
        ds["bold"].encoding = {"dtype": np.dtype(np.int16), "scale_factor": slope, "add_offset": 1.0}
    cg.save(ds, tmp_path / "a.zarr")
    read = []
    original = chunkfiles.read_chunk

    def watched(path, *rest):
        read.append(path.relative_to(tmp_path).as_posix())
        return original(path, *rest)

    monkeypatch.setattr(chunkfiles, "read_chunk", watched)
    opened = cg.open_store(tmp_path / "a.zarr")
    assert read == []
    np.testing.assert_array_equal(opened["bold"], values * (slope or 1) + (slope is not None))
    np.testing.assert_array_equal(opened["beta"], values[0] * 0.5)
    assert sorted(read) == ["a.zarr/beta/c/0/0/0", *(f"a.zarr/bold/c/{t}/0/0/0" for t in range(3))]
    with xr.open_zarr(tmp_path / "a.zarr") as plain:
        xr.testing.assert_equal(opened["bold"].variable, plain["bold"].variable)


def test_no_chunk_is_written_where_work_was_given_up(tmp_path):
    """By a process that slept meanwhile, say: neither without the workplace, nor where the array is not any more."""
    values = values_of("float32", (8, 9))
    with pytest.raises(FileNotFoundError):
        write_chunk(tmp_path / "array" / "c" / "0" / "0", values, (8, 9), tmp_path)
    (tmp_path / "array").mkdir()
    with pytest.raises(FileNotFoundError):
        write_chunk(tmp_path / "array" / "c" / "0" / "0", values, (8, 9), tmp_path / "workplace")
    assert [path.name for path in (tmp_path / "array").iterdir()] == []
    write_chunk(tmp_path / "array" / "c" / "0" / "0", values, (8, 9), tmp_path)
    assert is_whole(tmp_path / "array" / "c" / "0" / "0")


def test_two_writers_of_one_chunk_do_not_meet(tmp_path, monkeypatch):
    """One of them sleeps before its file gets its name, while the other does all its work."""
    values, path, replace = values_of("float32", (8, 9)), tmp_path / "0", Path.replace

    def sleep(one, target):
        monkeypatch.setattr(Path, "replace", replace)
        write_chunk(path, values, (8, 9), tmp_path)
        assert is_whole(path)
        return one.replace(target)

    monkeypatch.setattr(Path, "replace", sleep)
    write_chunk(path, values, (8, 9), tmp_path)
    assert is_whole(path)
    assert [one.name for one in tmp_path.iterdir()] == ["0"]
