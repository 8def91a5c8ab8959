"""Layers that move in the background while training goes on, so that the change of the view finds them there.

A planned change is told beforehand. Who gives copies its layers, some MiB a step, right after a commit, and sends the
copies in a thread of its own; of what is on its way already it sends the gradient of each further step as well. Who
takes loads the copies into layers that lie beside its own, and makes the same updates: bit for bit the same layer, one
step behind at most. When the view changes both end this; a state that is of the committed step need not be moved any
more, and any other is moved as if nothing had been sent. So nothing of this is needed for the view to be right.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.runtime.groups import Group, GroupBuilder, poison
from pipeline.runtime.worker import Worker
from pipeline.state.layer_state import LayerState, packed, stamp, unpacked
from pipeline.state.resident import part_span
from recovery.keys import say_migrated
from recovery.membership import Move

_END, _STATE, _UPDATE = range(3)
_MOST_COPIES = 8  # of what moves, as long as its weights: the state itself is three, each step's gradient one
_HEADER = 4  # kind, layer, version, generation
_STOPPING_S = 5.0
_ENDING_S = 1.0
_PATIENCE = timedelta(seconds=120)
Item = tuple[list[int], list[float], Tensor | None]


def layers_of(move: Move, num_layers: int, tied: bool) -> list[int]:
    """The layers that a move copies whole from one worker to another, but for those with a weight that others share."""
    span = part_span(move.part)
    if span is None or len(move.sources) != 1 or move.sources[0][1] != move.part or move.sources[0][0] == move.worker:
        return []
    return [layer for layer in range(*span) if not tied or 0 < layer < num_layers - 1]


@dataclass(frozen=True)
class Plan:
    """Migration `number`: the moves that will lead to `view` with `layout`."""

    number: int
    view: int
    layout: str
    moves: tuple[Move, ...]


@dataclass
class _Side:
    """One end of the way between two workers."""

    worker: int
    pair: tuple[int, int]
    layers: Sequence[int]
    thread: threading.Thread | None = None
    group: Group | None = None
    well: bool = True

    def start(self, run: Callable[[], None]) -> None:
        """In a thread of its own."""
        self.thread = threading.Thread(target=run, name="migration", daemon=True)
        self.thread.start()

    def stop(self, patience_s: float) -> bool:
        """Wait until it has ended; whether that was by itself, and well."""
        assert self.thread is not None
        self.thread.join(0.0 if self.group is None else patience_s)
        if self.thread.is_alive():
            self.well = False
            if self.group is not None:
                poison(self.group, self.pair, self.worker, {w for w in self.pair if w != self.worker})
            self.thread.join(_ENDING_S)
        return self.well and not self.thread.is_alive()


@dataclass
class _Giving(_Side):
    items: queue.Queue[Item] = field(default_factory=queue.Queue)
    backlog: int = 0
    sent: set[int] = field(default_factory=set)

    def put(self, item: Item) -> None:
        self.backlog += 0 if item[2] is None else item[2].numel() * 4
        self.items.put(item)

    def run(self, build: Callable[[], Group]) -> None:
        """Send what there is, until the end."""
        try:
            self.group = build()
            while True:
                header, numbers, flat = self.items.get()
                if not self.well:
                    header, flat = [_END, 0, 0, 0], None
                tensors = [torch.tensor(header), torch.tensor(numbers or [0.0, 0.0], dtype=torch.float64)]
                for tensor in (*tensors, *([] if flat is None else [flat])):
                    self.group.send([tensor], 1, 0).wait(_PATIENCE)
                if flat is None:
                    return
                self.backlog -= flat.numel() * 4
        except RuntimeError:
            self.well = False


@dataclass
class _Taking(_Side):
    states: dict[str, LayerState] = field(default_factory=dict)
    there: set[int] = field(default_factory=set)

    def run(self, build: Callable[[], Group], told: Callable[[], None]) -> None:
        """Take what comes, until the end. `told` is called once all layers are there."""
        try:
            self.group = build()
            while self._take(self.group):
                if self.there == set(self.layers):
                    told()
                    told = _nothing
        except RuntimeError:
            self.well = False

    @torch.no_grad()
    def _take(self, group: Group) -> bool:
        header, numbers = torch.empty(_HEADER, dtype=torch.int64), torch.empty(2, dtype=torch.float64)
        group.recv([header], 0, 0).wait(_PATIENCE)
        group.recv([numbers], 0, 0).wait(_PATIENCE)
        kind, layer, version, generation = header.tolist()
        if kind == _END:
            return False
        state = self.states[str(layer)]
        if kind == _STATE:
            tensors = state.tensors()
            flat = torch.empty(sum(t.numel() for t in tensors.values()))
            group.recv([flat], 0, 0).wait(_PATIENCE)
            state.put(unpacked(flat, tensors))
            stamp((state,), version, generation)
            self.there.add(layer)
        else:
            flat = torch.empty(state.size)
            group.recv([flat], 0, 0).wait(_PATIENCE)
            state.gradient.copy_(flat)
            state.apply(*numbers.tolist())
        return True


class Migration:
    """A worker's part in what moves in the background: at most `most_bytes` are copied in a step, or one layer."""

    def __init__(self, worker: Worker, builder: Callable[[], GroupBuilder], store: dist.Store, most_bytes: int) -> None:
        """`builder` makes one with a store client of its own; `store` is one that several threads may use."""
        self._worker, self._builder, self._store, self._most = worker, builder, store, most_bytes
        self._lock = threading.Lock()
        self._told: Plan | None = None
        self._plan: Plan | None = None
        self._giving: list[_Giving] = []
        self._taking: list[_Taking] = []

    def begin(self, plan: Plan, *, joins: bool) -> None:
        """In the watcher's thread: these moves are about to be made. A worker that waits to join listens at once; any
        other after its next step."""
        with self._lock:
            self._told = plan
            if joins:
                self._listen()

    # ---- in the worker's own thread ----

    def applied(self, state: LayerState, scale: float, lr: float) -> None:
        """A state is about to be updated: who has a copy makes the same update."""
        for side in self._giving:
            if state.name.isdigit() and int(state.name) in side.sent:
                header = [_UPDATE, int(state.name), state.version, state.generation]
                side.put((header, [scale, lr], state.gradient.detach().cpu().clone()))

    def stepped(self) -> None:
        """A step is committed: copy some more of what is to be given."""
        if self._told is not None:
            with self._lock:
                self._listen()
        for side in self._giving:
            room = self._most
            for layer in side.layers:
                state = self._worker.store.states.get(str(layer))
                if layer in side.sent or state is None:
                    continue
                flat = packed(state.tensors())
                if room < self._most and flat.numel() * 4 > room:
                    break
                room -= flat.numel() * 4
                side.put(([_STATE, layer, state.version, state.generation], [], flat))
                side.sent.add(layer)
            moving = sum(
                self._worker.store.states[str(n)].size for n in side.sent if str(n) in self._worker.store.states
            )
            if side.backlog > 4 * self._most + _MOST_COPIES * 4 * moving:
                side.well = False  # the way is slower than the steps: it will be moved when all wait

    def _listen(self) -> None:
        """Begin what was told of since."""
        plan, self._told = self._told, None
        if plan is None:
            return
        self._plan, me, store = plan, self._worker.id, self._worker.store
        for place, move in enumerate(plan.moves):
            if not (layers := layers_of(move, store.model.num_layers, store.model.tied)):
                continue
            pair = move.sources[0][0], move.worker
            if me not in pair:
                continue

            def build(place: int = place, pair: tuple[int, int] = pair) -> Group:
                builder = replace(self._builder(), ended=lambda: None if self._plan is plan else "the view has changed")
                return builder.build(f"migration{plan.number}/{place}", pair)

            def done(place: int = place) -> None:
                say_migrated(self._store, plan.number, place)

            if me == pair[0]:
                giving = _Giving(me, pair, layers)
                self._giving.append(giving)
                giving.start(partial(giving.run, build))
            else:
                taking = _Taking(me, pair, layers, states=store.prepare(layers))
                self._taking.append(taking)
                taking.start(partial(taking.run, build, done))

    def finish(self, view: int, layout: str) -> dict[str, int]:
        """The view changes: end all of it, at once where it is not the one that was told of. State -> the version of it
        that has come, for the store to adopt."""
        with self._lock:
            self._told = None
        planned = self._plan is not None and (self._plan.view, self._plan.layout) == (view, layout)
        for giving in self._giving:
            giving.put(([_END, 0, 0, 0], [], None))
        sides = [*self._giving, *self._taking]
        self._plan = None  # who has not met yet will not any more
        well = [side.stop(_STOPPING_S if planned else 0.0) for side in sides]
        self._giving, self._taking = [], []
        return {
            str(layer): side.states[str(layer)].version
            for side, ended_well in zip(sides, well, strict=True)
            if ended_well and isinstance(side, _Taking)
            for layer in side.there
        }


def _nothing() -> None:
    pass
