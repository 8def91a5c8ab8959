"""Projections of hidden states (MRP): what a decoder block gives loses some directions, and these alone are trained.

A block's output h becomes h - (h Q) Q^T, where the columns of Q are an orthonormal basis of the rows of `kept` (those
of earlier requests, which stay) and of `weight` (which are learned). No weight of the model changes, so nothing can be
merged: a projection lies beside the weights, and whoever uses them without it has the model as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.rng import derive
from pipeline.model.weights import ModelError

PROJECTION = ".projection.weight"
"""How the full name of a projection's parameter ends."""


def project(hidden: Tensor, directions: Tensor) -> Tensor:
    """`hidden` [..., hidden] without what lies in the span of the rows of `directions` [rows, hidden]. The rows must be
    independent: QR of a zero row would take away a direction that nobody has asked for."""
    basis = torch.linalg.qr(directions.float().T).Q
    return (hidden - (hidden.float() @ basis) @ basis.T).to(hidden.dtype)


class Projection(nn.Module):
    """What is taken from a block's output: `weight` [directions, hidden] and the buffer `kept` [earlier, hidden]."""

    def __init__(self, weight: Tensor, kept: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Raises nothing: shapes are those of the block."""
        return project(hidden, torch.cat([self.get_buffer("kept").to(hidden.device), self.weight]))


def _projected(block: nn.Module, _: Any, output: Any) -> Any:
    """The hook of a block: its output, a tensor or a tuple that begins with it, projected."""
    module = block.get_submodule("projection")
    return (module(output[0]), *output[1:]) if isinstance(output, tuple) else module(output)


@dataclass(frozen=True)
class Projections:
    """Which blocks of a model are projected: `count` of them, drawn by `seed`, or those of `kept` where there are any.
    `kept` has the directions of earlier requests, [earlier, hidden], by the number of a block; `digest` is a hash of
    them."""

    directions: int = 2
    count: int = 2
    seed: int = 0
    kept: Mapping[int, Tensor] = field(default_factory=dict, compare=False)
    digest: str = ""

    @property
    def about(self) -> str:
        """For a person."""
        return f"projections of {self.count} blocks by {self.directions} directions"

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with (JSON)."""
        return {name: getattr(self, name) for name in ("directions", "count", "seed", "digest")}

    def within(self, count: int) -> list[int]:
        """The projected ones of so many blocks. Raises ModelError for fewer blocks than that, and where earlier
        requests have projected blocks that are not there."""
        if missing := sorted(each for each in self.kept if each >= count):
            raise ModelError(f"an earlier request has projected blocks {missing}; the model has {count}")
        if self.kept:
            return sorted(self.kept)
        if self.count > count:
            raise ModelError(f"projected is {self.count}; allowed: 1 to {count}, the model's blocks")
        return sorted(sorted(range(count), key=lambda block: derive(self.seed, "projected", block))[: self.count])

    def adapt(self, block: nn.Module, number: int, hidden: int) -> None:
        """Have a block, built or on the meta device, project what it gives; the weight has no values yet."""
        kept = self.kept.get(number, torch.zeros(0, hidden))
        block.add_module("projection", Projection(torch.empty(self.directions, hidden, device="meta"), kept))
        block.register_forward_hook(_projected)

    def first_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Random directions of about unit length, from (seed, name) alone."""
        made = torch.Generator().manual_seed(derive(seed, "projection", name))
        return torch.randn(shape, generator=made) / math.sqrt(shape[-1])

    def merged(self, tensors: Mapping[str, Tensor], module: Callable[[str], nn.Module]) -> dict[str, Tensor]:
        """Full name -> weight without the projections, which no weight can take in."""
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(PROJECTION)}

    def pull(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Nothing but the loss moves a projection."""
