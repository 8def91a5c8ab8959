"""SkipPipe for a training job: from settings and a network file to verified schedules, and again when workers are lost.

The coordinator plans: the routes of a step, those of a step of the whole model if there are to be such steps, and
those of an evaluation. When workers are lost it plans again over those that are left, in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from typing import Any

from jobs.config import ConfigError, TrainConfig, require
from jobs.network import read_network
from pipeline.schedule.layout import EVALUATE, FULL, TRAIN, Layout
from pipeline.schedule.lower import lower
from pipeline.schedule.ops import F, Op, Route, Schedule, ScheduleError, Span
from pipeline.schedule.verify import verify
from recovery.remedy import CannotRestore
from schedulers import PartitionError, partition
from schedulers.skippipe import SkipPlan, replan, skippipe, without
from schedulers.skippipe_search.problem import NetworkError, RoutingProblem, quotas, routing_from_json

_FLOPS = 2e10  # products and sums per second of a worker, where the network file does not say what a forward takes


class Routes:
    """The plans of one job. `layer_costs` are operations per token; `evaluated` the samples of an evaluation.

    Raises ConfigError where the settings, the network and the model do not fit together.
    """

    def __init__(self, config: TrainConfig, layer_costs: list[float], evaluated: int, activation_bytes: int) -> None:
        self.config, self._bytes = config, activation_bytes
        self.evaluated = -(-evaluated // config.microbatch_size)
        values = self._values(layer_costs)
        try:
            asked = routing_from_json(
                values, skip=config.skip, swaps=config.swaps, contention=values["contention"],
                stages=None if "stages" in values else config.stages,
                microbatches=config.microbatches,
            )  # fmt: skip
        except NetworkError as error:
            raise ConfigError(f"network {str(config.network)!r} with scheduler skippipe: {error}") from error
        used = sorted(n for stage in asked.stages for n in stage)
        require(
            used == list(range(config.workers)), "workers", config.workers,
            f"{len(used)}, the nodes that the stages in {str(config.network)!r} name (found {used})",
        )  # fmt: skip
        least = [node for node, (fewest, _) in quotas(asked)[1].items() if fewest < 1]
        require(
            not least, "microbatches", config.microbatches,
            f"enough for every worker to be visited in every step; worker {min(least, default=0)} would not be",
        )  # fmt: skip
        self._asked, self._joint = asked, "stages" not in values
        blocks, stages = layer_costs[:-1], len(asked.stages)
        try:
            self.spans: tuple[Span, ...] = (*partition(blocks, [1.0] * stages), (len(blocks), len(blocks) + 1))
        except PartitionError as error:
            raise ConfigError(f"stages: {stages} for {len(layer_costs)} layers: {error}") from error

    def _values(self, layer_costs: list[float]) -> dict[str, Any]:
        """What the network file says, with the seconds of a hop for this model's activations, and of compute."""
        config = self.config
        assert config.network is not None
        network, values = read_network(config.network, config.workers)
        size = len(network.latency_s)
        values["hop_s"] = [
            [0.0 if a == b else network.hop(a, b, self._bytes)[1] for b in range(size)] for a in range(size)
        ]
        values["contention"] = network.exclusive
        stages = len(values["stages"]) if isinstance(values.get("stages"), list) else config.stages
        tokens = config.microbatch_size * config.sequence_length
        forward = values.setdefault("forward_s", sum(layer_costs[:-1]) * tokens / max(1, stages) / _FLOPS)
        if isinstance(forward, int | float):  # else it is refused by name when it is read
            values.setdefault("backward_s", 2 * forward)
        values.setdefault("loss_s", 3 * layer_costs[-1] * tokens / _FLOPS)
        return values

    @property
    def num_stages(self) -> int:
        """The stages, the head aside."""
        return len(self._asked.stages)

    @cached_property
    def plan(self) -> SkipPlan:
        """The routes of a step. Raises ConfigError."""
        try:
            return skippipe(self._asked, seed=self.config.seed, moves=self.config.search_moves, joint=self._joint)
        except NetworkError as error:
            raise ConfigError(f"scheduler skippipe: {error}") from error

    @cached_property
    def whole(self) -> SkipPlan:
        """The routes of a step in which no stage is skipped, over the same stages."""
        full = replace(self.plan.problem, path_length=len(self.plan.problem.stages))
        return skippipe(full, seed=self.config.seed, moves=self.config.search_moves // 4)

    @cached_property
    def layout(self) -> Layout:
        """Lowered and verified schedules by purpose, for all workers."""
        return self._made(self.plan, self.whole if self.config.full_every else None)

    def around(self, alive: Collection[int]) -> Layout:
        """The layout for the places that are left. Raises CannotRestore where there can be none."""
        lost = set(range(self.config.workers)) - set(alive)
        if not lost:
            return self.layout
        try:
            problem = without(self.plan.problem, lost)
            whole = None
            if self.config.full_every:
                whole = replan(self.whole, without(self.whole.problem, lost), seed=self.config.seed)
            return self._made(replan(self.plan, problem, seed=self.config.seed), whole)
        except (NetworkError, ScheduleError) as error:
            raise CannotRestore(str(error)) from error

    def _made(self, plan: SkipPlan, whole: SkipPlan | None) -> Layout:
        first, head = self.spans[0], self.spans[-1]
        spans = self._spans_of(plan.problem)
        made = {TRAIN: plan.schedule(spans), EVALUATE: evaluation_routes(plan.problem, spans, self.evaluated)}
        if whole is not None:
            made[FULL] = whole.schedule(spans, "skippipe, whole model")
        made = {purpose: lower(schedule) for purpose, schedule in made.items()}
        for purpose, schedule in made.items():
            training = purpose != EVALUATE
            verify(
                schedule,
                always=(first, head),
                balanced=training,
                max_activations=plan.max_activations if training else None,
            )
        return Layout(made)

    def _spans_of(self, problem: RoutingProblem) -> tuple[Span, ...]:
        """The spans of the stages that `problem` still has, and the head's."""
        names = [
            next(i for i, old in enumerate(self.plan.problem.stages) if stage[0] in old) for stage in problem.stages
        ]
        return (*(self.spans[i] for i in names), self.spans[-1])


def evaluation_routes(problem: RoutingProblem, spans: tuple[Span, ...], microbatches: int) -> Schedule:
    """Forward through every stage that there is, microbatches dealt to the nodes of each in turn."""
    route = Route(spans, ())
    lanes: dict[int, list[Op]] = {n: [] for stage in problem.stages for n in stage}
    for m in range(microbatches):
        for span, stage in zip(spans, problem.stages, strict=False):
            lanes[stage[m % len(stage)]].append(Op(F, span, m))
    for m in range(microbatches):  # the heads last: by then nobody waits for a home's forwards
        lanes[problem.home(m)].append(Op(F, spans[-1], m))
    return Schedule((route,) * microbatches, {n: tuple(lane) for n, lane in sorted(lanes.items())}, "evaluation")
