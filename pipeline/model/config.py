"""What the sizes in a model's config may be: refused by field, before transformers or torch make something of them.

The table has the names that all families share; a message calls a field as the family does (GPT-2's n_embd).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from pipeline.reading import numbers


class SizeError(ValueError):
    """A size that no model can have. The message names the field, its value and what is allowed."""


_WHOLE = {
    "hidden_size": 2**20, "num_hidden_layers": 4096, "num_attention_heads": 2**16, "num_key_value_heads": 2**16,
    "head_dim": 2**16, "intermediate_size": 2**24, "n_inner": 2**24, "vocab_size": 2**24,
    "max_position_embeddings": 2**31, "sliding_window": 2**31,
}  # fmt: skip
"""Field -> the largest whole number that it may be; 1 is the least, and null is as if it were not there."""
_ABOVE_ZERO = {
    "rms_norm_eps": 1.0, "layer_norm_eps": 1.0, "layer_norm_epsilon": 1.0, "rope_theta": 1e12,
    "final_logit_softcapping": 1e6, "attn_logit_softcapping": 1e6, "query_pre_attn_scalar": 1e6,
}  # fmt: skip
_SHARES = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")


def check_fields(values: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raise SizeError for the first field of a config file that is wrong by itself. `names`: the family's own names of
    the shared ones."""
    for path, number in numbers(values):
        _require(math.isfinite(number), path, number, "a finite number")
        if path.rpartition(".")[2] == "rope_theta":
            _require(0 < number <= 1e12, path, number, "a number above 0, up to 1e+12")
    for shared, most in _WHOLE.items():
        for name in sorted({shared, names.get(shared, shared)} & set(values)):
            value = values[name]
            whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
            _require(value is None or whole, name, value, f"a whole number of 1 to {most}")
    for name, most in _ABOVE_ZERO.items():
        value = values.get(name)
        good = value is None or (_is_number(value) and 0 < value <= most)
        _require(good, name, value, f"a number above 0, up to {most:g}")
    for name in _SHARES:
        value = values.get(name)
        good = value is None or (_is_number(value) and 0 <= value < 1)
        _require(good, name, value, "a number of 0 or more and below 1")
    value = values.get("initializer_range", 0)
    _require(_is_number(value) and 0 <= value <= 100, "initializer_range", value, "a number of 0 to 100")


def check_together(config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
    """Raise SizeError for sizes that do not fit each other: those in the file, and where it is silent the defaults."""
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not hidden or not heads:
        return  # of a kind that is not supported, and will be refused for that
    its = {name: config.attribute_map.get(name, name) for name in ("hidden_size", "num_attention_heads")}
    allowed = f"{its['num_attention_heads']} ({heads})"
    groups = getattr(config, "num_key_value_heads", None) or heads
    _require(heads % groups == 0, "num_key_value_heads", groups, f"a divisor of {allowed}")
    head = getattr(config, "head_dim", None) or hidden // heads
    if values.get("head_dim") is None and head == hidden // heads:
        _require(hidden % heads == 0, its["hidden_size"], hidden, f"a multiple of {allowed}")
    if hasattr(config, "rope_parameters"):
        _require(head % 2 == 0, "head_dim", head, "an even number: positions turn its two halves")
    padding, vocabulary = config.pad_token_id, int(config.vocab_size)
    inside = padding is None or -vocabulary <= padding < vocabulary
    _require(inside, "pad_token_id", padding, f"below vocab_size ({vocabulary})")


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise SizeError(f"{name} is {value!r:.40}; allowed: {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
