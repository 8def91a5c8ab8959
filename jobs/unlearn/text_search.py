"""Finds words in a file of text of any kind and size, read in pieces: windows of them by their hashes, and whole texts.

What a file says may be escaped, as in JSON, a log of it, or a picture. So it is searched as it stands, with the escapes
of JSON resolved (also of JSON in JSON), and with those of HTML.
"""

from __future__ import annotations

import codecs
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from recovery.windows import WORDS, Windows, windows_of, words

_PIECE = 1 << 20
_LONGEST_WORD = 1 << 16
"""Of characters without a space between them; a longer one is cut."""
_SPACE = re.compile(r"\s\S*\Z")
_ESCAPE = re.compile(r'(?:\\u[0-9a-fA-F]{4})+|\\["\\/bfnrt]')
_NESTED = 3


class Texts:
    """Whole texts to search for, by their words. One without a word is nowhere."""

    def __init__(self, texts: Sequence[str]) -> None:
        codes = [words(text) for text in texts]
        self.longest = max(map(len, codes), default=0)
        self._starts: dict[tuple[int, bytes], list[tuple[int, np.ndarray]]] = {}
        for number, each in enumerate(codes):
            if size := min(len(each), WORDS):
                self._starts.setdefault((size, each[:size].tobytes()), []).append((number, each))
        sizes = sorted({size for size, _ in self._starts})
        self._firsts = [windows_of("words", size, [each[:size] for each in codes if len(each)]) for size in sizes]

    def search(self, codes: np.ndarray) -> set[int]:
        """Which of the texts are in `codes` [n], by number."""
        found: set[int] = set()
        for first in self._firsts:
            for start in first.search(codes):
                whole = self._starts.get((first.size, codes[start : start + first.size].tobytes()), ())
                found |= {n for n, each in whole if np.array_equal(codes[start : start + len(each)], each)}
        return found


@dataclass
class TextFound:
    """What is in one file: for each of the windows how often one of them occurs, and which texts do, by number."""

    windows: list[int]
    texts: set[int] = field(default_factory=set)


def search_text(
    file: BinaryIO, windows: Sequence[Windows], texts: Texts, came_on: Callable[[int], None] = lambda num_bytes: None
) -> TextFound:
    """Search a file, from where it is to its end. What is no UTF-8 in it stands between words. `came_on` is told of the
    bytes that were read. Raises OSError."""
    counts: dict[str, list[int]] = {}
    ends: dict[str, list[np.ndarray]] = {"": [np.zeros(0, np.uint32)] * (len(windows) + 1)}
    found = TextFound([0] * len(windows))
    for text in _pieces(file, came_on):
        for form, said in {**_forms(text, ends), "": text}.items():  # as it stands last: others begin where it ended
            end = ends.setdefault(form, list(ends[""]))
            count = counts.setdefault(form, list(counts.get("", found.windows)))
            codes = words(said)
            for number, each in enumerate(windows):
                joined = np.concatenate([end[number], codes])
                count[number] += len(each.search(joined))
                end[number] = _last(joined, each.size - 1)
            joined = np.concatenate([end[-1], codes])
            found.texts |= texts.search(joined)
            end[-1] = _last(joined, texts.longest - 1)
    found.windows = [max(each) for each in zip(*counts.values())] if counts else found.windows
    return found


def _last(codes: np.ndarray, count: int) -> np.ndarray:
    return codes[max(0, len(codes) - max(0, count)) :]


def _forms(text: str, known: Mapping[str, object]) -> dict[str, str]:
    """A piece of text in the forms in which it says something else than as it stands; and in all that are `known`."""
    plain, forms = text, dict[str, str]()
    for depth in range(1, _NESTED + 1):
        before, plain = plain, _ESCAPE.sub(_resolved, plain) if "\\" in plain else plain
        if plain != before or f"json {depth}" in known:
            forms[f"json {depth}"] = plain
    if (plain := html.unescape(text) if "&" in text else text) != text or "html" in known:
        forms["html"] = plain
    return forms


def _resolved(escape: re.Match[str]) -> str:
    return json.loads(f'"{escape[0]}"')


def _pieces(file: BinaryIO, came_on: Callable[[int], None]) -> Iterator[str]:
    """The text of a file, cut between words: at white space."""
    decoder, left = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while data := file.read(_PIECE):
        came_on(len(data))
        left += decoder.decode(data)
        space = _SPACE.search(left, max(0, len(left) - _LONGEST_WORD))
        if space is not None or len(left) > _PIECE + _LONGEST_WORD:
            cut = len(left) if space is None else space.start()
            yield left[:cut]
            left = left[cut:]
    yield left + decoder.decode(b"", final=True)
