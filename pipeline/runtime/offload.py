"""A plain transformers model on a device that is smaller than its weights: they come from host memory as it computes.

Two knobs, as in Superpipeline (arXiv 2410.08791): the first `resident` layers stay on the device, and the others take
turns in `in_flight` buffers, each of which holds a layer that is being loaded or computed. While a layer computes, the
copies of those after it are under way; its buffer is filled again only after the event that its compute leaves behind.
The model is that of transformers: before a layer is called, a hook makes the weights in a buffer its parameters, so
that `generate`, its caches and whatever else calls the model work as ever, with the same numbers. Between the calls a
parameter has its shape and no memory.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.model.layered import LayeredModel
from pipeline.runtime.copy_engine import LATER, CopyEngine, Ticket
from pipeline.settings import require
from pipeline.state.host_weights import HostWeights, WeightLayout

DEADLINE_S = 120.0
"""How long the weights of one layer may take to come."""


class OffloadError(RuntimeError):
    """A model does not fit as it was asked for, or its weights do not come. Says what was needed and found."""


@dataclass(frozen=True)
class Placement:
    """What of a model may be on the device at once. All bytes are limits, known before anything is loaded."""

    resident: int
    """Layers that stay, from the first on."""
    in_flight: int
    """Buffers in which the others take turns."""
    resident_bytes: int
    buffer_bytes: int
    """Of one buffer: the largest of the other layers."""
    working_bytes: int
    """Activations and the KV cache."""

    @property
    def weight_bytes(self) -> int:
        """Of all weights that are there at once."""
        return self.resident_bytes + self.in_flight * self.buffer_bytes

    @property
    def num_bytes(self) -> int:
        """Of all."""
        return self.weight_bytes + self.working_bytes


def place(
    layout: WeightLayout, resident: int | None, in_flight: int, working_bytes: int, room: int | None = None
) -> Placement:
    """The placement that was asked for; None has as many layers stay as fit in `room` bytes, or none where that is not
    known. Layers that would all be in flight stay. Raises ConfigError for knobs that the model does not have, and
    OffloadError where `room` is too small."""
    layers = layout.model.num_layers
    require(resident is None or 0 <= resident <= layers, "layers_resident", resident, f"0 to {layers}, the model's")
    require(1 <= in_flight <= layers, "layers_in_flight", in_flight, f"1 to {layers}, the model's layers")

    def placed(stay: int) -> Placement:
        if stay + in_flight >= layers:
            stay = layers
        sizes = [layout.layer_bytes(n, _held(layout.model, n, stay)) for n in range(layers)]
        buffers = in_flight if stay < layers else 0
        return Placement(stay, buffers, sum(sizes[:stay]), max(sizes[stay:], default=0), working_bytes)

    choices = [placed(0 if room is None and resident is None else resident or 0)]
    if resident is None and room is not None:
        choices = [placed(stay) for stay in range(layers, -1, -1)]
    found = next((each for each in choices if room is None or each.num_bytes <= room), None)
    if found is None:
        least = min(choices, key=lambda each: each.num_bytes)
        raise OffloadError(
            f"{least.resident} layers resident and {least.in_flight} in flight need {least.num_bytes} bytes on the "
            f"device ({least.resident_bytes} + {least.in_flight} x {least.buffer_bytes} of weights, "
            f"{least.working_bytes} of activations and KV cache); {room} are free; allowed: fewer layers_resident or "
            "layers_in_flight, fewer tokens, or a narrower dtype"
        )
    return found


def _held(model: LayeredModel, layer: int, resident: int) -> tuple[str, ...]:
    """What a layer need not bring along, because a layer that stays has it: the embedding of a tied head."""
    return model.tied_keys if layer > 0 and resident > 0 else ()


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with all buffers and no weights, to compute on `device`: a parameter is one NaN, seen in its shape."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for module in model.modules():
            if any(buffer is not None for buffer in module._buffers.values()):
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
                model._init_weights(module)  # computes them, as `from_pretrained` does: no file holds them
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(device)
        nothing = torch.full((1,), torch.nan, dtype=dtype, device=device)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(nothing.expand(parameter.shape), requires_grad=False)
    return model


@dataclass
class _Load:
    """A layer that is in a buffer, or is coming."""

    layer: int
    buffer: int
    ticket: Ticket


class Offload:
    """Feeds a `skeleton` the weights of `host`. To be closed after use; the model is of no use then.

    `loaded_bytes` counts what has been queued to be copied to the device.
    """

    def __init__(
        self, model: PreTrainedModel, host: HostWeights, placement: Placement, device: torch.device,
        deadline_s: float = DEADLINE_S, copies: CopyEngine | None = None,
    ) -> None:  # fmt: skip
        self.model, self.host, self.placement, self.device = model, host, placement, device
        self.layers, self._deadline_s, self.loaded_bytes = host.layout.model, deadline_s, 0
        self._copies = copies or CopyEngine(device, "offload")
        self._places = {layer: self._parameters(layer) for layer in range(self.layers.num_layers)}
        self._empty = {layer: {n: m._parameters[a] for n, m, a in found} for layer, found in self._places.items()}
        self._turns = range(placement.resident, self.layers.num_layers)
        self._next = placement.resident
        self._at: int | None = None
        self._computing: _Load | None = None
        self._coming: deque[_Load] = deque()
        self._failed: OffloadError | None = None
        self._kept: dict[str, Tensor] = {}
        self._stay: list[Tensor] = []
        try:
            for layer in range(placement.resident):
                self._stay.append(flat := torch.empty(self._size(layer), dtype=torch.uint8, device=device))
                self._wait(layer, self._load(layer, flat, self._copies.mark()))
                views = host.layout.views(layer, flat, self._shared(layer))
                self._kept |= views
                self._adopt(layer, views)
            self._buffers = [
                torch.empty(placement.buffer_bytes, dtype=torch.uint8, device=device)
                for _ in range(placement.in_flight)
            ]
        except BaseException:
            self.close()
            raise
        self._free = deque((buffer, self._copies.mark()) for buffer in range(placement.in_flight))
        self._fill()
        for layer, found in self._places.items():
            for module in dict.fromkeys(module for _, module, _ in found):
                module.register_forward_pre_hook(partial(self._before, layer))

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let what is being copied come to its end, if it does."""
        self._copies.close(min(10.0, self._deadline_s))

    @property
    def weight_bytes(self) -> int:
        """Bytes that weights take on the device, all that were reserved for them."""
        return sum(flat.numel() for flat in (*self._stay, *self._buffers))

    # ---- a layer's turn ----

    def _before(self, layer: int, *_: Any) -> None:
        """A module of this layer is about to be called. Raises OffloadError."""
        if self._failed is not None:
            raise self._failed
        if layer == self._at:
            return
        if self._computing is not None:  # of the layer before; all of its work is queued on the device
            self._adopt(self._computing.layer, self._empty[self._computing.layer])
            self._free.append((self._computing.buffer, self._copies.mark()))
            self._computing = None
        if layer in self._turns:
            if not self._coming or self._coming[0].layer != layer:  # else it is called in order, as it should be
                self._begin_at(layer)
            self._fill()
            load = self._coming.popleft()
            self._wait(layer, load.ticket)
            self._adopt(layer, self.host.layout.views(layer, self._buffers[load.buffer], self._shared(layer)))
            self._computing = load
        else:
            self._fill()
        self._at = layer

    def _begin_at(self, layer: int) -> None:
        """Forget what is coming, and have this layer come next."""
        while self._coming:
            load = self._coming.popleft()
            self._wait(load.layer, load.ticket)
            self._free.append((load.buffer, None))
        self._next = layer

    def _fill(self) -> None:
        """Begin to load the layers that come next, as far as there are buffers; after the last one the first."""
        while self._free:
            buffer, used = self._free.popleft()
            self._coming.append(_Load(self._next, buffer, self._load(self._next, self._buffers[buffer], used)))
            self._next = self._next + 1 if self._next + 1 in self._turns else self.placement.resident

    def _load(self, layer: int, flat: Tensor, after: Any) -> Ticket:
        pieces = self.host.pieces(layer, self._shared(layer))
        parts = flat[: self._size(layer)].split([piece.numel() for piece in pieces])
        self.loaded_bytes += self._size(layer)
        return self._copies.move(list(zip(parts, pieces, strict=True)), LATER, after)

    def _wait(self, layer: int, ticket: Ticket) -> None:
        told = f"the {self._size(layer)} bytes of layer {layer}'s weights"
        try:
            ticket.wait(self._deadline_s)
        except TimeoutError as error:
            self._failed = OffloadError(f"{told} have not come to {self.device} within {self._deadline_s:g} s")
            raise self._failed from error
        except Exception as error:
            self._failed = OffloadError(f"{told} cannot be copied to {self.device}: {error}")
            raise self._failed from error

    # ---- parameters ----

    def _parameters(self, layer: int) -> list[tuple[str, nn.Module, str]]:
        """(full name, module, attribute) of all that a layer computes with."""
        found: list[tuple[str, nn.Module, str]] = []
        for path in self.layers.paths(layer).values():
            root = self.model.get_submodule(path)
            for prefix, module in root.named_modules():
                for attribute, _ in module.named_parameters(recurse=False):
                    local = f"{prefix}.{attribute}" if prefix else attribute
                    found.append((self.layers.full_name(path, local), module, attribute))
        return found

    def _adopt(self, layer: int, weights: Mapping[str, Any]) -> None:
        for name, module, attribute in self._places[layer]:
            weight = weights[name] if name in weights else self._kept[name]
            module._parameters[attribute] = (
                weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
            )

    def _shared(self, layer: int) -> tuple[str, ...]:
        return _held(self.layers, layer, self.placement.resident)

    def _size(self, layer: int) -> int:
        return self.host.layout.layer_bytes(layer, self._shared(layer))
