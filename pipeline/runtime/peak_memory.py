"""The most memory that a process has had, on the host and on its device."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.wire import checked

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one process, or of many. `host` is resident memory since it began, pages included that it shares with
    others: those of its parent that it has not written to, and mappings; so sums over processes count these more than
    once. `device` is what torch's allocator had given out at most, since it was last asked: 0 on the CPU."""

    host: int = 0
    device: int = 0

    def up_to(self, other: PeakMemory) -> PeakMemory:
        """The peaks of this time and of another one together."""
        return PeakMemory(max(self.host, other.host), max(self.device, other.device))

    def as_json(self) -> dict[str, int]:
        return {"host": self.host, "device": self.device}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PeakMemory:
        """Raises WireError for what is none."""
        return cls(**checked(values, "a peak of memory", host=int, device=int))


def peak_memory(device: torch.device) -> PeakMemory:
    """That of this process. What the device has had is forgotten, so that the next call tells of what comes now."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    host = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type != "cuda":
        return PeakMemory(host)
    import torch  # who only reads records needs none of it

    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return PeakMemory(host, most)


PEAK_BYTES = ("peak_host_bytes", "peak_host_bytes_sum", "peak_device_bytes", "peak_device_bytes_sum")


def told(peaks: Iterable[PeakMemory]) -> dict[str, int]:
    """Of some processes, what a record says under PEAK_BYTES: the most of one, and all together; of devices only where
    there are any."""
    each = [(peak.host, peak.device) for peak in peaks]
    kinds = [(max(values), sum(values)) for values in zip(*each)]
    return {name: value for name, value in zip(PEAK_BYTES, (n for kind in kinds for n in kind)) if value}
