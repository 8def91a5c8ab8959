"""One worker: its layers, its links, its sums, its vote, and the order of these in a step.

The worker knows no scheduler and no remedy. A step is its lane (`lane_executor.py`), the end of the sums over replicas
(`reducer.py`), one vote (`step_commit.py`), and the optimizer. A step that is a procedure (`procedure.py`) runs several
lanes before that vote.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.batch import Job
from pipeline.runtime.boundaries import Boundaries
from pipeline.runtime.compute import Settings
from pipeline.runtime.device_time import Mark, read_back
from pipeline.runtime.lane_executor import Lane, LaneExecutor, LaneResult, Spare
from pipeline.runtime.peak_memory import PeakMemory, peak_memory
from pipeline.runtime.probe import Probe, Pulse, Unprobed
from pipeline.runtime.reducer import Reducer
from pipeline.runtime.shards import exchange
from pipeline.runtime.step_commit import NonFiniteLoss, Settled, StepCommit, Vote
from pipeline.runtime.terms import StepTerms
from pipeline.runtime.transport import LinkError, Transport
from pipeline.schedule.layout import Excerpt
from pipeline.schedule.ops import Op, span_text
from pipeline.schedule.timeline import Event
from pipeline.state.layer_state import LayerState
from pipeline.state.optimizer import clip_factor, learning_rate
from pipeline.state.resident import ResidentStore, part_holders, part_span

Wish = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class StepResult:
    """One iteration, as every worker agrees on it. `loss` is what is minimised; `means` and `counts` are by term."""

    loss: float
    means: Mapping[str, float]
    counts: Mapping[str, int]
    grad_norm: float = 0.0
    lr: float = 0.0
    norms: Mapping[str, float] = field(default_factory=dict)
    """State -> gradient norm before clipping."""
    wishes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    """What a record says of the memory that all have had at most."""
    passes: Mapping[int, int] | None = None
    """Microbatch -> how often it went forward and back; None where each went once."""
    flops: int | None = None
    """Model FLOPs of the step, where they were counted."""

    @property
    def tokens(self) -> int:
        """All that counted for any term."""
        return sum(self.counts.values())


@dataclass
class Worker:
    """One worker, view after view: a view brings a new `commit`, says which `workers` are in which place, and edits
    transport and reducer. `norms` are those of the last committed step, by state."""

    id: int
    store: ResidentStore
    transport: Transport
    reducer: Reducer
    commit: StepCommit
    settings: Settings
    probe: Probe = field(default_factory=Unprobed)
    pulse: Pulse = field(default_factory=Pulse)
    norms: Mapping[str, float] = field(default_factory=dict)
    workers: Mapping[int, int] = field(default_factory=dict)
    spare: Spare = field(default_factory=dict)
    boundaries: Boundaries = field(default_factory=Boundaries)
    applied: Callable[[LayerState, float, float], None] = lambda *_: None
    """Called before the gradient of a state, times a scale, is applied at a learning rate."""

    def run(self, excerpt: Excerpt, job: Job, step: int, *, wish: Wish = dict, record: bool = False) -> StepResult:
        """Run this worker's lane for `step`, to the settled end.

        `wish()`, asked late, travels with the vote to every worker (`StepResult.wishes`). Raises LinkError when a peer
        is lost or the step deadline passes, NonFiniteLoss on every worker alike, and whatever the model raises.
        """
        lane = self.lane(excerpt, job, step)
        if lane.excerpt.trains and self.boundaries.limit:
            lane = replace(lane, boundaries=self.boundaries)
        self.store.train(lane.excerpt.trains)
        for old in [key for key in self.spare if key[0] != step]:
            del self.spare[old]
        with torch.set_grad_enabled(lane.excerpt.trains):
            found = LaneExecutor(lane).execute(record)
        return self.conclude(lane, found, self.finish_sums(lane, found), wish, record)

    def conclude(
        self, lane: Lane, found: LaneResult, divisors: Mapping[str, float], wish: Wish, record: bool = False
    ) -> StepResult:
        """Vote on what stands in the gradients, and apply it, divided by what `divisors` has for each part."""
        try:
            settled = self._settle(lane, found, divisors, wish)
        except NonFiniteLoss:  # every sum of it has ended
            self.reducer.clear()
            self.store.drop()
            raise
        if lane.boundaries is not None:
            lane.boundaries.committed()
        lr = learning_rate(self.store.config, lane.step) if lane.excerpt.trains else 0.0
        found = replace(found, timed=(*found.timed, *self._apply(lane, found, settled, divisors, lr)))
        self.reducer.clear()
        self.spare.clear()
        with suppress(LinkError):  # all that was sent has been used, or the step would not be settled
            self.transport.flush(lane.deadline)
        if lane.excerpt.trains:
            self.norms = settled.norms
        return StepResult(
            settled.loss, settled.means, settled.counts, settled.norm, lr, settled.norms, settled.wishes,
            found.events(lane.place) if record else (), settled.memory,
        )  # fmt: skip

    def lane(self, excerpt: Excerpt, job: Job, step: int, terms: StepTerms | None = None) -> Lane:
        """A run of a lane in the iteration that begins here, which has until the deadline of a step; with the job's own
        terms, unless others are given."""
        iteration, deadline = self.commit.begin(), time.monotonic() + self.settings.deadline_s
        self.transport.mailbox.advance(self.transport.view, iteration)
        model, modules = self.store.model, self.store.modules
        flat = self.store.gradients
        gradients = {span: flat[text] for span in modules if (text := span_text(span)) in flat}
        return Lane(
            excerpt, job, step, terms or StepTerms.of(job, step, excerpt.num_microbatches, excerpt.visits), model,
            modules, gradients, _Links(self.transport, iteration, self.workers),
            lambda span: self.reducer.start(span_text(span)), deadline, self.settings, self.probe, self.spare,
            lambda span: self.store.count(span, excerpt.num_microbatches), ended=self.transport.mailbox.woken,
        )  # fmt: skip

    def finish_sums(self, lane: Lane, found: LaneResult) -> dict[str, float]:
        """Have the gradient of each part that is held summed over its holders; returns what it is divided by."""
        parts = self.store.gradients
        steps = {span_text(op.span) for op in found.steps}
        for part in parts:
            if steps and part not in steps:  # held, but not computed in this lane: a shared weight, a copy for others
                self.reducer.start(part)
        self.reducer.finish(lane.deadline)
        if steps:
            self.store.finish_sums()
        num_layers = self.store.model.num_layers
        return {part: lane.terms.divisor(_layers(part, num_layers)) or 1.0 for part in parts}

    def answered(self, excerpt: Excerpt) -> dict[str, list[LayerState]]:
        """Part -> its states, of the parts that this worker alone answers for."""
        model, place = self.store.model, excerpt.place
        holders = part_holders(excerpt.holders, model.num_layers, model.tied)
        mine = [part for part in self.store.gradients if holders.get(part, (place,))[0] == place]
        return {part: self.store.states_of(part) for part in mine}

    def _settle(self, lane: Lane, found: LaneResult, divisors: Mapping[str, float], wish: Wish) -> Settled:
        """The step as all workers agree on it."""
        sums, squares = self._read(lane, found, divisors)
        if found.steps and self.store.shares:
            self._exchange(lane, squares, divisors)
        # of a step alone: what an evaluation takes on the device is then told with the step after it
        memory = peak_memory(self.settings.device) if lane.excerpt.trains else PeakMemory()
        return self.commit.settle(
            lane.step if lane.excerpt.trains else None, lane.terms, [state.name for state in self.store.model.states],
            Vote(sums, squares, wish(), found.busy_s, memory), lane.deadline,
            lambda: self.probe("commit", lane.step),
        )  # fmt: skip

    def _read(
        self, lane: Lane, found: LaneResult, divisors: Mapping[str, float]
    ) -> tuple[dict[int, dict[str, float]], dict[str, float]]:
        """Microbatch -> term -> sum, and state -> squared norm, NaN where it cannot be counted: the one time that a
        step waits for its device."""
        answered = self.answered(lane.excerpt) if found.steps else {}
        parts = {state.name: part for part, states in answered.items() for state in states}
        numbers: dict[tuple[str | int, str], Tensor] = {
            (m, term): value for m, sums in found.sums.items() for term, value in sums.items()
        }
        numbers |= {("norm", state.name): state.norm() for states in answered.values() for state in states}
        numbers |= {("beyond", name): value for name, value in (self.store.beyond() if found.steps else {}).items()}
        read = read_back(numbers)
        squares = {name: read["norm", name] ** 2 / divisors[part] ** 2 for name, part in parts.items()}
        squares |= {name: math.nan for what, name in read if what == "beyond" and read[what, name]}
        return {m: {term: read[m, term] for term in sums} for m, sums in found.sums.items()}, squares

    def _exchange(self, lane: Lane, squares: Mapping[str, float], divisors: Mapping[str, float]) -> None:
        """All new weights are everywhere before the vote, so that whoever is lost after it takes none along."""
        config, norm = self.store.config, 0.0
        if config.clip > 0:
            found = self.commit.norm([state.name for state in self.store.model.states], squares, lane.deadline)
            if found is None:  # all will be told so by the vote
                return
            norm = found
        lr = learning_rate(config, lane.step)
        clip, probe = clip_factor(norm, config.clip), lambda: self.probe("exchange", lane.step)
        exchange(self.store, self.reducer, divisors, clip, lr, lane.deadline, probe)

    def _apply(
        self, lane: Lane, found: LaneResult, settled: Settled, divisors: Mapping[str, float], lr: float
    ) -> list[tuple[Op, Mark, Mark]]:
        """The STEPs of the lane, and when they began and ended: a span's layers each, and with the last one all else
        that is held."""
        timed: list[tuple[Op, Mark, Mark]] = []
        left, clip = dict(self.store.states), clip_factor(settled.norm, self.store.config.clip)
        for op in found.steps:
            last = op is found.steps[-1]
            if last:
                self.probe("optimizer", lane.step)
            began = found.clock.mark()
            for state in [left.pop(state.name) for state in self.store.states_of(span_text(op.span))]:
                self._apply_one(state, clip, divisors, lr)
            if last:
                self.probe("snapshot", lane.step)
            for state in left.values() if last else ():  # copies for others, and what is shared
                self._apply_one(state, clip, divisors, lr)
                state.seal()
            timed.append((op, began, found.clock.mark()))
        return timed

    def _apply_one(self, state: LayerState, clip: float, divisors: Mapping[str, float], lr: float) -> None:
        scale = clip / divisors.get(self.store.part_of[state.name], 1.0)
        self.applied(state, scale, lr)
        state.apply(scale, lr)

    def gather(self, payload: dict[str, Any]) -> Mapping[int, dict[str, Any]]:
        """Everyone's payload, by worker: see StepCommit."""
        return self.commit.gather(payload)


@dataclass(frozen=True)
class _Links:
    """The transport within one iteration; `workers` says who is in which place."""

    transport: Transport
    iteration: int
    workers: Mapping[int, int]

    def send(self, op: Op, peer: int, tensor: Tensor) -> None:
        self.transport.send(self.iteration, op, self.workers[peer], tensor)

    def receive(self, op: Op, peer: int, deadline: float) -> Tensor:
        return self.transport.receive(self.iteration, op, self.workers[peer], deadline)


def _layers(part: str, num_layers: int) -> tuple[int, ...]:
    """The layers that compute with a part."""
    span = part_span(part)
    return (0, num_layers - 1) if span is None else tuple(range(*span))
