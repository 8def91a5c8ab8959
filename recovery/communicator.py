"""The links and groups of one worker, edited from view to view: only what touches a changed worker is rebuilt.

What a view builds counts once all members say that they have theirs; until then it may be half built on the other
side, so a view that is ended before that takes it along. Groups that are kept are brought in step: whoever was
interrupted before it could start a sum that others have started, in this view or an earlier one, starts it now.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from pipeline.runtime.groups import Group, GroupBuilder
from pipeline.runtime.transport import LinkError, Shape
from pipeline.runtime.worker import Worker
from pipeline.schedule.ops import Span

Pairs = set[tuple[int, int]]
Shapes = Mapping[tuple[int, int], Shape]


_ENDING_S = 5.0  # until a sum over a group whose sockets are closed has failed


@dataclass
class Communicator:
    """Edits `worker.transport` and `worker.groups`. `max_bytes` is the largest message of a link."""

    worker: Worker
    builder: GroupBuilder
    max_bytes: int
    backend: str = "gloo"
    members: dict[Span, tuple[int, ...]] = field(default_factory=dict)
    unconfirmed: tuple[set[int], set[Span]] = field(default_factory=lambda: (set(), set()))
    carrying: dict[str, tuple[tuple[int, ...], Group]] = field(default_factory=dict)
    """The groups over which state is being restored, by name: they are ended like the others."""

    @property
    def peers(self) -> set[int]:
        """The workers with which this one is in a group."""
        groups = [*list(self.members.values()), *(members for members, _ in list(self.carrying.values()))]
        return {worker for members in groups for worker in members}

    def poison(self, lost: set[int]) -> None:
        """End, from any thread, what waits in a group that has lost a member: its sockets close, its waiters raise."""
        for shard, members in list(self.members.items()):
            if lost & set(members):
                self._poison(self.worker.groups.get(shard), members, lost)
        for members, group in list(self.carrying.values()):
            if lost & set(members):
                self._poison(group, members, lost)

    def _poison(self, group: Group | None, members: tuple[int, ...], lost: set[int]) -> None:
        # A living peer before a lost one: a receive from a dead one fails without closing the others. Where there is
        # none, the lost one may be stopped or out of reach, and then a receive from it ends the wait.
        peer = next((w for w in sorted(members, key=lambda w: w in lost) if w != self.worker.id), None)
        if group is not None and peer is not None and self.backend == "gloo":
            try:
                work = group.recv([torch.empty(1)], members.index(peer), 1)
                work.wait(timedelta(milliseconds=1))
            except RuntimeError:
                return

    def quiesce(self, workers: set[int], deadline: float) -> None:
        """Leave the old view: drop what is broken or touches a worker that is not in `workers`. Raises nothing.

        Over groups that are kept a sum is started, so that nobody goes on waiting for this worker in one.
        """
        fresh_links, fresh_groups = self.unconfirmed
        for peer in list(self.worker.transport.links):
            if peer not in workers or peer in fresh_links or peer in self.worker.transport.mailbox.broken():
                self.worker.transport.drop(peer)
        for shard, members in list(self.members.items()):
            if not set(members) <= workers or shard in fresh_groups:
                self._poison(self.worker.groups.get(shard), members, set(members) - workers)
                self._end(shard, min(deadline, time.monotonic() + _ENDING_S))
                self._forget(shard)
        self.unconfirmed = (set(), set())
        for shard in list(self.members):
            if shard not in self.worker.reduced:
                self.worker.reduce(shard)
            elif self.worker.reduced[shard].is_completed() and not self._end(shard, deadline):
                self._forget(shard)

    def _end(self, shard: Span, deadline: float) -> bool:
        """Wait until a sum that was started no longer writes into the gradient; returns whether it went well."""
        try:
            if (work := self.worker.reduced.get(shard)) is not None:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        except RuntimeError:
            return False
        return True

    def kept(self) -> dict[str, list[Any]]:
        """What is left after `settle`, as JSON, for the others to see."""
        sums = [[*shard, self.worker.sums[shard]] for shard in self.members]
        return {"links": sorted(self.worker.transport.links), "sums": sums}

    def agree(self, votes: Mapping[int, Mapping[str, Any]], deadline: float) -> None:
        """Drop what another end has dropped, and bring what is left in step. `votes` are everyone's `kept`, by worker.

        Afterwards no sum is under way. Raises LinkError when a group does not come in step.
        """
        sums = {worker: {(lo, hi): number for lo, hi, number in vote["sums"]} for worker, vote in votes.items()}
        for peer in list(self.worker.transport.links):
            if self.worker.id not in votes[peer]["links"]:
                self.worker.transport.drop(peer)
        for shard, members in list(self.members.items()):
            if any(shard not in sums[member] for member in members):
                self._poison(self.worker.groups.get(shard), members, set())
                self._end(shard, min(deadline, time.monotonic() + _ENDING_S))
                self._forget(shard)
                continue
            if self.worker.sums[shard] < max(sums[member][shard] for member in members):
                self.worker.reduce(shard)
            if not self._end(shard, deadline):
                raise LinkError(f"workers {members} did not bring the group of shard {shard} in step")

    def _forget(self, shard: Span) -> None:
        self.members.pop(shard, None)
        self._groups.pop(shard, None)
        self.worker.reduced.pop(shard, None)
        self.worker.sums.pop(shard, None)

    @property
    def _groups(self) -> dict[Span, Group]:
        assert isinstance(self.worker.groups, dict)
        return self.worker.groups

    def edit(
        self, view: int, pairs: Pairs, shards: Mapping[Span, tuple[int, ...]], shapes: Shapes | None = None
    ) -> None:
        """Build the links of `pairs` and the groups of `shards` that are missing. Raises LinkError.

        All members of the view call this with the same arguments, after the same `settle`; they meet in one order.
        """
        transport, me = self.worker.transport, self.worker.id
        transport.view = view
        before = set(transport.links)
        wanted = {low if high == me else high for low, high in pairs if me in (low, high)}
        for peer in before - wanted:
            transport.drop(peer)
        try:
            transport.connect(self.builder, pairs, max_bytes=self.max_bytes, nccl=self.backend == "nccl", shapes=shapes)
            for shard, members in sorted(shards.items()):
                if me not in members or len(members) < 2 or self.members.get(shard) == members:
                    continue
                self._forget(shard)
                name = f"view{view}/shard{shard[0]}-{shard[1]}"
                self._groups[shard] = self.builder.build(name, members, self.backend)
                self.members[shard] = members
                self.unconfirmed[1].add(shard)
        except RuntimeError as error:
            raise LinkError(f"the links of view {view} could not be built: {error}") from error
        finally:
            self.unconfirmed[0].update(set(transport.links) - before)

    def confirm(self) -> None:
        """All members have built theirs."""
        self.unconfirmed = (set(), set())
