"""Section d of benchmarks/gpu.py, ours: RoundPipe with one worker, whose state lies in the host's memory.

The optimizer runs in this process on all cores, the worker in another on the device. Spans are as large as leaves the
store in the host's memory: what is in the last one is not computed twice. Losses are those of the peers; with the
optimizer one step behind they are those of weights that lack an update, as in the official RoundPipe by default.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from engine_ours import make_config
from gpu_case import Case
from gpu_machine import Peaks
from gpu_work import Training, figures, timed, weights_of
from roundpipe_ours import PoolJob, write_work
from roundpipe_ours import entry as pool_entry

from jobs.config import TrainConfig
from jobs.plan import layer_costs
from jobs.pool_engine import PoolEngine
from jobs.rounds import Rounds, plan_rounds
from jobs.train import Trainer
from launch.forkserver import ForkServer
from launch.round_train import hosting, make_layout
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import read_config
from pipeline.state.host_store import HostStore, StoreLayout, store_path

SHAPE = "Qwen3-1.7B"
SPANS_MIB = (0, 4096, 2048, 1500)
"""What --span-mib may be, largest first (0: no limit); the embedding alone is 1,187 MiB."""
SHARE = 0.85
"""Of the host's free memory that the store may take."""


def training_of(case: Case) -> Training:
    """32,768 tokens a step."""
    return Training.of(case, SHAPE, microbatches=4, batch=4, steps=4)


def free_bytes(path: Path) -> int:
    """What a store at `path` may take, as HostStore.create finds it."""
    return min(shutil.disk_usage(path.parent).free, psutil.virtual_memory().available)


def planned(config: TrainConfig, model: LayeredModel, free: int) -> tuple[TrainConfig, Rounds, StoreLayout]:
    """The plan with the largest spans whose store takes no more than SHARE of what is free; the one with the smallest
    where none does. Raises PartitionError as plan_rounds does."""
    costs = layer_costs(model, config.sequence_length)
    for span_mib in SPANS_MIB:
        found = replace(config, span_mib=span_mib)
        rounds = plan_rounds(found, model, costs, config.microbatch_size)
        layout = make_layout(found, model, rounds.cut, config.workers)
        if layout.num_bytes <= SHARE * free:
            break
    return found, rounds, layout


def ours(values: dict[str, Any]) -> None:
    """Every update before the next iteration."""
    _train(values, "ours, 1 worker", behind=False)


def ours_behind(values: dict[str, Any]) -> None:
    """Updates while the next iteration computes."""
    _train(values, "ours, 1 worker, one step behind", behind=True)


def _train(values: dict[str, Any], name: str, behind: bool) -> None:
    case = Case.from_json(values)
    forkserver = ForkServer(pool_entry)  # before anything here runs on several threads
    try:
        torch.set_num_threads(1 if case.dry else len(os.sched_getaffinity(0)))
        training, source, out = training_of(case), weights_of(case, SHAPE), case.folder
        (out / "model-config").symlink_to(source)
        work = training.work(read_config(source))
        write_work(work, out)
        config = replace(
            make_config("gpipe", work, 1, training.warmup + training.steps, out, case.limit_s), scheduler="roundpipe",
            dtype="bfloat16", optimizer_async=behind, at_once=work.microbatches,
        )  # fmt: skip
        config.validate()
        model = LayeredModel(read_config(source))
        config, rounds, layout = planned(config, model, free_bytes(store_path(out)))
        peaks = Peaks()
        peaks.start()
        store = HostStore.create(layout, store_path(out))
        try:
            found = _steps(case, training, config, rounds, store, PoolJob(work), forkserver, source)
        finally:
            store.close()
    finally:
        forkserver.close()
    cut = rounds.cut
    case.say(
        name, **figures(case, training, found["seconds"], found["losses"]), **peaks.close(),
        store_bytes=layout.num_bytes, span_mib=config.span_mib,
        cut={"forward": cut.forward, "fused": cut.fused, "backward": cut.backward},
    )  # fmt: skip


def _steps(
    case: Case, training: Training, config: TrainConfig, rounds: Rounds, store: HostStore, job: PoolJob,
    forkserver: ForkServer, source: Path,
) -> dict[str, Any]:  # fmt: skip
    """All steps of the pool's trainer."""
    losses: list[float] = []

    def report(record: dict[str, Any]) -> None:
        if record["kind"] == "step":
            losses.append(record["loss"])

    def device(_: int) -> str:
        return case.device

    with hosting(config, store, rounds, forkserver, lambda *_, **__: None, device) as (optimizer, pool):
        optimizer.initialise(0, source)
        engine = PoolEngine(
            optimizer, pool, rounds.cut, rounds.row, {"train": job, "evaluate": job},  # type: ignore[dict-item]
            config.round_size, config.deadline,
        )  # fmt: skip
        reports = SimpleNamespace(put=report, save_ledger=lambda step, view: "")
        trainer = Trainer(config, engine, job, "", reports, bool)  # type: ignore[arg-type]
        pool.open(config.workers)

        def step(_: int) -> float:
            trainer.one_step(record=False)
            return losses[-1]

        found = timed(training, step, "cpu")
        optimizer.drain(config.deadline)
    return found
