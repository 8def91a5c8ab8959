"""Rows on disk, as jobs.row_prepare writes them, dealt to samples in an order that is a pure function of the seed.

A sample is one row, or several with `pack`. Training samples have global ids 0, 1, 2, ... without end, exactly as those
of jobs.data. Where a row lies, and which sample it is in, depends on the lengths of the rows alone: a row that has been
forgotten keeps its place, and is blank there. So a run that goes over the same order again, without the row, meets all
others where they were.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jobs.corpus import permutation
from jobs.data import META, TOKENS
from jobs.files import CorpusError
from jobs.rows import read_rows
from pipeline.model.rng import derive
from pipeline.runtime.batch import IGNORED

ROWS, FORMAT = "rows.jsonl", "rows 1"
"""The file beside those of every dataset, and the form of all: another one once the same rows give other samples."""


@dataclass(frozen=True)
class Sample:
    """What a model is given of rows, [sequence] int64 each."""

    input_ids: np.ndarray
    labels: np.ndarray
    """The token after each of input_ids; IGNORED in prompts, padding and rows that were forgotten."""
    position_ids: np.ndarray | None = None
    """Of packed rows, each of which begins again at 0, as does the padding."""

    @classmethod
    def of(cls, ids: np.ndarray, answer: int) -> Sample:
        """A row alone, whose answer begins at token `answer` > 0."""
        labels = ids[1:].copy()
        labels[: answer - 1] = IGNORED
        return cls(ids[:-1], labels)

    def apart(self) -> Iterator[Sample]:
        """What lies in it, each by itself, without that of which no label counts."""
        first = np.zeros(1, np.int64) if self.position_ids is None else np.flatnonzero(self.position_ids == 0)
        for start, end in zip(first, [*first[1:], len(self.labels)], strict=True):
            if (self.labels[start:end] != IGNORED).any():
                yield Sample(self.input_ids[start:end], self.labels[start:end])


@dataclass(frozen=True)
class Said:
    """A row or a document that somebody shows, to have it found by its digest."""

    id: str
    digest: str
    text: str


@dataclass(frozen=True)
class RowInfo:
    """A row of a dataset: what it is called, what it is about, and where its tokens lie."""

    index: int
    id: str
    digest: str
    start: int
    answer: int
    """The first token of its answer."""
    end: int
    fields: Mapping[str, str] = field(default_factory=dict)
    """None are left of a row that was forgotten."""
    held_out: bool = False
    blank: bool = False
    """Whether it was forgotten: its tokens are all end tokens, and none counts."""

    @property
    def num_answer_tokens(self) -> int:
        """How many labels count."""
        return 0 if self.blank else self.end - self.answer

    def line(self) -> str:
        """The row in rows.jsonl."""
        kept = None if self.blank else self.fields
        about = {"id": self.id, "digest": self.digest, "start": self.start, "answer": self.answer, "end": self.end}
        return json.dumps({**about, "fields": kept}, ensure_ascii=False) + "\n"


@dataclass(frozen=True, eq=False)
class RowDataset:
    """Rows under one tokenizer, their tokens mapped from disk. Pickled, it is the path, opened anew on the other side.

    Where no share is held out, the rows of training are the held-out samples too, in an order that stays.
    """

    folder: Path
    tokens: np.ndarray
    """[tokens], uint16 or uint32: all rows in their order."""
    rows: tuple[RowInfo, ...]
    end_token: int
    sequence_length: int
    held_out_share: float
    seed: int
    pack: bool
    fingerprint: str
    """A hash of everything that decides what sample i is."""
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    noun: ClassVar[str] = "row"
    questions: ClassVar[bool] = True

    @classmethod
    def open(cls, folder: Path) -> RowDataset:
        """The dataset that `prepare_rows` wrote. Raises CorpusError when it is not there or not whole. What is erased
        while it is open is seen by those who open it after."""
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}; allowed: {FORMAT}")
            tokens = np.memmap(folder / TOKENS, dtype=meta["dtype"], mode="r")
            rows = read_infos(folder / ROWS, meta["held_out_share"], meta["seed"])
            if (len(tokens), len(rows)) != (meta["num_tokens"], meta["num_rows"]):
                raise ValueError(
                    f"{len(tokens)} tokens of {len(rows)} rows; {META} says {meta['num_tokens']} of {meta['num_rows']}"
                )
            return cls(folder, tokens, rows, **{name: meta[name] for name in _FIELDS})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{str(folder)!r} holds no prepared rows: {error}; delete it to make them anew, or, if it was being "
                "erased from, erase again"
            ) from error

    @property
    def num_train(self) -> int:
        """Training samples of one epoch."""
        return len(self._train)

    @property
    def num_held_out(self) -> int:
        """Samples to evaluate on."""
        return len(self._held_out)

    def train_sample(self, sample: int) -> Sample:
        """Training sample `sample` >= 0; ids go on over epochs. Raises IndexError."""
        return self._cut(self.rows_of(sample))

    def rows_of(self, sample: int) -> tuple[int, ...]:
        """The rows in training sample `sample` >= 0, by index. Raises IndexError."""
        return self.rows_at(self.place_of(sample))

    def place_of(self, sample: int) -> int:
        """Which of the `num_train` training samples `sample` >= 0 is. Raises IndexError."""
        if sample < 0:
            raise IndexError(f"training sample {sample}; allowed: 0 or more")
        epoch, position = divmod(sample, self.num_train)
        if epoch not in self._epochs:
            for old in [number for number in self._epochs if abs(number - epoch) > 1]:
                self._epochs.pop(old, None)  # a step may straddle two epochs, so two are kept
            self._epochs[epoch] = permutation(self.num_train, derive(self.seed, "data", "epoch", epoch))
        return int(self._epochs[epoch][position])

    def rows_at(self, place: int) -> tuple[int, ...]:
        """The rows in one of the `num_train` training samples, by index."""
        return self._train[place]

    def parts_at(self, place: int) -> tuple[int, ...]:
        """See Forgettable: a row is one part."""
        return self._train[place]

    def parts(self, row: int) -> tuple[int, ...]:
        """See Forgettable."""
        return (row,)

    def named(self, name: str) -> list[int]:
        """The row with this id; none where there is none."""
        return [self._indices[name]] if name in self._indices else []

    @property
    def names(self) -> set[str]:
        """All ids."""
        return set(self._indices)

    def read(self, path: Path) -> list[Said] | None:
        """The rows in a file; None where it is none of rows. Raises CorpusError."""
        rows = read_rows(str(path))
        return None if rows is None else [Said(row.id, row.digest, row.text) for row in rows]

    def num_labels(self, sample: int) -> int:
        """How many labels of a training sample count, without reading it. Raises IndexError."""
        return sum(self.rows[index].num_answer_tokens for index in self.rows_of(sample))

    def held_out_sample(self, sample: int) -> Sample:
        """Held-out sample 0 <= `sample` < num_held_out. Raises IndexError."""
        if not 0 <= sample < self.num_held_out:
            raise IndexError(f"held-out sample {sample}; allowed: 0 to {self.num_held_out - 1}")
        return self._cut(self._held_out[sample])

    def held_out_spread(self, count: int) -> Callable[[int], Sample]:
        """Sample i of `count` held-out ones, evenly spread."""
        return lambda sample: self.held_out_sample(sample * self.num_held_out // count)

    def row(self, index: int) -> Sample:
        """One row alone, not packed. Raises IndexError."""
        if not 0 <= index < len(self.rows):
            raise IndexError(f"row {index}; allowed: 0 to {len(self.rows) - 1}")
        sample = self._cut((index,))
        return Sample(sample.input_ids, sample.labels)

    def index_of(self, id: str) -> int:
        """The index of the row with this id. Raises CorpusError."""
        if id not in self._indices:
            raise CorpusError(f"no row has the id {id!r}; allowed: {self.rows[0].id!r} and {len(self.rows) - 1} others")
        return self._indices[id]

    @cached_property
    def _indices(self) -> Mapping[str, int]:
        return {row.id: row.index for row in self.rows}

    @cached_property
    def _train(self) -> Sequence[tuple[int, ...]]:
        return self._samples(held_out=False)

    @cached_property
    def _held_out(self) -> Sequence[tuple[int, ...]]:
        return self._samples(held_out=True) if self.held_out_share else self._train

    def _samples(self, *, held_out: bool) -> Sequence[tuple[int, ...]]:
        shuffled = (self.rows[int(index)] for index in row_order(len(self.rows), self.seed))
        part = [row for row in shuffled if row.held_out == held_out]
        if not self.pack:
            return [(row.index,) for row in part]
        bins = first_fit((row.end - row.start - 1 for row in part), self.sequence_length)
        return [tuple(part[position].index for position in packed) for packed in bins]

    def _cut(self, indices: Iterable[int]) -> Sample:
        size, at = self.sequence_length, 0
        input_ids, labels = np.full(size, self.end_token, np.int64), np.full(size, IGNORED, np.int64)
        positions = np.zeros(size, np.int64)
        for row in (self.rows[index] for index in indices):
            one = Sample.of(self.tokens[row.start : row.end].astype(np.int64), row.answer - row.start)
            after = at + len(one.labels)
            input_ids[at:after], positions[at:after] = one.input_ids, np.arange(len(one.labels))
            if not row.blank:
                labels[at:after] = one.labels
            at = after
        positions[at:] = np.arange(size - at)
        return Sample(input_ids, labels, positions if self.pack else None)

    def __reduce__(self) -> tuple[Callable[[Path], RowDataset], tuple[Path]]:
        return RowDataset.open, (self.folder,)


_FIELDS = ("end_token", "sequence_length", "held_out_share", "seed", "pack", "fingerprint")


def read_infos(path: Path, held_out_share: float, seed: int) -> tuple[RowInfo, ...]:
    """The rows that rows.jsonl tells of. Raises OSError, ValueError, KeyError and TypeError."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_bytes().splitlines()]
    held = held_out([line["digest"] for line in lines], held_out_share, seed)
    return tuple(
        RowInfo(
            index, line["id"], line["digest"], line["start"], line["answer"], line["end"], line["fields"] or {},
            held_out=line["digest"] in held, blank=line["fields"] is None,
        )
        for index, line in enumerate(lines)
    )  # fmt: skip


def row_order(count: int, seed: int) -> np.ndarray:
    """The rows, by index, in the order in which they are held out and packed [count] int64."""
    return permutation(count, derive(seed, "data", "documents"))


def held_out(digests: Sequence[str], share: float, seed: int) -> set[str]:
    """What is never trained on: of the first rows in the order of the seed, one at least where a share is. Rows that
    say the same are held out together."""
    count = max(1, round(share * len(digests))) if share else 0
    return {digests[int(index)] for index in row_order(len(digests), seed)[:count]}


def first_fit(sizes: Iterable[int], capacity: int) -> list[list[int]]:
    """Bins of items, by their number: each item goes into the first bin that has room for it (Johnson: Near-optimal Bin
    Packing Algorithms, 1973). No size may be above `capacity`, or below 1.
    """
    bins = list[list[int]]()
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # heaps of bins, by the room that is left
    first = np.full(capacity + 1, np.iinfo(np.int64).max)  # the top of each heap
    for item, size in enumerate(sizes):
        room = size + int(first[size:].argmin())
        if with_room[room]:
            found = heappop(with_room[room])
            first[room] = with_room[room][0] if with_room[room] else np.iinfo(np.int64).max
        else:
            found, room = len(bins), capacity
            bins.append([])
        bins[found].append(item)
        heappush(with_room[room - size], found)
        first[room - size] = with_room[room - size][0]
    return bins
