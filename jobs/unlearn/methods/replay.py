"""Exact unlearning: the run is run again without the rows, from the newest checkpoint that never saw them.

Ours; compare Unlearning at Scale (arXiv 2508.12220), which replays a log of microbatches. Samples keep their places, a
row to forget is blank in its own, and what is committed is bitwise the run that never had it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jobs.unlearn.method import Goal, Method, State


@dataclass(frozen=True)
class Replay(Method):
    """No steps of its own: nothing is minimised but what the run minimised."""

    name: ClassVar[str] = "replay"
    goal: ClassVar[Goal] = "untraining"
    kinds: ClassVar[tuple[str, ...]] = ()

    def terms(self, state: State) -> Mapping[str, float]:
        """None."""
        return {}
