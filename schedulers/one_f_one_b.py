"""1F1B: after a warm-up, one forward and one backward in turn, so that a stage holds at most p - i activations.

Source: Narayanan et al., "PipeDream", 2019 (arXiv 1806.03377), in its flushing form (Megatron-LM, arXiv 2104.04473).
Bubble (p-1)/(m+p-1), as GPipe's; it trades nothing for its smaller memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.schedule.ops import B, F, Op, Schedule, Span
from schedulers.chain import chain


def one_f_one_b(spans: Sequence[Span], microbatches: int, replicas: int = 1) -> Schedule:
    """One span per stage, in the order of `spans`. Raises ValueError for sizes below 1."""
    last = len(spans) - 1

    def lane(stage: int, mine: Sequence[int]) -> Iterator[Op]:
        span = spans[stage]
        warm = min(last - stage, len(mine))
        for m in mine[:warm]:
            yield Op(F, span, m)
        for m, back in zip(mine[warm:], mine, strict=False):
            yield Op(F, span, m)
            yield Op(B, span, back)
        for m in mine[len(mine) - warm :]:
            yield Op(B, span, m)

    return chain("one_f_one_b", spans, microbatches, replicas, lane)
