"""How many operations a second a device could do at most: what a utilisation is measured against.

Peaks are those of dense products (data sheets that give figures "with sparsity" are halved), from NVIDIA's data sheet
of each product, and for GeForce cards from the white papers of their architectures (GA102, AD102, GB202);
half-precision products add up in fp32. A device that is not in the table, and a CPU, has
a peak only where a person states one (`--peak-tflops`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.runtime.compute import Settings
from pipeline.wire import Kind, checked

BF16, FP16, TF32, FP32 = "bf16", "fp16", "tf32", "fp32"


def _tflops(half: float, tf32: float | None, fp32: float) -> Mapping[str, float]:
    """Of a device from Ampere on, where bf16 is as fast as fp16; those before it have fp16 alone."""
    return {FP16: half, FP32: fp32, **({} if tf32 is None else {BF16: half, TF32: tf32})}


PEAK_TFLOPS: tuple[tuple[str, Mapping[str, float]], ...] = (
    (r"GB200", _tflops(2500, 1250, 80)),
    (r"B200", _tflops(2250, 1125, 75)),
    (r"GH200", _tflops(989.4, 494.7, 66.9)),
    (r"H200 NVL", _tflops(835.5, 417.5, 60)),
    (r"H200", _tflops(989.4, 494.7, 66.9)),
    (r"H100 NVL", _tflops(835.5, 417.5, 60)),
    (r"H100 PCIe", _tflops(756, 378, 51.2)),
    (r"H100|H800", _tflops(989.4, 494.7, 66.9)),  # SXM: "NVIDIA H100 80GB HBM3"
    (r"H20", _tflops(148, 74, 44)),
    (r"A100|A800", _tflops(312, 156, 19.5)),
    (r"A40", _tflops(149.7, 74.8, 37.4)),
    (r"A30", _tflops(165, 82, 10.3)),
    (r"A10", _tflops(125, 62.5, 31.2)),
    (r"RTX A6000", _tflops(154.8, 77.4, 38.7)),
    (r"L40S", _tflops(362.05, 183, 91.6)),
    (r"L40", _tflops(181.05, 90.5, 90.5)),
    (r"L4", _tflops(121, 60, 30.3)),
    (r"RTX 5090", _tflops(209.5, 104.8, 104.8)),
    (r"RTX 4090", _tflops(165.2, 82.6, 82.6)),
    (r"RTX 3090", _tflops(71, 35.6, 35.6)),
    (r"V100-SXM\d", _tflops(125, None, 15.7)),
    (r"V100", _tflops(112, None, 14)),
    (r"T4", _tflops(65, None, 8.1)),
)
"""(what stands in the name that torch.cuda.get_device_name gives, as whole words; kind of product -> TFLOP/s): the
first that fits."""


def known_peak(name: str, products: str) -> float | None:
    """FLOP/s of a device of this name with products of a kind, where both are in the table. A variant of a device
    ("RTX 4090 D", "RTX 3090 Ti") is another one, and so is a part of one (MIG): these are not known."""
    for words, peaks in PEAK_TFLOPS:
        if re.search(rf"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])(?! (?:D|Ti|SUPER|Laptop)\b)(?!.*\bMIG\b)", name):
            return None if products not in peaks else 1e12 * peaks[products]
    return None


def products_of(autocast: torch.dtype | None) -> str:
    """The kind of product that matrices are multiplied with on CUDA."""
    if autocast is not None:
        return {torch.bfloat16: BF16, torch.float16: FP16}[autocast]
    return FP32 if torch.get_float32_matmul_precision() == "highest" else TF32


@dataclass(frozen=True)
class Capability:
    """A device, by a name that no other device has, and its peak in FLOP/s, None where that is not known."""

    device: str
    peak: float | None = None

    @classmethod
    def of(cls, settings: Settings, worker: int) -> Capability:
        """That of a worker's device; what the settings state comes before the table. Workers of one CUDA device share
        it; of the CPU each worker has a device of its own: its threads."""
        stated = None if settings.peak_tflops is None else 1e12 * settings.peak_tflops
        device = settings.device
        if device.type != "cuda":
            return cls(f"{device.type} of worker {worker}", stated)
        known = known_peak(torch.cuda.get_device_name(device), products_of(settings.autocast))
        return cls(str(torch.cuda.get_device_properties(device).uuid), stated or known)

    def as_json(self) -> dict[str, Any]:
        return {"device": self.device, "peak": self.peak}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Capability:
        """Raises WireError for what is none."""
        kinds: dict[str, Kind] = {"device": str, "peak": float | None}
        return cls(**checked(values, "a device's capability", **kinds))


UNKNOWN = Capability("unknown")


def together(capabilities: Iterable[Capability]) -> float | None:
    """FLOP/s of all these devices, each counted once; None where one is not known, or there is none."""
    peaks = {each.device: each.peak for each in capabilities}
    known = [peak for peak in peaks.values() if peak is not None]
    return sum(known) if known and len(known) == len(peaks) else None
