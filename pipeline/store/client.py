"""A client of a store, as torch's `Store`: process groups meet through it, and it fails as TCPStore does.

Whoever hands it to torch keeps it as well: torch calls back into this object. One thing is asked at a time; who would
wait beside another thread has a client of its own. What is waited for is waited for by the server, which tells when the
time is over; one that says nothing at all for longer than that is gone.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from pipeline.store.frames import FrameError, Seal, pack, unpack
from pipeline.store.handshake import (
    HELLO,
    NONCE_BYTES,
    PROOF_BYTES,
    Refused,
    Secrets,
    fresh_nonce,
)
from pipeline.store.server import watch_peer
from pipeline.store.table import Answer, Op

_PIECE = 1 << 18
_AGAIN_S = 0.02
_PROVE_S = 5.0
_SILENT_S = 60.0  # after the time in which there should have been an answer


class TokenRefused(dist.DistNetworkError):
    """There is a store, but not of this run: one end does not know the token of the other."""


class SealedStore(dist.Store):
    """A connection to the store at `host`:`port`, under `prefix`. `timeout_s` bounds the connecting, and what is waited
    for without a timeout of its own.

    Raises DistNetworkError where there is none in that time, or once it is gone, and TokenRefused; DistStoreError where
    keys do not come in time, or what is asked cannot be done.
    """

    def __init__(self, host: str, port: int, token: bytes, prefix: str = "", timeout_s: float = 60.0) -> None:
        super().__init__()
        self.set_timeout(timedelta(seconds=timeout_s))  # which whoever asks by torch's interface reads
        self._timeout_s = timeout_s
        self.host, self.port, self._token = host, port, token
        self._prefix = prefix + "/" if prefix else ""
        self._lock, self._received = threading.Lock(), bytearray()
        self._gone = ""
        self._end, self._seals = self._connect()

    # ---- connecting ----

    def _connect(self) -> tuple[socket.socket, tuple[Seal, Seal]]:
        """Until there is a store, or there is no more time."""
        deadline, pause, why = time.monotonic() + self._timeout_s, _AGAIN_S, ""
        while (left := deadline - time.monotonic()) > 0:
            try:
                end = socket.create_connection((self.host, self.port), min(left, _PROVE_S))
            except OSError as error:
                why = str(error)
            else:
                try:
                    return end, self._prove(end)
                except Refused as error:
                    end.close()
                    raise TokenRefused(f"at {self.host}:{self.port}: {error}") from error
                except OSError as error:  # it was too busy
                    end.close()
                    why = str(error)
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, 0.5)
        raise dist.DistNetworkError(f"there is no store at {self.host}:{self.port}: {why}")

    def _prove(self, end: socket.socket) -> tuple[Seal, Seal]:
        watch_peer(end)
        end.settimeout(_PROVE_S)
        end.sendall(HELLO + (mine := fresh_nonce()))
        secrets = Secrets.of(self._token, mine, self._exactly(end, NONCE_BYTES))
        end.sendall(secrets.client_proof)
        secrets.check_server(self._exactly(end, PROOF_BYTES))
        return secrets.seals(server=False)

    def _exactly(self, end: socket.socket, size: int) -> bytes:
        found = b""
        while len(found) < size:
            if not (piece := end.recv(size - len(found))):
                raise ConnectionResetError("it has closed the connection")
            found += piece
        return found

    def close(self) -> None:
        """Let go of the connection."""
        self._gone = "it was closed"
        self._end.close()

    # ---- asking ----

    def _ask(self, op: Op, fields: Sequence[bytes], seconds: float = 0.0, number: int = 0) -> list[bytes]:
        with self._lock:
            if self._gone:
                raise dist.DistNetworkError(self._told())
            answered = False
            try:
                if self._end.fileno() < 0:
                    self._end, self._seals = self._connect()
                found = self._exchange(pack(op, fields, seconds, number), seconds)
                answered = True
            except OSError as error:
                self._gone = str(error) or type(error).__name__
                raise dist.DistNetworkError(self._told()) from error
            finally:
                if not answered:  # of what is half said nothing can be made any more
                    self._end.close()
                    self._received.clear()
        answer, _, _, fields = found
        if answer == Answer.DONE:
            return list(fields)
        if answer == Answer.LATE:
            names = ", ".join(key.decode(errors="replace") for key in fields)
            raise dist.DistStoreError(f"wait timeout after {seconds * 1000:.0f}ms, keys: {names}")
        raise dist.DistStoreError(b" ".join(fields).decode(errors="replace"))

    def _told(self) -> str:
        return f"the store at {self.host}:{self.port} is gone: {self._gone}"

    def _exchange(self, message: bytes, seconds: float) -> tuple[int, float, int, list[bytes]]:
        mine, theirs = self._seals
        deadline = time.monotonic() + seconds + _SILENT_S
        self._end.settimeout(_SILENT_S)
        self._end.sendall(mine.seal(message))
        if seconds:
            self._end.settimeout(seconds + _SILENT_S)
        while (plain := theirs.take(self._received)) is None:
            if not (piece := self._end.recv(_PIECE)) or time.monotonic() > deadline:
                raise ConnectionResetError("it has closed the connection" if not piece else "it is too slow")
            self._received += piece
        if self._received:
            raise FrameError("it has said something that nobody has asked for")
        return unpack(plain)

    def _key(self, key: str) -> bytes:
        return (self._prefix + key).encode()

    def _patience(self, timeout: timedelta | None) -> float:
        return max(0.001, self._timeout_s if timeout is None else timeout.total_seconds())

    # ---- torch's interface ----

    def set(self, key: str, value: str | bytes) -> None:
        """Have `value` under a key."""
        self._ask(Op.SET, [self._key(key), _bytes(value)])

    def get(self, key: str) -> bytes:
        """What is under a key, once it is there."""
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """What is under each of these keys, once all are there."""
        return self._ask(Op.GET, [self._key(key) for key in keys], self._patience(None))

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        """Have each of these values under its key, all at once."""
        self._ask(
            Op.SET, [each for key, value in zip(keys, values, strict=True) for each in (self._key(key), _bytes(value))]
        )

    def add(self, key: str, value: int) -> int:
        """Add to the number under a key, which is 0 before; what it is then."""
        return int(self._ask(Op.ADD, [self._key(key)], number=value)[0])

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        """Have `desired_value` under a key where `expected_value` is, or nothing and it is ""; what is there then."""
        return self._ask(Op.COMPARE_SET, [self._key(key), _bytes(expected_value), _bytes(desired_value)])[0]

    def check(self, keys: list[str]) -> bool:
        """Whether all of these keys are there."""
        return bool(self._ask(Op.CHECK, [self._key(key) for key in keys])[0])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Until all of these keys are there."""
        self._ask(Op.WAIT, [self._key(key) for key in keys], self._patience(timeout))

    def delete_key(self, key: str) -> bool:
        """Take a key away; whether it was there."""
        return bool(self._ask(Op.DELETE, [self._key(key)])[0])

    def num_keys(self) -> int:
        """How many keys there are, under any prefix."""
        return int(self._ask(Op.NUM_KEYS, [])[0])

    def append(self, key: str, value: str | bytes) -> None:
        """Add to the end of what is under a key."""
        self._ask(Op.APPEND, [self._key(key), _bytes(value)])

    def has_extended_api(self) -> bool:
        """Whether many keys are set and read at once."""
        return True

    def clone(self) -> SealedStore:
        """Another connection to the same."""
        prefix, timeout_s = self._prefix.removesuffix("/"), self._timeout_s
        return SealedStore(self.host, self.port, self._token, prefix, timeout_s)

    deleteKey, getNumKeys = delete_key, num_keys  # as torch's own wrappers call them

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._end.close()


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
