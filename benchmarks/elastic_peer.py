"""What the peers of elastic_peers.py share: the work, the record of it, and how a kill or an arrival is read from it.

The work is that of elastic.py: Llama-tiny and 32 samples of 64 tokens a step, data parallel on one thread per worker.
Peers that resume from a checkpoint save one every CHECKPOINT_EVERY steps, with how many samples were taken, and take
the next ones from there: so none is lost or repeated but in steps that are undone and run again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks import recovery_peers
from benchmarks.recovery_peers import append

BATCH, SEQUENCE, VOCABULARY, CHECKPOINT_EVERY, CLIP = 32, 64, 258, 20, 1.0
WARM_STEPS = 25

Line = dict[str, Any]
Row = dict[str, float]

HERE = Path(__file__).resolve().parent


# ---- what the processes of the peers run ----


def trainee() -> tuple[Any, Any]:
    """The model and its optimizer, the same in every process."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.model.weights import preset

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(preset("llama-tiny", vocab_size=VOCABULARY)).float().train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def backward(model: Any, first: int, samples: int) -> None:
    """Gradients of the mean loss of `samples` samples from number `first` on."""
    import torch

    generator = torch.Generator().manual_seed(first)
    tokens = torch.randint(VOCABULARY, (samples, SEQUENCE + 1), generator=generator)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


def per_worker(full: int) -> int:
    """Samples of one worker a step, of the `full` ones that share a batch."""
    return round(BATCH / full)


def record(folder: Path, name: str, **line: Any) -> None:
    """A committed step of `world` workers: it took `samples` samples from number `first` on, as one of those of the
    attempt `epoch`, which undoes the steps from its first on."""
    append(folder / f"steps-{name}.jsonl", **line)


def train_on(folder: Path, rank: int, world: int, per: int, state: Mapping[str, Any] | None) -> Iterator[Line]:
    """Train from `state` on within the default process group; yields what is to be saved, on every rank."""
    import torch

    model, optimizer = trainee()
    epoch, step, taken = time.time(), 0, 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, taken = state["step"], state["taken"]
    shared = torch.nn.parallel.DistributedDataParallel(model)
    while True:
        optimizer.zero_grad()
        backward(shared, taken + rank * per, per)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        step += 1
        if rank == 0:
            line = {"step": step, "world": world, "first": taken, "samples": world * per, "epoch": epoch}
            record(folder, f"{os.getpid()}", **line)
        taken += world * per
        if step % CHECKPOINT_EVERY == 0:
            yield {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "taken": taken}


def load(path: Path) -> Any:
    """What `save` wrote, or None."""
    import torch

    return torch.load(path) if path.is_file() else None


def save(state: Line, path: Path) -> None:
    import torch

    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


# ---- the benchmark's side ----


class Family(recovery_peers.Family):
    """The processes of a peer."""

    def __init__(self, folder: Path, script: str = "elastic_peers.py") -> None:
        super().__init__(folder, str(HERE / script))
        # what a peer starts by itself imports from here too
        self.environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        for process in psutil.process_iter(["cmdline"]):  # what lost its parent still names the folder
            if any(str(self.folder) in word for word in process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def kill(self, process: subprocess.Popen[bytes], descendants: bool = False) -> float:
        """SIGKILL one, and what it started if `descendants`, as when its machine goes; the time of it."""
        root = psutil.Process(process.pid)
        self._needed.remove(process)
        if descendants:
            return kill_all(root)
        killed = time.time()
        root.kill()
        return killed


def settle(chance: random.Random) -> None:
    """Wait until a run that has changed is as it was, and on to a moment at random."""
    time.sleep(chance.uniform(1.0, 2.0))


class Commits:
    """The lines of all steps-*.jsonl of a folder, in order of time; only what is new is read."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._read, self._lines = folder, dict[Path, int](), list[Line]()

    def __call__(self) -> list[Line]:
        for path in self._folder.glob("steps-*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text, end, _ = file.read().rpartition(b"\n")
            self._read[path] = self._read.get(path, 0) + len(text) + len(end)
            self._lines += [json.loads(line) for line in text.splitlines()]
        self._lines.sort(key=lambda line: line["time"])
        return self._lines


def kill_all(root: psutil.Process) -> float:
    """SIGKILL this and all that it started, as when a machine goes; the time of it."""
    root.suspend()  # so that it starts no more while it is asked for those it has
    found = [root, *root.children(recursive=True)]
    killed = time.time()
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return killed


def changed(family: Family, commits: Commits, since: float, world: int, deadline_s: float = 120.0) -> Row:
    """Wait until a run that was changed at the time `since` commits with `world` workers, and gets further than it was.

    `next_s`: to the first commit with so many. `new_s`: to the first step that had not been done before. `again`:
    steps that are done again until then. `stall_s`: the longest time without a step that had not been done before.
    `batch`: samples of a step from then on. Raises PeerError.
    """

    def resized() -> list[Line]:
        return [line for line in commits() if line["time"] > since and line["world"] == world]

    family.until(lambda: bool(resized()), deadline_s)
    first = resized()[0]
    reached = max((line["step"] for line in commits() if line["time"] < first["time"]), default=0)
    family.until(lambda: any(line["step"] > reached for line in resized()), deadline_s)
    new = next(line for line in resized() if line["step"] > reached)
    progress, top = [since], max((line["step"] for line in commits() if line["time"] <= since), default=0)
    for line in commits():
        if since < line["time"] <= new["time"] and line["step"] > top:
            progress.append(line["time"])
            top = line["step"]
    return {
        "next_s": first["time"] - since, "new_s": new["time"] - since, "again": max(0, reached + 1 - first["step"]),
        "stall_s": max(b - a for a, b in pairwise(progress)), "batch": sum(
            {line["first"]: line["samples"] for line in commits()
             if line["step"] == new["step"] and line["epoch"] == new["epoch"]}.values()
        ),
    }  # fmt: skip


def row(shrink: Row, grow: Row | None) -> Row:
    """A kill and the arrival after it, as one."""
    grown = {} if grow is None else {f"grow_{name}": value for name, value in grow.items()}
    return {**{f"shrink_{name}": value for name, value in shrink.items()}, **grown}


def samples(lines: Sequence[Line]) -> dict[str, int]:
    """Samples that no step that stands has taken, and that several have; steps that were run again."""
    attempts: dict[int, dict[float, set[int]]] = {}
    for line in lines:
        taken = attempts.setdefault(line["step"], {}).setdefault(line["epoch"], set())
        taken.update(range(line["first"], line["first"] + line["samples"]))
    last = max(attempts, default=0) - 2  # whose lines are all there
    standing = [taken[max(taken)] for step, taken in attempts.items() if step <= last]
    once = set[int]().union(*standing)
    return {
        "steps": len(standing), "steps_again": sum(len(taken) - 1 for taken in attempts.values()),
        "samples_lost": max(once, default=-1) + 1 - len(once), "samples_repeated": sum(map(len, standing)) - len(once),
    }  # fmt: skip


def until_warm(family: Family, commits: Commits, world: int) -> None:
    """Raises PeerError."""

    def warm() -> bool:
        return any(line["step"] > WARM_STEPS and line["world"] == world for line in commits())

    family.until(warm)
