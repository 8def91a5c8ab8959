"""A view change edits links and groups: what touches no changed worker stays the same object on the same socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch

from launch.worker_main import connect
from pipeline.runtime.groups import GroupBuilder
from pipeline.runtime.reducer import Reducer
from pipeline.runtime.transport import LinkError, Transport
from pipeline.schedule.ops import Op
from recovery.communicator import Communicator, all_kept
from tests.harness import hosted_store

X = Op("F", (0, 1), 0)
PARTS = {"0:1": (0, 2), "1:2": (1, 3)}
PAIRS = {(0, 1), (1, 2), (2, 3)}


class Member:
    """Links, sums over one gradient, and who edits them."""

    def __init__(self, worker: int, address: dict[str, Any], shared: bool = True) -> None:
        self.id = worker
        self.transport = Transport(worker)
        self.gradient = torch.ones(64)
        self.reducer = Reducer(worker, lambda _: self.gradient, timeout_s=20.0)
        builder = GroupBuilder(
            connect(address, 20.0), worker, "127.0.0.1", torch.device("cpu"), 20.0, self.transport.mailbox.woken
        )
        self.communicator = Communicator(self.transport, self.reducer, builder, max_bytes=4096, shared=shared)


def together(members: list[Member], act: Callable[[Member], Any]) -> dict[int, Any]:
    """Every member in a thread of its own; what each returned or raised, by id."""
    found: dict[int, Any] = {}

    def run(member: Member) -> None:
        try:
            found[member.id] = act(member)
        except Exception as error:
            found[member.id] = error

    threads = [threading.Thread(target=run, args=(m,)) for m in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == len(members), "a member hangs"
    return found


def sockets() -> set[tuple[Any, Any]]:
    return {(c.laddr, c.raddr) for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED}


def enter(view: int, pairs: set[tuple[int, int]], parts: dict[str, tuple[int, ...]]) -> Callable[[Member], None]:
    def act(member: Member) -> None:
        member.transport.mailbox.advance(view, 0)
        member.communicator.edit(view, pairs, parts)
        member.communicator.confirm()

    return act


@pytest.mark.parametrize("shared", [False, True])
def test_only_what_touches_a_changed_worker_is_rebuilt(shared: bool) -> None:
    with hosted_store() as (_, address):
        members = [Member(w, address, shared) for w in range(4)]
        clients = sockets()
        assert set(together(members, enter(1, PAIRS, PARTS)).values()) == {None}
        a, b, c, d = members
        first = sockets() - clients
        assert len(first) == 2 * (len(PARTS) + (0 if shared else len(PAIRS))), "a socket per pair, seen from both ends"
        links = {m.id: dict(m.transport.links) for m in members}
        kept = {m.id: m.reducer.group("0:1") for m in (a, c)}
        d.transport.close()
        for link in d.transport.links.values():
            link.abandon()
        d.reducer._groups.clear()  # its process is gone, and with it its sockets
        a.reducer.start("0:1")  # worker 0 has begun its sum, worker 2 was interrupted before

        alive = {0, 1, 2, 4}
        survivors = [a, b, c]
        together(survivors, lambda m: m.communicator.quiesce(alive, time.monotonic() + 10))
        new = Member(4, address, shared)
        told = all_kept({m.id: m.communicator.kept() for m in [*survivors, new]})
        assert set(together(survivors, lambda m: m.communicator.agree(told, time.monotonic() + 10)).values()) == {None}
        more = sockets()
        parts = {"0:1": (0, 2), "1:2": (1, 4)}
        assert set(together([*survivors, new], enter(2, {(0, 1), (1, 2), (2, 4)}, parts)).values()) == {None}
        assert first & sockets() == first & more, "an unaffected socket was closed by the edit"
        assert len(first & sockets()) == 2 * (1 if shared else 3), "links 0-1 and 1-2, and the group of 0 and 2"
        for member in survivors:
            for peer in set(member.transport.links) & {0, 1, 2}:
                assert member.transport.links[peer] is links[member.id][peer]
        assert a.reducer.group("0:1") is kept[0]
        assert c.reducer.group("0:1") is kept[2]

        for m in (a, c):
            m.gradient = torch.full((64,), 1.0 + m.id)
            m.reducer.clear()
            m.reducer.start("0:1")
        for m in (a, c):
            m.reducer.ended("0:1", time.monotonic() + 10)
            assert torch.equal(m.gradient, torch.full((64,), 4.0)), "the kept group is out of step"
        c.transport.send(1, X, 4, torch.ones(3))
        assert torch.equal(new.transport.receive(1, X, 2, time.monotonic() + 10), torch.ones(3))
        for member in [*survivors, new]:
            member.transport.close()


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_kept_group_comes_in_step_whoever_saw_a_view_that_the_other_did_not(ahead: int) -> None:
    """One of two has agreed on view 2 and left it again, the other was interrupted in it before it agreed."""
    with hosted_store() as (_, address):
        members = [Member(w, address) for w in range(2)]
        together(members, enter(1, set(), {"0:1": (0, 1)}))
        together(members, lambda m: m.communicator.quiesce({0, 1}, time.monotonic() + 10))
        members[ahead].reducer.ended("0:1", time.monotonic() + 10)
        members[ahead].reducer.clear()
        for _ in range(2):  # a view that ends before anybody agrees, and one that does not
            together(members, lambda m: m.communicator.quiesce({0, 1}, time.monotonic() + 10))
        votes = {m.id: m.communicator.kept() for m in members}
        found = together(members, lambda m: m.communicator.agree(all_kept(votes), time.monotonic() + 10))
        assert set(found.values()) == {None}
        for m in members:
            m.gradient = torch.full((64,), 1.0 + m.id)
            m.reducer.clear()
            m.reducer.start("0:1")
        for m in members:
            assert m.reducer.ended("0:1", time.monotonic() + 10)
            assert torch.equal(m.gradient, torch.full((64,), 3.0)), "the kept group is out of step"


def test_waiting_for_a_member_that_never_comes_is_ended_by_the_next_view() -> None:
    with hosted_store() as (_, address):
        members = [Member(0, address), Member(1, address)]
        threading.Timer(0.2, lambda: [m.transport.mailbox.wake(2, "view 2 has begun") for m in members]).start()
        began = time.monotonic()
        found = together(members, enter(1, {(0, 1), (0, 2), (1, 2)}, {}))
        assert time.monotonic() - began < 2
        for error in found.values():
            assert isinstance(error, LinkError)
            assert "view 2 has begun" in str(error)
        for member in members:
            together([member], lambda m: m.communicator.quiesce({0, 1}, time.monotonic() + 5))
            assert not member.transport.links, "what a view built that was never ready is still there"


def test_a_sum_over_a_lost_member_is_ended_from_another_thread() -> None:
    """Worker 0 waits for worker 1, which is alive but will never come: worker 2 is lost."""
    with hosted_store() as (_, address):
        members = [Member(w, address) for w in range(3)]
        together(members, enter(1, set(), {"0:1": (0, 1, 2)}))
        a = members[0]
        a.reducer.start("0:1")
        threading.Timer(0.2, lambda: a.communicator.poison({2})).start()
        began = time.monotonic()
        assert not a.reducer.ended("0:1", time.monotonic() + 15)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("lost", [{2}, {1, 2}])
def test_poisoning_is_harmless_where_nobody_waits(lost: set[int]) -> None:
    with hosted_store() as (_, address):
        members = [Member(w, address) for w in range(3)]
        together(members, enter(1, set(), {"0:1": (0, 1, 2)}))
        members[0].communicator.poison(lost)
        assert members[0].communicator.kept() == {"links": [], "sums": {"0:1": 0}}


def test_state_goes_over_a_group_that_both_have_and_what_nobody_took_is_in_nobodys_way() -> None:
    """The second move is in a later view: the first one's end was interrupted before it had received anything."""
    with hosted_store() as (_, address):
        members = [Member(w, address) for w in range(3)]
        together(members, enter(1, set(), {"0:1": (0, 1), "1:2": (1, 2)}))
        before = sockets()
        left = torch.full((4,), 7.0)

        def move(view: int) -> Callable[[Member], Any]:
            def act(member: Member) -> Any:
                if member.id == 2:
                    return None
                with member.communicator.ways(view, 0, {0: (1, 0)}) as ways:
                    if member.id == 1:
                        work = ways[0].send(left if view == 1 else torch.arange(4.0))
                        return work if view == 1 else work.wait(timedelta(seconds=10))
                    if view == 1:
                        return None
                    ways[0].recv(found := torch.empty(4)).wait(timedelta(seconds=10))
                    return found

            return act

        together(members, move(1))
        found = together(members, move(2))
        assert torch.equal(found[0], torch.arange(4.0))
        assert sockets() == before, "a group was built for what one that was there could carry"
        assert all(m.communicator.carrying == {} for m in members)


def test_two_who_have_no_group_meet_in_one_for_the_move_alone() -> None:
    with hosted_store() as (_, address):
        members = [Member(w, address) for w in range(3)]
        together(members, enter(1, set(), {"0:1": (0, 1)}))

        def act(member: Member) -> Any:
            pair = {0: (2, 0)} if member.id != 1 else {}
            with member.communicator.ways(1, 3, pair) as ways:
                if member.id == 2:
                    ways[0].send(torch.ones(4)).wait(timedelta(seconds=10))
                    assert list(member.communicator.carrying) == ["view1/restore3/0"]
                    assert member.communicator.peers == {0, 2}, "a loss ends it"
                elif member.id == 0:
                    ways[0].recv(found := torch.empty(4)).wait(timedelta(seconds=10))
                    return found
            return None

        found = together(members, act)
        assert found[2] is None
        assert torch.equal(found[0], torch.ones(4))
        assert all(m.communicator.carrying == {} for m in members)
