"""Our engine beside its peers on the same work, in one run: who trains how many tokens a second, and in what memory.

    python benchmarks/engine.py                       # all of it: 3 rounds, results in benchmarks/results
    python benchmarks/engine.py --quick               # a tiny model and one round, to try the script
    python benchmarks/engine.py --only ours_zero_bubble torch_zbv one_thread --workers 4

A machine is never the same twice, so contenders take turns: in each round every one of them trains once, in processes
of its own, in an order shuffled by the seed, and ratios are formed within a round before their median is taken. The
best peer is the fastest pipeline engine of that round. The bound is one thread's speed of that round times the workers
(or cores, if fewer): a pipeline without any bubble or overhead. Plain PyTorch on one thread and on all cores is shown,
but is no pipeline. Peak memory is of the timed steps, libraries included; of these a forked worker of ours shares some
pages with its parent, so `grown_bytes` in the JSON leaves out what was there before. That the losses agree, step by
step, shows that all did the same work. `tflops` are model FLOP/s, `mfu` their share of the fp32 products that as many
threads do at best, measured at the start of each round (utilisation.py). A contender that fails is reported with its
error and costs only itself. Writes engine.json and engine.svg. At full size a round takes about a quarter of an hour on
two cores, which must be idle.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from engine_peers import PEERS, Work, threads
from engine_report import goals, picture, print_report, summarise
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from utilisation import Peak, cpu_peak

from schedulers import PLANNERS

HERE = Path(__file__).parent
OURS = tuple(f"ours_{name}" for name in PLANNERS)
CONTENDERS = (*OURS, *PEERS)
SEED = 0
TINY = Work(hidden=64, intermediate=128, layers=4, heads=4, vocabulary=256, sequence=32, microbatches=4, batch=2)
START_S, GRACE_S = 60.0, 20.0

Run = dict[str, Any]


def command(name: str, work: Work, options: argparse.Namespace, peak: Peak) -> list[str]:
    """What runs a contender in processes of its own."""
    ours = name in OURS
    script = HERE / ("engine_ours.py" if ours else "engine_peers.py")
    who = f"--scheduler={name.removeprefix('ours_')}" if ours else f"--peer={name}"
    shared = [f"--{key}={getattr(options, key)}" for key in ("workers", "steps", "warmup", "deadline")]
    sizes = [f"--{key}={value}" for key, value in asdict(work).items()]
    shared += [f"--peak-tflops={peak['peak_tflops']}", f"--parent={os.getpid()}"]
    return [sys.executable, str(script), who, *shared, *sizes, "--json"]


def run(name: str, work: Work, options: argparse.Namespace, peak: Peak) -> Run:
    """Run a contender once. What it printed; or its name and an error, whatever went wrong."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command(name, work, options, peak),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(timeout=options.deadline + START_S)
        except subprocess.TimeoutExpired:
            return {"peer": name, "error": f"did not end within {options.deadline + START_S:.0f} s"}
        finally:
            stop(process)
        lines = out.decode(errors="replace").splitlines()
        found = next((json.loads(line) for line in reversed(lines) if line.startswith('{"peer"')), None)
        if found is not None:
            told = {"error": tidy(found["error"])} if "error" in found else peak
            return {**found, "peer": name, **told}
        said.seek(0)
        words = " | ".join(said.read().decode(errors="replace").strip().splitlines()[-4:])[-1200:]
    return {"peer": name, "error": tidy(f"ended with {process.returncode}: {words or 'and said nothing'}")}


def tidy(error: str) -> str:
    """An error without where the repository lies on this machine."""
    return error.replace(f"{HERE.resolve().parent}/", "")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a contender that still runs: asked to, it stops its workers; if it cannot, they die with it."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def order(names: list[str], round_: int) -> list[str]:
    """The names, shuffled by the seed and the round."""
    return random.Random(f"{SEED}/{round_}").sample(names, len(names))


def about(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(__file__).name}", *arguments(sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "quick": options.quick,
        "seed": SEED,
        "work": asdict(work),
        **{key: getattr(options, key) for key in ("workers", "rounds", "steps", "warmup")},
    }


def arguments(given: list[str]) -> list[str]:
    """The command line without where the results go, which changes nothing in them."""
    kept: list[str] = []
    skip = False
    for word in given:
        if not skip and word.split("=")[0] != "--out":
            kept.append(word)
        skip = word == "--out"
    return kept


def parse() -> tuple[argparse.Namespace, Work]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="default 3, or 1 with --quick")
    parser.add_argument("--steps", type=int, help="timed steps of a run; default 8, or 3 with --quick")
    parser.add_argument("--warmup", type=int, help="steps before the timed ones; default 2, or 1 with --quick")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME",
                        help=f"contenders; one_thread gives the bound. All: {', '.join(CONTENDERS)}")  # fmt: skip
    parser.add_argument("--deadline", type=float, default=900.0, help="seconds that one run may take")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for engine.json and engine.svg")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps; the figures mean nothing")
    options = parser.parse_args()
    for key, usual, quick in (("rounds", 3, 1), ("steps", 8, 3), ("warmup", 2, 1)):
        if getattr(options, key) is None:
            setattr(options, key, quick if options.quick else usual)
    for key, least in (("workers", 1), ("rounds", 1), ("steps", 1), ("warmup", 0)):
        if getattr(options, key) < least:
            parser.error(f"--{key} {getattr(options, key)}; expected at least {least}")
    return options, TINY if options.quick else Work()


def main() -> int:
    options, work = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that being stopped also stops the contender
    console = Console(width=None if sys.stdout.isatty() else 140)
    facts = about(work, options)
    runs: list[Run] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=options.rounds * len(options.only))
        for round_ in range(options.rounds):
            counts = {name: threads(name, 1 if name == "one_thread" else options.workers) for name in options.only}
            peaks = {count: cpu_peak(count) for count in sorted(set(counts.values()))}
            for name in order(options.only, round_):
                progress.update(task, description=f"round {round_ + 1}: {name}")
                began, load = time.monotonic(), os.getloadavg()[0]
                found = run(name, work, options, peaks[counts[name]])
                runs.append({**found, "round": round_, "wall_s": time.monotonic() - began, "load_before": load})
                progress.advance(task)
                console.print(said(runs[-1]), highlight=False)
            save(options.out, facts, runs)  # what is there so far, should the rest not come
    print_report(console, facts, summarise(facts, runs), goals(facts, runs))
    console.print(f"written to {options.out}/engine.json and engine.svg")
    return 0


def said(found: Run) -> str:
    """One line on a run that has ended."""
    if "error" in found:
        return f"[red]{found['peer']}[/red] failed: {escape(found['error'][:300])}"
    return f"{found['peer']:<20} {found['tokens_per_s']:>8,.0f} tokens/s   {found['wall_s']:.0f} s in all"


def save(folder: Path, facts: dict[str, Any], runs: list[Run]) -> None:
    """engine.json and, where anything ran, engine.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = summarise(facts, runs)
    whole = {"about": facts, "summary": rows, "goals": goals(facts, runs), "runs": runs}
    (folder / "engine.json").write_text(json.dumps(whole, indent=1) + "\n")
    if any("tokens_per_s" in row for row in rows):
        (folder / "engine.svg").write_text(picture(facts, rows))


if __name__ == "__main__":
    sys.exit(main())
