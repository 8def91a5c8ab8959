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

from pipeline.schedule.costs import Costs
from pipeline.schedule.ops import Route, Schedule, Span
from pipeline.schedule.simulate import simulate
from schedulers.chain import check
from schedulers.greedy import greedy, unit_seconds

_SLIVER = 1 / 16  # of a layer, or of a worker's part if that is less: not worth a replica


_SEARCHED, _TURNS = 400, 8  # spans times microbatches up to which a dealing is searched for, and how many turns


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


class Dealing(NamedTuple):
    """How the microbatches of shared spans are dealt: `shift` more of them go to the earlier worker than its share
    says, `turn` places on in the round; `in_flight` bounds the microbatches whose activations a worker holds."""

    in_flight: int
    shift: int = 0
    turn: int = 0


def deal(shares: dict[int, float], count: int, shift: int = 0, turn: int = 0) -> list[int]:
    """The worker of each of `count` microbatches, spread evenly: whoever is furthest behind its share is next."""
    if shift and len(shares) > 1 and count:
        first, last = min(shares), max(shares)
        moved = min(shift / count, shares[last])
        shares = shares | {first: shares[first] + moved, last: shares[last] - moved}
    given = dict.fromkeys(shares, 0)
    out: list[int] = []
    for n in range(1, count + 1):
        worker = max(shares, key=lambda w: (n * shares[w] - given[w], -w))
        given[worker] += 1
        out.append(worker)
    return out[turn:] + out[:turn]


def balanced(
    layer_costs: Sequence[float], workers: int, microbatches: int, replicas: int = 1, *, dealing: Dealing | None = None,
    evaluated: int | None = None,
) -> Schedule:  # fmt: skip
    """Microbatch m runs on replica m % replicas, whose worker k is replica * workers + k of the schedule.

    `layer_costs` as in `pieces`. Unless `dealing` is given, the best of some is chosen by simulation. With
    `evaluated`, forwards alone, of so many microbatches, on the workers that the `microbatches` of training are dealt
    to. Raises ValueError for sizes that cannot be.
    """
    cut = pieces(layer_costs, workers)
    check([piece.span for piece in cut], microbatches, replicas)
    chosen = dealing or _choose(layer_costs, workers, -(-microbatches // replicas), cut)
    return _order(layer_costs, workers, microbatches, replicas, cut, chosen, evaluated)


def _choose(layer_costs: Sequence[float], workers: int, microbatches: int, cut: Sequence[Piece]) -> Dealing:
    """The dealing of one replica with the least makespan; among equals the one that holds least."""
    plain = Dealing(workers + 1)
    if microbatches * len(cut) > _SEARCHED or all(len(piece.shares) == 1 for piece in cut):
        return plain
    costs = Costs(
        forward=layer_costs, backward=[2 * c for c in layer_costs], input_gradient=layer_costs,
        weight_gradient=layer_costs,
    )  # fmt: skip
    found: list[tuple[float, int, Dealing]] = []
    for in_flight in (workers, workers + 1):
        for shift in (0, 1):
            for turn in range(min(microbatches, _TURNS)):
                dealing = Dealing(in_flight, shift, turn)
                timeline = simulate(_order(layer_costs, workers, microbatches, 1, cut, dealing, None), costs)
                found.append((round(timeline.makespan_s / fsum(layer_costs), 6), in_flight, dealing))
    return min(found)[-1]


def _order(
    layer_costs: Sequence[float], workers: int, microbatches: int, replicas: int, cut: Sequence[Piece],
    dealing: Dealing, evaluated: int | None,
) -> Schedule:  # fmt: skip
    count = microbatches if evaluated is None else evaluated
    home: dict[tuple[Span, int], int] = {}
    for replica in range(replicas):
        trained, mine = len(range(replica, microbatches, replicas)), range(replica, count, replicas)
        for piece in cut:
            dealt = deal(piece.shares, trained, dealing.shift, dealing.turn)
            if evaluated is not None:  # a small share may not come to a single microbatch of training
                shares = {w: share for w, share in piece.shares.items() if w in dealt} or piece.shares
                dealt = deal(shares, len(mine))
            home.update({(piece.span, m): replica * workers + w for m, w in zip(mine, dealt, strict=True)})
    limits = {
        replica * workers + k: dealing.in_flight * sum(k in piece.shares for piece in cut)
        for replica in range(replicas)
        for k in range(workers)
    }

    def seconds(kind: str, span: Span) -> float:
        return unit_seconds(kind, span) * fsum(layer_costs[span[0] : span[1]])

    spans = tuple(piece.span for piece in cut)
    route = Route.through(spans) if evaluated is None else Route(spans, ())
    return greedy(
        (route,) * count, lambda span, m: home[span, m], seconds=seconds, limits=limits,
        workers=range(workers * replicas), split=evaluated is None, name="balanced",
    )  # fmt: skip
