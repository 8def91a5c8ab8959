"""What a pool keeps in mind: runs over rows of units, which units each worker has, and what is there already."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.runtime.channel import Channel
from pipeline.runtime.peak_flops import UNKNOWN, Capability
from pipeline.runtime.peak_memory import PeakMemory
from pipeline.schedule.ops import Span
from pipeline.schedule.work_units import BACKWARD, FORWARD, WorkUnit

Fact = tuple[str, int, int]
"""(x or dx, microbatch, layer): a hidden state, or the gradient of one, that is there."""


@dataclass
class Iteration:
    """One pass over a row of units: an iteration of training, or a part of an evaluation."""

    number: int
    step: int
    job: str
    row: Sequence[WorkUnit]
    boundaries: Sequence[int]
    source: str
    version: int
    side: int = 0
    weights: Mapping[str, float] | None = None
    """Term -> its weight in what is minimised; None where it is always the same."""
    told: Mapping[str, Any] | None = None
    """What workers must hear of the job (JSON); None where they know all."""
    counted: bool = True
    """Whether its gradients are added as they come, or wait until the update before it has been asked for."""
    members: frozenset[int] = frozenset()
    pending: deque[int] = field(default_factory=deque)
    done: dict[int, set[int]] = field(default_factory=dict)
    facts: set[Fact] = field(default_factory=set)
    sums: dict[int, dict[str, float]] = field(default_factory=dict)
    """Microbatch -> term -> its sum."""
    committed: Counter[tuple[Span, int]] = field(default_factory=Counter)
    """(backward span, microbatch) -> how often its gradient was counted: once each in the end."""
    waiting: dict[Span, dict[tuple[int, ...], int]] = field(default_factory=dict)
    added: dict[Span, int] = field(default_factory=dict)
    left: int = 0
    events: dict[int, list[tuple[str, float, float]]] = field(default_factory=dict)
    """Place -> what was done there: (op, start, end)."""
    began: float = 0.0

    def needs(self, unit: WorkUnit, m: int) -> list[Fact]:
        """What must be there before a microbatch of a unit can run to its end."""
        lo, hi = unit.span
        needed: list[Fact] = [("x", m, lo)] if lo else []
        return [*needed, ("dx", m, hi)] if unit.kinds == BACKWARD else needed

    def makes(self, unit: WorkUnit, m: int) -> list[Fact]:
        """What is there once a microbatch of a unit is through."""
        lo, hi = unit.span
        if unit.kinds == FORWARD:
            return [("x", m, layer) for layer in self.boundaries if lo < layer <= hi]
        return [("dx", m, lo)] if lo else []


@dataclass
class Given:
    """A unit that a worker has."""

    id: int
    run: Iteration
    index: int
    block: int
    recalled: bool = False

    @property
    def unit(self) -> WorkUnit:
        return self.run.row[self.index]


@dataclass
class PoolMember:
    """A worker, from its start to its end. `place` is that of the worker which it has followed; `stuck` says that it
    does not take what it is told."""

    id: int
    place: int
    pid: int
    since: float
    channel: Channel | None = None
    stuck: bool = False
    given: dict[int, Given] = field(default_factory=dict)
    work: float = 0.0
    busy: float = 0.0
    most_held: int = 0
    memory: PeakMemory = field(default_factory=PeakMemory)
    """Of the device since it was last asked for."""
    capability: Capability = UNKNOWN

    @property
    def rate(self) -> float | None:
        """Cost units per second, as measured lately; None as long as nothing was."""
        return self.work / self.busy if self.busy > 0 else None
