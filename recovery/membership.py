"""Views: numbered memberships, written to the store by one coordinator and read by every worker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipeline.schedule import Schedule, loads


class MembershipError(RuntimeError):
    """A view that did not come in time."""


@dataclass(frozen=True)
class View:
    """Who does what from now on. `schedules` are texts by purpose: "train" and "evaluate"."""

    number: int
    workers: tuple[int, ...]
    schedules: Mapping[str, str]
    first_step: int = 0
    first_sample: int = 0
    checkpoint: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def schedule(self, purpose: str) -> Schedule:
        """The schedule for a purpose, parsed. Raises KeyError, or ScheduleError for a text it cannot read."""
        return loads(self.schedules[purpose])


def publish(store: dist.Store, view: View) -> None:
    """Write a view. Only the coordinator does; numbers ascend."""
    store.set(f"view/{view.number}", json.dumps(asdict(view)))


def await_view(store: dist.Store, number: int, timeout_s: float) -> View:
    """The view with this number. Raises MembershipError when the coordinator does not write it in time."""
    try:
        store.wait([f"view/{number}"], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise MembershipError(f"view {number} did not come within {timeout_s:.0f} s") from error
    fields = json.loads(store.get(f"view/{number}"))
    fields["workers"] = tuple(fields["workers"])
    return View(**fields)
