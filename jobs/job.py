"""What a run asks of a job beside the engine: where it is in its data, and what it carries from step to step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.runtime.batch import Job
from pipeline.runtime.curvature import FitJob
from pipeline.runtime.procedure import Procedure

if TYPE_CHECKING:
    from jobs.engine import Engine


class RunJob(Job, Protocol):
    """A job that a trainer can run, save and go on with."""

    @property
    def microbatches(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def limit(self) -> int | None: ...

    def next_sample(self, step: int, /) -> int:
        """The first sample id that steps before `step` did not take."""
        ...

    def sources(self, step: int, /) -> dict[str, int]:
        """How many samples of a step are from each source of a mixture; nothing where there is one source."""
        ...

    @property
    def carried(self) -> dict[str, Any]:
        """What the next step depends on beside weights and data (JSON): equal on all workers, saved and moved with the
        run."""
        ...

    def prepare(self, engine: Engine, step: int, /) -> None:
        """What the microbatches of a step follow from beside data is computed, together, with the weights as they are
        before it. Interrupted anywhere, or with the step after it, it is done again. Raises NonFiniteLoss."""
        ...

    @property
    def procedure(self) -> Procedure | None:
        """What makes its steps, where they are more than a gradient of its terms; it then is a ProcedureJob."""
        ...

    def fitting(self, kind: str, step: int, /) -> FitJob:
        """See ProcedureJob."""
        ...

    def committed(self, step: int, means: Mapping[str, float], /) -> None:
        """A step is committed, and its terms had these means."""
        ...

    def restore(self, carried: Mapping[str, Any], /) -> None:
        """Go on from what another has carried."""
        ...


@dataclass(frozen=True)
class Start:
    """Where a run begins: with which step and sample, and what its job carries there; None for what it begins with. An
    evaluation is run `at_once` microbatches at a time, or whole."""

    step: int = 0
    sample: int = 0
    at_once: int | None = None
    carried: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class SampledJob:
    """A job whose samples are one sequence of global ids, whatever the number of workers: step s takes those from
    first_sample + (s - first_step) * microbatches * size on. `limit` bounds the ids (an evaluation); the last
    microbatch is cut. It carries nothing from step to step."""

    microbatches: int
    size: int
    first_step: int = 0
    first_sample: int = 0
    limit: int | None = None
    source: Callable[[int], str] | None = None
    """What a sample is from, by its id, where there are several sources."""

    def sample_ids(self, step: int, microbatch: int) -> tuple[int, ...]:
        """The global ids of a microbatch's samples."""
        start = self.next_sample(step) + microbatch * self.size
        end = start + self.size if self.limit is None else min(start + self.size, self.limit)
        return tuple(range(start, end))

    def next_sample(self, step: int) -> int:
        """See RunJob."""
        return self.first_sample + (step - self.first_step) * self.microbatches * self.size

    def sources(self, step: int) -> dict[str, int]:
        """See RunJob."""
        if self.source is None:
            return {}
        return dict(
            sorted(Counter(map(self.source, range(self.next_sample(step), self.next_sample(step + 1)))).items())
        )

    @property
    def carried(self) -> dict[str, Any]:
        """See RunJob."""
        return {}

    def prepare(self, engine: Engine, step: int) -> None:
        """See RunJob."""

    @property
    def procedure(self) -> Procedure | None:
        """See RunJob."""
        return None

    def fitting(self, kind: str, step: int) -> FitJob:
        """See RunJob."""
        raise NotImplementedError

    def committed(self, step: int, means: Mapping[str, float]) -> None:
        """See RunJob."""

    def restore(self, carried: Mapping[str, Any]) -> None:
        """See RunJob."""
