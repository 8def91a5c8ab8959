"""Fewer or more workers in the middle of a run: how few it goes on with, and when it lets others in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from typing import Annotated, Literal, Protocol

from pipeline.schedule.layout import Layout
from pipeline.settings import WEEK_S, RunShape, Within, require
from pipeline.state.resident import part_span
from recovery.membership import View
from recovery.speeds import Speeds


class SpeedPlanner(Protocol):
    """Gives layouts over the places that have workers."""

    def __call__(self, alive: Collection[int], speeds: Mapping[int, float], replicas: int = 1) -> Layout:
        """`speeds[place]` is how many times as fast a place is, where it is not as fast as usual; every layer is on
        `replicas` workers at least. Raises CannotRestore."""
        ...


@dataclass(frozen=True)
class ResizeSettings:
    """Read where --workers is MIN:MAX."""

    min_workers: Annotated[int, Within(0, 1024)] = 0
    """The MIN of --workers MIN:MAX: the fewest workers that the run goes on with. 0 is a run of one size, in which what
    is lost is replaced."""
    cooldown: Annotated[float, Within(0, WEEK_S)] = 10.0
    """Seconds after a change of size in which nobody is let in, unless there are fewer than MIN."""
    wait: Annotated[float, Within(0, WEEK_S)] = 0.0
    """Seconds for which fewer than MIN workers go on, in which others may come; then the run saves itself and ends with
    the code 75."""

    preempt_signal: Literal["none", "SIGUSR1", "SIGUSR2"] = "SIGUSR1"
    """What tells the agent of a machine that the machine is about to go: its workers hand over what they hold, and the
    others go on; the other one of the two signals takes that back. The machine of node 0 takes the run along, which
    saves itself."""
    migration_mib: Annotated[int, Within(0, 2**20)] = 64
    """MiB of state that each worker copies in a step while layers move in the background, before a change that was not
    brought by a loss. 0 moves them while all wait."""
    shift: bool = True
    """Whether layers move away from a worker that has become slow, and back, where that gains more than it costs."""
    grace: Annotated[float, Within(0.1, WEEK_S)] = 25.0
    """Seconds that a machine has left when it is told so; AWS gives 120, Google 30."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError for a range that is none, or that the scheduler or the remedy has no layouts for."""
        if self.min_workers == 0:
            return
        require(self.min_workers <= run.workers, "workers", f"{self.min_workers}:{run.workers}", "MIN:MAX, MIN first")
        require(
            run.scheduler not in ("skippipe", "roundpipe"), "workers", f"{self.min_workers}:{run.workers}",
            f"one number under scheduler {run.scheduler}, which goes on with the workers that are left by itself",
        )  # fmt: skip
        require(
            run.recovery not in ("redundant", "checkfree+"), "recovery", run.recovery,
            "one that keeps no copies in certain places, where workers are MIN:MAX",
        )  # fmt: skip
        require(
            not run.shard_optimizer, "workers", f"{self.min_workers}:{run.workers}",
            "one number with shard_optimizer: nobody has all moments, so a run of another size cannot copy them",
        )  # fmt: skip
        require(run.ends in ("auto", "in-line"), "ends", run.ends, "auto or in-line where workers are MIN:MAX")


@dataclass(frozen=True)
class Resize:
    """How a run changes its size: `planner` gives the layout over the places that have workers, `least` is how few it
    goes on with, for longer than `wait_s` seconds; nobody is let in for `cooldown_s` after a change. As many as there
    are `spares` of a machine are replaced at once instead."""

    planner: SpeedPlanner
    least: int
    cooldown_s: float
    wait_s: float
    spares: int = 0
    shifts: bool = False
    """Whether layers move away from a worker that has become slow."""
    migrates: float = 0.0
    """Bytes that a worker copies in a step while layers move in the background; 0 where none do."""
    layer_bytes: Sequence[float] = ()
    """What the state of each layer takes."""
    speeds: Speeds = field(default_factory=Speeds)

    def moved_bytes(self, view: View) -> float:
        """What the moves of a view carry."""
        return fsum(
            fsum(self.layer_bytes[lo:hi]) * len(move.sources)
            for move in view.moves
            if (span := part_span(move.part)) is not None
            for lo, hi in [span]
        )

    def bytes_of(self, layout: Layout, view: View, workers: Collection[int]) -> float:
        """What some workers of a view hold."""
        places = {view.places[worker] for worker in workers}
        held = (span for span, holders in layout.train.holders.items() if places & set(holders))
        return fsum(fsum(self.layer_bytes[lo:hi]) for lo, hi in held)
