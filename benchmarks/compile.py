"""What --compile gains and what it costs: real runs as they are and compiled, turn by turn.

    python benchmarks/compile.py --rounds 3 --out benchmarks/results      # a quarter of an hour on two cores

Each run trains a Llama of 8 blocks on two workers with one thread each, and loses a worker to SIGKILL in the middle. Of
a run: tokens per second (the median step before the loss), seconds from its start to its first commit, and from the
kill to the next commit. The first compiled run of each case begins with an empty TORCHINDUCTOR_CACHE_DIR, and is told
apart; the others find what it has compiled. Losses at the last step are shown, since compiled sums round elsewhere.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # else recovery.py here would hide the package of that name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.runs import Records, command, finished, shown
from launch.forkserver import ForkServer
from pipeline.model.compiled import prepare
from pipeline.model.weights import preset

STEPS, KILL = 24, 16
CASES: dict[str, tuple[str, ...]] = {
    "float32": (),
    "float32, recompute": ("--recompute",),
    "float32, roundpipe": ("--scheduler", "roundpipe"),
    "bfloat16": ("--dtype", "bfloat16"),
}
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 4}  # fmt: skip


def model(folder: Path) -> Path:
    """A config.json of 6 million parameters and an alphabet of bytes."""
    config = preset("llama-2m", vocab_size=258)
    for name, value in SHAPE.items():
        setattr(config, name, value)
    config.head_dim = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    (path := folder / "model.json").write_text(config.to_json_string(use_diff=False))
    return path


def told(records: Records) -> dict[str, float]:
    """Of one run."""
    started = next(event["time"] for event in records.events if event["event"] == "started")
    fault = next(event["time"] for event in records.events if event["event"] == "fault")
    return {
        "tokens_per_s": statistics.median(m["tokens_per_s"] for m in records.metrics[2 : KILL - 2]),
        "first_commit_s": records.times[0] - started,
        "kill_to_commit_s": next(time for time in records.times if time > fault) - fault,
        "loss": records.metrics[-1]["loss"],
    }


def measure(rounds: int, folder: Path, advance: Callable[[float], None]) -> dict[str, Any]:
    """Every case as it is and compiled, by turns."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    prepare()
    forkserver, done, found = ForkServer(command), 0, dict[str, dict[str, Any]]()
    common = ["--model", str(model(folder)), "--tokenizer", "bytes", "--data", "stdlib", "--max-tokens", "400000",
              "--sequence-length", "256", "--microbatch-size", "2", "--microbatches", "4", "--steps", str(STEPS),
              "--workers", "2", "--threads", "1", "--evaluate-every", "0", "--sample-tokens", "0",
              "--checkpoint-every", "8"]  # fmt: skip
    try:
        for number in range(rounds + 1):  # the first round fills the cache
            for case, flags in CASES.items():
                kill = f"kill:worker=1,step={KILL},at=backward"
                for how in ("eager", "compiled"):
                    more = ["--compile"] if how == "compiled" else []
                    with finished(forkserver, folder, [*common, *flags, *more, "--inject", kill]) as (records, _):
                        run = told(records)
                    rows = found.setdefault(case, {"eager": [], "compiled": [], "empty_cache": []})
                    if number:
                        rows[how].append(run)
                    elif how == "compiled":
                        rows["empty_cache"].append(run)
                    done += 1
                    advance(done)
    finally:
        forkserver.close()
    return {"torch": torch.__version__, "shape": SHAPE, "load": os.getloadavg(), "cases": found, "table": table(found)}


def table(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians, and the ratio of compiled to eager of each round."""
    rows = list[dict[str, Any]]()
    for case, runs in found.items():
        ratios = [b["tokens_per_s"] / a["tokens_per_s"] for a, b in zip(runs["eager"], runs["compiled"], strict=True)]
        row: dict[str, Any] = {
            "case": case,
            "speed_up": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
        }
        for how in ("eager", "compiled", "empty_cache"):
            row[how] = {name: statistics.median(run[name] for run in runs[how]) for name in runs[how][0]}
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for compile.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:

        def act(advance: Callable[[float], None]) -> dict[str, Any]:
            return measure(options.rounds, Path(folder), advance)

        total = 2 * len(CASES) * (options.rounds + 1)
        shown("eager and compiled", total, act, options.out, "compile.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
