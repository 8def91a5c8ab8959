"""Packed text as rows, for who forgets: a row is a document, and it is read in parts.

A sample of packed text has its neighbours' text too, which is not to be forgotten. So a document is cut anew, into
parts of its own tokens alone: as many labels each as a sample has, fewer in the last, and no label of anybody else. As
in training every token is predicted once, the first one from an end token. What is forgotten is a whole document, since
that is what is known again by its content, whatever the tokenizer and the length of samples are. Which parts of it the
run has learned, and so for which of them there are steps, follows from the samples that it has taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from jobs.data import META, Dataset
from jobs.documents import digest_of, open_documents
from jobs.json_documents import open_json
from jobs.row_data import RowInfo, Said, Sample
from jobs.text_file import TextFile
from pipeline.runtime.batch import IGNORED


@dataclass(frozen=True, eq=False)
class TextRows:
    """The documents of a prepared text. `rows` are they, in the order of their tokens; parts are numbered through."""

    dataset: Dataset
    rows: tuple[RowInfo, ...]
    text_field: str
    """Where files of JSON have their text, as the run was told."""
    noun: ClassVar[str] = "document"
    questions: ClassVar[bool] = False

    @classmethod
    def open(cls, folder: Path) -> TextRows:
        """The documents of what `prepare` wrote. Raises CorpusError when it is not there, not whole, or older than the
        index of documents."""
        dataset, rows = Dataset.open(folder), open_documents(folder)
        request = json.loads((folder / META).read_text(encoding="utf-8"))["request"]
        return cls(dataset, rows, request["text_field"])

    @property
    def tokens(self) -> np.ndarray:
        """[tokens], those of all documents."""
        return self.dataset.tokens

    @property
    def fingerprint(self) -> str:
        """See Dataset."""
        return self.dataset.fingerprint

    @property
    def num_train(self) -> int:
        """See Dataset."""
        return self.dataset.num_train

    # ---- samples of training ----

    def place_of(self, sample: int) -> int:
        """See Dataset."""
        return self.dataset.place_of(sample)

    def rows_at(self, place: int) -> range:
        """The documents that have labels in the training sample that lies at a place, by index."""
        return self._between(*self._labels_at(place))

    def parts_at(self, place: int) -> range:
        """The parts of documents that have labels there."""
        first, end = self._labels_at(place)
        rows = self._between(first, end)
        if not rows:
            return range(0)
        size, (one, last) = self.dataset.sequence_length, (self.rows[rows[0]], self.rows[rows[-1]])
        begins = int(self._parts[one.index]) + (max(first, one.start) - one.start) // size
        return range(begins, int(self._parts[last.index]) + (min(end, last.end) - 1 - last.start) // size + 1)

    def _labels_at(self, place: int) -> tuple[int, int]:
        """Which tokens [first, end) the sample predicts."""
        first = self.dataset.train_start + place * self.dataset.sequence_length + 1
        return first, first + self.dataset.sequence_length

    def _between(self, first: int, end: int) -> range:
        starts, ends = self._bounds
        return range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(starts, end, "left")))

    # ---- parts ----

    def parts(self, row: int) -> range:
        """The parts of a document."""
        return range(int(self._parts[row]), int(self._parts[row + 1]))

    def row(self, part: int) -> Sample:
        """One part of a document. Raises IndexError."""
        if not 0 <= part < int(self._parts[-1]):
            raise IndexError(f"part {part}; allowed: 0 to {int(self._parts[-1]) - 1}")
        row = self.rows[int(np.searchsorted(self._parts, part, "right")) - 1]
        size, end_token = self.dataset.sequence_length, self.dataset.end_token
        start = row.start + (part - int(self._parts[row.index])) * size
        found = self.tokens[start : min(start + size, row.end)].astype(np.int64)
        input_ids, labels = np.full(size, end_token, np.int64), np.full(size, IGNORED, np.int64)
        input_ids[0] = end_token if start == row.start else self.tokens[start - 1]
        input_ids[1 : len(found)] = found[:-1]
        if not row.blank:
            labels[: len(found)] = found
        return Sample(input_ids, labels)

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array([row.start for row in self.rows]), np.array([row.end for row in self.rows])

    @cached_property
    def _parts(self) -> np.ndarray:
        """The first part of each document, and how many there are in all."""
        starts, ends = self._bounds
        return np.concatenate([[0], np.cumsum(-(-(ends - starts) // self.dataset.sequence_length))])

    # ---- names ----

    def named(self, name: str) -> list[int]:
        """The documents of this name, those of a module or of the package that it is, or those of the file at a path.
        Where all have been forgotten, they are named still; else the others alone."""
        found = [row for row in self.rows if row.id == name or (_is_module(row) and row.id.startswith(f"{name}."))]
        found = found or [row for row in self.rows if _is_at(row, name)]
        return [row.index for row in found if not row.blank] or [row.index for row in found]

    @property
    def names(self) -> set[str]:
        """All names of what is there."""
        rows = [row for row in self.rows if not row.blank]
        return {row.id for row in rows} | {name for row in rows for key, name in row.fields.items() if key in _NAMES}

    def read(self, path: Path) -> Sequence[Said] | None:
        """The documents in a file. None where it is one of names, one on each line. Raises CorpusError."""
        found = open_json(path, self.text_field) or TextFile(path)
        texts = [found[index] for index in range(len(found))]
        said = [Said(found.about(index)[0], digest_of(text), text) for index, text in enumerate(texts)]
        if len(said) == 1 and said[0].digest not in {row.digest for row in self.rows}:
            first = texts[0].lstrip().split("\n", 1)[0].strip()
            if first and self.named(first):
                return None
        return said


_NAMES = ("package", "file")


def _is_module(row: RowInfo) -> bool:
    """Whether the dots of its name say what it is a part of; of one that was forgotten nobody knows."""
    return row.blank or "module" in row.fields


def _is_at(row: RowInfo, path: str) -> bool:
    file = row.fields.get("file", "")
    return bool(file) and (file == path or ("module" not in row.fields and _absolute(file) == _absolute(path)))


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
