"""`unbroken explain recovery`: what would be done about each lost worker, in order, what that costs, and what is lost.

Nothing is run. Bytes follow from the model and the layout; seconds are those bytes at a bandwidth and the work of a fit
at a speed, which are measured here unless they are given. To notice a loss and to build links again comes on top.
"""

from __future__ import annotations

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
from launch.loss_plan import first_view, model_named, state_sizes
from pipeline.model.layered import LayeredModel
from pipeline.model.stage_fit import fit_flops
from pipeline.runtime.transport import span_bytes
from pipeline.schedule.ops import parse_span
from pipeline.settings import Within, check_bounds, of_kind, require
from recovery.membership import START, next_view
from recovery.policy import CHECKPOINT, POLICIES, REDUNDANT, Recovery, plan_part, remedies
from recovery.rehearse import boundary_bytes
from recovery.remedy import CannotRestore, Loss, has, losses, states_of

_FP32, _STATE, _MIB = 4, 12, 2**20  # bytes of a weight, and of one with two moments
_LOSES = {
    "replica": "nothing: a copy, bit for bit",
    REDUNDANT: "nothing: the worker before has computed it as well",
    "rehearse": "its moments; its weights are a fit to what went in and came out",
    "checkfree": "its weights and moments: the mean of its neighbours takes their place",
    "checkfree+": "its weights and moments: those of its twin take their place",
    "copy": "its weights and moments: those of a neighbour take their place",
    "copy-after": "its weights and moments: those of a neighbour take their place",
    "identity": "its weights and moments: its blocks add nothing at first",
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
    alike: defaultdict[tuple[Option, ...], list[int]] = defaultdict(list)
    for worker, each in options.items():
        alike[each].append(worker)
    values = {
        "recovery": config.recovery, "order": list(POLICIES[config.recovery]), "bandwidth_mib": topic.bandwidth_mib,
        "gflops": round(gflops, 1), "estimated": True,
        "workers": [{"lost": workers, "remedies": list(map(asdict, each))} for each, workers in alike.items()],
    }  # fmt: skip
    return values, _text(config, alike, topic.bandwidth_mib, gflops)


def _options(
    config: TrainConfig, model: LayeredModel, bandwidth: float, flops: float
) -> dict[int, tuple[Option, ...]]:  # fmt: skip
    """Worker of the first layout -> its remedies, in order."""
    home, around = plan_layout(config, model, config.evaluate_samples)
    view = first_view(home)
    recovery = Recovery(config.recovery, view, home, model.num_layers, model.tied, Path(), planner=around)
    had = has(view, home, model.num_layers, model.tied)
    states = sum(state_sizes(model, _STATE).values())
    found: dict[int, tuple[Option, ...]] = {}
    for worker in view.workers:
        after = next_view(view, (worker,))
        left = {each: names for each, names in had.items() if each != worker}
        wanted = losses(after, home, left, model.num_layers, model.tied)
        found[worker] = tuple(
            _rolled_back(config, states, bandwidth) if name == CHECKPOINT
            else _taken_over(recovery, worker) if name == REDUNDANT
            else _restored(config, model, name, wanted, bandwidth, flops)
            for name in POLICIES[config.recovery]
        )  # fmt: skip
    return found


def _restored(
    config: TrainConfig, model: LayeredModel, name: str, wanted: Sequence[Loss], bandwidth: float, flops: float
) -> Option:
    """A remedy that works part by part; what a copy is left of is copied in any case."""
    weights, states = (state_sizes(model, each) for each in (_FP32, _STATE))
    moved, seconds, reasons = 0, 0.0, list[str]()
    for loss in wanted:
        move = plan_part(loss, ("replica", name), reasons)
        if move is None:
            return Option(name, reasons[-1].removeprefix(f"{name}: "), 0, 0.0, "")
        sizes = states if remedies(config)[move.remedy].carries in ("state", "moments") else weights
        moved += len(move.sources) * sum(sizes.get(each, 0) for each in states_of(loss.part))
        if move.remedy == "rehearse":
            kept = boundary_bytes(config, model)
            moved += 2 * kept
            tokens = kept // span_bytes(1, 1, model.hidden_size, torch.bfloat16)
            seconds += fit_flops(model, parse_span(loss.part), tokens) / flops
    return Option(name, "", moved, seconds + moved / bandwidth, _LOSES[name])


def _taken_over(recovery: Recovery, worker: int) -> Option:
    try:
        recovery.after_loss(recovery.home, (worker,))
    except CannotRestore as error:
        return Option(REDUNDANT, str(error), 0, 0.0, "")
    return Option(REDUNDANT, "", 0, 0.0, _LOSES[REDUNDANT])


def _rolled_back(config: TrainConfig, moved: int, bandwidth: float) -> Option:
    """All go back, and read the checkpoint, or begin again."""
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


def _text(
    config: TrainConfig, alike: Mapping[tuple[Option, ...], Sequence[int]], bandwidth: float, gflops: float
) -> str:
    console = Console(width=118)
    with console.capture() as text:
        for options, workers in alike.items():
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
