"""Keeps the report of a run up to date: a process beside it while it goes on, and the last page at its end."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from launch.page.files import PAGE, RunReader
from launch.page.follow import draw_page

log = logging.getLogger(__name__)
FIRST_S = 10.0
"""Seconds until the first page is drawn: a run that is shorter has one at its end alone."""
_BYTES_PER_S = 30_000
"""A run that goes on from far has much to be read, and that is put off until it is a small share of its time."""
_PATIENCE_S = 2.0
_ROOT = str(Path(__file__).parents[2])
_BEGIN = """
import select, sys
root, folder, first = sys.argv[1:]
if not select.select([0], [], [], float(first))[0]:
    if root not in sys.path:
        sys.path.insert(0, root)
    from pathlib import Path
    from launch.page.follow import follow
    follow(Path(folder))
"""
"""Nothing is imported before it is needed: until then the process is as small as one can be."""


class PageKeeper:
    """Draws RUN/report.html from construction to `close`. Nothing that goes wrong with it is the run's concern;
    `say` is told where there is no last page."""

    def __init__(self, folder: Path, say: Callable[[str], None], first_s: float = FIRST_S) -> None:
        self._folder, self._say = folder, say
        self._process: subprocess.Popen[bytes] | None = None
        there = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
        first_s += there / _BYTES_PER_S
        command = [sys.executable, "-P", "-c", _BEGIN, _ROOT, str(folder.resolve()), str(first_s)]
        with suppress(OSError):  # without it there is a page at the end
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is not for it
            )  # fmt: skip

    def close(self) -> None:
        """The run is over: draw its last page."""
        if (process := self._process) is not None:
            self._process = None
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.write(b".")
                process.stdin.close()
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        draw_last(self._folder, self._say)


def draw_last(folder: Path, say: Callable[[str], None] = log.warning) -> None:
    """Draw the page of a run that is over; one that cannot be drawn costs the page, and is said."""
    try:
        draw_page(RunReader(folder), running=False)
    except Exception as error:  # what a page is made of has come from everywhere
        say(f"{PAGE} is not drawn: {error or type(error).__name__}")
