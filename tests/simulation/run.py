"""One run of the control plane, from its seed: what happens to whom, and what must hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import jobs.train as train_module
import launch.worker_main as worker_module
from launch import agent as agent_module
from pipeline.exit_codes import STOPPED
from recovery import commit as commit_module
from recovery import coordinator as coordinator_module
from recovery import keys
from recovery import lifeline as lifeline_module
from recovery import member as member_module
from recovery import membership as membership_module
from recovery import notice as notice_module
from recovery import planned as planned_module
from recovery import signs as signs_module
from recovery import speeds as speeds_module
from recovery.commit import Ballot
from recovery.membership import START, View
from tests.simulation.actors import STEPS, Actors
from tests.simulation.worker import LAYERS, calm
from tests.simulation.world import Broken, Process

KINDS = ("kill", "stop", "machine", "leave", "doubt", "slow")


@dataclass(frozen=True)
class Fault:
    """What happens to a process at a time: "kill", "stop" (for `seconds`), "machine" (an agent and its workers),
    "leave" (an agent is told that its machine goes in `seconds`), "doubt" (and soon that it stays after all), or "slow"
    (a worker computes five times slower for `seconds`)."""

    when: float
    kind: str
    whom: int
    seconds: float = 0.0


class Run(Actors):
    """One run, with its faults."""

    def __init__(self, seed: int, *, log: bool = False, ballot: type[Ballot] = Ballot) -> None:
        super().__init__(seed, log=log, ballot=ballot)
        self.faults = sorted(self._draw_faults(len(self.view.workers)), key=lambda fault: fault.when)

    def _draw_faults(self, workers: int) -> Iterator[Fault]:
        chance = self.world.chance
        for _ in range(chance.choice((0, 1, 1, 2, 3))):
            kind = chance.choices(KINDS, (6, 2, 1, *(3 * [int(self.elastic)])))[0]
            if kind in ("machine", "leave", "doubt") and self.agents == 1:
                kind = "kill"
            whom = 1 if kind in ("machine", "leave", "doubt") else chance.randrange(workers + 2)
            yield Fault(chance.uniform(0.0, 3.0), kind, whom, chance.choice((0.3, 2.0, 8.0)))

    def _faults(self) -> None:
        for fault in self.faults:
            self.world.sleep(max(0.0, fault.when - self.world.now))
            if fault.kind == "machine":
                self.world.say(f"machine {fault.whom} is gone")
                if fault.whom in self.agent_processes:
                    self.agent_processes[fault.whom].dead = True
                for worker, process in self.processes.items():
                    if self._agent_of(worker) == fault.whom:
                        process.dead = True
                if self.elastic:
                    self.world.start(Process("return"), lambda fault=fault: self._return(fault.whom, fault.seconds))
            elif fault.kind == "doubt":
                self.world.say(f"machine {fault.whom} goes in {fault.seconds} s, or not")
                if (agent := self.live_agents.get(fault.whom)) is not None:
                    agent.leave(fault.seconds)
                    self.world.sleep(fault.seconds / 4)
                    agent.stay()
                self.world.start(Process("return"), lambda fault=fault: self._return(fault.whom, 2 * fault.seconds))
            elif fault.kind == "slow":
                self.slow[fault.whom] = self.world.now + fault.seconds
            elif fault.kind == "leave":
                self.world.say(f"machine {fault.whom} goes in {fault.seconds} s")
                if (agent := self.live_agents.get(fault.whom)) is not None:
                    agent.leave(fault.seconds)
                self.world.start(Process("return"), lambda fault=fault: self._return(fault.whom, 2 * fault.seconds))
            elif (process := self.processes.get(fault.whom)) is not None and process.code is None:
                self.world.say(f"worker {fault.whom}: {fault.kind} {fault.seconds if fault.kind == 'stop' else ''}")
                if fault.kind == "kill":
                    process.dead = True
                else:
                    process.stopped_until = self.world.now + fault.seconds

    def _return(self, rank: int, after: float) -> None:
        """A machine comes back, with its agent."""
        self.world.sleep(after)
        if not (self.agent_processes[rank].dead or rank in self.codes) or 0 in self.codes:
            return  # it has been back before, or all is over
        self.codes.pop(rank, None)
        self.world.say(f"machine {rank} is back")
        process = self.agent_processes[rank] = Process(f"agent {rank}")
        self.world.start(process, lambda: self._agent(rank))

    def _agent_of(self, worker: int) -> int:
        view = self.view if self.coordinator is None else self.coordinator.view
        return view.agents.get(view.places.get(worker, -1), 0)

    # ---- all of it ----

    def execute(self) -> None:
        """Run to the end and check. Raises Broken, or what an actor met that is no named error."""
        with virtual(self):
            for rank in range(self.agents):
                process = self.agent_processes[rank] = Process(f"agent {rank}")
                self.world.start(process, lambda rank=rank: self._agent(rank))
            self.world.start(Process("faults"), self._faults)
            self.world.start(Process("mover"), self._mover)
            self.world.run(self._over)
        self.check()

    def _over(self) -> bool:
        return all(rank in self.codes or process.dead for rank, process in self.agent_processes.items())

    def check(self) -> None:
        """What must hold at the end of every run."""
        for text in self.errors:
            if any(sign in text for sign in ("stand at different places", "differ, by checksum", "the run is at step")):
                raise Broken(text)
        for (view, iteration), (step, who) in self.committed.items():
            expected = self.came[view, iteration]
            living = {w for w in expected if w in who or not self.is_gone(w)}
            if not living <= who and 0 in self.codes and self.codes[0] == 0 and self._went_on(view, iteration):
                raise Broken(f"step {step} of view {view} is committed on {sorted(who)}, not on {sorted(living - who)}")
        if self.codes.get(0) in (0, STOPPED):
            stopped = self.codes[0] == STOPPED
            last = max(self.saved, default=0) if stopped else STEPS
            back = any(event.get("remedy") == "checkpoint" for event in self.events)  # then lines of undone steps stay
            if {step for step in self.ledger if not back or step <= last} != set(range(1, last + 1)):
                raise Broken(f"the ledger has steps {sorted(self.ledger)}")
            for step, record in self.ledger.items():
                if record["first_sample"] != (step - 1) * 8:
                    raise Broken(f"step {step} took samples from {record['first_sample']} on")
            if stopped:
                return
            said = ("remedy", "rejoined", "shrunk")
            remedies_taken = {str(event["remedy"]) for event in self.events if event["event"] in said}
            approximate = any(word in remedy for remedy in remedies_taken for word in ("checkfree", "rehearse"))
            for layer in range(LAYERS):
                if approximate:
                    if len({*self.final.get(layer, {}).values()}) != 1:
                        raise Broken(f"the holders of layer {layer} end as {self.final.get(layer)}")
                elif {*self.final.get(layer, {}).values()} != {(STEPS, calm(layer, STEPS))}:
                    raise Broken(f"layer {layer} ends as {self.final.get(layer)}; a calm run: {calm(layer, STEPS)}")
        elif not self.errors:
            raise Broken(f"the run has ended with {self.codes}, and nobody says why")

    def _went_on(self, view: int, iteration: int) -> bool:
        """Whether there was a later iteration in the view: then all of it have read the one before."""
        return (view, iteration + 1) in self.came


@contextmanager
def virtual(run: Run) -> Iterator[None]:
    """Inside, the control plane's time, threads and processes are simulated."""
    world = run.world

    def spawn(target: Callable[[], None], name: str = "", daemon: bool = True) -> Any:
        return SimpleNamespace(start=lambda: world.start(world.process, target))

    def aside(function: Callable[..., Any], *arguments: Any) -> Any:
        future = coordinator_module.Future[Any]()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def send(pids: Any, signum: int) -> None:
        for pid in list(pids):
            world.say(f"signal {signum} to pid {pid}")
            run.by_pid[pid].dead = True

    def back(worker: Any, view: View, checkpoints: Path) -> int:
        step = 0 if view.rollback == START else int(str(view.rollback).removeprefix("step-"))
        worker.store.let_go()
        for newer in [saved for saved in run.saved if saved > step]:
            del run.saved[newer]
        for name, state in worker.store.states.items():
            state.value.fill_(run.saved[step][name] if step else float(name))
            state.version = step
        return step

    timed = (
        commit_module, coordinator_module, lifeline_module, member_module, membership_module, agent_module, keys,
        signs_module, planned_module, notice_module, speeds_module, train_module, worker_module,
    )  # fmt: skip
    changes = [
        (agent_module, "_send", send), (agent_module, "_POLL_S", 0.1), (coordinator_module, "aside", aside),
        (planned_module, "aside", aside),
        (member_module, "roll_back", back), (member_module, "write", lambda *_: None),
        (member_module, "Ballot", run.ballot),
        (member_module, "threading", SimpleNamespace(Thread=spawn, Event=threading.Event)),
        *((module, "time", world) for module in timed),
    ]  # fmt: skip
    with ExitStack() as stack:
        for module, name, value in changes:
            stack.enter_context(patch.object(module, name, value))
        # actors hand on inside torch.no_grad, which belongs to their one thread: none of them can put it back
        stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        yield
