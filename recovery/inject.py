"""Faults as text: the same words in a test, in a benchmark and on the command line.

    kill:worker=2,step=30,at=backward      slow:stage=1,step=10,factor=5      rate:p=0.002,stages=1-4,seed=7

A fault names a worker by id, or a stage (0 is the first) and then hits its lowest worker at that time; where workers
hold nothing, and so there are no stages, stage=1 is worker 1. It happens once, in the middle of what it names. A rate
is drawn per step and stage from its seed alone, so that every strategy meets the same failures. What can never happen,
since the run has no such worker, stage or point, is refused before it starts.

kill, term and stop are signals, segfault a read of address 0, gil a call into C that does not come back and keeps every
thread of Python out. cut breaks the connections to other workers. slow, nan and flip leave the worker as it is: it
takes `factor` times as long from then on, has a gradient that is no number, or one bit that has changed in a state that
it keeps for others, or in its own where it keeps none.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.model.rng import derive
from pipeline.runtime.probe import READING

POINTS = (
    "forward", "backward", "reduce", "commit", "optimizer", "snapshot", "recovery", "join", "copy", "exchange",
)  # fmt: skip
"""snapshot: own layers are a step ahead of the copies kept for others; recovery, join: all members of the next view are
there; copy: state is on its way to or from this worker; exchange: new weights are, under shard_optimizer. Where
something is read before the first step there is `reference`, amid the part of it that `step` says (mostly 0)."""
POOL_POINTS = ("order", "upload", "uploaded", "forward", "backward", "commit", "committed")
"""What workers that hold nothing meet: a unit is there, its weights are being loaded, they are loaded, it is computed
forward or back, its gradient is told, it counts."""
PROCEDURE_POINTS = ("gradient", "moved", "dot", "fit", "solve")
"""What is met besides in a step that is a procedure: a gradient is asked for, weights are moved for it, products are
asked for, curvature is fitted, an equation is solved with it."""
FAULTS = ("kill", "term", "stop", "segfault", "exception", "gil", "slow", "nan", "flip", "cut")
_DRAWN = {False: POINTS[:5], True: ("order", "forward", "backward", "commit", "committed")}
"""Whether it is a pool -> the points that every worker meets in every step, from which a rate draws."""
_ANY = (*POINTS, *(point for point in POOL_POINTS if point not in POINTS), READING, *PROCEDURE_POINTS)
_MOST = {"worker": 2 * 10**9, "stage": 1023, "step": 99_999_999, "seed": 2**63 - 1, "p": 1, "factor": 10_000}
_LEAST = {"factor": 1}
_FOLLOWING = ("recovery", "copy")
"""Points that, like join, have no step of their own: they follow the fault that caused them."""
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
_HELD_S = 3600


@dataclass(frozen=True)
class InjectionSettings:
    """Faults that are made."""

    inject: str = ""
    """Faults to inject, e.g. 'kill:worker=2,step=30,at=backward' or 'rate:p=0.002,stages=1-4,seed=7'; ; between.
    They are of this start: --resume does not repeat them."""


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
    points: tuple[str, ...] = POINTS[:5]

    def draw(self, step: int, stage: int) -> Fault | None:
        """The fault of this stage in this step, if there is one."""
        if self.stages and stage not in self.stages:
            return None
        if derive(self.seed, "fault", step, stage) / 2**63 >= self.p:
            return None
        at = self.points[derive(self.seed, "point", step, stage) % len(self.points)]
        return Fault(self.kind, step, at, stage=stage, name=f"rate/{self.seed}/{stage}")


@dataclass(frozen=True)
class Ground:
    """Where faults are to happen: workers have ids below `ids`; `stages` is None where that is not known yet. `pool`:
    workers hold nothing; `shares`: they share the optimizer's state; `reads`: something is read before the first
    step; `procedure`: a step is more than one gradient."""

    ids: int
    stages: int | None
    pool: bool = False
    shares: bool = False
    reads: bool = False
    procedure: bool = False


def parse_faults(text: str, ground: Ground | None = None) -> tuple[Fault | Rate, ...]:
    """The faults of a text, separated by semicolons. Raises InjectionError for what cannot be read, and for what never
    happens on `ground`, if that is given."""
    return tuple(_parse(part.strip(), f"{i}", ground) for i, part in enumerate(text.split(";")) if part.strip())


def _parse(text: str, name: str, ground: Ground | None) -> Fault | Rate:
    kind, _, rest = text.partition(":")
    values: dict[str, str] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or key.strip() in values:
            raise _refusal(text, f"{pair!r}; allowed: name=value, once for each name")
        values[key.strip()] = value.strip()
    allowed = ("p", "stages", "seed", "kind") if kind == "rate" else ("worker", "stage", "step", "at", "factor")
    pool = ground is not None and ground.pool
    faults = [fault for fault in FAULTS if not pool or fault != "flip"]  # who holds nothing keeps no copy
    if kind not in (*faults, "rate"):
        raise _refusal(text, f"{kind!r} is no fault; allowed: {', '.join(faults)}, rate")
    if unknown := set(values) - set(allowed):
        raise _refusal(text, f"{', '.join(sorted(unknown))}; allowed for {kind}: {', '.join(allowed)}")
    if kind == "rate":
        what = values.get("kind", "kill")
        if what not in faults:
            raise _refusal(text, f"kind is {what!r}; allowed: {', '.join(faults)}")
        p, seed = _number(text, values, "p", float), _number(text, values, "seed", int, "0")
        return Rate(p, _stages(text, values.get("stages", ""), ground), seed, what, _DRAWN[pool])
    if ("worker" in values) == ("stage" in values):
        raise _refusal(text, "allowed: one of worker=ID and stage=NUMBER")
    at = values.get("at", "forward" if kind == "slow" else "backward")
    shares = ground is None or ground.shares
    points = _ANY if ground is None else POOL_POINTS if pool else POINTS if shares else POINTS[:-1]
    points += (READING,) if ground is not None and ground.reads else ()
    points = (*points, *PROCEDURE_POINTS) if ground is not None and ground.procedure else points
    if at not in points:
        where = "" if at not in _ANY else f" {'with' if pool else 'without'} scheduler roundpipe"
        where = " without shard_optimizer" if at == "exchange" and not pool else where
        where = " where nothing is read before the first step" if at == READING else where
        where = " for a method whose step is one gradient" if at in PROCEDURE_POINTS else where
        raise _refusal(text, f"at is {at!r}; allowed{where}: {', '.join(points)}")
    who = {key: _number(text, values, key, int) for key in ("worker", "stage") if key in values}
    if ground is not None and "worker" in who and who["worker"] >= ground.ids:
        raise _refusal(
            text,
            f"worker is {who['worker']}; allowed: 0 to {ground.ids - 1}, the workers and those that "
            "may take their places",
        )
    _require_stages(text, [who["stage"]] if "stage" in who else [], ground)
    factor = _number(text, values, "factor", float, "5")
    return Fault(kind, _number(text, values, "step", int), at, factor=factor, name=name, **who)


def _refusal(text: str, said: str) -> InjectionError:
    return InjectionError(f"inject {text!r:.120}: {said}")


def _number(text: str, values: dict[str, str], name: str, kind: Callable[[str], float], default: str = "") -> int:
    value, least, most = values.get(name, default), _LEAST.get(name, 0), _MOST[name]
    try:
        number = kind(value)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        found = f"is {value!r}" if value else "is missing"
        what = "a whole number" if kind is int else "a number"
        raise _refusal(text, f"{name} {found:.40}; allowed: {what} of {least} to {most}")
    return number  # type: ignore[return-value]


def _stages(text: str, value: str, ground: Ground | None) -> tuple[int, ...]:
    if not value:
        return ()
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", value)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise _refusal(text, f"stages is {value!r}; allowed: a number or a range, as 1-4")
    _require_stages(text, (first, last), ground)
    return tuple(range(first, last + 1))


def _require_stages(text: str, stages: Iterable[int], ground: Ground | None) -> None:
    """Raise InjectionError for a stage that is not there; without stages a number is that of a worker."""
    if ground is None or (most := ground.ids if ground.pool else ground.stages) is None:
        return
    for stage in stages:
        if stage >= most:
            raise _refusal(text, f"stage is {stage}; allowed: 0 to {most - 1}")


@dataclass
class Injector:
    """The faults that one worker meets. `claim(name)` is true for the first who asks: a fault happens once in a run.

    `told(fault)` is called just before it happens. `poison` makes a gradient NaN, `flip` changes a bit of a state;
    `cut` breaks the worker's connections to other workers.
    """

    faults: Sequence[Fault | Rate]
    worker: int
    stage: int | None
    claim: Callable[[str], bool]
    told: Callable[[Fault], None]
    poison: Callable[[], None]
    cut: Callable[[], None]
    flip: Callable[[], None] = lambda: None
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
            in_time = point == "join" or (step >= fault.step if point in _FOLLOWING else step == fault.step)
            if in_time and self._me(fault):
                yield fault

    def _me(self, fault: Fault) -> bool:
        return self.worker == fault.worker if fault.worker is not None else self.stage == fault.stage

    def _happen(self, fault: Fault) -> None:
        if fault.kind in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[fault.kind])
            if fault.kind == "kill":
                time.sleep(60)  # the signal is on its way
        elif fault.kind == "segfault":
            faulthandler.disable()
            ctypes.string_at(0)
        elif fault.kind == "gil":
            ctypes.PyDLL(None).sleep(_HELD_S)
        elif fault.kind == "exception":
            raise InjectedFault(f"injected at {fault.at} of step {fault.step}")
        elif fault.kind == "slow":
            self.slowdown = fault.factor
        elif fault.kind == "cut":
            self.cut()
        elif fault.kind == "flip":
            self.flip()
        else:
            self.poison()
