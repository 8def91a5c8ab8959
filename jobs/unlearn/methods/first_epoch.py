"""First-epoch gradients (abstract of arXiv 2406.09391): what a row first taught is taken back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from jobs.unlearn.method import Goal, Method, State
from pipeline.settings import Within


@dataclass(frozen=True)
class FirstEpoch(Method):
    """theta <- theta + eta sum over the steps of the first epoch of g, where g is the gradient that the rows to forget
    had there, at the weights as they were, as a share of the step's loss; of the embedding alone, or of all weights.

    Our reading, of an abstract: nothing is stored while a run trains. The first epoch is run again, bitwise, from the
    start of the run (`unbroken replay`), and its steps tell what the rows' part of each gradient was. So any run can be
    asked, at the price of one epoch. It has no steps of its own.
    """

    name: ClassVar[str] = "first_epoch"
    goal: ClassVar[Goal] = "untraining"
    kinds: ClassVar[tuple[str, ...]] = ()

    eta: Annotated[float, Within(0, 1_000_000)] = 1.0
    """How much of these gradients is added."""
    layers: Literal["embedding", "all"] = "embedding"
    """Of which weights."""

    def terms(self, state: State) -> Mapping[str, float]:
        """None."""
        return {}
