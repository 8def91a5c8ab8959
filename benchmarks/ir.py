"""How long a schedule of half a million ops takes to write, prove, lower and simulate: seconds, in plain Python.

    python benchmarks/ir.py --out benchmarks/results/ir.json
    python benchmarks/ir.py --quick

After a failure a new schedule is written while everybody waits, so the representation must not be what they wait for.
The claim is about 256 workers and 1,024 microbatches of one_f_one_b: 20 s for the four parts together. Lowering adds
a SEND and a RECV for all that crosses workers, which triples the number of ops; verifying and simulating that form as
well is measured beside, outside the claim. Each scheduler runs in a process of its own, so that the peak of its memory
is its own. Imports no torch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.schedule.lower import lower
from pipeline.schedule.ops import Schedule
from pipeline.schedule.simulate import Costs, simulate
from pipeline.schedule.verify import verify
from schedulers import SCHEDULERS, balanced, build

NAMES = (*SCHEDULERS, "balanced")
CLAIMED, BOUND_S = "one_f_one_b", 20.0
WORKERS, MICROBATCHES = 256, 1024
PARTS = ("schedule", "verify", "lower", "simulate")
LOWERED = ("verify_lowered", "simulate_lowered")

T = TypeVar("T")


def write(name: str, workers: int, microbatches: int) -> Schedule:
    """The schedule of a model with one layer per span."""
    if name == "balanced":  # its price is that of a list scheduler; layers that do not divide evenly are shared
        return balanced([1.0] * workers + [0.5], workers, microbatches)
    count = workers * (2 if name == "interleaved" else 1)
    return build(name, [(i, i + 1) for i in range(count)], microbatches)


def measure(name: str, workers: int, microbatches: int) -> dict[str, Any]:
    """Seconds of each part, numbers of ops, and the peak of memory of this process."""
    seconds: dict[str, float] = {}

    def timed(part: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        seconds[part] = time.perf_counter() - began
        return result

    schedule = timed("schedule", lambda: write(name, workers, microbatches))
    report = timed("verify", lambda: verify(schedule))
    lowered = timed("lower", lambda: lower(schedule))
    costs = Costs.uniform(schedule)
    timeline = timed("simulate", lambda: simulate(schedule, costs))
    peak = peak_bytes()
    lowered_report = timed("verify_lowered", lambda: verify(lowered))
    same = timed("simulate_lowered", lambda: simulate(lowered, costs))
    assert abs(same.makespan_s - timeline.makespan_s) < 1e-6 * timeline.makespan_s, "lowering changed the plan"
    return {
        "scheduler": name,
        "workers": workers,
        "microbatches": microbatches,
        "ops": report.num_ops,
        "ops_lowered": lowered_report.num_ops,
        "seconds": seconds,
        "total_s": sum(seconds[part] for part in PARTS),
        "peak_rss_bytes": peak,
        "peak_rss_bytes_lowered": peak_bytes(),
        "makespan": timeline.makespan_s,
        "bubble": timeline.bubble,
    }


def peak_bytes() -> int:
    """The most memory that was resident in this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def show(console: Console, found: list[dict[str, Any]], workers: int, microbatches: int) -> None:
    """The table, and what of the claim holds."""
    table = Table(title=f"{workers} workers x {microbatches:,} microbatches, seconds", title_justify="left")
    heads = ("scheduler", "ops", *PARTS, "total", "peak MiB", "ops lowered", "verify", "simulate", "peak MiB")
    for head in heads:
        table.add_column(head, justify="left" if head == "scheduler" else "right", no_wrap=True)
    for each in found:
        if "error" in each:
            table.add_row(each["scheduler"], "failed")
            continue
        seconds = each["seconds"]
        table.add_row(
            each["scheduler"], f"{each['ops']:,}", *(f"{seconds[part]:.2f}" for part in PARTS),
            f"[bold]{each['total_s']:.2f}[/bold]", f"{each['peak_rss_bytes'] / 2**20:,.0f}",
            f"{each['ops_lowered']:,}", *(f"{seconds[part]:.2f}" for part in LOWERED),
            f"{each['peak_rss_bytes_lowered'] / 2**20:,.0f}",
        )  # fmt: skip
    console.print(table)
    for each in found:
        if "error" in each:
            console.print(f"[red]{each['scheduler']}[/red]: {escape(each['error'])}", highlight=False)
        elif each["scheduler"] == CLAIMED and (workers, microbatches) == (WORKERS, MICROBATCHES):
            holds = each["total_s"] <= BOUND_S
            verdict = "[green]holds[/green]" if holds else "[red]does not hold[/red]"
            console.print(f"claim, {CLAIMED}: at most {BOUND_S:g} s; took {each['total_s']:.2f} s: {verdict}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--microbatches", type=int, default=MICROBATCHES)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(SCHEDULERS), metavar="NAME",
                        help=f"of {', '.join(NAMES)}; the last is a list scheduler, slow at full size")  # fmt: skip
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--quick", action="store_true", help="16 workers, 64 microbatches")
    options = parser.parse_args()
    workers, microbatches = (16, 64) if options.quick else (options.workers, options.microbatches)
    for name, value in (("workers", workers), ("microbatches", microbatches)):
        if value < 1:
            parser.error(f"--{name} {value}; expected at least 1")
    console = Console(width=None if sys.stdout.isatty() else 140)
    found: list[dict[str, Any]] = []
    fresh = multiprocessing.get_context("spawn")
    with console.status("") as status:
        for name in options.only:
            status.update(f"{name}: {workers} workers x {microbatches:,} microbatches")
            with ProcessPoolExecutor(1, mp_context=fresh) as pool:
                try:
                    found.append(pool.submit(measure, name, workers, microbatches).result())
                except Exception as error:
                    found.append({"scheduler": name, "error": f"{type(error).__name__}: {error}"})
    show(console, found, workers, microbatches)
    if options.out is not None:
        facts = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "bound_s": BOUND_S,
            "claimed": CLAIMED,
            "parts_of_the_claim": PARTS,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"about": facts, "results": found}, indent=1) + "\n")
    return 1 if any("error" in each for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
