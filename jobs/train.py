"""The training loop of one worker: it reads as if nothing could fail, because a step either commits or raises."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from jobs.config import TrainConfig
from jobs.plan import model_fingerprint
from jobs.text import TextJob
from pipeline.schedule import Schedule
from pipeline.weights import finish_export, write_shard
from pipeline.worker import StepResult, Worker
from recovery import checkpoint
from recovery.membership import View

STOPPED = 75
"""The exit code of a run that was asked to stop and has saved itself (EX_TEMPFAIL: try again)."""

Report = Callable[[dict[str, Any]], None]
"""Takes a record {"kind": "step" | "evaluation" | "event" | "timeline" | ..., ...} to the coordinator."""


@dataclass
class Trainer:
    """What one worker needs to train. `stop_asked` is read once per step and travels with the vote."""

    config: TrainConfig
    view: View
    worker: Worker
    train: Schedule
    evaluate: Schedule
    job: TextJob
    held_out: TextJob
    data_fingerprint: str
    report: Report
    stop_asked: Callable[[], bool]

    @property
    def leads(self) -> bool:
        """Whether this worker reports for all: the lowest id of the view."""
        return self.worker.id == min(self.view.workers)

    def run(self) -> int:
        """Train to the last step; returns the exit code 0, or STOPPED after a save that was asked for."""
        config, first = self.config, self.view.first_step
        drawn = min(first + 2, config.steps - 1)  # the third step is warm, and early enough to be seen
        began = time.monotonic()
        for step in range(first, config.steps):
            result = self.worker.run(
                self.train, self.job, step, wish={"stop": self.stop_asked()}, record=step == drawn
            )  # fmt: skip
            now = time.monotonic()
            self._report_step(step, result, now - began)
            began = now
            if step == drawn:
                self._report_timeline(result)
            done = step + 1
            stop = any(wish["stop"] for wish in result.wishes.values())
            last = done == config.steps
            if not stop and (last or (config.evaluate_every and done % config.evaluate_every == 0)):
                self._evaluate(done)
            if last or stop or (config.checkpoint_every and done % config.checkpoint_every == 0):
                saved = self._save(done)
                if stop and not last:
                    if not saved:
                        raise checkpoint.CheckpointError(f"asked to stop at step {done}, but could not save")
                    self._say({"kind": "stopped", "step": done})
                    return STOPPED
            began += time.monotonic() - now  # evaluation and saving are not training time
        self.export(config.out / "model")
        return 0

    # ---- what is seen ----

    def _say(self, record: dict[str, Any]) -> None:
        if self.leads:
            self.report(record)

    def _report_step(self, step: int, result: StepResult, seconds: float) -> None:
        self._say(
            {
                "kind": "step", "step": step + 1, "loss": result.loss, "tokens": result.tokens,
                "tokens_per_s": result.tokens / max(seconds, 1e-9), "grad_norm": result.grad_norm, "lr": result.lr,
                "view": self.view.number,
            }
        )  # fmt: skip

    def _report_timeline(self, result: StepResult) -> None:
        mine = [(str(event.op), event.start, event.end) for event in result.events]
        lanes = self.worker.gather({"events": mine})
        self._say({"kind": "timeline", "lanes": {str(w): payload["events"] for w, payload in lanes.items()}})

    def _evaluate(self, done: int) -> None:
        result = self.worker.run(self.evaluate, self.held_out, 0)
        perplexity = math.exp(min(result.loss, 700.0))
        self._say({"kind": "evaluation", "step": done, "loss": result.loss, "perplexity": perplexity})

    # ---- what is kept ----

    def _owned_layers(self) -> list[int]:
        """The layers that this worker writes: those it holds as their lowest holder."""
        holders = self.train.holders
        return [
            layer for span in self.worker.store.modules for layer in range(*span) if holders[span][0] == self.worker.id
        ]

    def _save(self, done: int) -> bool:
        """Write a checkpoint together; returns whether it is whole. A disk that fails costs it, not the run."""
        root = self.config.out / "checkpoints"
        error, records = None, []
        try:
            if self.leads:
                checkpoint.begin(root, done)
        except (OSError, checkpoint.CheckpointError) as problem:
            error = str(problem)
        error = self._first_error(error)
        if error is None:
            try:
                tmp = checkpoint.temporary(root, done)
                records = [
                    checkpoint.write_layer(tmp, n, self.worker.store.layer_state(n)) for n in self._owned_layers()
                ]
            except (OSError, checkpoint.CheckpointError) as problem:
                error = str(problem)
        votes = self.worker.gather({"error": error, "records": [record.as_json() for record in records]})
        error = next((vote["error"] for vote in votes.values() if vote["error"]), None)
        if error is None and self.leads:
            written = [checkpoint.FileRecord.from_json(r) for vote in votes.values() for r in vote["records"]]
            try:
                checkpoint.commit(root, done, written, self._position(done), keep=self.config.keep)
            except (OSError, checkpoint.CheckpointError) as problem:
                error = str(problem)
        error = self._first_error(error)
        if error is not None and self.leads:
            checkpoint.abort(root, done)
        event = "checkpoint" if error is None else "checkpoint_failed"
        self._say({"kind": "event", "event": event, "step": done, **({"error": error} if error else {})})
        return error is None

    def _first_error(self, error: str | None) -> str | None:
        """Everyone's first error, so that all workers go the same way."""
        votes = self.worker.gather({"error": error})
        return next((vote["error"] for vote in votes.values() if vote["error"]), None)

    def _position(self, done: int) -> dict[str, Any]:
        return {
            "step": done,
            "next_sample": self.job.next_sample(done),
            "seed": self.config.seed,
            "model": model_fingerprint(self.worker.store.model.config),
            "data": self.data_fingerprint,
            "layout": {
                str(w): [list(op.span) for op in lane if op.kind == "STEP"] for w, lane in self.train.lanes.items()
            },
            "generation": 0,
        }

    def export(self, path: Path) -> None:
        """Write the model together, as a directory that transformers loads. Raises OSError or ModelError."""
        store, unfinished = self.worker.store, path.with_name(path.name + ".tmp")
        if self.leads:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.worker.gather({})
        tensors = {name: t for layer in self._owned_layers() for name, t in store.parameters(layer).items()}
        writers = sorted({holders[0] for holders in self.train.holders.values()})
        shards: dict[str, str] = {}
        if tensors and self.worker.id in writers:
            shards = write_shard(unfinished, writers.index(self.worker.id) + 1, len(writers), tensors)
        votes = self.worker.gather({"shards": shards})
        if self.leads:
            weight_map = {tensor: name for vote in votes.values() for tensor, name in vote["shards"].items()}
            every = [key for layer in range(store.model.num_layers) for key in store.model.keys(layer)]
            tokenizer = AutoTokenizer.from_pretrained(self.config.out / "tokenizer")
            finish_export(unfinished, store.model.config, weight_map, keys=every, tokenizer=tokenizer, into=path)
        self.worker.gather({})
        self._say({"kind": "event", "event": "exported", "step": self.config.steps, "path": str(path)})


def load_checkpoint(worker: Worker, path: Path) -> None:
    """Fill the worker's spans from a checkpoint that `checkpoint.find` has verified."""
    manifest = checkpoint.read_manifest(path)
    for layer in worker.store.layers():
        if worker.store.layer_state(layer):
            worker.store.load_layer_state(layer, checkpoint.read_layer(path, manifest, layer))
