"""Where a layer state comes from. Whatever way it takes, it says what it is of, and one check refuses what is not
wanted."""

from __future__ import annotations

from dataclasses import dataclass


class SourceRefused(RuntimeError):
    """A state of another step or generation than the one that is wanted. Names the source, what it has and what is
    wanted."""


@dataclass(frozen=True)
class Source:
    """A place that has states: `kind` (a remedy's name, "checkpoint", "start", "host") and `where` for a person to
    find it; the committed `step` and the `generation` that they are of."""

    kind: str
    where: str
    step: int
    generation: int

    def require(self, step: int | None, generation: int) -> Source:
        """This source, if it has what is wanted; a `step` of None is any. Raises SourceRefused."""
        if step is not None and self.step != step:
            raise SourceRefused(f"{self.kind} of {self.where} is of step {self.step}; wanted is step {step}")
        if self.generation != generation:
            raise SourceRefused(
                f"{self.kind} of {self.where} is of generation {self.generation}; the run is at generation "
                f"{generation}, and nothing of another may come back"
            )
        return self
