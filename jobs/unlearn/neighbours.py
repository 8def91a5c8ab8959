"""The rows to keep that lie beside those to forget: ROKA's neighbours (arXiv 2603.00436), found once, beforehand.

Our reading of notes on the paper, which finds siblings in the batch by their nearness in the space of input times
gradient. Here a row's place in it is the embedding's output times the gradient, with respect to it, of the
log-likelihood of the row's answer, summed over positions; near is what has a large cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from jobs.unlearn.material import Item, Material
from jobs.unlearn.method import FORGET, RETAIN
from jobs.unlearn.sweep import sweep_rows

_AT_ONCE = 1024  # rows to forget that are compared with all others


def neighbours_of(folder: Path, material: Material, count: int, size: int) -> list[int]:
    """The rows to keep, by index, ascending, each once, that are among the `count` nearest ones of a row to forget, by
    the model in a directory. Raises ModelError."""
    forget = places_of(folder, material, [Item(FORGET, row) for row in material.forget], size)
    keep = places_of(folder, material, [Item(RETAIN, row) for row in material.retain], size)
    near = nearest(forget, keep, count)
    return [material.retain[int(row)] for row in near.unique()]


def places_of(folder: Path, material: Material, items: Sequence[Item], size: int) -> Tensor:
    """Where rows lie: input times gradient [rows, hidden], in their order, computed `size` rows at a time."""
    return torch.cat([(each.hidden * each.gradient).sum(dim=1) for each in sweep_rows(folder, material, items, size)])


def nearest(of: Tensor, among: Tensor, count: int) -> Tensor:
    """For each row of `of` [n, dim] the `count` rows of `among` [m, dim] with the largest cosines, the nearest first,
    of equal ones the earlier: [n, min(count, m)] int64. A row of zeros is as far from everything."""
    others = functional.normalize(among.double(), dim=1)
    found = [
        (functional.normalize(part.double(), dim=1) @ others.T).argsort(dim=1, descending=True, stable=True)[:, :count]
        for part in of.split(_AT_ONCE)
    ]
    return torch.cat(found)
