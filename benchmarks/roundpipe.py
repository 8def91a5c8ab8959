"""RoundPipe's pool beside resident pipelines and plain PyTorch on the same work; a slow worker; the published bubbles.

    python benchmarks/roundpipe.py --out benchmarks/results            # about a quarter of an hour on two idle cores
    python benchmarks/roundpipe.py --quick                             # a tiny model, to try the script

Contenders take turns in rounds, in processes of their own, and ratios are formed within a round. All train the same
Llama on the same tokens; losses agree. RoundPipe recomputes what is not in the span of the loss, so its bound is that
share of one thread's speed times the workers. `mfu` holds model FLOPs, in which recomputation does not count, against
the fp32 products that as many threads do at best, measured at the start of each round. The slow worker is emulated:
every op of a worker takes 4 times as long by sleeping, of the slow one 16 times, so that four workers fit on two cores.
Writes roundpipe.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from engine_peers import Work, threads
from rich.console import Console
from rich.table import Table
from utilisation import Peak, cpu_peak

from launch.roundpipe_plan import plan_roundpipe
from pipeline.runtime.peak_memory import PEAK_BYTES

HERE = Path(__file__).parent
TINY = Work(hidden=64, intermediate=128, layers=4, heads=4, vocabulary=256, sequence=32, microbatches=4, batch=2)
SLOW = Work(hidden=128, intermediate=256, layers=14, heads=4, vocabulary=512, sequence=64, microbatches=8, batch=2)
SPEED: dict[str, tuple[str, ...]] = {
    "one thread": ("engine_peers.py", "--peer=one_thread"),
    "all cores": ("engine_peers.py", "--peer=all_cores"),
    "resident, balanced": ("engine_ours.py", "--scheduler=balanced", "--workers=2"),
    "resident, 1F1B": ("engine_ours.py", "--scheduler=one_f_one_b", "--workers=2"),
    "roundpipe, 1 worker": ("roundpipe_ours.py", "--workers=1"),
    "roundpipe, 2 workers": ("roundpipe_ours.py", "--workers=2"),
    "roundpipe, 2 workers, one step behind": ("roundpipe_ours.py", "--workers=2", "--behind"),
    "roundpipe, 2 workers, spans of 8 MiB": ("roundpipe_ours.py", "--workers=2", "--span-mib=8"),
}
RULES = ("round_robin", "ready")


def run(arguments: Sequence[str], work: Work, steps: int, warmup: int, peak: Peak) -> dict[str, Any]:
    """One contender's figures, or its error."""
    script, *flags = arguments
    sizes = [f"--{field.name}={getattr(work, field.name)}" for field in fields(work)]
    timed = [f"--steps={steps}", f"--warmup={warmup}", f"--peak-tflops={peak['peak_tflops']}"]
    command = [sys.executable, str(HERE / script), *flags, *sizes, *timed, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    found = next((json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith('{"peer"')), None)
    return {**found, **peak} if found else {"error": done.stderr[-500:]}


def threads_of(arguments: Sequence[str]) -> int:
    """On how many threads a contender computes."""
    flags = dict(flag.removeprefix("--").split("=") for flag in arguments if "=" in flag)
    return threads(flags.get("peer", ""), int(flags.get("workers", 1)))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def speed(options: argparse.Namespace, work: Work, console: Console) -> dict[str, Any]:
    """Tokens per second, ratios and memory of every contender."""
    runs: list[dict[str, Any]] = []
    for round_ in range(options.rounds):
        peaks = {count: cpu_peak(count) for count in sorted({threads_of(each) for each in SPEED.values()})}
        for name in random.Random(f"roundpipe/{round_}").sample(list(SPEED), len(SPEED)):
            peak = peaks[threads_of(SPEED[name])]
            found = {**run(SPEED[name], work, options.steps, 1, peak), "contender": name, "round": round_}
            runs.append(found)
            console.print(f"{name}: {found.get('tokens_per_s', found.get('error'))}", highlight=False)
    by = {(r["contender"], r["round"]): r for r in runs if "tokens_per_s" in r}
    rows: dict[str, Any] = {}
    for name in SPEED:
        mine = [by[name, k] for k in range(options.rounds) if (name, k) in by]
        if not mine:
            continue
        row: dict[str, Any] = {"tokens_per_s": spread([r["tokens_per_s"] for r in mine])}
        for other in ("one thread", "resident, balanced"):
            ratios = [
                r["tokens_per_s"] / by[other, r["round"]]["tokens_per_s"] for r in mine if (other, r["round"]) in by
            ]
            row[f"over {other}"] = spread(ratios) if ratios else None
        row |= {key: spread([r[key] for r in mine]) for key in ("tflops", "mfu", "peak_tflops")}
        row["peak_of"] = mine[0]["peak_of"]
        row |= {key: max(r[key] for r in mine) for key in PEAK_BYTES if key in mine[0]}
        row["peak_mib"] = [round(b / 2**20) for b in mine[0]["peak_rss_bytes"]]
        if "host_store_bytes" in mine[0]:
            cut = mine[0]["cut"]
            layers = cut["fused"][1] - 2
            again = cut["fused"][0] - 1
            row["host_mib"] = round(mine[0]["host_store_bytes"] / 2**20)
            row["cut"] = cut
            row["recomputed_blocks"] = [again, layers]
        row["loss"] = mine[0]["loss"]
        rows[name] = row
    return rows


def slow(options: argparse.Namespace, work: Work, console: Console) -> dict[str, Any]:
    """One of four workers four times as slow as the others, under both rules, turn by turn."""
    seconds: dict[str, list[float]] = {rule: [] for rule in RULES}
    peak = cpu_peak(4)
    for round_ in range(options.rounds):
        for rule in random.Random(f"slow/{round_}").sample(RULES, 2):
            flags = ("roundpipe_ours.py", "--workers=4", f"--rule={rule}", "--at-once=4")
            found = run((*flags, "--slow", "4", "4", "4", "16"), work, options.steps, 2, peak)
            if "tokens_per_s" in found:
                seconds[rule].append(work.tokens / found["tokens_per_s"])
            console.print(f"slow worker, {rule}: {found.get('tokens_per_s', found.get('error'))}", highlight=False)
    ratios = [a / b for a, b in zip(*(seconds[rule] for rule in RULES), strict=True)]
    return {"seconds_per_step": seconds, "round_robin_over_ready": spread(ratios) if ratios else None}


def published() -> dict[str, Any]:
    """The published bubbles and ours, simulated."""
    values = json.loads((HERE / "data" / "roundpipe_costs.json").read_text())
    rows: dict[str, Any] = {}
    for model, entry in values["models"].items():
        found, _ = plan_roundpipe(values, model, "ready", None, None, None)
        rows[model] = {
            "published_bubble_percent": entry["published_bubble_percent"],
            "searched_makespan_ms": entry["searched_makespan_ms"],
            **{key: found[key] for key in ("published", "published, in order", "planned", "baselines")},
        }
    return rows


def show(console: Console, rows: dict[str, Any], lame: dict[str, Any], bubbles: dict[str, Any]) -> None:
    """What was found, as tables."""
    table = Table("contender", "tokens/s", "MFU", "/ one thread", "/ resident", "worker MiB", "host MiB", "recomputed")
    for name, row in rows.items():
        ratios = [row[f"over {other}"] for other in ("one thread", "resident, balanced")]
        again = row.get("recomputed_blocks")
        table.add_row(
            name, f"{row['tokens_per_s']['median']:,.0f}", f"{row['mfu']['median']:.1%}",
            *(f"{r['median']:.2f}" if r else "" for r in ratios), ", ".join(map(str, row["peak_mib"])),
            str(row.get("host_mib", "")),
            f"{again[0]} of {again[1]} blocks" if again else "",
        )  # fmt: skip
    console.print(table)
    if ratio := lame.get("round_robin_over_ready"):
        console.print(f"one of four workers 4 times as slow (emulated): strict round robin takes {ratio['median']:.2f} "
                      f"({ratio['least']:.2f}-{ratio['most']:.2f}) times as long as the ready queue")  # fmt: skip
    table = Table(
        "model", "bubble published", "ours of it", "planned", "makespan", "searched before", "one step behind"
    )
    for model, row in bubbles.items():
        planned = row["planned"]
        table.add_row(
            model, f"{row['published_bubble_percent']['roundpipe_sync']:.2f} %", f"{row['published']['bubble']:.2%}",
            f"{planned['bubble']:.2%}", f"{planned['makespan_ms']:.1f} ms", f"{row['searched_makespan_ms']:.1f} ms",
            f"{planned['async_bubble']:.2%}",
        )  # fmt: skip
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run")
    parser.add_argument("--quick", action="store_true", help="a tiny model; the figures mean nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console = Console(width=140)
    rows = speed(options, TINY if options.quick else Work(), console)
    lame = slow(options, TINY if options.quick else SLOW, console)
    bubbles = published()
    show(console, rows, lame, bubbles)
    if options.out:
        facts = {
            "command": f"python benchmarks/roundpipe.py --rounds {options.rounds} --steps {options.steps}",
            "torch": torch.__version__, "python": platform.python_version(), "cpus": len(os.sched_getaffinity(0)),
            "cuda": torch.cuda.is_available(), "work": asdict(TINY if options.quick else Work()),
            "slow_work": asdict(TINY if options.quick else SLOW), "quick": options.quick,
        }  # fmt: skip
        whole = {"about": facts, "speed": rows, "slow_worker": lame, "published": bubbles}
        (options.out / "roundpipe.json").write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
