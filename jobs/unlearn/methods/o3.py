"""O3 (Gao et al., "On Large Language Model Continual Unlearning", ICLR 2025, arXiv 2407.10223): an adapter
that has learned noise in place of the answers, orthogonal to earlier ones, and a router that says when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from jobs.unlearn.method import FORGET, Method, State, cross_entropy, tokens
from jobs.unlearn.methods.forget_retain import WEIGHT
from pipeline.runtime.batch import IGNORED
from pipeline.settings import Within

_MIX = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_MASK = (1 << 31) - 1


def random_labels(labels: Tensor, vocabulary: int, seed: int) -> Tensor:
    """A token of the vocabulary in place of each label [batch, sequence], by (seed, label, position) alone: the same
    on every worker and at every step. IGNORED stays."""
    positions = torch.arange(labels.shape[1], device=labels.device)
    mixed = (labels * _MIX[0] + positions * _MIX[1] + seed % _MASK * _MIX[2]) & _MASK
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & _MASK
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & _MASK
    return torch.where(labels == IGNORED, IGNORED, (mixed ^ (mixed >> 15)) % vocabulary)


@dataclass(frozen=True)
class O3(Method):
    """Minimises CE(F, random labels) + orthogonality sum_j |A_j A^T|^2 over an adapter (A, B) alone, which begins as
    that of the request before; A_j are those of all earlier requests. Our reading: the labels are drawn once, and the
    second term's gradient is added where the first one is applied, after clipping.

    When the model is used, a linear layer of a block gives W x + w scale B A x, where w is the largest that a router of
    any request says of the question, 0 for most. Our router compares the hidden states of the question in the model
    itself with those of the rows to forget, in place of another model and thresholds for each data set. The weights of
    the model do not change, so this suppresses, and forgets nothing: what comes out is a guarded model.
    """

    name = "o3"
    goal = "suppression"
    kinds = (FORGET,)

    orthogonality: Annotated[float, WEIGHT] = 0.1
    """Weight of the term that keeps the adapter apart from earlier ones."""
    strength: Annotated[float, WEIGHT] = 1.2
    """w where the router says that a question is about what is to be forgotten."""
    control_seed: Annotated[int, Within(-(2**63), 2**63 - 1)] = 0
    """The random labels are keyed by it."""

    def terms(self, state: State) -> Mapping[str, float]:
        """See Method."""
        return {FORGET: 1.0}

    def counts(self, kind: str, labels: Tensor) -> Mapping[str, int]:
        """See Method."""
        return {kind: tokens(labels)}

    def loss(self, kind: str, output: Tensor, labels: Tensor, before: Tensor | None) -> Mapping[str, Tensor]:
        """See Method."""
        return {kind: cross_entropy(output, random_labels(labels, output.shape[-1], self.control_seed))}
