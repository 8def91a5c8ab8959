"""From settings to the optimizers of one layer state, with all that they keep there from the start.

They are torch's own: `Muon` for the matrices of decoder blocks, with `AdamW` for embedding, head, norms and biases, as
Muon's author has it; or one of `AdamW` and `SGD` for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.state.cpu_adam import make_adamw
from pipeline.state.optimizer import ADAMW, OptimizerConfig, decay_groups


def make_optimizers(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, block: bool,
    moments: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """The optimizers of the parameters of a decoder block, or of others. `moments` (name -> kind) are used where they
    lie, if they are given, and are made otherwise: one form before and after step 1. Raises OptimizerError."""
    found: list[torch.optim.Optimizer] = []
    kinds = {name: config.kinds(p.dim(), block) for name, p in parameters.items()}
    adamw = {name: p for name, p in parameters.items() if kinds[name] == ADAMW}
    others = [p for name, p in parameters.items() if kinds[name] != ADAMW]
    if others and config.optimizer == "sgd":
        found.append(torch.optim.SGD(others, lr=config.lr, momentum=config.momentum))
    elif others:
        muon: dict[str, Any] = {"weight_decay": config.weight_decay, "momentum": config.momentum}
        found.append(torch.optim.Muon(others, lr=config.lr, adjust_lr_fn="match_rms_adamw", **muon))
    if adamw:
        groups = decay_groups(adamw, config.weight_decay)
        found.append(make_adamw(groups, config.implementation, lr=config.lr, betas=config.betas, eps=config.eps))
    for optimizer in found:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = next(name for name, each in parameters.items() if each is parameter)
                given = {} if moments is None else moments[name]
                optimizer.state[parameter] = {kind: _zero(kind, parameter, given) for kind in kinds[name]}
    return found


def _zero(kind: str, parameter: nn.Parameter, given: Mapping[str, Tensor]) -> Tensor:
    if kind == "step":
        return torch.zeros((), dtype=torch.float32, device=parameter.device)
    return given[kind] if kind in given else torch.zeros_like(parameter)
