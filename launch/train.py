"""`unbroken train`: plan, start the agents, watch, and tell the story of the run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers

from jobs.config import TrainConfig
from jobs.plan import Plan, make_plan
from jobs.train import STOPPED
from launch.agent import OVER, Agent, RunFailed
from launch.claim import Claim
from launch.config import to_toml
from launch.devices import Devices, find_devices
from launch.generate import Continuation, continue_text
from launch.machine import check_machine
from launch.nursery import Nursery
from launch.pictures import Pictures
from launch.progress import Display
from launch.report import loss_terminal
from launch.resume import kept
from launch.run_folder import RunFolder
from launch.slots import Slot, StoreHandle, find_slot, open_store
from launch.worker_main import default_threads, worker_main
from recovery.coordinator import Coordinator
from recovery.policy import Recovery

_LAST_S = 20.0


def train(config: TrainConfig, as_json: bool = False) -> int:
    """Run a training job to its end on this machine, or this slot's share of it under torchrun. Returns the exit code.

    Raises ConfigError and its like before anything is started, RunFailed when a worker fails.
    """
    config = config.resolved()
    config.validate()
    if config.scheduler == "roundpipe":
        from launch.round_train import train_rounds  # built on this module

        return train_rounds(config, as_json)
    slot = find_slot(config)
    if slot.attempt and (config.out / "checkpoints").is_dir():
        config = replace(config, resume=True)  # torchrun has started everybody again: go on
    workers = slot.workers(config.workers)
    check_machine(config, slot.workers_here(config.workers))
    devices = find_devices(config.device, slot.workers_here(config.workers))
    transformers.utils.logging.disable_progress_bar()
    nursery = Nursery(worker_main)  # forked now: nothing below has started a thread yet
    try:
        handle = open_store(slot)
        agent = Agent(
            slot.rank, nursery, handle.store, workers, partial(_payload, config, slot, handle, devices), config.spares
        )
        try:
            agent.start()
            if slot.coordinates:
                return _coordinate(config, agent, handle.store, slot, as_json)
            try:
                code = agent.supervise(lambda: None)
                handle.store.set(f"done/{slot.rank}", str(code))
            except dist.DistNetworkError as error:
                raise RunFailed(
                    f"the store at {handle.host}:{handle.port} is gone, and with it the coordinator of the run; "
                    "--resume goes on from the newest valid checkpoint"
                ) from error
            return code
        finally:
            agent.end()
    finally:
        nursery.close()


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


def _coordinate(config: TrainConfig, agent: Agent, store: dist.Store, slot: Slot, as_json: bool) -> int:
    with interruptible():
        claim = Claim(config.out)
        with Display(config.steps, quiet=as_json) as display:
            try:
                plan = make_plan(config, display.preparing, kept(config))
            except BaseException as error:
                store.set("failed", f"{type(error).__name__}: {error}")
                claim.undo()
                raise
            try:
                code, story = _follow(config, plan, display, agent, store, slot)
            finally:
                claim.release()
    story.close(code, as_json)
    return code


@contextmanager
def interruptible() -> Iterator[None]:
    """Until workers are there to save something, SIGTERM is Ctrl-C: the run ends and leaves nothing."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _follow(
    config: TrainConfig, plan: Plan, display: Display, agent: Agent, store: dist.Store, slot: Slot
) -> tuple[int, Story]:
    """The run from its first view to its end."""
    for name, reason in plan.notes:
        display.say(f"checkpoint {name} is skipped: {reason}", "yellow")
    introduce(config, plan, display)
    folder = RunFolder(config.out, to_toml(config), plan.view.first_step, config.tensorboard)
    folder.event("started", step=plan.view.first_step, workers=config.workers, view=1)
    for name, reason in plan.notes:
        folder.event("checkpoint_skipped", step=plan.view.first_step, checkpoint=name, reason=reason)
    story, model = Story(config, plan, folder, display, store), plan.model
    first = replace(plan.view, agents=slot.dealt(config.workers))
    coordinator = Coordinator(
        store, first,
        Recovery(config.recovery, first, model.num_layers, model.tied, config.out / "checkpoints", plan.around),
        story.event, config.heartbeat, config.deadline, config.max_failures,
    )  # fmt: skip

    def tick() -> None:
        coordinator.tick()
        story.tick(coordinator.view.workers)

    try:
        code = agent.supervise(tick)
        store.set(OVER, str(code))
        _await_agents(coordinator, store)
        story.tick(coordinator.view.workers)
    except Exception as error:
        with suppress(RuntimeError):  # the store may be what failed
            if not store.check(["failed"]):
                store.set("failed", str(error))
            story.tick(coordinator.view.workers)
        folder.event("failed", error=str(error), step=story.step)
        raise
    finally:
        folder.close()
    return code, story


def _await_agents(coordinator: Coordinator, store: dist.Store) -> None:
    """The store stays until all agents that live have seen the end."""
    deadline = time.monotonic() + _LAST_S
    while not all(store.check([f"done/{agent}"]) for agent in coordinator.alive - {0}) and time.monotonic() < deadline:
        time.sleep(0.05)


def introduce(config: TrainConfig, plan: Plan, display: Display) -> None:
    model = plan.model
    count = sum(model.parameter_count(layer) for layer in range(model.num_layers))
    adapters = ""
    if model.lora is not None:
        trained = sum(model.trained_count(layer) for layer in range(model.num_layers))
        adapters = f" ({trained / 1e6:.2f}M of them trained, in adapters of rank {model.lora.rank})"
    view = plan.view
    spans = " ".join(f"{lo}:{hi}" for lo, hi in view.schedule("train").holders)
    parallel = f"{config.replicas} replica(s)" if config.scheduler != "skippipe" else f"skip {config.skip:g}"
    if plan.rounds is not None:
        cut = plan.rounds.cut
        said = [" ".join(f"{lo}:{hi}" for lo, hi in side) for side in (cut.forward, [cut.fused], cut.backward)]
        spans = f"{said[0]}, with the loss {said[1]}, back {said[2]}"
        parallel = f"{config.round_size} microbatches at once, {config.rule}"
    display.say(
        f"{model.config.model_type}, {count / 1e6:.1f}M parameters{adapters}, {model.num_layers} layers in spans "
        f"{spans}; {config.workers} workers, {parallel}, {config.scheduler}"
    )
    samples = config.samples_per_step
    display.say(
        f"global batch: {samples:,} samples of {config.sequence_length:,} tokens, so "
        f"{samples * config.sequence_length:,} tokens a step"
    )
    for line in plan.said:
        display.say(line)
    if view.checkpoint:
        display.say(f"resuming at step {view.first_step} from {Path(view.checkpoint).name}")


_SAID = {
    "detected": "worker {worker} {reason}",
    "remedy": "worker {replacement} takes its place: {remedy}",
    "rejoined": "worker {replacement} is ready and takes the place of worker {worker}: {remedy}",
    "taken_over": "the one before it does its work as well: {remedy}; worker {replacement} is being started",
    "redealt": "its {slots} slots go to the others",
    "joined": "worker {worker} has joined: it is used from the next iteration on",
    "rerouted": "its microbatches take other routes; worker {replacement} is being started",
    "resumed": "going on from step {step} after {seconds[total]:.2f} s",
    "link": "worker {worker} {reason}; nobody is lost: links are built anew",
    "rolled_back": "back to {to}: {steps_lost} steps are run again",
    "not_finite": "{error}; it is run again",
    "checkpoint_failed": "no checkpoint at step {step}: {error}; training goes on",
}


def _printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class Story:
    """Reads the workers' records and turns them into files and lines."""

    def __init__(
        self, config: TrainConfig, plan: Plan, folder: RunFolder, display: Display, store: dist.Store | None = None
    ) -> None:
        self._config, self._plan, self._folder, self._display, self._store = config, plan, folder, display, store
        self._pictures = Pictures(config, plan, folder)
        self._read: dict[int, int] = {}  # worker -> how many of its records
        self.step = plan.view.first_step
        self._began = time.monotonic()

    def tick(self, workers: Iterable[int]) -> None:
        """Handle every record that has come from `workers`, and the last ones of those who were lost since."""
        assert self._store is not None
        now = set(workers)
        for worker in sorted(now | set(self._read)):
            number = self._read.get(worker, 0)
            while self._store.check([key := f"record/{worker}/{number}"]):
                record = json.loads(self._store.get(key))
                self._store.delete_key(key)
                number += 1
                self.handle(record)
            if worker in now:
                self._read[worker] = number
            else:
                self._read.pop(worker, None)

    def event(self, event: str, **fields: Any) -> None:
        """Something happened to the membership: keep it, and say it."""
        fields.setdefault("step", self.step)
        self._folder.event(event, **fields)
        if (line := _SAID.get(event)) is not None:
            self._display.say(line.format(**fields), "yellow")

    def handle(self, record: dict[str, Any]) -> None:
        """Take one record that a worker, or the host of a pool, has made."""
        kind = record.pop("kind")
        if kind == "step":
            self.step = record["step"]
            self._folder.step(record)
            self._display.step(record)
        elif kind == "timeline":
            self._pictures.timeline(record["lanes"])
        elif kind == "evaluation":
            self._folder.event("evaluation", **record)
            self._display.say(
                f"step {record['step']}: held-out loss {record['loss']:.3f}, perplexity {record['perplexity']:.1f}"
            )
        elif kind == "stopped":
            self._folder.event("stopped", **record)
            self._display.say(f"asked to stop: saved at step {record['step']}; --resume goes on from there", "yellow")
        else:
            if record["event"] == "resumed":
                record["seconds"]["total"] = max(record["seconds"].values())
            self.event(**record)

    def close(self, code: int, as_json: bool) -> None:
        """The end: pictures, the loss curve, a sample, and where everything is."""
        self._pictures.loss()
        out, evaluations = self._config.out, self._folder.evaluations
        summary: dict[str, Any] = {
            "exit_code": code, "step": self.step, "seconds": round(time.monotonic() - self._began, 3), "out": str(out),
            "loss": self._folder.metrics[-1]["loss"] if self._folder.metrics else None,
            "held_out_perplexity": evaluations[-1]["perplexity"] if evaluations else None,
        }  # fmt: skip
        sample: Continuation | None = None
        if code != STOPPED:
            summary["model"] = str(out / "model")
            if self._config.sample_tokens:
                sample = continue_text(out / "model", None, self._config.sample_tokens, self._config.seed)
                summary["sample"] = sample.text
        if as_json:
            self._display.console.file = os.sys.stdout  # type: ignore[attr-defined]
            self._display.console.print_json(json.dumps(summary))
            return
        say = self._display.say
        say(loss_terminal(self._folder.metrics, width=72, height=12))
        if summary["held_out_perplexity"] is not None:
            say(f"held-out perplexity {summary['held_out_perplexity']:.2f} after {self.step} steps")
        if sample is not None:
            say(f"sample, after {sample.prompt!r}:\n{_printable(sample.text)}")
        if code != STOPPED:
            say(f"model     {out / 'model'}")
        say("pictures  " + "  ".join(str(path) for path in self._pictures.paths))
