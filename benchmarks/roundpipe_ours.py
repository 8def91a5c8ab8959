"""RoundPipe's pool on the work of engine_peers.py: the same Llama and tokens, the same AdamW and clipping.

    python benchmarks/roundpipe_ours.py --workers 2 --steps 4 --warmup 1 --json
    python benchmarks/roundpipe_ours.py --workers 4 --slow 4 4 4 16 --rule round_robin     # a slow worker, by sleeping

This process is the host: it owns the state, forks the workers from a forkserver, and prints one JSON line of the form
that the peers print. Memory is told in two parts: the host store, which all share, and what each worker has for itself
alone (USS, sampled), less what it had before its first unit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# The packages come before scripts beside this one: recovery is both.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from engine_ours import WorkJob, alone, make_config
from engine_peers import Work, llama, parse
from utilisation import gpu_peak

from jobs.config import TrainConfig
from jobs.plan import layer_costs
from jobs.pool_engine import PoolEngine
from jobs.rounds import plan_rounds
from jobs.train import Trainer
from launch.forkserver import ForkServer
from launch.pool_worker import pool_worker
from launch.round_train import hosting, make_layout
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import read_config
from pipeline.runtime.peak_memory import PEAK_BYTES
from pipeline.state.host_store import HostStore, store_path

SAMPLE_S = 1.0  # a look costs the process that is looked at some milliseconds


@dataclass
class PoolJob(WorkJob):
    """With what a trainer asks beside."""

    limit: int = 0

    def next_sample(self, step: int) -> int:
        """The first sample of a step."""
        return step * self.work.microbatches * self.work.batch

    def sources(self, step: int) -> dict[str, int]:
        """One source, which is not told."""
        return {}

    @property
    def carried(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def prepare(self, engine: Any, step: int) -> None:
        """All is there."""

    def committed(self, step: int, means: Any) -> None:
        """Nothing follows from it."""


def jobs(config: TrainConfig, step: int, sample: int) -> dict[str, Any]:
    """The work that lies in the run's folder."""
    work = Work(**json.loads((config.out / "work.json").read_text()))
    return {"train": PoolJob(work)}


def write_work(work: Work, out: Path) -> None:
    """Put the work where workers look for it."""
    (out / "work.json").write_text(json.dumps(asdict(work)))


def entry(payload: dict[str, Any]) -> int:
    """What a forked worker does."""
    return pool_worker(payload, jobs)  # type: ignore[arg-type]


class Memory(threading.Thread):
    """Samples what processes have for themselves alone: `most[pid]` bytes, `first[pid]` when first seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.pids: list[int] = []
        self.first: dict[int, int] = {}
        self.most: dict[int, int] = {}
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            for pid in list(self.pids):
                try:
                    now = psutil.Process(pid).memory_full_info().uss
                except psutil.Error:
                    continue
                self.first.setdefault(pid, now)
                self.most[pid] = max(now, self.most.get(pid, 0))

    def close(self) -> None:
        """Stop sampling."""
        self._over.set()
        self.join()


def run(work: Work, options: argparse.Namespace, forkserver: ForkServer) -> dict[str, Any]:
    """Train with a pool and gather its figures."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        llama(work).save_pretrained(out / "model-config")
        write_work(work, out)
        steps = options.steps + options.warmup
        slow = ";".join(f"slow:worker={w},step=0,at=order,factor={f:g}" for w, f in enumerate(options.slow or ()))
        config = replace(
            make_config("gpipe", work, options.workers, steps, out, options.deadline), scheduler="roundpipe",
            rule=options.rule, optimizer_async=options.behind, at_once=options.at_once, inject=slow,
            span_mib=options.span_mib,
        )  # fmt: skip
        config.validate()
        model = LayeredModel(read_config(out / "model-config"))
        rounds = plan_rounds(config, model, layer_costs(model, work.sequence), work.batch)
        store = HostStore.create(make_layout(config, model, rounds.cut, config.workers), store_path(out))
        memory, job = Memory(), PoolJob(work)
        losses: list[float] = []
        most: dict[str, int] = {}
        seconds: list[float] = []
        events: list[dict[str, Any]] = []

        def report(record: dict[str, Any]) -> None:
            if record["kind"] == "step":
                losses.append(record["loss"])
                most.update({name: max(record[name], most.get(name, 0)) for name in PEAK_BYTES if name in record})

        def event(name: str, **fields: Any) -> None:
            events.append({"event": name, **fields})

        try:
            with hosting(config, store, rounds, forkserver, event, lambda _: options.device) as (optimizer, pool):
                optimizer.initialise(0, out / "model-config")
                engine = PoolEngine(
                    optimizer, pool, rounds.cut, rounds.row, {"train": job, "evaluate": job},  # type: ignore[dict-item]
                    config.round_size, config.deadline,
                )  # fmt: skip
                reports = SimpleNamespace(put=report, save_ledger=lambda step, view: "")
                trainer = Trainer(config, engine, job, "", reports, bool)  # type: ignore[arg-type]
                pool.open(config.workers)
                memory.pids = [member.pid for member in pool.members.values()]
                memory.start()
                for _ in range(steps):
                    began = time.perf_counter()
                    trainer.one_step(record=False)
                    seconds.append(time.perf_counter() - began)
                optimizer.drain(options.deadline)
                memory.close()
                speeds = pool.dispatcher.speeds
        finally:
            store.close()
    timed = seconds[options.warmup :]
    cut = rounds.cut
    return {
        "peer": options.name, "workers": options.workers,
        "tokens_per_s": statistics.median(work.tokens / s for s in timed),
        "tokens_per_s_steps": [work.tokens / s for s in timed], "loss": losses,
        "peak_rss_bytes": sorted(memory.most.values()),
        "rss_before_bytes": [memory.first[pid] for pid in sorted(memory.most, key=lambda p: memory.most[p])],
        "host_store_bytes": store.layout.num_bytes, **most, **device_peak(options),
        "cut": {"forward": cut.forward, "fused": cut.fused, "backward": cut.backward},
        "order": "by_stage" if len(rounds.row) > 1 and rounds.row[0].span == rounds.row[1].span else "by_round",
        "speeds": speeds, "torch": torch.__version__, "work": asdict(work), "events": events,
    }  # fmt: skip


def device_peak(options: argparse.Namespace) -> dict[str, Any]:
    """What a GPU could do, where the workers share one."""
    device = torch.device(options.device)
    return dict(gpu_peak(device)) if device.type == "cuda" else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="roundpipe")
    parser.add_argument("--rule", choices=("ready", "round_robin"), default="ready")
    parser.add_argument("--behind", action="store_true", help="the optimizer one step behind")
    parser.add_argument("--at-once", type=int, default=0)
    parser.add_argument("--span-mib", type=int, default=0)
    parser.add_argument("--slow", type=float, nargs="*", help="per worker, how many times as long its ops take")
    parser.add_argument("--device", default="cpu")
    options, work = parse(parser)
    return alone(options, work, options.name, entry, lambda forkserver: run(work, options, forkserver))


if __name__ == "__main__":
    sys.exit(main())
