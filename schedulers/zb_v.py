"""ZB-V: two spans per worker, one on the way there and one on the way back, and weight gradients in the gaps.

Worker k of p holds spans k and 2p - 1 - k, so the first worker has both ends, and the fold, where a microbatch turns,
needs no message. The pipeline fills in half the time, and each worker holds as much: 2p activations of half a worker's
layers, which is what 1F1B's first worker holds. Source: Qi et al., "Zero Bubble Pipeline Parallelism", 2023 (arXiv
2401.10241), section 6, and "Pipeline Parallelism with Controllable Memory", 2024 (arXiv 2405.15362). With forward,
input and weight gradient of one length and at least 2p - 1 microbatches, no worker waits once it has begun.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from pipeline.schedule.ops import F, I, Op, Schedule, Span, W
from schedulers.chain import chain


def zb_v(spans: Sequence[Span], microbatches: int, replicas: int = 1) -> Schedule:
    """Two spans per worker. Raises ValueError for sizes below 1 and for an odd number of spans."""
    if len(spans) % 2:
        raise ValueError(f"spans: {len(spans)}; allowed: an even number, two per worker")
    stages = len(spans) // 2

    def lane(stage: int, mine: Sequence[int]) -> Iterator[Op]:
        there, back, whole = spans[stage], spans[-1 - stage], max(len(mine), 2 * stages - 1)
        left = stages - stage
        phases = (
            (2 * left - 1, ((F, there),)),
            (stage, ((F, back), (F, there))),
            (left, ((F, back), (I, back), (W, back))),
            (whole - stages, ((F, there), (I, there), (W, there), (F, back), (I, back), (W, back))),
            (stage, ((I, there), (I, back))),
            (left, ((I, there), (W, there))),
            (stage, ((W, back),)),
            (stage, ((W, there),)),
        )  # fmt: skip
        done = Counter[tuple[str, Span]]()
        for times, pattern in phases:
            for what in pattern * times:
                if done[what] < len(mine):  # a short step is a long one without the microbatches that it lacks
                    yield Op(*what, mine[done[what]])
                done[what] += 1

    return chain("zb_v", spans, microbatches, replicas, lane, stages=stages)
