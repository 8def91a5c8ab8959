"""Whether there still is a coordinator: who waits for it waits as long as it lives, and not for a fixed time.

What a coordinator does may take long (it verifies a checkpoint of many gigabytes), and so may what other workers do
(they load it); the coordinator is the one who ends workers that do not come on. So its life is all that is watched.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch.distributed as dist

from recovery.keys import read_agent


@dataclass
class Lifeline:
    """Calling it says whether the agent that has the coordinator has given a sign of life in the last `patience_s`."""

    store: dist.Store
    patience_s: float = 60.0
    _found: bytes | None = None
    _since: float = field(default_factory=time.monotonic)
    _asked: float = field(default_factory=time.monotonic)

    def __call__(self) -> bool:
        """Ask the store. Who has not asked for a while cannot tell what was in between: the time begins anew."""
        now, found = time.monotonic(), read_agent(self.store, 0)
        if found != self._found or now - self._asked > self.patience_s:
            self._found, self._since = found, now
        self._asked = now
        return now - self._since < self.patience_s
