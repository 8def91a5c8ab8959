"""Where the time of a run went. Goodput is the share of it that made steps which stand.

The clock of a run stands still between two of its starts: what nobody computed in is not its time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from launch.page.faults import Loss, in_recovery
from launch.page.files import RunFiles, number

FIRST_STEP = "until the first step"
STANDS, AGAIN, RECOVERY, REST = "steps that stand", "steps undone", "recovery", "evaluation, saving, the rest"


@dataclass(frozen=True)
class RunClock:
    """The starts of a run, as spans of unix seconds [from, to]."""

    starts: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, run: RunFiles) -> RunClock:
        """Each start ends with the last thing that is known of it."""
        begins = sorted(e["time"] for e in run.events if e.get("event") == "started")
        times = sorted([*(e["time"] for e in run.events), *(e["time"] for e in run.ledger)])
        if not times:
            return cls(())
        begins = begins or times[:1]
        ends = [times[max(bisect_left(times, begin) - 1, 0)] for begin in begins[1:]] + [times[-1]]
        return cls(tuple((begin, max(begin, end)) for begin, end in zip(begins, ends, strict=True)))

    @property
    def total(self) -> float:
        """Seconds that the run has run."""
        return sum(end - begin for begin, end in self.starts)

    def at(self, time: float) -> float:
        """The run's own seconds at a time."""
        return sum(min(max(time - begin, 0.0), end - begin) for begin, end in self.starts)


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run, by what they went into; they sum to `total`."""

    total: float
    parts: tuple[tuple[str, float], ...]

    @property
    def share(self) -> float | None:
        """The goodput, 0 to 1."""
        return dict(self.parts)[STANDS] / self.total if self.total > 0 else None


def goodput(run: RunFiles, clock: RunClock, found: Sequence[Loss]) -> Goodput:
    """The account of a run's time."""
    stands = sum(_seconds(m) for m in run.standing)
    again = sum(_seconds(m) for m in run.metrics) - stands
    commits = sorted((e["time"], e["step"]) for e in run.ledger)
    took = {m["step"]: _seconds(m) for m in run.metrics}
    first = 0.0
    for begin, end in clock.starts:
        at = bisect_right(commits, (begin, float("inf")))
        if at < len(commits) and commits[at][0] <= end:
            first += max(0.0, commits[at][0] - begin - took.get(commits[at][1], 0.0))
        else:
            first += end - begin  # it came to no step
    lost = 0.0
    for at, until in in_recovery(found):
        step = commits[min(bisect_left(commits, (until, -1)), len(commits) - 1)][1]
        lost += max(0.0, until - at - took.get(step, 0.0))
    left = clock.total - stands - again - first - lost
    parts = {STANDS: stands, AGAIN: again, RECOVERY: lost, FIRST_STEP: first, REST: left}
    if left < 0:  # clocks of several machines, or lines that are lost: what is known is less than what was counted
        scale = clock.total / (clock.total - left) if clock.total > 0 else 0.0
        parts = {name: value * scale for name, value in parts.items()} | {REST: 0.0}
    return Goodput(clock.total, tuple(parts.items()))


def _seconds(line: dict[str, object]) -> float:
    """How long a step took."""
    tokens, speed = number(line, "tokens"), number(line, "tokens_per_s")
    return tokens / speed if tokens and speed and speed > 0 and tokens > 0 else 0.0
