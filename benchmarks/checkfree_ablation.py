"""What a lost stage is filled with, and whether it matters: the neighbours' mean, one neighbour, or random weights.

    nice python benchmarks/checkfree_ablation.py --out benchmarks/results    # five seeds: an hour
    python benchmarks/checkfree_ablation.py --seeds 1 --steps 40 --out /tmp/x   # to try the script

The model and the data of checkfree.py, but four times the batch, so that every stage comes to learn something of its
own, and about 18 losses in each run, so that what a stage is filled with can be told from chance. They hit the second
and the fourth block stage, which have no neighbour in common that could be lost in the same moment. Only losses are
compared, not times, so other work on the machine does no harm. All arms of a seed meet the same failures. Writes
checkfree-ablation.json after every run, and goes on from it where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.checkfree import WORKERS, run  # noqa: E402
from benchmarks.checkfree_report import spread  # noqa: E402
from benchmarks.runs import command, earlier_runs  # noqa: E402
from benchmarks.utilisation import cpu_peak  # noqa: E402
from launch.forkserver import ForkServer  # noqa: E402

ARMS = ("none", "checkfree", "random", "copy")
MORE = ("--microbatch-size", "16", "--evaluate-samples", "512")  # the last word counts
STAGES = (2, 4)


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out loss at the end, paired by seed: of each arm less that of none, and of random less the mean's."""
    end = {(each["arm"], each["seed"]): each["curve"][-1][2] for each in runs}
    seeds = [s for s in sorted({seed for _, seed in end}) if all((arm, s) in end for arm in ARMS)]
    pairs = [(arm, "none") for arm in ARMS[1:]] + [("copy", "checkfree"), ("random", "checkfree")]
    return {
        f"{a} - {b}": spread([end[a, s] - end[b, s] for s in seeds]) for a, b in pairs if seeds
    } | {"faults": {arm: [each["faults"] for each in runs if each["arm"] == arm] for arm in ARMS}}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--p", type=float, default=0.018, help="losses per step and stage")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.checkpoint_every = 0
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "checkfree-ablation.json"
    settings = {"steps": options.steps, "p": options.p, "every": options.every}
    runs = earlier_runs(path, settings)
    done = {(each["arm"], each["seed"]) for each in runs}
    jobs = [
        {"arm": arm, "recovery": arm, "seed": seed, "more": MORE,
         "inject": "" if arm == "none" else ";".join(f"rate:p={options.p},stages={s},seed={seed}" for s in STAGES)}
        for arms in (ARMS[:3], ARMS[3:]) for seed in range(options.seeds) for arm in arms if (arm, seed) not in done
    ]  # fmt: skip
    forkserver, console, peak = ForkServer(command), Console(stderr=True), cpu_peak(WORKERS)
    with tempfile.TemporaryDirectory() as folder:
        for job in track(jobs, "training", console=console):
            runs.append({**job, **run(forkserver, Path(folder), job, options, peak)})
            found = {"command": ["benchmarks/checkfree_ablation.py", *sys.argv[1:]], "settings": settings,
                     "summary": summarise(runs), "runs": runs}  # fmt: skip
            path.write_text(json.dumps(found) + "\n")
    table = Table("held-out loss at the end", "difference", "seeds")
    for name, value in found["summary"].items():
        if name != "faults":
            table.add_row(name, f"{value['mean']:+.4f} ± {value['error']:.4f}", str(value["count"]))
    Console().print(table, f"stages lost per run: {found['summary']['faults']['checkfree']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
