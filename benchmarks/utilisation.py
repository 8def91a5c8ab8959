"""What a benchmark says of speed and memory beside tokens a second: model FLOP/s, their share of a stated peak, bytes.

    python benchmarks/utilisation.py      # the peak of a thread, in TFLOP/s

Model FLOPs are counted as in metrics.jsonl (pipeline/model/flops.py). The peak of a CPU is measured, in the same run as
what is held against it and in processes of its own: as many as the contender has threads, at most one a core, form fp32
products of two square matrices at once on a thread each, and the best rates of all are added up. That of a GPU is its
data sheet's (pipeline/runtime/peak_flops.py).
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

SIZE, SECONDS, LEAST, DEADLINE_S = 1024, 1.0, 3, 120.0

Peak = Mapping[str, Any]
"""`peak_tflops`, None where it is not known, and `peak_of`: what it is the peak of, and how that is known."""


def step_flops(config: PreTrainedConfig, microbatches: int, batch: int, sequence: int) -> int:
    """Model FLOPs of a step of so many microbatches [batch, sequence]."""
    model = LayeredModel(config)
    return microbatches * ModelFlops.of(model, batch, sequence).microbatch(range(model.num_layers))


def products() -> float:
    """FLOP/s of a thread: the best of all products in SECONDS, of at least LEAST."""
    torch.set_num_threads(1)
    a, b, rates, until = torch.rand(SIZE, SIZE), torch.rand(SIZE, SIZE), list[float](), time.monotonic() + SECONDS
    while time.monotonic() < until or len(rates) < LEAST:
        began = time.perf_counter()
        torch.mm(a, b)
        rates.append(2 * SIZE**3 / (time.perf_counter() - began))
    return max(rates)


def cpu_peak(threads: int) -> Peak:
    """That of all workers of a contender, which have so many threads together."""
    count = min(threads, len(os.sched_getaffinity(0)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    each = [
        subprocess.Popen([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        rates = [json.loads(process.communicate(timeout=DEADLINE_S)[0])["peak_tflops"] for process in each]
    finally:
        for process in each:
            process.kill()
            process.wait()
    about = f"fp32 products of {SIZE} x {SIZE} on {count} CPU thread(s), measured in this run"
    return {"peak_tflops": sum(rates), "peak_of": about}


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
    parser.parse_args()
    print(json.dumps({"peak_tflops": products() / 1e12}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
