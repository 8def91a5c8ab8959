"""The training loop: it reads as if nothing could fail, because a step is committed by all or by none.

Whatever ends a view raises an interruption. The loop then enters the next view and goes on from what is committed:
`step` counts the committed steps, and `due` says whether what follows a step (evaluation, checkpoint) is still to do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.config import TrainConfig
from jobs.engine import Engine, Position, ReportSink
from jobs.job import RunJob
from jobs.patience import is_over, known, seen
from jobs.plan import identity, model_fingerprint
from jobs.save import export, save
from pipeline.exit_codes import STOPPED
from pipeline.model.weights import ModelError
from pipeline.runtime.step_commit import NonFiniteLoss
from pipeline.runtime.worker import StepResult
from recovery.checkpoint import CheckpointError, read_manifest
from recovery.member import Joined
from recovery.membership import START

_WAIT_S = 0.05


@dataclass
class Trainer:
    """One trainer of a run. `job` says which samples a step takes; `stop_asked` is asked in every step, and the answer
    travels with the vote."""

    config: TrainConfig
    engine: Engine
    job: RunJob
    data_fingerprint: str
    reports: ReportSink
    stop_asked: Callable[[], bool]
    first_step: int = 0
    evaluate_first: bool = False
    """Whether the held-out loss before the first step is told: of weights that were trained before."""
    before: Callable[[Engine], None] = lambda _: None
    """What comes before the first step. Interrupted anywhere, it is done again."""
    trains: bool = True
    """Whether there is more to the run than that."""
    watched: dict[str, Any] = field(default_factory=dict)
    """What --patience has seen before."""
    at: Position = field(default_factory=Position)
    _began: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] | None = None
    """The record of the last committed step, for the case that who was to report it is lost; who joins learns it."""

    @property
    def step(self) -> int:
        """How many steps are committed."""
        return self.at.step

    def run(self) -> int:
        """Train to the last step; returns the exit code 0, or STOPPED after a save."""
        self._began = self.job.carried
        self.at = Position(self.first_step, due=self.evaluate_first, carried=self._began, watched=self.watched)
        while True:
            try:
                self._entered(self.engine.enter(self.at, self.last))
                return self._train()
            except self.engine.interruptions as error:
                self.engine.interrupted(error)

    def _entered(self, joined: Joined | None) -> None:
        """Take over the common position; who leads tells how long it took."""
        if joined is None:
            return
        # where all were lost, nobody knows but the checkpoint that they went back to
        self.at = Position.from_json({**asdict(self.at), **joined.position})
        if joined.view.rollback is not None:
            carried, watched = self._carried_at(joined.view.rollback)
            self.at = replace(self.at, carried=carried, watched=watched)
        self.job.restore(self.at.carried)
        self.last = joined.last
        if self.last is not None and self.last["step"] == self.step:
            self._say(self.last)
        if joined.view.number > 1:
            parts = {name: round(seconds, 4) for name, seconds in joined.parts.items()}
            restores = [[each.worker, each.part, each.remedy] for each in joined.view.moves]
            woken = time.time() - (time.monotonic() - joined.woken)
            self._event(
                "resumed",
                step=self.step,
                view=joined.view.number,
                seconds=parts,
                restores=restores,
                woken=woken,
                there=joined.there,
            )
            if joined.view.rollback is not None:
                self._event("rolled_back", step=self.step, to=Path(joined.view.rollback).name)

    def _carried_at(self, rollback: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the job carried, and patience had seen, where the run goes back to. Raises CheckpointError."""
        if rollback == START:
            return self._began, self.watched
        extra = read_manifest(Path(rollback))["extra"]
        return dict(extra.get("job", {})), dict(extra.get("watched", {}))

    def _train(self) -> int:
        if self.step == self.first_step:
            self.before(self.engine)
        if not self.trains:
            return self._end_before()
        config, drawn = self.config, min(self.first_step + 2, self.config.last_step - 1)
        while True:
            whole = self.step >= config.last_step or is_over(self.at.watched, config.patience)
            ends = (self.at.stopping or whole) and not self.engine.ahead
            if ends and self.engine.missing():
                self._await_missing()  # what is saved at the end is whole
            if self.at.due and not self.engine.ahead:
                self._after()
                continue  # it may have ended the run
            if ends and not whole:
                self._say({"kind": "stopped", "step": self.step})
                return STOPPED
            if ends:
                self._export()
                return 0
            self.one_step(record=self.step == drawn)

    def _end_before(self) -> int:
        """The run is over before its first step."""
        asked = self.engine.gather({"stop": self.stop_asked()})
        if not any(each["stop"] for each in asked.values()):
            return 0
        self._say({"kind": "stopped", "step": self.step})
        return STOPPED

    def _await_missing(self) -> None:
        """Wait for the view in which all layers are there, which ends this wait by an interruption. Raises
        CheckpointError when it does not come."""
        deadline = time.monotonic() + self.config.deadline
        while time.monotonic() < deadline:  # who joins is let in when something is settled
            self.engine.gather({})
            time.sleep(_WAIT_S)
        raise CheckpointError(
            f"layers {self.engine.missing()} are still being rebuilt {self.config.deadline:g} s after step "
            f"{self.step}: the model is not whole and cannot be saved"
        )

    def one_step(self, record: bool) -> None:
        """Run a step to its commit. A loss that is not finite is given a second chance: it may have been a fault."""
        began = time.monotonic()
        try:
            self.job.prepare(self.engine, self.step)
            result = self.engine.run(
                self.step, wish=lambda: {"stop": self.stop_asked()}, record=record, pauses=self._pauses_after
            )
        except NonFiniteLoss as error:
            if self.at.again or self.engine.ahead:
                raise
            self.at = replace(self.at, again=True)
            self._event("not_finite", step=self.step, error=str(error))
            return
        stopping = any(wish.get("stop") is True for wish in result.wishes.values())
        self.job.committed(self.step, result.means)
        self.at = Position(self.step + 1, True, stopping, carried=self.job.carried, watched=self.at.watched)
        self._report_step(result, time.monotonic() - began)
        if record:
            self._say({"kind": "timeline", "step": self.step, "lanes": self.engine.timeline(result)})

    # ---- what follows a step ----

    def _follows(self, done: int) -> tuple[bool, bool]:
        """Whether an evaluation, and whether a checkpoint, is due once `done` steps are committed."""
        config, first, last = self.config, done == self.first_step, done == self.config.last_step
        evaluated = first or last or (config.evaluate_every > 0 and done % config.evaluate_every == 0)
        saved = last or (not first and config.checkpoint_every > 0 and done % config.checkpoint_every == 0)
        return evaluated, saved

    def _exports(self, done: int) -> bool:
        """Whether a model is to be written once `done` steps are committed, beside the one at the end."""
        every = self.config.export_every
        return every > 0 and done % every == 0 and self.first_step < done < self.config.last_step

    def _pauses_after(self, done: int) -> bool:
        """Whether something is to follow the step that makes it `done`, which wants the state as of then."""
        return any((*self._follows(done), self._exports(done))) or self.at.stopping or self.stop_asked()

    def _after(self) -> None:
        """What follows a committed step. Interrupted anywhere, it is done again from its start."""
        done, stopping = self.step, self.at.stopping
        evaluated, saved = self._follows(done)
        self.engine.rest()
        watched, over = self.at.watched, False
        if evaluated and not stopping:
            watched = seen(watched, self._evaluate(done))
            over = is_over(watched, self.config.patience)
        if over:
            best, since = known(watched)
            self._event("early_stop", step=done, best=best, evaluations=since)
            if self.engine.missing():
                self._await_missing()
        if self._exports(done) and not over:
            self._export_at(done)
        if saved or stopping or over:
            whole = self._save(done, watched)
            if stopping and done < self.config.last_step and not whole:
                raise CheckpointError(f"asked to stop at step {done}, but could not save")
        self.at = replace(self.at, due=False, watched=watched)

    def _evaluate(self, done: int) -> float:
        """Tell the held-out loss, and return it: the same on all."""
        try:
            result = self.engine.evaluate()
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"{error}, {evaluated_when(done)}") from error
        perplexity = math.exp(min(result.loss, 700.0))
        found = {"loss": result.loss, "perplexity": perplexity, "means": dict(result.means)}
        self._say({"kind": "evaluation", "step": done, **found})
        return result.loss

    def _save(self, done: int, watched: dict[str, Any]) -> bool:
        """Write a checkpoint; whether it is whole."""
        error, config = None, self.config
        if missing := self.engine.missing():
            error = f"layers {missing} are being rebuilt"
        if error is None:
            about = {
                "next_sample": self.job.next_sample(done), "job": self.job.carried, "watched": watched,
                **identity(config),
                "model": model_fingerprint(self.engine.states.model.config), "data": self.data_fingerprint,
            }  # fmt: skip
            error = save(self.engine, config.out / "checkpoints", done, about, config.keep, self.reports)
        event = "checkpoint" if error is None else "checkpoint_failed"
        self._event(event, step=done, **({"error": error} if error else {}))
        return error is None

    def _export(self) -> None:
        self.engine.rest()
        path = self.config.out / "model"
        export(self.engine, path, self.config.out / "tokenizer", self.config.model)
        self._event("exported", step=self.step, path=str(path))
        self.engine.gather({})

    def _export_at(self, done: int) -> None:
        """The model as of now, beside that of the end; a disk that fails costs this model, not the run."""
        path, error = self.config.out / "exports" / f"step-{done:08d}" / "model", None
        if missing := self.engine.missing():
            error = f"layers {missing} are being rebuilt"
        else:
            try:
                export(self.engine, path, self.config.out / "tokenizer", self.config.model)
            except (OSError, ModelError) as problem:
                error = str(problem)
        told: dict[str, Any] = {"path": str(path)} if error is None else {"error": error}
        self._event("exported" if error is None else "export_failed", step=done, **told)
        self.engine.gather({})

    # ---- what is seen ----

    def _say(self, record: dict[str, Any]) -> None:
        if self.engine.leads:
            self.reports.put(record)

    def _event(self, event: str, **fields: Any) -> None:
        self._say({"kind": "event", "event": event, **fields})

    def _report_step(self, result: StepResult, seconds: float) -> None:
        self.last = (
            {
                "kind": "step", "step": self.step, "loss": result.loss, "tokens": result.tokens,
                "tokens_per_s": result.tokens / max(seconds, 1e-9), "grad_norm": result.grad_norm, "lr": result.lr,
                "first_sample": self.job.next_sample(self.step - 1), "samples": self.config.samples_per_step,
                **({"means": dict(result.means)} if len(result.means) > 1 else {}), **self.engine.about(),
                **({"sources": sources} if (sources := self.job.sources(self.step - 1)) else {}),
                **self._speed(result, seconds), **result.memory,
            }
        )  # fmt: skip
        self._say(self.last)

    def _speed(self, result: StepResult, seconds: float) -> dict[str, float]:
        """What was computed in a second, and which share that is of what the devices could do (MFU)."""
        if result.flops is None:
            return {}
        rate, peak = result.flops / max(seconds, 1e-9), self.engine.peak_flops
        return {"tflops": rate / 1e12, **({} if peak is None else {"mfu": rate / peak})}


def evaluated_when(done: int) -> str:
    """When an evaluation took place, for a person."""
    return f"in the evaluation after step {done}" if done else "before the first step"
