"""What SkipPipe's planner finds, beside what was published and beside the bound: simulated iterations, real searches.

    python benchmarks/skippipe.py --out benchmarks/results        # 45 minutes on two idle cores
    python benchmarks/skippipe.py --only published --budget 5     # to try the script

`published`: the published network of 20 nodes (data/skippipe_gcp20.json). The paths that were published are timed by
our clock; the others are searched for, each under three seeds. Every row says how many microbatches and stages it is
for, since the published full pipeline has 27 microbatches and the skipping ones have 30.
`second`: one of those plans in a second, under six seeds.
`unseen`: networks drawn from a seed, of 12 to 24 nodes in 4 to 6 stages. Sites lie on a globe; a link is as slow as its
sites are far apart, and varies besides; nodes are dealt to stages at random. One search for each.
`scale`: such networks of 100 and 1,000 nodes.
`moves`: moves per second by the estimate and by the clock, of one chain and of one on every core, beside those before
they were compiled, when a search was one chain.
`replan`: one node after another is lost from a plan for 1,000; how long a new plan takes, and what it is worth.
Every bound stands beside the one before all paths were packed at once (schedulers/skippipe_search/relaxed.py).
A budget is the seconds of a whole search, which has every core. Writes skippipe.json and skippipe-gaps.svg; parts that
are not asked for stay as they are there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.skippipe_networks import geography  # noqa: E402
from benchmarks.skippipe_report import gaps_svg, print_report  # noqa: E402
from launch.plan_command import published, published_time  # noqa: E402
from schedulers.skippipe import replan, replay, skippipe, without  # noqa: E402
from schedulers.skippipe_search.anneal import Budget, Search, ready  # noqa: E402
from schedulers.skippipe_search.conflicts import dealt_paths  # noqa: E402
from schedulers.skippipe_search.problem import RoutingProblem, routing_from_json  # noqa: E402

GCP = Path(__file__).parent / "data" / "skippipe_gcp20.json"
SEARCHED = {  # name -> stages left out, swaps, joint
    "re-routed, nothing skipped": (0, False, False),
    "re-routed, nothing skipped, cut searched": (0, False, True),
    "one stage of six skipped": (1, True, False),
    "two stages of six skipped, no swaps": (2, False, False),
    "two stages of six skipped": (2, True, False),
    "two stages of six skipped, cut searched": (2, True, True),
}
GOALS = {"two stages of six skipped": 33.3, "two stages of six skipped, cut searched": 28.8}  # s, of issue and anchor
IN_A_SECOND = "two stages of six skipped"
PARTS = ("published", "second", "unseen", "scale", "moves", "replan")
BEFORE = {  # moves per second of a core before they were compiled (commit 475bd7e), by the estimate and by the clock
    "20 nodes, cut searched": (47_244, 8_330), "20 nodes": (72_227, 8_159), "100 nodes": (49_032, 1_714),
    "1,000 nodes": (33_779, 221),
}  # fmt: skip


def job_problem(job: dict[str, Any]) -> RoutingProblem:
    """What a job is to plan."""
    if job["part"] in ("published", "second"):
        skipped, swaps, _ = SEARCHED[job["name"]]
        asked = routing_from_json(json.loads(GCP.read_text()), swaps=swaps)
        return replace(asked, path_length=len(asked.stages) - skipped)
    return geography(job["seed"], job["nodes"], job["stages"], job["skipped"], job["per_home"], job["swaps"])


def search(job: dict[str, Any]) -> dict[str, Any]:
    """One search, and what it came to."""
    problem = job_problem(job)
    began = time.monotonic()
    plan = skippipe(problem, seed=job["seed"], seconds=job["budget_s"], joint=job["joint"])
    before = max(seconds for name, seconds in plan.bounds.items() if name != "packing")
    return {
        **job, "microbatches": problem.num_microbatches, "path_length": problem.path_length,
        "stages": len(problem.stages), "iteration_s": plan.iteration_s, "bound_s": plan.lower_bound_s,
        "gap": plan.gap, "bound_before_s": before, "gap_before": plan.iteration_s / before - 1,
        "search_s": time.monotonic() - began,
    }  # fmt: skip


def replayed() -> list[dict[str, Any]]:
    """The published paths by our clock, and fixed pipelines for as many microbatches as the others have."""
    values = json.loads(GCP.read_text())
    problem = routing_from_json(values, swaps=True)
    values["published_iteration_s"]["full pipeline, 30 microbatches on 3 fixed pipelines"] = None
    rows: list[dict[str, Any]] = []
    for name, paths in published(problem, values).items():
        rows.append(
            {
                "part": "published", "name": name, "microbatches": len(paths), "path_length": len(paths[0]),
                "iteration_s": replay(problem, paths).iteration_s, "published_s": published_time(values, name),
            }
        )  # fmt: skip
    return rows


def moves_per_second(seconds: float = 3.0) -> list[dict[str, Any]]:
    """From the same start as before, of one chain and of as many as there are cores."""
    asked = routing_from_json(json.loads(GCP.read_text()), swaps=True)
    published_, rows = replace(asked, path_length=len(asked.stages) - 2), list[dict[str, Any]]()
    began = time.monotonic()
    ready()
    compiling, cores = time.monotonic() - began, len(os.sched_getaffinity(0))
    for name, problem in (
        ("20 nodes, cut searched", published_), ("20 nodes", published_),
        ("100 nodes", geography(0, 100, 10, 3, 6)), ("1,000 nodes", geography(0, 1000, 10, 3, 3, False)),
    ):  # fmt: skip
        row: dict[str, Any] = {"part": "moves", "name": name, "cores": cores, "ready_s": compiling}
        for many in dict.fromkeys((1, cores)):
            searches = [Search(problem, "cut" in name) for _ in range(many)]
            for seed, each in enumerate(searches):
                each.load(problem, dealt_paths(problem), seed)
            for kind, before in zip(("estimate", "clock"), BEFORE[name], strict=True):
                for each in searches:
                    each.descend(Budget(1), exact=kind == "clock")
                row[f"{kind}, {many}"] = _together(searches, kind == "clock", seconds)
                row[f"{kind}_before"] = before
        rows.append(row)
    return rows


def _together(searches: list[Search], exact: bool, seconds: float) -> float:
    """Moves per second of searches that go on side by side."""
    made, began = sum(each.made for each in searches), time.monotonic()
    with ThreadPoolExecutor(len(searches)) as threads:
        going = [threads.submit(each.descend, Budget(None, seconds), exact=exact) for each in searches]
    for each in going:
        each.result()
    return (sum(each.made for each in searches) - made) / (time.monotonic() - began)


def replanned(budget: float, lost: int = 60, beside: int = 3) -> list[dict[str, Any]]:
    """Lost nodes of a plan for 1,000, one each time; the first `beside` are searched for from scratch too."""
    plan = skippipe(geography(0, 1000, 10, 3, 3, False), seconds=budget)
    rows: list[dict[str, Any]] = []
    for number, node in enumerate(np.random.default_rng(0).permutation(1000)[:lost].tolist()):
        began = time.perf_counter()
        left = without(plan.problem, [node])
        again = replan(plan, left)
        took = time.perf_counter() - began
        rows.append(
            {"part": "replan", "name": f"without node {node}", "home": node in plan.problem.homes, "replan_s": took,
             "plan_s": plan.iteration_s, "iteration_s": again.iteration_s,
             "searched_s": skippipe(left, seconds=budget).iteration_s if number < beside else None}
        )  # fmt: skip
    return rows


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every search, the long ones first."""
    made: list[dict[str, Any]] = []
    if "scale" in options.only:
        for nodes, stages, skipped, per_home, swaps in ((1000, 10, 3, 3, False), (100, 10, 3, 6, True)):
            made.append(
                {"part": "scale", "name": f"{nodes:,} nodes", "nodes": nodes, "stages": stages, "skipped": skipped,
                 "per_home": per_home, "swaps": swaps, "joint": False, "seed": 0, "budget_s": 5 * options.budget}
            )  # fmt: skip
    if "published" in options.only:
        made += [
            {"part": "published", "name": name, "joint": joint, "seed": seed, "budget_s": options.budget}
            for name, (_, _, joint) in SEARCHED.items() for seed in range(3)
        ]  # fmt: skip
    if "second" in options.only:
        made += [
            {"part": "second", "name": IN_A_SECOND, "joint": False, "seed": seed, "budget_s": 1.0} for seed in range(6)
        ]
    if "unseen" in options.only:
        for seed in range(options.networks):
            draw = np.random.default_rng(10_000 + seed)
            stages = int(draw.integers(4, 7))
            made.append(
                {"part": "unseen", "name": f"network {seed}", "nodes": int(draw.integers(12, 25)), "stages": stages,
                 "skipped": int(draw.integers(1, 3)), "per_home": int(draw.choice([4, 6])), "swaps": bool(seed % 2),
                 "joint": False, "seed": seed, "budget_s": options.budget}
            )  # fmt: skip
    return made


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over seeds, and how the gaps are spread."""
    found: dict[str, Any] = {}
    for name in SEARCHED:
        if same := [row for row in rows if row["part"] == "published" and row["name"] == name]:
            seconds = [row["iteration_s"] for row in same]
            found[name] = {
                "median_s": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds),
                "bound_s": max(row["bound_s"] for row in same),
                "bound_before_s": same[0]["bound_before_s"], "gap": statistics.median(row["gap"] for row in same),
                "search_s": max(row["search_s"] for row in same),
                **({"goal_s": GOALS[name]} if name in GOALS else {}),
            }  # fmt: skip
    if quick := [row for row in rows if row["part"] == "second"]:
        most = {name: max(row[name] for row in quick) for name in ("iteration_s", "search_s", "gap")}
        found["second"] = {"seeds": len(quick), **most}
    if gaps := sorted(row["gap"] for row in rows if row["part"] == "unseen"):
        found["unseen"] = {
            "networks": len(gaps), "median_before": statistics.median(
                row["gap_before"] for row in rows if row["part"] == "unseen"
            ), "median": statistics.median(gaps), "least": gaps[0], "most": gaps[-1],
            "p90": gaps[min(len(gaps) - 1, int(0.9 * len(gaps)))], "proved_best": sum(gap < 1e-6 for gap in gaps),
        }  # fmt: skip
    if again := [row for row in rows if row["part"] == "replan"]:
        ms = sorted(1000 * row["replan_s"] for row in again[1:])  # the first one finds nothing in the caches
        found["replan"] = {
            "lost": len(again), "p50_ms": statistics.median(ms), "p95_ms": ms[int(0.95 * (len(ms) - 1))],
            "first_ms": 1000 * again[0]["replan_s"],
            **{f"times_as_long, {kind}": statistics.median(r["iteration_s"] / r["plan_s"] for r in again
                                                           if r["home"] == home)
               for kind, home in (("a home", True), ("another node", False))
               if any(r["home"] == home for r in again)},
        }  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of a search; five times as many for scale")
    parser.add_argument("--networks", type=int, default=40, help="of part unseen")
    parser.add_argument("--out", type=Path, help="folder for skippipe.json and skippipe-gaps.svg")
    options = parser.parse_args()
    path = options.out / "skippipe.json" if options.out else None
    old = json.loads(path.read_text()) if path is not None and path.exists() else {"rows": [], "commands": {}}
    mine = ["benchmarks/skippipe.py", *sys.argv[1:]]
    commands = {**old["commands"], **dict.fromkeys(options.only, mine)}
    rows = [row for row in old["rows"] if row["part"] not in options.only]
    rows += replayed() if "published" in options.only else []
    rows += moves_per_second() if "moves" in options.only else []
    rows += replanned(options.budget) if "replan" in options.only else []
    with Progress(console=Console(stderr=True)) as progress:
        rows += [search(job) for job in progress.track(jobs(options), description="searching")]
    rows.sort(key=lambda row: (PARTS.index(row["part"]), row.get("nodes", 0) if row["part"] == "scale" else 0))
    found = {
        "commands": commands, "cores": os.cpu_count(), "simulated": True,
        "summary": summarise(rows), "rows": rows,
    }  # fmt: skip
    print_report(found, Console(width=150))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        if "unseen" in options.only:
            path.with_name("skippipe-gaps.svg").write_text(gaps_svg(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
