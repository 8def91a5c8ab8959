"""How long a lost worker costs: from SIGKILL to the next committed step, with its parts, for each remedy.

    python benchmarks/recovery.py --kills 20 --out benchmarks/results
    python benchmarks/recovery.py --only replica torchft 'fault-free cost' --kills 3

A run of the small Llama is hit by SIGKILL from outside, at random moments and on random workers, while it trains.
Times are of one clock (this machine's): the kill here, detection and view by the coordinator, the parts by the workers,
the next commit by the run's metrics. `checkpoint` includes the steps that are run again until the run is where it was.
The peers, torchrun --max-restarts, torchft and nvrx, are in recovery_peers.py, with how they are killed and what is
timed. With --passes each remedy and peer has its turn so often, in an order that alternates.

`fault-free cost` is what being able to recover by CheckFree, or from boundary activations, takes while nobody dies:
tokens/s under --recovery checkfree, or rehearse, over those under none with the same stages (--ends apart). Each round
runs all anew, in an order that alternates, and counts ten seconds of steady steps of each; ratios are formed within a
round.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from processes import warm_parent
from recovery_peers import PEERS, measure_peer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

STEPS = 1_000_000
STEP_TOKENS = 4 * 2 * 64  # microbatches, their size, the sequence length: see `command`
REMEDIES = {  # name -> (flags, places that may be killed)
    "replica": (["--workers", "4", "--replicas", "2", "--recovery", "replica"], (0, 1, 2, 3)),
    "checkfree": (["--workers", "5", "--recovery", "checkfree"], (2, 3)),
    "checkfree+": (["--workers", "5", "--recovery", "checkfree+"], (0, 1, 2, 3, 4)),
    "redundant": (["--workers", "4", "--recovery", "redundant"], (0, 1, 2, 3)),
    "checkpoint": (["--workers", "4", "--recovery", "checkpoint"], (0, 1, 2, 3)),
    "replica, spare": (["--workers", "4", "--replicas", "2", "--recovery", "replica", "--spares", "1"], (0, 1, 2, 3)),
}
COST = "fault-free cost"
COMPARED = {  # the same stages and schedule
    "none": ["--workers", "5", "--recovery", "none", "--ends", "apart", "--checkpoint-every", "0"],
    "checkfree": ["--workers", "5", "--recovery", "checkfree", "--checkpoint-every", "0"],
    "rehearse": ["--workers", "5", "--recovery", "rehearse", "--ends", "apart", "--checkpoint-every", "0"],
}
PARTS = (
    "total_s", "next_s", "detect_s", "decide_s", "woken_s", "ready_s", "edit_s", "restore_s", "first_step_s",
    "rejoin_s",
)  # fmt: skip


def command(out: Path, steps: int, *flags: str) -> list[str]:
    return [
        "-m", "launch", "train", "--model", "llama-2m", "--tokenizer", "bytes", "--max-tokens", "400000",
        "--sequence-length", "64", "--microbatch-size", "2", "--microbatches", "4", "--steps", str(steps),
        "--evaluate-every", "0", "--checkpoint-every", "20", "--sample-tokens", "0", "--threads", "1",
        "--max-failures", "1000000", "--out", str(out), *flags,
    ]  # fmt: skip


class Tail:
    """The records of a JSONL file that is written to meanwhile; only what is new is read."""

    def __init__(self, path: Path) -> None:
        self._path, self._read, self._records = path, 0, list[dict[str, Any]]()

    def __call__(self) -> list[dict[str, Any]]:
        if self._path.is_file():
            with self._path.open("rb") as file:
                file.seek(self._read)
                text, _, _ = file.read().rpartition(b"\n")
            self._read += len(text) + 1 if text else 0
            self._records += [json.loads(line) for line in text.splitlines()]
        return self._records


class Run:
    """A training run that is watched through its folder and hit through the operating system."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self.out = folder / "run"
        self.metrics, self.events, self.ledger = (
            Tail(self.out / f"{name}.jsonl") for name in ("metrics", "events", "ledger")
        )
        self.log = folder / "log"
        self.process = self.start(command(self.out, STEPS, *flags))

    def start(self, arguments: list[str]) -> Any:
        """The command in a process of its own, with what subprocess.Popen has to watch and to end it."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

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

    def last_step(self) -> int:
        return self.metrics()[-1]["step"] if self.metrics() else 0

    def until(self, reached: Any, deadline_s: float = 120.0) -> float:
        """Wait until `reached()`; returns when that was seen, in unix seconds."""
        deadline = time.monotonic() + deadline_s
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run ended or hangs: {self.log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.005)
        return time.time()


def measure(name: str, kills: int, seed: int, advance: Any) -> dict[str, Any]:
    """`kills` recoveries of one remedy."""
    flags, places = REMEDIES[name]
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, Run(Path(folder), flags) as run:
        for row in itertools.islice(recoveries(run, name, flags, places, random.Random(f"{seed}/{name}")), kills):
            rows.append(row)
            advance()
    return {"remedy": name, "kills": len(rows), "rows": rows}


def recoveries(
    run: Run, name: str, flags: list[str], places: Sequence[int], chance: random.Random, warm_steps: int = 25
) -> Iterator[dict[str, float]]:
    """Kill a worker in one of `places`, wait until the run has gone on, and say how long that took; and again. Pids are
    read from the process tree, in the order of worker ids."""
    run.until(lambda: run.last_step() >= warm_steps)
    warm = warm_parent(run.process.pid)
    at = dict(enumerate(sorted(child.pid for child in warm.children())))  # place -> pid; a spare comes last
    spare = at.pop(max(at)) if "--spares" in flags else 0
    while True:
        time.sleep(chance.uniform(0.3, 0.8))
        place = chance.choice(places)
        before, seen = run.last_step(), len(run.events())
        killed = time.time()
        os.kill(at[place], signal.SIGKILL)
        run.until(lambda seen=seen: any(e["event"] == "resumed" for e in run.events()[seen:]))
        new = run.events()[seen:]
        detected = next(e["time"] for e in new if e["event"] == "detected")
        view = next(e["time"] for e in new if e["event"] == "view")
        resumed = next(e for e in new if e["event"] == "resumed")
        least = before if name == "checkpoint" else 0  # what was rolled back is run again first

        def done(view: int = resumed["view"], least: int = least) -> list[float]:
            new = itertools.takewhile(lambda line: line["view"] >= view, reversed(run.ledger()))
            return [line["time"] for line in new if line["view"] == view and line["step"] > least]

        run.until(done)
        committed = done()[-1]
        parts = resumed["seconds"]
        row = {
            "total_s": committed - killed, "detect_s": detected - killed, "decide_s": view - detected,
            "woken_s": max(0.0, resumed["woken"] - killed), "ready_s": parts["ready"] - parts["view"],
            "edit_s": parts["edited"] - parts["ready"], "restore_s": parts["restored"] - parts["edited"],
            "first_step_s": committed - resumed["time"],
        }  # fmt: skip
        if name == "redundant":  # its replacement joins later, while the run goes on
            run.until(lambda seen=seen: sum(e["event"] == "resumed" for e in run.events()[seen:]) > 1)
        known = {*at.values(), spare}

        def fresh(known: set[int] = known) -> list[int]:
            return [child.pid for child in warm.children() if child.pid not in known]

        run.until(fresh)  # a spare worker follows a second later
        at[place], spare = (spare, fresh()[0]) if spare else (fresh()[0], 0)
        yield row


def throughput(flags: list[str], seconds: float) -> float:
    """Tokens per second of a run of its own that nobody disturbs, over `seconds` of its steps."""
    with tempfile.TemporaryDirectory() as folder, Run(Path(folder), flags) as run:
        run.until(lambda: run.last_step() >= 40)
        began = time.time()
        time.sleep(seconds)
        run.until(lambda: run.ledger()[-1]["time"] >= began + seconds)
        steady = [line for line in run.ledger() if line["time"] >= began]
    span = steady[-1]["time"] - steady[0]["time"]
    return STEP_TOKENS * (steady[-1]["step"] - steady[0]["step"]) / span


def fault_free(rounds: int, seconds: float, advance: Any) -> dict[str, Any]:
    """Rounds of all in COMPARED, in an order that alternates, and the ratio of their speeds."""
    found: list[dict[str, float]] = []
    for number in range(rounds):
        names = [*COMPARED] if number % 2 == 0 else [*reversed(COMPARED)]
        speeds: dict[str, float] = {}
        for name in names:
            speeds[name] = throughput(COMPARED[name], seconds)
            advance()
        found.append(speeds)
    ratios = {name: [each[name] / each["none"] for each in found] for name in COMPARED if name != "none"}
    return {
        "seconds": seconds, "rounds": found,
        "tokens_per_s": {name: statistics.median(each[name] for each in found) for name in COMPARED},
        "ratios": {
            name: {"median": statistics.median(each), "least": min(each), "most": max(each)}
            for name, each in ratios.items()
        },
    }  # fmt: skip


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def spread(values: list[float]) -> dict[str, float]:
    return {"p50": statistics.median(values), "p95": quantile(values, 0.95)}


def together(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the passes of a remedy or a peer come to."""
    mine = [found for found in results if found["remedy"] == name]
    rows = [{**row, "pass": number} for number, found in enumerate(mine) for row in found["rows"]]
    errors = {found["error"] for found in mine if "error" in found}
    return {"remedy": name, "kills": len(rows), "rows": rows, **({"error": "; ".join(errors)} if errors else {})}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    rows = found["rows"]
    names = [name for name in rows[0] if name != "pass"] if rows else []
    return {
        "remedy": found["remedy"], "kills": found["kills"], **({"error": found["error"]} if "error" in found else {}),
        **{n: spread([row[n] for row in rows]) for n in names},
    }  # fmt: skip


def report(console: Console, summaries: list[dict[str, Any]], cost: dict[str, Any] | None) -> None:
    """The tables, and a line for each peer that failed."""
    parts = [part for part in PARTS if any(part in each for each in summaries)]
    if parts:
        table = Table(title="seconds from SIGKILL to the next commit: p50 / p95")
        for column in ("remedy", "kills", *parts):
            table.add_column(column, justify="right")
        for each in summaries:
            values = [each.get(part) for part in parts]
            cells = [f"{v['p50']:.3f} / {v['p95']:.3f}" if v else "" for v in values]
            table.add_row(each["remedy"], str(each["kills"]), *cells)
        console.print(table)
    for each in summaries:
        if "error" in each:
            console.print(f"{each['remedy']}: {escape(each['error'])}", highlight=False)
    if cost:
        table = Table(title=f"{COST}: tokens/s")
        for column in ("round", *COMPARED):
            table.add_column(column, justify="right")
        for number, each in enumerate(cost["rounds"]):
            table.add_row(str(number + 1), *(f"{each[name]:,.0f}" for name in COMPARED))
        table.add_row("median", *(f"{cost['tokens_per_s'][name]:,.0f}" for name in COMPARED))
        told = [f"{r['median']:.3f} ({r['least']:.3f}-{r['most']:.3f})" for r in cost["ratios"].values()]
        table.add_row("beside none", "", *told)
        console.print(table)


def main() -> int:
    everything = (*REMEDIES, *PEERS, COST)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="per remedy")
    parser.add_argument("--peer", type=int, help="kills per peer; default as many as per remedy")
    parser.add_argument("--passes", type=int, default=1, help="in which kills are made, all remedies and peers in each")
    parser.add_argument("--rounds", type=int, default=5, help=f"of {COST}")
    parser.add_argument("--seconds", type=float, default=10.0, help=f"of steady steps, per run of {COST}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=everything, default=[*everything], metavar="NAME",
                        help=f"parts to run. All: {'; '.join(everything)}")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for recovery.json")
    options = parser.parse_args()
    for name in ("kills", "passes", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}; expected at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that being stopped also stops what was started
    console = Console(width=180)
    per_peer = options.kills if options.peer is None else options.peer
    remedies = [name for name in REMEDIES if name in options.only]
    peers = [name for name in PEERS if name in options.only and per_peer > 0]
    rounds = options.rounds if COST in options.only else 0
    results: list[dict[str, Any]] = []
    cost: dict[str, Any] | None = None
    with Progress(console=console) as progress:
        total = options.kills * len(remedies) + per_peer * len(peers) + rounds * len(COMPARED)
        task = progress.add_task("", total=total)
        for number in range(options.passes):
            for name in [*remedies, *peers] if number % 2 == 0 else [*reversed(peers), *reversed(remedies)]:
                progress.update(task, description=name)
                one, kills = (measure, options.kills) if name in REMEDIES else (measure_peer, per_peer)
                kills = kills * (number + 1) // options.passes - kills * number // options.passes
                if not kills:  # more passes than kills
                    continue
                found = one(name, kills, options.seed + number, lambda: progress.advance(task))
                progress.advance(task, kills - found["kills"])
                results.append(found)
        results = [together(name, results) for name in (*remedies, *peers)]
        if rounds:
            progress.update(task, description=COST)
            cost = fault_free(rounds, options.seconds, lambda: progress.advance(task))
    summaries = [summary(found) for found in results]
    report(console, summaries, cost)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        whole = {"command": sys.argv, "cores": os.cpu_count(), "summary": summaries, "runs": results}
        if cost:
            whole["fault_free_cost"] = cost
        (options.out / "recovery.json").write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
