"""Which remedy: the first that can work, exact ones before approximate ones; or the one that the user names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.schedule.layout import Layout
from pipeline.settings import RunShape, require_known
from recovery import redundant
from recovery.baselines import Copy, CopyAfter, Identity, Random
from recovery.checkfree import Average, CheckFreeSettings
from recovery.checkfree_plus import Twin
from recovery.checkpoint import Found, Verifier
from recovery.membership import START, Move, View, next_view
from recovery.rehearse import Rehearse
from recovery.remedy import CannotRestore, Loss, Remedy, has, losses
from recovery.replica import Replica
from recovery.reroute import Planner
from recovery.resize import Resize
from recovery.shards import Shards

CHECKPOINT, REDUNDANT, REPLICA, REROUTE, RESIZE = "checkpoint", "redundant", "replica", "reroute", "resize"
POLICIES: Mapping[str, tuple[str, ...]] = {
    "auto": ("replica", "rehearse", "checkfree", CHECKPOINT),
    "exact": ("replica", CHECKPOINT),
    "replica": ("replica",),
    "checkfree": ("replica", "checkfree"),
    "checkfree+": ("replica", "checkfree+", "checkfree"),
    "rehearse": ("replica", "rehearse", "checkfree"),
    REDUNDANT: (REDUNDANT, "replica", CHECKPOINT),
    "copy": ("replica", "copy"),
    "copy-after": ("replica", "copy-after"),
    "identity": ("replica", "identity"),
    "random": ("replica", "random"),
    CHECKPOINT: (CHECKPOINT,),
    "none": (),
}
"""--recovery NAME -> remedies in the order in which they are tried. A surviving replica is copied in any case."""


DEFAULTS = CheckFreeSettings()
_CANNOT = "what was lost cannot be brought back: "


@dataclass(frozen=True)
class RecoverySettings:
    """What brings back what is lost."""

    recovery: str = "auto"
    """What brings the state of a lost worker back: auto, exact (a copy, else a checkpoint: never an approximation),
    replica, rehearse, checkfree, checkfree+, redundant, copy, copy-after, identity, random, checkpoint, or none."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError for a name that is none."""
        require_known("recovery", self.recovery, POLICIES)


def remedies(settings: CheckFreeSettings = DEFAULTS) -> dict[str, Remedy]:
    """Every remedy that works part by part, by name."""
    weights, scale = settings.checkfree_weights, settings.checkfree_lr_scale
    mean = Average(weights, scale, moments=settings.checkfree_moments == "averaged")
    plain = [kind(weights, scale) for kind in (Twin, Copy, CopyAfter, Identity, Random)]
    return {remedy.name: remedy for remedy in (Replica(), Rehearse(weights), mean, *plain, Shards())}


@dataclass(frozen=True)
class Recovery:
    """What is done about lost workers. `home` is the first view of the run and `layout` its layout, to which it comes
    back; `policy` is a name in POLICIES."""

    policy: str
    home: View
    layout: Layout
    num_layers: int
    tied: bool
    checkpoints: Path
    planner: Planner | None = None
    """Gives other routes where microbatches may take them; without it lost workers are waited for."""
    source_changed: Callable[[], str] = str
    """Why the weights that the run began with cannot be had again, "" where they can."""
    verifier: Verifier = field(default_factory=Verifier)
    resize: Resize | None = None
    """How the run goes on with fewer workers, if it does."""
    only: tuple[str, ...] | None = None
    """The remedies, where not all those of the policy hold."""
    layouts: dict[str, Layout] = field(default_factory=dict)
    """All layouts that a view of the run has had, by key."""

    def __post_init__(self) -> None:
        self.layouts[self.layout.key] = self.layout

    def after_loss(self, view: View, lost: tuple[int, ...]) -> View:
        """The view after `view`, in which the work of `lost` is taken over, or replacements join. Raises CannotRestore.

        `view.moves` are those that have not been made yet.
        """
        if view.rollback is not None:  # everybody is still to go back
            return self.going_back(view, lost)
        reasons = list[str]()
        if (name := self.meanwhile) is not None:
            try:
                left = next_view(view, lost, wait=True)
                after = self._cured(view, replace(left, layout=self._around(left)))
                back = self._come_back(after, tuple(after.awaited)) if name == REROUTE else after
                if name != RESIZE and (after.rollback or back.rollback):
                    raise CannotRestore("what was lost will come back from a checkpoint alone, so it is now")
                return after
            except CannotRestore as error:
                reasons.append(f"{name}: {str(error).removeprefix(_CANNOT)}")
        return self._cured(view, next_view(view, lost), reasons)

    def replaced(self, view: View, lost: tuple[int, ...]) -> View:
        """The view after `view`, in which others take the places of `lost` at once. Raises CannotRestore."""
        after = next_view(view, lost)
        return after if view.rollback is not None else self._cured(view, after)

    def going_back(self, view: View, lost: tuple[int, ...]) -> View:
        """The view after one in which all go back, or begin, and which has nothing to lose: as `after_loss`."""
        if self.resize is not None:
            with suppress(CannotRestore):
                left = next_view(view, lost, wait=True)
                return replace(left, layout=self._around(left))
        return next_view(view, lost)

    def before_training(self, view: View, lost: tuple[int, ...]) -> View:
        """As `after_loss`, of a run that has not made a step: what a worker builds by itself is what all have."""
        after = self.going_back(view, lost)
        # the layers that somebody has now and did not build are filled in like those of a worker that joins
        moved = after.layout != view.layout and after.rollback is None
        return replace(after, rollback=self.home.checkpoint or START) if moved else after

    def with_ready(self, view: View, ready: tuple[int, ...]) -> View:
        """The view after `view`, which is settled, in which awaited workers that are ready join. Raises
        CannotRestore."""
        return self._come_back(view.settled(), ready)

    def without(self, view: View, leaving: tuple[int, ...]) -> View:
        """The view after `view`, which is settled, on the way to one without some of its workers: first they hand over
        what they hold, and are members that hold nothing; then they are none. Raises CannotRestore."""
        stay = {place: worker for place, worker in view.at.items() if worker not in leaving}
        key = self.layout_over(stay, self.speeds(view))
        if view.layout == key:
            return next_view(view.settled(), leaving, wait=True)
        return self.in_layout(view, key)

    def _come_back(self, view: View, ready: tuple[int, ...]) -> View:
        after = next_view(view, ready=ready)
        return self._cured(view, replace(after, layout=self._around(after), rollback=None), first=(REPLICA,))

    @property
    def meanwhile(self) -> str | None:
        """What is done until a replacement is ready: RESIZE, REROUTE, REDUNDANT; None is to wait for it."""
        if self.resize is not None:
            return RESIZE
        if POLICIES[self.policy] not in ((), (CHECKPOINT,)) and self.planner is not None:
            return REROUTE
        return REDUNDANT if REDUNDANT in POLICIES[self.policy] else None

    def in_layout(self, view: View, layout: str) -> View:
        """The view after `view`, which is settled, in another layout over the same workers. Raises CannotRestore."""
        return self._cured(view.settled(), next_view(view.settled(), layout=layout), first=(REPLICA,))

    def alone_on(self, view: View, workers: Collection[int]) -> bool:
        """Whether nobody but these has some state of a settled view."""
        had = has(view, self.layouts[view.layout], self.num_layers, self.tied)
        others = set[str]().union(*(names for worker, names in had.items() if worker not in workers))
        return any(names - others for worker, names in had.items() if worker in workers)

    def speeds(self, view: View) -> dict[int, float]:
        """Place -> the speed of its worker, where that is not the usual one and layers go by it."""
        found = {} if self.resize is None or not self.resize.shifts else self.resize.speeds.of(view.workers)
        return {view.places[worker]: speed for worker, speed in found.items()}

    def _around(self, view: View) -> str:
        """The key of the layout over the places that have workers. Raises CannotRestore."""
        return self.layout_over(view.at, self.speeds(view))

    def layout_over(self, places: Collection[int], speeds: Mapping[int, float]) -> str:
        """The key of the layout over these places, of which some are not as fast as usual. Raises CannotRestore."""
        alive = sorted(places)
        if set(alive) == set(self.layout.train.lanes):
            found = self.layout
        elif self.resize is not None:
            found = self.resize.planner(alive, {})
        else:
            found = redundant.takeover(self.layout, alive) if self.planner is None else self.planner(alive)
        if speeds and self.resize is not None:  # to be faster is not worth a copy that a loss may need
            found = self.resize.planner(alive, speeds, min(map(len, found.train.holders.values())))
        self.layouts[found.key] = found
        return found.key

    def _cured(self, before: View, after: View, reasons: Sequence[str] = (), first: tuple[str, ...] = ()) -> View:
        """`after` with what moves into it, or to what it goes back. `first` are remedies that go before those of the
        policy: where nothing is lost, what moves is copied. Raises CannotRestore."""
        had = has(before, self.layouts[before.layout], self.num_layers, self.tied)
        wanted = losses(after, self.layouts[after.layout], had, self.num_layers, self.tied)
        names = (*first, *POLICIES[self.policy]) if self.only is None else self.only
        return cure(after, wanted, names, self.rollback_target, reasons)

    def rollback_target(self) -> str:
        """What all can go back to: the newest valid checkpoint, or the start of the run. Raises CannotRestore."""
        if (found := self.verifier.find(self.checkpoints)).path is not None:
            return str(found.path)
        reason = f"{str(self.checkpoints)!r} holds no valid one"
        if self.home.checkpoint is not None:
            raise CannotRestore(f"{reason}, and the one that the run began with is gone")
        if self.home.generation:
            raise CannotRestore(f"{reason}, and the start of the run is older than what was forgotten since")
        if changed := self.source_changed():
            raise CannotRestore(f"{reason}, and the run cannot start again: {changed}")
        return START

    def forecast(self, worker: int) -> str:
        """What would be done if a worker of the first view were lost in the middle of training."""
        try:
            after = self._tried(worker)
        except CannotRestore as error:
            return f"the run ends ({error})"
        if after.awaited and self.resize is None:
            return f"{self.meanwhile}, without waiting for anybody"
        if after.rollback is not None:
            return CHECKPOINT
        return "+".join(sorted({move.remedy for move in after.moves})) or "the others have all that it holds"

    def _tried(self, worker: int) -> View:
        """`after_loss` of a run that has saved itself."""
        return self.supposing_a_checkpoint().after_loss(self.home, (worker,))

    def supposing_a_checkpoint(self) -> Recovery:
        """The same in a run that has saved itself."""
        return replace(self, verifier=_Always())


class _Always(Verifier):
    """There is a checkpoint."""

    def find(self, root: Path, before: int | None = None) -> Found:
        return Found(root, None)


def cure(
    view: View, wanted: Sequence[Loss], remedies: Sequence[str], rollback: Callable[[], str], tried: Sequence[str] = ()
) -> View:
    """`view`, with how each part that is `wanted` comes back, by the first of the remedies, by name, that can. Raises
    CannotRestore.

    Rolling back concerns everybody, so it is taken for all parts or for none; `rollback()` says to what. `tried` says
    what has been found impossible before.
    """
    reasons = list(tried)
    moves = [found for loss in wanted if (found := plan_part(loss, remedies, reasons))]
    if len(moves) == len(wanted):
        return replace(view, moves=tuple(moves))
    if CHECKPOINT in remedies:
        try:
            return replace(view, rollback=rollback())
        except CannotRestore as error:
            reasons.append(f"{CHECKPOINT}: {error}")
    raise CannotRestore(f"{_CANNOT}{'; '.join(reasons) or 'recovery is off'}")


def plan_part(loss: Loss, names: Sequence[str], reasons: list[str]) -> Move | None:
    """How one part comes back, by the first of the remedies, by name, that can; why others could not goes into
    `reasons`."""
    known = remedies()
    for name in names:
        if name in known:
            try:
                return known[name].plan(loss)
            except CannotRestore as error:
                reasons.append(f"{name}: {error}")
    return None
