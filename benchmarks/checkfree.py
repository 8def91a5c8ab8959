"""What each remedy costs in loss and time, under the failure rates of the CheckFree paper: real runs, real kills.

    python benchmarks/checkfree.py --out benchmarks/results            # five seeds: 40 minutes on two idle cores
    python benchmarks/checkfree.py --seeds 1 --steps 60 --out /tmp/x   # to try the script

A Llama of 1.3 M parameters, one block per stage in six stages, the embedding and the head on a worker of their own,
trains on the sources of Python's standard library while SIGKILL hits its block stages. Whether a stage is lost in a
step is drawn from the seed, the step and the stage alone (`--inject rate:`), so every remedy meets the same failures;
like the paper's, they spare the first and last block stage, which CheckFree cannot rebuild, but for the row "all
stages" of CheckFree+ at the highest rate. Remedies take turns within each seed and rate, in an order shuffled by the
seed. Time is that of the run's own records, from its first committed step; `none` is the run without failures.
Held-out loss is measured every --every steps by the run itself. The jump is the loss of the very batch that follows the
loss of the first block stage, less that of the same run without it. Writes checkfree.json and checkfree.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.checkfree_report import picture, print_report, summarise  # noqa: E402
from benchmarks.runs import command, finished, llama  # noqa: E402
from benchmarks.utilisation import Peak, cpu_peak, of_run  # noqa: E402
from launch.forkserver import ForkServer  # noqa: E402

RATES = json.loads((Path(__file__).parent / "data" / "checkfree_paper.json").read_text())
MIDDLE, ALL = "2-5", "1-6"
ARMS = {  # name -> (recovery, stages that are hit)
    "checkpoint": ("checkpoint", MIDDLE), "redundant": ("redundant", MIDDLE), "checkfree": ("checkfree", MIDDLE),
    "checkfree+": ("checkfree+", MIDDLE), "copy": ("copy", MIDDLE), "random": ("random", MIDDLE),
    "checkfree+, all stages": ("checkfree+", ALL),
}  # fmt: skip
WORKERS = 7
JUMP = 10  # steps before the end


def run(
    forkserver: ForkServer, folder: Path, job: dict[str, Any], options: argparse.Namespace, peak: Peak
) -> dict[str, Any]:
    """One run to its end: its curve, its failures and what it cost. Raises RuntimeError with what it said."""
    recovery, seed = job["recovery"], job["seed"]
    arguments = [
        "--workers", str(WORKERS), "--ends", "apart", "--model", str(llama(folder, 6)),
        "--tokenizer", "bytes", "--max-tokens", "1000000", "--sequence-length", "64", "--microbatches", "2",
        "--microbatch-size", "4", "--steps", str(job.get("steps", options.steps)), "--warmup", "20", "--lr", "2e-3",
        "--threads", "1", "--evaluate-every", str(options.every), "--evaluate-samples", "64", "--sample-tokens", "0",
        "--seed", str(seed), "--checkpoint-every", str(options.checkpoint_every if recovery == "checkpoint" else 0),
        "--recovery", recovery, "--inject", job["inject"], "--max-failures", "1000", *job.get("more", ()),
    ]  # fmt: skip
    with finished(forkserver, folder, arguments) as (records, _):
        losses = {"losses": [step["loss"] for step in records.metrics]} if job["arm"].startswith("jump") else {}
        return {
            "curve": records.curve, **losses, "seconds": records.curve[-1][1],
            "step_s": statistics.median(records.steps_s), **of_run(records.metrics, peak),
            "faults": sum(e["event"] == "fault" for e in records.events),
            "replayed": sum(e.get("steps_lost", 0) for e in records.events if e["event"] == "rolled_back"),
        }  # fmt: skip


def plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run, in the order in which they are made."""
    jobs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for number, p in enumerate(RATES["failures_per_iteration_and_stage"]):
            turn = [
                {"arm": arm, "recovery": recovery, "rate": number, "seed": seed,
                 "inject": f"rate:p={p},stages={stages},seed={seed}"}
                for arm, (recovery, stages) in ARMS.items()
                if stages == MIDDLE or number == 2
            ]  # fmt: skip
            if number == 0:
                turn.append({"arm": "none", "recovery": "none", "rate": None, "seed": seed, "inject": ""})
            random.Random(f"{seed}/{number}").shuffle(turn)
            jobs += turn
        for arm, recovery in (("jump, swapped", "checkfree+"), ("jump, not swapped", "copy")):
            for fault in ("", f"kill:stage=1,step={options.steps - JUMP},at=backward"):
                steps = options.steps - JUMP + 2
                jobs.append(
                    {"arm": arm, "recovery": recovery, "rate": None, "seed": seed, "inject": fault, "steps": steps}
                )
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="of the checkpoint arm")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    forkserver, peak = ForkServer(command), cpu_peak(WORKERS)
    console, runs, failed = Console(stderr=True), list[dict[str, Any]](), list[str]()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as folder:
        jobs = plan(options)
        task = progress.add_task("training", total=len(jobs))
        for job in jobs:
            progress.update(task, description=f"seed {job['seed']}, {job['arm']}, rate {job['rate']}")
            try:
                runs.append({**job, **run(forkserver, Path(folder), job, options, peak)})
            except RuntimeError as error:
                failed.append(str(error))
                console.print(f"[red]{error}")
            progress.advance(task)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {
        "command": ["benchmarks/checkfree.py", *sys.argv[1:]], "seeds": options.seeds, "steps": options.steps,
        "jump_at": options.steps - JUMP,
        "checkpoint_every": options.checkpoint_every, "paper": RATES, "failed": failed, "runs": runs,
    }  # fmt: skip
    found["summary"] = summarise(found)
    (options.out / "checkfree.json").write_text(json.dumps(found) + "\n")
    (options.out / "checkfree.svg").write_text(picture(found))
    print_report(found, Console(width=140))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
