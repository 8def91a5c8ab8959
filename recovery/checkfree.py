"""CheckFree (arXiv 2506.15461, section 4.2): a lost stage becomes the weighted mean of its neighbours, layer by layer.

W_i = (w- W_{i-1} + w+ W_{i+1}) / (w- + w+), where w is the norm of the neighbour's last gradient, before clipping (the
reference takes it after, which makes both weights equal whenever clipping acts). Optimizer moments start anew and the
learning rate of the stage is 1.1 times what the schedule says, unless the settings say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.settings import Within
from recovery.membership import Move
from recovery.remedy import CannotRestore, Carries, Loss, State

WEIGHTS = ("norm", "norm_squared", "uniform")
LR_SCALE = 1.1
_TINY = 1e-4  # keeps weights apart from 0, as the reference does


@dataclass(frozen=True)
class CheckFreeSettings:
    """Read by the remedies that make a stage of its neighbours' weights, or of new ones."""

    checkfree_weights: Literal["norm", "norm_squared", "uniform"] = "norm"
    """How both neighbours are weighed: by their gradient norms, the squares of these, or alike."""
    checkfree_moments: Literal["new", "averaged"] = "new"
    """The optimizer's moments of a stage that checkfree has rebuilt: begun anew, or averaged as its weights are."""
    checkfree_lr_scale: Annotated[float, Within(0, 100, above=True)] = LR_SCALE
    """What the learning rate of a stage is multiplied by once checkfree, checkfree+, copy, copy-after, identity or
    random has rebuilt it."""


class Average:
    """The mean of both neighbours. `weights` is one of WEIGHTS; `moments`: of the optimizer's moments as well."""

    name = "checkfree"

    def __init__(self, weights: str = "norm", lr_scale: float = LR_SCALE, moments: bool = False) -> None:
        self.weights, self.lr_scale = weights, lr_scale
        self.carries: Carries = "moments" if moments else "weights"

    def plan(self, loss: Loss) -> Move:
        """From the spans before and after. Neither may be lost, and both must consist of the same kind of layer."""
        name = loss.name
        if not loss.blocks:
            raise CannotRestore(f"{name} holds the embedding or the head, which no neighbour resembles")
        sources = loss.neighbours()
        for side, (_, (lo, hi)) in zip(("before", "after"), sources, strict=True):
            if not any(0 < layer < loss.num_layers - 1 for layer in range(lo, hi)):
                raise CannotRestore(f"the neighbour {side} {name}, {lo}:{hi}, holds no decoder block")
        return loss.restored(self.name, *sources)

    def combine(self, states: Sequence[State], norms: Sequence[float]) -> State | None:
        """The weighted mean of all that came."""
        power = {"norm": 1, "norm_squared": 2, "uniform": 0}[self.weights]
        raw = [(norm + _TINY) ** power for norm in norms]
        shares = [weight / sum(raw) for weight in raw]
        return {key: sum(s * state[key] for s, state in zip(shares, states, strict=True)) for key in states[0]}  # type: ignore[misc]
