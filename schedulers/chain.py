"""What the classic schedules share: one chain of stages per replica, microbatches dealt to the replicas in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pipeline.schedule.ops import Op, Route, Schedule, Span

Lane = Callable[[int, Sequence[int]], Iterable[Op]]
"""(stage, the microbatches of its replica) -> the ops of that stage's worker, in order."""


def chain(
    name: str, spans: Sequence[Span], microbatches: int, replicas: int, lane: Lane, *, stages: int | None = None,
    backward: bool = True,
) -> Schedule:  # fmt: skip
    """Microbatch m runs through all `spans` on replica m % replicas; worker replica * stages + stage runs its `lane`.

    `stages` is the number of workers of one replica, one per span unless given; which spans a stage holds is up to
    its lane. Raises ValueError for sizes below 1 and for spans that are no chain.
    """
    stages = len(spans) if stages is None else stages
    check(spans, microbatches, replicas)
    spans = tuple(spans)
    route = Route.through(spans) if backward else Route(spans, ())
    lanes = {
        replica * stages + stage: tuple(lane(stage, range(replica, microbatches, replicas)))
        for replica in range(replicas)
        for stage in range(stages)
    }
    return Schedule((route,) * microbatches, lanes, name)


def check(spans: Sequence[Span], microbatches: int, replicas: int) -> None:
    """Raise ValueError unless there is at least one of each, and the spans follow one another."""
    for what, value in (("microbatches", microbatches), ("replicas", replicas), ("spans", len(spans))):
        if value < 1:
            raise ValueError(f"{what}: {value}; allowed: 1 or more")
    for before, span in zip((None, *spans), spans, strict=False):
        if span[0] < 0 or span[0] >= span[1] or (before is not None and before[1] != span[0]):
            raise ValueError(
                f"span {span} after {before}; allowed: (lo, hi) with lo < hi, each starting where the last ends"
            )
