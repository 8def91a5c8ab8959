"""Who is there in a run: processes, workers, agents and the coordinator, as launch/ starts them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from jobs.config import TrainConfig
from jobs.pipeline_engine import PipelineEngine
from jobs.resizing import make_planner
from jobs.train import Trainer
from launch.agent import Agent, RunFailed
from launch.forkserver import Exit
from launch.worker_main import Reports, last_words
from pipeline.runtime.step_commit import StepCommit
from pipeline.schedule.layout import EVALUATE, TRAIN, Layout
from pipeline.schedule.lower import add_redundant, lower
from pipeline.schedule.ops import Span
from pipeline.wire import WireError
from recovery import keys, redundant
from recovery.checkpoint import Found
from recovery.commit import Ballot
from recovery.coordinator import Coordinator
from recovery.lifeline import Lifeline
from recovery.losses import TooManyFailures
from recovery.member import Member, Watcher
from recovery.membership import EVICTED, START, Evicted, View, await_view, read_layout, read_view
from recovery.policy import Recovery, remedies
from recovery.remedy import CannotRestore
from recovery.resize import Resize
from recovery.speeds import Speeds
from schedulers import plan
from schedulers.resize import ResizeProblem
from tests.simulation.store import Client, Server
from tests.simulation.worker import LAYERS, SimCommunicator, SimState, SimWorker
from tests.simulation.world import Broken, Process, World

STEPS = 8
NAMED = (RunFailed, CannotRestore, TooManyFailures)
DEADLINE_S, HEARTBEAT_S = 20.0, 3.0


class SimJob:
    """What the trainer and the engine ask of a job. It carries how many steps are committed."""

    terms: Mapping[str, float] = {"text": 1.0}
    procedure = None

    def __init__(self) -> None:
        self.carried: dict[str, Any] = {"steps": 0}

    def counts(self, step: int, microbatch: int) -> Mapping[str, int]:
        return {"text": 8}

    def next_sample(self, step: int) -> int:
        return step * 8

    def sources(self, step: int) -> dict[str, int]:
        return {}

    def prepare(self, engine: Any, step: int) -> None:
        assert self.carried["steps"] == step, f"step {step} is prepared by a job that carries {self.carried}"

    def committed(self, step: int, means: Mapping[str, float]) -> None:
        assert self.carried["steps"] == step, f"the job carries {self.carried} into step {step}"
        self.carried = {"steps": step + 1}

    def restore(self, carried: Mapping[str, Any]) -> None:
        self.carried = dict(carried)


class SimTrainer(Trainer):
    """The training loop; what is written is kept in the run."""

    run_of: Actors

    def _evaluate(self, done: int) -> float:
        self.engine.evaluate()
        return 0.0

    def _save(self, done: int, watched: dict[str, Any]) -> bool:
        worker = self.engine.worker  # type: ignore[attr-defined]
        mine = {name: [s.version, float(s.value)] for name, s in worker.store.states.items()}
        votes = self.engine.gather({"states": mine})
        error = None
        if self.engine.leads:
            error = self.reports.save_ledger(done, self.engine.fence[1])
            if not error:
                self.run_of.save(done, votes)
        votes = self.engine.gather({"error": error})
        return not any(vote["error"] for vote in votes.values())

    def _carried_at(self, rollback: str) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"steps": 0 if rollback == START else int(Path(rollback).name.removeprefix("step-"))}, {}

    def _export(self) -> None:
        worker = self.engine.worker  # type: ignore[attr-defined]
        self.engine.gather({})
        for name, state in worker.store.states.items():
            self.run_of.ended_with(worker.id, int(name), state)
        self.engine.gather({})


class Actors:
    """All of one run, and what they tell of it."""

    def __init__(self, seed: int, *, log: bool = False, ballot: type[Ballot] = Ballot) -> None:
        self.seed, self.world, self.ballot = seed, World(seed, log=log), ballot
        chance = self.world.chance
        self.replicas = chance.choice((1, 2))
        self.stages = chance.choice((2, 3))
        self.agents = chance.choice((1, 2))
        self.policy = chance.choice(("auto", "replica", "checkpoint", "redundant"))
        self.elastic = self.policy != "redundant" and chance.choice((False, True))
        workers = self.replicas * self.stages
        self.layout = self._plan(workers)
        self.least = chance.randrange(1, workers) if self.elastic else 0
        self.server = Server()
        places = {w: w for w in range(workers)}
        details = {"attempt": 1, "source": None}
        self.view = View(
            1, tuple(range(workers)), self.layout.key, details=details, places=places,
            agents={w: w % self.agents for w in range(workers)}, next_worker=workers,
        )  # fmt: skip
        self.came: dict[tuple[int, int], set[int]] = {}
        self.wires: dict[tuple[str, int], deque[Tensor]] = {}
        self.processes: dict[int, Process] = {}  # worker -> its newest process
        self.agent_processes: dict[int, Process] = {}
        self.live_agents: dict[int, Agent] = {}
        self.saved: dict[int, dict[str, float]] = {}
        self.committed: dict[tuple[int, int], tuple[int, set[int]]] = {}
        self.ledger: dict[int, dict[str, Any]] = {}
        self.final: dict[int, dict[int, tuple[int, float]]] = {}
        self.codes: dict[int, int] = {}
        self.errors: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.coordinator: Coordinator | None = None
        self.slow: dict[int, float] = {}  # worker -> until when
        self._read: dict[int, int] = {}
        self.by_pid: dict[int, Process] = {}

    def _plan(self, workers: int) -> Layout:
        made = plan("one_f_one_b", [1.0] * LAYERS, self.stages, 4, self.replicas)
        evaluated = plan("one_f_one_b", [1.0] * LAYERS, self.stages, 4, self.replicas, evaluated=2)
        backups: list[tuple[Span, int]] = []
        for base in range(0, workers if self.policy == "redundant" else 0, self.stages):
            held = [[s for s, ws in made.holders.items() if base + k in ws] for k in range(self.stages)]
            backups += [(span, base + place) for span, place in redundant.copies(held)]
        train = lower(add_redundant(made, backups) if backups else made)
        return Layout({TRAIN: train, EVALUATE: lower(evaluated)}, tuple(sorted(backups)))

    # ---- what the actors tell ----

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name, **fields})
        self.world.say(f"{name} {fields}")

    def is_gone(self, worker: int) -> bool:
        process = self.processes.get(worker)
        return process is None or process.gone

    def stepped(self, worker: int, view: int, iteration: int, step: int) -> None:
        made, who = self.committed.setdefault((view, iteration), (step, set()))
        if made != step:
            raise Broken(f"iteration {iteration} of view {view} is step {made} and step {step}")
        who.add(worker)

    def save(self, done: int, votes: Mapping[int, Mapping[str, Any]]) -> None:
        states: dict[str, float] = {}
        for vote in votes.values():
            for name, (version, value) in vote["states"].items():
                if version != done or states.setdefault(name, value) != value:
                    raise Broken(f"a checkpoint of step {done} has layer {name} of step {version}, or two of it")
        self.saved[done] = states

    def ended_with(self, worker: int, layer: int, state: SimState) -> None:
        self.final.setdefault(layer, {})[worker] = (state.version, float(state.value))

    # ---- processes ----

    def forkserver(self, rank: int) -> Any:
        mine: dict[int, Process] = {}

        def start(payload: dict[str, Any]) -> int:
            worker = int(payload["worker"])
            process = Process(f"worker {worker}")
            self.processes[worker] = process
            pid = len(self.by_pid)
            mine[pid] = self.by_pid[pid] = process
            self.world.start(process, lambda: self._worker(process, payload), self.world.chance.uniform(0.05, 0.6))
            return pid

        def poll(timeout: float) -> list[Exit]:
            self.world.sleep(timeout)
            found = [(pid, p) for pid, p in mine.items() if p.gone]
            for pid, _ in found:
                del mine[pid]
            return [Exit(pid, -9 if p.code is None else p.code) for pid, p in found]

        return SimpleNamespace(start=start, poll=poll, prepare=lambda _: None)

    def _worker(self, process: Process, payload: dict[str, Any]) -> None:
        try:
            process.code = self._worker_main(process, payload)
        except Evicted:
            process.code = EVICTED
        except Broken:
            raise
        except (ArithmeticError, AttributeError, LookupError, NameError, TypeError) as error:
            raise Broken(f"worker {payload['worker']} has met what is a slip of a programmer: {error!r}") from error
        except Exception as error:
            keys.report_error(self.client(), int(payload["worker"]), last_words(error))
            self.world.say(f"{process.name} {type(error).__name__}: {error}")
            process.code = 1

    def client(self, patient: float = 1.0) -> Any:
        return Client(self.world, self.server, patient)

    def _worker_main(self, process: Process, payload: dict[str, Any]) -> int:
        """As launch/worker_main.py, with a simulated worker."""
        id, number = int(payload["worker"]), int(payload["view"])
        store = self.client()
        await_view(store, 1)
        view = read_view(store, 1)
        stop = threading.Event()
        watcher = Watcher(self.client(), id, number, stop)
        try:
            worker = SimWorker(id, self, process, StepCommit(self.ballot(store, 0, id, ())))
            worker.store.hold(read_layout(store, view, int(payload["place"])).spans, fill=not payload["joins"])
            self.world.sleep(self.world.chance.uniform(0.0, 0.3))
            communicator = SimCommunicator(worker, store)
            member = Member(
                worker, communicator, store, remedies(), lambda _: None,  # type: ignore[arg-type]
                Lifeline(store, 60.0, None, self.world.now, self.world.now), Path("checkpoints"),
            )  # fmt: skip
            config = replace(TrainConfig(), steps=STEPS, evaluate_every=0, checkpoint_every=2, deadline=40.0)
            job: Any = SimJob()
            engine = PipelineEngine(member, {TRAIN: job, EVALUATE: job}, number, bool(payload["joins"]))
            reports = Reports(self.client(), id)
            reports._guided = Lifeline(store, 60.0, None, self.world.now, self.world.now)
            trainer = SimTrainer(config, engine, job, "", reports, stop.is_set)
            trainer.run_of = self
            watcher.attach(member)
            return trainer.run()
        finally:
            watcher.stop()

    # ---- agents ----

    def _agent(self, rank: int) -> None:
        """As launch/train.py: an agent; that of rank 0 has the coordinator."""
        store = self.client(0.1 if rank == 0 else 1.0)
        places = [place for place, agent in self.view.agents.items() if agent == rank]

        def payload(worker: int, place: int, view: int, joins: bool) -> dict[str, Any]:
            return {"worker": worker, "place": place, "view": view, "joins": joins}

        agent = Agent(rank, self.forkserver(rank), store, places, payload)
        self.live_agents[rank] = agent
        agent.start()
        if rank == 0:
            self.coordinator = self._coordinator(store)
        try:
            code = agent.supervise(self._tick if rank == 0 else lambda: None)
            if rank == 0:
                self._read_records(())
                keys.end(store, code)
            self.codes[rank] = code
        except NAMED as error:
            if rank == 0:
                keys.fail(store, str(error))
            self.errors.append(str(error))
            self.codes[rank] = 1
        for pid in agent.pids:  # as Agent.end
            self.by_pid[pid].dead = True
        self.world.say(f"agent {rank} ends with {self.codes[rank]} {self.errors}")

    def _coordinator(self, store: Any) -> Coordinator:
        def find(root: Path) -> Found:
            self.world.sleep(self.world.chance.uniform(0.0, 0.2))
            newest = max(self.saved, default=None)
            return Found(None if newest is None else Path(f"step-{newest}"), None)

        verifier: Any = SimpleNamespace(find=find, came_on_at=0.0, generation=0)
        problem = ResizeProblem("one_f_one_b", [1.0] * LAYERS, 4, 2, self.replicas)
        migrates = self.world.chance.choice((0.0, 1e6))
        sized = Resize(make_planner(problem, self.layout), self.least, 0.5, 2.0, 0, True, migrates, [100.0] * LAYERS,
                       Speeds([1.0] * LAYERS))  # fmt: skip
        resize = sized if self.elastic else None
        recovery = Recovery(
            self.policy, self.view, self.layout, LAYERS, False, Path("checkpoints"), verifier=verifier, resize=resize
        )  # fmt: skip
        return Coordinator(store, self.view, recovery, self.event, HEARTBEAT_S, DEADLINE_S, 20)

    def _mover(self) -> None:
        """What moves in the background, which a simulated worker has no part in: it is there after a while, or never,
        and in any case the moves of the view are made."""
        store, told = self.client(), 0
        while True:
            self.world.sleep(0.1)
            if (plan := keys.read_migration(store)) is not None and plan["number"] > told:
                told = plan["number"]
                self.world.sleep(self.world.chance.choice((0.0, 0.2, 60.0)))
                for place in range(len(plan["moves"])):
                    keys.say_migrated(store, told, place)

    def _tick(self) -> None:
        assert self.coordinator is not None
        self.coordinator.tick()
        self._read_records(self.coordinator.view.workers)

    def _read_records(self, workers: Sequence[int]) -> None:
        """As launch/story.py: the ledger."""
        assert self.coordinator is not None
        store, valid = self.coordinator.store, self.coordinator.valid
        for worker in sorted({*workers, *self._read}):
            number = self._read.get(worker, 0)
            for record in keys.take_records(store, worker, number):
                assert not isinstance(record, WireError)
                if record["kind"] == "ledger":
                    told = "" if record["view"] == valid else f"view {record['view']} is over"
                    if not told and set(range(1, record["step"] + 1)) - set(self.ledger):
                        told = "the ledger lacks steps"
                    keys.answer_ledger(store, worker, number, told)
                elif record["kind"] == "step":
                    self.ledger[record["step"]] = record
                number += 1
            self._read[worker] = number
