"""When the layout changes because workers have become slow, or fast again: not at once, and not again and again.

A situation is who is how fast. What is known of it are the layout that would be best, how long it has lasted before,
and what came after it. To change costs a stall, as measured. The layout is chosen that loses least over this situation
and those to come: the expected loss of each follows from the times before, by value iteration over the situations
seen. A situation that is new is expected to last as long again as it has lasted, so the first change comes when as much
has been lost as it costs (the ski rental problem).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from recovery.speeds import ALIKE

Speed = Mapping[int, float]
"""Place -> how many times as fast as the usual one; 1 where missing."""

_WORTH = 0.05  # a layout that saves less than this share of a step is no better
_DISCOUNT = 0.9
_ROUNDS = 40
_MOST = 16  # situations that are remembered


@dataclass
class _Situation:
    """Who is how fast, and the best layout then; how long that lasted, of late; and which situations came next, how
    often."""

    speeds: Speed
    best: str
    lasted: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    then: Counter[int] = field(default_factory=Counter)

    def left(self, elapsed: float) -> float:
        """Seconds that it is expected to go on."""
        if self.lasted and elapsed < (usual := fmean(self.lasted)):
            return usual - elapsed
        return elapsed


class Shifter:
    """`best(speeds)` is the layout (by key) that takes the least time, `seconds(speeds, layout)` how long a step of one
    takes; `cost_s` is what a change costs, `lag_s` how late it is seen who is how fast. Both may be set as they are
    measured."""

    def __init__(
        self, best: Callable[[Speed], str], seconds: Callable[[Speed, str], float], cost_s: float, lag_s: float = 0.0
    ) -> None:
        self._best, self._seconds, self.cost_s, self.lag_s = best, seconds, cost_s, lag_s
        self._known: list[_Situation] = []
        self._now, self._since = -1, 0.0
        self._lost: dict[tuple[int, str], float] = {}
        self._values: tuple[object, dict[tuple[int, str], float]] = (None, {})

    def consider(self, now: float, speeds: Speed, at: str) -> str:
        """The layout to be in, where it is `at` now; `now` in seconds."""
        self._observe(now, speeds)
        here, elapsed = self._known[self._now], now - self._since
        layouts = {at, *(situation.best for situation in self._known)}
        if self._loss(self._now, at) - min(self._loss(self._now, each) for each in layouts) < _WORTH:
            return at
        ahead = self._ahead(layouts)

        def total(layout: str) -> float:
            stall = self.cost_s * (layout != at)
            return stall + self._during(self._now, layout, here.left(elapsed)) + self._future(self._now, layout, ahead)

        return min(sorted(layouts), key=lambda layout: (total(layout), layout != at))

    def _observe(self, now: float, speeds: Speed) -> None:
        """Take note of how fast everybody is."""
        if self._now >= 0 and _alike(self._known[self._now].speeds, speeds):
            return
        found = next((n for n, known in enumerate(self._known) if _alike(known.speeds, speeds)), len(self._known))
        if found == _MOST:  # nothing comes back in a run like this: what was seen helps nobody
            self._known, self._lost, self._now, found = [], {}, -1, 0
        if found == len(self._known):
            self._known.append(_Situation(dict(speeds), self._best(speeds)))
        if self._now >= 0:
            self._known[self._now].lasted.append(now - self._since)
            self._known[self._now].then[found] += 1
        self._now, self._since = found, now

    def _loss(self, situation: int, layout: str) -> float:
        """The share of the time that is lost in a layout, beside the best one."""
        if (key := (situation, layout)) not in self._lost:
            known = self._known[situation]
            best = self._seconds(known.speeds, known.best)
            self._lost[key] = max(0.0, 1.0 - best / self._seconds(known.speeds, layout))
        return self._lost[key]

    def _ahead(self, layouts: set[str]) -> dict[tuple[int, str], float]:
        """(situation, layout) -> the seconds that will be lost from when that situation is seen in that layout."""
        given = sum(known.then.total() for known in self._known), self.cost_s, self.lag_s, frozenset(layouts)
        if self._values[0] == given:
            return self._values[1]
        found = {(s, layout): 0.0 for s in range(len(self._known)) for layout in layouts}
        for _ in range(_ROUNDS):
            found = {
                (s, layout): min(
                    self.cost_s * (other != layout)
                    + self._during(s, other, fmean(known.lasted) if known.lasted else 0.0)
                    + self._future(s, other, found)
                    for other in layouts
                )
                for s, known in enumerate(self._known)
                for layout in layouts
            }
        self._values = given, found
        return found

    def _during(self, situation: int, layout: str, lasts: float) -> float:
        """The seconds that are lost while a situation is seen: in the last of them it is another one already."""
        late, then = min(self.lag_s, lasts), self._known[situation].then
        now = self._loss(situation, layout)
        after = sum(count * self._loss(s, layout) for s, count in then.items()) / then.total() if then else now
        return now * (lasts - late) + after * late

    def _future(self, situation: int, layout: str, ahead: Mapping[tuple[int, str], float]) -> float:
        then = self._known[situation].then
        return _DISCOUNT * sum(count * ahead[s, layout] for s, count in then.items()) / max(1, then.total())


def _alike(a: Speed, b: Speed) -> bool:
    return all(1 / ALIKE <= a.get(place, 1.0) / b.get(place, 1.0) <= ALIKE for place in {*a, *b})
