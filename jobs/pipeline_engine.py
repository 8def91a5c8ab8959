"""The resident pipeline as an engine: every worker has one, and the workers of a view move together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from jobs.engine import Position
from jobs.job import RunJob
from pipeline.model.flops import ModelFlops
from pipeline.runtime.probe import Reading
from pipeline.runtime.procedure import run_procedure
from pipeline.runtime.shards import whole_moments
from pipeline.runtime.worker import StepResult, Worker
from pipeline.schedule.layout import EVALUATE, FULL, TRAIN
from pipeline.state.layer_state import LayerStates
from recovery.checkpoint import Fence
from recovery.member import INTERRUPTIONS, Joined, Member
from recovery.membership import View


@dataclass
class PipelineEngine:
    """One worker's part. It begins in view `number`, or `joins` a run under way there; `full_every` steps no span is
    skipped. `flops` are those of a microbatch, where steps are to be told with theirs."""

    member: Member
    jobs: Mapping[str, RunJob]
    number: int
    joins: bool = False
    full_every: int = 0
    flops: ModelFlops | None = None
    interruptions: tuple[type[Exception], ...] = INTERRUPTIONS
    ahead: bool = False
    peak_flops: float | None = None
    _counted: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Purpose -> the FLOPs of each microbatch in this view."""

    @property
    def worker(self) -> Worker:
        return self.member.worker

    @property
    def view(self) -> View:
        assert self.member.view is not None
        return self.member.view

    @property
    def states(self) -> LayerStates:
        return self.worker.store

    @property
    def me(self) -> int:
        return self.worker.id

    @property
    def leads(self) -> bool:
        """The lowest id of the view."""
        return self.me == min(self.view.workers)

    @property
    def fence(self) -> Fence:
        return self.view.fence

    @property
    def generation(self) -> int:
        return self.view.generation

    def enter(self, at: Position, last: dict[str, Any] | None) -> Joined:
        """See Engine. Raises MembershipError, Evicted."""
        joined = self.member.enter(self.number, None if self.joins else asdict(at), last)
        self.number, self.joins = joined.view.number + 1, False
        self.peak_flops, self._counted = joined.peak_flops, {}
        return joined

    def interrupted(self, error: Exception) -> None:
        self.member.complain(error)

    def run(
        self, step: int, *, wish: Callable[[], Mapping[str, Any]], record: bool, pauses: Callable[[int], bool]
    ) -> StepResult:
        """See Engine."""
        full = self.full_every and (step + 1) % self.full_every == 0  # every so often no span is skipped
        purpose = FULL if full else TRAIN
        excerpt = self.member.excerpt(purpose)
        job = self.jobs[TRAIN]
        if (procedure := job.procedure) is None:
            result = self.worker.run(excerpt, job, step, wish=wish, record=record)
        else:
            result = run_procedure(self.worker, excerpt, job, procedure, step, wish=wish, record=record)
        self.worker.store.let_go()  # the view is settled: it will not be asked for what it gave away
        if self.member.migration is not None:
            self.member.migration.stepped()
        return replace(result, flops=self._flops(purpose, result))

    def _flops(self, purpose: str, result: StepResult) -> int | None:
        """Model FLOPs of a step."""
        if self.flops is None:
            return None
        if purpose not in self._counted:
            routes = self.member.excerpt(purpose).routes
            visited = ((n for span in route.forward for n in range(*span)) for route in routes)
            self._counted[purpose] = tuple(self.flops.microbatch(layers) for layers in visited)
        each = self._counted[purpose]
        return sum(each) if result.passes is None else sum(each[m] * n for m, n in result.passes.items())

    @property
    def at_once(self) -> int:
        return self.member.excerpt(EVALUATE).num_microbatches

    def measure(self, job: str, part: int) -> StepResult:
        worker, probe = self.worker, self.worker.probe
        worker.probe = probe if job == EVALUATE else Reading(probe, probe.slowdown)
        try:
            return worker.run(self.member.excerpt(EVALUATE), self.jobs[job], part)
        finally:
            worker.probe = probe

    def evaluate(self) -> StepResult:
        return self.measure(EVALUATE, 0)

    def gather(self, payload: dict[str, Any]) -> Mapping[int, dict[str, Any]]:
        return self.worker.gather(payload)

    def about(self) -> dict[str, Any]:
        return {"view": self.view.number}

    def timeline(self, result: StepResult) -> Mapping[str, Any]:
        mine = [(str(event.op), event.start, event.end) for event in result.events]
        lanes = self.worker.gather({"events": mine})
        return {str(self.view.places[worker]): payload["events"] for worker, payload in lanes.items()}

    # ---- states ----

    def rest(self) -> None:
        """A committed step is at rest."""

    def missing(self) -> list[int]:
        """Their stage is being rebuilt, and routes lead around it."""
        held = self.owners()
        return [layer for layer in range(self.states.model.num_layers) if layer not in held]

    def owners(self) -> Mapping[int, int]:
        """The worker in the lowest place that computes each layer."""
        holders = self.member.excerpt(TRAIN).holders
        return {layer: self.worker.workers[places[0]] for span, places in holders.items() for layer in range(*span)}

    def whole_moments(self) -> Mapping[str, Tensor]:
        """See Engine."""
        mine = {layer for layer, owner in self.owners().items() if owner == self.me}
        wanted = [state.name for layer in mine for state in self.states.owned(layer)]
        return whole_moments(self.worker.store, self.worker.reducer, wanted, self.worker.settings.deadline_s)

    def pulse(self) -> None:
        self.worker.pulse()

    def layout(self) -> Mapping[str, Any]:
        found: dict[str, list[list[int]]] = {}
        for span, places in self.member.excerpt(TRAIN).holders.items():
            for place in places:
                found.setdefault(str(self.worker.workers[place]), []).append(list(span))
        return found
