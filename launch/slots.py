"""Where a process stands among the agents of a run: alone on a machine, or a slot of torchrun; and the run's store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from jobs.config import ConfigError


@dataclass(frozen=True)
class Slot:
    """This agent's place. `world` is the number of torchrun slots, 0 where there is no torchrun."""

    rank: int = 0
    world: int = 0
    local_rank: int = 0
    local_world: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    agent_store: bool = False
    prefix: str = "unbroken"
    attempt: int = 0
    """How many times torchrun has started everybody again."""

    @property
    def coordinates(self) -> bool:
        """Whether this agent plans, writes the run folder and speaks to the user."""
        return self.rank == 0

    def workers(self, total: int) -> list[int]:
        """The workers that this agent supervises. Raises ConfigError when torchrun has another number of slots."""
        if not self.world:
            return list(range(total))
        if total != self.world:
            raise ConfigError(f"workers is {total}; allowed under this torchrun: {self.world}, one per slot")
        return [self.rank]

    def local_index(self, worker: int) -> int:
        """The worker's number among those of its machine: which device it takes."""
        return self.local_rank if self.world else worker

    def workers_here(self, total: int) -> int:
        """How many workers share this machine."""
        return self.local_world if self.world else total


def find_slot(environment: Mapping[str, str] = os.environ) -> Slot:
    """The slot that torchrun's environment variables describe, or the whole machine where they are not set."""
    if "TORCHELASTIC_RUN_ID" not in environment and not {"RANK", "MASTER_ADDR"} <= set(environment):
        return Slot()
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Slot(
        rank=int(environment["RANK"]),
        world=int(environment["WORLD_SIZE"]),
        local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
        local_world=int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])),
        host=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        # torchrun starts everybody again after a failure: a new attempt must not read the keys of the old one
        prefix=f"unbroken/{environment.get('TORCHELASTIC_RUN_ID', 'run')}/{attempt}",
        attempt=int(attempt),
    )


@dataclass(frozen=True)
class StoreHandle:
    """The store, and where others reach it."""

    store: dist.Store
    host: str
    port: int
    prefix: str

    def address(self) -> dict[str, object]:
        """What `launch.worker_main.connect` takes."""
        return {"host": self.host, "port": self.port, "prefix": self.prefix}


def open_store(slot: Slot, port: int, timeout_s: float = 60.0) -> StoreHandle:
    """Host the store (on one machine), or join torchrun's. Raises ConfigError for a port that is in use."""
    hosts = not slot.world or (slot.rank == 0 and not slot.agent_store)
    host, wanted = (slot.host, slot.port) if slot.world else ("127.0.0.1", port)
    try:
        store = dist.TCPStore(
            host, wanted, is_master=hosts, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
    except (RuntimeError, OSError) as error:
        if hosts and ("EADDRINUSE" in str(error) or "address already in use" in str(error).lower()):
            raise ConfigError(
                f"store_port is {wanted}, which is in use; allowed: a free port, or 0 to take one"
            ) from error
        raise
    return StoreHandle(dist.PrefixStore(slot.prefix, store), host, store.port, slot.prefix)
