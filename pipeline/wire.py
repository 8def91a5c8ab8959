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


def pair(value: Any, what: str) -> tuple[Any, Any]:
    """Both elements of a JSON array of two. Raises WireError."""
    if not isinstance(value, list) or len(value) != 2:
        raise WireError(f"{what} is {_short(value)}; expected a pair")
    return value[0], value[1]


def whole(value: Any, what: str, least: int = 0) -> int:
    """A whole number of at least `least`. Raises WireError."""
    if type(value) is not int or value < least:
        raise WireError(f"{what} is {_short(value)}; expected a whole number of {least} or more")
    return value


_MOST_NUMBERS = 1 << 20
"""In one mapping among numbers: else a line of text fills the memory."""


def as_runs(values: Mapping[int, int]) -> list[list[int]]:
    """A mapping among whole numbers as JSON: [key, value, step of the value, length] of every run of keys. `numbered`
    reads it."""
    runs: list[list[int]] = []
    for key, value in sorted(values.items()):
        if runs and runs[-1][0] + runs[-1][3] == key:
            first, step, length = runs[-1][1:]
            step = value - first if length == 1 and value - first in (0, 1) else step
            if value == first + step * length:
                runs[-1][2:] = [step, length + 1]
                continue
        runs.append([key, value, 0, 1])
    return runs


def numbered(values: Any, what: str) -> dict[int, int]:
    """The mapping that `as_runs` wrote. Raises WireError."""
    found: dict[int, int] = {}
    left = _MOST_NUMBERS
    for run in listed(values, what, lambda each: each):
        if not isinstance(run, list) or len(run) != 4 or set(map(type, run)) != {int} or min(run) < 0 or run[2] > 1:
            raise WireError(f"{what} has {_short(run)}; expected [key, value, step of 0 or 1, length]")
        key, value, step, length = run
        if not 0 < length <= left:
            raise WireError(f"{what} has a run of {length}; expected 1 to {left}")
        left -= length
        found.update(zip(range(key, key + length), range(value, value + length) if step else [value] * length))
    if len(found) < _MOST_NUMBERS - left:
        raise WireError(f"{what} has a number twice")
    return found


def _short(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:  # it is nested as deeply as could just be read
        text = f"a {type(value).__name__} in which much is nested"
    return text if len(text) <= 80 else text[:77] + "..."
