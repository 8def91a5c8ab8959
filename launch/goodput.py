"""What faults have cost a run: goodput, lost steps, and the seconds that recovery took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any


class Goodput:
    """Of one start of a run. `useful` is the time of the steps that stand, each the first time that it was taken; all
    else since the first of them began is evaluations, checkpoints, recovery and steps that are taken again."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._began = now, None
        self.lost_steps, self.recovery_s, self._useful = 0, 0.0, 0.0

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A step was committed; `metrics` are those of metrics.jsonl."""
        seconds = metrics["tokens"] / max(metrics["tokens_per_s"], 1e-9)
        if self._began is None:
            self._began = self._now() - seconds
        if metrics["again"]:
            self.lost_steps += 1
        else:
            self._useful += seconds

    def event(self, event: str, fields: Mapping[str, Any]) -> None:
        """Something happened; `fields` are those of events.jsonl."""
        if event == "resumed":
            self.recovery_s += max(fields["seconds"].values(), default=0.0)

    def values(self) -> dict[str, float]:
        """`goodput` from 0 to 1, `lost_steps`, `recovery_s`."""
        elapsed = 0.0 if self._began is None else self._now() - self._began
        share = min(1.0, self._useful / elapsed) if elapsed > 0 else 1.0
        return {"goodput": share, "lost_steps": float(self.lost_steps), "recovery_s": self.recovery_s}
