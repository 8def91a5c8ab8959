"""The schedules of a training job whose workers hold their stage: what layers cost, how they are cut, who does what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from jobs.config import ConfigError, TrainConfig
from jobs.routes import Routes
from pipeline.model.layered import LayeredModel
from pipeline.runtime.transport import span_bytes
from pipeline.schedule.layout import EVALUATE, TRAIN, Layout
from pipeline.schedule.lower import add_redundant, lower
from pipeline.schedule.ops import Schedule, Span
from pipeline.schedule.verify import verify
from recovery import redundant
from recovery.reroute import Planner
from schedulers import num_spans, plan
from schedulers.plan import Ends

_SMALL_OPS = 1.2  # what norms, activations and rotations add to a block (measured at dim 384: a fifth)


def layer_costs(model: LayeredModel, sequence_length: int) -> list[float]:
    """Operations per token of each layer's forward, in units of 2^20, counting products only (2 per weight, and
    attention's 4 * sequence * hidden / 2 under a causal mask). The embedding is a look-up: next to nothing."""
    hidden, vocabulary = model.hidden_size, int(model.config.vocab_size)
    blocks = [
        _SMALL_OPS * (2.0 * model.parameter_count(layer) + 2.0 * sequence_length * hidden) for layer in model.blocks
    ]
    costs = [0.01 * hidden, *blocks, *([2.0 * hidden * vocabulary] if model.headed else [])]
    return [cost / 2**20 for cost in costs]  # planners take seconds: numbers of up to 1e9


def plan_layout(config: TrainConfig, model: LayeredModel, evaluated: int) -> tuple[Layout, Planner | None]:
    """The layout of a job: the lowered and verified schedules of one step and of one evaluation of `evaluated` samples,
    and the backups; and what gives one for the workers that are left, where microbatches may take other routes.

    Raises ConfigError where the model has fewer layers than the settings ask for spans.
    """
    costs = layer_costs(model, config.sequence_length)
    if config.scheduler == "skippipe":
        routes = find_routes(config, model, evaluated)
        return routes.layout, routes.around
    require_layers(config, model.num_layers)
    ends = where_ends_go(config)
    if config.exact_sums and model.tied and config.stages == 1 and ends == "in-line":
        ends = "home"  # the gradients of both on the weight that they share are summed one by one
    made: dict[str, Schedule] = {}
    for purpose, count in ((TRAIN, None), (EVALUATE, -(-evaluated // config.microbatch_size))):
        schedule = plan(
            config.scheduler, costs, config.stages, config.microbatches, config.replicas, chunks=config.chunks,
            evaluated=count, ends=ends, swap=config.recovery == "checkfree+",
            balanced_memory=config.balanced_memory, balanced_shape=config.balanced_shape,
        )  # fmt: skip
        if config.recovery == "redundant" and count is None:
            schedule = add_redundant(schedule, backups(config, schedule))
        made[purpose] = lower(schedule)
        verify(made[purpose])
    return Layout(made, backups(config, made[TRAIN])), None


def find_routes(config: TrainConfig, model: LayeredModel, evaluated: int) -> Routes:
    """The routes through a slow network, not searched yet. Raises ConfigError where settings, network and model do not
    fit together."""
    size = span_bytes(config.microbatch_size, config.sequence_length, model.hidden_size, torch.float32)
    return Routes(config, layer_costs(model, config.sequence_length), evaluated, size)


def require_layers(config: TrainConfig, layers: int) -> None:
    """Raise ConfigError where a model has fewer layers than the settings ask for spans."""
    asked = num_spans(config.scheduler, config.stages, config.chunks) + (where_ends_go(config) != "in-line")
    if asked > layers:
        by = f" x chunks {config.chunks}" if config.scheduler == "interleaved" else ""
        raise ConfigError(
            f"workers {config.workers} / replicas {config.replicas}{by} asks for {asked} spans; "
            f"allowed: at most {layers}, the layers of the model"
        )


def where_ends_go(config: TrainConfig) -> Ends:
    """Where the embedding and the head are placed: apart from the blocks where stages are to be alike (CheckFree)."""
    if config.min_workers:  # the layouts of all sizes are in-line
        return "in-line"
    alike = config.recovery == "checkfree+" or (config.recovery in ("checkfree", "rehearse") and config.stages > 3)
    if config.ends == "auto":
        return "apart" if alike and config.scheduler == "one_f_one_b" else "in-line"
    return config.ends


def backups(config: TrainConfig, schedule: Schedule) -> tuple[tuple[Span, int], ...]:
    """Copies that are kept for recovery alone, as (span, worker): under checkfree+ both ends on the second worker,
    under redundant, and with snapshots, each stage on the one before it."""
    holders, found = schedule.holders, list[tuple[Span, int]]()
    for base in range(0, config.workers, config.stages):
        if config.recovery == "checkfree+":
            found += [(span, base + 1) for span in (min(holders), max(holders))]
        elif config.recovery == "redundant" or (config.snapshot == "neighbour" and config.replicas == 1):
            stages = [[s for s, workers in holders.items() if base + k in workers] for k in range(config.stages)]
            found += [(span, base + worker) for span, worker in redundant.copies(stages)]
    return tuple(found)


def stage_at(config: TrainConfig, holders: Mapping[Span, Sequence[int]], place: int) -> int | None:
    """The stage of the first replica in a place, in the first layout of the run; None for the others."""
    if config.scheduler == "skippipe":
        return next((i for i, span in enumerate(holders) if holders[span][0] == place and span != max(holders)), None)
    return place if place < config.stages else None
