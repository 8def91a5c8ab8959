"""Forward only: held-out loss over the same workers and spans as training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.schedule.ops import F, Op, Schedule, Span
from schedulers.chain import chain
from schedulers.interleaved import by_rounds


def evaluation(spans: Sequence[Span], microbatches: int, replicas: int = 1, *, stages: int | None = None) -> Schedule:
    """Worker i of a replica holds spans i, i + stages, ...; `stages` is the number of spans unless given.

    Raises ValueError for sizes below 1 and where `stages` does not divide the number of spans.
    """
    stages = len(spans) if stages is None else stages
    if stages < 1 or len(spans) % stages:
        raise ValueError(f"stages: {stages} for {len(spans)} spans; allowed: a divisor of the number of spans")

    def lane(stage: int, mine: Sequence[int]) -> Iterator[Op]:
        return (Op(F, span, m) for span, m in by_rounds(spans[stage::stages], mine, stages))

    return chain("evaluation", spans, microbatches, replicas, lane, stages=stages, backward=False)
