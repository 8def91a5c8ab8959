"""Messages between processes: none is lost for its size, a poster never waits, and what is no message is told."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from pipeline.runtime.channel import Channel, ChannelClosed, ChannelFull
from pipeline.wire import WireError


def pair(room: int = 16 << 20) -> tuple[Channel, Channel]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(a, room), Channel(b, room)


def test_messages_arrive_whole_and_in_order_whatever_their_size() -> None:
    a, b = pair()
    sent = [{"n": n, "text": "x" * size} for n, size in enumerate((0, 1, 70_000, 3_000_000, 5))]
    thread = threading.Thread(target=lambda: [a.send(message, 10.0) for message in sent])
    thread.start()
    assert [b.receive(10.0) for _ in sent] == sent
    thread.join(10.0)
    assert b.receive(0.0) is None


def test_who_posts_never_waits_and_the_rest_goes_as_it_is_taken() -> None:
    a, b = pair()
    began = time.monotonic()
    for n in range(4000):
        a.post({"n": n, "text": "x" * 1000})
    assert time.monotonic() - began < 5.0
    assert a.waiting > 1_000_000, "the socket has no room for all of it"
    for n in range(4000):
        a.flush()
        message = b.receive(5.0)
        assert message is not None
        assert message["n"] == n
    assert a.waiting == 0


def test_an_end_that_takes_nothing_is_told() -> None:
    a, _b = pair(room=100_000)

    def flood() -> None:
        for _ in range(1000):
            a.post({"text": "x" * 1000})

    with pytest.raises(ChannelFull, match=r"\d+ bytes wait for the other end; allowed: 100000"):
        flood()
    with pytest.raises(TimeoutError, match=r"has not taken a message for 0\.1 s"):
        a.send({}, 0.1)


def test_what_was_sent_before_the_end_is_still_received() -> None:
    a, b = pair()
    a.post({"n": 1})
    a.close()
    assert b.receive(1.0) == {"n": 1}
    with pytest.raises(ChannelClosed):
        b.receive(1.0)
    b.post({"n": 2})  # told where it is read from
    with pytest.raises(ChannelClosed):
        b.send({"n": 3}, 1.0)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xff\xff\xff\xff", r"a message of 4294967295 bytes; expected at most"),
        (b"\x00\x00\x00\x02[]", "a message is a JSON list; expected an object"),
        (b"\x00\x00\x00\x03\xff\xfe{", "a message is no JSON"),
        (b"\x00\x01\x86\xa0" + b"[" * 100_000, "a message is no JSON"),
    ],
)
def test_what_is_no_message_is_told(data: bytes, said: str) -> None:
    a, b = pair()
    threading.Thread(target=a.socket.sendall, args=(data,)).start()
    with pytest.raises(WireError, match=said):
        b.receive(10.0)


def test_nobody_waits_longer_than_asked() -> None:
    _a, b = pair()
    began = time.monotonic()
    assert b.receive(0.1) is None
    assert time.monotonic() - began < 1.0
    assert not b.ready
