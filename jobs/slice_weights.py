"""The model of a stage: the weights that a run of slices began with, with the adapters of its prefix merged in."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from pipeline.model.layered import LayeredModel
from pipeline.model.lora import KEPT_AS, Adapters
from pipeline.model.weights import Weights, finish_export, read_config, write_shard


def assemble(source: Path, lora: Adapters, adapters: Sequence[Path], tokenizer: Path, into: Path) -> None:
    """Write the model directory `into`: that in `source` with the adapters of these folders, in their order. They are
    of different blocks, so each is added as the stage has added it when it was exported. Raises ModelError, OSError."""
    model, known, unfinished = LayeredModel(read_config(source)), Weights(source), into.with_name(f"{into.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    added: dict[str, Tensor] = {}
    for folder in adapters:
        held = load_file(folder / "adapter_model.safetensors")
        added |= {name.removeprefix(KEPT_AS): tensor for name, tensor in held.items()}
    weight_map: dict[str, str] = {}
    for layer in range(model.num_layers):
        keys = model.keys(layer)
        if not keys:
            continue
        tensors = known.read({key: model.stored_names(key) for key in keys})
        mine = {name: t for name, t in added.items() if f"{name.rpartition('.lora_')[0]}.weight" in tensors}
        tensors = lora.merged(tensors | mine, model.module)
        weight_map |= write_shard(unfinished, layer + 1, model.num_layers, tensors)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    finish_export(unfinished, model.config, weight_map, tokenizer=loaded, into=into)
