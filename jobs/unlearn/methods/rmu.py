"""Representation misdirection (RMU; Li et al., "The WMDP Benchmark", arXiv 2403.03218): at one layer, hidden
states of what is to be forgotten are steered to one random vector, and those of the rest held where they were. Only
the blocks up to that layer are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from jobs.unlearn.method import FORGET, RETAIN, Method, Reads, State, rows
from jobs.unlearn.methods.forget_retain import WEIGHT
from jobs.unlearn.methods.positions import Positions, counted
from pipeline.settings import Within


def control_vector(dim: int, seed: int) -> Tensor:
    """u = rand(dim) / |rand(dim)|, fp32 on the host: the same on every worker and at every step."""
    drawn = torch.rand(dim, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def distance(hidden: Tensor, target: Tensor, where: Tensor) -> Tensor:
    """The mean square of hidden - target over a row's positions `where` [batch, sequence], summed over rows, fp32.
    `hidden` is [batch, sequence, hidden]; a row without a position is 0. A scalar.

    Every row's sum is divided by its own number of positions. OpenUnlearning's (batch,) / (batch, 1) divides every sum
    by every number, which is the same only where all are alike.
    """
    off = torch.where(where[..., None], hidden.float() - target, 0.0).square().mean(dim=-1)
    return (off.sum(dim=1) / where.sum(dim=1).clamp(min=1)).sum()


@dataclass(frozen=True)
class RMU(Method):
    """Minimises MSE(h(F), steering u) + alpha MSE(h(R), h before(R)), means over a row's positions, then over rows; h
    is the output of decoder block `layer`, u a unit vector.

    Labels stand beside the position that predicts them, so the answer's positions are one to the left of those that
    hold it, which OpenUnlearning takes. Defaults are its own for TOFU; the paper has steering 6.5 and alpha 1200 for
    Zephyr-7B. Which weights are trained is not the method's to say.
    """

    name = "rmu"
    goal = "concept removal"
    kinds = (FORGET, RETAIN)
    steered: ClassVar[tuple[str, ...]] = (FORGET,)
    """The kinds whose hidden states go to u; those of the others stay."""

    layer: Annotated[int, Within(0, 1023)] = 7
    """The decoder block whose output is steered, from 0."""
    steering: Annotated[float, WEIGHT] = 2.0
    """The length of the vector that hidden states are steered to."""
    alpha: Annotated[float, WEIGHT] = 1.0
    """Weight of the term that keeps the rest."""
    positions: Positions = "answer"
    """Where hidden states are compared."""
    control_seed: Annotated[int, Within(-(2**63), 2**63 - 1)] = 0
    """The direction of u is keyed by it."""

    def reads(self, kind: str) -> Reads:
        """See Method."""
        return Reads.NOTHING if kind in self.steered else Reads.HIDDEN

    @property
    def depth(self) -> int:
        """See Method."""
        return self.layer + 1

    def terms(self, state: State) -> Mapping[str, float]:
        """See Method."""
        return {FORGET: 1.0, RETAIN: self.alpha}

    def counts(self, kind: str, labels: Tensor) -> Mapping[str, int]:
        """See Method."""
        return {kind: rows(labels)}

    def loss(self, kind: str, output: Tensor, labels: Tensor, before: Tensor | None) -> Mapping[str, Tensor]:
        """See Method."""
        if kind in self.steered:
            target = self.steering * control_vector(output.shape[-1], self.control_seed).to(output.device)
        else:
            assert before is not None
            target = before.detach().float()
        return {kind: distance(output, target, counted(labels, self.positions))}
