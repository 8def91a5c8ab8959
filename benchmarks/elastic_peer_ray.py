"""Ray Train among the peers of elastic_peers.py: TorchTrainer with num_workers=(1, 2) on a cluster of this machine.

A head without CPUs, and two nodes of one CPU each, all on 127.0.0.1. A node is killed with its worker, as when a
machine goes: with two workers of one node there would be nothing to shrink, since a killed worker's place is free at
once. A node is added for it afterwards. After a kill Ray first asks for as many workers as there were, since its
coordinator looks for changes every 20 s only, and waits for them: 60 s by default, 5 s if `tuned`. That looks for new
nodes every second too, in place of every 60, and at its workers every 0.5 s, in place of every 2.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.elastic_peer import (
    Commits,
    Family,
    Row,
    changed,
    kill_all,
    load,
    per_worker,
    row,
    save,
    settle,
    train_on,
    until_warm,
)  # fmt: skip
from benchmarks.recovery_peers import PeerError

NODES, DEADLINE_S = 2, 240.0
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


def loop(config: dict[str, Any]) -> None:
    """A worker: resume, then train on and on."""
    from ray import train

    folder, context, found = Path(config["folder"]), train.get_context(), train.get_checkpoint()
    (folder / f"worker-{os.getpid()}").touch()
    before = None
    if found is not None:
        with found.as_directory() as directory:
            before = load(Path(directory) / "state.pt")
    rank = context.get_world_rank()
    for state in train_on(folder, rank, context.get_world_size(), per_worker(NODES), before):
        with tempfile.TemporaryDirectory(dir=folder) as directory:
            if rank == 0:
                save(state, Path(directory) / "state.pt")
            made = train.Checkpoint.from_directory(directory) if rank == 0 else None
            train.report({"step": state["step"]}, checkpoint=made)


def driver(folder: Path, tuned: int) -> None:
    """The cluster and the trainer; adds a node when `folder`/add is there."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder), "RAY_TRAIN_V2_ENABLED": "1"}
    if tuned:
        os.environ |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    import ray
    from ray.cluster_utils import Cluster
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    for _ in range(NODES):
        cluster.add_node(**NODE)
    ray.init(address=cluster.address)

    trainer = TorchTrainer(
        loop, train_loop_config={"folder": str(folder)}, torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=(1, NODES), **({"elastic_resize_monitor_interval_s": 1} if tuned else {})
        ),
        run_config=RunConfig(
            name="peer", storage_path=str(folder / "results"), failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )  # fmt: skip
    training = threading.Thread(target=trainer.fit, daemon=True)  # nodes are added by the main thread or not at all
    training.start()
    while training.is_alive():
        time.sleep(0.05)
        if (folder / "add").exists():
            (folder / "add").unlink()
            cluster.add_node(**NODE)


def raylets(folder: Path) -> list[psutil.Process]:
    """Of the nodes that have a worker that trains."""
    found: list[psutil.Process] = []
    for path in folder.glob("worker-*"):
        if psutil.pid_exists(pid := int(path.name.removeprefix("worker-"))):
            found += [each for each in psutil.Process(pid).parents() if each.name() == "raylet"]
    return found


def ray_train(family: Family, chance: random.Random, tuned: bool) -> Iterator[Row]:
    """Ray Train, whose nodes are killed and added."""
    family.start("ray-driver", tuned)
    yield from turns(family, Commits(family.folder), chance, partial(raylets, family.folder))


def turns(
    family: Family, commits: Commits, chance: random.Random, find: Callable[[], list[psutil.Process]]
) -> Iterator[Row]:
    """Kill one of two nodes, which `find` finds, with its worker; wait for a commit without it, then with a new one;
    and so on."""
    until_warm(family, commits, NODES)
    while True:
        if len(nodes := find()) != NODES:
            raise PeerError(f"{len(nodes)} nodes train; expected {NODES}")
        killed = kill_all(chance.choice(nodes))
        shrunk = changed(family, commits, killed, NODES - 1, DEADLINE_S)
        started = time.time()
        (family.folder / "add").touch()
        yield row(shrunk, changed(family, commits, started, NODES, DEADLINE_S))
        settle(chance)


ROLES = {"ray-driver": driver}
