"""Reasoning-aware representation misdirection (R2MU; Wang et al., arXiv 2506.12963; the authors' code): RMU that also
steers the traces a reasoning model writes about what is to be forgotten, and holds its reasoning on other problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from jobs.unlearn.method import ANCHOR, FORGET, RETAIN, TRACE, State
from jobs.unlearn.methods.forget_retain import WEIGHT
from jobs.unlearn.methods.positions import Positions
from jobs.unlearn.methods.rmu import RMU


@dataclass(frozen=True)
class R2MU(RMU):
    """Minimises MSE(h(F), steering u) + alpha MSE(h(R), h before(R)) + MSE(h(T), steering u) + anchor_weight MSE(h(A),
    h before(A)): T are traces, A worked solutions. As in the code, the last weight is that of the anchor, not of the
    trace, and all positions count, padding too."""

    name = "r2mu"
    kinds = (FORGET, RETAIN, TRACE, ANCHOR)
    steered = (FORGET, TRACE)

    steering: Annotated[float, WEIGHT] = 6.5
    """The length of the vector that hidden states are steered to."""
    alpha: Annotated[float, WEIGHT] = 1.7
    """Weight of the term that keeps the rest."""
    positions: Positions = "all"
    """Where hidden states are compared."""
    anchor_weight: Annotated[float, WEIGHT] = 1.0
    """Weight of the term that keeps reasoning."""

    def terms(self, state: State) -> Mapping[str, float]:
        """See Method."""
        return {FORGET: 1.0, RETAIN: self.alpha, TRACE: 1.0, ANCHOR: self.anchor_weight}
