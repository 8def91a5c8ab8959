"""Hashes that tell whether a text is the one of before: of one document, of many in their order."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator

from jobs.pieces import Texts, pieces
from jobs.rows import normal


class Letters:
    """The first of `digests`, of a document that is read for something else."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def through(self, document: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
        """The same pieces, seen."""
        for text, share in document:
            self.add(text)
            yield text, share

    def add(self, text: str) -> None:
        self._hash.update(text.encode())

    @property
    def digest(self) -> int:
        """Of what was seen: 64 bits."""
        return int.from_bytes(self._hash.digest(), "little")


def letters_of(texts: Texts, index: int) -> int:
    """The first of `document_digests` alone, which takes a small part of the time of both."""
    seen = Letters()
    for text, _ in pieces(texts, index):
        seen.add(text)
    return seen.digest


def document_digests(texts: Texts, index: int) -> tuple[int, str]:
    """Of a document of `texts`, which is read in pieces: see `digests`."""
    return digests(piece for piece, _ in pieces(texts, index))


def digests(document: Iterable[str]) -> tuple[int, str]:
    """Of a document in pieces: a hash of it to the letter, 64 bits; and one of what it says, however it is spaced, as
    that of a row [32 hex digits]."""
    letters, said, between = Letters(), hashlib.blake2b(b'["', digest_size=16), ""
    for words in _whole_words(document, letters.add):
        if text := normal(words):  # of words that are whole each is normal by itself
            said.update(json.dumps(between + text)[1:-1].encode())
            between = " "
    said.update(b'"]')
    return letters.digest, said.hexdigest()


def _whole_words(document: Iterable[str], seen: Callable[[str], None]) -> Iterator[str]:
    """The same text in pieces that end after white space, where there is any; `seen` is given what was read."""
    held = list[str]()
    for piece in document:
        seen(piece)
        last = "" if piece[-1:].isspace() else (piece.rsplit(None, 1) or [""])[-1]
        if len(last) < len(piece):
            yield "".join([*held, piece[: len(piece) - len(last)]])
            held.clear()
        held.append(last)
    yield "".join(held)


def chain(digests: Iterable[int]) -> str:
    """Of documents in their order, by their digests: 32 hex digits."""
    return hashlib.blake2b(array("Q", digests).tobytes(), digest_size=16).hexdigest()
