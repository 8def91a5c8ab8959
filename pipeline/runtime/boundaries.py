"""What went into a span and what came out of it, as its neighbours saw it: enough to rebuild it when it is lost.

Who sends a hidden state to a span keeps a copy of it, and so does who receives one from a span, of the last
microbatches of committed steps, in bfloat16, up to a bound of bytes each. Nothing is computed or sent for that. What a
step adds counts once it is committed, so what two workers have in common does not depend on when they are interrupted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.schedule.ops import Span

Side = Literal["into", "out of"]


class Passage(NamedTuple):
    """One microbatch of one step."""

    step: int
    microbatch: int


class _Last:
    """The last hidden states of one side, at most `limit` bytes of them."""

    def __init__(self, limit: int) -> None:
        self.limit, self.num_bytes = limit, 0
        self.kept: OrderedDict[Passage, Tensor] = OrderedDict()

    def add(self, passage: Passage, hidden: Tensor) -> None:
        """The oldest make room for it."""
        self.kept[passage] = hidden
        self.num_bytes += hidden.nbytes
        while self.num_bytes > self.limit:
            self.num_bytes -= self.kept.popitem(last=False)[1].nbytes


@dataclass
class Boundaries:
    """The last hidden states [batch, sequence, hidden] by side and span, at most `limit` bytes of each (0 keeps
    nothing) beside those of the step under way, of which there are no more; all of one `generation`."""

    limit: int = 0
    generation: int = 0
    _kept: dict[tuple[Side, Span], _Last] = field(default_factory=dict)
    _under_way: dict[tuple[Side, Span], _Last] = field(default_factory=dict)

    @torch.no_grad()
    def keep(self, side: Side, span: Span, passage: Passage, hidden: Tensor) -> None:
        """Copy what went into a span, or came out of it, in the step under way."""
        copied = hidden.detach().to(torch.bfloat16, copy=True)
        self._under_way.setdefault((side, span), _Last(self.limit)).add(passage, copied)

    def committed(self) -> None:
        """The step under way is committed."""
        for key, last in self._under_way.items():
            for passage, hidden in last.kept.items():
                self._kept.setdefault(key, _Last(self.limit)).add(passage, hidden)
        self._under_way.clear()

    def enter(self, generation: int) -> None:
        """The step under way was not committed, and what is kept is of this generation from now on."""
        self._under_way.clear()
        if generation != self.generation:
            self.clear()
        self.generation = generation

    def of(self, side: Side, span: Span) -> Mapping[Passage, Tensor]:
        """What is kept of one side of a span, oldest first."""
        found = self._kept.get((side, span))
        return {} if found is None else found.kept

    def clear(self) -> None:
        """Forget all: what is kept was computed with weights that are not those of the run."""
        self._kept.clear()
        self._under_way.clear()

    @property
    def num_bytes(self) -> int:
        """Of all that is kept, and of the step under way."""
        return sum(last.num_bytes for each in (self._kept, self._under_way) for last in each.values())
