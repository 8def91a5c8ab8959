"""What has arrived at a worker, filed by what it is: a worker waits here, and can be woken at any time."""

from __future__ import annotations

import threading
import time

from torch import Tensor

from pipeline.schedule.ops import Op


class LinkError(RuntimeError):
    """A message that will not come: the peer is gone, or the deadline has passed. Names the peer and the message."""


class Mailbox:
    """Messages that have arrived at one worker, by (view, step, op, peer). Thread safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._messages: dict[tuple[int, int, Op, int], tuple[float, Tensor]] = {}
        self._lost: dict[int, str] = {}
        self._woken: str | None = None
        self._oldest = (0, 0)
        self.waiting = ""
        """What a worker waits for at the moment, for others to read; empty while it works."""

    def put(self, view: int, step: int, op: Op, peer: int, deliver_at: float, payload: Tensor) -> None:
        """File a message; one that is older than the current (view, step) is dropped."""
        with self._changed:
            if (view, step) >= self._oldest:
                self._messages[view, step, op, peer] = (deliver_at, payload)
                self._changed.notify_all()

    def lose(self, peer: int, reason: str) -> None:
        """Say that nothing more comes from `peer`."""
        with self._changed:
            self._lost.setdefault(peer, reason)
            self._changed.notify_all()

    def forget(self, peer: int) -> None:
        """A new link to `peer` takes the place of one that was lost."""
        with self._changed:
            self._lost.pop(peer, None)

    def woken(self) -> str | None:
        """Why the present view has ended, or None while it has not."""
        return self._woken

    def broken(self) -> set[int]:
        """The peers that were lost."""
        with self._changed:
            return set(self._lost)

    def wake(self, view: int, reason: str) -> None:
        """View `view` has begun: make every wait of an older one fail at once, with `reason`."""
        with self._changed:
            if view > self._oldest[0]:
                self._woken = reason
                self._changed.notify_all()

    def advance(self, view: int, step: int) -> None:
        """Drop all that is older than (view, step) and refuse it from now on."""
        with self._changed:
            if view > self._oldest[0]:
                self._woken = None
            self._oldest = (view, step)
            self._messages = {key: value for key, value in self._messages.items() if key[:2] >= self._oldest}

    def get(self, view: int, step: int, op: Op, peer: int, deadline: float) -> Tensor:
        """The payload of `op` from `peer`, waited for until `deadline` (time.monotonic seconds).

        Raises LinkError when the peer is lost, the wait is woken, or the deadline passes.
        """
        key = (view, step, op, peer)
        with self._changed:
            while True:
                now = time.monotonic()
                held = self._messages.get(key)
                if held is not None and held[0] <= now:
                    del self._messages[key]
                    return held[1]
                what = f"the output of {op} from worker {peer} (view {view}, step {step})"
                if self._woken is not None:
                    raise LinkError(f"waiting for {what} was ended: {self._woken}")
                if held is None and peer in self._lost:
                    raise LinkError(f"{what} will not come: {self._lost[peer]}")
                if now >= deadline:
                    raise LinkError(f"{what} did not come within the step deadline")
                self.waiting = what
                self._changed.wait(min(deadline, held[0] if held else deadline) - now)
                self.waiting = ""
