"""What settings are made of: groups, each declared beside its owner, and the numbers that a field may be.

    class InterleavedSettings:
        chunks: Annotated[int, Within(1, 1024)] = 2

        def check(self, run: RunShape) -> None: ...

A job's settings are one dataclass that inherits from all its groups, so they are flat in a file and on the command
line. Every number has a least and a most, both finite, so that NaN, an infinity or a slip of the finger is refused by
name before anything starts. What the model, the data or the machine decide is checked by who knows these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_type_hints

from pipeline.names import did_you_mean

_Kind = TypeVar("_Kind")
MOST_STEPS = 99_999_999
"""A step's number has eight digits, in the names of checkpoints."""
WEEK_S = 604_800
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


class RunShape(Protocol):
    """What the owner of a group may ask of the settings of others."""

    @property
    def workers(self) -> int: ...
    @property
    def min_workers(self) -> int: ...
    @property
    def nodes(self) -> int: ...
    @property
    def replicas(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def microbatches(self) -> int: ...
    @property
    def scheduler(self) -> str: ...
    @property
    def recovery(self) -> str: ...
    @property
    def ends(self) -> str: ...
    @property
    def network(self) -> Path | None: ...
    @property
    def shard_optimizer(self) -> bool: ...
    @property
    def lora_rank(self) -> int: ...


def groups(settings: type) -> tuple[type, ...]:
    """The groups that a dataclass of settings inherits from, in order, where it declares nothing itself; else it is one
    group."""
    found = tuple(each for each in settings.__mro__[1:] if is_dataclass(each) and declared(each))
    return (settings,) if declared(settings) else found


def tables(settings: type) -> dict[str, type]:
    """Name -> group, for a dataclass of settings that inherits from several: what the help and a file call them."""
    found = groups(settings)
    return {} if found == (settings,) else {each.__name__.removesuffix("Settings").lower(): each for each in found}


def of_kind(kind: type[_Kind], settings: Any, **more: Any) -> _Kind:
    """Settings as another dataclass of settings, which has all its fields from them but those in `more`."""
    return kind(**{name: getattr(settings, name) for name in names_of(kind) if name not in more}, **more)


def names_of(settings: type) -> list[str]:
    """All fields of a dataclass of settings, group by group, as a person reads them."""
    own = {name: place for place, name in enumerate(name for group in groups(settings) for name in declared(group))}
    return sorted((field.name for field in fields(settings)), key=lambda name: own.get(name, -1))


def declared(group: type) -> dict[str, Any]:
    """Field -> default of what a group declares itself."""
    own = vars(group).get("__annotations__", {})
    return {field.name: field.default for field in fields(group) if field.name in own}


def check_groups(config: Any) -> None:
    """Raise ConfigError for the first number out of bounds, or the first group that says that it cannot work."""
    check_bounds(config)
    for group in type(config).__mro__[1:]:
        if "check" in vars(group):
            group.check(config, config)


def require_owner(config: Any, group: type, names: Iterable[str], scheduler: str) -> None:
    """Raise ConfigError for the first of these fields of a group that is set where its scheduler is not the one that
    runs, and would not be read."""
    unset = declared(group)
    for name in names:
        value = getattr(config, name)
        allowed = f"{unset[name]} unless scheduler is {scheduler}"
        require(config.scheduler == scheduler or value == unset[name], name, value, allowed)


def _text(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
