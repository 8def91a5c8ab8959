"""The weights of a request: out of the run's checkpoint before it, and into a checkpoint of the run after it.

A request begins with weights alone, adapters merged. What it ends with becomes a checkpoint of the run at the step that
it began from, in the new generation: the same layers, with no moments, because moments are sums over what was seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.model.layered import LayeredModel
from pipeline.model.lora import is_adapter
from pipeline.model.weights import Weights, read_config, write_model
from recovery import checkpoint
from recovery.disk import write_flushed

SAID = "unbroken.json"
"""Says beside an exported model of which generation it is."""


def begin_with(model: LayeredModel, saved: Path, into: Path, tokenizer: Path) -> None:
    """Write the weights of a checkpoint as a model directory. Raises CheckpointError, ModelError."""
    manifest = checkpoint.read_manifest(saved)

    def shards() -> Iterator[dict[str, Tensor]]:
        for layer in range(model.num_layers):
            tensors = {
                key.removeprefix("param/"): tensor
                for key, tensor in checkpoint.read_layer(saved, manifest, layer).items() if key.startswith("param/")
            }  # fmt: skip
            yield tensors if model.lora is None else model.lora.merged(tensors, model.module)

    write_model(into, model.config, shards(), model.num_layers, tokenizer)


def by_file(known: Weights) -> list[tuple[Path, dict[str, tuple[str, ...]]]]:
    """Each file of a model directory, and what is in it, as `Weights.read` is asked for it."""
    return [
        (file, {name: (name,) for name, where in known.files.items() if where == file})
        for file in sorted(set(known.files.values()))
    ]


def rewrite(
    start: Path, into: Path, tokenizer: Path, change: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> None:  # fmt: skip
    """Write the model directory `start` anew as `change` makes its tensors, one file's after another's. Raises
    ModelError."""
    known = Weights(start)
    files = by_file(known)
    write_model(into, read_config(start), (change(known.read(names)) for _, names in files), len(files), tokenizer)


def publish(root: Path, before: Path, layers: Mapping[int, Callable[[], Mapping[str, Tensor]]], **changed: Any) -> Path:
    """Make a checkpoint under `root` of layers' states: that of the checkpoint `before`, but for what is `changed` in
    what its manifest says. Raises CheckpointError, ModelError."""
    extra = {**checkpoint.read_manifest(before)["extra"], **changed}
    step, fence = int(extra["step"]), (checkpoint.last_attempt(root) + 1, 1)
    folder = checkpoint.begin(root, step, fence)
    records = [checkpoint.write_layer(folder, layer, state()) for layer, state in layers.items()]
    return checkpoint.commit(root, step, records, extra, fence=fence)


def states_of(model: LayeredModel, weights: Path, seed: int) -> Mapping[int, Callable[[], Mapping[str, Tensor]]]:
    """Layer -> what the file of a checkpoint has, of a model directory: no moments, and no steps taken."""
    known = Weights(weights)
    return {layer: partial(_state, model, known, layer, seed) for layer in range(model.num_layers)}


def states_in(saved: Path) -> Mapping[int, Callable[[], Mapping[str, Tensor]]]:
    """Layer -> what its file in a checkpoint has. Raises CheckpointError."""
    manifest = checkpoint.read_manifest(saved)
    layers = sorted(int(record["layer"]) for record in manifest["files"])
    return {layer: partial(checkpoint.read_layer, saved, manifest, layer) for layer in layers}


def _state(model: LayeredModel, known: Weights, layer: int, seed: int) -> dict[str, Tensor]:
    """What the file of a layer has, as at the first step; adapters begin anew, for they are merged."""
    shapes, found = model.shapes(layer), dict[str, Tensor]()
    for spec in (spec for spec in model.states if spec.owner == layer):
        names = {key: model.stored_names(key) for key in spec.keys if not is_adapter(key)}
        values = known.read(names)
        for key in filter(is_adapter, spec.keys):
            assert model.lora is not None
            values[key] = model.lora.first_value(key, shapes[key], seed)
        found |= {f"param/{key}": values[key] for key in spec.keys}
        for place, key in enumerate(spec.keys[: spec.trained]):
            found |= {f"{kind}/{key}": torch.zeros_like(values[key]) for kind in ("exp_avg", "exp_avg_sq")}
            found[f"step/{key}"] = torch.zeros(())
            if place == 0:
                found[f"lr_scale/{key}"] = torch.ones(())
    return found


def say_generation(folder: Path, generation: int) -> None:
    """Have a model directory say of which generation it is."""
    write_flushed(folder / SAID, json.dumps({"generation": generation}).encode())
