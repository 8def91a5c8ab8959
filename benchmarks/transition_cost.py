"""What the certificate costs beside the move that it certifies: two processes, all states of a model, over gloo.

A move is recovery/restore.py as workers run it. Before it both hash what they hold, after it they testify, as
recovery/member.py has them do. A memcpy of as many bytes, in one process, stands for what memory allows.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from pipeline.model.layered import TIED, LayeredModel
from pipeline.model.weights import preset
from pipeline.runtime.groups import GroupBuilder
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore
from recovery.certificate import Witness
from recovery.membership import Move, View
from recovery.replica import Replica
from recovery.restore import restore


def pair_main(payload: Mapping[str, Any]) -> int:
    """Worker 0 gives all that it has to worker 1, `rounds` times; each writes its seconds into `folder`."""
    torch.set_num_threads(1)
    folder, me = Path(payload["folder"]), int(payload["rank"])
    store = dist.FileStore(str(folder / f"store-{payload['model']}"), 2)
    name, _, layers = payload["model"].partition(":")
    config = preset(name)
    config.num_hidden_layers = int(layers or config.num_hidden_layers)
    model = LayeredModel(config)
    held = ResidentStore(model, [(0, model.num_layers)], OptimizerConfig(), seed=me, device=torch.device("cpu"))
    parts = [f"0:{model.num_layers}", *([TIED] if model.tied else [])]
    moves = tuple(Move(1, part, "replica", ((0, part),)) for part in parts)
    with torch.no_grad():
        for state in held.states.values():
            for key, tensor in state.tensors().items():
                if key.startswith("exp_avg"):
                    tensor.fill_(0.1 + me)  # memory that was never written to would cost nothing to read
    patience = SimpleNamespace(deadline_s=60.0)
    worker = cast(Any, SimpleNamespace(id=me, store=held, settings=patience, pulse=lambda: None))
    builder = GroupBuilder(store, me, "127.0.0.1", torch.device("cpu"))
    communicator = cast(Any, SimpleNamespace(builder=builder, carrying={}))
    rounds: list[dict[str, tuple[float, float]]] = []
    for number in range(payload["rounds"]):
        view = View(number, (0, 1), "", moves=moves)
        with _timed(times := {}, "before", store, number, me):
            before = {name: state.fingerprint() for name, state in held.states.items()}
        with _timed(times, "move", store, number, me):
            restore(worker, view, communicator, {"replica": Replica()}, {}, 0)
        with _timed(times, "after", store, number, me):
            Witness.of(me, held.states, held.states, before, moves, {})
        rounds.append(times)
    (folder / f"{payload['model']}-{me}.json").write_text(json.dumps(rounds))
    if me == 1:
        wanted = sum(t.nbytes for state in held.states.values() for t in state.tensors().values())
        states = {"bytes": wanted, "states": len(held.states), "parameters": sum(s.size for s in held.states.values())}
        (folder / f"{payload['model']}.json").write_text(json.dumps({**states, "memcpy": _memcpy(wanted)}))
    _meet(store, "end", me)
    return 0


@contextmanager
def _timed(times: dict[str, tuple[float, float]], what: str, store: dist.Store, number: int, me: int) -> Iterator[None]:
    """Seconds by the clock and of this process's CPU, from when both are there."""
    _meet(store, f"{number}/{what}", me)
    began, cpu = time.monotonic(), time.process_time()
    yield
    times[what] = time.monotonic() - began, time.process_time() - cpu


def _meet(store: dist.Store, what: str, me: int) -> None:
    store.set(f"{what}/{me}", "")
    store.wait([f"{what}/{worker}" for worker in (0, 1)], timedelta(seconds=60))


def _memcpy(size: int) -> float:
    """Seconds to copy so many bytes, both sides written to before."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    times: list[float] = []
    for _ in range(5):
        began = time.monotonic()
        target.copy_(source)
        times.append(time.monotonic() - began)
    return min(times)


def summarise(folder: Path, name: str) -> dict[str, Any]:
    """Of the fastest of the rounds, which others on the machine have disturbed least. A move has ended when the taker
    has all, a hash when the slower one has its own. The share of CPU is of both workers, the median and the ends."""
    gave, took = (json.loads((folder / f"{name}-{me}.json").read_text()) for me in (0, 1))
    sizes = json.loads((folder / f"{name}.json").read_text())
    gb, both = sizes["bytes"] / 1e9, list(zip(gave, took, strict=True))
    move = min(each["move"][0] for each in took)
    before, after = (min(max(a[kind][0], b[kind][0]) for a, b in both) for kind in ("before", "after"))
    shares = [
        sum(e[k][1] for e in pair for k in ("before", "after")) / sum(e["move"][1] for e in pair) for pair in both
    ]
    return {
        "model": name, **sizes, "rounds": len(both), "move_s": move, "move_gb_s": gb / move,
        "memcpy_gb_s": gb / sizes["memcpy"], "hash_s": before, "hash_gb_s": gb / before,
        "certificate_s": before + after, "certificate_of_move": (before + after) / move,
        "cpu_of_move": {"median": statistics.median(shares), "least": min(shares), "most": max(shares)},
    }  # fmt: skip
