"""Draws the report of a run while the run goes on, in a process of its own that takes only time which nobody wants.

It reads what the run has written and is never waited for: were it stopped, the run would not know. What it may cost is
a share of the run's time, counted by itself.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from pathlib import Path

from launch.page.draw import page
from launch.page.files import PAGE, RunReader
from launch.page.sheet import sheet
from launch.run_folder import write_whole

SHARE = 0.004
"""Of one core's time that it may use."""
_POLL_S, _EVERY_S = 1.0, 5.0


def draw_page(reader: RunReader, *, running: bool | None = None) -> None:
    """Write the report of a run into its folder. Raises OSError where that cannot be."""
    write_whole(reader.folder / PAGE, page(sheet(reader.read(running))))


def follow(folder: Path, orders: int = 0) -> None:
    """Draw whenever something has come, until `orders` ends: a byte before that says that the run ends in peace, and
    draws its last page itself."""
    with suppress(OSError, AttributeError):  # it may be forbidden, or unknown to this system
        os.nice(19)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    reader, began = RunReader(folder), time.monotonic()
    last, known, drawn = -_EVERY_S, 0, 0
    used = time.process_time()  # what it took to be here
    while not select.select([orders], [], [], _POLL_S)[0]:
        reader.more()
        now, events = time.monotonic(), reader.events
        in_turn = now - last >= (_EVERY_S if events == known else _POLL_S)
        if in_turn and reader.size != drawn and time.process_time() - used <= SHARE * (now - began):
            last, known, drawn = now, events, reader.size
            with suppress(OSError):  # a full disk: the next one may find room
                draw_page(reader, running=True)
    if not os.read(orders, 1):  # the run was killed, and has drawn nothing
        with suppress(OSError):
            draw_page(reader, running=False)
