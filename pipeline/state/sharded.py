"""A layer state whose moments are shared among its holders: see `shard.py` for the idea, and what it takes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.state.layer_state import LayerState
from pipeline.state.masks import Masks
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.shard import Block, Share, blocks, deal, range_name

KINDS = ("exp_avg", "exp_avg_sq")
_AT_ONCE = 1 << 20  # elements that are updated on the side at once


class ShardedState(LayerState):
    """A state of which this holder keeps a `share` of the moments. `tensors` has zeros in those that others keep.

    `prepare` makes the new weights without touching the old, and between it and `apply` their sum over all holders is
    taken: `apply` then finds all of them where `prepare` has put its own.
    """

    def __init__(
        self, name: str, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, share: Share, *,
        frozen: Mapping[str, Tensor] | None = None, masks: Masks | None = None,
    ) -> None:  # fmt: skip
        self.share = share
        super().__init__(name, parameters, config, frozen=frozen, masks=masks)
        self._bits: Tensor | None = None
        self._aside: Tensor | None = None

    def _begin(self, moments: Mapping[str, Mapping[str, Tensor]] | None) -> None:
        """No optimizer of torch: it would want moments of the form of the weights."""
        assert moments is None
        every = blocks({name: p.numel() for name, p in self.parameters.items()})
        ranks = deal([block.size for block in every], self.share.count)
        self._blocks: list[Block] = []
        self._ends: dict[int, tuple[int, int]] = {}  # rank -> where its ranges lie among what is kept
        at = 0
        for rank in self.share.kept:
            begins = at
            for block in (block for block, whose in zip(every, ranks, strict=True) if whose == rank):
                self._blocks.append(Block(block.name, block.start, block.stop, block.at, at))
                at += block.size
            self._ends[rank] = (begins, at)
        device = self.gradient.device
        self._kept = {kind: torch.zeros(at, device=device) for kind in KINDS}
        self._steps = {name: torch.zeros((), device=device) for name in self.parameters}

    # ---- a step ----

    @torch.no_grad()
    def prepare(self, scale: float, lr: float, bits: Tensor) -> None:
        """One AdamW step on the own ranges, as `apply` would make it, of which only the new weights are made: their
        bits stand in `bits` [size], whole numbers, zero elsewhere. It may lie in the gradient's own memory. Raises
        StateChanged, before anybody has got anything of it."""
        self.require_intact()
        self._mask()
        if scale != 1.0:
            self.gradient.mul_(scale)
        if bits.data_ptr() == self.gradient.data_ptr() and self._blocks:
            self._aside = torch.cat([block.inside(self.gradient) for block in self._blocks])
        bits.zero_()
        for some in _batches(block for block in self._blocks if block.kept_at < self._ends[self.share.rank][1]):
            name = some[0].name
            flat = self.parameters[name].detach().view(-1)
            made = [block.of(flat).clone() for block in some]
            moments = [[block.kept(self._kept[kind]).clone() for block in some] for kind in KINDS]
            self._update(made, some, moments, lr)
            for block, new in zip(some, made, strict=True):
                block.inside(bits).copy_(new.view(torch.int32))
        self._bits = bits

    @torch.no_grad()
    def apply(self, scale: float, lr: float) -> None:
        """The step that was prepared, with the same numbers, once all weights of it are there. Raises StateChanged."""
        self.require_intact()
        self.unseal()
        if self.parameters:
            assert self._bits is not None, "a sharded step is prepared before the vote"
            before = self._before()
            for some in _batches(self._blocks):
                name = some[0].name
                flat = self.parameters[name].detach().view(-1)
                moments = [[block.kept(self._kept[kind]) for block in some] for kind in KINDS]
                self._update([block.of(flat) for block in some], some, moments, lr)
            at = 0
            for name, parameter in self.parameters.items():
                found = self._bits[at : at + parameter.numel()].to(torch.int32).view(torch.float32)
                parameter.detach().view(-1).copy_(found)
                self._steps[name] += 1
                at += parameter.numel()
            self._put_back(before)
            self._bits.zero_()
            self.drop()
        self.version += 1

    def _update(
        self, weights: list[Tensor], some: Sequence[Block], moments: Sequence[list[Tensor]], lr: float
    ) -> None:  # fmt: skip
        """The next step of torch's fused AdamW, as `torch.optim.AdamW` calls it, on blocks of one parameter."""
        name, aside, config = some[0].name, self._aside, self.config
        gradients = [block.inside(self.gradient) if aside is None else block.kept(aside) for block in some]
        cast(Any, torch)._fused_adamw_(
            weights, gradients, *moments, [], [self._steps[name] + 1] * len(some), amsgrad=False,
            lr=lr * float(self.lr_scale), beta1=config.betas[0], beta2=config.betas[1],
            weight_decay=config.weight_decay if self.parameters[name].dim() >= 2 else 0.0, eps=config.eps,
            maximize=False,
        )  # fmt: skip

    def drop(self) -> None:
        """Forget the gradients of a step that does not count, and what was prepared of it."""
        super().drop()
        self._bits = self._aside = None

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._steps[name].zero_()
            for block in (block for block in self._blocks if block.name == name):
                for kept in self._kept.values():
                    block.kept(kept).zero_()

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
        self._printed = None
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

    def _stored(self) -> list[Tensor]:
        return [*self._alike().values(), *(self._kept.values() if self.parameters else ())]

    def _fingerprints(self) -> dict[str, int]:
        """See LayerState; and a checksum of the moments of each range that is kept here, by its name."""
        found = super()._fingerprints()
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
