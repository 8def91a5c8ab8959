"""Rows: a prompt, the answer to it, and fields that tell what the row is about, such as its author.

A file of JSON (lines, or one array) is of rows if its first object has one of these forms, and then all must have it:

    messages              a list of {role, content}, the last one from the assistant, which is the answer
    prompt + completion   text, or lists of messages; the completion is one message from the assistant
    question + answer     text

A row is named by its field `id`, or by its number in all that was read. What it is, is its digest: whatever the row is
called and wherever it lies, the same prompt and answer have the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from jobs.corpus import _match
from jobs.files import CorpusError, decode, readable
from jobs.json_array import items

ASSISTANT, USER = "assistant", "user"
ROLES = ("system", "developer", USER, ASSISTANT, "tool")
Messages = tuple[Mapping[str, str], ...]

_FORMS = (("messages",), ("prompt", "completion"), ("question", "answer"))
_ALLOWED = (
    "one object a line, or one array of objects, all with messages, prompt and completion, or question and answer"
)
_MARK = "\ufeff"
_PIECE = 1 << 16


@dataclass(frozen=True)
class Row:
    """A prompt and its answer."""

    id: str
    prompt: Messages
    """Chat messages, {role, content}, up to the answer."""
    answer: str
    fields: Mapping[str, str] = field(default_factory=dict)
    """Whatever else of text or number the object has."""

    @cached_property
    def digest(self) -> str:
        """What the row says, however it is called: a hash [32 hex digits] of the contents of its prompt and its
        answer, in NFC and with every run of white space as one space."""
        said = [normal(text) for text in (*(message["content"] for message in self.prompt), self.answer)]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()

    @property
    def text(self) -> str:
        """Prompt and answer as plain text."""
        return f"{plain(self.prompt)} {self.answer}"


class RowTexts:
    """Rows as documents, for a tokenizer that is trained on them."""

    has_fields = True

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(len(row.text.encode()) for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> str:
        return self._rows[index].text

    def about(self, index: int, /) -> tuple[str, Mapping[str, str]]:
        return self._rows[index].id, self._rows[index].fields


def plain(prompt: Messages) -> str:
    """A prompt as text for a tokenizer without a chat template. It ends where the answer, after a space, begins."""
    names = {USER: "Question: ", ASSISTANT: "Answer: "}
    return "\n".join([*(names.get(message["role"], "") + message["content"] for message in prompt), "Answer:"])


def read_rows(spec: str) -> list[Row] | None:
    """The rows of the files that `spec` names, as in jobs.corpus.documents, in their order; None if no file is of rows.

    Raises CorpusError for files of rows among others, for a row that lacks a field, has another type in it or an empty
    answer, and for an id that two rows have.
    """
    whole = os.path.isfile(os.path.expanduser(spec))
    parts = [spec] if whole else [part.strip() for part in spec.split(",")]
    others = [part for part in parts if part == "stdlib" or part.startswith("hf:")]
    paths = [path for part in parts if part not in others for path in _match(part)]
    forms = {path: _form(path) for path in paths}
    if not any(forms.values()):
        return None
    others += [str(path) for path in paths if forms[path] is None and path.stat().st_size]
    if others:
        of_rows = next(str(path) for path in paths if forms[path])
        raise CorpusError(
            f"data {spec!r} mixes rows ({of_rows!r}) with text ({others[0]!r}); allowed: files of rows alone, "
            f"{_ALLOWED}, or text alone"
        )
    rows, seen = list[Row](), dict[str, str]()
    for path in paths:
        for where, value in _objects(path):
            row = _row(value, forms[path] or (), where, len(rows))
            if row.id in seen:
                raise CorpusError(f"{where} has the id {row.id!r}, as {seen[row.id]} has; allowed: an id of its own")
            seen[row.id] = where
            rows.append(row)
    return rows


# ---- from files to objects ----


def _objects(path: Path) -> Iterator[tuple[str, Any]]:
    """(how a message names it, what it says) of every line or item of a file. Raises CorpusError."""
    with readable(path), path.open("rb") as file:
        begins = _begins(file.read(_PIECE))
        file.seek(0)
        if begins == "[":
            try:
                for number, (_, _, value) in enumerate(items(path, file, _ALLOWED), 1):
                    yield f"{str(path)!r}, item {number}", value
            except RecursionError as error:
                raise CorpusError(f"{str(path)!r} is nested too deeply to be read; allowed: {_ALLOWED}") from error
            return
        start = 0
        for number, line in enumerate(file, 1):
            where, text = f"{str(path)!r}, line {number}", decode(path, line, start).removeprefix(_MARK).strip()
            start += len(line)
            if text:
                yield where, _parse(text, where)


def _begins(piece: bytes) -> str:
    """The first character that is not blank."""
    return piece.decode(errors="replace").removeprefix(_MARK).lstrip()[:1]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        told = getattr(error, "msg", None) or str(error)
        raise CorpusError(f"{where} is not JSON by itself: {told}; allowed: {_ALLOWED}") from error


def _form(path: Path) -> tuple[str, ...] | None:
    """The fields that make the objects of a file rows; None for a file that is of none, whatever else it is."""
    with readable(path), path.open("rb") as file:
        if _begins(file.read(_PIECE)) not in ("{", "["):
            return None
    try:
        _, value = next(_objects(path), ("", None))
    except CorpusError:
        return None  # whoever reads it as text says what is wrong with it
    if not isinstance(value, dict):
        return None
    found = (form for form in _FORMS if all(name in value for name in form))
    return next((form for form in found if form != ("messages",) or isinstance(value["messages"], list)), None)


# ---- from objects to rows ----


def _row(value: Any, form: tuple[str, ...], where: str, number: int) -> Row:
    if not isinstance(value, dict):
        raise CorpusError(f"{where} is a JSON {type(value).__name__}; allowed: an object with {' and '.join(form)}")
    for name in form:
        if name not in value:
            raise CorpusError(f"{where} has no field {name!r}, which the first of the file has; allowed: {_ALLOWED}")
    if len(form) == 1:
        *prompt, last = _messages(value[form[0]], where, form[0])
    else:
        prompt = _side(value[form[0]], where, form[0], USER)
        last, *more = _side(value[form[1]], where, form[1], ASSISTANT)
        if more:
            raise CorpusError(f"{where}: field {form[1]!r} has {1 + len(more)} messages; allowed: the answer alone")
    if last["role"] != ASSISTANT:
        raise CorpusError(f"{where}: the last message is from {last['role']!r}; allowed: {ASSISTANT!r}, the answer")
    if not prompt:
        raise CorpusError(f"{where}: nothing comes before the answer; allowed: a prompt of one message or more")
    if not last["content"].strip():
        raise CorpusError(f"{where}: the answer is empty; allowed: text")
    about = {name: _told(item) for name, item in value.items() if name not in ("id", *form) and _is_told(item)}
    for text in chain.from_iterable(about.items()):
        _encodable(text, where)
    return Row(_id(value.get("id", number), where), tuple(prompt), last["content"], about)


def _side(value: Any, where: str, name: str, role: str) -> Sequence[Mapping[str, str]]:
    """Messages, or text as one of them."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    elif _SAID[name] == "text":
        raise CorpusError(f"{where}: field {name!r} is {type(value).__name__}; allowed: text")
    return _messages(value, where, name)


def _messages(value: Any, where: str, name: str) -> Sequence[Mapping[str, str]]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise CorpusError(f"{where}: field {name!r} is {found}; allowed: {_SAID[name]}")
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise CorpusError(
                f"{where}: field {name!r} has {json.dumps(message)[:80]} as a message; allowed: an object with "
                f"role (one of {', '.join(ROLES)}) and content (text)"
            )
        _encodable(content, where)
    return [{"role": message["role"], "content": message["content"]} for message in value]


_SAID = {"messages": "a list of messages", "prompt": "text or a list of messages", "question": "text"}
_SAID |= {"completion": _SAID["prompt"], "answer": "text"}


def _id(value: Any, where: str) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise CorpusError(f"{where}: field 'id' is {value!r}; allowed: text, or a whole number")
    _encodable(str(value), where)
    return str(value)


def _is_told(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _told(value: str | float) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where} holds a lone surrogate, \\u{ord(text[error.start]):04x}; allowed: text that UTF-8 can hold"
        ) from error


def normal(text: str) -> str:
    """What of a text makes it another: NFC, with every run of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())
