"""RoundPipe (ITcarrot/RoundPipe, arXiv April 2026): stages are dealt to workers that hold nothing.

Forward and backward are cut independently, since a backward stage that recomputes holds about a third of the layers in
the same time; the last forward, the loss and the first backward are one stage, which recomputes nothing. On S equal
stages and R rounds of N microbatches over N workers the bubble is (N - 1) / (R S + N - 1).
"""

from __future__ import annotations

from schedulers.roundpipe_search.clock import RULES, Clock, Dealt, dealt, repeated
from schedulers.roundpipe_search.problem import RoundsProblem, cut_from, rounds_from_json
from schedulers.roundpipe_search.search import ORDERS, search

__all__ = [
    "ORDERS", "RULES", "Clock", "Dealt", "RoundsProblem", "cut_from", "dealt", "ideal_bubble", "repeated",
    "rounds_from_json", "search",
]  # fmt: skip


def ideal_bubble(workers: int, rounds: int, stages: int) -> float:
    """The bubble of `rounds` rounds of `workers` microbatches through `stages` equal stages: (N-1) / (R S + N-1)."""
    return (workers - 1) / (rounds * stages + workers - 1)
