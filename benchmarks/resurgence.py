"""What a checkpoint from before brings back: the negative control of deletion-safe recovery.

A model forgets an author. Then a stage is lost. With the guard (generations), it comes back from what the run has saved
since: a real SIGKILL in a real `unbroken train --resume`. Without it, a system takes a checkpoint of that stage from
before: here its layers are put in as they were before the request, and the model is measured. That side is no run,
because our recovery refuses to do it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.unlearn_runs import FORGOTTEN, material, probabilities, trained, unbroken
from pipeline.drawing.svg import coord, document, oklch, tag, text
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import Weights, finish_export, read_config, write_shard

STAGES = {"the first stage": range(5), "the second stage": range(5, 10)}
_FORGET, _RETAIN = oklch(0.6, 0.18, 25), oklch(0.6, 0.1, 165)


def mixed(new: Path, old: Path, layers: range, into: Path) -> Path:
    """The model `new` with some layers as `old` has them."""
    model = LayeredModel(read_config(new))
    weight_map: dict[str, str] = {}
    for layer in range(model.num_layers):
        keys = {key: (key,) for key in model.keys(layer)}
        if keys:
            values = Weights(old if layer in layers else new).read(keys)
            weight_map |= write_shard(into, layer + 1, model.num_layers, values)
    return finish_export(into, model.config, weight_map)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--run", type=Path, default=None, help="a run of unlearn_runs.py, not a new one")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)  # what took long is not lost for want of a folder
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = trained(folder, options.steps) if options.run is None else options.run
        rows, items = material(before)
        run = Path(shutil.copytree(before, folder / "forgets"))
        asked = ("--forget", FORGOTTEN, "--method", "npo", "--lr", "5e-4", "--steps", 30, "--alpha", 3)
        unbroken("unlearn", run, *asked, "--evaluate-every", 0, "--json")
        bars = {"before": probabilities(before / "model", rows, items)}
        bars["forgotten"] = probabilities(run / "model", rows, items)
        for stage, layers in STAGES.items():
            model = mixed(run / "model", before / "model", layers, folder / stage)
            bars[f"guard off: {stage} lost"] = probabilities(model, rows, items)
        data = before.parent / "authors" / "train.jsonl"
        for place, stage in enumerate(STAGES):
            copy = folder / f"goes-on-{place}"
            shutil.copytree(run, copy)
            more = ("--steps", options.steps + 4, "--recovery", "checkpoint", "--checkpoint-every", 0, "--lr", "1e-5")
            fault = f"kill:stage={place},step={options.steps + 2},at=backward"
            unbroken("train", "--out", copy, "--resume", "--change", "--data", data, *more, "--inject", fault, "--json")
            events = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
            assert any(event["event"] == "rolled_back" for event in events), "the stage was lost"
            bars[f"guard on: {stage} lost"] = probabilities(copy / "model", rows, items)
    after = bars["forgotten"][0]
    for which, (forget, retain) in bars.items():
        print(f"{which:<34} forget {forget:.4f} ({forget / after:6.1f} x)  retain {retain:.4f}")
    (options.out / "resurgence.json").write_text(
        json.dumps({"method": "npo", "bars": {k: {"forget": f, "retain": r} for k, (f, r) in bars.items()}}, indent=1)
        + "\n"
    )
    (options.out / "resurgence.svg").write_text(picture(bars))


def picture(bars: dict[str, tuple[float, float]]) -> str:
    """Bars of the probability of the forgotten answers, with a tick for those that are kept."""
    left, width, row = 250.0, 480.0, 34.0
    body = [text(16, 28, "What a lost stage brings back", font_size=16, font_weight="600")]
    body.append(text(16, 48, "probability of the answers that were forgotten (bar), and of those that are kept (tick)"))
    for place, (which, (forget, retain)) in enumerate(bars.items()):
        y = 70 + place * row
        body.append(text(left - 10, y + 16, which, text_anchor="end"))
        body.append(
            tag("rect", x=coord(left), y=coord(y), width=coord(max(1.0, width * forget)), height=22, fill=_FORGET)
        )
        x = left + width * retain
        body.append(
            tag("line", x1=coord(x), x2=coord(x), y1=coord(y - 2), y2=coord(y + 24), stroke=_RETAIN, stroke_width=3)
        )
        body.append(text(left + width + 14, y + 16, f"{forget:.3f} / {retain:.3f}"))
    title = "What a lost stage brings back"
    return document(860, int(70 + row * len(bars) + 16), body, title=title, description="generations keep it forgotten")


if __name__ == "__main__":
    main()
