"""The model of a stage: the weights that a run of slices began with, with the adapters of its prefix merged in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from pipeline.model.layered import LayeredModel
from pipeline.model.lora import Adapters, adapter_of
from pipeline.model.weights import Weights, read_config, write_model


def assemble(source: Path, lora: Adapters, adapters: Sequence[Path], tokenizer: Path, into: Path) -> None:
    """Write the model directory `into`: that in `source` with the adapters of these folders, in their order. They are
    of different blocks, so each is added as the stage has added it when it was exported. Raises ModelError, OSError."""
    model, known, added = LayeredModel(read_config(source)), Weights(source), dict[str, Tensor]()
    for folder in adapters:
        added |= adapter_of(folder)

    def shards() -> Iterator[dict[str, Tensor]]:
        for layer in range(model.num_layers):
            tensors = known.read({key: model.stored_names(key) for key in model.keys(layer)})
            mine = {name: t for name, t in added.items() if f"{name.rpartition('.lora_')[0]}.weight" in tensors}
            yield lora.merged(tensors | mine, model.module)

    write_model(into, model.config, shards(), model.num_layers, tokenizer)
