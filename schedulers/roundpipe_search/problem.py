"""What RoundPipe plans for: what layers cost, how many workers and microbatches there are, what fits into a device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from pipeline.schedule.costs import MOST_S, CostError, Costs, Network
from pipeline.schedule.ops import Span
from pipeline.schedule.work_units import Cut

_MOST_COUNT = 65536
"""Of layers, workers or microbatches."""


@dataclass(frozen=True)
class RoundsProblem:
    """Seconds are those of one microbatch on a worker of speed 1. Raises CostError for numbers that cannot be meant.

    Layer 0 is the embedding, the last one the head with the loss.
    """

    forward: tuple[float, ...]
    """Seconds of each layer's forward."""
    backward: tuple[float, ...]
    """Seconds of each layer's backward, without the forward that is run again before it."""
    workers: int
    microbatches: int
    at_once: int = 0
    """Microbatches that go through a span at once; 0: as many as there are workers, as published."""
    hop_s: float = 0.0
    """Seconds until what one worker made can be used by another."""
    sizes: tuple[float, ...] = ()
    """Bytes of each layer, where memory is limited."""
    room: float = math.inf
    """Bytes that one span may take: a device holds two."""

    def __post_init__(self) -> None:
        if len(self.forward) < 2 or len(self.forward) != len(self.backward):
            raise CostError(
                f"forward has {len(self.forward)} layers, backward {len(self.backward)}; allowed: as many, 2 or more"
            )
        if self.sizes and len(self.sizes) != len(self.forward):
            raise CostError(f"sizes has {len(self.sizes)} layers; allowed: {len(self.forward)}, as forward has")
        for name in ("workers", "microbatches"):
            if (value := getattr(self, name)) < 1:
                raise CostError(f"{name} is {value}; allowed: 1 or more")
        if not 0 <= self.at_once <= self.microbatches:
            raise CostError(f"at_once is {self.at_once}; allowed: 0 to microbatches ({self.microbatches})")
        if self.sizes and (largest := max(self.sizes)) > self.room:
            layer = self.sizes.index(largest)
            raise CostError(
                f"layer {layer} takes {largest:.4g} bytes; allowed: {self.room:.4g}, the room of one of two spans"
            )
        for name in ("forward", "backward"):
            Costs(getattr(self, name))
        Costs(hop := self.hop_s, backward=hop)

    @property
    def round(self) -> int:
        """Microbatches that go through a span at once."""
        return self.at_once or min(self.workers, self.microbatches)

    @property
    def num_layers(self) -> int:
        return len(self.forward)

    @property
    def costs(self) -> Costs:
        """For the simulator."""
        return Costs(self.forward, self.backward)

    @property
    def network(self) -> Network:
        """For the simulator: what goes through host memory takes `hop_s`, whoever it is from."""
        return Network.uniform(self.workers, self.hop_s)

    def work(self, cut: Cut) -> float:
        """Seconds of compute of an iteration, over all workers: each forward outside the fused span is run twice."""
        last = cut.fused[0]
        once = math.fsum(self.forward) + math.fsum(self.backward) + math.fsum(self.forward[:last])
        return self.microbatches * once

    def bubble(self, cut: Cut, makespan: float) -> float:
        """The share of the workers' time in which they do nothing."""
        return 1 - self.work(cut) / (self.workers * makespan)

    def fits(self, span: Span) -> bool:
        """Whether a span is small enough for its half of a device."""
        return not self.sizes or math.fsum(self.sizes[span[0] : span[1]]) <= self.room


def sums(values: Sequence[float]) -> list[float]:
    """[0, v0, v0 + v1, ...]: a span's sum is a difference of two."""
    return [0.0, *accumulate(values)]


def cut_from(forward: Sequence[int], backward: Sequence[int], num_layers: int) -> Cut:
    """The cut of a published partition: decoder blocks per forward stage, and per backward stage, in which the first
    holds the head as well. The embedding goes with the first blocks. Raises CostError where they do not agree."""
    blocks = num_layers - 2
    for name, counts in (("forward", forward), ("backward", backward)):
        if sum(counts) != blocks or any(n < 0 for n in counts) or not counts:
            raise CostError(f"published_{name} is {list(counts)}; allowed: numbers of blocks that sum to {blocks}")
    fused = (num_layers - 1 - backward[0], num_layers)
    if backward[0]:
        raise CostError(f"published_backward begins with {backward[0]} blocks beside the head; allowed: 0, which the "
                        "forward stages, that cover all blocks, leave to it")  # fmt: skip
    return Cut(spans_from(forward, fused[0]), fused, spans_from(backward[:0:-1], fused[0])[::-1])


def spans_from(blocks: Sequence[int], end: int) -> tuple[Span, ...]:
    """Spans of so many blocks each, from layer 0, which is no block and goes with the first, to `end`."""
    marks = [0, *(1 + n for n in accumulate(n for n in blocks if n))]
    if marks[-1] != end:
        raise CostError(f"{list(blocks)} blocks end at layer {marks[-1]}; allowed: {end}")
    return tuple(pairwise(marks))


def rounds_from_json(values: Any, model: str) -> tuple[RoundsProblem, Cut | None]:
    """A model of a file of published costs, and its published cut if it has one. Raises CostError.

    The file has gpus, microbatches, round and models; a model has layers (blocks), forward_ms, backward_ms,
    head_forward_ms, head_backward_ms and hop_ms; published_forward and published_backward as in `cut_from`.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("models"), Mapping):
        raise CostError("costs have no 'models'; allowed: an object with gpus, microbatches, round and models")
    models = values["models"]
    if model not in models:
        raise CostError(f"model is {model!r}; allowed: {', '.join(map(str, models)) or 'none, the file has no model'}")
    entry = models[model]

    def number(where: Mapping[str, Any], name: str, kind: type = float, default: float | None = None) -> Any:
        value: Any = where.get(name, default) if isinstance(where, Mapping) else None
        what = "a whole number" if kind is int else "a number"
        most = _MOST_COUNT if kind is int else MOST_S
        bad = not isinstance(value, int | float) or isinstance(value, bool)
        if bad or not 0 <= value <= most or kind(value) != value:
            raise CostError(f"{name} of {model!r} is {value!r:.40}; allowed: {what} of 0 to {most:g}")
        return kind(value)

    blocks = number(entry, "layers", int)
    forward, backward = number(entry, "forward_ms") / 1e3, number(entry, "backward_ms") / 1e3
    problem = RoundsProblem(
        (0.0, *[forward] * blocks, number(entry, "head_forward_ms") / 1e3),
        (0.0, *[backward] * blocks, number(entry, "head_backward_ms") / 1e3),
        number(values, "gpus", int), number(values, "microbatches", int), number(values, "round", int, 0),
        number(entry, "hop_ms", default=0.0) / 1e3,
    )  # fmt: skip
    if "published_forward" not in entry:
        return problem, None
    published = [entry.get(name) for name in ("published_forward", "published_backward")]
    for name, counts in zip(("published_forward", "published_backward"), published, strict=True):
        if not isinstance(counts, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in counts):
            raise CostError(f"{name} of {model!r} is {counts!r:.80}; allowed: a list of numbers of blocks")
    forward_blocks, backward_blocks = published
    return problem, cut_from(forward_blocks, backward_blocks, problem.num_layers)
