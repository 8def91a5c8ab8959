"""The items of a file that is one JSON array, in one pass and in the memory of one item, whatever the file's size."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jobs.files import CorpusError, not_utf8

_BLANK = " \t\r\n"
_PIECE = 1 << 20
_LONGEST = 16
"""Characters of the longest token that a piece may end in, but for strings: -Infinity, \\ud83d\\ude00."""


class NoArrayError(CorpusError):
    """A file that begins like an array is not one of documents: says where it goes wrong."""


def items(path: Path, file: BinaryIO, allowed: str) -> Iterator[tuple[int, int, Any]]:
    """(first byte, byte after the last, what it says) of each object or string of the array that `file` holds.

    Raises NoArrayError, whose message ends in `allowed`, where the file stops being such an array, CorpusError for
    bytes that are no UTF-8, and RecursionError for an item that is nested too deeply.
    """
    window = _Window(path, file)

    def wrong(what: str) -> NoArrayError:
        return NoArrayError(f"{str(path)!r}{what}, at byte {window.byte}; allowed: {allowed}")

    window.peek()
    window.take()  # the bracket
    number = 0
    while (begins := window.peek()) != "]" or number:
        number += 1
        if begins not in ("{", '"'):
            raise wrong(f", item {number}: {_shown(begins)} where an object or a string should begin")
        try:
            yield window.value()
        except ValueError as error:
            raise wrong(f", item {number} is not JSON: {getattr(error, 'msg', error)}") from error
        follows = window.peek()
        if follows not in (",", "]"):
            raise wrong(f", item {number}: {_shown(follows)} where a comma or the end of the array should follow")
        if follows == "]":
            break
        window.take()
    window.take()
    if window.peek():
        raise wrong(f" goes on after its array, with {_shown(window.peek())}")


def _shown(character: str) -> str:
    return repr(character) if character else "the end of the file"


class _Window:
    """A part of a file's text that moves forward. `byte`: where in the file its unread part begins."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._read = "", 0, 0
        self.byte = 0
        if self._more() and self._text.startswith("\ufeff"):
            self.take()

    def _more(self) -> bool:
        """Read on, as much as is held already: an item that needs many pieces is parsed again for few of them."""
        held = len(self._utf8.getstate()[0])
        piece = self._file.read(max(_PIECE, len(self._text) - self._at))
        try:
            self._text, self._at = self._text[self._at :] + self._utf8.decode(piece, final=not piece), 0
        except UnicodeDecodeError as error:
            raise not_utf8(self._path, error.object[error.start], self._read - held + error.start) from error
        self._read += len(piece)
        return bool(piece)

    def peek(self) -> str:
        """The next character that is not blank; nothing at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self.take()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self) -> None:
        """Pass one character."""
        self.byte += len(self._text[self._at].encode())
        self._at += 1

    def value(self) -> tuple[int, int, Any]:
        """Pass an object or a string, and tell where it lies. Raises JSONDecodeError, RecursionError."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or len(self._text) - error.pos < _LONGEST
                if not (cut and self._more()):
                    raise
        start = self.byte
        self.byte += len(self._text[self._at : end].encode())
        self._at = end
        return start, self.byte, value
