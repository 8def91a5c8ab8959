"""The links and groups of one worker, edited from view to view: only what touches a changed worker is rebuilt.

What a view builds counts once all members say that they have theirs; until then it may be half built on the other
side, so a view that is ended before that takes it along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.runtime.groups import Group, GroupBuilder, Way, poison
from pipeline.runtime.reducer import Reducer, most_started
from pipeline.runtime.transport import LinkError, Shape, Transport

_FIRST_TAG, _TAGS = 16, 1 << 30  # of what is carried: smaller ones are others'
Pairs = set[tuple[int, int]]
Shapes = Mapping[tuple[int, int], Shape]


def all_kept(each: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What everyone's `Communicator.kept`, by worker, comes to: the links (low, high) that both ends have, and the
    sums."""
    links = {worker: set(kept["links"]) for worker, kept in each.items()}
    both = sorted((a, b) for a, peers in links.items() for b in peers if a < b and a in links.get(b, ()))
    return {"links": both, "sums": most_started({worker: kept["sums"] for worker, kept in each.items()})}


@dataclass
class Communicator:
    """Edits the links of `transport` and has `reducer` edit its groups. `max_bytes` is the largest message of a
    link."""

    transport: Transport
    reducer: Reducer
    builder: GroupBuilder
    max_bytes: int
    shared: bool = True
    """Whether workers of one machine share memory."""
    demanded: bool = False
    """Whether all that have a link must."""
    carrying: dict[str, tuple[tuple[int, ...], Group]] = field(default_factory=dict)
    """The groups over which state is being restored, by name: they are ended like the others."""
    _unconfirmed: set[int] = field(default_factory=set)

    @property
    def peers(self) -> set[int]:
        """The workers with which this one is in a group."""
        return self.reducer.peers | {w for members, _ in list(self.carrying.values()) for w in members}

    def poison(self, lost: set[int]) -> None:
        """End, from any thread, what waits in a group that has lost a member: its sockets close, its waiters raise."""
        self.reducer.poison(lost)
        for members, group in list(self.carrying.values()):
            if lost & set(members):
                poison(group, members, self.transport.worker, lost)

    def quiesce(self, workers: set[int], deadline: float) -> None:
        """Leave the old view: drop what is broken or touches a worker that is not in `workers`. Raises nothing."""
        for peer in list(self.transport.links):
            if peer not in workers or peer in self._unconfirmed or peer in self.transport.mailbox.broken():
                self.transport.drop(peer)
        self._unconfirmed = set()
        self.reducer.quiesce(workers, deadline)

    def kept(self) -> dict[str, Any]:
        """What is left after `quiesce`, as JSON, for the others to see."""
        return {"links": sorted(self.transport.links), "sums": dict(self.reducer.started)}

    def agree(self, kept: Mapping[str, Any], deadline: float) -> None:
        """Drop what another end has dropped, and bring what is left in step; `kept` is what everyone's comes to.

        Afterwards no sum is under way. Raises LinkError when a group does not come in step.
        """
        held = {tuple(pair) for pair in kept["links"]}
        for peer in list(self.transport.links):
            if (min(peer, me := self.transport.worker), max(peer, me)) not in held:
                self.transport.drop(peer)
        self.reducer.agree(kept["sums"], deadline)

    def edit(self, view: int, pairs: Pairs, parts: Mapping[str, tuple[int, ...]], shapes: Shapes | None = None) -> None:
        """Build the links of `pairs` and the groups of `parts` that are missing. Raises LinkError; ConfigError where
        memory is to be shared and cannot be.

        All members of the view call this with the same arguments, after the same `agree`; they meet in one order.
        """
        transport, me = self.transport, self.transport.worker
        transport.view = view
        before = set(transport.links)
        wanted = {low if high == me else high for low, high in pairs if me in (low, high)}
        for peer in before - wanted:
            transport.drop(peer)
        try:
            transport.connect(
                self.builder, pairs, max_bytes=self.max_bytes, shared=self.shared, demanded=self.demanded,
                shapes=shapes,
            )  # fmt: skip
            self.reducer.edit(view, parts, self.builder)
        except RuntimeError as error:
            raise LinkError(f"the links of view {view} could not be built: {error}") from error
        finally:
            self._unconfirmed.update(set(transport.links) - before)

    @contextmanager
    def ways(self, view: int, number: int, pairs: Mapping[int, tuple[int, int]]) -> Iterator[dict[int, Way]]:
        """The ways over which move `number` of a view is made, by the place of the source among its sources; `pairs`
        are (source, taker), of which this worker is one. Two who sum something together have a group already; for
        others one is built, for this alone. Raises RuntimeError where the other does not come."""
        ways, built, tag = dict[int, Way](), list[str](), _FIRST_TAG + (view << 12 | number) % _TAGS
        try:
            for place, pair in pairs.items():
                peer = pair[1] if pair[0] == self.transport.worker else pair[0]
                if (way := self.reducer.way(peer, tag)) is None:
                    built.append(name := f"view{view}/restore{number}/{place}")
                    group = self.builder.build(name, pair)
                    self.carrying[name] = pair, group
                    way = Way(group, pair.index(peer), tag)
                ways[place] = way
            yield ways
        finally:
            for name in built:
                self.carrying.pop(name, None)

    def confirm(self) -> None:
        """All members have built theirs."""
        self._unconfirmed = set()
        self.reducer.confirm()
