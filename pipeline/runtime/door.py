"""Gloo's listening socket, kept shut but for the milliseconds in which a group is built, and proof of who came in.

Gloo believes whoever connects: a stranger that says a small number first is taken for the member that was expected.
(torch has been built without gloo's TLS.) So the kernel drops all that is sent to the socket except while a group is
built, and then every two members show each other, over their new connection, that they share a key which only they
could read in the run's store. Where the filter cannot be set (it is Linux's) the proof stands alone.
"""

from __future__ import annotations

import ctypes
import hmac
import os
import socket
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

_ATTACH_FILTER, _DETACH_FILTER = 26, 27  # of a socket, in asm-generic/socket.h
_RETURN = 6  # of classic BPF: how many bytes of a packet are let through
_DROP_ALL = ctypes.create_string_buffer(struct.pack("HBBI", _RETURN, 0, 0, 0))
_FILTER = struct.pack("HP", 1, ctypes.addressof(_DROP_ALL))
_TAG = 2
_MAKING = threading.Lock()


class Connected(Protocol):
    """What a proof goes over."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Any: ...
    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Any: ...


class Door:
    """A gloo device that listens on `address`, shut. Several threads may hold it open at once."""

    def __init__(self, address: str) -> None:
        with _MAKING:
            before = set(_listening())
            self.device: Any = dist.ProcessGroupGloo.create_device(hostname=address)
            self._sockets = [_again(fd) for fd in set(_listening()) - before]
        for each in self._sockets:
            weakref.finalize(self, each.close)
        self._inside, self._lock = 0, threading.Lock()
        self._shut()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """(host, port) of what listens."""
        return [each.getsockname() for each in self._sockets]

    @contextmanager
    def held_open(self) -> Iterator[None]:
        """Let connections in."""
        with self._lock:
            self._inside += 1
            for each in self._sockets:
                with suppress(OSError):  # there was no filter
                    each.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._shut()

    def _shut(self) -> None:
        for each in self._sockets:
            with suppress(OSError):  # a system without: who connects still has to prove itself
                each.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, _FILTER)


def _listening() -> Iterator[int]:
    """The descriptors of this process at which it listens for TCP connections."""
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    with _again(int(name)) as each:
                        tcp = each.family in (socket.AF_INET, socket.AF_INET6) and each.type == socket.SOCK_STREAM
                        if tcp and each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                            yield int(name)


def _again(descriptor: int) -> socket.socket:
    return socket.socket(fileno=os.dup(descriptor))


def prove(group: Connected, key: bytes, rank: int, size: int, timeout_s: float) -> None:
    """Show every other member of a new group that this one knows its key, and see that they do. Raises RuntimeError
    where one does not, or says nothing in time."""
    others = [peer for peer in range(size) if peer != rank]
    heard = {peer: torch.empty(32, dtype=torch.uint8) for peer in others}
    timeout = timedelta(seconds=timeout_s)
    awaited = [group.recv([heard[peer]], peer, _TAG) for peer in others]
    said = [torch.frombuffer(bytearray(_proof(key, rank, peer)), dtype=torch.uint8) for peer in others]
    awaited += [group.send([proof], peer, _TAG) for proof, peer in zip(said, others, strict=True)]
    for work in awaited:
        work.wait(timeout)
    for peer in others:
        if not hmac.compare_digest(bytes(heard[peer].tolist()), _proof(key, peer, rank)):
            raise RuntimeError(f"who has connected as member {peer} does not know the key of the group")


def _proof(key: bytes, sender: int, receiver: int) -> bytes:
    return hmac.digest(key, b"%d to %d" % (sender, receiver), "sha256")
