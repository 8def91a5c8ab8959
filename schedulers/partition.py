"""Which layers go to which worker: contiguous spans that make the slowest worker as fast as it can be.

Exact dynamic programme over (workers, layers). F(k, j), the least possible time of the slowest of the first k workers
when they hold the first j layers, is min over i of max(F(k-1, i), cost(i..j) / speed_k), over the i for which layers
i..j fit into worker k. Quadratic in layers, linear in workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from pipeline.schedule.ops import Span


class PartitionError(ValueError):
    """No partition exists, or the problem is malformed. Says which number stands in the way."""


def partition(
    layer_costs: Sequence[float],
    speeds: Sequence[float],
    memory: Sequence[float] | None = None,
    limits: Sequence[float] | None = None,
) -> tuple[Span, ...]:
    """One span per worker, in the order of `speeds`, each of at least one layer.

    `layer_costs[l]`: seconds of layer l on a worker of speed 1; `speeds[k]`: how many times as fast worker k is;
    `memory[l]`: bytes of layer l; `limits[k]`: bytes that worker k has. Among equal bests, earlier workers get more.
    Raises PartitionError where nothing fits.
    """
    layers, workers = len(layer_costs), len(speeds)
    _check(layer_costs, speeds, memory, limits)
    sums = [0.0, *accumulate(layer_costs)]
    sizes = [0.0, *accumulate(memory or [0.0] * layers)]
    rooms = limits or [math.inf] * workers

    best = [0.0, *[math.inf] * layers]
    cuts: list[list[int]] = []
    for k, (speed, room) in enumerate(zip(speeds, rooms, strict=True)):
        now, cut = [math.inf] * (layers + 1), [0] * (layers + 1)
        for j in range(k + 1, layers - (workers - k - 1) + 1):
            for i in range(j - 1, k - 1, -1):
                own = (sums[j] - sums[i]) / speed
                if sizes[j] - sizes[i] > room or own >= now[j]:  # both only grow as i falls
                    break
                if (slowest := max(best[i], own)) < now[j]:
                    now[j], cut[j] = slowest, i
        best = now
        cuts.append(cut)
    if math.isinf(best[layers]):
        raise PartitionError(_why(sizes, rooms))
    spans: list[Span] = []
    hi = layers
    for cut in reversed(cuts):
        spans.append((cut[hi], hi))
        hi = cut[hi]
    return tuple(reversed(spans))


def _check(
    costs: Sequence[float], speeds: Sequence[float], memory: Sequence[float] | None, limits: Sequence[float] | None
) -> None:
    if not speeds:
        raise PartitionError("speeds is empty; expected one per worker")
    if len(speeds) > len(costs):
        raise PartitionError(
            f"{len(speeds)} stages for {len(costs)} layers; allowed: at most {len(costs)}, one layer each"
        )
    if (memory is None) != (limits is None):
        raise PartitionError("memory and limits go together: bytes per layer and bytes per worker")
    for name, values, count, least in (
        ("layer_costs", costs, len(costs), 0.0), ("speeds", speeds, len(speeds), math.ulp(0.0)),
        ("memory", memory, len(costs), 0.0), ("limits", limits, len(speeds), 0.0),
    ):  # fmt: skip
        if values is None:
            continue
        if len(values) != count:
            raise PartitionError(f"{name} has {len(values)} values; expected {count}")
        for i, value in enumerate(values):
            if not least <= value < math.inf and not (name == "limits" and value == math.inf):
                raise PartitionError(f"{name}[{i}] is {value}; allowed: {'above 0' if least else '0 or more'}, finite")


def _why(sizes: Sequence[float], rooms: Sequence[float]) -> str:
    """What does not fit, told by filling the workers in order, each with as many layers as it can take."""
    layers, workers = len(sizes) - 1, len(rooms)
    total = sum(rooms)
    if sizes[-1] > total:
        return f"{layers} layers need {sizes[-1]:.4g} bytes; the {workers} workers together have {total:.4g}"
    lo = 0
    for k, room in enumerate(rooms):
        hi, most = lo, layers - (workers - k - 1)
        while hi < most and sizes[hi + 1] - sizes[lo] <= room:
            hi += 1
        if hi == lo:
            return (
                f"layer {lo} needs {sizes[lo + 1] - sizes[lo]:.4g} bytes; worker {k}, whose turn it is, has {room:.4g}"
            )
        lo = hi
    left = sizes[-1] - sizes[lo]
    return (
        f"in this order the workers can hold layers 0 to {lo - 1}; "
        f"layers {lo} to {layers - 1}, {left:.4g} bytes, fit nowhere"
    )
