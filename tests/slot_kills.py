"""Processes that end by SIGKILL at one point of a slot's way: patched here, so that the product has no hook for it.

A slot goes: granted by its receiver, mapped by the sender, filled, told of, filed, let go, told to be free again.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime import shared_link, slots
from pipeline.runtime.mailbox import Mailbox
from pipeline.runtime.shared_link import SharedLink
from pipeline.schedule.ops import Op

SENDER = ("before the copy", "during the copy", "after the copy", "after the message", "a grant comes", "it is mapped")
"""Where the end that sends is killed; the last two as a slot reaches it."""
RECEIVER = ("a message is filed", "it is let go", "before its return", "after its return", "before a grant",
            "after a grant")  # fmt: skip
"""Where the end that owns the slots is killed."""
POINTS = (*SENDER, *RECEIVER)
SIZE = 1 << 16


def die() -> None:
    """By SIGKILL, here and now."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal is on its way


def kill_at(point: str, due: Callable[[], bool]) -> None:
    """From now on this process is killed when one of its links is at `point` and that is `due`."""

    def before(owner: Any, name: str, holds: Callable[..., bool] = lambda *_: True) -> None:
        plain = getattr(owner, name)

        def patched(*args: Any, **more: Any) -> Any:
            if holds(*args) and due():
                die()
            return plain(*args, **more)

        setattr(owner, name, patched)

    def after(owner: Any, name: str, holds: Callable[..., bool] = lambda *_: True) -> None:
        plain = getattr(owner, name)

        def patched(*args: Any, **more: Any) -> Any:
            held, result = holds(*args), plain(*args, **more)
            if held and due():
                die()
            return result

        setattr(owner, name, patched)

    def returns(link: SharedLink, *_: Any) -> bool:
        return bool(link._bell.returned)

    def full(_: SharedLink, what: int, *__: Any) -> bool:
        return what == shared_link._FULL

    if point == "during the copy":
        before(SharedLink, "_fill", lambda *args: bool(_half(*args)))
    elif point == "a grant comes":
        before(slots, "map_slot")
    elif point == "it is mapped":
        after(slots, "map_slot")
    elif point == "it is let go":
        after(shared_link.Bell, "give_back")
    else:
        when, name, holds = {
            "before the copy": (before, "_fill", lambda *_: True),
            "after the copy": (before, "_filled", lambda *_: True),
            "after the message": (after, "_post", full),
            "a message is filed": (after, "_deliver", lambda *_: True),
            "before its return": (before, "_give_back", returns),
            "after its return": (after, "_give_back", returns),
            "before a grant": (before, "_grant", lambda *_: True),
            "after a grant": (after, "_grant", lambda *_: True),
        }[point]
        when(SharedLink, name, holds)


def _half(link: SharedLink, number: int, _: bytes, payload: Tensor) -> int:
    """Write the first half of a payload; its bytes."""
    flat = payload.contiguous().view(-1).view(torch.uint8)
    link._theirs[number][: flat.numel() // 2].copy_(flat[: flat.numel() // 2])
    return flat.numel()


def memory() -> tuple[int, int, set[str]]:
    """Descriptors, mapped slots, and what is in /dev/shm of links (nothing ever is)."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    there = {name for name in os.listdir("/dev/shm") if "unbroken-link" in name}
    return len(os.listdir("/proc/self/fd")), sum("unbroken-link" in line for line in maps), there


def content(number: int) -> Tensor:
    """Of message `number`: between a few bytes and a whole slot, and nowhere what any other message has there."""
    length = 1 + (number * 7919) % (SIZE // 4)
    return torch.arange(length, dtype=torch.float32) + 100_000 * number


def op(number: int) -> Op:
    return Op("F", (0, 1), number)


# ---- one end of a link, in a process of its own ----


def end_main(payload: dict[str, Any]) -> int:
    """Connect, and send or take messages until killed at `point`, the `at`-th time that it is reached."""
    reached = iter(range(1, 1 << 30))
    kill_at(payload["point"], lambda: next(reached) == payload["at"])
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.connect(payload["name"].replace("@", "\0"))
    box = Mailbox()
    link = SharedLink(0, end, box, max_bytes=SIZE)
    number, held = 0, list[Tensor]()
    while True:
        if payload["point"] in SENDER:
            link.send(0, 0, op(number), content(number))
            time.sleep(0.001)
        else:
            held.append(box.get(0, 0, op(number), 0, time.monotonic() + 30))
            assert torch.equal(held[-1], content(number))
            if len(held) > 4 and "grant" not in payload["point"]:
                held.pop(0)
        number += 1


# ---- a whole run ----


def run_main(payload: dict[str, Any]) -> int:
    """`unbroken ...`, whose workers are killed at each of some points, once, from a step on: payload["slots"] is a list
    of (point, step); with step 0 it is one that takes a lost one's place and has sent nothing yet. Who is killed says
    so by a file in payload["said"]."""
    from tests import harness

    said, newest = Path(payload["said"]), 0
    send = SharedLink.send

    def sending(link: SharedLink, view: int, step: int, op: Op, tensor: Tensor) -> None:
        nonlocal newest
        newest = step
        send(link, view, step, op, tensor)

    SharedLink.send = sending  # type: ignore[method-assign]

    def due(point: str, step: int) -> bool:
        if newest < step or (not step and (newest or not any(said.iterdir()))):
            return False
        try:
            (said / point.replace(" ", "-")).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    for point, step in payload["slots"]:
        kill_at(point, lambda point=point, step=step: due(point, step))
    return harness._command(payload["argv"], Path(payload["log"]))
