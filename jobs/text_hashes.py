"""Hashes that tell whether a text is the one of before: of one document, of many in their order."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable


def digest(text: str) -> int:
    """Of a document, to the letter: 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def chain(digests: Iterable[int]) -> str:
    """Of documents in their order, by their digests: 32 hex digits."""
    return hashlib.blake2b(array("Q", digests).tobytes(), digest_size=16).hexdigest()
