"""Every set of one or two lost workers of six, injected: does the run survive as the table says, and as fast?

    python benchmarks/loss_table.py --out benchmarks/results

`unbroken plan --losses 2` says for each set what becomes of the run. Here each set is lost for real, by SIGKILL at one
step, and the steps after that are timed beside those before, and beside those of a run that begins with as many. Six
workers have two cores here, so each of them computes and then sleeps, `--slow` times as long in all: that stands for a
device of its own, which the others do not slow down.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.elastic import Machines  # noqa: E402
from benchmarks.runs import command, shown  # noqa: E402
from jobs.config import TrainConfig  # noqa: E402
from launch.config import config_from_dict  # noqa: E402
from launch.forkserver import ForkServer  # noqa: E402
from launch.loss_plan import Outcome, loss_table  # noqa: E402
from launch.words import given  # noqa: E402
from pipeline.model.layered import LayeredModel  # noqa: E402
from pipeline.model.weights import read_config  # noqa: E402

WORKERS = 6
SHAPE = """model_type = "llama"
hidden_size = 64
intermediate_size = 172
num_hidden_layers = 10
num_attention_heads = 4
num_key_value_heads = 4
"""
COMMON = ["--sequence-length", "64", "--snapshot", "neighbour", "--recovery", "exact"]
RUN = [
    "--tokenizer", "bytes", "--max-tokens", "400000", "--evaluate-every", "0", "--sample-tokens", "0", "--threads", "1",
    "--microbatches", "4", "--microbatch-size", "1", "--cooldown", "3600", "--no-shift", "--checkpoint-every", "5",
    "--steps", "100000", *COMMON,
]  # fmt: skip
LOSS, AFTER = 7, 7


def table(model: Path) -> list[Outcome]:
    """What `unbroken plan --losses 2` says, for these settings."""
    flags = given(TrainConfig, [*RUN, "--model", str(model), "--workers", str(WORKERS)])
    return loss_table(config_from_dict(TrainConfig, flags), LayeredModel(read_config(model)), 2)


def inject(forkserver: ForkServer, model: Path, lost: tuple[int, ...], slow: float) -> dict[str, Any]:
    """Lose a set in a run: seconds of a step before and after, and how the run went on."""
    faults = [f"slow:worker={worker},step=1,factor={slow:g}" for worker in range(WORKERS)]
    faults += [f"kill:worker={worker},step={LOSS},at=commit" for worker in lost]
    with tempfile.TemporaryDirectory(prefix="losses-") as folder:
        flags = [*RUN, "--model", str(model), "--workers", f"1:{WORKERS}", "--inject", ";".join(faults)]
        with Machines(forkserver, Path(folder), flags) as run:
            run.start(0)

            def views() -> list[int]:
                return [line["view"] for line in run.lines("ledger")]

            def smaller() -> int:
                resized = [e for e in run.lines("events") if e["event"] == "resized"]
                if not resized or resized[-1]["workers"] > WORKERS - len(lost):
                    return 0
                return views().count(resized[-1]["view"])

            run.until(lambda: smaller() >= AFTER, 240)
            run.stop()
            ledger, events = run.lines("ledger"), run.lines("events")
    last = [e for e in events if e["event"] == "resized"][-1]
    before = [line["time"] for line in ledger if line["view"] == 1][3:]
    after = [line["time"] for line in ledger if line["view"] == last["view"]][2:]
    usual, now = (statistics.median(b - a for a, b in pairwise(times)) for times in (before, after))
    remedies = sorted({e["remedy"] for e in events if e["event"] == "shrunk"})
    return {"step_s": usual, "after_s": now, "slower": now / usual, "remedies": remedies, "layers": last["layers"]}


def fresh(forkserver: ForkServer, model: Path, workers: int, slow: float) -> float:
    """Seconds of a step of a run that begins with so many workers."""
    faults = ";".join(f"slow:worker={worker},step=1,factor={slow:g}" for worker in range(workers))
    with tempfile.TemporaryDirectory(prefix="losses-") as folder:
        flags = [*RUN, "--model", str(model), "--workers", str(workers), "--inject", faults]
        with Machines(forkserver, Path(folder), flags) as run:
            run.start(0)
            run.until(lambda: len(run.lines("ledger")) >= LOSS + AFTER, 240)
            run.stop()
            times = [line["time"] for line in run.lines("ledger")][4:]
    return statistics.median(b - a for a, b in pairwise(times))


def measure(slow: float, sets: int, done: Callable[[float], None]) -> dict[str, Any]:
    """All sets, one after the other."""
    forkserver, found = ForkServer(command), list[dict[str, Any]]()
    try:
        with tempfile.TemporaryDirectory(prefix="losses-") as folder:
            model = Path(folder) / "model.toml"
            model.write_text(SHAPE)
            for row in table(model)[:sets]:
                told = {"lost": row.lost, "survives": not row.why, "predicted": round(row.slower, 4),
                        "remedies_told": row.remedies}  # fmt: skip
                found.append({**told, **inject(forkserver, model, row.lost, slow)})
                done(len(found))
            anew = {n: fresh(forkserver, model, WORKERS - n, slow) for n in {len(row["lost"]) for row in found}}
    finally:
        forkserver.close()
    for row in found:
        row["measured / predicted"] = round(row["slower"] / row["predicted"], 3)
        row["speed / started anew"] = round(anew[len(row["lost"])] / row["after_s"], 3)
    off = sorted(abs(row["measured / predicted"] - 1) for row in found)
    return {
        "sets": found, "slow": slow, "survived": len(found), "called survivable": sum(r["survives"] for r in found),
        "off by": {"median": round(statistics.median(off), 3), "most": round(off[-1], 3)},
        "speed / started anew": {
            n: round(statistics.median(r["speed / started anew"] for r in found if len(r["lost"]) == n), 3)
            for n in anew
        },
        "within 10 %": sum(each <= 0.1 for each in off),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", type=float, default=6.0)
    parser.add_argument("--sets", type=int, default=21, help="the first so many")
    parser.add_argument("--out", type=Path, help="folder for loss-table.json")
    options = parser.parse_args()
    shown("sets", options.sets, partial(measure, options.slow, options.sets), options.out, "loss-table.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
