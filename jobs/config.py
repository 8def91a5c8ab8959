"""The settings of a training job: those of all their owners, and what follows from them together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from jobs.batch import BatchSettings, microbatches_of
from jobs.cluster import ClusterSettings
from jobs.fields import DataSettings, MachineSettings, ModelSettings, OutputSettings
from pipeline.model.lora import LoraSettings
from pipeline.model.trained import TrainedSettings
from pipeline.model.weights import has_weights
from pipeline.settings import ConfigError as ConfigError
from pipeline.settings import check_groups
from pipeline.settings import require as require
from pipeline.state.optimizer import MUON_MOMENTUM, OptimizerConfig, OptimizerSettings
from pipeline.state.shard import ShardSettings
from recovery.checkfree import CheckFreeSettings
from recovery.inject import Fault, Ground, InjectionSettings, Rate, parse_faults
from recovery.losses import SupervisionSettings
from recovery.policy import RecoverySettings
from recovery.redundant import RedundantSettings
from recovery.rehearse import RehearseSettings
from recovery.resize import ResizeSettings
from recovery.snapshot import SnapshotSettings
from schedulers.balanced import BalancedSettings
from schedulers.interleaved import InterleavedSettings
from schedulers.plan import ScheduleSettings
from schedulers.roundpipe import RoundPipeSettings
from schedulers.skippipe import SkipPipeSettings
from schedulers.swapped import SwappedSettings


@dataclass(frozen=True)
class TrainConfig(
    ScheduleSettings, ModelSettings, DataSettings, OptimizerSettings, OutputSettings, RecoverySettings,
    SupervisionSettings, ResizeSettings, SnapshotSettings, MachineSettings, InjectionSettings, InterleavedSettings,
    BalancedSettings, SkipPipeSettings, RoundPipeSettings, LoraSettings, TrainedSettings, CheckFreeSettings,
    SwappedSettings, RedundantSettings, RehearseSettings, ShardSettings, ClusterSettings, BatchSettings,
):  # fmt: skip
    """Train a causal language model through a pipeline of workers."""

    job: ClassVar[str] = "text"  # what the run is of: see jobs.registry

    @property
    def depth(self) -> int | None:
        """How many decoder blocks are computed; None for the whole model."""
        return None

    @property
    def masks(self) -> Path | None:
        """The folder that says which weights are updated (pipeline.state.masks); None for all."""
        return None

    @property
    def reads_before(self) -> bool:
        """Whether workers compute something of the model before the first step."""
        return False

    @property
    def is_procedure(self) -> bool:
        """Whether a step is more than one gradient."""
        return False

    @property
    def stages(self) -> int:
        """Workers per replica."""
        return self.workers // self.replicas

    @property
    def round_size(self) -> int:
        """Microbatches that go through a span at once under roundpipe."""
        return self.at_once or max(1, -(-self.microbatches // 2))

    @property
    def samples_per_step(self) -> int:
        """The global batch."""
        return self.microbatches * self.microbatch_size

    @property
    def last_step(self) -> int:
        """The step after which this start of the run ends."""
        return self.until or self.steps

    def resolved(self) -> TrainConfig:
        """The same with the settings filled in that are unset and follow from others: what a run is kept with. Raises
        ConfigError where two ways to say the global batch disagree."""
        trained = has_weights(self.model)
        lr = (2e-4 if self.lora_rank else 2e-5) if trained else 2e-3
        partly = (self.lora_rank > 0 or bool(self.patterns())) and self.scheduler != "roundpipe"
        return replace(
            self.with_batch({} if self.microbatches == TrainConfig.microbatches else {"microbatches"}),
            recovery="exact" if partly and self.recovery == "auto" else self.recovery,
            lr=lr if self.lr is None else self.lr,
            warmup=min(20, -(-self.steps // 10)) if self.warmup is None else self.warmup,
            data="stdlib" if self.data is None and not trained else self.data,
            optimizer=self.optimizer or "adamw",
            clip=1.0 if self.clip is None else self.clip,
        )

    def with_batch(self, asked: Collection[str]) -> Self:
        """The same with the global batch in microbatches, however it was said; `asked` are the settings that somebody
        has given. Raises ConfigError where two of them disagree."""
        count = microbatches_of(self, self.replicas, self.microbatch_size, self.microbatches, "microbatches" in asked)
        return replace(self, microbatches=count, grad_accumulation=0, global_batch=0)

    def optimizer_config(self) -> OptimizerConfig:
        """The part that the optimizer reads."""
        known = self.resolved()
        assert known.lr is not None
        assert known.warmup is not None
        assert known.clip is not None
        assert known.optimizer is not None
        momentum = (MUON_MOMENTUM if known.optimizer == "muon" else 0.0) if self.momentum is None else self.momentum
        return OptimizerConfig(
            known.lr, self.steps, known.warmup, self.min_lr_ratio, (self.beta1, self.beta2), self.eps,
            self.weight_decay, known.clip, self.cpu_adam, known.optimizer, self.lr_schedule, self.lr_decay_share,
            momentum,
        )  # fmt: skip

    def faults(self, stages: int | None = None) -> tuple[Fault | Rate, ...]:
        """The faults to inject. `stages` is how many the schedule has, where its network file decides it. Raises
        InjectionError for one that could never happen."""
        pool = self.scheduler == "roundpipe"
        known = self.stages if stages is None and self.scheduler != "skippipe" else stages
        ids = self.workers + self.max_failures
        return parse_faults(
            self.inject, Ground(ids, known, pool, self.shard_optimizer, self.reads_before, self.is_procedure)
        )

    def validate(self) -> None:
        """Raise ConfigError, or InjectionError, for the first setting that cannot work, whatever the model, the data
        and the machine are."""
        check_groups(self)
        if self.data is None and has_weights(self.model):
            raise ConfigError(
                f"data is unset; allowed with the weights of model {self.model!r}: files of text, globs, hf:NAME, or "
                "stdlib by its name"
            )
        self.faults()
