"""What a benchmark says of speed and memory beside tokens a second: model FLOP/s, their share of a stated peak, bytes.

    python benchmarks/utilisation.py --threads 2      # the peak of so many threads, in TFLOP/s

Model FLOPs are counted as in metrics.jsonl (pipeline/model/flops.py). The peak of a CPU is measured, in the same run as
what is held against it and in a process of its own: the best rate of fp32 products of two square matrices, on as many
threads as the contender has, at most one a core. That of a GPU is its data sheet's (pipeline/runtime/peak_flops.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The packages come before scripts beside this one: recovery is both.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import PreTrainedConfig

from pipeline.model.flops import ModelFlops
from pipeline.model.layered import LayeredModel
from pipeline.runtime.peak_flops import known_peak, products_of
from pipeline.runtime.peak_memory import PEAK_BYTES, PeakMemory, told

SIZE, SECONDS, LEAST = 1024, 1.0, 3

Peak = Mapping[str, Any]
"""`peak_tflops`, None where it is not known, and `peak_of`: what it is the peak of, and how that is known."""


def step_flops(config: PreTrainedConfig, microbatches: int, batch: int, sequence: int) -> int:
    """Model FLOPs of a step of so many microbatches [batch, sequence]."""
    model = LayeredModel(config)
    return microbatches * ModelFlops.of(model, batch, sequence).microbatch(range(model.num_layers))


def products(threads: int) -> float:
    """FLOP/s of this process with so many threads: the best of all products in SECONDS, of at least LEAST."""
    torch.set_num_threads(threads)
    a, b, rates, until = torch.rand(SIZE, SIZE), torch.rand(SIZE, SIZE), list[float](), time.monotonic() + SECONDS
    while time.monotonic() < until or len(rates) < LEAST:
        began = time.perf_counter()
        torch.mm(a, b)
        rates.append(2 * SIZE**3 / (time.perf_counter() - began))
    return max(rates)


def cpu_peak(threads: int) -> Peak:
    """That of all workers of a contender, which have so many threads together."""
    count = min(threads, len(os.sched_getaffinity(0)))
    environment = {**os.environ, "OMP_NUM_THREADS": str(count)}
    command = [sys.executable, __file__, "--threads", str(count)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    about = f"fp32 products of {SIZE} x {SIZE} on {count} CPU thread(s), measured in this run"
    return {"peak_tflops": json.loads(found.stdout)["peak_tflops"], "peak_of": about}


def gpu_peak(device: torch.device, devices: int = 1, autocast: torch.dtype | None = None) -> Peak:
    """That of so many GPUs like this one."""
    name, kind = torch.cuda.get_device_name(device), products_of(autocast)
    peak = known_peak(name, kind)
    about = f"{devices} {name}, dense {kind}, data sheet"
    return {"peak_tflops": None if peak is None else devices * peak / 1e12, "peak_of": about}


def stated(tflops: float | None, threads: int) -> Peak:
    """What the caller has measured for all its contenders, else what is measured here."""
    return cpu_peak(threads) if tflops is None else {"peak_tflops": tflops, "peak_of": "stated with --peak-tflops"}


def reached(flops: float, seconds: float, peak: Peak) -> dict[str, Any]:
    """Of a step: `tflops` a second, and `mfu`, which is None where no peak is known."""
    tflops, most = flops / seconds / 1e12, peak["peak_tflops"]
    return {"tflops": tflops, "mfu": None if most is None else tflops / most, **peak}


def memory(host: Sequence[int], device: Sequence[int] = ()) -> dict[str, int]:
    """Of processes that had so many bytes at most: the most of one, and all together."""
    return told(PeakMemory(*each) for each in zip(host, device or [0] * len(host), strict=True))


def of_run(metrics: Sequence[Mapping[str, Any]], peak: Peak, skipped: int = 0) -> dict[str, Any]:
    """From the lines of a run's metrics.jsonl, without the first steps: the median rate, and the most memory."""
    timed = metrics[skipped:] or metrics
    found = reached(1e12 * statistics.median(line["tflops"] for line in timed), 1.0, peak)
    return found | {name: max(line[name] for line in metrics) for name in PEAK_BYTES if name in metrics[-1]}


def middle(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several runs of `of_run`, the median rates, and the most memory."""
    rates = {name: statistics.median(run[name] for run in runs) for name in ("tflops", "mfu", "peak_tflops")}
    most = {name: max(run[name] for run in runs) for name in PEAK_BYTES if name in runs[0]}
    return {**rates, "peak_of": runs[0]["peak_of"], **most}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(json.dumps({"threads": options.threads, "peak_tflops": products(options.threads) / 1e12}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
