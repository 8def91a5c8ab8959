"""What the holders of sharded states exchange: new weights before the vote, and the moments for a checkpoint.

Both are sums over the group of the gradient, in its place and of its size. So whatever sum of a group a worker is
interrupted before, the one that it starts instead is of the same size, and nobody waits for it in vain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from pipeline.runtime.reducer import Reducer
from pipeline.state.resident import ResidentStore
from pipeline.state.sharded import KINDS, ShardedState


def exchange(
    store: ResidentStore, reducer: Reducer, divisors: Mapping[str, float], clip: float, lr: float, deadline: float,
    probe: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Make the new weights of all that is held, each holder those of its ranges, and have them all: what `apply` of the
    states puts in place. `probe` is called before the last sum. Raises LinkError."""
    for part in (parts := sorted(store.gradients)):
        for state, bits in _pieces(store, part):
            state.prepare(clip / divisors.get(part, 1.0), lr, bits)
        if part == parts[-1]:
            probe()
        reducer.start(part, store.bits(part))
    reducer.finish(deadline)


@torch.no_grad()
def whole_moments(
    store: ResidentStore, reducer: Reducer, wanted: Collection[str], patience_s: float
) -> dict[str, Tensor]:
    """The moments of the `wanted` states, by their keys in `tensors`, from all who keep some of them. All workers of a
    view call it at the same point, between two steps. Raises LinkError."""
    found: dict[str, Tensor] = {}
    for part in sorted(store.gradients) if store.shares else ():
        for kind in KINDS:
            for state, bits in _pieces(store, part):
                state.give(kind, bits)
            reducer.start(part, store.bits(part))
            reducer.finish(time.monotonic() + patience_s)
            for state, bits in _pieces(store, part):
                if state.name in wanted:
                    flat = bits.to(torch.int32).view(torch.float32)
                    sizes = [parameter.numel() for parameter in state.parameters.values()]
                    for (name, parameter), piece in zip(state.parameters.items(), flat.split(sizes), strict=True):
                        found[f"{kind}/{name}"] = piece.view_as(parameter).clone()
        store.bits(part).zero_()
    reducer.clear()
    return found


def _pieces(store: ResidentStore, part: str) -> Iterator[tuple[ShardedState, Tensor]]:
    """The states of a part, each with its place in what is exchanged."""
    states = [state for state in store.states_of(part) if state.size]
    for state, bits in zip(states, store.bits(part).split([state.size for state in states]), strict=True):
        assert isinstance(state, ShardedState)
        yield state, bits
