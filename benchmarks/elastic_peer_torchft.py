"""torchft 0.2.0 among the peers of elastic_peers.py: replica groups of one process, and a lighthouse.

Gradients are summed by Manager.allreduce, so that a replica may be killed at any moment (in the midst of a backward
pass torchft's wrapper of DDP would raise an AssertionError in the survivors). Samples go to replicas by step and number
as its DistributedSampler deals them: those of a replica that is away are not taken by anybody.

A survivor that waits for the dead one sees it at once; one that waits for the other survivor waits for the timeout of
Manager and process group, 60 s by default and here 2 s.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.elastic_peer import (
    CLIP,
    Commits,
    Family,
    Row,
    backward,
    changed,
    per_worker,
    record,
    row,
    settle,
    trainee,
    until_warm,
)  # fmt: skip
from benchmarks.recovery_peers import lighthouse

REPLICAS = 3


def replica(folder: Path, number: int, timeout_s: int) -> None:
    """A replica group of one process."""
    import torch
    import torch.distributed as dist
    from torchft import Manager, Optimizer, ProcessGroupGloo

    model, adamw = trainee()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        adamw.load_state_dict(state["optimizer"])

    limit = timedelta(seconds=timeout_s)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=limit), load_state_dict=load, min_replica_size=1, rank=0, world_size=1,
        timeout=limit, state_dict=lambda: {"model": model.state_dict(), "optimizer": adamw.state_dict()},
        store_addr="127.0.0.1", store_port=store.port, hostname="127.0.0.1", replica_id=f"replica{number}",
        lighthouse_addr=(folder / "lighthouse").read_text(),
    )  # fmt: skip
    optimizer, parameters, per = Optimizer(manager, adamw), list(model.parameters()), per_worker(REPLICAS)
    while True:
        before = manager.current_step()
        optimizer.zero_grad()
        backward(model, (before * REPLICAS + number) * per, per)
        flat = torch.nn.utils.parameters_to_vector([p.grad for p in parameters])
        manager.allreduce(flat).wait()
        torch.nn.utils.vector_to_parameters(flat, [p.grad for p in parameters])
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        if (step := manager.current_step()) == before:
            continue
        world = manager.num_participants()
        # where all took part, say so for all: one may be killed before it has written its line
        first, samples = (0, REPLICAS * per) if world == REPLICAS else (number * per, per)
        first += (step - 1) * REPLICAS * per
        record(folder, f"{number}", step=step, world=world, first=first, samples=samples, epoch=0)


def torchft(family: Family, chance: random.Random, heartbeat_s: int, timeout_s: int) -> Iterator[Row]:
    """Kill one of three replicas, wait for a commit of the others, then for a new one to take part; and again."""
    commits = Commits(family.folder)
    family.start("lighthouse", 1000 * heartbeat_s)
    family.until((family.folder / "lighthouse").is_file)
    processes = [family.start("replica", number, timeout_s) for number in range(REPLICAS)]
    until_warm(family, commits, REPLICAS)
    while True:
        victim = chance.randrange(REPLICAS)
        killed = family.kill(processes[victim])
        shrunk = changed(family, commits, killed, REPLICAS - 1)
        started = time.time()
        processes[victim] = family.start("replica", victim, timeout_s)
        yield row(shrunk, changed(family, commits, started, REPLICAS))
        settle(chance)


ROLES = {"lighthouse": lighthouse, "replica": replica}
