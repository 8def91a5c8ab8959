"""`unbroken simulate | draw`: one dataclass of settings and one function each. Without torch: it takes seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from launch.run_folder import write_whole
from pipeline import reading
from pipeline.drawing.draw import svg
from pipeline.drawing.terminal import terminal
from pipeline.drawing.trace import perfetto
from pipeline.reading import FileError, read_text
from pipeline.schedule.graph import compiled
from pipeline.schedule.holdings import Bound, bounds
from pipeline.schedule.lower import lower
from pipeline.schedule.ops import LOAD, B, F, Schedule, dumps, loads
from pipeline.schedule.simulate import Costs, Network, simulate
from pipeline.schedule.timeline import Timeline
from pipeline.schedule.verify import verify
from pipeline.settings import ConfigError, Within, check_bounds, limit_work, require, require_known
from schedulers import ENGINES, PLANNERS, num_spans, plan
from schedulers.balanced_search.pieces import Held, Shape

_MOST_WORKERS = 2**14
Result = tuple[dict[str, Any], str]
"""What --json prints, and what a person reads."""


@dataclass(frozen=True)
class SimulateConfig:
    """Time a schedule without running it: this is a simulation, under the costs and the network that it is given."""

    scheduler: str = "one_f_one_b"
    """gpipe, one_f_one_b, interleaved, zero_bubble or balanced."""
    stages: Annotated[int, Within(1, 1024)] = 4
    """Workers per replica."""
    microbatches: Annotated[int, Within(1, 65536)] = 8
    """Microbatches, over all replicas."""
    replicas: Annotated[int, Within(1, 1024)] = 1
    """Data-parallel copies of the pipeline."""
    chunks: Annotated[int, Within(1, 1024)] = 2
    """Spans per worker, with --scheduler interleaved."""
    balanced_memory: Held = "free"
    """As in `train`, with --scheduler balanced."""
    balanced_shape: Shape = "line"
    """As in `train`, with --scheduler balanced."""
    schedule: Path | None = None
    """The text of a schedule, instead of a scheduler's."""
    costs: Path | None = None
    """JSON of seconds per layer (cut into stages) or per span; unset: forward 1, backward 2 for every span."""
    network: Path | None = None
    """JSON with latency_s and bandwidth matrices; unset: transfers take no time."""
    json: bool = False
    """Print one JSON object."""


def simulation(config: SimulateConfig) -> tuple[Schedule, Timeline, Mapping[int, Bound]]:
    """The schedule, its simulated timeline, and what its workers may hold at most. Raises ConfigError,
    ScheduleError or the refusal of a file."""
    check_bounds(config)
    values = None if config.costs is None else read_setting(config.costs, "costs")
    if config.schedule is not None:
        schedule = loads(_read(config.schedule, "schedule"))
        spans = list(schedule.holders)
    else:
        if config.scheduler in ENGINES and config.scheduler not in PLANNERS:
            raise ConfigError(
                f"scheduler is {config.scheduler!r}, which `unbroken plan --scheduler {config.scheduler}` plans and "
                f"times; allowed here: {', '.join(PLANNERS)}"
            )
        require_known("scheduler", config.scheduler, PLANNERS)
        count = num_spans(config.scheduler, config.stages, config.chunks)
        limit_work("stages", count, config.microbatches)
        require(
            config.stages * config.replicas <= _MOST_WORKERS, "replicas", config.replicas,
            f"1 to {_MOST_WORKERS // config.stages} with {config.stages} stages, {_MOST_WORKERS} workers in all",
        )  # fmt: skip
        forward = values.get("forward") if isinstance(values, dict) else None
        layers = max(count, len(forward)) if isinstance(forward, list) else count
        layer_costs = [1.0] * layers
        if layers > count:
            known = Costs.from_json(values)
            layer_costs = [known.seconds(F, (i, i + 1)) + known.seconds(B, (i, i + 1)) for i in range(layers)]
        schedule = plan(
            config.scheduler, layer_costs, config.stages, config.microbatches, config.replicas, chunks=config.chunks,
            balanced_memory=config.balanced_memory, balanced_shape=config.balanced_shape,
        )  # fmt: skip
        spans = list(schedule.holders)
    costs = Costs.uniform(schedule) if values is None else Costs.from_json(values, spans)
    network = None if config.network is None else Network.from_json(read_setting(config.network, "network"))
    verify(schedule)
    held = message_bounds(schedule)
    messages = {worker: int(bound.messages) for worker, bound in held.items()}
    return schedule, replace(simulate(schedule, costs, network), peak_messages=messages), held


def message_bounds(schedule: Schedule) -> Mapping[int, Bound]:
    """Worker -> what it may hold at most once the schedule is lowered, whatever the times; nothing where spans come and
    go, for then outputs lie in host memory."""
    return {} if any(op.kind == LOAD for _, op in schedule.others) else bounds(compiled(lower(schedule)))


def simulate_command(config: SimulateConfig) -> Result:
    """makespan_s, bubble, and per worker peak_activations, peak_messages (all, received, sent) and busy_s."""
    schedule, timeline, held = simulation(config)
    received = {worker: int(bound.most.received) for worker, bound in held.items()}
    sent = {worker: int(bound.most.sent) for worker, bound in held.items()}
    values = {
        "scheduler": timeline.name, "workers": len(schedule.lanes), "microbatches": schedule.num_microbatches,
        "makespan_s": timeline.makespan_s, "bubble": timeline.bubble,
        **{
            name: {str(w): n for w, n in peaks.items()}
            for name, peaks in (
                ("peak_activations", timeline.peak_activations), ("peak_messages", timeline.peak_messages),
                ("peak_received", received), ("peak_sent", sent),
            )
        },
        "busy_s": {str(w): s for w, s in timeline.busy_s.items()},
        "simulated": True,
    }  # fmt: skip
    text = (
        f"{terminal(timeline)}\nsimulated: makespan {timeline.makespan_s:.4g} s, bubble {timeline.bubble:.1%}, "
        f"peak activations per worker {_listed(timeline.peak_activations)}"
    )
    if held:
        text += (
            f"; messages at most {_listed(timeline.peak_messages)} "
            f"(received {_listed(received)}, sent and kept {_listed(sent)})"
        )
    return values, text


def _listed(peaks: Mapping[int, int]) -> str:
    return " ".join(f"{w}:{n}" for w, n in peaks.items())


@dataclass(frozen=True)
class DrawConfig(SimulateConfig):
    """Draw a schedule's simulated timeline."""

    out: Path = Path("schedule.svg")
    """Where to write; the ending chooses the form: .svg a picture, .json a Perfetto trace, .txt the schedule's text."""
    format: Literal["auto", "svg", "json", "txt"] = "auto"
    """The form, whatever the ending."""


def draw(config: DrawConfig) -> Result:
    """Write a picture, a trace or a text."""
    kind = config.format if config.format != "auto" else config.out.suffix.lstrip(".")
    require(kind in ("svg", "json", "txt"), "out", str(config.out), "a path that ends in .svg, .json or .txt")
    schedule, timeline, _ = simulation(config)
    texts = {
        "svg": lambda: svg(timeline),
        "json": lambda: json.dumps(perfetto(timeline)),
        "txt": lambda: dumps(schedule),
    }
    try:
        write_whole(config.out, texts[kind]())
    except OSError as error:
        raise ConfigError(f"out is {str(config.out)!r}, which cannot be written: {error}") from error
    return {"out": str(config.out), "makespan_s": timeline.makespan_s, "bubble": timeline.bubble}, f"wrote {config.out}"


def _read(path: Path, name: str) -> str:
    try:
        return read_text(path)
    except FileError as error:
        raise ConfigError(f"{name} is {str(path)!r}, which {error}") from error


def read_setting(path: Path, name: str) -> Any:
    """What a JSON file holds. Raises ConfigError, calling the setting by its `name`."""
    try:
        return reading.read_json(path)
    except FileError as error:
        raise ConfigError(f"{name} is {str(path)!r}, which {error}") from error
