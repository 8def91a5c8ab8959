"""Sums gradients over their holders: it alone owns the groups, the sums under way, and their number.

A *part* is what is summed at once: the gradient of a span, or of a weight that several layers share. Each has a group
of its own, if several workers hold it. A worker that is interrupted before it could start a sum that others have
started starts it before the next view begins; so all members of a group have started as many sums, or one of them
waits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

from torch import Tensor

from pipeline.runtime.groups import Group, GroupBuilder, Way, Work, poison, sum_over
from pipeline.runtime.mailbox import LinkError

_ENDING_S = 5.0  # until a sum over a group whose sockets are closed has failed


Started = Mapping[str, tuple[int, Sequence[int]]]
"""Part -> the most sums that any member has started over its group, and the members that have it."""


def most_started(each: Mapping[int, Mapping[str, int]]) -> dict[str, tuple[int, list[int]]]:
    """What everyone's `Reducer.started`, by worker, comes to."""
    found: dict[str, tuple[int, list[int]]] = {}
    for worker, started in sorted(each.items()):
        for part, number in started.items():
            most, having = found.get(part, (0, []))
            found[part] = max(most, number), [*having, worker]
    return found


class Reducer:
    """The sums of one worker, view after view. `gradient(part)` is what is summed, in place, if there is anything."""

    def __init__(
        self, worker: int, gradient: Callable[[str], Tensor | None], *, timeout_s: float = 60.0, backend: str = "gloo"
    ) -> None:
        self._worker, self._gradient, self._timeout_s, self._backend = worker, gradient, timeout_s, backend
        self._members: dict[str, tuple[int, ...]] = {}
        self._groups: dict[str, Group] = {}
        self._under_way: dict[str, Work] = {}
        self._started = Counter[str]()
        self._unconfirmed: set[str] = set()

    # ---- in a step ----

    def start(self, part: str, tensor: Tensor | None = None) -> None:
        """Start summing the gradient of a part over its holders, if there are several; or another tensor of that many
        bytes. Returns at once."""
        group, gradient = self._groups.get(part), self._gradient(part) if tensor is None else tensor
        if group is not None and gradient is not None:
            self._started[part] += 1
            self._under_way[part] = sum_over(group, gradient, self._timeout_s)

    def finish(self, deadline: float) -> None:
        """Wait for all sums that were started, until `deadline` (time.monotonic seconds). Raises LinkError."""
        for part, work in self._under_way.items():
            try:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except RuntimeError as error:
                raise LinkError(f"summing the gradient of {part} over its replicas failed: {error}") from error

    def clear(self) -> None:
        """The step is over: no sum belongs to it any more."""
        self._under_way.clear()

    def way(self, peer: int, tag: int) -> Way | None:
        """To a worker with which this one sums something, over the first group that carries what lies on the host; for
        the time in which no sum is under way."""
        for part, members in sorted(self._members.items()):
            if peer in members and self._backend == "gloo":
                return Way(self._groups[part], members.index(peer), tag)
        return None

    def group(self, part: str) -> Group | None:
        """The group of a part, to be timed."""
        return self._groups.get(part)

    # ---- from view to view ----

    @property
    def peers(self) -> set[int]:
        """The workers with which this one is in a group. May be asked from any thread."""
        return {worker for members in list(self._members.values()) for worker in members}

    @property
    def started(self) -> Mapping[str, int]:
        """Part -> how many sums were started over its group since that was built."""
        return {part: self._started[part] for part in self._members}

    def poison(self, lost: set[int]) -> None:
        """End, from any thread, what waits in a group that has lost a member."""
        for part, members in list(self._members.items()):
            if lost & set(members):
                self._poison(part, lost)

    def _poison(self, part: str, lost: set[int]) -> None:
        group, members = self._groups.get(part), self._members.get(part)
        if group is not None and members is not None:
            poison(group, members, self._worker, lost)

    def quiesce(self, workers: set[int], deadline: float) -> None:
        """Leave the old view: drop groups that are half built or have a member that is not in `workers`.

        Over those that are kept a sum is started, so that nobody goes on waiting for this worker in one.
        """
        for part, members in list(self._members.items()):
            if not set(members) <= workers or part in self._unconfirmed:
                self._poison(part, set(members) - workers)
                self._drop(part, deadline)
        self._unconfirmed = set()
        for part in list(self._members):
            work = self._under_way.get(part)
            if work is None:
                self.start(part)
            elif work.is_completed() and not self.ended(part, deadline):
                self._forget(part)

    def agree(self, started: Started, deadline: float) -> None:
        """Drop the groups that another member has dropped, and bring what is left in step; `started` is what everyone's
        comes to. Afterwards no sum is under way. Raises LinkError when a group does not come in step."""
        for part, members in list(self._members.items()):
            most, having = started.get(part, (0, ()))
            if not set(members) <= set(having):
                self._poison(part, set())
                self._drop(part, deadline)
                continue
            if self._started[part] < most:
                self.start(part)
            if not self.ended(part, deadline):
                raise LinkError(f"workers {members} did not bring the group of {part} in step")
        self.clear()

    def ended(self, part: str, deadline: float) -> bool:
        """Wait until a sum that was started no longer writes into the gradient; whether it went well."""
        try:
            if (work := self._under_way.get(part)) is not None:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        except RuntimeError:
            return False
        return True

    def edit(self, view: int, parts: Mapping[str, tuple[int, ...]], builder: GroupBuilder) -> None:
        """Build the groups that are missing: part -> its holders. Raises RuntimeError where the others do not come.

        All members of the view call this with the same parts; they meet in one order. Groups of what is no part any
        more, or has other holders now, are dropped: no sum is under way.
        """
        for part in [part for part, members in self._members.items() if parts.get(part) != members]:
            self._forget(part)
        for part, members in sorted(parts.items()):
            if self._worker not in members or len(members) < 2 or self._members.get(part) == members:
                continue
            self._forget(part)
            self._groups[part] = builder.build(f"view{view}/sum{part}", members, self._backend)
            self._members[part] = members
            self._unconfirmed.add(part)

    def confirm(self) -> None:
        """All members have built theirs."""
        self._unconfirmed = set()

    def _drop(self, part: str, deadline: float) -> None:
        self.ended(part, min(deadline, time.monotonic() + _ENDING_S))
        self._forget(part)

    def _forget(self, part: str) -> None:
        for held in (self._members, self._groups, self._under_way, self._started):
            held.pop(part, None)
