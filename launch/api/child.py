"""The process in which the Python API runs a command: it is asked to stop when whoever started it is gone.

Its standard input is a pipe that nobody writes to. When the other end is closed, by whatever death of the notebook's
process, the kernel itself sends SIGTERM, on which a run saves itself. That needs no thread, which must not be there
when agents fork, and no process that watches.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys

from launch.cli import STOPPED, main
from launch.signals import NotStarted, stopping

_F_SETSIG = 10  # of Linux; the module fcntl has no name for it


def run() -> int:
    """Run the command that the words say. Returns its exit code."""
    try:
        with stopping():  # while there is nothing to save yet
            stop_with(sys.stdin.fileno())
            return main(sys.argv[1:])
    except NotStarted:
        return STOPPED


def stop_with(pipe: int) -> None:
    """Have SIGTERM sent to this process when the last writer of a pipe is gone; also where that was before."""
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, _F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:
        os.kill(os.getpid(), signal.SIGTERM)
