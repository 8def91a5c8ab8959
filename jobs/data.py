"""Packed tokens on disk, as jobs.prepare writes them, cut into samples in an order that is a pure function of the seed.

Training samples have global ids 0, 1, 2, ... without end: id i is position i % n of epoch i // n, whose order is a
permutation keyed by (seed, epoch). So a position in the data is one number, whoever reads it, and resuming is exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jobs.corpus import permutation
from jobs.files import CorpusError
from pipeline.model.rng import derive

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
            return cls(folder, tokens, **{name: meta[name] for name in _FIELDS})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{str(folder)!r} holds no prepared tokens: {error}; delete it to make them anew"
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
        if sample < 0:
            raise IndexError(f"training sample {sample}; allowed: 0 or more")
        epoch, position = divmod(sample, self.num_train)
        if epoch not in self._epochs:
            for old in [number for number in self._epochs if abs(number - epoch) > 1]:
                self._epochs.pop(old, None)  # a step may straddle two epochs, so two are kept
            self._epochs[epoch] = permutation(self.num_train, derive(self.seed, "data", "epoch", epoch))
        return self._cut(self.train_start, int(self._epochs[epoch][position]))

    def held_out_sample(self, sample: int) -> np.ndarray:
        """Tokens [sequence + 1] int64 of held-out sample 0 <= `sample` < num_held_out. Raises IndexError."""
        if not 0 <= sample < self.num_held_out:
            raise IndexError(f"held-out sample {sample}; allowed: 0 to {self.num_held_out - 1}")
        return self._cut(0, sample)

    def held_out_spread(self, count: int) -> Callable[[int], np.ndarray]:
        """Sample i of `count` held-out ones, evenly spread: neighbours come from one document, and tell of it alone."""
        return lambda sample: self.held_out_sample(sample * self.num_held_out // count)

    def _cut(self, start: int, sample: int) -> np.ndarray:
        start += sample * self.sequence_length
        return self.tokens[start : start + self.sequence_length + 1].astype(np.int64)

    def __reduce__(self) -> tuple[Callable[[Path], Dataset], tuple[Path]]:
        return Dataset.open, (self.folder,)


_FIELDS = ("held_out_tokens", "train_start", "sequence_length", "seed", "fingerprint")


def _num_samples(tokens: int, sequence_length: int) -> int:
    return max(0, tokens - 1) // sequence_length
