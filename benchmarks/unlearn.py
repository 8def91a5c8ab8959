"""20 questions about one author are forgotten, 180 about others are kept, by each of some methods.

Each method on a copy of one run, beside the exact replay, which is the oracle.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.unlearn_runs import FORGOTTEN, copied, divergence, material, probabilities, trained, unbroken

METHODS = {
    "npo": ("--lr", "5e-4", "--steps", "30", "--alpha", "3"),
    "simnpo": ("--lr", "5e-4", "--steps", "30"),
    "grad_diff": ("--lr", "3e-4", "--steps", "30", "--alpha", "3"),
    "kl_min": ("--lr", "3e-4", "--steps", "30", "--alpha", "3"),
    "wga": ("--lr", "3e-4", "--steps", "30", "--alpha", "3"),
    "dpo": ("--lr", "5e-4", "--steps", "30", "--alpha", "3"),
    "undial": ("--lr", "5e-4", "--steps", "30", "--alpha", "3"),
}
FIELDS = ("forget probability", "retain probability", "KL to the oracle, forget", "KL to the oracle, retain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = trained(folder, options.steps)
        rows, items = material(run)
        oracle = folder / "oracle"
        unbroken("replay", run, "--since", 1, "--without", FORGOTTEN, "--out", oracle, "--json")
        models = {"before": run / "model", "oracle": oracle / "model"}
        for method in options.methods.split(","):
            copy = copied(run, f"by-{method}")
            asked = ("--forget", FORGOTTEN, "--method", method, *METHODS[method])
            unbroken("unlearn", copy, *asked, "--evaluate-every", 0, "--checkpoint-every", 0, "--json")
            models[method] = copy / "model"
        table = {}
        for which, model in models.items():
            kl = [divergence(model, models["oracle"], rows, items, kind) for kind in ("forget", "retain")]
            table[which] = dict(zip(FIELDS, (*probabilities(model, rows, items), *kl), strict=True))
            print(f"{which:<24}" + "  ".join(f"{table[which][field]:8.4f}" for field in FIELDS), flush=True)
    settings = {method: " ".join(METHODS[method]) for method in options.methods.split(",")}
    (options.out / "unlearn.json").write_text(
        json.dumps({"steps": options.steps, "rows": table, "settings": settings}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
