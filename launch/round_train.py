"""`unbroken train --scheduler roundpipe`: the host of a run."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from jobs.config import TrainConfig, require
from jobs.plan import Plan
from jobs.pool_engine import PoolEngine
from jobs.registry import KINDS, TRAIN
from jobs.rounds import Rounds
from jobs.train import Trainer
from launch.agent import RunFailed
from launch.config import to_toml
from launch.described import describe
from launch.devices import Devices, device_bytes, find_devices, span_mib
from launch.forkserver import ForkServer
from launch.introduction import introduce
from launch.machine import check_machine
from launch.page.keeper import PageKeeper
from launch.pool_worker import pool_worker, run_jobs, store_layout
from launch.progress import Display
from launch.resume import kept
from launch.run_folder import RunFolder
from launch.run_lock import RunLock
from launch.signals import Stopping
from launch.story import Story
from launch.trackers import Trackers
from launch.warm import warm_up
from launch.worker_main import computes, default_threads
from pipeline.model.flops import ModelFlops
from pipeline.model.layered import LayeredModel
from pipeline.schedule.work_units import Cut
from pipeline.state.host_optimizer import HostOptimizer
from pipeline.state.host_store import HostStore, StoreLayout, store_path
from recovery.dispatcher import ROOM
from recovery.pool import NoWorkerLeft, Pool
from recovery.restore import load_checkpoint


def train_rounds(config: TrainConfig, as_json: bool, signals: Stopping, prepared: bool = False) -> int:
    """Run a job to its end on this machine; `prepared` as in `make_plan`. Returns the exit code; raises ConfigError
    before anything is started, HostMemoryError where the state does not fit, RunFailed when the run cannot go on."""
    require("LOCAL_RANK" not in os.environ, "scheduler", config.scheduler, "one process that starts its own workers, "
            "not torchrun: the state is in the memory of one host")  # fmt: skip
    check_machine(config, config.workers)
    devices = find_devices(config.device, config.workers)
    if devices.cuda and not config.span_mib:
        config = replace(config, span_mib=span_mib(device_bytes(), config.dtype))
    transformers.utils.logging.disable_progress_bar()
    warm_up(config)
    forkserver = ForkServer(pool_worker)  # forked now: nothing below has started a thread yet
    try:
        claim = RunLock(config.out)
        with Display(config.last_step, quiet=as_json) as display:
            try:
                plan = KINDS[config.job].plan(config, display.preparing, kept(config), prepared)
                assert plan.rounds is not None
                layout = make_layout(config, plan.model, plan.rounds.cut, config.workers)
                store = HostStore.create(layout, store_path(config.out))
            except BaseException:
                claim.undo()
                raise
            try:
                code, story = _host(config, plan, display, forkserver, store, devices, signals)
            finally:
                store.close()
                claim.release()
        story.close(code, as_json)
        return code
    finally:
        forkserver.close()


def make_layout(config: TrainConfig, model: LayeredModel, cut: Cut, workers: int) -> StoreLayout:
    """Where everything lies in the host store."""
    rounds = -(-config.microbatches // config.round_size)
    blocks = ROOM * workers * (2 if config.optimizer_async else 1) + rounds
    return store_layout(config, model, cut, blocks)


@contextmanager
def hosting(
    config: TrainConfig, store: HostStore, rounds: Rounds, forkserver: ForkServer, event: Callable[..., None],
    device: Callable[[int], str], *, step: int = 0, sample: int = 0, stopping: Callable[[], bool] = bool,
) -> Iterator[tuple[HostOptimizer, Pool]]:  # fmt: skip
    """The optimizer of a store and a pool without workers yet; both end with the context."""
    pool: Pool | None = None

    def told(what: str, about: Any) -> None:
        if pool is not None:
            pool.told(what, about)

    optimizer = HostOptimizer(store, config.optimizer_config(), told, config.masks)
    address = f"\0unbroken-{os.getpid()}-{store.path.name}"

    def start(worker: int) -> int:
        return forkserver.start(
            {
                "pool": address, "worker": worker, "job": config.job,
                "config": json.loads(json.dumps(asdict(config), default=str)),
                "cut": rounds.cut, "blocks": store.layout.blocks, "device": device(worker),
                "threads": config.threads or default_threads(config.workers), "step": step, "sample": sample,
            }
        )  # fmt: skip

    with ExitStack() as stack:
        stack.callback(optimizer.close)
        pool = Pool(
            address, start, forkserver.poll, optimizer, store.layout.blocks, rounds.cost, rounds.dealer, event,
            deadline_s=config.deadline, max_failures=config.max_failures, stopping=stopping,
        )  # fmt: skip
        stack.callback(pool.close)
        yield optimizer, pool


def _host(
    config: TrainConfig, plan: Plan, display: Display, forkserver: ForkServer, store: HostStore, devices: Devices,
    signals: Stopping,
) -> tuple[int, Story]:  # fmt: skip
    """The run, from its first worker to its end."""
    assert plan.rounds is not None
    stop, began = threading.Event(), False
    signals.trains(_asks(stop))
    introduce(config, plan, display)
    display.say(f"host memory: {store.layout.num_bytes / 2**30:.2f} GiB in {store.path}")
    view = plan.view
    trackers = Trackers(config, asdict(config), display.warn) if config.trackers else None
    folder = RunFolder(config.out, to_toml(config), view.first_step, trackers, display.warn)
    folder.event("started", step=view.first_step, workers=config.workers, host_bytes=store.layout.num_bytes,
                 **computes(config, config.workers))  # fmt: skip
    folder.event("described", step=view.first_step, **describe(config, plan))
    page = PageKeeper(config.out, display.warn) if KINDS[config.job].trains else None
    story, rounds = Story(config, plan, folder, display), plan.rounds
    torch.set_num_threads(config.threads or default_threads(1))
    jobs, source = run_jobs(config, view.first_step, view.first_sample, view.details["carried"]), view.details["source"]
    try:
        with hosting(
            config, store, rounds, forkserver, story.event, devices.of, step=view.first_step,
            sample=view.first_sample, stopping=stop.is_set,
        ) as (optimizer, pool):  # fmt: skip
            engine = PoolEngine(
                optimizer, pool, rounds.cut, rounds.row, jobs, config.round_size, config.deadline,
                int(view.details["attempt"]), view.generation, ModelFlops.from_json(view.details["flops"]),
            )  # fmt: skip
            trainer = Trainer(
                config, engine, jobs[TRAIN], KINDS[config.job].data(config), _HostReports(story, folder),
                stop.is_set, view.first_step, evaluate_first=source is not None and not view.checkpoint,
                before=partial(KINDS[config.job].before, jobs=jobs, first_step=view.first_step),
                trains=KINDS[config.job].trains, watched=view.details["watched"],
            )  # fmt: skip
            if view.checkpoint is not None:
                load_checkpoint(optimizer, Path(view.checkpoint), view.generation)
            else:
                optimizer.initialise(config.seed, None if source is None else Path(source))
            pool.open(config.workers)
            began = True
            code = trainer.run()
            signals.over()
            return code, story
    except Exception as error:
        folder.event("failed", error=str(error), step=story.step)
        # once it trains the settings were right
        if isinstance(error, NoWorkerLeft) or (began and isinstance(error, ValueError)):
            raise RunFailed(str(error)) from error
        raise
    finally:
        story.tell_fault()
        folder.close()
        if page is not None:
            page.close()


@dataclass(frozen=True)
class _HostReports:
    """The host keeps its own records."""

    story: Story
    folder: RunFolder

    def put(self, record: dict[str, Any]) -> None:
        self.story.handle(record)

    def save_ledger(self, step: int, view: int) -> str:
        return self.folder.save_ledger(step)


def _asks(stop: threading.Event) -> Callable[[int], None]:
    """SIGTERM, SIGHUP and the first Ctrl-C ask the run to save and stop; a second Ctrl-C does not wait."""

    def handle(signum: int) -> None:
        if signum == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    return handle
