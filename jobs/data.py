"""Packed tokens on disk, as jobs.prepare writes them, cut into samples in an order that is a pure function of the seed.

Training samples have global ids 0, 1, 2, ... without end: id i is position i % n of epoch i // n, whose order is a
permutation keyed by (seed, epoch). So a position in the data is one number, whoever reads it, and resuming is exact.

What has been forgotten keeps its place. On disk it is end tokens; in a sample it is IGNORED, so that nobody takes it
for text: no label of it counts, and as an input an end token stands for it. All other text is where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from jobs.corpus import permutation
from jobs.files import CorpusError
from pipeline.model.rng import derive
from pipeline.runtime.batch import IGNORED

TOKENS, META, FORMAT = "tokens.bin", "meta.json", 1
"""The files of a dataset, and their form: another number once the same text would give other samples."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Tokens of one corpus under one tokenizer, mapped from disk: the held-out part, then the training part.

    A sample is `sequence_length` + 1 tokens and begins where the one before it in the same part has its last token, so
    that every token but the first is predicted once. Pickled, it is the path, opened anew on the other side.
    """

    folder: Path
    tokens: np.ndarray
    """[tokens], uint16 or uint32."""
    held_out_tokens: int
    train_start: int
    sequence_length: int
    seed: int
    fingerprint: str
    """A hash of everything that decides what sample i is."""
    end_token: int = 0
    """What ends each document, and stands where text was forgotten."""
    blank: tuple[tuple[int, int], ...] = ()
    """Where that is: spans of tokens [start, end), ascending, none of which touch."""
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """The dataset that `prepare` wrote. Raises CorpusError when it is not there or not whole."""
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}; allowed: {FORMAT}")
            tokens = np.memmap(folder / TOKENS, dtype=meta["dtype"], mode="r")
            if len(tokens) != meta["num_tokens"]:
                raise ValueError(f"{TOKENS} has {len(tokens)} tokens; {META} says {meta['num_tokens']}")
            spans = tuple((int(start), int(end)) for start, end in meta.get("blank", ()))
            known = {name: meta[name] for name in _FIELDS}
            return cls(folder, tokens, **known, end_token=meta.get("end_token", 0), blank=spans)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{str(folder)!r} holds no prepared tokens: {error}; delete it to make them anew, or, if it was being "
                "erased from, erase again"
            ) from error

    @property
    def num_train(self) -> int:
        """Training samples of one epoch."""
        return _num_samples(len(self.tokens) - self.train_start, self.sequence_length)

    @property
    def num_held_out(self) -> int:
        """Samples that are never trained on."""
        return _num_samples(self.held_out_tokens, self.sequence_length)

    def train_sample(self, sample: int) -> np.ndarray:
        """Tokens [sequence + 1] int64 of training sample `sample` >= 0; ids go on over epochs. Raises IndexError."""
        return self._cut(self.train_start + self.place_of(sample) * self.sequence_length)

    def place_of(self, sample: int) -> int:
        """Which of the `num_train` training samples `sample` >= 0 is, by where it lies. Raises IndexError."""
        if sample < 0:
            raise IndexError(f"training sample {sample}; allowed: 0 or more")
        epoch, position = divmod(sample, self.num_train)
        if epoch not in self._epochs:
            for old in [number for number in self._epochs if abs(number - epoch) > 1]:
                self._epochs.pop(old, None)  # a step may straddle two epochs, so two are kept
            self._epochs[epoch] = permutation(self.num_train, derive(self.seed, "data", "epoch", epoch))
        return int(self._epochs[epoch][position])

    def num_labels(self, sample: int) -> int:
        """How many labels of a training sample count, without reading it. Raises IndexError."""
        if not self.blank:
            return self.sequence_length
        first = self.train_start + self.place_of(sample) * self.sequence_length + 1
        return self.sequence_length - self._num_blank(first + self.sequence_length) + self._num_blank(first)

    def held_out_sample(self, sample: int) -> np.ndarray:
        """Tokens [sequence + 1] int64 of held-out sample 0 <= `sample` < num_held_out. Raises IndexError."""
        if not 0 <= sample < self.num_held_out:
            raise IndexError(f"held-out sample {sample}; allowed: 0 to {self.num_held_out - 1}")
        return self._cut(sample * self.sequence_length)

    def held_out_spread(self, count: int) -> Callable[[int], np.ndarray]:
        """Sample i of `count` held-out ones, evenly spread: neighbours come from one document, and tell of it alone."""
        return lambda sample: self.held_out_sample(sample * self.num_held_out // count)

    def _cut(self, start: int) -> np.ndarray:
        end = start + self.sequence_length + 1
        found = self.tokens[start:end].astype(np.int64)
        starts, ends, _ = self._spans
        for span in range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end, "left"))):
            found[max(0, int(starts[span]) - start) : int(ends[span]) - start] = IGNORED
        return found

    def _num_blank(self, end: int) -> int:
        """How many tokens before `end` were forgotten."""
        starts, ends, before = self._spans
        span = int(np.searchsorted(starts, end, "left"))
        return int(before[span]) - max(0, int(ends[span - 1]) - end if span else 0)

    @cached_property
    def _spans(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts and ends of what is blank, and how many tokens are in the spans before each, and in all."""
        spans = np.array(self.blank, np.int64).reshape(-1, 2)
        return spans[:, 0], spans[:, 1], np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])

    def __reduce__(self) -> tuple[Callable[[Path], Dataset], tuple[Path]]:
        return Dataset.open, (self.folder,)


_FIELDS = ("held_out_tokens", "train_start", "sequence_length", "seed", "fingerprint")


def _num_samples(tokens: int, sequence_length: int) -> int:
    return max(0, tokens - 1) // sequence_length
