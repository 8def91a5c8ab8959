"""What faults have cost a run: goodput, lost steps, and the seconds that recovery took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any


class Goodput:
    """Of one start of a run, as the report counts it (launch/page/goodput.py): the share of the time since then that
    made steps which stand. All else is start-up, evaluation, saving, recovery, and steps that were undone."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._began = now, now()
        self.lost_steps, self.recovery_s = 0, 0.0
        self._useful, self._standing = 0.0, dict[int, float]()
        """Step -> seconds, ascending."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A step was committed, which undoes those from it on; `metrics` are those of metrics.jsonl."""
        while self._standing and next(reversed(self._standing)) >= metrics["step"]:
            self._useful -= self._standing.popitem()[1]
            self.lost_steps += 1
        self._standing[metrics["step"]] = metrics["tokens"] / max(metrics["tokens_per_s"], 1e-9)
        self._useful += self._standing[metrics["step"]]

    def event(self, event: str, fields: Mapping[str, Any]) -> None:
        """Something happened; `fields` are those of events.jsonl."""
        if event == "resumed":
            self.recovery_s += max(fields["seconds"].values(), default=0.0)

    def values(self) -> dict[str, float]:
        """`goodput` from 0 to 1, `lost_steps`, `recovery_s`."""
        elapsed = self._now() - self._began
        share = min(1.0, self._useful / elapsed) if elapsed > 0 else 0.0
        return {"goodput": share, "lost_steps": float(self.lost_steps), "recovery_s": self.recovery_s}
