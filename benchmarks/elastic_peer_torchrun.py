"""torchrun among the peers of elastic_peers.py: two agents of one worker under `--nnodes 1:2`, c10d rendezvous.

An agent is killed together with its worker, as when a machine goes; the other's worker fails and is started again once
the dead one's heartbeats are missed. A new agent makes it stop its worker too: both start again from the checkpoint.
The store of the rendezvous is in a process that nobody kills, so either agent may be hit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.elastic_peer import (
    Commits,
    Family,
    Row,
    changed,
    load,
    per_worker,
    row,
    save,
    settle,
    train_on,
    until_warm,
)  # fmt: skip
from benchmarks.recovery_peers import serve_store

NODES = 2
TUNED = "last_call_timeout=1,keep_alive_interval=1"


def agent(folder: Path, tuned: int) -> None:
    """torchrun itself, within a process that dies with the benchmark."""
    from torch.distributed.run import main

    main(
        [
            "--nnodes", f"1:{NODES}", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "peer",
            "--rdzv-endpoint", f"127.0.0.1:{(folder / 'store').read_text()}", "--local-addr", "127.0.0.1",
            "--rdzv-conf", "is_host=0" + (f",{TUNED}" if tuned else ""), "--max-restarts", "1000000",
            "--log-dir", str(folder / "logs"),
            *(["--monitor-interval", "0.1"] if tuned else []),
            str(Path(__file__).with_name("elastic_peers.py")), "--role=torchrun-worker", f"--folder={folder}",
        ]
    )  # fmt: skip


def worker(folder: Path) -> None:
    """Resume, then train on and on."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, saved = dist.get_rank(), folder / "checkpoint.pt"
    for state in train_on(folder, rank, dist.get_world_size(), per_worker(NODES), load(saved)):
        if rank == 0:
            save(state, saved)


def torchrun(family: Family, chance: random.Random, tuned: bool) -> Iterator[Row]:
    """Kill one of two agents with its worker, wait for a commit of the other, then for a new one's; and again."""
    commits = Commits(family.folder)
    family.start("store")
    family.until((family.folder / "store").is_file)
    # each round's rank 0 serves a store of its own: the shared one still has the names of the round before
    family.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    agents = [family.start("torchrun-agent", tuned) for _ in range(NODES)]
    until_warm(family, commits, NODES)
    while True:
        victim = chance.randrange(NODES)
        killed = family.kill(agents[victim], descendants=True)
        shrunk = changed(family, commits, killed, NODES - 1)
        started = time.time()
        agents[victim] = family.start("torchrun-agent", tuned)
        yield row(shrunk, changed(family, commits, started, NODES))
        settle(chance)


ROLES = {"store": serve_store, "torchrun-agent": agent, "torchrun-worker": worker}
