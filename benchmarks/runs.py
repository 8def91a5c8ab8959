"""Training runs of their own that benchmarks start: forked from a forkserver, waited for, read and cleared away."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedConfig

import launch.train  # noqa: F401  (what a run imports is there before it is forked)
from launch import cli
from launch.forkserver import ForkServer
from launch.run_folder import read_jsonl, standing
from pipeline.model.weights import preset

DEADLINE_S = 900.0


@dataclass(frozen=True)
class Records:
    """What a run has written down. `curve`: (step, seconds since the first commit, held-out loss)."""

    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    times: list[float]
    """Of the commits, in unix seconds."""

    @property
    def curve(self) -> list[tuple[int, float, float]]:
        return [(e["step"], e["time"] - self.times[0], e["loss"]) for e in self.events if e["event"] == "evaluation"]

    @property
    def steps_s(self) -> list[float]:
        """Seconds from each commit to the next."""
        return [b - a for a, b in pairwise(self.times)]


def llama_config(blocks: int) -> PreTrainedConfig:
    """A model's shape: llama-2m with so many blocks and an alphabet of bytes."""
    config = preset("llama-2m", vocab_size=258)
    config.num_hidden_layers = blocks
    return config


def llama(folder: Path, blocks: int) -> Path:
    """`llama_config` as a file for --model."""
    path = folder / f"model-{blocks}.json"
    path.write_text(llama_config(blocks).to_json_string(use_diff=False))
    return path


def earlier_runs(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a file that the same settings have written, to go on from; else none."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found["runs"] if found.get("settings") == settings else []


def command(payload: dict[str, Any]) -> int:
    """The command line, in a process that has imported everything before: the entry of a ForkServer."""
    with open(payload["log"], "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return cli.main(payload["arguments"])


@contextlib.contextmanager
def finished(forkserver: ForkServer, folder: Path, arguments: Sequence[str], keep: bool = False):
    """`unbroken train` with these arguments, run to its end: its Records and its folder, `folder`/run, which is gone
    afterwards unless it is to be kept. Raises RuntimeError with what it said where it fails or takes more than
    DEADLINE_S."""
    out, log = folder / "run", folder / "log"
    pid = forkserver.start({"arguments": ["train", "--json", "--out", str(out), *arguments], "log": str(log)})
    try:
        ended = forkserver.poll(DEADLINE_S)
        if [exit_.code for exit_ in ended] != [0]:
            raise RuntimeError(f"{' '.join(arguments)} ended: {log.read_text()[-600:]}")
        times = [line["time"] for line in read_jsonl(out / "ledger.jsonl")]
        yield Records(standing(read_jsonl(out / "metrics.jsonl")), read_jsonl(out / "events.jsonl"), times), out
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # and with it go its workers
            forkserver.poll(5.0)
        if not keep:
            shutil.rmtree(out, ignore_errors=True)


@contextlib.contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """`work` runs in a thread of this process; it must end soon after the event that it is given is set."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def shown(
    task: str, total: float, measure: Callable[[Callable[[float], None]], dict[str, Any]], out: Path | None, name: str
) -> dict[str, Any]:
    """Measure under a progress bar, which `measure` is given to say how much of `total` is done; print what was found,
    and write it to the file `name` in the folder `out`, if there is one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(task, total=total)
        found = measure(lambda done: progress.update(bar, completed=done))
    print(json.dumps(found, indent=1))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps({"command": sys.argv, **found}, indent=1) + "\n")
    return found


def op_seconds(out: Path) -> dict[tuple[str, str], list[float]]:
    """Seconds of the ops of the iteration that a run has recorded: (kind, span as "lo:hi") -> one per op."""
    found: dict[tuple[str, str], list[float]] = {}
    for event in json.loads((out / "trace.json").read_text())["traceEvents"]:
        if event["ph"] == "X":
            found.setdefault((event["cat"], event["args"]["span"]), []).append(event["dur"] * 1e-6)
    return found
