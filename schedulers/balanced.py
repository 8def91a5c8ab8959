"""Stages of equal work, though layers are whole: a layer on the border of two workers is held by both.

Layers cannot be cut, so one worker is always the slowest: a Llama of 8 blocks and a head worth 0.9 of a block, on two
workers, keeps one of them waiting a tenth of the time. Here the layer in which a border falls is a span of its own
with a replica on either side, and runs for some microbatches here, for the others there, in the proportion in which
the border cuts it. The price is one sum of that layer's gradient per step. Backwards are split as in ZB-H1, and the
order is that of a list scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import fsum
from typing import NamedTuple

from pipeline.schedule import Route, Schedule, Span
from schedulers.chain import check
from schedulers.greedy import greedy, unit_seconds

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


def deal(shares: dict[int, float], count: int) -> list[int]:
    """The worker of each of `count` microbatches, spread evenly: whoever is furthest behind its share is next."""
    given = dict.fromkeys(shares, 0)
    out: list[int] = []
    for n in range(1, count + 1):
        worker = max(shares, key=lambda w: (n * shares[w] - given[w], -w))
        given[worker] += 1
        out.append(worker)
    return out


def balanced(
    layer_costs: Sequence[float], workers: int, microbatches: int, replicas: int = 1, *, in_flight: int | None = None,
    evaluated: int | None = None,
) -> Schedule:  # fmt: skip
    """Microbatch m runs on replica m % replicas, whose worker k is replica * workers + k of the schedule.

    `layer_costs` as in `pieces`; `in_flight` bounds the microbatches whose activations a worker holds (workers + 1
    unless given). With `evaluated`, forwards alone, of so many microbatches, on the
    workers that the `microbatches` of training are dealt to. Raises ValueError for sizes that cannot be.
    """
    cut = pieces(layer_costs, workers)
    spans = tuple(piece.span for piece in cut)
    check(spans, microbatches, replicas)
    count = microbatches if evaluated is None else evaluated
    home: dict[tuple[Span, int], int] = {}
    for replica in range(replicas):
        trained, mine = len(range(replica, microbatches, replicas)), range(replica, count, replicas)
        for piece in cut:
            shares = piece.shares
            if evaluated is not None and trained:  # a small share may not come to a single microbatch
                holders = set(deal(shares, trained))
                shares = {worker: share for worker, share in shares.items() if worker in holders}
            for m, worker in zip(mine, deal(shares, len(mine)), strict=True):
                home[piece.span, m] = replica * workers + worker
    held = workers + 1 if in_flight is None else in_flight
    limits = {
        replica * workers + k: held * sum(k in piece.shares for piece in cut)
        for replica in range(replicas)
        for k in range(workers)
    }

    def seconds(kind: str, span: Span) -> float:
        return unit_seconds(kind, span) * fsum(layer_costs[span[0] : span[1]])

    route = Route.through(spans) if evaluated is None else Route(spans, ())
    return greedy(
        (route,) * count, lambda span, m: home[span, m], seconds=seconds, limits=limits,
        workers=range(workers * replicas), split=evaluated is None, name="balanced",
    )  # fmt: skip
