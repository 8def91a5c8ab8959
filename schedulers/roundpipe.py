"""RoundPipe (ITcarrot/RoundPipe, arXiv April 2026): stages are dealt to workers that hold nothing.

Forward and backward are cut independently, since a backward stage that recomputes holds about a third of the layers in
the same time; the last forward, the loss and the first backward are one stage, which recomputes nothing. On S equal
stages and R rounds of N microbatches over N workers the bubble is (N - 1) / (R S + N - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Literal

from pipeline.settings import RunShape, Within, require, require_owner
from schedulers.roundpipe_search.clock import RULES, Clock, Dealt, dealt, repeated
from schedulers.roundpipe_search.problem import RoundsProblem, cut_from, rounds_from_json
from schedulers.roundpipe_search.search import ORDERS, search

__all__ = [
    "ORDERS", "RULES", "Clock", "Dealt", "RoundPipeSettings", "RoundsProblem", "cut_from", "dealt", "ideal_bubble",
    "repeated", "rounds_from_json", "search",
]  # fmt: skip


@dataclass(frozen=True)
class RoundPipeSettings:
    """Read by --scheduler roundpipe."""

    at_once: Annotated[int, Within(0, 65536)] = 0
    """Microbatches that go through a span before another is loaded; 0 for half of them.
    Their gradients are summed first, so the sum depends on it, and not on --workers."""
    rule: Literal["ready", "round_robin"] = "ready"
    """Who gets the next span: the worker that will be through with it first, by measured
    speed, or the next one in turn, as published."""
    optimizer_async: bool = False
    """Apply an update while the next iteration computes with the weights before it."""
    cpu_adam: Literal["torch", "deepspeed"] = "torch"
    """Whose AdamW updates the weights in host memory; torch's is the faster one."""
    span_mib: Annotated[int, Within(0, 2**24)] = 0
    """MiB that the weights of one span may take, in fp32: a worker holds two of them, in the
    dtype that is computed in, and on a GPU the fp32 gradients of two; 0 has these take half of
    a GPU's memory, and is no limit on the CPU."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the gradients of a round go to the host in. On the worker they are summed in
    float32; bfloat16 halves what goes over the bus, and rounds each round's sum."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError for what workers that hold nothing cannot do, or need not, and where these settings are not
        read."""
        require_owner(
            self,
            RoundPipeSettings,
            ("optimizer_async", "at_once", "span_mib", "cpu_adam", "gradient_dtype"),
            "roundpipe",
        )
        if run.scheduler != "roundpipe":
            return
        for name, only in (("replicas", 1), ("nodes", 1), ("spares", 0), ("network", None), ("ends", "auto")):
            require(getattr(run, name) == only, name, getattr(run, name), f"{only} under scheduler roundpipe")
        require(
            run.recovery == "auto", "recovery", run.recovery,
            "auto under scheduler roundpipe: what a lost worker had is dealt to the others",
        )  # fmt: skip
        require(
            self.cpu_adam == "torch" or find_spec("deepspeed") is not None, "cpu_adam", self.cpu_adam,
            "torch, as deepspeed is not installed (pip install 'unbroken[deepspeed]')",
        )  # fmt: skip
        require(self.at_once <= run.microbatches, "at_once", self.at_once, f"0 to microbatches ({run.microbatches})")


def ideal_bubble(workers: int, rounds: int, stages: int) -> float:
    """The bubble of `rounds` rounds of `workers` microbatches through `stages` equal stages: (N-1) / (R S + N-1)."""
    return (workers - 1) / (rounds * stages + workers - 1)
