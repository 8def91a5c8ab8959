"""Interleaved 1F1B: each worker holds several spans, so the pipeline fills in shorter steps.

Microbatches go in rounds of about one per stage; within a round a worker runs its first span for all of them, then its
second. Source: Narayanan et al., 2021 (arXiv 2104.04473), section 2.2, which asks for a multiple of p microbatches.
Here rounds may be longer than p, by as little as they must, so any number runs. Bubble (p-1)/(v*m+p-1) for v spans
per worker, where p divides m; paid with v times the messages and somewhat more activations than 1F1B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Annotated

from pipeline.schedule.ops import B, F, Op, Schedule, Span
from pipeline.settings import RunShape, Within, limit_work
from schedulers.chain import chain


@dataclass(frozen=True)
class InterleavedSettings:
    """Read by --scheduler interleaved."""

    chunks: Annotated[int, Within(1, 1024)] = 2
    """Spans per worker."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError for a schedule that would be too large."""
        if run.scheduler == "interleaved":
            limit_work("stages", run.stages * self.chunks, run.microbatches)


def interleaved(spans: Sequence[Span], microbatches: int, replicas: int = 1, chunks: int = 2) -> Schedule:
    """Worker w of a replica holds spans w, w + p, w + 2p, ... where p = len(spans) / chunks.

    Raises ValueError for sizes below 1 and where `chunks` does not divide the number of spans.
    """
    if chunks < 1 or len(spans) % chunks:
        raise ValueError(f"chunks: {chunks} with {len(spans)} spans; allowed: a divisor of the number of spans")
    stages = len(spans) // chunks

    def lane(stage: int, mine: Sequence[int]) -> Iterator[Op]:
        held = spans[stage::stages]
        forwards = [Op(F, span, m) for span, m in by_rounds(held, mine, stages)]
        backwards = [Op(B, span, m) for span, m in by_rounds(held[::-1], mine, stages)]
        longest = max(map(len, rounds(mine, stages)), default=0)
        warm = min(len(forwards), 2 * (stages - 1 - stage) + (chunks - 1) * longest)
        yield from forwards[:warm]
        for forward, backward in zip_longest(forwards[warm:], backwards):
            if forward is not None:
                yield forward
            yield backward

    return chain("interleaved", spans, microbatches, replicas, lane, stages=stages)


def rounds(microbatches: Sequence[int], stages: int) -> list[Sequence[int]]:
    """The microbatches in runs of at least `stages` (where there are so many), equal within one."""
    count = max(1, len(microbatches) // stages)
    size, longer = divmod(len(microbatches), count)
    ends = [i * size + min(i, longer) for i in range(count + 1)]
    return [microbatches[a:b] for a, b in pairwise(ends)]


def by_rounds(spans: Sequence[Span], microbatches: Sequence[int], stages: int) -> Iterator[tuple[Span, int]]:
    """(span, microbatch) in the order in which a worker that holds several spans meets them."""
    return ((span, m) for turn in rounds(microbatches, stages) for span in spans for m in turn)
