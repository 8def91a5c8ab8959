"""A step takes at least so long: what a planner may leave out without simulating it.

The bounds look at one worker at a time. Before its first op the forwards of the spans before it must have run, after
its last one the backwards of those spans, and in between it has all of its own work. They hold for any durations; where
all stages are alike those of 1F1B, GPipe and ZB-H1 are met.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import fsum

from pipeline.schedule.ops import Span

_SPLIT = ("zero_bubble", "balanced")
"""Those whose weight gradients nobody waits for."""
_SAFE = 1 - 1e-9  # sums in another order round in another way


def least_of_any_cut(
    scheduler: str, layer_costs: Sequence[float], paces: Sequence[float], microbatches: int
) -> float:  # fmt: skip
    """Seconds, at least, of a step of `microbatches` on one replica, however it is cut; 0 where a pace is none.

    `layer_costs[l]`: seconds of layer l's forward at pace 1; a backward takes twice as long. `paces[k]`: how many times
    as fast stage k is.
    """
    if not paces or not all(0 < pace < float("inf") for pace in paces):
        return 0.0
    forward = fsum(layer_costs)
    alone = (2 if scheduler in _SPLIT else 3) * forward / max(paces)  # one microbatch from end to end
    return _SAFE * max(alone, 3 * microbatches * forward / fsum(paces))


def least_of_cut(
    scheduler: str, layer_costs: Sequence[float], spans: Sequence[Span], paces: Sequence[float], microbatches: int
) -> float:  # fmt: skip
    """As `least_of_any_cut`, where stage k holds `spans[k]`, `spans[k + stages]` and so on."""
    stages = len(paces)
    forward = [fsum(layer_costs[lo:hi]) / paces[i % stages] for i, (lo, hi) in enumerate(spans)]
    own = [fsum(forward[k::stages]) for k in range(stages)]
    ahead = [0.0, *accumulate(forward)]  # ahead[k]: the forwards of the spans before span k
    tail = 0 if scheduler in _SPLIT else 2
    found = max(ahead[k] * (1 + tail) + 3 * microbatches * own[k] for k in range(stages))
    if scheduler == "gpipe":  # identical jobs through a chain, and back
        found = max(found, 3 * (ahead[-1] + (microbatches - 1) * max(own)))
    elif scheduler == "one_f_one_b":  # its first backward comes when one microbatch has gone through all stages
        for k, mine in enumerate(own):
            after = max(0, microbatches - stages + k)  # forwards that come after the first backward
            found = max(found, 3 * ahead[-1] - 2 * mine + (2 * microbatches + after) * mine)
    return _SAFE * found
