"""The training loop of RoundPipe's host: it owns the state, hands out the work, and commits what comes back.

It reads as if nothing could fail: a lost worker costs the pool some work that is done again. What ends a run by name is
that no worker is left, that a loss is not finite twice, or that the host itself is out of memory or disk.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from jobs.config import TrainConfig
from jobs.plan import identity, model_fingerprint
from jobs.text import TextJob
from jobs.train import STOPPED, Report, evaluated_when
from pipeline.model.lora import merge_adapters, save_adapter
from pipeline.model.weights import ModelError, finish_export, write_shard
from pipeline.runtime.stateless import TRAIN
from pipeline.runtime.step_commit import NonFiniteLoss
from pipeline.schedule.work_units import Cut, WorkUnit, forward_units
from pipeline.state.host_optimizer import HostOptimizer
from pipeline.state.optimizer import learning_rate
from recovery import checkpoint
from recovery.pool import Pool
from recovery.runs import Iteration


@dataclass
class RoundTrainer:
    """What the host needs to train. `stop_asked` is read between steps."""

    config: TrainConfig
    optimizer: HostOptimizer
    pool: Pool
    cut: Cut
    row: tuple[WorkUnit, ...]
    job: TextJob
    held_out: TextJob
    data_fingerprint: str
    report: Report
    stop_asked: Callable[[], bool]
    save_ledger: Callable[[int], str]
    """Has every step up to one on the disk, in the ledger; why that cannot be, or ""."""
    attempt: int = 1
    evaluate_first: bool = False
    """Whether the held-out loss before the first step is told: of weights that were trained before."""
    step: int = 0
    runs: dict[int, Iteration] = field(default_factory=dict)
    """The iterations under way, by step: with an optimizer that is one step behind, two."""

    @property
    def behind(self) -> bool:
        """Whether an iteration reads weights that lack the update of the one before it."""
        return self.config.optimizer_async

    def train(self) -> int:
        """From `step` to the last step; returns the exit code 0, or STOPPED after a save."""
        config, first = self.config, self.step
        drawn = min(first + 2, config.steps - 1)
        if self.evaluate_first:
            self._evaluate(first)
        while self.step < config.steps:
            self._one_step(record=self.step == drawn)
            if self._after():
                self._say("stopped", step=self.step)
                return STOPPED
        self.optimizer.drain(config.deadline)
        self.export(config.out / "model")
        return 0

    # ---- one step ----

    def _submit(self, step: int) -> Iteration:
        source, version, side = "param", step, 0
        if self.behind:
            source, version, side = f"read{(step + 1) % 2}", max(0, step - 1), step % 2
        return self.pool.dispatcher.submit(
            self.row, self.optimizer.store.layout.boundaries, step=step, job=TRAIN, source=source, version=version,
            side=side,
        )  # fmt: skip

    def _one_step(self, record: bool, again: bool = False) -> None:
        """Run a step to its commit. A loss that is not finite is given a second chance: it may have been a fault."""
        config, step, began = self.config, self.step, time.monotonic()
        run = self.runs.pop(step, None) or self._submit(step)
        if self.behind and not self._pauses_after(step + 1) and step + 1 not in self.runs:
            self.runs[step + 1] = self._submit(step + 1)
        self.pool.finish(run)
        loss, tokens = self._loss(run, self.job, step)
        self.optimizer.measure(step, tokens)
        _, norm = self.pool.wait_for("norm")
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.drop()
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
            error = f"{what} at step {step + 1}; the step was not taken"
            if again or self.runs:
                raise NonFiniteLoss(error)
            self._event("not_finite", step=step, error=error)
            self._one_step(record, again=True)
            return
        lr = learning_rate(config.optimizer(), step)
        self.optimizer.update(step, 1.0 / max(1, tokens), norm, lr)
        for later in self.runs.values():
            self.pool.dispatcher.count(later)
        self.step = step + 1
        self.report(
            {
                "kind": "step", "step": self.step, "loss": loss, "tokens": tokens,
                "tokens_per_s": tokens / max(time.monotonic() - began, 1e-9), "grad_norm": norm, "lr": lr, "view": 1,
                "first_sample": self.job.next_sample(step), "samples": config.samples_per_step,
                "version": run.version, "workers": len(self.pool.dispatcher.ready),
            }
        )  # fmt: skip
        if record:
            lanes = {
                str(worker): [(op, start - run.began, end - run.began) for op, start, end in events]
                for worker, events in sorted(run.events.items())
            }
            self._say("timeline", lanes=lanes)

    def _loss(self, run: Iteration, job: TextJob, step: int) -> tuple[float, int]:
        """The mean loss over the tokens, summed in the order of the microbatches; and the tokens."""
        tokens = sum(job.tokens(step, m) for m in run.losses)
        return sum(run.losses[m] for m in sorted(run.losses)) / max(1, tokens), tokens

    # ---- what follows a step ----

    def _pauses_after(self, done: int) -> bool:
        """Whether something is to follow the step that makes it `done`, which wants the state as of then."""
        config = self.config
        every = [config.evaluate_every, config.checkpoint_every]
        return done >= config.steps or any(n and done % n == 0 for n in every) or self.stop_asked()

    def _after(self) -> bool:
        """Evaluation and checkpoint, where they are due; whether the run is to stop."""
        config, done = self.config, self.step
        if self.runs:  # the next iteration is under way: it was known that nothing follows this one
            return False
        stopping, last = self.stop_asked() and done < config.steps, done == config.steps
        if not stopping and (last or (config.evaluate_every and done % config.evaluate_every == 0)):
            self._evaluate(done)
        if last or stopping or (config.checkpoint_every and done % config.checkpoint_every == 0):
            saved = self._save(done)
            if stopping and not saved:
                raise checkpoint.CheckpointError(f"asked to stop at step {done}, but could not save")
        return stopping

    def _evaluate(self, done: int) -> None:
        """The held-out loss of the weights as last updated, in parts of as many microbatches as the store holds."""
        self.optimizer.drain(self.config.deadline)
        total, tokens, size = 0.0, 0, self.config.microbatches
        count = -(-(self.held_out.limit or 0) // self.config.microbatch_size)
        for part, lo in enumerate(range(0, count, size)):
            many = min(size, count - lo)
            run = self.pool.dispatcher.submit(
                forward_units(self.cut, many, self.config.round_size), self.optimizer.store.layout.boundaries,
                step=part, job="evaluate", source="param", version=self.optimizer.updates,
            )  # fmt: skip
            self.pool.finish(run)
            loss, counted = self._loss(run, self.held_out, part)
            total, tokens = total + loss * counted, tokens + counted
        loss = total / max(1, tokens)
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"the held-out loss is {loss}, {evaluated_when(done)}")
        self._say("evaluation", step=done, loss=loss, perplexity=math.exp(min(loss, 700.0)))

    def _say(self, kind: str, **fields: Any) -> None:
        self.report({"kind": kind, **fields})

    def _event(self, event: str, **fields: Any) -> None:
        self._say("event", event=event, **fields)

    # ---- what is kept ----

    def _save(self, done: int) -> bool:
        """Write a checkpoint; whether it is whole. A disk that fails costs it, not the run."""
        self.optimizer.drain(self.config.deadline)
        root, layers = self.config.out / "checkpoints", range(self.optimizer.model.num_layers)
        fence = self.attempt, 1
        try:
            folder = checkpoint.begin(root, done, fence)
            records = [checkpoint.write_layer(folder, n, self.optimizer.layer_state(n)) for n in layers]
            if missing := self.save_ledger(done):  # what a checkpoint contains is in the ledger, always
                raise checkpoint.CheckpointError(missing)
            checkpoint.commit(root, done, records, self._manifest(done), fence=fence)
            checkpoint.prune(root, done, self.config.keep, fence)
        except (OSError, checkpoint.CheckpointError) as error:
            checkpoint.abort(root, done, fence)
            self._event("checkpoint_failed", step=done, error=str(error))
            return False
        self._event("checkpoint", step=done)
        return True

    def _manifest(self, done: int) -> dict[str, Any]:
        return {
            "step": done, "next_sample": self.job.next_sample(done), **identity(self.config),
            "model": model_fingerprint(self.optimizer.model.config), "data": self.data_fingerprint,
            "layout": {"host": [list(span) for span in (*self.cut.forward, self.cut.fused)]}, "generation": 0,
        }  # fmt: skip

    def resume(self, path: Path) -> None:
        """Take the state of a checkpoint, whichever scheduler has written it. Raises CheckpointError."""
        manifest, read = checkpoint.read_manifest(path), {}
        for layer in range(self.optimizer.model.num_layers):
            if self.optimizer.layer_state(layer):
                state = checkpoint.read_layer(path, manifest, layer)
                self.optimizer.load_layer_state(layer, state)
                read.update({k.removeprefix("read/"): t for k, t in state.items() if k.startswith("read/")})
        self.step = int(manifest["extra"]["step"])
        self.optimizer.start(self.step, read)

    def export(self, path: Path) -> None:
        """Write the model as a directory that transformers loads; adapters are merged into it, and kept in
        `adapter` beside it. Raises OSError or ModelError."""
        unfinished, model = path.with_name(path.name + ".tmp"), self.optimizer.model
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            tensors = {n: t for layer in range(model.num_layers) for n, t in self.optimizer.parameters(layer).items()}
            if model.lora is not None:
                self._export_adapter(path.with_name("adapter"), tensors)
                tensors = merge_adapters(model.lora, tensors, model.module)
            shards = write_shard(unfinished, 1, 1, tensors)
            tokenizer = AutoTokenizer.from_pretrained(self.config.out / "tokenizer")
            finish_export(unfinished, model.config, shards, keys=list(tensors), tokenizer=tokenizer, into=path)
        except (OSError, ModelError):
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self._event("exported", step=self.config.steps, path=str(path))

    def _export_adapter(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        model = self.optimizer.model
        assert model.lora is not None
        config = model.lora.config(model.module(model.paths(1)["block"]))
        base = self.config.model if Path(self.config.model).is_dir() else None
        save_adapter(path, config, tensors, base)
