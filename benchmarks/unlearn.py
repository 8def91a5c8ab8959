"""20 questions about one author are forgotten, 180 about others are kept, by each of some methods.

Each method has the same budget: six settings on a run of seed 0, of which the one is taken that comes nearest to the
goal by the probabilities of answers alone. That setting is shown, beside the exact replay, which is the oracle, and the
noise floor, the distance of two models that never saw the rows. The methods that meet all of the goal are then run, as
they are, on runs of two other seeds, each with an oracle and a floor of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.unlearn_picture import picture
from benchmarks.unlearn_runs import forgotten, oracles, trained

STEPS = 30
RATES = ("2e-4", "4e-4", "8e-4")
WEIGHTS = {
    "npo": ("--alpha", ("1", "3")), "wga": ("--alpha", ("1", "3")), "undial": ("--alpha", ("1", "3")),
    "grad_diff": ("--alpha", ("3", "10")), "kl_min": ("--alpha", ("3", "10")), "satimp": ("--gamma", ("1", "10")),
    "simnpo": ("--gamma", ("0.5", "2")), "pdu": ("--gamma", ("0.01", "0.1")), "dpo": ("--alpha", ("1", "3")),
}  # fmt: skip
"""Method -> the weight that is tried, the smaller and the larger, with each learning rate."""
MORE = {"pdu": ("--dual-warmup", "0")}
FORGET, RETAIN, FACTOR, SHOWN = 0.10, 0.90, 2.0, 3
"""The goal: the probability of forgotten answers, that of kept ones, KL on those in noise floors, and by how many."""
FIELDS = ("forget_probability", "retain_probability", "forget_kl", "retain_kl")
Row = dict[str, Any]


def shortfall(row: Row) -> tuple[float, float]:
    """How far a result is from the goal by probabilities alone; among those that meet it, the one that keeps more."""
    forget, retain = row["forget_probability"], row["retain_probability"]
    return max(0.0, forget - FORGET) + max(0.0, RETAIN - retain), -retain


def meets(row: Row, floor: Row) -> bool:
    return shortfall(row)[0] == 0 and row["retain_kl"] <= FACTOR * floor["retain_kl"]


def tried(run: Path, method: str) -> list[Row]:
    """The grid of a method, in one process each: what is asked, and the probabilities after it."""
    name, values = WEIGHTS[method]
    found: list[Row] = []
    for rate, value in product(RATES, values):
        settings = ("--lr", rate, name, value, *MORE.get(method, ()))
        after = forgotten(run, method, "--method", method, "--steps", STEPS, *settings, "--workers", 1)["after"]
        found.append({"settings": " ".join(settings), **{field: after[field] for field in FIELDS[:2]}})
        print(f"  {method:<10} {found[-1]['settings']:<36} {after[FIELDS[0]]:.4f} {after[FIELDS[1]]:.4f}", flush=True)
    return found


def measured(run: Path, method: str, settings: str, models: tuple[Path, Path]) -> dict[str, Row]:
    """Of each model that a request's report has, all that is told of it."""
    asked = ("--method", method, "--steps", STEPS, *settings.split(), "--oracle", models[0], "--floor", models[1])
    told = forgotten(run, method, *asked)
    return {which: {field: told[which][field] for field in FIELDS if field in told[which]}
            for which in ("before", "after", "oracle", "floor")}  # fmt: skip


def said(which: str, row: Row) -> None:
    print(f"{which:<16}" + "  ".join(f"{row.get(field, 0.0):8.4f}" for field in FIELDS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--folder", type=Path, default=None, help="where runs are kept, and used again")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(WEIGHTS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        run = trained(folder / "seed-0", options.steps)
        models = oracles(run, options.steps, 0)
        grid, rows, settings = dict[str, list[Row]](), dict[str, Row](), dict[str, str]()
        for method in options.methods.split(","):
            kept = folder / f"grid-{method}.json"
            grid[method] = json.loads(kept.read_text()) if kept.exists() else tried(run, method)
            kept.write_text(json.dumps(grid[method]))
            settings[method] = min(grid[method], key=shortfall)["settings"]
        for method in settings:
            found = measured(run, method, settings[method], models)
            rows |= {which: found[which] for which in ("before", "oracle", "floor")} | {method: found["after"]}
        for which, row in rows.items():
            said(which, row)
        best = [method for method in settings if meets(rows[method], rows["floor"])]
        print(f"the goal is met by {', '.join(best) or 'none'}", flush=True)
        seeds: dict[str, list[Row]] = {which: [rows[which]] for which in ("oracle", "floor", *best)}
        for seed in range(1, options.seeds):
            run = trained(folder / f"seed-{seed}", options.steps, seed)
            models = oracles(run, options.steps, seed)
            for method in best:
                found = measured(run, method, settings[method], models)
                seeds[method].append(found["after"])
            for which in ("oracle", "floor"):
                seeds[which].append(found[which])
        spread = {which: [told(each, field) for field in FIELDS] for which, each in seeds.items()}
        for which, each in spread.items():
            print(f"{which:<16}" + "  ".join("{:.3f} ({:.3f} to {:.3f})".format(*values) for values in each))
    shown = {
        "steps": options.steps, "request_steps": STEPS,
        "goal": {"forget_probability": FORGET, "retain_probability": RETAIN, "retain_kl_in_floors": FACTOR},
        "rows": rows, "settings": settings, "meets": best, "seeds": seeds, "grid": grid,
    }  # fmt: skip
    (options.out / "unlearn.json").write_text(json.dumps(shown, indent=1) + "\n")
    (options.out / "unlearn.svg").write_text(picture(rows, best, FORGET, RETAIN, FACTOR * rows["floor"]["retain_kl"]))


def told(rows: list[Row], field: str) -> tuple[float, float, float]:
    """Mean, least and most."""
    values = [row.get(field, 0.0) for row in rows]
    return mean(values), min(values), max(values)


if __name__ == "__main__":
    main()
