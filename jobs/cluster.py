"""Where a cluster places the agents of a run: its settings, which say nothing of what the run computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pipeline.settings import WEEK_S, RunShape, Within, require

RAY = "ray"


@dataclass(frozen=True)
class ClusterSettings:
    """Read where a cluster places the agents of a run."""

    cluster: str = ""
    """`ray` has the agents of the run placed by Ray: by the cluster that RAY_ADDRESS names or that runs on this
    machine, else by a new one of this machine. ray://HOST:PORT is a cluster elsewhere, by Ray Client. --out must be a
    folder that all its nodes see."""
    agent_workers: Annotated[int, Within(1, 1024)] = 1
    """Workers that an agent has at most. They are neighbours, on one node of the cluster."""
    agent_cpus: Annotated[float, Within(0, 1024, above=True)] = 1.0
    """CPUs that the cluster keeps for each worker. With --device cuda it keeps a GPU as well."""
    cluster_wait: Annotated[float, Within(0, WEEK_S)] = 60.0
    """Seconds after which the run begins with the workers that are there, if they are MIN or more. With fewer it waits
    for --wait seconds more, and ends with the code 75."""

    def check(self, run: RunShape) -> None:
        """Raise ConfigError for a cluster that is none, or a run that cannot go on without one of its nodes."""
        if not self.cluster:
            return
        host, _, port = self.cluster.removeprefix(f"{RAY}://").rpartition(":")
        remote = self.cluster.startswith(f"{RAY}://") and bool(host) and port.isdecimal() and 0 < int(port[:6]) < 65536
        require(self.cluster == RAY or remote, "cluster", self.cluster, "ray, or ray://HOST:PORT")
        require(run.min_workers > 0, "workers", run.workers, "MIN:MAX with cluster, whose nodes come and go")
        require(run.nodes == 1, "nodes", run.nodes, "1 with cluster, which has nodes of its own")
        require(run.network is None, "network", str(run.network), "nothing with cluster, whose links are real")
