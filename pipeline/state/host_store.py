"""The state of a model in named shared memory of the host: it outlives every worker, and no worker has a copy of it.

One file in /dev/shm holds weights, fp32 gradients, AdamW's moments, the hidden states between spans and the blocks into
which workers write gradients before they count. Where each lies follows from the model and the settings alone, so a
worker that attaches needs the path and nothing else. The file is reserved whole before anything is written, and it goes
with the process that made it; what a killed one has left is found by its name and removed.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

import psutil
import torch
from torch import Tensor

from pipeline.locks import lock, unlock
from pipeline.model.layered import LayeredModel
from pipeline.schedule.ops import Span
from pipeline.schedule.work_units import Cut
from pipeline.state.optimizer import OptimizerConfig

ALIGN = 64
"""Bytes: a cache line, and what vector loads want."""
_SHARED = Path("/dev/shm")
_PAGE = mmap.PAGESIZE
_TRAVELS, _END = "travels", "end"  # names of places that hold nothing


class HostMemoryError(RuntimeError):
    """The host has not enough memory, or the store of a run is in use or gone. Says what was needed and found."""


class Placed(Protocol):
    """Where tensors lie in a piece of host memory."""

    hint: ClassVar[str]
    """What needs less, for the message that there is not enough."""

    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True)
class StoreLayout:
    """Name -> place of every tensor of a store. All are fp32 but `version/*` and `tally/*`, which are int64, and what
    goes to and from devices: hidden states and the weights of linear maps are in the dtype that is computed in, and
    blocks of gradients in that of `gradients`. Such weights are copies, `narrow-*`, of those that are updated.

    `batch` x `sequence` is the shape of a microbatch; `blocks` how many gradient blocks there are. `tally/B` says what
    block B holds: the order that it was written for, and how often each microbatch was added to it. With `behind`, two
    iterations may be under way: there are two sets of hidden states, and beside the weights that the optimizer writes
    two copies that workers read, in turn. What is not trained has one place, and neither gradient nor moments.
    """

    hint: ClassVar[str] = "fewer or smaller microbatches need less, as do fewer workers"
    model: LayeredModel
    cut: Cut
    microbatches: int
    batch: int
    sequence: int
    blocks: int
    behind: bool = False
    compute: torch.dtype = torch.float32
    gradients: torch.dtype = torch.float32
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """The layers whose input must be kept: where a forward or a backward span begins, layer 0 aside."""
        starts = {lo for lo, _ in (*self.cut.forward, self.cut.fused, *self.cut.backward)}
        return tuple(sorted(starts - {0}))

    @cached_property
    def block_size(self) -> int:
        """Elements of the largest gradient of a span."""
        return max(self.gradient_size(span) for span in (self.cut.fused, *self.cut.backward))

    def travels(self, layer: int) -> dict[str, torch.dtype]:
        """Full name of all that a layer computes with, a tied head's weight included -> what it goes to a device in."""
        narrow = self.model.multiplied(layer)
        return {n: self.compute if n in narrow else torch.float32 for n in self.model.shapes(layer)}

    def weight_bytes(self, span: Span) -> int:
        """Bytes of these, for all layers of a span."""
        return sum(
            _aligned(dtype.itemsize * math.prod(self.model.shapes(layer)[name]))
            for layer in range(*span)
            for name, dtype in self.travels(layer).items()
        )

    def gradient_size(self, span: Span) -> int:
        """Elements of the gradient of what is trained among that."""
        return sum(math.prod(shape) for layer in range(*span) for shape in self._differentiated(layer).values())

    def _differentiated(self, layer: int) -> dict[str, tuple[int, ...]]:
        shapes = self.model.shapes(layer)
        return {name: shapes[name] for name in self.model.differentiated(layer)}

    @cached_property
    def places(self) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
        """Name -> (offset in bytes, shape, dtype)."""
        found: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        at = 0

        def place(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
            nonlocal at
            found[name] = at, shape, dtype
            at += _aligned(dtype.itemsize * math.prod(shape))

        model, layers = self.model, range(self.model.num_layers)
        owned = {key: model.shapes(layer)[key] for layer in layers for key in model.keys(layer)}
        trained = {key: layer for layer in layers for key in model.trainable(layer)}
        for key, layer in trained.items():
            for kind in self.optimizer.kinds(len(owned[key]), layer in model.blocks):
                if kind != "step":
                    place(f"{kind}/{key}", owned[key])
        for layer in layers:
            place(f"grad/{layer}", (self.gradient_size((layer, layer + 1)),))
        for key in owned:
            if torch.float32 not in self._in[key]:
                place(f"param/{key}", owned[key])
        found[_TRAVELS] = at, (), torch.uint8  # from here on, what is copied to and from devices
        read = {f"read{side}": list(trained) for side in (0, 1) if self.behind}
        for kind, keys in {"param": owned, **read}.items():
            place(f"version/{kind}", (model.num_layers,), torch.int64)
            for key in keys:
                for dtype in self._in[key]:
                    place(f"{'' if dtype == torch.float32 else 'narrow-'}{kind}/{key}", owned[key], dtype)
        for block in range(self.blocks):
            place(f"block/{block}", (self.block_size,), self.gradients)
            place(f"tally/{block}", (1 + self.microbatches,), torch.int64)
        hidden = (self.batch, self.sequence, model.hidden_size)
        for side in range(2 if self.behind else 1):
            for m in range(self.microbatches):
                for boundary in self.boundaries:
                    place(f"x{side}/{m}/{boundary}", hidden, self.compute)
                    place(f"dx{side}/{m}/{boundary}", hidden, self.compute)
        found[_END] = at, (), torch.uint8
        return found

    @cached_property
    def _in(self) -> dict[str, set[torch.dtype]]:
        """Weight -> what it goes to devices in: a tied one in both."""
        found: dict[str, set[torch.dtype]] = {}
        for layer in range(self.model.num_layers):
            for name, dtype in self.travels(layer).items():
                found.setdefault(name, set()).add(dtype)
        return found

    @property
    def travelling(self) -> int:
        """The byte from which on all lies that is copied to and from devices: what only the host works with is
        before."""
        return self.places[_TRAVELS][0]

    @property
    def num_bytes(self) -> int:
        """Of the whole store."""
        return self.places[_END][0]

    def weight_views(self, layers: Sequence[int], flat: Tensor) -> dict[int, dict[str, Tensor]]:
        """Layer -> name -> its part of the bytes that begin with the weights of the first of `layers`."""
        views: dict[int, dict[str, Tensor]] = {}
        at = 0
        for layer in layers:
            shapes, views[layer] = self.model.shapes(layer), {}
            for name, dtype in self.travels(layer).items():
                size = dtype.itemsize * math.prod(shapes[name])
                views[layer][name] = flat[at : at + size].view(dtype).view(shapes[name])
                at += _aligned(size)
        return views

    def gradient_views(self, layers: Sequence[int], flat: Tensor) -> dict[int, dict[str, Tensor]]:
        """Layer -> name of what is trained -> its part of a flat gradient that begins with the first of `layers`."""
        views: dict[int, dict[str, Tensor]] = {}
        at = 0
        for layer in layers:
            views[layer] = {}
            for name, shape in self._differentiated(layer).items():
                views[layer][name] = flat[at : at + math.prod(shape)].view(shape)
                at += math.prod(shape)
        return views


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def store_path(out: Path) -> Path:
    """Where the store of a run folder lies: in shared memory where there is some, under a name made of the folder's."""
    digest = hashlib.blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()
    root = _SHARED if _SHARED.is_dir() else out
    return root / f"unbroken-{os.getuid()}-{digest}"


def stores(root: Path | None = None) -> list[Path]:
    """The stores of this user that lie in a folder; unset, in shared memory."""
    root = _SHARED if root is None else root
    return sorted(path for path in root.glob(f"unbroken-{os.getuid()}-*") if path.is_file())


class HostMemory:
    """A piece of host memory with a name, made by `create` or attached to."""

    def __init__(self, layout: Placed, path: Path) -> None:
        """Attach. Raises HostMemoryError where there is no such store or it is of another layout."""
        self.path = path
        size = path.stat().st_size if path.is_file() else -1
        if size != layout.num_bytes:
            found = "nothing" if size < 0 else f"{size} bytes"
            raise HostMemoryError(f"host store {path}: found {found}; this run's has {layout.num_bytes} bytes")
        storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=size)
        self._whole = torch.empty(0, dtype=torch.uint8).set_(cast(torch.UntypedStorage, storage))
        self._lock = -1

    @classmethod
    def create(cls, layout: Placed, path: Path) -> Self:
        """Reserve the memory, all zeros, and hold it until `close`. Raises HostMemoryError, naming needed and found."""
        try:
            descriptor = lock(path, 0o600)
        except BlockingIOError as error:
            raise HostMemoryError(f"host store {path} is in use: another run trains in the same folder") from error
        try:
            os.ftruncate(descriptor, 0)  # of a run that was killed
            needed = layout.num_bytes
            free = min(shutil.disk_usage(path.parent).free, psutil.virtual_memory().available)
            if needed > free:
                raise HostMemoryError(
                    f"host memory: {needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are available in "
                    f"{path.parent}; {layout.hint}"
                )
            os.posix_fallocate(descriptor, 0, needed)  # else a full host would end a worker with SIGBUS much later
            store = cls(layout, path)
        except BaseException:
            unlock(path, descriptor)
            raise
        store._lock = descriptor
        return store

    def view(self, offset: int, shape: Sequence[int], kind: torch.dtype) -> Tensor:
        """The tensor of that shape and kind that begins at a byte."""
        return self._whole[offset : offset + kind.itemsize * math.prod(shape)].view(kind).view(tuple(shape))

    def pin(self, first: int = 0) -> None:
        """Register the mapping with CUDA from a byte on, so that copies need no staging. Raises HostMemoryError."""
        runtime: Any = torch.cuda.cudart()
        self._pinned = self._whole[first // _PAGE * _PAGE :]
        if result := int(runtime.cudaHostRegister(self._pinned.data_ptr(), self._pinned.numel(), 0)):
            raise HostMemoryError(f"host store {self.path}: cudaHostRegister failed with error {result}")

    def unpin(self) -> None:
        """Undo `pin`, before another mapping comes to lie where this one does."""
        cast(Any, torch.cuda.cudart()).cudaHostUnregister(self._pinned.data_ptr())

    def close(self) -> None:
        """Give the memory back, if this process made it; views must not be used any more."""
        if self._lock >= 0:
            unlock(self.path, self._lock)
            self._lock = -1


class HostStore(HostMemory):
    """The store of a run."""

    def __init__(self, layout: StoreLayout, path: Path) -> None:
        """See HostMemory."""
        super().__init__(layout, path)
        self.layout = layout

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name, where it lies. Raises KeyError."""
        return self.view(*self.layout.places[name])

    def weights(self, layer: int, kind: str = "param") -> dict[str, Tensor]:
        """Full name -> weight of all that a layer computes with, as it travels; `kind`, of what is trained: param,
        read0 or read1."""
        trained = self.layout.model.differentiated(layer)
        return {
            n: self[f"{'' if dtype == torch.float32 else 'narrow-'}{kind if n in trained else 'param'}/{n}"]
            for n, dtype in self.layout.travels(layer).items()
        }

    def publish(self, kind: str, key: str, weight: Tensor) -> None:
        """Have a weight read as this from now on, in every dtype in which it travels."""
        for name in (f"{kind}/{key}", f"narrow-{kind}/{key}"):
            if name in self.layout.places and (place := self[name]).data_ptr() != weight.data_ptr():
                place.copy_(weight)

    def read(self, kind: str, key: str) -> Tensor:
        """A weight as it is read, in the widest dtype in which it travels."""
        return self[f"{kind}/{key}" if f"{kind}/{key}" in self.layout.places else f"narrow-{kind}/{key}"]

    def lacks(self, block: int, order: int, microbatches: Sequence[int]) -> str:
        """What is wrong with a gradient block that was written for an order, or "": every one of its microbatches must
        have been added to it once, and no other."""
        written, *counts = self[f"tally/{block}"].tolist()
        if written != order:
            return f"block {block} was not written for order {order}, but for {written}"
        wrong = [m for m, count in enumerate(counts) if count != (m in microbatches)]
        return f"block {block} of order {order} has microbatches {wrong} not once each" if wrong else ""
