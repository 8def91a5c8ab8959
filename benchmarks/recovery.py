"""How long a lost worker costs: from SIGKILL to the next committed step, with its parts, for each remedy.

    python benchmarks/recovery.py --kills 20 --out benchmarks/results

A run of the small Llama is hit by SIGKILL from outside, at random moments and on random workers, while it trains.
Times are of one clock (this machine's): the kill here, detection and view by the coordinator, the parts by the workers,
the next commit by the run's metrics. `checkpoint` includes the steps that are run again until the run is where it was.
The peer is torchrun with --max-restarts, which stops every worker and starts all again from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

STEPS = 1_000_000
REMEDIES = {  # name -> (flags, places that may be killed)
    "replica": (["--workers", "4", "--replicas", "2", "--recovery", "replica"], (0, 1, 2, 3)),
    "checkfree": (["--workers", "5", "--recovery", "checkfree"], (2, 3)),
    "checkfree+": (["--workers", "5", "--recovery", "checkfree+"], (0, 1, 2, 3, 4)),
    "checkpoint": (["--workers", "4", "--recovery", "checkpoint"], (0, 1, 2, 3)),
    "replica, spare": (["--workers", "4", "--replicas", "2", "--recovery", "replica", "--spares", "1"], (0, 1, 2, 3)),
}


def command(out: Path, steps: int, *flags: str) -> list[str]:
    return [
        "-m", "launch", "train", "--model", "llama-2m", "--tokenizer", "bytes", "--max-tokens", "400000",
        "--sequence-length", "64", "--microbatch-size", "2", "--microbatches", "4", "--steps", str(steps),
        "--evaluate-every", "0", "--checkpoint-every", "20", "--sample-tokens", "0", "--threads", "1",
        "--max-failures", "1000000", "--out", str(out), *flags,
    ]  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


class Run:
    """A training run that is watched through its folder and hit through the operating system."""

    def __init__(self, folder: Path, flags: list[str], launcher: list[str] | None = None) -> None:
        self.out = folder / "run"
        self._log = (folder / "log").open("wb")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        arguments = [sys.executable, *(launcher or []), *command(self.out, STEPS, *flags)]
        self.process = subprocess.Popen(
            arguments, env=environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        self._log.close()

    def steps(self) -> int:
        """Steps committed so far, each counted once."""
        return len({line["step"] for line in lines(self.out / "metrics.jsonl")})

    def last_step(self) -> int:
        found = lines(self.out / "metrics.jsonl")
        return found[-1]["step"] if found else 0

    def starts(self) -> int:
        """How often the run has been started."""
        return sum(event["event"] == "started" for event in lines(self.out / "events.jsonl"))

    def until(self, reached: Any, deadline_s: float = 120.0) -> float:
        """Wait until `reached()`; returns when that was seen, in unix seconds."""
        deadline = time.monotonic() + deadline_s
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run ended or hangs: {Path(self._log.name).read_text()[-1500:]}")
            time.sleep(0.002)
        return time.time()


def measure(name: str, kills: int, seed: int, advance: Any) -> dict[str, Any]:
    """`kills` recoveries of one remedy. Pids are read from the process tree, in the order of worker ids."""
    flags, places = REMEDIES[name]
    chance = random.Random(f"{seed}/{name}")
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, Run(Path(folder), flags) as run:
        run.until(lambda: run.last_step() >= 25)
        (warm,) = psutil.Process(run.process.pid).children()
        at = dict(enumerate(sorted(child.pid for child in warm.children())))  # place -> pid; a spare comes last
        spare = at.pop(max(at)) if "--spares" in flags else 0
        for _ in range(kills):
            time.sleep(chance.uniform(0.3, 0.8))
            place = chance.choice(places)
            before, seen = run.last_step(), len(lines(run.out / "events.jsonl"))
            killed = time.time()
            os.kill(at[place], signal.SIGKILL)
            run.until(lambda seen=seen: any(e["event"] == "resumed" for e in lines(run.out / "events.jsonl")[seen:]))
            new = lines(run.out / "events.jsonl")[seen:]
            detected = next(e["time"] for e in new if e["event"] == "detected")
            view = next(e["time"] for e in new if e["event"] == "view")
            resumed = next(e for e in new if e["event"] == "resumed")
            least = before if name == "checkpoint" else 0  # what was rolled back is run again first

            def done(view: int = resumed["view"], least: int = least) -> list[float]:
                ledger = lines(run.out / "ledger.jsonl")
                return [line["time"] for line in ledger if line["view"] == view and line["step"] > least]

            run.until(done)
            committed = done()[0]
            parts = resumed["seconds"]
            rows.append(
                {
                    "total_s": committed - killed, "detect_s": detected - killed, "decide_s": view - detected,
                    "woken_s": max(0.0, resumed["woken"] - killed), "ready_s": parts["ready"] - parts["view"],
                    "edit_s": parts["edited"] - parts["ready"], "restore_s": parts["restored"] - parts["edited"],
                    "first_step_s": committed - resumed["time"],
                }
            )  # fmt: skip
            known = set(at.values())
            fresh = [c.pid for c in warm.children() if c.pid not in known]
            at[place], spare = (spare, next(pid for pid in fresh if pid != spare)) if spare else (fresh[0], 0)
            advance()
    return {"remedy": name, "kills": len(rows), "rows": rows}


def torchrun_restart(kills: int, seed: int, advance: Any) -> dict[str, Any]:
    """The peer: every worker is stopped and started again; the run resumes from its newest checkpoint."""
    chance, rows = random.Random(seed), list[dict[str, float]]()
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "4",
        "--max-restarts",
        "1000",
        "--monitor-interval",
        "0.1",
    ]
    flags = ["--workers", "4", "--recovery", "none"]
    with tempfile.TemporaryDirectory() as folder, Run(Path(folder), flags, launcher) as run:
        run.until(lambda: run.last_step() >= 25)
        for _ in range(kills):
            time.sleep(chance.uniform(0.3, 0.8))
            before = run.last_step()
            agents = psutil.Process(run.process.pid).children()
            victim = chance.choice(agents)
            killed = time.time()
            victim.kill()
            run.until(lambda before=before: run.last_step() < before or run.starts() > 1 + len(rows))
            done = run.until(lambda before=before: run.last_step() > before)
            rows.append({"total_s": done - killed})
            advance()
    return {"remedy": "torchrun restart", "kills": len(rows), "rows": rows}


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def spread(values: list[float]) -> dict[str, float]:
    return {"p50": statistics.median(values), "p95": quantile(values, 0.95)}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    names = found["rows"][0].keys()
    return {
        "remedy": found["remedy"], "kills": found["kills"],
        **{n: spread([row[n] for row in found["rows"]]) for n in names},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="per remedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--remedies", nargs="*", default=[*REMEDIES], choices=[*REMEDIES])
    parser.add_argument("--peer", type=int, default=5, help="kills under torchrun --max-restarts; 0 for none")
    parser.add_argument("--out", type=Path, help="folder for recovery.json")
    options = parser.parse_args()
    console = Console(width=150)
    results: list[dict[str, Any]] = []
    with Progress(console=console) as progress:
        task = progress.add_task("kills", total=options.kills * len(options.remedies) + options.peer)
        for name in options.remedies:
            progress.update(task, description=name)
            results.append(measure(name, options.kills, options.seed, lambda: progress.advance(task)))
        if options.peer:
            progress.update(task, description="torchrun restart")
            results.append(torchrun_restart(options.peer, options.seed, lambda: progress.advance(task)))
    table = Table(title="seconds from SIGKILL to the next commit: p50 / p95")
    summaries = [summary(found) for found in results]
    for column in ("remedy", "kills", *[k for k in summaries[0] if k.endswith("_s")]):
        table.add_column(column, justify="right")
    for each in summaries:
        cells = [f"{v['p50']:.3f} / {v['p95']:.3f}" if isinstance(v, dict) else str(v) for v in each.values()]
        table.add_row(*cells)
    console.print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"command": sys.argv, "cores": os.cpu_count(), "summary": summaries, "runs": results}, indent=1
        )
        (options.out / "recovery.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
