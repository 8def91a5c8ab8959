"""`unbroken plan --losses F`: what becomes of a run for every set of at most F lost workers, before any is lost.

For each set: the layout over those that are left, what is lost with them, what moves, the predicted time of a step, and
the bytes of the fullest worker while it still has what it gives. All layouts pass the verifier.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.config import TrainConfig, require
from jobs.pipelines import layer_costs, plan_layout
from jobs.resizing import make_planner, resize_problem
from launch.commands import Result
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import read_config, resolve
from pipeline.schedule.costs import Costs
from pipeline.schedule.layout import Layout
from pipeline.schedule.simulate import simulate
from recovery.membership import View
from recovery.policy import Recovery
from recovery.remedy import CannotRestore, has, states_of
from recovery.resize import Resize

_FP32, _STATE = 4, 16  # bytes of a frozen weight, and of a trained one: itself, its gradient and two moments


@dataclass(frozen=True)
class Outcome:
    """What becomes of a run that loses `lost`. `why` says why it cannot go on, if so; else `slower` is the step's time
    as a multiple of what it was, `moved` the bytes of state that are sent, `peak` those of the fullest worker in the
    transition."""

    lost: tuple[int, ...]
    why: str = ""
    stages: int = 0
    replicas: int = 0
    slower: float = 0.0
    remedies: tuple[str, ...] = ()
    moved: int = 0
    peak: int = 0


def loss_table(config: TrainConfig, model: LayeredModel, losses: int) -> list[Outcome]:
    """The outcome of every set of 1 to `losses` workers of the first layout."""
    costs = layer_costs(model, config.sequence_length)
    home, _ = plan_layout(config, model, config.evaluate_samples)
    planner = make_planner(resize_problem(config, model, costs, config.evaluate_samples), home)
    view = first_view(home)
    recovery = Recovery(
        config.recovery, view, home, model.num_layers, model.tied, Path(), resize=Resize(planner, 1, 0.0, 0.0)
    )
    usual = _seconds(home, costs)
    sizes = state_sizes(model, _STATE)
    return [
        _outcome(recovery, sizes, lost, lambda layout: _seconds(layout, costs) / usual)
        for count in range(1, losses + 1)
        for lost in combinations(view.workers, count)
    ]


def state_sizes(model: LayeredModel, trained: int) -> dict[str, int]:
    """State -> its bytes, with so many for each weight that is trained; a frozen one is there in fp32."""
    shapes = {key: shape for layer in range(model.num_layers) for key, shape in model.shapes(layer).items()}
    return {
        state.name: sum(
            (trained if place < state.trained else _FP32) * math.prod(shapes[key])
            for place, key in enumerate(state.keys)
        )
        for state in model.states
    }


def first_view(home: Layout) -> View:
    """That of a run which begins in a layout, all on one machine."""
    places = tuple(home.train.lanes)
    return View(
        1, places, home.key, details={"attempt": 1, "source": None}, places={p: p for p in places},
        agents=dict.fromkeys(places, 0), next_worker=len(places),
    )  # fmt: skip


def model_named(config: TrainConfig) -> LayeredModel:
    """The model that the settings name, its shape alone. Raises ModelError, ConfigError."""
    with tempfile.TemporaryDirectory() as converted:
        found = resolve(config.model, Path(converted))
        shape = read_config(found) if isinstance(found, Path) else found
        return LayeredModel(shape, lora=config.lora(), trained=config.patterns())


def _seconds(layout: Layout, costs: Sequence[float]) -> float:
    return simulate(layout.train, Costs(list(costs))).makespan_s


def _outcome(
    recovery: Recovery, sizes: Mapping[str, int], lost: tuple[int, ...], slower: Callable[[Layout], float]
) -> Outcome:
    try:
        after = recovery.supposing_a_checkpoint().after_loss(recovery.home, lost)
    except CannotRestore as error:
        return Outcome(lost, str(error))
    layout = recovery.layouts[after.layout]
    held = has(after.settled(), layout, recovery.num_layers, recovery.tied)
    before = has(recovery.home, recovery.layout, recovery.num_layers, recovery.tied)
    peak = max(sum(sizes.get(name, 0) for name in held[w] | before.get(w, set())) for w in after.workers)
    moved = sum(sizes.get(name, 0) for move in after.moves for name in states_of(move.part) for _ in move.sources)
    spans = layout.train.holders
    replicas = max(map(len, spans.values()))
    remedies = ("checkpoint",) if after.rollback else tuple(sorted({move.remedy for move in after.moves}))
    return Outcome(lost, "", len(layout.train.lanes) // replicas, replicas, slower(layout), remedies, moved, peak)


def plan_losses(config: TrainConfig, losses: int) -> Result:
    """The table of `loss_table`, for the model and the workers that the settings name."""
    config.validate()
    require(not config.shard_optimizer, "shard_optimizer", True, "False with --losses: such a run keeps its size")
    outcomes = loss_table(config, model_named(config), losses)
    rows = [
        {"lost": list(o.lost), "survives": not o.why, "why": o.why, "stages": o.stages, "replicas": o.replicas,
         "step_time": round(o.slower, 4), "remedies": list(o.remedies), "moved_bytes": o.moved, "peak_bytes": o.peak}
        for o in outcomes
    ]  # fmt: skip
    values = {"simulated": True, "workers": config.workers, "losses": losses, "sets": rows}
    return values, _text(outcomes)


def _text(outcomes: Sequence[Outcome]) -> str:
    table = Table("lost", "goes on as", "step time", "by", "moves MiB", "peak MiB", title="losses, simulated")
    for o in outcomes:
        lost = ", ".join(map(str, o.lost))
        if o.why:
            table.add_row(lost, "ends", "", o.why)
            continue
        table.add_row(
            lost, f"{o.stages} x {o.replicas}", f"{o.slower:.2f}", "+".join(o.remedies) or "nothing",
            f"{o.moved / 2**20:.1f}", f"{o.peak / 2**20:.1f}",
        )  # fmt: skip
    console = Console(width=110)
    with console.capture() as text:
        console.print(table)
        ends = sum(bool(o.why) for o in outcomes)
        console.print(f"{len(outcomes)} sets of workers, of which {len(outcomes) - ends} are survived")
    return text.get()
