"""A document in pieces of about a million characters, so that one that is larger than memory can be read.

A piece ends after a line where it can. Cut like this, a text gives the same pieces wherever it lies: in memory, or in a
file that is read as it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

PIECE = 1 << 20
"""Characters of a piece."""


class Texts(Protocol):
    """What readers of text need: a Corpus, or a list of strings."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


@runtime_checkable
class InPieces(Protocol):
    """Texts that need not be read whole."""

    def pieces(self, index: int, /) -> Iterator[tuple[str, float]]:
        """A document: its pieces, and which share of it they end at, 1.0 for the last alone."""
        ...


def pieces(texts: Texts, index: int) -> Iterator[tuple[str, float]]:
    """A document of `texts` in pieces, with the share of it that is read. An empty one is one piece."""
    return texts.pieces(index) if isinstance(texts, InPieces) else cut(texts[index])


def cut(text: str) -> Iterator[tuple[str, float]]:
    """A text in pieces."""
    start = 0
    while (left := len(text) - start) > PIECE:
        end = start + piece_end(text[start : start + PIECE])
        yield text[start:end], min(end / len(text), 1 - 1 / left)
        start = end
    yield text[start:], 1.0


def piece_end(text: str) -> int:
    """Where the first piece ends of a text that goes on after these characters."""
    return text.rfind("\n") + 1 or len(text)
