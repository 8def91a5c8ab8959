"""Exact: a surviving holder of the same span, or of a copy kept for this purpose, sends weights and moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from recovery.membership import Restore
from recovery.remedy import CannotRestore, Loss, State


class Replica:
    """The state of a replica, bit for bit."""

    name = "replica"
    carries: Literal["state", "weights"] = "state"
    lr_scale = 1.0

    def plan(self, loss: Loss) -> Restore:
        """From the lowest holder that is left."""
        if not loss.copies:
            raise CannotRestore(f"no other worker holds span {loss.span[0]}:{loss.span[1]}")
        return Restore(loss.joiner, loss.span, self.name, ((loss.copies[0], loss.span),))

    def combine(self, states: Sequence[State], norms: Sequence[float]) -> State:
        """The one state that came."""
        return states[0]
