"""Networks to plan for, drawn from a seed."""

from __future__ import annotations

import numpy as np

from schedulers.skippipe_search.problem import RoutingProblem


def geography(seed: int, nodes: int, stages: int, skipped: int, per_home: int, swaps: bool = True) -> RoutingProblem:
    """Nodes at sites on a globe, two to a site on average, dealt to stages of which the first is the largest.

    A hop is 20 ms, light in fibre along one and a half times the great circle, and 33.5 MB at a bandwidth that falls
    with the distance, from 400 MB/s within a site to some 10 MB/s round the globe, times a log-normal factor of 0.4:
    hops of 0.1 to 5 s, as on the published network, whose times of compute and memory slots are taken too.
    """
    draw = np.random.default_rng(seed)
    sites = draw.normal(size=(max(2, nodes // 2), 3))
    sites /= np.linalg.norm(sites, axis=1, keepdims=True)
    at = sites[draw.integers(len(sites), size=nodes)]
    km = 6371 * np.arccos(np.clip(at @ at.T, -1, 1))
    speed = 400e6 / (1 + km / 500) * draw.lognormal(0.0, 0.4, size=(nodes, nodes))
    hop = 0.02 + 1.5 * km / 200_000 + 33_554_432 / speed
    np.fill_diagonal(hop, 0.0)
    order = [int(n) for n in draw.permutation(nodes)]
    rest = nodes // (stages + 1) if stages < 10 else nodes // stages
    first = nodes - rest * (stages - 1)
    cut = [order[:first], *(order[first + i * rest : first + (i + 1) * rest] for i in range(stages - 1))]
    return RoutingProblem(
        hop.tolist(), tuple(map(tuple, cut)), stages - skipped, per_home * first, 0.44, 0.66, 0.11, 0.16 * 0.44,
        (3,) * nodes, swaps=swaps,
    )  # fmt: skip
