"""20 questions about one author are forgotten on-policy, 180 about others are kept: before, after the cold start alone,
and after a cold start and steps with the model's own answers.

What is known is measured twice: how probable the true answers are, and how many of the model's own answers a judge
rewards in each step (1 in cold steps, whose answers say nothing).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.unlearn_runs import FORGOTTEN, copied, material, probabilities, trained, unbroken

SIZES = ("--microbatches", "8", "--microbatch-size", "8", "--evaluate-every", "0", "--checkpoint-every", "0", "--json")
ANSWERS = ("--rollouts", "8", "--answer-tokens", "48")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--run", type=Path, help="a run that was trained before; else it is trained")
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--cold", type=int, default=5)
    parser.add_argument("--on-policy", type=int, default=12)
    parser.add_argument("--lr", default="3e-4")
    parser.add_argument("--alpha", default="3")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)  # what took long is not lost for want of a folder
    with tempfile.TemporaryDirectory() as name:
        run = options.run or trained(Path(name), options.steps)
        rows, items = material(run)
        table: dict[str, dict[str, object]] = {}

        def tell(which: str, model: Path, rewards: list[float]) -> None:
            forget, retain = probabilities(model, rows, items)
            table[which] = {"forget probability": forget, "retain probability": retain, "rewards": rewards}
            own = f"  rewards {' '.join(f'{reward:.2f}' for reward in rewards)}" if rewards else ""
            print(f"{which:<12} forget {forget:.4f}  retain {retain:.4f}{own}", flush=True)

        tell("before", run / "model", [])
        common = ("--forget", FORGOTTEN, "--method", "grpo", *SIZES, *ANSWERS)
        common += ("--lr", options.lr, "--alpha", options.alpha, "--cold-steps", options.cold)
        for which, steps in (("on-policy", options.cold + options.on_policy), ("cold", options.cold)):
            copy = copied(run, f"{run.name}-{which}")
            told = unbroken("unlearn", copy, *common, "--steps", steps)
            tell(which, copy / "model", told["rewards"])
    settings = {name: getattr(options, name) for name in ("steps", "cold", "on_policy", "lr", "alpha")}
    (options.out / "unlearn_grpo.json").write_text(json.dumps({"settings": settings, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
