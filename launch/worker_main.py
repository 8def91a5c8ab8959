"""What a forked worker does: join the store, await its view, build its spans and links, and train."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from jobs.config import ConfigError, TrainConfig
from jobs.corpus import CorpusError
from jobs.job import RunJob, Start
from jobs.network import read_network
from jobs.pipeline_engine import PipelineEngine
from jobs.pipelines import stage_at
from jobs.registry import KINDS, TRAIN, make_jobs
from jobs.train import Trainer
from launch.devices import count_cuda
from launch.warm import model_of, settings_of, try_out
from pipeline.model.flops import ModelFlops
from pipeline.model.weights import ModelError
from pipeline.runtime.batch import Needs
from pipeline.runtime.compute import Settings
from pipeline.runtime.groups import GroupBuilder, address_towards
from pipeline.runtime.peak_flops import Capability
from pipeline.runtime.probe import Pulse
from pipeline.runtime.reducer import Reducer
from pipeline.runtime.step_commit import NonFiniteLoss, StepCommit
from pipeline.runtime.transport import Shape, Transport, span_bytes
from pipeline.runtime.worker import Worker
from pipeline.schedule.ops import STEP, span_text
from pipeline.state.resident import ResidentStore, part_holders
from pipeline.state.shard import shares_of
from pipeline.state.source import SourceRefused
from pipeline.store.client import SealedStore
from pipeline.wire import checked, parse
from recovery import keys
from recovery.checkpoint import CheckpointError
from recovery.commit import Ballot
from recovery.communicator import Communicator
from recovery.inject import Fault, Injector, parse_faults
from recovery.lifeline import Lifeline
from recovery.member import Member, Watcher
from recovery.membership import EVICTED, Evicted, MembershipError, View, await_view, read_layout, read_view
from recovery.migration import Migration
from recovery.policy import POLICIES, remedies
from recovery.rehearse import Rehearsal, boundary_bytes
from recovery.restore import load_checkpoint

log = logging.getLogger(__name__)
_POLL_S = 0.005
_FOREVER = timedelta(days=365)  # an agent that ends takes its spare workers along
FATAL = (NonFiniteLoss, CheckpointError, SourceRefused, ModelError, CorpusError, ConfigError, MembershipError)
"""Errors that another worker in the same place would meet too: the run ends with them."""


def connect(store: dict[str, Any], timeout_s: float) -> dist.Store:
    """A client of the run's store (an address as `StoreHandle` gives it), under the run's prefix."""
    return SealedStore(store["host"], store["port"], bytes.fromhex(store["token"]), store["prefix"], timeout_s)


def worker_main(payload: dict[str, Any]) -> int:
    """The entry of a worker process. Returns its exit code; an error is left in the store for the agent to tell."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    torch.set_num_threads(int(payload["threads"]))
    store, worker_id = connect(payload["store"], 60.0), int(payload["worker"])
    try:
        if "spare" in payload:
            payload = _called(store, payload)
            worker_id = int(payload["worker"])
        return _run(worker_id, payload, store, stop)
    except Evicted:
        return EVICTED
    except Exception as error:
        log.debug("worker %d failed", worker_id, exc_info=True)
        keys.report_error(store, worker_id, last_words(error))
        return 1


def last_words(error: Exception) -> keys.ErrorReport:
    """What a worker says of the error that ends it."""
    return keys.ErrorReport(f"{type(error).__name__}: {error}"[:4000], isinstance(error, FATAL))


def _called(store: dist.Store, payload: dict[str, Any]) -> dict[str, Any]:
    """Load what every worker needs, then wait for the place that is to be taken; the payload with it."""
    await_view(store, 1)
    config = settings_of(read_view(store, 1).details)
    model = model_of(config)
    device = torch.device(payload["device"])
    if device.type == "cpu" or count_cuda() == 1:  # else it is not known which it will be
        with suppress(RuntimeError):  # who has a place tells
            try_out(config, model, device)
    model.copy_ahead(range(model.num_layers))
    store.wait([key := payload["spare"]], _FOREVER)
    fields = {"worker": int, "place": int, "view": int, "joins": bool, "device": str}
    return {**payload, **checked(parse(store.get(key), "a spare worker's place"), "a spare worker's place", **fields)}


def _run(worker_id: int, payload: dict[str, Any], store: dist.Store, stop: threading.Event) -> int:
    number, joins = int(payload["view"]), bool(payload["joins"])
    await_view(store, 1)  # as long as it takes to plan: who plans has the store in it
    view = read_view(store, 1)  # the newest view is this one with other workers in some places
    config = settings_of(view.details)
    place = int(payload["place"])
    watcher = Watcher(connect(payload["store"], 60.0), worker_id, number, stop)
    try:
        member = build_member(worker_id, config, view, place, store, payload, watcher.pulse, fill=not joins)
        if view.checkpoint is not None and not joins:
            load_checkpoint(member.worker.store, Path(view.checkpoint), view.generation, member.worker.pulse)
        reports = Reports(connect(payload["store"], 60.0), worker_id)
        member.worker.probe = make_injector(member, config, view, place, reports, int(payload["store"]["port"]))
        jobs = make_jobs(config, Start(view.first_step, view.first_sample, carried=view.details["carried"]))
        member.keys = partial(sample_keys, config.seed, jobs[TRAIN])
        if "rehearse" in POLICIES[config.recovery]:
            member.worker.boundaries.limit = boundary_bytes(config, member.worker.store.model)
        member.rehearsal = Rehearsal(
            partial(jobs[TRAIN].batch, needs=Needs.NOTHING),
            lambda told: reports.put({"kind": "event", "worker": worker_id, **told}),
        )
        flops = ModelFlops.from_json(view.details["flops"])
        engine = PipelineEngine(member, jobs, number, joins, config.full_every, flops)
        trainer = Trainer(
            config,
            engine,
            jobs[TRAIN],
            KINDS[config.job].data(config),
            reports,
            stop.is_set,
            view.first_step,
            evaluate_first=view.details["source"] is not None and view.checkpoint is None,
            before=partial(KINDS[config.job].before, jobs=jobs, first_step=view.first_step),
            trains=KINDS[config.job].trains,
            watched=view.details["watched"],
        )
        if config.min_workers and config.migration_mib and not payload["nccl"]:
            own = partial(connect, payload["store"], 60.0)
            builder = member.communicator.builder
            member.migration = Migration(
                member.worker, lambda: replace(builder, store=own(), timeout_s=30.0), own(), config.migration_mib << 20
            )  # fmt: skip
            member.worker.applied = member.migration.applied
        watcher.attach(member)
        code = trainer.run()
        member.worker.transport.close()  # who fails has no time for it: its end is what others wait for
        return code
    finally:
        watcher.stop()


def sample_keys(seed: int, job: RunJob, step: int) -> dict[str, Any]:
    """What the samples of a step and its random numbers follow from."""
    return {"seed": seed, "next_sample": job.next_sample(step), "microbatches": job.microbatches, "size": job.size}


def build_member(
    worker_id: int, config: TrainConfig, view: View, place: int, store: dist.Store, payload: dict[str, Any],
    pulse: Pulse, *, fill: bool = True,
) -> Member:  # fmt: skip
    """A worker with the spans of its place, and no links yet. `view` is the first of the run; `pulse` tells of every
    layer that is built. Without `fill` weights are put in later."""
    device = torch.device(payload["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = model_of(config, payload.get("attention"))
    source = view.details["source"]
    layout = read_layout(store, view, place)
    parts = part_holders(layout.holders, model.num_layers, model.tied) if config.shard_optimizer else {}
    held = ResidentStore(
        model, layout.spans, config.optimizer_config(), seed=config.seed, device=device,
        source=None if source is None or view.checkpoint else Path(source), came_on=pulse, exact=config.exact_sums,
        shares=shares_of(parts, place, config.snapshot == "neighbour"), masks=config.masks, fill=fill,
    )  # fmt: skip
    settings = Settings(
        device, config.seed, torch.bfloat16 if config.dtype == "bfloat16" else None, config.recompute,
        2 * config.deadline,  # the coordinator, who knows whom all wait for, comes first
        config.compile, config.peak_tflops,
    )  # fmt: skip
    transport, backend = Transport(worker_id), "nccl" if payload["nccl"] else "gloo"
    reducer = Reducer(worker_id, held.summed, timeout_s=settings.deadline_s, backend=backend)
    commit = StepCommit(Ballot(store, 0, worker_id, ()))
    worker = Worker(worker_id, held, transport, reducer, commit, settings, pulse=pulse)
    address = address_towards(payload["store"]["host"], payload["store"]["port"])
    builder = GroupBuilder(store, worker_id, address, device, 2 * config.deadline, transport.mailbox.woken)
    largest = span_bytes(
        config.microbatch_size, config.sequence_length, model.hidden_size, settings.autocast or torch.float32
    )  # fmt: skip
    communicator = Communicator(
        transport, reducer, builder, largest, shared=config.links != "gloo", demanded=config.links == "shm"
    )
    network = link_shapes(config.network, config.workers)

    def shapes(now: View) -> dict[tuple[int, int], Shape] | None:
        at = {place: worker for worker, place in now.places.items()}
        return None if network is None else {(at[a], at[b]): shape for (a, b), shape in network.items()}

    return Member(
        worker, communicator, store, remedies(config), shapes, Lifeline(store),
        config.out / "checkpoints", capability=Capability.of(settings, worker_id),
    )  # fmt: skip


def make_injector(
    member: Member, config: TrainConfig, view: View, place: int, reports: Reports, store_port: int
) -> Injector:
    """The faults of the settings, as this worker meets them. The stage is that of the first view."""
    stage = stage_at(config, read_layout(member.store, view, place).train.holders, place)
    store = member.worker.store

    def poison() -> None:
        for gradient in list(store.gradients.values())[:1]:  # none where all that is held is frozen
            gradient[0] = float("nan")

    def told(fault: Fault) -> None:
        reports.put({"kind": "event", "event": "fault", "worker": reports.worker, "step": fault.step,
                     "fault": fault.kind, "at": fault.at})  # fmt: skip

    def cut() -> None:
        for link in list(member.worker.transport.links.values()):
            link.cut()
        for connection in psutil.Process().net_connections("tcp"):
            if connection.status == psutil.CONN_ESTABLISHED and connection.raddr.port != store_port:
                with socket.socket(fileno=os.dup(connection.fd)) as end:
                    end.shutdown(socket.SHUT_RDWR)

    @torch.no_grad()
    def flip() -> None:
        lane = () if member.assignment is None else member.excerpt(TRAIN).lane
        kept = set(store.modules) - {op.span for op in lane if op.kind == STEP}  # for others
        copies = [state for span in kept for state in store.states_of(span_text(span))]
        weight = next(weight for state in (*copies, *store.states.values()) for weight in state.weights().values())
        weight.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 20)

    return Injector(parse_faults(config.inject), reports.worker, stage, reports.claim, told, poison, cut, flip)


def link_shapes(network: Path | None, workers: int) -> dict[tuple[int, int], Shape] | None:
    """The slow links that a network file asks for."""
    if network is None:
        return None
    loaded, _ = read_network(network, workers)
    pairs = [(a, b) for a in range(workers) for b in range(workers) if a != b]
    return {(a, b): Shape(loaded.latency_s[a][b], loaded.bandwidth[a][b], loaded.exclusive) for a, b in pairs}


class Reports:
    """What one worker tells the coordinator, by numbered records in the store."""

    def __init__(self, store: dist.Store, worker: int) -> None:
        self._store, self.worker, self._next, self._guided = store, worker, 0, Lifeline(store)

    def put(self, record: dict[str, Any]) -> None:
        """Add a record."""
        keys.put_record(self._store, self.worker, self._next, record)
        self._next += 1

    def save_ledger(self, step: int, view: int) -> str:
        """Have the coordinator write every step up to `step` to the disk, for a checkpoint of `view`; why that cannot
        be, or ""."""
        number = self._next
        self.put({"kind": "ledger", "step": step, "view": view})
        while (answer := keys.take_ledger_answer(self._store, self.worker, number)) is None:
            if not self._guided():
                return "the ledger is not safe: the coordinator gives no sign of life"
            time.sleep(_POLL_S)
        return answer

    def claim(self, name: str) -> bool:
        """Whether nobody has asked for `name` before."""
        return keys.claim(self._store, name)


def computes(config: TrainConfig, workers_here: int) -> dict[str, Any]:
    """What the bits of a run depend on beside its settings, for the record of its start."""
    return {"torch": torch.__version__, "threads": config.threads or default_threads(workers_here)}


def default_threads(workers_here: int) -> int:
    """Compute threads per worker: OMP_NUM_THREADS where it is set, else an even share of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return (
        int(asked) if asked.isdecimal() and int(asked) else max(1, len(os.sched_getaffinity(0)) // max(1, workers_here))
    )
