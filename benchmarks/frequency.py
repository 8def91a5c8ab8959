"""Clocks under a power cap, simulated: all nominal, all lowered evenly to keep the cap, and as the scheduler plans.

Nothing is measured here: the step is the simulator's, the watts are those of a model. A worker draws 150 W whatever it
does and 550 W more while it computes at its nominal clock, as the cube of the clock; it can have any clock from 0.5 to
1.25, and all of its compute scales with the clock unless a row says otherwise. The cap is on all computing at once.

`uneven`: pipelines of 4, 8 and 16 stages of blocks that do not divide evenly, the head as dear as two, under 70, 85 and
100 % of the watts of all at nominal clocks.
`slow`: eight even stages, one worker at 0.7 of the speed of the others.
`lost`: a pipeline of 4, 8 or 16 that lost a worker, whose layers the others take (schedulers.resize). The cap is what
all drew before, so that the watts of who is gone may go to the others; or those of who is left.
`replica`: replicas of four stages of which one has lost a worker and goes on with three, its microbatches kept, while
the others wait for it at the end of the step: the case of nonuniform tensor parallelism (arXiv 2504.06095), where
"0.1 % failed GPUs cost about 10 %, about 0 with a power boost".
Won back is the share of what a loss adds to the step that the plan takes away again. Writes frequency.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from pipeline.schedule.costs import Costs  # noqa: E402
from pipeline.schedule.ops import Op, Route, Schedule, Span  # noqa: E402
from pipeline.schedule.simulate import simulate  # noqa: E402
from schedulers import build, partition, plan  # noqa: E402
from schedulers.frequency import Clocks, Power, at_clocks, even_clocks, plan_clocks  # noqa: E402
from schedulers.resize import ResizeProblem, resize  # noqa: E402

STATIC, DYNAMIC = 150.0, 550.0
NOMINAL = STATIC + DYNAMIC
STEPS = tuple(round(0.5 + 0.05 * n, 2) for n in range(16))
VARIANTS: dict[str, dict[str, Any]] = {  # what is not known of a device
    "": {}, "0.7 of the time scales": {"bound": 0.7}, "clocks up to 1.1": {"most": 1.1},
    "steps of 0.05": {"steps": STEPS},
}  # fmt: skip


def compare(
    part: str, name: str, schedule: Schedule, costs: Costs, cap: float, *, before_s: float | None = None, **power: Any
) -> dict[str, Any]:
    """The three choices of clocks in one case. `before_s`: the step before a loss, at nominal clocks."""
    powers = dict.fromkeys(schedule.lanes, Power(STATIC, DYNAMIC, **power))
    nominal = at_clocks(schedule, costs, powers, dict.fromkeys(powers, 1.0))
    even = at_clocks(schedule, costs, powers, even_clocks(powers, cap))
    began = time.monotonic()
    ours = plan_clocks(schedule, costs, powers, cap)
    row = {
        "part": part, "name": name, "workers": len(powers), "cap_watts": cap, "power": power,
        "nominal": shown(nominal), "even": shown(even), "planned": shown(ours), "bound_s": ours.bound_s,
        "search_s": time.monotonic() - began,
    }  # fmt: skip
    if before_s is not None:
        added = even.seconds - before_s
        row |= {"before_s": before_s, "won_back": (even.seconds - ours.seconds) / added}
    return row


def shown(clocks: Clocks) -> dict[str, Any]:
    """What the result says of a choice of clocks."""
    return {
        "seconds": clocks.seconds, "joules": clocks.joules, "mean_watts": clocks.mean_watts,
        "peak_watts": clocks.peak_watts, "clock": [round(clocks.clock[w], 4) for w in sorted(clocks.clock)],
    }  # fmt: skip


def uneven() -> list[dict[str, Any]]:
    """Pipelines whose stages differ because blocks are whole."""
    rows: list[dict[str, Any]] = []
    for stages in (4, 8, 16):
        layers = [0.01, *[1.0] * (2 * stages + stages // 2), 2.0]
        schedule = plan("one_f_one_b", layers, stages, 4 * stages)
        for share in (0.7, 0.85, 1.0):
            cap = share * NOMINAL * stages
            rows.append(compare("uneven", f"{stages} uneven stages, {share:.0%}", schedule, Costs(layers), cap))
    return rows


def slow() -> list[dict[str, Any]]:
    """One worker that is slower than the others."""
    schedule, rows = build("one_f_one_b", [(i, i + 1) for i in range(8)], 32), []
    usual = simulate(schedule, Costs([1.0] * 8)).makespan_s
    costs = Costs([1.0] * 8, speed={3: 0.7})
    for said, power in VARIANTS.items():
        name = "8 stages, one at 0.7 of the speed" + (said and f"; {said}")
        rows.append(compare("slow", name, schedule, costs, 8 * NOMINAL, before_s=usual, **power))
    return rows


def lost() -> list[dict[str, Any]]:
    """A pipeline that has one worker less, whose layers the others have."""
    rows: list[dict[str, Any]] = []
    for workers in (4, 8, 16):
        layers = [1.0] * (3 * workers)
        asked = ResizeProblem("one_f_one_b", layers, 4 * workers, 1)
        costs = Costs(layers)
        before = resize(asked, range(workers)).seconds
        after = resize(asked, [w for w in range(workers) if w != 1]).layout.train
        for said, power in VARIANTS.items():
            name = f"{workers} stages, one lost" + (said and f"; {said}")
            rows.append(compare("lost", name, after, costs, workers * NOMINAL, before_s=before, **power))
        name = f"{workers} stages, one lost with its watts"
        rows.append(compare("lost", name, after, costs, (workers - 1) * NOMINAL, before_s=before))
    return rows


def replica() -> list[dict[str, Any]]:
    """Replicas of which one has a stage less."""
    rows: list[dict[str, Any]] = []
    layers = [1.0] * 12
    for replicas in (2, 4, 8):
        usual = simulate(replicated(layers, [4] * replicas, 16), Costs(layers)).makespan_s
        schedule = replicated(layers, [3, *[4] * (replicas - 1)], 16)
        for said, power in VARIANTS.items():
            name = f"{replicas} replicas of 4 stages, one lost" + (said and f"; {said}")
            cap = 4 * replicas * NOMINAL
            rows.append(compare("replica", name, schedule, Costs(layers), cap, before_s=usual, **power))
    return rows


def replicated(layers: Sequence[float], stages: Sequence[int], microbatches: int) -> Schedule:
    """1F1B in replicas of so many stages each, with as many microbatches in each; a step ends with the last of them."""
    routes: list[Route] = []
    lanes: dict[int, tuple[Op, ...]] = {}
    for count in stages:
        spans: tuple[Span, ...] = partition(layers, [1.0] * count)
        own = build("one_f_one_b", spans, microbatches)
        first = len(lanes)
        for worker, lane in own.lanes.items():
            lanes[first + worker] = tuple(op._replace(microbatch=op.microbatch + len(routes)) for op in lane)
        routes += own.routes
    return Schedule(tuple(routes), lanes, "replicas of different depths")


def print_rows(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table, times and joules as multiples of those at nominal clocks."""
    table = Table(
        "case", "cap W", "step: nominal", "even", "planned", "/ even", "above bound", "J: even", "planned", "won back",
        title="clocks under a power cap, simulated",
    )  # fmt: skip
    for row in rows:
        nominal, even, ours = (row[name] for name in ("nominal", "even", "planned"))
        won = f"{max(0.0, row['won_back']):.0%}" if "won_back" in row else ""
        over = "*" if nominal["peak_watts"] > row["cap_watts"] * (1 + 1e-9) else ""
        table.add_row(
            row["name"], f"{row['cap_watts']:,.0f}", f"{nominal['seconds']:.1f}{over}", f"{even['seconds']:.1f}",
            f"{ours['seconds']:.1f}", f"{ours['seconds'] / even['seconds']:.3f}",
            f"{ours['seconds'] / row['bound_s'] - 1:.1e}", f"{even['joules'] / nominal['joules']:.3f}",
            f"{ours['joules'] / nominal['joules']:.3f}", won,
        )  # fmt: skip
    console.print(table)
    console.print("* above the cap; J: multiples of those at nominal clocks; all times and joules are simulated")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for frequency.json")
    options = parser.parse_args()
    rows = [*uneven(), *slow(), *lost(), *replica()]
    print_rows(rows, Console(width=150))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        model = {"static_watts": STATIC, "dynamic_watts": DYNAMIC, "exponent": 3, "clocks": [0.5, 1.25], "bound": 1.0}
        found = {"command": ["benchmarks/frequency.py", *sys.argv[1:]], "simulated": True, "model": model, "rows": rows}
        (options.out / "frequency.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
