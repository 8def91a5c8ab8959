"""What a stateless worker gives back: results are told of once they are in the store.

The thread that copies sees to that, so a hidden state on its way to the host holds no later microbatch back. What the
host is told of a unit comes in one order: its microbatches, then that it is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.copy_engine import LATER, URGENT, CopyEngine, Then, Ticket
from pipeline.runtime.device_time import Clock, Mark
from pipeline.runtime.orders import Gradient, Order
from pipeline.runtime.probe import Probe
from pipeline.schedule.ops import Op
from pipeline.state.host_store import HostStore

_EVENTS = 1024  # that are told of one unit
_SUMS = 2  # gradients on a device: one that is summed, one that is on its way to the host
_LEAVING = 3  # microbatches whose results are on their way to the host


@dataclass
class Results:
    """What a microbatch of a unit has come to: hidden states and gradients of such, by kind and layer; the sum of each
    term, where the model ends; and when its ops began and ended, by `clock`."""

    clock: Clock
    states: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    sums: Mapping[str, Tensor] | None = None
    timed: list[tuple[str, Mark, Mark]] = field(default_factory=list)


class Handover:
    """The way of results to the store, and of the word about them to the host.

    `tell` sends a message; `failed` is told, on the thread that copies, what went wrong there.
    """

    def __init__(
        self, store: HostStore, device: torch.device, down: CopyEngine, tell: Callable[..., None],
        failed: Callable[[BaseException], None], deadline_s: float,
    ) -> None:  # fmt: skip
        self._store, self._down, self._tell, self._failed, self._deadline_s = store, down, tell, failed, deadline_s
        self._cuda = device.type == "cuda"
        own = self._cuda or store.layout.gradients != torch.float32  # else a block itself is where they are summed
        sums = (torch.empty(store.layout.block_size, device=device) for _ in range(_SUMS if own else 0))
        self._sums: deque[Tensor] = deque(sums)
        self._summed: dict[int, Ticket] = {}
        """Of these, those that are on their way to the host."""
        self._leaving: deque[Ticket] = deque()

    @contextmanager
    def summing(self, order: Order) -> Iterator[Gradient]:
        """Inside, gradients are summed for an order: for no other, whoever shares its weights."""
        assert order.loaded is not None
        layout = self._store.layout
        block = self._store[f"block/{order.block}"][: layout.gradient_size(order.span)]
        flat = block
        if self._sums:
            self._sums.rotate()
            if (leaving := self._summed.pop(self._sums[0].data_ptr(), None)) is not None:
                leaving.wait(self._deadline_s)
            flat = self._sums[0][: block.numel()]
        gradient = Gradient(flat.zero_(), block, self._store[f"tally/{order.block}"].zero_())
        try:
            for layer, named in layout.gradient_views(list(range(*order.span)), flat).items():
                for name, view in named.items():
                    gradient.take(order.loaded.parameters[layer][name], view)
            yield gradient
        finally:
            gradient.let_go()

    def give(self, order: Order, m: int, results: Results) -> None:
        """Put what a microbatch has come to where others find it, and tell of it when it is there."""
        sums, pairs = dict(results.sums or {}), list[tuple[Tensor, Tensor]]()
        if m not in order.skip:
            for (kind, layer), value in results.states.items():
                host = self._store[f"{kind}{order.side}/{m}/{layer}"]
                pairs.append((host[: value.shape[0]], value.detach()))
            for term, value in (results.sums or {}).items() if self._cuda else ():
                sums[term] = torch.empty((), dtype=value.dtype, pin_memory=True)
                pairs.append((sums[term], value))
        while len(self._leaving) >= _LEAVING:
            self._leaving.popleft().wait(self._deadline_s)
        then = partial(self._given, order, m, None if results.sums is None else sums, results)
        self._leaving.append(self._down.move(pairs, URGENT, self._down.mark(), self._guarded(then)))

    def _given(self, order: Order, m: int, sums: Mapping[str, Tensor] | None, results: Results) -> None:
        """A microbatch's results are in the store."""
        clock, timed = results.clock, results.timed
        for kind, began, ended in timed[: max(0, _EVENTS - len(order.events))]:
            order.events.append((str(Op(kind, order.span, m)), clock.at(began), clock.at(ended)))
        if m not in order.skip:
            told = None if sums is None else {term: float(value) for term, value in sums.items()}
            self._tell(op=order.id, m=m, sums=told, busy=sum(clock.seconds(a, b) for _, a, b in timed))

    def commit(self, order: Order, gradient: Gradient | None, probe: Probe, **about: Any) -> None:
        """Have the gradient in its block, and say there for which order: on the CPU it was summed there. Then tell that
        the unit is done, and what is `about` it."""
        pairs = list[tuple[Tensor, Tensor]]()
        if gradient is not None and gradient.flat is not gradient.block:
            pairs = [(gradient.block, gradient.flat)]

        def committed() -> None:
            if gradient is not None:
                gradient.tally[0] = order.id
            probe("commit", order.step)
            self._tell(unit=order.id, events=order.events, **about)
            probe("committed", order.step)

        ticket = self._down.move(pairs, LATER, self._down.mark(), self._guarded(committed))
        if pairs:
            self._summed[self._sums[0].data_ptr()] = ticket

    def _guarded(self, then: Callable[[], None]) -> Then:
        """For the thread that copies: it goes on, whatever fails."""

        def told(error: BaseException | None) -> None:
            try:
                if error is not None:
                    raise error
                then()
            except BaseException as failed:
                self._failed(failed)

        return told
