"""The cases of `unlearn_rows.py` on real engines: what is read of weights `before`, and a step taken at others, `now`.

All cases of a layout share its workers. What is asked of an engine is what production asks: `read_before`, then `run`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.config import TrainConfig
from jobs.pipeline_engine import PipelineEngine
from jobs.pool_engine import PoolEngine
from jobs.unlearn.config import UnlearnConfig
from jobs.unlearn.reference import Reference, read_before
from launch.forkserver import ForkServer
from pipeline.runtime.worker import StepResult
from pipeline.schedule.layout import TRAIN
from pipeline.state.layer_state import LayerState, LayerStates
from recovery.member import Member
from tests import unlearn_rows as rows
from tests.harness import TIMEOUT_S, hosted_pool, run_workers

BEFORE, NOW = "before.safetensors", "now.safetensors"
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Found:
    """What an engine made of one case."""

    loss: float
    means: Mapping[str, float]
    counts: Mapping[str, int]
    norm: float
    gradients: Tensors
    """Of every trained parameter, as the optimizer applies it."""
    kept: Reference


def settings(names: Sequence[str], workers: int, out: Path, **more: Any) -> TrainConfig:
    """Those of a request. All cases have the whole model, or all end at the same layer."""
    deep = set(names) <= set(rows.DEEP)
    changes: dict[str, Any] = {
        "workers": workers, "microbatches": rows.MICROBATCHES, "microbatch_size": rows.SIZE, "steps": len(names),
        "clip": 0.0, "sequence_length": rows.LENGTH, "evaluate_samples": rows.MICROBATCHES * rows.SIZE, "out": out,
        "data": rows.DATA + ";".join(names), "forget": "x", "method": "rmu" if deep else "npo",
        "layer": rows.LAYER if deep else None, **more,
    }  # fmt: skip
    return UnlearnConfig(**changes).resolved()


def fill(states: LayerStates, weights: Tensors) -> None:
    """Give an engine's states these weights, and nothing else of the past."""
    for state in states.states.values():
        state.begin_anew()
        state.put({f"param/{name}": weights[name] for name in state.weights()})


def of_state(state: LayerState, scale: float = 1.0) -> dict[str, Tensor]:
    """The gradients that it is about to apply, times a scale."""
    return {name: scale * p.grad for name, p in state.parameters.items() if p.grad is not None}


def _told(result: StepResult) -> dict[str, Any]:
    return {
        "loss": result.loss, "means": dict(result.means), "counts": dict(result.counts), "norm": result.grad_norm
    }  # fmt: skip


# ---- workers that hold their stage ----


def pipeline_worker(member: Member, payload: Mapping[str, Any]) -> int:
    """What a worker does, in a process of its own."""
    worker, out = member.worker, Path(payload["out"])
    engine = PipelineEngine(member, {}, 1)
    before, now = load_file(out / BEFORE), load_file(out / NOW)
    told, found = dict[str, Any](), dict[str, Tensor]()
    for name in payload["unlearn"]:
        engine.jobs = rows.reading(name, out / "read", engine.at_once)
        fill(worker.store, before)
        read_before(engine, engine.jobs, 0)
        engine.jobs = {TRAIN: rows.later_job(name, out / "read")}
        fill(worker.store, now)

        def applied(state: LayerState, scale: float, lr: float, name: str = name) -> None:
            found.update({f"{name}/{key}": tensor for key, tensor in of_state(state, scale).items()})

        worker.applied = applied
        told[name] = _told(engine.run(rows.STEP, wish=dict, record=False, pauses=lambda _: False))
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, out / f"gradients-{worker.id}.safetensors")
    (out / f"told-{worker.id}.json").write_text(json.dumps(told))
    worker.transport.close()
    return 0


def on_pipeline(
    forkserver: ForkServer, names: Sequence[str], workers: int, out: Path, before: Tensors, now: Tensors
) -> dict[str, Found]:
    """The cases under 1F1B. All workers must tell the same, and who shares a weight must have the same gradient."""
    save_file(dict(before), out / BEFORE)
    save_file(dict(now), out / NOW)
    run_workers(forkserver, settings(names, workers, out), rows.SHAPE, out, unlearn=list(names))
    told = [json.loads((out / f"told-{worker}.json").read_text()) for worker in range(workers)]
    assert all(each == told[0] for each in told)
    gradients: dict[str, Tensor] = {}
    for worker in range(workers):
        for key, tensor in load_file(out / f"gradients-{worker}.safetensors").items():
            assert torch.equal(gradients.setdefault(key, tensor), tensor), key
    return {
        name: Found(**told[0][name], gradients=_of(name, gradients), kept=rows.reference(name, out / "read"))
        for name in names
    }


def _of(name: str, gradients: Tensors) -> dict[str, Tensor]:
    start = f"{name}/"
    return {key.removeprefix(start): tensor for key, tensor in gradients.items() if key.startswith(start)}


# ---- workers that hold nothing ----


def on_pool(
    forkserver: ForkServer, names: Sequence[str], workers: int, out: Path, before: Tensors, now: Tensors, **more: Any
) -> dict[str, Found]:
    """The cases on a pool; `more` are settings."""
    config = settings(names, workers, out, scheduler="roundpipe", at_once=2, **more)
    found: dict[str, Found] = {}
    with hosted_pool(forkserver, config, rows.SHAPE) as (optimizer, pool, rounds):
        jobs = rows.pool_jobs(config, make=rows.later_job)
        engine = PoolEngine(optimizer, pool, rounds.cut, rounds.row, jobs, config.round_size, config.deadline)
        optimizer.initialise(config.seed, None)
        update = optimizer.update
        gradients: dict[str, Tensor] = {}

        def watching(step: int, norm: float, lr: float) -> None:
            gradients.update(
                {key: g.clone() for state in optimizer.states.values() for key, g in of_state(state).items()}
            )
            update(step, norm, lr)

        optimizer.update = watching
        pool.open(workers)
        for number, name in enumerate(names):
            optimizer.drain(TIMEOUT_S)
            fill(optimizer, before)
            read_before(_named(engine, name), rows.reading(name, out / "read", engine.at_once), 0)
            fill(optimizer, now)
            jobs[TRAIN].now, gradients = number, {}
            result = engine.run(number, wish=dict, record=False, pauses=lambda _: False)
            found[name] = Found(**_told(result), gradients=gradients, kept=rows.reference(name, out / "read"))
        optimizer.drain(TIMEOUT_S)
    return found


def _named(engine: PoolEngine, name: str) -> Any:
    """The engine for `read_before`, where the job that reads has the name of its case."""
    return SimpleNamespace(
        gather=engine.gather, leads=engine.leads, at_once=engine.at_once, pulse=engine.pulse,
        measure=lambda job, part: engine.measure(f"{job} {name}", part),
    )  # fmt: skip
