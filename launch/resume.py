"""The settings that a run folder has kept, for the next start of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.config import ConfigError, TrainConfig
from jobs.resume import OF_THE_START
from launch.config import toml_values


def kept_values(out: Path, settings: type[TrainConfig] = TrainConfig) -> dict[str, Any]:
    """The settings in config.toml of a run folder that go on from start to start; none where there is no such file.
    Raises ConfigError naming the file."""
    path = out / "config.toml"
    if not path.is_file():
        return {}
    try:
        values = toml_values(path, settings)
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r} does not hold the settings of a run: {error}") from error
    return {name: value for name, value in values.items() if name not in OF_THE_START}


def kept(config: TrainConfig) -> TrainConfig | None:
    """With what settings the run that `config` resumes went on before; None for a new run, or where none are kept."""
    if not config.resume or not (values := kept_values(config.out, type(config))):
        return None
    return type(config)(**values).resolved()
