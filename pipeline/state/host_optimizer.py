"""The optimizer beside the pipeline: a thread of the host that sums gradient blocks and applies AdamW, layer by layer.

Blocks of one layer are added in the order of their rounds, whoever computed them and whenever they came, so the sum is
the same to the last bit for every number of workers and after every failure. A layer's weights get a version with every
update; who wants to read version v of a span waits until all its layers have it.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.schedule.ops import Span
from pipeline.state.host_store import HostStore
from pipeline.state.optimizer import OptimizerConfig, SpanOptimizer, clip_factor

log = logging.getLogger(__name__)

Told = Callable[[str, Any], None]
"""(what, about): "added" a block number, "norm" (step, norm), "updated" (step, layer), "failed" an exception."""


class HostOptimizer:
    """The weights, gradients and moments in a host store, and the thread that changes them.

    `told` is called on that thread. Whatever else reads the state calls `drain` first.
    """

    def __init__(self, store: HostStore, config: OptimizerConfig, told: Told) -> None:
        self.store, self.config = store, config
        self.model, self.behind = store.layout.model, store.layout.behind
        self._told = told
        self.layers = [self._layer(layer) for layer in range(self.model.num_layers)]
        self.updates = 0
        self._jobs: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="optimizer", daemon=True)
        self._thread.start()

    def _layer(self, layer: int) -> SpanOptimizer | None:
        model, store = self.model, self.store
        keys = model.trainable(layer)
        if not keys:
            return None
        owned = list(model.differentiated(layer))[: len(keys)]
        assert owned == list(keys), "a tied weight stands last among those of the head"
        sizes = sum(math.prod(model.shapes(layer)[key]) for key in keys)
        return SpanOptimizer(
            {key: nn.Parameter(store[f"param/{key}"]) for key in keys}, self.config,
            gradient=store[f"grad/{layer}"][:sizes],
            moments={key: {kind: store[f"{kind}/{key}"] for kind in ("exp_avg", "exp_avg_sq")} for key in keys},
        )  # fmt: skip

    # ---- state ----

    @torch.no_grad()
    def initialise(self, seed: int, source: Path | None) -> None:
        """Fill the weights, one layer at a time, with what every worker of another scheduler would begin with."""
        for layer in range(self.model.num_layers):
            module = self.model.build((layer, layer + 1), seed=seed, source=source)
            for name, parameter in module.named_layer_parameters(layer).items():
                if name in self.model.keys(layer):
                    self.store[f"param/{name}"].copy_(parameter)
        self.start(0)

    @torch.no_grad()
    def start(self, updates: int, read: Mapping[str, Tensor] | None = None) -> None:
        """The weights are there, after so many updates; `read` are those of the update before, if they differ."""
        self.updates = updates
        self.store["version/param"].fill_(updates)
        if self.behind:
            for side in (0, 1):
                behind = (updates + side) % 2 == 1  # the side that the iteration to come reads
                for layer in range(self.model.num_layers):
                    for key in self.model.trainable(layer):
                        given = read.get(key) if behind and read else None
                        target = self.store[f"read{side}/{key}"]
                        target.copy_(self.store[f"param/{key}"] if given is None else given)
                self.store[f"version/read{side}"].fill_(max(0, updates - 1) if behind else updates)

    def layer_state(self, layer: int) -> dict[str, Tensor]:
        """As `ResidentStore.layer_state`; under an optimizer that is behind also `read/NAME`, what is read next. What
        is not trained has its `param/NAME` alone."""
        state = {f"param/{name}": weight for name, weight in self.parameters(layer).items()}
        shard = self.layers[layer]
        if shard is None:
            return state
        state["lr_scale/" + next(iter(shard.parameters))] = shard.lr_scale
        for name in shard.parameters:
            state.update({f"{kind}/{name}": tensor for kind, tensor in shard.moments(name).items()})
            if self.behind:
                state[f"read/{name}"] = self.store[f"read{(self.updates + 1) % 2}/{name}"]
        return state

    @torch.no_grad()
    def load_layer_state(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """Copy a state in, from this or another scheduler's checkpoint. Raises KeyError for a missing tensor."""
        for key, tensor in self.layer_state(layer).items():
            if not key.startswith("read/"):
                tensor.copy_(state[key])

    def parameters(self, layer: int) -> dict[str, Tensor]:
        """Full name -> weight of the parameters that `layer` owns, as last updated."""
        return {name: self.store[f"param/{name}"] for name in self.model.keys(layer)}

    def version(self, span: Span, source: str) -> int:
        """The least version among a span's layers, the layer of a tied weight included."""
        versions = self.store[f"version/{source}"]
        least = int(versions[span[0] : span[1]].min())
        tied = self.model.tied and span[1] == self.model.num_layers
        return min(least, int(versions[0])) if tied else least

    # ---- what is asked of the thread ----

    def add(self, block: int, span: Span) -> None:
        """Add a block of gradients to the sums."""
        self._jobs.put((self._add, (block, span)))

    def measure(self, step: int, tokens: int) -> None:
        """Tell the norm of the summed gradient, divided by the tokens."""
        self._jobs.put((self._measure, (step, tokens)))

    def update(self, step: int, scale: float, norm: float, lr: float) -> None:
        """Apply the summed gradient times `scale`, clipped by its norm."""
        self._jobs.put((self._update, (step, scale * clip_factor(norm, self.config.clip), lr)))

    def drop(self) -> None:
        """Forget the summed gradient."""
        self._jobs.put((self._drop, ()))

    def drain(self, timeout_s: float) -> None:
        """Return when all that was asked is done. Raises TimeoutError."""
        done = threading.Event()
        self._jobs.put((done.set, ()))
        if not done.wait(timeout_s):
            raise TimeoutError(f"the optimizer has not come to an end after {timeout_s:g} s")

    def close(self, timeout_s: float = 60.0) -> None:
        """End the thread once it has done what was asked; one that does not end is left behind, and that is said."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("the optimizer has not come to its end within %g s", timeout_s)

    # ---- the thread ----

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, arguments = job
            try:
                function(*arguments)
            except BaseException as error:
                self._told("failed", error)

    @torch.no_grad()
    def _add(self, block: int, span: Span) -> None:
        flat, at = self.store[f"block/{block}"], 0
        for layer in range(*span):
            total = self.store[f"grad/{layer}"]
            total.add_(flat[at : at + total.numel()])
            at += total.numel()
        self._told("added", block)

    @torch.no_grad()
    def _measure(self, step: int, tokens: int) -> None:
        head = self.layers[-1]
        if self.model.tied and self.model.lora is None:  # the head's share of the weight that the embedding owns
            owned = 0 if head is None else head.gradient.numel()
            shared = self.store[f"grad/{self.model.num_layers - 1}"][owned:]
            (name,) = self.model.tied_keys
            first = self.layers[0]
            assert first is not None
            gradient = first.parameters[name].grad
            assert gradient is not None
            gradient.add_(shared.view_as(gradient))
            shared.zero_()
        squares = sum(shard.squared_norm() for shard in self.layers if shard is not None)
        self._told("norm", (step, math.sqrt(squares) / max(1, tokens)))

    @torch.no_grad()
    def _update(self, step: int, scale: float, lr: float) -> None:
        source = "param"
        if self.behind:  # the iteration under way reads the other side
            source = f"read{(self.updates + 1) % 2}"
        for layer, shard in enumerate(self.layers):
            if shard is not None:
                shard.apply(scale, lr)
            if self.behind:
                for key in self.model.trainable(layer):
                    self.store[f"{source}/{key}"].copy_(self.store[f"param/{key}"])
                self.store[f"version/{source}"][layer] = self.updates + 1
            self.store["version/param"][layer] = self.updates + 1
            self._told("updated", (step, layer))
        self.updates += 1

    @torch.no_grad()
    def _drop(self) -> None:
        for layer in range(self.model.num_layers):
            self.store[f"grad/{layer}"].zero_()
