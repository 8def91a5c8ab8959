"""Settings from defaults, then a TOML file, then the command line; and back to TOML for the run folder."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tomli_w

from jobs.config import ConfigError

C = TypeVar("C")


def config_from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
    """A settings dataclass from plain values. Raises ConfigError for a field that it does not have."""
    hints, names = get_type_hints(cls), [f.name for f in fields(cls)]  # pyright: ignore[reportArgumentType]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: no such setting; allowed: {', '.join(sorted(names))}")
    return cls(**{name: _convert(name, value, hints[name]) for name, value in values.items()})


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Paths come as text in JSON and TOML; a whole number may stand for a float. Anything else must fit as it is."""
    allowed = getattr(hint, "__args__", (hint,))
    if value is None or any(isinstance(value, kind) and not _is_bool_for_int(value, kind) for kind in _types(allowed)):
        return value
    if isinstance(value, str) and Path in allowed:
        return Path(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        return float(value)
    if value in allowed:  # Literal
        return value
    wanted = " or ".join(getattr(kind, "__name__", repr(kind)) for kind in allowed if kind is not type(None))
    raise ConfigError(f"{name} is {value!r}; allowed: {wanted}")


def _types(allowed: tuple[Any, ...]) -> list[type]:
    return [kind for kind in allowed if isinstance(kind, type)]


def _is_bool_for_int(value: Any, kind: type) -> bool:
    return isinstance(value, bool) and kind is not bool


def read_toml(path: Path, cls: type[C]) -> C:
    """Settings from a TOML file with the flags' names, dashes or underscores. Raises ConfigError naming the file."""
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config is {str(path)!r}, which cannot be read as TOML: {error}") from error
    return config_from_dict(cls, {key.replace("-", "_"): value for key, value in values.items()})


def to_toml(config: Any) -> str:
    """The settings as TOML; unset ones are left out."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    return tomli_w.dumps({key: value for key, value in values.items() if value is not None})
