"""How fast each worker computes: the seconds that it has computed in a step, over what its lane is predicted to take.

Both come with every step: what a worker has computed, and not waited, travels with its vote. The median of the last
steps is taken, so that one step that was disturbed says nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from statistics import median, median_low

from pipeline.schedule.costs import Costs
from pipeline.schedule.layout import Layout
from pipeline.schedule.ops import COMPUTE
from recovery.membership import View

ALIKE = 1.5
"""Workers whose speeds differ by no more than this factor are taken as equally fast: they share a machine, or noise."""
_WINDOW = 5
_LEAST = 3
FORGET_S = 10.0
"""Who was too slow to be given anything is tried again after so many seconds; twice as many after each time."""


class Speeds:
    """What is known of the workers of a run; `layer_costs[l]` are the seconds of layer l's forward, or a multiple."""

    def __init__(self, layer_costs: Sequence[float] = ()) -> None:
        self.costs = Costs(list(layer_costs) or [1.0])
        self._paces: dict[int, deque[float]] = {}
        self._work: tuple[str, dict[int, float]] = ("", {})
        self._idle: dict[int, float] = {}  # worker that has nothing to do -> since when
        self._patience: dict[int, float] = {}

    def note(self, view: View, layout: Layout, busy_s: Mapping[int, float]) -> None:
        """Take note of a step: worker -> the seconds that it has computed. Who did nothing says nothing, and what is
        known of it is forgotten after a while: nobody else can say that it is as fast as usual again."""
        if self._work[0] != layout.key:
            self._work = layout.key, {place: self._of(layout, place) for place in layout.train.lanes}
        for gone in set(self._paces) - set(view.workers):
            del self._paces[gone]
        for worker, seconds in busy_s.items():
            work = self._work[1].get(view.places.get(worker, -1), 0.0)
            if work > 0 and seconds > 0:
                self._paces.setdefault(worker, deque(maxlen=_WINDOW)).append(seconds / work)
                self._idle.pop(worker, None)
            elif time.monotonic() - self._idle.setdefault(worker, time.monotonic()) > self._patience.get(
                worker, FORGET_S
            ):
                self._paces.pop(worker, None)
                self._patience[worker] = 2 * self._patience.get(worker, FORGET_S)
                self._idle[worker] = time.monotonic()

    def _of(self, layout: Layout, place: int) -> float:
        """What the lane of a place takes at speed 1."""
        return sum(self.costs.seconds(op.kind, op.span) for op in layout.train.lanes[place] if op.kind in COMPUTE)

    def of(self, workers: Collection[int]) -> dict[int, float]:
        """Worker -> how many times as fast as the usual one it is, of those that are not as fast as that. Empty where
        too little is known."""
        paces = {w: median(self._paces[w]) for w in workers if len(self._paces.get(w, ())) >= _LEAST}
        if len(paces) < 2:
            return {}
        usual = median_low(paces.values())
        slow = {w: usual / pace for w, pace in paces.items() if not 1 / ALIKE <= usual / pace <= ALIKE}
        for worker in set(paces) - set(slow):
            self._patience.pop(worker, None)
        return slow
