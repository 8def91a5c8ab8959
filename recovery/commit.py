"""How the workers of a view settle a step: each votes once, and the outcome is written once, in one place.

The last to vote reads all votes, combines them and writes "commit" with what comes of it; the coordinator, when it
changes the view, writes "abort", and so does a worker that gives up waiting. The first wins, by compare-and-set, and
all obey what stands there, so a step is committed on all workers or on none, whichever dies and whenever. All wait on
that one key of a store that outlives any worker, and read it alone; nobody waits inside a collective whose other
members may be dead.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from pipeline.runtime.step_commit import Combine, everything
from pipeline.store.waiting import came
from pipeline.wire import WireError, parse
from recovery.keys import outcome_key, vote_key, votes_key

COMMIT, ABORT = "commit", "abort"
_SLICE_S = 0.5  # how often who waits without end asks whether there is a coordinator
READY = 2
"""The iteration of a view by which all its members are ready; 1 is that they are there."""


class CommitError(RuntimeError):
    """A step could not be settled: names the workers whose vote did not come."""


class Aborted(RuntimeError):
    """The coordinator has ended this step, because the view changes. Nothing of it counts."""


def decide(store: dist.Store, view: int, iteration: int, outcome: str) -> str:
    """Write the outcome of an iteration, unless it has one; returns the outcome that stands."""
    return _outcome(store.compare_set(outcome_key(view, iteration), "", outcome))


def _outcome(stands: bytes) -> str:
    return COMMIT if stands.split(b"\n", 1)[0] == COMMIT.encode() else ABORT


@dataclass
class Ballot:
    """The votes of one worker in one view. Calling it has the form of `pipeline.runtime.step_commit.Exchange`."""

    store: dist.Store
    view: int
    worker: int
    members: Sequence[int]
    guided: Callable[[], bool] = lambda: True
    """Whether there still is a coordinator."""

    def _vote(self, iteration: int, worker: int) -> str:
        return vote_key(self.view, iteration, worker)

    def __call__(
        self, iteration: int, payload: dict[str, Any], deadline: float, combine: Combine = everything,
        voted: Callable[[], None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Vote `payload` (JSON) and return what all votes come to. `deadline` is in time.monotonic seconds; without
        end, the wait is as long as the coordinator lives, which ends workers that do not come on.

        `combine` makes one JSON object of everyone's vote, by worker, on whichever worker is the last. `voted` is
        called between the vote and its outcome. Raises Aborted when the view changes, CommitError when votes are
        missing at the deadline or cannot be combined, which then is so for all, or the store is gone.
        """
        try:
            self.store.set(self._vote(iteration, self.worker), json.dumps(payload))
            last = self.store.add(votes_key(self.view, iteration), 1) == len(self.members)
            if voted is not None:
                voted()
            if last:
                self._conclude(iteration, combine)
            stands = self._await(iteration, deadline)
            if _outcome(stands) != COMMIT:
                raise Aborted(f"iteration {iteration} of view {self.view} was ended, because the view changes")
            # Whoever votes now has read the outcome of the iteration before, for which this vote was read.
            self.store.delete_key(self._vote(iteration - 2, self.worker))
            if last:
                self.store.delete_key(votes_key(self.view, iteration - 2))
        except dist.DistNetworkError as error:
            raise CommitError(f"the store is gone: {str(error).splitlines()[0]}") from error
        try:
            return parse(stands.split(b"\n", 1)[-1], f"the outcome of iteration {iteration}, view {self.view}")
        except WireError as error:
            raise CommitError(str(error)) from error

    def _conclude(self, iteration: int, combine: Combine) -> None:
        """Write what all votes come to. Raises CommitError, and aborts, where a vote is none."""
        votes = self.store.multi_get([self._vote(iteration, member) for member in self.members])
        try:
            read = {m: parse(vote, f"the vote of worker {m}") for m, vote in zip(self.members, votes, strict=True)}
            found = json.dumps(combine(read))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            decide(self.store, self.view, iteration, ABORT)
            told = str(error) if isinstance(error, WireError) else f"{type(error).__name__} {error}"
            raise CommitError(f"the votes on iteration {iteration} of view {self.view} are none: {told}") from error
        decide(self.store, self.view, iteration, f"{COMMIT}\n{found}")

    def _await(self, iteration: int, deadline: float) -> bytes:
        """What stands as the outcome of an iteration. Raises CommitError where it is this worker that has ended it."""
        key = outcome_key(self.view, iteration)
        while True:
            if came(self.store, [key], max(0.001, min(_SLICE_S, deadline - time.monotonic()))):
                return self.store.get(key)
            if time.monotonic() < deadline and (deadline < math.inf or self.guided()):
                continue
            missing = [m for m in self.members if not self.store.check([self._vote(iteration, m)])]
            if decide(self.store, self.view, iteration, ABORT) == COMMIT:
                return self.store.get(key)
            raise CommitError(f"no vote of workers {missing} on iteration {iteration}, view {self.view}")


@dataclass
class Follower:
    """The coordinator's eye on the iterations of a view: how far they have come, and the right to end them.

    `iteration` only ascends, and all before it are committed.
    """

    store: dist.Store
    view: int
    iteration: int = 1
    """The first iteration without a known outcome; workers count from 1."""
    moved: float = 0.0
    """When the last outcome was seen, in time.monotonic seconds."""
    given_up: bool = False
    """Whether a worker has ended the view: it waited for votes in vain."""
    seen: Callable[[Mapping[str, Any]], None] | None = None
    """Called with what each committed step, and no other iteration, has come to."""

    def __post_init__(self) -> None:
        self.moved = time.monotonic()

    def follow(self) -> bool:
        """Take note of new outcomes, and delete what nobody reads any more; returns whether there were any."""
        before = self.iteration
        while not self.given_up and self.store.check([key := outcome_key(self.view, self.iteration)]):
            if _outcome(stands := self.store.get(key)) != COMMIT:
                self.given_up = True
                break
            if self.seen is not None:
                with suppress(WireError):
                    found = parse(stands.split(b"\n", 1)[-1], "an outcome")
                    if found.get("norms"):  # an evaluation has none
                        self.seen(found)
            self.store.delete_key(outcome_key(self.view, self.iteration - 3))
            self.iteration += 1
            self.moved = time.monotonic()
        return self.iteration > before

    def voted(self, worker: int) -> bool:
        """Whether a worker has voted on the iteration under way."""
        return self.store.check([vote_key(self.view, self.iteration, worker)])

    def abort(self) -> None:
        """End the view: the first iteration that is not committed never will be, and all who wait on it wake."""
        while decide(self.store, self.view, self.iteration, ABORT) == COMMIT:
            self.iteration += 1
