"""The bytes that a plain model takes on a device beside its weights: activations, the KV cache, what sampling needs.

They are counted on tensors that have a device and a shape but no memory (torch's FakeTensorMode): the same operators
as in earnest, the kernel of attention that the device would take included. What operators and libraries keep to
themselves is not seen.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from pipeline.runtime.footprint import Live

_SAMPLED = 16
"""fp32 vectors of the vocabulary's size that choosing a token takes: what is scaled, sorted, summed, drawn from."""
_TOKEN = 128
"""Bytes of a token beside: its id, its place in masks and positions, each of them copied when one is added."""


@contextmanager
def _imagined(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Iterator[PreTrainedModel]:
    with FakeTensorMode(), torch.device(device), torch.no_grad():
        yield AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()


def generation_bytes(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, prompt: int, tokens: int
) -> int:  # fmt: skip
    """At most, of one row: a prompt of so many tokens is read, then one by one until there are `tokens` in all."""
    with _imagined(config, dtype, device) as model:
        names = inspect.signature(model.forward).parameters
        keyword = "cache" if "cache" in names else "past_key_values"  # its name changes with transformers 5.40

        def read(count: int, cache: DynamicCache) -> None:
            ids = torch.zeros((1, count), dtype=torch.long)
            model(ids, **{keyword: cache}, use_cache=True, logits_to_keep=1)

        with Live() as live:
            reading = live.rise(lambda: read(prompt, DynamicCache(config=model.config)))
        with Live() as live:
            cache = DynamicCache(config=model.config)
            read(max(1, tokens - 1), cache)
            kept = live.now
            going_on = kept + live.rise(lambda: read(1, cache))
    return max(reading, going_on) + 4 * _SAMPLED * int(config.vocab_size) + _TOKEN * tokens


def scoring_bytes(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, length: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> int:  # fmt: skip
    """At most, of one row of so many tokens, of which `loss` (logits, targets) is taken."""
    with _imagined(config, dtype, device) as model, Live() as live:
        ids = torch.zeros((1, length), dtype=torch.long)
        return live.now + live.rise(lambda: loss(model(ids).logits, ids)) + _TOKEN * length
