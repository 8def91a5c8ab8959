"""The settings of a request to forget: those of a run, with the method and the request before them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from jobs.config import TrainConfig, require
from jobs.unlearn.method import PAIR
from jobs.unlearn.methods.matching import OracleMatching
from jobs.unlearn.settings import MethodSettings, method_of
from pipeline.settings import Within


@dataclass(frozen=True)
class RequestSettings:
    """What is to be forgotten, and what is left of it."""

    run: Path = Path("runs/default")
    """The run folder whose model is to forget."""
    forget: str = ""
    """Rows to forget: an id, id:A,B, FIELD=VALUE (as author=NAME), a file of rows, or one with an id on each line."""
    retain: str = "auto"
    """Rows to keep, by which the model is held together: in the same ways, or auto for all others that it has seen."""
    idk: Path | None = None
    """Answers that say nothing, one on each line, for dpo and idk; unset takes ours."""
    trace: Path | None = None
    """Rows with a model's reasoning about what is to be forgotten, for r2mu."""
    anchor: Path | None = None
    """Rows with reasoning about other things, for r2mu."""
    oracle: Path | None = None
    """A model directory that never saw what is to be forgotten, such as `unbroken replay --without` writes: the report
    measures how far the result is from it."""
    epochs: Annotated[float | None, Within(0, 10_000, above=True)] = 5.0
    """How often every row to forget is taken; with --steps it is unset, and they say how long the request takes. kfade
    takes one step unless --steps says otherwise, over the rows of its --microbatches."""
    reference_top: Annotated[int, Within(0, 2**20)] = 0
    """Of the distribution over tokens that kl_min, undial and roka compare with, keep so many tokens of each position;
    0 keeps all."""
    old_checkpoints: Literal["fence", "shred"] = "fence"
    """What becomes of checkpoints that still know: fence moves them where no run reads, shred overwrites and removes
    them."""
    keep_update: bool = False
    """Keep what the request changes about the weights in its folder, so that --reapply can apply it again after more
    training. With the weights after the request it gives back the weights before it: whoever has both has all that was
    forgotten. The manifest says so, and unbroken audit lists it."""
    reapply: Annotated[int, Within(0, 9999)] = 0
    """Apply the kept update of the request of this number again, to the run's weights as they are now, as a request of
    its own without rows or steps; 0 for none."""
    key: Path | None = None
    """A private key (Ed25519, PEM or OpenSSH) that signs the manifest."""


@dataclass(frozen=True)
class UnlearnConfig(RequestSettings, MethodSettings, TrainConfig):
    """Make a trained model forget rows of its data."""

    job: ClassVar[str] = "unlearn"

    @property
    def is_procedure(self) -> bool:
        """See TrainConfig."""
        return method_of(self).is_procedure

    @property
    def depth(self) -> int | None:
        """See TrainConfig."""
        return method_of(self).depth

    def resolved(self) -> UnlearnConfig:
        """See TrainConfig; methods, adapters and whole models begin with the learning rates and optimizers that suit
        them, and what is lost comes back as it was: a request is held to its word."""
        method = method_of(self)
        lr = self.lr if self.lr is not None else method.rate or (1e-3 if self.lora_rank else 1e-4)
        clip = self.clip if self.clip is not None else 0.0 if method.is_procedure else 1.0
        warmup = min(20, -(-self.steps // 10)) if self.warmup is None else self.warmup
        exact = self.recovery == "auto" and self.scheduler not in ("roundpipe", "skippipe")
        recovery = "exact" if exact else self.recovery
        return replace(
            self, lr=lr, warmup=warmup, data=self.data or "rows of the run", recovery=recovery, clip=clip,
            optimizer=self.optimizer or method.optimizer,
        )  # fmt: skip

    def validate(self) -> None:
        """Raise ConfigError where microbatches, scheduler, optimizer or numbers do not go with the method, too."""
        if (method := method_of(self)).is_procedure:
            told = f"for method {self.method}, whose step is more than one gradient"
            require(self.scheduler not in ("roundpipe", "skippipe"), "scheduler", self.scheduler,
                    f"one whose workers keep their layers and whose microbatches visit all, {told}")  # fmt: skip
            require(self.optimizer in (None, "sgd"), "optimizer", self.optimizer, f"sgd {told}")
        require(
            self.dtype == "float32" or not method.by_differences, "dtype", self.dtype,
            f"float32 for method {self.method}, which takes differences of gradients",
        )  # fmt: skip
        super().validate()
        kinds = method.kinds
        require(
            self.method != OracleMatching.name or self.oracle is not None, "oracle", self.oracle,
            f"a model directory, which method {self.method} needs",
        )  # fmt: skip
        require(self.oracle is None or self.oracle.is_dir(), "oracle", str(self.oracle), "a model directory")
        require(
            not (self.reapply and (self.forget or self.keep_update)), "reapply", self.reapply,
            "0 with forget or keep_update: what is applied again has its rows, and is kept already",
        )  # fmt: skip
        require(
            bool(self.forget or self.reapply), "forget", self.forget,
            "rows of the run: an id, FIELD=VALUE, or a file",
        )  # fmt: skip
        require(
            not kinds or self.microbatches % len(kinds) == 0, "microbatches", self.microbatches,
            f"a multiple of {len(kinds)} for method {self.method}, which takes {', '.join(kinds)} in turn",
        )  # fmt: skip
        require(
            PAIR not in kinds or self.microbatch_size % 2 == 0, "microbatch_size", self.microbatch_size,
            f"an even number for method {self.method}, which takes pairs of answers",
        )  # fmt: skip

    @property
    def rows_per_step(self) -> int:
        """Rows to forget that a step takes."""
        kinds = method_of(self).kinds
        size = self.microbatch_size // 2 if PAIR in kinds else self.microbatch_size
        return size * (self.microbatches // len(kinds))

    def with_steps(self, rows: int) -> UnlearnConfig:
        """The same with the steps that the method asks for, or the epochs take over so many rows."""
        if self.epochs is None or not (method := method_of(self)).kinds:
            return self
        if method.few_steps is not None:
            return replace(self, steps=method.few_steps)
        return replace(self, steps=max(1, round(self.epochs * rows / self.rows_per_step)))
