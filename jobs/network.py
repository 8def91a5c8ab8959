"""The network file of a job: what its links are like, and whatever else a planner reads from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.config import ConfigError, require
from pipeline.reading import FileError, read_json
from pipeline.schedule.costs import CostError, Network


def read_network(path: Path, workers: int) -> tuple[Network, dict[str, Any]]:
    """The links of a network file, for at least so many workers, and all that it holds. Raises ConfigError."""
    try:
        values = read_json(path)
        network = Network.from_json(values)
    except FileError as error:
        raise ConfigError(f"network is {str(path)!r}, which {error}") from error
    except CostError as error:
        raise ConfigError(f"network is {str(path)!r}, which cannot be used: {error}") from error
    size = len(network.latency_s)
    require(
        size >= workers, "network", str(path), f"a link matrix of {workers} workers or more; found {size} worker(s)"
    )
    return network, values
