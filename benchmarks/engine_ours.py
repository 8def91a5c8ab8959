"""Our engine on the work of engine_peers.py: the same Llama from the same weights, the same tokens, AdamW and clipping.

    python benchmarks/engine_ours.py --scheduler zero_bubble --workers 2 --steps 8 --warmup 2 --json

A process is the agent: it forks the workers from a forkserver, hosts their store, and prints one JSON line of the form
that the peers print. Every op of the timed steps is recorded; from the median times of forwards, backwards and
optimizer steps, by span, the simulator says what the schedule should have given with links and votes that cost nothing.
`measured_over_predicted` is what the engine keeps of that. AdamW is the peers' but for norms, which do not decay here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# The packages come before scripts beside this one: recovery is both.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
import torch.distributed as dist
from engine_peers import CLIP, LEARNING_RATE, Work, llama, parse, peak_rss, reset_peak, show, stop_well
from engine_predict import predict
from torch import Tensor

from jobs.config import TrainConfig
from jobs.pipelines import plan_layout
from jobs.text import TEXT, token_loss
from launch.config import config_from_dict
from launch.forkserver import ForkServer
from launch.slots import Slot, open_store
from launch.worker_main import build_member, connect
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import read_config
from pipeline.runtime.batch import Batch, Needs
from pipeline.runtime.probe import Pulse
from pipeline.runtime.worker import Worker
from pipeline.schedule.layout import TRAIN, Excerpt, Layout
from pipeline.schedule.ops import Schedule, span_text
from recovery.membership import View, await_view, publish, within
from schedulers import PLANNERS

JOIN_S = 60.0
PREFIX = "ours_"
Entry = Callable[[dict[str, Any]], int]
"""What a forked worker runs."""


@dataclass
class WorkJob:
    """The peers' tokens as a job of the engine."""

    work: Work
    _held: tuple[int, tuple[Tensor, Tensor]] | None = field(default=None, repr=False)

    @property
    def terms(self) -> Mapping[str, float]:
        """See pipeline.runtime.batch.Job."""
        return {TEXT: 1.0}

    def batch(self, step: int, microbatch: int, needs: Needs) -> Batch:
        """See pipeline.runtime.batch.Job."""
        if self._held is None or self._held[0] != step:
            self._held = step, self.work.data(step)
        inputs, targets = self._held[1]
        lo = microbatch * self.work.batch
        hi = lo + self.work.batch
        first = step * len(inputs)
        return Batch(tuple(range(first + lo, first + hi)), {"input_ids": inputs[lo:hi], "labels": targets[lo:hi]})

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        """See pipeline.runtime.batch.Job."""
        return {TEXT: self.work.batch * self.work.sequence}

    def loss(self, logits: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """See pipeline.runtime.batch.Job."""
        return {TEXT: token_loss(logits, batch["labels"])}


# ---- what touches the engine's own way of starting ----


def make_config(scheduler: str, work: Work, workers: int, steps: int, out: Path, deadline_s: float) -> TrainConfig:
    """The peers' hyperparameters as settings of a job: a constant rate, AdamW's defaults in torch, clipping at CLIP."""
    config = TrainConfig(
        workers=workers, scheduler=scheduler, microbatches=work.microbatches, microbatch_size=work.batch,
        sequence_length=work.sequence, steps=steps, lr=LEARNING_RATE, warmup=0, min_lr_ratio=1.0, weight_decay=0.01,
        beta1=0.9, beta2=0.999, eps=1e-8, clip=CLIP, out=out, deadline=deadline_s,
    )  # fmt: skip
    config.validate()
    return config


def make_view(config: TrainConfig) -> tuple[View, Layout]:
    """The first view of a run whose weights lie in config.out, and its layout, planned as for users.

    An evaluation is planned but not run.
    """
    source = config.out / "model-config"
    layout, _ = plan_layout(config, LayeredModel(read_config(source)), config.microbatch_size)
    fields = json.loads(json.dumps(asdict(config), default=str))
    workers = tuple(range(config.workers))
    details = {"config": fields, "source": str(source)}
    return View(1, workers, layout.key, details=details, places={w: w for w in workers}), layout


def join(payload: dict[str, Any]) -> tuple[Worker, Excerpt]:
    """In a worker process: its spans, links and lane."""
    store, me = connect(payload["store"], JOIN_S), int(payload["worker"])
    view = await_view(store, 1, within(JOIN_S))
    config = config_from_dict(TrainConfig, view.details["config"])
    member = build_member(me, config, view, me, store, payload, Pulse())
    member.enter(1, None)
    return member.worker, member.excerpt(TRAIN)


# ---- one worker ----


def entry(payload: dict[str, Any]) -> int:
    """What a forked worker does."""
    return leave(payload, train)


def leave(payload: dict[str, Any], train: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Train, and leave the figures, or the error, in the payload's folder under the worker's number."""
    folder, me = Path(payload["folder"]), int(payload["worker"])
    try:
        figures = train(payload)
    except Exception as error:
        traceback.print_exc()
        (folder / f"{me}.error").write_text(f"{type(error).__name__}: {error}")
        return 1
    (folder / f"{me}.json").write_text(json.dumps(figures))
    return 0


def train(payload: dict[str, Any]) -> dict[str, Any]:
    """Run all steps; seconds and ops are those of the timed ones."""
    torch.set_num_threads(1)
    before = psutil.Process().memory_info().rss
    worker, schedule = join(payload)
    job = WorkJob(Work(**payload["work"]))
    losses: list[float] = []
    seconds: list[float] = []
    events: list[list[tuple[str, float, float]]] = []
    for number in range(payload["warmup"] + payload["steps"]):
        if number == payload["warmup"]:
            reset_peak()
            worker.gather({})  # so that nobody's first timed step waits for another's clean-up
        began = time.perf_counter()
        result = worker.run(schedule, job, number, record=True)
        seconds.append(time.perf_counter() - began)
        losses.append(result.loss)
        events.append([(str(e.op), e.start, e.end) for e in result.events])
    peak = peak_rss()
    sums = time_sums(worker, schedule)
    worker.transport.close()
    timed = slice(payload["warmup"], None)
    return {
        "loss": losses,
        "seconds": seconds[timed],
        "events": events[timed],
        "sums": sums,
        "peak_rss_bytes": peak,
        "rss_before_bytes": before,
    }


def time_sums(worker: Worker, schedule: Excerpt, repeats: int = 5) -> dict[str, float]:
    """Own shared span -> median seconds of summing its gradient over its holders when all of them are there."""
    found: dict[str, float] = {}
    for span, members in schedule.holders.items():
        seconds: list[float] = []
        for _ in range(repeats if len(members) > 1 else 0):
            worker.gather({})
            if group := worker.reducer.group(span_text(span)):
                gradient = torch.zeros_like(worker.store.gradients[span_text(span)])
                began = time.perf_counter()
                group.allreduce([gradient]).wait()
                seconds.append(time.perf_counter() - began)
        if seconds:
            found[f"{span[0]}:{span[1]}"] = statistics.median(seconds)
    return found


# ---- the agent ----


class OursError(RuntimeError):
    """A run of ours that did not finish; the message says which worker failed and how."""


@contextmanager
def hosted_store() -> Iterator[tuple[dist.Store, dict[str, Any]]]:
    """A store of this process, and its address for workers."""
    handle = open_store(Slot(prefix="engine"), JOIN_S)
    try:
        yield handle.store, handle.address()
    finally:
        handle.close()


def run(
    scheduler: str, work: Work, workers: int, steps: int, warmup: int, deadline_s: float, forkserver: ForkServer
) -> dict[str, Any]:
    """Train in forked workers and gather their figures. Raises OursError, or as the planner does."""
    deadline = time.monotonic() + deadline_s
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama(work).save_pretrained(folder / "model-config")
        view, layout = make_view(make_config(scheduler, work, workers, steps + warmup, folder, deadline_s))
        shared = {"threads": 1, "device": "cpu", "nccl": False, "folder": name, "work": asdict(work)}
        with hosted_store() as (store, address):
            payload = {**shared, "store": address, "steps": steps, "warmup": warmup}
            running = {forkserver.start({**payload, "worker": w}): w for w in view.workers}
            publish(store, view, layout)
            while running:
                if time.monotonic() > deadline:
                    raise OursError(f"workers {sorted(running.values())} did not finish before the deadline")
                for exit_ in forkserver.poll(0.2):
                    worker = running.pop(exit_.pid)
                    if exit_.code:
                        said = folder / f"{worker}.error"
                        raise OursError(f"worker {worker} " + (said.read_text() if said.is_file() else str(exit_)))
        found = [json.loads((folder / f"{w}.json").read_text()) for w in view.workers]
    return figures(f"{PREFIX}{scheduler}", work, layout.train, found)


def figures(name: str, work: Work, schedule: Schedule, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The form that the peers' figures have, and what the simulator predicts from the ops of the same steps."""
    seconds = [max(times) for times in zip(*(f["seconds"] for f in found), strict=True)]
    speed = statistics.median(work.tokens / s for s in seconds)
    lanes = [{str(w): f["events"][k] for w, f in enumerate(found)} for k in range(len(seconds))]
    sums = {
        span: min(f["sums"][f"{span[0]}:{span[1]}"] for f in (found[w] for w in members))
        for span, members in schedule.holders.items()
        if len(members) > 1
    }
    prediction = predict(schedule, lanes, seconds, sums)
    predicted = work.tokens / prediction["predicted_step_s"]
    return {
        "peer": name,
        "workers": len(found),
        "tokens_per_s": speed,
        "tokens_per_s_steps": [work.tokens / s for s in seconds],
        "loss": found[0]["loss"],
        "peak_rss_bytes": [f["peak_rss_bytes"] for f in found],
        "rss_before_bytes": [f["rss_before_bytes"] for f in found],
        "torch": torch.__version__,
        "work": asdict(work),
        "predicted_tokens_per_s": predicted,
        "measured_over_predicted": speed / predicted,
        **prediction,
    }


def alone(
    options: argparse.Namespace, work: Work, name: str, entry: Entry, train: Callable[[ForkServer], dict[str, Any]]
) -> int:
    """Train with forked workers that run `entry`, and print the figures, or the error, as the peers do."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    stop_well(options.parent)
    forkserver = ForkServer(entry)  # before anything starts threads
    try:
        found = train(forkserver)
    except (ValueError, RuntimeError) as error:
        print(json.dumps({"peer": name, "workers": options.workers, "error": f"{type(error).__name__}: {error}"}))
        return 1
    finally:
        forkserver.close()
    show(found, work, options)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheduler", required=True, choices=PLANNERS)
    options, work = parse(parser)

    def train(forkserver: ForkServer) -> dict[str, Any]:
        sizes = options.workers, options.steps, options.warmup, options.deadline
        return run(options.scheduler, work, *sizes, forkserver)

    return alone(options, work, f"{PREFIX}{options.scheduler}", entry, train)


if __name__ == "__main__":
    sys.exit(main())
