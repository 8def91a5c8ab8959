"""Files of text: read and decoded, with one message by name for what is not there or is not text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        return decode(self._path, read(self._path)).removeprefix("\ufeff")

    def about(self, index: int, /) -> tuple[str, Mapping[str, str]]:
        return self._about
