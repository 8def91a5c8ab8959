"""What a forked worker of a pool does: attach to the host store, and serve the work units that it is given."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch

from jobs.config import TrainConfig
from jobs.job import RunJob, Start
from jobs.registry import KINDS, make_jobs
from launch.config import config_from_dict
from launch.warm import model_of
from launch.worker_main import last_words
from pipeline.model.layered import LayeredModel
from pipeline.runtime.batch import Job
from pipeline.runtime.channel import Channel
from pipeline.runtime.compute import Settings
from pipeline.runtime.copy_engine import CHUNK
from pipeline.runtime.stateless import PoolClosed, StatelessWorker
from pipeline.schedule.work_units import Cut
from pipeline.state.host_store import HostStore, StoreLayout, store_path
from recovery.inject import Fault, Injector
from recovery.pool import LEFT

log = logging.getLogger(__name__)
_LAST_WORDS_S = 5.0


def run_jobs(
    config: TrainConfig, first_step: int, first_sample: int, carried: Mapping[str, Any] | None = None
) -> dict[str, RunJob]:
    """Those of a run folder; an evaluation is run as many microbatches at a time as the host store holds."""
    return make_jobs(config, Start(first_step, first_sample, config.microbatches, carried))


Jobs = Callable[[TrainConfig, int, int], dict[str, RunJob]]
"""(settings, first step, first sample) -> the jobs of a run, by name."""


def pool_worker(payload: dict[str, Any], jobs: Jobs = run_jobs) -> int:
    """What a forked worker of a pool does. Returns its exit code; an error is told to the host before it ends."""
    torch.set_num_threads(int(payload["threads"]))
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    end.connect(payload["pool"])
    channel = Channel(end)
    try:
        config = config_from_dict(KINDS[payload["job"]].settings, payload["config"])
        made = jobs(config, int(payload["step"]), int(payload["sample"]))
        make_worker(payload, config, made, channel).serve()
    except PoolClosed:
        return LEFT
    except Exception as error:
        log.debug("worker %d failed", payload["worker"], exc_info=True)
        said = last_words(error)
        with contextlib.suppress(RuntimeError, OSError):
            channel.send({"error": said.text, "fatal": said.fatal}, _LAST_WORDS_S)
        return 1
    return 0


def store_layout(config: TrainConfig, model: LayeredModel, cut: Cut, blocks: int) -> StoreLayout:
    """Where everything lies in the host store of a run."""
    return StoreLayout(
        model, cut, config.microbatches, config.microbatch_size, config.sequence_length, blocks, config.optimizer_async,
        compute=getattr(torch, config.dtype), gradients=getattr(torch, config.gradient_dtype),
        optimizer=config.optimizer_config(),
    )  # fmt: skip


def make_worker(
    payload: dict[str, Any], config: TrainConfig, jobs: dict[str, RunJob], channel: Channel
) -> StatelessWorker:
    """A worker that is attached to the host store."""
    id = int(payload["worker"])
    forward, fused, backward = payload["cut"]
    cut = Cut(tuple(map(tuple, forward)), tuple(fused), tuple(map(tuple, backward)))
    layout = store_layout(config, model_of(config), cut, int(payload["blocks"]))
    device = torch.device(payload["device"])
    store = HostStore(layout, store_path(config.out))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        store.pin(layout.travelling)
    settings = Settings(
        device, config.seed, torch.bfloat16 if config.dtype == "bfloat16" else None,
        deadline_s=2 * config.deadline,  # the host, who knows whom all wait for, comes first
        compiled=config.compile, peak_tflops=config.peak_tflops,
    )  # fmt: skip
    named: dict[str, Job] = dict(jobs)
    worker = StatelessWorker(id, store, named, settings, channel, chunk=CHUNK)

    claimed: set[str] = set()

    def claim(name: str) -> bool:
        new = name not in claimed
        claimed.add(name)
        return new

    def told(fault: Fault) -> None:
        worker.tell(event={"step": fault.step, "fault": fault.kind, "at": fault.at})

    worker.probe = Injector(
        config.faults(), id, id, claim, told, worker.poison, lambda: channel.socket.shutdown(socket.SHUT_RDWR)
    )
    return worker
