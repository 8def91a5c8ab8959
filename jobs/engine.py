"""What a trainer trains with. There are two engines: the resident pipeline, in which every worker runs the trainer, and
the pool of stateless workers, of which the host runs it. How each of them fails, and goes on, stays behind this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from pipeline.runtime.worker import StepResult
from pipeline.state.layer_state import LayerStates
from pipeline.wire import WireError, checked
from recovery.checkpoint import Fence
from recovery.member import Joined
from recovery.membership import MembershipError


@dataclass(frozen=True)
class Position:
    """Where training stands: equal on all workers of a view. `step` counts the committed steps, `due` says that what
    follows a step is still to do, `stopping` that the run is to save itself and stop, `again` that the step under way
    is run again, because its loss was not finite. `watched` is what --patience has seen (see jobs.patience)."""

    step: int = 0
    due: bool = False
    stopping: bool = False
    again: bool = False
    carried: dict[str, Any] = field(default_factory=dict)
    """What the job carries from step to step (JSON)."""
    watched: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Position:
        """What another worker has told. Raises MembershipError for what is no position."""
        try:
            kinds = {"step": int, "due": bool, "stopping": bool, "again": bool, "carried": dict, "watched": dict}
            return cls(**checked(values, "a position", **kinds))
        except WireError as error:
            raise MembershipError(str(error)) from error


class ReportSink(Protocol):
    """The way of records {"kind": "step" | "evaluation" | "event" | "timeline" | ..., ...} to who keeps them."""

    def put(self, record: dict[str, Any], /) -> None: ...

    def save_ledger(self, step: int, view: int, /) -> str:
        """Have every step up to `step` on the disk, in the ledger, for a checkpoint of `view`; why that cannot be, or
        "": then the checkpoint may be made true."""
        ...


class Engine(Protocol):
    """Runs the steps of a job, and holds the layer states. A method that says *together* is called by the trainers of
    all members of a view at the same point, and is a wait for the last of them."""

    interruptions: tuple[type[Exception], ...]
    """What ends a view in the middle of anything; the state is then that of the last committed step."""

    @property
    def leads(self) -> bool:
        """Whether this trainer reports for all."""
        ...

    @property
    def fence(self) -> Fence:
        """(attempt, view): what is saved now."""
        ...

    @property
    def generation(self) -> int: ...

    def enter(self, at: Position, last: dict[str, Any] | None) -> Joined | None:
        """Take part from now on, or again after an interruption; `last` is the last step's record. Returns how, if that
        is to be told."""
        ...

    def interrupted(self, error: Exception) -> None:
        """An interruption has been caught."""
        ...

    def run(
        self, step: int, *, wish: Callable[[], Mapping[str, Any]], record: bool, pauses: Callable[[int], bool]
    ) -> StepResult:
        """Run a step to its commit, together. `wish()` is asked late and told to all; `pauses(n)` says whether
        something is to follow the step that makes it n. Raises NonFiniteLoss where nothing was committed."""
        ...

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of which the devices of all members are capable together, where that is known."""
        ...

    @property
    def ahead(self) -> bool:
        """Whether the next step is under way already: nothing can come before it, nor can this one be run again."""
        ...

    @property
    def at_once(self) -> int:
        """How many microbatches `measure` takes."""
        ...

    def measure(self, job: str, part: int) -> StepResult:
        """What the loss of a job of this name comes to over its `at_once` microbatches of step `part`, with the weights
        as they are, together. Raises NonFiniteLoss."""
        ...

    def evaluate(self) -> StepResult:
        """The held-out loss of the weights as they are, together. Raises NonFiniteLoss."""
        ...

    def gather(self, payload: dict[str, Any]) -> Mapping[int, dict[str, Any]]:
        """Everyone's payload (JSON), by member, together."""
        ...

    def about(self) -> dict[str, Any]:
        """What a step's record says of the membership: at least `view`."""
        ...

    def timeline(self, result: StepResult) -> Mapping[str, Any]:
        """Place -> [(op, start, end)] in seconds, of a step that was recorded, together."""
        ...

    # ---- states ----

    def rest(self) -> None:
        """Return once nothing changes the states."""
        ...

    def missing(self) -> list[int]:
        """The layers that nobody holds at the moment: they are being rebuilt."""
        ...

    def owners(self) -> Mapping[int, int]:
        """Layer -> the member that writes it, the same for all."""
        ...

    @property
    def me(self) -> int:
        """The member that this trainer is."""
        ...

    @property
    def states(self) -> LayerStates:
        """Those that this member holds."""
        ...

    def whole_moments(self) -> Mapping[str, Tensor]:
        """The moments, by their keys, of the layers that this member owns where it keeps a share of them alone; they
        take the place of those in `states`. Together."""
        ...

    def pulse(self) -> None:
        """Something long comes on."""
        ...

    def layout(self) -> Mapping[str, Any]:
        """Who computes which spans, for a person who reads a manifest."""
        ...
