"""Settings from defaults, then a TOML file, then the command line; and back to TOML for the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tomli_w

from pipeline import reading
from pipeline.names import did_you_mean
from pipeline.reading import FileError
from pipeline.settings import ConfigError, declared, names_of, require, tables

C = TypeVar("C")
_FORMERLY = {("links", "sockets"): "gloo"}
"""Values under the names that they had when a file was written."""


def config_from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
    """A settings dataclass from plain values. Raises ConfigError for a field that it does not have."""
    return cls(**_fitting(cls, values))


def _fitting(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the fields of `cls` hold them. Raises ConfigError for one that has no field, or does not fit."""
    values = _mixture(_range_of_workers(values))
    hints, names = get_type_hints(cls), [f.name for f in fields(cls)]
    if unknown := sorted(set(values) - set(names)):
        raise ConfigError(_unknown(unknown, names, values, cls))
    return {name: _convert(name, value, hints[name]) for name, value in values.items()}


def _range_of_workers(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`workers` as MIN:MAX is two settings. Raises ConfigError for what is neither that nor a number."""
    given = values.get("workers")
    if not isinstance(given, str) or ":" not in given:
        return values
    least, _, most = given.partition(":")
    if not (least.isdecimal() and most.isdecimal() and int(least[:9]) > 0):
        raise ConfigError(f"workers is {given!r:.40}; allowed: a whole number, or MIN:MAX with MIN of 1 or more")
    return {**values, "min_workers": int(least), "workers": int(most)}


def _mixture(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`data` as a table of weights, or a list, as it is written on the command line."""
    data = values.get("data")
    if isinstance(data, list) and data and all(isinstance(each, str) for each in data):
        return {**values, "data": ",".join(data)}
    if isinstance(data, Mapping) and data and all(isinstance(w, int | float) for w in data.values()):
        return {**values, "data": ",".join(f"{source}:{weight:.12g}" for source, weight in data.items())}
    return values


def _unknown(unknown: list[str], names: list[str], values: Mapping[str, Any], cls: type) -> str:
    nested = [name for name in unknown if isinstance(values[name], Mapping)]
    if nested:
        known = ", ".join(f"[{name}]" for name in tables(cls))
        return (
            f"{', '.join(nested)}: no such setting; settings stand at the top of the file, and not in a table such as "
            f"[{nested[0]}]" + (f", but for those of their groups: {known}" if known else "")
        )
    told = ", ".join(name + did_you_mean(name, names) for name in unknown)
    return f"{told}: no such setting; allowed: {', '.join(sorted(names))}"


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Paths come as text in JSON and TOML; a whole number may stand for a float. Anything else must fit as it is."""
    allowed = get_args(hint) or (hint,)
    if value is None or any(isinstance(value, kind) and not _is_bool_for_int(value, kind) for kind in _types(allowed)):
        return value
    if isinstance(value, str) and Path in allowed:
        return Path(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        return float(value) if abs(value) < 10**300 else value  # what is too large for one is refused by its bounds
    if value in allowed:  # Literal
        return value
    wanted = " or ".join(getattr(kind, "__name__", repr(kind)) for kind in allowed if kind is not type(None))
    near = did_you_mean(value, [kind for kind in allowed if isinstance(kind, str)]) if isinstance(value, str) else ""
    raise ConfigError(f"{name} is {value!r:.80}; allowed: {wanted}{near}")


def _types(allowed: tuple[Any, ...]) -> list[type]:
    return [kind for kind in allowed if isinstance(kind, type)]


def _is_bool_for_int(value: Any, kind: type) -> bool:
    return isinstance(value, bool) and kind is not bool


def toml_values(path: Path, cls: type) -> dict[str, Any]:
    """The settings that a TOML file gives, with dashes or underscores in their names, at its top or in the table of
    their group. Raises ConfigError naming it."""
    try:
        values = reading.read_toml(path)
    except FileError as error:
        raise ConfigError(f"config is {str(path)!r}, which {error}") from error
    named = [(key.replace("-", "_"), value) for key, value in _flat(values, cls)]
    return _fitting(cls, {key: _FORMERLY.get((key, str(value)), value) for key, value in named})


def _flat(values: Mapping[str, Any], cls: type) -> list[tuple[str, Any]]:
    """The same without the tables of groups. Raises ConfigError for what stands in the table of another group, or
    twice."""
    known, found = tables(cls), list[tuple[str, Any]]()
    for name, value in values.items():
        own = declared(known[name]) if name in known else ()
        nested = isinstance(value, Mapping) and bool(own)
        if nested and name == "data":  # settings, or sources by weight
            nested = not {key.replace("-", "_") for key in value}.isdisjoint(own)
        if not nested:
            found.append((name, value))
            continue
        for key in value:
            theirs = [other for other, group in known.items() if key.replace("-", "_") in declared(group)]
            require(
                key.replace("-", "_") in own, f"{name}.{key}", value[key],
                f"in [{theirs[0]}], or at the top of the file" if theirs else
                f"{', '.join(own)}{did_you_mean(key, own)}",
            )  # fmt: skip
        found += value.items()
    once = set[str]()
    for key, value in found:
        require(key.replace("-", "_") not in once, key, value, "once, at the top of the file or in a table")
        once.add(key.replace("-", "_"))
    return found


def config_from_toml(path: Path, cls: type[C]) -> C:
    """Settings from a TOML file, and defaults for the others. Raises ConfigError."""
    return cls(**toml_values(path, cls))


def to_toml(config: Any) -> str:
    """The settings as TOML; unset ones are left out."""
    names = names_of(type(config))
    values = {key: str(value) if isinstance(value := getattr(config, key), Path) else value for key in names}
    return tomli_w.dumps({key: value for key, value in values.items() if value is not None})
