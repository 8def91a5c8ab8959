"""What a stateless worker has at hand: its orders, the weights that are loaded for them, the gradient of the one that
runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pipeline.model.layered import SpanModule
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
    """Where the gradients of the order at hand are summed: `views` [(parameter, its part of `flat`)] are the
    parameters' .grad as long as the order runs, and `block` [as `flat`] is what the host will read."""

    flat: Tensor
    block: Tensor
    tally: Tensor
    views: list[tuple[nn.Parameter, Tensor]]

    def add(self, m: int) -> None:
        """Note that a microbatch was added. Raises RuntimeError where autograd has added it elsewhere."""
        for parameter, view in self.views:
            if parameter.grad is None or parameter.grad.data_ptr() != view.data_ptr():
                raise RuntimeError(f"the gradient of microbatch {m} was not summed where it counts")
        self.tally[1 + m] += 1
