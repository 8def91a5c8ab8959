"""Rehearse: a lost stage is fitted to what its neighbours still have of its last inputs and outputs.

The worker before a stage has sent it hidden states, the one after it has received what came of them, and both keep the
last of them (`pipeline/runtime/boundaries.py`). Whoever takes the stage's place begins with its neighbours' mean, as
under CheckFree, unless that is far worse than what it was built with, and is then fitted to those pairs, in closed form
and by gradient descent (`pipeline/model/stage_fit.py`), which takes seconds, while the others wait. Neighbours that
have nothing yet leave it with the mean. So it needs no neighbour that resembles it: the first and the last stage of
blocks come back as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from pipeline.model.layered import LayeredModel
from pipeline.model.output_fit import linear_outputs
from pipeline.model.passed import Passed, relative_error
from pipeline.model.span_module import SpanModule
from pipeline.model.stage_fit import fit_stage, most_tokens
from pipeline.runtime.batch import Batch
from pipeline.runtime.boundaries import Passage, Side
from pipeline.runtime.groups import Way
from pipeline.runtime.transport import span_bytes
from pipeline.runtime.worker import Worker
from pipeline.schedule.ops import Span, span_text
from pipeline.settings import Within, require
from pipeline.state.source import Source
from recovery.checkfree import Average
from recovery.membership import Move
from recovery.remedy import CannotRestore, Carries, Loss, State

FEWEST = 8
"""Microbatches that are worth a fit."""
FAR = 2.0
"""How many times the error of the stage as built its neighbours' mean may have: the features of trained blocks are
worth more than their outputs, and need smaller weights."""
SIDES: tuple[Side, Side] = ("into", "out of")
"""What the worker before, and the worker after, have of a span: in the order of a move's sources."""
_DIMS = 3  # of a hidden state: batch, sequence, hidden


@dataclass(frozen=True)
class RehearseSettings:
    """Read by the remedy rehearse."""

    rehearse_mib: Annotated[int, Within(1, 1_048_576)] = 64
    """--recovery rehearse: MiB that a worker keeps, at most, of the hidden states that it sent to the next stage in the
    last steps, and as much of those that it received from the one before; less where less is needed."""


def boundary_bytes(shape: BatchShape, model: LayeredModel) -> int:
    """Of the hidden states that a worker keeps of each side: as many as it is worth fitting to, but no more than it may
    keep; 0 where that is too little for a fit, or where blocks could not be fitted."""
    fewest, most = FEWEST * _microbatch(shape, model), shape.rehearse_mib << 20
    if fewest > most or model.family.out_of_attention is None:
        return 0
    return min(max(span_bytes(1, most_tokens(model), model.hidden_size, torch.bfloat16), fewest), most)


def require_room(shape: BatchShape, model: LayeredModel) -> None:
    """Raise ConfigError for a run that asks for rehearse where what may be kept is too little for it."""
    size = _microbatch(shape, model)
    require(
        shape.recovery != "rehearse" or FEWEST * size <= shape.rehearse_mib << 20, "rehearse_mib", shape.rehearse_mib,
        f"{-(-FEWEST * size >> 20)} or more with recovery rehearse, for {FEWEST} microbatches of {size:,} bytes",
    )  # fmt: skip


def _microbatch(shape: BatchShape, model: LayeredModel) -> int:
    """Bytes of one, as it is kept."""
    return span_bytes(shape.microbatch_size, shape.sequence_length, model.hidden_size, torch.bfloat16)


class BatchShape(Protocol):
    """Of the settings of a run, what says how much a microbatch is."""

    @property
    def recovery(self) -> str: ...
    @property
    def rehearse_mib(self) -> int: ...
    @property
    def microbatch_size(self) -> int: ...
    @property
    def sequence_length(self) -> int: ...


class Rehearse(Average):
    """The mean of both neighbours, or what is at hand, and then a fit to what both know of the stage."""

    name = "rehearse"

    def __init__(self, weights: str = "norm") -> None:
        super().__init__(weights, lr_scale=1.0)
        self.carries: Carries = "pairs"

    def plan(self, loss: Loss) -> Move:
        """From the workers before and after, whatever they hold. Neither may be lost."""
        name = loss.name
        if not loss.blocks:
            raise CannotRestore(f"{name} holds the embedding or the head, which is not what goes in or comes out")
        sources = loss.neighbours()
        if len(loss.ring) > 1:
            raise CannotRestore(f"{len(loss.ring)} workers are to hold {name}, and must come out equal")
        return loss.restored(self.name, *sources)

    def combine(self, states: Sequence[State], norms: Sequence[float]) -> State | None:
        """The mean of those neighbours that hold blocks; where none does it stays as it was built."""
        return super().combine(states, norms) if states else None


@dataclass(frozen=True)
class Rehearsal:
    """What a worker needs to be fitted: `batch(step, microbatch)` has the masks and positions of a microbatch; `told`
    is told what came of it."""

    batch: Callable[[int, int], Batch]
    told: Callable[[Mapping[str, Any]], None] = lambda _: None

    def pairs(
        self, into: Mapping[Passage, Tensor], out: Mapping[Passage, Tensor], device: torch.device
    ) -> list[Passed]:
        """The microbatches of which both sides are known, oldest first."""
        found: list[Passed] = []
        for passage in [passage for passage in into if passage in out]:
            batch = self.batch(passage.step, passage.microbatch)
            given = {name: batch.get(name) for name in ("attention_mask", "position_ids")}
            moved = {name: None if tensor is None else tensor.to(device) for name, tensor in given.items()}
            found.append(Passed(into[passage].to(device), out[passage].to(device), **moved))
        return found

    @torch.no_grad()
    def rebuild(self, worker: Worker, span: Span, pairs: Sequence[Passed], mean: Callable[[], bool]) -> None:
        """Fit a span that has just been built. `mean()` fills in that of its neighbours, and says whether there is
        one."""
        began, module, where = time.monotonic(), _part_of(worker.store.modules, span), {"span": span_text(span)}
        if (reason := _why_not(module, pairs)) or module is None:
            start = "the mean of its neighbours" if mean() else "what it was built with"
            self.told({"event": "not_rehearsed", **where, "reason": f"{reason}; it begins as {start}"})
            return
        training = module.training
        module.eval()
        start, built = "what it was built with", {name: weight.clone() for name, weight in module.state_dict().items()}
        error = relative_error(module, pairs[-1:], worker.pulse)
        if mean():
            if relative_error(module, pairs[-1:], worker.pulse) < FAR * error:
                start = "the mean of its neighbours"
            else:
                module.load_state_dict(built)
        del built
        fit = fit_stage(module, pairs, worker.pulse)
        module.train(training)
        self.told(
            {"event": "rehearsed", **where, "start": start, "tokens": fit.tokens, "error_before": fit.before,
             "error_after": fit.after, "took": time.monotonic() - began}
        )  # fmt: skip


def _part_of(modules: Mapping[Span, SpanModule], span: Span) -> SpanModule | None:
    """A run of layers of a span that is held, which may be longer: the lost stage may have come to somebody who has
    others too."""
    for (lo, hi), module in modules.items():
        if lo <= span[0] and span[1] <= hi:
            layers = {str(n): module.layers[str(n)] for n in range(*span)}
            return module if (lo, hi) == span else SpanModule(module.model, span, layers, module.rotary)
    return None


def _why_not(module: SpanModule | None, pairs: Sequence[Passed]) -> str:
    """Why a span cannot be fitted, or ""."""
    if module is None or not linear_outputs(module):
        return "what its blocks add is not linear in trained weights"
    if len(pairs) < FEWEST:
        return f"its neighbours have {len(pairs)} microbatches in common; {FEWEST} or more are needed"
    return ""


def give(worker: Worker, way: Way, side: Side, span: Span, patience: timedelta) -> None:
    """Send what this worker has of one side of a span: how many, whose, of which shapes, and then each."""
    kept = worker.boundaries.of(side, span)
    way.send(torch.tensor([len(kept), worker.boundaries.generation])).wait(patience)
    if not kept:
        return
    way.send(torch.tensor([[*passage, *hidden.shape] for passage, hidden in kept.items()])).wait(patience)
    for hidden in kept.values():
        way.send(hidden.cpu().contiguous().view(torch.int16)).wait(patience)
        worker.pulse()


def take(worker: Worker, way: Way, span: Span, generation: int, patience: timedelta) -> dict[Passage, Tensor]:
    """Receive what `give` sends: hidden states [batch, sequence, hidden], bfloat16, on the host. Raises SourceRefused
    for those of another generation."""
    header = torch.empty(2, dtype=torch.int64)
    way.recv(header).wait(patience)
    count, its = header.tolist()
    if count == 0:
        return {}
    Source("rehearse", f"what a neighbour of span {span_text(span)} keeps", 0, its).require(None, generation)
    rows = torch.empty(count, len(Passage._fields) + _DIMS, dtype=torch.int64)
    way.recv(rows).wait(patience)
    found: dict[Passage, Tensor] = {}
    for row in rows.tolist():
        bits = torch.empty(row[-_DIMS:], dtype=torch.int16)
        way.recv(bits).wait(patience)
        found[Passage(*row[:-_DIMS])] = bits.view(torch.bfloat16)
        worker.pulse()
    return found
