"""What every worker of a run needs is there before it is needed.

Code is imported once, in the process from which workers are forked, and so is the model's blueprint made, as soon as
the run is planned: each takes a tenth of a second or two, of every worker as it starts, and of each that takes a lost
one's place, while all others wait. A spare worker has even computed once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from jobs.config import TrainConfig
from jobs.registry import KINDS
from launch.config import config_from_dict
from pipeline.model import compiled
from pipeline.model.layered import LayeredModel
from pipeline.model.lora import Adapters
from pipeline.model.rng import RngKey
from pipeline.model.weights import PRESETS, preset, read_config
from pipeline.state.resident import ResidentStore


def warm_up(config: TrainConfig) -> None:
    """Import the model's code, and that of adapters and the compiler where they are used. Starts no thread, and raises
    nothing: what is wrong with the model is told by who plans."""
    with suppress(Exception):
        if config.compile:
            compiled.prepare()
        path = Path(config.model)
        if config.model in PRESETS:
            LayeredModel(preset(config.model), lora=config.lora(), trained=config.patterns())
        elif path.is_dir() or path.suffix in (".json", ".toml"):
            LayeredModel(read_config(path), lora=config.lora(), trained=config.patterns())


def settings_of(details: Mapping[str, Any]) -> TrainConfig:
    """Those of a run, whatever it is of, from the details of its views."""
    return _settings(details["job"], json.dumps(details["config"]))


@cache
def _settings(job: str, text: str) -> TrainConfig:
    return config_from_dict(KINDS[job].settings, json.loads(text))


def prepare(details: dict[str, Any]) -> None:
    """Load, in the process from which workers are forked, what each of them needs."""
    model = model_of(settings_of(details))
    model.copy_ahead(range(model.num_layers))


def try_out(config: TrainConfig, model: LayeredModel, device: torch.device) -> None:
    """Take a microbatch through a block, back, and into its weights: what takes longer the first time is over then."""
    block = model.blocks.start
    held = ResidentStore(model, [(block, block + 1)], config.optimizer_config(), seed=config.seed, device=device)
    shape = config.microbatch_size, config.sequence_length, model.hidden_size
    x = torch.zeros(shape, device=device, requires_grad=True)
    rng = RngKey(config.seed, 0, tuple(range(config.microbatch_size)))
    with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        y = held.modules[block, block + 1](x, rng=rng)
    y.float().sum().backward()
    for state in held.states.values():
        state.apply(1.0, 0.0)


def model_of(config: TrainConfig, attention: str | None = None) -> LayeredModel:
    """The model of a run, read once from its folder."""
    return _blueprint(config.out / "model-config", attention, config.lora(), config.depth, config.patterns())


@cache
def _blueprint(
    folder: Path, attention: str | None, lora: Adapters | None, depth: int | None, trained: tuple[str, ...]
) -> LayeredModel:
    return LayeredModel(read_config(folder), attention=attention, lora=lora, depth=depth, trained=trained)
