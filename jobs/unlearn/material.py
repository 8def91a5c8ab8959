"""The rows of a request: which are to be forgotten, which are kept, and in which order a step takes them.

Every order is keyed by (seed, kind, epoch) alone. No row of a kind comes a second time before all others of it have
come once, whoever computes it: two workers never draw the same row to keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from jobs.corpus import permutation
from jobs.row_data import Sample
from jobs.unlearn.method import FORGET, PAIR, RETAIN
from jobs.unlearn.samples import answered, tensors_of
from pipeline.model.rng import derive
from pipeline.runtime.batch import Needs

IDK = "idk"
"""Where the rows come from whose answers say nothing."""


class Rows(Protocol):
    """What rows are read from, each as one sample."""

    def row(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class Item:
    """One row of a source: FORGET and RETAIN are rows of the run's data, IDK the rows to forget under other answers,
    any other kind has rows of its own."""

    source: str
    index: int

    @property
    def key(self) -> str:
        """What it is called where something is kept for it."""
        return f"{self.source}-{self.index}"


@dataclass
class Material:
    """`forget` and `retain` are indices of `data`; `others` are the rows of further kinds; `idk` are answers as tokens,
    the end token last."""

    data: Rows
    forget: Sequence[int]
    retain: Sequence[int]
    seed: int
    idk: Sequence[Sequence[int]] = ()
    others: Mapping[str, tuple[Rows, int]] = field(default_factory=dict)
    """Kind -> (rows, how many)."""
    _orders: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def indices(self, kind: str) -> Sequence[int]:
        """All rows of a kind."""
        if kind in (FORGET, PAIR):
            return self.forget
        return self.retain if kind == RETAIN else range(self.others[kind][1])

    def drawn(self, kind: str, position: int) -> int:
        """The row at a position of the endless order of a kind."""
        rows = self.indices(kind)
        epoch, place = divmod(position, len(rows))
        if (kind, epoch) not in self._orders:
            for old in [key for key in self._orders if key[0] == kind and abs(key[1] - epoch) > 1]:
                del self._orders[old]
            self._orders[kind, epoch] = permutation(len(rows), derive(self.seed, "unlearn", kind, epoch))
        return rows[int(self._orders[kind, epoch][place])]

    def items(self, kind: str, first: int, count: int) -> list[Item]:
        """The rows of a microbatch of `count` rows; of a PAIR half of them each."""
        if kind != PAIR:
            return [Item(kind, self.drawn(kind, first + i)) for i in range(count)]
        rows = [self.drawn(kind, first + i) for i in range(count // 2)]
        return [Item(FORGET, row) for row in rows] + [Item(IDK, row) for row in rows]

    def sample(self, item: Item) -> Sample:
        """Its ids and labels."""
        if item.source == IDK:
            return self._evasive(item.index)
        rows = self.others[item.source][0] if item.source in self.others else self.data
        return rows.row(item.index)

    def _evasive(self, index: int) -> Sample:
        """The question of a row with an answer that says nothing: which one, the seed decides."""
        return answered(self.data.row(index), self.idk[derive(self.seed, "idk", index) % len(self.idk)])


def stacked(material: Material, items: list[Item], needs: Needs) -> dict[str, Tensor]:
    """The tensors of some rows that are needed: `input_ids` and `labels` [rows, sequence]."""
    return tensors_of([material.sample(item) for item in items], needs)
