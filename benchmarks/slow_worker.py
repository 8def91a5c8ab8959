"""A worker that is five times slower every so often: does the layout change when that pays, and only then? Simulated.

    python benchmarks/slow_worker.py --out benchmarks/results

Four stages of three layers; the one worker is slow in every second period. The rule of the coordinator
(recovery/shifting.py) stands beside never changing and always changing, both of which know nothing of the future
either: all see what is so after a lag, and a change stalls all. In steps per second, by period and by cost.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from recovery.shifting import Shifter  # noqa: E402

EVEN, UNEVEN = "three layers each", "one layer for the slow one"
STEP_S, LAG_S, PERIODS = 0.1, 0.3, 60
PERIODS_S, COSTS_S = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 20.0, 50.0, 100.0), (0.05, 0.2, 1.0, 5.0, 20.0)
Policy = Callable[[float, Mapping[int, float], str], str]
"""(now, who is how fast, the layout) -> the layout to be in."""


def seconds(speeds: Mapping[int, float], layout: str) -> float:
    """Of a step, in units of a layer on the slowest stage; stage 1 may be slow."""
    slow = speeds.get(1, 1.0)
    return max(3.0, 3.0 / slow) if layout == EVEN else max(11 / 3, 1.0 / slow)


def best(speeds: Mapping[int, float]) -> str:
    """The layout with the shorter step."""
    return min((EVEN, UNEVEN), key=lambda layout: seconds(speeds, layout))


def stay(_: float, __: Mapping[int, float], at: str) -> str:
    """Never change."""
    return at


def always(_: float, speeds: Mapping[int, float], __: str) -> str:
    """Change whenever another layout is better now."""
    return best(speeds)


def ours(cost_s: float) -> Policy:
    """The rule of the coordinator."""
    return Shifter(best, seconds, cost_s, LAG_S).consider


def steps_per_second(policy: Policy, every_s: float, cost_s: float, periods: int = PERIODS) -> float:
    """With the worker five times slower in every second period; that is seen LAG_S late."""
    at, now, done, end = EVEN, 0.0, 0, periods * every_s

    def slow(when: float) -> Mapping[int, float]:
        return {1: 0.2} if int(max(0.0, when) // every_s) % 2 else {}

    while now < end:
        if (wanted := policy(now, slow(now - LAG_S), at)) != at:
            now, at = now + cost_s, wanted
            continue
        now += STEP_S * seconds(slow(now), at) / 3
        done += 1
    return done / now


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for slow-worker.json")
    options = parser.parse_args()
    shown = Table("slow every (s)", *(f"cost {cost:g} s" for cost in COSTS_S), title="ours / the better one, simulated")
    rows: list[dict[str, Any]] = []
    for every in PERIODS_S:
        cells: list[str] = []
        for cost in COSTS_S:
            found = {name: steps_per_second(policy, every, cost)
                     for name, policy in (("stay", stay), ("always", always), ("ours", ours(cost)))}  # fmt: skip
            share = found["ours"] / max(found["stay"], found["always"])
            rows.append({"every_s": every, "cost_s": cost, **found, "share": round(share, 4)})
            cells.append(f"{share:.3f}")
        shown.add_row(f"{every:g}", *cells)
    Console().print(shown)
    least = min(row["share"] for row in rows)
    Console().print(
        f"never below {least:.3f} of the better one; more than it by up to {max(r['share'] for r in rows):.2f}"
    )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        told = {"command": sys.argv, "simulated": True, "least": least, "rows": rows}
        (options.out / "slow-worker.json").write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
