"""Pools of stateless workers that are hit for a long time, and end in the weights of the run that nobody disturbed.

    python benchmarks/soak_pool.py --minutes 20 --every 2 --out benchmarks/results

Three workers train under --scheduler roundpipe while SIGKILL from outside hits one of them every few seconds on
average, at random moments, in one of five cases two in the same breath; now and then one is stopped instead (SIGSTOP),
and found out by its silence. Rounds alternate between the two kinds of optimizer, in step and one step behind. Each
must end with code 0, in weights that are bitwise those of the calm run of its kind, with a ledger in which every step
was committed once on the samples that follow those of the step before, and with no process and no shared memory left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from soak import check_ledger, show, workers

from recovery import Run

KINDS = {"in step": [], "one step behind": ["--optimizer-async"]}
FLAGS = ["--scheduler", "roundpipe", "--workers", "3", "--at-once", "2", "--model", "llama-tiny", "--deadline", "8",
         "--checkpoint-every", "50", "--max-failures", "100000"]  # fmt: skip
STOPS = 0.04  # of all hits


def weights(run: Run) -> dict[str, torch.Tensor]:
    """What a run has exported."""
    return {n: t for file in sorted((run.out / "model").glob("*.safetensors")) for n, t in load_file(file).items()}


def calm(kind: str, steps: int, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the run that nobody disturbs. Raises RuntimeError where it fails."""
    with Run(folder, [*FLAGS, *KINDS[kind], "--steps", str(steps)]) as run:
        if run.process.wait(600) != 0:
            raise RuntimeError(f"the calm run failed: {Path(run._log.name).read_text()[-1500:]}")
        return weights(run)


def hit(run: Run, chance: random.Random) -> int:
    """Kill or stop one worker, or kill two; returns how many."""
    try:
        alive = workers(run)
        victims = chance.sample(alive, min(len(alive), 2 if chance.random() < 0.2 else 1))
        signum = signal.SIGSTOP if chance.random() < STOPS else signal.SIGKILL
        for victim in victims if signum == signal.SIGKILL else victims[:1]:
            victim.send_signal(signum)
        return len(victims)
    except (psutil.NoSuchProcess, ValueError):
        return 0  # the run is over


def storm(kind: str, steps: int, every_s: float, seed: int, expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One run to its end under fire, and what is wrong with it."""
    chance, shared = random.Random(f"{seed}/{kind}"), set(os.listdir("/dev/shm"))
    folder = Path(tempfile.mkdtemp(prefix="soak-pool-"))  # kept when something is wrong
    hits, problems, family = 0, list[str](), list[psutil.Process]()
    with Run(folder, [*FLAGS, *KINDS[kind], "--steps", str(steps)]) as run:
        run.until(lambda: run.last_step() >= 2)
        deadline = time.monotonic() + 900
        while run.process.poll() is None and time.monotonic() < deadline:
            time.sleep(min(3 * every_s, chance.expovariate(1 / every_s)))
            if run.process.poll() is None:
                family = psutil.Process(run.process.pid).children(recursive=True)
                hits += hit(run, chance)
        code = run.process.poll()
        problems += [] if code == 0 else [f"exit code {code}: {Path(run._log.name).read_text()[-800:]}"]
        problems += check_ledger(run)
        if code == 0:
            found = weights(run)
            wrong = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
            problems += [
                f"{len(wrong)} of {len(expected)} tensors differ from the calm run, e.g. {n}" for n in wrong[:1]
            ]
        events, done = run.events(), run.last_step()
    _, alive = psutil.wait_procs(family, timeout=10)
    problems += [f"left behind: {process}" for process in alive]
    problems += [f"shared memory left: {name}" for name in set(os.listdir("/dev/shm")) - shared]
    if problems:
        problems.append(f"the run's folder was kept: {folder}")
    else:
        shutil.rmtree(folder)
    lost = sum(event["event"] == "detected" for event in events)
    return {"kind": kind, "seed": seed, "hits": hits, "lost": lost, "steps": done, "problems": problems}


def soak(minutes: float, every_s: float, seed: int, steps: int, advance: Any) -> dict[str, Any]:
    """Rounds of both kinds until the time is over, one of each at least."""
    began, rounds = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        expected = {kind: calm(kind, steps, _made(Path(name) / kind.replace(" ", "-"))) for kind in KINDS}
    while len(rounds) < len(KINDS) or time.monotonic() - began < 60 * minutes:
        kind = list(KINDS)[len(rounds) % len(KINDS)]
        rounds.append(storm(kind, steps, every_s, seed + len(rounds), expected[kind]))
        advance(time.monotonic() - began)
        if rounds[-1]["problems"]:
            break
    return {
        "minutes": round((time.monotonic() - began) / 60, 1), "rounds": len(rounds),
        **{name: sum(each[name] for each in rounds) for name in ("hits", "lost", "steps")},
        "problems": [problem for each in rounds for problem in each["problems"]], "by_round": rounds,
    }  # fmt: skip


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every", type=float, default=2.0, help="mean seconds between hits")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for soak-pool.json")
    options = parser.parse_args()
    return show(options, "soak-pool.json", partial(soak, options.minutes, options.every, options.seed, options.steps))


if __name__ == "__main__":
    sys.exit(main())
