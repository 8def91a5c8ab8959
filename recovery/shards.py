"""What a loss means where the replicas of a stage share the optimizer's state (`pipeline/state/shard.py`).

No replica has all of it, so none can be copied. Where each keeps the share of the one before it as well
(`--snapshot neighbour`), two of them together have what the lost one had: its share the one after it, what it kept for
the one before it that one itself. Each sends zeros for what it does not keep, so the bits of both, put together by OR,
are the state. Otherwise the moments are lost, and all go back to a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from pipeline.state.resident import ResidentStore
from pipeline.state.shard import Share, range_holders
from recovery.membership import Move
from recovery.remedy import CannotRestore, Carries, Loss, State

SHARDS, CHECKPOINT = "shards", "checkpoint"


class Shards:
    """From the replicas next to the lost one, bit for bit."""

    name = SHARDS
    carries: Carries = "state"
    lr_scale = 1.0

    def plan(self, loss: Loss) -> Move:
        """Raises CannotRestore where two neighbours are lost at once."""
        place, count = loss.ring.index(loss.joiner), len(loss.ring)
        beside = {loss.ring[(place + 1) % count]: None, loss.ring[place - 1]: None}
        if missing := sorted(set(beside) - set(loss.copies)):
            raise CannotRestore(f"the shares of {loss.name} that worker(s) {missing} kept are lost too")
        return Move(loss.joiner, loss.part, self.name, tuple((worker, loss.part) for worker in beside))

    def combine(self, states: Sequence[State], norms: Sequence[float]) -> State:
        """What any of the sources has; what both have is the same."""
        found = {key: tensor.contiguous().view(torch.int32).clone() for key, tensor in states[0].items()}
        for other in states[1:]:
            for key, tensor in other.items():
                found[key] |= tensor.contiguous().view(torch.int32)
        return {key: bits.view(torch.float32) for key, bits in found.items()}


def remedies_of(names: Iterable[str], backup: bool) -> tuple[str, ...]:
    """Those of a policy that hold where the state is shared; `backup`: each keeps two shares."""
    return ((SHARDS,) if backup and "replica" in names else ()) + tuple(n for n in names if n == CHECKPOINT)


def with_ranges(
    store: ResidentStore, holders: Mapping[str, Sequence[int]], places: Mapping[int, int]
) -> dict[str, Sequence[int]]:
    """What all hold, by state: and by range, where moments are shared. `places` has that of each worker."""
    if not store.shares:
        return dict(holders)
    trained = {state.name for state in store.model.states if state.trained}
    ranked = {name: sorted(holders[name], key=places.__getitem__) for name in trained & set(holders)}
    backup = any(share != Share(share.rank, share.count) for share in store.shares.values())
    return {**holders, **range_holders(ranked, backup)}
