"""Runs the work of one lane: a table from the kind of an op to its handler.

A lane takes its inputs from its own earlier ops or from a link and leaves its outputs for its own later ops or on a
link. It knows no scheduler, no remedy and no vote, and writes nothing but gradients: it ends where the first STEP
stands, and what it has found is a `LaneResult`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor

from pipeline.model.backward import WeightGradients, defer_weights
from pipeline.model.layered import LayeredModel
from pipeline.model.span_module import SpanModule
from pipeline.runtime.batch import Batch, Job, Needs
from pipeline.runtime.boundaries import Boundaries, Passage
from pipeline.runtime.compute import Output, Settings, compute, needs
from pipeline.runtime.device_time import Clock, Mark
from pipeline.runtime.mailbox import LinkError
from pipeline.runtime.probe import Probe, Unprobed
from pipeline.runtime.terms import StepTerms
from pipeline.schedule.layout import Excerpt
from pipeline.schedule.ops import COMPUTE, RECV, REDUCE, SEND, STEP, B, F, I, Op, R, Route, Span, W
from pipeline.schedule.timeline import Event

_POINTS = {F: "forward", B: "backward", I: "backward", REDUCE: "reduce"}


class Links(Protocol):
    """The way of outputs between places, within one iteration."""

    def send(self, op: Op, peer: int, tensor: Tensor, /) -> None:
        """Start sending the output of `op` to the place `peer`."""
        ...

    def receive(self, op: Op, peer: int, deadline: float, /) -> Tensor:
        """The output of `op`, waited for until `deadline` (time.monotonic seconds). Raises LinkError."""
        ...


@dataclass
class Saved:
    """What a forward leaves for its backward."""

    x: Tensor
    output: Output
    later: WeightGradients | None


Spare = MutableMapping[tuple[int, Span, int], Saved]
"""(step, span, microbatch) -> what a redundant forward has left, for the case that this worker takes over."""


@dataclass(frozen=True)
class Lane:
    """One run of one lane: what is to be done, for which step of which job, and with what.

    `gradients[span]` is the flat gradient into which the backward of a span adds; `reduce(span)` starts summing it over
    the span's replicas, and returns at once. Nothing is waited for after `deadline` (time.monotonic seconds).
    """

    excerpt: Excerpt
    job: Job
    step: int
    terms: StepTerms
    model: LayeredModel
    modules: Mapping[Span, SpanModule]
    gradients: Mapping[Span, Tensor]
    links: Links
    reduce: Callable[[Span], None]
    deadline: float
    settings: Settings
    probe: Probe = field(default_factory=Unprobed)
    spare: Spare = field(default_factory=dict)
    counted: Callable[[Span], None] = lambda _: None
    """Told when a microbatch's part of the gradient of a span has been added."""
    boundaries: Boundaries | None = None
    """Where what crosses links on its way forward is kept, in case the span beside is lost."""
    ended: Callable[[], str | None] = lambda: None
    """Why this iteration will not count, if that is known: then nothing more of it is computed."""

    @property
    def ops(self) -> tuple[Op, ...]:
        return self.excerpt.lane

    @property
    def place(self) -> int:
        return self.excerpt.place


@dataclass(frozen=True)
class LaneResult:
    """What a lane has found: microbatch -> term -> sum, of those whose loss was computed here; the STEPs that are still
    to be done, in order; and moments of its `clock`: when it `began`, when it has computed, and, where they are
    recorded, when each op began and ended. Who asks for seconds waits for the device."""

    sums: Mapping[int, Mapping[str, Tensor]]
    steps: tuple[Op, ...]
    clock: Clock
    began: Mark
    busy: tuple[tuple[Mark, Mark], ...] = ()
    timed: tuple[tuple[Op, Mark, Mark], ...] = ()

    @property
    def busy_s(self) -> float:
        """The seconds that it has computed, and not waited."""
        return sum(self.clock.seconds(*each) for each in self.busy)

    def events(self, place: int) -> tuple[Event, ...]:
        """The ops that took time, in seconds since it began."""
        seconds, began = self.clock.seconds, self.began
        return tuple(Event(place, op, seconds(began, a), seconds(began, b)) for op, a, b in self.timed)


def lane_needs(model: LayeredModel, ops: Sequence[Op]) -> dict[int, Needs]:
    """Microbatch -> what of it the ops of a lane compute with."""
    found: dict[int, Needs] = {}
    for op in ops:
        if op.kind in (F, R):
            found[op.microbatch] = found.get(op.microbatch, Needs.NOTHING) | needs(model, op.span)
    return found


def learns(model: LayeredModel, route: Route, span: Span) -> bool:
    """Whether something is trained in what a route visits before a span."""
    before = route.forward[: route.forward.index(span)]
    return any(layer in model.learning for each in before for layer in range(*each))


class LaneExecutor:
    """One run of one lane."""

    def __init__(self, lane: Lane) -> None:
        self.lane, self.settings, self.routes = lane, lane.settings, lane.excerpt.routes
        self.values: dict[tuple[str, Span, int], Tensor] = {}
        self.saved: dict[tuple[Span, int], Saved] = {}
        self.sums: dict[int, Mapping[str, Tensor]] = {}
        self.batches: dict[int, Batch] = {}
        ops = lane.ops
        at_once = self.settings.recompute or self.settings.compiled  # B does all, and W finds nothing left
        self.split = set() if at_once else {op[1:3] for op in ops if op.kind == W}
        self.needs = lane_needs(lane.model, ops)
        counts = Counter(_POINTS[op.kind] for op in ops if op.kind in _POINTS)
        self.middle = {point: n // 2 + 1 for point, n in counts.items()}
        self.seen = Counter[str]()
        self.clock = Clock(self.settings.device)
        self.busy: list[tuple[Mark, Mark]] = []
        self.last = {op.microbatch: op for op in ops if op.kind in (B, I)}
        self.handlers: dict[str, Callable[[Op], None]] = {
            F: self.forward, B: self.backward, I: self.backward, W: self.weights, SEND: self.send, RECV: self.receive,
            REDUCE: self.reduce, R: self.redundant,
        }  # fmt: skip

    def execute(self, record: bool = False) -> LaneResult:
        """Run the lane up to its first STEP. Raises LinkError, ValueError for an op that it cannot run, and whatever
        the model raises."""
        timed: list[tuple[Op, Mark, Mark]] = []
        start = self.clock.mark()
        work = list(takewhile(lambda op: op.kind != STEP, self.lane.ops))
        steps = self.lane.ops[len(work) :]
        for op in work:
            if op.kind not in self.handlers:
                raise ValueError(f"place {self.lane.place} has no handler for {op}; it runs {sorted(self.handlers)}")
            marks = self.run_op(op)
            if record and op.kind not in (SEND, RECV):
                timed.append((op, *marks))
        if odd := [op for op in steps if op.kind != STEP]:
            raise ValueError(f"{odd[0]} of place {self.lane.place} comes after a STEP, which ends the work of a lane")
        return LaneResult(self.sums, steps, self.clock, start, tuple(self.busy), tuple(timed))

    def run_op(self, op: Op) -> tuple[Mark, Mark]:
        """Run one op, and return when it began and ended; faults are injected in the middle of its kind, and a worker
        that is to be slow takes its time."""
        probe, point = self.lane.probe, _POINTS.get(op.kind)
        if point is not None:
            self.seen[point] += 1
            if self.seen[point] == self.middle[point]:
                probe(point, self.lane.step)
        if (reason := self.lane.ended()) is not None:
            raise LinkError(f"{op} was not begun: {reason}")
        began = self.clock.mark()
        self.handlers[op.kind](op)
        if op.kind in COMPUTE:
            if probe.slowdown > 1:
                time.sleep((probe.slowdown - 1) * self.clock.seconds(began, self.clock.mark()))
            self.busy.append((began, self.clock.mark()))
        return began, self.clock.mark()

    # ---- compute ----

    def forward(self, op: Op) -> None:
        span, m = op.span, op.microbatch
        route = self.routes[m]
        place = route.forward.index(span)
        x = None if place == 0 else self.values.pop((F, route.forward[place - 1], m))
        saved = self.lane.spare.pop((self.lane.step, span, m), None) if route.backward else None
        if saved is None:
            saved = self.compute(op, x, WeightGradients() if (span, m) in self.split else None)
        if saved.output.sums is None:
            self.values[F, span, m] = saved.output.y.detach()
        else:
            self.sums[m] = saved.output.sums
        if route.backward:
            self.saved[span, m] = saved

    def redundant(self, op: Op) -> None:
        """F on a copy. Its input is the output of this worker's own forward, or has been received."""
        route, m = self.routes[op.microbatch], op.microbatch
        place, x = route.forward.index(op.span), None
        if place > 0:
            before = route.forward[place - 1]
            own = self.saved.get((before, m))
            x = self.values.pop((F, before, m)) if own is None else own.output.y
        self.lane.spare[self.lane.step, op.span, m] = self.compute(op, x, None)

    def compute(self, op: Op, x: Tensor | None, later: WeightGradients | None) -> Saved:
        """The forward of a span on `x` (None: on the tokens), up to the loss where it is the last."""
        lane, batch = self.lane, self.batch(op.microbatch)
        route = self.routes[op.microbatch]
        if x is None:
            x = batch["input_ids"]
        else:  # nobody asks for its gradient where all before is frozen
            x = x.detach().requires_grad_(torch.is_grad_enabled() and learns(lane.model, route, op.span))
        recompute = self.settings.recompute and bool(route.backward)
        with defer_weights(later) if later else nullcontext():
            output = compute(
                lane.modules[op.span], x, lane.job, batch, lane.step, lane.terms, self.settings, recompute=recompute
            )
        return Saved(x, output, later)

    def backward(self, op: Op) -> None:
        """B, or I: there the products with weights were put off by `defer_weights` and W computes them."""
        span, m = op.span, op.microbatch
        saved = self.saved[span, m] if op.kind == I else self.saved.pop((span, m))
        route = self.routes[m]
        place = route.backward.index(span)
        gradient = None
        if place > 0:
            before = route.backward[place - 1]
            kind = I if (I, before, m) in self.values else B
            gradient = self.values.pop((kind, before, m))
        if saved.output.y.requires_grad:  # else it and all before it is frozen
            with self.weighed(span, m):
                torch.autograd.backward(saved.output.y, gradient)
        self.lane.counted(span)
        saved.output = Output(saved.output.y.detach())  # the graph and what it holds can go; W keeps its own inputs
        if place + 1 < len(route.backward):
            self.values[op.kind, span, m] = torch.zeros_like(saved.x) if saved.x.grad is None else saved.x.grad
        if op is self.last[m]:  # who runs these forwards for real has come through
            for key in [key for key in self.lane.spare if key[2] == m]:
                del self.lane.spare[key]

    def weights(self, op: Op) -> None:
        saved = self.saved.pop((op.span, op.microbatch))
        if saved.later is not None:
            with self.weighed(op.span, op.microbatch):
                saved.later.run()
            self.lane.counted(op.span)

    @contextmanager
    def weighed(self, span: Span, m: int) -> Iterator[None]:
        """Inside, what is added to a span's gradient counts as often as the terms of the microbatch want."""
        terms, factor = self.lane.terms, 1.0
        if terms.divisor(range(*span)) is None:
            factor = terms.factor(span[0], m)
        gradient = self.lane.gradients.get(span)
        if factor == 1.0 or gradient is None:
            yield
            return
        gradient.div_(factor)
        yield
        gradient.mul_(factor)

    # ---- communication ----

    def send(self, op: Op) -> None:
        assert op.of is not None
        tensor = self.values.pop(op.of[:3])
        self.lane.links.send(op.of, op.peer, tensor)
        if op.of.kind == F and self.lane.boundaries is not None:
            route = self.routes[op.of.microbatch].forward
            self.lane.boundaries.keep("into", route[route.index(op.of.span) + 1], self.passage(op.of), tensor)

    def receive(self, op: Op) -> None:
        assert op.of is not None
        tensor = self.lane.links.receive(op.of, op.peer, self.lane.deadline)
        self.values[op.of[:3]] = tensor = tensor.to(self.settings.device, non_blocking=True)
        if op.of.kind == F and self.lane.boundaries is not None:
            self.lane.boundaries.keep("out of", op.of.span, self.passage(op.of), tensor)

    def passage(self, op: Op) -> Passage:
        return Passage(self.lane.step, op.microbatch)

    def reduce(self, op: Op) -> None:
        self.lane.reduce(op.span)

    def batch(self, microbatch: int) -> Batch:
        """What this lane needs of a microbatch, on its device."""
        if microbatch not in self.batches:
            found = self.lane.job.batch(self.lane.step, microbatch, self.needs[microbatch])
            self.batches[microbatch] = found.to(self.settings.device)
        return self.batches[microbatch]
