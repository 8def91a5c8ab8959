"""The pictures of a run: the measured iteration beside the planned one, its trace, and the loss curve."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jobs.config import TrainConfig
from jobs.network import read_network
from jobs.plan import Plan
from launch.report import loss_svg
from launch.run_folder import RunFolder, write_whole
from pipeline.drawing.draw import compare_svg
from pipeline.drawing.trace import perfetto
from pipeline.schedule.ops import COMPUTE, F, R, Span, parse_op
from pipeline.schedule.simulate import Costs, simulate
from pipeline.schedule.timeline import Event, Timeline

Lanes = dict[str, list[tuple[str, float, float]]]
"""Place -> (op as text, start, end): whoever has a place now, its row is that of the plan."""


class Pictures:
    """Draws into a run folder; a picture that cannot be drawn or written costs the picture, not the run.

    `event` takes a picture_failed, with the `path` and the `error`.
    """

    def __init__(self, config: TrainConfig, plan: Plan, folder: RunFolder, event: Callable[..., None]) -> None:
        self._config, self._plan, self._folder, self._event = config, plan, folder, event
        self.paths: list[Path] = []
        self.layout = plan.layout
        """The one in force."""

    def timeline(self, lanes: Lanes) -> None:
        """timeline.svg and trace.json of a measured iteration; the plan above it uses the measured op times."""
        measured = measured_timeline(self._config.scheduler, lanes)
        self._write("timeline.svg", lambda: self._beside_the_plan(measured))
        self._write("trace.json", lambda: json.dumps(perfetto(measured)))

    def _beside_the_plan(self, measured: Timeline) -> str:
        """Raises CostError where an op of the plan was not measured: its stage was lost at the time."""
        config, network, size = self._config, None, 0
        if config.network is not None:
            network, _ = read_network(config.network, config.workers)
            size = config.microbatch_size * config.sequence_length * self._plan.model.hidden_size * 4
        costs = replace(measured_costs(measured), output_bytes=size)
        planned = simulate(self.layout.train, costs, network)
        title = f"{config.scheduler}, {len(planned.workers)} workers, {config.microbatches} microbatches"
        return compare_svg(planned, measured, title=title)

    def loss(self) -> None:
        """loss.svg: training loss, held-out loss where it was evaluated, and every failure."""
        if self._folder.metrics:
            events = [*self._folder.evaluations, *self._folder.marks]
            self._write("loss.svg", lambda: loss_svg(self._folder.metrics, events))

    def _write(self, name: str, draw: Callable[[], str]) -> None:
        try:
            write_whole(path := self._folder.path / name, draw())
            if path not in self.paths:  # after a rollback it is drawn again
                self.paths.append(path)
        except (OSError, ValueError, ArithmeticError, LookupError) as error:
            self._event("picture_failed", path=name, error=str(error) or type(error).__name__)


def measured_timeline(name: str, lanes: Lanes) -> Timeline:
    """The timeline that workers reported: times in seconds since each began the iteration."""
    events = [Event(int(w), parse_op(op), start, end) for w, lane in lanes.items() for op, start, end in lane]
    return Timeline(name, tuple(events), measured=True)


def measured_costs(timeline: Timeline) -> Costs:
    """The mean seconds of each kind of op on each span in a measured iteration, as costs for the simulator."""
    times: dict[tuple[str, Span], list[float]] = defaultdict(list)
    for event in timeline.events:
        if event.op.kind in COMPUTE:
            kind = F if event.op.kind == R else event.op.kind  # a forward that is run again costs what it cost
            times[kind, event.op.span].append(event.end - event.start)
    mean: dict[str, dict[Span, float]] = defaultdict(dict)
    for (kind, span), values in times.items():
        mean[kind][span] = sum(values) / len(values)
    return Costs(forward=mean["F"], backward=mean["B"], input_gradient=mean["I"], weight_gradient=mean["W"])
