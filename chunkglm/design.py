"""Design matrices: reading and checking.

A design is a float64 DataFrame: a row per volume, a named column per regressor.
"""

import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pandas as pd
from numpy.lib import format as npy

from chunkglm.errors import (
    ContrastError,
    DesignError,
    InputError,
    SourceNotFoundError,
)

FloatArray = npt.NDArray[np.float64]
_Table = tuple[npt.NDArray[Any], list[str] | None]

_MAX_COLUMNS = 100_000
_MAX_VALUES, _MAX_BYTES = 10**8, 2**30
_MAX_DIGITS = 10
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


def read_sample_mask(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Read which volumes of a run to keep from a text file of numbers, separated by white space or commas.

    Parameters
    ----------
    path : str or path-like
        A local file: either a 1 (keep) or 0 (censor) for every volume, at least three of them, or the numbers of the
        volumes to keep, from 0.

    Returns
    -------
    ndarray of bool or int, 1-D
        What :func:`chunkglm.fit` takes as a sample mask.

    Raises
    ------
    SourceNotFoundError
        If there is no such file.
    InputError
        If the file holds something else.
    """
    label = f"The sample mask {str(Path(path))!r}"
    with _open(Path(path), label) as stream:
        words = _decode(stream.read(), label).replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() and len(word) < _MAX_DIGITS for word in words):
        bad = [word for word in words if not (word.isascii() and word.isdigit())]
        raise InputError(
            f"{label} holds {f'what is no whole number: {listed(bad)}' if bad else 'no usable numbers'}. Accepted are a "
            "1 (keep) or 0 (censor) for every volume, or the numbers of the volumes to keep, from 0."
        )
    numbers = np.array([int(word) for word in words])
    # Two numbers, 0 and 1, might be volumes; three of them cannot.
    flags = len(numbers) >= 3 and numbers.max() <= 1
    return numbers.astype(bool) if flags else numbers


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


def estimable_regressors(design: npt.NDArray[Any]) -> list[bool]:
    """For each regressor, whether data can determine its coefficient.

    Parameters
    ----------
    design : (T, P) array

    Returns
    -------
    list of bool
        False for columns of zeros and collinear ones: see `is_estimable`.
    """
    return [is_estimable(design, one) for one in np.eye(design.shape[1])]


def variance_inflation(design: npt.NDArray[Any]) -> FloatArray:
    """How many times the variance of each coefficient is larger than if no other regressor shared anything with it.

    Parameters
    ----------
    design : (T, P) array
        The design matrix, finite.

    Returns
    -------
    (P,) array
        1 and more; infinite for collinear columns, 1 for constant ones.

    Notes
    -----
    The diagonal of the inverse of the correlations of the columns [1]_, which is ``1 / (1 - R^2)`` of each on the others.

    References
    ----------
    .. [1] D. W. Marquardt (1970), Technometrics 12:591-612.
    """
    X = np.asarray(design, dtype=np.float64)
    centred = X - X.mean(axis=0)
    size = np.linalg.norm(centred, axis=0)
    varies = size > 1e-10 * np.linalg.norm(X, axis=0).clip(min=np.finfo(np.float64).tiny)
    inflation = np.ones(X.shape[1])
    unit = centred[:, varies] / size[varies]
    _, s, rows = np.linalg.svd(unit, full_matrices=False)
    with np.errstate(divide="ignore"):
        whole = ((rows / s[:, None]) ** 2).sum(axis=0)
    limit = (max(unit.shape, default=1) * np.finfo(np.float64).eps) ** 2
    inflation[varies] = np.where(whole * limit >= 1, np.inf, whole)
    return inflation


def _open(path: Path, label: str) -> BinaryIO:
    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise DesignError(f"{label} has more than {_MAX_BYTES:,} bytes. Check that it is a design.")
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


def finite_number(text: str) -> float | None:
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
        numbers = [number for cell in cells if (number := finite_number(cell)) is not None]
        if len(numbers) < len(cells):
            bad = [finite_number(cell) for cell in cells].index(None)
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
        if header and all(finite_number(cell) is not None for cell in header):
            raise DesignError(
                f"{label} begins with numbers ({listed(header)}), but a header row is expected. Put the "
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
                f"{label} has no array 'X'; its arrays are: {listed(archive.files)}. Save the matrix with "
                "numpy.savez(path, X=matrix)."
            )
        shape, dtype = _npy_header(archive, "X")
        _check_array(shape, dtype, label)
        for key in ("conditions", "columns"):
            size, kind = _npy_header(archive, key) if key in archive.files else ((), dtype)
            if size == shape[1:] and kind.kind in "US":
                names = archive[key].tolist()
                return archive["X"], [_decode(n, label) if isinstance(n, bytes) else n for n in names]
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
            f"(here {listed(counts)}), and then /Matrix with the rows. Write it again with FSL, or as .csv."
        )
    width, height = map(int, counts)
    _check_width(width, label)
    values = _parse_rows(lines[start + 1 :], default_names(width), label)
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
    if math.prod(shape) > _MAX_VALUES:
        raise DesignError(
            f"{label} has the shape {shape}; at most {_MAX_VALUES:,} values are accepted. Check that it is a design, one row "
            "per volume and one column per regressor."
        )


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


def default_names(count: int) -> list[str]:
    """Names of the columns of a design that has none."""
    return [f"x{i}" for i in range(count)]


def _frame(values: npt.NDArray[Any], names: list[Any] | None, label: str) -> pd.DataFrame:
    if 0 in values.shape:
        raise DesignError(f"{label} is empty, of shape {values.shape}. Give at least one row and one column.")
    names = default_names(values.shape[1]) if names is None else names
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
        raise DesignError(f"{label} has several columns named {listed(twice)}. Give each its own name.")


def listed(values: Sequence[str]) -> str:
    """Names in a message: the first 20, and how many more."""
    shown = ", ".join(map(short, values[:20]))
    return f"{shown} and {len(values) - 20} more" if len(values) > 20 else shown


def short(text: str) -> str:
    """A text in a message, quoted and not too long."""
    return repr(text if len(text) <= 200 else f"{text[:200]}...")
