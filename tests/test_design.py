"""Design matrices and contrast expressions."""

import io
import re
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from nilearn.glm.contrasts import expression_to_contrast_vector

from chunkglm.design import as_design, is_estimable, read_column_names, read_design
from chunkglm.errors import (
    ChunkGLMWarning,
    ContrastError,
    DesignError,
    SourceNotFoundError,
)
from chunkglm.expressions import contrast_name, contrast_rows, parse_definition, parse_expression

NAMES = ["face", "house", "drift_1"]
COLUMNS = ["face", "house", "2back", "0back", "trial_type.face", "trial type", "a-b", "a", "b", "été"]


def matrix(rows=6, columns=3):
    return np.random.default_rng(4).normal(size=(rows, columns))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


VEST = """/NumWaves\t2
/NumPoints\t3
/PPheights\t\t1.0e+00 2.0e+00

/Matrix
1.0e+00\t-2.5e-01\t
0 .5
1 1e-3
"""


# --- reading: round trips ----------------------------------------------------------------------


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("name", ["d.csv", "d.CSV", "d.tsv", "d.Tsv"])
def test_read_design__text_round_trip_is_exact(tmp_path, name, index):
    frame = pd.DataFrame(
        matrix(), columns=["face", 'a "quoted", name', "été"], index=[0, 2.5, 5, 7.5, 10, 12.5]
    )
    frame.to_csv(tmp_path / name, sep="\t" if "tsv" in name.lower() else ",", index=index)
    got = read_design(tmp_path / name)
    pd.testing.assert_frame_equal(got, frame.reset_index(drop=True))
    assert isinstance(got.index, pd.RangeIndex)
    assert (got.dtypes == np.float64).all()


def test_read_design__accepts_str_paths_bom_crlf_and_blank_lines(tmp_path):
    path = write(tmp_path / "d.csv", "\ufeff face , house\r\n1,2\r\n\r\n 3 ,-4e1\r\n")
    got = read_design(str(path))
    assert list(got.columns) == ["face", "house"]
    np.testing.assert_array_equal(got, [[1, 2], [3, -40]])


def test_read_design__index_of_strings_is_dropped_and_names_may_be_digits(tmp_path):
    path = write(tmp_path / "d.csv", ",0,1\nfirst,1,2\nsecond,3,4\n")
    got = read_design(path)
    assert list(got.columns) == ["0", "1"]
    np.testing.assert_array_equal(got, [[1, 2], [3, 4]])


@pytest.mark.parametrize("key", ["conditions", "columns"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_read_design__npz_with_names(tmp_path, save, key):
    X = matrix()
    save(tmp_path / "d.npz", X=X, **{key: np.array(NAMES)})
    pd.testing.assert_frame_equal(read_design(tmp_path / "d.npz"), pd.DataFrame(X, columns=NAMES))


def test_read_design__npz_with_names_in_bytes(tmp_path):
    names = ["Gesicht", "Häuser", "x"]
    np.savez(tmp_path / "d.npz", X=matrix(), conditions=np.array([name.encode() for name in names]))
    assert list(read_design(tmp_path / "d.npz").columns) == names
    np.savez(tmp_path / "d.npz", X=matrix(), conditions=np.array([b"a", b"\xff", b"c"]))
    with pytest.raises(DesignError, match="UTF-8"):
        read_design(tmp_path / "d.npz")


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint8, bool, ">f8"])
def test_read_design__npz_without_names(tmp_path, dtype):
    X = (matrix() > 0).astype(dtype)
    np.savez(tmp_path / "d.npz", X=np.asfortranarray(X), other=np.zeros(3))
    got = read_design(tmp_path / "d.npz")
    assert list(got.columns) == ["x0", "x1", "x2"]
    assert (got.dtypes == np.float64).all()
    np.testing.assert_array_equal(got, X)


@pytest.mark.parametrize(
    "names",
    [
        np.array(["a", "b"]),
        np.arange(3),
        np.array([["a"], ["b"], ["c"]]),
        np.array(["a", None, 3], dtype=object),
    ],
    ids=["too few", "numbers", "2-D", "pickled"],
)
def test_read_design__npz_names_that_do_not_fit_are_ignored(tmp_path, names):
    np.savez(tmp_path / "d.npz", X=matrix(), conditions=names)
    assert list(read_design(tmp_path / "d.npz").columns) == ["x0", "x1", "x2"]
    np.savez(tmp_path / "d.npz", X=matrix(), conditions=names, columns=np.array(NAMES))
    assert list(read_design(tmp_path / "d.npz").columns) == NAMES


@pytest.mark.parametrize(
    "text", [VEST, VEST.replace("\n", "\r\n"), VEST.replace("/PPheights\t\t1.0e+00 2.0e+00\n", "")]
)
def test_read_design__fsl_mat(tmp_path, text):
    got = read_design(write(tmp_path / "design.mat", text))
    assert list(got.columns) == ["x0", "x1"]
    np.testing.assert_array_equal(got, [[1, -0.25], [0, 0.5], [1, 1e-3]])


def test_read_design__columns_name_or_rename(tmp_path):
    mat = write(tmp_path / "design.mat", VEST)
    csv = write(tmp_path / "d.csv", "a,a\n1,2\n")
    np.savez(tmp_path / "d.npz", X=matrix(4, 2), conditions=np.array(["a", "b"]))
    for path in (mat, csv, tmp_path / "d.npz"):
        assert list(read_design(path, columns=("face", "house")).columns) == ["face", "house"]
        with pytest.raises(DesignError, match=rf"{path.name}' has 2 columns, but 3 names"):
            read_design(path, columns=NAMES)
        with pytest.raises(DesignError, match=r"several columns named 'face'"):
            read_design(path, columns=["face", "face"])
        with pytest.raises(DesignError, match=r"name 5 for column 2"):
            read_design(path, columns=["face", 5])
        with pytest.raises(DesignError, match=r"one string as names, 'ab'"):
            read_design(path, columns="ab")


# --- reading: refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no.csv", "no.npz", "no.mat", "no.txt", "no/such/folder.tsv"])
def test_read_design__missing_file(tmp_path, name):
    with pytest.raises(SourceNotFoundError, match=re.escape(name)):
        read_design(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        as_design(tmp_path / name, n_volumes=3, run="1")


@pytest.mark.parametrize("name", ["d.txt", "d.xmat.1D", "d", "d.csv.gz", "d.npy"])
def test_read_design__other_suffix(tmp_path, name):
    write(tmp_path / name, "a\n1\n")
    with pytest.raises(DesignError, match=re.escape(name)) as caught:
        read_design(tmp_path / name)
    for accepted in (".csv", ".tsv", ".npz", ".mat"):
        assert accepted in str(caught.value)


def test_read_design__folder_is_refused(tmp_path):
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(DesignError, match=r"d\.csv' cannot be opened"):
        read_design(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty", "(0, 0)"]),
        ("\n\n", ["empty"]),
        ("a,b\n", ["empty", "(0, 2)"]),
        ('""\n1\n2\n', ["empty", "(2, 0)"]),
        ("1,2\n3,4\n", ["'1', '2'", "header row is expected"]),
        ("a,a,b\n1,2,3\n", ["several columns named 'a'"]),
        ("a, a\n1,2\n", ["several columns named 'a'"]),
        ("a,,b\n1,2,3\n", ["name '' for column 2"]),
        ("a,b\n1,2\n3,n/a\n", ["'n/a'", "row 2", "column 'b'"]),
        ("a,b\n1,\n", ["''", "row 1", "column 'b'"]),
        ("a,b\n1,2\n1,2\nnan,4\n", ["'nan'", "row 3", "column 'a'"]),
        ("a,b\n1,-inf\n", ["'-inf'", "row 1", "column 'b'"]),
        ("a,b\n1,1_000\n", ["'1_000'", "row 1", "column 'b'"]),
        (",a\n5,x\n", ["'x'", "row 1", "column 'a'"]),
        ("a;b\n1;2\n", ["'1;2'", "column 'a;b'", "comma"]),
        ("a,b\n1,2\n3\n", ["1 values in row 2", "2 columns"]),
        ("a,b\n1,2,3\n", ["3 values in row 1", "2 columns"]),
        ("a\n" + "1" * 200_000, ["not a table of text"]),
        (b"a,b\n\xff\xfe,1\n", ["not UTF-8"]),
        ("a,b\n1,2\n".encode("utf-16"), ["not UTF-8"]),
    ],
)
def test_read_design__csv_refusals_name_file_and_place(tmp_path, text, parts):
    with pytest.raises(DesignError) as caught:
        read_design(write(tmp_path / "bad.csv", text))
    for part in ["bad.csv", *parts]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_design__missing_values_of_to_csv_are_refused(tmp_path):
    frame = pd.DataFrame({"only": [1.0, np.nan, 3.0]})
    frame.to_csv(tmp_path / "d.csv", index=False)
    with pytest.raises(DesignError, match=r"holds '' in row 2.*column 'only'"):
        read_design(tmp_path / "d.csv")


def test_read_design__absurd_widths_are_refused_before_the_rows_are_read(tmp_path):
    wide = "100001 columns; at most 100000"
    header = ",".join(f"c{i}" for i in range(100_001))
    csv = write(tmp_path / "d.csv", f"{header}\nnot a number\n")
    mat = write(tmp_path / "d.mat", "/NumWaves 100001\n/NumPoints 1\n/Matrix\nnot a number\n")
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f8", "fortran_order": False, "shape": (10**9, 100_001)}
    )
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("X.npy", buffer.getvalue())
    for path in (csv, mat, tmp_path / "d.npz"):
        with pytest.raises(DesignError, match=rf"{path.name}' has {wide}"):
            read_design(path)
    with pytest.raises(DesignError, match=wide):
        as_design(np.zeros((1, 100_001)), n_volumes=1, run="1")


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"design": np.eye(3), "Y": np.eye(2)}, ["no array 'X'", "'design', 'Y'", "savez"]),
        ({}, ["no array 'X'"]),
        ({"X": np.arange(3.0)}, ["shape (3,)", "float64"]),
        ({"X": np.zeros((2, 3, 4))}, ["shape (2, 3, 4)"]),
        ({"X": np.array([["1", "2"]])}, ["<U1", "real numbers"]),
        ({"X": np.array([[1, None]], dtype=object)}, ["object"]),
        ({"X": np.array([[1j]])}, ["complex128"]),
        ({"X": np.zeros(2, dtype=[("a", "f8")])}, ["shape (2,)"]),
        ({"X": np.zeros((0, 2))}, ["empty", "(0, 2)"]),
        ({"X": np.zeros((2, 0))}, ["empty", "(2, 0)"]),
        ({"X": np.array([[1, 2], [3, np.nan]])}, ["holds nan in row 2", "column 'x1'"]),
        ({"X": np.array([[np.inf]])}, ["holds inf in row 1", "column 'x0'"]),
        ({"X": np.eye(2), "conditions": np.array(["a", "a"])}, ["several columns named 'a'"]),
        ({"X": np.eye(2), "conditions": np.array(["a", ""])}, ["name '' for column 2"]),
    ],
)
def test_read_design__npz_refusals(tmp_path, arrays, parts):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DesignError) as caught:
        read_design(tmp_path / "bad.npz")
    for part in ["bad.npz", *parts]:
        assert part in str(caught.value)


def test_read_design__damaged_npz_of_any_kind(tmp_path):
    np.savez(tmp_path / "good.npz", X=matrix(50, 4))
    whole = (tmp_path / "good.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    buffer = io.BytesIO()
    np.save(buffer, matrix())
    for content in (b"", b"text", whole[:100], whole[:-30], bytes(flipped), buffer.getvalue(), b"\x80\x04N."):
        with pytest.raises(DesignError, match=r"bad\.npz' is not an \.npz archive"):
            read_design(write(tmp_path / "bad.npz", content))


def test_read_design__npz_of_raw_members(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("X", b"no numpy header")
    with pytest.raises(DesignError, match=r"bad\.npz"):
        read_design(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["/NumWaves", "/Matrix"]),
        ("1 2\n3 4\n", ["/NumWaves"]),
        (VEST.replace("/NumWaves\t2", "/NumWaves two"), ["'two'", "'3'"]),
        (VEST.replace("/NumWaves\t2", "/NumWaves 2.0"), ["'2.0'"]),
        (VEST.replace("/NumPoints\t3\n", ""), ["'2', ''"]),
        (VEST.replace("/Matrix\n", ""), ["/Matrix"]),
        (VEST.replace("/NumPoints\t3", "/NumPoints 5"), ["announces 5 rows", "but 3 follow"]),
        (VEST.replace("/NumPoints\t3", "/NumPoints 2"), ["announces 2 rows", "but 3 follow"]),
        (VEST.replace("/NumWaves\t2", "/NumWaves 3"), ["2 values in row 1", "3 columns"]),
        (VEST.replace("0 .5", "0 .5 7"), ["3 values in row 2", "2 columns"]),
        (VEST.replace("0 .5", "0 x"), ["'x' in row 2", "column 'x1'"]),
        (VEST.replace("0 .5", "0 nan"), ["'nan' in row 2", "column 'x1'"]),
        ("/NumWaves 0\n/NumPoints 0\n/Matrix\n", ["empty", "(0, 0)"]),
        (b"/NumWaves \xff", ["UTF-8"]),
    ],
)
def test_read_design__fsl_mat_refusals(tmp_path, text, parts):
    with pytest.raises(DesignError) as caught:
        read_design(write(tmp_path / "bad.mat", text))
    for part in ["bad.mat", *parts]:
        assert part in str(caught.value)


def test_read_design__matlab_mat_is_recognised(tmp_path):
    from scipy.io import savemat

    for version in ("4", "5"):
        savemat(tmp_path / "SPM.mat", {"X": matrix()}, format=version)
        with pytest.raises(DesignError, match=r"SPM\.mat' is a binary file, as MATLAB"):
            read_design(tmp_path / "SPM.mat")
    write(tmp_path / "SPM.mat", b"\x89HDF\r\n\x1a\n")
    with pytest.raises(DesignError, match=r"MATLAB.*\.csv.*\.npz"):
        read_design(tmp_path / "SPM.mat")


@given(content=st.binary(max_size=300), suffix=st.sampled_from(["csv", "tsv", "npz", "mat"]))
@example(content=b"PK\x03\x04" + b"\0" * 60, suffix="npz")
@example(content=b"\x93NUMPY\x01\x00", suffix="npz")
def test_read_design__any_bytes_are_read_or_refused(tmp_path_factory, content, suffix):
    path = write(tmp_path_factory.getbasetemp() / f"random.{suffix}", content)
    try:
        frame = read_design(path)
    except DesignError as error:
        assert path.name in str(error)
    else:
        assert np.isfinite(frame.to_numpy()).all()


def test_read_column_names__strips_and_skips(tmp_path):
    path = write(tmp_path / "names.txt", "\ufeff face\r\n\n trial type \nété")
    assert read_column_names(path) == ["face", "trial type", "été"]
    assert read_column_names(str(path)) == ["face", "trial type", "été"]


def test_read_column_names__refusals(tmp_path):
    with pytest.raises(SourceNotFoundError, match=r"none\.txt"):
        read_column_names(tmp_path / "none.txt")
    with pytest.raises(DesignError, match=r"empty\.txt' holds no name"):
        read_column_names(write(tmp_path / "empty.txt", "\n \n"))
    with pytest.raises(DesignError, match=r"latin\.txt' is not UTF-8"):
        read_column_names(write(tmp_path / "latin.txt", "été".encode("latin-1")))


# --- as_design ---------------------------------------------------------------------------------


def test_as_design__frame_is_copied_as_float64():
    frame = pd.DataFrame(
        {
            "i": np.arange(4, dtype=np.int8),
            "f": np.arange(4, dtype=np.float32),
            "b": [True, False, True, False],
            "n": pd.array([1, 2, 3, 4], dtype="Int64"),
        },
        index=[0.0, 2.0, 4.0, 6.0],
    )
    before = frame.copy(deep=True)
    got = as_design(frame, n_volumes=4, run="1")
    assert (got.dtypes == np.float64).all()
    assert isinstance(got.index, pd.RangeIndex)
    np.testing.assert_array_equal(got, frame.to_numpy(dtype=float))
    got.iloc[:] = 9.0
    pd.testing.assert_frame_equal(frame, before)


def test_as_design__array_is_copied_and_named():
    X = matrix()
    got = as_design(X, n_volumes=6, run="1")
    assert list(got.columns) == ["x0", "x1", "x2"]
    np.testing.assert_array_equal(got, X)
    got.iloc[:] = 9.0
    np.testing.assert_array_equal(X, matrix())


def test_as_design__path_is_read_and_named_in_messages(tmp_path):
    frame = pd.DataFrame(matrix(), columns=NAMES)
    frame.to_csv(tmp_path / "d.tsv", sep="\t", index=False)
    pd.testing.assert_frame_equal(as_design(tmp_path / "d.tsv", n_volumes=6, run="1"), frame)
    pd.testing.assert_frame_equal(as_design(str(tmp_path / "d.tsv"), n_volumes=6, run="1"), frame)
    with pytest.raises(DesignError, match=r"run 'sub-1'.*d\.tsv'\) has 6 rows, but the run has 7 volumes"):
        as_design(tmp_path / "d.tsv", n_volumes=7, run="sub-1")


@pytest.mark.parametrize("n_volumes", [5, 7])
def test_as_design__rows_must_be_volumes(n_volumes):
    for design in (matrix(), pd.DataFrame(matrix(), columns=NAMES)):
        with pytest.raises(DesignError, match=rf"run '2' has 6 rows, but the run has {n_volumes} volumes"):
            as_design(design, n_volumes=n_volumes, run="2")


@pytest.mark.parametrize(
    ("design", "part"),
    [
        (pd.DataFrame(index=range(3)), "empty, of shape (3, 0)"),
        (pd.DataFrame(np.eye(3)), "name 0 for column 1"),
        (pd.DataFrame(np.eye(3), columns=["a", "b", "a"]), "several columns named 'a'"),
        (pd.DataFrame(np.eye(2), columns=pd.MultiIndex.from_product([["a"], ["b", "c"]])), "name ('a', 'b')"),
        (pd.DataFrame({"a": [1.0, 2.0], "b": ["1", "2"]}), "column 'b' of type"),
        (pd.DataFrame({"a": [1.0, 2.0], "b": [1j, 2j]}), "column 'b' of type complex128"),
        (pd.DataFrame({"a": pd.to_timedelta([1, 2], unit="s")}), "column 'a' of type timedelta64"),
        (pd.DataFrame({"a": [1.0, np.nan]}), "holds nan in row 2 (from 1, without header), column 'a'"),
        (pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}), "holds nan in row 2"),
        (pd.DataFrame({"a": [-np.inf, 1.0]}), "holds -inf in row 1"),
        (np.array([[1, np.nan]]), "column 'x1'"),
        (np.arange(3.0), "shape (3,)"),
        (np.zeros((3, 0)), "shape (3, 0)"),
        (np.array([["a"]]), "type <U1"),
        (np.array([[None]]), "type object"),
        ([[1.0], [2.0]], "of type list"),
        (pd.Series([1.0]), "of type Series"),
        (None, "of type NoneType"),
    ],
)
def test_as_design__refusals(design, part):
    with pytest.raises(DesignError, match=r"run '1'") as caught:
        as_design(design, n_volumes=len(design) if hasattr(design, "__len__") else 1, run="1")
    assert part in str(caught.value)


# --- expressions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("face", {"face": 1}),
        ("  face\n", {"face": 1}),
        ("trial type", {"trial type": 1}),
        (" a-b ", {"a-b": 1}),
        ("a - b", {"a": 1, "b": -1}),
        ("`a-b` - b", {"a-b": 1, "b": -1}),
        ("`trial type`", {"trial type": 1}),
        ("`trial type`-`face`", {"trial type": 1, "face": -1}),
        ("2back - 0back", {"2back": 1, "0back": -1}),
        ("2*2back-.5*0back", {"2back": 2, "0back": -0.5}),
        ("trial_type.face - face", {"trial_type.face": 1, "face": -1}),
        ("été", {"été": 1}),
        ("été - a", {"été": 1, "a": -1}),
        ("face-house", {"face": 1, "house": -1}),
        ("-face", {"face": -1}),
        ("+ - -face", {"face": 1}),
        ("2 - -face - 2", {"face": 1}),
        ("face*2", {"face": 2}),
        ("face / 4", {"face": 0.25}),
        ("1/4*face", {"face": 0.25}),
        ("1 - 2*3 + 5 + a", {"a": 1}),
        ("a - (b - face)", {"a": 1, "b": -1, "face": 1}),
        ("a - b - face", {"a": 1, "b": -1, "face": -1}),
        ("8*a/2/2", {"a": 2}),
        ("(a + b)/2 - (face + house)*(1/2)", {"a": 0.5, "b": 0.5, "face": -0.5, "house": -0.5}),
        ("a + a + b - b", {"a": 2}),
        ("1e-3*a + 1E+2*b + 1.*face + .25*house", {"a": 1e-3, "b": 100, "face": 1, "house": 0.25}),
        ("0.1*a + 0.2*a", {"a": 0.3}),
        ("a + 0.1 + 0.2 - 0.3", {"a": 1}),
        ("(" * 100 + "a" + ")" * 100, {"a": 1}),
        ("-" * 9998 + "a", {"a": 1}),
    ],
)
def test_parse_expression__accepts(text, expected):
    got = parse_expression(text, COLUMNS)
    assert got == expected
    assert all(type(weight) is float for weight in got.values())


def test_parse_expression__a_column_wins_over_a_number():
    assert parse_expression("1e - 3*a", ["1e", "a"]) == {"1e": 1, "a": -3}
    assert parse_expression("2*1e-3*a", ["1e", "a"]) == {"1e": 2, "a": -3}
    assert parse_expression("1e-3*a", ["a"]) == {"a": 1e-3}
    assert parse_expression("3*7 - 8", ["7", "8"]) == {"7": 3, "8": -1}
    assert parse_expression("1.5", ["1.5"]) == {"1.5": 1}
    assert parse_expression("a - b", ["a", "b", "a - b"]) == {"a - b": 1}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("fase - house", "names 'fase', which is no column of the design (did you mean 'face'?)"),
        ("Xyz", "the columns are 'face', 'house', '2back'"),
        ("3back", "names '3back'"),
        ("1e-3x", "names '1e'"),
        ("1..2*a", "names '1..2'"),
        ("nan*a", "names 'nan'"),
        ("``", "names ''"),
        ("`no such` - a", "names 'no such'"),
        ("trial type - a", "names 'trial'"),
        ("face*house", "multiplies 'face' by 'house'"),
        ("2*(a - b)*face", "multiplies 'a', 'b' by 'face'"),
        ("(a - a)*b", "multiplies 'a' by 'b'"),
        ("face/house", "divides by 'house'"),
        ("1/face", "divides by 'face'"),
        ("a/0", "divides by zero"),
        ("a/(1 - 1)", "divides by zero"),
        ("a + 2", "leaves the constant 2 over"),
        ("0.5", "leaves the constant 0.5 over"),
        ("face - face", "no weight other than zero"),
        ("0*face", "no weight other than zero"),
        ("0.1*a + 0.2*a - 0.3*a", "no weight other than zero"),
        ("1 - 1", "no weight other than zero"),
        ("1e-999999999*a", "no weight other than zero"),
        ("1e999*a", "not finite"),
        ("1e999999999*a", "not finite"),
        ("1e200*1e200*a", "not finite"),
        ("1e308*10*a", "not finite"),
        ("a*" + "1e300*" * 50 + "1", "not finite"),
        ("9" * 200 + "*a", "not finite"),
        ("(a", "does not close a parenthesis"),
        ("((a) - b", "does not close a parenthesis"),
        ("a)", "closes a parenthesis that was not opened"),
        ("()", "has a ')' where"),
        ("(", "ends where a regressor or a number is expected"),
        ("(a b)", "lacks an operator in a parenthesis"),
        ("a b", "lacks an operator"),
        ("2a", "names '2a'"),
        ("2 a", "lacks an operator"),
        ("2(a)", "lacks an operator"),
        ("a -", "ends where"),
        ("a - * b", "has a '*' where"),
        ("* a", "has a '*' where"),
        ("a // 2", "has a '/' where"),
        ("a**2", "power"),
        ("a > b", "has a '>'"),
        ("a == b", "has a '='"),
        ("a, b", "has a ','"),
        ("a[0]", "has a '['"),
        ("a; b", "has a ';'"),
        ("`a", "has a '`'"),
        ("a \N{MINUS SIGN} b", "has a '\N{MINUS SIGN}'"),
        ("__import__('os')", "names '__import__'"),
        ("(" * 101 + "a" + ")" * 101, "nested deeper than 100"),
        ("(" * 9999, "nested deeper than 100"),
        ("a" * 10_001, "10001 characters, more than the 10000"),
    ],
)
def test_parse_expression__refuses(text, part):
    with pytest.raises(ContrastError) as caught:
        parse_expression(text, COLUMNS)
    assert part in str(caught.value)
    assert repr(text)[1:-1][:200] in str(caught.value)
    assert "linear combination" in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_parse_expression__the_list_of_columns_is_capped():
    with pytest.raises(ContrastError, match=r"'c19' and 480 more") as caught:
        parse_expression("nothing_like_it", [f"c{i}" for i in range(500)])
    assert "'c20'" not in str(caught.value)


@given(text=st.text(max_size=60))
def test_parse_expression__any_text_is_read_or_refused(text):
    try:
        weights = parse_expression(text, COLUMNS)
    except ContrastError:
        return
    assert weights
    assert all(name in COLUMNS and np.isfinite(weight) and weight for name, weight in weights.items())


@given(
    parts=st.lists(
        st.sampled_from([*"+-*/()` .", "**", "1", "0", "1e", "2.5", "1e308", "face", "a", "2back"])
    )
)
def test_parse_expression__any_tokens_are_read_or_refused(parts):
    try:
        weights = parse_expression("".join(parts), COLUMNS)
    except ContrastError:
        return
    assert weights
    assert all(np.isfinite(weight) and weight for weight in weights.values())


numbers = st.sampled_from(["1", "2", "0.5", "3.", ".25", "1e-1", "1.5", "0.1", "2.5e0"])
names = st.sampled_from(["face", "house", "drift_1", "_x9"])
expressions = st.recursive(
    st.one_of(names, st.builds("{} * {}".format, numbers, names)),
    lambda inner: st.one_of(
        st.builds("{} + {}".format, inner, inner),
        st.builds("{}-({})".format, inner, inner),
        st.builds("{}*({})".format, numbers, inner),
        st.builds("({})/{}".format, inner, numbers),
        st.builds("({}) * ({} + {})".format, inner, numbers, numbers),
        st.builds("-({})".format, inner),
    ),
    max_leaves=8,
)


@given(text=expressions)
def test_parse_expression__agrees_with_nilearn(text):
    columns = ["face", "house", "drift_1", "_x9"]
    expected = np.asarray(expression_to_contrast_vector(text, columns), dtype=float)
    try:
        got = contrast_rows(text, columns).weights[0]
    except ContrastError as error:
        assert "no weight other than zero" in str(error)
        got = np.zeros(4)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-11 * max(1, np.abs(expected).max()))


@given(weights=st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4).filter(any))
def test_contrast_rows__expression_of_random_weights_gives_them_back(weights):
    columns = ["face", "2back", "trial type", "x.y"]
    text = " + ".join(f"{weight!r}*`{name}`" for weight, name in zip(weights, columns, strict=True))
    np.testing.assert_array_equal(contrast_rows(text, columns).weights[0], weights)


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "definition",
    [
        "face - 0.5*drift_1",
        [1, 0, -0.5],
        (1, 0, -0.5),
        np.array([1, 0, -0.5]),
        np.array([1, 0, -0.5], dtype=np.float32),
        [[1, 0, -0.5]],
        np.array([[1, 0, -0.5]]),
        [np.float32(1), np.int8(0), -0.5],
    ],
)
def test_contrast_rows__forms(definition):
    for columns in (NAMES, tuple(NAMES), pd.Index(NAMES)):
        got = contrast_rows(definition, columns).weights[0]
        assert got.dtype == np.float64
        assert got.shape == (3,)
        np.testing.assert_array_equal(got, [1, 0, -0.5])


def test_contrast_rows__array_is_copied():
    weights = np.array([1.0, -1.0, 0.0])
    contrast_rows(weights, NAMES).weights[:] = 7
    np.testing.assert_array_equal(weights, [1, -1, 0])


def test_contrast_rows__short_vectors_are_filled_up_with_a_warning():
    with pytest.warns(
        ChunkGLMWarning, match=r"'diff' has 2 weights.* 3 columns.*weight 0: 'drift_1'"
    ) as caught:
        got = contrast_rows([1, -1], NAMES, name="diff").weights[0]
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(got, [1, -1, 0])


@pytest.mark.parametrize(
    ("definition", "part"),
    [
        ([1, 2, 3, 4], "4 weights, but the design has 3 columns: 'face', 'house', 'drift_1'"),
        ([0, 0, 0], "only weights of 0"),
        ([[0, 0, 0], [0, 0, 0]], "only weights of 0"),
        ([], "shape (0,)"),
        ([[]], "shape (1, 0)"),
        (np.array(2.0), "shape ()"),
        (np.ones((1, 1, 3)), "shape (1, 1, 3)"),
        ([1, np.nan, 0], "nan is not finite"),
        ([1, -np.inf, 0], "-inf is not finite"),
        ([10**400, 1, 1], "too large"),
        ([[1, 2], [1]], "'[1, 2]' is not a real number"),
        ([1, "a", 0], "'n'"),
        ([1, None, 0], "'None' is not a real number"),
        ([1j, 0, 0], "'1j' is not a real number"),
        ([True, False, False], "'True' is not a real number"),
        (np.array([True, False, False]), "'True' is not a real number"),
        (True, "of type bool"),
        (1.0, "of type float"),
        (None, "of type NoneType"),
        ({"face": 1}, "'n: face' is of type int"),
        ({}, "no rows"),
        ({"a": ["face", "house"]}, "a row 'a' that has several rows"),
        ({"a": "face", "b": "2"}, "constant"),
        (["face", 1], "'face' is not a real number"),
        (["face", "nose"], "'nose'"),
        (b"face", "not a real number"),
        (pd.Series([1, 0, 0]), "of type Series"),
    ],
)
def test_contrast_rows__refusals(definition, part):
    with pytest.raises(ContrastError, match=r"^The contrast ") as caught:
        contrast_rows(definition, NAMES, name="n")
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("definition", "names", "weights"),
    [
        (np.eye(3), ["1", "2", "3"], np.eye(3)),
        ([[1, 0, 0], [0, 1, 0]], ["1", "2"], np.eye(3)[:2]),
        (["face", "house - face"], ["face", "house - face"], [[1, 0, 0], [-1, 1, 0]]),
        (np.array(["face"]), ["face"], [[1, 0, 0]]),
        ({"f": "face", "h": [0, 1, 0]}, ["f", "h"], np.eye(3)[:2]),
    ],
)
def test_contrast_rows__several(definition, names, weights):
    got = contrast_rows(definition, NAMES)
    assert got.names == names
    np.testing.assert_array_equal(got.weights, weights)


def test_contrast_rows__what_follows_from_other_rows_is_left_out_and_named():
    pairs = {
        "a": "face - house",
        "b": "house - drift_1",
        "c": "face - drift_1",
        "d": [0, 0, 0],
        "e": "1e-9*face",
    }
    with pytest.warns(ChunkGLMWarning, match=r"'n' has rows that follow from others.*: 'c', 'd'\. They are"):
        got = contrast_rows(
            {k: v for k, v in pairs.items() if k != "d"} | {"d": "2*face - 2*house"}, NAMES, name="n"
        )
    assert got.names == ["a", "b", "e"]
    with pytest.warns(ChunkGLMWarning, match="follow from others.*: '2'"):
        got = contrast_rows([[1, 0, 0], [0, 0, 0], [0, 1, 0]], NAMES)
    assert got.names == ["1", "3"]


def test_contrast_rows__a_short_matrix_is_filled_up():
    with pytest.warns(ChunkGLMWarning, match="2 weights.*weight 0: 'drift_1'"):
        got = contrast_rows(np.eye(2), NAMES)
    np.testing.assert_array_equal(got.weights, np.eye(3)[:2])


# --- command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("face - house", (None, "face - house")),
        ("diff=face - house", ("diff", "face - house")),
        (" diff = face - house ", ("diff", "face - house")),
        ("DSt_minus-SSt2=[-1,-1, 1 ,1]", ("DSt_minus-SSt2", [-1, -1, 1, 1])),
        ("[1 -1\t.5]", (None, [1, -1, 0.5])),
        ("w=[1e-3]", ("w", [1e-3])),
        ("`a=b` - c", (None, "`a=b` - c")),
        ("d=`a=b` - c", ("d", "`a=b` - c")),
        ("a==b", ("a", "=b")),
        ("x" * 100 + "=a", ("x" * 100, "a")),
        ("any=face; house - cat", ("any", ["face", "house - cat"])),
        ("`a;b` ; c", (None, ["`a;b`", "c"])),
        ("f=[1,0; 0 1]", ("f", [[1, 0], [0, 1]])),
        ("f=[[1,0],[0,1]]", ("f", [[1, 0], [0, 1]])),
        ("[[1, 0] , [0, 1], [2,2] ]", (None, [[1, 0], [0, 1], [2, 2]])),
        ("[[1, 0]]", (None, [1, 0])),
    ],
)
def test_parse_definition__accepts(text, expected):
    assert parse_definition(text) == expected


@pytest.mark.parametrize(
    "name", ["../x", "<script>", "", "a b", "a/b", "été", "a\nb", "a.b", "a >", "`a`", "x" * 101]
)
def test_parse_definition__refuses_names(name):
    with pytest.raises(ContrastError, match="digits") as caught:
        parse_definition(f"{name}=face")
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "'' is empty"),
        ("diff= ", "'diff= ' is empty"),
        ("d=[]", "''"),
        ("d=[1,,2]", "''"),
        ("d=[1,2,]", "''"),
        ("d=[1,face]", "'face'"),
        ("d=[1,nan]", "'nan'"),
        ("d=[1,inf]", "'inf'"),
        ("d=[1_0]", "'1_0'"),
        ("d=[1,2", "no bracket at the end"),
        ("d=[1,2]*2", "'2]*2'"),
        ("[__import__('os')]", "__import__"),
        ("f=a;", "empty row"),
        ("f=;a", "empty row"),
        ("f=[1,0;]", "empty row"),
        ("f=[1,0;0,1", "no bracket at the end"),
        ("f=[[1,0],[0,1]", "no bracket at the end"),
        ("[1,0],[0,1]", "'0]'"),
        ("[1,0];[0,1]", "'0]'"),
    ],
)
def test_parse_definition__refuses_content(text, part):
    with pytest.raises(ContrastError) as caught:
        parse_definition(text)
    assert part in str(caught.value)


@given(text=st.text(max_size=40))
def test_parse_definition__any_text_is_split_or_refused(text):
    try:
        name, content = parse_definition(text)
    except ContrastError:
        return
    assert name is None or re.fullmatch("[A-Za-z0-9_-]+", name)
    assert content


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("face", "face"),
        ("face - house", "face_minus_house"),
        ("0.5*face + 0.5*house", "0p5_face_plus_0p5_house"),
        (".5*face", "0p5_face"),
        ("-face", "minus_face"),
        ("(a + b)/2", "a_plus_b_over_2"),
        ("`trial type` - trial_type.face", "trial_type_minus_trial_type_face"),
        ("2back-0back", "2back_minus_0back"),
    ],
)
def test_contrast_name__is_readable(text, expected):
    assert contrast_name(text) == expected


def test_contrast_name__lost_characters_keep_names_distinct():
    assert contrast_name("脸 - 屋") != contrast_name("屋 - 脸")
    long = [contrast_name("a + " * 100 + end) for end in "bc"]
    assert long[0] != long[1]


@given(text=st.text(max_size=300))
@example(text="")
@example(text="\udcff")
def test_contrast_name__is_always_a_valid_name(text):
    name = contrast_name(text)
    assert re.fullmatch("[A-Za-z0-9_]{1,100}", name)
    assert contrast_name(text) == name
    assert parse_definition(f"{name}=face") == (name, "face")


# --- estimability ------------------------------------------------------------------------------


def test_is_estimable__full_rank_estimates_everything():
    X = matrix(20, 4)
    for weights in np.eye(4):
        assert is_estimable(X, weights) is True
    assert is_estimable(X, np.array([1, -1, 0.5, 1e-9]))


def test_is_estimable__zero_column():
    X = matrix(20, 3)
    X[:, 1] = 0
    assert is_estimable(X, np.array([1, 0, -1]))
    assert is_estimable(X, np.array([0, 1, 0])) is False
    assert not is_estimable(X, np.array([1e12, 1e-3, 0]))


def test_is_estimable__collinear_columns():
    X = matrix(20, 4)
    X[:, 3] = X[:, 0] + X[:, 1]
    assert is_estimable(X, np.array([1, 0, 0, 1]))  # moves along with column 3 = column 0 + column 1
    assert not is_estimable(X, np.array([1, 0, 0, 0]))
    assert not is_estimable(X, np.array([1, -1, 0, 1]))
    assert is_estimable(X, np.array([1, -1, 0, 0]))
    assert is_estimable(X, np.array([0, 0, 1, 0]))


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1, 1e6, 1e200])
def test_is_estimable__does_not_depend_on_units(scale):
    X = matrix(20, 4)
    X[:, 3] = X[:, 0] + X[:, 1]
    X[:, 2] *= scale
    assert is_estimable(X, np.array([0, 0, 1, 0]))
    assert is_estimable(X, np.array([1, -1, 0, 0]))
    assert not is_estimable(X, np.array([1, 0, 0, 0]))


def test_is_estimable__dummy_coding_with_intercept():
    groups = np.repeat(np.eye(3), 5, axis=0)
    X = np.column_stack([groups, np.ones(15)])
    assert is_estimable(X, np.array([1, -1, 0, 0]))
    assert is_estimable(X, np.array([1, 0, 0, 1]))
    assert not is_estimable(X, np.array([1, 0, 0, 0]))
    assert not is_estimable(X, np.array([0, 0, 0, 1]))


def test_is_estimable__more_columns_than_rows():
    X = matrix(3, 5)
    assert is_estimable(X, X[0] - 2 * X[2])
    assert not is_estimable(X, np.eye(5)[0])


def test_is_estimable__shapes_must_fit():
    with pytest.raises(ContrastError, match=r"\(2,\).*\(6, 3\)"):
        is_estimable(matrix(), np.ones(2))
    with pytest.raises(ContrastError, match=r"\(1, 3\)"):
        is_estimable(matrix(), np.ones((1, 3)))
