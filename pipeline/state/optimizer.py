"""The optimizer's settings: warm-up and cosine, AdamW's decay for matrices alone, clipping by the norm over the whole
model. Plain gradient steps (SGD) keep nothing from step to step beside the weights.

Every layer has an optimizer of its own (`layer_state.py`), so that a layer can be moved, rebuilt with fresh moments or
given another learning rate without touching its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from torch import nn

from pipeline.settings import MOST_STEPS, RunShape, Within, require, require_known

OPTIMIZERS = ("adamw", "sgd")
MOMENTS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "sgd": ()}
"""What an optimizer keeps of each parameter."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer, and the learning rate."""

    optimizer: str | None = None
    """adamw, or sgd: gradient times learning rate, with no moments and no decay. Unset, adamw, or what a method of
    unlearning asks for."""
    lr: Annotated[float | None, Within(0, 100, above=True)] = None
    """Peak learning rate. Unset, it is 2e-3 where weights begin at random; 2e-5 for weights that were trained
    before, as Llama 2 was fine-tuned (arXiv 2307.09288, section 3.1); 2e-4 for adapters on these, as in QLoRA
    (2305.14314)."""
    warmup: Annotated[int | None, Within(0, MOST_STEPS)] = None
    """Steps of linear warm-up; a cosine follows. Unset, a tenth of --steps, and 20 at most."""
    min_lr_ratio: Annotated[float, Within(0, 1)] = 0.1
    """Where the cosine ends, as a share of --lr."""
    weight_decay: Annotated[float, Within(0, 100)] = 0.1
    """AdamW's decay of matrices; norms and biases do not decay."""
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
        if self.optimizer == "sgd":
            require(run.scheduler != "roundpipe", "optimizer", "sgd", "adamw under scheduler roundpipe")
            require(not run.shard_optimizer, "optimizer", "sgd", "adamw with shard_optimizer: sgd has nothing to share")
        require(
            not self.exact_sums or run.scheduler != "roundpipe", "exact_sums", self.exact_sums,
            "False under scheduler roundpipe, whose sums do not depend on the workers",
        )  # fmt: skip


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), or SGD, under a linear warm-up and a cosine decay."""

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

    @property
    def moments(self) -> tuple[str, ...]:
        """What is kept of each parameter."""
        return MOMENTS[self.optimizer]


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate of 0-based `step`: lr (step + 1) / warmup, then half a cosine from lr to lr * min_lr_ratio."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


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
