"""What a number in the settings may be: declared beside its field, and checked in one place.

    workers: Annotated[int, Within(1, 1024)] = 4

Every number has a least and a most, both finite, so that NaN, an infinity or a slip of the finger is refused by name
before anything starts. What depends on other settings, the model or the machine is checked by who knows these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_type_hints

from jobs.names import did_you_mean

MOST_FORWARDS = 2**20
"""Microbatches x spans of a schedule: a minute, and 2 GiB."""


class ConfigError(ValueError):
    """A setting that cannot be used: names the field, its value and what is allowed."""


def require(holds: bool, name: str, value: object, allowed: object) -> None:
    """Raise ConfigError in its one form unless `holds`."""
    if not holds:
        raise ConfigError(f"{name} is {value!r}; allowed: {allowed}")


def require_known(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ConfigError, with the nearest, for a name that is not one of `allowed`."""
    names = tuple(allowed)
    require(value in names, name, value, f"one of {', '.join(names)}{did_you_mean(value, names)}")


@dataclass(frozen=True)
class Within:
    """The numbers from `low` to `high`; `above` and `below` leave out that end itself. `note` follows in messages."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        assert math.isfinite(self.low)
        assert math.isfinite(self.high)

    def __contains__(self, value: float) -> bool:
        enough = self.low < value if self.above else self.low <= value
        return enough and (value < self.high if self.below else value <= self.high)  # NaN is in no order

    def __str__(self) -> str:
        low, high = _text(self.low), _text(self.high)
        if self.above and self.below:
            return f"between {low} and {high}"
        if self.above:
            return f"above {low}, up to {high}{self.note}"
        return f"{low} or more and below {high}" if self.below else f"{low} to {high}{self.note}"


def bounds_of(settings: type) -> dict[str, Within]:
    """Field -> the bounds that are declared beside it, of a dataclass of settings."""
    hints = get_type_hints(settings, include_extras=True)
    found = {
        name: [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Within)]
        for name, hint in hints.items()
    }
    return {name: each[0] for name, each in found.items() if each}


def check_bounds(config: Any) -> None:
    """Raise ConfigError for the first number of a dataclass of settings that is out of bounds; None is unset."""
    for name, bounds in bounds_of(type(config)).items():
        value = getattr(config, name)
        require(value is None or value in bounds, name, value, bounds)


def limit_work(what: str, spans: int, microbatches: int) -> None:
    """Raise ConfigError for a schedule that would take minutes and many GiB to make; `what` has so many spans."""
    most = max(1, MOST_FORWARDS // spans)
    require(microbatches <= most, "microbatches", microbatches, f"1 to {most} for {spans} {what}")


def _text(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
