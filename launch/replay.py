"""`unbroken replay`: committed steps of a run are run again, by whom and how many ever, and every bit is compared.

It is a real run, in a folder of its own, from the newest checkpoint before the step. The run's files are only read.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from jobs.config import ConfigError, TrainConfig
from jobs.erase import erased_copy
from jobs.forgettable import open_forgettable
from jobs.inexact import changed_at, inexact, told
from jobs.replay import (
    Asked,
    Difference,
    Records,
    check_rates,
    differing_checkpoint,
    differing_model,
    differing_step,
    first_seen,
    missing_steps,
    settings_of,
)
from jobs.unlearn.select import samples_of, select
from launch.agent import RunFailed
from launch.commands import Result
from launch.past import MARK, Past, check_tokens, lay_out, read_ledger, read_metrics
from launch.run_folder import write_whole
from launch.train import train
from launch.worker_main import computes
from pipeline.model.weights import ModelError, drawn, has_weights
from pipeline.settings import MOST_STEPS, Within, check_bounds, require
from recovery import checkpoint
from recovery.checkpoint import CheckpointError
from recovery.generation import read_generation


@dataclass(frozen=True)
class ReplayConfig:
    """Run committed steps of a run again, and compare losses, gradient norms, samples and weights to the last bit."""

    run: Path = Path("runs/default")
    """The folder of the run; also the first word: `unbroken replay RUN`. Nothing in it changes but for --out."""
    step: Annotated[int, Within(0, MOST_STEPS)] = 0
    """The last step that is run again; 0 is the last that the run has committed."""
    since: Annotated[int | None, Within(1, MOST_STEPS)] = None
    """The first step that is to be run again: the newest checkpoint before it is the start. Unset, --step."""
    workers: Annotated[int | None, Within(1, 1024)] = None
    """Workers of the replay; unset, as many as the run had."""
    replicas: Annotated[int | None, Within(1, 1024)] = None
    """Replicas of the replay; another number than that of the run only where it had --exact-sums."""
    scheduler: str | None = None
    """Scheduler of the replay; another one than that of the run where both sum in the same order."""
    model: str | None = None
    """Where the weights that the run began with lie now, if they have been moved."""
    data: Path | None = None
    """A folder of prepared tokens that take the place of those of the run. Then nothing is compared: what counts is the
    checkpoint and the model."""
    without: str = ""
    """Rows without which the steps are run again, from the newest checkpoint that never saw them, as `unbroken unlearn
    --forget` names them; of packed text documents, whose labels then do not count, all other text in its place. Nothing
    is compared: the model is the one that would have been."""
    out: Path | None = None
    """The folder of the replay; unset, replays/step-N in that of the run. An older replay there is replaced."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class Planned:
    """What is run again: the steps after `start`, of `checkpoint` where there is one, with `config` on `tokens`."""

    start: int
    checkpoint: Path | None
    config: TrainConfig
    tokens: Path
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return self.config.until

    @property
    def steps(self) -> range:
        return range(self.start + 1, self.step + 1)


def replay(config: ReplayConfig, kind: Callable[[TrainConfig], TrainConfig] = lambda config: config) -> Result:
    """The report. `kind` may make a run of another kind of it, whose steps are the same. Raises ConfigError for what
    cannot be run again, before anything is started; CorpusError, ModelError, CheckpointError or RunFailed as a run
    does."""
    check_bounds(config)
    require("LOCAL_RANK" not in os.environ, "replay", "torchrun", "one process that starts its own workers")
    past = Past.read(config.run)
    with ExitStack() as stack:
        if config.without:
            config = stack.enter_context(filtered(past, config))
        planned = plan_replay(past, config)
        lay_out(past, planned.config.out, planned.tokens, planned.start, planned.checkpoint)
        if config.json:  # one object is printed, and it is not that of the run
            stack.enter_context(redirect_stdout(io.StringIO()))
        code = train(kind(planned.config), config.json, prepared=True)
    if code != 0:
        raise RunFailed(f"the replay in {str(planned.config.out)!r} was stopped before step {planned.step}", code)
    values = report(past, planned, compares=config.data is None)
    write_whole(planned.config.out / MARK, json.dumps(values, indent=1) + "\n")
    return values, in_words(values, past.folder)


# ---- before ----


@contextmanager
def filtered(past: Past, config: ReplayConfig) -> Iterator[ReplayConfig]:
    """The replay without some rows: their first step is where it has to begin, and their tokens are blank. Raises
    ConfigError for rows that the run has never seen."""
    require(config.data is None, "data", str(config.data), "nothing with --without, which makes its own")
    dataset = open_forgettable(past.folder / "data")
    rows = select(dataset, config.without, "without")
    lines = read_ledger(past.folder)
    last = max((line["first_sample"] + line["samples"] for line in lines), default=0)
    since = first_seen(lines, samples_of(dataset, rows, last))
    if since is None:
        raise ConfigError(f"without is {config.without!r}; no step of the run's ledger has any of these rows")
    with tempfile.TemporaryDirectory(prefix="without-", dir=past.folder) as folder:
        gone = {dataset.rows[row].digest for row in rows}
        copy = erased_copy(past.folder / "data", Path(folder) / "data", gone)
        since = min(since, config.step or past.records.committed)
        yield replace(config, data=copy, since=since if config.since is None else min(config.since, since))


def plan_replay(past: Past, config: ReplayConfig) -> Planned:
    """Where a replay begins, and with which settings. Raises ConfigError where the steps do not follow from that."""
    last = past.records.committed
    step = config.step or last
    require(0 < step <= last, "step", step, f"1 to {last}, the last that the ledger of the run has" if last else
            "nothing: the ledger of the run has no steps")  # fmt: skip
    since = step if config.since is None else config.since
    require(since <= step, "since", since, f"1 to {step}, the step")
    generation = read_generation(past.folder)
    found = checkpoint.find(past.folder / "checkpoints", generation, before=since)
    start = 0 if found.manifest is None else int(found.manifest["extra"]["step"])
    require(
        found.path is not None or generation == 0 or config.data is not None, "step", step,
        "one after a checkpoint: samples were forgotten since the start of the run",
    )  # fmt: skip
    out = config.out or past.folder / "replays" / f"step-{step}"
    asked = Asked(config.workers, config.replicas, config.scheduler, config.model)
    settings = _with_threads(settings_of(past.config, asked, past.tied, step, start > 0, out), past)
    _check_weights(past.folder, settings, start)
    planned = Planned(start, found.path, settings, config.data or past.folder / "data", _notes(past, start, step))
    planned.notes.extend(f"checkpoint {path.name} is skipped: {reason}" for path, reason in found.skipped)
    check_rates(past.config, past.records, planned.steps)
    if gaps := missing_steps(past.records, planned.steps):
        raise ConfigError(
            f"the ledger of the run in {str(past.folder)!r} lacks step {gaps[0]}, which is to be run again"
        )
    exact = past.config.exact_sums or past.config.scheduler == "roundpipe"
    if (event := inexact(past.events, start, step, None if exact else past.config.replicas, past.tied)) is not None:
        raise ConfigError(
            f"step is {step}, and the run has {told(event)}: the steps after that do not follow from the data alone; "
            f"allowed: a step up to {event['step']}, or one after the next checkpoint"
        )
    check_tokens(past, planned.tokens, found.manifest)
    return planned


def _with_threads(config: TrainConfig, past: Past) -> TrainConfig:
    """With as many threads as each worker of the run had, where that was left to the machine."""
    threads = [event["threads"] for event in past.started() if isinstance(event.get("threads"), int)]
    if config.threads or not threads or config.scheduler == "roundpipe":
        return config
    return replace(config, threads=threads[-1])


def _check_weights(run: Path, settings: TrainConfig, start: int) -> None:
    """Raise ConfigError where the weights that a run began with are needed and gone."""
    require(
        start > 0 or drawn(settings.model) or has_weights(settings.model), "model", settings.model,
        f"where the weights lie that the run in {str(run)!r} began with: they may have been moved, and there is no "
        "checkpoint before the step",
    )  # fmt: skip


def _notes(past: Past, start: int, step: int) -> list[str]:
    """What is no difference, and may explain one."""
    notes = list[str]()
    now = computes(past.config, 1)["torch"]
    if others := sorted({str(event["torch"]) for event in past.started() if event.get("torch", now) != now}):
        notes.append(f"the run was computed by torch {', '.join(others)}, this is {now}: bits may differ")
    if later := [event["step"] for event in past.started() if event["step"] > start]:
        notes.append(f"the run was started again at step {later[-1]}; config.toml has the settings of its last start")
    return notes


# ---- afterwards ----


def report(past: Past, planned: Planned, compares: bool) -> dict[str, Any]:
    """What --json prints. Where nothing `compares`, what says whether it is equal is None."""
    config, notes = planned.config, [*planned.notes]
    values: dict[str, Any] = {
        "run": str(past.folder), "step": planned.step, "from": planned.start, "out": str(config.out),
        "workers": config.workers, "replicas": config.replicas, "scheduler": config.scheduler, "steps_compared": 0,
        "equal": None, "first_difference": None, "checkpoint_equal": None, "model_equal": None, "notes": notes,
    }  # fmt: skip
    if compares:
        now = Records.of(read_metrics(config.out), read_ledger(config.out))
        found = [differing_step(past.records, now, planned.steps)]
        values["steps_compared"] = len(planned.steps)
        for name, difference in _weights(past, planned, notes).items():
            values[name] = difference is None
            found.append(difference)
        first = next((each for each in found if each is not None), None)
        values["equal"], values["first_difference"] = first is None, None if first is None else first.as_json()
    return {**values, "ok": values["equal"] is not False}


def _weights(past: Past, planned: Planned, notes: list[str]) -> dict[str, Difference | None]:
    """checkpoint_equal, model_equal -> the first difference, of those that the run has of the step."""
    out, step, found = planned.config.out, planned.step, dict[str, Difference | None]()
    if (event := changed_at(past.events, step)) is not None:
        notes.append(f"the weights are not compared: the run has {told(event)}")
        return found
    theirs = checkpoint.directory(past.folder / "checkpoints", step)
    if theirs.is_dir():
        try:
            found["checkpoint_equal"] = differing_checkpoint(
                theirs, checkpoint.directory(out / "checkpoints", step), step
            )
        except CheckpointError as error:
            notes.append(f"the checkpoint of step {step} is not compared: {error}")
    exported = [event["step"] for event in past.events if event["event"] == "exported"]
    if exported and exported[-1] == step == past.records.committed and (past.folder / "model").is_dir():
        try:
            found["model_equal"] = differing_model(past.folder / "model", out / "model", step)
        except ModelError as error:
            notes.append(f"the exported model is not compared: {error}")
    return found


def in_words(values: dict[str, Any], run: Path) -> str:
    """The report for a person."""
    first, last, out = values["from"] + 1, values["step"], values["out"]
    what = f"steps {first} to {last}" if first < last else f"step {last}"
    who = f"{what} of {str(run)!r} on {values['workers']} worker(s), {values['scheduler']}"
    weights = [name.split("_")[0] for name in ("checkpoint_equal", "model_equal") if values[name] is not None]
    if values["equal"] is None:
        said = f"{who}, on other tokens: nothing is compared"
    elif values["equal"]:
        and_weights = f", and the weights of the {' and the '.join(weights)}" if weights else "; no weights are kept"
        said = f"{who}: the same to the last bit, samples, losses, gradient norms{and_weights}"
    else:
        said = f"{who}: NOT the same. {Difference(**values['first_difference'])}"
    return "\n".join([said, *values["notes"], f"replay    {out}"])
