"""What each remedy costs in loss and time once every stage matters: a Llama trained here first, then real kills.

    python benchmarks/checkfree_llama.py --base build/llama --out benchmarks/results      # two hours on two idle cores
    python benchmarks/checkfree_llama.py --base /tmp/b --without 0 --seeds 1 --steps 40 --out /tmp/x    # to try it

A Llama of 5.4 M parameters in three stages of four blocks, over bytes, trains on the sources of Python's standard
library in one process until the held-out loss without its inner stage is at least --without above that with it: then
the stage has learned what the others have not. (Of six stages of two blocks some are worth no more than +0.2 after
1,400 steps, of four of three blocks +0.4.) From there every run of checkfree.py begins, at the failure rates of the
CheckFree paper, of remedies that take turns: four workers, SIGKILL, the same failures for every remedy of a seed. Where
two rates or seeds draw the very same failures, a remedy runs once for them; where they draw none, its run is the calm
one. Once the workers have read the trained weights the file is overwritten by random ones, so that nobody has a lost
stage back from a disk, but for `checkpoint`, which has its own copies. The seed draws the failures; data are the same,
and what is held out was never trained on. Writes checkfree-llama.json and .svg; goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import AutoModelForCausalLM

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.checkfree import RATES, run  # noqa: E402
from benchmarks.checkfree_report import picture, print_report, summarise  # noqa: E402
from benchmarks.runs import command, earlier_runs, finished, llama_config  # noqa: E402
from benchmarks.trained_model import overwritten, scramble  # noqa: E402
from benchmarks.utilisation import cpu_peak  # noqa: E402
from jobs.data import Dataset  # noqa: E402
from launch.forkserver import ForkServer  # noqa: E402
from launch.run_folder import read_jsonl  # noqa: E402
from recovery.inject import Rate  # noqa: E402

STAGES, BLOCKS, SEQUENCE, HELD_OUT = 3, 4, 128, 64
WORKERS = STAGES + 1
ARMS = ("checkfree", "rehearse", "random", "checkpoint")
DATA = ("--tokenizer", "bytes", "--data", "stdlib", "--max-tokens", "3000000", "--sequence-length", str(SEQUENCE),
        "--seed", "0")  # fmt: skip
MARGIN = 0.15  # above the calm run's end, which is a little above where all begin: come back to that
ROUND, MOST = 200, 3000
"""Steps of 2,048 tokens from one look at the stages to the next, and at most."""


def without_stages(base: Path) -> dict[str, float]:
    """Held-out loss of the model of a run: whole, and how far above that it is without each stage, 1 to STAGES."""
    model, data = AutoModelForCausalLM.from_pretrained(base / "model"), Dataset.open(base / "data")
    sample, layers, found = data.held_out_spread(HELD_OUT), list(model.model.layers), dict[str, float]()
    rows = torch.stack([torch.from_numpy(sample(i)) for i in range(HELD_OUT)])
    for name, gone in (("whole", 0), *((str(stage), stage) for stage in range(1, STAGES + 1))):
        model.model.layers = nn.ModuleList(layer for i, layer in enumerate(layers) if i // BLOCKS != gone - 1)
        with torch.no_grad():
            logits = model(rows[:, :-1], use_cache=False).logits
        loss = float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
        found[name] = loss - found.get("whole", 0.0)
    return found


def trained(forkserver: ForkServer, base: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train until every inner stage matters; what it came to. Goes on with a run that is there. Raises RuntimeError."""
    base.mkdir(parents=True, exist_ok=True)
    config = llama_config(STAGES * BLOCKS)
    config.hidden_size, config.intermediate_size, config.head_dim = 192, 512, 32
    config.num_attention_heads = config.num_key_value_heads = 6
    (base / "model.json").write_text(config.to_json_string(use_diff=False))
    out = base / "run"
    while True:
        steps = read_jsonl(out / "ledger.jsonl")[-1]["step"] if (out / "ledger.jsonl").exists() else 0
        if (out / "model").exists():
            found = without_stages(out)
            least = min(found[str(stage)] for stage in range(2, STAGES))
            console.print(f"{steps} steps: loss {found['whole']:.3f}, without an inner stage +{least:.3f} or more")
            if least >= options.without:
                return {"steps": steps, "without": found}
            if steps >= MOST:
                raise RuntimeError(f"after {steps} steps no more than +{least:.3f}; asked: +{options.without}")
        more = ("--resume",) if (out / "config.toml").exists() else (
            "--workers", "1", "--model", str(base / "model.json"), *DATA, "--microbatches", "1",
            "--microbatch-size", "16",
            "--steps", str(MOST), "--warmup", "50", "--lr", "2e-3", "--lr-schedule", "constant", "--threads", "2",
            "--evaluate-every", "0", "--sample-tokens", "0", "--checkpoint-every", "0", "--recovery", "none",
        )  # fmt: skip
        arguments = ["--until", str(steps // ROUND * ROUND + ROUND), *more]
        with finished(forkserver, base, arguments, keep=True):
            pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="where the model is trained, or was")
    parser.add_argument("--without", type=float, default=0.5, help="nats more without an inner stage")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="of the checkpoint arm")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=[*ARMS])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    forkserver, console, path = ForkServer(command), Console(stderr=True), options.out / "checkfree-llama.json"
    base = trained(forkserver, options.base, options, console)
    peak, settings = cpu_peak(WORKERS), {
        "steps": options.steps, "every": options.every, "checkpoint_every": options.checkpoint_every, "base": base,
    }  # fmt: skip
    runs, failed = earlier_runs(path, settings), list[str]()
    have = {(each["arm"], each["rate"], each["seed"]) for each in runs}
    whole: dict[str, Any] = {
        "command": ["benchmarks/checkfree_llama.py", *sys.argv[1:]], "settings": settings, "seeds": options.seeds,
        "steps": options.steps, "margin": MARGIN, "paper": RATES, "failed": failed, "runs": runs,
    }  # fmt: skip
    jobs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        turn: list[dict[str, Any]] = [
            {"arm": "none", "recovery": "none", "rate": None, "seed": seed, "inject": "", "drawn": []}
        ]
        for number, p in enumerate(RATES["failures_per_iteration_and_stage"]):
            rate = Rate(p, tuple(range(2, STAGES)), seed)
            drawn = [[step, stage] for step in range(options.steps) for stage in rate.stages if rate.draw(step, stage)]
            inject = f"rate:p={p},stages=2-{STAGES - 1},seed={seed}"
            turn += [
                {"arm": arm, "recovery": arm, "rate": number, "seed": seed, "inject": inject, "drawn": drawn}
                for arm in options.arms
            ]
        random.Random(seed).shuffle(turn)
        turn.sort(key=lambda job: job["arm"] != "none")
        jobs += [job for job in turn if (job["arm"], job["rate"], job["seed"]) not in have]
    with Progress(console=console) as progress, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, task = folder / "model", progress.add_task("training", total=len(jobs))
        start = folder / "trained"
        AutoModelForCausalLM.from_pretrained(options.base / "run" / "model").save_pretrained(start)
        scramble(start, folder / "random")
        more = (
            *DATA, "--workers", str(WORKERS), "--model", str(model), "--microbatch-size", "2", "--lr", "5e-4",
            "--lr-schedule", "constant",
        )  # fmt: skip
        for job in jobs:
            progress.update(task, description=f"seed {job['seed']}, {job['arm']}, rate {job['rate']}")
            own = job["recovery"] in ("none", "checkpoint")
            same = next((r for r in runs if r["drawn"] == job["drawn"] and r["arm"] in (job["arm"], "none")), None)
            if same is not None:
                runs.append({**same, **job})
                progress.advance(task)
                continue
            try:
                with overwritten(start, model, start if own else folder / "random", folder / "run"):
                    found = run(forkserver, folder, {**job, "more": more}, options, peak)
            except RuntimeError as error:
                failed.append(str(error))
                console.print(f"[red]{error}")
                continue
            finally:
                progress.advance(task)
            runs.append({**job, **found})
            path.write_text(json.dumps(whole) + "\n")
    if not any(each["arm"] == "none" for each in runs):
        raise SystemExit("the run without failures has not ended well: there is nothing to compare with")
    whole["summary"] = summarise(whole)
    path.write_text(json.dumps(whole) + "\n")
    (options.out / "checkfree-llama.svg").write_text(picture(whole))
    print_report(whole, Console(width=140))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
