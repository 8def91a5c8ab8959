"""The optimizer's settings: the learning rate over the steps, clipping by the norm over the whole model, decay for
matrices alone, and what each optimizer keeps of a parameter from step to step.

Every layer has optimizers of its own (`layer_state.py`, `make_optimizer.py`), so that a layer can be moved, rebuilt
with fresh moments or given another learning rate without touching its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import nn

from pipeline.settings import MOST_STEPS, RunShape, Within, require, require_known
from pipeline.state.lr_schedule import SHAPES

OPTIMIZERS = ("adamw", "sgd", "muon")
ADAMW, MOMENTUM = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)
"""What AdamW, and what momentum, keep of a parameter."""
MUON_MOMENTUM = 0.95


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer, and the learning rate."""

    optimizer: str | None = None
    """adamw; muon (momentum made orthogonal for the matrices of the blocks, AdamW for all else, one learning rate for
    both); or sgd: gradient, or momentum, times learning rate, with no decay. Unset, adamw, or what a method of
    unlearning asks for."""
    lr: Annotated[float | None, Within(0, 100, above=True)] = None
    """Peak learning rate. Unset, it is 2e-3 where weights begin at random; 2e-5 for weights that were trained
    before, as Llama 2 was fine-tuned (arXiv 2307.09288, section 3.1); 2e-4 for adapters on these, as in QLoRA
    (2305.14314)."""
    warmup: Annotated[int | None, Within(0, MOST_STEPS)] = None
    """Steps of linear warm-up; --lr-schedule follows. Unset, a tenth of --steps, and 20 at most."""
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How the learning rate goes after the warm-up: half a cosine or a line down to the last step, wsd (the peak, then
    a line over the last --lr-decay-share of all steps), or the peak to the end."""
    lr_decay_share: Annotated[float, Within(0, 1, above=True)] = 0.2
    """The share of --steps over which wsd decays."""
    min_lr_ratio: Annotated[float, Within(0, 1)] = 0.1
    """Where the decay ends, as a share of --lr."""
    momentum: Annotated[float | None, Within(0, 1, below=True)] = None
    """That of muon and sgd. Unset, it is 0.95 under muon, and sgd has none."""
    weight_decay: Annotated[float, Within(0, 100)] = 0.1
    """Decay of matrices under adamw and muon; norms and biases do not decay."""
    beta1: Annotated[float, Within(0, 1, below=True)] = 0.9
    """AdamW's first moment decay."""
    beta2: Annotated[float, Within(0, 1, below=True)] = 0.95
    """AdamW's second moment decay."""
    eps: Annotated[float, Within(0, 1, above=True)] = 1e-8
    """AdamW's epsilon."""
    clip: Annotated[float | None, Within(0, 1_000_000)] = None
    """Global gradient norm above which gradients are scaled down; 0 never. Unset, 1, or 0 for a method of unlearning
    whose step is not a gradient."""
    exact_sums: bool = False
    """Sum gradients over microbatches in whole numbers, so that the sum depends neither on --workers nor on --replicas:
    a run that changes its size is bitwise the run that does not. Takes 8 bytes more a parameter."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError for an optimizer that is none or does not fit, and where sums do not depend on the workers
        anyway."""
        if self.optimizer is not None:
            require_known("optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer in ("sgd", "muon"):
            require(
                not run.shard_optimizer, "optimizer", self.optimizer,
                "adamw with shard_optimizer: the moments of others are not cut into ranges",
            )  # fmt: skip
        else:
            require(self.momentum is None, "momentum", self.momentum, "unset under optimizer adamw: see beta1")
        require(
            not self.exact_sums or run.scheduler != "roundpipe", "exact_sums", self.exact_sums,
            "False under scheduler roundpipe, whose sums do not depend on the workers",
        )  # fmt: skip


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer under a schedule: AdamW (Loshchilov and Hutter, arXiv 1711.05101), SGD, or Muon (Jordan et al.,
    an optimizer for hidden layers in neural networks, 2024), with the scale of updates that lets one learning rate
    serve it and AdamW (2502.16982, section 2.2)."""

    lr: float = 1e-3
    total_steps: int = 100
    warmup_steps: int = 10
    min_lr_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    implementation: str = "torch"
    """"torch" or, for weights in host memory, "deepspeed": whose AdamW."""
    optimizer: str = "adamw"
    schedule: str = "cosine"
    decay_share: float = 0.2
    momentum: float = 0.0

    def kinds(self, num_dims: int, block: bool) -> tuple[str, ...]:
        """What is kept of a parameter with so many dimensions, of a decoder block or not."""
        if self.optimizer == "sgd":
            return MOMENTUM if self.momentum else ()
        return MOMENTUM if self.optimizer == "muon" and block and num_dims == 2 else ADAMW

    def num_moments(self, num_dims: int, block: bool) -> int:
        """How many of them have a number for each of the parameter."""
        return sum(kind != "step" for kind in self.kinds(num_dims, block))


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate of 0-based `step`: lr (step + 1) / warmup, then from lr to lr * min_lr_ratio as the schedule goes."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.min_lr_ratio
    left = SHAPES[config.schedule](step, config.warmup_steps, config.total_steps, config.decay_share)
    return floor + (config.lr - floor) * left


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of global norm `norm` are multiplied by, as torch.nn.utils.clip_grad_norm_ does; 0 never clips."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0


def decay_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """AdamW's parameter groups: matrices decay, vectors (norms, biases) do not."""
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    groups: list[dict[str, object]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
