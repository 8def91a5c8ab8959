"""Carries the state of lost spans to the workers that take their places, and makes it theirs.

Source and joiner meet in a group of two that exists for this alone. A layer travels as one flat fp32 buffer, whose
layout both know from the model; nothing but numbers crosses the wire.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from pipeline.runtime.groups import Group
from pipeline.runtime.transport import LinkError
from pipeline.runtime.worker import Worker
from pipeline.schedule.ops import Span
from pipeline.state.optimizer import SpanOptimizer
from pipeline.state.resident import TIED
from recovery import checkpoint
from recovery.communicator import Communicator
from recovery.membership import START, Restore, View
from recovery.remedy import Remedy


def matching(layers: Sequence[int], source: Sequence[int]) -> list[int]:
    """For each of `layers` the source's layer in the same place; the source's last one where it has fewer."""
    return [source[min(i, len(source) - 1)] for i in range(len(layers))]


def restore(
    worker: Worker, view: View, communicator: Communicator, remedies: Mapping[str, Remedy], norms: Mapping[Span, float]
) -> None:
    """This worker's part in the restores of `view`: to send, to receive, or nothing. Raises LinkError.

    `norms` are the gradient norms of the last committed step, by span, the same on every worker. Each layer has the
    deadline of a step for itself: a stage of any size may be on its way as long as it comes on.
    """
    for number, each in enumerate(view.restores):
        if each.remedy not in remedies:
            raise LinkError(f"view {view.number} names the remedy {each.remedy!r}; known: {', '.join(remedies)}")
        places = [place for place, (source, _) in enumerate(each.sources) if worker.id in (source, each.worker)]
        names = [f"view{view.number}/restore{number}/{place}" for place in places]
        try:
            with _named(each):
                groups: list[Group] = []
                for name, place in zip(names, places, strict=True):
                    pair = (each.sources[place][0], each.worker)
                    groups.append(communicator.builder.build(name, pair))
                    communicator.carrying[name] = pair, groups[-1]
                if each.worker == worker.id:
                    _take(worker, view, each, groups, remedies[each.remedy], norms)
                else:
                    _give(worker, each, [each.sources[place][1] for place in places], groups, remedies[each.remedy])
        finally:
            for name in names:
                communicator.carrying.pop(name, None)


def _sent(worker: Worker, each: Restore, span: Span, carries: str) -> list[dict[str, Tensor]]:
    """What a source sends of `span`: a state for each layer of the lost one, from the layer in the same place."""
    last = worker.store.model.num_layers - 1
    if span == each.span:
        states = worker.store.span_states(span)
    else:
        states = [
            worker.store.layer_state(n) for n in matching(range(*each.span), [n for n in range(*span) if 0 < n < last])
        ]
    return [_carried(state, carries) for state in states]


def _carried(state: Mapping[str, Tensor], carries: str) -> dict[str, Tensor]:
    """In the order of the names' local parts, which layers of one kind share."""
    return {key: state[key] for key in sorted(state) if carries == "state" or key.startswith("param/")}


def _give(worker: Worker, each: Restore, spans: Sequence[Span], groups: Sequence[Group], remedy: Remedy) -> None:
    """Layer by layer, and within a layer in the order in which they are taken."""
    for states in zip(*(_sent(worker, each, span, remedy.carries) for span in spans), strict=True):
        for state, group in zip(states, groups, strict=True):
            flat = torch.cat([tensor.detach().float().cpu().reshape(-1) for tensor in state.values()])
            group.send([flat], 1, 0).wait(_patience(worker))
            worker.pulse()


@torch.no_grad()
def _take(
    worker: Worker, view: View, each: Restore, groups: Sequence[Group], remedy: Remedy, norms: Mapping[Span, float]
) -> None:
    shards = worker.store.shards_of(each.span)
    if not each.sources:
        _start_again(worker, view, shards)
    if remedy.carries == "weights":
        for shard in shards:  # an earlier remedy may have been interrupted, and have left a part of its state
            shard.begin_anew()
            shard.lr_scale.fill_(remedy.lr_scale)
    for whole in worker.store.span_states(each.span):
        mine = _carried(whole, remedy.carries)
        states: list[dict[str, Tensor]] = []
        for group in groups:
            flat = torch.empty(sum(tensor.numel() for tensor in mine.values()))
            group.recv([flat], 0, 0).wait(_patience(worker))
            worker.pulse()
            parts = flat.split([tensor.numel() for tensor in mine.values()])
            states.append({k: part.view(t.shape) for (k, t), part in zip(mine.items(), parts, strict=True)})
        weights = [norms.get(span, 0.0) for _, span in each.sources]
        for key, tensor in (remedy.combine(states, weights) or {}).items():
            mine[key].copy_(tensor)


def roll_back(worker: Worker, view: View, checkpoints: Path) -> int:
    """Go back to where `view` says; returns the step. Raises CheckpointError, ModelError.

    Who leads drops what was saved after it: who was about to save more is a member of `view` as well, or lost.
    """
    target = None if view.rollback == START else Path(view.rollback or "")
    if worker.id == min(view.workers):
        checkpoint.drop_newer(checkpoints, target, view.fence)
    if target is not None:
        return load_checkpoint(worker, target)
    _start_again(worker, view, worker.store.shards.values())
    return view.first_step


def _start_again(worker: Worker, view: View, shards: Iterable[SpanOptimizer]) -> None:
    """What a worker holds of these shards is as at the start of the run, or as of a worker that has just been built."""
    source = view.details["source"] if view.checkpoint is None else None
    worker.store.start_again(shards, worker.settings.seed, None if source is None else Path(source), worker.pulse)


def load_checkpoint(worker: Worker, path: Path) -> int:
    """Fill the worker's spans from a checkpoint that `checkpoint.find` has verified; returns its step."""
    manifest = checkpoint.read_manifest(path)
    for layer in worker.store.layers():
        if worker.store.layer_state(layer):
            worker.store.load_layer_state(layer, checkpoint.read_layer(path, manifest, layer))
            worker.pulse()
    if TIED in worker.store.shards:  # a head that sits elsewhere: its weight is in the embedding's file
        saved = checkpoint.read_layer(path, manifest, 0)
        with torch.no_grad():
            for key, tensor in worker.store.shard_state(TIED).items():
                tensor.copy_(saved[key])
    return int(manifest["extra"]["step"])


class _named:
    """Turns what gloo raises into a LinkError that says what was under way."""

    def __init__(self, each: Restore) -> None:
        self._each = each

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, LinkError):
            span = self._each.span
            raise LinkError(
                f"restoring span {span[0]}:{span[1]} on worker {self._each.worker} failed: {error}"
            ) from error


def _patience(worker: Worker) -> timedelta:
    return timedelta(seconds=worker.settings.deadline_s)
