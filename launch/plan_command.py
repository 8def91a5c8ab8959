"""`unbroken plan`: search for a plan through a network, or time the paths that a file holds."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console

from jobs.config import TrainConfig
from launch.clock_plan import plan_power, power_of
from launch.commands import Result, message_bounds, read_setting
from launch.loss_plan import plan_losses
from launch.roundpipe_plan import plan_roundpipe
from launch.run_folder import write_whole
from pipeline.drawing.draw import svg
from pipeline.drawing.network_picture import network_svg
from pipeline.schedule.ops import dumps
from pipeline.schedule.simulate import simulate
from pipeline.schedule.verify import verify
from pipeline.settings import WEEK_S, ConfigError, Within, check_bounds, require, require_known
from schedulers.skippipe import SkipPlan, replay, skippipe
from schedulers.skippipe_search.clock import STUCK
from schedulers.skippipe_search.problem import NetworkError, RoutingProblem, routing_from_json
from schedulers.skippipe_search.problem import Path as Nodes


@dataclass(frozen=True)
class PlanConfig:
    """Plan routes through a network of nodes, or a cut for workers that hold nothing. What is printed is simulated,
    under the times in the file."""

    network: Path | None = None
    """For skippipe: JSON with hop_s, a matrix of seconds from node to node, and stages, a list of lists of nodes; and,
    if they are to differ from the defaults, forward_s, backward_s, loss_s, gap_s, speed, memory_slots, path_length and
    microbatches_per_first_stage_node."""
    scheduler: str = "skippipe"
    """skippipe: every microbatch skips some stages, and nodes are shared by all paths. roundpipe: stages are dealt to
    workers round robin, forward and backward cut independently. With --losses and --power-cap, one of those of
    `unbroken train`, with --losses one whose runs change their size."""
    losses: Annotated[int, Within(0, 4)] = 0
    """Tell for every set of at most so many lost workers what becomes of a run of --workers, --replicas and --model."""
    power_cap: Annotated[float | None, Within(0, 1e9, above=True)] = None
    """Plan a clock for each worker of a run of --workers, --replicas and --model, so that all workers computing at once
    draw at most so many watts. Sets no clock."""
    watts: str = "150:550"
    """For --power-cap, STATIC:DYNAMIC: what a worker draws whatever it does, and what computing at the nominal clock
    adds; at clock f that is f cubed as much."""
    clock_range: str = "0.5:1.25"
    """For --power-cap, LEAST:MOST, as multiples of the nominal clock."""
    bound: Annotated[float, Within(0, 1)] = 1.0
    """For --power-cap: the share of the compute time that scales with the clock."""
    replicas: Annotated[int, Within(1, 1024)] = 1
    """For --losses and --power-cap."""
    snapshot: Literal["off", "neighbour"] = "off"
    """For --losses: as of `unbroken train`."""
    recovery: str = "auto"
    """For --losses: as of `unbroken train`."""
    costs: Path | None = None
    """For roundpipe: JSON with gpus, microbatches, round and models; a model has layers, forward_ms, backward_ms,
    head_forward_ms, head_backward_ms, hop_ms and perhaps published_forward and published_backward."""
    model: str | None = None
    """For roundpipe: which of the models in --costs. For --losses and --power-cap: as of `unbroken train`."""
    rule: Literal["round_robin", "ready"] = "round_robin"
    """For roundpipe: how stages are dealt, in turn or each to the worker that will be through with it first."""
    at_once: Annotated[int | None, Within(0, 65536)] = None
    """For roundpipe: microbatches that go through a stage at once; unset: round in the file."""
    workers: Annotated[int | None, Within(1, 1024)] = None
    """For roundpipe: unset: gpus in the file. For --losses and --power-cap: those that there are at first."""
    skip: Annotated[float | None, Within(0, 1, below=True)] = None
    """Share of the stages that a path leaves out; unset: what path_length in the file says, or nothing."""
    swaps: bool = False
    """Let one pair of neighbouring stages change places on a path."""
    joint: bool = False
    """Search which node serves which stage too."""
    stages: Annotated[int | None, Within(1, 1024)] = None
    """Stages of equal size, where the file has none."""
    microbatches: Annotated[int | None, Within(1, 65536)] = None
    """Microbatches over all nodes of the first stage; unset: what the file says per node of the first stage."""
    contention: bool = False
    """A link carries one microbatch at a time, per direction."""
    budget: Annotated[float, Within(0, WEEK_S, above=True, note=" (a week)")] = 60.0
    """Seconds of search; it ends sooner where the plan is proved to be the best."""
    seed: Annotated[int, Within(-(2**63), 2**63 - 1)] = 0
    """Of the search."""
    replay: bool = False
    """Search for nothing: time the paths under published_paths in the file."""
    out: Path | None = None
    """A folder for pictures of the network and of the iteration, and for the schedule's text."""
    json: bool = False
    """Print one JSON object."""


def plan_command(config: PlanConfig) -> Result:
    """iteration_s, lower_bound_s, gap, stages and paths. Raises ConfigError or NetworkError."""
    check_bounds(config)
    require(not config.losses or config.power_cap is None, "power_cap", config.power_cap, "unset with --losses")
    if config.losses:
        return plan_losses(_sizes(config), config.losses)
    if config.power_cap is not None:
        return plan_power(_sizes(config), config.power_cap, power_of(config.watts, config.clock_range, config.bound))
    require_known("scheduler", config.scheduler, ("skippipe", "roundpipe"))
    if config.scheduler == "roundpipe":
        require(config.costs is not None, "costs", None, "a JSON file, under scheduler roundpipe")
        require(config.model is not None, "model", None, "the name of a model in costs, under scheduler roundpipe")
        assert config.costs is not None
        assert config.model is not None
        return plan_roundpipe(
            read_setting(config.costs, "costs"), config.model, config.rule, config.at_once, config.workers, config.out
        )
    require(config.network is not None, "network", None, "a JSON file, under scheduler skippipe")
    assert config.network is not None
    values = read_setting(config.network, "network")
    problem = routing_from_json(
        values, skip=config.skip, swaps=config.swaps, contention=config.contention, stages=config.stages,
        microbatches=config.microbatches,
    )  # fmt: skip
    names = names_in(values, len(problem.hop_s))
    if config.replay:
        return _replayed(config, problem, values, names)
    began = time.monotonic()
    with Console(stderr=True, quiet=config.json).status(f"searching for up to {config.budget:g} s"):
        plan = skippipe(problem, seed=config.seed, seconds=config.budget, joint=config.joint)
    schedule = plan.schedule()
    report = verify(
        schedule, always=((0, 1), (len(problem.stages), len(problem.stages) + 1)), balanced=True,
        max_activations=plan.max_activations,
    )  # fmt: skip
    held = message_bounds(schedule)
    found = {
        "scheduler": "skippipe", **as_json(plan), "joint": config.joint, "seed": config.seed,
        "search_s": round(time.monotonic() - began, 3), "verified_ops": report.num_ops, "simulated": True,
        "peak_activations": {str(w): n for w, n in report.peak_activations.items()},
        "peak_messages": {str(w): int(bound.messages) for w, bound in held.items()},
    }  # fmt: skip
    written = [] if config.out is None else _draw(config.out, plan, names)
    return {**found, "written": written}, _text(plan, names, found, written)


def _sizes(config: PlanConfig) -> TrainConfig:
    """The training job that --losses and --power-cap ask about."""
    require(config.workers is not None, "workers", None, "a number, with --losses or --power-cap")
    scheduler = "one_f_one_b" if config.scheduler == "skippipe" else config.scheduler
    asked = TrainConfig(
        workers=config.workers or 1, min_workers=int(config.losses > 0), replicas=config.replicas, scheduler=scheduler,
        recovery=config.recovery, snapshot=config.snapshot,
    )  # fmt: skip
    model = asked.model if config.model is None else config.model
    return replace(asked, model=model, microbatches=config.microbatches or asked.microbatches, data="stdlib")


def as_json(plan: SkipPlan) -> dict[str, Any]:
    """What a plan is and takes, for --json."""
    problem = plan.problem
    return {
        "nodes": len(problem.hop_s), "microbatches": problem.num_microbatches, "path_length": problem.path_length,
        "skip": round(1 - problem.path_length / len(problem.stages), 4), "swaps": problem.swaps,
        "contention": problem.contention, "iteration_s": plan.iteration_s, "lower_bound_s": plan.lower_bound_s,
        "gap": plan.gap, "bounds": plan.bounds, "rule": plan.rule, "stages": [list(s) for s in problem.stages],
        "paths": [list(path) for path in plan.paths], "finish_s": list(plan.run.finish),
    }  # fmt: skip


def names_in(values: Mapping[str, Any], size: int) -> list[str]:
    """The names of the nodes in a network file, if it has them."""
    names = values.get("locations", [])
    good = isinstance(names, list) and len(names) == size
    return [str(name) for name in names] if good else []


def published(problem: RoutingProblem, values: Mapping[str, Any]) -> dict[str, list[Nodes]]:
    """The paths that a file holds, by name, microbatch by microbatch: each path serves as many as the others, in turn.

    A published time of "full pipeline, N microbatches on K fixed pipelines" is that of the k-th nodes of all stages.
    Raises NetworkError for paths that cannot be read.
    """
    found: dict[str, list[Nodes]] = {}
    for name in _named(values, "published_iteration_s"):
        if fixed := re.search(r"full pipeline, (\d+) microbatches on (\d+) fixed pipelines", name):
            many, narrowest = int(fixed[2]), min(map(len, problem.stages))
            if not 1 <= many <= narrowest:
                raise NetworkError(f"published_iteration_s {name!r}: {many} pipelines; allowed: 1 to {narrowest}, the "
                                   "nodes of the smallest stage")  # fmt: skip
            lines = [tuple(stage[k] for stage in problem.stages) for k in range(many)]
            found[name] = [lines[m % many] for m in range(int(fixed[1]))]
    groups = _named(values, "published_paths")
    for name in groups:
        lines = [_chain(name, each) for each in _named(groups, name).values()]
        if not lines or problem.num_microbatches % len(lines):
            raise NetworkError(
                f"published_paths {name!r} has {len(lines)} paths for {problem.num_microbatches} microbatches; "
                "allowed: a divisor"
            )
        found[name] = lines * (problem.num_microbatches // len(lines))
    if not found:
        raise NetworkError("the network file has no published_paths to replay")
    return found


def published_time(values: Mapping[str, Any], name: str) -> float | None:
    """The one iteration that a file says the paths of this name take, if it says one."""
    times = _named(values, "published_iteration_s")
    known = [seconds for said, seconds in times.items() if name.split(" (")[0] in said]
    number = len(known) == 1 and isinstance(known[0], int | float) and known[0] > 0
    return known[0] if number else None


def _named(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object of that name, empty where there is none. Raises NetworkError where it is something else."""
    found = values.get(name, {})
    if not isinstance(found, Mapping):
        raise NetworkError(f"{name} is {found!r:.80}; allowed: an object")
    return found


def _chain(name: str, following: Any) -> Nodes:
    """The path of {node: the next one}."""
    try:
        after = {int(a): int(b) for a, b in following.items()}
    except (AttributeError, TypeError, ValueError):
        raise NetworkError(f"published_paths {name!r}: {following!r:.80}; allowed: {{node: the next one}}") from None
    starts = set(after) - set(after.values())
    if len(starts) != 1:
        raise NetworkError(f"published_paths {name!r}: {dict(following)} is no path; allowed: each node's next one")
    path = [starts.pop()]
    while path[-1] in after and len(path) <= len(after):  # what runs in a circle is refused as a path
        path.append(after[path[-1]])
    return tuple(path)


def _replayed(config: PlanConfig, problem: RoutingProblem, values: Mapping[str, Any], names: list[str]) -> Result:
    rows: list[dict[str, Any]] = []
    for name, paths in published(problem, values).items():
        plan = replay(replace(problem, swaps=True), paths)  # what was published may swap stages
        seconds = published_time(values, name)
        rows.append(
            {
                "name": name, "microbatches": len(paths), "completed": sum(t < STUCK for t in plan.run.finish),
                "iteration_s": plan.iteration_s, "published_s": seconds,
                "ratio": None if seconds is None else plan.iteration_s / seconds,
            }
        )  # fmt: skip
        if config.out is not None:
            stem = re.sub(r"[^a-z0-9]+", "-", name.split(" (")[0].lower()).strip("-")
            _draw(config.out, plan, names, f"{stem}-")
    said = [
        f"{row['name']}: {row['iteration_s']:.2f} s"
        + (f", published {row['published_s']:.2f} s ({row['ratio']:.3f} of it)" if row["published_s"] else "")
        + f", {row['completed']} of {row['microbatches']} microbatches complete"
        for row in rows
    ]
    return {"scheduler": "skippipe", "replayed": rows, "simulated": True}, "\n".join(said)


def _draw(out: Path, plan: SkipPlan, names: list[str], stem: str = "") -> list[str]:
    """Pictures of the network and of the iteration, and the text of the schedule; returns their paths."""
    schedule, problem = plan.schedule(), plan.problem
    messages = {worker: int(bound.messages) for worker, bound in message_bounds(schedule).items()}
    note = f"iteration {plan.iteration_s:.2f} s, no plan takes less than {plan.lower_bound_s:.2f} s"
    texts = {
        f"{stem}network.svg": network_svg(
            [list(row) for row in problem.hop_s], [list(s) for s in problem.stages], list(plan.paths), names=names,
            title="SkipPipe's paths through the network", note=note,
        ),
        f"{stem}timeline.svg": svg(replace(simulate(schedule, plan.costs, plan.network), peak_messages=messages)),
        f"{stem}schedule.txt": dumps(schedule),
    }  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(out / name, text)
    except OSError as error:
        raise ConfigError(f"out is {str(out)!r}, which cannot be written: {error}") from error
    return [str(out / name) for name in texts]


def _text(plan: SkipPlan, names: list[str], found: Mapping[str, Any], written: list[str]) -> str:
    problem = plan.problem

    def said(node: int) -> str:
        return f"{node} {names[node]}" if names else str(node)

    lines = [f"stage {i}: {', '.join(map(said, stage))}" for i, stage in enumerate(problem.stages)]
    for path, many in sorted(Counter(plan.paths).items()):
        lines.append(f"{many} x {' > '.join(map(said, path))}   round trip {problem.round_trip(path):.2f} s")
    proved = ", proved to be the least" if plan.gap < 1e-6 else f", at most {plan.gap:.1%} above the least"
    lines.append(
        f"simulated: iteration {plan.iteration_s:.3f} s, bound {plan.lower_bound_s:.3f} s{proved}; "
        f"{problem.num_microbatches} microbatches visit {problem.path_length} of {len(problem.stages)} stages; "
        f"searched {found['search_s']:.1f} s"
    )
    most = [max(found[name].values()) for name in ("peak_activations", "peak_messages")]
    lines.append(f"a node holds at most {most[0]} activations and {most[1]} messages")
    return "\n".join([*lines, *(f"wrote {path}" for path in written)])
