"""What a device knows and the host does not: when ops began and ended, and what numbers came out.

An op on CUDA has only been queued when its call returns. So times are events on the stream, and numbers are read for
all at once, at the end of a step: between, nothing waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
Mark = Any
"""A moment: seconds of time.monotonic, or an event on a stream."""


class Clock:
    """Marks moments of the work on a device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        self._began_s, self._began = time.monotonic(), self.mark()

    @property
    def idle(self) -> bool:
        """Whether nothing is queued for the device."""
        return self._stream is None or self._stream.query()

    def at(self, mark: Mark) -> float:
        """A moment in seconds of time.monotonic; waits for it. Of a device, exact if it was idle at the beginning."""
        return self._began_s + self.seconds(self._began, mark)

    def mark(self) -> Mark:
        """The moment at which all work that has been queued so far is done."""
        if self._stream is None:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def seconds(self, since: Mark, until: Mark) -> float:
        """Between two moments; waits for the later one."""
        if self._stream is None:
            return until - since
        until.synchronize()
        return 1e-3 * since.elapsed_time(until)


def read_back(numbers: Mapping[Key, Tensor | float]) -> dict[Key, float]:
    """Scalars, of whatever type and on one device, as Python numbers: with one copy to the host for all of them."""
    tensors = [value for value in numbers.values() if isinstance(value, Tensor)]
    kinds = {tensor.dtype for tensor in tensors}
    read = iter(torch.stack(tensors if len(kinds) == 1 else [t.double() for t in tensors]).tolist() if tensors else ())
    return {key: float(next(read) if isinstance(value, Tensor) else value) for key, value in numbers.items()}
