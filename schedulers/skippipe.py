"""SkipPipe: microbatches take partial, reordered paths through a slow network (arXiv 2502.19913).

Every microbatch skips some stages, so that less is computed and fewer slow links are crossed; which ones, over which
nodes, in which order is searched for: conflict-based search first, then annealing from there, within a budget. What
comes out is an ordinary Schedule, a bound that no plan can beat, and the gap to it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

from pipeline.garbage import no_collection
from pipeline.schedule.costs import Costs, Network
from pipeline.schedule.ops import B, F, Op, Route, Schedule, Span
from pipeline.settings import MOST_STEPS, RunShape, Within, require, require_owner
from schedulers.skippipe_search.anneal import Annealed, Budget, anneal, ready, repair
from schedulers.skippipe_search.bounds import any_cut, lower_bounds, own_work
from schedulers.skippipe_search.clock import STUCK, Rule, Run, clock
from schedulers.skippipe_search.conflicts import TRIES, conflict_based, dealt_paths, prioritised
from schedulers.skippipe_search.problem import NetworkError, Path, RoutingProblem, check_paths, quotas
from schedulers.skippipe_search.relaxed import packing_bound

MOVES = 200_000
"""The budget in moves unless told otherwise: some seconds for tens of nodes."""
_REPAIR = 250_000  # ops that the clock serves while a plan is mended, which takes it less than a tenth of a second
_CONFLICTS = 0.2  # of a budget in seconds: what the search for starts may take
_BOUND = 0.2  # the same, beside it: what the search for a bound may take
_LARGE = 20_000  # microbatches times nodes beyond which conflicts are too many to be resolved one by one


@dataclass(frozen=True)
class SkipPipeSettings:
    """Read by --scheduler skippipe."""

    skip: Annotated[float, Within(0, 1, below=True)] = 0.0
    """Share of the stages that each microbatch leaves out; the first is never left out."""
    swaps: bool = False
    """Let a pair of neighbouring stages change places on a route, under --scheduler skippipe."""
    full_every: Annotated[int, Within(0, MOST_STEPS)] = 0
    """Every so many steps one in which no stage is skipped; 0 for none."""
    search_moves: Annotated[int, Within(0, 100_000_000)] = MOVES
    """How long routes are searched for: moves, so that the seed alone decides the result."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError where there is no network to find routes through, or these settings are not read."""
        require(
            run.scheduler != "skippipe" or run.network is not None, "network", run.network,
            "a JSON file, under scheduler skippipe",
        )  # fmt: skip
        require_owner(self, SkipPipeSettings, ("skip", "swaps", "full_every"), "skippipe")


@dataclass(frozen=True)
class SkipPlan:
    """Paths with their timing under `problem`, whose stages are those of the plan. `bounds`: see `lower_bounds`."""

    problem: RoutingProblem
    paths: tuple[Path, ...]
    rule: Rule
    run: Run
    bounds: dict[str, float]

    @property
    def iteration_s(self) -> float:
        return self.run.iteration_s

    @property
    def lower_bound_s(self) -> float:
        return max(self.bounds.values())

    @property
    def gap(self) -> float:
        """How much longer than the bound, as a share of it."""
        return self.iteration_s / self.lower_bound_s - 1 if self.lower_bound_s > 0 else 0.0

    def schedule(self, spans: Sequence[Span] = (), name: str = "skippipe") -> Schedule:
        """The lanes: node n is worker n. `spans` are the stages' layers, and the head's last; one layer each unless
        given. Raises ValueError for another number of them."""
        problem, stages = self.problem, len(self.problem.stages)
        spans = tuple(spans) or tuple((i, i + 1) for i in range(stages + 1))
        if len(spans) != stages + 1:
            raise ValueError(f"spans: {len(spans)}; allowed: {stages + 1}, one per stage and the head's")
        at, head = problem.stage_of, spans[-1]
        routes = [Route.through((*(spans[at[node]] for node in path), head)) for path in self.paths]
        lanes: dict[int, list[Op]] = {}
        for node in sorted(at):
            lanes[node] = lane = []
            for m, position in self.run.lanes[node]:
                length = len(self.paths[m])
                if position == length:
                    lane += [Op(F, head, m), Op(B, head, m)]
                else:
                    lane.append(Op(F if position < length else B, spans[at[node]], m))
        return Schedule(tuple(routes), {node: tuple(lane) for node, lane in lanes.items()}, name)

    @property
    def max_activations(self) -> dict[int, int]:
        """What each node may hold by its memory slots, for the verifier: a home holds a head's beside."""
        return {n: slots + (n in self.problem.homes) for n, slots in enumerate(self.problem.slots)}

    @cached_property
    def costs(self) -> Costs:
        """What the simulator must know to time `schedule()` as the clock does."""
        problem, stages = self.problem, len(self.problem.stages)
        spans = [(i, i + 1) for i in range(stages)]
        head = (stages, stages + 1)
        return Costs(
            {**dict.fromkeys(spans, problem.forward_s), head: problem.loss_s / 2},
            {**dict.fromkeys(spans, problem.backward_s), head: problem.loss_s / 2},
            speed=dict(enumerate(problem.speed)), gap_s=problem.gap_s,
        )  # fmt: skip

    @cached_property
    def network(self) -> Network:
        """The links for the simulator."""
        size = len(self.problem.hop_s)
        return Network(self.problem.hop_s, [[float("inf")] * size] * size, exclusive=self.problem.contention)


def skippipe(
    problem: RoutingProblem, *, seed: int = 0, moves: int = MOVES, seconds: float | None = None, joint: bool = False,
    start: Sequence[Path] | None = None,
) -> SkipPlan:  # fmt: skip
    """The best plan found within `moves`, which the seed alone decides, or within `seconds`.

    `joint` searches the assignment of nodes to stages too; the bound is then one for every assignment of the same
    sizes. `start` is where the search begins; unless given, a conflict-based search finds it. Raises NetworkError
    where memory or the network lets no plan through.
    """
    ready()  # a budget in seconds is not for compiling
    began = time.monotonic()
    bounds = {"any stages": any_cut(problem)} if joint else lower_bounds(problem)
    starts = [dealt_paths(problem) if start is None else list(start)]
    if start is None and problem.path_length > 1:
        end = None if seconds is None else began + _CONFLICTS * seconds
        starts += _starts(problem, seed, lambda: end is not None and time.monotonic() > end)
    left = None if seconds is None else max(0.0, seconds - (time.monotonic() - began))
    best = anneal(
        problem, starts, Budget(None if left is not None else moves, left), seed=seed, joint=joint,
        bound=max(bounds.values()),
    )  # fmt: skip
    plan = _plan(problem, best, bounds)
    if seconds is None or plan.gap < 1e-6:
        return plan
    over = time.monotonic() + max(1.0, _BOUND * seconds)
    packed = packing_bound(problem, plan.lower_bound_s, plan.iteration_s, joint, lambda: time.monotonic() > over)
    return replace(plan, bounds={**bounds, "packing": packed})


def _starts(problem: RoutingProblem, seed: int, over: Callable[[], bool]) -> list[list[Path]]:
    """By conflict-based search, unless the network is large, and by one home after another, until `over()`."""
    size = problem.num_microbatches * len(problem.hop_s)
    found = [conflict_based(problem, over=over) if size <= _LARGE else None]
    found.append(prioritised(problem, seed, max(1, min(TRIES, TRIES * _LARGE // size)), over))
    return [paths for paths in found if paths is not None]


def replay(problem: RoutingProblem, paths: Sequence[Path], rule: Rule = "furthest") -> SkipPlan:
    """Given paths, timed. Raises NetworkError for paths that are illegal, and where some microbatch never completes."""
    check_paths(problem, paths, balanced=False)
    run = clock(problem, paths, rule)
    if run.iteration_s == STUCK:
        raise NetworkError("the paths lock each other out: some microbatch never completes for want of memory slots")
    return SkipPlan(problem, tuple(paths), rule, run, lower_bounds(problem))


def replan(plan: SkipPlan, problem: RoutingProblem, *, seed: int = 0, moves: int | None = None) -> SkipPlan:
    """The plan again for `problem`, in which links have changed or nodes are gone (`without`), from its paths as far as
    they hold: the visits of a lost node go to its replicas, or around its stage where it had none.

    Then `moves` near there, by default as many as take less than a tenth of a second; the bounds are those that cost
    nothing. Raises NetworkError where memory or the network lets no plan through.
    """
    with no_collection():  # to walk a large network's objects takes longer than to mend its plan
        paths = mended(plan.paths, plan.problem, problem)
        if moves is None:
            moves = max(50, _REPAIR // (problem.num_microbatches * (2 * problem.path_length + 1)))
        found = repair(problem, paths, moves, seed)
        if found.run.iteration_s == STUCK:  # only stages that have changed places lock each other out
            at = problem.stage_of
            found = repair(problem, [(path[0], *sorted(path[1:], key=at.__getitem__)) for path in paths], moves, seed)
        return _plan(problem, found, own_work(problem))


def without(problem: RoutingProblem, lost: Collection[int]) -> RoutingProblem:
    """The problem without some nodes, with as many microbatches. A stage that has lost its last node is a stage no
    more; paths are as long as they were, or as there are stages. Raises NetworkError where no home is left."""
    stages = [tuple(n for n in stage if n not in lost) for stage in problem.stages]
    if not stages[0]:
        raise NetworkError("no node of the first stage is left, and the first stage is never skipped")
    kept = tuple(stage for stage in stages if stage)
    return problem.with_stages(kept, min(problem.path_length, len(kept)))


def mended(paths: Sequence[Path], old: RoutingProblem, new: RoutingProblem) -> list[Path]:
    """Legal and balanced paths for `new` that keep what they can of `paths`, which were for `old`: also their homes,
    whatever the numbers of their microbatches."""
    stage_of, was = new.stage_of, old.stage_of
    now = {i: new.stages.index(stage) for i, each in enumerate(old.stages)
           if (stage := next((s for s in new.stages if set(s) & set(each)), None))}  # fmt: skip
    left: dict[int, list[Path]] = {home: [] for home in new.homes}
    moved: list[Path] = []
    for path in paths:
        left.get(path[0], moved).append(path)
    kept = [left[home].pop(0) if left[home := new.home(m)] else None for m in range(new.num_microbatches)]
    moved += [path for each in left.values() for path in each]
    visits: Counter[int] = Counter()
    made: list[list[int]] = []
    for m, kept_path in enumerate(kept):
        here = [new.home(m)]
        for node in (kept_path or (moved.pop(0) if moved else ()))[1:]:
            if len(here) < new.path_length and node in stage_of:
                here.append(node)
                visits[node] += 1
            elif len(here) < new.path_length and was[node] in now:
                here.append(-1 - now[was[node]])
        made.append(here)
    both, most = new.both_ways, {node: share[1] for node, share in quotas(new)[1].items()}
    for here in made:  # a replica takes over that has visits to spare and is on the way
        for i, lost in enumerate(here):
            if lost < 0:
                before, after = here[i - 1], here[i + 1] if i + 1 < len(here) and here[i + 1] >= 0 else here[0]
                here[i] = min(
                    new.stages[-1 - lost],
                    key=lambda n: (visits[n] >= most[n], both[before, n] + both[n, after], n),
                )
                visits[here[i]] += 1
    for here in made:  # where a stage is gone, another one is visited in its place
        while len(here) < new.path_length:
            free = [n for n in stage_of if stage_of[n] not in {stage_of[h] for h in here}]
            node = min(free, key=lambda n: (visits[n], n))
            here[1:] = sorted([*here[1:], node], key=stage_of.__getitem__)
            visits[node] += 1
    _even(made, new, visits)
    found = [tuple(here) for here in made]
    try:
        check_paths(new, found)
    except NetworkError:
        return dealt_paths(new)
    return found


def _even(paths: list[list[int]], problem: RoutingProblem, visits: Counter[int]) -> None:
    """Move visits from nodes that have too many to nodes that have too few, path by path, while that is possible."""
    stage_of = problem.stage_of
    nodes = quotas(problem)[1]
    for here in paths:
        for at in range(1, len(here)):
            others = {stage_of[n] for i, n in enumerate(here) if i != at}
            old = here[at]
            if visits[old] <= nodes[old][0]:
                continue
            new = min((n for n in nodes if stage_of[n] not in others), key=lambda n: (visits[n], n))
            if visits[new] + 1 < visits[old]:
                visits[old] -= 1
                visits[new] += 1
                here[at] = new
                if stage_of[new] != stage_of[old]:
                    here[1:] = sorted(here[1:], key=stage_of.__getitem__)


def _plan(problem: RoutingProblem, found: Annealed, bounds: dict[str, float]) -> SkipPlan:
    planned = problem.with_stages(found.stages)
    if found.run.iteration_s == STUCK:
        slots = sorted(set(problem.slots))
        raise NetworkError(
            f"memory_slots of {slots[0]} per node: no plan was found under which every microbatch completes; allowed: "
            "more slots, fewer microbatches, or no swaps"
        )
    check_paths(planned, found.paths)
    return SkipPlan(planned, found.paths, found.rule, found.run, bounds)
