"""Goodput at 10^3 to 10^5 workers, simulated, and the time the planner takes for 1,000 of them, measured.

    python benchmarks/elastic_scale.py --out benchmarks/results
    python benchmarks/elastic_scale.py --quick

No run of that size has been made. Failures come at the rate published for Llama 3, each takes a host; what a failure
stalls is what benchmarks/elastic.py, recovery.py and control_plane.py measured on toy runs, and the copy of a real
stage's state on top; how slow a smaller run is, the planner of real runs says. It shares microbatches evenly, so a run
that loses a host goes on with fewer replicas or fewer stages, whichever is faster, and some workers idle. PARAMETERS
has every number with its source, or says that it is assumed. Where a choice had to be made it favours restarts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))  # the packages come before scripts beside this one

from benchmarks.elastic_scale_model import (
    Draw,
    Stalls,
    checkpoint_restart,
    daly_interval,
    draw_failures,
    elastic,
    replacing_only,
)
from benchmarks.elastic_scale_picture import picture
from schedulers.resize import ResizeProblem, predicted, resize

RESULTS = Path(__file__).parent / "results"
HOUR, DAY = 3600.0, 86400.0
STRATEGIES = ("elastic", "replacing only", "checkpoint-restart")

LAYERS, STAGES, HOST = 80, 16, 8
LAYER_BYTES, PLACE_BYTES = 70e9 * 16 / LAYERS, 141e9
LINK, STORAGE = 12.5e9, 2e12
MTBF_H = 54 * 24 * 16_384 / 419
PARAMETERS = {
    "MTBF of a worker": f"{MTBF_H:,.0f} h: 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3, arXiv "
    "2407.21783, section 3.3.4); exponential: assumed",
    "lost with it": f"{HOST} workers, a host: GPUs of a server (Llama 3, section 3.3.1); that all go: assumed",
    "replacement": "hot spare for 50 % of failures, else after 30 min on average, exponential: assumed",
    "model": f"70B parameters in {LAYERS} equal layers (ends left out), 16 bytes a parameter (fp32 weights, gradients "
    f"and two moments, as this engine holds them), {PLACE_BYTES / 1e9:.0f} GB a worker (NVIDIA H200 data sheet)",
    "layout": f"{STAGES} stages of 1F1B, 30 microbatches of 8,192 tokens a replica at every size: assumed",
    "step": "6 * 70e9 * tokens / (400 TFLOP/s a GPU, Llama 3, table 4): 16.1 s",
    "copy of a stage": f"{LAYERS // STAGES} layers over {LINK / 1e9} GB/s a worker: assumed, a quarter of 400 Gbit/s",
    "detection": "10 s, the default of --heartbeat, for all three",
    "shrink, growth": "results/elastic-kills.json, lognormal by p50 and p95; growth counted in steps",
    "replacement's restart": "results/recovery.json, replica and replica with a spare, lognormal",
    "new view": "results/control-plane.json: planned + combined + voted of 1,024 members, per worker",
    "planning": "measured here at 1,000 workers, taken for all sizes: assumed (replicas are alike)",
    "step under way": "lost, half of it on average",
    "restart of all": "line through 18.5 s at 4 workers (torchrun, results/recovery.json) and 600 s at 100,000 (the "
    "stall of synchronous training, arXiv 2602.00277, abstract): line assumed; it favours restarts",
    "checkpoint": f"one replica's state at {STORAGE / 1e12:.0f} TB/s (Llama 3, section 3.3.1), written while the run "
    "stands, at Daly's interval but no more often than every step; read as fast and copied on like a stage",
}  # fmt: skip


def lognormal(found: dict[str, float]) -> Draw:
    """Draws with the p50 and the p95 given."""
    spread = math.log(found["p95"] / found["p50"]) / 1.645
    return lambda rng: found["p50"] * math.exp(spread * rng.standard_normal())


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


@dataclass(frozen=True)
class Job:
    """Replicas of a pipeline of STAGES workers; `plan_s` is what a plan takes."""

    replicas: int
    microbatches: int
    """Of a replica."""
    plan_s: float = 2.0
    spare_share: float = 0.5
    wait_s: float = HOUR / 2

    @property
    def workers(self) -> int:
        return self.replicas * STAGES

    @property
    def step_s(self) -> float:
        return 6 * 70e9 * 8192 * self.microbatches / (STAGES * 400e12)

    def slow(self, hosts: int) -> list[float]:
        """[k]: how many times as long a step takes without k hosts, for the shape that the planner chooses."""
        problem = ResizeProblem(
            "one_f_one_b", [1.0] * LAYERS, self.microbatches * self.replicas, 1, self.replicas,
            layer_bytes=[LAYER_BYTES] * LAYERS,
        )  # fmt: skip

        def seconds(lost: int) -> float:
            places = range(self.workers - HOST * lost)
            return predicted(problem, places, limits=dict.fromkeys(places, PLACE_BYTES))[0]

        found = {lost: seconds(lost) for lost in {0, 1, hosts}}

        def between(low: int, high: int) -> None:
            """More workers never take longer, so what is equal at both ends is so in between."""
            if high - low > 1 and found[low] == found[high]:
                found.update(dict.fromkeys(range(low + 1, high), found[low]))
            elif high - low > 1:
                middle = (low + high) // 2
                found[middle] = seconds(middle)
                between(low, middle)
                between(middle, high)

        between(1, hosts)
        return [found[lost] / found[0] for lost in range(hosts + 1)]

    def stalls(self, detect_s: float = 10.0) -> Stalls:
        kills, step = read("elastic-kills"), self.step_s
        remedies = {row["remedy"]: row["total_s"] for row in read("recovery")["summary"]}
        members = read("control-plane")["rows"][-1]
        shared = sum(members["view_parts_s"][part] for part in ("planned", "combined", "voted")) / members["members"]
        edit = shared * self.workers + LAYER_BYTES * LAYERS / STAGES / LINK
        spare, shrink, grow = map(
            lognormal, (remedies["replica, spare"], kills["shrink_s"], kills["growth_stall_steps"])
        )
        return Stalls(
            lambda rng: detect_s + rng.uniform() * step + spare(rng) + edit,
            lambda rng: detect_s + rng.uniform() * step + shrink(rng) + edit + self.plan_s,
            lambda rng: grow(rng) * step + edit + self.plan_s, detect_s,
        )  # fmt: skip

    def restart_s(self) -> float:
        started = {row["remedy"]: row["total_s"]["p50"] for row in read("recovery")["summary"]}["torchrun restart"]
        reload = LAYER_BYTES * LAYERS / STORAGE + LAYER_BYTES * LAYERS / STAGES / LINK
        return started + (600 - started) * (self.workers - 4) / (1e5 - 4) + reload


def simulate_job(
    job: Job, slow: Sequence[float], *, mtbf_h: float = MTBF_H, seeds: Iterable[int] = range(10), days: float = 54
) -> dict[str, list[float]]:
    """Strategy -> goodput by seed; all strategies meet the same failures."""
    horizon, rate = days * DAY, job.workers / (mtbf_h * HOUR)
    write = LAYER_BYTES * LAYERS / STORAGE
    every = max(job.step_s, daly_interval(1 / rate, write))
    stalls, found = job.stalls(), {name: list[float]() for name in STRATEGIES}
    for seed in seeds:
        failures = draw_failures(np.random.default_rng(seed), rate, horizon, job.wait_s, job.spare_share)
        draws = np.random.default_rng(seed + 1_000_000)
        found["elastic"].append(elastic(draws, failures, horizon, stalls, slow))
        found["replacing only"].append(replacing_only(draws, failures, horizon, stalls))
        found["checkpoint-restart"].append(
            checkpoint_restart(failures, horizon, every, write, job.restart_s(), stalls.detect_s)
        )
    return found


# ---- how long a plan takes ----


def planning(sizes: Sequence[int], microbatches: int = 1024) -> list[dict[str, Any]]:
    """Seconds of `resize` for the model above on so many places, alike and not; the layout is written and proved."""
    rows: list[dict[str, Any]] = []
    for places in sizes:
        for kind in ("alike", "0.8 to 1.2"):
            chance = random.Random(places)
            speeds = {place: chance.uniform(0.8, 1.2) for place in range(places)} if kind != "alike" else {}
            problem = ResizeProblem(
                "one_f_one_b", [1.0] * LAYERS, microbatches, 64, places, layer_bytes=[LAYER_BYTES] * LAYERS
            )
            limits = dict.fromkeys(range(places), PLACE_BYTES)
            wall, cpu = time.perf_counter(), time.process_time()
            found = resize(problem, range(places), speeds=speeds, limits=limits)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            search = time.process_time()
            predicted(problem, range(places), speeds=speeds, limits=limits)
            search = time.process_time() - search
            rows.append(
                {
                    "places": places, "microbatches": microbatches, "speeds": kind, "wall_s": round(wall, 3),
                    "cpu_s": round(cpu, 3), "search_cpu_s": round(search, 3), "stages": found.stages,
                    "replicas": found.replicas,
                }
            )  # fmt: skip
    return rows


# ---- all together ----


def summary(values: Sequence[float]) -> dict[str, float]:
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    return {"mean": round(mean, 4), "stdev": round(spread, 4), "least": round(min(values), 4),
            "most": round(max(values), 4)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="small sizes and few seeds, to see that it works")
    parser.add_argument("--out", type=Path, help="folder for elastic-scale.json and elastic-scale.svg")
    options = parser.parse_args()
    seeds, console = range(3 if options.quick else options.seeds), Console(width=120)
    plans = planning([8, 32] if options.quick else [8, 32, 128, 512, 1000])
    plan_s = max(row["cpu_s"] for row in plans if row["places"] == plans[-1]["places"])
    if not options.quick:
        plans += planning([1000], 4096)
    rows: list[dict[str, Any]] = []
    sizes = [64] if options.quick else [64, 192, 640, 1920, 6400]
    for replicas in track(sizes, "simulated", console=Console(stderr=True)):
        job = Job(replicas, 30, plan_s)
        slow = job.slow(hosts=12)
        variants = {"": (job, MTBF_H, slow)}
        if replicas in (640, 6400):
            variants |= {
                "no spares": (replace(job, spare_share=0.0), MTBF_H, slow),
                "spares always": (replace(job, spare_share=1.0), MTBF_H, slow),
                "MTBF / 4": (job, MTBF_H / 4, slow),
                "replacement in 4 h": (replace(job, wait_s=4 * HOUR), MTBF_H, job.slow(hosts=48)),
                "planning grows with workers": (replace(job, plan_s=plan_s * job.workers / 1000), MTBF_H, slow),
                "32 microbatches": (replace(job, microbatches=32), MTBF_H, replace(job, microbatches=32).slow(12)),
            }
        for name, (each, mtbf, times) in variants.items():
            found = simulate_job(each, times, mtbf_h=mtbf, seeds=seeds)
            rows.append(
                {"workers": each.workers, "variant": name, "slow": round(times[1], 4),
                 "failures_a_day": round(24 * each.workers / mtbf, 2),
                 **{strategy: summary(values) for strategy, values in found.items()}}
            )  # fmt: skip
    table = Table(title=f"simulated goodput, {len(seeds)} seeds of 54 days, mean ± standard deviation")
    for name in ("workers", "", "failures a day", "step with a host less", *STRATEGIES):
        table.add_column(name, justify="right")
    for row in rows:
        shares = (f"{row[name]['mean']:.3f} ± {row[name]['stdev']:.3f}" for name in STRATEGIES)
        table.add_row(f"{row['workers']:,}", row["variant"], str(row["failures_a_day"]), f"x {row['slow']}", *shares)
    console.print(table)
    table = Table(title="planning, measured: seconds")
    for name in plans[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in plans:
        table.add_row(*map(str, row.values()))
    console.print(table)
    for name, said in PARAMETERS.items():
        console.print(f"{name}: {said}", highlight=False)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        result = {"simulated": True, "command": sys.argv, "seeds": len(seeds), "parameters": PARAMETERS, "rows": rows,
                  "planning_measured": plans}  # fmt: skip
        (options.out / "elastic-scale.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "elastic-scale.svg").write_text(picture(rows, STRATEGIES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
