"""Faults as text: the same words in a test, in a benchmark and on the command line.

    kill:worker=2,step=30,at=backward      slow:stage=1,step=10,factor=5      rate:p=0.002,stages=1-4,seed=7

A fault names a worker by id, or a stage (0 is the first) and then hits its lowest worker at that time. It happens once,
in the middle of what it names. A rate is drawn per step and stage from its seed alone, so that every strategy meets
the same failures.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.rng import derive

POINTS = ("forward", "backward", "reduce", "commit", "optimizer", "recovery", "join", "order", "upload", "uploaded",
          "committed")  # fmt: skip
"""The last four are met by workers that hold nothing: a slot is there, its weights are being loaded, they are loaded,
its gradient counts."""
KINDS = ("kill", "term", "stop", "exception", "slow", "nan", "cut")
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}


class InjectionError(ValueError):
    """A fault that cannot be read: quotes it, and says what is allowed."""


class InjectedFault(RuntimeError):
    """The exception that `exception:` raises."""


@dataclass(frozen=True)
class Fault:
    """One fault. Exactly one of `worker` and `stage` is set."""

    kind: str
    step: int
    at: str = "backward"
    worker: int | None = None
    stage: int | None = None
    factor: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class Rate:
    """A kill of each of `stages` (all, if empty) in each step with probability `p`, at a random point."""

    p: float
    stages: tuple[int, ...] = ()
    seed: int = 0
    kind: str = "kill"

    def draw(self, step: int, stage: int) -> Fault | None:
        """The fault of this stage in this step, if there is one."""
        if self.stages and stage not in self.stages:
            return None
        if derive(self.seed, "fault", step, stage) / 2**63 >= self.p:
            return None
        at = POINTS[derive(self.seed, "point", step, stage) % 5]
        return Fault(self.kind, step, at, stage=stage, name=f"rate/{self.seed}/{stage}")


def parse(text: str) -> tuple[Fault | Rate, ...]:
    """The faults of a text, separated by semicolons. Raises InjectionError."""
    return tuple(_parse(part.strip(), f"{i}") for i, part in enumerate(text.split(";")) if part.strip())


def _parse(text: str, name: str) -> Fault | Rate:
    kind, _, rest = text.partition(":")
    values: dict[str, str] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise InjectionError(f"inject {text!r}: {pair!r}; allowed: name=value")
        values[key.strip()] = value.strip()
    allowed = ("p", "stages", "seed", "kind") if kind == "rate" else ("worker", "stage", "step", "at", "factor")
    if kind not in (*KINDS, "rate"):
        raise InjectionError(f"inject {text!r}: {kind!r} is no fault; allowed: {', '.join(KINDS)}, rate")
    if unknown := set(values) - set(allowed):
        raise InjectionError(f"inject {text!r}: {', '.join(sorted(unknown))}; allowed for {kind}: {', '.join(allowed)}")
    if kind == "rate":
        p = _number(text, values, "p", float)
        if not 0 <= p <= 1:
            raise InjectionError(f"inject {text!r}: p is {p}; allowed: 0 to 1")
        what = values.get("kind", "kill")
        if what not in KINDS:
            raise InjectionError(f"inject {text!r}: kind is {what!r}; allowed: {', '.join(KINDS)}")
        return Rate(p, _stages(text, values.get("stages", "")), _number(text, values, "seed", int, "0"), what)
    if ("worker" in values) == ("stage" in values):
        raise InjectionError(f"inject {text!r}: allowed: one of worker=ID and stage=NUMBER")
    at = values.get("at", "forward" if kind == "slow" else "backward")
    if at not in POINTS:
        raise InjectionError(f"inject {text!r}: at is {at!r}; allowed: {', '.join(POINTS)}")
    factor = _number(text, values, "factor", float, "5")
    who = {key: _number(text, values, key, int) for key in ("worker", "stage") if key in values}
    return Fault(kind, _number(text, values, "step", int), at, factor=factor, name=name, **who)


def _number(text: str, values: dict[str, str], name: str, kind: Callable[[str], float], default: str = "") -> int:
    value = values.get(name, default)
    try:
        number = kind(value)
    except ValueError:
        number = -1
    if number < 0:
        found = f"is {value!r}" if value else "is missing"
        raise InjectionError(f"inject {text!r}: {name} {found}; allowed: a number of 0 or more")
    return number  # type: ignore[return-value]


def _stages(text: str, value: str) -> tuple[int, ...]:
    if not value:
        return ()
    if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", value)):
        raise InjectionError(f"inject {text!r}: stages is {value!r}; allowed: a number or a range, as 1-4")
    first, last = int(match[1]), int(match[2] or match[1])
    return tuple(range(first, last + 1))


@dataclass
class Injector:
    """The faults that one worker meets. `claim(name)` is true for the first who asks: a fault happens once in a run.

    `told(fault)` is called just before it happens. `poison` makes a gradient NaN; `cut` breaks the worker's connections
    to other workers.
    """

    faults: Sequence[Fault | Rate]
    worker: int
    stage: int | None
    claim: Callable[[str], bool]
    told: Callable[[Fault], None]
    poison: Callable[[], None]
    cut: Callable[[], None]
    slowdown: float = field(default=1.0)

    def __call__(self, point: str, step: int) -> None:
        """Let what is due at this point of this step happen. Raises InjectedFault for an injected exception."""
        for fault in self._due(point, step):
            if self.claim(f"{fault.name}/{fault.step}"):
                self.told(fault)
                self._happen(fault)

    def _due(self, point: str, step: int) -> Iterable[Fault]:
        for each in self.faults:
            fault = each.draw(step, self.stage) if isinstance(each, Rate) and self.stage is not None else each
            if not isinstance(fault, Fault) or fault.at != point:
                continue
            # recovery and join have no step of their own: they follow the fault that caused them
            in_time = point == "join" or (step >= fault.step if point == "recovery" else step == fault.step)
            if in_time and self._me(fault):
                yield fault

    def _me(self, fault: Fault) -> bool:
        return self.worker == fault.worker if fault.worker is not None else self.stage == fault.stage

    def _happen(self, fault: Fault) -> None:
        if fault.kind in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[fault.kind])
            if fault.kind == "kill":
                time.sleep(60)  # the signal is on its way
        elif fault.kind == "exception":
            raise InjectedFault(f"injected at {fault.at} of step {fault.step}")
        elif fault.kind == "slow":
            self.slowdown = fault.factor
        elif fault.kind == "cut":
            self.cut()
        else:
            self.poison()
