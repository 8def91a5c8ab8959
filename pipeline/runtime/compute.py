"""A span computed on a microbatch: one function for a worker that holds the span and for one that has loaded it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.model.layered import SpanModule
from pipeline.model.rng import RngKey
from pipeline.runtime.batch import Batch, Job


@dataclass(frozen=True)
class Settings:
    """How a worker computes, whatever it computes."""

    device: torch.device
    seed: int = 0
    autocast: torch.dtype | None = None
    recompute: bool = False
    deadline_s: float = 300.0


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    mask = batch.attention_mask
    return replace(
        batch, input_ids=batch.input_ids.to(device), labels=batch.labels.to(device),
        attention_mask=None if mask is None else mask.to(device),
    )  # fmt: skip


def compute(
    module: SpanModule, x: Tensor, job: Job, batch: Batch, step: int, settings: Settings, *, recompute: bool = False,
    taps: dict[int, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The output [batch, sequence, hidden] of a span on `x`, which is the batch's ids for the first one; of the last
    span the loss, summed over the tokens that count. `recompute` and `taps` as in SpanModule."""
    with torch.autocast(settings.device.type, dtype=settings.autocast, enabled=settings.autocast is not None):
        y = module(
            x, attention_mask=batch.attention_mask, recompute=recompute, taps=taps,
            rng=RngKey(settings.seed, step, batch.sample_ids),
        )  # fmt: skip
    return job.loss(y, batch) if module.span[1] == module.model.num_layers else y
