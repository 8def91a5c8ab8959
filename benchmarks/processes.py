"""The processes of a run, as the process tree tells of them."""

from __future__ import annotations

import psutil


def warm_parent(agent: int) -> psutil.Process:
    """The process from which the workers of an agent are forked: its eldest child. Then come the store and who draws
    the report."""
    return min(psutil.Process(agent).children(), key=psutil.Process.create_time)
