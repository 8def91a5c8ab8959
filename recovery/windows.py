"""Evidence that text is gone, without keeping the text: salted hashes of short windows of it, to search for.

A window is `size` consecutive tokens, or words, of one answer. What is kept of it is a keyed BLAKE2b hash of 8 bytes.
So that ten million windows need not all be hashed so, each has also a mark: a few bits of a hash that numpy computes
for many windows at once. A rolling polynomial would be quicker still, but it is linear: from the marks of windows that
overlap the tokens could be solved for. Whoever can guess the text can check the guess; nobody can read it from here.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np

from pipeline.wire import WireError, checked

TOKENS, WORDS = 8, 6
"""How long a window is."""
Unit = Literal["tokens", "words"]

_SALT_BYTES = 16
_PIECE = 1 << 20
_MOST_BITS = 24
_HASH, _MARK, _CODE = np.dtype("<u8"), np.dtype("<u4"), np.dtype("<u4")
_ALONE = "぀-ヿ㐀-䶿一-鿿"  # written without spaces: each character is a word
_WORD, _ASCII_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+"), re.compile(rb"\w+")


@dataclass(frozen=True, eq=False)
class Windows:
    """Hashes of windows. `search` says where one of them is."""

    of: Unit
    size: int
    salt: bytes
    hashes: np.ndarray
    """uint64, ascending."""
    marks: np.ndarray
    """uint32, ascending, of `bits` bits each."""
    bits: int

    def search(self, codes: np.ndarray) -> np.ndarray:
        """Where a window of `codes` [n] begins that is one of these: int64, ascending. Codes are tokens, or what
        `words` makes of text."""
        found = [start + places for start, piece in _pieces(codes, self.size) for places in [self._search(piece)[0]]]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def as_json(self) -> dict[str, Any]:
        about = {"of": self.of, "size": self.size, "salt": self.salt.hex(), "bits": self.bits}
        return {**about, "hashes": _text(self.hashes.astype(_HASH)), "marks": _text(self.marks.astype(_MARK))}

    @classmethod
    def from_json(cls, values: Any) -> Windows:
        """Raises WireError for what `as_json` has not written."""
        kinds = {"of": str, "size": int, "salt": str, "bits": int, "hashes": str, "marks": str}
        found = checked(values if isinstance(values, dict) else {}, "windows", **kinds)
        if found["of"] not in ("tokens", "words") or found["size"] < 1 or not 1 <= found["bits"] <= _MOST_BITS:
            raise WireError(
                f"windows are {found['size']} {found['of']} of {found['bits']} bits; expected 1 or more tokens or "
                f"words, of 1 to {_MOST_BITS} bits"
            )
        try:
            salt = bytes.fromhex(found["salt"])
            hashes, marks = _array(found["hashes"], _HASH), _array(found["marks"], _MARK)
        except ValueError as error:
            raise WireError(f"windows cannot be read: {error}") from error
        if len(salt) != _SALT_BYTES or (len(marks) and int(marks.max()) >> found["bits"]):
            raise WireError(f"windows have a salt of {len(salt)} bytes, or larger marks than {found['bits']} bits")
        return cls(cast(Unit, found["of"]), found["size"], salt, hashes, marks, found["bits"])

    def _search(self, codes: np.ndarray, inside: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(starts, hashes) of the windows in a piece that are among these; of those that begin where it is `inside`."""
        marked = self._table[_marks(codes, self.size, self.salt) & self._mask]
        starts = np.flatnonzero(marked if inside is None else marked & inside)
        hashes = _hashes(codes, starts, self.size, self.salt)
        known = np.isin(hashes, self.hashes)
        return starts[known], hashes[known]

    @property
    def _mask(self) -> np.uint64:
        return np.uint64((1 << self.bits) - 1)

    @cached_property
    def _table(self) -> np.ndarray:
        """[2 ** bits] bool: whether a window has that mark."""
        table = np.zeros(1 << self.bits, bool)
        table[self.marks] = True
        return table


def token_windows(sequences: Iterable[np.ndarray], salt: bytes, size: int = TOKENS) -> np.ndarray:
    """The hashes of every window in each of the sequences of tokens: uint64, ascending, each once."""
    found = [
        _hashes(codes, np.flatnonzero(inside), size, salt) for codes, inside in _batches(sequences, size)
    ]  # fmt: skip
    return np.unique(np.concatenate(found)) if found else np.zeros(0, _HASH)


def word_windows(texts: Iterable[str], salt: bytes, size: int = WORDS) -> np.ndarray:
    """The hashes of every window of words in each of the texts: uint64, ascending, each once."""
    return token_windows(map(words, texts), salt, size)


def forgotten_windows(
    tokens: Sequence[np.ndarray], kept_tokens: Iterable[np.ndarray], texts: Sequence[str], kept_texts: Iterable[str]
) -> tuple[Windows, Windows]:
    """The windows of tokens, and of words, that answers which are forgotten have and those that are kept have not."""
    kept_words = (words(text) for text in kept_texts)
    return (
        windows_of("tokens", TOKENS, tokens, kept_tokens),
        windows_of("words", WORDS, [words(text) for text in texts], kept_words),
    )


def windows_of(of: Unit, size: int, wanted: Sequence[np.ndarray], kept: Iterable[np.ndarray] = ()) -> Windows:
    """The windows in `wanted` that are not in `kept`, under a new salt. Each sequence is gone through once."""
    salt = os.urandom(_SALT_BYTES)
    found = [
        (_hashes(codes, starts, size, salt), _marks(codes, size, salt)[starts])
        for codes, inside in _batches(wanted, size)
        for starts in [np.flatnonzero(inside)]
    ]
    hashes, first = np.unique(np.concatenate([each for each, _ in found] or [np.zeros(0, _HASH)]), return_index=True)
    marks = np.concatenate([each for _, each in found] or [np.zeros(0, np.uint64)])[first]
    bits = max(8, min(_MOST_BITS, len(hashes).bit_length() + 5))  # most others have no such mark: 31 of 32
    every = _select(of, size, salt, hashes, marks, bits)
    seen = [every._search(codes, inside)[1] for codes, inside in _batches(kept, size)] if len(hashes) else []
    left = ~np.isin(hashes, np.concatenate(seen)) if seen else np.ones(len(hashes), bool)
    return _select(of, size, salt, hashes[left], marks[left], bits)


def words(text: str) -> np.ndarray:
    """A code, uint32, of each word of a text. Case, punctuation, and how characters are composed make no difference."""
    if text.isascii():
        found = _ASCII_WORD.findall(text.lower().encode())
    else:
        joined = "\0".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))
        found = joined.encode("utf-8", "surrogatepass").split(b"\0") if joined else []
    return np.fromiter(map(zlib.crc32, found), _CODE, len(found))


# ---- hashes ----


def _select(of: Unit, size: int, salt: bytes, hashes: np.ndarray, marks: np.ndarray, bits: int) -> Windows:
    cut = np.unique(marks & np.uint64((1 << bits) - 1)).astype(_MARK)
    return Windows(of, size, salt, hashes, cut, bits)


def _marks(codes: np.ndarray, size: int, salt: bytes) -> np.ndarray:
    """A mixed hash, uint64, of every window [n - size + 1]: each code is multiplied in and shifted over itself."""
    num, start = max(0, len(codes) - size + 1), int.from_bytes(salt[:8], "little")
    mixed = np.full(num, start, np.uint64)
    for place in range(size):
        mixed ^= codes[place : place + num]
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _hashes(codes: np.ndarray, starts: np.ndarray, size: int, salt: bytes) -> np.ndarray:
    """The keyed BLAKE2b hash, uint64, of each of the windows that begin at `starts`."""
    if not len(starts):
        return np.zeros(0, _HASH)
    data = np.lib.stride_tricks.sliding_window_view(codes, size)[starts].astype(_CODE).tobytes()
    width = size * _CODE.itemsize
    each = (
        hashlib.blake2b(data[at : at + width], digest_size=8, key=salt).digest() for at in range(0, len(data), width)
    )
    return np.frombuffer(b"".join(each), _HASH)


# ---- many short sequences, or a long one, as pieces of a good length ----


def _pieces(codes: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(where it begins, piece) of a long sequence; every window is in one piece."""
    for start in range(0, max(0, len(codes) - size + 1), _PIECE):
        yield start, np.asarray(codes[start : start + _PIECE + size - 1]).astype(_CODE)


def _batches(sequences: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(codes, for each window whether it is inside one sequence); sequences that follow each other are joined."""
    batch, length = list[np.ndarray](), 0
    for sequence in sequences:
        for _, piece in _pieces(np.asarray(sequence), size):
            batch.append(piece)
            length += len(piece)
            if length >= _PIECE:
                yield _joined(batch, size)
                batch, length = [], 0
    if batch:
        yield _joined(batch, size)


def _joined(batch: list[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    codes = np.concatenate(batch)
    inside = np.ones(len(codes), bool)
    ends = np.cumsum([len(piece) for piece in batch])
    inside[(ends[:, None] - np.arange(1, size)).ravel()] = False  # every piece is as long as a window or longer
    return codes, inside[: len(codes) - size + 1]


def _text(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _array(text: str, dtype: np.dtype[Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)
