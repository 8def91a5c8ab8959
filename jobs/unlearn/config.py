"""The settings of a request to forget: those of a run, with the method and the request before them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from jobs.config import TrainConfig, require
from jobs.unlearn.method import FORGET, PAIR, RETAIN
from jobs.unlearn.methods.matching import OracleMatching
from jobs.unlearn.neurons import NEURONS
from jobs.unlearn.settings import MethodSettings, method_of
from pipeline.settings import Within
from recovery.policy import POLICIES


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
    """Answers that say nothing, one on each line, for dpo, idk and concept; unset takes ours."""
    trace: Path | None = None
    """Rows with a model's reasoning about what is to be forgotten, for r2mu."""
    anchor: Path | None = None
    """Rows with reasoning about other things, for r2mu."""
    oracle: Path | None = None
    """A model directory that never saw what is to be forgotten, such as `unbroken replay --without` writes: the report
    measures how far the result is from it."""
    epochs: Annotated[float | None, Within(0, 10_000, above=True)] = 5.0
    """How often every row to forget is taken; with --steps it is unset, and they say how long the request takes."""
    reference_top: Annotated[int, Within(0, 2**20)] = 0
    """Of the distribution over tokens that kl_min, undial and roka compare with, keep so many tokens of each position;
    0 keeps all."""
    neighbours: Annotated[int, Within(0, 2**24)] = 0
    """Of the rows to keep take only those that are among the so many nearest ones of a row to forget, by what the model
    before makes of them (input times gradient, as in ROKA); 0 takes all."""
    neurons: Annotated[float, Within(0, 1)] = 0.0
    """Update only this share of the neurons of the blocks' MLPs, those that have most to do with the answers to forget
    (as in KLUE), and leave all other weights as they are, bit for bit; 0 updates all weights."""
    forgotten_below: Annotated[float, Within(0, 1)] = 0.0
    """A row to forget adds nothing to a step in which its answer has less than this probability per token; 0 lets every
    row add something always."""
    old_checkpoints: Literal["fence", "shred"] = "fence"
    """What becomes of checkpoints that still know: fence moves them where no run reads, shred overwrites and removes
    them."""
    key: Path | None = None
    """A private key (Ed25519, PEM or OpenSSH) that signs the manifest."""


@dataclass(frozen=True)
class UnlearnConfig(RequestSettings, MethodSettings, TrainConfig):
    """Make a trained model forget rows of its data."""

    job: ClassVar[str] = "unlearn"

    @property
    def depth(self) -> int | None:
        """See TrainConfig."""
        return method_of(self).depth

    @property
    def masks(self) -> Path | None:
        """See TrainConfig."""
        return self.out / NEURONS if self.neurons else None

    def resolved(self) -> UnlearnConfig:
        """See TrainConfig; adapters and whole models begin with the learning rates that suit them, and what is lost
        comes back as it was: a request is held to its word."""
        lr = (1e-3 if self.lora_rank else 1e-4) if self.lr is None else self.lr
        warmup = min(20, -(-self.steps // 10)) if self.warmup is None else self.warmup
        exact = self.recovery == "auto" and self.scheduler not in ("roundpipe", "skippipe")
        recovery = "exact" if exact else self.recovery
        return replace(self, lr=lr, warmup=warmup, data=self.data or "rows of the run", recovery=recovery)

    def validate(self) -> None:
        """Raise ConfigError where the microbatches of a step do not go with the method, too."""
        super().validate()
        kinds = method_of(self).kinds
        require(
            self.method != OracleMatching.name or self.oracle is not None, "oracle", self.oracle,
            f"a model directory, which method {self.method} needs",
        )  # fmt: skip
        require(self.oracle is None or self.oracle.is_dir(), "oracle", str(self.oracle), "a model directory")
        require(bool(self.forget), "forget", self.forget, "rows of the run: an id, FIELD=VALUE, or a file")
        require(
            not kinds or self.microbatches % len(kinds) == 0, "microbatches", self.microbatches,
            f"a multiple of {len(kinds)} for method {self.method}, which takes {', '.join(kinds)} in turn",
        )  # fmt: skip
        require(
            PAIR not in kinds or self.microbatch_size % 2 == 0, "microbatch_size", self.microbatch_size,
            f"an even number for method {self.method}, which takes pairs of answers",
        )  # fmt: skip

        self._check_rows(kinds)
        self._check_neurons(kinds)

    def _check_rows(self, kinds: Collection[str]) -> None:
        require(
            not self.neighbours or RETAIN in kinds, "neighbours", self.neighbours,
            f"0 for method {self.method}, which takes no rows to keep",
        )  # fmt: skip
        require(
            not self.forgotten_below or (self.depth is None and bool({FORGET, PAIR} & set(kinds))), "forgotten_below",
            self.forgotten_below,
            f"0 for method {self.method}, in whose steps the answers to forget have no probability",
        )  # fmt: skip

    def _check_neurons(self, kinds: Collection[str]) -> None:
        if not self.neurons:
            return
        require(bool(kinds), "neurons", self.neurons, f"0 for method {self.method}, which has no steps of its own")
        require(not self.lora_rank, "neurons", self.neurons, "0 with lora_rank: adapters belong to no neuron")
        made_up = set(POLICIES.get(self.recovery, ())) - {"replica", "checkpoint", "redundant"}
        require(
            not made_up or self.scheduler == "roundpipe", "recovery", self.recovery,
            "exact, replica, checkpoint, redundant or none with neurons: other weights stay as they are, to the bit",
        )  # fmt: skip

    @property
    def rows_per_step(self) -> int:
        """Rows to forget that a step takes."""
        kinds = method_of(self).kinds
        size = self.microbatch_size // 2 if PAIR in kinds else self.microbatch_size
        return size * (self.microbatches // len(kinds))

    def with_steps(self, rows: int) -> UnlearnConfig:
        """The same with the steps that the epochs take over so many rows."""
        if self.epochs is None or not method_of(self).kinds:
            return self
        return replace(self, steps=max(1, round(self.epochs * rows / self.rows_per_step)))
