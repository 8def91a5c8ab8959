"""Files of text: read and decoded, with one message by name for what is not there or is not text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ALLOWED = "stdlib, UTF-8 text files, files of JSON (lines or an array), globs of them, or hf:NAME[@CONFIG][:SPLIT]"


class CorpusError(ValueError):
    """Text that cannot be had: names the file or the spec, what was found and what is allowed."""


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise CorpusError for what the operating system says about `path` inside."""
    try:
        yield
    except OSError as error:
        raise CorpusError(f"{str(path)!r} cannot be read: {error.strerror}; allowed: {ALLOWED}") from error


def read(path: Path, start: int = 0, length: int = -1) -> bytes:
    """`length` bytes of a file from byte `start` on, all that follow unless given. Raises CorpusError."""
    with readable(path), path.open("rb") as file:
        file.seek(start)
        return file.read(length)


def decode(path: Path, data: bytes, start: int = 0) -> str:
    """The text of `data`, which begins at byte `start` of the file. Raises CorpusError naming the byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, data[error.start], start + error.start) from error


def not_utf8(path: Path, byte: int, offset: int) -> CorpusError:
    """What is said of a byte that is no UTF-8."""
    return CorpusError(f"{str(path)!r} is not UTF-8: byte {byte:#04x} at offset {offset}; allowed: text in UTF-8")
