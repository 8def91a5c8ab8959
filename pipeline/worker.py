"""Runs one lane: a table from the kind of an op to its handler, and the moment where a step becomes true.

The worker knows no scheduler and no remedy. It takes its inputs from its own earlier ops or from the mailbox, leaves
its outputs for its own later ops or on a link, and at the first STEP settles with all others: losses, norms and
wishes are exchanged once, and everybody applies the same factor, or nobody steps.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.backward import WeightGradients, defer_weights
from pipeline.batch import Batch, Job
from pipeline.groups import Group, Work, sum_over
from pipeline.optimizer import clip_factor, learning_rate
from pipeline.rng import RngKey
from pipeline.schedule import COMPUTE, RECV, REDUCE, SEND, STEP, B, F, I, Op, R, Schedule, Span, W
from pipeline.store import TIED, ResidentStore, shard_holders
from pipeline.timeline import Event
from pipeline.transport import LinkError, Transport

Voted = Callable[[], None] | None


class Exchange(Protocol):
    """How the workers of a view settle a step: everybody's payload to everybody, or nobody's to anybody."""

    def __call__(
        self, iteration: int, payload: dict[str, Any], deadline: float, voted: Voted = None, /
    ) -> Mapping[int, dict[str, Any]]:
        """Every worker's payload, by worker. `voted` is called when the own one is given but the outcome is open."""
        ...


class Probe(Protocol):
    """Called at named points of a step (forward, backward, reduce, commit, optimizer): to inject faults."""

    slowdown: float
    """How many times as long every compute op is to take."""

    def __call__(self, point: str, step: int, /) -> None: ...


class Unprobed:
    """Nothing happens."""

    slowdown = 1.0

    def __call__(self, point: str, step: int, /) -> None:
        return None


class NonFiniteLoss(RuntimeError):
    """A loss or gradient norm is NaN or infinite. The step did not happen: weights are those of the step before."""


@dataclass(frozen=True)
class Settings:
    """How a worker computes, whatever it computes."""

    device: torch.device
    seed: int = 0
    autocast: torch.dtype | None = None
    recompute: bool = False
    deadline_s: float = 300.0


@dataclass
class Saved:
    """What a forward leaves for its backward."""

    x: Tensor
    y: Tensor
    later: WeightGradients | None


@dataclass(frozen=True)
class StepResult:
    """One iteration, as every worker agrees on it. `loss` is the mean over `tokens`."""

    loss: float
    tokens: int
    grad_norm: float = 0.0
    lr: float = 0.0
    norms: Mapping[Span, float] = field(default_factory=dict)
    wishes: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    events: tuple[Event, ...] = ()


@dataclass
class Worker:
    """One worker, view after view. `groups[shard]` reduces a shard's gradient over its holders, if there are several.

    `norms` are those of the last committed step: span -> gradient norm before clipping.
    """

    id: int
    store: ResidentStore
    transport: Transport
    groups: Mapping[Span, Group]
    exchange: Exchange
    settings: Settings
    iteration: int = 0
    probe: Probe = field(default_factory=Unprobed)
    norms: Mapping[Span, float] = field(default_factory=dict)
    reduced: dict[Span, Work] = field(default_factory=dict)
    """The sums over replicas that were started since the last committed step."""
    sums: Counter[Span] = field(default_factory=Counter)
    """How many sums were started over each group since it was built: equal on all its members, or one of them waits."""
    spare: dict[tuple[int, Span, int], Saved] = field(default_factory=dict)
    """(step, span, microbatch) -> what a redundant forward has left, for the case that this worker takes over."""

    def run(
        self, schedule: Schedule, job: Job, step: int, *, wish: Mapping[str, Any] | None = None, record: bool = False
    ) -> StepResult:
        """Run this worker's lane of `schedule` for `step`, to the settled end.

        `wish` travels with the vote to every worker (`StepResult.wishes`). Raises LinkError when a peer is lost or
        the step deadline passes, NonFiniteLoss on every worker alike, and whatever the model raises.
        """
        self.iteration += 1
        self.transport.mailbox.advance(self.transport.view, self.iteration)
        pass_ = _Pass(self, schedule, job, step, dict(wish or {}))
        training = pass_.trains
        self.store.train(training)
        with torch.set_grad_enabled(training):
            events = pass_.execute(record)
        settled = pass_.settled
        if training:
            self.norms = settled.norms
        return StepResult(
            settled.loss, settled.tokens, settled.norm, settled.lr if training else 0.0, settled.norms,
            settled.wishes, events,
        )  # fmt: skip

    def gather(self, payload: dict[str, Any]) -> Mapping[int, dict[str, Any]]:
        """Everyone's payload, by worker, outside any step: a barrier that carries JSON."""
        self.iteration += 1
        return self.exchange(self.iteration, payload, time.monotonic() + self.settings.deadline_s)

    def reduce(self, shard: Span) -> None:
        """Start summing a shard's gradient over its holders, if there are several."""
        if group := self.groups.get(shard):
            self.sums[shard] += 1
            self.reduced[shard] = sum_over(group, self.store.shards[shard].gradient, self.settings.deadline_s)

    def finish_reductions(self, deadline: float) -> None:
        """Wait for all sums that were started. Raises LinkError."""
        for shard, work in self.reduced.items():
            try:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except RuntimeError as error:
                raise LinkError(f"summing the gradient of {shard} over its replicas failed: {error}") from error

    def drop(self) -> None:
        """Forget the gradients of a step that does not count."""
        for shard in self.store.shards.values():
            shard.drop()


_POINTS = {F: "forward", B: "backward", I: "backward", REDUCE: "reduce"}


@dataclass(frozen=True)
class _Settled:
    loss: float
    tokens: int
    norm: float
    lr: float
    norms: Mapping[Span, float]
    wishes: Mapping[int, Mapping[str, Any]]


class _Pass:
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
        batch, backward = self.batch(op.microbatch), bool(self.schedule.routes[op.microbatch].backward)
        x = batch.input_ids if x is None else x.detach().requires_grad_(torch.is_grad_enabled())
        with defer_weights(later) if later else nullcontext(), self.autocast():
            y = self.worker.store.modules[op.span](
                x, attention_mask=batch.attention_mask, recompute=self.worker.settings.recompute and backward,
                rng=RngKey(self.worker.settings.seed, self.step, batch.sample_ids),
            )  # fmt: skip
        return Saved(x, self.job.loss(y, batch) if op.span[1] == self.model.num_layers else y, later)

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
    def settled(self) -> _Settled:
        """The step as all workers agree on it, reached once per pass: everything that STEP needs to know."""
        worker, shards = self.worker, self.worker.store.shards
        training = any(op.kind == STEP for op in self.lane)
        for shard in self.beside if training else ():
            worker.reduce(shard)
        worker.finish_reductions(self.deadline)
        holders = shard_holders(self.schedule.holders, self.model.num_layers, self.model.tied)
        norms = {
            f"{span[0]}:{span[1]}": (shard.squared_norm() / max(1, self.visits(span)) ** 2)
            for span, shard in shards.items()
            if training and holders.get(span, (worker.id,))[0] == worker.id
        }
        votes = worker.exchange(
            worker.iteration,
            {"losses": {str(m): float(loss) for m, loss in self.losses.items()}, "norms": norms, "wish": self.wish},
            self.deadline,
            lambda: worker.probe("commit", self.step),
        )
        return self._agree(votes)

    @cached_property
    def beside(self) -> list[Span]:
        """The shards that are held but not computed in this lane: a tied weight, copies kept for others."""
        stepped = {op.span for op in self.lane if op.kind == STEP}
        return [shard for shard in self.worker.store.shards if shard not in stepped]

    def _agree(self, votes: Mapping[int, Mapping[str, Any]]) -> _Settled:
        losses = sorted((int(m), loss) for vote in votes.values() for m, loss in vote["losses"].items())
        for m, loss in losses:
            if not math.isfinite(loss):
                self.worker.drop()
                if not self.trains:
                    raise NonFiniteLoss(f"the held-out loss is {loss} at microbatch {m}")
                where = f"step {self.step + 1}, microbatch {m}"
                raise NonFiniteLoss(f"the loss is {loss} at {where}; the step was not taken")
        squares = {_span(text): value for vote in votes.values() for text, value in vote["norms"].items()}
        norm = math.sqrt(sum(value for _, value in sorted(squares.items())))
        if not math.isfinite(norm):
            span = next(s for s, value in sorted(squares.items()) if not math.isfinite(value))
            self.worker.drop()
            raise NonFiniteLoss(
                f"the gradient norm of span {span} is {squares[span]} at step {self.step + 1}; the step was not taken"
            )
        tokens = sum(self.job.tokens(self.step, m) for m, _ in losses)
        config = next((s.config for s in self.worker.store.shards.values()), None)
        return _Settled(
            loss=sum(loss for _, loss in losses) / max(1, tokens), tokens=tokens, norm=norm,
            lr=learning_rate(config, self.step) if config else 0.0,
            norms={span: math.sqrt(value) for span, value in sorted(squares.items())},
            wishes={worker: vote["wish"] for worker, vote in sorted(votes.items())},
        )  # fmt: skip

    def apply(self, op: Op) -> None:
        settled = self.settled
        last = op is self._last_step
        if last:
            self.worker.probe("optimizer", self.step)
        for span in (op.span, *self.beside) if last else (op.span,):
            if shard := self.worker.store.shards.get(span):
                scale = clip_factor(settled.norm, shard.config.clip) / max(1, self.visits(span))
                shard.apply(scale, settled.lr)

    @cached_property
    def _last_step(self) -> Op:
        return [op for op in self.lane if op.kind == STEP][-1]

    # ---- small things ----

    def visits(self, span: Span) -> int:
        """The tokens of the microbatches whose route visits `span`, over all workers: the divisor of its gradient."""
        visited = (m for m, route in enumerate(self.schedule.routes) if span == TIED or span in route.forward)
        return sum(self.job.tokens(self.step, m) for m in visited)

    def batch(self, microbatch: int) -> Batch:
        if microbatch not in self.batches:
            batch, device = self.job.batch(self.step, microbatch), self.worker.settings.device
            mask = batch.attention_mask
            self.batches[microbatch] = Batch(
                batch.sample_ids, batch.input_ids.to(device), batch.labels.to(device),
                None if mask is None else mask.to(device),
            )  # fmt: skip
        return self.batches[microbatch]

    @contextmanager
    def autocast(self) -> Iterator[None]:
        settings = self.worker.settings
        with torch.autocast(settings.device.type, dtype=settings.autocast, enabled=settings.autocast is not None):
            yield


def _span(text: str) -> Span:
    lo, _, hi = text.partition(":")
    return int(lo), int(hi)


def connections(schedule: Schedule) -> set[tuple[int, int]]:
    """The (source, target) workers between which a lowered schedule sends."""
    return {(worker, op.peer) for worker, op in schedule.ops() if op.kind == SEND}
