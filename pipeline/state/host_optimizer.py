"""The optimizer beside the pipeline: a thread of the host that sums gradient blocks and applies them, layer by layer.

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

from pipeline.model.layered import NamedState
from pipeline.schedule.ops import Span
from pipeline.state.host_store import HostStore
from pipeline.state.layer_state import LayerState, LayerStates
from pipeline.state.masks import read_masks
from pipeline.state.optimizer import OptimizerConfig, clip_factor

log = logging.getLogger(__name__)

Told = Callable[[str, Any], None]
"""(what, about): "added" a block number, "norms" (step, state -> norm), "updated" (step, layer), "failed" an
exception."""


class HostOptimizer(LayerStates):
    """The weights, gradients and moments in a host store, and the thread that changes them.

    `told` is called on that thread. Whatever else reads the state calls `drain` first.
    """

    def __init__(self, store: HostStore, config: OptimizerConfig, told: Told, masks: Path | None = None) -> None:
        """`masks` is a folder that says what is updated; without one, all is."""
        super().__init__(store.layout.model)
        self._masks = masks
        self.store, self.config, self.behind = store, config, store.layout.behind
        self._told = told
        self.states = {spec.name: self._state(spec) for spec in self.model.states}
        self.updates = 0
        self._jobs: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="optimizer", daemon=True)
        self._thread.start()

    def _state(self, spec: NamedState) -> LayerState:
        """A state where it lies in the store; its gradient is a piece of the flat one of its owner."""
        shapes, names = self.model.shapes(spec.owner), list(self.model.differentiated(spec.owner))
        trained, frozen = spec.keys[: spec.trained], spec.keys[spec.trained :]
        first = names.index(trained[0]) if trained else 0
        assert tuple(names[first : first + len(trained)]) == trained, f"state {spec.name} is not in one piece"
        block = spec.owner in self.model.blocks
        kept = {key: self.config.kinds(len(shapes[key]), block) for key in trained}
        at, end = (sum(math.prod(shapes[n]) for n in names[:place]) for place in (first, first + len(trained)))
        state = LayerState(
            spec.name, {key: nn.Parameter(self.store[f"param/{key}"]) for key in trained}, self.config,
            frozen={key: self.store[f"param/{key}"] for key in frozen},
            gradient=self.store[f"grad/{spec.owner}"][at:end],
            moments={key: {k: self.store[f"{k}/{key}"] for k in kinds if k != "step"} for key, kinds in kept.items()},
            masks=None if self._masks is None else read_masks(self._masks, spec), block=block,
        )  # fmt: skip
        state.pull = None if self.model.lora is None else self.model.lora.pull
        return state

    # ---- state ----

    @torch.no_grad()
    def initialise(self, seed: int, source: Path | None) -> None:
        """Fill the weights, one layer at a time, with what every worker of another scheduler would begin with."""
        for layer in range(self.model.num_layers):
            module = self.model.build((layer, layer + 1), seed=seed, source=source)
            for name, parameter in module.named_layer_parameters(layer).items():
                if name in self.model.keys(layer):
                    self.store[f"param/{name}"].copy_(parameter)
            self._publish(layer, 0, {})

    @torch.no_grad()
    def _publish(self, layer: int, updates: int, read: Mapping[str, Tensor]) -> None:
        """A layer's weights are there, after so many updates; `read` are those of the update before, if they differ."""
        self.updates = updates
        self.store["version/param"][layer] = updates
        for key in self.model.keys(layer):
            self.store.publish("param", key, self.store[f"param/{key}"])
        for side in (0, 1) if self.behind else ():
            behind = (updates + side) % 2 == 1  # the side that the iteration to come reads
            for key in self.model.trainable(layer):
                given = read.get(key) if behind else None
                self.store.publish(f"read{side}", key, self.store[f"param/{key}"] if given is None else given)
            self.store[f"version/read{side}"][layer] = max(0, updates - 1) if behind else updates

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """See LayerStates; under an optimizer that is behind also `read/NAME`, what is read next."""
        side = (self.updates + 1) % 2
        keys = self.model.trainable(layer) if self.behind else ()
        read = {f"read/{key}": self.store.read(f"read{side}", key) for key in keys}
        return super().tensors(layer) | read

    def load(self, layer: int, tensors: Mapping[str, Tensor], step: int, generation: int) -> None:
        """See LayerStates: from this or another scheduler's checkpoint."""
        super().load(layer, tensors, step, generation)
        read = {key.removeprefix("read/"): tensor for key, tensor in tensors.items() if key.startswith("read/")}
        self._publish(layer, step, read)

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

    def measure(self, step: int) -> None:
        """Tell the norms of the summed gradient."""
        self._jobs.put((self._measure, (step,)))

    def update(self, step: int, norm: float, lr: float) -> None:
        """Apply the summed gradient, clipped by its norm."""
        self._jobs.put((self._update, (step, clip_factor(norm, self.config.clip), lr)))

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
    def _measure(self, step: int) -> None:
        for spec in self.model.states:
            if spec.shared and spec.trained:  # the shares of its other users, which stand last among their gradients
                state = self.states[spec.name]
                for user in spec.users[1:]:
                    share = self.store[f"grad/{user}"][-state.size :]
                    state.gradient.add_(share)
                    share.zero_()
        norms = {name: float(state.norm()) for name, state in self.states.items()}
        self._told("norms", (step, norms))

    @torch.no_grad()
    def _update(self, step: int, scale: float, lr: float) -> None:
        source = "param"
        if self.behind:  # the iteration under way reads the other side
            source = f"read{(self.updates + 1) % 2}"
        for layer in range(self.model.num_layers):
            for state in self.owned(layer):
                state.apply(scale, lr)
            for key in self.model.trainable(layer):
                for kind in {"param", source}:
                    self.store.publish(kind, key, self.store[f"param/{key}"])
            if self.behind:
                self.store[f"version/{source}"][layer] = self.updates + 1
            self.store["version/param"][layer] = self.updates + 1
            self._told("updated", (step, layer))
        self.updates += 1

    @torch.no_grad()
    def _drop(self) -> None:
        for layer in range(self.model.num_layers):
            self.store[f"grad/{layer}"].zero_()
