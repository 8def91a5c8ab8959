"""Files of JSON and TOML, read whole: one error for all that can be wrong with one, whoever reads it."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class FileError(ValueError):
    """A file that cannot be read or is not what it should be. The message goes on after "which": the caller knows what
    names the file."""


def read_text(path: Path) -> str:
    """The text of a file. Raises FileError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot be read: {error}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises FileError, for NaN and infinities too: they are no JSON, but Python reads them."""
    values = _parsed(json.loads, path, "JSON")
    for where, number in numbers(values):
        if isinstance(number, float) and not math.isfinite(number):
            raise FileError(f"holds {number} at {where or 'its top'}; allowed: finite numbers")
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds. Raises FileError."""
    return _parsed(tomllib.loads, path, "TOML")


def numbers(values: Any) -> Iterator[tuple[str, float]]:
    """Every number in what a file holds, in order, with the fields that lead to it: ("a.b[2]", 1.5)."""
    waiting: list[tuple[str, Any]] = [("", values)]
    while waiting:  # and not by recursion: nesting is limited by who reads the file alone
        where, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{where}.{name}" if where else str(name), entry) for name, entry in value.items()][::-1]
        elif isinstance(value, list):
            waiting += [(f"{where}[{place}]", entry) for place, entry in enumerate(value)][::-1]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield where, value


def _parsed(parse: Any, path: Path, form: str) -> Any:
    text = read_text(path)
    try:
        return parse(text)
    except ValueError as error:  # beside what the parsers call an error, a number of more digits than Python reads
        raise FileError(f"is no {form}: {error}") from error
    except RecursionError as error:
        raise FileError(f"is no {form} that can be read: it is nested too deeply") from error
