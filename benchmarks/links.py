"""What a message between two workers of one machine costs: shared memory beside gloo's sockets, and one copy as the
bound.

    python benchmarks/links.py --out benchmarks/results
    python benchmarks/links.py --sizes 0.0625 1 --rounds 1        # MiB; to try the script

Two processes, one thread each. *Latency*: one sends a payload of fp32, the other takes it from its mailbox, reads all
of it and answers with one number; so a message is on its way alone, and the seconds are those from its sending to the
answer. *Bandwidth*: messages follow each other, AHEAD of them under way, and are taken without being read; bytes by the
seconds until all are answered for. CPU seconds are those of both processes per message of the first kind, threads of
the links included. Each size has processes of its own: in those that have had large messages gloo's small ones take
several times as long. The kinds take turns, round by round, and every ratio is formed within a round. The bounds are
the fastest that was seen in the sender: of a latency one copy of the payload and the reading of it, of a bandwidth the
copy alone (memcpy). Writes links.json.
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
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from launch.slots import Slot, open_store
from launch.worker_main import connect
from pipeline.runtime.groups import GroupBuilder
from pipeline.runtime.transport import Transport
from pipeline.schedule.ops import Op

KINDS = ("shm", "gloo")
MIB = 1 << 20
AHEAD = 3
WAIT_S = 120.0


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def worker(me: int, options: argparse.Namespace) -> None:
    """One end: all rounds and kinds of a size; prints its figures."""
    torch.set_num_threads(1)
    store = connect(json.loads(sys.stdin.readline()), WAIT_S)
    found: list[dict[str, Any]] = []
    (size,) = options.sizes
    payload = torch.randn(int(size * MIB / 4))
    messages = max(4, min(options.messages, int(options.budget / size)))
    for round_ in range(options.rounds):
        for number, kind in enumerate(KINDS if round_ % 2 else KINDS[::-1]):
            end = Transport(me, view=len(KINDS) * round_ + number + 1)
            builder = GroupBuilder(store, me, "127.0.0.1", torch.device("cpu"), WAIT_S)
            shm = kind == "shm"
            end.connect(builder, {(0, 1)}, max_bytes=payload.nbytes, shared=shm, demanded=shm)
            figures = {**latency(end, payload, messages), **bandwidth(end, payload, messages)}
            end.close()
            found.append({"round": round_, "kind": kind, "mib": size, "messages": messages, **figures})
        if me == 0:
            found[-1] |= memcpy(payload, messages)
    print(json.dumps(found))


def latency(end: Transport, payload: torch.Tensor, messages: int) -> dict[str, float]:
    """So many messages one way, each answered; of the first fifth, which takes memory, nothing is counted."""
    me, warm = end.worker, max(2, messages // 5)
    seconds, used, peer = 0.0, 0.0, 1 - end.worker
    for m in range(warm + messages):
        if m == warm:
            seconds, used = time.monotonic(), cpu()
        if me == 0:
            end.send(0, Op("F", (0, 1), m), peer, payload)
            end.receive(0, Op("B", (0, 1), m), peer, time.monotonic() + WAIT_S)
        else:
            total = end.receive(0, Op("F", (0, 1), m), peer, time.monotonic() + WAIT_S).sum()
            end.send(0, Op("B", (0, 1), m), peer, total)
    return {"ms": 1e3 * (time.monotonic() - seconds) / messages, "cpu_ms": 1e3 * (cpu() - used) / messages}


def bandwidth(end: Transport, payload: torch.Tensor, messages: int) -> dict[str, float]:
    """So many messages that follow each other; GiB per second, but of the first fifth."""
    me, warm = end.worker, max(2, messages // 5) + AHEAD
    began, peer, answer = 0.0, 1 - end.worker, torch.zeros(1)
    for m in range(warm + messages + AHEAD):
        if m == warm:
            began = time.monotonic()
        if me == 0:
            if m < warm + messages:
                end.send(1, Op("F", (0, 1), m), peer, payload)
            if m >= AHEAD:
                end.receive(1, Op("B", (0, 1), m - AHEAD), peer, time.monotonic() + WAIT_S)
        elif m < warm + messages:
            end.receive(1, Op("F", (0, 1), m), peer, time.monotonic() + WAIT_S)
            end.send(1, Op("B", (0, 1), m), peer, answer)
    return {"gib_per_s": (messages + AHEAD) * payload.nbytes / (time.monotonic() - began) / 2**30}


def memcpy(payload: torch.Tensor, messages: int) -> dict[str, float]:
    """The bounds: milliseconds of a copy that is read, GiB per second of copies."""
    into = torch.empty_like(payload)

    def copied() -> float:
        began = time.perf_counter()
        into.copy_(payload)
        return time.perf_counter() - began

    def read() -> float:
        began = time.perf_counter()
        float(into.sum())
        return time.perf_counter() - began

    copies, reads = zip(*((copied(), read()) for _ in range(messages + 1)), strict=True)
    return {"bound_ms": 1e3 * (min(copies) + min(reads)), "memcpy_gib_per_s": payload.nbytes / min(copies) / 2**30}


def both_ends(size: float, options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """What two new processes find of one size."""
    handle = open_store(Slot(prefix="links"), WAIT_S)
    command = [sys.executable, __file__, "--sizes", str(size), "--messages", str(options.messages), "--budget",
               str(options.budget), "--rounds", str(options.rounds), "--worker"]  # fmt: skip
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ends = [subprocess.Popen([*command, str(me)], **pipes) for me in (0, 1)]
    try:
        for end in ends:  # both have to be told before one is waited for
            assert end.stdin is not None
            end.stdin.write(json.dumps(handle.address()) + "\n")
            end.stdin.flush()
        said = [end.communicate(timeout=300)[0] for end in ends]
    finally:
        for end in ends:
            end.kill()
        handle.close()
    return [json.loads(text.splitlines()[-1]) for text in said]


def summarise(ends: list[list[dict[str, Any]]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over the rounds, as the sender has them, of the CPU of both ends, and how many times better shm is."""
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        pairs = [pair for pair in zip(*ends, strict=True) if pair[0]["mib"] == size]
        row: dict[str, Any] = {"mib": size, "messages": pairs[0][0]["messages"]}
        each: dict[str, dict[str, list[float]]] = {}
        for kind in KINDS:
            of_kind = [pair for pair in pairs if pair[0]["kind"] == kind]
            each[kind] = {
                "ms": [a["ms"] for a, _ in of_kind], "cpu_ms": [a["cpu_ms"] + b["cpu_ms"] for a, b in of_kind],
                "gib_per_s": [a["gib_per_s"] for a, _ in of_kind],
            }  # fmt: skip
            row[kind] = {name: statistics.median(values) for name, values in each[kind].items()}
        for name in ("bound_ms", "memcpy_gib_per_s"):
            row[name] = (min if name == "bound_ms" else max)(a[name] for a, _ in pairs if name in a)
        for name in ("ms", "cpu_ms", "gib_per_s"):
            both = zip(each["gloo"][name], each["shm"][name], strict=True)
            ratios = [b / a if name == "gib_per_s" else a / b for a, b in both]
            row[f"{name}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
        rows.append(row)
    return rows


def shown(rows: list[dict[str, Any]]) -> Table:
    """One row per size."""
    heads = ("message", "shm", "gloo", "bound", "gloo / shm", "shm", "gloo", "memcpy", "shm / gloo", "shm", "gloo")
    table = Table(title="latency, ms · bandwidth, GiB/s · CPU of both ends, ms; ratios: median (least-most)")
    for number, head in enumerate(heads):
        unit = "" if not number else "\nms" if number < 5 else "\nGiB/s" if number < 9 else "\nCPU ms"
        table.add_column(head + unit, justify="right")
    for row in rows:
        size = f"{row['mib']:g} MiB" if row["mib"] >= 1 else f"{1024 * row['mib']:g} KiB"
        ratios = [f"{row[n][0]:.1f} ({row[n][1]:.1f}-{row[n][2]:.1f})" for n in ("ms_ratio", "gib_per_s_ratio")]
        table.add_row(
            size, *(f"{row[kind]['ms']:.3f}" for kind in KINDS), f"{row['bound_ms']:.3f}", ratios[0],
            *(f"{row[kind]['gib_per_s']:.2f}" for kind in KINDS), f"{row['memcpy_gib_per_s']:.2f}", ratios[1],
            *(f"{row[kind]['cpu_ms']:.2f}" for kind in KINDS),
        )  # fmt: skip
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [4 / 1024, 64 / 1024, 1.0, 4.0, 16.0, 64.0]
    parser.add_argument("--sizes", type=float, nargs="+", default=sizes, help="MiB")
    parser.add_argument("--messages", type=int, default=300, help="at most, of a size, kind and round")
    parser.add_argument("--budget", type=float, default=384.0, help="MiB of such messages, but four of them at least")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker, options)
        return 0
    began, ends = time.monotonic(), [list[dict[str, Any]](), list[dict[str, Any]]()]
    for size in options.sizes:
        for me, found in enumerate(both_ends(size, options)):
            ends[me] += found
    rows = summarise(ends, options)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(shown(rows))
    if options.out is not None:
        about = {
            "python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count(),
            "load": os.getloadavg()[0], "rounds": options.rounds, "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "links.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        console.print(f"written to {options.out}/links.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
