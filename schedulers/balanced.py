"""Stages of equal work, though layers are whole: a layer on the border of two workers is held by both.

Layers cannot be cut, so one worker is always the slowest: a Llama of 8 blocks and a head worth 0.9 of a block, on two
workers, keeps one of them waiting a tenth of the time. Here the layer in which a border falls is a span of its own
with a replica on either side, and runs for some microbatches here, for the others there, in the proportion in which
the border cuts it. The price is one sum of that layer's gradient per step. Backwards are split as in ZB-H1, and the
order is that of a list scheduler.

Folded to a V, each worker has a part on the way there and one on the way back, as in ZB-V (Qi et al., "Pipeline
Parallelism with Controllable Memory", 2024, arXiv 2405.15362): the pipeline fills in half the time, every worker holds
as much as the others, and twice as many messages are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import fsum
from typing import TYPE_CHECKING

from pipeline.schedule.ops import Op, Route, Schedule, Span
from pipeline.settings import RunShape, require_owner
from schedulers.balanced_search.pieces import Held, Shape, deal
from schedulers.chain import check
from schedulers.greedy import greedy, unit_seconds

if TYPE_CHECKING:
    from schedulers.balanced_search.search import Chosen


@dataclass(frozen=True)
class BalancedSettings:
    """Read by --scheduler balanced."""

    balanced_memory: Held = "free"
    """What a worker may hold of activations: as much as makes a step fast (free); no more than the fullest worker of
    1F1B does (fullest), as devices are alike; or no more than the same worker of 1F1B (1f1b)."""
    balanced_shape: Shape = "line"
    """line gives each worker one part of the layers; v gives it two, one on the way there and one on the way back,
    where there are two layers for each worker: shorter steps, twice as many messages, more layers that are shared."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError where these settings are not read."""
        require_owner(self, BalancedSettings, ("balanced_memory", "balanced_shape"), "balanced")


def balanced(
    layer_costs: Sequence[float], workers: int, microbatches: int, replicas: int = 1, *, held: Held = "free",
    shape: Shape = "line", halves: tuple[float, float] = (1.0, 1.0), sizes: Sequence[float] | None = None,
    evaluated: int | None = None,
) -> Schedule:  # fmt: skip
    """Microbatch m runs on replica m % replicas, whose worker k is replica * workers + k of the schedule.

    `layer_costs` as in `pieces`; `held` and `shape` as in `BalancedSettings`; `halves` says what both halves of a
    backward take, in forwards; `sizes` what a layer's activation counts, as much as it costs unless given: 1F1B, on
    the layers cut by cost alone, is measured with them. How microbatches are dealt is chosen by simulation. With
    `evaluated`, forwards alone, of so many microbatches, on the workers that the `microbatches` of training are dealt
    to. Raises ValueError for sizes that cannot be.
    """
    check([(0, len(layer_costs))], microbatches, replicas)
    counts = [len(range(replica, microbatches, replicas)) for replica in range(replicas)]
    known = tuple(sorted({count for count in counts if count}))
    weights = tuple(layer_costs if sizes is None else sizes)
    chosen = _chosen(tuple(layer_costs), workers, known, halves, weights, held, shape)
    if evaluated is not None:
        return _evaluation(chosen, layer_costs, workers, counts, evaluated)
    # numba takes half a second to import: only those who plan this way need it
    from schedulers.balanced_search.search import ordered

    spans = tuple(piece.span for piece in chosen.cut)
    lanes: dict[int, tuple[Op, ...]] = {}
    for replica, count in enumerate(counts):
        for k, lane in enumerate(ordered(chosen, layer_costs, workers, count, halves, weights)):
            ops = (Op(kind, spans[i], replica + m * replicas) for kind, i, m in lane)
            lanes[replica * workers + k] = tuple(ops)
    return Schedule((Route.through(spans),) * microbatches, lanes, "balanced")


@lru_cache(maxsize=32)
def _chosen(
    layer_costs: tuple[float, ...], workers: int, counts: tuple[int, ...], halves: tuple[float, float],
    sizes: tuple[float, ...], held: Held, shape: Shape,
) -> Chosen:  # fmt: skip
    from schedulers.balanced_search.search import Search

    return Search(layer_costs, workers, counts, halves, sizes).choose(held, shape)


def _evaluation(
    chosen: Chosen, layer_costs: Sequence[float], workers: int, counts: Sequence[int], evaluated: int
) -> Schedule:
    """Forwards of `evaluated` microbatches, each span on the workers that hold it for training."""
    replicas, home = len(counts), dict[tuple[Span, int], int]()
    for replica, count in enumerate(counts):
        mine = range(replica, evaluated, replicas)
        for piece, row in zip(chosen.cut, chosen.dealt(count), strict=True):
            # a small share may not come to a single microbatch of training
            shares = {part: share for part, share in piece.shares.items() if part in row} or piece.shares
            dealt = deal(shares, len(mine))
            home |= {
                (piece.span, m): replica * workers + chosen.worker_of[part] for m, part in zip(mine, dealt, strict=True)
            }

    def seconds(kind: str, span: Span) -> float:
        return unit_seconds(kind, span) * fsum(layer_costs[span[0] : span[1]])

    route = Route(tuple(piece.span for piece in chosen.cut), ())
    return greedy(
        (route,) * evaluated, lambda span, m: home[span, m], seconds=seconds, workers=range(workers * replicas),
        name="balanced",
    )  # fmt: skip
