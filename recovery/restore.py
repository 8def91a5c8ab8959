"""Carries the state of what was lost to the workers that take places, and makes it theirs.

Source and joiner meet in a group that they have in common, or in one of two that exists for this alone. A layer's
state travels as one flat fp32 buffer, whose layout both know from the model, behind a header that says of which step
and generation it is; nothing but numbers crosses the wire.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from pipeline.runtime.groups import Way, Work
from pipeline.runtime.transport import LinkError
from pipeline.runtime.worker import Worker
from pipeline.schedule.ops import parse_span
from pipeline.state.layer_state import UNFILLED, LayerState, LayerStates, packed, stamp, unpacked
from pipeline.state.source import Source, SourceRefused
from recovery import checkpoint
from recovery.checkpoint import CheckpointError
from recovery.communicator import Communicator
from recovery.membership import START, Move, View, part_name
from recovery.rehearse import SIDES, Rehearsal, give, take
from recovery.remedy import Remedy, states_of


def matching(layers: Sequence[int], source: Sequence[int]) -> list[int]:
    """For each of `layers` the source's layer in the same place; the source's last one where it has fewer."""
    return [source[min(i, len(source) - 1)] for i in range(len(layers))]


def restore(
    worker: Worker, view: View, communicator: Communicator, remedies: Mapping[str, Remedy], norms: Mapping[str, float],
    step: int, there: Mapping[int, Collection[str]] | None = None, rehearsal: Rehearsal | None = None,
) -> None:  # fmt: skip
    """This worker's part in the moves of `view`, in which `step` steps are committed: to send, to receive, or
    nothing. `there` are the states, by worker, that have moved beforehand. Raises LinkError, and SourceRefused for a
    state of another step or generation.

    `norms` are the gradient norms of the last committed step, by state, the same on every worker. Each layer has the
    deadline of a step for itself: a stage of any size may be on its way as long as it comes on. What no move brings is
    as the run began.
    """
    brought = {name for each in view.moves if each.worker == worker.id for name in states_of(each.part)}
    if bare := [state for state in worker.store.unfilled if state.name not in brought]:
        begin(worker, view, bare)
    for number, each in enumerate(view.moves):
        if each.remedy not in remedies:
            raise LinkError(f"view {view.number} names the remedy {each.remedy!r}; known: {', '.join(remedies)}")
        skip = set((there or {}).get(each.worker, ()))
        if states_of(each.part) <= skip:
            continue
        pairs = {place: (source, each.worker) for place, (source, _) in enumerate(each.sources)}
        mine = {place: pair for place, pair in pairs.items() if worker.id in pair and pair[0] != pair[1]}
        with _named(each), communicator.ways(view.number, number, mine) as ways:
            if each.worker == worker.id:
                _take(worker, view, each, ways, remedies[each.remedy], norms, step, skip, rehearsal)
            else:
                _give(worker, each, ways, remedies[each.remedy], skip)


def _sent(worker: Worker, each: Move, part: str) -> list[LayerState]:
    """What a source sends of its `part`: a state for each of the lost part, from the layer in the same place."""
    if part == each.part:
        return worker.store.states_of(part)
    blocks = _blocks(worker, part)
    found = {state.name: state for state in worker.store.states_of(part)}
    return [found[str(layer)] for layer in matching(range(*parse_span(each.part)), blocks)]


def _carried(state: LayerState, carries: str) -> dict[str, Tensor]:
    """In the order of the names' local parts, which layers of one kind share."""
    tensors = state.tensors()
    kinds = {key: key.partition("/")[0] for key in sorted(tensors)}
    moments = carries in ("state", "moments")
    return {key: tensors[key] for key, kind in kinds.items()
            if kind == "param" or (carries == "state" if kind == "lr_scale" else moments)}  # fmt: skip


def _give(worker: Worker, each: Move, ways: Mapping[int, Way], remedy: Remedy, skip: Collection[str]) -> None:
    """Layer by layer, and within a layer in the order in which they are taken; the next is packed while one is on its
    way."""
    if remedy.carries == "pairs":
        for place, way in ways.items():
            give(worker, way, SIDES[place], parse_span(each.part), _patience(worker))
    ways = {place: way for place, way in ways.items() if _resembles(worker, each, each.sources[place][1])}
    under_way: list[tuple[Work, Tensor]] = []
    for states in zip(*(_sent(worker, each, each.sources[place][1]) for place in ways), strict=True):
        if states and states[0].name in skip:
            continue
        for state, way in zip(states, ways.values(), strict=True):
            header, flat = torch.tensor([state.version, state.generation]), packed(_carried(state, remedy.carries))
            for work, _ in under_way:
                work.wait(_patience(worker))
            way.send(header).wait(_patience(worker))
            worker.probe("copy", state.version)
            under_way = [(way.send(flat), flat)]
            worker.pulse()
    for work, _ in under_way:
        work.wait(_patience(worker))


@torch.no_grad()
def _take(
    worker: Worker, view: View, each: Move, ways: Mapping[int, Way], remedy: Remedy, norms: Mapping[str, float],
    step: int, skip: Collection[str], rehearsal: Rehearsal | None,
) -> None:  # fmt: skip
    """Who takes may be a source as well, without a way: then it has a neighbour of what it lacks."""
    mine = worker.store.states_of(each.part)
    if not each.sources:
        _start_again(worker, view, mine)
    if remedy.carries != "state":
        for state in mine:  # an earlier remedy may have been interrupted, and have left a part of its state
            state.begin_anew()
            state.lr_scale.fill_(remedy.lr_scale)
    if remedy.carries == "pairs":
        try:
            begin(worker, view, mine)
        except CheckpointError:  # that is gone
            _draw(worker, view, mine, None)
        assert rehearsal is not None, "who can take a place knows its batches"
        span = parse_span(each.part)
        sides = [
            take(worker, ways[place], span, view.generation, _patience(worker))
            if place in ways
            else worker.boundaries.of(side, span)
            for place, side in enumerate(SIDES)
        ]
        pairs = rehearsal.pairs(sides[0], sides[1], worker.settings.device)

        def mean() -> bool:
            return _combine(worker, view, each, ways, remedy, norms, step, skip)

        rehearsal.rebuild(worker, span, pairs, mean)
        stamp(mine, step, view.generation)
        return
    _combine(worker, view, each, ways, remedy, norms, step, skip)


def _combine(
    worker: Worker, view: View, each: Move, ways: Mapping[int, Way], remedy: Remedy, norms: Mapping[str, float],
    step: int, skip: Collection[str],
) -> bool:  # fmt: skip
    """Receive what the sources have, layer by layer, and make the lost part of it; says whether there was anything."""
    mine = worker.store.states_of(each.part)
    sources = [source for source in enumerate(each.sources) if _resembles(worker, each, source[1][1])]
    weights = [_norm(worker, part, norms) for _, (_, part) in sources]
    own = {place: _sent(worker, each, part) for place, (_, part) in sources if place not in ways}
    for number, state in enumerate(mine):
        if state.name in skip:
            continue
        wanted = _carried(state, remedy.carries)
        found: list[dict[str, Tensor]] = []
        for place, (source, part) in sources:
            if place in own:
                have = _carried(own[place][number], remedy.carries)
                found.append(dict(zip(wanted, (tensor.clone() for tensor in have.values()), strict=True)))
                continue
            way = ways[place]
            header = torch.empty(2, dtype=torch.int64)
            way.recv(header).wait(_patience(worker))
            version, generation = header.tolist()
            Source(each.remedy, f"{part_name(part)} on worker {source}", version, generation).require(
                step, view.generation
            )
            worker.probe("copy", step)
            flat = torch.empty(sum(tensor.numel() for tensor in wanted.values()))
            way.recv(flat).wait(_patience(worker))
            worker.pulse()
            found.append(unpacked(flat, wanted))
        if (made := remedy.combine(found, weights)) is not None:
            state.put(made)
        elif state.version == UNFILLED:
            begin(worker, view, (state,))
        stamp((state,), step, view.generation)
        state.fingerprints()  # while the next is on its way
    return bool(sources)


def _resembles(worker: Worker, each: Move, part: str) -> bool:
    """Whether a source has layers like those that are lost: the same part, or a decoder block."""
    return part == each.part or bool(_blocks(worker, part))


def _blocks(worker: Worker, part: str) -> list[int]:
    """The decoder blocks of a span."""
    last = worker.store.model.num_layers - 1
    return [layer for layer in range(*parse_span(part)) if 0 < layer < last]


def _norm(worker: Worker, part: str, norms: Mapping[str, float]) -> float:
    """Of the last gradient of a whole part."""
    inside = states_of(part)
    names = [state.name for state in worker.store.model.states if state.name in inside]
    return math.sqrt(sum(norms.get(name, 0.0) ** 2 for name in names))


def roll_back(worker: Worker, view: View, checkpoints: Path) -> int:
    """Go back to where `view` says; returns the step. Raises CheckpointError, ModelError, SourceRefused.

    Who leads drops what was saved after it: who was about to save more is a member of `view` as well, or lost.
    """
    target = None if view.rollback == START else Path(view.rollback or "")
    if worker.id == min(view.workers):
        checkpoint.drop_newer(checkpoints, target, view.fence)
    worker.store.let_go()
    if target is not None:
        return load_checkpoint(worker.store, target, view.generation, worker.pulse)
    _start_again(worker, view, worker.store.states.values())
    return view.first_step


def _start_again(worker: Worker, view: View, states: Iterable[LayerState]) -> None:
    """These states are as at the start of the run, or as of a worker that has just been built. Raises SourceRefused
    where something was forgotten since."""
    path = view.details["source"] if view.checkpoint is None else None
    Source("start", "weights from the seed" if path is None else path, view.first_step, 0).require(
        None, view.generation
    )
    _draw(worker, view, states, path)


def _draw(worker: Worker, view: View, states: Iterable[LayerState], source: str | None) -> None:
    """Weights of `source`, or from the seed."""
    states = list(states)
    worker.store.start_again(states, None if source is None else Path(source))
    stamp(states, view.first_step, view.generation)


def begin(worker: Worker, view: View, states: Iterable[LayerState]) -> None:
    """Fill these states with what the run began with. Raises ModelError or CheckpointError where that is gone."""
    if view.checkpoint is None:
        _draw(worker, view, states, view.details["source"])
        return
    path, named = Path(view.checkpoint), {state.name: state for state in states}
    manifest = checkpoint.read_manifest(path)
    checkpoint.source(path, manifest).require(None, view.generation)
    specs = [spec for spec in worker.store.model.states if spec.name in named]
    for owner, owned in groupby(specs, lambda spec: spec.owner):
        tensors = checkpoint.read_layer(path, manifest, owner)
        for spec in owned:
            named[spec.name].load(tensors)
        worker.pulse()
    stamp(named.values(), view.first_step, view.generation)


def load_checkpoint(
    states: LayerStates, path: Path, generation: int = 0, came_on: Callable[[], None] = lambda: None
) -> int:
    """Fill states in from a checkpoint that `checkpoint.find` has verified, whichever scheduler has written it; returns
    its step. `came_on` is called after each layer. Raises CheckpointError, and SourceRefused for another generation."""
    manifest = checkpoint.read_manifest(path)
    source = checkpoint.source(path, manifest).require(None, generation)
    for layer in states.owners:
        states.load(layer, checkpoint.read_layer(path, manifest, layer), source.step, source.generation)
        came_on()
    return source.step


class _named:
    """Turns what gloo raises into a LinkError that says what was under way."""

    def __init__(self, each: Move) -> None:
        self._each = each

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, LinkError | SourceRefused):
            told = f"restoring {part_name(self._each.part)} on worker {self._each.worker} failed: {error}"
            raise LinkError(told) from error


def _patience(worker: Worker) -> timedelta:
    return timedelta(seconds=worker.settings.deadline_s)
