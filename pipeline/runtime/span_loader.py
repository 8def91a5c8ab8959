"""The weights that a stateless worker has at hand: two spans at most, one that is computed and one that is loaded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pipeline.model.span_module import SpanModule
from pipeline.runtime.copy_engine import LATER, CopyEngine
from pipeline.runtime.orders import Loaded, Order
from pipeline.runtime.probe import Probe
from pipeline.state.host_store import HostStore

_HELD = 2


class SpanLoader:
    """Loads spans from the host store into buffers, in the dtype in which weights travel."""

    def __init__(self, store: HostStore, device: torch.device, up: CopyEngine) -> None:
        self._store, self._layout, self._device, self._up = store, store.layout, device, up
        cut = store.layout.cut
        largest = max(store.layout.weight_bytes(span) for span in (*cut.forward, cut.fused, *cut.backward))
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(_HELD)]
        self._free = list(range(_HELD))
        self._shells: dict[tuple[int, int], SpanModule] = {}
        self.most_held = 0

    def prepare(self, orders: Iterable[Order], probe: Probe) -> None:
        """Begin to load the spans of the orders at hand, as far as there is room."""
        orders = tuple(orders)
        for order in orders:
            if order.loaded is None:
                order.loaded = _shared(order, orders) or (self._load(order) if self._free else None)
                if order.loaded is not None and order.loaded.users == 1:
                    probe("upload", order.step)

    def _load(self, order: Order) -> Loaded:
        buffer = self._free.pop()
        flat, layers = self._buffers[buffer], list(range(*order.span))
        views = self._layout.weight_views(layers, flat)
        versions = self._store[f"version/{order.source}"][layers[0] : layers[-1] + 1]
        if int(versions.max()) != (version := int(versions.min())):
            raise RuntimeError(f"span {order.span} has weights of versions {versions.tolist()}; expected one")
        pairs = [(views[n][name], host) for n in layers for name, host in self._store.weights(n, order.source).items()]
        ticket = self._up.move(pairs, LATER, self._up.mark())
        parts: dict[str, nn.Module] = {}
        parameters: dict[int, dict[str, nn.Parameter]] = {}
        for layer in layers:
            shell = self._shell(buffer, layer)
            parameters[layer] = shell.adopt(layer, views[layer])
            parts[str(layer)] = shell.layers[str(layer)]
        self.most_held = max(self.most_held, _HELD - len(self._free))
        module = SpanModule(self._layout.model, order.span, parts, self._shell(buffer, layers[0]).rotary)
        return Loaded(buffer, module, parameters, ticket, version)

    def _shell(self, buffer: int, layer: int) -> SpanModule:
        """A layer without weights, to be filled from a buffer."""
        if (buffer, layer) not in self._shells:
            model = self._layout.model
            empty = {n: nn.Parameter(torch.empty(s, device="meta")) for n, s in model.shapes(layer).items()}
            self._shells[buffer, layer] = model.build((layer, layer + 1), seed=0, device=self._device, share=empty)
        return self._shells[buffer, layer]

    def let_go(self, order: Order) -> None:
        """Give the buffer back, unless another order goes on with it: what is copied into it waits for the device."""
        assert order.loaded is not None
        order.loaded.users -= 1
        if not order.loaded.users:
            self._free.append(order.loaded.buffer)


def _shared(order: Order, orders: Iterable[Order]) -> Loaded | None:
    """The weights that an earlier order at hand has, if it is of the same span and iteration."""
    for other in orders:
        if other.loaded and (other.span, other.source, other.run) == (order.span, order.source, order.run):
            other.loaded.users += 1
            return other.loaded
    return None
