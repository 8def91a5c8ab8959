"""Work units: the work of a pool whose workers hold nothing. A unit is one span and the microbatches that go through
it at once: whoever takes it loads the span, runs them in turn, and lets go of the span.

A row of units in which each depends only on earlier ones can be dealt to any number of workers, in any way, and dealt
again when a worker is lost: that is why there are units beside lanes. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pipeline.schedule.ops import LOAD, OFFLOAD, B, F, Op, R, Route, Schedule, Span

FORWARD, FUSED, BACKWARD = (F,), (F, B), (R, B)
"""What a unit does with each of its microbatches: a forward; the last forward, the loss and the first backward; or a
backward that first runs its forward again."""


class WorkUnit(NamedTuple):
    """`kinds` is FORWARD, FUSED or BACKWARD."""

    kinds: tuple[str, ...]
    span: Span
    microbatches: tuple[int, ...]

    def ops(self) -> Iterator[Op]:
        """Microbatch by microbatch."""
        return (Op(kind, self.span, m) for m in self.microbatches for kind in self.kinds)


class Cut(NamedTuple):
    """How the layers are cut: forward spans, the span of the loss, and backward spans in the order of the way back.

    The forward spans and the backward ones cover the same layers, all but those of `fused`, which are the last.
    """

    forward: tuple[Span, ...]
    fused: Span
    backward: tuple[Span, ...]

    @property
    def route(self) -> Route:
        """Of every microbatch."""
        return Route((*self.forward, self.fused), (self.fused, *self.backward))

    @property
    def stages(self) -> tuple[tuple[tuple[str, ...], Span], ...]:
        """(kinds, span) in the order in which a microbatch goes through them."""
        forward = [(FORWARD, span) for span in self.forward]
        return (*forward, (FUSED, self.fused), *((BACKWARD, span) for span in self.backward))


def units(cut: Cut, microbatches: int, at_once: int, *, by_stage: bool) -> tuple[WorkUnit, ...]:
    """All units of an iteration, each after those that it depends on. `at_once` microbatches make a round.

    `by_stage`: every round goes through a stage before the next stage comes; else a round goes all the way first.
    """
    rounds = [tuple(range(lo, min(lo + at_once, microbatches))) for lo in range(0, microbatches, at_once)]
    stages = cut.stages
    if by_stage:
        return tuple(WorkUnit(*stage, chosen) for stage in stages for chosen in rounds)
    return tuple(WorkUnit(*stage, chosen) for chosen in rounds for stage in stages)


def forward_units(cut: Cut, microbatches: int, at_once: int) -> tuple[WorkUnit, ...]:
    """The units of an evaluation: forward alone, the loss at the end."""
    rounds = [tuple(range(lo, min(lo + at_once, microbatches))) for lo in range(0, microbatches, at_once)]
    return tuple(WorkUnit(FORWARD, span, chosen) for span in (*cut.forward, cut.fused) for chosen in rounds)


def schedule_of(
    cut: Cut, row: Sequence[WorkUnit], homes: Sequence[int], workers: Iterable[int], microbatches: int, name: str
) -> Schedule:
    """The lanes of a row of units, where `homes[i]` runs `row[i]`.

    A worker loads the span of its next unit before it begins with the one at hand, and lets go of a span after its last
    microbatch: it never holds more than two.
    """
    lanes: dict[int, tuple[Op, ...]] = {}
    trains = any(B in unit.kinds for unit in row)
    for worker in workers:
        held: list[list[WorkUnit]] = []  # units of one span that follow each other need it loaded once
        for unit, home in zip(row, homes, strict=True):
            if home == worker and held and held[-1][0].span == unit.span:
                held[-1].append(unit)
            elif home == worker:
                held.append([unit])
        ops: list[Op] = [Op(LOAD, held[0][0].span)] if held else []
        for i, group in enumerate(held):
            ops += [Op(LOAD, held[i + 1][0].span)] if i + 1 < len(held) else []
            ops += [op for unit in group for op in unit.ops()]
            ops.append(Op(OFFLOAD, group[0].span))
        lanes[worker] = tuple(ops)
    route = cut.route if trains else Route(cut.route.forward, ())
    return Schedule((route,) * microbatches, lanes, name)
