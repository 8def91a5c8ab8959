"""1F1B with the head beside the embedding on the first worker, as tied weights, CheckFree and SkipPipe want it.

A microbatch comes home to the first worker for its loss. The other workers run 1F1B with one microbatch more in flight,
which covers that round trip. The first worker takes turns: head forward and backward, so that the last worker never
waits for long, then an older embedding backward, then a newer embedding forward. Where the first worker's spans
together take as long as any other worker's, the bubble is at most the (p-1)/(m+p-1) of 1F1B on as many workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.schedule.ops import B, F, Op, Schedule, Span
from schedulers.chain import chain


def head_with_embedding(
    spans: Sequence[Span], microbatches: int, replicas: int = 1, *, evaluate: bool = False
) -> Schedule:
    """Worker i of a replica holds spans[i], the first also spans[-1], the head; `evaluate` leaves the backwards out.

    Raises ValueError for fewer than 2 spans or sizes below 1.
    """
    if len(spans) < 2:
        raise ValueError(f"spans: {len(spans)}; allowed: 2 or more, the last of them the head's")
    stages = len(spans) - 1
    ahead = stages if evaluate else stages // 2 + 1
    behind = 2 * stages // 3 + 1  # turns until the gradient of a head's microbatch is back at the embedding

    def first(mine: Sequence[int]) -> Iterator[Op]:
        for m in mine[:ahead]:
            yield Op(F, spans[0], m)
        for k in range(len(mine) + behind):
            if k < len(mine):
                yield Op(F, spans[-1], mine[k])
                if not evaluate:
                    yield Op(B, spans[-1], mine[k])
            if k >= behind and not evaluate:
                yield Op(B, spans[0], mine[k - behind])
            if ahead + k < len(mine):
                yield Op(F, spans[0], mine[ahead + k])

    def lane(stage: int, mine: Sequence[int]) -> Iterator[Op]:
        if stage == 0:
            yield from first(mine)
            return
        warm = len(mine) if evaluate else min(len(mine), stages - stage)
        for m in mine[:warm]:
            yield Op(F, spans[stage], m)
        for k in range(0 if evaluate else len(mine)):
            if warm + k < len(mine):
                yield Op(F, spans[stage], mine[warm + k])
            yield Op(B, spans[stage], mine[k])

    return chain("head_with_embedding", spans, microbatches, replicas, lane, stages=stages, backward=not evaluate)
