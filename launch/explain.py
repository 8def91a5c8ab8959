"""`unbroken explain recovery`: what would be done about each lost worker, in order, what that costs, and what is lost.

Nothing is run. Bytes follow from the model and the layout; seconds are those bytes at a bandwidth and the work of a fit
at a speed, which are measured here unless they are given. To notice a loss and to build links again comes on top.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from jobs.config import TrainConfig
from jobs.pipelines import plan_layout
from launch.loss_plan import first_view, model_named
from pipeline.model.layered import LayeredModel
from pipeline.model.output_fit import fit_flops
from pipeline.schedule.ops import parse_span
from pipeline.settings import Within, check_bounds, of_kind, require
from pipeline.state.resident import part_span
from recovery.membership import START, next_view
from recovery.policy import CHECKPOINT, POLICIES, REDUNDANT, Recovery, remedies
from recovery.rehearse import boundary_bytes
from recovery.remedy import CannotRestore, Loss, Remedy, has, losses, states_of

_FP32, _MIB = 4, 2**20
_LOSES = {
    "replica": "nothing: a copy, bit for bit",
    REDUNDANT: "nothing: the worker before has computed it as well",
    "rehearse": "its moments; its output projections are fitted, the rest is a mean",
    "checkfree": "its weights and moments: the mean of its neighbours takes their place",
    "checkfree+": "its weights and moments: those of its twin take their place",
    "copy": "its weights and moments: those of a neighbour take their place",
    "random": "all that it learned since the run began",
}


@dataclass(frozen=True)
class TopicSettings:
    """What is explained, and what it is reckoned with."""

    topic: Literal["recovery"] = "recovery"
    """What is to be explained."""
    bandwidth_mib: Annotated[float, Within(0, 1e9, above=True)] = 1000.0
    """MiB a second between two workers, and from the disk."""
    gflops: Annotated[float | None, Within(0, 1e9, above=True)] = None
    """GFLOP/s of a worker, for a fit; unset: measured here, on one thread."""


@dataclass(frozen=True)
class Option:
    """One remedy for one lost worker: why it cannot be, or ""; the bytes that are sent, the seconds that takes, and
    what is lost."""

    remedy: str
    why_not: str
    moved: int
    seconds: float
    loses: str


def explain(train: TrainConfig, topic: TopicSettings) -> tuple[dict[str, Any], str]:
    """The remedies of --recovery for each worker that may be lost. Raises ConfigError, ModelError."""
    config = replace(train, data=train.data or "stdlib").resolved()
    config.validate()
    require(config.scheduler != "roundpipe", "scheduler", config.scheduler, "any but roundpipe, which loses no state")
    model = model_named(config)
    gflops = topic.gflops or _measured_gflops()
    options = _options(config, model, topic.bandwidth_mib * _MIB, gflops * 1e9)
    alike: defaultdict[str, list[int]] = defaultdict(list)
    for worker, each in options.items():
        alike[json.dumps([asdict(option) for option in each])].append(worker)
    values = {
        "recovery": config.recovery, "order": list(POLICIES[config.recovery]), "bandwidth_mib": topic.bandwidth_mib,
        "gflops": round(gflops, 1), "estimated": True,
        "workers": [{"lost": workers, "remedies": json.loads(text)} for text, workers in alike.items()],
    }  # fmt: skip
    return values, _text(config, alike, topic.bandwidth_mib, gflops)


def _options(
    config: TrainConfig, model: LayeredModel, bandwidth: float, flops: float
) -> dict[int, list[Option]]:  # fmt: skip
    """Worker of the first layout -> its remedies, in order."""
    home, around = plan_layout(config, model, config.evaluate_samples)
    view = first_view(home)
    recovery = Recovery(config.recovery, view, home, model.num_layers, model.tied, Path(), planner=around)
    had = has(view, home, model.num_layers, model.tied)
    sizes = _sizes(model)
    found: dict[int, list[Option]] = {}
    for worker in view.workers:
        after = next_view(view, (worker,))
        left = {each: names for each, names in had.items() if each != worker}
        wanted = losses(after, home, left, model.num_layers, model.tied)
        found[worker] = [
            _rolled_back(config, sum(sizes.values()), bandwidth) if name == CHECKPOINT
            else _taken_over(recovery, worker) if name == REDUNDANT
            else _restored(config, model, remedies()[name], wanted, sizes, bandwidth, flops)
            for name in POLICIES[config.recovery]
        ]  # fmt: skip
    return found


def _sizes(model: LayeredModel) -> dict[str, int]:
    """State -> its elements."""
    shapes = {key: shape for layer in range(model.num_layers) for key, shape in model.shapes(layer).items()}
    return {state.name: sum(math.prod(shapes[key]) for key in state.keys) for state in model.states}


def _restored(
    config: TrainConfig, model: LayeredModel, remedy: Remedy, wanted: Sequence[Loss], sizes: Mapping[str, int],
    bandwidth: float, flops: float,
) -> Option:  # fmt: skip
    """A remedy that works part by part; what a copy is left of is copied in any case."""
    moved, seconds = 0, 0.0
    for loss in wanted:
        elements = sum(sizes.get(name, 0) for name in states_of(loss.part))
        try:
            move, exact = remedies()["replica"].plan(loss), True
        except CannotRestore:
            try:
                move, exact = remedy.plan(loss), remedy.carries == "state"
            except CannotRestore as error:
                return Option(remedy.name, str(error), 0, 0.0, "")
        sent = elements * _FP32 * (3 if exact else len(move.sources))
        if move.remedy == "rehearse":
            kept = boundary_bytes(config, model)
            tokens = kept // (model.hidden_size * torch.bfloat16.itemsize)
            sent += 2 * kept
            seconds += fit_flops(model, parse_span(loss.part), tokens) / flops if part_span(loss.part) else 0.0
        moved += sent
    return Option(remedy.name, "", moved, seconds + moved / bandwidth, _LOSES[remedy.name])


def _taken_over(recovery: Recovery, worker: int) -> Option:
    try:
        recovery.after_loss(recovery.home, (worker,))
    except CannotRestore as error:
        return Option(REDUNDANT, str(error), 0, 0.0, "")
    return Option(REDUNDANT, "", 0, 0.0, _LOSES[REDUNDANT])


def _rolled_back(config: TrainConfig, elements: int, bandwidth: float) -> Option:
    """All go back, and read the checkpoint, or begin again."""
    moved = elements * _FP32 * 3
    every = config.checkpoint_every
    again = f"nothing, but up to {every} steps are run again" if every else f"all steps: back to the {START} of the run"
    return Option(CHECKPOINT, "", moved, moved / bandwidth, again)


def _measured_gflops() -> float:
    """Of one matrix product on one thread, in fp32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, times = torch.ones(1024, 1024), list[float]()
        for _ in range(4):
            began = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return 2 * 1024**3 / min(times) / 1e9


def _text(config: TrainConfig, alike: Mapping[str, Sequence[int]], bandwidth: float, gflops: float) -> str:
    console = Console(width=118)
    with console.capture() as text:
        for told, workers in alike.items():
            options = [Option(**each) for each in json.loads(told)]
            lost = f"worker{'s' if len(workers) > 1 else ''} {', '.join(map(str, workers))}"
            one = " one of" if len(workers) > 1 else ""
            made = Table("", "remedy", "moves MiB", "seconds", "what is lost", title=f"if{one} {lost} is lost",
                         title_justify="left", expand=True)  # fmt: skip
            taken = False
            for number, each in enumerate(options, 1):
                if each.why_not:
                    made.add_row(str(number), each.remedy, "", "", f"cannot be: {each.why_not}", style="dim")
                    continue
                cells = f"{each.moved / _MIB:,.1f}", f"{each.seconds:.2f}", each.loses
                made.add_row(str(number), each.remedy, *cells, style="dim" if taken else "bold")
                taken = True
            if not taken:
                made.add_row("", "none", "", "", "the run ends")
            console.print(made)
        console.print(
            f"--recovery {config.recovery}: the first that can be is taken. Estimated at {bandwidth:,.0f} MiB/s and "
            f"{gflops:,.0f} GFLOP/s; to notice the loss and to build links again takes some tenths of a second more."
        )
    return text.get()


def explain_command(config: Any) -> tuple[dict[str, Any], str]:
    """The command's: its settings are those of train, and those of the topic."""
    check_bounds(config)
    return explain(of_kind(TrainConfig, config), of_kind(TopicSettings, config))


__all__ = ["Option", "TopicSettings", "explain", "explain_command"]
