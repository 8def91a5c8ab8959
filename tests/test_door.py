"""Gloo's listening sockets: shut while no group is built, and whoever comes in then has to prove who it is."""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pipeline.runtime import groups
from pipeline.runtime.door import Door, prove
from pipeline.runtime.groups import GroupBuilder

linux = pytest.mark.skipif(sys.platform != "linux", reason="a filter on a socket is Linux's")


def builders() -> list[GroupBuilder]:
    store = dist.HashStore()
    return [GroupBuilder(store, worker, "127.0.0.1", torch.device("cpu"), 10.0) for worker in (0, 1)]


def build(ends: list[GroupBuilder], name: str) -> list[str]:
    """What building a group of both comes to on each end: "" or its error; and a sum over it is right."""

    def one(end: GroupBuilder) -> str:
        try:
            group, tensor = end.build(name, [0, 1]), torch.ones(2)
            group.allreduce([tensor]).wait(timedelta(seconds=5))
            return "" if tensor.tolist() == [2.0, 2.0] else "a wrong sum"
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, ends))


@contextmanager
def strangers(door: Door, say: bytes, count: int) -> Iterator[None]:
    """So many connections that each say this, for as long as the context lasts."""
    with ExitStack() as stack:
        for _ in range(count):
            end = stack.enter_context(socket.create_connection(door.addresses[0], timeout=2))
            end.sendall(say)
        time.sleep(0.1)
        yield


@linux
def test_nobody_gets_in_while_no_group_is_built() -> None:
    door = Door("127.0.0.1")
    assert len(door.addresses) == 1
    with pytest.raises(TimeoutError):
        socket.create_connection(door.addresses[0], timeout=0.2)
    with door.held_open(), door.held_open():
        socket.create_connection(door.addresses[0], timeout=2).close()
    with pytest.raises(TimeoutError):
        socket.create_connection(door.addresses[0], timeout=0.2)


def test_a_group_goes_on_behind_a_shut_door_and_others_are_built() -> None:
    ends = builders()
    assert build(ends, "one") == ["", ""]
    assert build(ends, "two") == ["", ""]
    assert ends[0]._door is not None
    if sys.platform == "linux":
        with pytest.raises(TimeoutError):
            socket.create_connection(ends[0]._door.addresses[0], timeout=0.2)


@linux
def test_a_stranger_that_takes_a_members_place_is_found_out_and_the_next_group_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says the numbers by which gloo tells its connections apart before the member does."""
    monkeypatch.setattr(groups, "_CONNECT_S", 1.0)
    ends = builders()
    for end in ends:
        end._door = Door("127.0.0.1")
    with ExitStack() as stack:
        for end in ends:
            assert end._door is not None
            stack.enter_context(end._door.held_open())
            for number in range(4):
                stack.enter_context(strangers(end._door, struct.pack("q", number), 1))
        assert all(build(ends, "taken")), "both ends must see that this is no group"
        assert build(ends, "next") == ["", ""]


@pytest.mark.parametrize("say", [b"", b"abc", b"\xff" * 4096, b"\x00" * 4096], ids=["nothing", "half", "ones", "zeros"])
@linux
def test_whatever_a_stranger_says_to_an_open_door_costs_a_group_at_most(
    say: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "_CONNECT_S", 1.0)
    ends = builders()
    ends[0]._door = Door("127.0.0.1")
    with ends[0]._door.held_open(), strangers(ends[0]._door, say, 20):
        build(ends, "one")
        assert build(ends, "two") == ["", ""]


class Said:
    """A group of two whose other member says this."""

    def __init__(self, proof: bytes) -> None:
        self.proof = proof

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Said:
        return self

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Said:
        tensors[0].copy_(torch.frombuffer(bytearray(self.proof), dtype=torch.uint8))
        return self

    def wait(self, timeout: timedelta) -> bool:
        return True


def test_a_proof_that_is_sent_back_proves_nothing() -> None:
    heard: list[bytes] = []

    class Mirror(Said):
        def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Said:
            heard.append(bytes(tensors[0].tolist()))
            return self

    prove(Mirror(_other(b"k" * 32)), b"k" * 32, 0, 2, 1.0)
    for proof in (heard[0], bytes(32), _other(b"j" * 32)):
        with pytest.raises(RuntimeError, match="member 1 does not know the key of the group"):
            prove(Said(proof), b"k" * 32, 0, 2, 1.0)


def _other(key: bytes) -> bytes:
    """The proof of member 1 to member 0."""
    heard: list[bytes] = []

    class Ear(Said):
        def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Said:
            heard.append(bytes(tensors[0].tolist()))
            return self

    with suppress(RuntimeError):
        prove(Ear(bytes(32)), key, 1, 2, 1.0)
    return heard[0]
