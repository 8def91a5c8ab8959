"""Randomness that belongs to the data: keyed by (seed, step, global sample id, layer), never by rank, time or order.

The dropout mask of a sample is a SplitMix64 stream (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
Generators, OOPSLA 2014) that starts at a hash of those four and of the number of the dropout call inside the layer. It
is integer arithmetic on tensors, so it is the same on every device, however samples are batched, wherever a layer
runs, and when its activations are computed again. Each 64-bit word decides four elements with 16 bits each: a drop
probability is rounded to 1/65536, the scale of what is kept follows the rounded value, so the mean stays exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LEVELS = 1 << 16


def _signed(word: int) -> int:
    """An unsigned 64-bit constant as the int64 of the same bits; tensor arithmetic wraps, so the sums are the same."""
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def derive(seed: int, *words: int | str) -> int:
    """A 63-bit hash of `seed` and `words`, the same in every process and on every machine; 1 and "1" differ."""
    text = "\0".join(f"{type(word).__name__}:{word}" for word in (seed, *words))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class RngKey:
    """What the random numbers of one microbatch depend on. `sample_ids[i]` is the global id of row i of the batch."""

    seed: int
    step: int
    sample_ids: tuple[int, ...]


def random_words(seeds: Tensor, num_words: int) -> Tensor:
    """[batch, num_words] int64: row i holds the first outputs of a SplitMix64 generator of state seeds[i] (int64)."""
    words = torch.arange(1, num_words + 1, dtype=torch.int64, device=seeds.device) * _GOLDEN + seeds[:, None]
    for shift, factor in zip((30, 27), _MIX, strict=True):
        words ^= _shift_right(words, shift)
        words *= factor
    words ^= _shift_right(words, 31)
    return words


def uniforms(seeds: Tensor, num: int) -> Tensor:
    """[batch, num] float64 between 0 and 1, neither of which occurs: row i is drawn from seeds[i] (int64)."""
    return (_shift_right(random_words(seeds, num), 11).double() + 0.5) * 2.0**-53


def _shift_right(words: Tensor, bits: int) -> Tensor:
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)  # int64 shifts copy the sign; the reference has none


def keyed_mask(shape: Sequence[int], p: float, key: RngKey, layer: int, call: int, device: torch.device) -> Tensor:
    """Boolean mask of `shape` ([batch, ...]), False where dropout number `call` inside `layer` drops an element.

    Raises ValueError if the batch is not as long as `key.sample_ids`.
    """
    if not shape or shape[0] != len(key.sample_ids):
        raise ValueError(
            f"dropout in layer {layer} has input of shape {tuple(shape)}; the first dimension must be the batch of "
            f"{len(key.sample_ids)} samples that the key names"
        )
    numel = 1
    for size in shape[1:]:
        numel *= size
    seeds = [derive(key.seed, "dropout", key.step, sample, layer, call) for sample in key.sample_ids]
    words = random_words(torch.tensor(seeds, dtype=torch.int64, device=device), -(-numel // 4))
    keep = words.view(torch.int16)[:, :numel] >= _dropped_levels(p) - _LEVELS // 2
    return keep.reshape(tuple(shape))


def _dropped_levels(p: float) -> int:
    return min(round(p * _LEVELS), _LEVELS - 1)


class _KeyedDropout(TorchFunctionMode):
    def __init__(self, key: RngKey, layer: int) -> None:
        super().__init__()
        self._key, self._layer, self._call = key, layer, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if func is functional.dropout or func is torch.dropout:
            return self._drop(*args, **kwargs)
        if func in _UNKEYED or (func is functional.scaled_dot_product_attention and _attention_drops(*args, **kwargs)):
            raise NotImplementedError(
                f"layer {self._layer} draws random numbers inside {func.__name__}, which cannot be keyed by sample; "
                "allowed: torch.nn.functional.dropout (for attention: the eager implementation)"
            )
        return func(*args, **kwargs)

    def _drop(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, train: bool | None = None
    ) -> Tensor:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout probability is {p}; expected 0 to 1")
        if not (training if train is None else train) or p == 0.0:
            return input
        if p == 1.0:
            output = input * 0.0
        else:
            keep = keyed_mask(input.shape, p, self._key, self._layer, self._call, input.device)
            output = input.masked_fill(~keep, 0.0) * (_LEVELS / (_LEVELS - _dropped_levels(p)))
        self._call += 1
        return input.copy_(output) if inplace else output


_UNKEYED = {
    functional.alpha_dropout, functional.feature_alpha_dropout, functional.dropout1d, functional.dropout2d,
    functional.dropout3d, torch.dropout_, torch.native_dropout, torch.bernoulli,
}  # fmt: skip


def _attention_drops(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *_: Any, **__: Any
) -> bool:
    return dropout_p > 0.0


def keyed_dropout(key: RngKey, layer: int) -> TorchFunctionMode:
    """A context in which nn.Dropout and functional.dropout draw the masks of `layer` for the samples of `key`.

    Enter it anew for every run of the layer, and inside the function that is checkpointed: calls are numbered from
    the entry, and modes belong to a thread, which for a recomputation is autograd's. Other kinds of dropout raise
    NotImplementedError, so that nothing random goes unkeyed.
    """
    return _KeyedDropout(key, layer)
