"""A run that is hit for a long time: workers are killed at random moments, and in the end nothing is missing or left.

    python benchmarks/soak.py --minutes 30 --every 20 --out benchmarks/results

Six workers (three stages, two replicas) train while SIGKILL hits one of them every 20 s on average; sometimes a second
one in the same breath. Then the run is asked to stop. It must end with code 75, a checkpoint, and a ledger in which
every step was committed once on the samples that follow those of the step before (steps that a rollback undid are
there again, in a later view); replicas are compared by checksum in every view change, by the run itself. Nothing may
be left: no process, no shared memory, and no file descriptor or thread more than before in who survived.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from processes import warm_parent
from rich.console import Console
from rich.progress import Progress

from recovery import Run

FLAGS = ["--workers", "6", "--replicas", "2", "--model", "llama-tiny", "--checkpoint-every", "50"]


def workers(run: Run) -> list[psutil.Process]:
    return warm_parent(run.process.pid).children()


def hit(run: Run, chance: random.Random) -> int:
    """Kill one worker, or in one of five cases two; returns how many."""
    victims = chance.sample(workers(run), 2 if chance.random() < 0.2 else 1)
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    return len(victims)


def check_ledger(run: Run) -> list[str]:
    """What is wrong with it."""
    ledger = run.ledger()
    last: dict[int, dict[str, Any]] = {}
    wrong: list[str] = []
    for line in ledger:
        if line["step"] in last and last[line["step"]]["view"] >= line["view"]:
            wrong.append(f"step {line['step']} was committed twice in view {line['view']}")
        last[line["step"]] = line
    if sorted(last) != list(range(1, len(last) + 1)):
        wrong.append(f"steps are missing: {sorted(set(range(1, max(last) + 1)) - set(last))[:10]}")
    wrong += [
        f"step {s}: first sample {x['first_sample']}" for s, x in last.items() if x["first_sample"] != 8 * (s - 1)
    ]
    return wrong


def soak(minutes: float, every_s: float, seed: int, advance: Any) -> dict[str, Any]:
    """Run, hit, stop, check. Raises RuntimeError when the run ends by itself or hangs."""
    chance, shared = random.Random(seed), set(os.listdir("/dev/shm"))
    folder = Path(tempfile.mkdtemp(prefix="soak-"))  # kept when something is wrong
    with Run(folder, FLAGS) as run:
        run.until(lambda: run.last_step() >= 10)
        agent = psutil.Process(run.process.pid)
        warm = warm_parent(agent.pid)
        began, kills = time.monotonic(), 0
        open_before = {p.pid: (p.num_fds(), p.num_threads()) for p in (agent, warm)}
        eldest = {p.pid: p.num_fds() for p in workers(run)}
        while time.monotonic() - began < 60 * minutes:
            wait = min(chance.expovariate(1 / every_s), 60 * minutes - (time.monotonic() - began))
            time.sleep(max(0.0, wait))
            advance(time.monotonic() - began)
            kills += hit(run, chance)
            at = run.last_step()
            run.until(lambda at=at: run.last_step() > at or rolled_back(run), deadline_s=60)
        time.sleep(3)
        open_after = {p.pid: (p.num_fds(), p.num_threads()) for p in (agent, warm)}
        survivors = {p.pid: p.num_fds() for p in workers(run)}
        family = agent.children(recursive=True)
        run.process.send_signal(signal.SIGTERM)
        code = run.process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=10)
        events = run.events()
        steps = len({line["step"] for line in run.ledger()})
        problems = check_ledger(run)
        problems += [] if code == 75 else [f"exit code {code}: {Path(run._log.name).read_text()[-500:]}"]
        problems += [f"left behind: {p}" for p in alive]
        problems += [f"shared memory left: {name}" for name in set(os.listdir("/dev/shm")) - shared]
        for pid, (fds, threads) in open_after.items():
            if fds > open_before[pid][0] + 8 or threads > open_before[pid][1] + 2:
                problems.append(
                    f"process {pid} had {open_before[pid]} descriptors and threads, and has {(fds, threads)}"
                )
        growth = {pid: survivors[pid] - n for pid, n in eldest.items() if pid in survivors}
        problems += [f"worker {pid} has {n} descriptors more than at first" for pid, n in growth.items() if n > 12]
    if problems:
        problems.append(f"the run's folder was kept: {folder}")
    else:
        shutil.rmtree(folder)
    return {
        "minutes": minutes, "kills": kills, "lost": sum(e["event"] == "detected" for e in events),
        "views": 1 + sum(e["event"] == "view" for e in events), "steps": steps,
        "rollbacks": sum(e["event"] == "rolled_back" for e in events), "problems": problems,
    }  # fmt: skip


def rolled_back(run: Run) -> bool:
    events = run.events()
    return bool(events) and events[-1]["event"] == "rolled_back"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=20.0, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for soak.json")
    options = parser.parse_args()
    return show(options, "soak.json", partial(soak, options.minutes, options.every, options.seed))


def show(options: argparse.Namespace, name: str, soak: Callable[[Callable[[float], None]], dict[str, Any]]) -> int:
    """Soak under a progress bar; print and write what was found. The exit code: 1 if something is wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run is ended too
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("soaking", total=60 * options.minutes)
        found = soak(lambda seconds: progress.update(task, completed=seconds))
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / name).write_text(json.dumps({"command": sys.argv, **found}, indent=1) + "\n")
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
