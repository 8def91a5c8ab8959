"""What a forked worker does: join the store, await its view, build its spans and links, and train."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.config import TrainConfig
from jobs.plan import evaluation_samples, open_dataset
from jobs.text import TextJob
from jobs.train import Trainer, load_checkpoint
from launch.config import config_from_dict
from pipeline.groups import GroupBuilder, address_towards
from pipeline.model import LayeredModel
from pipeline.simulate import Network
from pipeline.store import ResidentStore, shard_holders
from pipeline.transport import Shape, Transport, link_pairs, span_bytes
from pipeline.weights import read_config
from pipeline.worker import Settings, Worker, connections
from recovery.commit import Ballot
from recovery.membership import View, await_view

log = logging.getLogger(__name__)


def connect(store: dict[str, Any], timeout_s: float) -> dist.Store:
    """A client of the run's store, under the run's prefix."""
    client = dist.TCPStore(
        store["host"], store["port"], is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )
    return dist.PrefixStore(store["prefix"], client)


def worker_main(payload: dict[str, Any]) -> int:
    """The entry of a worker process. Returns its exit code; an error is left in the store for the agent to tell."""
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    worker_id = int(payload["worker"])
    torch.set_num_threads(int(payload["threads"]))
    store = connect(payload["store"], 60.0)
    try:
        return _run(worker_id, payload, store, stop)
    except Exception as error:
        log.debug("worker %d failed", worker_id, exc_info=True)
        text = f"{type(error).__name__}: {error}"
        store.set(f"error/{worker_id}", json.dumps({"time": time.time(), "type": type(error).__name__, "error": text}))
        return 1


def _run(worker_id: int, payload: dict[str, Any], store: dist.Store, stop: threading.Event) -> int:
    view = await_view(store, 1, timeout_s=3600.0)
    config = config_from_dict(TrainConfig, view.details["config"])
    worker, train = build_worker(worker_id, config, view, store, payload)
    if view.checkpoint is not None:
        load_checkpoint(worker, Path(view.checkpoint))
    dataset = open_dataset(config.out)
    reports = _Reports(connect(payload["store"], 60.0))
    evaluated = evaluation_samples(config, dataset)
    trainer = Trainer(
        config, view, worker, train, view.schedule("evaluate"),
        TextJob(
            dataset.train_sample, config.sequence_length, config.microbatches, config.microbatch_size,
            view.first_step, view.first_sample,
        ),
        TextJob(
            dataset.held_out_spread(evaluated), config.sequence_length, view.schedule("evaluate").num_microbatches,
            config.microbatch_size, limit=evaluated,
        ),
        dataset.fingerprint, reports.put, stop.is_set,
    )  # fmt: skip
    code = trainer.run()
    worker.transport.close()
    return code


def build_worker(
    worker_id: int, config: TrainConfig, view: View, store: dist.Store, payload: dict[str, Any]
) -> tuple[Worker, Any]:
    """The worker of a view with its spans, links and groups, and the training schedule."""
    device = torch.device(payload["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    train, evaluate = view.schedule("train"), view.schedule("evaluate")
    model = LayeredModel(read_config(config.out / "model-config"), attention=payload.get("attention"))
    source = view.details["source"]
    holders = train.holders
    spans = [span for span, workers in holders.items() if worker_id in workers]
    held = ResidentStore(
        model, spans, config.optimizer(), seed=config.seed, device=device,
        source=None if source is None or view.checkpoint else Path(source),
    )  # fmt: skip
    host = payload["store"]["host"]
    address = address_towards(host, payload["store"]["port"])
    builder = GroupBuilder(store, worker_id, address, device, timeout_s=config.deadline)
    backend = "nccl" if payload["nccl"] else "gloo"
    transport = Transport(worker_id, view.number)
    transport.connect(
        builder, link_pairs(connections(train) | connections(evaluate)),
        max_bytes=span_bytes(config.microbatch_size, config.sequence_length, model.hidden_size, torch.float32),
        nccl=payload["nccl"], shapes=link_shapes(config.network, config.workers),
    )  # fmt: skip
    groups = {
        shard: builder.build(f"view{view.number}/shard{shard[0]}-{shard[1]}", members, backend)
        for shard, members in shard_holders(holders, model).items()
        if worker_id in members and len(members) > 1
    }
    settings = Settings(
        device, config.seed, torch.bfloat16 if config.dtype == "bfloat16" else None, config.recompute, config.deadline
    )
    ballot = Ballot(store, view.number, worker_id, view.workers)
    return Worker(worker_id, held, transport, groups, ballot, settings), train


def link_shapes(network: Path | None, workers: int) -> dict[tuple[int, int], Shape] | None:
    """The slow links that a network file asks for."""
    if network is None:
        return None
    loaded = Network.from_json(json.loads(network.read_text()))
    pairs = [(a, b) for a in range(workers) for b in range(workers) if a != b]
    return {(a, b): Shape(loaded.latency_s[a][b], loaded.bandwidth[a][b]) for a, b in pairs}


class _Reports:
    """Numbered records in the store; the coordinator reads them in order."""

    def __init__(self, store: dist.Store) -> None:
        self._store, self._next = store, 0

    def put(self, record: dict[str, Any]) -> None:
        self._store.set(f"record/{self._next}", json.dumps({"time": time.time(), **record}))
        self._next += 1


def default_threads(workers_here: int) -> int:
    """Compute threads per worker when the cores of this machine are shared evenly."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, workers_here))
