"""ZB-H1: the backward split in two. Only the input gradient is urgent; weight gradients fill what would be bubbles.

Stage i delays its weight gradients by i microbatches: the later the stage, the fewer forwards it holds, so the more
it can put off within the memory of 1F1B's first stage. Source: Qi et al., "Zero Bubble Pipeline Parallelism", 2023
(arXiv 2401.10241), section 2.2. With forward, input and weight gradient of one length the bubble is
(p-1)/(3m+p-1) for m >= p, a third of 1F1B's idle time, and no stage holds more than p activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.schedule.ops import F, I, Op, Schedule, Span, W
from schedulers.chain import chain


def zero_bubble(spans: Sequence[Span], microbatches: int, replicas: int = 1) -> Schedule:
    """One span per stage, in the order of `spans`. Raises ValueError for sizes below 1."""
    last = len(spans) - 1

    def lane(stage: int, mine: Sequence[int]) -> Iterator[Op]:
        span = spans[stage]
        warm = min(last - stage, len(mine))
        for m in mine[:warm]:
            yield Op(F, span, m)
        for k, m in enumerate(mine):
            if warm + k < len(mine):
                yield Op(F, span, mine[warm + k])
            yield Op(I, span, m)
            if k >= stage:
                yield Op(W, span, mine[k - stage])
        for m in mine[max(0, len(mine) - stage) :]:
            yield Op(W, span, m)

    return chain("zero_bubble", spans, microbatches, replicas, lane)
