"""20 questions about one author are forgotten, 180 about others are kept, by each of some methods.

Each method has the same budget: four settings are tried, and the one is taken that meets the goal by the probabilities
of answers with the widest margin, or misses it by least. That setting is shown, beside the exact replay, which is the
oracle, and the noise floor, the distance of two models that never saw the rows. The methods that meet all of the goal
then forget twice more, under two other seeds, which decide the order of rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.unlearn_picture import picture
from benchmarks.unlearn_runs import forgotten, oracles, trained

STEPS = 30
ASKED = ("--steps", STEPS, "--lr", "5e-4", "--microbatches", 2)
"""Of every request: 10 rows to forget and 10 to keep in a step, at a learning rate that all methods share."""
TRIES = {
    "npo": ("--alpha 3", "--alpha 5", "--alpha 10", "--alpha 20"),
    "wga": ("--alpha 1", "--alpha 3", "--alpha 5", "--alpha 10"),
    "undial": ("--alpha 1", "--alpha 3", "--alpha 10", "--alpha 3 --demotion 30"),
    "grad_diff": ("--alpha 10", "--alpha 13", "--alpha 17", "--alpha 30"),
    "simnpo": ("--gamma 0.5", "--gamma 2", "--gamma 8", "--gamma 20"),
    "satimp": ("--gamma 1", "--gamma 10", "--gamma 20", "--gamma 40"),
    "kl_min": ("--alpha 3", "--alpha 10", "--alpha 17", "--alpha 30"),
    "pdu": tuple(f"--dual-warmup 0 --gamma {gamma}" for gamma in ("0.003", "0.01", "0.03", "0.1")),
    "dpo": ("--alpha 0.3", "--alpha 1", "--alpha 3", "--alpha 10"),
}
"""Method -> what is tried."""
FORGET, RETAIN, FACTOR = 0.10, 0.90, 2.0
"""The goal: the probability of forgotten answers, that of kept ones, and KL on those in noise floors."""
FIELDS = ("forget_probability", "retain_probability", "forget_kl", "retain_kl")
Row = dict[str, Any]


def margin(row: Row) -> float:
    """By how much the nearer one of the two probabilities is on the good side of its goal; below 0 it is not."""
    return min(FORGET - row["forget_probability"], row["retain_probability"] - RETAIN)


def meets(row: Row, floor: Row) -> bool:
    return margin(row) >= 0 and row["retain_kl"] <= FACTOR * floor["retain_kl"]


def measured(run: Path, method: str, settings: str, models: tuple[Path, Path], seed: int = 0) -> dict[str, Row]:
    """Of each model that a request's report has, all that is told of it; kept beside the run."""
    kept = run.parent / f"{method} {settings} {seed}.json"
    if not kept.exists():
        asked = ("--method", method, *ASKED, *settings.split(), "--oracle", models[0], "--floor", models[1])
        kept.write_text(json.dumps(forgotten(run, method, *asked, "--seed", seed)))
    report = json.loads(kept.read_text())
    found = {which: {field: report[which][field] for field in FIELDS if field in report[which]}
             for which in ("before", "after", "oracle", "floor")}  # fmt: skip
    said(f"  {method} {settings}, seed {seed}", found["after"])
    return found


def said(which: str, row: Row) -> None:
    print(f"{which:<46}" + "  ".join(f"{row.get(field, 0.0):8.4f}" for field in FIELDS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--folder", type=Path, default=None, help="where runs are kept, and used again")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(TRIES))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)  # what took long is not lost for want of a folder
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        run = trained(folder, options.steps)
        models = oracles(run, options.steps)
        grid, rows, settings = dict[str, list[Row]](), dict[str, Row](), dict[str, str]()
        for method in options.methods.split(","):
            grid[method] = [{"settings": each, **measured(run, method, each, models)} for each in TRIES[method]]
            taken = max(grid[method], key=lambda each: margin(each["after"]))
            settings[method] = taken["settings"]
            rows |= {which: taken[which] for which in ("before", "oracle", "floor")} | {method: taken["after"]}
        for which, row in rows.items():
            said(which, row)
        best = [method for method in settings if meets(rows[method], rows["floor"])]
        print(f"the goal is met by {', '.join(best) or 'none'}", flush=True)
        seeds: dict[str, list[Row]] = {which: [rows[which]] for which in best}
        for method in best:
            more = [measured(run, method, settings[method], models, seed) for seed in range(1, options.seeds)]
            seeds[method] += [each["after"] for each in more]
        spread = {which: [told(each, field) for field in FIELDS] for which, each in seeds.items()}
        for which, each in spread.items():
            print(f"{which:<46}" + "  ".join("{:.3f} ({:.3f} to {:.3f})".format(*values) for values in each))
    tries = {method: [{"settings": each["settings"], **each["after"]} for each in grid[method]] for method in grid}
    shown = {
        "steps": options.steps, "request": " ".join(map(str, ASKED)),
        "goal": {"forget_probability": FORGET, "retain_probability": RETAIN, "retain_kl_in_floors": FACTOR},
        "rows": rows, "settings": settings, "meets": best, "seeds": seeds, "tried": tries,
    }  # fmt: skip
    (options.out / "unlearn.json").write_text(json.dumps(shown, indent=1) + "\n")
    (options.out / "unlearn.svg").write_text(picture(rows, best, FORGET, RETAIN, FACTOR * rows["floor"]["retain_kl"]))


def told(rows: list[Row], field: str) -> tuple[float, float, float]:
    """Mean, least and most."""
    values = [row.get(field, 0.0) for row in rows]
    return mean(values), min(values), max(values)


if __name__ == "__main__":
    main()
