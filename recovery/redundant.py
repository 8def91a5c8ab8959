"""Redundant computation (Bamboo, Thorpe et al., NSDI 2023): each stage also holds its successor and runs its forward.

When a worker is lost, the one before it does its work as well, from the next view on and without waiting for anybody:
it has the state, kept up to date step by step, and the activations of the microbatches under way. Meanwhile a
replacement is started; once it is ready it joins at the end of a step and gets its state back from whom kept it.
Weights stay bitwise those of a run without the loss, but for a tied weight whose two ends meet on one worker: there its
gradient is summed in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.schedule.lower import add_redundant, lower
from pipeline.schedule.merge import merge
from pipeline.schedule.ops import F, R, Schedule, Span, dumps
from pipeline.schedule.verify import verify
from recovery.membership import View, substitute
from recovery.remedy import CannotRestore


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


def arrange_takeover(home: View, view: View) -> View:
    """`view` with the schedules of `home` for the places that its workers have; the others' work is taken over.

    Raises CannotRestore where who could do that is not there, or has no state itself.
    """
    at = {view.places[worker]: worker for worker in view.workers}
    train = home.schedule("train")
    holders = successors(train)
    into: dict[int, int] = {}
    for place in sorted(set(home.workers) - set(at)):
        holder = holders.get(place)
        if holder is None or holder not in at or at[holder] in view.joined:
            who = "nobody keeps a copy" if holder is None else f"the stage that keeps the copy, {holder}, is lost too"
            raise CannotRestore(f"stage {place}: {who}")
        into[place] = holder
    merged = merge(train, into)
    computed = {(span, worker) for span, workers in merged.holders.items() for worker in workers}
    backups = tuple((span, place) for span, place in home.backups if place in at and (span, place) not in computed)
    made = {
        "train": lower(add_redundant(merged, backups)),
        "evaluate": lower(merge(home.schedule("evaluate"), into)),
    }
    for schedule in made.values():
        verify(schedule)
    return replace(
        view,
        schedules={purpose: dumps(substitute(schedule, at)) for purpose, schedule in made.items()},
        backups=tuple((span, at[place]) for span, place in backups),
    )
