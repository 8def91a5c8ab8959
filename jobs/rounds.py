"""RoundPipe for a training job: from settings and the model's shape to a cut, its units and the verified schedules.

The cut and the rounds are made once and stay, whoever comes and goes; only the dealing follows the workers. How
microbatches are summed follows from the settings alone, so a run ends in the same bits with any number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.config import TrainConfig
from pipeline.model.layered import LayeredModel
from pipeline.schedule.layout import EVALUATE, TRAIN, Layout
from pipeline.schedule.ops import B, F, R
from pipeline.schedule.verify import verify
from pipeline.schedule.work_units import Cut, WorkUnit, forward_units, schedule_of
from schedulers import PartitionError
from schedulers.roundpipe import RoundsProblem, search
from schedulers.roundpipe_search.deal import Dealer

_TRIES = 200_000
_BACKWARD = 2.0
"""What a backward costs, in forwards."""
_FROZEN_BACKWARD = 1.0
"""The same where all weights are frozen, or all but adapters: their gradients are half of it."""


@dataclass(frozen=True)
class Rounds:
    """The plan of one job."""

    problem: RoundsProblem
    cut: Cut
    row: tuple[WorkUnit, ...]
    layout: Layout
    rule: str

    def cost(self, unit: WorkUnit) -> float:
        """What a microbatch of a unit takes, in the unit of the layers' costs."""
        lo, hi = unit.span
        times = {F: self.problem.forward, R: self.problem.forward, B: self.problem.backward}
        return math.fsum(math.fsum(times[kind][lo:hi]) for kind in unit.kinds)

    @property
    def dealer(self) -> Dealer:
        """Gives units to workers that run."""
        return Dealer(self.rule, self.cost)


def plan_rounds(config: TrainConfig, model: LayeredModel, layer_costs: Sequence[float], evaluated: int) -> Rounds:
    """The best cut found for the settings. `layer_costs` are those of a forward, in any unit; `evaluated` counts the
    samples of an evaluation. Raises PartitionError where a layer is larger than --span-mib allows."""
    require_room(config, model, range(model.num_layers))
    sizes = tuple(float(model.parameter_bytes(layer)) for layer in range(model.num_layers))
    room = config.span_mib * 2**20 if config.span_mib else math.inf
    backward = [_backward(model, layer) for layer in range(model.num_layers)]
    problem = RoundsProblem(
        tuple(layer_costs), tuple(times * cost for times, cost in zip(backward, layer_costs, strict=True)),
        config.workers, config.microbatches, config.round_size, sizes=sizes, room=room,
    )  # fmt: skip
    best = search(problem, tries=_TRIES).best
    count = -(-evaluated // config.microbatch_size)
    row = forward_units(best.cut, count, config.round_size)
    homes = [i % config.workers for i in range(len(row))]
    made = {
        TRAIN: best.schedule(),
        EVALUATE: schedule_of(best.cut, row, homes, range(config.workers), count, "evaluation"),
    }
    for schedule in made.values():
        verify(schedule)
    return Rounds(problem, best.cut, best.row, Layout(made), config.rule)


def _backward(model: LayeredModel, layer: int) -> float:
    if model.lora is not None:
        return _FROZEN_BACKWARD
    numbers = sum(map(math.prod, model.shapes(layer).values()))
    trained = sum(math.prod(model.shapes(layer)[name]) for name in model.differentiated(layer))
    return _FROZEN_BACKWARD + (_BACKWARD - _FROZEN_BACKWARD) * trained / max(1, numbers)


def require_room(config: TrainConfig, model: LayeredModel, layers: Sequence[int]) -> None:
    """Raise PartitionError where one of `layers` is larger than --span-mib allows a span to be."""
    largest = max(layers, key=model.parameter_bytes)
    needed = math.ceil(model.parameter_bytes(largest) / 2**20)
    if config.span_mib and needed > config.span_mib:
        raise PartitionError(
            f"span_mib is {config.span_mib}; allowed: {needed} or more, for the weights of layer {largest}"
        )
