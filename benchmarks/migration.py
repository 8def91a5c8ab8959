"""What a worker that comes costs the others, where layers move in the background and where all wait for them.

    python benchmarks/migration.py --rounds 5 --out benchmarks/results

A run of three workers loses one, and lets its successor in: the stall is the time between the two commits around that,
less the usual step. Kinds are interleaved. Also: how fast state moves, beside a memcpy.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.elastic import Machines, percentiles  # noqa: E402
from benchmarks.runs import command, shown  # noqa: E402
from launch.forkserver import ForkServer  # noqa: E402

KINDS = {"background": "64", "all wait": "0"}
RUN = [
    "--model", "llama-17m", "--tokenizer", "bytes", "--max-tokens", "400000", "--workers", "2:3", "--cooldown", "0.5",
    "--microbatch-size", "2", "--microbatches", "6", "--sequence-length", "64", "--snapshot", "neighbour",
    "--checkpoint-every", "0", "--evaluate-every", "0", "--steps", "1000000", "--no-shift",
]  # fmt: skip


def growth(forkserver: ForkServer, kind: str, kills: int, seed: int) -> list[dict[str, float]]:
    """One run, and each time its successor is let in: seconds of the stall, of moving, of a usual step, and bytes."""
    folder, chance = Path(tempfile.mkdtemp(prefix="migration-")), random.Random(seed)
    found: list[dict[str, float]] = []
    with Machines(forkserver, folder, [*RUN, "--migration-mib", KINDS[kind]]) as run:
        run.start(0)
        run.until(lambda: len(run.lines("ledger")) >= 10)
        for number in range(kills):
            chance.choice(run.workers()[:3]).kill()
            run.until(lambda n=number: len([e for e in run.lines("events") if e["event"] == "rejoined"]) > n, 180)
            at = len(run.lines("ledger"))
            run.until(lambda n=at: len(run.lines("ledger")) >= n + 8)
        run.stop()
        ledger, events = run.lines("ledger"), run.lines("events")
    shutil.rmtree(folder)
    times = sorted(line["time"] for line in ledger)
    moved = {event["view"]: event for event in events if event["event"] == "moving"}
    for event in (e for e in events if e["event"] == "rejoined"):
        (resumed,) = (e for e in events if e["event"] == "resumed" and e["view"] == event["view"])
        before = max(t for t in times if t <= event["time"])
        after = min(t for t in times if t > event["time"])
        usual = statistics.median(b - a for a, b in pairwise([t for t in times if t > event["time"]][1:8]))
        parts = resumed["seconds"]
        found.append({
            "stall_s": after - before - usual, "step_s": usual, "restored_s": parts["restored"] - parts["edited"],
            "bytes": moved.get(event["view"], {}).get("bytes", 0), "there": resumed["there"],
        })  # fmt: skip
    return found


def memcpy(nbytes: int = 1 << 28) -> float:
    """Bytes a second."""
    a, b = torch.zeros(nbytes // 4), torch.zeros(nbytes // 4)
    times: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - began)
    return nbytes / min(times)


def measure(rounds: int, kills: int, seed: int, done: Callable[[float], None]) -> dict[str, Any]:
    """All kinds, round by round."""
    forkserver, each = ForkServer(command), {kind: list[dict[str, float]]() for kind in KINDS}
    try:
        for number in range(rounds):
            for at, kind in enumerate(KINDS if number % 2 == 0 else reversed(KINDS), 1):
                each[kind] += growth(forkserver, kind, kills, seed + number)
                done(number * len(KINDS) + at)
    finally:
        forkserver.close()
    return {
        "run": RUN, "memcpy_gb_s": round(memcpy() / 1e9, 2),
        **{kind: summary(values) for kind, values in each.items()},
    }  # fmt: skip


def summary(values: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Of all times that a worker was let in."""
    return {
        "stall_s": percentiles([v["stall_s"] for v in values]),
        "stall_steps": percentiles([v["stall_s"] / v["step_s"] for v in values]),
        "restored_s": percentiles([v["restored_s"] for v in values]),
        "step_s": round(statistics.median(v["step_s"] for v in values), 4),
        "moved_mb": round(statistics.median(v["bytes"] for v in values) / 1e6, 1),
        "states_there": [int(v["there"]) for v in values],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5, help="in each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for migration.json")
    options = parser.parse_args()
    made = partial(measure, options.rounds, options.kills, options.seed)
    shown("runs", len(KINDS) * options.rounds, made, options.out, "migration.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
