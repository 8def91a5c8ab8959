"""Runs one lane of a schedule: a table from the kind of an op to its handler.

A lane takes its inputs from its own earlier ops or from the mailbox and leaves its outputs for its own later ops or on
a link. It knows no scheduler and no remedy. At its first STEP it settles with all others (`step_commit.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.model.backward import WeightGradients, defer_weights
from pipeline.runtime.batch import Batch, Job
from pipeline.runtime.compute import compute, on_device
from pipeline.runtime.step_commit import Settled, settle, visits
from pipeline.runtime.transport import LinkError
from pipeline.schedule.ops import COMPUTE, RECV, REDUCE, SEND, STEP, B, F, I, Op, R, Schedule, Span, W
from pipeline.schedule.timeline import Event
from pipeline.state.optimizer import clip_factor

if TYPE_CHECKING:
    from pipeline.runtime.worker import Worker

_POINTS = {F: "forward", B: "backward", I: "backward", REDUCE: "reduce"}


@dataclass
class Saved:
    """What a forward leaves for its backward."""

    x: Tensor
    y: Tensor
    later: WeightGradients | None


class LaneExecutor:
    """One run of one lane."""

    def __init__(self, worker: Worker, schedule: Schedule, job: Job, step: int, wish: dict[str, Any]) -> None:
        self.worker, self.schedule, self.job, self.step, self.wish = worker, schedule, job, step, wish
        self.lane = schedule.lanes.get(worker.id, ())
        self.deadline = time.monotonic() + worker.settings.deadline_s
        self.trains = any(route.backward for route in schedule.routes)
        self.model = worker.store.model
        self.values: dict[tuple[str, Span, int], Tensor] = {}
        self.saved: dict[tuple[Span, int], Saved] = {}
        self.losses: dict[int, Tensor] = {}
        self.batches: dict[int, Batch] = {}
        self.split = {op[1:3] for op in self.lane if op.kind == W} if not worker.settings.recompute else set()
        counts = Counter(_POINTS[op.kind] for op in self.lane if op.kind in _POINTS)
        self.middle = {point: n // 2 + 1 for point, n in counts.items()}
        self.seen: dict[str, int] = {}
        self.last = {op.microbatch: op for op in self.lane if op.kind in (B, I)}
        for old in [key for key in worker.spare if key[0] != step]:
            del worker.spare[old]
        self.handlers: dict[str, Callable[[Op], None]] = {
            F: self.forward, B: self.backward, I: self.backward, W: self.weights, SEND: self.send, RECV: self.receive,
            REDUCE: self.reduce, STEP: self.apply, R: self.redundant,
        }  # fmt: skip

    def execute(self, record: bool) -> tuple[Event, ...]:
        events: list[Event] = []
        start = time.monotonic()
        for op in self.lane:
            if op.kind not in self.handlers:
                raise ValueError(f"worker {self.worker.id} has no handler for {op}; it runs {sorted(self.handlers)}")
            if op.kind == STEP:
                _ = self.settled  # waiting for the others is a bubble, not the work of a STEP
            began = time.monotonic() - start
            self.run_op(op)
            if record and op.kind not in (SEND, RECV):
                if self.worker.settings.device.type == "cuda":
                    torch.cuda.synchronize()
                events.append(Event(self.worker.id, op, began, time.monotonic() - start))
        _ = self.settled  # lanes without STEP (evaluation, an idle worker) settle too
        self.worker.reduced.clear()
        self.worker.spare.clear()
        with suppress(LinkError):  # all that was sent has been used, or the step would not be settled
            self.worker.transport.flush(self.deadline)
        return tuple(events)

    def run_op(self, op: Op) -> None:
        """Run one op; faults are injected in the middle of its kind, and a worker that is to be slow takes its time."""
        point = _POINTS.get(op.kind)
        if point is not None:
            self.seen[point] = self.seen.get(point, 0) + 1
            if self.seen[point] == self.middle[point]:
                self.worker.probe(point, self.step)
        began = time.monotonic()
        self.handlers[op.kind](op)
        if op.kind in COMPUTE and self.worker.probe.slowdown > 1:
            time.sleep((self.worker.probe.slowdown - 1) * (time.monotonic() - began))

    # ---- compute ----

    def forward(self, op: Op) -> None:
        span, m = op.span, op.microbatch
        route = self.schedule.routes[m]
        place = route.forward.index(span)
        x = None if place == 0 else self.values.pop((F, route.forward[place - 1], m))
        saved = self.worker.spare.pop((self.step, span, m), None) if route.backward else None
        if saved is None:
            saved = self.compute(op, x, WeightGradients() if (span, m) in self.split else None)
        if span[1] == self.model.num_layers:
            self.losses[m] = saved.y.detach()
        else:
            self.values[F, span, m] = saved.y.detach()
        if route.backward:
            self.saved[span, m] = saved

    def redundant(self, op: Op) -> None:
        """F on a copy. Its input is the output of this worker's own forward, or has been received."""
        route, m = self.schedule.routes[op.microbatch], op.microbatch
        place, x = route.forward.index(op.span), None
        if place > 0:
            before = route.forward[place - 1]
            x = self.saved[before, m].y if (before, m) in self.saved else self.values.pop((F, before, m))
        self.worker.spare[self.step, op.span, m] = self.compute(op, x, None)

    def compute(self, op: Op, x: Tensor | None, later: WeightGradients | None) -> Saved:
        """The forward of a span on `x` (None: on the tokens), up to the loss where it is the last."""
        batch, settings = self.batch(op.microbatch), self.worker.settings
        x = batch.input_ids if x is None else x.detach().requires_grad_(torch.is_grad_enabled())
        recompute = settings.recompute and bool(self.schedule.routes[op.microbatch].backward)
        with defer_weights(later) if later else nullcontext():
            y = compute(
                self.worker.store.modules[op.span], x, self.job, batch, self.step, settings, recompute=recompute
            )  # fmt: skip
        return Saved(x, y, later)

    def backward(self, op: Op) -> None:
        """B, or I: there the products with weights were put off by `defer_weights` and W computes them."""
        span, m = op.span, op.microbatch
        saved = self.saved[span, m] if op.kind == I else self.saved.pop((span, m))
        route = self.schedule.routes[m]
        place = route.backward.index(span)
        gradient = None
        if place > 0:
            before = route.backward[place - 1]
            kind = I if (I, before, m) in self.schedule.home else B
            gradient = self.values.pop((kind, before, m))
        torch.autograd.backward(saved.y, gradient)
        saved.y = saved.y.detach()  # the graph and what it holds can go; W keeps its own inputs
        if place + 1 < len(route.backward):
            assert saved.x.grad is not None
            self.values[op.kind, span, m] = saved.x.grad
        if op is self.last[m]:  # who runs these forwards for real has come through
            for key in [key for key in self.worker.spare if key[2] == m]:
                del self.worker.spare[key]

    def weights(self, op: Op) -> None:
        saved = self.saved.pop((op.span, op.microbatch))
        if saved.later is not None:
            saved.later.run()

    # ---- communication ----

    def send(self, op: Op) -> None:
        assert op.of is not None
        self.worker.transport.send(self.worker.iteration, op.of, op.peer, self.values.pop(op.of[:3]))

    def receive(self, op: Op) -> None:
        assert op.of is not None
        tensor = self.worker.transport.receive(self.worker.iteration, op.of, op.peer, self.deadline)
        self.values[op.of[:3]] = tensor.to(self.worker.settings.device, non_blocking=True)

    def reduce(self, op: Op) -> None:
        """Start summing the span's gradient over its replicas; `settled` waits for it."""
        if op.span in self.worker.store.shards:
            self.worker.reduce(op.span)

    # ---- the end of the step ----

    @cached_property
    def settled(self) -> Settled:
        """The step as all workers agree on it, reached once per pass: everything that STEP needs to know."""
        beside = self.beside if any(op.kind == STEP for op in self.lane) else None
        return settle(
            self.worker, self.schedule, self.job, self.step, trains=self.trains, losses=self.losses, beside=beside,
            wish=self.wish, deadline=self.deadline,
        )  # fmt: skip

    @cached_property
    def beside(self) -> list[Span]:
        """The shards that are held but not computed in this lane: a tied weight, copies kept for others."""
        stepped = {op.span for op in self.lane if op.kind == STEP}
        return [shard for shard in self.worker.store.shards if shard not in stepped]

    def apply(self, op: Op) -> None:
        settled = self.settled
        last = op is self._last_step
        if last:
            self.worker.probe("optimizer", self.step)
        for span in (op.span, *self.beside) if last else (op.span,):
            if shard := self.worker.store.shards.get(span):
                scale = clip_factor(settled.norm, shard.config.clip) / max(
                    1, visits(self.schedule, self.job, self.step, span)
                )
                shard.apply(scale, settled.lr)

    @cached_property
    def _last_step(self) -> Op:
        return [op for op in self.lane if op.kind == STEP][-1]

    # ---- small things ----

    def batch(self, microbatch: int) -> Batch:
        if microbatch not in self.batches:
            self.batches[microbatch] = on_device(self.job.batch(self.step, microbatch), self.worker.settings.device)
        return self.batches[microbatch]
