"""What a stateless worker has at hand: its orders, the weights that are loaded for them, the gradient of the one that
runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.span_module import SpanModule
from pipeline.runtime.copy_engine import Ticket
from pipeline.schedule.ops import Span


@dataclass
class Order:
    """A unit as it was given to this worker. `skip` are the microbatches whose results others have made already."""

    id: int
    run: int
    step: int
    job: str
    kinds: tuple[str, ...]
    span: Span
    microbatches: tuple[int, ...]
    source: str
    side: int
    block: int
    skip: frozenset[int]
    weights: Mapping[str, float] | None
    """Term -> its weight in this step, if that follows from the steps before, which the host alone knows."""
    told: Mapping[str, Any] | None = None
    """What a ToldJob is to hear first."""
    loaded: Loaded | None = None
    events: list[tuple[str, float, float]] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Order:
        return cls(
            values["id"], values["run"], values["step"], values["job"], tuple(values["kinds"]), tuple(values["span"]),
            tuple(values["microbatches"]), values["source"], values["side"], values["block"], frozenset(values["skip"]),
            values.get("weights"), values.get("told"),
        )  # fmt: skip


@dataclass
class Loaded:
    """A span's weights in one of the worker's two buffers."""

    buffer: int
    module: SpanModule
    parameters: dict[int, dict[str, nn.Parameter]]
    ticket: Ticket
    version: int
    """How many updates the weights have seen."""
    users: int = 1


@dataclass
class Gradient:
    """Where the gradients of the order at hand are summed, in fp32: in `flat`, the parts of which are the parameters'
    .grad as long as the order runs. `block` [as `flat`] is what the host will read."""

    flat: Tensor
    block: Tensor
    tally: Tensor
    views: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=list)

    def take(self, parameter: nn.Parameter, view: Tensor) -> None:
        """Have the gradient of a parameter summed in a part of `flat`. That of a narrow one is narrow itself: it is
        added as soon as autograd has it, as autocast would from a narrow copy of a wide one."""
        self.views.append((parameter, view))
        if parameter.dtype == view.dtype:
            parameter.grad = view
        else:
            self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(_add, view)))

    def let_go(self) -> None:
        """The parameters have nothing to do with it any more."""
        for hook in self._hooks:
            hook.remove()
        for parameter, _ in self.views:
            parameter.grad = None

    def add(self, m: int) -> None:
        """Note that a microbatch was added. Raises RuntimeError where autograd has added it elsewhere."""
        for parameter, view in self.views:
            found, narrow = parameter.grad, parameter.dtype != view.dtype
            if found is not None if narrow else found is None or found.data_ptr() != view.data_ptr():
                raise RuntimeError(f"the gradient of microbatch {m} was not summed where it counts")
        self.tally[1 + m] += 1


@torch.no_grad()
def _add(view: Tensor, parameter: Tensor) -> None:
    if parameter.grad is not None:
        view.add_(parameter.grad)
        parameter.grad = None
