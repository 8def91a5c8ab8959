"""GPipe: all forwards, then all backwards. Simple; holds the activations of every microbatch.

Source: Huang et al., "GPipe", 2019 (arXiv 1811.06965). Bubble (p-1)/(m+p-1) for p stages and m microbatches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.schedule.ops import B, F, Op, Schedule, Span
from schedulers.chain import chain


def gpipe(spans: Sequence[Span], microbatches: int, replicas: int = 1) -> Schedule:
    """One span per stage, in the order of `spans`. Raises ValueError for sizes below 1."""

    def lane(stage: int, mine: Sequence[int]) -> Iterator[Op]:
        for kind in (F, B):
            for m in mine:
                yield Op(kind, spans[stage], m)

    return chain("gpipe", spans, microbatches, replicas, lane)
