"""AdamW for weights in host memory: torch's fused one, or DeepSpeed's C++ one where it is asked for and installed.

Both keep the same state (`step`, `exp_avg`, `exp_avg_sq`) in the same tensors. Measured, torch's is the faster one
(benchmarks/cpu_adam.py), so it is the default.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch


class OptimizerError(ValueError):
    """An optimizer that is not there. Says what to install."""


def make_adamw(
    groups: list[dict[str, object]], implementation: str, *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """AdamW over parameter groups. `implementation` is "torch" or "deepspeed". Raises OptimizerError."""
    if implementation == "deepspeed":
        return _deepspeed(groups, lr, betas, eps)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def _deepspeed(groups: Any, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    try:
        base: Any = import_module("deepspeed.ops.adam").DeepSpeedCPUAdam  # an extra, compiled when first used
    except ImportError as error:
        raise OptimizerError(
            f"cpu_adam is 'deepspeed', which cannot be imported ({error}); pip install 'unbroken[deepspeed]'"
        ) from error

    class Adam(base):
        """Counts steps in a tensor, as torch does, so that checkpoints have one form."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    state["step"] += 1
                    self.ds_opt_adam.adam_update(
                        self.opt_id, int(state["step"]), group["lr"], *group["betas"], group["eps"],
                        group["weight_decay"], group["bias_correction"], parameter.data, parameter.grad.data,
                        state["exp_avg"], state["exp_avg_sq"],
                    )  # fmt: skip

    return Adam(groups, lr=lr, betas=betas, eps=eps, adamw_mode=True)
