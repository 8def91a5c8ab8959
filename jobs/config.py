"""What the settings of a training job mean together: what follows from them, and what cannot work, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

from jobs.bounds import ConfigError as ConfigError
from jobs.bounds import check_bounds, limit_work, require_known
from jobs.bounds import require as require
from jobs.fields import TrainFields
from pipeline.model.lora import ALL_LINEAR, Lora
from pipeline.model.weights import has_weights
from pipeline.state.optimizer import OptimizerConfig
from recovery.inject import Fault, Ground, Rate, parse_faults
from recovery.policy import POLICIES
from schedulers import ENGINES
from schedulers.swapped import LEAST

_OF_ROUNDS = {"lora_rank": 0, "optimizer_async": False, "at_once": 0, "span_mib": 0, "cpu_adam": "torch"}
_OF_ROUTES = {"skip": 0, "swaps": False, "full_every": 0}
"""Settings that one scheduler alone reads, and the value that leaves them to it."""


@dataclass(frozen=True)
class TrainConfig(TrainFields):
    """Train a causal language model through a pipeline of workers."""

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

    def resolved(self) -> TrainConfig:
        """The same with the settings filled in that are unset and follow from others: what a run is kept with."""
        trained = has_weights(self.model)
        lr = (2e-4 if self.lora_rank else 2e-5) if trained else 2e-3
        return replace(
            self,
            lr=lr if self.lr is None else self.lr,
            warmup=min(20, -(-self.steps // 10)) if self.warmup is None else self.warmup,
            data="stdlib" if self.data is None and not trained else self.data,
        )

    def optimizer(self) -> OptimizerConfig:
        """The part that the optimizer reads."""
        known = self.resolved()
        assert known.lr is not None
        assert known.warmup is not None
        return OptimizerConfig(
            known.lr, self.steps, known.warmup, self.min_lr_ratio, (self.beta1, self.beta2), self.eps,
            self.weight_decay, self.clip, self.cpu_adam,
        )  # fmt: skip

    def lora(self) -> Lora | None:
        """The adapters that are trained, if it is adapters."""
        return Lora(self.lora_rank, self.lora_alpha, self.lora_targets) if self.lora_rank else None

    def faults(self, stages: int | None = None) -> tuple[Fault | Rate, ...]:
        """The faults to inject. `stages` is how many the schedule has, where its network file decides it. Raises
        InjectionError for one that could never happen."""
        pool = self.scheduler == "roundpipe"
        known = self.stages if stages is None and self.scheduler != "skippipe" else stages
        return parse_faults(self.inject, Ground(self.workers + self.max_failures, known, pool))

    def validate(self) -> None:
        """Raise ConfigError, or InjectionError, for the first setting that cannot work, whatever the model, the data
        and the machine are."""
        check_bounds(self)
        require_known("scheduler", self.scheduler, ENGINES)
        self._check_owners()
        require(
            all(name.strip() for name in self.lora_targets.split(",")), "lora_targets", self.lora_targets,
            f"{ALL_LINEAR}, or names separated by commas",
        )  # fmt: skip
        if self.scheduler == "roundpipe":
            self._check_rounds()
        require(self.workers % self.replicas == 0, "replicas", self.replicas, f"a divisor of workers ({self.workers})")
        require(
            self.microbatches % self.replicas == 0, "microbatches", self.microbatches,
            f"a multiple of replicas ({self.replicas})",
        )  # fmt: skip
        limit_work("stages", self.stages * (self.chunks if self.scheduler == "interleaved" else 1), self.microbatches)
        self._check_recovery()
        self._check_places()
        if self.data is None and has_weights(self.model):
            raise ConfigError(
                f"data is unset; allowed with the weights of model {self.model!r}: files of text, globs, hf:NAME, or "
                "stdlib by its name"
            )
        if self.network is not None:
            require(self.network.is_file(), "network", str(self.network), "a readable JSON file")
        self.faults()

    def _check_owners(self) -> None:
        """That no setting is set which the scheduler would not read."""
        skips = self.scheduler == "skippipe"
        require(not skips or self.network is not None, "network", self.network, "a JSON file, under scheduler skippipe")
        for owner, names in (("skippipe", _OF_ROUTES), ("roundpipe", _OF_ROUNDS)):
            for name, unset in names.items():
                value = getattr(self, name)
                require(
                    self.scheduler == owner or value == unset, name, value, f"{unset} unless scheduler is {owner}"
                )  # fmt: skip

    def _check_rounds(self) -> None:
        """What workers that hold nothing cannot do, or need not."""
        for name, only in (("replicas", 1), ("nodes", 1), ("spares", 0), ("network", None), ("ends", "auto")):
            require(getattr(self, name) == only, name, getattr(self, name), f"{only} under scheduler roundpipe")
        require(
            self.recovery == "auto", "recovery", self.recovery,
            "auto under scheduler roundpipe: what a lost worker had is dealt to the others",
        )  # fmt: skip
        require(
            self.cpu_adam == "torch" or find_spec("deepspeed") is not None, "cpu_adam", self.cpu_adam,
            "torch, as deepspeed is not installed (pip install 'unbroken[deepspeed]')",
        )  # fmt: skip
        require(self.at_once <= self.microbatches, "at_once", self.at_once, f"0 to microbatches ({self.microbatches})")

    def _check_recovery(self) -> None:
        """Which remedies, and which places of the two ends, go with the schedule."""
        require_known("recovery", self.recovery, POLICIES)
        if self.recovery == "checkfree+":
            require(
                self.scheduler == "one_f_one_b" and self.stages > LEAST, "recovery", self.recovery,
                f"only with scheduler one_f_one_b and {LEAST + 1} or more workers per replica (found {self.stages}): "
                f"{LEAST} block stages, and the embedding and the head on a worker of their own",
            )  # fmt: skip
            require(self.ends in ("auto", "apart"), "ends", self.ends, "auto or apart under --recovery checkfree+")
        if self.ends in ("home", "apart"):
            require(
                self.scheduler == "one_f_one_b" and self.stages > 1, "ends", self.ends,
                "auto or in-line; home and apart only with scheduler one_f_one_b and 2 or more stages",
            )  # fmt: skip
        if self.recovery == "redundant":
            require(
                self.scheduler not in ("balanced", "skippipe") and self.stages > 1, "recovery", self.recovery,
                "only with 2 or more workers per replica, and not with scheduler balanced or skippipe",
            )  # fmt: skip

    def _check_places(self) -> None:
        """Where the machines of a run meet."""
        require(self.node_rank < self.nodes, "node_rank", self.node_rank, f"0 to {self.nodes - 1}")
        host, _, port = self.store.rpartition(":")
        meets = bool(host) and port.isdecimal() and 0 < int(port[:6]) < 65536
        require(
            meets if self.nodes > 1 else not self.store, "store", self.store,
            "HOST:PORT of node 0" if self.nodes > 1 else "nothing with one node",
        )  # fmt: skip
