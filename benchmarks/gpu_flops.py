"""Model FLOPs and peak rates, for MFU.

To be replaced by pipeline/model/flops.py, which counts the FLOPs of each layer: `model_flops` is the one place.
"""

from __future__ import annotations

from typing import Any

PEAK_BF16 = {"H200": 989.4e12, "H100 PCIe": 756e12, "H100": 989.4e12, "A100": 312e12}
"""Name in the device's -> dense bf16 FLOP/s, from NVIDIA's data sheets (the SXM parts where nothing else is said)."""


def model_flops(config: Any, sequence: int) -> float:
    """FLOPs per token of a forward and a backward, recomputation not counted: 6 N + 12 L H S (Chowdhery et al., PaLM,
    arXiv 2204.02311, appendix B). N are the weights that are multiplied with: the embedding's look-up is not, a tied
    head's product is. L blocks, H heads times their size, S tokens that are seen."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    hidden = config.hidden_size
    block = hidden * size * (2 * heads + 2 * kv) + 3 * hidden * config.intermediate_size
    weights = config.num_hidden_layers * block + hidden * config.vocab_size
    return 6.0 * weights + 12.0 * config.num_hidden_layers * heads * size * sequence


def peak_flops(device: str | None) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None for one that is not in the table."""
    return next((peak for name, peak in PEAK_BF16.items() if device and name in device), None)
