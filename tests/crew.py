"""Workers in threads of this process, over a real store, real votes, links and sums: what is lost is lost in the middle
of a named question, and comes back from its replica in the next view."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from jobs.config import TrainConfig
from jobs.pipelines import plan_layout
from jobs.unlearn.job import UnlearnJob
from launch.worker_main import build_member
from pipeline.model.layered import LayeredModel
from pipeline.runtime.probe import Pulse
from pipeline.runtime.procedure import run_procedure
from pipeline.runtime.worker import StepResult
from pipeline.schedule.layout import TRAIN
from pipeline.state.resident import part_holders
from recovery.commit import Follower
from recovery.member import INTERRUPTIONS, Member, Watcher
from recovery.membership import Move, View, next_view, publish
from tests.harness import TIMEOUT_S, connect, hosted_store, with_links


class Lost(BaseException):
    """The worker ends here, without a word."""


class Probe:
    """Calls `met(point, how often it was met in this step)` at every point."""

    slowdown = 1.0

    def __init__(self, met: Callable[[str, int, int], None]) -> None:
        self._met, self._seen = met, Counter[tuple[str, int]]()

    def __call__(self, point: str, step: int, /) -> None:
        self._seen[point, step] += 1
        self._met(point, self._seen[point, step], step)


class Crew:
    """A run of some steps of a job. `lost` is (worker, step, point, how often it was met there): that worker is lost
    there. `watch` is told of every point that a member meets. `weights` are what comes out, `results` what all say of
    each step."""

    def __init__(
        self, config: TrainConfig, shape: PreTrainedConfig, out: Path, job: Callable[[], UnlearnJob], steps: int,
        lost: tuple[int, int, str, int] | None = None, watch: Callable[[Member, str], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        self.config, self.out, self.job = with_links(replace(config, out=out)), out, job
        self.steps, self.lost = steps, lost
        self.watch = watch
        out.mkdir(parents=True, exist_ok=True)
        shape.save_pretrained(out / "model-config")
        self.model = LayeredModel(shape)
        self.layout, _ = plan_layout(self.config, self.model, 6)
        self.members: dict[int, Member] = {}
        self.results: dict[int, list[StepResult]] = {}
        self.points: dict[int, list[str]] = {}
        self.gone = threading.Event()
        self.errors: list[BaseException] = []
        self.weights: dict[str, Tensor] = {}

    def run(self) -> Crew:
        places = {worker: worker for worker in range(self.config.workers)}
        details = {"source": None, "attempt": 1}
        view = View(1, tuple(places), self.layout.key, places=places, next_worker=len(places), details=details)
        with hosted_store() as (store, address):
            self.address = address
            publish(store, view, self.layout)
            threads = [self._thread(worker, view) for worker in view.workers]
            for thread in threads:
                thread.start()
            if self.lost is not None:
                while not self.gone.wait(0.05):
                    assert any(thread.is_alive() for thread in threads), f"never there; met: {self.points}"
                worker = self.lost[0]
                view = next_view(view, [worker])
                heir = next(each for each in view.joined)
                holders = part_holders(self.layout.holders, self.model.num_layers, self.model.tied)
                view = replace(view, moves=tuple(
                    Move(heir, part, "replica", ((next(p for p in sorted(at) if p != worker), part),))
                    for part, at in holders.items() if worker in at
                ))  # fmt: skip
                publish(store, view, self.layout)
                threads.append(self._thread(heir, view))
                follower = Follower(store, 1)
                follower.follow()
                follower.abort()
                threads[-1].start()
            deadline = time.monotonic() + TIMEOUT_S
            for thread in threads:
                while thread.is_alive() and time.monotonic() < deadline and not self.errors:
                    thread.join(0.05)
            if self.errors:
                raise self.errors[0]
            assert not any(thread.is_alive() for thread in threads), "somebody hangs"
        for worker in view.workers:
            store = self.members[worker].worker.store
            for layer in store.layers():
                for name, tensor in store.weights(layer).items():
                    assert torch.equal(self.weights.setdefault(name, tensor.clone()), tensor), "holders differ"
        return self

    def _thread(self, worker: int, view: View) -> threading.Thread:
        place = view.places[worker]
        connected = connect(self.address, TIMEOUT_S)
        payload = {"store": self.address, "device": "cpu", "nccl": False}
        member = build_member(worker, self.config, view, place, connected, payload, Pulse())
        member.guided = lambda: True  # type: ignore[assignment]
        self.members[worker], self.points[worker] = member, []

        def met(point: str, times: int, step: int) -> None:
            self.points[worker].append(point)
            self.watch(member, point)
            if (worker, step, point, times) == self.lost and not self.gone.is_set():
                raise Lost

        member.worker.probe = Probe(met)
        return threading.Thread(target=self._work, args=(member, view), name=f"worker {worker}", daemon=True)

    def _work(self, member: Member, view: View) -> None:
        worker, job, step = member.worker, self.job(), 0
        watcher = Watcher(connect(self.address, TIMEOUT_S), worker.id, view.number, threading.Event())
        watcher.attach(member)
        try:
            joined = member.enter(view.number, None if view.number > 1 else {"step": 0})
            step = int(joined.position["step"])
            while step < self.steps:
                try:
                    procedure = job.procedure
                    assert procedure is not None
                    result = run_procedure(worker, member.excerpt(TRAIN), job, procedure, step)
                    worker.store.let_go()
                    step += 1
                    self.results.setdefault(step, []).append(result)
                except INTERRUPTIONS as error:
                    if self.lost is None or not self.gone.wait(TIMEOUT_S):
                        raise
                    member.complain(error)
                    joined = member.enter(joined.view.number + 1, {"step": step})
            worker.transport.close()
        except Lost:
            self.gone.set()
        except BaseException as error:
            self.errors.append(error)
            self.gone.set()
        finally:
            watcher.stop()


def relative(found: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> float:
    """|found - wanted| / |wanted| over all tensors together, in float64."""
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    gap = sum(float((found[n].double() - wanted[n].double()).square().sum()) for n in wanted)
    return (gap / sum(float(wanted[n].double().square().sum()) for n in wanted)) ** 0.5
