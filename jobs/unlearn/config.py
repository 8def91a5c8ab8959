"""The settings of a request to forget: those of a run, with the method and the request before them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from transformers import PreTrainedConfig

from jobs.config import TrainConfig, require
from jobs.unlearn.guard import GUARD, GUARDS, adapters_of
from jobs.unlearn.method import FORGET, PAIR, POISON, RETAIN, ROLLOUT, TRACE, Reads
from jobs.unlearn.methods.grpo import GRPO
from jobs.unlearn.methods.matching import OracleMatching
from jobs.unlearn.methods.o3 import O3
from jobs.unlearn.neurons import NEURONS
from jobs.unlearn.settings import MethodSettings, method_of
from pipeline.model.layered import LayeredModel
from pipeline.model.lora import Adapters
from pipeline.settings import Within
from recovery.policy import POLICIES


@dataclass(frozen=True)
class RequestSettings:
    """What is to be forgotten, and what is left of it."""

    run: Path = Path("runs/default")
    """The run folder whose model is to forget."""
    forget: str = ""
    """Rows to forget: an id, id:A,B, FIELD=VALUE (as author=NAME), a file of rows, or one with an id on each line. Of a
    run on text documents: a module or package of the standard library (asyncio, json.decoder), the path of a file, or a
    file with such names or with the text itself."""
    retain: str = "auto"
    """Rows to keep, by which the model is held together: in the same ways, or auto for all others that it has seen."""
    idk: Path | None = None
    """Answers that say nothing, one on each line, for dpo, idk, concept and the first steps of grpo; unset takes
    ours."""
    trace: Path | None = None
    """Rows with a model's reasoning about what is to be forgotten, for r2mu; unset has the model itself write it."""
    trace_tokens: Annotated[int, Within(1, 2**20)] = 100
    """Tokens of the reasoning about each row that the model writes itself, for r2mu."""
    anchor: Path | None = None
    """Rows with reasoning about other things, for r2mu."""
    oracle: Path | None = None
    """A model directory that never saw what is to be forgotten, such as `unbroken replay --without` writes: the report
    measures how far the result is from it (KL divergence)."""
    floor: Path | None = None
    """A second oracle, trained with another seed and the run's tokenizer: how far it is from --oracle is the noise
    floor, which no method can be expected to come under."""
    epochs: Annotated[float | None, Within(0, 10_000, above=True)] = 5.0
    """How often every row to forget is taken; with --steps it is unset, and they say how long the request takes. kfade
    takes one step unless --steps says otherwise, over the rows of its --microbatches."""
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

    def lora(self) -> Adapters | None:
        """What is trained beside weights that stay: the adapters of the settings, or those of a method that guards."""
        return adapters_of(method_of(self), super().lora(), self.out / GUARD)

    @property
    def masks(self) -> Path | None:
        """See TrainConfig."""
        return self.out / NEURONS if self.neurons else None

    @property
    def reads_before(self) -> bool:
        """See TrainConfig; what an oracle says is read in the process that begins the request."""
        method = method_of(self)
        own = method.name != OracleMatching.name
        return own and any(method.reads(kind) is not Reads.NOTHING for kind in method.kinds)

    @property
    def needs_questions(self) -> bool:
        """Whether rows need a question: for other answers, those of the model, a router, or neurons chosen by it."""
        kinds = {PAIR, POISON, ROLLOUT} | ({TRACE} if self.trace is None else set())
        return bool(kinds & set(method_of(self).kinds)) or self.method == O3.name or bool(self.neurons)

    def resolved(self) -> UnlearnConfig:
        """See TrainConfig; methods, adapters and whole models begin with the learning rates and optimizers that suit
        them, and what is lost comes back as it was: a request is held to its word."""
        method = method_of(self)
        lr = self.lr if self.lr is not None else method.rate or (1e-3 if self._adapts else 1e-4)
        clip = self.clip if self.clip is not None else 0.0 if method.is_procedure else 1.0
        warmup = min(20, -(-self.steps // 10)) if self.warmup is None else self.warmup
        schedulers = ("roundpipe",) if self._adapts or self.patterns() else ("roundpipe", "skippipe")
        exact = self.recovery == "auto" and self.scheduler not in schedulers
        recovery = "exact" if exact else self.recovery
        return replace(
            self, lr=lr, warmup=warmup, data=self.data or "rows of the run", recovery=recovery, clip=clip,
            optimizer=self.optimizer or method.optimizer,
        )  # fmt: skip

    @property
    def _adapts(self) -> bool:
        return self.lora_rank > 0 or self.method in GUARDS

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
            not (self.shard_optimizer and self.method == O3.name), "shard_optimizer", self.shard_optimizer,
            f"False for method {O3.name}, which adds to gradients where they are applied",
        )  # fmt: skip
        require(
            self.method != OracleMatching.name or self.oracle is not None, "oracle", self.oracle,
            f"a model directory, which method {self.method} needs",
        )  # fmt: skip
        require(self.oracle is None or self.oracle.is_dir(), "oracle", str(self.oracle), "a model directory")
        require(self.floor is None or self.floor.is_dir(), "floor", str(self.floor), "a model directory")
        require(
            self.floor is None or self.oracle is not None, "floor", str(self.floor), "unset without --oracle"
        )  # fmt: skip
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
        if isinstance(method := method_of(self), GRPO):
            answers = self.microbatches // len(kinds) * self.microbatch_size
            require(
                answers % method.rollouts == 0, "rollouts", method.rollouts,
                f"a divisor of {answers}, the answers of a step: microbatches / 2 x microbatch_size",
            )  # fmt: skip
            require(
                not self.optimizer_async, "optimizer_async", self.optimizer_async,
                f"off for method {self.method}: the weights that answer are those that are trained",
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
        method = method_of(self)
        size = self.microbatch_size // 2 if PAIR in method.kinds else self.microbatch_size
        rows = size * (self.microbatches // len(method.kinds))
        return rows // method.rollouts if isinstance(method, GRPO) else rows

    def computed(self, shape: PreTrainedConfig) -> LayeredModel:
        """What a request computes of a model of this shape. Raises ConfigError for a layer that it does not have, and
        ModelError for anything else that does not fit."""
        blocks = int(shape.num_hidden_layers)
        allowed = f"0 to {blocks - 1}, the model's blocks"
        require((self.depth or 1) <= blocks, "layer", (self.depth or 1) - 1, allowed)
        return LayeredModel(shape, lora=self.lora(), depth=self.depth, trained=self.patterns())

    def with_steps(self, rows: int) -> UnlearnConfig:
        """The same with the steps that the method asks for, or the epochs take over so many rows."""
        if self.epochs is None or not (method := method_of(self)).kinds:
            return self
        if method.few_steps is not None:
            return replace(self, steps=method.few_steps)
        return replace(self, steps=max(1, round(self.epochs * rows / self.rows_per_step)))
