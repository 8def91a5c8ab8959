"""Which device each worker takes, and whether links and reductions go over NCCL."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from jobs.config import ConfigError


@dataclass(frozen=True)
class Devices:
    """CUDA devices of this machine (0: the CPU). NCCL needs a device per worker; else the host carries."""

    cuda: int
    nccl: bool

    def of(self, local_index: int) -> str:
        """The device of the worker with this number among those of the machine."""
        return f"cuda:{local_index % self.cuda}" if self.cuda else "cpu"


def count_cuda() -> int:
    """CUDA devices present, counted without touching CUDA: a process that has cannot fork workers that use it."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return torch.cuda.device_count() if torch.backends.cuda.is_built() else 0


def find_devices(wanted: str, workers_here: int) -> Devices:
    """The devices for `auto`, `cpu` or `cuda`. Raises ConfigError when CUDA is asked for and there is none."""
    cuda = 0 if wanted == "cpu" else count_cuda()
    if wanted == "cuda" and not cuda:
        raise ConfigError("device is 'cuda', but no CUDA device is present; allowed here: cpu, auto")
    return Devices(cuda, nccl=cuda >= workers_here > 1)


def device_bytes() -> int:
    """Memory of the smallest CUDA device, asked of the driver's own tool: who asks CUDA itself cannot fork workers that
    use it. Raises ConfigError where that is not to be had."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return min(int(mib) for mib in told) << 20
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"span_mib is 0, but what memory the CUDA devices have is not known ({' '.join(command)}: {error}); "
            "allowed: the MiB that the weights of a span may take"
        ) from error


def span_mib(memory: int, dtype: str) -> int:
    """MiB of fp32 weights that a span may have, so that the weights of two, as they are computed in, and the fp32
    gradients of two take half of a device's memory."""
    times = 2 * (0.5 if dtype == "bfloat16" else 1.0) + 2
    return max(1, int(memory / 2 / times) >> 20)
