"""The cells of the fault matrix: what happens to a small real run, and what came of it. See matrix.py."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from launch.forkserver import ForkServer
from launch.run_folder import read_jsonl

KINDS = ("kill", "term", "stop", "segfault", "exception", "gil", "slow", "cut", "nan", "flip")
POINTS = ("forward", "backward", "reduce", "commit", "optimizer", "snapshot", "recovery", "copy", "join")
STEPS, SAMPLES, AT, EVERY = 48, 8, 8, 7
DEADLINE_S = 20.0
"""From a fault to a commit or a named end: a heartbeat of 2 s, a step's deadline of 5 s, and a busy machine's share."""
_RUN_S = 90.0
_NAMES = re.compile(r"workers? \d|layer \d|state \d|the store|asked to stop|the loss is|the gradient norm")
FLAGS = [
    "--model", "llama-tiny", "--tokenizer", "bytes", "--max-tokens", "60000", "--sequence-length", "32",
    "--microbatch-size", "2", "--microbatches", "4", "--warmup", "4", "--steps", str(STEPS), "--evaluate-every", "0",
    "--sample-tokens", "0", "--threads", "1", "--checkpoint-every", str(EVERY), "--heartbeat", "2", "--deadline", "5",
    "--cooldown", "0.2", "--exact-sums", "--recovery", "exact",
]  # fmt: skip
LINE = ("--workers", "1:3", "--snapshot", "neighbour")
PAIRS = {  # what two workers are to each other -> the run, and who they are
    "two-same-span": (("--workers", "1:4", "--replicas", "4"), (0, 1)),
    "two-neighbours": (("--workers", "1:4", "--snapshot", "neighbour"), (1, 2)),
    "two-apart": (("--workers", "1:4", "--snapshot", "neighbour"), (0, 2)),
    "all-of-a-span": (("--workers", "2:4", "--replicas", "2"), (1, 3)),
    "all-workers": (LINE, (0, 1, 2)),
}
OTHER_COPY = "flip-other-lost"
SAVED, STORE = "nan-in-a-save", "store-lost"
ROWS = (*KINDS, SAVED, OTHER_COPY, *PAIRS, STORE)
GOOD = ("correct", "saved", "named")


@dataclass(frozen=True)
class Cell:
    """One run: what happens (a row), where (a column), and how it is started."""

    row: str
    at: str
    flags: tuple[str, ...]
    inject: str

    @property
    def faults(self) -> int:
        return self.inject.count(";") + 1


@dataclass(frozen=True)
class Found:
    """What came of a cell. `seconds` is None where the fault was not met, or nothing came of it."""

    row: str
    at: str
    verdict: str
    seconds: float | None
    code: int | None
    said: str = ""


def cells(rows: Sequence[str] = ROWS, points: Sequence[str] = POINTS) -> Iterator[Cell]:
    """All but that of the store."""
    for row in rows:
        for at in points:
            follows = POINTS.index(at) >= POINTS.index("recovery")
            if row in KINDS:
                hit = f"{row}:worker={3 if at == 'join' else 1},step={0 if at == 'join' else AT},at={at}"
                first, then = f"kill:worker=0,step={AT};" if follows else "", ""
                if row == "flip" and not follows:
                    then = f";kill:worker=0,step={AT + 8}"
                yield Cell(row, at, LINE, first + hit + then)
            elif row == OTHER_COPY and not follows:
                yield Cell(row, at, LINE, f"flip:worker=1,step={AT},at={at};kill:worker=2,step={AT + 8}")
            elif row == SAVED and not follows:
                yield Cell(row, at, LINE, f"nan:worker=1,step={2 * EVERY - 1},at={at}")
            elif row in PAIRS and not follows:
                flags, whom = PAIRS[row]
                yield Cell(row, at, flags, ";".join(f"kill:worker={worker},step={AT},at={at}" for worker in whom))


class Running:
    """Runs of one cell, in a folder of its own: started, waited for, and ended with all that they have started."""

    def __init__(self, forkserver: ForkServer, folder: Path) -> None:
        self.forkserver, self.out = forkserver, folder / "run"
        self._folder, self._family = folder, dict[int, psutil.Process]()
        self.codes: dict[int, int | None] = {}

    def start(self, *flags: str) -> int:
        log = self._folder / f"log{len(self.codes)}"
        arguments = ["train", "--out", str(self.out), *FLAGS, *flags]
        pid = self.forkserver.start({"argv": arguments, "log": str(log)})
        self.codes[pid] = None
        return pid

    def watch(self, timeout_s: float = 0.1) -> None:
        """Take note of what has ended, and of who belongs to what runs."""
        for pid in [pid for pid, code in self.codes.items() if code is None]:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._family |= {each.pid: each for each in psutil.Process(pid).children(recursive=True)}
        self.codes |= {each.pid: each.code for each in self.forkserver.poll(timeout_s) if each.pid in self.codes}

    def wait(self, pid: int, timeout_s: float) -> int | None:
        """The exit code; None if it does not come."""
        deadline = time.monotonic() + timeout_s
        while self.codes[pid] is None and time.monotonic() < deadline:
            self.watch()
        return self.codes[pid]

    def said(self) -> str:
        """The errors of all of them, and what asked them to stop, on a line."""
        each = [path.read_text(errors="replace").splitlines() for path in sorted(self._folder.glob("log*"))]
        begin = ("unbroken", "asked to stop")
        return " | ".join(line for lines in each for line in lines if line.startswith(begin))

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.out / f"{name}.jsonl"
        return read_jsonl(path) if path.exists() else []

    def left(self, patience_s: float = 3.0) -> list[int]:
        """Who outlives the runs; afterwards nobody does."""
        for pid in [pid for pid, code in self.codes.items() if code is None]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.wait(pid, patience_s)
        _, alive = psutil.wait_procs(list(self._family.values()), patience_s)
        for each in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        return [each.pid for each in alive]


def exported(out: Path) -> dict[str, torch.Tensor]:
    """The weights that a run has ended with."""
    return {name: t for file in sorted((out / "model").glob("*.safetensors")) for name, t in load_file(file).items()}


def calm(forkserver: ForkServer, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the run that nothing happens to. Raises RuntimeError."""
    running = Running(forkserver, folder)
    try:
        if running.wait(running.start("--workers", "2"), _RUN_S) != 0:
            raise RuntimeError(f"the calm run: {running.said()}")
    finally:
        running.left()
    return exported(running.out)


def wrong_with(running: Running, wanted: dict[str, torch.Tensor]) -> str:
    """What is not as in the calm run, "" if nothing."""
    last: dict[int, dict[str, Any]] = {}
    for line in running.lines("ledger"):
        if line["step"] in last and last[line["step"]]["view"] >= line["view"]:
            return f"step {line['step']} was committed twice in view {line['view']}"
        last[line["step"]] = line
    if sorted(last) != list(range(1, STEPS + 1)):
        return f"the ledger has {len(last)} steps of {STEPS}"
    if any((x["first_sample"], x["samples"]) != (SAMPLES * (s - 1), SAMPLES) for s, x in last.items()):
        return "a sample is lost or repeated"
    ours = exported(running.out)
    if ours.keys() != wanted.keys() or not all(torch.equal(ours[name], wanted[name]) for name in wanted):
        return "the weights are not those of the calm run"
    return ""


def measure(running: Running, cell: Cell, ended: float) -> float | None:
    """Seconds from the last fault to the first commit of the view after it, or after it, or else to the end."""
    faults = [e["time"] for e in running.lines("events") if e["event"] == "fault"]
    if len(faults) < cell.faults:
        return None
    fault = faults[-1]
    views = [e["view"] for e in running.lines("events") if e["event"] == "view" and e["time"] > fault]
    lines = [line for line in running.lines("ledger") if line["time"] > fault]
    after = [line["time"] for line in lines if not views or line["view"] >= views[0]]
    return (min(after) if after else ended) - fault


def run_cell(forkserver: ForkServer, cell: Cell, folder: Path, wanted: dict[str, torch.Tensor]) -> Found:
    """Run a cell to its verdict; nothing of it is left but its folder."""
    running = Running(forkserver, folder)
    try:
        pid = running.start(*cell.flags, "--inject", cell.inject)
        code, ended = running.wait(pid, _RUN_S), time.time()
        seconds, said = measure(running, cell, ended), running.said()[:300]
        verdict, more = judge(running, cell, code, seconds, said, wanted)
    finally:
        left = running.left()
    if left:
        verdict, more = "WRONG", f"{len(left)} processes were left behind"
    rounded = None if seconds is None else round(seconds, 2)
    return Found(cell.row, cell.at, verdict, rounded, code, " ".join(filter(None, [more, said if code else ""])))


def judge(
    running: Running, cell: Cell, code: int | None, seconds: float | None, said: str, wanted: dict[str, torch.Tensor]
) -> tuple[str, str]:
    """The verdict, and what is wrong; who was saved or named is resumed for it."""
    if code is None:
        return "HANG", f"not over after {_RUN_S:g} s"
    if seconds is None:
        return "WRONG", "not every fault has happened"
    if seconds > DEADLINE_S:
        return "HANG", f"nothing came of it for {seconds:.0f} s"
    if code == 0:
        wrong = wrong_with(running, wanted)
        return ("WRONG", wrong) if wrong else ("correct", "")
    if code not in (1, 75, 93) or not _NAMES.search(said):
        return "WRONG", f"code {code}, and nobody is named:"
    if (again := running.wait(running.start(*cell.flags, "--resume"), _RUN_S)) != 0:
        return "WRONG", f"--resume ended with {again}: {running.said()[-300:]}"
    wrong = wrong_with(running, wanted)
    return ("WRONG", f"resumed, {wrong}:") if wrong else ("saved" if code == 75 else "named", "")


def store_lost(forkserver: ForkServer, folder: Path) -> Found:
    """SIGKILL hits the process that has store and coordinator; another machine's agent and workers end by name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = ("--nodes", "2", "--store", f"127.0.0.1:{free.getsockname()[1]}", *LINE[2:], "--workers", "2:4")
    running = Running(forkserver, folder)
    try:
        first, other = (running.start(*meet, "--steps", "99999", "--node-rank", str(rank)) for rank in (0, 1))
        deadline = time.monotonic() + _RUN_S
        while len(running.lines("ledger")) < AT and None in running.codes.values() and time.monotonic() < deadline:
            running.watch()
        os.kill(first, signal.SIGKILL)
        hit = time.monotonic()
        code, seconds = running.wait(other, DEADLINE_S), time.monotonic() - hit
        said = running.said()[-300:]
    finally:
        left = running.left()
    good = code == 1 and "the store" in said and not left
    verdict = "named" if good else "HANG" if code is None else "WRONG"
    return Found(STORE, "any", verdict, round(seconds, 2), code, (f"left: {left} " if left else "") + said)
