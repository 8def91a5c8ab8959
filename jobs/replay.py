"""To run committed steps of a run again and compare every bit: with which settings, from where, and the comparison.

What a step computes follows from the state before it, its samples and its settings, whoever computed it. So a replay
takes the run's settings, but for who does the work, and begins at a checkpoint. Where the order of a sum depends on who
does the work, it has to be as it was.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from jobs.config import ConfigError, TrainConfig, require
from jobs.pipelines import where_ends_go
from pipeline.model.weights import Weights
from pipeline.state.optimizer import learning_rate
from recovery import checkpoint

METRICS = ("loss", "grad_norm", "lr", "tokens")
SAMPLES = ("first_sample", "samples")
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Records:
    """Lines of metrics.jsonl and ledger.jsonl that stand, by step."""

    metrics: Mapping[int, Line]
    ledger: Mapping[int, Line]

    @classmethod
    def of(cls, metrics: Iterable[Line], ledger: Iterable[Line]) -> Records:
        return cls({line["step"]: line for line in metrics}, {line["step"]: line for line in ledger})

    @property
    def committed(self) -> int:
        """The last step that the ledger has."""
        return max(self.ledger, default=0)


def first_seen(ledger: Iterable[Line], samples: Iterable[int]) -> int | None:
    """The first committed step that has any of these global sample ids; None where no step has. `ledger` are the lines
    that stand."""
    wanted = sorted(set(samples))
    steps = list[int]()
    for line in ledger:
        at = bisect_left(wanted, line["first_sample"])
        if at < len(wanted) and wanted[at] < line["first_sample"] + line["samples"]:
            steps.append(line["step"])
    return min(steps, default=None)


# ---- settings ----


@dataclass(frozen=True)
class Asked:
    """What a replay may have otherwise than the run; None is as the run had it."""

    workers: int | None = None
    replicas: int | None = None
    scheduler: str | None = None
    model: str | None = None
    """Where the weights that the run began with lie now."""


def settings_of(run: TrainConfig, asked: Asked, tied: bool, step: int, resume: bool, out: Path) -> TrainConfig:
    """The settings of the replay of a run up to `step`, in a folder of its own, where it begins at a checkpoint if
    `resume`. Raises ConfigError for what would sum in another order than the run, or can never work."""
    scheduler, replicas = asked.scheduler or run.scheduler, asked.replicas or run.replicas
    recovery = {"roundpipe": "auto", "skippipe": "checkpoint"}.get(scheduler, "exact")
    now = replace(
        run, workers=asked.workers or run.workers, replicas=replicas, scheduler=scheduler,
        model=asked.model or run.model, recovery=run.recovery if _swaps(run) else recovery, ends=_ends(run, tied),
        min_workers=0, spares=0, snapshot="off", shard_optimizer=run.shard_optimizer and replicas > 1,
        network=run.network if scheduler == "skippipe" else None,
        evaluate_every=0, sample_tokens=0, tensorboard=False, track="", patience=0, export_every=0, until=step,
        resume=resume, out=out, inject="",
    )  # fmt: skip
    check_sums(run, now, tied)
    now.validate()
    return now


def _swaps(run: TrainConfig) -> bool:
    """Whether half of the microbatches take swapped routes."""
    return run.recovery == "checkfree+"


def _ends(run: TrainConfig, tied: bool) -> Literal["auto", "in-line", "home", "apart"]:
    """Where the embedding and the head go: as in the run where a sum depends on it."""
    ends = where_ends_go(run)
    if _swaps(run):
        return run.ends
    return ends if tied and not run.exact_sums and ends != "in-line" else "auto"


def check_sums(run: TrainConfig, now: TrainConfig, tied: bool) -> None:
    """Raise ConfigError where `now` sums gradients in another order than `run`. `tied`: the embedding is the head."""
    pools = {"roundpipe", "skippipe"} & {run.scheduler, now.scheduler}
    require(
        not pools or now.scheduler == run.scheduler, "scheduler", now.scheduler,
        f"{run.scheduler}, as in the run: {' or '.join(sorted(pools))} sums gradients in an order of its own",
    )  # fmt: skip
    if now.scheduler == "roundpipe" or (run.exact_sums and not pools and not _swaps(run)):
        return
    shares = "balanced" in (run.scheduler, now.scheduler)
    meets = tied and (where_ends_go(run) != "in-line" or run.stages == 1)
    if pools or shares or meets or _swaps(run):
        why = (
            "routes follow from it"
            if pools or _swaps(run)
            else "on one worker gradients of a weight are summed in turn"
        )
        for name in ("scheduler", "workers", "replicas"):
            had, has = getattr(run, name), getattr(now, name)
            require(had == has, name, has, f"{had}, as in the run, which had no --exact-sums: {why}")
    require(
        now.replicas == run.replicas, "replicas", now.replicas,
        f"{run.replicas}, as in the run, which had no --exact-sums: gradients are summed by replica",
    )  # fmt: skip
    require(
        not tied or (run.stages == 1) == (now.stages == 1), "workers", now.workers,
        "2 or more for each replica, as in the run, which had no --exact-sums: the embedding is the head, and on one "
        "worker the gradients of both are summed in turn",
    )  # fmt: skip


def check_rates(run: TrainConfig, records: Records, steps: Iterable[int]) -> None:
    """Raise ConfigError where the run's learning rate was another than its last settings say: a run that was resumed
    with other settings keeps only these."""
    for step in steps:
        line = records.metrics.get(step)
        if line is not None and (lr := learning_rate(run.optimizer_config(), step - 1)) != line["lr"]:
            raise ConfigError(
                f"step {step} had the learning rate {line['lr']!r} by metrics.jsonl, and has {lr!r} by config.toml: "
                "the run was resumed with other settings since; allowed: a step after that"
            )


# ---- comparison ----


@dataclass(frozen=True)
class Difference:
    """The first thing that is not as it was; None for what is not there."""

    step: int
    what: str
    was: Any
    now: Any

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.was is None or self.now is None:
            return (
                f"step {self.step}: {self.what} is {'only in the replay' if self.was is None else 'not in the replay'}"
            )
        return f"step {self.step}: {self.what} was {self.was} and is {self.now}"


def differing_step(was: Records, now: Records, steps: Iterable[int]) -> Difference | None:
    """The first difference in what the steps were made of, and in what they came to."""
    for step in steps:
        for names, had, has in ((SAMPLES, was.ledger, now.ledger), (METRICS, was.metrics, now.metrics)):
            before, after = had.get(step, {}), has.get(step, {})
            for name in names:
                if _bits(before.get(name)) != _bits(after.get(name)):
                    return Difference(step, name, before.get(name), after.get(name))
    return None


def _bits(value: Any) -> str:
    return float(value).hex() if isinstance(value, int | float) else str(value)


def differing_checkpoint(was: Path, now: Path, step: int) -> Difference | None:
    """The first tensor of two checkpoints that differs. Raises CheckpointError for one that is damaged."""
    manifests = [checkpoint.read_manifest(path) for path in (was, now)]
    layers = [sorted(int(file["layer"]) for file in manifest["files"]) for manifest in manifests]
    if layers[0] != layers[1]:
        return Difference(step, "the number of layers in the checkpoint", len(layers[0]), len(layers[1]))
    for layer in layers[0]:
        before, after = (checkpoint.read_layer(path, m, layer) for path, m in zip((was, now), manifests, strict=True))
        for name in sorted(before.keys() | after.keys()):
            found = differing_tensor(before.get(name), after.get(name))
            if found is not None:
                return Difference(step, f"{name} of layer {layer} in the checkpoint", *found)
    return None


def differing_model(was: Path, now: Path, step: int) -> Difference | None:
    """The first tensor of two exported models that differs, however they are cut into files. Raises ModelError."""
    before, after = Weights(was).files, Weights(now).files
    for name in sorted(before.keys() | after.keys()):
        found = differing_tensor(_read(before, name), _read(after, name))
        if found is not None:
            return Difference(step, f"{name} in the model", *found)
    return None


def _read(files: Mapping[str, Path], name: str) -> Tensor | None:
    if name not in files:
        return None
    with safe_open(files[name], framework="pt") as file:
        return file.get_tensor(name)


def differing_tensor(was: Tensor | None, now: Tensor | None) -> tuple[str | None, str | None] | None:
    """What is to be said of two tensors that are not the same to the last bit."""
    if was is None or now is None:
        return (None, "there") if was is None else ("there", None)
    if (was.dtype, was.shape) != (now.dtype, now.shape):
        return (f"{was.dtype} {tuple(was.shape)}", f"{now.dtype} {tuple(now.shape)}")
    bytes_ = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (was, now)]
    if torch.equal(*bytes_):
        return None
    at = int((bytes_[0] != bytes_[1]).nonzero()[0]) // was.element_size()
    return (f"{was.reshape(-1)[at].item()!r} at {at}", f"{now.reshape(-1)[at].item()!r} at {at}")


def missing_steps(records: Records, steps: Sequence[int]) -> list[int]:
    """The steps that the ledger does not have."""
    return [step for step in steps if step not in records.ledger]
