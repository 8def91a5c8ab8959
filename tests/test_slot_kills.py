"""A real process is killed at every point of a slot's way: who is left sees the loss, gets whole messages and nothing
else, and has all its memory back; and runs that lose workers there are bitwise the calm run."""

from __future__ import annotations

import secrets
import signal
import socket
import time
from pathlib import Path

import pytest
from torch import Tensor

from launch.forkserver import ForkServer
from pipeline.runtime.mailbox import LinkError, Mailbox
from pipeline.runtime.shared_link import SharedLink
from tests.harness import Started, stop
from tests.slot_kills import POINTS, SENDER, SIZE, content, memory, op
from tests.test_recovery import events, same_weights, settings, train, whole_ledger

AT = 7
"""The time at which a point is reached that ends it: two slots have been used again and again by then."""
WAIT_S = 20.0


def meet(forkserver: ForkServer, point: str) -> tuple[int, socket.socket]:
    """A process that will be killed at `point`, and this end of the connection to it."""
    name = f"unbroken-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{name}")
        listener.listen(1)
        listener.settimeout(WAIT_S)
        pid = forkserver.start({"call": "tests.slot_kills:end_main", "name": f"@{name}", "point": point, "at": AT})
        return pid, listener.accept()[0]


def use(link: SharedLink, box: Mailbox, point: str) -> list[Tensor]:
    """Send, or take, until the peer is gone: what came, in order; some of it is let go at once, some kept."""
    kept: list[Tensor] = []
    number, deadline = 0, time.monotonic() + WAIT_S

    def once() -> None:
        if point in SENDER:
            found = box.get(0, 0, op(number), 9, deadline)
            assert found.equal(content(number)), f"message {number} is torn"
            if number % 2 or point in ("a grant comes", "it is mapped"):
                kept.append(found)
        else:
            link.send(0, 0, op(number), content(number))
            time.sleep(0.001)

    while True:
        assert time.monotonic() < deadline, "the peer was not killed, or its loss was not seen"
        try:
            once()
        except LinkError as error:
            said = str(error)
            break
        number += 1
    assert any(each in said for each in ("was closed", "reset by peer", "Broken pipe")), said
    assert not point.endswith("the copy") or number == AT - 1, "a message that was not told of has come, or one is lost"
    assert point != "after the message" or number == AT, "a message that was told of is lost"
    with pytest.raises(LinkError):
        link.send(0, 0, op(number), content(0))
    with pytest.raises(LinkError):
        link.flush(time.monotonic() + WAIT_S)
    return kept


MOST_TELLING = ("during the copy", "after the message", "before a grant", "it is let go")


@pytest.mark.parametrize(
    "point", [each if each in MOST_TELLING else pytest.param(each, marks=pytest.mark.long) for each in POINTS]
)
def test_who_is_left_sees_the_loss_and_nothing_torn_and_has_its_memory_back(forkserver: ForkServer, point: str) -> None:
    before = memory()
    pid, end = meet(forkserver, point)
    running = {pid: 0}
    try:
        box = Mailbox()
        link = SharedLink(9, end, box, max_bytes=SIZE)
        kept = use(link, box, point)
        deadline = time.monotonic() + WAIT_S
        ended = next((e for e in forkserver.poll(0.05) if e.pid == pid), None)
        while ended is None and time.monotonic() < deadline:
            ended = next((e for e in forkserver.poll(0.05) if e.pid == pid), None)
        running.clear()
        assert ended is not None
        assert ended.code == -signal.SIGKILL, ended
        began = [each.clone() for each in kept]
        link.abandon()
        assert all(a.equal(b) for a, b in zip(kept, began, strict=True)), "what is still used is gone with the link"
        kept.clear()
        del box, link
        assert memory() == before
    finally:
        stop(forkserver, running)


def test_a_run_that_loses_a_worker_at_each_point_is_bitwise_the_calm_run(
    forkserver: ForkServer, tmp_path: Path
) -> None:
    """Its worker goes back to the newest checkpoint, or to the start, with the other one."""
    flags = ["--workers", "2", "--scheduler", "gpipe", "--recovery", "checkpoint", "--links", "shm"]
    train(forkserver, calm := tmp_path / "calm", *flags)
    points = ("before the copy", "during the copy", "after the copy", "after the message", "before its return",
              "a grant comes")  # fmt: skip
    kills = [(point, (2 + 2 * i) % 12) for i, point in enumerate(points)]
    out, said = tmp_path / "run", tmp_path / "said"
    said.mkdir()
    argv = settings(out, *flags)
    with Started(
        forkserver, out.with_suffix(".log"), call="tests.slot_kills:run_main", argv=argv, slots=kills, said=str(said)
    ) as started:
        done = started.wait(60.0)
    assert done.code == 0, done.output
    assert {path.name.replace("-", " ") for path in said.iterdir()} == set(points)
    assert done.output.count("was killed by SIGKILL") == len(points)
    assert len(events(out, "remedy")) >= len(points)
    whole_ledger(out)
    assert same_weights(out, calm)
