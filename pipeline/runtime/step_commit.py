"""The moment where a step becomes true: losses, norms and wishes are exchanged once, and everybody applies the same
factor, or nobody steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.runtime.batch import Job
from pipeline.schedule.ops import Schedule, Span, parse_span, span_text
from pipeline.state.optimizer import learning_rate
from pipeline.state.resident import TIED, shard_holders

if TYPE_CHECKING:
    from pipeline.runtime.worker import Worker


class NonFiniteLoss(RuntimeError):
    """A loss or gradient norm is NaN or infinite. The step did not happen: weights are those of the step before."""


@dataclass(frozen=True)
class Settled:
    """One step, the same on all workers. `loss` is the mean over `tokens`, `norms` are those of the spans."""

    loss: float
    tokens: int
    norm: float
    lr: float
    norms: Mapping[Span, float]
    wishes: Mapping[int, Mapping[str, Any]]


def settle(
    worker: Worker, schedule: Schedule, job: Job, step: int, *, trains: bool, losses: Mapping[int, Tensor],
    beside: Sequence[Span] | None, wish: Mapping[str, Any], deadline: float,
) -> Settled:  # fmt: skip
    """Sum what is still to be summed, vote, and return what all agree on.

    `losses` are the sums over the tokens of the microbatches whose loss this worker has computed; `beside` the shards
    that it holds but does not compute with, None where its lane has no STEP. Raises NonFiniteLoss on all workers alike.
    """
    model, shards = worker.store.model, worker.store.shards
    for shard in beside or ():
        worker.reduce(shard)
    worker.finish_reductions(deadline)
    holders = shard_holders(schedule.holders, model.num_layers, model.tied)
    norms = {
        span_text(span): (shard.squared_norm() / max(1, visits(schedule, job, step, span)) ** 2)
        for span, shard in shards.items()
        if beside is not None and holders.get(span, (worker.id,))[0] == worker.id
    }
    votes = worker.exchange(
        worker.iteration,
        {"losses": {str(m): float(loss) for m, loss in losses.items()}, "norms": norms, "wish": wish},
        deadline,
        lambda: worker.probe("commit", step),
    )
    return _agree(worker, job, step, votes, trains)


def _agree(worker: Worker, job: Job, step: int, votes: Mapping[int, Mapping[str, Any]], trains: bool) -> Settled:
    losses = sorted((int(m), loss) for vote in votes.values() for m, loss in vote["losses"].items())
    for m, loss in losses:
        if not math.isfinite(loss):
            worker.drop()
            if not trains:
                raise NonFiniteLoss(f"the held-out loss is {loss} at microbatch {m}")
            where = f"step {step + 1}, microbatch {m}"
            raise NonFiniteLoss(f"the loss is {loss} at {where}; the step was not taken")
    squares = {parse_span(text): value for vote in votes.values() for text, value in vote["norms"].items()}
    norm = math.sqrt(sum(value for _, value in sorted(squares.items())))
    if not math.isfinite(norm):
        span = next(s for s, value in sorted(squares.items()) if not math.isfinite(value))
        worker.drop()
        raise NonFiniteLoss(
            f"the gradient norm of span {span} is {squares[span]} at step {step + 1}; the step was not taken"
        )
    tokens = sum(job.tokens(step, m) for m, _ in losses)
    config = next((s.config for s in worker.store.shards.values()), None)
    return Settled(
        loss=sum(loss for _, loss in losses) / max(1, tokens), tokens=tokens, norm=norm,
        lr=learning_rate(config, step) if config else 0.0,
        norms={span: math.sqrt(value) for span, value in sorted(squares.items())},
        wishes={worker: vote["wish"] for worker, vote in sorted(votes.items())},
    )  # fmt: skip


def visits(schedule: Schedule, job: Job, step: int, span: Span) -> int:
    """The tokens of the microbatches whose route visits `span`, over all workers: the divisor of its gradient."""
    visited = (m for m, route in enumerate(schedule.routes) if span == TIED or span in route.forward)
    return sum(job.tokens(step, m) for m in visited)
