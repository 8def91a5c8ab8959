"""What every worker of a run needs is imported once, in the process from which they are forked.

The code of a model's family takes a tenth or two of a second to import: by each worker as it starts, and by each that
takes a lost one's place, while all others wait.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from jobs.config import TrainConfig
from pipeline.model.compiled import prepare
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import PRESETS, preset, read_config


def warm_up(config: TrainConfig) -> None:
    """Import the model's code, and that of adapters and the compiler where they are used. Starts no thread, and raises
    nothing: what is wrong with the model is told by who plans."""
    with suppress(Exception):
        if config.compile:
            prepare()
        path = Path(config.model)
        if config.model in PRESETS:
            LayeredModel(preset(config.model), lora=config.lora(), trained=config.patterns())
        elif path.is_dir() or path.suffix in (".json", ".toml"):
            LayeredModel(read_config(path), lora=config.lora(), trained=config.patterns())
