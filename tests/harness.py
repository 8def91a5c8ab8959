"""Real workers for tests: processes forked from a forkserver, joined over a real store and real gloo links.

`run_workers` is the one way in. The reference that results are held against, `plain_training`, is transformers and
torch in one process; of the engine it uses the initial weights and the mask function, nothing else.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from jobs.config import TrainConfig
from jobs.pipeline_engine import PipelineEngine
from jobs.pipelines import layer_costs, plan_layout
from jobs.pool_engine import PoolEngine
from jobs.registry import KINDS
from jobs.rounds import Rounds, plan_rounds
from jobs.text import TextJob
from jobs.train import Trainer
from jobs.unlearn.rollout import ROLLOUT, RolloutJob, roll_out
from launch.config import config_from_dict
from launch.forkserver import ForkServer
from launch.pool_worker import pool_worker, run_jobs
from launch.round_train import hosting, make_layout
from launch.worker_main import build_member, connect
from pipeline.model.flops import ModelFlops
from pipeline.model.layered import LayeredModel
from pipeline.model.rng import RngKey, keyed_dropout
from pipeline.model.weights import read_config
from pipeline.runtime.batch import Needs
from pipeline.runtime.probe import Pulse
from pipeline.schedule.layout import EVALUATE, TRAIN
from pipeline.schedule.ops import Route
from pipeline.state.host_optimizer import HostOptimizer
from pipeline.state.host_store import HostStore, store_path
from pipeline.state.optimizer import OptimizerConfig, decay_groups, learning_rate
from pipeline.store.hosting import StoreThread
from recovery.commit import READY
from recovery.member import Member
from recovery.membership import View, await_view, publish, within
from recovery.pool import Pool
from tests import unlearn_rows

TIMEOUT_S = 90.0
LINKS = os.environ.get("UNBROKEN_LINKS", "")
"""What all runs of the tests exchange activations through, where they do not ask for something themselves: shm or gloo;
unset, as users have it. `make soak` runs the tests that start processes over both."""


def linked(argv: Sequence[str]) -> list[str]:
    """The arguments of a command, with LINKS."""
    takes = LINKS and argv[0] in ("train", "unlearn") and "--links" not in argv
    return [*argv, *(["--links", LINKS] if takes else [])]


def with_links(config: TrainConfig) -> TrainConfig:
    """Settings, with LINKS."""
    return replace(config, links=LINKS) if LINKS and config.links == "auto" else config  # type: ignore[arg-type]


def random_tokens(vocabulary: int, length: int, sample: int) -> np.ndarray:
    """Sample `sample`: [length] int64, the same everywhere. Skewed, so that there is something to learn."""
    drawn = np.random.default_rng([7, sample]).random(length) ** 3
    return (drawn * vocabulary).astype(np.int64)


def make_job(config: TrainConfig, vocabulary: int) -> TextJob:
    """The same random microbatches in workers and in the reference."""
    length = config.sequence_length + 1
    return TextJob(
        lambda i: random_tokens(vocabulary, length, i), config.sequence_length, microbatches=config.microbatches,
        size=config.microbatch_size,
    )  # fmt: skip


@dataclass
class Outcome:
    """What the workers of a run found: losses and norms per step, and tensors by name."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    """Of the first step, divided by the tokens, before clipping."""
    replicas_equal: bool = True
    details: dict[int, dict[str, Any]] = field(default_factory=dict)


def entry(payload: dict[str, Any]) -> int:
    """What a process forked from the forkserver does: run the command line, or be a worker of `run_workers`."""
    if "kills" in payload:
        from tests.killed_commit import drive

        return _saying(Path(payload["log"]), lambda: drive(payload))
    if "call" in payload:  # a function of a test's own
        module, _, name = payload["call"].partition(":")
        return getattr(importlib.import_module(module), name)(payload)
    if "argv" in payload:
        return _command(linked(payload["argv"]), Path(payload["log"]))
    if "pool" in payload:
        if "late" in payload["config"]["data"] and payload["worker"] >= payload["config"]["workers"]:
            time.sleep(0.7)  # who takes a lost one's place takes its time
        return pool_worker(payload, _jobs_of(payload["config"]["data"]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    store = connect(payload["store"], TIMEOUT_S)
    view = await_view(store, 1, within(TIMEOUT_S))
    config = config_from_dict(KINDS[view.details.get("job", "text")].settings, view.details["config"])
    me = int(payload["worker"])
    member = build_member(me, config, view, me, store, payload, Pulse())
    worker = member.worker
    member.enter(1, None)
    train = member.excerpt(TRAIN)
    if "unlearn" in payload:
        from tests.unlearn_engines import pipeline_worker  # it needs this module

        return pipeline_worker(member, payload)
    if "rollout" in payload:
        return _roll_out(member, me, config, payload)
    job = make_job(config, int(worker.store.model.config.vocab_size))
    gradients: dict[str, Tensor] = {}
    votes = worker.commit.exchange

    def watching(iteration: int, vote: dict[str, Any], deadline: float, combine: Any, voted: Any = None) -> Any:
        if iteration == READY + 1:  # reduced, not yet applied
            for state in worker.store.states.values():
                for name, parameter in state.parameters.items():
                    assert parameter.grad is not None
                    gradients[name] = parameter.grad.clone()
        return votes(iteration, vote, deadline, combine, voted)

    worker.commit.exchange = watching
    results = [worker.run(train, job, step) for step in range(config.steps)]
    weights = {n: t for layer in worker.store.layers() for n, t in worker.store.weights(layer).items()}
    out = Path(payload["out"])
    save_file({n: t.cpu().contiguous() for n, t in weights.items()}, out / f"weights-{me}.safetensors")
    save_file({n: t.cpu().contiguous() for n, t in gradients.items()}, out / f"gradients-{me}.safetensors")
    details = {"losses": [r.loss for r in results], "norms": [r.grad_norm for r in results]}
    (out / f"result-{me}.json").write_text(json.dumps(details))
    worker.transport.close()
    return 0


def _jobs_of(data: str) -> Callable[..., Any]:
    """What a pool's worker makes its jobs with."""
    if data.startswith(unlearn_rows.DATA):
        return unlearn_rows.pool_jobs
    return pool_jobs if "random-tokens" in data else run_jobs


def _roll_out(member: Member, me: int, config: TrainConfig, payload: dict[str, Any]) -> int:
    """What the model answers at each of some temperatures."""
    from tests import unlearn_rows

    told: list[list[list[int]]] = []
    for temperature in payload["rollout"]:
        job = RolloutJob(
            microbatches=member.excerpt(EVALUATE).num_microbatches, size=config.microbatch_size,
            sequence_length=config.sequence_length, end_token=1, seed=5, temperature=temperature,
            cut=True,
        )  # fmt: skip
        engine = PipelineEngine(member, {ROLLOUT: job}, 1)
        told.append(roll_out(engine, job, 2, unlearn_rows.prompts(), 7))
    (Path(payload["out"]) / f"rollout-{me}.json").write_text(json.dumps(told))
    member.worker.transport.close()
    return 0


def _command(argv: list[str], log: Path) -> int:
    from launch.cli import main

    return _saying(log, lambda: main(argv))


def _saying(log: Path, work: Callable[[], int]) -> int:
    """Do something; all that is said goes to a file."""
    said = log.open("w", buffering=1)  # open to the end of the process
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    sys.stdout = sys.stderr = said  # pytest has put its own objects in their places
    return work()


@dataclass(frozen=True)
class Command:
    """A finished command: its exit code, and what it said."""

    code: int
    output: str


class Started:
    """`unbroken ...` in a process of its own, forked from the forkserver: no time is lost on imports."""

    def __init__(self, forkserver: ForkServer, log: Path, *argv: str, **payload: Any) -> None:
        self._forkserver, self._log = forkserver, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self.pid = forkserver.start({**(payload or {"argv": list(argv)}), "log": str(log)})
        self._code: int | None = None

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        if self._code is None:
            stop(self._forkserver, {self.pid: 0})

    def wait(self, timeout_s: float = TIMEOUT_S) -> Command:
        """Its end. Raises AssertionError, with what it said, if that does not come in time."""
        deadline = time.monotonic() + timeout_s
        while self._code is None and time.monotonic() < deadline:
            self._code = next((e.code for e in self._forkserver.poll(0.05) if e.pid == self.pid), None)
        output = self._log.read_text()
        assert self._code is not None, f"not over after {timeout_s:.0f} s; it said: {output[-2000:]}"
        return Command(self._code, output)


def run_command(forkserver: ForkServer, log: Path, *argv: str, timeout_s: float = TIMEOUT_S) -> Command:
    """Run `unbroken ...` to its end."""
    with Started(forkserver, log, *argv) as started:
        return started.wait(timeout_s)


@contextmanager
def hosted_store() -> Iterator[tuple[dist.Store, dict[str, Any]]]:
    """A store in this process, and its address for workers."""
    server = StoreThread("127.0.0.1", 0, token := secrets.token_bytes(32))
    address = {"host": "127.0.0.1", "port": server.port, "prefix": "test", "token": token.hex()}
    try:
        yield connect(address, 30.0), address
    finally:
        server.close()


def run_workers(
    forkserver: ForkServer,
    config: TrainConfig,
    model_config: PreTrainedConfig,
    out: Path,
    device: str = "cpu",
    **more: Any,
) -> Outcome:
    """Train `model_config` for config.steps with real workers. Raises AssertionError when one fails or hangs."""
    out.mkdir(parents=True, exist_ok=True)
    config = with_links(config)
    model_config.save_pretrained(out / "model-config")
    model = LayeredModel(model_config, lora=config.lora(), depth=config.depth, trained=config.patterns())
    layout, _ = plan_layout(config, model, config.evaluate_samples)
    fields = json.loads(json.dumps(asdict(config) | {"out": str(out)}, default=str))
    view = View(
        1,
        tuple(range(config.workers)),
        layout.key,
        details={"config": fields, "source": None, "job": config.job},
        places={w: w for w in range(config.workers)},
    )
    with hosted_store() as (store, address):
        payload = {"store": address, "threads": 1, "device": device, "nccl": False, "out": str(out), **more}
        running = {forkserver.start({**payload, "worker": w}): w for w in view.workers}
        publish(store, view, layout)
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while running and time.monotonic() < deadline:
                for exit_ in forkserver.poll(0.05):
                    worker = running.pop(exit_.pid)
                    assert exit_.code == 0, f"worker {worker} {exit_}"
            assert not running, f"workers {sorted(running.values())} did not end"
        finally:
            stop(forkserver, running)
    return Outcome([], [], {}, {}) if {"unlearn", "rollout"} & set(more) else _collect(out, view.workers)


def stop(forkserver: ForkServer, running: dict[int, int]) -> None:
    """End what still runs."""
    for pid in running:
        with suppress(ProcessLookupError):  # it has ended, and is about to be reported
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while running and time.monotonic() < deadline:
        for exit_ in forkserver.poll(0.05):
            running.pop(exit_.pid, None)


def _collect(out: Path, workers: Sequence[int]) -> Outcome:
    results = {w: json.loads((out / f"result-{w}.json").read_text()) for w in workers}
    tensors: dict[str, dict[str, Tensor]] = {"weights": {}, "gradients": {}}
    equal = True
    for kind, found in tensors.items():
        for w in workers:
            for name, tensor in load_file(out / f"{kind}-{w}.safetensors").items():
                equal &= name not in found or torch.equal(found[name], tensor)
                found[name] = tensor
    first = results[workers[0]]
    return Outcome(first["losses"], first["norms"], tensors["weights"], tensors["gradients"], equal, results)


def pool_jobs(config: TrainConfig, first_step: int, first_sample: int) -> dict[str, TextJob]:
    """The microbatches of `make_job`, for a pool."""
    vocabulary = int(read_config(config.out / "model-config").vocab_size)
    held_out = replace(make_job(config, vocabulary), limit=config.evaluate_samples)
    return {"train": make_job(config, vocabulary), "evaluate": held_out}


def run_pool(
    forkserver: ForkServer, config: TrainConfig, model_config: PreTrainedConfig, out: Path, evaluate: bool = False
) -> Outcome:
    """Train `model_config` for config.steps with a pool of stateless workers, hosted by this process."""
    config = replace(config, scheduler="roundpipe", out=out, data=config.data or "random-tokens")
    outcome = Outcome([], [], {}, {})
    events: list[dict[str, Any]] = []

    def event(name: str, **fields: Any) -> None:
        events.append({"event": name, **fields})

    def report(record: dict[str, Any]) -> None:
        if record["kind"] == "step":
            outcome.losses.append(record["loss"])
            outcome.norms.append(record["grad_norm"])
        events.append({"event": record["kind"], **record})

    with hosted_pool(forkserver, config, model_config, event) as (optimizer, pool, rounds):
        jobs = pool_jobs(config, 0, 0)
        optimizer.initialise(config.seed, None)
        update = optimizer.update

        def watching(step: int, norm: float, lr: float) -> None:
            if step == 0:  # measured, not yet applied
                for state in optimizer.states.values():
                    for n, p in state.parameters.items():
                        assert p.grad is not None
                        outcome.gradients[n] = p.grad.clone()
            update(step, norm, lr)

        optimizer.update = watching
        engine = PoolEngine(
            optimizer, pool, rounds.cut, rounds.row, jobs, config.round_size, config.deadline,
            flops=ModelFlops.of(optimizer.model, config.microbatch_size, config.sequence_length),
        )  # fmt: skip
        reports = SimpleNamespace(put=report, save_ledger=lambda step, view: "")
        trainer = Trainer(config, engine, jobs["train"], "", reports, bool)
        pool.open(config.workers)
        while trainer.step < config.steps:
            trainer.one_step(record=True)
        if evaluate:
            trainer._evaluate(config.steps)
        optimizer.drain(TIMEOUT_S)
        layers = range(optimizer.model.num_layers)
        outcome.weights = {n: t.clone() for layer in layers for n, t in optimizer.weights(layer).items()}
        most = max((member.most_held for member in pool.members.values()), default=0)
        outcome.details[0] = {
            "events": events, "most_held": most, "rounds": rounds, "speeds": pool.dispatcher.speeds
        }  # fmt: skip
    return outcome


@contextmanager
def hosted_pool(
    forkserver: ForkServer,
    config: TrainConfig,
    model_config: PreTrainedConfig,
    event: Callable[..., None] = lambda *_, **__: None,
) -> Iterator[tuple[HostOptimizer, Pool, Rounds]]:
    """A pool in this process without workers yet, its weights not filled in; all of it ends with the context."""
    config.out.mkdir(parents=True, exist_ok=True)
    model_config.save_pretrained(config.out / "model-config")
    model = LayeredModel(model_config, lora=config.lora(), depth=config.depth, trained=config.patterns())
    config.validate()
    rounds = plan_rounds(config, model, layer_costs(model, config.sequence_length), config.evaluate_samples)
    store = HostStore.create(make_layout(config, model, rounds.cut, config.workers), store_path(config.out))
    try:
        with hosting(config, store, rounds, forkserver, event, lambda _: "cpu") as (optimizer, pool):
            yield optimizer, pool, rounds
    finally:
        store.close()


def plain_training(
    config: TrainConfig, model_config: PreTrainedConfig, device: str = "cpu", routes: Sequence[Route] = (),
    behind: bool = False,
) -> Outcome:  # fmt: skip
    """The same training with transformers and torch in this process: full model, full batch, one optimizer.

    With `routes`, by microbatch, only the blocks that a route visits are run, in its order, and the gradient of a
    block is divided by the tokens that have visited it. With `behind`, gradients are those of the weights before the
    last update. Adapters are those of peft. With patterns of what is trained, the rest is frozen.
    """
    blueprint = LayeredModel(model_config, lora=config.lora())
    whole = blueprint.build((0, blueprint.num_layers), seed=config.seed)
    state = {n: p for layer in range(blueprint.num_layers) for n, p in whole.named_layer_parameters(layer).items()}
    attention = "eager" if blueprint.has_dropout else "sdpa"
    model = AutoModelForCausalLM.from_config(model_config, attn_implementation=attention, dtype=torch.float32)
    if blueprint.lora is not None:
        import peft  # only where it is asked for: an import of seconds

        block = model.get_submodule(blueprint.paths(1)["block"])
        adapted = blueprint.lora.config(block, whole=True)
        peft.get_peft_model(model, adapted, autocast_adapter_dtype=False)  # changed in place
    for name, parameter in model.named_parameters() if config.patterns() else ():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in config.patterns()))
    standard = {n: n.replace(".base_layer", "").replace(".default", "") for n in model.state_dict()}
    values = {n: state[name].detach().clone() for n, name in standard.items() if name in state}
    assert set(state) == {standard[n] for n in values}
    missing = model.load_state_dict(values, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    model.to(device).train()
    job, settings = make_job(config, model_config.vocab_size), config.optimizer_config()
    named = {standard[n]: p for n, p in model.named_parameters() if p.requires_grad}
    optimizers = _plain_optimizers(named, settings)
    tokens = config.samples_per_step * config.sequence_length
    outcome = Outcome([], [], {}, {})
    older = {n: p.detach().clone() for n, p in named.items()}
    for step in range(config.steps):
        total = 0.0
        newest = {n: p.detach().clone() for n, p in named.items()}
        _fill(named, older if behind else newest)
        for m in range(config.microbatches):
            batch = job.batch(step, m, Needs.INPUT | Needs.LOSS)
            with _keyed(model, RngKey(config.seed, step, batch.sample_ids)), _routed(model, routes[m : m + 1]):
                logits = model(batch["input_ids"].to(device), use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten().to(device), reduction="sum")
            if loss.requires_grad:  # else its route visits nothing that is trained
                (loss / tokens).backward()
            total += float(loss.detach()) / tokens
        _fill(named, newest)
        older = newest
        if step == 0:
            outcome.gradients = {n: p.grad.clone().cpu() for n, p in named.items() if p.grad is not None}
        for number, block in enumerate(model.model.layers, 1) if routes else ():
            visits = sum(any(lo <= number < hi for lo, hi in route.forward) for route in routes)
            for parameter in block.parameters():
                if parameter.grad is not None:
                    parameter.grad *= len(routes) / visits
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip or float("inf"))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            optimizer.step()
            optimizer.zero_grad()
        outcome.losses.append(total)
        outcome.norms.append(float(norm))
    outcome.weights = {n: p.detach().cpu() for n, p in named.items()}
    return outcome


def _plain_optimizers(named: dict[str, torch.nn.Parameter], settings: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """torch's own, over the whole model."""
    if settings.optimizer == "sgd":
        return [torch.optim.SGD(named.values(), lr=settings.lr, momentum=settings.momentum)]
    muon = {n: p for n, p in named.items() if settings.optimizer == "muon" and p.dim() == 2 and ".layers." in n}
    groups: Any = decay_groups({n: p for n, p in named.items() if n not in muon}, settings.weight_decay)
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)]
    if muon:
        how: Any = {"weight_decay": settings.weight_decay, "momentum": settings.momentum}
        found.append(torch.optim.Muon(muon.values(), adjust_lr_fn="match_rms_adamw", **how))
    return found


@torch.no_grad()
def _fill(named: dict[str, torch.nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in named.items():
        parameter.copy_(values[name])


@contextmanager
def _routed(model: torch.nn.Module, routes: Sequence[Route]) -> Iterator[None]:
    """Inside, a plain Llama consists of the blocks of the one route alone, if there is one."""
    if not routes:
        yield
        return
    inner: Any = model.model
    whole, count = inner.layers, inner.config.num_hidden_layers
    visited = [n for lo, hi in routes[0].forward for n in range(lo, hi) if 1 <= n <= len(whole)]
    inner.layers = torch.nn.ModuleList([whole[n - 1] for n in visited])
    inner.config.num_hidden_layers = len(visited)
    try:
        yield
    finally:
        inner.layers, inner.config.num_hidden_layers = whole, count


@contextmanager
def _keyed(model: torch.nn.Module, key: RngKey) -> Iterator[None]:
    """Inside, the plain model's dropout calls draw the masks of `key`: the embedding's as layer 0, then the blocks'."""
    transformer = getattr(model, "transformer", None)
    if transformer is None:
        yield
        return
    handles, active = [], {}
    for layer, module in enumerate([transformer.drop, *transformer.h]):

        def enter(_m: Any, _a: Any, layer: int = layer) -> None:
            active[layer] = keyed_dropout(key, layer)
            active[layer].__enter__()

        def leave(_m: Any, _a: Any, _o: Any, layer: int = layer) -> None:
            active.pop(layer).__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """|ours - theirs| / |theirs| over all tensors together. Names must agree."""
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))
    gap = sum(float((ours[n].double() - theirs[n].double()).square().sum()) for n in ours)
    size = sum(float(theirs[n].double().square().sum()) for n in theirs)
    return (gap / size) ** 0.5
