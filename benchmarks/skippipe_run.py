"""SkipPipe for real: the seconds of an iteration on slow links beside those that its plan foretells.

    python benchmarks/skippipe_run.py --out benchmarks/results              # 10 minutes on two idle cores
    python benchmarks/skippipe_run.py --rounds 1 --steps 15 --out /tmp/x    # to try the script

Eight processes in four stages train a Llama of 1.6 M parameters with eight blocks; every message between them arrives
as late as its link is slow, 20 to 100 ms, drawn from a seed (links are shaped; gradients of replicas, which lie beside
each other, are not). The times of the ops are measured first, in a run of its own, and go into the network file with
the matrix of links, so that the plan is for what really runs. Then runs without and with 25 % of the stages skipped
take turns on the same number of microbatches. An iteration is the time from one commit to the next: the median of a
run's steps without its first five. Model FLOPs, of the layers that a microbatch visits, and memory are those of
metrics.jsonl; the peak is that of all cores (utilisation.py). Writes skippipe-run.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.runs import command, finished, llama, llama_config, op_seconds  # noqa: E402
from benchmarks.skippipe_report import results_table  # noqa: E402
from benchmarks.utilisation import Peak, cpu_peak, middle, of_run  # noqa: E402
from jobs.config import TrainConfig  # noqa: E402
from jobs.plan import layer_costs  # noqa: E402
from jobs.routes import Routes  # noqa: E402
from launch.forkserver import ForkServer  # noqa: E402
from pipeline.model.layered import LayeredModel  # noqa: E402

STAGES = [[0, 1], [2, 3], [4, 5], [6, 7]]
SKIPS = {"full": 0.0, "25 % skipped": 0.25}
MICROBATCHES, SLOTS, BLOCKS, SIZE, LENGTH = 16, 3, 8, 1, 64
WARM = 5


def links(seed: int, nodes: int) -> list[list[float]]:
    """Seconds from node to node: 20 to 100 ms, the same both ways."""
    drawn = np.random.default_rng(seed).uniform(0.02, 0.1, size=(nodes, nodes))
    hop = np.triu(drawn, 1)
    return (hop + hop.T).round(4).tolist()


def write_network(
    path: Path, hops: list[list[float]], stages: list[list[int]], slots: int, times: dict[str, float]
) -> Path:
    """A network file with the times of the ops; until they are known, with a guess."""
    times = times or {"forward_s": 0.003, "backward_s": 0.006, "loss_s": 0.002}
    values = {"hop_s": hops, "stages": stages, "memory_slots": slots, "contention": False, "gap_s": 0.0, **times}
    path.write_text(json.dumps(values))
    return path


def op_times(out: Path, blocks: int) -> dict[str, float]:
    """Medians of the ops of a run's recorded iteration, as a network file has them."""
    head, ops = f"{blocks + 1}:{blocks + 2}", op_seconds(out)
    forward, backward = (
        statistics.median(s for (k, span), each in ops.items() if k == kind and span != head for s in each)
        for kind in "FB"
    )
    loss = statistics.median(ops["F", head]) + statistics.median(ops["B", head])
    return {"forward_s": forward, "backward_s": backward, "loss_s": loss}


def arguments(folder: Path, network: Path, skip: float, steps: int, seed: int) -> list[str]:
    return [
        "--workers", "8", "--scheduler", "skippipe", "--skip", str(skip), "--network", str(network),
        "--model", str(llama(folder, BLOCKS)), "--tokenizer", "bytes", "--max-tokens", "400000",
        "--sequence-length", str(LENGTH), "--microbatches", str(MICROBATCHES), "--microbatch-size", str(SIZE),
        "--steps", str(steps), "--threads", "1", "--evaluate-every", "0", "--evaluate-samples", "16",
        "--checkpoint-every", "0", "--sample-tokens", "0", "--seed", str(seed),
    ]  # fmt: skip


def measured(
    forkserver: ForkServer, folder: Path, network: Path, skip: float, steps: int, seed: int, peak: Peak
) -> dict[str, Any]:
    """One run: its iteration, the last loss, model FLOP/s and memory, and the seconds of its ops."""
    with finished(forkserver, folder, arguments(folder, network, skip, steps, seed)) as (records, out):
        steps_s = records.steps_s[WARM:]
        return {
            "iteration_s": statistics.median(steps_s), "least_s": min(steps_s), "most_s": max(steps_s),
            "steps": len(steps_s), "loss": records.metrics[-1]["loss"], "ops": op_times(out, BLOCKS),
            **of_run(records.metrics, peak, WARM),
        }  # fmt: skip


def foretold(network: Path, skip: float, seed: int) -> dict[str, float]:
    """The plan that such a run trains by."""
    settings = TrainConfig(
        workers=8, scheduler="skippipe", skip=skip, network=network, microbatches=MICROBATCHES,
        microbatch_size=SIZE, sequence_length=LENGTH, seed=seed,
    )  # fmt: skip
    plan = Routes(settings, layer_costs(LayeredModel(llama_config(BLOCKS)), LENGTH), 16, 0).plan
    return {"simulated_s": plan.iteration_s, "bound_s": plan.lower_bound_s}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per arm: medians of the rounds, and measured over simulated; and how much less time skipping takes, by round."""
    found: dict[str, Any] = {}
    for arm in SKIPS:
        same = [run for run in runs if run["arm"] == arm]
        ratios = [run["iteration_s"] / run["simulated_s"] for run in same]
        found[arm] = {
            "iteration_s": statistics.median(run["iteration_s"] for run in same),
            "simulated_s": same[0]["simulated_s"], "bound_s": same[0]["bound_s"],
            "ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)],
            **middle(same),
        }  # fmt: skip
    by_round: dict[int, dict[str, float]] = {}
    for run in runs:
        by_round.setdefault(run["round"], {})[run["arm"]] = run["iteration_s"]
    full, skipped = SKIPS
    saved = [1 - each[skipped] / each[full] for each in by_round.values() if len(each) == 2]
    found["less_time"] = {"median": statistics.median(saved), "least": min(saved), "most": max(saved)}
    found["times_as_fast"] = found[full]["iteration_s"] / found[skipped]["iteration_s"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the links, the plans and the runs")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    forkserver, console, runs = ForkServer(command), Console(stderr=True), list[dict[str, Any]]()
    peak = cpu_peak(8)
    with tempfile.TemporaryDirectory() as name, Progress(console=console) as progress:
        folder, hops = Path(name), links(options.seed, 8)
        task = progress.add_task("times of the ops", total=1 + options.rounds * len(SKIPS))
        network = write_network(folder / "network.json", hops, STAGES, SLOTS, {})
        times = measured(forkserver, folder, network, 0.0, 20, options.seed, peak)["ops"]
        write_network(network, hops, STAGES, SLOTS, times)
        plans = {arm: foretold(network, skip, options.seed) for arm, skip in SKIPS.items()}
        progress.advance(task)
        for turn in range(options.rounds):
            for arm in [*SKIPS] if turn % 2 == 0 else [*reversed(SKIPS)]:
                progress.update(task, description=f"round {turn + 1}, {arm}")
                found = measured(forkserver, folder, network, SKIPS[arm], options.steps, options.seed, peak)
                runs.append({"round": turn, "arm": arm, **found, **plans[arm]})
                progress.advance(task)
    summary = summarise(runs)
    table = results_table(
        "8 processes, 4 stages, links of 20 to 100 ms: seconds of an iteration",
        "arm", "measured", "simulated", "measured / simulated", "of rounds", "bound",
    )  # fmt: skip
    for arm in SKIPS:
        each = summary[arm]
        table.add_row(
            arm, f"{each['iteration_s']:.3f}", f"{each['simulated_s']:.3f}", f"{each['ratio']:.3f}",
            "{:.3f}-{:.3f}".format(*each["ratios"]), f"{each['bound_s']:.3f}",
        )  # fmt: skip
    less = summary["less_time"]
    Console(width=120).print(
        table,
        f"skipping is {summary['times_as_fast']:.3f} times as fast and takes {less['median']:.1%} less time "
        f"({less['least']:.1%} to {less['most']:.1%} by round)",
    )
    options.out.mkdir(parents=True, exist_ok=True)
    found = {
        "command": ["benchmarks/skippipe_run.py", *sys.argv[1:]], "cores": os.cpu_count(), "hop_s": hops,
        "stages": STAGES, "ops": times, **peak, "summary": summary, "runs": runs,
    }  # fmt: skip
    (options.out / "skippipe-run.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
