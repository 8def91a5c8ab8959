"""The weights of a model in host memory, once, as a device that cannot hold them all takes them: layer by layer.

A layer's weights lie side by side, so that one copy moves them. The memory loses its name as soon as it is reserved: it
goes with this process, however that ends.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.model.layered import LayeredModel, copy_weight
from pipeline.model.weights import ModelError, Weights
from pipeline.state.host_store import ALIGN, HostMemory, store_path


class WeightLayout:
    """Name -> place of every weight, all in one dtype. A weight that both ends share lies with the first of them."""

    hint: ClassVar[str] = "bfloat16 needs half of float32"

    def __init__(self, model: LayeredModel, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.shapes = {name: shape for n in range(model.num_layers) for name, shape in model.shapes(n).items()}
        self.offsets: dict[str, int] = {}
        self.num_bytes = 0
        for layer in range(model.num_layers):
            for name in model.keys(layer):
                self.offsets[name] = self.num_bytes
                self.num_bytes += self.size(name)

    def size(self, name: str) -> int:
        """Bytes of a weight, rounded up so that the next one is aligned."""
        return -(-self.dtype.itemsize * math.prod(self.shapes[name]) // ALIGN) * ALIGN

    def names(self, layer: int, without: Collection[str] = ()) -> list[str]:
        """What a layer computes with: its own, then what it shares with another; but not those of `without`."""
        own = self.model.keys(layer)
        shared = (name for name in self.model.shapes(layer) if name not in own)
        return [name for name in (*own, *shared) if name not in without]

    def layer_bytes(self, layer: int, without: Collection[str] = ()) -> int:
        """Bytes of these."""
        return sum(self.size(name) for name in self.names(layer, without))

    def views(self, layer: int, flat: Tensor, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Name -> its part of the bytes `flat` into which the layer was copied."""
        found: dict[str, Tensor] = {}
        at = 0
        for name in self.names(layer, without):
            shape = self.shapes[name]
            end = at + self.dtype.itemsize * math.prod(shape)
            found[name] = flat[at:end].view(self.dtype).view(shape)
            at += self.size(name)
        return found


class HostWeights(HostMemory):
    """The weights where they lie."""

    def __init__(self, layout: WeightLayout, path: Path) -> None:
        """See HostMemory."""
        super().__init__(layout, path)
        self.layout = layout

    @classmethod
    def read(cls, layout: WeightLayout, directory: Path) -> HostWeights:
        """Those of a directory of safetensors, read a layer at a time. Raises HostMemoryError and ModelError."""
        weights, model = Weights(directory), layout.model
        for name, other in ((owner, alias) for alias, owner in model.aliases.items()):
            if {name, other} <= set(weights.files):
                both = weights.read({name: (name,), other: (other,)}, None)
                if not torch.equal(both[name], both[other]):
                    raise ModelError(f"{directory}: {name} and {other} differ, which the config says are one weight")
        with tempfile.TemporaryDirectory() as unique:
            made = cls.create(layout, store_path(Path(unique)))
            made.close()  # its name; what is mapped stays
        for layer in range(model.num_layers):
            read = weights.read({name: model.stored_names(name) for name in model.keys(layer)}, None)
            for name, tensor in read.items():
                copy_weight(made[name], tensor, name, weights)
        return made

    def __getitem__(self, name: str) -> Tensor:
        """The weight of that name. Raises KeyError."""
        return self.view(self.layout.offsets[name], self.layout.shapes[name], self.layout.dtype)

    def pieces(self, layer: int, without: Collection[str] = ()) -> list[Tensor]:
        """The bytes of a layer [uint8], in as few pieces as they lie in: what is copied to a device."""
        ranges: list[tuple[int, int]] = []
        for name in self.layout.names(layer, without):
            lo = self.layout.offsets[name]
            first = ranges.pop()[0] if ranges and ranges[-1][1] == lo else lo
            ranges.append((first, lo + self.layout.size(name)))
        return [self.view(lo, (hi - lo,), torch.uint8) for lo, hi in ranges]
