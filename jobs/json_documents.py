"""Documents in files of JSON, which are known by what they hold, whatever their names end in.

    JSON lines  the first two lines that are not blank are JSON objects: every line is one, with the text in a field
    an array    the whole file is an array of objects, with the text in a field, or of strings, which are the text

A name that ends in .json, .jsonl or .ndjson promises one of the two, and a file that breaks the promise is an error;
under any other name it is text. So is Python source that begins with a bracket, an array of numbers, a file whose first
line is a JSON string, or one whose first line alone is an object, which is told. A file is checked from its first line
to its last when it is opened, so that its first fault is the one that is named, before any other work is done; then
only where its documents lie is held in memory.
"""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jobs.files import CorpusError, decode, read, readable
from jobs.json_array import NoArrayError, items

_ENDINGS = (".json", ".jsonl", ".ndjson")
_ALLOWED = "an object on each line, or one array of objects or of strings"
_PROMISED = f"{_ALLOWED}; other text under an ending of its own"
_KNOWN = f"{_ALLOWED}; other text whose first two lines are not both objects"
_MARK, _MARK_BYTES = "\ufeff", codecs.BOM_UTF8
_PIECE = 1 << 16
_TOLD = 12


class NoFieldError(CorpusError):
    """An object without the field that is to hold its text: says which other fields hold text."""

    def __init__(self, row: dict[Any, Any], field: str, where: str, lacking: str) -> None:
        names = [str(name).encode(errors="backslashreplace").decode() for name in row if isinstance(row[name], str)]
        told = ", ".join(names[:_TOLD]) + (", ..." if len(names) > _TOLD else "") or "none, as no field holds text"
        super().__init__(f"{where} has no field {field!r}{lacking}; allowed for text_field: {told}")


def field_text(row: object, field: str, where: str, lacking: str = "") -> str:
    """The text of a row. Raises NoFieldError, which says how many are `lacking` it, or CorpusError for no text."""
    if not isinstance(row, dict):
        raise CorpusError(f"{where} is a JSON {type(row).__name__}; allowed: an object with the field {field!r}")
    if field not in row:
        raise NoFieldError(row, field, where, lacking)
    if not isinstance(row[field], str):
        raise CorpusError(f"{where}: field {field!r} is {type(row[field]).__name__}; allowed: text")
    return row[field]


def open_json(path: Path, field: str, tell: Callable[[str], None] = lambda _: None) -> JsonDocuments | None:
    """The documents of a file of JSON; None for one of text. Raises CorpusError for the first fault of the file.

    `tell` takes a line about a file of text that may not have been meant to be one.
    """
    with readable(path), path.open("rb") as file:
        first = _first_line(file)
        begins = _is_object(first)
        second = _first_line(file) if begins else b""
        file.seek(0)
        if first.startswith(b"["):
            try:
                return _array(path, file, field)
            except NoArrayError:
                if _promised(path):
                    raise
                return None
        if _promised(path) or (begins and (not second or _is_object(second))):
            return _lines(path, file, field)
        if begins:
            tell(f"{str(path)!r} is read as text: its first line is a JSON object, and the one after it is none")
        return None


def _promised(path: Path) -> bool:
    return path.suffix.lower() in _ENDINGS


def _allowed(path: Path) -> str:
    return _PROMISED if _promised(path) else _KNOWN


def _first_line(file: BinaryIO) -> bytes:
    """What is not blank of the next such line, up to a piece of it where it cannot be an object."""
    pieces = iter(lambda: file.readline(_PIECE), b"")
    first = next((stripped for line in pieces if (stripped := line.removeprefix(_MARK_BYTES).lstrip())), b"")
    whole = not first.startswith(b"{") or first.endswith(b"\n")
    return first if whole else first + file.readline()


def _is_object(line: bytes) -> bool:
    try:
        return line.startswith(b"{") and isinstance(json.loads(line.decode()), dict)
    except RecursionError:  # nothing but JSON opens so many brackets; that it cannot be read is said later
        return True
    except ValueError:
        return False


class JsonDocuments:
    """The documents of a file of JSON, read when they are asked for; CorpusError then says that the file has changed.

    `field`: where an object has its text, None for strings. `unit`: what a message calls a document, line or item.
    """

    def __init__(self, path: Path, field: str | None, unit: str) -> None:
        self.has_fields = field is not None
        self._path, self._field, self._unit = path, field, unit
        self._starts, self._ends, self._numbers = array("q"), array("q"), array("q")
        self._lacking = 0
        self._first: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def num_bytes(self) -> int:
        """What the documents take in the file."""
        return sum(self._ends) - sum(self._starts)

    def __getitem__(self, index: int, /) -> str:
        start, number = self._starts[index], self._numbers[index]
        line = decode(self._path, read(self._path, start, self._ends[index] - start), start)
        return self.text(self.parse(line, number), number)

    def about(self, index: int, /) -> tuple[str, Mapping[str, str]]:
        """PATH:NUMBER, and both as fields."""
        number = str(self._numbers[index])
        return f"{self._path}:{number}", {"file": str(self._path), self._unit: number}

    def where(self, number: int) -> str:
        """How a message names a document."""
        return f"{str(self._path)!r}, {self._unit} {number}"

    def parse(self, line: str, number: int) -> Any:
        """What a line or an item says. Raises CorpusError."""
        try:
            return json.loads(line.removeprefix(_MARK).rstrip())
        except RecursionError as error:
            raise _too_deep(self._path, self.where(number)) from error
        except ValueError as error:
            raise CorpusError(
                f"{self.where(number)} is not JSON by itself: {_told(error)}; allowed: {_allowed(self._path)}"
            ) from error

    def text(self, value: Any, number: int, lacking: str = "") -> str:
        """The text of a document. Raises CorpusError where it has none that UTF-8 can hold."""
        where = self.where(number)
        text = value if self._field is None else field_text(value, self._field, where, lacking)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"{where} holds a lone surrogate, \\u{ord(text[error.start]):04x}, at character {error.start} of its "
                "text; allowed: text that UTF-8 can hold"
            ) from error
        return text

    def add(self, start: int, end: int, number: int, value: Any) -> None:
        """Take the document between two bytes. What is wrong with it, `checked` raises."""
        try:
            self.text(value, number)
        except CorpusError as error:
            self._lacking += isinstance(error, NoFieldError)
            self._first = self._first or (number, value)
        self._starts.append(start)
        self._ends.append(end)
        self._numbers.append(number)

    def checked(self) -> JsonDocuments:
        """These documents. Raises CorpusError for the first that is at fault; how many lack the field, it says too."""
        if self._first is not None:
            number, value = self._first
            self.text(value, number, f", which {self._lacking:,} of {len(self):,} {self._unit}s lack")
        return self


def _lines(path: Path, file: BinaryIO, field: str) -> JsonDocuments:
    found, at = JsonDocuments(path, field, "line"), 0
    for number, line in enumerate(file, 1):
        start, at = at, at + len(line)
        if line.removeprefix(_MARK_BYTES).strip():
            try:
                value = found.parse(decode(path, line, start), number)
            except CorpusError:
                found.checked()  # what is wrong with a line before this one comes first
                raise
            found.add(start, at, number, value)
    return found.checked()


def _array(path: Path, file: BinaryIO, field: str) -> JsonDocuments:
    found: JsonDocuments | None = None
    number = 0
    try:
        for number, (start, end, value) in enumerate(items(path, file, _PROMISED), 1):
            strings = isinstance(value, str)
            found = found or JsonDocuments(path, None if strings else field, "item")
            if strings is found.has_fields:
                one, others = ("a string", "objects") if strings else ("an object", "strings")
                raise NoArrayError(f"{found.where(number)} is {one} among {others}; allowed: {_PROMISED}")
            found.add(start, end, number, value)
    except RecursionError as error:
        raise _too_deep(path, JsonDocuments(path, field, "item").where(number + 1)) from error
    return (found or JsonDocuments(path, field, "item")).checked()


def _too_deep(path: Path, where: str) -> CorpusError:
    return CorpusError(f"{where} is nested too deeply to be read; allowed: {_allowed(path)}")


def _told(error: ValueError) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
