"""Sharded optimizer state (ZeRO stage 1; Rajbhandari et al., arXiv 1910.02054, section 5.1): each of the d holders of a
layer keeps AdamW's moments of its own ranges of it alone.

Ranges are interleaved: a layer is cut into blocks of a size that follows from the layer alone, and block i is that of
holder i mod d; so every holder has a little of every weight. A step takes two sums over the holders. The first is that
of the gradients, as without sharding: its bits, and those of the norm, are the same. Then each holder makes the new
weights of its ranges, and the second sum, in which all others give zeros, brings all of them to everybody: as whole
numbers, so that it changes no bit. Both come before the vote. A step that is not committed leaves nothing behind.

Bytes per trained parameter, where each range is kept by k holders: 4 weights + 4 gradient + 8 k/d from step to step;
from the end of the backward to the commit 4 k/d more for the gradient of the own ranges, whose place the new weights
take. With exact sums these lie in the 8 bytes of the sum, and nothing is needed more.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.settings import RunShape, require
from pipeline.state.layer_state import LayerState
from pipeline.state.optimizer import OptimizerConfig

KINDS = ("exp_avg", "exp_avg_sq")
_LEAST, _MOST = 1 << 8, 1 << 16  # elements of a block: whole vectors of every processor, so AdamW's bits are the same
_PIECES = 64  # blocks of a layer of usual size
_AT_ONCE = 1 << 20  # elements that are updated on the side at once


@dataclass(frozen=True)
class ShardSettings:
    """Optimizer state."""

    shard_optimizer: bool = False
    """Keep AdamW's moments of a layer once over all its replicas (ZeRO-1), not once on each: the same bits with less
    memory, and twice the bytes between replicas. A lost replica takes its part along: all go back to the newest
    checkpoint, unless --snapshot neighbour keeps each part twice (3 or more replicas)."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError where there is nobody to share with, or somebody else would take over what is missing."""
        if not self.shard_optimizer:
            return
        require(
            run.scheduler not in ("skippipe", "roundpipe"), "shard_optimizer", True,
            f"False under scheduler {run.scheduler}",
        )  # fmt: skip
        require(run.replicas > 1, "shard_optimizer", True, "False without replicas; --replicas 2 or more to share")
        require(
            run.recovery in ("auto", "exact", "checkpoint", "none"), "recovery", run.recovery,
            "auto, exact, checkpoint or none with shard_optimizer",
        )  # fmt: skip


@dataclass(frozen=True)
class Share:
    """That of one of `count` holders; it also keeps that of the holder before it, if `backup`."""

    rank: int
    count: int
    backup: bool = False

    @property
    def kept(self) -> tuple[int, ...]:
        """Whose ranges are kept here, the own first."""
        before = (self.rank - 1) % self.count
        return (self.rank, before) if self.backup and before != self.rank else (self.rank,)


def shares_of(parts: Mapping[str, Sequence[int]], place: int, backup: bool) -> dict[str, Share]:
    """Part -> what a place keeps of it; `parts` has the places that hold each, in order."""
    return {
        part: Share(list(places).index(place), len(places), backup)
        for part, places in parts.items()
        if place in places
    }  # fmt: skip


def range_name(state: str, rank: int) -> str:
    """What the moments of one holder's ranges are called beside their state."""
    return f"{state}/{rank}"


def range_holders(states: Mapping[str, Sequence[int]], backup: bool) -> dict[str, list[int]]:
    """Range -> who keeps it, for each state that has any; `states` has the holders of each, in the order of ranks."""
    found: dict[str, list[int]] = {}
    for state, holders in states.items():
        for rank, holder in enumerate(holders):
            for kept in Share(rank, len(holders), backup).kept:
                found.setdefault(range_name(state, kept), []).append(holder)
    return found


@dataclass(frozen=True)
class Block:
    """Elements `start` to `stop` of the parameter `name`; `at` is where they begin in the gradient of the state,
    `kept_at` where among what is kept."""

    name: str
    start: int
    stop: int
    at: int
    kept_at: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.start

    def of(self, flat: Tensor) -> Tensor:
        """Of the flat parameter."""
        return flat[self.start : self.stop]

    def inside(self, whole: Tensor) -> Tensor:
        """Of what has the form of the gradient."""
        return whole[self.at : self.at + self.size]

    def kept(self, kept: Tensor) -> Tensor:
        """Of what has the form of what is kept."""
        return kept[self.kept_at : self.kept_at + self.size]


def blocks(sizes: Mapping[str, int]) -> list[Block]:
    """The blocks of a state whose parameters have so many elements. No block is of two parameters."""
    wanted = max(_LEAST, min(_MOST, sum(sizes.values()) // _PIECES))
    length = 1 << (wanted.bit_length() - 1)
    found: list[Block] = []
    base = 0
    for name, size in sizes.items():
        found += [Block(name, at, min(at + length, size), base + at) for at in range(0, size, length)]
        base += size
    return found


class ShardedState(LayerState):
    """A state of which this holder keeps a `share` of the moments. `tensors` has zeros in those that others keep.

    `prepare` makes the new weights without touching the old, and between it and `apply` their sum over all holders is
    taken: `apply` then finds all of them where `prepare` has put its own.
    """

    def __init__(
        self, name: str, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, share: Share, *,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.share = share
        super().__init__(name, parameters, config, frozen=frozen)
        self._bits: Tensor | None = None
        self._aside: Tensor | None = None

    def _begin(self, moments: Mapping[str, Mapping[str, Tensor]] | None) -> None:
        """No optimizer of torch: it would want moments of the form of the weights."""
        assert moments is None
        every = blocks({name: p.numel() for name, p in self.parameters.items()})
        self._blocks: list[Block] = []
        self._ends: dict[int, tuple[int, int]] = {}  # rank -> where its ranges lie among what is kept
        at = 0
        for rank in self.share.kept:
            begins = at
            for block in every[rank :: self.share.count]:
                self._blocks.append(Block(block.name, block.start, block.stop, block.at, at))
                at += block.size
            self._ends[rank] = (begins, at)
        device = self.lr_scale.device
        self._kept = {kind: torch.zeros(at, device=device) for kind in KINDS}
        self._steps = {name: torch.zeros((), device=device) for name in self.parameters}

    # ---- a step ----

    @torch.no_grad()
    def prepare(self, scale: float, lr: float, bits: Tensor) -> None:
        """One AdamW step on the own ranges, as `apply` would make it, of which only the new weights are made: their
        bits stand in `bits` [size], whole numbers, zero elsewhere. It may lie in the gradient's own memory."""
        if scale != 1.0:
            self.gradient.mul_(scale)
        if bits.data_ptr() == self.gradient.data_ptr() and self._blocks:
            self._aside = torch.cat([block.inside(self.gradient) for block in self._blocks])
        bits.zero_()
        for some in _batches(block for block in self._blocks if block.kept_at < self._ends[self.share.rank][1]):
            name = some[0].name
            flat = self.parameters[name].detach().view(-1)
            made = [block.of(flat).clone() for block in some]
            moments = ([block.kept(self._kept[kind]).clone() for block in some] for kind in KINDS)
            self._update(name, made, some, *moments, self._steps[name] + 1, lr)
            for block, new in zip(some, made, strict=True):
                block.inside(bits).copy_(new.view(torch.int32))
        self._bits = bits

    @torch.no_grad()
    def apply(self, scale: float, lr: float) -> None:
        """The step that was prepared, with the same numbers, once all weights of it are there."""
        if self.parameters:
            assert self._bits is not None, "a sharded step is prepared before the vote"
            for some in _batches(self._blocks):
                name = some[0].name
                flat = self.parameters[name].detach().view(-1)
                moments = ([block.kept(self._kept[kind]) for block in some] for kind in KINDS)
                weights = [block.of(flat) for block in some]
                self._update(name, weights, some, *moments, self._steps[name] + 1, lr)
            at = 0
            for name, parameter in self.parameters.items():
                found = self._bits[at : at + parameter.numel()].to(torch.int32).view(torch.float32)
                parameter.detach().view(-1).copy_(found)
                self._steps[name] += 1
                at += parameter.numel()
            self._bits.zero_()
            self.drop()
        self.version += 1

    def _update(
        self, name: str, weights: list[Tensor], some: Sequence[Block], first: list[Tensor], second: list[Tensor],
        step: Tensor, lr: float,
    ) -> None:  # fmt: skip
        """torch's fused AdamW, as `torch.optim.AdamW` calls it."""
        aside = self._aside
        gradients = [block.inside(self.gradient) if aside is None else block.kept(aside) for block in some]
        decay = self.config.weight_decay if self.parameters[name].dim() >= 2 else 0.0
        beta1, beta2 = self.config.betas
        cast(Any, torch)._fused_adamw_(
            weights, gradients, first, second, [], [step] * len(some), amsgrad=False, lr=lr * float(self.lr_scale),
            beta1=beta1, beta2=beta2, weight_decay=decay, eps=self.config.eps, maximize=False,
        )  # fmt: skip

    def drop(self) -> None:
        """Forget the gradients of a step that does not count, and what was prepared of it."""
        super().drop()
        self._bits = self._aside = None

    def _forget(self) -> None:
        for tensor in (*self._kept.values(), *self._steps.values()):
            tensor.zero_()

    # ---- what it consists of ----

    def moments(self, name: str) -> dict[str, Tensor]:
        """As of a state that is whole, copied, with zeros for what others keep."""
        found = {"step": self._steps[name]}
        for kind in KINDS:
            found[kind] = torch.zeros_like(self.parameters[name])
            for block in self._blocks:
                if block.name == name:
                    block.of(found[kind].view(-1)).copy_(block.kept(self._kept[kind]))
        return found

    @torch.no_grad()
    def give(self, kind: str, bits: Tensor) -> None:
        """The bits of the own moments of a kind go into `bits` [size], whole numbers, zero elsewhere."""
        bits.zero_()
        for block in self._blocks:
            if block.kept_at < self._ends[self.share.rank][1]:
                block.inside(bits).copy_(block.kept(self._kept[kind]).view(torch.int32))

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """See LayerState: of whole moments the kept ranges."""
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            if kind in KINDS:
                if tensor.shape != self.parameters[name].shape:
                    raise RuntimeError(f"{key} has shape {tuple(tensor.shape)}, not {self.parameters[name].shape}")
                flat = tensor.reshape(-1)
                for block in self._blocks:
                    if block.name == name:
                        block.kept(self._kept[kind]).copy_(block.of(flat))
            elif kind == "param":
                self.weights()[name].copy_(tensor)
            else:
                (self._steps[name] if kind == "step" else self.lr_scale).copy_(tensor)

    def _alike(self) -> dict[str, Tensor]:
        """All but the moments."""
        found = {f"param/{name}": tensor for name, tensor in self.weights().items()}
        found |= {f"step/{name}": tensor for name, tensor in self._steps.items()} if self.parameters else {}
        return {**found, "lr_scale": self.lr_scale}

    def fingerprints(self) -> dict[str, int]:
        """See LayerState; and a checksum of the moments of each range that is kept here, by its name."""
        found = super().fingerprints()
        for rank, (begins, ends) in self._ends.items() if self.parameters else ():
            crc = zlib.crc32(f"{self.version}/{self.generation}".encode())
            for kind in KINDS:
                part = self._kept[kind][begins:ends].cpu()
                crc = zlib.crc32(part.view(torch.uint8).numpy().data, crc)
            found[range_name(self.name, rank)] = crc
        return found


def _batches(some: Iterable[Block]) -> Iterator[list[Block]]:
    """Runs of blocks of one parameter, of a bounded size."""
    for _, each in groupby(some, lambda block: block.name):
        batch: list[Block] = []
        for block in each:
            batch.append(block)
            if sum(b.size for b in batch) >= _AT_ONCE:
                yield batch
                batch = []
        if batch:
            yield batch
