"""What skipping stages costs in loss and saves in time, and what a model is worth with a stage missing: real runs.

    python benchmarks/skippipe_training.py --out benchmarks/results                     # three seeds: 45 minutes
    python benchmarks/skippipe_training.py --seeds 1 --steps 10 --every 5 --out /tmp/x  # to try the script

Llamas of 1.3 and 1.7 M parameters train on the sources of the standard library of Python: one of eight blocks over 8
processes in 4 stages, 25 % of which are skipped, and one of six blocks over 12 processes in 6 stages, 33 % of them.
Links are as slow as in skippipe_run.py, 20 to 100 ms, so time is real time, from a run's first commit. Three arms see
the same samples in the same order: `full`, `skip`, and `skip, every 10th full`, as SkipPipe's authors train. They take
turns within each seed. Held-out loss is that of the whole model. At the end each stage's blocks are left out of the
exported model in turn, and its perplexity on held-out text is taken again. Writes skippipe-training.json after every
run, and goes on from it where it was stopped; and skippipe-training.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.runs import command, earlier_runs, finished, llama  # noqa: E402
from benchmarks.skippipe_run import links, op_times, write_network  # noqa: E402
from benchmarks.skippipe_training_report import ARMS, picture, print_report, summarise  # noqa: E402
from benchmarks.utilisation import Peak, cpu_peak, of_run  # noqa: E402
from jobs.data import Dataset  # noqa: E402
from launch.forkserver import ForkServer  # noqa: E402

SETTINGS = {4: (8, 0.25, 8), 6: (12, 0.33, 6)}  # stages -> processes, share skipped, blocks
SLOTS = 4  # microbatches of a home: none waits for another to come back
SAMPLES = 128  # held-out, of an evaluation


def arguments(folder: Path, network: Path, job: dict[str, Any], options: argparse.Namespace) -> list[str]:
    workers, skip, blocks = SETTINGS[job["stages"]]
    skipping = ["--skip", "0"] if job["arm"] == "full" else ["--skip", str(skip)]
    return [
        "--workers", str(workers), "--scheduler", "skippipe", "--network", str(network), *skipping,
        "--full-every", "10" if "10th" in job["arm"] else "0",
        "--model", str(llama(folder, blocks)), "--tokenizer", "bytes", "--max-tokens", "1000000",
        "--sequence-length", "64", "--microbatches", "8", "--microbatch-size", "2", "--steps", str(job["steps"]),
        "--warmup", "20", "--lr", "2e-3", "--threads", "1", "--evaluate-every", str(options.every),
        "--evaluate-samples", str(SAMPLES), "--checkpoint-every", "0", "--sample-tokens", "0",
        "--seed", str(job["seed"]),
    ]  # fmt: skip


def omitted(out: Path, stages: int, blocks: int) -> dict[str, float]:
    """Perplexity of the exported model on the held-out samples: whole, and without the blocks of each stage."""
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32, attn_implementation="sdpa").eval()
    sample = Dataset.open(out / "data").held_out_spread(SAMPLES)
    tokens = torch.stack([torch.from_numpy(sample(i)) for i in range(SAMPLES)])
    layers, per = list(model.model.layers), blocks // stages
    found: dict[str, float] = {}
    for name, left_out in [("none", range(0)), *((str(k), range(k * per, (k + 1) * per)) for k in range(stages))]:
        model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in left_out)
        with torch.no_grad():
            logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        found[name] = math.exp(float(loss))
    return found


def run(
    forkserver: ForkServer, folder: Path, network: Path, job: dict[str, Any], options: argparse.Namespace, peak: Peak
) -> Any:
    """One run to its end: its curve, its step, FLOP/s and memory, and its perplexities. Raises RuntimeError with what
    it said."""
    stages, blocks = job["stages"], SETTINGS[job["stages"]][2]
    with finished(forkserver, folder, arguments(folder, network, job, options)) as (records, out):
        return {
            "curve": records.curve, "step_s": statistics.median(records.steps_s),
            "tokens": sum(step["tokens"] for step in records.metrics), **of_run(records.metrics, peak),
            "perplexity_without": omitted(out, stages, blocks),
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--stages", type=int, nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    torch.set_num_threads(1)
    disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "skippipe-training.json"
    settings = {"steps": options.steps, "every": options.every}
    runs = earlier_runs(path, settings)
    done = {(each["stages"], each["arm"], each["seed"]) for each in runs}
    jobs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        turn = [{"stages": stages, "arm": arm, "seed": seed, "steps": options.steps}
                for stages in options.stages for arm in ARMS]  # fmt: skip
        random.Random(seed).shuffle(turn)
        jobs += [job for job in turn if (job["stages"], job["arm"], job["seed"]) not in done]
    forkserver, console = ForkServer(command), Console(stderr=True)
    peaks = {workers: cpu_peak(workers) for workers, *_ in SETTINGS.values()}
    with tempfile.TemporaryDirectory() as name:
        folder, networks = Path(name), dict[int, Path]()
        for stages in sorted({job["stages"] for job in jobs}):
            workers, _, blocks = SETTINGS[stages]
            where, hops = folder / f"network-{stages}.json", links(0, workers)
            cut = [[2 * k, 2 * k + 1] for k in range(stages)]
            networks[stages] = write_network(where, hops, cut, SLOTS, {})
            trial = {"stages": stages, "arm": "full", "seed": 0, "steps": 10}
            with finished(forkserver, folder, arguments(folder, where, trial, options)) as (_, out):
                times = op_times(out, blocks)
            write_network(where, hops, cut, SLOTS, times)
        for job in track(jobs, "training", console=console):
            peak = peaks[SETTINGS[job["stages"]][0]]
            runs.append({**job, **run(forkserver, folder, networks[job["stages"]], job, options, peak)})
            found = {"command": ["benchmarks/skippipe_training.py", *sys.argv[1:]], "settings": settings,
                     "summary": summarise(runs), "runs": runs}  # fmt: skip
            path.write_text(json.dumps(found) + "\n")
    found = json.loads(path.read_text())
    path.with_suffix(".svg").write_text(picture(found))
    print_report(found, Console(width=140))
    return 0


if __name__ == "__main__":
    sys.exit(main())
