"""Links in shared memory: what is copied, slots that come back, peers that stop, end, or talk nonsense."""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch.worker_main import connect
from pipeline.runtime import groups, transport
from pipeline.runtime.groups import GroupBuilder
from pipeline.runtime.mailbox import LinkError, Mailbox
from pipeline.runtime.message import HEADER_BYTES, Header
from pipeline.runtime.shared_link import SharedLink
from pipeline.runtime.slots import HostSlot, map_slot
from pipeline.runtime.transport import Transport
from pipeline.schedule.ops import Op
from pipeline.settings import ConfigError
from tests.emulated_device import EmulatedDriver, emulated
from tests.harness import hosted_store

SIZE = 4096
X = Op("F", (0, 2), 3)


def sockets() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@contextmanager
def two(memory: str = "host") -> Iterator[tuple[SharedLink, SharedLink, Mailbox, Mailbox]]:
    """The ends that workers 3 and 5 have of one link, and what has arrived at each."""
    ends, boxes = sockets(), (Mailbox(), Mailbox())
    more = [emulated(seed) if memory == "device" else {} for seed in (0, 7)]
    a, b = (
        SharedLink(peer, end, box, max_bytes=SIZE, **each)
        for peer, end, box, each in zip((5, 3), ends, boxes, more, strict=True)
    )
    try:
        yield a, b, *boxes
    finally:
        a.abandon()
        b.abandon()
        for each in more:
            if each:
                each["copies"].close()


either = pytest.mark.parametrize("memory", ["host", "device"])


def got(box: Mailbox, peer: int, number: int, step: int = 0) -> Tensor:
    return box.get(0, step, Op("F", (0, 1), number), peer, time.monotonic() + 10)


@either
def test_slots_are_used_again_and_again(memory: str) -> None:
    """However many messages there are, two slots do where each is used before the next but one comes."""
    with two(memory) as (a, b, _, box):
        for number in range(200):
            a.send(0, 0, Op("F", (0, 1), number), torch.full((16, 16), float(number)))
            assert torch.equal(got(box, 3, number), torch.full((16, 16), float(number)))
        assert b.slots == 2
        assert a.slots == 2


@either
def test_what_is_kept_is_not_overwritten(memory: str) -> None:
    """There are as many slots as payloads in use, and each is itself."""
    with two(memory) as (a, b, _, box):
        kept = []
        for number in range(40):
            a.send(0, 0, Op("F", (0, 1), number), torch.full((100,), float(number)))
            kept.append(got(box, 3, number))
        assert [float(each.sum()) for each in kept] == [100.0 * number for number in range(40)]
        assert b.slots >= 40
        views = [each[10:] for each in kept]
        del kept
        a.send(0, 0, Op("F", (0, 1), 40), torch.zeros(100))
        assert [float(each[0]) for each in views] == list(map(float, range(40)))
        most = b.slots
        del views
        for number in range(41, 200):
            a.send(0, 0, Op("F", (0, 1), number), torch.full((100,), float(number)))
            got(box, 3, number)
        assert b.slots == most


def test_what_is_free_goes_back_to_the_system() -> None:
    """All but two slots of a link; and what is written then is right."""

    def shared() -> float:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssShmem"))) / 1024

    ends, box, size = sockets(), Mailbox(), 4 << 20
    a, b = (SharedLink(peer, end, box, max_bytes=size) for peer, end in zip((5, 3), ends, strict=True))
    before = shared()
    kept = []
    for number in range(10):
        a.send(0, 0, Op("F", (0, 1), number), torch.full((size // 4,), float(number)))
        kept.append(got(box, 3, number))
    assert shared() - before >= 40
    kept.clear()
    deadline = time.monotonic() + 10
    while shared() - before > 20 and time.monotonic() < deadline:  # each is mapped twice here
        time.sleep(0.01)
    assert shared() - before <= 20
    for number in range(10):
        a.send(0, 1, Op("F", (0, 1), number), torch.full((size // 4,), float(number)))
        kept.append(got(box, 3, number, step=1))
    assert [float(each.sum()) for each in kept] == [size // 4 * float(number) for number in range(10)]
    a.abandon()
    b.abandon()


@either
def test_a_payload_is_kept_for_a_backward_pass(memory: str) -> None:
    with two(memory) as (a, _, __, box):
        a.send(0, 0, Op("F", (0, 1), 0), torch.arange(6.0))
        x = got(box, 3, 0).requires_grad_()
        loss = (x.square() * 3).sum()
        del x
        gc.collect()
        for number in range(1, 30):
            a.send(0, 0, Op("F", (0, 1), number), torch.full((6,), -1.0))
        loss.backward()
        assert loss.item() == 3 * sum(i * i for i in range(6))


def test_what_waits_for_a_slot_is_not_copied_twice() -> None:
    """It is the sender's own memory until there is a slot, and goes as soon as it is copied."""
    ends, box = sockets(), Mailbox()
    a = SharedLink(5, ends[0], Mailbox(), max_bytes=SIZE)
    payloads = [torch.full((64,), float(number)) for number in range(30)]
    places = [payload.data_ptr() for payload in payloads]
    for number in range(30):
        a.send(0, 0, Op("F", (0, 1), number), payloads[number])
    assert [payload.data_ptr() for _, payload in a._waiting] == places
    b = SharedLink(3, ends[1], box, max_bytes=SIZE)
    assert [float(got(box, 3, number)[0]) for number in range(30)] == list(map(float, range(30)))
    a.flush(time.monotonic() + 5)
    assert a.in_flight == 0
    gone = [weakref.ref(payload) for payload in payloads]
    del payloads
    assert not any(each() for each in gone)
    a.abandon()
    b.abandon()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (1, 2, 3, 4), (0, 3)])
def test_every_form(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    payload = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    with two() as (a, _, __, box):
        a.send(0, 0, Op("F", (0, 1), 0), payload.transpose(0, -1).contiguous().transpose(0, -1))
        found = got(box, 3, 0)
        assert found.dtype == dtype
        assert torch.equal(found, payload)
        with pytest.raises(LinkError, match=r"has 8192 bytes for worker 5; links carry 4096 at most"):
            a.send(0, 0, X, torch.zeros(2048))
        with pytest.raises(LinkError, match="links carry up to 4"):
            a.send(0, 0, X, torch.zeros(1, 1, 1, 1, 1))


@either
def test_what_is_stale_gives_its_slot_back(memory: str) -> None:
    with two(memory) as (a, b, _, box):
        box.advance(0, 5)
        for number in range(100):
            a.send(0, 4, Op("F", (0, 1), number), torch.ones(4))
        a.send(0, 5, Op("F", (0, 1), 0), torch.ones(4))
        assert torch.equal(got(box, 3, 0, step=5), torch.ones(4))
        a.flush(time.monotonic() + 5)
        had = b.slots
        for number in range(100, 120):
            a.send(0, 4, Op("F", (0, 1), number), torch.ones(4))
            a.flush(time.monotonic() + 5)
        assert b.slots <= had + 1


@either
def test_both_ways_from_several_threads(memory: str) -> None:
    """Each end sends while it receives, and holds what it got for as long as it likes."""
    with two(memory) as (a, b, box_a, box_b):
        wrong: list[str] = []

        def send(link: SharedLink, seed: int) -> None:
            for number in random.Random(seed).sample(range(300), 300):
                link.send(0, seed, Op("F", (0, 1), number), torch.full((number % 7 + 1, 50), number + seed / 2))

        def take(box: Mailbox, peer: int, seed: int) -> None:
            held: list[Tensor] = []
            drawn = random.Random(seed + 10)
            for number in drawn.sample(range(300), 300):
                found = got(box, peer, number, step=seed)
                if found.shape != (number % 7 + 1, 50) or not bool((found == number + seed / 2).all()):
                    wrong.append(f"{number}: {found}")
                held.append(found)
                if len(held) > 6:
                    held.pop(drawn.randrange(len(held)))

        work = [(send, a, 0), (send, b, 1), (send, a, 1), (take, box_b, 3, 0), (take, box_a, 5, 1), (take, box_b, 3, 1)]
        threads = [threading.Thread(target=each[0], args=each[1:]) for each in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert not wrong


# ---- the end ----


@either
def test_goodbye(memory: str) -> None:
    with two(memory) as (a, b, _, box):
        a.send(0, 0, Op("F", (0, 1), 0), torch.ones(3))
        a.close()
        b.join(5)
        assert torch.equal(got(box, 3, 0), torch.ones(3))  # it came before
        with pytest.raises(LinkError, match="will not come: it has left"):
            got(box, 3, 1)


@either
def test_a_cut(memory: str) -> None:
    with two(memory) as (a, b, box_a, box_b):
        a.cut()
        for box, peer in ((box_a, 5), (box_b, 3)):
            with pytest.raises(LinkError, match="the connection was closed"):
                got(box, peer, 0)
        for link in (a, b):
            link.join(5)
            with pytest.raises(LinkError, match=r"sending to worker . failed: the connection was closed"):
                link.send(0, 0, X, torch.ones(1))
            with pytest.raises(LinkError, match="failed"):
                link.flush(time.monotonic() + 5)


@either
def test_a_link_that_is_abandoned_says_nothing(memory: str) -> None:
    with two(memory) as (a, _, box, __):
        a.abandon()
        assert box.broken() == set()


def test_a_peer_that_is_stopped_holds_nobody_up() -> None:
    """It reads nothing: sending goes on at once, and the flush ends at its deadline."""
    end, other = sockets()
    link = SharedLink(5, end, Mailbox(), max_bytes=SIZE)
    began = time.monotonic()
    for number in range(3000):  # more than the socket takes
        link.send(0, 0, Op("F", (0, 1), number), torch.ones(4))
    with pytest.raises(LinkError, match="3000 messages to worker 5 did not leave in time"):
        link.flush(time.monotonic() + 0.05)
    assert time.monotonic() - began < 5
    link.abandon()
    other.close()


_PEER = """
import socket, sys, time, torch
from pipeline.runtime.mailbox import Mailbox
from pipeline.runtime.shared_link import SharedLink
from pipeline.schedule.ops import Op
end, box = socket.socket(fileno=int(sys.argv[1])), Mailbox()
link = SharedLink(3, end, box, max_bytes=4096)
x = box.get(0, 0, Op("F", (0, 1), 0), 3, time.monotonic() + 20)
link.send(0, 0, Op("B", (0, 1), 0), x * 2)
time.sleep(60)
"""


def test_a_peer_that_is_killed() -> None:
    """A real process, SIGKILL: what it sent is still there, the link is lost at once, and no memory is left."""
    end, other = sockets()
    process = subprocess.Popen([sys.executable, "-c", _PEER, str(other.fileno())], pass_fds=[other.fileno()])
    other.close()
    box = Mailbox()
    link = SharedLink(5, end, box, max_bytes=SIZE)
    try:
        link.send(0, 0, Op("F", (0, 1), 0), torch.arange(5.0))
        found = box.get(0, 0, Op("B", (0, 1), 0), 5, time.monotonic() + 20)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(LinkError, match="the connection was closed"):
            box.get(0, 0, Op("B", (0, 1), 1), 5, time.monotonic() + 5)
        assert torch.equal(found, 2 * torch.arange(5.0))
    finally:
        process.kill()
        process.wait()
        link.abandon()


NONE = [struct.pack("<qqq", *words, 0) for words in ((7, 0), (3, 2), (3, -1), (1, 5), (-1, 0))]
FULL = struct.pack("<qqq", 3, 0, 0)
HEADER = Header(0, 0, X, torch.float32, (1 << 20,)).pack()


@pytest.mark.parametrize(
    "data", [*NONE, b"x", FULL, FULL + bytes(HEADER_BYTES - 40), FULL + b"\xff" * HEADER_BYTES, FULL + HEADER]
)
def test_a_message_that_is_none_is_the_loss_of_the_link(data: bytes) -> None:
    end, other = sockets()
    box = Mailbox()
    link = SharedLink(5, end, box, max_bytes=SIZE)
    other.send(data)
    with pytest.raises(LinkError, match="will not come: a message is none"):
        got(box, 5, 0)
    link.join(5)
    other.close()


def test_a_slot_that_is_none_is_the_loss_of_the_link() -> None:
    for slot in (HostSlot(SIZE // 2), HostSlot(SIZE)):
        end, other = sockets()
        box = Mailbox()
        link = SharedLink(5, end, box, max_bytes=SIZE)
        descriptor = slot.descriptor
        if slot.size == SIZE:  # of the right size, but it might shrink
            descriptor = os.memfd_create("t")
            os.ftruncate(descriptor, SIZE)
        socket.send_fds(other, [bytes(24)], [descriptor])
        with pytest.raises(LinkError, match=r"will not come: a slot of (2048|4096) bytes; expected 4096, sealed"):
            got(box, 5, 0)
        link.join(5)
        other.close()
        slot.was_told()
        if descriptor != slot.descriptor:
            os.close(descriptor)


def test_a_slot_without_memory_is_the_loss_of_the_link() -> None:
    end, other = sockets()
    box = Mailbox()
    link = SharedLink(5, end, box, max_bytes=SIZE)
    other.send(bytes(24))
    with pytest.raises(LinkError, match="will not come: a slot of host memory with 0 descriptors; expected one"):
        got(box, 5, 0)
    link.join(5)
    other.close()


@either
def test_descriptors_are_closed(memory: str) -> None:
    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        with two(memory) as (a, _b, __, box):
            kept = []
            for number in range(20):
                a.send(0, 0, Op("F", (0, 1), number), torch.ones(2))
                kept.append(got(box, 3, number))
        del a, _b, box, kept
    assert count() <= before
    slot = HostSlot(SIZE)
    map_slot(os.dup(slot.descriptor), SIZE)[0] = 7
    slot.was_told()
    assert int(slot.payload(1, lambda: None)[0]) == 7


# ---- who is on this machine ----


def meet(
    monkeypatch: pytest.MonkeyPatch, machines: tuple[str, str], errors: list[Exception] | None = None
) -> list[Transport]:
    """Two workers, each on its machine; with `errors`, they must share memory, and say why they cannot."""

    def connect_(end: Transport, builder: GroupBuilder) -> None:
        try:
            end.connect(builder, {(3, 5)}, max_bytes=64, demanded=errors is not None)
        except ConfigError as error:
            assert errors is not None
            errors.append(error)

    said = {f"link-of-{worker}": name for worker, name in zip((3, 5), machines, strict=True)}
    for module in (groups, transport):
        monkeypatch.setattr(module, "machine", lambda: said[threading.current_thread().name])
    with hosted_store() as (_, address):
        ends = [Transport(3, 1), Transport(5, 1)]
        threads: list[threading.Thread] = []
        for end in ends:
            builder = GroupBuilder(connect(address, 10.0), end.worker, "127.0.0.1", torch.device("cpu"), 10.0)
            name = f"link-of-{end.worker}"
            threads.append(threading.Thread(target=connect_, args=(end, builder), name=name))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    return ends


@pytest.mark.parametrize(
    ("machines", "shared"), [(("m", "m"), True), (("m", "n"), False), (("", ""), False), (("m", ""), False)]
)
def test_only_workers_of_one_machine_share(
    monkeypatch: pytest.MonkeyPatch, machines: tuple[str, str], shared: bool
) -> None:
    a, b = meet(monkeypatch, machines)
    assert [isinstance(link, SharedLink) for end in (a, b) for link in end.links.values()] == [shared] * 2
    a.send(0, X, 5, torch.ones(2))
    assert torch.equal(b.receive(0, X, 3, time.monotonic() + 5), torch.ones(2))
    a.close()
    b.close()


@pytest.mark.parametrize(
    ("machines", "found"),
    [(("m", "n"), "they are not on one machine"), (("", ""), "this system has no memfd, or no Unix sockets")],
)
def test_shared_memory_that_is_demanded_and_cannot_be_is_refused_by_both(
    monkeypatch: pytest.MonkeyPatch, machines: tuple[str, str], found: str
) -> None:
    errors: list[Exception] = []
    ends = meet(monkeypatch, machines, errors)
    told = f"links is 'shm', which workers 3 and 5 cannot have: {found}; allowed here: auto, gloo"
    assert [str(error) for error in errors] == [told] * 2
    assert not any(end.links for end in ends)


def test_strangers_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's process knocks first: it is not taken for the peer."""
    listener = groups._listen()
    assert listener is not None
    users = iter([os.getuid() + 1, os.getuid()])
    monkeypatch.setattr(groups, "_user_of", lambda end: next(users))
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.connect(listener.getsockname())
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.connect(listener.getsockname())
    builder = GroupBuilder(None, 0, "127.0.0.1", torch.device("cpu"))  # type: ignore[arg-type]
    with builder._accept(listener, "x") as end:
        assert stranger.recv(1) == b""
        peer.send(b"me")
        assert end.recv(10) == b"me"
    for each in (stranger, peer, listener):
        each.close()


# ---- a device ----


def test_memory_of_a_device_is_given_back() -> None:
    """Both what was allocated and what was mapped, once nobody has a payload any more."""
    drivers = []
    with two("device") as (a, b, box_a, box_b):
        drivers = [link._memory._driver for link in (a, b)]  # type: ignore[attr-defined]
        for number in range(20):
            a.send(0, 0, Op("F", (0, 1), number), torch.full((20,), float(number)))
            b.send(0, 0, Op("B", (0, 1), number), torch.full((30,), float(-number)))
        kept = [got(box_b, 3, number) for number in range(20)]
        kept += [box_a.get(0, 0, Op("B", (0, 1), number), 5, time.monotonic() + 10) for number in range(20)]
        assert all(driver.maps for driver in drivers)
    del a, b, box_a, box_b
    gc.collect()
    assert [float(each[0]) for each in kept] == [*map(float, range(20)), *(-float(n) for n in range(20))]
    del kept
    gc.collect()
    deadline = time.monotonic() + 10
    while any(driver.maps for driver in drivers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [driver.maps for driver in drivers] == [{}, {}]


def test_a_slot_is_not_given_back_while_the_device_reads_it() -> None:
    """The last who has the payload lets go, and what was queued for the device with it is not done yet."""
    with two("device") as (a, b, _, box):
        held, asked, used = threading.Event(), itertools.count(), b._copies.used
        late = [lambda then: threading.Thread(target=lambda: (held.wait(10), then(None)), daemon=True).start()]
        b._copies.used = lambda then: (late if next(asked) == 0 else [used])[0](then)  # type: ignore[method-assign]
        a.send(0, 0, Op("F", (0, 1), 0), torch.ones(8))
        place = got(box, 3, 0).data_ptr()

        def places(first: int, count: int) -> Iterator[int]:
            for number in range(first, first + count):
                a.send(0, 0, Op("F", (0, 1), number), torch.full((8,), float(number)))
                yield got(box, 3, number).data_ptr()

        assert place not in set(places(1, 20))
        held.set()
        assert place in set(places(21, 200))


@pytest.mark.parametrize("which", ["copy", "used"])
def test_what_a_device_cannot_do_is_the_loss_of_the_link(which: str) -> None:
    with two("device") as (a, b, _, box):

        def refuse(*arguments: object) -> None:
            arguments[-1](RuntimeError("an illegal memory access was encountered"))  # type: ignore[operator]

        setattr((a if which == "copy" else b)._copies, which, refuse)
        a.send(0, 0, Op("F", (0, 1), 0), torch.ones(8))
        if which == "used":
            got(box, 3, 0)
        with pytest.raises(LinkError, match="connection was closed" if which == "copy" else "is still in use: an ille"):
            got(box, 3, 1)
        a.join(5)
        with pytest.raises(LinkError, match=r"sending to worker 5 failed: "):
            a.send(0, 0, Op("F", (0, 1), 1), torch.ones(8))


def test_a_handle_that_is_none_is_the_loss_of_the_link() -> None:
    for said in (b"short", struct.pack("<qq", os.getpid(), 99999).ljust(64, b"\0")):
        end, other = sockets()
        box, more = Mailbox(), emulated(0)
        link = SharedLink(5, end, box, max_bytes=SIZE, **more)
        other.send(bytes(24) + said)
        with pytest.raises(LinkError, match=r"will not come: .*(a handle of 5 bytes|No such file)"):
            got(box, 5, 0)
        link.abandon()
        other.close()
        more["copies"].close()
    assert EmulatedDriver().handle_bytes == 64
