"""A file of text as one document, read as it is asked for."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from pathlib import Path

from jobs.files import not_utf8, readable
from jobs.pieces import PIECE, piece_end

_BYTES = 1 << 20
"""That are read at a time."""
_NOT_YET = 0.999


class TextFile:
    """A file that is one document, or none if it is empty: called `name` and known by `fields`, or by its path. Raises
    CorpusError, for its bytes when they are read."""

    has_fields = False

    def __init__(self, path: Path, name: str = "", fields: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._about = name or str(path), fields or {"file": str(path)}
        with readable(path):
            self.num_bytes = path.stat().st_size

    def __len__(self) -> int:
        return int(self.num_bytes > 0)

    def __getitem__(self, index: int, /) -> str:
        return "".join(piece for piece, _ in self.pieces(index))

    def pieces(self, index: int, /) -> Iterator[tuple[str, float]]:
        """See jobs.pieces: the file is never in memory whole."""
        text, at = "", 0
        for decoded, at in self._decoded():
            text += decoded
            while len(text) > PIECE:
                end = piece_end(text[:PIECE])
                yield text[:end], min(at / max(self.num_bytes, at), _NOT_YET)
                text = text[end:]
        yield text, 1.0

    def _decoded(self) -> Iterator[tuple[str, int]]:
        """The text without its byte order mark, bit by bit, and how many bytes were read."""
        at, begun, held = 0, False, b""
        with readable(self._path), self._path.open("rb") as file:
            while came := file.read(_BYTES) or held:
                last = came is held
                held = held if last else held + came
                try:
                    text, used = codecs.utf_8_decode(held, "strict", last)
                except UnicodeDecodeError as error:
                    raise not_utf8(self._path, held[error.start], at + error.start) from error
                at, held = at + used, held[used:]
                if text:
                    yield text if begun else text.removeprefix("\ufeff"), at
                    begun = True

    def about(self, index: int, /) -> tuple[str, Mapping[str, str]]:
        return self._about
