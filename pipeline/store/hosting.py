"""A store in a process of its own: it answers at once, whatever the process that has started it is busy with.

It is a fresh interpreter without torch. The token comes through its standard input, which stays open: when that ends,
because the handle is closed or its owner was killed, the store ends.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from pipeline.store.server import StoreServer

_BACKLOG = 4096
_END_S = 5.0


class StoreProcess:
    """Hosts a store at `host`:`port` until `close`; port 0 takes a free one. Raises OSError where it cannot listen."""

    def __init__(self, host: str, port: int, token: bytes) -> None:
        with socket.create_server((host, port), backlog=_BACKLOG) as listener:
            self.port: int = listener.getsockname()[1]
            packages = str(Path(__file__).parents[2])
            paths = os.pathsep.join([packages, *filter(None, [os.environ.get("PYTHONPATH")])])
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.store.hosting", str(listener.fileno())],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()],
                env={**os.environ, "PYTHONPATH": paths}, process_group=0,
            )  # fmt: skip
        self.pid = self._process.pid
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # who connects is told
            self._process.stdin.write(token.hex().encode() + b"\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:  # stopped, say
            self._process.kill()
            self._process.wait()


class StoreThread:
    """The same in a thread of this process, for one that is not busy."""

    def __init__(self, host: str, port: int, token: bytes) -> None:
        listener = socket.create_server((host, port), backlog=_BACKLOG)
        self.port: int = listener.getsockname()[1]
        self._server = StoreServer(listener, token)
        self._thread = threading.Thread(target=self._server.run, name="store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._server.stop()
        self._thread.join(_END_S)


def main(descriptor: int) -> None:
    """The process: serve until the standard input ends."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # sent to all processes of a run: its agent alone decides what they mean
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    token = bytes.fromhex(sys.stdin.buffer.readline().decode())
    StoreServer(socket.socket(fileno=descriptor), token).run(until=sys.stdin.fileno())


if __name__ == "__main__":
    main(int(sys.argv[1]))
