"""Forward and backward through a model directory, layer by layer from the disk: one layer is in memory at a time.

The forward keeps what goes into each layer. The backward takes the layers in descending order, builds each anew,
computes it again and differentiates. Inputs are taken some at a time, so that what is kept between layers is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jobs.unlearn.material import Item, Material, stacked
from jobs.unlearn.method import row_nll
from jobs.unlearn.probe import build_layer, go_through, parts_of
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import read_config
from pipeline.runtime.batch import Needs

Objective = Callable[[int, Tensor], Tensor]
"""(number of the part, its logits [batch, sequence, vocabulary]) -> what is differentiated, a scalar."""
Watch = Callable[[int, int, Tensor, Tensor], None]
"""(number of the part, block, what its MLP's neurons say [batch, sequence, neurons], the gradient of that)."""

MOST_BYTES = 1 << 30
"""What is kept between layers at once, unless a single part needs more."""


@dataclass(frozen=True)
class Swept:
    """Of one part: what the objective gave, the embedding's output and its gradient, both [batch, sequence, hidden]."""

    value: float
    hidden: Tensor
    gradient: Tensor


def sweep(
    folder: Path, inputs: Iterable[Tensor], objective: Objective, watch: Watch | None = None,
    most_bytes: int = MOST_BYTES,
) -> Iterator[Swept]:  # fmt: skip
    """Differentiate `objective` of the model in a directory, part by part, in fp32 on the CPU. A part is ids [batch,
    sequence], or in their place what the embedding would give. Dropout is off. Raises ModelError."""
    model, first = LayeredModel(read_config(folder)), 0
    for parts in _together(inputs, 4 * model.hidden_size * model.num_layers, most_bytes):
        hidden = _embedded(model, folder, parts)
        kept = [hidden]
        for layer in range(1, model.num_layers - 1):
            kept.append([*kept[-1]])
            go_through(model, folder, layer, kept[-1])
        values, gradients = _head(model, folder, kept.pop(), objective, first)
        for layer in range(model.num_layers - 2, 0, -1):
            told = None if watch is None else _Watched(watch, layer, first)
            gradients = _backward(model, folder, layer, kept.pop(), gradients, told)
        for value, x, gradient in zip(values, hidden, gradients, strict=True):
            yield Swept(value, x, gradient)
        first += len(parts)


def embedded(folder: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the embedding of the model in a directory gives for ids [batch, sequence]: [batch, sequence, hidden]. Raises
    ModelError."""
    return _embedded(LayeredModel(read_config(folder)), folder, inputs)


def sweep_rows(
    folder: Path, material: Material, items: Sequence[Item], size: int, watch: Watch | None = None
) -> Iterator[Swept]:
    """Differentiate the log-likelihood of the answers of some rows, `size` rows at a time, in their order."""
    parts = parts_of(items, size)

    def likelihood(part: int, logits: Tensor) -> Tensor:
        return -row_nll(logits, stacked(material, parts[part], Needs.LOSS)["labels"]).sum()

    yield from sweep(
        folder, (stacked(material, part, Needs.INPUT)["input_ids"] for part in parts), likelihood, watch
    )  # fmt: skip


@dataclass(frozen=True)
class _Watched:
    """Who watches a block, of parts that are numbered from `first` on."""

    watch: Watch
    layer: int
    first: int


def _together(inputs: Iterable[Tensor], each: int, most_bytes: int) -> Iterator[list[Tensor]]:
    """Parts that are taken at once: `each` bytes are kept of every position."""
    parts, size = list[Tensor](), 0
    for part in inputs:
        needed = part.shape[0] * part.shape[1] * each
        if parts and size + needed > most_bytes:
            yield parts
            parts, size = [], 0
        parts.append(part)
        size += needed
    if parts:
        yield parts


# ---- one layer: it is gone when these return ----


@torch.no_grad()
def _embedded(model: LayeredModel, folder: Path, parts: Sequence[Tensor]) -> list[Tensor]:
    if all(part.dim() == 3 for part in parts):
        return list(parts)
    module = build_layer(model, folder, 0)
    return [part if part.dim() == 3 else module(part) for part in parts]


@torch.enable_grad()
def _head(
    model: LayeredModel, folder: Path, hidden: Sequence[Tensor], objective: Objective, first: int
) -> tuple[list[float], list[Tensor]]:
    module, values, gradients = build_layer(model, folder, model.num_layers - 1), list[float](), list[Tensor]()
    for number, each in enumerate(hidden, first):
        x = each.detach().requires_grad_()
        value = objective(number, module(x))
        gradients.append(torch.autograd.grad(value, x)[0])
        values.append(float(value.detach()))
    return values, gradients


@torch.enable_grad()
def _backward(
    model: LayeredModel, folder: Path, layer: int, hidden: Sequence[Tensor], gradients: Sequence[Tensor],
    told: _Watched | None,
) -> list[Tensor]:  # fmt: skip
    """The gradients of what goes into a block, from those of what comes out."""
    module, neurons, found = build_layer(model, folder, layer), list[Tensor](), list[Tensor]()
    if told is not None:
        reader = module.layers[str(layer)].get_submodule(model.family.out_of_neurons)
        reader.register_forward_pre_hook(lambda _, given: neurons.append(given[0]))
    for number, (each, gradient) in enumerate(zip(hidden, gradients, strict=True)):
        x = each.detach().requires_grad_()
        y = module(x)
        got, *of_neurons = torch.autograd.grad(y, [x, *neurons], gradient)
        found.append(got)
        if told is not None:
            told.watch(told.first + number, layer, neurons.pop().detach(), of_neurons[0])
    return found
