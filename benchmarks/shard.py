"""What a replica keeps and takes with the optimizer's state shared (--shard-optimizer), beside the formula.

    python benchmarks/shard.py --out benchmarks/results
    python benchmarks/shard.py --quick

One stage of a Llama on 1, 2 and 4 replicas, in real processes; each with all moments, with its share of them, and with
the share of the one before it as well. Bytes a trained parameter: *kept* counts the tensors from step to step, against
the formula of pipeline/state/shard.py: 4 weights + 4 gradient + 8 k/d moments, each kept by k of d; *at the vote* is
with the gradient that is set aside for it. *Rest* and *peak* are private memory (RssAnon between two steps, VmHWM less
RssFile and RssShmem) above what the process took before it had anything, with a malloc that hides nothing, as in
memory.py. Losses and norms must be the same bits. *Sums* asks what gloo has for ZeRO's first half: whether its
reduce-scatter gives the bits of its all-reduce, and what both, and an all-gather, take of the gradient of one worker.
Writes shard.json; the verdict is that no worker keeps more than the formula and SLACK.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# The packages come before scripts beside this one: recovery is both.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from engine import arguments
from engine_ours import WorkJob, join, leave, make_config, make_view
from engine_peers import Work, llama, reset_peak
from memory import MALLOPT, TINY, private, status, trained
from rich.console import Console
from rich.table import Table
from transformers.utils import logging
from utilisation import Peak, cpu_peak, memory, reached, step_flops

from launch.forkserver import ForkServer
from pipeline.model.weights import read_config
from pipeline.runtime.worker import Worker
from pipeline.state.sharded import ShardedState

SLACK = 0.02
"""Share by which more than the formula may be kept: blocks are whole."""
SIZE = Work(hidden=256, intermediate=688, layers=8, heads=4, vocabulary=4096, sequence=256, microbatches=4, batch=2)
CASES = ((1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2))
"""(replicas, by how many each share is kept; 0: all is kept by all)."""
REPEATS = 5


# ---- one worker ----


def entry(payload: dict[str, Any]) -> int:
    """What a forked worker does."""
    return leave(payload, train)


@dataclass
class AtVote:
    """A probe that counts what is set aside for a step while it is voted on."""

    worker: Worker
    slowdown: float = 1.0
    aside: int = 0

    def __call__(self, point: str, step: int) -> None:
        if point == "commit":
            states = (state for state in self.worker.store.states.values() if isinstance(state, ShardedState))
            self.aside = sum(4 * state._aside.numel() for state in states if state._aside is not None)


def train(payload: dict[str, Any]) -> dict[str, Any]:
    """Run all steps, and then the sums."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    assert all(libc.mallopt(option, value) == 1 for option, value in MALLOPT.items())
    job = WorkJob(Work(**payload["work"]))
    before = private()
    worker, schedule = join(payload)
    found: dict[str, Any] = {"loss": [], "norm": [], "seconds": []}
    worker.probe = probe = AtVote(worker)
    for number in range(payload["warmup"] + payload["steps"]):
        if number == payload["warmup"]:
            found["rest"] = private() - before
            reset_peak()
        worker.gather({})
        began = time.perf_counter()
        result = worker.run(schedule, job, number)
        found["seconds"].append(time.perf_counter() - began)
        found["loss"].append(result.loss)
        found["norm"].append(result.grad_norm)
    found["resident"] = status("VmHWM")
    found["peak"] = status("VmHWM") - status("RssFile") - status("RssShmem") - before
    states = worker.store.states.values()
    found["parameters"] = sum(state.size for state in states)
    found["weights"] = sum(4 * weight.numel() for state in states for weight in state.weights().values())
    found["gradient"] = sum(4 * state.gradient.numel() for state in states)
    found["moments"] = sum(4 * tensor.numel() for state in states for tensor in kept(state))
    found["aside"] = probe.aside
    found["sums"] = sums(worker)
    worker.gather({})  # nobody leaves while another still trains
    worker.transport.close()
    return found


def kept(state: Any) -> list[torch.Tensor]:
    """The moments that lie in memory."""
    if isinstance(state, ShardedState):
        return list(state._kept.values())
    return [state.moments(name)[kind] for name in state.parameters for kind in ("exp_avg", "exp_avg_sq")]


def sums(worker: Worker) -> dict[str, Any]:
    """What gloo has, on the gradient of this worker."""
    (part,) = worker.store.gradients
    if (group := worker.reducer.group(part)) is None:
        return {}
    backend: Any = group
    ranks = int(backend.size())
    size = worker.store.gradients[part].numel() // ranks * ranks
    mine = torch.randn(size, generator=torch.Generator().manual_seed(worker.id))
    seconds: dict[str, list[float]] = {"all_reduce": [], "reduce_scatter": [], "all_gather": []}
    found: dict[str, Any] = {}
    for _ in range(REPEATS):
        whole, piece, spread = mine.clone(), torch.empty(size // ranks), torch.empty(size)
        try:
            timed(worker, seconds["all_reduce"], lambda: backend.allreduce([whole]).wait())  # noqa: B023
            timed(worker, seconds["reduce_scatter"], lambda: backend._reduce_scatter_base(piece, mine).wait())  # noqa: B023
            timed(worker, seconds["all_gather"], lambda: backend._allgather_base(spread, piece).wait())  # noqa: B023
        except RuntimeError as error:
            return {"error": str(error).splitlines()[0]}
        found["same_bits"] = torch.equal(whole.chunk(ranks)[int(backend.rank())], piece)
    return {**found, **{name: statistics.median(each) for name, each in seconds.items()}}


def timed(worker: Worker, seconds: list[float], collective: Any) -> None:
    """Once everybody is there."""
    worker.gather({})
    began = time.perf_counter()
    collective()
    seconds.append(time.perf_counter() - began)


# ---- all ----


def run(
    replicas: int, keepers: int, work: Work, options: argparse.Namespace, forkserver: ForkServer, peak: Peak
) -> dict[str, Any]:
    """The figures of one case, by worker."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama(work).save_pretrained(folder / "model-config")
        config = make_config("one_f_one_b", work, 1, options.warmup + options.steps, folder, options.deadline)
        config = replace(
            config, workers=replicas, replicas=replicas, shard_optimizer=keepers > 0,
            snapshot="neighbour" if keepers == 2 else "off",
        )  # fmt: skip
        config.validate()
        view, layout = make_view(config)
        found: Any = trained(folder, work, view, layout, "straight", options, forkserver)
        flops = step_flops(read_config(folder / "model-config"), work.microbatches, work.batch, work.sequence)
    steps = zip(*(row["seconds"][options.warmup :] for row in found), strict=True)
    speed = reached(flops, statistics.median(map(max, steps)), peak)
    moments = 8 * (keepers / replicas if keepers else 1)
    return {
        "replicas": replicas, "keepers": keepers, "formula": 8 + moments,
        "formula_at_vote": 8 + moments * (1.5 if keepers else 1), **speed,
        **memory([row["resident"] for row in found]), "by_worker": found,
    }  # fmt: skip


def a_parameter(row: dict[str, Any], *names: str) -> float:
    """Bytes."""
    return sum(row[name] for name in names) / row["parameters"]


def table(runs: list[dict[str, Any]]) -> Table:
    """The fullest worker of each case."""
    found = Table(title="Bytes a trained parameter, of the fullest replica")
    for head in ("replicas", "each share kept by", "formula", "kept", "at the vote", "rest", "peak", "step, s"):
        found.add_column(head, justify="right")
    for each in runs:
        rows = each["by_worker"]
        most = (
            max(a_parameter(row, *names) for row in rows)
            for names in (("weights", "gradient", "moments"), ("weights", "gradient", "moments", "aside"),
                          ("rest",), ("peak",))
        )  # fmt: skip
        seconds = statistics.median(s for row in rows for s in row["seconds"][1:])
        found.add_row(
            str(each["replicas"]), str(each["keepers"] or "all"), f"{each['formula']:.2f}",
            *(f"{value:.2f}" for value in most), f"{seconds:.3f}",
        )  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the timed ones")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds that one run may take")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--out", type=Path, help="folder for shard.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    forkserver = ForkServer(entry)  # before anything starts threads
    work = TINY if options.quick else SIZE
    try:
        peaks = {replicas: cpu_peak(replicas) for replicas, _ in CASES}
        runs = [run(replicas, keepers, work, options, forkserver, peaks[replicas]) for replicas, keepers in CASES]
    finally:
        forkserver.close()
    rows = [(each, row) for each in runs for row in each["by_worker"]]
    over = max(a_parameter(row, "weights", "gradient", "moments") / each["formula"] for each, row in rows) - 1
    curves = {
        replicas: {json.dumps([row["loss"], row["norm"]]) for each, row in rows if each["replicas"] == replicas}
        for replicas in {each["replicas"] for each in runs}
    }
    same = all(len(found) == 1 for found in curves.values())
    holds = over <= SLACK and same
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(runs))
    for each in runs:
        if (found := each["by_worker"][0]["sums"]) and each["keepers"] == 1:
            console.print(f"gloo, {each['replicas']} replicas: {found}")
    console.print(f"kept above the formula: {100 * over:.2f} %; losses and norms are the same bits: {same}")
    if options.out is not None:
        facts = {
            "command": shlex.join(["python", "benchmarks/shard.py", *arguments(sys.argv[1:])]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__, "python": platform.python_version(), "work": asdict(work),
        }  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        whole = {"about": facts, "above_formula": over, "same_bits": same, "runs": runs}
        (options.out / "shard.json").write_text(json.dumps(whole, indent=1) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
