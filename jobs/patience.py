"""Early stop: when a run ends because its held-out loss no longer falls.

What was seen is JSON, equal on all workers and saved with the run: the lowest held-out loss, and how many evaluations
since then were no lower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.wire import WireError, checked


def seen(watched: Mapping[str, Any], loss: float) -> dict[str, Any]:
    """What was seen, with one more evaluation."""
    best, since = known(watched)
    return {"best": loss, "since": 0} if best is None or loss < best else {"best": best, "since": since + 1}


def known(watched: Mapping[str, Any]) -> tuple[float | None, int]:
    """(lowest loss so far, evaluations since); nothing is known of what is not so."""
    try:
        found = checked(watched, "what was watched", best=float, since=int)
    except WireError:
        return None, 0
    return found["best"], found["since"]


def is_over(watched: Mapping[str, Any], patience: int) -> bool:
    """Whether patience has come to its end; 0 never does."""
    return 0 < patience <= known(watched)[1]
