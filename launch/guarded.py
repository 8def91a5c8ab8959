"""A guarded model in plain transformers: its blocks get the guard's hooks, and each prompt is routed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jobs.unlearn.guard import Guard
from jobs.unlearn.router import described
from pipeline.model.families import FAMILIES


def put_on(guard: Guard, model: PreTrainedModel) -> None:
    """Have a plain model be guarded from now on. A prompt is read once without the adapter, by which the router
    decides; the answer's tokens go the way that the prompt went."""
    path = FAMILIES[model.config.model_type].blocks
    blocks = list(model.get_submodule(path).children())
    for number, block in enumerate(blocks):
        guard.attach(f"{path}.{number}", block)
    if guard.routers:
        _Route(guard, model, blocks).install()


def guard_bytes(guard: Guard, tokens: int) -> int:
    """At most, what a guard takes beside the model for one row of so many tokens, in fp32: its tensors where the model
    is, and up to four hidden states as wide as they are."""
    tensors = (*guard.projections.values(), *guard.adapter.values())
    widest = max((max(tensor.shape) for tensor in tensors), default=0)
    return sum(4 * tensor.numel() for tensor in tensors) + 4 * 4 * tokens * widest


class _Route:
    """Routes a prompt when the model is called with one."""

    def __init__(self, guard: Guard, model: PreTrainedModel, blocks: list[nn.Module]) -> None:
        self.guard, self.model, self.blocks = guard, model, blocks
        self.reading = False

    def install(self) -> None:
        self.model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if self.reading or (cache is not None and cache.get_seq_length()):
            return
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        asked = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
        self.guard.route(self._described(ids, asked.bool()))

    @torch.no_grad()
    def _described(self, ids: Tensor, asked: Tensor) -> Tensor:
        found: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            found.append(described(hidden.float().cpu(), asked.cpu()))

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        self.reading, self.guard.given = True, None
        try:
            self.model(input_ids=ids, attention_mask=asked.long(), use_cache=False, logits_to_keep=1)
        finally:
            self.reading = False
            for handle in handles:
                handle.remove()
        return torch.stack(found, dim=1)
