"""`unbroken train`: plan, start the agents, watch, and tell the story of the run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers

from jobs.config import TrainConfig
from jobs.plan import Plan
from jobs.registry import KINDS
from launch.agent import Agent, RunFailed, fail_before_start
from launch.cluster import Crew, connect, on_nodes
from launch.config import to_toml
from launch.described import describe
from launch.devices import Devices, find_devices
from launch.forecast import forecast
from launch.forkserver import ForkServer, die_with_parent
from launch.introduction import introduce
from launch.machine import check_links, check_machine
from launch.page.keeper import PageKeeper
from launch.progress import Display
from launch.resume import kept
from launch.round_train import train_rounds
from launch.run_folder import RunFolder
from launch.run_lock import RunLock
from launch.signals import NotStarted, Stopping, stopping
from launch.slots import Slot, StoreHandle, find_slot, open_store
from launch.story import Story
from launch.token import find_token, leave_token
from launch.trackers import Trackers, require_trackers
from launch.warm import prepare, warm_up
from launch.worker_main import computes, default_threads, worker_main
from pipeline.exit_codes import ERROR, STOPPED, exit_code
from pipeline.model.weights import watch
from recovery import keys
from recovery.checkpoint import Verifier, any_saved
from recovery.coordinator import Coordinator
from recovery.losses import TooManyFailures
from recovery.policy import POLICIES, Recovery
from recovery.shards import remedies_of

_LAST_S = 20.0
TAKES_BACK = {"SIGUSR1": signal.SIGUSR2, "SIGUSR2": signal.SIGUSR1}
"""The signal that tells a machine to go -> the one that tells it that it stays after all."""


def train(config: TrainConfig, as_json: bool = False, prepared: bool = False) -> int:
    """Run a training job to its end on this machine, or this slot's share of it under torchrun. Returns the exit code.
    `prepared`: as in `make_plan`.

    Raises ConfigError and its like before anything is started, RunFailed when a worker fails.
    """
    try:
        with stopping() as signals:
            return _train(config.resolved(), as_json, signals, prepared)
    except NotStarted:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        return STOPPED
    except (ValueError, RuntimeError, OSError) as error:
        shared = isinstance(error, ValueError | RunFailed)
        if os.environ.get("LOCAL_RANK", "0") == "0" or not shared:
            raise
        return exit_code(error)  # one slot of a machine says it for all


def _train(config: TrainConfig, as_json: bool, signals: Stopping, prepared: bool) -> int:
    config.validate()
    require_trackers(config)
    if config.scheduler == "roundpipe":
        return train_rounds(config, as_json, signals, prepared)
    slot = find_slot(config)
    if slot.cluster and slot.coordinates:
        config = on_nodes(config)
    if slot.parent:
        die_with_parent(slot.parent, signal.SIGTERM if slot.coordinates else signal.SIGKILL)
    if slot.attempt and any_saved(config.out / "checkpoints"):
        config = replace(config, resume=True)  # torchrun has started everybody again: go on
    workers = slot.workers(config.workers)
    if workers:
        check_machine(config, slot.workers_here(config.workers))
        check_links(config)
    devices = find_devices(config.device, slot.workers_here(config.workers)) if workers else Devices(0, nccl=False)
    transformers.utils.logging.disable_progress_bar()
    warm_up(config)
    forkserver = ForkServer(worker_main, prepare)  # forked now: nothing below has started a thread yet
    handle = None
    try:
        if slot.cluster and slot.coordinates:
            return _lead(config, slot, forkserver, as_json, signals, prepared)
        handle = open_store(slot, token=find_token(config, slot.rank, slot.agents))
        payload = partial(_payload, config, slot, handle, devices)
        agent = Agent(slot.rank, forkserver, handle.store, workers, payload, config.spares)
        if config.min_workers and config.preempt_signal != "none":  # the machine with the store takes the run along
            leave = signals if slot.coordinates else lambda _: agent.leave(config.grace)
            signal.signal(getattr(signal, config.preempt_signal), lambda number, _: leave(number))
            signal.signal(TAKES_BACK[config.preempt_signal], lambda *_: None if slot.coordinates else agent.stay())
        try:
            agent.start()
            if slot.coordinates:
                return _coordinate(config, agent, handle, slot, as_json, signals, prepared, None)
            signals.trains(agent.asked_to_stop)
            try:
                code = agent.supervise(lambda: None)
                keys.confirm_end(handle.store, slot.rank)
            except dist.DistNetworkError as error:
                raise RunFailed(
                    f"the store at {handle.host}:{handle.port} is gone, and with it the coordinator of the run; "
                    "--resume goes on from the newest valid checkpoint"
                ) from error
            signals.over()
            return code
        finally:
            agent.end()
    finally:
        forkserver.close()
        if handle is not None:
            handle.close()


def _lead(
    config: TrainConfig, slot: Slot, forkserver: ForkServer, as_json: bool, signals: Stopping, prepared: bool
) -> int:
    """A run whose agents a cluster places: this process hosts the store and coordinates, and has no workers."""
    token, handle = find_token(config, slot.rank, slot.agents), None
    cluster = connect(config)
    try:
        handle = open_store(replace(slot, host=cluster.host), token=token)
        crew = Crew.of(config, slot, cluster, handle)
    except BaseException:
        cluster.close([])
        if handle is not None:
            handle.close()
        raise
    try:
        agent = Agent(slot.rank, forkserver, handle.store, [], lambda *_: {})
        if config.preempt_signal != "none":
            signal.signal(getattr(signal, config.preempt_signal), lambda number, _: signals(number))
            signal.signal(TAKES_BACK[config.preempt_signal], signal.SIG_IGN)
        agent.start()
        crew.ask()
        return _coordinate(config, agent, handle, slot, as_json, signals, prepared, crew)
    finally:
        crew.close()
        handle.close()


def _payload(
    config: TrainConfig,
    slot: Slot,
    handle: StoreHandle,
    devices: Devices,
    worker: int,
    place: int,
    view: int,
    joins: bool,
) -> dict[str, Any]:
    return {
        "worker": worker,
        "place": place,
        "view": view,
        "joins": joins,
        "store": handle.address(),
        "threads": config.threads or default_threads(slot.workers_here(config.workers)),
        "device": devices.of(slot.local_index(place, config.workers)),
        "nccl": devices.nccl,
    }


def _coordinate(
    config: TrainConfig, agent: Agent, handle: StoreHandle, slot: Slot, as_json: bool, signals: Stopping,
    prepared: bool, crew: Crew | None,
) -> int:  # fmt: skip
    claim, store, absent = RunLock(config.out), handle.store, ()
    with Display(config.last_step, quiet=as_json) as display:
        try:
            leave_token(config, handle.token, slot.agents, placed=slot.cluster)
            plan = KINDS[config.job].plan(config, display.preparing, kept(config), prepared)
            if crew is not None:
                most_s = config.cluster_wait + config.wait
                absent = crew.await_first(
                    slot.dealt(config.workers), config.min_workers, config.cluster_wait, most_s, display.warn
                )
            signals.trains(agent.asked_to_stop)
        except BaseException as error:
            fail_before_start(store, NotStarted() if signals.too_early else error)
            claim.undo()
            raise
        try:
            code, story = _follow(config, plan, display, agent, store, slot, signals, crew, absent)
        finally:
            claim.release()
    story.close(code, as_json)
    return code


def _follow(
    config: TrainConfig, plan: Plan, display: Display, agent: Agent, store: dist.Store, slot: Slot, signals: Stopping,
    crew: Crew | None, absent: Sequence[int],
) -> tuple[int, Story]:  # fmt: skip
    """The run from its first view to its end."""
    introduce(config, plan, display)
    trackers = Trackers(config, asdict(config), display.warn) if config.trackers else None
    folder = RunFolder(config.out, to_toml(config), plan.view.first_step, trackers, display.warn)
    story = Story(config, plan, folder, display, store)
    page = PageKeeper(config.out, display.warn) if KINDS[config.job].trains else None
    try:
        coordinator = _coordinator(config, plan, folder, story, display, store, slot)
        coordinator.begin_without(absent)
        if crew is not None:
            crew.tell, crew.gone = story.event, coordinator.machine_gone

        def tick() -> None:
            if crew is not None:
                crew.tick()
            coordinator.tick()
            story.tick(coordinator.view.workers, coordinator.valid, coordinator.layout)

        code = agent.supervise(tick)
        signals.over()
        keys.end(store, code)
        _await_agents(coordinator, store)
        story.tick(coordinator.view.workers, coordinator.valid, coordinator.layout)
    except Exception as error:
        with suppress(RuntimeError):  # the store may be what failed
            keys.fail(store, str(error), _code(error))
            story.tick((), None)
        folder.event("failed", error=str(error), step=story.step)
        if isinstance(error, ValueError | TooManyFailures):
            raise RunFailed(str(error), _code(error)) from error
        raise
    finally:
        story.tell_fault()
        folder.close()
        if page is not None:
            page.close()
    return code, story


def _code(error: Exception) -> int:
    """The settings were right, or nothing would have begun: then a ValueError is none of usage."""
    return ERROR if isinstance(error, ValueError) else exit_code(error)


def _coordinator(
    config: TrainConfig, plan: Plan, folder: RunFolder, story: Story, display: Display, store: dist.Store, slot: Slot
) -> Coordinator:
    """Tell what begins, and publish the first view."""
    folder.event("started", step=plan.view.first_step, workers=config.workers, view=1,
                 **computes(config, slot.workers_here(config.workers)))  # fmt: skip
    folder.event("described", step=plan.view.first_step, **describe(config, plan))
    for name, reason in plan.notes:
        folder.event("checkpoint_skipped", step=plan.view.first_step, checkpoint=name, reason=reason)
    first, model = replace(plan.view, agents=slot.dealt(config.workers)), plan.model
    source = plan.view.details["source"]
    recovery = Recovery(
        config.recovery, first, plan.layout, model.num_layers, model.tied, config.out / "checkpoints", plan.around,
        watch(None if source is None else Path(source)), Verifier(first.generation), plan.resize,
        remedies_of(POLICIES[config.recovery], config.snapshot != "off") if config.shard_optimizer else None,
    )  # fmt: skip
    for line in forecast(config, recovery):
        display.say(line)
    return Coordinator(store, first, recovery, story.event, config.heartbeat, config.deadline, config.max_failures,
                       config.max_preemptions)  # fmt: skip


def _await_agents(coordinator: Coordinator, store: dist.Store) -> None:
    """The store stays until all agents that live have seen the end."""
    deadline = time.monotonic() + _LAST_S
    came = {agent for agent in coordinator.alive - {0} if keys.read_agent(store, agent) is not None}
    while not all(keys.has_confirmed(store, agent) for agent in coordinator.alive & came) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
