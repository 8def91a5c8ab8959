"""Two ends of a link in shared memory, driven at random: nothing is lost, repeated or torn, whatever is sent, kept, let
go or cut, and however views and steps go on; and there are never more slots than messages that needed one at once."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from pipeline.runtime.mailbox import LinkError, Mailbox
from pipeline.runtime.shared_link import KEPT, SharedLink
from pipeline.schedule.ops import Op
from tests.slot_kills import memory

SIZE = 4096
WAIT_S = 20.0
ENDS = st.sampled_from((0, 1))
Stage = tuple[int, int]
"""View and step."""


def payload(number: int, length: int) -> Tensor:
    """Nowhere the same as that of another message."""
    return torch.arange(length, dtype=torch.float64) + 10_000 * number


@dataclass
class Sent:
    """A message that may still need a slot: stale ones until it is certain that they were dropped."""

    number: int
    length: int
    at: Stage


@dataclass
class End:
    """One worker: where it is, what was sent to it, and what it has taken and not let go."""

    box: Mailbox = field(default_factory=Mailbox)
    at: Stage = (1, 0)
    coming: dict[int, Sent] = field(default_factory=dict)
    kept: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    """Number -> length and payload, of this connection."""
    older: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    """The same, of connections that have ended."""
    most: int = 0
    """Messages that were sent to it on this connection and not let go, at once."""

    def count(self) -> None:
        self.most = max(self.most, len(self.coming) + len(self.kept))


class Links(RuleBasedStateMachine):
    before: ClassVar[tuple[int, int, set[str]] | None] = None
    """What there was before the example."""

    def __init__(self) -> None:
        super().__init__()
        Links.before = Links.before or memory()
        self.ends, self.links = [End(), End()], list[SharedLink]()
        self.sent = 0
        self.cut_off = False

    @initialize()
    def connect(self) -> None:
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.links = [SharedLink(1 - me, pair[me], self.ends[me].box, max_bytes=SIZE) for me in (0, 1)]
        self.cut_off = False

    # ---- while it holds ----

    @precondition(lambda self: not self.cut_off)
    @rule(source=ENDS, length=st.one_of(st.integers(0, SIZE // 8), st.sampled_from((0, 1, SIZE // 8))))
    def send(self, source: int, length: int) -> None:
        """A message of the view and step where the sender is."""
        self._send(source, length)

    def _send(self, source: int, length: int) -> int:
        target, self.sent = self.ends[1 - source], self.sent + 1
        view, step = at = self.ends[source].at
        target.coming[self.sent] = Sent(self.sent, length, at)
        target.count()
        self.links[source].send(view, step, Op("F", (0, 1), self.sent), payload(self.sent, length))
        return self.sent

    @precondition(lambda self: not self.cut_off)
    @rule(me=ENDS, choice=st.integers(0, 1 << 20))
    def take(self, me: int, choice: int) -> None:
        """Any message that is not stale, in whatever order."""
        end = self.ends[me]
        fresh = [message for message in end.coming.values() if message.at >= end.at]
        if fresh:
            self._take(me, fresh[choice % len(fresh)])

    def _take(self, me: int, message: Sent) -> None:
        end, (view, step), op = self.ends[me], message.at, Op("F", (0, 1), message.number)
        found = end.box.get(view, step, op, 1 - me, time.monotonic() + WAIT_S)
        assert found.equal(payload(message.number, message.length)), "it is torn"
        del end.coming[message.number]
        end.kept[message.number] = message.length, found
        with pytest.raises(LinkError, match=r"did not come within|will not come"):
            end.box.get(view, step, op, 1 - me, time.monotonic())

    @rule(me=ENDS, choice=st.integers(0, 1 << 20))
    def let_go(self, me: int, choice: int) -> None:
        end = self.ends[me]
        for kept in (end.kept, end.older):
            if kept:
                kept.pop(list(kept)[choice % len(kept)])

    @precondition(lambda self: not self.cut_off)
    @rule(me=ENDS, view=st.booleans())
    def go_on(self, me: int, view: bool) -> None:
        """To the next step, or the next view: what is older and not taken yet is dropped, and comes in vain later."""
        end = self.ends[me]
        end.at = (end.at[0] + 1, 0) if view else (end.at[0], end.at[1] + 1)
        end.box.advance(*end.at)

    @precondition(lambda self: not self.cut_off)
    @rule(source=ENDS)
    def settle(self, source: int) -> None:
        """When a message has come, all before it have; what was stale among them has given its slot back."""
        target = self.ends[1 - source]
        self.ends[source].at = target.at = max(end.at for end in self.ends)
        for end in self.ends:
            end.box.advance(*end.at)
        number = self._send(source, 1)
        self._take(1 - source, target.coming[number])
        for message in [each for each in target.coming.values() if each.at < target.at]:
            with pytest.raises(LinkError, match="did not come within"):
                target.box.get(*message.at, Op("F", (0, 1), message.number), source, time.monotonic())
            del target.coming[message.number]
        self.links[source].flush(time.monotonic() + WAIT_S)

    # ---- its end, and another one ----

    @precondition(lambda self: not self.cut_off)
    @rule(me=ENDS)
    def cut(self, me: int) -> None:
        self.links[me].cut()
        self.cut_off = True
        for link in self.links:
            link.join(WAIT_S)
            with pytest.raises(LinkError, match="failed"):
                link.send(0, 0, Op("F", (0, 1), 0), torch.zeros(1))

    @precondition(lambda self: self.cut_off)
    @rule(me=ENDS)
    def take_what_has_come(self, me: int) -> None:
        """Of what was under way, some has come, from the first on; what has is whole."""
        end = self.ends[me]
        for message in [each for each in end.coming.values() if each.at >= end.at]:
            try:
                self._take(me, message)
            except LinkError as error:
                assert "will not come" in str(error)  # noqa: PT017

    @precondition(lambda self: self.cut_off)
    @rule()
    def mend(self) -> None:
        """A view with a new connection: nothing of the old one comes any more."""
        view = 1 + max(end.at[0] for end in self.ends)
        for me, end in enumerate(self.ends):
            self.links[me].abandon()
            end.older |= end.kept
            end.box.forget(1 - me)
            end.at, end.coming, end.kept, end.most = (view, 0), {}, {}, 0
            end.box.advance(*end.at)
        self.connect()

    # ---- always ----

    @invariant()
    def what_is_kept_stays_as_it_was(self) -> None:
        for end in self.ends:
            for number, (length, found) in (*end.kept.items(), *end.older.items()):
                assert found.equal(payload(number, length)), "it was overwritten"

    @invariant()
    def slots_are_no_more_than_needed(self) -> None:
        for end, link in zip(self.ends, self.links, strict=False):
            assert link.slots <= max(KEPT, end.most), f"{link.slots} slots; {end.most} messages at once"

    def teardown(self) -> None:
        """All that was sent comes; then all memory is given back."""
        if self.links and not self.cut_off:
            self._take_all()
        while self.links:
            self.links.pop().abandon()
        self.ends.clear()
        left, before = memory(), Links.before
        assert before is not None
        assert all(now <= then for now, then in zip(left, before, strict=True)), f"{left} is left of {before}"
        Links.before = left  # what ends late of the tests before this one must not hide a leak

    def _take_all(self) -> None:
        for me in (0, 1):
            self.settle(me)
        for me, end in enumerate(self.ends):
            for message in list(end.coming.values()):
                self._take(me, message)
        self.what_is_kept_stays_as_it_was()
        self.slots_are_no_more_than_needed()


Links.TestCase.settings = settings(max_examples=8, stateful_step_count=30, phases=[Phase.generate])
"""To shrink a failure takes longer than a test may."""
test_links = Links.TestCase
