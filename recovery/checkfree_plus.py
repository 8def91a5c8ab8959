"""CheckFree+ (arXiv 2506.15461, section 4.3): the first or last block stage becomes a copy of its twin.

Routes of half of the microbatches change the order of two stages, so each has learned the other's work as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.schedule.ops import Span
from recovery.checkfree import Average
from recovery.membership import Move
from recovery.remedy import CannotRestore, Loss, State


class Twin(Average):
    """A copy of the stage that a lost one changes places with."""

    name = "checkfree+"

    def plan(self, loss: Loss) -> Move:
        """From the twin, where a mean is not to be had."""
        if loss.twin is None:
            raise CannotRestore(f"{loss.name} has no twin that is left")
        inner = all(found is not None and found[1][0] > 0 and found[1][1] < loss.num_layers for found in _sides(loss))
        if inner:
            raise CannotRestore(f"{loss.name} is neither the first nor the last of the blocks")
        return loss.restored(self.name, loss.twin)

    def combine(self, states: Sequence[State], norms: Sequence[float]) -> State | None:
        """The twin's weights."""
        return states[0]


def _sides(loss: Loss) -> tuple[tuple[int, Span] | None, ...]:
    return loss.before, loss.after
