"""What a message between two workers of one machine costs: shared memory beside sockets, and one copy as the bound.

    python benchmarks/links.py --out benchmarks/results
    python benchmarks/links.py --sizes 1 --messages 50        # MiB; to try the script

Two processes, one thread each. One sends a payload of fp32, the other takes it from its mailbox, reads all of it and
answers with one number; so a message is on its way alone, and the seconds are those from its sending to the answer. CPU
seconds are those of both processes, threads of the links included. The kinds take turns, round by round, and every
ratio is formed within a round. The bound is one copy of the payload, measured in the sender, and the reading of it.
Writes links.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from launch.worker_main import connect
from pipeline.runtime.groups import GroupBuilder
from pipeline.runtime.transport import Transport
from pipeline.schedule.ops import Op

KINDS = ("sockets", "shared")
MIB = 1 << 20
WAIT_S = 120.0


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def worker(me: int, options: argparse.Namespace) -> None:
    """One end: all rounds, sizes and kinds; prints its figures."""
    torch.set_num_threads(1)
    store = connect(json.loads(options.address), WAIT_S)
    found: list[dict[str, Any]] = []
    view = 0
    for round_ in range(options.rounds):
        for kind in KINDS if round_ % 2 else KINDS[::-1]:
            view += 1
            end = Transport(me, view)
            builder = GroupBuilder(store, me, "127.0.0.1", torch.device("cpu"), WAIT_S)
            end.connect(builder, {(0, 1)}, max_bytes=int(max(options.sizes) * MIB), shared=kind == "shared")
            for size in options.sizes:
                figures = exchange(end, me, int(size * MIB / 4), options.messages)
                found.append({"round": round_, "kind": kind, "mib": size, **figures})
            end.close()
    print(json.dumps(found))


def exchange(end: Transport, me: int, numbers: int, messages: int) -> dict[str, float]:
    """So many messages one way, each answered; of the first fifth, which takes memory, nothing is counted."""
    payload, warm = torch.randn(numbers), max(2, messages // 5)
    seconds, used, peer = 0.0, 0.0, 1 - me
    for m in range(warm + messages):
        if m == warm:
            seconds, used = time.monotonic(), cpu()
        if me == 0:
            end.send(numbers, Op("F", (0, 1), m), peer, payload)
            end.receive(numbers, Op("B", (0, 1), m), peer, time.monotonic() + WAIT_S)
        else:
            total = end.receive(numbers, Op("F", (0, 1), m), peer, time.monotonic() + WAIT_S).sum()
            end.send(numbers, Op("B", (0, 1), m), peer, total)
    found = {"ms": 1e3 * (time.monotonic() - seconds) / messages, "cpu_ms": 1e3 * (cpu() - used) / messages}
    if me == 0:
        into = torch.empty(numbers)
        began = time.monotonic()
        for _ in range(messages):
            into.copy_(payload)
            float(into.sum())
        found["bound_ms"] = 1e3 * (time.monotonic() - began) / messages
    return found


def summarise(ends: list[list[dict[str, Any]]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over the rounds, of seconds as the sender has them and of the CPU of both ends, and their ratios."""
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        row: dict[str, Any] = {"mib": size}
        each: dict[str, dict[str, list[float]]] = {}
        for kind in KINDS:
            pairs = [p for p in zip(*ends, strict=True) if p[0]["kind"] == kind and p[0]["mib"] == size]
            each[kind] = {
                "ms": [a["ms"] for a, _ in pairs], "cpu_ms": [a["cpu_ms"] + b["cpu_ms"] for a, b in pairs],
                "bound_ms": [a["bound_ms"] for a, _ in pairs],
            }  # fmt: skip
            row[kind] = {name: statistics.median(values) for name, values in each[kind].items()}
        row["bound_ms"] = statistics.median(each["shared"]["bound_ms"] + each["sockets"]["bound_ms"])
        for name in ("ms", "cpu_ms"):
            ratios = [a / b for a, b in zip(each["sockets"][name], each["shared"][name], strict=True)]
            row[f"{name}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.0625, 0.25, 1.0, 4.0, 16.0], help="MiB")
    parser.add_argument("--messages", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker, options)
        return 0
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=WAIT_S))
    address = json.dumps({"host": "127.0.0.1", "port": server.port, "prefix": "links"})
    command = [sys.executable, __file__, *sys.argv[1:], "--address", address, "--worker"]
    ends = [subprocess.Popen([*command, str(me)], stdout=subprocess.PIPE, text=True) for me in (0, 1)]
    try:
        said = [end.communicate(timeout=600)[0] for end in ends]
    finally:
        for end in ends:
            end.kill()
    rows = summarise([json.loads(text.splitlines()[-1]) for text in said], options)
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("MiB", "sockets, ms", "shared, ms", "ratio (least-most)", "sockets, CPU ms", "shared, CPU ms",
                  "ratio (least-most)", "bound, ms")  # fmt: skip
    for row in rows:
        ratios = [
            f"{row[name][0]:.1f} ({row[name][1]:.1f}-{row[name][2]:.1f})" for name in ("ms_ratio", "cpu_ms_ratio")
        ]
        table.add_row(
            f"{row['mib']:g}", f"{row['sockets']['ms']:.2f}", f"{row['shared']['ms']:.2f}", ratios[0],
            f"{row['sockets']['cpu_ms']:.2f}", f"{row['shared']['cpu_ms']:.2f}", ratios[1], f"{row['bound_ms']:.2f}",
        )  # fmt: skip
    console.print(table)
    if options.out is not None:
        about = {
            "python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count(),
            "load": os.getloadavg()[0], "messages": options.messages, "rounds": options.rounds,
        }  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "links.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        console.print(f"written to {options.out}/links.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
