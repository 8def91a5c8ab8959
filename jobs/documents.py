"""Which documents packed text is made of, and where each lies: documents.jsonl beside its tokens, in their order.

A document that is held out in part lies in two places, and has two lines. What it is, is its digest, as that of a row:
the same text has the same one, whatever it is called and however it is spaced. Documents without tokens have no line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from jobs.corpus import Corpus
from jobs.data import META
from jobs.files import CorpusError
from jobs.row_data import RowInfo
from jobs.text_hashes import digests

DOCUMENTS = "documents.jsonl"
PLACES = np.dtype([("number", "<i8"), ("start", "<i8"), ("end", "<i8"), ("digest", "S16")])
"""Of a document: its number in the order of the seed, its tokens [start, end), and its digest. Without names it holds
for everybody who has the same text."""
_PIECE = 1 << 16


def digest_of(text: str) -> str:
    """What a document says, however it is called: a hash [32 hex digits]."""
    return digests([text])[1]


def places_of(
    starts: np.ndarray, num_tokens: int, digests: Sequence[bytes], train_start: int, kept: Mapping[int, int]
) -> np.ndarray:
    """The places [n] of documents whose tokens begin at `starts`, one after another, and were cut in two at
    `train_start`; of the first part those are left that `kept` has: number -> where it was moved to."""
    ends, raw = np.append(starts[1:], num_tokens), np.array(digests, PLACES["digest"])
    held = np.fromiter(kept, np.int64, len(kept))
    trained = np.arange(int(np.searchsorted(ends, train_start, "right")), len(starts))
    found = np.zeros(len(held) + len(trained), PLACES)
    found["number"] = np.concatenate([held, trained])
    moved = np.fromiter(kept.values(), np.int64, len(kept))
    found["start"] = np.concatenate([moved, np.maximum(starts[trained], train_start)])
    sizes = np.minimum(ends[held], train_start) - starts[held]
    found["end"] = np.concatenate([moved + sizes, ends[trained]])
    found["digest"] = raw[found["number"]]
    return found[found["start"] < found["end"]]


def infos_of(places: np.ndarray, corpus: Corpus, order: np.ndarray, forgotten: Set[str]) -> Iterator[RowInfo]:
    """What the lines say of documents of a corpus that was taken in this order."""
    for first in range(0, len(places), _PIECE):
        for index, (number, start, end, raw) in enumerate(places[first : first + _PIECE].tolist(), first):
            name, fields = corpus.about(int(order[number]))
            digest = _hex(raw)
            yield RowInfo(index, name, digest, start, start, end, fields, blank=digest in forgotten)


def digests_of(places: np.ndarray) -> set[str]:
    """The digests of all of them."""
    return {_hex(raw) for raw in places["digest"].tolist()}


def _hex(raw: bytes) -> str:
    return raw.ljust(16, b"\0").hex()  # numpy does not tell zeros at the end


def read_documents(path: Path, held_out_tokens: int) -> tuple[RowInfo, ...]:
    """The documents that documents.jsonl tells of. Raises OSError, ValueError, KeyError and TypeError."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_bytes().splitlines()]
    return tuple(
        RowInfo(
            index, line["id"], line["digest"], line["start"], line["answer"], line["end"], line["fields"] or {},
            held_out=line["end"] <= held_out_tokens, blank=line["fields"] is None,
        )
        for index, line in enumerate(lines)
    )  # fmt: skip


def blank_spans(documents: Sequence[RowInfo], held_out_tokens: int, train_start: int) -> list[tuple[int, int]]:
    """The spans of tokens [start, end) that are blank, ascending, none of which touch. Where there are any, what lies
    between the two parts is one, which no sample reads: documents have been moved away from there."""
    found = [(each.start, each.end) for each in documents if each.blank]
    gap = [(held_out_tokens, train_start)] if found and held_out_tokens < train_start else []
    spans = list[tuple[int, int]]()
    for start, end in sorted([*found, *gap]):
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def has_forgotten(folder: Path, digests: Set[str]) -> bool:
    """Whether a prepared folder tells of its documents, and of those of `digests`, and no others, that they are blank.
    Raises CorpusError where what it tells cannot be read."""
    if not (folder / DOCUMENTS).is_file():
        return False
    if not digests:
        return not json.loads((folder / META).read_text(encoding="utf-8"))["blank"]
    documents = open_documents(folder)
    return {each.digest for each in documents if each.blank} == digests & {each.digest for each in documents}


def open_documents(folder: Path) -> tuple[RowInfo, ...]:
    """The documents of a prepared folder. Raises CorpusError."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        found = read_documents(folder / DOCUMENTS, meta["held_out_tokens"])
        if len(found) != meta["num_documents"]:
            raise ValueError(f"{len(found)} lines; {META} says {meta['num_documents']}")
        return found
    except FileNotFoundError as error:
        raise CorpusError(
            f"{str(folder)!r} does not tell which documents its tokens are made of: it was prepared before that was "
            "kept; allowed: `unbroken train --resume` on the run, which makes them anew from the same text"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{str(folder / DOCUMENTS)!r} cannot be read: {error}; delete it to make it anew") from error
