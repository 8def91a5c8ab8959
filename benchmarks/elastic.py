"""Runs that change their size: how fast they shrink and grow, what a spot market costs them, and what being exact does.

    python benchmarks/elastic.py --kills 20 --peers torchft,ray,nvrx,torchrun --out benchmarks/results
    python benchmarks/elastic.py --trace benchmarks/data/spot_g4dn_us_east_1c.csv --minutes 5 --json
    python benchmarks/elastic.py --rounds 5 --out benchmarks/results

The first kills workers of a run of 4 with SIGKILL, one after the other, and takes the time to the next commit; the
worker that is started for it is let in later, and what that stalls is how much longer the longest time between two
commits around it is than the median one; peers (elastic_peers.py) are killed after it, as often. The second replays a
market: each machine is an agent with one worker, killed with all that it has started and started again as the trace
says, in compressed time; machine 0 stays, since it has the store. Committed tokens stand beside the ideal: what runs
of fixed sizes commit in the time in which so many machines were there. Then the same steps are run by 2 workers whom
nothing happens to, and all weights and moments are compared. The third runs the same steps without and with
--exact-sums and --snapshot neighbour, interleaved.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.elastic_peers import chosen, peers  # noqa: E402
from benchmarks.processes import warm_parent  # noqa: E402
from benchmarks.runs import command, finished  # noqa: E402
from benchmarks.utilisation import cpu_peak, middle, of_run  # noqa: E402
from launch.forkserver import ForkServer  # noqa: E402
from launch.run_folder import read_jsonl  # noqa: E402
from recovery import checkpoint  # noqa: E402

MODEL = [
    "--model", "llama-tiny", "--tokenizer", "bytes", "--max-tokens", "400000", "--sequence-length", "64",
    "--evaluate-every", "0", "--sample-tokens", "0", "--threads", "1",
]  # fmt: skip
SAME = [*MODEL, "--steps", "99999", "--warmup", "20", "--exact-sums", "--recovery", "exact"]
"""All that decides what comes out."""
TOKENS = 32 * 64


class Machines:
    """Agents that are started and killed, each with all its workers."""

    def __init__(self, forkserver: ForkServer, folder: Path, flags: Sequence[str], nodes: int = 1) -> None:
        self.forkserver, self.folder, self.out = forkserver, folder, folder / "run"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        meet = ["--nodes", str(nodes), "--store", f"127.0.0.1:{port}"] if nodes > 1 else []
        self.flags = ["train", "--json", "--out", str(self.out), *flags, *meet]
        self.running: dict[int, int] = {}

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in list(self.running):
            self.kill(rank)

    def start(self, rank: int) -> None:
        log = self.folder / f"machine{rank}-{time.time():.0f}.log"
        self.running[rank] = self.forkserver.start(
            {"arguments": [*self.flags, "--node-rank", str(rank)], "log": str(log)}
        )

    def kill(self, rank: int) -> None:
        """As when the power goes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.running[rank])
            for process in [agent, *agent.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        del self.running[rank]
        self.forkserver.poll(0.05)

    def workers(self) -> list[psutil.Process]:
        """Those of machine 0, in order of their start."""
        return sorted(warm_parent(self.running[0]).children(), key=lambda process: process.create_time())

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.out / f"{name}.jsonl"
        return read_jsonl(path) if path.exists() else []

    def until(self, holds: Callable[[], bool], deadline_s: float = 90.0) -> None:
        end = time.monotonic() + deadline_s
        while not holds():
            if time.monotonic() > end or 0 not in self.running or not psutil.pid_exists(self.running[0]):
                logs = sorted(self.folder.glob("machine0*.log"))
                raise RuntimeError(f"it does not come: {logs[-1].read_text()[-1500:]}")
            time.sleep(0.005)

    def stop(self) -> int:
        """Ask the run to save itself; its newest step."""
        os.kill(self.running[0], signal.SIGTERM)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if any(exit_.pid == self.running[0] for exit_ in self.forkserver.poll(0.1)):
                break
        found = checkpoint.find(self.out / "checkpoints")
        if found.path is None:
            raise RuntimeError("the run has not saved itself")
        return int(found.path.name.removeprefix("step-"))


def standing(ledger: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Step -> its last line: what a rollback undid is there again."""
    return {line["step"]: line for line in ledger}


def samples(ledger: list[dict[str, Any]], last: int) -> tuple[int, int]:
    """Samples that no step up to `last` has taken, and that several have."""
    taken: dict[int, int] = {}
    for step, line in standing(ledger).items():
        if step <= last:
            for sample in range(line["first_sample"], line["first_sample"] + line["samples"]):
                taken[sample] = taken.get(sample, 0) + 1
    per_step = next(iter(ledger))["samples"]
    return sum(sample not in taken for sample in range(last * per_step)), sum(n > 1 for n in taken.values())


def same_state(a: Path, b: Path) -> bool:
    """Whether two checkpoints have the same weights and moments, to the bit."""
    files = sorted(path.name for path in a.glob("*.safetensors"))
    if files != sorted(path.name for path in b.glob("*.safetensors")) or not files:
        return False
    for name in files:
        ours, theirs = load_file(a / name), load_file(b / name)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return False
    return True


def percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] for q in (0.5, 0.95)]
    return {"p50": round(at[0], 3), "p95": round(at[1], 3), "most": round(ordered[-1], 3), "n": len(ordered)}


# ---- kills ----


def kills(forkserver: ForkServer, count: int, seed: int, advance: Callable[[float], None]) -> dict[str, Any]:
    """SIGKILL to the next commit, and what letting the next worker in stalls."""
    chance, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="elastic-"))
    flags = [*SAME, "--workers", "2:4", "--cooldown", "0.5", "--snapshot", "neighbour", "--checkpoint-every", "0"]
    shrink: list[float] = []
    with Machines(forkserver, folder, flags) as run:
        run.start(0)
        run.until(lambda: len(run.lines("ledger")) >= 20)
        for number in range(count):
            grown = len([e for e in run.lines("events") if e["event"] == "rejoined"])
            victim = chance.choice(run.workers()[:4])
            killed = time.time()
            victim.kill()
            run.until(lambda at=killed: any(e["event"] == "shrunk" and e["time"] > at for e in run.lines("events")))
            view = [e["view"] for e in run.lines("events") if e["event"] == "shrunk"][-1]
            run.until(lambda v=view: any(line["view"] >= v for line in run.lines("ledger")[-20:]))
            shrink.append(next(line["time"] for line in run.lines("ledger") if line["view"] >= view) - killed)
            run.until(lambda n=grown: len([e for e in run.lines("events") if e["event"] == "rejoined"]) > n)
            at = len(run.lines("ledger"))
            run.until(lambda n=at: len(run.lines("ledger")) >= n + 10)
            advance(number + 1)
        last = run.stop()
        ledger, events = run.lines("ledger"), run.lines("events")
    shutil.rmtree(folder)
    times = sorted(line["time"] for line in ledger)
    gaps = [b - a for a, b in pairwise(times)]
    usual = statistics.median(gaps)
    stall: list[float] = []
    for event in (e for e in events if e["event"] == "rejoined"):
        at = bisect.bisect_left(times, event["time"])
        stall.append(max(times[at] - times[at - 1], times[min(at + 1, len(times) - 1)] - times[at]) - usual)
    lost, repeated = samples(ledger, last)
    return {
        "kills": count, "shrink_s": percentiles(shrink), "step_s": round(usual, 4),
        "growth_stall_s": percentiles(stall), "growth_stall_steps": percentiles([s / usual for s in stall]),
        "rollbacks": sum(e["event"] == "rolled_back" for e in events), "samples_lost": lost,
        "samples_repeated": repeated,
    }  # fmt: skip


# ---- a market ----


def changes(trace: Path, machines: int, seconds: float) -> list[tuple[float, int]]:
    """(time, machines that are there from then on), in compressed time; machine 0 comes on top."""
    rows = [(float(t), int(n)) for t, n in csv.reader(trace.open())]
    target, end = max(n for _, n in rows), rows[-1][0]
    found: list[tuple[float, int]] = []
    for at, there in rows:
        scaled = 1 + round(there * (machines - 1) / target)
        if found and found[-1][0] == at / end * seconds:
            found.pop()  # a pair of lines at one time is a step
        if not found or found[-1][1] != scaled:
            found.append((at / end * seconds, scaled))
    return found


def rates(forkserver: ForkServer, machines: int, steps: int = 80) -> dict[int, float]:
    """Size -> tokens a second of a run of that size alone."""
    found: dict[int, float] = {}
    for size in range(1, machines + 1):
        with tempfile.TemporaryDirectory(prefix="elastic-") as folder:
            flags = [*MODEL, "--exact-sums", "--steps", str(steps), "--workers", str(size), "--checkpoint-every", "0"]
            with finished(forkserver, Path(folder), flags) as (records, _):
                found[size] = TOKENS / statistics.median(records.steps_s[10:])
    return found


def market(
    forkserver: ForkServer, trace: Path, minutes: float, machines: int, seed: int, picture: Path | None,
    advance: Callable[[float], None],
) -> dict[str, Any]:  # fmt: skip
    """A run on machines that come and go, beside the ideal, and beside a calm one; its sizes.svg goes to `picture`."""
    chance, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="elastic-"))
    speed, peak = rates(forkserver, machines), cpu_peak(machines)
    flags = [
        *SAME, "--workers", f"1:{machines}", "--cooldown", "1", "--heartbeat", "2", "--snapshot", "neighbour",
        "--checkpoint-every", "50", "--max-failures", "100000",
    ]  # fmt: skip
    sizes: list[tuple[float, int]] = []
    with Machines(forkserver, folder, flags, machines) as run:
        for rank in range(machines):
            run.start(rank)
        run.until(lambda: len(run.lines("ledger")) >= 5)
        began, first = time.monotonic(), run.lines("ledger")[-1]["step"]
        sizes.append((0.0, machines))
        for at, there in changes(trace, machines, 60 * minutes):
            while (now := time.monotonic() - began) < at:
                time.sleep(min(0.2, at - now))
                advance(now)
            ranks = [rank for rank in run.running if rank]
            for rank in chance.sample(ranks, max(0, len(ranks) + 1 - there)):
                run.kill(rank)
            free = [rank for rank in range(1, machines) if rank not in run.running]
            for rank in free[: max(0, there - len(run.running))]:
                run.start(rank)
            sizes.append((time.monotonic() - began, there))
        while (now := time.monotonic() - began) < 60 * minutes:
            time.sleep(0.2)
            advance(now)
        sizes.append((time.monotonic() - began, 0))
        committed = run.lines("ledger")[-1]["step"] - first
        last = run.stop()
        ledger, events, metrics = run.lines("ledger"), run.lines("events"), run.lines("metrics")
        if picture is not None and (run.out / "sizes.svg").exists():
            shutil.copy(run.out / "sizes.svg", picture)
        ended = checkpoint.find(run.out / "checkpoints").path
        assert ended is not None
        with tempfile.TemporaryDirectory(prefix="elastic-") as beside:
            flags = [*SAME, "--workers", "2", "--checkpoint-every", str(last)]
            with Machines(forkserver, Path(beside), flags) as calm:
                calm.start(0)
                saved = calm.out / "checkpoints" / ended.name
                calm.until(lambda: (saved / "manifest.json").exists(), 60 * minutes + 300)
                equal = same_state(ended, saved)
    shutil.rmtree(folder)
    ideal = sum(speed[n] * (b - a) for (a, n), (b, _) in pairwise(sizes))
    lost, repeated = samples(ledger, last)
    return {
        "committed_tokens": committed * TOKENS, "ideal_tokens": round(ideal), "samples_lost": lost,
        "samples_repeated": repeated, "bitwise_equal": equal, "share": round(committed * TOKENS / ideal, 3),
        "minutes": minutes, "machines": machines, "changes": len(sizes) - 2, "steps": last,
        "steps_again": len(ledger) - len(standing(ledger)),
        "rollbacks": sum(e["event"] == "rolled_back" for e in events),
        "sizes": [e["workers"] for e in events if e["event"] == "resized"],
        "tokens_per_s": {n: round(rate) for n, rate in speed.items()}, **of_run(metrics, peak),
    }  # fmt: skip


# ---- what it costs ----

KINDS = {
    "plain": [], "exact": ["--exact-sums"], "copies": ["--snapshot", "neighbour"],
    "both": ["--exact-sums", "--snapshot", "neighbour"],
}  # fmt: skip


def costs(forkserver: ForkServer, rounds: int, advance: Callable[[float], None]) -> dict[str, Any]:
    """Tokens a second of llama-2m on two workers, by kind, as a share of the plain run of the same round."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    peak, used = cpu_peak(2), dict[str, list[dict[str, Any]]]()
    for number in range(rounds):
        for kind in list(KINDS) if number % 2 == 0 else reversed(KINDS):
            with tempfile.TemporaryDirectory(prefix="elastic-") as folder:
                flags = ["--model", "llama-2m", "--tokenizer", "bytes", "--max-tokens", "400000", "--workers", "2"]
                flags += ["--steps", "30", "--checkpoint-every", "0", *MODEL[6:], *KINDS[kind]]
                with finished(forkserver, Path(folder), flags) as (records, _):
                    found[kind].append(1 / statistics.median(records.steps_s[5:]))
                    used.setdefault(kind, []).append(of_run(records.metrics, peak, 5))
        advance(number + 1)
    shares = {kind: [v / p for v, p in zip(found[kind], found["plain"], strict=True)] for kind in KINDS}
    return {
        "rounds": rounds,
        **{kind: {"median": round(statistics.median(s), 3), "least": round(min(s), 3), "most": round(max(s), 3),
                  **middle(used[kind])}
           for kind, s in shares.items()},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="workers that are killed one by one")
    parser.add_argument("--peers", type=chosen, help="of elastic_peers.py, apart by commas; as many kills for each")
    parser.add_argument("--trace", type=Path, help="CSV of (seconds, instances)")
    parser.add_argument("--minutes", type=float, default=5.0, help="in which the trace is replayed")
    parser.add_argument("--rounds", type=int, default=0, help="of runs with and without what makes a run exact")
    parser.add_argument("--machines", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result and nothing else")
    parser.add_argument("--out", type=Path, help="folder for elastic-kills.json and its like")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    forkserver, found = ForkServer(command), dict[str, Any]()
    try:
        with Progress(console=Console(stderr=True), disable=options.json) as progress:
            if options.kills:
                task = progress.add_task("kills", total=options.kills)
                found["kills"] = kills(
                    forkserver, options.kills, options.seed, lambda n: progress.update(task, completed=n)
                )
            if options.kills and options.peers:
                task = progress.add_task("peers", total=None)
                theirs = peers(options.peers, options.kills, options.seed, lambda: progress.advance(task))
                found["peers"] = {"ours": found["kills"], **theirs}
            if options.trace:
                task = progress.add_task("market", total=60 * options.minutes)
                found["market"] = market(
                    forkserver, options.trace, options.minutes, options.machines, options.seed,
                    None if options.out is None else options.out / "elastic-market.svg",
                    lambda seconds: progress.update(task, completed=seconds),
                )  # fmt: skip
            if options.rounds:
                task = progress.add_task("costs", total=options.rounds)
                found["costs"] = costs(forkserver, options.rounds, lambda n: progress.update(task, completed=n))
    finally:
        forkserver.close()
    print(json.dumps(found["market"] if list(found) == ["market"] else found, indent=None if options.json else 1))
    for name, values in found.items() if options.out else ():
        (options.out / f"elastic-{name}.json").write_text(json.dumps({"command": sys.argv, **values}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
