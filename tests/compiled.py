"""Compiles the searches before tests run, whose real runs have deadlines: `python -m tests.compiled`."""

from __future__ import annotations

from schedulers import plan
from schedulers.roundpipe_search.problem import RoundsProblem
from schedulers.roundpipe_search.search import search
from schedulers.skippipe import replan, skippipe, without
from schedulers.skippipe_search.problem import RoutingProblem


def main() -> None:
    """One small plan of each kind."""
    hops = [[0.0 if a == b else 0.1 * (1 + (a + b) % 3) for b in range(6)] for a in range(6)]
    for contention in (False, True):
        problem = RoutingProblem(
            hops, ((0, 1), (2, 3), (4, 5)), 2, 4, slots=(2,) * 6, swaps=True, contention=contention
        )
        found = skippipe(problem, moves=200, joint=True)
    replan(found, without(found.problem, {found.problem.stages[1][0]}))
    skippipe(problem, seconds=0.2)
    plan("balanced", [1.0] * 9 + [0.9], 2, 8)
    search(RoundsProblem((0.0, 1.0, 1.0, 1.0), (0.0, 2.0, 2.0, 2.0), 2, 4))


if __name__ == "__main__":
    main()
