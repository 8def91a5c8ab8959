"""RoundPipe's pool as an engine: the host owns the state, hands out the work, and commits what comes back.

A lost worker costs the pool some work that is done again. What ends a run by name is that no worker is left, that a
loss is not finite twice, or that the host itself is out of memory or disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jobs.engine import Position
from jobs.job import RunJob
from pipeline.model.flops import ModelFlops
from pipeline.runtime.batch import ToldJob
from pipeline.runtime.peak_flops import together
from pipeline.runtime.peak_memory import PeakMemory, peak_memory, told
from pipeline.runtime.step_commit import NonFiniteLoss, Vote, agree
from pipeline.runtime.terms import StepTerms
from pipeline.runtime.worker import StepResult
from pipeline.schedule.layout import EVALUATE, TRAIN
from pipeline.schedule.work_units import Cut, WorkUnit, forward_units
from pipeline.state.host_optimizer import HostOptimizer
from pipeline.state.layer_state import LayerStates
from pipeline.state.optimizer import learning_rate
from recovery.checkpoint import Fence
from recovery.pool import Pool
from recovery.runs import Iteration

_HOST = 0  # the one member
_NO_DEVICE = torch.device("cpu")  # the host computes nothing


@dataclass
class PoolEngine:
    """The host's engine. The samples of an evaluation are taken in parts of as many microbatches as the store holds."""

    optimizer: HostOptimizer
    pool: Pool
    cut: Cut
    row: tuple[WorkUnit, ...]
    jobs: Mapping[str, RunJob]
    round_size: int
    deadline_s: float
    attempt: int = 1
    generation: int = 0
    flops: ModelFlops | None = None
    """Those of a microbatch, where steps are to be told with theirs."""
    interruptions: tuple[type[Exception], ...] = ()
    me: int = _HOST
    leads: bool = True
    runs: dict[int, Iteration] = field(default_factory=dict)
    """The iterations under way, by step: with an optimizer that is one step behind, two."""
    _ran: Iteration | None = None

    @property
    def states(self) -> LayerStates:
        return self.optimizer

    @property
    def fence(self) -> Fence:
        return self.attempt, 1

    @property
    def ahead(self) -> bool:
        return bool(self.runs)

    @property
    def peak_flops(self) -> float | None:
        """See Engine: of the workers that can be used now."""
        return together(self.pool.members[worker].capability for worker in self.pool.dispatcher.ready)

    def enter(self, at: Position, last: dict[str, Any] | None) -> None:
        """The host is always in."""

    def interrupted(self, error: Exception) -> None:
        """Nothing interrupts it."""

    def gather(self, payload: dict[str, Any]) -> Mapping[int, dict[str, Any]]:
        return {_HOST: payload}

    # ---- steps ----

    def _submit(self, step: int) -> Iteration:
        source, version, side = "param", step, 0
        if self.optimizer.behind:  # an iteration reads weights that lack the update of the one before it
            source, version, side = f"read{(step + 1) % 2}", max(0, step - 1), step % 2
        return self.pool.dispatcher.submit(
            self.row, self.optimizer.store.layout.boundaries, step=step, job=TRAIN, source=source, version=version,
            side=side, weights=self.jobs[TRAIN].terms, told=self._told(TRAIN, step),
        )  # fmt: skip

    def _told(self, job: str, step: int) -> dict[str, Any] | None:
        """What workers cannot know of a job by themselves."""
        return found.tell(step) if isinstance(found := self.jobs[job], ToldJob) else None

    def run(
        self, step: int, *, wish: Callable[[], Mapping[str, Any]], record: bool, pauses: Callable[[int], bool]
    ) -> StepResult:
        """See Engine. Raises NoWorkerLeft, TooManyFailures, TimeoutError."""
        run = self.runs.pop(step, None) or self._submit(step)
        if self.optimizer.behind and not pauses(step + 1) and step + 1 not in self.runs:
            self.runs[step + 1] = self._submit(step + 1)
        self.pool.finish(run)
        self.optimizer.measure(step)
        _, norms = self.pool.wait_for("norms")
        squares = {state: norm**2 for state, norm in norms.items()}
        try:
            terms = StepTerms.of(self.jobs[TRAIN], step, self.at_once)
            settled = agree(step, terms, self._names, {_HOST: Vote(run.sums, squares, wish()).as_json()})
        except NonFiniteLoss:
            self.optimizer.drop()
            raise
        lr = learning_rate(self.optimizer.config, step)
        self.optimizer.update(step, settled.norm, lr)
        for later in self.runs.values():
            self.pool.dispatcher.count(later)
        self._ran = run
        return StepResult(
            settled.loss, settled.means, settled.counts, settled.norm, lr, settled.norms, settled.wishes,
            memory=self._memory(),
            flops=self.flops and self.at_once * self.flops.microbatch(range(self.states.model.num_layers)),
        )  # fmt: skip

    def _memory(self) -> Mapping[str, int]:
        """What a record says of the memory of all workers, and of the host, since the step before."""
        peaks = [peak_memory(_NO_DEVICE)]
        for member in self.pool.members.values():
            peaks.append(member.memory)
            member.memory = PeakMemory(member.memory.host)
        return told(peaks)

    @property
    def _names(self) -> list[str]:
        return [state.name for state in self.states.model.states]

    @property
    def at_once(self) -> int:
        return self.optimizer.store.layout.microbatches

    def _forward(self, job: str, part: int, count: int) -> dict[int, Mapping[str, float]]:
        """Microbatch -> its sums, of `count` microbatches that only go forward."""
        self.rest()
        run = self.pool.dispatcher.submit(
            forward_units(self.cut, count, self.round_size), self.optimizer.store.layout.boundaries, step=part,
            job=job, source="param", version=self.optimizer.updates, weights=self.jobs[job].terms,
            told=self._told(job, part),
        )  # fmt: skip
        self.pool.finish(run)
        return dict(run.sums)

    def measure(self, job: str, part: int) -> StepResult:
        """See Engine."""
        terms = StepTerms.of(self.jobs[job], part, self.at_once)
        return self._result(terms, self._forward(job, part, self.at_once))

    def evaluate(self) -> StepResult:
        """See Engine."""
        held_out, sums = self.jobs[EVALUATE], dict[int, Mapping[str, float]]()
        count = -(-(held_out.limit or 0) // held_out.size)
        for part, lo in enumerate(range(0, count, self.at_once)):
            found = self._forward(EVALUATE, part, min(self.at_once, count - lo))
            sums |= {lo + m: each for m, each in found.items()}
        return self._result(StepTerms.of(held_out, 0, count), sums)

    def _result(self, terms: StepTerms, sums: Mapping[int, Mapping[str, float]]) -> StepResult:
        settled = agree(None, terms, self._names, {_HOST: Vote(sums).as_json()})
        return StepResult(settled.loss, settled.means, settled.counts)

    def about(self) -> dict[str, Any]:
        version = None if self._ran is None else self._ran.version
        return {"view": 1, "version": version, "workers": len(self.pool.dispatcher.ready)}

    def timeline(self, result: StepResult) -> Mapping[str, Any]:
        """See Engine: of the step that was run last."""
        run = self._ran
        return {} if run is None else {
            str(place): [(op, start - run.began, end - run.began) for op, start, end in events]
            for place, events in sorted(run.events.items())
        }  # fmt: skip

    # ---- states ----

    def rest(self) -> None:
        """See Engine. Raises TimeoutError."""
        self.optimizer.drain(self.deadline_s)

    def missing(self) -> list[int]:
        """The host has all."""
        return []

    def owners(self) -> Mapping[int, int]:
        return dict.fromkeys(range(self.states.model.num_layers), _HOST)

    def whole_moments(self) -> Mapping[str, Tensor]:
        """The host has all."""
        return {}

    def pulse(self) -> None:
        """Nobody watches the host."""

    def layout(self) -> Mapping[str, Any]:
        return {"host": [list(span) for span in (*self.cut.forward, self.cut.fused)]}
