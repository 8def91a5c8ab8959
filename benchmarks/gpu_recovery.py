"""Section c of benchmarks/gpu.py: a CUDA worker is lost to SIGKILL; how long until the next commit, and the memory.

The runs and the kills are those of benchmarks/recovery.py, with all workers on one device. A process that takes a lost
one's place makes a CUDA context first, which a spare has already: that is timed apart.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import time
from typing import Any

import torch
from gpu_case import Case, crew, end_children, entry
from gpu_machine import Device

from benchmarks.recovery import PARTS, REMEDIES, Run, recoveries, spread
from launch.forkserver import ForkServer

KILLS = 15
SMALL = {  # in place of a remedy's flags and places, to try everything
    "replica": (["--workers", "2", "--replicas", "2", "--recovery", "replica"], (0, 1)),
    "replica, spare": (["--workers", "2", "--replicas", "2", "--recovery", "replica", "--spares", "1"], (0, 1)),
}
_SETTLE_S = 0.5
_LAST_S = 8.0


class _Process:
    """A forked process with what Run asks of subprocess.Popen."""

    def __init__(self, forkserver: ForkServer, pid: int) -> None:
        self._forkserver, self.pid = forkserver, pid
        self._code: int | None = None

    def poll(self) -> int | None:
        for exit_ in self._forkserver.poll(0.0) if self._code is None else ():
            self._code = exit_.code
        return self._code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        deadline = time.monotonic() + _LAST_S
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)


class ForkedRun(Run):
    """A run of the command in a process that has imported everything already."""

    def __init__(self, case: Case, flags: list[str], forkserver: ForkServer) -> None:
        self._case, self._forkserver = case, forkserver
        super().__init__(case.folder, [*flags, "--device", torch.device(case.device).type])

    def start(self, arguments: list[str]) -> Any:
        answer = self._case.folder / "launched.json"
        self.log = answer.with_suffix(".log")
        asked = {"call": "gpu_recovery:launched", "argument": arguments[2:], "answer": str(answer)}
        return _Process(self._forkserver, self._forkserver.start(asked))


def launched(arguments: list[str]) -> int:
    """The command, in its process."""
    from launch import cli  # benchmarks/recovery.py needs none of it

    return cli.main(arguments)


def contexts(values: dict[str, Any]) -> None:
    """What a CUDA context and a first kernel take in a process that has none, twice."""
    case = Case.from_json(values)
    forkserver = ForkServer(entry)
    try:
        asked = [{"device": case.device}]
        found = [crew(forkserver, case.folder, "gpu_recovery:one_context", asked, case.limit_s)[0] for _ in range(2)]
    finally:
        forkserver.close()
    case.say("a CUDA context", total_p50_s=statistics.median(found), all_s=found)


def one_context(payload: dict[str, Any]) -> float:
    """Seconds until a first sum has come back."""
    began = time.perf_counter()
    float(torch.ones(1024, device=payload["device"]).sum())
    return time.perf_counter() - began


def replaced(values: dict[str, Any]) -> None:
    """The lost worker's place is taken by a process that is forked then."""
    _kill(values, "replica")


def spared(values: dict[str, Any]) -> None:
    """The lost worker's place is taken by one that waits."""
    _kill(values, "replica, spare")


def _kill(values: dict[str, Any], name: str) -> None:
    case = Case.from_json(values)
    kills, deadline = (1, float("inf")) if case.dry else (KILLS, time.monotonic() + case.limit_s - _LAST_S)
    flags, places = (SMALL if case.dry else REMEDIES)[name]
    device = Device()
    memory: dict[str, int | None] = {"before": device.used()}
    rows: list[dict[str, float]] = []
    forkserver = ForkServer(entry)
    try:
        with ForkedRun(case, flags, forkserver) as run:
            run.until(lambda: run.last_step() >= (2 if case.dry else 25), min(120.0, case.limit_s))
            memory["running"] = device.used()
            for row in recoveries(run, name, flags, places, random.Random(f"gpu/{name}"), warm_steps=2):
                rows.append(row)
                if not case.dry:
                    time.sleep(_SETTLE_S)  # a spare takes the place of the one that was called
                memory["after"] = device.used()
                case.say(f"SIGKILL, {name}", **_summary(rows, memory))
                if len(rows) == kills or time.monotonic() > deadline:
                    break
            end_children(run.process.pid)
    finally:
        forkserver.close()
    if not case.dry:
        time.sleep(_SETTLE_S)
    memory["ended"] = device.used()
    case.say(f"SIGKILL, {name}", **_summary(rows, memory))


def _summary(rows: list[dict[str, float]], memory: dict[str, int | None]) -> dict[str, Any]:
    """Median and 95th percentile of each part, and how much of the device's memory was not given back: beyond what the
    workers had before the first kill, and beyond what was in use before the run."""
    parts = {part: spread([row[part] for row in rows]) for part in PARTS if part in rows[0]}
    return {
        "kills": len(rows), "total_p50_s": parts["total_s"]["p50"], "total_p95_s": parts["total_s"]["p95"],
        **{f"{part.removesuffix('_s')}_p50_s": parts[part]["p50"] for part in PARTS[1:] if part in parts},
        "kept_after_kills_bytes": _more(memory, "after", "running"),
        "kept_in_the_end_bytes": _more(memory, "ended", "before"),
        "memory_bytes": memory, "each": rows,
    }  # fmt: skip


def _more(memory: dict[str, int | None], now: str, before: str) -> int | None:
    a, b = memory.get(now), memory.get(before)
    return None if a is None or b is None else a - b
