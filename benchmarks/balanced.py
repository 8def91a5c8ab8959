"""`balanced` beside 1F1B, interleaved 1F1B, ZB-H1 and ZB-V on layers that do not divide: simulated steps and memory.

    python benchmarks/balanced.py --out benchmarks/results              # about five minutes on one core
    python benchmarks/balanced.py --workers 8 --halves 1.1 0.9          # some sizes; halves as somebody measured them

Layers are those of a Llama: an embedding that costs next to nothing, equal blocks, and a head. Nothing is run: a step
is simulated without links, `slower` is its time over work / workers, which nothing can beat, and `memory` is what the
fullest worker holds of activations, in bytes of layers (a layer's are taken to be as its cost), over what 1F1B's
fullest worker holds. A backward's halves take a forward each, or what they take where `attention` is a share of a
forward: its gradient is all in the first half, and twice as long. `shared` counts the layers that two workers hold;
`sum_gib` is what all workers together send to sum the gradients of these, once a step, for blocks and head of Llama-3
8B in fp32. Other planners cut the layers as evenly as they can: partition minimises the largest span. Writes
balanced.json and balanced.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from pipeline.drawing.plot import Plot
from pipeline.drawing.svg import INK, MUTED, coord, document, oklch, tag, text, tooltip
from pipeline.schedule.graph import compiled
from pipeline.schedule.memory import lane_peaks
from pipeline.schedule.ops import Schedule
from pipeline.schedule.simulate import Costs, simulate
from schedulers import build, partition
from schedulers.balanced import balanced
from schedulers.balanced_search.search import Search
from schedulers.zb_v import zb_v

MODELS = {"2.5 blocks a worker, head 0.9": (2.5, 0.9), "3.3 blocks a worker, head 2.5": (3.3, 2.5)}
EMBEDDING = 0.01
ATTENTION = 0.15
"""Of a forward: about what it is of a block of Llama-3 8B at 8,192 tokens, causal."""
BLOCK, HEAD = 218_112_000, 525_336_576
"""Parameters of Llama-3 8B."""
OURS: dict[str, dict[str, Any]] = {
    "balanced": {}, "balanced, v": {"shape": "v"},
    "balanced, v, fullest": {"shape": "v", "held": "fullest"}, "balanced, 1f1b": {"held": "1f1b"},
}  # fmt: skip
PEERS = ("1F1B", "interleaved 1F1B", "ZB-H1", "ZB-V")
HUES = dict(zip((*PEERS, *OURS), (oklch(0.55, 0.02, 255), oklch(0.6, 0.1, 20), oklch(0.6, 0.13, 55),
                                  oklch(0.6, 0.13, 100), oklch(0.55, 0.17, 255), oklch(0.5, 0.2, 300),
                                  oklch(0.55, 0.2, 340), oklch(0.6, 0.13, 200))))  # fmt: skip


def contenders(
    layers: Sequence[float], workers: int, microbatches: int, halves: tuple[float, float]
) -> dict[str, Callable[[], Schedule]]:
    """Name -> what plans it."""

    def cut(parts: int) -> Sequence[tuple[int, int]]:
        return partition(layers, [1.0] * parts)

    return {
        "1F1B": lambda: build("one_f_one_b", cut(workers), microbatches),
        "interleaved 1F1B": lambda: build("interleaved", cut(2 * workers), microbatches, chunks=2),
        "ZB-H1": lambda: build("zero_bubble", cut(workers), microbatches),
        "ZB-V": lambda: zb_v(cut(2 * workers), microbatches),
        **{
            name: lambda how=how: balanced(layers, workers, microbatches, halves=halves, **how)
            for name, how in OURS.items()
        },
    }  # fmt: skip


def case(layers: Sequence[float], workers: int, microbatches: int, halves: tuple[float, float]) -> dict[str, Any]:
    """The rows of all contenders on the same work."""
    first, second = ([times * c for c in layers] for times in halves)
    costs = Costs(layers, input_gradient=first, weight_gradient=second)
    least = microbatches * fsum(layers) * (1 + sum(halves)) / workers
    rows: dict[str, Any] = {}
    fullest = 0.0
    for name, planned in contenders(layers, workers, microbatches, halves).items():
        began = time.perf_counter()
        schedule = planned()
        seconds = time.perf_counter() - began
        held = lane_peaks(compiled(schedule), lambda span: fsum(layers[slice(*span)]))
        fullest = fullest or max(held.values())
        shared = [span for span, holders in schedule.holders.items() if len(holders) > 1]
        sums = sum(HEAD if span[1] == len(layers) else BLOCK for span in shared)
        rows[name] = {
            "slower": simulate(schedule, costs).makespan_s / least, "memory": max(held.values()) / fullest,
            "planning_s": round(seconds, 3), "shared": len(shared), "sum_gib": round(2 * 4 * sums / 2**30, 2),
        }  # fmt: skip
    return rows


def warm() -> None:
    """Have the search compiled: it is kept on disk, and no planning is to wait for it."""
    Search([1.0, 1.0, 1.0], 2, [2], (1.0, 1.0), [1.0, 1.0, 1.0]).choose("free", "line")


def picture(cases: Sequence[Mapping[str, Any]]) -> str:
    """Time and memory of each contender, a panel for each number of workers, at four microbatches a worker."""
    title = "Pipelines of layers that do not divide, simulated"
    said = ("2.5 Llama blocks a worker and a head of 0.9, 4 microbatches a worker, halves of a backward as long as a "
            "forward; nothing is run")  # fmt: skip
    model = next(iter(MODELS))
    shown = [c for c in cases if c["model"] == model and c["times"] == 4 and c["halves"] == [1.0, 1.0]]
    body = [text(16, 28, title, font_size=16, font_weight="600"), text(16, 48, said, fill=MUTED)]
    for number, (name, ink) in enumerate(HUES.items()):
        x, y = (16.0 + 160 * (number % 4), 74 + 20 * (number // 4))
        body.append(tag("circle", cx=x + 4, cy=y - 4, r=5, fill=ink))
        body.append(text(x + 16, y, name))
    for panel, one in enumerate(shown):
        plot = Plot(64 + panel * 300, 150, 220, 280, (0.0, 2.5), (1.0, 1.5))
        body += plot.axes("", 5)
        body.append(text(plot.left, 136, f"{one['workers']} workers", font_weight="600"))
        for at in (0, 1, 2):
            body.append(text(plot.x(at), plot.y(1.0) + 20, str(at), font_size=11, fill=MUTED, text_anchor="middle"))
        label = "up: time over work / workers; right: memory over 1F1B's"
        body.append(text(plot.left - 30, plot.y(1.0) + 40, label, font_size=10, fill=MUTED))
        line = f"M{coord(plot.x(1))} {coord(plot.y(1.0))}V{coord(plot.y(1.5))}"
        body.append(tag("path", d=line, stroke=INK, stroke_width=0.6, stroke_dasharray="3 3", fill="none"))
        for name, row in one["rows"].items():
            at, up = plot.x(min(2.5, row["memory"])), plot.y(min(1.5, row["slower"]))
            about = tooltip(f"{name}: {row['slower']:.3f} of the bound, {row['memory']:.2f} of 1F1B's memory")
            body.append(tag("circle", about, cx=at, cy=up, r=6, fill=HUES[name], fill_opacity=0.9))
    return document(64 + 300 * len(shown), 490, body, title=title, description=said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[8, 16, 64])
    parser.add_argument("--times", type=int, nargs="*", default=[2, 4], help="microbatches per worker")
    parser.add_argument("--halves", type=float, nargs=2, help="what both halves of a backward take, in forwards")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console = Console(width=130)
    known = [(1.0, 1.0), (1 + ATTENTION, 1 - ATTENTION)]
    warm()
    cases: list[dict[str, Any]] = []
    for workers in options.workers:
        for name, (blocks, head) in MODELS.items():
            layers = [EMBEDDING, *[1.0] * int(blocks * workers), head]
            for times in options.times:
                for halves in [tuple(options.halves)] if options.halves else known:
                    rows = case(layers, workers, times * workers, halves)
                    cases.append({"workers": workers, "model": name, "blocks": len(layers) - 2, "head": head,
                                  "times": times, "microbatches": times * workers, "halves": list(halves),
                                  "rows": rows})  # fmt: skip
                    title = f"{workers} workers, {name}, {times * workers} microbatches, halves {halves}"
                    table = Table("contender", "time / bound", "memory / 1F1B", "planned in s", "shared", "sums GiB",
                                  title=title)  # fmt: skip
                    for who, row in rows.items():
                        table.add_row(who, f"{row['slower']:.3f}", f"{row['memory']:.2f}", f"{row['planning_s']:.2f}",
                                      str(row["shared"]), f"{row['sum_gib']:.1f}")  # fmt: skip
                    console.print(table)
    if options.out:
        facts = {"command": "python benchmarks/balanced.py --out benchmarks/results", "simulated": True,
                 "python": platform.python_version(), "cpus": len(os.sched_getaffinity(0))}  # fmt: skip
        (options.out / "balanced.json").write_text(json.dumps({"about": facts, "cases": cases}, indent=1) + "\n")
        (options.out / "balanced.svg").write_text(picture(cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
