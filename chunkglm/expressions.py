"""Contrast expressions: linear combinations of the names of regressors, parsed and never evaluated as code."""

import difflib
import hashlib
import math
import re
import unicodedata
import warnings
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chunkglm.design import default_names, finite_number, listed, short
from chunkglm.errors import ChunkGLMWarning, ContrastError, NotAvailableError

FloatArray = npt.NDArray[np.float64]

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
        raise ContrastError(f"{lengths}: {listed(columns)}. Give one weight per column, in this order.")
    missing = columns[len(weights) :]
    if missing:
        warnings.warn(f"{lengths}; these get weight 0: {listed(missing)}.", ChunkGLMWarning, stacklevel=2)
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
            f"The contrast name {short(name)} cannot be part of file names. Accepted are up to {_MAX_NAME} "
            "letters (A-Z, a-z), digits, '_' and '-', such as face_minus_house=face-house."
        )
    if not content:
        raise ContrastError(
            f"The contrast {short(text)} is empty. Give it as diff=face-house or diff=[1,-1]."
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
        f"The contrast expression {short(text)} {problem}. Accepted is a linear combination of regressors, "
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
        raise TypeError(f"{short(str(entry))} is not a real number")
    if not math.isfinite(entry):
        raise ValueError(f"{entry!r} is not finite")
    return float(entry)


def _parse_weights(text: str) -> list[float]:
    inner = text[1:].removesuffix("]").strip()
    if "[" in inner:
        raise _several_rows(f"The contrast {short(text)}")
    entries = re.split(r"\s*,\s*|\s+", inner)
    weights = [weight for entry in entries if (weight := finite_number(entry)) is not None]
    if not text.endswith("]") or len(weights) < len(entries):
        bad = [entry for entry in entries if finite_number(entry) is None]
        raise ContrastError(
            f"The weights {short(text)} are not a closed list of finite numbers (wrong here: "
            f"{listed(bad) or 'no bracket at the end'}). Give them as in [1, -1, 0]."
        )
    return weights
