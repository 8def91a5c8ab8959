"""The loop of a store: one thread, all connections, nothing that waits.

Who has not proved that it knows the token costs a socket and 48 bytes, for a few seconds: there is room for so many,
and one more costs the oldest its connection. What cannot be opened costs a connection as well, and nothing else.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count

from pipeline.store.frames import FrameError, Seal, pack, unpack
from pipeline.store.handshake import (
    HELLO_BYTES,
    LEAST_BYTES,
    PROOF_BYTES,
    REFUSED,
    Refused,
    Secrets,
    begins_well,
    client_nonce,
    fresh_nonce,
)
from pipeline.store.table import Answer, Op, Table, Wrong

_PIECE = 1 << 18
_PROVE_S = 5.0
_UNPROVED = 512
_ACCEPTED = 16  # at once, before those that are known have their turn again
_FULL_S = 0.05
_LONGEST_S = 60.0
_IDLE_S, _PROBE_S, _PROBES = 30, 10, 3  # after which a machine that does not answer is gone


class _Connection:
    """One client. It asks for one thing at a time."""

    def __init__(self, end: socket.socket) -> None:
        self.end, self.since = end, time.monotonic()
        self.received, self.unsent = bytearray(), b""
        self.secrets: Secrets | None = None
        self.seals: tuple[Seal, Seal] | None = None
        self.asked: tuple[int, int, list[bytes]] | None = None
        """What waits for keys, as (op, its number, keys)."""
        self.missing: set[bytes] = set()
        self.waits = 0
        """The number of its newest wait."""


class StoreServer:
    """Serves a store on a listening socket, which is its own from now on, to who knows the token."""

    def __init__(self, listener: socket.socket, token: bytes) -> None:
        """Raises ValueError for a token that is too short."""
        if len(token) < LEAST_BYTES:
            raise ValueError(f"a token of {len(token)} bytes; allowed: {LEAST_BYTES} or more")
        listener.setblocking(False)
        self._listener, self._token, self._table = listener, token, Table()
        self._selector = selectors.DefaultSelector()
        self._unproved: OrderedDict[_Connection, None] = OrderedDict()
        self._waiting: dict[bytes, set[_Connection]] = {}
        self._due: list[tuple[float, int, int, _Connection]] = []
        self._order = count()
        self._closed_until = 0.0
        self._stop, self._stopped = socket.socketpair()
        self._selector.register(self._stopped, selectors.EVENT_READ)
        self._selector.register(listener, selectors.EVENT_READ)

    def stop(self) -> None:
        """From any thread: have `run` return."""
        self._stop.close()

    def run(self, until: int | None = None) -> None:
        """Serve until `stop`, or until the descriptor `until` can be read; all connections end with it."""
        if until is not None:
            self._selector.register(until, selectors.EVENT_READ)
        try:
            while True:
                for key, events in self._selector.select(self._patience()):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.data, _Connection):
                        self._serve(key.data, events)
                    else:
                        return
                self._expire()
        finally:
            for key in list(self._selector.get_map().values()):
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()
            self._stop.close()
            self._selector.close()

    # ---- connections ----

    def _patience(self) -> float | None:
        """Seconds to the next thing that is due."""
        due = [self._due[0][0]] if self._due else []
        due += [next(iter(self._unproved)).since + _PROVE_S] if self._unproved else []
        due += [self._closed_until] if self._closed_until else []
        return min(_LONGEST_S, max(0.0, min(due) - time.monotonic())) if due else None

    def _accept(self) -> None:
        for _ in range(_ACCEPTED):
            try:
                end, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor is left
                self._make_room()
                return
            end.setblocking(False)
            with suppress(OSError):  # it may be gone already
                watch_peer(end)
            self._selector.register(end, selectors.EVENT_READ, connection := _Connection(end))
            self._unproved[connection] = None
            if len(self._unproved) > _UNPROVED:
                self._end(next(iter(self._unproved)))

    def _make_room(self) -> None:
        """At the cost of who has not proved itself for longest; where all have, nobody is let in for a moment."""
        if self._unproved:
            self._end(next(iter(self._unproved)))
        else:
            self._selector.unregister(self._listener)
            self._closed_until = time.monotonic() + _FULL_S

    def _expire(self) -> None:
        now = time.monotonic()
        while self._unproved and (oldest := next(iter(self._unproved))).since + _PROVE_S <= now:
            self._end(oldest)
        while self._due and self._due[0][0] <= now:
            _, _, number, connection = heappop(self._due)
            if connection.waits == number and connection.asked is not None:
                missing = sorted(self._table.missing(connection.asked[2]))
                self._forget(connection)
                self._answer(connection, Answer.LATE, missing)
        if self._closed_until and self._closed_until <= now:
            self._closed_until = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _end(self, connection: _Connection) -> None:
        if connection.end.fileno() < 0:
            return
        self._forget(connection)
        self._unproved.pop(connection, None)
        self._selector.unregister(connection.end)
        connection.end.close()

    def _serve(self, connection: _Connection, events: int) -> None:
        """Whatever goes wrong here costs this connection alone."""
        if connection.end.fileno() < 0:  # it has ended since it was selected
            return
        try:
            if events & selectors.EVENT_WRITE:
                self._send(connection, b"")
            if events & selectors.EVENT_READ:
                self._read(connection)
        except (OSError, MemoryError):
            self._end(connection)

    def _read(self, connection: _Connection) -> None:
        proved = connection.seals is not None
        wanted = HELLO_BYTES if connection.secrets is None else PROOF_BYTES
        try:
            data = connection.end.recv(_PIECE if proved else wanted - len(connection.received))
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError("the other end is gone")
        connection.received += data
        if connection.seals is not None:
            self._take(connection, connection.seals[1])
        elif connection.secrets is None and not begins_well(connection.received):
            raise Refused("what has connected is no part of a run")
        elif len(connection.received) == wanted:
            self._prove(connection, bytes(connection.received))

    def _prove(self, connection: _Connection, said: bytes) -> None:
        """The next part of the handshake."""
        connection.received.clear()
        if connection.secrets is None:
            nonce = fresh_nonce()
            connection.secrets = Secrets.of(self._token, client_nonce(said), nonce)
            self._send(connection, nonce)
            return
        try:
            connection.secrets.check_client(said)
        except Refused:
            with suppress(OSError):
                connection.end.send(REFUSED)
            raise
        connection.seals = connection.secrets.seals(server=True)
        del self._unproved[connection]
        self._send(connection, connection.secrets.server_proof)

    def _send(self, connection: _Connection, data: bytes) -> None:
        """Send, and keep what does not go at once: until it has gone nothing more is read."""
        unsent = connection.unsent + data
        with suppress(BlockingIOError):
            unsent = unsent[connection.end.send(unsent) :] if unsent else b""
        if bool(unsent) != bool(connection.unsent):
            event = selectors.EVENT_WRITE if unsent else selectors.EVENT_READ
            self._selector.modify(connection.end, event, connection)
        connection.unsent = unsent

    # ---- requests ----

    def _take(self, connection: _Connection, seal: Seal) -> None:
        """Do what is asked, once it has come whole."""
        plain = None if connection.asked is not None else seal.take(connection.received)
        if connection.received and (plain is not None or connection.asked is not None):
            raise FrameError("a client that does not wait for its answers")
        if plain is not None:
            self._ask(connection, *unpack(plain))

    def _ask(self, connection: _Connection, op: int, seconds: float, number: int, fields: list[bytes]) -> None:
        if op in (Op.GET, Op.WAIT) and (missing := self._table.missing(fields)):
            connection.asked, connection.missing = (op, number, fields), set(missing)
            connection.waits += 1
            for key in connection.missing:
                self._waiting.setdefault(key, set()).add(connection)
            due = time.monotonic() + (seconds if seconds >= 0 else 0.0)  # NaN is in no order: it waits for nothing
            heappush(self._due, (due, next(self._order), connection.waits, connection))
            return
        self._do(connection, op, number, fields)

    def _do(self, connection: _Connection, op: int, number: int, fields: list[bytes]) -> None:
        try:
            found, written = self._table.apply(op, fields, number)
        except Wrong as error:
            self._answer(connection, Answer.WRONG, [str(error).encode()])
            return
        self._answer(connection, Answer.DONE, found)
        self._wake(written)

    def _answer(self, connection: _Connection, answer: Answer, fields: list[bytes]) -> None:
        assert connection.seals is not None
        try:
            self._send(connection, connection.seals[0].seal(pack(answer, fields)))
        except (OSError, FrameError):
            self._end(connection)

    def _wake(self, written: Iterable[bytes]) -> None:
        """Those for whom these were the last keys that they waited for."""
        for key in written:
            for connection in self._waiting.pop(key, ()):
                connection.missing.discard(key)
                if connection.missing or connection.asked is None:
                    continue
                op, number, keys = connection.asked
                if late := self._table.missing(keys):  # one that had come is deleted again
                    connection.missing = set(late)
                    for each in late:
                        self._waiting.setdefault(each, set()).add(connection)
                    continue
                self._forget(connection)
                self._do(connection, op, number, keys)

    def _forget(self, connection: _Connection) -> None:
        """It waits for nothing any more."""
        for key in connection.missing:
            if (others := self._waiting.get(key)) is not None:
                others.discard(connection)
                if not others:
                    del self._waiting[key]
        connection.asked, connection.missing = None, set()


def watch_peer(end: socket.socket) -> None:
    """Have the kernel send at once, and see that the machine at the other end is gone."""
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", _IDLE_S), ("TCP_KEEPINTVL", _PROBE_S), ("TCP_KEEPCNT", _PROBES)):
        if hasattr(socket, option):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
