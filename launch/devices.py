"""Which device each worker takes, and whether links and reductions go over NCCL."""

from __future__ import annotations

import os
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
