"""Where the state of a worker's spans lives: modules, gradients, optimizer state, by span and by layer.

Here it is resident on the worker's device. A tied embedding that sits on another worker than the head is a shard of
its own, held on both sides: its two gradients are summed, so both copies stay equal.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.model.layered import LayeredModel, SpanModule
from pipeline.schedule.ops import Span, overlaps
from pipeline.state.optimizer import OptimizerConfig, SpanOptimizer

TIED: Span = (-1, 0)
"""The shard of a weight that the embedding and the head share. Not a run of layers: it belongs to no lane."""

Holders = Mapping[Span, tuple[int, ...]]


def shard_holders(holders: Holders, num_layers: int, tied: bool) -> dict[Span, tuple[int, ...]]:
    """Shard -> the workers that hold a copy and must reduce its gradient together: spans, and a tied weight if any."""
    shards = dict(holders)
    if tied:
        ends = ((0, 1), (num_layers - 1, num_layers))
        shards[TIED] = tuple(sorted({w for s, ws in holders.items() for w in ws if any(overlaps(s, e) for e in ends)}))
    return shards


class ResidentStore:
    """The spans of one worker, on its device."""

    def __init__(
        self, model: LayeredModel, spans: Iterable[Span], config: OptimizerConfig, *, seed: int,
        device: torch.device, source: Path | None = None, came_on: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`came_on` is called after each layer: a large model takes long."""
        self.model = model
        self.modules: dict[Span, SpanModule] = {}
        self.shards: dict[Span, SpanOptimizer] = {}
        shared: dict[str, nn.Parameter] = {}
        for span in sorted(spans):
            module = model.build(span, seed=seed, device=device, source=source, share=shared, came_on=came_on)
            self.modules[span] = module
            named = {n: p for layer in range(*span) for n, p in module.named_layer_parameters(layer).items()}
            for name in set(named) & set(model.tied_keys):
                shared.setdefault(name, named[name])
                del named[name]
            if named:
                self.shards[span] = SpanOptimizer(named, config)
        if shared:
            self.shards[TIED] = SpanOptimizer(shared, config)

    def train(self, mode: bool) -> None:
        """Set every module to training (with dropout) or to evaluation."""
        for module in self.modules.values():
            module.train(mode)

    def layers(self) -> list[int]:
        """The layers held, ascending."""
        return sorted(layer for span in self.modules for layer in range(*span))

    def _owner(self, layer: int) -> dict[str, SpanOptimizer]:
        """Full parameter name -> the shard that holds it, for the parameters that `layer` owns."""
        keys = self.model.keys(layer)
        return {name: shard for shard in self.shards.values() for name in keys if name in shard.parameters}

    def layer_state(self, layer: int) -> dict[str, Tensor]:
        """The whole state of a layer: `param/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`. Not copies.

        `lr_scale/NAME` is there once for each shard that the layer's parameters are in.
        """
        return _state(self._owner(layer))

    def shard_state(self, shard: Span) -> dict[str, Tensor]:
        """The state of one shard, in the form of `layer_state`: what replicas of it must agree on, bit for bit."""
        return _state(dict.fromkeys(self.shards[shard].parameters, self.shards[shard]))

    def fingerprint(self, shard: Span) -> int:
        """A checksum of a shard's whole state: equal on all its holders, or one of them is wrong."""
        crc = 0
        for _, tensor in sorted(self.shard_state(shard).items()):
            crc = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, crc)
        return crc

    def span_states(self, span: Span) -> list[dict[str, Tensor]]:
        """The states that `span` consists of: one per layer, or that of the tied weight."""
        return [self.shard_state(TIED)] if span == TIED else [self.layer_state(layer) for layer in range(*span)]

    def shards_of(self, span: Span) -> list[SpanOptimizer]:
        """The shards that hold parameters of these layers, the tied weight aside."""
        return [shard for key, shard in self.shards.items() if key == span or (key != TIED and overlaps(key, span))]

    @torch.no_grad()
    def load_layer_state(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """Copy a state given by `layer_state` in. Raises KeyError for a missing tensor, RuntimeError for a shape."""
        for key, tensor in self.layer_state(layer).items():
            tensor.copy_(state[key])

    @torch.no_grad()
    def start_again(
        self, shards: Iterable[SpanOptimizer], seed: int, source: Path | None, came_on: Callable[[], None]
    ) -> None:
        """Fill in the weights that a run begins with, and no moments. Raises ModelError for a source that is gone."""
        shards = list(shards)
        wanted = {name for shard in shards for name in shard.parameters}
        fresh: dict[str, nn.Parameter] = {}
        for layer in self.layers():
            if not wanted.isdisjoint(self.model.shapes(layer)):
                fresh |= self.model.build((layer, layer + 1), seed=seed, source=source).named_layer_parameters(layer)
                came_on()
        for shard in shards:
            shard.begin_anew()
            for name, parameter in shard.parameters.items():
                parameter.copy_(fresh[name])

    def parameters(self, layer: int) -> dict[str, Tensor]:
        """Full name -> weight of the parameters that `layer` owns."""
        return {name: shard.parameters[name].detach() for name, shard in self._owner(layer).items()}


def _state(owners: Mapping[str, SpanOptimizer]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    scaled: set[int] = set()
    for name, shard in owners.items():
        state[f"param/{name}"] = shard.parameters[name].detach()
        state.update({f"{kind}/{name}": tensor for kind, tensor in shard.moments(name).items()})
        if id(shard) not in scaled:
            scaled.add(id(shard))
            state[f"lr_scale/{name}"] = shard.lr_scale
    return state
