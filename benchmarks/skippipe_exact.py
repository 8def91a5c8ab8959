"""Small networks solved exactly: what a plan, its bound and the true optimum are, side by side.

    python benchmarks/skippipe_exact.py --out benchmarks/results        # 10 minutes on an idle core

Networks as in skippipe.py, of 12 nodes. CP-SAT (OR-tools, extra `peers`) chooses the paths and when each op starts:
an op needs its node alone, and `gap_s` after it; a slot is held from a forward to its backward. It may let a node wait
on purpose, which the planner's clock never does; so beside it stands the best that was found under the clock. Its
seconds are whole milliseconds, rounded down, so that its bound holds for the network as it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.skippipe_networks import geography  # noqa: E402
from benchmarks.skippipe_report import exact_table  # noqa: E402
from schedulers.skippipe import SkipPlan, skippipe  # noqa: E402
from schedulers.skippipe_search.bounds import any_cut, lower_bounds  # noqa: E402,F401
from schedulers.skippipe_search.problem import RoutingProblem, quotas  # noqa: E402
from schedulers.skippipe_search.relaxed import all_paths  # noqa: E402

_MS = 1000.0


def solve(problem: RoutingProblem, plan: SkipPlan, seconds: float, workers: int) -> dict[str, Any]:
    """The least iteration that was found from `plan` on, and what none can beat; equal where it is proved."""
    from ortools.sat.python import cp_model

    model, columns = cp_model.CpModel(), all_paths(problem, any_stages=False)
    if columns is None:
        raise ValueError(f"{problem.path_length} stops on {len(problem.hop_s)} nodes: too many paths to list")
    most, length = math.ceil(plan.iteration_s * _MS), problem.path_length
    gap = math.floor(problem.gap_s * _MS)

    def ms(kind: str, node: int) -> int:
        return math.floor(problem.seconds(kind, node) * _MS)

    paths: dict[int, list[tuple[int, ...]]] = {home: [] for home in problem.homes}
    for row in columns.paths.tolist():
        paths[row[0]].append(tuple(row))
    busy: dict[int, list[Any]] = {n: [] for n in problem.stage_of}
    held: dict[int, list[Any]] = {n: [] for n in problem.stage_of}
    visits: dict[int, list[Any]] = {n: [] for n in problem.stage_of}
    end = model.new_int_var(math.floor(plan.lower_bound_s * _MS), most, "end")
    starts: list[list[Any]] = []
    chosen: list[list[Any]] = []
    for m in range(problem.num_microbatches):
        home = problem.home(m)
        at = [model.new_int_var(0, most, f"{m} at {i}") for i in range(2 * length + 1)]
        picks = [model.new_bool_var(f"{m} by {k}") for k in range(len(paths[home]))]
        model.add_exactly_one(picks)
        starts.append(at)
        chosen.append(picks)
        by_stop: dict[tuple[int, int], list[Any]] = {}
        for path, pick in zip(paths[home], picks, strict=True):
            stops = (*path, home, *path[::-1])
            for i, (a, b) in enumerate(itertools.pairwise(stops)):
                kind = "forward" if i < length else "loss" if i == length else "backward"
                hop = math.floor(problem.hop_s[a][b] * _MS) if a != b else 0
                model.add(at[i + 1] >= at[i] + ms(kind, a) + hop).only_enforce_if(pick)
            for i, node in enumerate(path[1:], 1):
                by_stop.setdefault((i, node), []).append(pick)
        for (i, node), some in by_stop.items():
            here = model.new_bool_var(f"{m} {i} {node}")
            model.add(sum(some) == here)
            visits[node].append(here)
            forward, backward = ms("forward", node), ms("backward", node)
            for start, size in ((at[i], forward), (at[2 * length - i], backward)):
                busy[node].append(model.new_optional_fixed_size_interval_var(start, size + gap, here, ""))
            stay = model.new_int_var(0, most + gap, "")
            held[node].append(
                model.new_optional_interval_var(at[i], stay, at[2 * length - i] + backward + gap, here, "")
            )
        for i, kind in ((0, "forward"), (length, "loss"), (2 * length, "backward")):
            busy[home].append(model.new_fixed_size_interval_var(at[i], ms(kind, home) + gap, ""))
        last = at[2 * length] + ms("backward", home)
        held[home].append(model.new_interval_var(at[0], model.new_int_var(0, most + gap, ""), last + gap, ""))
        model.add(end >= last)
        if m >= len(problem.homes):  # microbatches of one home are alike
            model.add(at[0] >= starts[m - len(problem.homes)][0])
    (low, high), shares = quotas(problem)
    for stage in problem.stages[1:]:
        model.add_linear_constraint(sum(v for n in stage for v in visits[n]), low, high)
    for node, (least, greatest) in shares.items():
        model.add_linear_constraint(sum(visits[node]), least, greatest)
    for node in problem.stage_of:
        model.add_no_overlap(busy[node])
        model.add_cumulative(held[node], [1] * len(held[node]), problem.slots[node])
    model.minimize(end)
    _hint(model, problem, plan, paths, starts, chosen)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = workers
    began = time.monotonic()
    status = solver.solve(model)
    found = solver.objective_value / _MS if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else plan.iteration_s
    return {
        "exact_s": min(found, plan.iteration_s), "exact_bound_s": solver.best_objective_bound / _MS,
        "proved": status == cp_model.OPTIMAL, "exact_search_s": time.monotonic() - began,
    }  # fmt: skip


def _hint(
    model: Any, problem: RoutingProblem, plan: SkipPlan, paths: dict[int, list[tuple[int, ...]]],
    starts: list[list[Any]], chosen: list[list[Any]],
) -> None:  # fmt: skip
    """Tell the solver the plan, microbatches of a home in the order of their starts."""
    first = {m: k for lane in plan.run.lanes for k, (m, at) in enumerate(lane) if at == 0}
    homes = len(problem.homes)
    for home in range(homes):
        slots = range(home, problem.num_microbatches, homes)
        for m, planned in zip(slots, sorted(slots, key=lambda m: first[m]), strict=True):
            for path, pick in zip(paths[problem.home(m)], chosen[m], strict=True):
                model.add_hint(pick, path == plan.paths[planned])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of the exact search of a network")
    parser.add_argument("--workers", type=int, default=1, help="threads of the exact search")
    parser.add_argument("--out", type=Path, help="folder for skippipe-exact.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(options.networks):
        stages, per_home = 4 + seed % 2, 2 + seed % 3 // 2
        problem = geography(seed, 12, stages, 1 + seed // 2 % 2, per_home, swaps=False)
        old = max(lower_bounds(problem).values())
        plan = skippipe(problem, seed=0, seconds=options.budget / 6)
        rows.append(
            {"network": seed, "stages": [len(s) for s in problem.stages], "path_length": problem.path_length,
             "microbatches": problem.num_microbatches, "iteration_s": plan.iteration_s, "bound_before_s": old,
             "bound_s": plan.lower_bound_s, **solve(problem, plan, options.budget, options.workers)}
        )  # fmt: skip
        Console(stderr=True).print(rows[-1])
    found = {
        "command": ["benchmarks/skippipe_exact.py", *sys.argv[1:]], "cores": os.cpu_count(), "simulated": True,
        "rows": rows,
    }  # fmt: skip
    Console(width=150).print(exact_table(rows))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "skippipe-exact.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
