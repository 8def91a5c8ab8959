"""Which remedy: the first that can work, exact ones before approximate ones; or the one that the user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from recovery import checkpoint
from recovery.membership import Restore, View
from recovery.neighbours import Average, Copy, Random, Twin
from recovery.remedy import CannotRestore, Loss, Remedy, losses
from recovery.replica import Replica

CHECKPOINT = "checkpoint"
POLICIES: Mapping[str, tuple[str, ...]] = {
    "auto": ("replica", "checkfree", CHECKPOINT),
    "replica": ("replica",),
    "checkfree": ("replica", "checkfree"),
    "checkfree+": ("replica", "checkfree+", "checkfree"),
    "copy": ("replica", "copy"),
    "random": ("replica", "random"),
    CHECKPOINT: (CHECKPOINT,),
    "none": (),
}
"""--recovery NAME -> remedies in the order in which they are tried. A surviving replica is copied in any case."""


def remedies(weights: str = "norm") -> dict[str, Remedy]:
    """Every remedy that works span by span, by name; `weights` as in `neighbours.WEIGHTS`."""
    return {remedy.name: remedy for remedy in (Replica(), Average(weights), Twin(), Copy(), Random())}


def cure(view: View, policy: str, num_layers: int, tied: bool, checkpoints: Path) -> View:
    """`view`, in which workers have joined, with how each of their spans comes back. Raises CannotRestore.

    Rolling back to a checkpoint concerns everybody, so it is taken for all spans or for none.
    """
    wanted, reasons = losses(view, num_layers, tied), list[str]()
    restores = [found for loss in wanted if (found := _plan(loss, POLICIES[policy], reasons))]
    if len(restores) == len(wanted):
        return replace(view, restores=tuple(restores))
    if CHECKPOINT in POLICIES[policy]:
        found = checkpoint.find(checkpoints)
        if found.path is not None:
            return replace(view, rollback=str(found.path))
        reasons.append(f"checkpoint: {str(checkpoints)!r} holds no valid one")
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
