"""Contrast expressions: linear combinations of the names of regressors, parsed and never evaluated as code."""

import difflib
import hashlib
import itertools
import math
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chunkglm.design import default_names, finite_number, listed, short
from chunkglm.errors import ChunkGLMWarning, ContrastError

FloatArray = npt.NDArray[np.float64]
Row = str | Sequence[float] | npt.NDArray[Any]
Definition = Row | Sequence[str] | Sequence[Sequence[float]] | Mapping[str, Row]
"""What defines a contrast: one row, or several."""

Parsed = str | list[float] | list[str] | list[list[float]]
"""A definition from the command line."""

_MAX_TEXT, _MAX_DEPTH, _MAX_BITS, _MAX_NAME = 10_000, 100, 4096, 100


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


class Rows(NamedTuple):
    """The rows of a contrast: what they are called, and their weights (q, P) over the columns of a design."""

    names: list[str]
    weights: FloatArray


def contrast_rows(definition: Definition, columns: Sequence[str], *, name: str | None = None) -> Rows:
    """Weights of a contrast over the columns of a design.

    Parameters
    ----------
    definition : str, or sequence or array of numbers, or several rows of them
        An expression (see `parse_expression`), or weights in the order of the columns, (P,) or (q, P); fewer
        than P are filled up with zeros. Or a sequence of expressions, or a mapping of names to expressions or
        weights: the rows of an F contrast.
    columns : sequence of str
        The P names of the regressors.
    name : str, optional
        The name of the contrast, for messages.

    Returns
    -------
    Rows
        float64, finite. One row is not all zero; of several, those that others already imply are left out.

    Raises
    ------
    ContrastError
        If the definition is none of these, or has too many weights, or weights that are not finite or all zero.

    Warns
    -----
    ChunkGLMWarning
        If weights were filled up with zeros, or rows were left out.
    """
    columns = list(columns)
    label = "The contrast" if name is None else f"The contrast {name!r}"
    if isinstance(definition, str):
        return Rows([definition], _of_expression(definition, columns)[None])
    if isinstance(definition, Mapping):
        if not definition:
            raise ContrastError(f"{label} has no rows. Give at least one name with an expression or weights.")
        rows = [
            contrast_rows(one, columns, name=f"{name or 'contrast'}: {key}")
            for key, one in definition.items()
        ]
        wide = [str(key) for key, one in zip(definition, rows, strict=True) if len(one.names) > 1]
        if wide:
            raise ContrastError(
                f"{label} has a row {wide[0]!r} that has several rows itself. Give each row its own name."
            )
        return _independent(
            Rows([str(key) for key in definition], np.concatenate([one.weights for one in rows])), label
        )
    if _is_texts(definition):
        texts = [str(text) for text in definition]
        return _independent(Rows(texts, np.stack([_of_expression(text, columns) for text in texts])), label)
    weights = _numbers(definition, label)
    lengths = f"{label} has {weights.shape[1]} weights, but the design has {len(columns)} columns"
    if weights.shape[1] > len(columns):
        raise ContrastError(f"{lengths}: {listed(columns)}. Give one weight per column, in this order.")
    missing = columns[weights.shape[1] :]
    if missing:
        warnings.warn(f"{lengths}; these get weight 0: {listed(missing)}.", ChunkGLMWarning, stacklevel=2)
    weights = np.pad(weights, ((0, 0), (0, len(missing))))
    return _independent(Rows([str(number) for number in range(1, len(weights) + 1)], weights), label)


def _of_expression(text: str, columns: list[str]) -> FloatArray:
    parsed = parse_expression(text, columns)
    return np.array([parsed.get(column, 0.0) for column in columns])


def _is_texts(definition: object) -> bool:
    if isinstance(definition, np.ndarray):
        definition = definition.tolist()
    return (
        isinstance(definition, Sequence)
        and len(definition) > 0
        and all(isinstance(one, str) for one in definition)
    )


def _independent(rows: Rows, label: str) -> Rows:
    """Leave out rows that are linear combinations of those before them, and say so."""
    size = np.abs(rows.weights).max(axis=1, keepdims=True)
    scaled = rows.weights / np.where(size > 0, size, 1.0)
    chosen: list[int] = []
    for number in range(len(scaled)):
        if np.linalg.matrix_rank(scaled[[*chosen, number]]) > len(chosen):
            chosen.append(number)
    if not chosen:
        raise ContrastError(f"{label} has only weights of 0. At least one must be another number.")
    if len(chosen) < len(scaled):
        redundant = [rows.names[number] for number in range(len(scaled)) if number not in chosen]
        warnings.warn(
            f"{label} has rows that follow from others and change nothing: {listed(redundant)}. They are left out.",
            ChunkGLMWarning,
            stacklevel=3,
        )
    return Rows([rows.names[number] for number in chosen], rows.weights[chosen])


def parse_definition(text: str) -> tuple[str | None, Parsed]:
    """Split a contrast, as defined on the command line, into its name and its content.

    Parameters
    ----------
    text : str
        ``NAME=EXPRESSION``, ``NAME=[weights]``, or either without the name. Weights are separated by commas
        or white space. The rows of an F contrast are separated by semicolons: ``NAME=face; house``,
        ``NAME=[1,0; 0,1]``. An ``=`` or ``;`` in backticks belongs to the name of a regressor.

    Returns
    -------
    name : str or None
        At most 100 letters (A-Z, a-z), digits, ``_`` and ``-``, fit for file names.
    content : str, list of float, or list of them
        The expression, not parsed yet, or the weights; of an F contrast a list of rows.

    Raises
    ------
    ContrastError
        If the name has other characters, the content or a row is empty, or a weight is not a finite number.
    """
    split = _without_quoted(text).find("=")
    name = text[:split].strip() if split >= 0 else None
    content = text[split + 1 :].strip()
    if name is not None and not re.fullmatch(f"[A-Za-z0-9_-]{{1,{_MAX_NAME}}}", name):
        raise ContrastError(
            f"The contrast name {short(name)} cannot be part of file names. Accepted are up to {_MAX_NAME} "
            "letters (A-Z, a-z), digits, '_' and '-', such as face_minus_house=face-house."
        )
    if not content:
        raise ContrastError(
            f"The contrast {short(text)} is empty. Give it as diff=face-house or diff=[1,-1]."
        )
    rows = _split_rows(content)
    if not all(rows):
        raise ContrastError(
            f"The contrast {short(text)} has an empty row. Give rows as any=face; house or any=[1,0; 0,1]."
        )
    parsed: Any = [_parse_weights(row) if row.startswith("[") else row for row in rows]
    return name, parsed[0] if len(rows) == 1 else parsed


def _without_quoted(text: str) -> str:
    """The text with other characters in place of what is in backticks."""
    return re.sub("`[^`]*`", lambda quoted: "_" * len(quoted[0]), text)


def _split_rows(content: str) -> list[str]:
    """Expressions, or weights in brackets."""
    if content.startswith("[["):
        # As Python and JSON write a matrix.
        inner, closed = re.sub(r"\]\s*,?\s*\[", ";", content[2:]), re.search(r"\]\s*\]$", content)
        inner = re.sub(r"\]\s*\]$", "", inner)
    elif content.startswith("["):
        inner, closed = content[1:].removesuffix("]"), re.search(r"\]$", content)
    else:
        inner, closed = content, None
    plain = _without_quoted(inner)
    places = [-1, *(place for place, sign in enumerate(plain) if sign == ";"), len(inner)]
    rows = [inner[start + 1 : end].strip() for start, end in itertools.pairwise(places)]
    if not content.startswith("["):
        return rows
    if len(rows) == 1 and not content.startswith("[["):
        return [content]
    if not closed:
        raise ContrastError(
            f"The weights {short(content)} have no bracket at the end. Give them as in [1, 0; 0, 1]."
        )
    return [f"[{row}]" if row else "" for row in rows]


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
        known = f"the columns are {listed(self.columns)}"
        if list(self.columns) == default_names(len(self.columns)):
            known += (
                " (its file has no names: give them with --column-names FILE, or columns= of read_design)"
            )
        raise _refusal(self.text, f"names {short(name)}, which is no column of the design{hint}; {known}")

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
            factors = f"{listed(list(left.weights))} by {listed(list(right.weights))}"
            raise _refusal(self.text, f"multiplies {factors}, which is not linear")
        return right.times(left.constant) if right.weights else left.times(right.constant)

    def _quotient(self, left: _Linear, right: _Linear) -> _Linear:
        if right.weights:
            raise _refusal(self.text, f"divides by {listed(list(right.weights))}, which is not linear")
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
        f"The contrast expression {short(text)} {problem}. Accepted is a linear combination of regressors, "
        "such as 'face - house' or '0.5*(face + house)', with + - * / and numbers; a name that has other "
        "characters than letters, digits, '_' and '.' goes in backticks, such as `trial type`."
    )


def _numbers(definition: object, label: str) -> FloatArray:
    """Weights as an array (q, P)."""
    if not isinstance(definition, Sequence | np.ndarray):
        kind = type(definition).__name__
        raise ContrastError(
            f"{label} is of type {kind}. Accepted are an expression (str), a list of weights, and for an F contrast a "
            "matrix, or a list or mapping of expressions."
        )
    try:
        entries = np.asarray(definition, dtype=object)
        weights: FloatArray = np.vectorize(_weight, otypes=[np.float64])(entries)
    except (TypeError, ValueError, OverflowError) as error:
        raise ContrastError(
            f"{label} is no vector or matrix of finite numbers: {error}. Give one number per column, in each row."
        ) from error
    if weights.ndim not in (1, 2) or weights.size == 0:
        raise ContrastError(
            f"{label} has weights of shape {weights.shape}. Give one number per column, in one row or several."
        )
    return np.atleast_2d(weights)


def _weight(entry: object) -> float:
    if isinstance(entry, bool | np.bool_) or not isinstance(entry, Real):
        raise TypeError(f"{short(str(entry))} is not a real number")
    if not math.isfinite(entry):
        raise ValueError(f"{entry!r} is not finite")
    return float(entry)


def _parse_weights(text: str) -> list[float]:
    inner = text[1:].removesuffix("]").strip()
    entries = re.split(r"\s*,\s*|\s+", inner)
    weights = [weight for entry in entries if (weight := finite_number(entry)) is not None]
    if not text.endswith("]") or len(weights) < len(entries):
        bad = [entry for entry in entries if finite_number(entry) is None]
        raise ContrastError(
            f"The weights {short(text)} are not a closed list of finite numbers (wrong here: "
            f"{listed(bad) or 'no bracket at the end'}). Give them as in [1, -1, 0]."
        )
    return weights
