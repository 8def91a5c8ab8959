"""A process of `unbroken train` that another process starts: an agent by an actor of a cluster, a run by a script.

Imports nothing that takes time: an actor of a cluster loads this and no more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PARENT = "UNBROKEN_PARENT"
"""The environment variable with the process without which the other one must not go on."""
_TOLD_LINES = 20
_HERE = Path(__file__).resolve().parent.parent


def run_process(
    settings: str, environment: Mapping[str, str], folder: str, stdout: int | None = None,
    started: Callable[[subprocess.Popen[str]], Any] = lambda _: None,
) -> tuple[int, str]:  # fmt: skip
    """Run `unbroken train` with settings as TOML to its end: its exit code, and the last lines of its errors, which go
    to those of this process too. It has a session of its own: signals come from who calls, by `started`, or not."""
    paths = [str(_HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "launch", "train", "--config", "/dev/stdin"],
        stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE, text=True, start_new_session=True,
        cwd=folder if os.path.isdir(folder) else None,
        env={**os.environ, **environment, PARENT: str(os.getpid()), "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    started(child)
    assert child.stdin is not None
    assert child.stderr is not None
    with suppress(BrokenPipeError), child.stdin:
        child.stdin.write(settings)
    said = deque[str](maxlen=_TOLD_LINES)
    with child.stderr:
        for line in child.stderr:
            sys.stderr.write(line)
            said.append(line)
    return child.wait(), "".join(said)


class AgentProcess:
    """What an actor of a cluster is."""

    def where(self) -> str:
        """The name of its machine."""
        return os.uname().nodename

    def run(self, settings: str, environment: dict[str, str], folder: str) -> tuple[int, str]:
        """Run an agent, which forks workers: from a process without threads, as that of an actor is not."""
        return run_process(settings, environment, folder, subprocess.DEVNULL)
