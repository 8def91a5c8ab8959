"""A step that is more than one gradient: a procedure that asks an oracle several times, and then says where to go.

From the committed weights to the next commit it is one step, taken by all or by none. Every worker runs the same
procedure; vectors lie distributed, each worker has of them the parts that it holds, and numbers are the same on all.
Each question is an iteration of its own: a lane over the microbatches that it needs, the sums over replicas, and an
exchange by which all have the answer or none. A gradient may be asked for at weights that are moved. They are put back
before anything else happens, however the question ends, so that nobody can ever see or send them; and a step that is
interrupted is done again from its first question. What the procedure returns stands where a step's gradient would, and
is voted on and applied as one.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.runtime.batch import Job
from pipeline.runtime.curvature import Curvature, FitJob, Fitting
from pipeline.runtime.device_time import Clock, read_back
from pipeline.runtime.lane_executor import Lane, LaneExecutor, LaneResult
from pipeline.runtime.step_commit import NonFiniteLoss, Vote, total_sums
from pipeline.runtime.terms import StepTerms
from pipeline.runtime.transport import LinkError
from pipeline.runtime.worker import StepResult, Wish, Worker
from pipeline.schedule.layout import Excerpt
from pipeline.schedule.ops import ALL, STEP
from pipeline.state.optimizer import learning_rate

_AT_ONCE = 1 << 20  # elements


@dataclass(frozen=True)
class Vector:
    """A vector over all trained weights, of which this worker has `parts`: part -> [elements], fp32, in the form of
    the part's gradient."""

    parts: Mapping[str, Tensor]

    def __add__(self, other: Vector) -> Vector:
        return Vector({part: tensor + other.parts[part] for part, tensor in self.parts.items()})

    def __sub__(self, other: Vector) -> Vector:
        return Vector({part: tensor - other.parts[part] for part, tensor in self.parts.items()})

    def __mul__(self, factor: float) -> Vector:
        return Vector({part: tensor * factor for part, tensor in self.parts.items()})


class Oracle(Protocol):
    """What a procedure may ask. All workers ask the same in the same order. Every question raises LinkError where the
    view ends, and NonFiniteLoss on all alike."""

    @property
    def step(self) -> int:
        """The number of the step, from 0."""
        ...

    @property
    def rate(self) -> float:
        """What the direction that is returned will be multiplied by, and taken from the weights."""
        ...

    def weights(self) -> Vector:
        """The committed weights, copied."""
        ...

    def gradient(self, weights: Mapping[str, float], at: Vector | None = None) -> Vector:
        """The gradient of a sum of terms with these weights, each a mean over what counts for it in the step, at the
        committed weights, or `at` so far from them. Microbatches that count for none of them are not computed."""
        ...

    def dots(self, *pairs: tuple[Vector, Vector]) -> list[float]:
        """Their inner products, in float64."""
        ...

    def fit(self, kind: str) -> Curvature:
        """The curvature of the divergence of the outputs on the microbatches of a kind: see `curvature.py`."""
        ...

    def solve(self, curvature: Curvature, vector: Vector, damping: float) -> Vector:
        """(H + damping I)^-1 vector, and 0 where H is not known."""
        ...

    def keep(self, vector: Vector, folder: Path, wanted: Callable[[str], bool]) -> None:
        """Write a vector's parameters whose full names are wanted, as FOLDER/STATE.safetensors, each state by who
        answers for it; when this returns, all are there. Raises OSError."""
        ...


Procedure = Callable[[Oracle], Vector]
"""Returns the direction that, times the learning rate, is taken from the weights."""


class ProcedureJob(Job, Protocol):
    """A job whose steps are procedures."""

    def fitting(self, kind: str, step: int, /) -> FitJob:
        """The microbatches of a step as the curvature of a kind is fitted on them."""
        ...


def run_procedure(
    worker: Worker, excerpt: Excerpt, job: ProcedureJob, procedure: Procedure, step: int, *, wish: Wish = dict,
    record: bool = False,
) -> StepResult:  # fmt: skip
    """One step by a procedure, to the settled end, as Worker.run. The means that it tells of are those of the committed
    weights, of the terms that were asked for there."""
    asked = _Asked(worker, excerpt, job, step, record)
    try:
        direction = procedure(asked)
    except NonFiniteLoss:
        worker.reducer.clear()
        worker.store.drop()
        raise
    for part, gradient in worker.store.gradients.items():
        gradient.copy_(direction.parts[part])
    lane = worker.lane(excerpt, job, step, asked.terms({}))
    result = worker.conclude(lane, asked.told, dict.fromkeys(worker.store.gradients, 1.0), wish, record)
    return replace(result, passes=asked.passes)


class _Asked:
    """The oracle of one step on one worker."""

    def __init__(self, worker: Worker, excerpt: Excerpt, job: ProcedureJob, step: int, record: bool) -> None:
        self._worker, self._excerpt, self._job, self._record = worker, excerpt, job, record
        self.step, self.rate = step, learning_rate(worker.store.config, step)
        self._counts = tuple(job.counts(step, m) for m in range(excerpt.num_microbatches))
        steps = tuple(op for op in excerpt.lane if op.kind == STEP)
        clock = Clock(worker.settings.device)
        self.told = LaneResult({}, steps, clock, clock.mark())
        """What is told of the step as a whole; events are those of the first lane."""
        self.passes: Counter[int] = Counter()
        """How often each microbatch went forward and back."""
        worker.store.train(excerpt.trains)

    def terms(self, weights: Mapping[str, float]) -> StepTerms:
        """The terms of the job with these weights, or without any with its own."""
        weighed = {**dict.fromkeys(self._job.terms, 0.0), **weights} if weights else self._job.terms
        return StepTerms(weighed, self._counts, self._excerpt.visits)

    # ---- questions ----

    def weights(self) -> Vector:
        """See Oracle."""
        store = self._worker.store
        return Vector(
            {
                part: torch.cat([p.detach().view(-1) for s in store.states_of(part) for p in s.parameters.values()])
                for part in store.gradients
            }
        )

    def gradient(self, weights: Mapping[str, float], at: Vector | None = None) -> Vector:
        """See Oracle."""
        worker = self._worker
        worker.probe("gradient", self.step)
        lane = self._lane(self._job, self.terms(weights))
        with nullcontext() if at is None else worker.store.moved(at.parts):
            if at is not None:
                worker.probe("moved", self.step)
            found = LaneExecutor(lane).execute(self._record)
            divisors = worker.finish_sums(lane, found)
        self._agree(lane, found, whole=at is None)
        held = worker.store.gradients
        return Vector({part: self._taken(gradient) / divisors[part] for part, gradient in held.items()})

    def dots(self, *pairs: tuple[Vector, Vector]) -> list[float]:
        """See Oracle."""
        worker = self._worker
        worker.probe("dot", self.step)
        mine: dict[str, list[float]] = {}
        for part, states in worker.answered(self._excerpt).items():
            sizes = [state.size for state in states]
            cut = [(a.parts[part].split(sizes), b.parts[part].split(sizes)) for a, b in pairs]
            mine |= {state.name: [_dot(a[i], b[i]) for a, b in cut] for i, state in enumerate(states)}
        names, step = [state.name for state in worker.store.model.states], self.step

        def combine(votes: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
            by_state = {name: dots for vote in votes.values() for name, dots in vote["dots"].items()}
            found = [math.fsum(by_state[name][i] for name in names if name in by_state) for i in range(len(pairs))]
            if not all(map(math.isfinite, found)):
                return {"not_finite": f"a product of gradients is {found} at step {step + 1}; the step was not taken"}
            return {"dots": found}

        worker.commit.begin()
        return [float(value) for value in self._shared({"dots": mine}, self._deadline(), combine)["dots"]]

    def fit(self, kind: str) -> Curvature:
        """See Oracle."""
        worker, job = self._worker, self._job.fitting(kind, self.step)
        worker.probe("fit", self.step)
        counts = tuple(job.counts(self.step, m) for m in range(self._excerpt.num_microbatches))
        labels = sum(count.get(job.sampled, 0) for count in counts)
        lane = self._lane(job, StepTerms({**job.terms, job.sampled: float(labels)}, counts))  # sums, not means
        with Fitting(worker.store, job, lane) as fitting:
            found = fitting.execute(self._record)
        worker.store.drop()  # what these gradients are of is no loss of the job
        self._agree(lane, found, whole=True)
        curvature = fitting.summed(worker.reducer, lane.deadline)
        worker.commit.begin()
        self._shared({"beyond": curvature.not_finite()}, self._deadline(), self._beyond)
        return curvature

    def solve(self, curvature: Curvature, vector: Vector, damping: float) -> Vector:
        """See Oracle. One holder of a part computes, and the others take its bits."""
        worker = self._worker
        worker.probe("solve", self.step)
        found: dict[str, Tensor] = {}
        mine = worker.answered(self._excerpt)
        for part in sorted(worker.store.gradients):
            solved = curvature.solve(part, vector.parts[part], damping) if part in mine else None
            found[part] = self._from_one(part, solved)
        return Vector({part: found[part] for part in worker.store.gradients})

    def keep(self, vector: Vector, folder: Path, wanted: Callable[[str], bool]) -> None:
        """See Oracle."""
        worker = self._worker
        for part, states in worker.answered(self._excerpt).items():
            for state, piece in zip(states, vector.parts[part].split([s.size for s in states]), strict=True):
                cut = piece.split([p.numel() for p in state.parameters.values()])
                found = {
                    name: tensor.view_as(state.parameters[name]).cpu().clone()
                    for name, tensor in zip(state.parameters, cut, strict=True) if wanted(name)
                }  # fmt: skip
                if found:
                    folder.mkdir(parents=True, exist_ok=True)
                    unfinished = folder / f"{state.name}.{worker.id}.tmp"
                    save_file(found, unfinished)
                    os.replace(unfinished, folder / f"{state.name}.safetensors")
        worker.commit.begin()
        self._shared({}, self._deadline(), lambda votes: {})

    # ---- how they are answered ----

    def _deadline(self) -> float:
        return time.monotonic() + self._worker.settings.deadline_s

    def _lane(self, job: Job, terms: StepTerms) -> Lane:
        """The lane cut down to the microbatches that count; nothing of it is kept for who takes over."""
        wanted = {m for m, counts in enumerate(terms.counts) if any(terms.weights[term] for term in counts)}
        self.passes.update(wanted)
        ops = tuple(op for op in self._excerpt.lane if op.microbatch == ALL or op.microbatch in wanted)
        return replace(self._worker.lane(replace(self._excerpt, lane=ops), job, self.step, terms), spare={})

    def _agree(self, lane: Lane, found: LaneResult, whole: bool) -> None:
        """All have come through the lane, and all losses are numbers; those at the committed weights are kept."""
        worker = self._worker
        beyond = [name for name, is_beyond in read_back(worker.store.beyond()).items() if is_beyond]
        vote = Vote(found.sums).as_json() | {"beyond": beyond}
        self._shared(vote, lane.deadline, self._beyond)
        worker.reducer.clear()
        with suppress(LinkError):  # all that was sent has been used, or there were no agreement
            worker.transport.flush(lane.deadline)
        own = {m: {t: value for t, value in sums.items() if t in self._job.terms} for m, sums in found.sums.items()}
        told = self.told
        if self._record:
            told, self._record = replace(told, timed=found.timed, began=found.began), False
        self.told = replace(told, sums={**(own if whole else {}), **told.sums}, busy=(*told.busy, *found.busy))

    def _beyond(self, votes: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        """Whether what all have found are numbers."""
        try:
            total_sums(self.step, {worker: {"sums": {}, **vote} for worker, vote in votes.items()})
        except NonFiniteLoss as error:
            return {"not_finite": str(error)}
        beyond = sorted({name for vote in votes.values() for name in vote["beyond"]})
        if beyond:
            told = f"a gradient of layers {', '.join(beyond)} is no number, or too large"
            return {"not_finite": f"{told}, at step {self.step + 1}; the step was not taken"}
        return {}

    def _shared(self, payload: dict[str, Any], deadline: float, combine: Any) -> dict[str, Any]:
        found = self._worker.commit.share(payload, deadline, combine)
        if "not_finite" in found:
            raise NonFiniteLoss(str(found["not_finite"]))
        return found

    def _taken(self, gradient: Tensor) -> Tensor:
        """What stands in a gradient, which then is zero."""
        found = gradient.clone()
        gradient.zero_()
        return found

    def _from_one(self, part: str, mine: Tensor | None) -> Tensor:
        """What one holder of a part has, on all of them: the sum of its bits and zeros."""
        store, reducer = self._worker.store, self._worker.reducer
        if reducer.group(part) is None:
            assert mine is not None, f"nobody answers for {part}"
            return mine
        bits = store.bits(part).zero_()
        if mine is not None:
            bits.copy_(mine.view(torch.int32))
        reducer.start(part, bits)
        reducer.finish(self._deadline())
        found = bits.to(torch.int32).view(torch.float32).clone()
        bits.zero_()
        reducer.clear()
        return found


def _dot(a: Tensor, b: Tensor) -> float:
    """In one order, wherever the two lie in memory."""
    pieces = zip(a.split(_AT_ONCE), b.split(_AT_ONCE), strict=True)
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in pieces)
