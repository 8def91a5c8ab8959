"""Sequence-aware sharded sliced training (S3T; Basu Roy Chowdhury et al., ICLR 2025, arXiv 2406.16257): who learns from
what, what a deletion leaves, and how many deletions are survived.

Rows are dealt to slices. A sequence is an order of the slices. Its stage i trains adapters on a span of decoder blocks
of its own, the topmost first, on the rows of its first i + 1 slices, and begins with the adapters of the stages before
it. So a stage is its *prefix* of slices, and no more: sequences that begin alike share their first stages. Who deletes
from slice s drops every stage whose prefix has s. To drop the span that was added with s is not enough: the stages
after it have learned from s as well. What is left of a sequence is a model that has never seen the slice.

The paper's text is read here by its abstract and its code (brcsomnath/S3T); what is ours says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from random import Random

import networkx as nx
import numpy as np

from pipeline.model.rng import derive
from pipeline.schedule.ops import Span

Prefix = tuple[int, ...]
"""Slices in the order in which they were learned; a whole sequence is one, too."""
_HORIZON = 100  # deletions ahead for which sequences are chosen, as in the code of the paper
_UNITS = 2**40  # scores as whole numbers, which a matching compares exactly
_GRID = 400_001


def deal(rows: int, slices: int, seed: int) -> list[int]:
    """Row -> its slice: as many rows in each, up to one, and dealt without looking at what they say."""
    order = list(range(rows))
    Random(derive(seed, "s3t", "rows")).shuffle(order)
    found = [0] * rows
    for place, row in enumerate(order):
        found[row] = place % slices
    return found


def spans(blocks: int, slices: int) -> tuple[Span, ...]:
    """Stage -> the decoder blocks that are its own, from 0, the topmost first; blocks that are left over stay as they
    are. Raises ValueError for fewer blocks than slices."""
    size = blocks // slices
    if size == 0:
        raise ValueError(f"{slices} slices for {blocks} blocks")
    return tuple((blocks - (stage + 1) * size, blocks - stage * size) for stage in range(slices))


# ---- sequences ----


def rotations(slices: Sequence[int], count: int) -> list[Prefix]:
    """`count` different orders of the slices: rotations of one, and where there are more than slices, rotations of what
    follows the first one (in the paper iterative rotation), and so on. As many begin with each slice, up to one."""
    if not slices:
        return [()] * min(1, count)
    every = [tuple(slices[-k:]) + tuple(slices[:-k]) if k else tuple(slices) for k in range(len(slices))]
    share, more = divmod(count, len(every))
    return [
        (order[0], *rest)
        for place, order in enumerate(every[:count])
        for rest in rotations(order[1:], min(max(1, share + (place < more)), math.factorial(len(slices) - 1)))
    ]


def score(sequence: Sequence[int], rates: Sequence[float]) -> float:
    """What is left of a sequence after 100 deletions, as in the code: the sum over k of k (1 - p_1 - .. - p_k)^100,
    where p_k is how likely a deletion is to be from its k-th slice."""
    gone = np.cumsum([rates[each] for each in sequence])
    return float(sum(k * max(0.0, 1 - p) ** _HORIZON for k, p in enumerate(gone, 1)))


def matched(rates: Sequence[float], count: int) -> list[Prefix]:
    """Sequences for slices whose deletions are not equally likely: bipartite matching, place by place. One begins with
    each slice; then all are given their next slices, no two the same, so that the sum of their scores is the largest.
    The best `count` of them are taken (ours: the paper takes as many as slices)."""
    known = [rate / sum(rates) for rate in rates]
    found = [(first,) for first in range(len(known))]
    for _ in range(len(known) - 1):
        graph = nx.Graph()
        for number, sequence in enumerate(found):
            for each in range(len(known)):
                if each not in sequence:
                    worth = round(_UNITS * score((*sequence, each), known))
                    graph.add_edge(number, len(known) + each, weight=worth)
        pairs: dict[int, int] = {min(pair): max(pair) for pair in nx.max_weight_matching(graph, maxcardinality=True)}
        found = [(*sequence, pairs[number] - len(known)) for number, sequence in enumerate(found)]
    return sorted(found, key=lambda sequence: (-score(sequence, known), sequence))[:count]


def prefixes(sequences: Iterable[Prefix]) -> list[Prefix]:
    """Every stage that is trained, one that several sequences share once; those that it begins with come before it."""
    return list(dict.fromkeys(sequence[: end + 1] for sequence in sequences for end in range(len(sequence))))


# ---- deletions ----


def left(stages: Iterable[Prefix], slices: Collection[int]) -> list[Prefix]:
    """The stages that have never seen these slices."""
    return [stage for stage in stages if not set(slices) & set(stage)]


def best(stages: Iterable[Prefix]) -> Prefix | None:
    """The stage whose model is used: one that has seen the most, the first among these. None where there is none."""
    return max(stages, key=len, default=None)


def expected_deletions(sequences: Iterable[Prefix], rates: Sequence[float]) -> float:
    """How many deletions there are, on average, up to the one that leaves nothing. Each is from a slice by the `rates`,
    whatever came before.

    A sequence is over once its first slice is hit, so this is how long a coupon collector takes for the first slices.
    For equal rates that is n H_b, of n slices and b different first ones; over m shards m n H_(m b), in the paper
    O(m L log(m min(B, L))). Else it is the integral over t of 1 - prod (1 - exp(-p t)) over the first slices (each hit
    by a Poisson process of its own).
    """
    first = {sequence[0] for sequence in sequences}
    known = np.array([rates[each] / math.fsum(rates) for each in sorted(first)])
    if len({rates[each] for each in range(len(rates))}) == 1:
        return len(rates) * math.fsum(1 / k for k in range(1, len(first) + 1))
    times = np.concatenate([[0.0], np.geomspace(1e-6 / known.max(), 60 / known.min(), _GRID)])
    alive = -np.expm1(np.log1p(-np.exp(-np.outer(times[1:], known))).sum(axis=1))
    heights = np.concatenate([[1.0], alive])
    return float(((heights[1:] + heights[:-1]) * np.diff(times)).sum() / 2)


def simulated_deletions(sequences: Sequence[Prefix], rates: Sequence[float], runs: int, seed: int) -> float:
    """The same by trying: the mean over `runs` of how many deletions it takes, each of which drops what `left` does."""
    bits = {stage: 1 << number for number, stage in enumerate(prefixes(sequences))}
    stays = [sum(bits[stage] for stage in left(bits, (each,))) for each in range(len(rates))]
    slices, ends, total = range(len(rates)), list(accumulate(rates)), 0
    for run in range(runs):
        random, stages = Random(derive(seed, "s3t", "deletions", run)), sum(bits.values())
        while stages:
            stages &= stays[random.choices(slices, cum_weights=ends)[0]]
            total += 1
    return total / runs


def name_of(stage: Prefix) -> str:
    """A stage as a folder is called."""
    return "-".join(map(str, stage))


def stage_of(name: str) -> Prefix:
    """The stage that is called so. Raises ValueError."""
    return tuple(int(part) for part in name.split("-"))


def rows_of(slice_of: Sequence[int], stage: Prefix) -> list[int]:
    """The rows that a stage learns from, ascending."""
    return [row for row, each in enumerate(slice_of) if each in stage]


def steps_of(steps: int, stage: Prefix, slices: int) -> int:
    """Optimizer steps of a stage, where all rows take so many: every row is taken as often in each stage."""
    return max(1, math.ceil(steps * len(stage) / slices))
