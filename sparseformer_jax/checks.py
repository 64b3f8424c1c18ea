"""What every check of a user's input shares: the error, near names, types."""

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union


class ConfigError(ValueError):
    """A user's mistake, told in one line: the field, its value and the fix."""


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a parameter is not a finite number."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean x?" for the nearest known name, else lists them all."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    if nearest:
        return f"; did you mean {nearest[0]}?"
    return f"; choose one of {', '.join(known)}" if known else ""


def check_choice(field: str, value: object, choices: Sequence[str]) -> None:
    """Raises ConfigError unless the value of `field` is one of `choices`."""
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1)
        advice = f"; did you mean {nearest[0]}?" if nearest else ""
        listed = ", ".join(choices)
        raise ConfigError(f"{field}={value!r}: not one of {listed}{advice}")


def convert(field: str, value: Any, annotation: Any) -> Any:
    """Returns `value` as its annotation wants it: an int as a float, a list as a tuple.

    Understands plain types, `X | None`, `Literal` and tuples of these. Raises
    ConfigError for any other mismatch: nothing is cast that could lose anything.
    """
    if typing.get_origin(annotation) is Literal:
        check_choice(field, value, typing.get_args(annotation))
    try:
        return _convert(value, annotation)
    except TypeError:
        plain = isinstance(annotation, type) and not typing.get_args(annotation)
        expected = annotation.__name__ if plain else annotation
        # The command line reads 5 as a number.
        advice = "; a name that is a number needs quotes: '\"5\"'" * (expected == tuple[str, ...])
        raise ConfigError(
            f"{field}={value!r}: must be {expected}, not {_kind(value)}{advice}"
        ) from None


def _kind(value: Any) -> str:
    """Names the type of a value, and of the items of a tuple."""
    if not isinstance(value, tuple):
        return type(value).__name__
    return f"tuple[{', '.join(type(item).__name__ for item in value)}]"


def _convert(value: Any, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments)
    if origin is tuple and isinstance(value, tuple | list):
        return _convert_items(value, arguments)
    if origin is Literal and value in arguments:
        return value
    if annotation is float and type(value) is int:
        return float(value)
    # Not isinstance: True is an int, and `num_layers=True` is a mistake.
    if type(value) is (type(None) if annotation is None else annotation):
        return value
    raise TypeError


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    if type(value) in members:
        return value
    for member in members:
        try:
            return _convert(value, member)
        except TypeError:
            continue
    raise TypeError


def _convert_items(values: Sequence[Any], items: tuple[Any, ...]) -> tuple[Any, ...]:
    if items[-1] is Ellipsis:
        items = items[:1] * len(values)
    if len(items) != len(values):
        raise TypeError
    return tuple(_convert(value, item) for value, item in zip(values, items, strict=True))
