"""What CheckFree is compared with: the weights of one neighbour, and new ones."""

from __future__ import annotations

from collections.abc import Sequence

from recovery.checkfree import Average
from recovery.membership import Move
from recovery.remedy import CannotRestore, Loss, State


class Copy(Average):
    """The weights of one neighbour: the one before, or, if that cannot be, the one after."""

    name = "copy"

    def plan(self, loss: Loss) -> Move:
        """From the neighbour whose layers are decoder blocks."""
        name = loss.name
        if not loss.blocks:
            raise CannotRestore(f"{name} holds the embedding or the head, which no neighbour resembles")
        for found in (loss.before, loss.after):
            if found is not None and any(0 < layer < loss.num_layers - 1 for layer in range(*found[1])):
                return loss.restored(self.name, found)
        raise CannotRestore(f"neither neighbour of {name} is left with a decoder block")

    def combine(self, states: Sequence[State], norms: Sequence[float]) -> State | None:
        """That neighbour's weights."""
        return states[0]


class Random(Average):
    """New weights from the seed, as at the start of the run."""

    name = "random"

    def plan(self, loss: Loss) -> Move:
        """Needs nobody."""
        return loss.restored(self.name)

    def combine(self, states: Sequence[State], norms: Sequence[float]) -> None:
        """As it was drawn."""
        return
