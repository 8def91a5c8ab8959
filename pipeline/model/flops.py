"""Model FLOPs: what the matrix products of a model come to in a forward and a backward, layer by layer.

The convention is that of model FLOPs utilisation (PaLM, Chowdhery et al., arXiv 2204.02311, appendix B): a multiply-add
is 2 operations; only products of matrices count, so neither the lookup of an embedding nor a norm or a softmax does;
attention counts the full square of the sequence, whatever its mask hides; and what is computed a second time
(recomputed activations, a redundant forward) does not count. Nothing of it is a formula of ours: the layer's own
modules run on the meta device, where tensors have shapes and no memory, under torch's FlopCounterMode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.model.layered import LayeredModel
from pipeline.wire import WireError, checked, listed, whole


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one layer on one microbatch: forward; backward where something is trained before it, so that the
    gradient of its input is needed; and `first`: backward where nothing is. With all weights trained, backward is
    twice forward: one product for the gradient of the weights, one for that of the input."""

    forward: int
    backward: int
    first: int


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of every layer of a model on one microbatch; `learning` are the layers that compute with something that is
    trained."""

    layers: tuple[LayerFlops, ...]
    learning: frozenset[int]
    _routes: dict[tuple[frozenset[int], bool], int] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, model: LayeredModel, batch: int, sequence: int) -> ModelFlops:
        """Counted for a microbatch [batch, sequence]; of layers that are alike, one is run."""
        found: dict[Any, LayerFlops] = {}
        layers: list[LayerFlops] = []
        for layer in range(model.num_layers):
            alike = _alike(model, layer)
            if alike not in found:
                found[alike] = _count(model, layer, batch, sequence)
            layers.append(found[alike])
        return cls(tuple(layers), model.learning)

    def microbatch(self, visited: Iterable[int], trains: bool = True) -> int:
        """Of a microbatch that visits these layers, forward and, if it trains, back as far as anything is trained."""
        key = frozenset(visited), trains
        if key not in self._routes:
            lowest = min(key[0] & self.learning, default=len(self.layers)) if trains else len(self.layers)
            self._routes[key] = sum(
                each.forward + (each.backward if layer > lowest else each.first if layer == lowest else 0)
                for layer, each in enumerate(self.layers)
                if layer in key[0]
            )
        return self._routes[key]

    def as_json(self) -> dict[str, Any]:
        """For `from_json`: every kind of layer once."""
        kinds = list(dict.fromkeys(self.layers))
        return {
            "kinds": [[each.forward, each.backward, each.first] for each in kinds],
            "layers": [kinds.index(each) for each in self.layers], "learning": sorted(self.learning),
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelFlops:
        """Raises WireError for what is none."""
        what = "the FLOPs of a model"

        def numbers(each: Any) -> tuple[int, ...]:
            return listed(each, what, lambda number: whole(number, what))

        told = checked(values, what, kinds=list, layers=list, learning=list)
        kinds, layers = listed(told["kinds"], what, numbers), numbers(told["layers"])
        if any(len(kind) != 3 for kind in kinds) or max(layers, default=0) >= len(kinds):
            raise WireError(f"{what} are {told!s:.80}; expected three numbers of each kind, and the kind of each layer")
        return cls(tuple(LayerFlops(*kinds[each]) for each in layers), frozenset(numbers(told["learning"])))


def _alike(model: LayeredModel, layer: int) -> Any:
    """What tells layers apart that take different amounts: the ends, and shapes and what is trained of a block. What a
    block sees makes no difference: its mask hides, and spares nothing."""
    trained = set(model.differentiated(layer))
    end = layer if layer not in model.blocks else -1
    return end, tuple((shape, name in trained) for name, shape in model.shapes(layer).items())


def _count(model: LayeredModel, layer: int, batch: int, sequence: int) -> LayerFlops:
    """Run a layer, forward and back, on shapes alone."""
    shapes = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in model.shapes(layer).items()}
    module = model.build((layer, layer + 1), seed=0, device="meta", share=shapes).eval()  # eval: dropout wants a key
    if module.rotary is not None:
        module.rotary = _RealRotary(model.rotary())

    def run(before: bool) -> tuple[int, int]:
        """(forward, backward), with the gradient of the input if something is trained `before`."""
        if layer == 0:
            x = torch.empty((batch, sequence), dtype=torch.long, device="meta")
        else:
            x = torch.empty((batch, sequence, model.hidden_size), device="meta", requires_grad=before)
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            y = module(x)
            forward = counter.get_total_flops()
            if y.requires_grad:
                torch.autograd.backward(y, torch.empty_like(y))
        return forward, counter.get_total_flops() - forward

    forward, first = run(before=False)
    return LayerFlops(forward, run(before=True)[1], first)


class _RealRotary(nn.Module):
    """Rotary embeddings computed for real: some kinds read the positions to see how far they go."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden: Tensor, places: Tensor, *kind: str) -> tuple[Tensor, ...]:
        found = self.rotary(torch.empty(0, dtype=hidden.dtype), torch.arange(places.shape[1])[None], *kind)
        return tuple(each.to(hidden.device) for each in found)
