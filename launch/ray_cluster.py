"""Ray as the cluster of a run: each agent is an actor, and the actor a process beside it that dies with it.

Agents without which the run cannot begin are placed all or none, in a placement group: two runs that want more than
there is do not hold half of it each. The others are placed where there is room, on another node than the others where
it can be. Requests stay open until then: an autoscaler sees them.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import ray  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
from ray.util.placement_group import (  # pyright: ignore[reportMissingImports]
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]
    PlacementGroupSchedulingStrategy,
)

from jobs.config import ConfigError
from launch.agent_process import AgentProcess
from launch.cluster import AgentStart

_END_S = 5.0


class _Handle(NamedTuple):
    """An actor, and what it will have answered: its node, and how its agent has ended."""

    actor: Any
    where: Any
    run: Any


class RayCluster:
    """A cluster of Ray, by its address; "" is the one that RAY_ADDRESS names, or that runs here, or a new one.

    Raises ConfigError where there is none.
    """

    def __init__(self, address: str) -> None:
        try:
            with _signals_kept():  # a cluster that begins here would end this process by its own handlers
                ray.init(address=address or None, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            told = str(error).strip().splitlines()
            named = address or os.environ.get("RAY_ADDRESS") or "ray"
            raise ConfigError(
                f"cluster is {named!r}, where Ray cannot be reached ({told[0] if told else type(error).__name__}); "
                "allowed: a cluster that `ray start --head` has begun"
            ) from error
        self._actor: Any = ray.remote(AgentProcess)
        self._group: Any = None
        self._placed: Any = None
        self._bundles = dict[int, int]()

    @property
    def host(self) -> str:
        """The address of this machine, as the nodes reach it."""
        return ray.util.get_node_ip_address()

    def reserve(self, agents: Sequence[AgentStart]) -> None:
        """A placement group, with a bundle for each agent: a bundle whose node is lost is placed again by Ray."""
        bundles = [{kind: n for kind, n in (("CPU", a.cpus), ("GPU", a.gpus)) if n} for a in agents]
        self._group = placement_group(bundles, strategy="SPREAD")
        self._bundles, self._placed = {agent.rank: at for at, agent in enumerate(agents)}, self._group.ready()

    def reserved(self) -> bool:
        """Whether the placement group has been placed once."""
        if self._placed is not None and ray.wait([self._placed], timeout=0)[0]:
            self._placed = None
        return self._placed is None

    def start(self, what: AgentStart) -> _Handle:
        """Ask for the actor of an agent, in its bundle where it has one."""
        place: Any = "SPREAD"
        if (at := self._bundles.get(what.rank)) is not None:
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=at)
        takes = {"num_cpus": what.cpus, "num_gpus": what.gpus, "scheduling_strategy": place}
        actor = self._actor.options(**takes, max_restarts=0).remote()
        where = actor.where.remote()  # answered before it runs
        return _Handle(actor, where, actor.run.remote(what.settings, dict(what.environment), what.folder))

    def where(self, handle: _Handle) -> str | None:
        """The node on which an agent has been placed, if it has."""
        with suppress(RayError):
            return ray.get(handle.where, timeout=0)
        return None

    def ended(self, handle: _Handle) -> str | None:
        """Why an agent has ended, if it has."""
        ready, _ = ray.wait([handle.run], timeout=0)
        if not ready:
            return None
        try:
            code, said = ray.get(ready[0])
        except RayError as error:
            return f"was lost by Ray: {_line(error)}"
        last = said.strip().splitlines()
        return f"has ended with exit code {code}{f': {last[-1]}' if last else ''}"

    def end(self, handle: _Handle) -> None:
        """End an actor, and with it its agent."""
        with suppress(RayError, ValueError):
            ray.kill(handle.actor)

    def room(self) -> str:
        """What the cluster has, for a person."""
        whole, free = ray.cluster_resources(), ray.available_resources()
        kinds = [f"{free.get(kind, 0):g} of {whole.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU") if kind in whole]
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        return f"its {nodes} nodes have {', '.join(kinds) or 'neither CPUs nor GPUs'} free"

    def close(self, handles: Collection[_Handle]) -> None:
        """End all agents, who have a moment for it, and leave the cluster."""
        with suppress(RayError):
            if runs := [handle.run for handle in handles]:
                ray.wait(runs, num_returns=len(runs), timeout=_END_S)
        for handle in handles:
            self.end(handle)
        if self._group is not None:
            with suppress(RayError):
                remove_placement_group(self._group)
        ray.shutdown()


def _line(error: Exception) -> str:
    """The line of an error that says why: Ray writes it last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "The actor" in line or "node" in line), lines[0] if lines else "")


@contextmanager
def _signals_kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
