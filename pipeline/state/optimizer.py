"""AdamW per span: fp32 gradients in one flat buffer, one global norm over all spans, warm-up and cosine.

Every span has an optimizer of its own, so that a span can be moved, rebuilt with fresh moments or given another
learning rate without touching its neighbours. Gradients are sums over tokens; `apply` divides by the tokens that
visited the span and clips by the norm over all spans in the same pass over memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.state.cpu_adam import make_adamw


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) under a linear warm-up and a cosine decay."""

    lr: float = 1e-3
    total_steps: int = 100
    warmup_steps: int = 10
    min_lr_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    implementation: str = "torch"
    """"torch" or, for weights in host memory, "deepspeed"."""


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


class SpanOptimizer:
    """The parameters of one span (by full name), their flat fp32 gradient and their AdamW state.

    `gradient` is one vector; each parameter's `.grad` is a view of it, so autograd adds into it in place and replicas
    reduce it in one collective. `lr_scale`, a scalar tensor, is state too: it multiplies the learning
    rate, and CheckFree raises that of a rebuilt stage.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, *, gradient: Tensor | None = None,
        moments: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        """`gradient` [all elements, in order] and `moments` (name -> exp_avg, exp_avg_sq) are used where they lie, if
        they are given, and are made otherwise; all of them begin as zeros."""
        self.parameters = dict(parameters)
        self.config = config
        device = next(iter(self.parameters.values())).device
        self.lr_scale = torch.ones((), device=device)
        size = sum(p.numel() for p in self.parameters.values())
        self.gradient = torch.zeros(size, dtype=torch.float32, device=device) if gradient is None else gradient
        at = 0
        for parameter in self.parameters.values():
            parameter.grad = self.gradient[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()
        self._adamw = make_adamw(
            decay_groups(self.parameters, config.weight_decay), config.implementation, lr=config.lr,
            betas=config.betas, eps=config.eps,
        )  # fmt: skip
        for name, parameter in self.parameters.items():  # state exists from the start: one form before and after step 1
            given = {} if moments is None else moments[name]
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                **{kind: given.get(kind, torch.zeros_like(parameter)) for kind in ("exp_avg", "exp_avg_sq")},
            }

    def squared_norm(self) -> float:
        """The sum of squares of the (undivided) gradient."""
        return float(torch.linalg.vector_norm(self.gradient)) ** 2

    def apply(self, scale: float, lr: float) -> None:
        """One AdamW step at `lr` with gradients times `scale`, which then are zero again."""
        self.gradient.mul_(scale)
        for group in self._adamw.param_groups:
            group["lr"] = lr * float(self.lr_scale)
        self._adamw.step()
        self.gradient.zero_()

    def drop(self) -> None:
        """Forget the gradients of a step that does not count."""
        self.gradient.zero_()

    @torch.no_grad()
    def begin_anew(self) -> None:
        """No gradient, no moments, no steps, and the learning rate as it is scheduled."""
        self.drop()
        self.lr_scale.fill_(1.0)
        for name in self.parameters:
            for tensor in self.moments(name).values():
                tensor.zero_()

    def moments(self, name: str) -> dict[str, Tensor]:
        """AdamW's `step`, `exp_avg` and `exp_avg_sq` of the parameter called `name`: the tensors themselves."""
        return self._adamw.state[self.parameters[name]]
