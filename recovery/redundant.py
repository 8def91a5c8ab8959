"""Redundant computation (Bamboo, Thorpe et al., NSDI 2023): each stage also holds its successor and runs its forward.

When a worker is lost, the one before it does its work as well, from the next view on and without waiting for anybody:
it has the state, kept up to date step by step, and the activations of the microbatches under way. Meanwhile a
replacement is started; once it is ready it joins at the end of a step and gets its state back from whom kept it.
Weights stay bitwise those of a run without the loss, but for a tied weight whose two ends meet on one worker: there its
gradient is summed in another order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipeline.schedule.layout import EVALUATE, TRAIN, Layout
from pipeline.schedule.lower import add_redundant, lower
from pipeline.schedule.merge import merge
from pipeline.schedule.ops import F, R, Schedule, Span
from pipeline.schedule.verify import verify
from pipeline.settings import RunShape, require
from recovery.remedy import CannotRestore


@dataclass(frozen=True)
class RedundantSettings:
    """Nothing of its own."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError where no stage can keep a copy of another."""
        if run.recovery == "redundant":
            require(
                run.scheduler not in ("balanced", "skippipe") and run.stages > 1, "recovery", run.recovery,
                "only with 2 or more workers per replica, and not with scheduler balanced or skippipe",
            )  # fmt: skip


def copies(spans_of: Sequence[Sequence[Span]]) -> tuple[tuple[Span, int], ...]:
    """(span, who also holds it), for the stages of one pipeline in order: the stage before; for the first, the last."""
    return tuple((span, (stage - 1) % len(spans_of)) for stage, spans in enumerate(spans_of) for span in spans)


def successors(train: Schedule) -> dict[int, int]:
    """Worker -> the one that runs every forward of it redundantly and can take its place."""
    found: dict[int, set[int | None]] = {}
    for (kind, span, m), worker in train.home.items():
        if kind == F:
            found.setdefault(worker, set()).add(train.home.get((R, span, m)))
    return {worker: holder for worker, (holder, *more) in found.items() if holder is not None and not more}


def takeover(home: Layout, alive: Collection[int]) -> Layout:
    """The layout over the places that have workers: the work of the others is taken over by those that keep a copy.

    Raises CannotRestore where such a place has no worker either.
    """
    holders = successors(home.train)
    into: dict[int, int] = {}
    for place in sorted(set(home.train.lanes) - set(alive)):
        holder = holders.get(place)
        if holder is None or holder not in alive:
            who = "nobody keeps a copy" if holder is None else f"the stage that keeps the copy, {holder}, is lost too"
            raise CannotRestore(f"stage {place}: {who}")
        into[place] = holder
    merged = merge(home.train, into)
    computed = {(span, place) for span, places in merged.holders.items() for place in places}
    backups = tuple((span, place) for span, place in home.backups if place in alive and (span, place) not in computed)
    made = {
        TRAIN: lower(add_redundant(merged, backups)),
        EVALUATE: lower(merge(home.schedules[EVALUATE], into)),
    }
    for schedule in made.values():
        verify(schedule)
    return Layout(made, backups)
