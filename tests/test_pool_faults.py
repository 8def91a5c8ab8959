"""The pool against workers that stop, lie, do not end or cannot be started: processes that say what a test wants."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.schedule.ops import Span
from pipeline.schedule.work_units import Cut, units
from recovery.losses import TooManyFailures
from recovery.pool import NoWorkerLeft, Pool
from recovery.runs import Iteration

CUT = Cut(((0, 2),), (2, 4), ((0, 2),))
WORKER = """
import json, socket, struct, sys, time
behaviour = json.loads(sys.argv[2])
end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
end.connect(sys.argv[1].replace("@", chr(0)))
def say(**message):
    data = json.dumps(message).encode()
    end.sendall(struct.pack("!I", len(data)) + data)
def exactly(size):
    data = b""
    while len(data) < size:
        piece = end.recv(size - len(data))
        if not piece:
            sys.exit(4)
        data += piece
    return data
say(hello=0, capability={"device": "cpu", "peak": None})
if behaviour.get("deaf"):
    time.sleep(60)
done = 0
while True:
    message = json.loads(exactly(struct.unpack("!I", exactly(4))[0]))
    if "end" in message:
        break
    if "do" not in message:
        continue
    order = message["do"]
    if done == behaviour.get("fail_after"):
        say(error="ValueError: " + behaviour["error"], fatal=False)
        sys.exit(1)
    if done == behaviour.get("garbage_after"):
        say(**behaviour["garbage"])
        time.sleep(60)
    for m in order["microbatches"]:
        say(op=order["id"], m=m, sums={"text": 1.0} if order["span"][1] == 4 else None, busy=0.01)
    say(unit=order["id"], version=0, events=[], held=1, memory={"host": 0, "device": 0})
    done += 1
"""


@dataclass(frozen=True)
class Ended:
    pid: int
    code: int

    def __str__(self) -> str:
        return f"was killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"


class Machine:
    """Starts workers by a script each, and tells of their ends, unless it is to hide them."""

    def __init__(self, *behaviours: dict[str, Any]) -> None:
        self.behaviours, self.address = list(behaviours), f"@unbroken-test-{os.getpid()}-{id(self)}"
        self.started: list[subprocess.Popen[bytes]] = []
        self.hidden: set[int] = set()
        self.refusals = 0
        self._told: set[int] = set()

    def start(self, worker: int) -> int:
        if self.refusals:
            self.refusals -= 1
            raise OSError("could not be started: Cannot allocate memory")
        behaviour = self.behaviours[min(worker, len(self.behaviours) - 1)]
        command = [sys.executable, "-S", "-c", WORKER, self.address, json.dumps(behaviour)]
        self.started.append(subprocess.Popen(command))
        return self.started[-1].pid

    def exits(self, timeout_s: float) -> list[Ended]:
        deadline = time.monotonic() + timeout_s
        while True:
            ended = [p for p in self.started if p.pid not in self._told | self.hidden and p.poll() is not None]
            if ended or time.monotonic() >= deadline:
                self._told |= {p.pid for p in ended}
                return [Ended(p.pid, p.returncode) for p in ended]
            time.sleep(0.002)

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


class Host:
    """A pool whose gradients are summed by nobody. `wrong(block, order, microbatches)` says what is wrong with one."""

    def __init__(self, machine: Machine, blocks: int = 12, **changes: Any) -> None:
        self.machine, self.events, self.added = machine, list[dict[str, Any]](), list[int]()
        self.wrong: Any = lambda *_: ""
        optimizer = SimpleNamespace(
            version=lambda *_: 0, add=self._add, store=SimpleNamespace(lacks=lambda *args: self.wrong(*args))
        )
        settings = {"deadline_s": 20.0, "max_failures": 10, **changes}
        self.pool = Pool(
            machine.address.replace("@", "\0"), machine.start, machine.exits, optimizer, blocks,  # type: ignore[arg-type]
            lambda _: 1.0, lambda unit, free, speeds: min(free, key=lambda w: (free[w], w)), self.event, **settings,
        )  # fmt: skip

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name, **fields})

    def named(self, name: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == name]

    def _add(self, block: int, span: Span) -> None:
        self.added.append(block)
        self.pool.told("added", block)

    def iteration(self, microbatches: int = 4, step: int = 0) -> Iteration:
        row = units(CUT, microbatches, 2, by_stage=True)
        run = self.pool.dispatcher.submit(row, (2,), step=step, job="train", source="param", version=0)
        self.pool.finish(run)
        return run


@pytest.fixture
def hosts() -> Iterator[Any]:
    made: list[Host] = []

    def host(*behaviours: dict[str, Any], **changes: Any) -> Host:
        made.append(Host(Machine(*behaviours), **changes))
        return made[-1]

    yield host
    for each in made:
        each.pool.close()
        each.machine.close()


def test_an_iteration_by_the_script(hosts: Any) -> None:
    host = hosts({})
    host.pool.open(2)
    for step in range(3):
        run = host.iteration(step=step)
        assert set(run.committed.values()) == {1}
    assert len(host.added) == 3 * 4
    assert not host.named("detected")


def test_a_worker_that_takes_nothing_does_not_hold_up_the_loop_and_is_lost(hosts: Any) -> None:
    """It is stopped: what it is told piles up, to a bound. Not one turn waits for it, and nothing is swallowed."""
    host = hosts({"deaf": True}, {}, deadline_s=60.0)
    host.pool.open(2)
    deaf = host.pool.members[0]
    assert deaf.channel is not None
    deaf.channel._room = 1 << 20
    longest = 0.0
    while 0 in host.pool.members:
        began = time.monotonic()
        host.pool._tell(deaf, facts=[[0, "x", m, 2] for m in range(2000)])
        host.pool._look_after()
        longest = max(longest, time.monotonic() - began)
        assert longest < 8.0, "a send waits"
    (detected,) = host.named("detected")
    assert "does not take its messages: " in detected["reason"]
    assert "bytes wait for the other end" in detected["reason"]


def test_a_message_of_any_size_arrives(hosts: Any) -> None:
    host = hosts({})
    host.pool.open(1)
    member = host.pool.members[0]
    host.pool._tell(member, facts=[[0, "x", m, 2] for m in range(60_000)])
    host.iteration()
    assert not host.named("detected")


def test_a_block_whose_writer_was_not_seen_to_end_goes_to_nobody(hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine does not tell of its end for a while: no block of it is given out, and the iteration does not end."""
    monkeypatch.setattr("recovery.processes._GONE_S", 0.2)
    monkeypatch.setattr("recovery.processes._BY_ITSELF_S", 0.0)
    host = hosts({"fail_after": 0, "error": "x"}, {})
    host.pool.open(2)
    lost = host.pool.members[0]
    host.machine.hidden.add(lost.pid)
    row = units(Cut((), (0, 4), ()), 12, 2, by_stage=True)  # every unit has a block, and each worker two of them
    run = host.pool.dispatcher.submit(row, (2,), step=0, job="train", source="param", version=0)
    processes, deadline = host.pool._processes, time.monotonic() + 10
    while not processes.unseen and time.monotonic() < deadline:
        host.pool.turn()
    held, before = set(processes.unseen[lost.pid]), len(host.added)
    assert held
    while run.left and time.monotonic() < deadline:
        host.pool.turn()
        given = {g.block for member in host.pool.members.values() for g in member.given.values()}
        assert not held & {*host.pool.dispatcher.blocks, *given, *host.added[before:]}
    host.pool._deadline_s = 0.2
    with pytest.raises(TimeoutError, match=rf"processes \[{lost.pid}\] were ended, and have not been seen to end"):
        host.pool.finish(run)
    host.pool._deadline_s = 20.0
    host.machine.hidden.clear()
    host.pool.finish(run)
    assert not processes.unseen
    assert len(host.pool.dispatcher.blocks) == 12, "in the end they are all there again"


def test_a_gradient_that_lacks_a_microbatch_does_not_count_and_its_writer_is_ended(hosts: Any) -> None:
    host = hosts({})
    host.pool.open(2)
    refused: list[int] = []

    def wrong(block: int, order: int, microbatches: Any) -> str:
        if not refused:
            refused.append(order)
            return f"block {block} of order {order} has microbatches [1] not once each"
        return ""

    host.wrong = wrong
    run = host.iteration()
    assert set(run.committed.values()) == {1}
    assert len(host.added) == 4
    (detected,) = host.named("detected")
    assert detected["reason"].startswith("gave back a gradient that does not count: block ")


@pytest.mark.parametrize(
    ("garbage", "said"),
    [
        ({"op": 1, "m": 77, "sums": None, "busy": 0.0}, "microbatch 77 is told of"),
        ({"op": 1, "m": "0", "sums": None, "busy": 0.0}, "m of a result is '0'"),
        ({"op": 1, "m": 0, "sums": {"text": [1]}, "busy": 0.0}, "text of the sums of a result is"),
        ({"unit": 1}, "a result has no version"),
        ({"what": 1}, "a result has no unit"),
    ],
)
def test_a_worker_that_talks_nonsense_is_lost_and_the_run_goes_on(hosts: Any, garbage: Any, said: str) -> None:
    host = hosts({"garbage_after": 0, "garbage": garbage}, {})
    host.pool.open(2)
    run = host.iteration()
    assert set(run.committed.values()) == {1}
    assert said in host.named("detected")[0]["reason"]


def test_nothing_is_waited_for_without_end(hosts: Any) -> None:
    """All workers are there and none can go on, for want of a block: that ends by name."""
    host = hosts({}, blocks=0, deadline_s=0.3)
    host.pool.open(1)
    with pytest.raises(TimeoutError, match=r"nothing was heard for 0\.6 s; 4 units of step 0 are left"):
        host.iteration()


def test_an_error_that_every_worker_meets_ends_the_run_with_it(hosts: Any) -> None:
    host = hosts({"fail_after": 0, "error": "this sample cannot be read"}, deadline_s=20.0)
    host.pool.open(2)
    with pytest.raises(TooManyFailures, match=r"ValueError: this sample cannot be read; 3 times in a row"):
        host.iteration()
    assert len(host.named("detected")) == 3


def test_workers_that_are_killed_while_they_have_nothing_to_do_prove_nothing(hosts: Any) -> None:
    """Another one is stopped and holds its units, so no step is made meanwhile, whoever is killed and how often."""
    host = hosts({"deaf": True}, {}, deadline_s=60.0)
    host.pool.open(2)
    row = units(CUT, 4, 2, by_stage=True)
    host.pool.dispatcher.submit(row, (2,), step=0, job="train", source="param", version=0)

    def idle() -> Any:
        return next((m for m in host.pool.members.values() if m.id > 0 and m.channel is not None and not m.given), None)

    for _ in range(5):
        deadline = time.monotonic() + 10.0
        while (victim := idle()) is None:
            host.pool.turn()
            assert time.monotonic() < deadline
        os.kill(victim.pid, signal.SIGKILL)
        while victim.id in host.pool.members:
            host.pool.turn()
    assert len(host.named("detected")) == 5


def test_a_machine_without_room_is_asked_again_and_the_others_go_on(hosts: Any) -> None:
    host = hosts({})
    host.machine.refusals = 2
    host.pool.open(2)
    assert len(host.pool.dispatcher.ready) == 2
    assert [each["reason"] for each in host.named("not_started")] == [
        "could not be started: Cannot allocate memory"
    ] * 2
    host.iteration()


def test_a_machine_that_starts_nothing_ends_the_run_by_name(hosts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recovery.processes._TRY_AGAIN_S", 0.01)
    host = hosts({})
    host.machine.refusals = 1000
    with pytest.raises(NoWorkerLeft, match=r"could not be started: Cannot allocate memory"):
        host.pool.open(2)


def test_who_has_no_part_in_it_is_not_listened_to(hosts: Any, tmp_path: Path) -> None:
    host = hosts({})
    host.pool.open(1)
    command = [sys.executable, "-S", "-c", WORKER, host.machine.address, json.dumps({"deaf": False})]
    stranger = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    run = host.iteration()
    deadline = time.monotonic() + 10
    while stranger.poll() is None and time.monotonic() < deadline:
        host.pool.turn()
    assert stranger.wait(1) != 0, "its connection was closed"
    assert set(run.events) <= {0}
