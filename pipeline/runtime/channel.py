"""JSON messages between two processes of one machine, over a Unix stream socket, each behind its length.

Who must never wait (a loop that looks after many) posts: what does not go at once is kept and goes later, up to a
bound, past which the other end is stuck and its messages would be lost: that is an error. Who talks to one peer alone
sends, and waits up to a deadline. A message has no size that the socket's buffer would forbid.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections import deque
from typing import Any

from pipeline.wire import WireError, parse

_LENGTH = struct.Struct("!I")
_LONGEST = 64 << 20
"""Bytes of the longest message that is taken from a peer."""
_PIECE = 1 << 16


class ChannelClosed(RuntimeError):
    """The other end is gone."""


class ChannelFull(RuntimeError):
    """The other end has not taken what was posted. Says how much waits, and the bound."""


class Channel:
    """One end. The socket is the channel's own from now on, and does not block. `room`: bytes that may wait."""

    def __init__(self, end: socket.socket, room: int = 16 << 20) -> None:
        end.setblocking(False)
        self.socket, self._room = end, room
        self._out, self._in = bytearray(), bytearray()
        self._messages: deque[dict[str, Any]] = deque()
        self._closed = self._gone = False  # for reading, for writing

    def fileno(self) -> int:
        """For selectors: readable when there may be a message, writable when `flush` may help."""
        return self.socket.fileno()

    @property
    def waiting(self) -> int:
        """Bytes that are posted and have not left."""
        return len(self._out)

    @property
    def ready(self) -> bool:
        """Whether there is something to receive: a message, a part of one, or the end."""
        return bool(self._messages) or self._ready(select.POLLIN, 0.0)

    def post(self, message: dict[str, Any]) -> None:
        """Send what goes at once, keep the rest for `flush`. Raises ChannelFull; that the other end is gone is told
        where it is read from."""
        data = json.dumps(message).encode()
        if len(self._out) + len(data) > self._room:
            raise ChannelFull(f"{len(self._out)} bytes wait for the other end; allowed: {self._room}")
        self._out += _LENGTH.pack(len(data)) + data
        self.flush()

    def flush(self) -> bool:
        """Send on, without waiting; whether all has left."""
        try:
            while self._out and (sent := self.socket.send(memoryview(self._out)[:_PIECE].tobytes())):
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._gone = True
            self._out.clear()
        return not self._out

    def send(self, message: dict[str, Any], timeout_s: float) -> None:
        """Post, and wait until all has left. Raises ChannelClosed, and TimeoutError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        self.post(message)
        while not self.flush():
            if not self._ready(select.POLLOUT, deadline - time.monotonic()):
                raise TimeoutError(f"the other end has not taken a message for {timeout_s:g} s")
        if self._gone:
            raise ChannelClosed("the other end is gone")

    def receive(self, timeout_s: float | None) -> dict[str, Any] | None:
        """The next message, or None if none comes within `timeout_s` (None: for as long as the other end lives).

        Raises ChannelClosed once the other end is gone and all that it has sent was received, and WireError for what
        is no message.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._messages:
            if self._closed:
                raise ChannelClosed("the other end is gone")
            if not self._ready(select.POLLIN, None if deadline is None else deadline - time.monotonic()):
                return None
            self._read()
        return self._messages.popleft()

    def _ready(self, event: int, left_s: float | None) -> bool:
        """Whether the socket is ready within so many seconds."""
        poll = select.poll()  # select knows no descriptor past 1,023
        poll.register(self.socket, event)
        return bool(poll.poll(None if left_s is None else max(0.0, 1000 * left_s)))

    def _read(self) -> None:
        try:
            data = self.socket.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._closed = not data
        self._in += data
        while len(self._in) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._in)
            if size > _LONGEST:
                raise WireError(f"a message of {size} bytes; expected at most {_LONGEST}")
            if len(self._in) < _LENGTH.size + size:
                return
            data = bytes(self._in[_LENGTH.size : _LENGTH.size + size])
            del self._in[: _LENGTH.size + size]
            self._messages.append(parse(data, "a message"))

    def close(self) -> None:
        """Let go of the socket."""
        self.socket.close()
