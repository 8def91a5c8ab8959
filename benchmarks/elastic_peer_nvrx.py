"""nvrx 0.4.1 in process among the peers of elastic_peers.py: three ranks under inprocess.Wrapper, started by hand.

One is killed; its monitor process says so, and the others leave the wrapped function and enter it again in the same
processes, as two, from the checkpoint. A new process cannot come in (only ranks that were there at the start), so
every kill is one of a run of its own and nothing grows. The wrapper's store is in a process that nobody kills; in its
examples rank 0 has it, whose death ends the job. `tuned` sets all intervals to 0.1 s, the heartbeat's timeout to 1 s,
and the process group's to 2 s in place of the 10 s of its examples: as long waits a survivor that waits for the other
survivor.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.elastic_peer import (
    Commits,
    Family,
    Row,
    changed,
    load,
    per_worker,
    row,
    save,
    train_on,
    until_warm,
)  # fmt: skip
from benchmarks.recovery_peers import serve_store, under_nvrx

RANKS = 3


def rank(folder: Path, number: int, tuned: int) -> None:
    """One of three, and of fewer after a failure."""
    import transformers  # noqa: F401  (else ranks first meet as far apart as importing it takes)

    def train(rank: int, world: int, wrapper: Any) -> None:
        saved = folder / "checkpoint.pt"
        for state in train_on(folder, rank, world, per_worker(RANKS), load(saved)):
            if rank == 0:
                with wrapper.atomic():
                    save(state, saved)

    under_nvrx(folder, number, RANKS, train, bool(tuned))


def nvrx(family: Family, chance: random.Random, tuned: bool) -> Iterator[Row]:
    """Kill one of three, wait for a commit of the others. One row."""
    commits = Commits(family.folder)
    family.start("store")
    family.until((family.folder / "store").is_file)
    ranks = [family.start("nvrx-rank", number, tuned) for number in range(RANKS)]
    until_warm(family, commits, RANKS)
    time.sleep(chance.uniform(0.0, 1.0))
    killed = family.kill(chance.choice(ranks))
    yield row(changed(family, commits, killed, RANKS - 1), None)


ROLES = {"store": serve_store, "nvrx-rank": rank}
