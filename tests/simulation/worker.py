"""A worker whose compute is waiting, and its links. Its votes and moves are those of production."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.runtime.boundaries import Boundaries
from pipeline.runtime.groups import Way
from pipeline.runtime.mailbox import LinkError, Mailbox
from pipeline.runtime.probe import Pulse
from pipeline.runtime.step_commit import StepCommit, Vote
from pipeline.runtime.terms import StepTerms
from pipeline.runtime.worker import StepResult
from pipeline.schedule.ops import parse_span
from pipeline.state.layer_state import UNFILLED
from tests.simulation.store import Client
from tests.simulation.world import Broken, Process

if TYPE_CHECKING:
    from tests.simulation.actors import Actors

LAYERS = 6


class SimState:
    """A layer's state: one whole number, exact in fp32, which every step turns into another."""

    def __init__(self, name: str, fill: bool = True) -> None:
        """Without `fill` it is what nobody may compute with."""
        self.name, self.value = name, torch.tensor([float(name) if fill else float("nan")])
        self.lr_scale = torch.ones(())
        self.version, self.generation = 0 if fill else UNFILLED, 0

    def tensors(self) -> dict[str, Tensor]:
        return {f"param/{self.name}": self.value}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Some of them."""
        for key, tensor in tensors.items():
            self.tensors()[key].copy_(tensor)

    def begin_anew(self) -> None:
        self.value.fill_(float(self.name))

    def step(self, number: int) -> None:
        if self.version != number:
            raise Broken(f"step {number} is made on layer {self.name} of step {self.version}")
        self.value.copy_(after(self.value, number))
        self.version += 1

    def unseal(self) -> None:
        """It never is sealed."""

    def require_intact(self) -> None:
        """Nobody flips a bit of it."""

    def fingerprints(self) -> dict[str, int]:
        """It is in one piece."""
        return {self.name: self.fingerprint()}

    def fingerprint(self) -> int:
        return hash((self.version, self.generation, float(self.value)))


def after(value: Tensor, step: int) -> Tensor:
    """What a step makes of a state: a small whole number that depends on all before it, exact in fp32."""
    return (value * 31 + step + 7) % 65521


def calm(layer: int, steps: int) -> float:
    """What a layer comes to in a run without faults."""
    state = SimState(str(layer))
    for step in range(steps):
        state.step(step)
    return float(state.value)


class SimStore:
    """The layer states of a worker."""

    def __init__(self) -> None:
        states = [SimpleNamespace(name=str(n), shared=False) for n in range(LAYERS)]
        self.model = SimpleNamespace(num_layers=LAYERS, tied=False, states=states)
        self.states: dict[str, SimState] = {}
        self.aside: dict[str, SimState] = {}
        self.shares: dict[str, Any] = {}

    def hold(self, spans: Any, *, fill: bool = True) -> None:
        wanted = {str(layer) for span in spans for layer in range(*span)}
        known = self.aside | self.states
        self.states = {name: known.get(name) or SimState(name, fill) for name in sorted(wanted, key=int)}
        self.aside = {name: state for name, state in known.items() if name not in wanted}

    @property
    def unfilled(self) -> list[SimState]:
        return [state for state in self.states.values() if state.version == UNFILLED]

    def adopt(self, states: Any) -> None:
        """Nothing has moved beforehand."""

    def let_go(self) -> None:
        self.aside.clear()

    def states_of(self, part: str) -> list[SimState]:
        known = self.aside | self.states
        return [known[str(n)] for n in range(*parse_span(part)) if str(n) in known]

    def drop(self) -> None:
        """There are no gradients."""

    def start_again(self, states: Any, source: Path | None) -> None:
        for state in states:
            state.begin_anew()
            state.version = 0


@dataclass
class SimWorker:
    """A worker whose compute is waiting; its votes are real."""

    id: int
    run_of: Actors
    process: Process
    commit: StepCommit
    store: SimStore = field(default_factory=SimStore)
    settings: Any = field(default_factory=lambda: SimpleNamespace(deadline_s=40.0))
    probe: Any = lambda *_: None
    pulse: Pulse = field(default_factory=Pulse)
    norms: Mapping[str, float] = field(default_factory=dict)
    workers: Mapping[int, int] = field(default_factory=dict)
    spare: dict[Any, Any] = field(default_factory=dict)
    boundaries: Boundaries = field(default_factory=Boundaries)
    transport: Any = field(default_factory=lambda: SimpleNamespace(view=0, mailbox=Mailbox(), links={}))

    def run(self, excerpt: Any, job: Any, step: int, *, wish: Any = dict, record: bool = False) -> StepResult:
        """A lane: it needs all that send to it to come as far."""
        world, run = self.run_of.world, self.run_of
        iteration = self.commit.begin()
        box = self.transport.mailbox
        box.advance(self.transport.view, iteration)
        run.came.setdefault((self.transport.view, iteration), set()).add(self.id)
        deadline = world.now + self.settings.deadline_s
        slowness = 5.0 if run.slow.get(self.id, 0.0) > world.now else 1.0
        world.sleep(slowness * world.chance.uniform(0.01, 0.2))
        busy_s = slowness * 0.01 * len(self.store.states) * world.chance.uniform(0.9, 1.1)
        peers = {self.workers[a] for a, b in excerpt.sends if self.workers[b] == self.id} - {self.id}
        for peer in sorted(peers):
            box.waiting = f"the output of {peer}"
            while peer not in run.came[self.transport.view, iteration]:
                if (reason := box.woken()) is not None:
                    raise LinkError(reason)
                if run.is_gone(peer):
                    raise LinkError(f"worker {peer} has closed its connection")
                if world.now > deadline:
                    raise LinkError(f"the output of worker {peer} did not come in time")
                world.sleep(0.02)
            box.waiting = ""
        terms = StepTerms.of(job, step, excerpt.num_microbatches)
        last = max(excerpt.holders)
        mine = [m for m in range(excerpt.num_microbatches)
                if self.workers[excerpt.holders[last][m % len(excerpt.holders[last])]] == self.id]  # fmt: skip
        squares = {"0": 1.0} if excerpt.trains else {}
        vote = Vote({m: {"text": torch.tensor(1.0)} for m in mine}, squares, wish(), busy_s)
        settled = self.commit.settle(step if excerpt.trains else None, terms, list(squares), vote, deadline)
        if excerpt.trains:
            for state in self.store.states.values():
                state.step(step)
            run.stepped(self.id, self.transport.view, iteration, step)
        return StepResult(settled.loss, settled.means, settled.counts, wishes=settled.wishes)

    def gather(self, payload: dict[str, Any]) -> Mapping[int, dict[str, Any]]:
        return self.commit.gather(payload)


@dataclass
class SimGroup:
    """Two ends of a wire for states."""

    run: Actors
    name: str
    pair: tuple[int, int]
    me: int
    woken: Callable[[], str | None]

    def _queue(self, sender: int) -> deque[Tensor]:
        return self.run.wires.setdefault((self.name, sender), deque())

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> Any:
        self._queue(self.me).append(tensors[0].clone())
        return SimpleNamespace(wait=lambda _: self.run.world.sleep(0.002))

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> Any:
        other = next(worker for worker in self.pair if worker != self.me)

        def wait(timeout: timedelta) -> None:
            deadline = self.run.world.now + timeout.total_seconds()
            while not self._queue(other):
                if (reason := self.woken()) is not None:
                    raise RuntimeError(reason)
                if self.run.is_gone(other) or self.run.world.now > deadline:
                    raise RuntimeError("Connection closed by peer")
                self.run.world.sleep(0.01)
            tensors[0].copy_(self._queue(other).popleft())

        return SimpleNamespace(wait=wait)


@dataclass
class SimCommunicator:
    """Links that are there once both ends have come."""

    worker: SimWorker
    store: Client
    links: set[int] = field(default_factory=set)
    fresh: set[int] = field(default_factory=set)
    peers: set[int] = field(default_factory=set)

    def _meet(self, name: str, others: set[int]) -> None:
        self.store.set(f"{name}/here/{self.worker.id}", "")
        deadline = self.worker.run_of.world.now + 40.0
        while not self.store.check([f"{name}/here/{other}" for other in sorted(others)]):
            if (reason := self.worker.transport.mailbox.woken()) is not None:
                raise RuntimeError(f"building {name} was ended: {reason}")
            if self.worker.run_of.world.now > deadline:
                raise RuntimeError(f"the members of {name} did not meet")
            self.worker.run_of.world.sleep(0.01)

    @contextmanager
    def ways(self, view: int, number: int, pairs: Mapping[int, tuple[int, int]]) -> Iterator[dict[int, Way]]:
        yield {place: self._way(f"view{view}/restore{number}/{place}", pair) for place, pair in pairs.items()}

    def _way(self, name: str, pair: tuple[int, int]) -> Way:
        self._meet(name, set(pair) - {self.worker.id})
        group = SimGroup(self.worker.run_of, name, pair, self.worker.id, self.worker.transport.mailbox.woken)
        return Way(group, 1 - pair.index(self.worker.id), 16)

    def poison(self, lost: set[int]) -> None:
        """Who waits is woken by its mailbox."""

    def quiesce(self, workers: set[int], deadline: float) -> None:
        gone = {peer for peer in self.links if self.worker.run_of.is_gone(peer)}
        self.links -= gone | self.fresh | (self.links - workers)
        self.fresh = set()

    def kept(self) -> dict[str, Any]:
        return {"links": sorted(self.links), "sums": {}}

    def agree(self, kept: Mapping[str, Any], deadline: float) -> None:
        held = {tuple(pair) for pair in kept["links"]}
        me = self.worker.id
        self.links = {peer for peer in self.links if (min(me, peer), max(me, peer)) in held}

    def edit(self, view: int, pairs: set[tuple[int, int]], parts: Any, shapes: Any = None) -> None:
        me = self.worker.id
        wanted = {low if high == me else high for low, high in pairs if me in (low, high)}
        missing = wanted - self.links
        try:
            for peer in sorted(missing):
                self._meet(f"view{view}/link{min(me, peer)}-{max(me, peer)}", {peer})
        except RuntimeError as error:
            raise LinkError(f"the links of view {view} could not be built: {error}") from error
        finally:
            self.fresh |= missing
        self.links = wanted

    def confirm(self) -> None:
        self.fresh = set()
