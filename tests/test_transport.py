"""Messages, the mailbox, and links between real processes' groups (here: two groups in two threads of one process)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

from launch.worker_main import connect
from pipeline.runtime.groups import GroupBuilder, NcclGroup, poison
from pipeline.runtime.link import FIRST, HEADER_BYTES, PIECE, Engines, Link, as_bytes, pack
from pipeline.runtime.message import Header
from pipeline.runtime.shared_link import SharedLink
from pipeline.runtime.transport import LinkError, Mailbox, Shape, Transport
from pipeline.schedule.ops import Op
from tests.emulated_device import LateEngine
from tests.harness import hosted_store

X = Op("F", (0, 2), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (1, 2, 3, 4), (0, 3)])
def test_message_round_trips(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    payload = torch.arange(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].view(shape).to(dtype)
    first = pack(Header.of(4, 7, X, payload, 1.5), as_bytes(payload))
    header = Header.unpack(first[:HEADER_BYTES].numpy().tobytes(), payload.nbytes)
    found = first[HEADER_BYTES:].view(header.dtype).view(header.shape)
    assert (header.view, header.step, header.op, header.deliver_at) == (4, 7, X, 1.5)
    assert (header.dtype, header.shape, header.num_bytes) == (dtype, shape, payload.nbytes)
    assert Header.unpack(header.pack(), payload.nbytes) == header
    assert torch.equal(found, payload)


def test_mailbox_drops_what_is_stale() -> None:
    box = Mailbox()
    box.advance(2, 5)
    box.put(1, 9, X, 0, 0.0, torch.ones(1))
    box.put(2, 4, X, 0, 0.0, torch.ones(1))
    for view, step in ((1, 9), (2, 4)):
        with pytest.raises(LinkError, match="did not come within"):
            box.get(view, step, X, 0, time.monotonic() + 0.01)
    box.put(2, 6, X, 0, 0.0, torch.ones(1))  # a peer that is ahead
    box.advance(2, 6)
    assert torch.equal(box.get(2, 6, X, 0, time.monotonic() + 1), torch.ones(1))


def test_waiters_are_woken_by_loss_and_by_a_view_change() -> None:
    for act, words in (
        (lambda box: box.lose(7, "connection closed"), "connection closed"),
        (lambda box: box.wake(3, "view 3"), "view 3"),
    ):
        box, found = Mailbox(), []

        def wait(box: Mailbox = box, found: list[str] = found) -> None:
            try:
                box.get(0, 0, X, 7, time.monotonic() + 30)
            except LinkError as error:
                found.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.05)
        act(box)
        thread.join(2)
        assert not thread.is_alive()
        assert words in found[0]
        assert "F[0:2]#3 from worker 7" in found[0]


def test_a_message_that_came_before_the_loss_is_still_used() -> None:
    box = Mailbox()
    box.put(0, 0, X, 7, 0.0, torch.ones(1))
    box.lose(7, "gone")
    assert torch.equal(box.get(0, 0, X, 7, time.monotonic() + 1), torch.ones(1))


def _pair(
    shapes: dict[tuple[int, int], Shape] | None = None, max_bytes: int = 4096, shared: bool = False
) -> list[Transport]:
    """Workers 3 and 5, connected by gloo, or as workers of one machine."""
    with hosted_store() as (_, address):
        ends = [Transport(3, 1), Transport(5, 1)]
        threads: list[threading.Thread] = []
        for end in ends:  # each with a client of its own: one that waits keeps others from using it
            builder = GroupBuilder(connect(address, 10.0), end.worker, "127.0.0.1", torch.device("cpu"), 10.0)
            more = {"max_bytes": max_bytes, "shapes": shapes, "shared": shared}
            threads.append(threading.Thread(target=end.connect, args=(builder, {(3, 5)}), kwargs=more))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert all(isinstance(link, SharedLink) == shared for end in ends for link in end.links.values())
    return ends


either = pytest.mark.parametrize("shared", [False, True], ids=["gloo", "shared"])


@either
def test_links_carry_messages_both_ways_in_any_order(shared: bool) -> None:
    a, b = _pair(shared=shared)
    sent = {m: torch.randn(3, 5) for m in range(20)}
    for m, tensor in sent.items():
        a.send(0, Op("F", (0, 1), m), 5, tensor)
        b.send(0, Op("B", (1, 2), m), 3, -tensor)
    deadline = time.monotonic() + 10
    for m in reversed(sent):
        assert torch.equal(b.receive(0, Op("F", (0, 1), m), 3, deadline), sent[m])
        assert torch.equal(a.receive(0, Op("B", (1, 2), m), 5, deadline), -sent[m])
    a.flush(deadline)
    b.flush(deadline)
    a.close()
    with pytest.raises(LinkError, match="it has left"):
        b.receive(1, X, 3, time.monotonic() + 5)
    b.close()


@either
def test_too_large_a_payload_is_refused(shared: bool) -> None:
    a, b = _pair(max_bytes=16, shared=shared)
    with pytest.raises(LinkError, match=r"F\[0:2\]#3 has 400 bytes for worker 5"):
        a.send(0, X, 5, torch.zeros(100))
    a.close()
    b.close()


@either
def test_a_shaped_link_takes_latency_and_bandwidth(shared: bool) -> None:
    a, b = _pair({(3, 5): Shape(latency_s=0.1, bandwidth=4000.0)}, shared=shared)
    began = time.monotonic()
    for m in range(2):
        a.send(0, Op("F", (0, 1), m), 5, torch.zeros(100))  # 400 bytes: 0.1 s on the link each, one after the other
    assert time.monotonic() - began < 0.09, "sending waits for the link"
    b.receive(0, Op("F", (0, 1), 0), 3, began + 10)
    first = time.monotonic() - began
    b.receive(0, Op("F", (0, 1), 1), 3, began + 10)
    second = time.monotonic() - began
    b.send(0, X, 3, torch.zeros(100))
    unshaped = time.monotonic()
    a.receive(0, X, 5, began + 10)
    assert first >= 0.2
    assert second >= 0.3
    assert time.monotonic() - unshaped < 0.1
    a.close()
    b.close()


# ---- what ends a link is told ----


class Sockets:
    """A group of one end: receives what a test gives it, and sends into the void."""

    def __init__(self) -> None:
        self.incoming: list[torch.Tensor | Exception] = []
        self.arrived = threading.Event()
        self.gone = threading.Semaphore(0)
        self.late = False
        """Whether a receive that is given up ends none that was there before."""

    class Done:
        """A transfer that is waited for."""

        def __init__(self, wait: Callable[[], None]) -> None:
            self._wait = wait

        def wait(self, timeout: timedelta = timedelta(0)) -> bool:
            self._wait()
            return True

        def is_completed(self) -> bool:
            return False  # as gloo's, until somebody has waited

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Done:
        def wait() -> None:
            if tag == 1 and self.late:
                return
            assert self.arrived.wait(10)
            found = self.incoming.pop(0) if self.incoming else RuntimeError("Connection closed by peer")
            if isinstance(found, Exception):
                raise found
            tensors[0][: found.numel()].copy_(found)

        return self.Done(wait)

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Done:
        return self.Done(lambda: self.gone.acquire(timeout=10) and None)

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Done:
        raise NotImplementedError


def a_link(sockets: Sockets, box: Mailbox) -> Link:
    return Link(7, sockets, (0, 1), box, max_bytes=1024)


def broken_header(**changes: int) -> torch.Tensor:
    buffer = pack(Header.of(0, 1, X, torch.ones(4)), as_bytes(torch.ones(4)))
    words = buffer[:104].view(torch.int64)
    for place, value in {"kind": 2, "dtype": 6, "ndim": 7, "extent": 9}.items():
        if place in changes:
            words[value] = changes[place]
    return buffer


@pytest.mark.parametrize(
    "buffer",
    [
        broken_header(kind=99), broken_header(kind=-1), broken_header(dtype=17), broken_header(ndim=5),
        broken_header(ndim=-1), broken_header(extent=-4), broken_header(extent=1 << 40), broken_header(extent=300),
        torch.full((200,), 255, dtype=torch.uint8),
    ],
)  # fmt: skip
def test_a_message_that_is_none_is_the_loss_of_the_link(buffer: torch.Tensor) -> None:
    sockets, box = Sockets(), Mailbox()
    sockets.incoming.append(buffer)
    sockets.arrived.set()
    link = a_link(sockets, box)
    with pytest.raises(LinkError, match=r"will not come: a message is none: "):
        box.get(0, 1, X, 7, time.monotonic() + 10)
    link.abandon()


def test_a_buffer_for_which_there_is_no_memory_is_the_loss_of_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    sockets, box, empty = Sockets(), Mailbox(), torch.empty

    def refusing(*size: Any, **more: Any) -> torch.Tensor:
        if size == (1024 + HEADER_BYTES,):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1152")
        return empty(*size, **more)

    monkeypatch.setattr(torch, "empty", refusing)
    link = a_link(sockets, box)
    with pytest.raises(LinkError, match=r"will not come: .*can't allocate memory"):
        box.get(0, 1, X, 7, time.monotonic() + 10)
    sockets.arrived.set()
    link.abandon()


def test_a_link_that_is_abandoned_says_nothing_of_the_one_that_takes_its_place() -> None:
    """Its thread ends late, when a new link to the same peer may be there already."""
    sockets, box = Sockets(), Mailbox()
    link = a_link(sockets, box)
    sockets.late = True
    link.abandon()
    box.forget(7)
    sockets.arrived.set()  # of nothing that is a message
    link.join(10.0)
    assert box.broken() == set()


def test_what_has_left_is_held_no_longer() -> None:
    """gloo tells of a transfer's end only to who waits for it; nobody flushes here, and the buffers go all the same."""
    sockets, box = Sockets(), Mailbox()
    link = a_link(sockets, box)
    for _ in range(3):
        link.send(0, 1, X, torch.ones(4))
    assert link.in_flight == 3
    sockets.gone.release(2)
    deadline = time.monotonic() + 5
    while link.in_flight > 1 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert link.in_flight == 1
    with pytest.raises(LinkError, match="1 messages to worker 7 did not leave in time"):
        link.flush(time.monotonic() + 0.05)
    sockets.gone.release()
    link.flush(time.monotonic() + 5)
    sockets.arrived.set()
    link.abandon()


def test_what_no_message_can_carry_is_refused() -> None:
    with pytest.raises(LinkError, match=r"a payload of 5 dimensions of torch\.float32"):
        Header.of(0, 1, X, torch.ones(1, 1, 1, 1, 1))
    with pytest.raises(LinkError, match=r"torch\.bool"):
        Header.of(0, 1, X, torch.ones(1, dtype=torch.bool))


# ---- pieces ----

SIZES = [0, 4, FIRST - 4, FIRST, FIRST + 4, FIRST + PIECE - 4, FIRST + PIECE, FIRST + 2 * PIECE + 4]


@pytest.mark.parametrize("device", [False, True], ids=["cpu", "emulated device"])
def test_pieces_make_the_message_again(monkeypatch: pytest.MonkeyPatch, device: bool) -> None:
    """Of every size about the limits, several under way at once, both ways; a device's copies end late."""
    if device:
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more))
        monkeypatch.setattr(Transport, "_engines_of", lambda *_: Engines(LateEngine("down", 1), LateEngine("up", 2)))
    a, b = _pair(max_bytes=max(SIZES), shared=False)
    sent = {m: torch.arange(size // 4, dtype=torch.int32).view(torch.float32) + m for m, size in enumerate(SIZES)}
    for m, tensor in sent.items():
        a.send(0, Op("F", (0, 1), m), 5, tensor)
        b.send(0, Op("B", (1, 2), m), 3, tensor.view(-1, 1).expand(-1, 1).t())
    deadline = time.monotonic() + 60
    for m in reversed(sent):
        assert torch.equal(b.receive(0, Op("F", (0, 1), m), 3, deadline), sent[m])
        assert torch.equal(a.receive(0, Op("B", (1, 2), m), 5, deadline), sent[m][None])
    a.flush(deadline)
    b.flush(deadline)
    a.close()
    b.close()


def test_a_copy_from_a_device_that_fails_is_told() -> None:
    class Failing(LateEngine):
        def _copy(self, *_: Any) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    sockets, box = Sockets(), Mailbox()
    down, up = Failing("down", 0), LateEngine("up", 1)
    link = Link(7, sockets, (0, 1), box, max_bytes=1024)
    link._engines = Engines(down, up)
    with pytest.MonkeyPatch.context() as patch:
        empty = torch.empty
        patch.setattr(torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more))
        link.send(0, 1, X, torch.ones(4))
        with pytest.raises(LinkError, match="failed: a payload could not be copied: an illegal memory"):
            link.flush(time.monotonic() + 10)
        with pytest.raises(LinkError, match="a payload could not be copied"):
            link.send(0, 1, X, torch.ones(4))
    link._engines = None
    sockets.arrived.set()
    link.abandon()
    down.close()
    up.close()


# ---- NCCL's sums, by the contract of gloo ----


class Sums:
    """What a test says of a sum on a device."""

    def __init__(self) -> None:
        self.done = self.aborted = False

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Sums:
        return self

    def is_completed(self) -> bool:
        return self.done

    def wait(self) -> bool:
        return True

    def abort(self) -> None:
        self.aborted = True


def test_a_sum_over_nccl_ends_at_its_deadline_or_when_its_group_is_ended() -> None:
    sums = Sums()
    group = NcclGroup(sums)
    work = group.allreduce([torch.ones(1)])
    with pytest.raises(RuntimeError, match=r"a sum over NCCL has not ended after 0\.01 s"):
        work.wait(timedelta(seconds=0.01))
    threading.Timer(0.05, lambda: poison(group, [0, 1], 0, {1})).start()
    with pytest.raises(RuntimeError, match="the group of a sum over NCCL was ended"):
        work.wait(timedelta(seconds=10))
    assert sums.aborted
    other = Sums()
    work, other.done = NcclGroup(other).allreduce([torch.ones(1)]), True
    assert work.wait(timedelta(seconds=10))
    with pytest.raises(NotImplementedError, match="activations do not go over NCCL"):
        group.recv([], 0, 0)
