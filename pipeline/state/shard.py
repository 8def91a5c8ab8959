"""Sharded optimizer state (ZeRO stage 1; Rajbhandari et al., arXiv 1910.02054, section 5.1): each of the d holders of a
layer keeps AdamW's moments of its own ranges of it alone.

Ranges are interleaved: a layer is cut into blocks of a size that follows from the layer alone, and who is added to
d - 1 holders takes a d-th of the blocks of each. So every holder has a little of every weight, and d shares differ from
d - 1 in as few blocks as can be. A step takes two sums over the holders. The first is that
of the gradients, as without sharding: its bits, and those of the norm, are the same. Then each holder makes the new
weights of its ranges, and the second sum, in which all others give zeros, brings all of them to everybody: as whole
numbers, so that it changes no bit. Both come before the vote. A step that is not committed leaves nothing behind.

Bytes per trained parameter, where each range is kept by k holders: 4 weights + 4 gradient + 8 k/d from step to step;
from the end of the backward to the commit 4 k/d more for the gradient of the own ranges, whose place the new weights
take. With exact sums these lie in the 8 bytes of the sum, and nothing is needed more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.settings import RunShape, require

_LEAST, _MOST = 1 << 8, 1 << 16  # elements of a block: whole vectors of every processor, so AdamW's bits are the same
_PIECES = 64  # blocks of a layer of usual size


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


def deal(sizes: Sequence[int], count: int) -> list[int]:
    """The rank to which each block goes, of so many elements each: one more takes a little of each, evenly along the
    layer."""
    found = [0] * len(sizes)
    for new in range(1, count):
        seen, taken = [0] * new, [0] * new
        for number, size in enumerate(sizes):
            rank = found[number]
            seen[rank] += size
            if (2 * taken[rank] + size) * (new + 1) <= 2 * seen[rank]:
                found[number] = new
                taken[rank] += size
    return found
