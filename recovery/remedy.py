"""What was lost, and the form of a cure. A remedy plans (pure, on the coordinator) and combines (on who joins).

To plan is to name the workers whose state is needed, or to say why it cannot be done; `restore.py` carries the state
over; to combine is to make the lost span's state of it. Each remedy is one small file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

from torch import Tensor

from pipeline.schedule.layout import Layout
from pipeline.schedule.ops import Schedule, Span, span_text
from pipeline.state.resident import part_span
from recovery.membership import Move, View, part_name, parts_of

State = Mapping[str, Tensor]
"""The state of one layer: `param/NAME`, `exp_avg/NAME`, ..., as `pipeline.state.resident` gives it."""


Carries = Literal["state", "weights", "moments", "pairs"]
"""What the sources of a remedy send: all of the state, which is taken as it is; weights alone, or with the optimizer's
moments; or what they have of the span's inputs and outputs, and weights."""


class CannotRestore(RuntimeError):
    """No remedy brings the lost state back: says for each why."""


@dataclass(frozen=True)
class Loss:
    """One part that a worker, `joiner`, needs in the next view and does not have: a span, or a weight that layers
    share.

    `before` and `after` are the holders of the spans next to it that have state, lowest first; `copies` those of the
    part itself, `twin` that of the span it changes places with on swapped routes. `num_layers` counts both ends.
    """

    joiner: int
    part: str
    num_layers: int
    copies: tuple[int, ...]
    before: tuple[int, Span] | None = None
    after: tuple[int, Span] | None = None
    twin: tuple[int, Span] | None = None
    ring: tuple[int, ...] = ()
    """All that are to hold the part, in the order of their places."""

    @property
    def name(self) -> str:
        """For a person."""
        return part_name(self.part)

    @property
    def blocks(self) -> bool:
        """Whether it is decoder blocks alone: neither the embedding nor the head."""
        span = part_span(self.part)
        return span is not None and span[0] > 0 and span[1] < self.num_layers

    def neighbours(self) -> tuple[tuple[int, Span], tuple[int, Span]]:
        """The holders before and after. Raises CannotRestore where one is lost too."""
        if self.before is not None and self.after is not None:
            return self.before, self.after
        lost = " and ".join(side for side in ("before", "after") if getattr(self, side) is None)
        raise CannotRestore(f"the neighbour {lost} {self.name} is lost too")

    def restored(self, remedy: str, *sources: tuple[int, Span]) -> Move:
        """That it comes from holders of spans."""
        return Move(self.joiner, self.part, remedy, tuple((worker, span_text(span)) for worker, span in sources))


Has = Mapping[int, Set[str]]
"""Worker -> the names of the states that it has."""


def states_of(part: str) -> set[str]:
    """The names of the states of a part."""
    span = part_span(part)
    return {part} if span is None else {str(layer) for layer in range(*span)}


def has(view: View, layout: Layout, num_layers: int, tied: bool) -> Has:
    """What the workers of a view have: what its layout wants, but for what is still to move there; and what they are to
    give, which they keep until the view is settled."""
    found: dict[int, set[str]] = {worker: set() for worker in view.workers}
    for part, workers in parts_of(view, layout.holders, num_layers, tied).items():
        for worker in workers:
            found[worker] |= states_of(part)
    for move in view.moves:
        found[move.worker] -= states_of(move.part)
    for worker, part in (source for move in view.moves for source in move.sources):
        if worker in found:
            found[worker] |= states_of(part)
    return found


def losses(view: View, layout: Layout, before: Has, num_layers: int, tied: bool) -> tuple[Loss, ...]:
    """What moves into `view`: the difference between what its layout wants its workers to hold and what they had
    `before`. A span that a worker has in part, or that others have in parts, is cut where its holders change."""
    train = layout.train
    twins, holders = swaps(train), train.holders
    parts = parts_of(view, layout.holders, num_layers, tied)
    alive = {part: _having(view, part, before) for part in parts}
    lacking = [(part, joiner) for part, workers in parts.items() for joiner in workers if joiner not in alive[part]]
    recut = any(joiner not in view.joined for _, joiner in lacking)  # a lost stage is not a span of this layout

    def neighbour(edge: int, side: int) -> tuple[int, Span] | None:
        found = [(alive[span_text(span)][0], span) for span in holders if span[side] == edge and alive[span_text(span)]]
        return min(found) if found else _run_next_to(view, before, edge, side, num_layers) if recut else None

    def lost(joiner: int, part: str) -> Loss:
        copies = _having(view, part, before)
        whole = next(each for each in parts if states_of(part) <= states_of(each))
        ring = tuple(sorted(parts[whole], key=view.places.__getitem__))
        if (span := part_span(part)) is None:
            return Loss(joiner, part, num_layers, copies, ring=ring)
        others = [(alive[text][0], other) for other in twins.get(span, ()) if alive[text := span_text(other)]]
        return Loss(
            joiner, part, num_layers, copies, neighbour(span[0], 1), neighbour(span[1], 0), next(iter(others), None),
            ring,
        )  # fmt: skip

    return tuple(lost(joiner, piece) for part, joiner in lacking for piece in _pieces(view, part, joiner, before))


def _having(view: View, part: str, before: Has) -> tuple[int, ...]:
    """Who has all states of a part, ascending."""
    return tuple(worker for worker in view.workers if states_of(part) <= before.get(worker, set()))


def _pieces(view: View, part: str, joiner: int, before: Has) -> list[str]:
    """What a worker lacks of a part, in pieces of which each has the same holders."""
    if (span := part_span(part)) is None:
        return [part]
    pieces: list[tuple[Span, tuple[int, ...]]] = []
    for layer in range(*span):
        if str(layer) not in before.get(joiner, set()):
            having = _having(view, span_text((layer, layer + 1)), before)
            if pieces and pieces[-1] == ((pieces[-1][0][0], layer), having):
                pieces[-1] = (pieces[-1][0][0], layer + 1), having
            else:
                pieces.append(((layer, layer + 1), having))
    return [span_text(piece) for piece, _ in pieces]


def _run_next_to(view: View, before: Has, edge: int, side: int, num_layers: int) -> tuple[int, Span] | None:
    """The longest run of layers that one worker has and that ends before `edge` (side 1) or begins after it (side 0),
    with nothing but lost layers between."""
    on = -1 if side else 1
    at = edge - 1 if side else edge  # the first layer beside the edge
    while 0 <= at < num_layers and not _having(view, span_text((at, at + 1)), before):
        at += on
    found: list[tuple[int, int]] = []
    for worker in view.workers:
        length = 0
        while 0 <= (layer := at + on * length) < num_layers and str(layer) in before.get(worker, set()):
            length += 1
        found.append((-length, worker))
    length, worker = min(found, default=(0, 0))
    return None if length == 0 else (worker, (at + length + 1, at + 1) if side else (at, at - length))


def swaps(schedule: Schedule) -> dict[Span, tuple[Span, ...]]:
    """Span -> the spans that follow it on one route and precede it on another."""
    pairs = {pair for route in set(schedule.routes) for pair in pairwise(route.forward)}
    found: dict[Span, tuple[Span, ...]] = {}
    for a, b in sorted(pairs):
        if (b, a) in pairs:
            found[a] = (*found.get(a, ()), b)
    return found


class Remedy(Protocol):
    """One way to bring a span back."""

    name: str

    @property
    def carries(self) -> Carries:
        """What its sources send."""
        ...

    def plan(self, loss: Loss) -> Move:
        """Whose state is needed. Raises CannotRestore."""
        ...

    def combine(self, states: Sequence[State], norms: Sequence[float]) -> State | None:
        """The state of one layer from that of its sources; None leaves it as it was drawn from the seed."""
        ...

    @property
    def lr_scale(self) -> float:
        """What the learning rate of a restored span is multiplied by from now on."""
        ...
