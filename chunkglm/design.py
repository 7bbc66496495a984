"""Design matrices and contrast expressions.

A design is a float64 DataFrame: a row per volume, a named column per regressor. A contrast expression is a
linear combination of these names, parsed here and never evaluated as code.
"""

import csv
import difflib
import hashlib
import io
import math
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from numpy.lib import format as npy

from chunkglm.errors import (
    ChunkGLMWarning,
    ContrastError,
    DesignError,
    NotAvailableError,
    SourceNotFoundError,
)

FloatArray = npt.NDArray[np.float64]
_Table = tuple[npt.NDArray[Any], list[str] | None]

_MAX_COLUMNS, _MAX_TEXT, _MAX_DEPTH, _MAX_BITS, _MAX_NAME = 100_000, 10_000, 100, 4096, 100
_ESTIMABLE_RTOL = 1e-8
_FORMATS = (
    ".csv and .tsv (a header row of names, then numbers), .npz (a 2-D array under the key 'X') and .mat (the "
    "text that FSL writes, with /NumWaves, /NumPoints and /Matrix)"
)


def read_design(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a design matrix from a file.

    Parameters
    ----------
    path : str or path-like
        A local file. Its suffix, in either case, says what it is: ``.csv`` or ``.tsv``, UTF-8 with a header
        row (a first column without a name, as pandas writes the index, is dropped); ``.npz`` with the (T, P)
        array ``X`` and, if they are P strings, names in ``conditions`` or ``columns``; ``.mat`` as of FSL.
    columns : sequence of str, optional
        P names instead of those in the file. Columns without names are called ``x0``, ``x1``, ...

    Returns
    -------
    DataFrame
        (T, P), float64, with a ``RangeIndex``: T volumes and P regressors, in the units of the file.

    Raises
    ------
    SourceNotFoundError
        If there is no such file.
    DesignError
        If the file is of another kind, damaged, not of finite numbers or wider than 100,000 columns, or if
        names are missing, repeated, or not as many as the columns.
    """
    source = Path(path)
    label = f"The design matrix {str(source)!r}"
    with _open(source, label) as stream:
        reader = _READERS.get(source.suffix.lower())
        if reader is None:
            raise DesignError(f"{label} has a suffix that is not read. Save it as one of these: {_FORMATS}.")
        values, names = reader(stream, label)
    if isinstance(columns, str):
        raise DesignError(f"{label} was given one string as names, {columns!r}. Give a list of names.")
    return _frame(values, names if columns is None else list(columns), label)


def read_column_names(path: str | os.PathLike[str]) -> list[str]:
    """Read names of regressors from a UTF-8 text file, one a line; empty lines are skipped.

    Parameters
    ----------
    path : str or path-like
        A local file.

    Returns
    -------
    list of str
        At least one name, without white space around it.

    Raises
    ------
    SourceNotFoundError
        If there is no such file.
    DesignError
        If the file is not UTF-8 text or holds no name.
    """
    label = f"The file of column names {str(Path(path))!r}"
    with _open(Path(path), label) as stream:
        names = [line.strip() for line in _decode(stream.read(), label).splitlines() if line.strip()]
    if not names:
        raise DesignError(f"{label} holds no name. Write one name a line, one for each column of the design.")
    return names


def as_design(
    design: pd.DataFrame | npt.NDArray[Any] | str | os.PathLike[str], *, n_volumes: int, run: str
) -> pd.DataFrame:
    """Check that a design matrix fits its run.

    Parameters
    ----------
    design : DataFrame, (T, P) array, str or path-like
        The matrix, or the file that holds it (see `read_design`). The columns of an array are called ``x0``,
        ``x1``, ...; the index of a DataFrame is ignored.
    n_volumes : int
        The number of volumes of the run, which T must be.
    run : str
        The label of the run, for messages.

    Returns
    -------
    DataFrame
        A copy: (T, P), float64, finite, with unique names of str and a ``RangeIndex``.

    Raises
    ------
    DesignError
        If the rows are not as many, there is no column, names are not unique strings, or values not finite.
    SourceNotFoundError
        If a file that is named does not exist.
    """
    label = f"The design matrix of run {run!r}"
    if isinstance(design, str | os.PathLike):
        label += f" (file {os.fspath(design)!r})"
        frame = read_design(design)
    elif isinstance(design, pd.DataFrame):
        frame = _frame(_column_values(design, label), list(design.columns), label)
    elif isinstance(design, np.ndarray):
        _check_array(design.shape, design.dtype, label)
        frame = _frame(design, None, label)
    else:
        raise DesignError(
            f"{label} is of type {type(design).__name__}. Accepted are a DataFrame, a numpy array of shape "
            "(volumes, regressors), or the path of a file."
        )
    if len(frame) != n_volumes:
        raise DesignError(
            f"{label} has {len(frame)} rows, but the run has {n_volumes} volumes. A design has one row per "
            "volume: check that it belongs to this run, and that neither of them was cut."
        )
    return frame


def is_estimable(design: npt.NDArray[Any], weights: npt.NDArray[Any]) -> bool:
    """Whether the weights of a contrast lie in the row space of the design [1]_.

    Parameters
    ----------
    design : (T, P) array
        The design matrix, finite.
    weights : (P,) array
        The weights of one t contrast, finite.

    Returns
    -------
    bool
        False where no data can determine the combination: it weights a column of zeros, or tells collinear
        columns apart.

    Raises
    ------
    ContrastError
        If there are not as many weights as columns.

    References
    ----------
    .. [1] S. R. Searle (1971), Linear Models, Wiley.
    """
    X, w = np.asarray(design, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if X.ndim != 2 or w.shape != X.shape[1:]:
        raise ContrastError(
            f"Weights of shape {w.shape} do not fit a design of shape {X.shape}: give one per column."
        )
    # Units of regressors differ by many orders of magnitude, which must not decide on the rank.
    peak = np.abs(X).max(axis=0, initial=0.0)
    used = peak > 0
    target = w[used] / peak[used]
    _, s, rows = np.linalg.svd(X[:, used] / peak[used], full_matrices=False)
    rows = rows[s > s.max(initial=0.0) * max(X.shape) * np.finfo(np.float64).eps]
    residual = np.linalg.norm(target - rows.T @ (rows @ target))
    return not w[~used].any() and bool(residual <= _ESTIMABLE_RTOL * np.linalg.norm(target))


def _open(path: Path, label: str) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise SourceNotFoundError(
            f"{label} does not exist. Check the path and the current folder."
        ) from error
    except (OSError, ValueError) as error:
        raise DesignError(
            f"{label} cannot be opened: {error}. It must be a file that you may read."
        ) from error


def _decode(data: bytes, label: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DesignError(f"{label} is not UTF-8 text ({error}). Save it as plain text in UTF-8.") from error


def _number(text: str) -> float | None:
    """Finite number or None; ``1_000``, which float() accepts, is a slip in a data file."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


def _parse_rows(rows: Iterable[list[str]], names: list[str], label: str) -> FloatArray:
    table = []
    for row, cells in enumerate(rows, 1):
        if len(cells) != len(names):
            raise DesignError(
                f"{label} has {len(cells)} values in row {row}, but {len(names)} columns. Mend the row or "
                "the header: every row needs one number per column."
            )
        numbers = [number for cell in cells if (number := _number(cell)) is not None]
        if len(numbers) < len(cells):
            bad = [_number(cell) for cell in cells].index(None)
            raise _not_finite(label, repr(cells[bad]), row, names[bad])
        table.append(numbers)
    return np.array(table, dtype=np.float64).reshape(len(table), len(names))


def _not_finite(label: str, value: str, row: int, column: str) -> DesignError:
    return DesignError(
        f"{label} holds {value} in row {row} (from 1, without header), column {column!r}. Every value must "
        "be a finite number: fill in what is missing or drop the column; in a text, check the separator "
        "(comma in .csv, tab in .tsv, white space in .mat)."
    )


def _check_width(count: int, label: str) -> None:
    if count > _MAX_COLUMNS:
        raise DesignError(
            f"{label} has {count} columns; at most {_MAX_COLUMNS} are accepted. Check that it is a design, "
            "one row per volume and one column per regressor, and not transposed."
        )


def _read_delimited(stream: BinaryIO, label: str, delimiter: str) -> _Table:
    text = io.StringIO(_decode(stream.read(), label), newline=None)
    rows = (row for row in csv.reader(text, delimiter=delimiter) if row)
    try:
        header = [cell.strip() for cell in next(rows, [])]
        _check_width(len(header), label)
        if header and all(_number(cell) is not None for cell in header):
            raise DesignError(
                f"{label} begins with numbers ({_listed(header)}), but a header row is expected. Put the "
                "names of the columns in the first row."
            )
        start = int(header[:1] == [""])
        return _parse_rows((row[start:] for row in rows), header[start:], label), header[start:]
    except csv.Error as error:
        raise DesignError(f"{label} is not a table of text: {error}. Save it as plain text.") from error


def _read_npz(stream: BinaryIO, label: str) -> _Table:
    try:
        return _read_archive(stream, label)
    except DesignError:
        raise
    except Exception as error:  # damaged archives make zipfile, zlib and numpy raise a dozen kinds
        raise DesignError(
            f"{label} is not an .npz archive that can be read ({type(error).__name__}: {error}). It may be "
            "cut off or of another format: write it again with numpy.savez(path, X=matrix)."
        ) from error


def _read_archive(stream: BinaryIO, label: str) -> _Table:
    with np.load(stream, allow_pickle=False) as archive:
        if "X" not in archive.files:
            raise DesignError(
                f"{label} has no array 'X'; its arrays are: {_listed(archive.files)}. Save the matrix with "
                "numpy.savez(path, X=matrix)."
            )
        shape, dtype = _npy_header(archive, "X")
        _check_array(shape, dtype, label)
        for key in ("conditions", "columns"):
            size, kind = _npy_header(archive, key) if key in archive.files else ((), dtype)
            if size == shape[1:] and kind.kind == "U":
                return archive["X"], archive[key].tolist()
        return archive["X"], None


def _npy_header(archive: Any, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array in an NpzFile that is not loaded, as it can be large or pickled."""
    with archive.zip.open(f"{key}.npy") as member:
        old = npy.read_magic(member) == (1, 0)
        shape, _, dtype = (npy.read_array_header_1_0 if old else npy.read_array_header_2_0)(member)
    return shape, dtype


def _read_vest(stream: BinaryIO, label: str) -> _Table:
    data = stream.read()
    if data.startswith((b"MATLAB", b"\x89HDF")) or b"\0" in data[:1024]:
        raise DesignError(
            f"{label} is a binary file, as MATLAB and SPM write, which is not read. Save the matrix as one "
            f"of these: {_FORMATS}."
        )
    lines = [line.split() for line in _decode(data, label).splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if line[0] == "/Matrix"), len(lines))
    header = {line[0]: " ".join(line[1:]) for line in lines[:start]}
    counts = [header.get(key, "") for key in ("/NumWaves", "/NumPoints")]
    if start == len(lines) or not all(re.fullmatch("[0-9]{1,9}", count) for count in counts):
        raise DesignError(
            f"{label} is not the text that FSL writes: it needs /NumWaves and /NumPoints, whole numbers "
            f"(here {_listed(counts)}), and then /Matrix with the rows. Write it again with FSL, or as .csv."
        )
    width, height = map(int, counts)
    _check_width(width, label)
    values = _parse_rows(lines[start + 1 :], _default_names(width), label)
    if len(values) != height:
        raise DesignError(
            f"{label} announces {height} rows (/NumPoints), but {len(values)} follow /Matrix. It may be cut "
            "off: write it again, or mend the count."
        )
    return values, None


_READERS: dict[str, Callable[[BinaryIO, str], _Table]] = {
    ".csv": partial(_read_delimited, delimiter=","),
    ".tsv": partial(_read_delimited, delimiter="\t"),
    ".npz": _read_npz,
    ".mat": _read_vest,
}


def _check_array(shape: tuple[int, ...], dtype: np.dtype[Any], label: str) -> None:
    if len(shape) != 2 or dtype.kind not in "biuf":
        raise DesignError(
            f"{label} is an array of shape {shape} and type {dtype}. Accepted is a 2-D array of real numbers "
            "(volumes, regressors)."
        )
    _check_width(shape[1], label)


def _column_values(frame: pd.DataFrame, label: str) -> FloatArray:
    values = np.empty(frame.shape)
    for i, (name, column) in enumerate(frame.items()):
        if not pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_complex_dtype(column.dtype):
            raise DesignError(
                f"{label} has a column {name!r} of type {column.dtype}. Every column must hold real numbers: "
                "convert it with astype(float), or drop it."
            )
        values[:, i] = column.to_numpy(dtype=np.float64, na_value=np.nan)
    return values


def _default_names(count: int) -> list[str]:
    return [f"x{i}" for i in range(count)]


def _frame(values: npt.NDArray[Any], names: list[Any] | None, label: str) -> pd.DataFrame:
    if 0 in values.shape:
        raise DesignError(f"{label} is empty, of shape {values.shape}. Give at least one row and one column.")
    names = _default_names(values.shape[1]) if names is None else names
    _check_names(names, values.shape[1], label)
    with np.errstate(over="ignore"):
        values = values.astype(np.float64)
    for row, column in np.argwhere(~np.isfinite(values))[:1]:
        raise _not_finite(label, str(values[row, column]), row + 1, names[column])
    return pd.DataFrame(values, columns=names)


def _check_names(names: list[Any], count: int, label: str) -> None:
    _check_width(count, label)
    if len(names) != count:
        raise DesignError(f"{label} has {count} columns, but {len(names)} names. Give one name per column.")
    for i, name in enumerate(names, 1):
        if not isinstance(name, str) or not name.strip():
            raise DesignError(f"{label} has the name {name!r} for column {i}. Give every column a string.")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise DesignError(f"{label} has several columns named {_listed(twice)}. Give each its own name.")


def parse_expression(text: str, columns: Sequence[str]) -> dict[str, float]:
    """Read a linear combination of regressors.

    Parameters
    ----------
    text : str
        Names, numbers, ``+ - * /`` and parentheses, such as ``"face - house"``; at most 10,000 characters. A
        name is a run of letters, digits, ``_`` and ``.``, even where it could be a number; any other goes in
        backticks, unless it is the whole text. Arithmetic is exact: ``0.1*a + 0.2*a - 0.3*a`` is nothing.
    columns : sequence of str
        The names of the regressors.

    Returns
    -------
    dict of str to float
        The weights other than zero, at least one, all finite.

    Raises
    ------
    ContrastError
        If the text is not a linear combination of the columns, leaves a constant over, or has no weight left.
    """
    for name in (text, text.strip()):
        if name in columns:
            return {name: 1.0}
    try:
        constant, exact = _Parser(text, columns).parse()
        if constant != 0:
            raise _refusal(text, f"leaves the constant {float(constant):g} over, which must go")
        weights = {name: float(weight) for name, weight in exact.items() if float(weight) != 0}
    except OverflowError as error:
        raise _refusal(text, "has numbers out of range, so that weights are not finite") from error
    if not weights:
        raise _refusal(text, "leaves no weight other than zero, so that it contrasts nothing")
    return weights


def contrast_weights(
    definition: str | Sequence[float] | npt.NDArray[Any], columns: Sequence[str], *, name: str | None = None
) -> FloatArray:
    """Weights of one t contrast over the columns of a design.

    Parameters
    ----------
    definition : str, or sequence or array of numbers
        An expression (see `parse_expression`), or weights in the order of the columns, (P,) or (1, P); fewer
        than P are filled up with zeros.
    columns : sequence of str
        The P names of the regressors.
    name : str, optional
        The name of the contrast, for messages.

    Returns
    -------
    (P,) array
        float64, finite, not all zero.

    Raises
    ------
    ContrastError
        If the definition is neither, or has too many weights, or weights that are not finite or all zero.
    NotAvailableError
        If it has several rows: F contrasts are not built yet.

    Warns
    -----
    ChunkGLMWarning
        If weights were filled up with zeros.
    """
    columns = list(columns)
    if isinstance(definition, str):
        parsed = parse_expression(definition, columns)
        return np.array([parsed.get(column, 0.0) for column in columns])
    label = "The contrast" if name is None else f"The contrast {name!r}"
    weights = _vector(definition, label)
    lengths = f"{label} has {len(weights)} weights, but the design has {len(columns)} columns"
    if len(weights) > len(columns):
        raise ContrastError(f"{lengths}: {_listed(columns)}. Give one weight per column, in this order.")
    missing = columns[len(weights) :]
    if missing:
        warnings.warn(f"{lengths}; these get weight 0: {_listed(missing)}.", ChunkGLMWarning, stacklevel=2)
    return np.pad(weights, (0, len(missing)))


def parse_definition(text: str) -> tuple[str | None, str | list[float]]:
    """Split a contrast, as defined on the command line, into its name and its content.

    Parameters
    ----------
    text : str
        ``NAME=EXPRESSION``, ``NAME=[weights]``, or either without the name. Weights are separated by commas
        or white space. An ``=`` in backticks belongs to the name of a regressor.

    Returns
    -------
    name : str or None
        At most 100 letters (A-Z, a-z), digits, ``_`` and ``-``, fit for file names.
    content : str or list of float
        The expression, not parsed yet, or the weights.

    Raises
    ------
    ContrastError
        If the name has other characters, the content is empty, or a weight is not a finite number.
    NotAvailableError
        If there are several rows of weights: F contrasts are not built yet.
    """
    split = re.sub("`[^`]*`", lambda quoted: "_" * len(quoted[0]), text).find("=")
    name = text[:split].strip() if split >= 0 else None
    content = text[split + 1 :].strip()
    if name is not None and not re.fullmatch(f"[A-Za-z0-9_-]{{1,{_MAX_NAME}}}", name):
        raise ContrastError(
            f"The contrast name {_short(name)} cannot be part of file names. Accepted are up to {_MAX_NAME} "
            "letters (A-Z, a-z), digits, '_' and '-', such as face_minus_house=face-house."
        )
    if not content:
        raise ContrastError(
            f"The contrast {_short(text)} is empty. Give it as diff=face-house or diff=[1,-1]."
        )
    return name, _parse_weights(content) if content.startswith("[") else content


def contrast_name(expression: str) -> str:
    """Name for a contrast that was given none.

    Parameters
    ----------
    expression : str
        Any text, such as ``"face - house"``.

    Returns
    -------
    str
        1 to 100 ASCII letters, digits and ``_``, such as ``"face_minus_house"``, always the same for the same
        text. Expressions that differ in spaces, quotes or parentheses only can share a name. Where characters
        had to be dropped, or there were too many, part of a SHA-256 keeps the name distinct.
    """
    plain = unicodedata.normalize("NFKD", expression).encode("ascii", "ignore").decode()
    plain = re.sub(r"(?<=[0-9])\.(?=[0-9])", "p", re.sub(r"(?<!\w)\.(?=[0-9])", "0.", plain))
    for sign, word in (("+", " plus "), ("-", " minus "), ("/", " over ")):
        plain = plain.replace(sign, word)
    name = re.sub("[^A-Za-z0-9_]+", "_", plain).strip("_")
    if name and expression.isascii() and len(name) <= _MAX_NAME:
        return name
    digest = hashlib.sha256(expression.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[: _MAX_NAME - 9] or 'contrast'}_{digest}"


class _Linear(NamedTuple):
    constant: Fraction
    weights: dict[str, Fraction]

    def plus(self, other: "_Linear") -> "_Linear":
        sums = {name: _bounded(self.weights.get(name, 0) + weight) for name, weight in other.weights.items()}
        return _Linear(_bounded(self.constant + other.constant), self.weights | sums)

    def times(self, factor: Fraction) -> "_Linear":
        products = {name: _bounded(weight * factor) for name, weight in self.weights.items()}
        return _Linear(_bounded(self.constant * factor), products)


def _bounded(value: Fraction) -> Fraction:
    # Exact numbers grow with every operation; far beyond the range of float64 they only cost time.
    if value.numerator.bit_length() + value.denominator.bit_length() > _MAX_BITS:
        raise OverflowError
    return value


_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_TOKEN = re.compile(r"\s*+(?:`(?P<quoted>[^`]*)`|(?P<word>[\w.]++)|(?P<sign>\*\*|[-+*/()]))")
_NUMBER = re.compile(r"(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)(?:[eE][-+]?[0-9]++)?+(?![\w.])")


class _Parser:
    """Precedence climbing; `pending` holds the tokens to come, the next one last, "" for the end."""

    def __init__(self, text: str, columns: Sequence[str]) -> None:
        if not text.strip():
            raise _refusal(text, "is empty")
        if len(text) > _MAX_TEXT:
            raise _refusal(text, f"has {len(text)} characters, more than the {_MAX_TEXT} accepted")
        self.text, self.columns, self.known = text, columns, set(columns)
        self.pending: list[_Linear | str] = ["", *reversed(self._tokens())]

    def parse(self) -> _Linear:
        value = self._climb(1, 0)
        if self.pending[-1] == ")":
            raise _refusal(self.text, "closes a parenthesis that was not opened")
        if self.pending[-1] != "":
            raise _refusal(self.text, "lacks an operator between two terms (products need a '*')")
        return value

    def _tokens(self) -> list[_Linear | str]:
        tokens: list[_Linear | str] = []
        end = 0
        while match := _TOKEN.match(self.text, end):
            word, sign, end = match["word"], match["sign"], match.end()
            number = _NUMBER.match(self.text, match.start("word")) if word else None
            if number and word not in self.known:
                tokens.append(_constant(number[0]))
                end = number.end()
            else:
                tokens.append(sign or self._regressor(word or match["quoted"]))
        if rest := self.text[end:].strip():
            raise _refusal(self.text, f"has a {rest[0]!r} that is not part of a linear combination")
        if "**" in tokens:
            raise _refusal(self.text, "has a power ('**'), which is not linear")
        return tokens

    def _regressor(self, name: str) -> _Linear:
        if name in self.known:
            return _Linear(Fraction(), {name: Fraction(1)})
        close = " or ".join(map(repr, difflib.get_close_matches(name, self.columns)))
        hint = f" (did you mean {close}?)" if close else ""
        known = f"the columns are {_listed(self.columns)}"
        raise _refusal(self.text, f"names {_short(name)}, which is no column of the design{hint}; {known}")

    def _climb(self, lowest: int, depth: int) -> _Linear:
        value = self._operand(depth)
        while (precedence := _PRECEDENCE.get(str(self.pending[-1]), 0)) >= lowest:
            sign = self.pending.pop()
            right = self._climb(precedence + 1, depth)
            if sign == "*":
                value = self._product(value, right)
            elif sign == "/":
                value = self._quotient(value, right)
            else:
                value = value.plus(right if sign == "+" else right.times(Fraction(-1)))
        return value

    def _operand(self, depth: int) -> _Linear:
        factor = Fraction(1)
        while (item := self.pending.pop()) in ("+", "-"):
            factor = -factor if item == "-" else factor
        if isinstance(item, _Linear):
            return item.times(factor)
        if item != "(":
            found = f"has a {item!r}" if item else "ends"
            raise _refusal(self.text, f"{found} where a regressor or a number is expected")
        if depth == _MAX_DEPTH:
            raise _refusal(self.text, f"has parentheses nested deeper than {_MAX_DEPTH}")
        value = self._climb(1, depth + 1)
        if self.pending[-1] != ")":
            problem = "lacks an operator in" if self.pending[-1] else "does not close"
            raise _refusal(self.text, f"{problem} a parenthesis")
        self.pending.pop()
        return value.times(factor)

    def _product(self, left: _Linear, right: _Linear) -> _Linear:
        if left.weights and right.weights:
            raise _refusal(self.text, "multiplies regressors with each other, which is not linear")
        return right.times(left.constant) if right.weights else left.times(right.constant)

    def _quotient(self, left: _Linear, right: _Linear) -> _Linear:
        if right.weights:
            raise _refusal(self.text, "divides by a regressor, which is not linear")
        if right.constant == 0:
            raise _refusal(self.text, "divides by zero")
        return left.times(1 / right.constant)


def _constant(literal: str) -> _Linear:
    # The exact value of 1e999999999 would fill the memory: float64 decides first what is in range.
    approximate = float(literal)
    if len(literal) > 100 or not math.isfinite(approximate):
        raise OverflowError
    return _Linear(Fraction(literal) if approximate else Fraction(), {})


def _refusal(text: str, problem: str) -> ContrastError:
    return ContrastError(
        f"The contrast expression {_short(text)} {problem}. Accepted is a linear combination of regressors, "
        "such as 'face - house' or '0.5*(face + house)', with + - * / and numbers; a name that has other "
        "characters than letters, digits, '_' and '.' goes in backticks, such as `trial type`."
    )


def _several_rows(label: str) -> NotAvailableError:
    return NotAvailableError(
        f"{label} has several rows, which makes it an F contrast. F contrasts are not built yet: give each "
        "row as a t contrast with its own name."
    )


def _vector(definition: object, label: str) -> FloatArray:
    if not isinstance(definition, Sequence | np.ndarray):
        kind = type(definition).__name__
        raise ContrastError(
            f"{label} is of type {kind}. Accepted are an expression (str) or a list of weights."
        )
    try:
        entries = np.asarray(definition, dtype=object)
        if entries.size and all(isinstance(entry, str) for entry in entries.flat):
            raise _several_rows(label)
        weights: FloatArray = np.vectorize(_weight, otypes=[np.float64])(entries)
    except (TypeError, ValueError, OverflowError) as error:
        raise ContrastError(
            f"{label} is no vector of finite numbers: {error}. Give one number per column."
        ) from error
    if weights.ndim == 2 and len(weights) > 1:
        raise _several_rows(label)
    if weights.ndim not in (1, 2) or not weights.any():
        raise ContrastError(
            f"{label} has weights of shape {weights.shape}, all zero or not one row. Give one number per "
            "column, of which at least one is not zero."
        )
    return weights.ravel()


def _weight(entry: object) -> float:
    if isinstance(entry, bool | np.bool_) or not isinstance(entry, Real):
        raise TypeError(f"{_short(str(entry))} is not a real number")
    if not math.isfinite(entry):
        raise ValueError(f"{entry!r} is not finite")
    return float(entry)


def _parse_weights(text: str) -> list[float]:
    inner = text[1:].removesuffix("]").strip()
    if "[" in inner:
        raise _several_rows(f"The contrast {_short(text)}")
    entries = re.split(r"\s*,\s*|\s+", inner)
    weights = [weight for entry in entries if (weight := _number(entry)) is not None]
    if not text.endswith("]") or len(weights) < len(entries):
        bad = [entry for entry in entries if _number(entry) is None]
        raise ContrastError(
            f"The weights {_short(text)} are not a closed list of finite numbers (wrong here: "
            f"{_listed(bad) or 'no bracket at the end'}). Give them as in [1, -1, 0]."
        )
    return weights


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def _listed(values: Sequence[str]) -> str:
    shown = ", ".join(map(_short, values[:20]))
    return f"{shown} and {len(values) - 20} more" if len(values) > 20 else shown
