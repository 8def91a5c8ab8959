"""`unbroken plan --power-cap WATTS`: a clock for each worker of a run, under a model of their power. All is simulated.

Times are in steps at nominal clocks, since what a layer costs is known in operations, not in seconds of a device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.config import TrainConfig
from jobs.pipelines import layer_costs, plan_layout
from launch.commands import Result
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import read_config, resolve
from pipeline.schedule.costs import Costs
from pipeline.schedule.ops import span_text
from pipeline.schedule.simulate import simulate
from pipeline.settings import ConfigError, require_known
from schedulers import PLANNERS
from schedulers.frequency import Clocks, Power, at_clocks, even_clocks, plan_clocks


@dataclass(frozen=True)
class ClockTable:
    """A run at nominal clocks, at the same clock for all that keeps the cap, and as planned. `layers` by worker."""

    cap_watts: float
    power: Power
    nominal: Clocks
    even: Clocks
    planned: Clocks
    layers: Mapping[int, str]


def power_of(watts: str, clock_range: str, bound: float) -> Power:
    """The Power that `--watts STATIC:DYNAMIC --clock-range LEAST:MOST --bound SHARE` mean. Raises ConfigError."""
    (static, dynamic), (least, most) = _pair("watts", watts), _pair("clock_range", clock_range)
    if not least <= 1 <= most:
        raise ConfigError(
            f"clock_range is {clock_range!r}; allowed: LEAST:MOST with 1, the nominal clock, between them"
        )
    return Power(static, dynamic, least, most, bound)


def _pair(name: str, text: str) -> tuple[float, float]:
    try:
        first, second = map(float, text.split(":"))
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; allowed: two numbers, as '0.5:1.25'") from None
    return first, second


def clock_table(config: TrainConfig, model: LayeredModel, cap_watts: float, power: Power) -> ClockTable:
    """The clocks for the run that the settings describe. Raises ClockError for a cap that cannot be kept."""
    schedule = plan_layout(config, model, config.evaluate_samples)[0].train
    layers = layer_costs(model, config.sequence_length)
    largest = max(layers)
    whole = simulate(schedule, Costs([cost / largest for cost in layers])).makespan_s
    costs = Costs([cost / largest / whole for cost in layers])
    powers = dict.fromkeys(schedule.lanes, power)
    spans: dict[int, list[str]] = {worker: [] for worker in schedule.lanes}
    for span, workers in schedule.holders.items():
        for worker in workers:
            spans[worker].append(span_text(span))
    return ClockTable(
        cap_watts, power, at_clocks(schedule, costs, powers, dict.fromkeys(powers, 1.0)),
        at_clocks(schedule, costs, powers, even_clocks(powers, cap_watts)),
        plan_clocks(schedule, costs, powers, cap_watts), {worker: " ".join(said) for worker, said in spans.items()},
    )  # fmt: skip


def plan_power(config: TrainConfig, cap_watts: float, power: Power) -> Result:
    """The table of `clock_table`, for the model and the workers that the settings name."""
    require_known("scheduler", config.scheduler, PLANNERS)
    config.validate()
    with tempfile.TemporaryDirectory() as converted:
        found = resolve(config.model, Path(converted))
        model = LayeredModel(read_config(found) if isinstance(found, Path) else found)
    table = clock_table(config, model, cap_watts, power)
    shown = {"nominal": table.nominal, "even": table.even, "planned": table.planned}
    values = {
        "simulated": True, "workers": config.workers, "power_cap_watts": cap_watts, "power": vars(power),
        "unit_s": "a step at nominal clocks", **{name: _as_json(clocks) for name, clocks in shown.items()},
        "bound_s": table.planned.bound_s,
    }  # fmt: skip
    return values, _text(table)


def _as_json(clocks: Clocks) -> dict[str, Any]:
    return {
        "step": clocks.seconds, "joules": clocks.joules, "mean_watts": clocks.mean_watts,
        "peak_watts": clocks.peak_watts, "clock": {str(w): f for w, f in clocks.clock.items()},
        "busy": {str(w): share for w, share in clocks.busy.items()},
        "watts": {str(w): watts for w, watts in clocks.watts.items()},
    }  # fmt: skip


def _text(table: ClockTable) -> str:
    nominal, planned = table.nominal, table.planned
    rows = Table("worker", "layers", "clock", "busy before", "busy after", "mean W", title="clocks, simulated")
    for worker, clock in planned.clock.items():
        rows.add_row(
            str(worker), table.layers[worker], f"{clock:.3f}", f"{nominal.busy[worker]:.0%}",
            f"{planned.busy[worker]:.0%}", f"{planned.watts[worker]:.0f}",
        )  # fmt: skip
    said = Table("", "step", "energy", "mean W", "peak W", title=f"under {table.cap_watts:g} W, simulated")
    for name, each in (("nominal clocks", nominal), ("all lowered evenly", table.even), ("planned", planned)):
        over = " (over)" if each.peak_watts > table.cap_watts * (1 + 1e-9) else ""
        said.add_row(
            name, f"{each.seconds / nominal.seconds:.3f}", f"{each.joules / nominal.joules:.3f}",
            f"{each.mean_watts:.0f}", f"{each.peak_watts:.0f}{over}",
        )  # fmt: skip
    console = Console(width=110)
    with console.capture() as text:
        console.print(rows)
        console.print(said)
        console.print(
            "simulated, from a model of power; step and energy are multiples of those at nominal clocks; peak W is all "
            "workers computing at once, which is what the cap is on"
        )
    return text.get()
