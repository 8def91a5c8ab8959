"""Faults as text: read whole or refused by name, drawn from the seed alone, and met once."""

from __future__ import annotations

import os
import signal
import threading
import time
from itertools import pairwise

import pytest

from recovery import inject
from recovery.inject import (
    POINTS,
    POOL_POINTS,
    Fault,
    Ground,
    InjectedFault,
    InjectionError,
    Injector,
    Rate,
    parse_faults,
)


def test_texts_are_read_whole() -> None:
    kill, slow, rate = parse_faults(
        "kill:worker=2,step=30,at=reduce; slow:stage=1,step=4,factor=2.5;rate:p=0.5,stages=1-3,seed=9"
    )
    assert kill == Fault("kill", 30, "reduce", worker=2, factor=5.0, name="0")
    assert slow == Fault("slow", 4, "forward", stage=1, factor=2.5, name="1")
    assert rate == Rate(0.5, (1, 2, 3), 9)
    assert parse_faults("") == ()
    for pool in (False, True):
        (reading,) = parse_faults("kill:worker=1,step=0,at=reference", Ground(4, 2, pool, reads=True))
        assert reading == Fault("kill", 0, "reference", worker=1, factor=5.0, name="0")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("burn:worker=1,step=2", r"'burn' is no fault; allowed: kill, term, stop, segfault, exception, gil, slow"),
        ("kill:worker=1", r"step is missing; allowed: a whole number of 0 to 99999999"),
        ("kill:worker=x,step=1", r"worker is 'x'; allowed: a whole number of 0 to"),
        ("kill:step=1", r"allowed: one of worker=ID and stage=NUMBER"),
        ("kill:worker=1,stage=1,step=1", r"allowed: one of worker=ID and stage=NUMBER"),
        ("kill:worker=1,step=1,at=lunch", r"at is 'lunch'; allowed: forward, backward"),
        ("kill:worker=1,step=1,when=now", r"when; allowed for kill: worker, stage, step, at, factor"),
        ("kill:worker", r"'worker'; allowed: name=value, once"),
        ("rate:p=2", r"p is '2'; allowed: a number of 0 to 1"),
        ("rate:p=0.1,stages=a-b", r"stages is 'a-b'; allowed: a number or a range"),
        ("rate:p=0.1,kind=tickle", r"kind is 'tickle'; allowed: kill"),
        ("rate:p=nan", r"p is 'nan'; allowed: a number of 0 to 1"),
        ("rate:p=-0.1", r"p is '-0.1'; allowed: a number of 0 to 1"),
        ("rate:p=0.1,stages=4-1", r"stages is '4-1'; allowed: a number or a range"),
        ("rate:p=0.1,stages=0-99999999999", r"stages is '0-99999999999'; allowed: a number or a range"),
        ("rate:p=0.1,seed=1e9", r"seed is '1e9'; allowed: a whole number"),
        ("slow:worker=1,step=1,factor=nan", r"factor is 'nan'; allowed: a number of 1 to 10000"),
        ("slow:worker=1,step=1,factor=inf", r"factor is 'inf'; allowed: a number of 1 to 10000"),
        ("slow:worker=1,step=1,factor=0.5", r"factor is '0.5'; allowed: a number of 1 to 10000"),
        ("kill:worker=1,step=-1", r"step is '-1'; allowed: a whole number of 0 to 99999999"),
        (f"kill:worker=1,step={10**30}", r"step is '1000000000000000000000000000000'; allowed: a whole number"),
        ("kill:worker=1,worker=2,step=1", r"'worker=2'; allowed: name=value, once for each name"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(InjectionError, match=said):
        parse_faults(text)


@pytest.mark.parametrize(
    ("text", "ground", "said"),
    [
        ("kill:worker=104,step=1", Ground(104, 4), r"worker is 104; allowed: 0 to 103, the workers and those that may"),
        ("kill:stage=4,step=1", Ground(104, 4), r"stage is 4; allowed: 0 to 3"),
        ("rate:p=0.1,stages=2-4", Ground(104, 4), r"stage is 4; allowed: 0 to 3"),
        (
            "kill:worker=1,step=1,at=upload",
            Ground(104, 4),
            r"at is 'upload'; allowed without scheduler roundpipe: forw",
        ),
        (
            "kill:worker=1,step=1,at=join",
            Ground(104, None, True),
            r"at is 'join'; allowed with scheduler roundpipe: ord",
        ),
        ("kill:stage=104,step=1", Ground(104, None, True), r"stage is 104; allowed: 0 to 103"),
        (
            "kill:worker=1,step=0,at=reference",
            Ground(104, 4),
            r"at is 'reference'; allowed where nothing is read before the first step: forward, backward",
        ),
        ("flip:worker=1,step=1,at=forward", Ground(104, None, True), r"'flip' is no fault; allowed: kill, term,"),
        ("rate:p=0.1,kind=flip", Ground(104, None, True), r"kind is 'flip'; allowed: kill, term,"),
    ],
)
def test_what_can_never_happen_is_refused_by_name(text: str, ground: Ground, said: str) -> None:
    parse_faults(text)
    with pytest.raises(InjectionError, match=said):
        parse_faults(text, ground)


def test_a_rate_strikes_a_pool_where_every_worker_comes_by() -> None:
    (rate,) = parse_faults("rate:p=1", Ground(4, None, True))
    assert isinstance(rate, Rate)
    drawn = {fault.at for step in range(200) if (fault := rate.draw(step, 1))}
    assert drawn == {"order", "forward", "backward", "commit", "committed"} < set(POOL_POINTS)


def test_a_rate_is_drawn_from_its_seed_alone_and_as_often_as_it_says() -> None:
    rate = Rate(0.1, (1, 2), seed=3)
    drawn = [(step, stage, fault) for step in range(2000) for stage in range(4) if (fault := rate.draw(step, stage))]
    assert drawn == [(s, n, f) for s in range(2000) for n in range(4) if (f := Rate(0.1, (1, 2), seed=3).draw(s, n))]
    assert {stage for _, stage, _ in drawn} == {1, 2}
    assert 330 < len(drawn) < 470, "far from 400 of 4000"
    assert {fault.at for _, _, fault in drawn} == set(POINTS[:5])
    assert [f for s, n, f in drawn if n == 1] != [Rate(0.1, (1, 2), seed=4).draw(s, 1) for s, n, _ in drawn if n == 1]


def test_a_fault_is_met_once_by_whom_it_names() -> None:
    asked: list[str] = []
    poisoned: list[int] = []
    flipped: list[int] = []

    def claim(name: str) -> bool:
        asked.append(name)
        return asked.count(name) == 1

    def injector(worker: int, stage: int, text: str) -> Injector:
        return Injector(
            parse_faults(text), worker, stage, claim, lambda fault: None, lambda: poisoned.append(worker), lambda: None,
            lambda: flipped.append(worker),
        )  # fmt: skip

    named = injector(2, 0, "exception:worker=2,step=5,at=forward")
    named("forward", 4)
    named("backward", 5)
    injector(1, 0, "exception:worker=2,step=5,at=forward")("forward", 5)
    with pytest.raises(InjectedFault, match="injected at forward of step 5"):
        named("forward", 5)
    named("forward", 5)  # the step is run again, by the same worker or by who took its place
    staged = injector(7, 1, "nan:stage=1,step=3;slow:stage=1,step=3,factor=4")
    staged("backward", 3)
    staged("forward", 3)
    assert poisoned == [7]
    assert staged.slowdown == 4
    moved = injector(7, 1, "flip:worker=7,step=7,at=copy;nan:worker=7,step=7,at=snapshot")
    moved("copy", 6)
    moved("snapshot", 8)
    assert not flipped, "copies are moved after a loss, and the loss is at the step or after it"
    moved("copy", 8)
    assert flipped == [7]


@pytest.mark.parametrize(("kind", "signum"), [("segfault", signal.SIGSEGV), ("kill", signal.SIGKILL)])
def test_what_ends_a_process_is_seen_as_such(kind: str, signum: int) -> None:
    (fault,) = parse_faults(f"{kind}:worker=0,step=1")
    if (pid := os.fork()) == 0:
        Injector((fault,), 0, 0, lambda _: True, lambda _: None, lambda: None, lambda: None)("backward", 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signum


def test_no_thread_of_python_comes_on_while_the_gil_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inject, "_HELD_S", 1)
    (fault,) = parse_faults("gil:worker=0,step=1")
    beats, ended = list[float](), threading.Event()

    def beat() -> None:
        while not ended.wait(0.01):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.1)
    Injector((fault,), 0, 0, lambda _: True, lambda _: None, lambda: None, lambda: None)("backward", 1)
    time.sleep(0.1)
    ended.set()
    thread.join()
    assert max(b - a for a, b in pairwise(beats)) > 0.9
