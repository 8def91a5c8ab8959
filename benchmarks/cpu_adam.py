"""AdamW on weights in host memory: torch's fused one and DeepSpeed's C++ one, turn by turn on the same numbers.

    python benchmarks/cpu_adam.py --threads 1 --out benchmarks/results

The faster one is the default of --cpu-adam. Needs deepspeed, which compiles its part when first used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from pipeline.state.cpu_adam import make_adamw

NAMES = ("torch", "deepspeed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--millions", type=int, default=32, help="parameters, in tensors of four millions")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    first = [torch.randn(4 << 20) for _ in range(max(1, options.millions // 4))]
    gradients = [torch.randn_like(tensor) for tensor in first]
    optimizers, parameters = {}, {}
    for name in NAMES:
        parameters[name] = [torch.nn.Parameter(tensor.clone()) for tensor in first]
        groups: list[dict[str, object]] = [{"params": parameters[name], "weight_decay": 0.1}]
        optimizers[name] = make_adamw(groups, name, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
        for parameter, gradient in zip(parameters[name], gradients, strict=True):
            parameter.grad = gradient.clone()
            optimizers[name].state[parameter] = {
                "step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(options.steps):
        for name in NAMES:
            began = time.perf_counter()
            optimizers[name].step()
            times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values[2:]) for name, values in times.items()}
    ratios = [d / t for t, d in zip(times["torch"][2:], times["deepspeed"][2:], strict=True)]
    gap = max(
        float((a - b).detach().abs().max()) for a, b in zip(parameters["torch"], parameters["deepspeed"], strict=True)
    )
    found = {
        "parameters": 4 * len(first) << 20, "threads": options.threads, "steps": options.steps, "seconds": median,
        "deepspeed_over_torch": statistics.median(ratios), "spread": [min(ratios), max(ratios)], "largest_gap": gap,
        "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if options.out:
        (options.out / "cpu_adam.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
