"""Weighted data: `a.jsonl:0.7,b.txt:0.3`. Sample i comes from a source that follows from the seed and i alone.

Samples are dealt in windows, in each of which every source has its exact share; within a window the order is a
permutation keyed by (seed, window). The samples of one source are taken in its own order, epoch after epoch, each when
its turn comes: so a position in the mixture is one number, as of a dataset, and resuming is exact.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from jobs.corpus import permutation
from jobs.data import Dataset
from jobs.files import CorpusError
from jobs.row_data import ROWS, RowDataset
from pipeline.model.rng import derive

MIXTURE, FORMAT = "mixture.json", "mixture 1"
LONGEST_WINDOW = 1000
"""Shares that need more samples to be exact are rounded to so many."""
_WEIGHTED = re.compile(r"(?P<source>.+):(?P<weight>\d+(\.\d*)?|\.\d+)")


@dataclass(frozen=True)
class Source:
    """Files, globs or a dataset, as in jobs.corpus, and how many samples of a window are from there."""

    spec: str
    count: int


def sources_of(spec: str) -> tuple[Source, ...]:
    """The sources of a mixture; none where `spec` is none. Raises CorpusError for weights that some lack, that are
    zero, or too small to be met within LONGEST_WINDOW samples, and for a source that is named twice."""
    if os.path.isfile(os.path.expanduser(spec)):
        return ()
    parts = [part.strip() for part in spec.split(",")]
    found = [None if os.path.isfile(part) else _WEIGHTED.fullmatch(part) for part in parts]
    if not any(found):
        return ()
    if lacks := [part for part, match in zip(parts, found, strict=True) if match is None]:
        raise CorpusError(f"data {spec!r} gives {lacks[0]!r} no weight; allowed: SOURCE:WEIGHT for all, or for none")
    named = {match["source"]: Fraction(match["weight"]) for match in found if match is not None}
    if len(named) < len(parts):
        raise CorpusError(f"data {spec!r} names a source twice; allowed: each once, with its weight")
    total = sum(named.values())
    if low := [source for source, weight in named.items() if weight == 0]:
        raise CorpusError(f"data {spec!r} gives {low[0]!r} the weight 0; allowed: above 0")
    shares = {source: weight / total for source, weight in named.items()}
    window = min(LONGEST_WINDOW, math.lcm(*(share.denominator for share in shares.values())))
    counts = _dealt(window, list(shares.values()), [window] * len(shares))
    if 0 in counts:
        raise CorpusError(
            f"data {spec!r} gives {list(shares)[counts.index(0)]!r} a share of less than one sample in "
            f"{LONGEST_WINDOW}; allowed: more"
        )
    return tuple(Source(source, count) for source, count in zip(shares, counts, strict=True))


def plain_spec(spec: str) -> str:
    """The sources of `spec` without their weights."""
    return ",".join(source.spec for source in sources_of(spec)) or spec


def folder_of(folder: Path, number: int) -> Path:
    """Where the tokens of a source lie in the folder of a mixture."""
    return folder / f"source-{number}"


@dataclass(frozen=True, eq=False)
class Mixture:
    """The prepared data of several sources. It answers as one dataset does."""

    folder: Path
    sources: tuple[Source, ...]
    parts: tuple[Dataset | RowDataset, ...]
    seed: int
    _windows: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> Mixture:
        """What `keep` has said of the datasets in `folder`. Raises CorpusError when it is not there or not whole."""
        try:
            said = json.loads((folder / MIXTURE).read_text(encoding="utf-8"))
            if said["format"] != FORMAT:
                raise ValueError(f"format {said['format']}; allowed: {FORMAT}")
            sources = tuple(Source(str(each["source"]), int(each["count"])) for each in said["sources"])
            parts = tuple(open_part(folder_of(folder, number)) for number in range(len(sources)))
            return cls(folder, sources, parts, int(said["seed"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{str(folder)!r} holds no prepared mixture: {error}; delete it to make it anew"
            ) from error

    @property
    def said(self) -> dict[str, Any]:
        """What decides which sample is from where (JSON)."""
        sources = [{"source": source.spec, "count": source.count} for source in self.sources]
        return {"format": FORMAT, "seed": self.seed, "sources": sources}

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what sample i is: the name of a source is not of it."""
        counts = [source.count for source in self.sources]
        told = f"{FORMAT} {self.seed} {counts} {[part.fingerprint for part in self.parts]}"
        return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()

    @property
    def window(self) -> int:
        """The samples in which every source has its exact share."""
        return sum(source.count for source in self.sources)

    def place(self, sample: int) -> tuple[int, int]:
        """(source, which of its samples) of training sample `sample` >= 0. Raises IndexError."""
        if sample < 0:
            raise IndexError(f"training sample {sample}; allowed: 0 or more")
        number, at = divmod(sample, self.window)
        dealt = self._window(number)
        source = int(dealt[at])
        return source, number * self.sources[source].count + int((dealt[:at] == source).sum())

    def _window(self, number: int) -> np.ndarray:
        """[window] the source of each sample of a window."""
        if number not in self._windows:
            for old in [each for each in self._windows if abs(each - number) > 64]:
                self._windows.pop(old, None)
            row = np.repeat(np.arange(len(self.sources)), [source.count for source in self.sources])
            self._windows[number] = row[permutation(len(row), derive(self.seed, "mixture", number))]
        return self._windows[number]

    def source_of(self, sample: int) -> str:
        """What a training sample is from."""
        return self.sources[self.place(sample)[0]].spec

    # ---- as of a dataset ----

    def train_sample(self, sample: int) -> Any:
        """See Dataset, RowDataset."""
        source, index = self.place(sample)
        return self.parts[source].train_sample(index)

    def num_labels(self, sample: int) -> int:
        """See Dataset, RowDataset."""
        source, index = self.place(sample)
        return self.parts[source].num_labels(index)

    @property
    def num_held_out(self) -> int:
        """Samples that are evaluated, of all sources."""
        return sum(part.num_held_out for part in self.parts)

    def held_out_spread(self, count: int) -> Callable[[int], Any]:
        """Sample i of `count` held-out ones: from each source its share, as far as it has so many, evenly spread."""
        shares = [Fraction(source.count, self.window) for source in self.sources]
        counts = _dealt(count, shares, [part.num_held_out for part in self.parts])
        ends = list(accumulate(counts))
        spreads = [part.held_out_spread(number) if number else None for part, number in zip(self.parts, counts)]

        def sample(i: int) -> Any:
            source = bisect_right(ends, i)
            spread = spreads[source]
            assert spread is not None
            return spread(i - (ends[source - 1] if source else 0))

        return sample

    @property
    def rows(self) -> bool:
        """Whether it is of rows, of which the answers are learned."""
        return isinstance(self.parts[0], RowDataset)

    @property
    def pack(self) -> bool:
        """See RowDataset."""
        return isinstance(self.parts[0], RowDataset) and self.parts[0].pack

    @property
    def end_token(self) -> int:
        """See Dataset."""
        return self.parts[0].end_token

    @property
    def blank(self) -> bool:
        """Whether something in it was forgotten."""
        return any(part.blank for part in self.parts if isinstance(part, Dataset))

    def __reduce__(self) -> tuple[Callable[[Path], Mixture], tuple[Path]]:
        return Mixture.open, (self.folder,)


def open_part(folder: Path) -> Dataset | RowDataset:
    """One dataset, of text or of rows. Raises CorpusError."""
    return RowDataset.open(folder) if (folder / ROWS).is_file() else Dataset.open(folder)


def _dealt(total: int, shares: Sequence[Fraction], room: Sequence[int]) -> list[int]:
    """`total` in whole numbers by shares (largest remainders, the earlier first), none above its room; what has none is
    dealt to the others in turn."""
    found = [min(most, math.floor(total * share)) for share, most in zip(shares, room, strict=True)]
    order = sorted(range(len(shares)), key=lambda n: (found[n] - total * shares[n], n))
    while sum(found) < min(total, sum(room)):
        for number in order:
            if found[number] < room[number] and sum(found) < total:
                found[number] += 1
    return found
