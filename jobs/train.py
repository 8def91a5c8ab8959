"""The training loop of one worker: it reads as if nothing could fail, because a step is committed by all or by none.

Whatever ends a view raises an interruption. The loop then enters the next view and goes on from what is committed:
`step` counts the committed steps, and `due` says whether what follows a step (evaluation, checkpoint) is still to do.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer

from jobs.config import TrainConfig
from jobs.plan import identity, model_fingerprint
from jobs.text import TextJob
from pipeline.model.weights import ModelError, finish_export, write_shard
from pipeline.runtime.step_commit import NonFiniteLoss
from pipeline.runtime.worker import StepResult, Worker
from pipeline.schedule.ops import Schedule
from pipeline.wire import WireError, checked
from recovery import checkpoint
from recovery.member import INTERRUPTIONS, Joined, Member
from recovery.membership import MembershipError, View

_WAIT_S = 0.05
_FILE_BYTES = 2 << 30
"""Of an exported file: a worker that writes many gigabytes is seen to come on."""
STOPPED = 75
"""The exit code of a run that was asked to stop and has saved itself (EX_TEMPFAIL: try again)."""


def evaluated_when(done: int) -> str:
    """When an evaluation took place, for a person."""
    return f"in the evaluation after step {done}" if done else "before the first step"


Report = Callable[[dict[str, Any]], None]
"""Takes a record {"kind": "step" | "evaluation" | "event" | "timeline" | ..., ...} to the coordinator."""


class ReportSink(Protocol):
    """The way of a worker's records to the coordinator."""

    def put(self, record: dict[str, Any], /) -> None:
        """See Report."""
        ...

    def save_ledger(self, step: int, view: int, /) -> str:
        """Have every step up to `step` on the disk, in the ledger, for a checkpoint of `view`; why that cannot be, or
        "": then the checkpoint may be made true."""
        ...


@dataclass(frozen=True)
class Position:
    """Where training stands: equal on all workers of a view. `step` counts the committed steps, `due` says that what
    follows a step is still to do, `stopping` that the run is to save itself and stop, `again` that the step under way
    is run again, because its loss was not finite."""

    step: int = 0
    due: bool = False
    stopping: bool = False
    again: bool = False

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Position:
        """What another worker has told. Raises MembershipError for what is no position."""
        try:
            return cls(**checked(values, "a position", step=int, due=bool, stopping=bool, again=bool))
        except WireError as error:
            raise MembershipError(str(error)) from error


@dataclass
class Trainer:
    """What one worker needs to train. `stop_asked` is read once per step and travels with the vote."""

    config: TrainConfig
    member: Member
    job: TextJob
    held_out: TextJob
    data_fingerprint: str
    reports: ReportSink
    stop_asked: Callable[[], bool]
    first_step: int = 0
    evaluate_first: bool = False
    """Whether the held-out loss before the first step is told: of weights that were trained before."""
    at: Position = Position()
    last: dict[str, Any] | None = None
    """The record of the last committed step, for the case that who was to report it is lost; who joins learns it."""

    @property
    def step(self) -> int:
        """How many steps are committed."""
        return self.at.step

    @property
    def worker(self) -> Worker:
        return self.member.worker

    @property
    def view(self) -> View:
        assert self.member.view is not None
        return self.member.view

    @property
    def leads(self) -> bool:
        """Whether this worker reports for all: the lowest id of the view."""
        return self.worker.id == min(self.view.workers)

    def run(self, number: int, joins: bool) -> int:
        """Train from view `number` to the last step; returns the exit code 0, or STOPPED after a save.

        `joins`: this worker takes the place of another in a run under way.
        """
        self.at = Position(self.first_step, due=self.evaluate_first)
        position = None if joins else asdict(self.at)
        while True:
            try:
                self._entered(self.member.enter(number, position, self.last))
                return self._train()
            except INTERRUPTIONS as error:
                self.member.complain(error)
                number, position = self.view.number + 1, asdict(self.at)

    def _entered(self, joined: Joined) -> None:
        """Take over the common position; who leads tells how long it took."""
        # where all were lost, nobody knows but the checkpoint that they went back to
        self.at = Position.from_json({**asdict(self.at), **joined.position})
        self.last = joined.last
        if self.last is not None and self.last["step"] == self.step:
            self._say(self.last)
        if joined.view.number > 1:
            parts = {name: round(seconds, 4) for name, seconds in joined.parts.items()}
            restores = [[each.worker, list(each.span), each.remedy] for each in joined.view.restores]
            woken = time.time() - (time.monotonic() - joined.woken)
            self._event(
                "resumed", step=self.step, view=joined.view.number, seconds=parts, restores=restores, woken=woken
            )
            if joined.view.rollback is not None:
                self._event("rolled_back", step=self.step, to=Path(joined.view.rollback).name)

    def _train(self) -> int:
        config, drawn = self.config, min(self.first_step + 2, self.config.steps - 1)
        while True:
            if (self.at.stopping or self.step >= config.steps) and self._missing():
                self._await_missing()  # what is saved at the end is whole
            if self.at.due:
                self._after()
            if self.at.stopping and self.step < config.steps:
                self._say({"kind": "stopped", "step": self.step})
                return STOPPED
            if self.step >= config.steps:
                self.export(config.out / "model")
                return 0
            self._one_step(record=self.step == drawn)

    def _schedule(self) -> Schedule:
        """That of the step under way: every so often one in which no span is skipped."""
        every = self.config.full_every
        return self.member.schedules["full" if every and (self.step + 1) % every == 0 else "train"]

    def _missing(self) -> list[int]:
        """The layers that nobody holds at the moment: their stage is being rebuilt, and routes lead around it."""
        held = {layer for span in self.member.train.holders for layer in range(*span)}
        return [layer for layer in range(self.worker.store.model.num_layers) if layer not in held]

    def _await_missing(self) -> None:
        """Wait for the view in which all layers are there, which ends this wait by an interruption. Raises
        CheckpointError when it does not come."""
        deadline = time.monotonic() + self.config.deadline
        while time.monotonic() < deadline:  # who joins is let in when something is settled
            self.worker.gather({})
            time.sleep(_WAIT_S)
        raise checkpoint.CheckpointError(
            f"layers {self._missing()} are still being rebuilt {self.config.deadline:g} s after step {self.step}: the "
            "model is not whole and cannot be saved"
        )

    def _one_step(self, record: bool) -> None:
        """Run a step to its commit. A loss that is not finite is given a second chance: it may have been a fault."""
        began = time.monotonic()
        wish = {"stop": self.stop_asked()}
        try:
            result = self.worker.run(self._schedule(), self.job, self.step, wish=wish, record=record)
        except NonFiniteLoss as error:
            if self.at.again:
                raise
            self.at = replace(self.at, again=True)
            self._event("not_finite", step=self.step, error=str(error))
            return
        stopping = any(wish.get("stop") is True for wish in result.wishes.values())
        self.at = Position(self.step + 1, due=True, stopping=stopping)
        self._report_step(result, time.monotonic() - began)
        if record:
            self._report_timeline(result)

    def _after(self) -> None:
        """What follows a committed step. Interrupted anywhere, it is done again from its start."""
        config, done, stopping = self.config, self.step, self.at.stopping
        first, last = done == self.first_step, done == config.steps
        if not stopping and (first or last or (config.evaluate_every and done % config.evaluate_every == 0)):
            self._evaluate(done)
        if last or stopping or (not first and config.checkpoint_every and done % config.checkpoint_every == 0):
            missing = self._missing()
            if missing:
                self._event("checkpoint_failed", step=done, error=f"layers {missing} are being rebuilt")
            saved = not missing and self._save(done)
            if stopping and not last and not saved:
                raise checkpoint.CheckpointError(f"asked to stop at step {done}, but could not save")
        self.at = replace(self.at, due=False)

    # ---- what is seen ----

    def _say(self, record: dict[str, Any]) -> None:
        if self.leads:
            self.reports.put(record)

    def _event(self, event: str, **fields: Any) -> None:
        self._say({"kind": "event", "event": event, **fields})

    def _report_step(self, result: StepResult, seconds: float) -> None:
        self.last = (
            {
                "kind": "step", "step": self.step, "loss": result.loss, "tokens": result.tokens,
                "tokens_per_s": result.tokens / max(seconds, 1e-9), "grad_norm": result.grad_norm, "lr": result.lr,
                "view": self.view.number, "first_sample": self.job.next_sample(self.step - 1),
                "samples": self.config.samples_per_step,
            }
        )  # fmt: skip
        self._say(self.last)

    def _report_timeline(self, result: StepResult) -> None:
        mine = [(str(event.op), event.start, event.end) for event in result.events]
        lanes = self.worker.gather({"events": mine})
        rows = {str(self.view.places[worker]): payload["events"] for worker, payload in lanes.items()}
        self._say({"kind": "timeline", "lanes": rows})

    def _evaluate(self, done: int) -> None:
        try:
            result = self.worker.run(self.member.schedules["evaluate"], self.held_out, 0)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"{error}, {evaluated_when(done)}") from error
        perplexity = math.exp(min(result.loss, 700.0))
        self._say({"kind": "evaluation", "step": done, "loss": result.loss, "perplexity": perplexity})

    # ---- what is kept ----

    def _owned_layers(self) -> list[int]:
        """The layers that this worker writes: those it holds as their lowest holder."""
        holders, me = self.member.train.holders, self.worker.id
        return [layer for span in self.worker.store.modules for layer in range(*span) if holders[span][0] == me]

    def _save(self, done: int) -> bool:
        """Write a checkpoint together; returns whether it is whole. A disk that fails costs it, not the run."""
        root, fence = self.config.out / "checkpoints", self.view.fence
        error, records = None, []
        try:
            if self.leads:
                checkpoint.begin(root, done, fence)
        except (OSError, checkpoint.CheckpointError) as problem:
            error = str(problem)
        error = self._first_error(error)
        if error is None:
            try:
                records = self._write_layers(checkpoint.temporary(root, done, fence))
            except (OSError, checkpoint.CheckpointError) as problem:
                error = str(problem)
        votes = self.worker.gather({"error": error, "records": [record.as_json() for record in records]})
        error = next((vote["error"] for vote in votes.values() if vote["error"]), None)
        if error is None and self.leads:
            try:
                written = [checkpoint.FileRecord.from_json(r) for vote in votes.values() for r in vote["records"]]
                # what a checkpoint contains is in the ledger, always
                if missing := self.reports.save_ledger(done, self.view.number):
                    raise checkpoint.CheckpointError(missing)
                manifest = self._manifest(done)
                checkpoint.commit(root, done, written, manifest, fence=fence)
            except (OSError, checkpoint.CheckpointError) as problem:
                error = str(problem)
        error = self._first_error(error)
        if error is not None and self.leads:
            checkpoint.abort(root, done, fence)
        elif self.leads:  # all know of the new one: whatever is lost now, nobody goes back to what is dropped
            checkpoint.prune(root, done, self.config.keep, fence)
        event = "checkpoint" if error is None else "checkpoint_failed"
        self._event(event, step=done, **({"error": error} if error else {}))
        return error is None

    def _write_layers(self, folder: Path) -> list[checkpoint.FileRecord]:
        records: list[checkpoint.FileRecord] = []
        for layer in self._owned_layers():
            records.append(checkpoint.write_layer(folder, layer, self.worker.store.layer_state(layer)))
            self.worker.pulse()
        return records

    def _first_error(self, error: str | None) -> str | None:
        """Everyone's first error, so that all workers go the same way."""
        votes = self.worker.gather({"error": error})
        return next((vote["error"] for vote in votes.values() if vote["error"]), None)

    def _manifest(self, done: int) -> dict[str, Any]:
        lanes = self.member.train.lanes
        return {
            "step": done,
            "next_sample": self.job.next_sample(done),
            **identity(self.config),
            "model": model_fingerprint(self.worker.store.model.config),
            "data": self.data_fingerprint,
            "layout": {str(w): [list(op.span) for op in lane if op.kind == "STEP"] for w, lane in lanes.items()},
            "generation": 0,
        }

    def export(self, path: Path) -> None:
        """Write the model together, as a directory that transformers loads. Raises OSError or ModelError."""
        unfinished = path.with_name(path.name + ".tmp")
        if self.leads:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.worker.gather({})
        try:
            self._export(path, unfinished)
        except (OSError, ModelError):
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self._event("exported", step=self.config.steps, path=str(path))
        self.worker.gather({})

    def _export(self, path: Path, unfinished: Path) -> None:
        store, files = self.worker.store, self._files()
        shards: dict[str, str] = {}
        for number, (writer, layers) in enumerate(files, 1):
            tensors = (
                {n: t for layer in layers for n, t in store.parameters(layer).items()}
                if writer == self.worker.id
                else {}
            )
            if tensors:
                shards |= write_shard(unfinished, number, len(files), tensors)
                self.worker.pulse()
        votes = self.worker.gather({"shards": shards})
        if self.leads:
            weight_map = {tensor: name for vote in votes.values() for tensor, name in vote["shards"].items()}
            every = [key for layer in range(store.model.num_layers) for key in store.model.keys(layer)]
            tokenizer = AutoTokenizer.from_pretrained(self.config.out / "tokenizer")
            finish_export(unfinished, store.model.config, weight_map, keys=every, tokenizer=tokenizer, into=path)

    def _files(self) -> list[tuple[int, list[int]]]:
        """(writer, its layers) of every file of an export, the same on all workers; the layers of one writer are in
        one file, unless that would be too large."""
        holders, model = self.member.train.holders, self.worker.store.model
        owned: dict[int, list[int]] = {}
        for span in sorted(holders):
            owned.setdefault(holders[span][0], []).extend(range(*span))
        files: list[tuple[int, list[int]]] = []
        for writer, layers in sorted(owned.items()):
            size = math.inf
            for layer in layers:
                if size + model.parameter_bytes(layer) > _FILE_BYTES:
                    files.append((writer, []))
                    size = 0
                files[-1][1].append(layer)
                size += model.parameter_bytes(layer)
        return files
