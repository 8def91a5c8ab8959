"""What is said after the handshake: frames, each sealed with ChaCha20-Poly1305, and the fields inside.

A frame is its length (which is sealed along) and the sealed text. Each direction has a key of its own and counts its
frames in the nonce: one that is changed, repeated, left out or sent back cannot be opened, and the connection ends.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

LONGEST = 64 << 20
"""Bytes of the longest frame."""
_TAG_BYTES = 16
_LENGTH = struct.Struct("!I")
_NONCE = struct.Struct("!4xQ")
_HEAD = struct.Struct("!BdqI")


class FrameError(ConnectionError):
    """Something that is no frame of this connection: changed, out of order, too long, or not sealed by the other."""


class Seal:
    """One direction of a connection."""

    def __init__(self, key: bytes) -> None:
        self._cipher, self._count = ChaCha20Poly1305(key), 0

    def seal(self, plain: bytes) -> bytes:
        """The next frame. Raises FrameError for what is too long."""
        size = len(plain) + _TAG_BYTES
        if size > LONGEST:
            raise FrameError(f"a message of {len(plain)} bytes; allowed: {LONGEST - _TAG_BYTES}")
        head = _LENGTH.pack(size)
        return head + self._cipher.encrypt(self._nonce(), plain, head)

    def take(self, received: bytearray) -> bytes | None:
        """Open the frame at the front of what was received, and remove it; None where it is not whole. Raises
        FrameError."""
        if len(received) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack_from(received)
        if not _TAG_BYTES <= size <= LONGEST:
            raise FrameError(f"a frame of {size} bytes; allowed: {_TAG_BYTES} to {LONGEST}")
        end = _LENGTH.size + size
        if len(received) < end:
            return None
        try:
            plain = self._cipher.decrypt(
                self._nonce(), bytes(received[_LENGTH.size : end]), bytes(received[: _LENGTH.size])
            )
        except InvalidTag as error:
            raise FrameError("a frame that the other end has not sealed, or not now") from error
        del received[:end]
        return plain

    def _nonce(self) -> bytes:
        self._count += 1
        return _NONCE.pack(self._count)


def pack(kind: int, fields: Sequence[bytes], seconds: float = 0.0, number: int = 0) -> bytes:
    """A message: what it is, a time, a whole number, and its fields."""
    lengths = struct.pack(f"!{len(fields)}I", *map(len, fields))
    return b"".join((_HEAD.pack(kind, seconds, number, len(fields)), lengths, *fields))


def unpack(plain: bytes) -> tuple[int, float, int, list[bytes]]:
    """(kind, seconds, number, fields) of a message. Raises FrameError for what is none."""
    try:
        kind, seconds, number, count = _HEAD.unpack_from(plain)
        if count > len(plain):
            raise FrameError(f"a message of {count} fields in {len(plain)} bytes")
        lengths = struct.unpack_from(f"!{count}I", plain, _HEAD.size)
    except struct.error as error:
        raise FrameError("a message that is cut off") from error
    at, fields = _HEAD.size + 4 * count, list[bytes]()
    for length in lengths:
        fields.append(plain[at : at + length])
        at += length
    if at != len(plain):
        raise FrameError(f"a message of {len(plain)} bytes whose fields end at {at}")
    return kind, seconds, number, fields
