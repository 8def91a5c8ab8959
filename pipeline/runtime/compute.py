"""A span computed on a microbatch: one function for a worker that holds the span and for one that has loaded it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.layered import LayeredModel
from pipeline.model.rng import RngKey
from pipeline.model.span_module import SpanModule
from pipeline.runtime.batch import Batch, Job, Needs
from pipeline.runtime.terms import StepTerms
from pipeline.schedule.ops import Span


@dataclass(frozen=True)
class Settings:
    """How a worker computes, whatever it computes."""

    device: torch.device
    seed: int = 0
    autocast: torch.dtype | None = None
    recompute: bool = False
    deadline_s: float = 300.0
    compiled: bool = False
    peak_tflops: float | None = None
    """What the device could do at most, where a person has stated it."""


@dataclass(frozen=True)
class Output:
    """What a span gives for a microbatch. `y` is a hidden state [batch, sequence, hidden], or at the end of the model
    the scalar to go back from; there `sums` has the microbatch's sum of each term."""

    y: Tensor
    sums: Mapping[str, Tensor] | None = None


def needs(model: LayeredModel, span: Span) -> Needs:
    """What of a microbatch a span computes with."""
    first = Needs.INPUT if span[0] == 0 else Needs.NOTHING
    return first | (Needs.LOSS if span[1] == model.num_layers else Needs.NOTHING)


def compute(
    module: SpanModule, x: Tensor, job: Job, batch: Batch, step: int, terms: StepTerms, settings: Settings, *,
    recompute: bool = False, taps: dict[int, Tensor] | None = None,
) -> Output:  # fmt: skip
    """A span on `x`: the ids [batch, sequence] for the first one, else a hidden state. `recompute` and `taps` as in
    SpanModule."""
    with torch.autocast(settings.device.type, dtype=settings.autocast, enabled=settings.autocast is not None):
        y = module(
            x, attention_mask=batch.get("attention_mask"), position_ids=batch.get("position_ids"), recompute=recompute,
            compiled=settings.compiled, taps=taps, rng=RngKey(settings.seed, step, batch.sample_ids),
        )  # fmt: skip
    if module.span[1] < module.model.num_layers:
        return Output(y)
    sums = job.loss(y, batch)
    return Output(terms.scaled(sums), {term: value.detach() for term, value in sums.items()})
