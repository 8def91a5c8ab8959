"""Which remedy: the first that can work, exact ones before approximate ones; or the one that the user names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from recovery import redundant, reroute
from recovery.baselines import Copy, Random
from recovery.checkfree import Average
from recovery.checkfree_plus import Twin
from recovery.checkpoint import Found, Verifier
from recovery.membership import START, Restore, View, come, leave, replace_workers
from recovery.remedy import CannotRestore, Loss, Remedy, losses
from recovery.replica import Replica

CHECKPOINT, REDUNDANT, REROUTE = "checkpoint", "redundant", "reroute"
POLICIES: Mapping[str, tuple[str, ...]] = {
    "auto": ("replica", "checkfree", CHECKPOINT),
    "replica": ("replica",),
    "checkfree": ("replica", "checkfree"),
    "checkfree+": ("replica", "checkfree+", "checkfree"),
    REDUNDANT: (REDUNDANT, "replica", CHECKPOINT),
    "copy": ("replica", "copy"),
    "random": ("replica", "random"),
    CHECKPOINT: (CHECKPOINT,),
    "none": (),
}
"""--recovery NAME -> remedies in the order in which they are tried. A surviving replica is copied in any case."""


def remedies(weights: str = "norm") -> dict[str, Remedy]:
    """Every remedy that works span by span, by name; `weights` as in `checkfree.WEIGHTS`."""
    return {remedy.name: remedy for remedy in (Replica(), Average(weights), Twin(), Copy(), Random())}


@dataclass(frozen=True)
class Recovery:
    """What is done about lost workers. `home` is the first view of the run, `policy` a name in POLICIES."""

    policy: str
    home: View
    num_layers: int
    tied: bool
    checkpoints: Path
    planner: reroute.Planner | None = None
    """Gives other routes where microbatches may take them; without it lost workers are waited for."""
    source_changed: Callable[[], str] = str
    """Why the weights that the run began with cannot be had again, "" where they can."""
    verifier: Verifier = field(default_factory=Verifier)

    def after_loss(self, view: View, lost: tuple[int, ...]) -> View:
        """The view after `view`, in which the work of `lost` is taken over, or replacements join. Raises CannotRestore.

        `view.joined` are those who have joined it without having got their state yet.
        """
        if view.rollback is not None:  # everybody is still to go back
            return replace_workers(view, lost)
        reasons = list[str]()
        if (name := self.meanwhile) is not None:
            try:
                after = self._cured(self._arranged(leave(view, lost)))
                if name == REROUTE and self._cured(self._arranged(come(after, tuple(after.awaited)))).rollback:
                    raise CannotRestore("what was lost will come back from a checkpoint alone, so it is now")
                return after
            except CannotRestore as error:
                reasons.append(f"{name}: {error}")
        return self._cured(replace_workers(view, lost), reasons)

    def with_ready(self, view: View, ready: tuple[int, ...]) -> View:
        """The view after `view`, in which awaited workers that are ready join. Raises CannotRestore."""
        return self._cured(self._arranged(come(view, ready)))

    @property
    def meanwhile(self) -> str | None:
        """What is done until a replacement is ready: REROUTE, REDUNDANT, or nothing, which is to wait for it."""
        if POLICIES[self.policy] not in ((), (CHECKPOINT,)) and self.planner is not None:
            return REROUTE
        return REDUNDANT if REDUNDANT in POLICIES[self.policy] else None

    def _arranged(self, view: View) -> View:
        """`view` with the schedules for its workers. Raises CannotRestore."""
        return (
            redundant.arrange_takeover(self.home, view)
            if self.planner is None
            else reroute.arrange_detour(self.planner, view)
        )

    def _cured(self, view: View, reasons: Sequence[str] = ()) -> View:
        return cure(view, self.policy, self.num_layers, self.tied, self.rollback_target, reasons)

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
        if after.awaited:
            return f"{self.meanwhile}, without waiting for anybody"
        if after.rollback is not None:
            return CHECKPOINT
        return "+".join(sorted({restore.remedy for restore in after.restores}))

    def _tried(self, worker: int) -> View:
        """`after_loss`, as if there were a checkpoint."""
        anyway = replace(self, verifier=_Always())
        return anyway.after_loss(self.home, (worker,))


class _Always(Verifier):
    """There is a checkpoint."""

    def find(self, root: Path) -> Found:
        return Found(root, None)


def cure(
    view: View, policy: str, num_layers: int, tied: bool, rollback: Callable[[], str], tried: Sequence[str] = ()
) -> View:
    """`view`, in which workers have joined, with how each of their spans comes back. Raises CannotRestore.

    Rolling back concerns everybody, so it is taken for all spans or for none; `rollback()` says to what. `tried` says
    what has been found impossible before.
    """
    wanted, reasons = losses(view, num_layers, tied), list(tried)
    restores = [found for loss in wanted if (found := _plan(loss, POLICIES[policy], reasons))]
    if len(restores) == len(wanted):
        return replace(view, restores=tuple(restores))
    if CHECKPOINT in POLICIES[policy]:
        try:
            return replace(view, rollback=rollback())
        except CannotRestore as error:
            reasons.append(f"{CHECKPOINT}: {error}")
    raise CannotRestore(f"recovery {policy!r} cannot bring back what was lost: {'; '.join(reasons) or 'it is off'}")


def _plan(loss: Loss, names: Sequence[str], reasons: list[str]) -> Restore | None:
    known = remedies()
    for name in names:
        if name in known:
            try:
                return known[name].plan(loss)
            except CannotRestore as error:
                reasons.append(f"{name}: {error}")
    return None
