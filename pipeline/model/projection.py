"""Projections of hidden states (MRP): what a decoder block gives loses some directions, and these alone are trained.

A block's output h becomes h - (h Q) Q^T, where the columns of Q are an orthonormal basis of the rows of `kept` (those
of earlier requests, which stay) and of `weight` (which are learned). No weight of the model changes, so nothing can be
merged: a projection lies beside the weights, and whoever uses them without it has the model as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    `kept` has the directions of earlier requests, by the path of a block."""

    directions: int = 2
    count: int = 2
    seed: int = 0
    kept: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    def blocks(self, paths: list[str]) -> list[str]:
        """Those of the paths of a model's blocks that are projected. Raises ModelError for fewer blocks than that, and
        where earlier requests have projected blocks that are not there."""
        if missing := sorted(set(self.kept) - set(paths)):
            raise ModelError(f"an earlier request has projected {', '.join(missing)}; the model has no such block")
        if self.kept:
            return [path for path in paths if path in self.kept]
        if self.count > len(paths):
            raise ModelError(f"projected is {self.count}; the model has {len(paths)} blocks, so 1 to {len(paths)}")
        return sorted(
            sorted(paths, key=lambda path: derive(self.seed, "projected", path))[: self.count], key=paths.index
        )

    def adapt(self, block: nn.Module, path: str, hidden: int) -> None:
        """Have a block, built or on the meta device, project what it gives; the weight has no values yet."""
        kept = self.kept.get(path, torch.zeros(0, hidden))
        block.add_module("projection", Projection(torch.empty(self.directions, hidden, device="meta"), kept))
        block.register_forward_hook(_projected)


def first_directions(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random directions of about unit length, from (seed, name) alone."""
    made = torch.Generator().manual_seed(derive(seed, "projection", name))
    return torch.randn(shape, generator=made) / math.sqrt(shape[-1])
