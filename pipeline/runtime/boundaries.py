"""What went into a span and what came out of it, as its neighbours saw it: enough to rebuild it when it is lost.

Who sends a hidden state to a span keeps a copy of it, and so does who receives one from a span, of the last
microbatches that were trained on, in bfloat16, up to a bound of bytes each. Nothing is computed or sent for that.
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
    """One microbatch of one step, in the view in which it was computed: a step that was interrupted is computed again,
    perhaps with other weights."""

    view: int
    step: int
    microbatch: int


@dataclass
class Boundaries:
    """The last hidden states [batch, sequence, hidden] by side and span, at most `limit` bytes of each (0 keeps
    nothing), all of one `generation`."""

    limit: int = 0
    generation: int = 0
    _kept: dict[tuple[Side, Span], OrderedDict[Passage, Tensor]] = field(default_factory=dict)
    _bytes: dict[tuple[Side, Span], int] = field(default_factory=dict)

    @torch.no_grad()
    def keep(self, side: Side, span: Span, passage: Passage, hidden: Tensor) -> None:
        """Copy what went into a span, or came out of it; the oldest make room for it."""
        size = hidden.numel() * torch.bfloat16.itemsize
        if size > self.limit:
            return
        kept = self._kept.setdefault((side, span), OrderedDict())
        if (old := kept.pop(passage, None)) is not None:
            self._bytes[side, span] -= old.nbytes
        kept[passage] = hidden.detach().to(torch.bfloat16, copy=True)
        self._bytes[side, span] = self._bytes.get((side, span), 0) + size
        while self._bytes[side, span] > self.limit:
            self._bytes[side, span] -= kept.popitem(last=False)[1].nbytes

    def of(self, side: Side, span: Span) -> Mapping[Passage, Tensor]:
        """What is kept of one side of a span, oldest first."""
        return self._kept.get((side, span), {})

    def enter(self, generation: int) -> None:
        """What is kept from now on is of this generation, and nothing of another one is."""
        if generation != self.generation:
            self.clear()
        self.generation = generation

    def clear(self) -> None:
        """Forget all: what is kept was computed with weights that are not those of the run."""
        self._kept.clear()
        self._bytes.clear()

    @property
    def num_bytes(self) -> int:
        """Of all that is kept."""
        return sum(self._bytes.values())
