"""What CheckFree is compared with: the weights of one neighbour, blocks that add nothing, and new weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.model.families import FAMILIES
from pipeline.schedule.ops import Span
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
        for found in self._sides(loss):
            if found is not None and any(0 < layer < loss.num_layers - 1 for layer in range(*found[1])):
                return loss.restored(self.name, found)
        raise CannotRestore(f"neither neighbour of {name} is left with a decoder block")

    def combine(self, states: Sequence[State], norms: Sequence[float]) -> State | None:
        """That neighbour's weights."""
        return states[0]

    def _sides(self, loss: Loss) -> tuple[tuple[int, Span] | None, ...]:
        return loss.before, loss.after


class CopyAfter(Copy):
    """The weights of the neighbour after, or, if that cannot be, of the one before."""

    name = "copy-after"

    def _sides(self, loss: Loss) -> tuple[tuple[int, Span] | None, ...]:
        return loss.after, loss.before


class Identity(Average):
    """The mean of both neighbours, but that its blocks add nothing to what goes in: their output projections are
    zero."""

    name = "identity"

    def combine(self, states: Sequence[State], norms: Sequence[float]) -> State | None:
        """The mean, and zeros."""
        mean = super().combine(states, norms)
        assert mean is not None
        return {key: torch.zeros_like(tensor) if _adds(key) else tensor for key, tensor in mean.items()}


_PATHS = {path for family in FAMILIES.values() for path in (family.out_of_attention, family.out_of_neurons)} - {None}
_ENDS = tuple(f".{path}.{kind}" for path in sorted(map(str, _PATHS)) for kind in ("weight", "bias"))


def _adds(key: str) -> bool:
    """Whether it is of what makes what a block adds, as a linear map or before a norm without a shift."""
    return key.endswith(_ENDS)


class Random(Average):
    """New weights from the seed, as at the start of the run."""

    name = "random"

    def plan(self, loss: Loss) -> Move:
        """Needs nobody."""
        return loss.restored(self.name)

    def combine(self, states: Sequence[State], norms: Sequence[float]) -> None:
        """As it was drawn."""
        return
