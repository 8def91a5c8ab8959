"""Layers cut so that the borders of parts fall where they must, and microbatches dealt to the two sides of a border."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import fsum
from typing import Literal, NamedTuple

from pipeline.schedule.ops import Span

Held = Literal["free", "fullest", "1f1b"]
Shape = Literal["line", "v"]

_SLIVER = 1 / 16  # of a layer, or of a worker's part if that is less: not worth a replica


class Piece(NamedTuple):
    """A span and what part of its microbatches each of its workers runs, ascending and adjacent: {worker: share}."""

    span: Span
    shares: dict[int, float]


def pieces(layer_costs: Sequence[float], workers: int) -> tuple[Piece, ...]:
    """The layers cut into spans so that every worker has 1 / workers of the cost, give or take a sliver of a layer.

    `layer_costs[l]`: seconds of layer l, forward and backward, of which at least one is above 0. Raises ValueError.
    """
    if not 1 <= workers <= len(layer_costs):
        raise ValueError(f"workers: {workers} for {len(layer_costs)} layers; allowed: 1 to {len(layer_costs)}")
    if min(layer_costs) < 0 or not fsum(layer_costs) > 0:
        raise ValueError(f"layer_costs: {list(layer_costs)}; allowed: 0 or more, not all 0")
    part = fsum(layer_costs) / workers
    ends = [0.0, *accumulate(layer_costs)]
    found: list[Piece] = []
    for layer in range(len(layer_costs)):
        lo, hi = ends[layer] / part, ends[layer + 1] / part
        inside = {w: min(hi, w + 1) - max(lo, w) for w in range(int(lo), min(workers, int(hi) + 1))}
        whole = sum(inside.values())
        shares = {w: x / whole for w, x in inside.items() if whole and x >= _SLIVER * min(1.0, whole)}
        if not shares:  # a layer that costs nothing, or a border on an edge
            shares = {min(int((lo + hi) / 2), workers - 1): 1.0}
        total = sum(shares.values())
        shares = {w: x / total for w, x in shares.items()}
        if found and len(shares) == 1 and found[-1].shares.keys() == shares.keys():
            found[-1] = Piece((found[-1].span[0], layer + 1), shares)
        else:
            found.append(Piece((layer, layer + 1), shares))
    return tuple(found)


def deal(shares: dict[int, float], count: int, shift: int = 0, turn: int = 0) -> list[int]:
    """The worker of each of `count` microbatches, spread evenly: whoever is furthest behind its share is next.

    `shift` more of them go to the first worker than its share says, fewer if negative; `turn` places on in the round.
    """
    if shift and len(shares) > 1 and count:
        first, last = min(shares), max(shares)
        moved = max(-shares[first], min(shift / count, shares[last]))
        shares = shares | {first: shares[first] + moved, last: shares[last] - moved}
    given = dict.fromkeys(shares, 0)
    out: list[int] = []
    for n in range(1, count + 1):
        worker = max(shares, key=lambda w: (n * shares[w] - given[w], -w))
        given[worker] += 1
        out.append(worker)
    return out[turn:] + out[:turn]
