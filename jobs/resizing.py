"""A job that changes its size: what the planner of layouts is given, and how it is asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from jobs.config import TrainConfig
from pipeline.model.layered import LayeredModel
from pipeline.runtime.footprint import state_bytes
from pipeline.schedule.layout import Layout
from recovery.remedy import CannotRestore
from recovery.resize import SpeedPlanner
from schedulers import PartitionError
from schedulers.resize import ResizeProblem, resize

_KEPT = 4096  # layouts: a table of what each loss leads to, and of what came before


def resize_problem(config: TrainConfig, model: LayeredModel, layer_costs: list[float], evaluated: int) -> ResizeProblem:
    """What is known of a job before it runs; `evaluated` are the samples of an evaluation."""
    optimizer = config.optimizer_config()
    held = [float(state_bytes(model, [(layer, layer + 1)], optimizer)) for layer in range(model.num_layers)]
    return ResizeProblem(
        config.scheduler, layer_costs, config.microbatches, -(-evaluated // config.microbatch_size), config.replicas,
        config.chunks, held, config.snapshot == "neighbour", config.exact_sums and model.tied,
        config.balanced_memory, config.balanced_shape,
    )  # fmt: skip


def make_planner(problem: ResizeProblem, home: Layout) -> SpeedPlanner:
    """The layout for the places that have workers. Layers stay in the places that have them in `home`, where they can,
    so it depends on nothing but who is there, and how fast, and is kept."""
    held: dict[int, set[int]] = {place: set() for place in home.train.lanes}
    for span, places in home.train.holders.items():
        for place in places:
            held[place] |= set(range(*span))

    known: dict[object, Layout | PartitionError] = {}

    def planner(alive: Collection[int], speeds: Mapping[int, float], replicas: int = 1) -> Layout:
        if not alive:
            raise CannotRestore("no worker is left")
        if (key := (frozenset(alive), tuple(sorted(speeds.items())), replicas)) not in known:
            if len(known) >= _KEPT:
                known.pop(next(iter(known)))
            try:
                known[key] = resize(problem, alive, speeds=speeds, held=held, least_replicas=replicas).layout
            except PartitionError as error:
                known[key] = error
        if isinstance(found := known[key], PartitionError):
            raise CannotRestore(str(found)) from found
        return found

    return planner
