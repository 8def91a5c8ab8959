"""One worker: its state, its links, its vote. `lane_executor.py` runs a lane for it, `step_commit.py` ends a step.

The worker knows no scheduler and no remedy. It counts iterations, so that every message and every vote has a number,
and the sums over its replicas, so that they can be brought in step after an interruption.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch

from pipeline.runtime.batch import Job
from pipeline.runtime.compute import Settings
from pipeline.runtime.groups import Group, Work, sum_over
from pipeline.runtime.lane_executor import LaneExecutor, Saved
from pipeline.runtime.probe import Probe, Pulse, Unprobed
from pipeline.runtime.transport import LinkError, Transport
from pipeline.schedule.ops import SEND, Schedule, Span
from pipeline.schedule.timeline import Event
from pipeline.state.resident import ResidentStore

Voted = Callable[[], None] | None


class Exchange(Protocol):
    """How the workers of a view settle a step: everybody's payload to everybody, or nobody's to anybody."""

    def __call__(
        self, iteration: int, payload: dict[str, Any], deadline: float, voted: Voted = None, /
    ) -> Mapping[int, dict[str, Any]]:
        """Every worker's payload, by worker. `voted` is called when the own one is given but the outcome is open.

        `deadline` is in time.monotonic seconds, or infinite: then the wait is as long as the run is guided.
        """
        ...


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
    pulse: Pulse = field(default_factory=Pulse)
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
        executor = LaneExecutor(self, schedule, job, step, dict(wish or {}))
        training = executor.trains
        self.store.train(training)
        with torch.set_grad_enabled(training):
            events = executor.execute(record)
        settled = executor.settled
        if training:
            self.norms = settled.norms
        return StepResult(
            settled.loss, settled.tokens, settled.norm, settled.lr if training else 0.0, settled.norms,
            settled.wishes, events,
        )  # fmt: skip

    def gather(self, payload: dict[str, Any]) -> Mapping[int, dict[str, Any]]:
        """Everyone's payload, by worker, outside any step: a barrier that carries JSON.

        Before it others may read, write or receive much, so it waits as long as somebody sees to it that they come on.
        """
        self.iteration += 1
        return self.exchange(self.iteration, payload, math.inf)

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


def connections(schedule: Schedule) -> set[tuple[int, int]]:
    """The (source, target) workers between which a lowered schedule sends."""
    return {(worker, op.peer) for worker, op in schedule.ops() if op.kind == SEND}
