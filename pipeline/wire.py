"""What comes from another process is checked before it is used: JSON of the kind that was asked for, or a WireError.

A peer may be of another version, half dead, or a stranger. Nothing of it becomes an attribute, a path or an index
before its name and its kind are known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import UnionType
from typing import Any, TypeVar

T = TypeVar("T")
Kind = type | UnionType


class WireError(ValueError):
    """Something from another process is not what it should be: says what was expected and what was found."""


def parse(data: bytes | str, what: str) -> dict[str, Any]:
    """The JSON object in `data`, called `what` in errors. Raises WireError."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is no JSON ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise WireError(f"{what} is a JSON {type(values).__name__}; expected an object")
    return values


def checked(values: Mapping[str, Any], what: str, /, **kinds: Kind) -> dict[str, Any]:
    """The named fields of `values`, each of its kind; other fields are left out. Raises WireError.

    A whole number may stand for a float, and becomes one; a bool stands for nothing but itself.
    """
    return {name: _field(values, name, kind, what) for name, kind in kinds.items()}


def _field(values: Mapping[str, Any], name: str, kind: Kind, what: str) -> Any:
    if name not in values:
        raise WireError(f"{what} has no {name}")
    value = values[name]
    allowed = kind.__args__ if isinstance(kind, UnionType) else (kind,)
    if type(value) in allowed:
        return value
    if type(value) is int and float in allowed:
        with suppress(OverflowError):  # a float holds no such number
            return float(value)
    wanted = " or ".join("null" if each is type(None) else each.__name__ for each in allowed)
    raise WireError(f"{name} of {what} is {_short(value)}; expected {wanted}")


def listed(values: Any, what: str, of: Callable[[Any], T]) -> tuple[T, ...]:
    """Every element of a JSON array through `of`. Raises WireError."""
    if not isinstance(values, list):
        raise WireError(f"{what} is {_short(values)}; expected a list")
    return tuple(of(value) for value in values)


def whole(value: Any, what: str, least: int = 0) -> int:
    """A whole number of at least `least`. Raises WireError."""
    if type(value) is not int or value < least:
        raise WireError(f"{what} is {_short(value)}; expected a whole number of {least} or more")
    return value


def numbered(values: Any, what: str) -> dict[int, int]:
    """A JSON object whose names and values are whole numbers. Raises WireError."""
    if not isinstance(values, dict) or not all(str(name).isdecimal() for name in values):
        raise WireError(f"{what} is {_short(values)}; expected numbers by number")
    return {int(name): whole(value, what) for name, value in values.items()}


def _short(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:  # it is nested as deeply as could just be read
        text = f"a {type(value).__name__} in which much is nested"
    return text if len(text) <= 80 else text[:77] + "..."
