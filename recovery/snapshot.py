"""A copy of each stage in the memory of the worker before it, kept up to date by the gradient of every step.

Who keeps it takes part in the sum of the gradient and applies the same update, so the copy is of the committed step,
bit for bit, at any time: a stage that is lost comes back from it, as from a replica, with no step lost. The gradients
that keep it so are 4 bytes a parameter in a step; weights and moments would be 12. A stage with replicas needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.settings import RunShape, require


@dataclass(frozen=True)
class SnapshotSettings:
    """Copies in memory."""

    snapshot: Literal["off", "neighbour"] = "off"
    """neighbour has every worker keep a copy of the next stage as well, exact after every step, from which a lost one
    comes back; it takes the memory of that stage's weights, gradients and moments, and nothing where --replicas is 2 or
    more. With --shard-optimizer, every replica keeps the share of the moments of the one before it as well."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError where nobody could keep a copy, or nobody would read it."""
        if self.snapshot == "off":
            return
        require(
            run.scheduler not in ("skippipe", "roundpipe", "balanced"), "snapshot", self.snapshot,
            f"off under scheduler {run.scheduler}",
        )  # fmt: skip
        require(
            run.recovery in ("auto", "exact", "replica", "checkfree"), "snapshot", self.snapshot,
            f"off under recovery {run.recovery}, which does not read it",
        )  # fmt: skip
        require(
            not run.shard_optimizer or run.replicas > 2, "snapshot", self.snapshot,
            "off with shard_optimizer and 2 replicas: each would keep all moments; 3 replicas or more",
        )  # fmt: skip
        require(run.workers > 1, "snapshot", self.snapshot, "off with one worker")
