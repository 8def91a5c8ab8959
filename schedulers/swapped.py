"""CheckFree+: for every other microbatch the first two and the last two block stages change places.

So S1 and S2, and S(s-1) and S(s), learn each other's work, and a lost first or last block stage can be a copy of its
twin (arXiv 2506.15461, section 4.3). The embedding and the head sit together on the first worker. Routes differ, so
the order comes from the list scheduler, whose limits keep the memory near that of 1F1B without letting two microbatches
lock each other out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.schedule.ops import Route, Schedule, Span
from pipeline.settings import RunShape, require
from schedulers.chain import check
from schedulers.greedy import greedy

LEAST = 4
"""Block stages below which the two pairs would share a stage."""


@dataclass(frozen=True)
class SwappedSettings:
    """Nothing of its own: who wants swapped routes asks for the remedy that reads them."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError where routes cannot be swapped."""
        if run.recovery != "checkfree+":
            return
        require(
            run.scheduler == "one_f_one_b" and run.stages > LEAST, "recovery", run.recovery,
            f"only with scheduler one_f_one_b and {LEAST + 1} or more workers per replica (found {run.stages}): "
            f"{LEAST} block stages, and the embedding and the head on a worker of their own",
        )  # fmt: skip
        require(run.ends in ("auto", "apart"), "ends", run.ends, "auto or apart under --recovery checkfree+")


def swapped_order(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Embedding, S2, S1, S3, ..., S(s-2), S(s), S(s-1), head. Raises ValueError for fewer than 4 block spans."""
    if len(spans) < LEAST + 2:
        raise ValueError(
            f"block stages: {max(0, len(spans) - 2)}; allowed with swapped routes: {LEAST} or more, beside the "
            "embedding and the head"
        )
    embedding, first, second, *middle, before, last, head = spans
    return (embedding, second, first, *middle, last, before, head)


def swapped(spans: Sequence[Span], microbatches: int, replicas: int = 1, *, evaluate: bool = False) -> Schedule:
    """`spans` are the embedding, the block stages and the head; worker i of a replica holds spans[i], the first also
    the head. Microbatches with an odd number within their replica are swapped; `evaluate` swaps none and goes forward
    only. Raises ValueError as `swapped_order` does, and for sizes below 1.
    """
    check(spans, microbatches, replicas)
    orders = (tuple(spans), swapped_order(spans))
    stages = len(spans) - 1
    if evaluate:
        routes = [Route(orders[0], ())] * microbatches
    else:
        routes = [Route.through(orders[m // replicas % 2]) for m in range(microbatches)]
    place = {span: i % stages for i, span in enumerate(spans)}
    limits = {
        replica * stages + stage: 2 * stages if stage == 0 else max(2, stages - stage + 1)
        for replica in range(replicas)
        for stage in range(stages)
    }
    return greedy(
        routes, lambda span, m: m % replicas * stages + place[span], limits=limits, workers=range(stages * replicas),
        seconds=lambda kind, span: 0.1 if span == spans[0] else 1.0 if kind == "F" else 2.0, name="swapped",
    )  # fmt: skip
