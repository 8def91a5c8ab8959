"""The global batch in the words of other trainers.

    global batch = microbatches x microbatch_size = replicas x grad_accumulation x microbatch_size

Elsewhere microbatch_size is the batch size per device (transformers) or the local batch size (torchtitan), and replicas
the data-parallel degree. A run is kept with the number of microbatches alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pipeline.settings import Within, bounds_of, require


@dataclass(frozen=True)
class BatchSettings:
    """The global batch, in other words."""

    grad_accumulation: Annotated[int, Within(0, 65536)] = 0
    """Microbatches that each replica adds up in a step, in place of --microbatches: global batch = replicas x
    grad_accumulation x microbatch_size. 0 leaves it to --microbatches."""
    global_batch: Annotated[int, Within(0, 2**32)] = 0
    """Samples in a step, in place of --microbatches: there are global_batch / microbatch_size of them. 0 leaves it to
    --microbatches."""


def microbatches_of(said: BatchSettings, replicas: int, size: int, microbatches: int, asked: bool) -> int:
    """How many microbatches of `size` samples a step has. `microbatches` is what that setting says, which counts where
    nothing else does, or where somebody has `asked` for it. Raises ConfigError where two disagree."""
    for name, bounds in bounds_of(BatchSettings).items():
        require(getattr(said, name) in bounds, name, getattr(said, name), bounds)
    found = {"microbatches": microbatches} if asked else {}
    if said.grad_accumulation:
        found["grad_accumulation"] = said.grad_accumulation * replicas
    if said.global_batch and size > 0:  # which is refused later
        require(
            said.global_batch % size == 0, "global_batch", said.global_batch, f"a multiple of microbatch_size ({size})"
        )
        found["global_batch"] = said.global_batch // size
    first, *others = found or {"microbatches": microbatches}
    for name in others:
        told = f"{found[first]} microbatches, as {first} has it, or only one of both"
        require(found[name] == found[first], name, getattr(said, name), told)
    return found.get(first, microbatches)
