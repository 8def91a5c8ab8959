"""Exact: a surviving holder of the same part, or of a copy kept for this purpose, sends weights and moments."""

from __future__ import annotations

from collections.abc import Sequence

from recovery.membership import Move
from recovery.remedy import CannotRestore, Carries, Loss, State


class Replica:
    """The state of a replica, bit for bit."""

    name = "replica"
    carries: Carries = "state"
    lr_scale = 1.0

    def plan(self, loss: Loss) -> Move:
        """From the lowest holder that is left."""
        if not loss.copies:
            raise CannotRestore(f"no other worker holds {loss.name}")
        return Move(loss.joiner, loss.part, self.name, ((loss.copies[0], loss.part),))

    def combine(self, states: Sequence[State], norms: Sequence[float]) -> State:
        """The one state that came."""
        return states[0]
