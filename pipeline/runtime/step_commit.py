"""The moment where a step becomes true: losses, norms and wishes are exchanged once, and everybody applies the same
factor, or nobody steps. A `StepCommit` alone votes, in one view, and numbers what is voted on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from pipeline.runtime.device_time import read_back
from pipeline.runtime.peak_memory import PeakMemory, told
from pipeline.runtime.terms import StepTerms
from pipeline.wire import checked


class NonFiniteLoss(RuntimeError):
    """A loss or gradient norm is NaN or infinite. The step did not happen: weights are those of the step before."""


Voted = Callable[[], None] | None
Combine = Callable[[Mapping[int, dict[str, Any]]], dict[str, Any]]
"""Everyone's vote, by worker -> what they come to, both JSON. It is called on one of them; the others are told."""


def everything(votes: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """All votes as they are: a Combine for what is rare."""
    return {str(worker): vote for worker, vote in votes.items()}


class Exchange(Protocol):
    """How the workers of a view settle a step: what all payloads come to, to everybody, or nothing to anybody."""

    def __call__(
        self, iteration: int, payload: dict[str, Any], deadline: float, combine: Combine = ..., voted: Voted = None, /
    ) -> dict[str, Any]:
        """What all payloads come to. `voted` is called when the own one is given but the outcome is open.

        `deadline` is in time.monotonic seconds, or infinite: then the wait is as long as the run is guided.
        """
        ...


@dataclass(frozen=True)
class Vote:
    """What one worker has found in a step: microbatch -> term -> sum; the squared norms of the gradients that it alone
    answers for, by state; what it wishes for, for all to see; the seconds that it has computed; and the memory that
    it has had at most."""

    sums: Mapping[int, Mapping[str, Tensor | float]]
    squares: Mapping[str, float] = field(default_factory=dict)
    wish: Mapping[str, Any] = field(default_factory=dict)
    busy_s: float = 0.0
    memory: PeakMemory = field(default_factory=PeakMemory)

    def as_json(self) -> dict[str, Any]:
        read = read_back({(m, term): value for m, sums in self.sums.items() for term, value in sums.items()})
        sums = {str(m): {term: read[m, term] for term in sums} for m, sums in self.sums.items()}
        return {
            "sums": sums, "squares": self.squares, "wish": self.wish, "busy_s": round(self.busy_s, 6),
            "memory": self.memory.as_json(),
        }  # fmt: skip


@dataclass(frozen=True)
class Settled:
    """One step, the same on all workers. `loss` is what is minimised, `means` has each term's mean over what counts
    for it, of which there are `counts`; `norms` are those of the states, `norm` that of all."""

    loss: float
    means: Mapping[str, float]
    counts: Mapping[str, int]
    norm: float
    norms: Mapping[str, float]
    wishes: Mapping[str, Mapping[str, Any]]
    """Worker, as text -> what it wishes for, where there is anything in it."""
    busy_s: str = ""
    """The seconds that each worker has computed, and not waited, as `busy_seconds` reads them: one text, since every
    worker reads all of this at each step, and the coordinator alone wants them."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """What a record says of the memory of all workers."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settled:
        """Raises WireError."""
        what = "what a step has come to"
        kinds: dict[str, type] = {
            "means": float,
            "counts": int,
            "norms": float,
            "wishes": dict,
            "memory": int,
        }
        found = checked(values, what, loss=float, norm=float, busy_s=str) | checked(
            values, what, **dict.fromkeys(kinds, dict)
        )
        for name, kind in kinds.items():
            found[name] = checked(found[name], what, **dict.fromkeys(found[name], kind))
        return cls(**found)


@dataclass
class StepCommit:
    """The votes of one worker in one view. `iteration` is the number of the last one; it only ascends."""

    exchange: Exchange
    iteration: int = 0

    def begin(self) -> int:
        """The number of the next iteration, by which its messages are known."""
        self.iteration += 1
        return self.iteration

    def gather(self, payload: dict[str, Any]) -> Mapping[int, dict[str, Any]]:
        """Everyone's payload, by worker, outside any step: a barrier that carries JSON.

        Before it others may read, write or receive much, so it waits as long as somebody sees to it that they come on.
        """
        found = self.exchange(self.begin(), payload, math.inf, everything)
        return {int(worker): vote for worker, vote in found.items()}

    def agree(self, payload: dict[str, Any], combine: Combine) -> dict[str, Any]:
        """As `gather`, but what everyone's payload comes to."""
        return self.exchange(self.begin(), payload, math.inf, combine)

    def share(self, payload: dict[str, Any], deadline: float, combine: Combine) -> dict[str, Any]:
        """What everyone's payload comes to in the iteration that has begun, and ends here without a step. Together."""
        return self.exchange(self.iteration, payload, deadline, combine)

    def norm(self, states: Sequence[str], squares: Mapping[str, float], deadline: float) -> float | None:
        """The norm that the iteration which has begun will have, if it is settled; None where it is not finite. It is
        for who needs it before the vote, which takes the next number. Together."""

        def combine(votes: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
            norm = math.sqrt(sum(_squares(states, votes).values()))
            return {"norm": norm if math.isfinite(norm) else None}

        found = self.exchange(self.iteration, {"squares": dict(squares)}, deadline, combine)["norm"]
        self.begin()
        return None if found is None else float(found)

    def settle(
        self, step: int | None, terms: StepTerms, states: Sequence[str], vote: Vote, deadline: float,
        voted: Voted = None,
    ) -> Settled:  # fmt: skip
        """Vote on the iteration that has begun, and return what all agree on; `states` are those of the model, in the
        order in which norms are summed; `step` is None in an evaluation. Raises NonFiniteLoss on all workers alike."""

        def combine(votes: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
            try:
                return asdict(agree(step, terms, states, votes))
            except NonFiniteLoss as error:
                return {"not_finite": str(error)}

        found = self.exchange(self.iteration, vote.as_json(), deadline, combine, voted)
        if "not_finite" in found:
            raise NonFiniteLoss(str(found["not_finite"]))
        return Settled.from_json(found)


def agree(step: int | None, terms: StepTerms, states: Sequence[str], votes: Mapping[int, Mapping[str, Any]]) -> Settled:
    """What a step is, from everyone's vote. Raises NonFiniteLoss."""
    totals = total_sums(step, votes)
    squares = _squares(states, votes)
    for state, value in squares.items():
        if not math.isfinite(value):
            raise NonFiniteLoss(
                f"the gradient norm of layer {state} is {value} at step {(step or 0) + 1}; the step was not taken"
            )
    return Settled(
        terms.loss(totals), {term: value / max(1, terms.totals[term]) for term, value in totals.items()}, terms.totals,
        math.sqrt(sum(squares.values())), {state: math.sqrt(value) for state, value in squares.items()},
        {str(worker): vote["wish"] for worker, vote in sorted(votes.items()) if any(vote["wish"].values())},
        " ".join(f"{worker}:{float(vote.get('busy_s', 0.0)):g}" for worker, vote in sorted(votes.items())),
        told(PeakMemory.from_json(vote["memory"]) for vote in votes.values()),
    )  # fmt: skip


def busy_seconds(told: str) -> dict[int, float]:
    """Worker -> seconds, from the text of them; raises ValueError for one that is none."""
    pairs = (each.split(":") for each in told.split())
    return {int(worker): float(seconds) for worker, seconds in pairs}


def total_sums(step: int | None, votes: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """Term -> its sum, from everyone's "sums". Raises NonFiniteLoss."""
    totals: dict[str, float] = {}
    for m, sums in sorted((int(m), sums) for vote in votes.values() for m, sums in vote["sums"].items()):
        for term, value in sums.items():
            if not math.isfinite(value):
                if step is None:
                    raise NonFiniteLoss(f"the held-out loss is {value} at microbatch {m}")
                raise NonFiniteLoss(f"the loss is {value} at step {step + 1}, microbatch {m}; the step was not taken")
            totals[term] = totals.get(term, 0.0) + value
    return totals


def _squares(states: Sequence[str], votes: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """The squared norm of each state's gradient, in the order of the states."""
    found: dict[str, float] = {}
    for state, value in ((state, value) for vote in votes.values() for state, value in vote["squares"].items()):
        found[state] = found.get(state, 0.0) + value  # one answers; another only says that it has none
    return {state: found[state] for state in states if state in found}
