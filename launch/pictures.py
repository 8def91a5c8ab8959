"""The pictures of a run: the measured iteration beside the planned one, its trace, the loss curve, and its sizes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.config import TrainConfig
from jobs.network import read_network
from jobs.plan import Plan
from launch.report import loss_svg
from launch.run_folder import RunFolder, write_whole
from pipeline.drawing.draw import compare_svg
from pipeline.drawing.history import Era, Mark, history_svg
from pipeline.drawing.trace import perfetto
from pipeline.schedule.ops import COMPUTE, F, R, Span, parse_op, parse_span
from pipeline.schedule.simulate import Costs, simulate
from pipeline.schedule.timeline import Event, Timeline
from recovery.coordinator import as_layers

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

    def timeline(self, lanes: Lanes, step: int | None = None) -> None:
        """timeline.svg and trace.json of a measured iteration, the one that took `step`; the plan above it uses the
        measured op times."""
        measured = measured_timeline(self._config.scheduler, lanes)
        self._write("timeline.svg", lambda: self._beside_the_plan(measured, step))
        self._write("trace.json", lambda: json.dumps(perfetto(measured)))

    def _beside_the_plan(self, measured: Timeline, step: int | None) -> str:
        """Raises CostError where an op of the plan was not measured: its stage was lost at the time."""
        config, network, size = self._config, None, 0
        if config.network is not None:
            network, _ = read_network(config.network, config.workers)
            size = config.microbatch_size * config.sequence_length * self._plan.model.hidden_size * 4
        costs = replace(measured_costs(measured), output_bytes=size)
        planned = simulate(self.layout.train, costs, network)
        title = f"{config.scheduler}, {len(planned.workers)} workers, {config.microbatches} microbatches"
        title += "" if step is None else f", step {step:,}"
        return compare_svg(planned, measured, title=title)

    def loss(self) -> None:
        """loss.svg: training loss, held-out loss where it was evaluated, and every failure."""
        if self._folder.metrics:
            events = [*self._folder.evaluations, *self._folder.marks]
            self._write("loss.svg", lambda: loss_svg(self._folder.metrics, events))

    def sizes(self, ledger: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> None:
        """sizes.svg of a run that has changed its size: who held what when, from the lines of its files."""
        if any(event["event"] == "resized" for event in events) and ledger:
            self._write("sizes.svg", lambda: self._over_time(ledger, events))

    def _over_time(self, ledger: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> str:
        first, layers = ledger[0]["time"], self._plan.model.num_layers
        commits = [line["time"] - first for line in ledger]
        holds = {
            int(place): [parse_span(span) for span in spans] for place, spans in as_layers(self._plan.layout).items()
        }
        eras, marks = [Era(0.0, holds)], list[Mark]()
        for event in (event for event in events if event["time"] >= first):
            at = event["time"] - first
            if event["event"] == "resized":
                eras.append(Era(at, _held(event["layers"])))
            elif event["event"] in ("shrunk", "remedy", "rejoined"):
                lost = event["event"] != "rejoined"
                who = event["worker"] if lost else event["replacement"]
                marks.append(Mark(at, f"worker {who} {'is lost' if lost else 'comes'}: {event['remedy']}", lost))
        taken = {line["step"]: line["time"] - first for line in ledger}
        losses = [(taken[m["step"]], m["loss"]) for m in self._folder.metrics if m["step"] in taken]
        return history_svg(
            eras, marks, commits, sorted(losses), end=commits[-1], num_layers=layers,
            title=f"{self._config.scheduler}, {self._config.min_workers} to {self._config.workers} workers",
        )  # fmt: skip

    def _write(self, name: str, draw: Callable[[], str]) -> None:
        try:
            write_whole(path := self._folder.path / name, draw())
            if path not in self.paths:  # after a rollback it is drawn again
                self.paths.append(path)
        except (OSError, ValueError, ArithmeticError, LookupError) as error:
            self._event("picture_failed", path=name, error=str(error) or type(error).__name__)


def _held(layers: Mapping[str, Sequence[str]]) -> dict[int, list[Span]]:
    return {int(place): [parse_span(span) for span in spans] for place, spans in layers.items()}


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
