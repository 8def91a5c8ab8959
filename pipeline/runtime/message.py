"""What is said of a payload, whatever link carries it: a header of one size, and when a slow link would deliver it."""

from __future__ import annotations

import math
import struct
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.runtime.mailbox import LinkError
from pipeline.schedule.ops import COMPUTE, Op

HEADER_BYTES = 128
_HEADER = struct.Struct("<8qd4q")  # view, step, kind, lo, hi, microbatch, dtype, ndim, deliver_at, shape
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Header:
    """Whose output a payload is, in which view and step, when it is to be delivered (time.monotonic seconds, 0 at
    once), and its form: at most 4 dimensions."""

    view: int
    step: int
    op: Op
    dtype: torch.dtype
    shape: tuple[int, ...]
    deliver_at: float = 0.0

    @classmethod
    def of(cls, view: int, step: int, op: Op, payload: Tensor, deliver_at: float = 0.0) -> Header:
        """Raises LinkError for what has no form."""
        if payload.dim() > _MOST_DIMENSIONS or payload.dtype not in _DTYPES:
            raise LinkError(f"{op} has a payload of {payload.dim()} dimensions of {payload.dtype}; links carry up to 4")
        return cls(view, step, op, payload.dtype, tuple(payload.shape), deliver_at)

    @property
    def num_bytes(self) -> int:
        """Of the payload."""
        return self.dtype.itemsize * math.prod(self.shape)

    def pack(self) -> bytes:
        """HEADER_BYTES of it."""
        op, shape = self.op, (*self.shape, 0, 0, 0, 0)[:_MOST_DIMENSIONS]
        packed = _HEADER.pack(
            self.view, self.step, COMPUTE.index(op.kind), *op.span, op.microbatch, _DTYPES.index(self.dtype),
            len(self.shape), self.deliver_at, *shape,
        )  # fmt: skip
        return packed.ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes, most_bytes: int) -> Header:
        """From what `pack` has given, of a payload of `most_bytes` at most. Raises LinkError for what is none."""
        if len(data) < _HEADER.size:
            raise LinkError(f"a message is none: a header of {len(data)} bytes")
        fields = _HEADER.unpack_from(data)
        view, step, kind, lo, hi, microbatch, dtype, ndim, deliver_at = fields[:9]
        known = 0 <= kind < len(COMPUTE) and 0 <= dtype < len(_DTYPES) and 0 <= ndim <= _MOST_DIMENSIONS
        if not known or min(fields[9:]) < 0 or not math.isfinite(deliver_at):
            raise LinkError(f"a message is none: its header says {fields}")
        op = Op(COMPUTE[kind], (lo, hi), microbatch)
        found = cls(view, step, op, _DTYPES[dtype], fields[9 : 9 + ndim], deliver_at)
        if found.num_bytes > most_bytes:
            raise LinkError(f"a message is none: {found.num_bytes} bytes of payload; there is room for {most_bytes}")
        return found


@dataclass(frozen=True)
class Shape:
    """What a slow link adds, per direction: seconds before the first byte arrives, and bytes per second.

    A message holds an `exclusive` link until it has arrived, any other while its bytes go in.
    """

    latency_s: float = 0.0
    bandwidth: float = float("inf")
    exclusive: bool = False


@dataclass
class Timing:
    """When messages of one direction of a link are to be delivered."""

    shape: Shape | None = None
    _free_at: float = 0.0

    def deliver_at(self, num_bytes: int) -> float:
        """In time.monotonic seconds of the next message, 0 at once."""
        if self.shape is None:
            return 0.0
        self._free_at = max(self._free_at, time.monotonic()) + num_bytes / self.shape.bandwidth
        at = self._free_at + self.shape.latency_s
        if self.shape.exclusive:
            self._free_at = at
        return at
