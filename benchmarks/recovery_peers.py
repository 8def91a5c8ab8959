"""The peers of benchmarks/recovery.py: SIGKILL to the next commit under torchrun's restarts, torchft, and nvrx.

    python benchmarks/recovery.py --only 'torchrun restart' torchft 'torchft, 1 s' 'torchft, 1 s, any moment' nvrx

All train a plain transformers Llama of the size of preset llama-2m, data parallel over gloo on one thread per process,
on as many tokens a step as recovery.py asks for (random ones, which cost the same). Who commits a step appends a line.

`torchrun restart`: four processes under torchrun --max-restarts, DDP, torch.save every 20 steps. SIGKILL at a random
moment on a random process, rank 0 included; then torchrun ends the others, starts all again, and they resume. Parts:
`ready_s` until all run again with their group built (the imports of four processes, almost all of it), `restore_s`
reads the checkpoint, and `first_step_s` ends with the first step that the run had not done before.

`torchft` (0.2.0): two replica groups of one process, a lighthouse on 127.0.0.1, a Manager with ProcessGroupGloo, and
torchft's wrappers of DDP and the optimizer. A replica is killed between steps: by its own hand when asked to, 0.1 s
after a commit, when the other waits for it. In the middle of a backward pass the survivor's DDP wrapper would raise an
AssertionError and end it too. `any moment` reduces by Manager.allreduce in the wrapper's place, survives that, and is
killed from outside. Times are until the survivor's next commit without the dead, which waits for the lighthouse's
heartbeat timeout: 5 s by default. `rejoin_s` is from the start of a new process in the dead one's place until both
commit together.

`nvrx` (nvidia-resiliency-ext 0.4.1, in process): three ranks under inprocess.Wrapper, DDP, a checkpoint every 20 steps.
One is killed; the two others leave the wrapped function, enter it again in the same processes, and resume. Nobody comes
in the dead one's place, so each kill is one of a run of its own. All its intervals are 0.1 s and its heartbeat timeout
1 s, for which its defaults have seconds. `next_s` ends with the next commit, `total_s` with the first step that the run
had not done before. No peer here has a pipeline to repair.

Each process is this script with --role, dies with who started it, and is ended on the way out, whatever happened.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from launch.forkserver import die_with_parent

MODEL = {  # preset llama-2m, with the vocabulary of --tokenizer bytes
    "hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 352, "vocab_size": 258, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "use_cache": False,
}  # fmt: skip
SAMPLES, SEQUENCE, CHECKPOINT_EVERY, CLIP = 8, 64, 20, 1.0
WORKERS, REPLICAS, RANKS, WARM_STEPS = 4, 2, 3, 25

HERE = Path(__file__).resolve().parent

Row = dict[str, float]


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that is still written to."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def append(path: Path, **fields: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"time": time.time(), **fields}) + "\n")


# ---- what the processes of the peers run ----


def trainee() -> tuple[Any, Any]:
    """The model and its optimizer, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).float().train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def backward(model: Any, step: int, rank: int, world: int) -> None:
    """Gradients of this process's share of a step."""
    import torch

    generator = torch.Generator().manual_seed(step * world + rank)
    tokens = torch.randint(MODEL["vocab_size"], (SAMPLES // world, SEQUENCE + 1), generator=generator)
    logits = model(input_ids=tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


def torchrun_agent(folder: Path) -> None:
    """torchrun itself, within a process that dies with the benchmark."""
    from torch.distributed.run import main

    main(
        [
            "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(WORKERS), "--max-restarts", "1000000",
            "--monitor-interval", "0.1", __file__, "--role=torchrun-worker", f"--folder={folder}",
        ]
    )  # fmt: skip


def torchrun_worker(folder: Path) -> None:
    """One of four: resume, then train on and on. The store outlives a restart, so each has names of its own."""
    import torch.distributed as dist

    rank, world, restart = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    trained = trainee()
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore(f"restart{restart}", store), rank=rank, world_size=world)
    resume(folder, trained, rank, world, restart, contextlib.nullcontext)


def serve_store(folder: Path) -> None:
    """A TCPStore in a process that nobody kills; `folder`/store has its port."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    unfinished = folder / "store.tmp"
    unfinished.write_text(str(store.port))
    unfinished.replace(folder / "store")
    while True:
        time.sleep(60)


def under_nvrx(
    folder: Path, number: int, ranks: int, train: Callable[[int, int, Any], None], tuned: bool = True
) -> None:  # fmt: skip
    """One of `ranks` under nvrx, and of fewer after a failure: `train(rank, world, call_wrapper)` in a default process
    group. `tuned`: intervals of 0.1 s and short timeouts, in place of its own and of those of its examples."""
    import torch.distributed as dist
    from nvidia_resiliency_ext import inprocess

    port = int((folder / "store").read_text())
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    intervals = (f"{name}_interval" for name in ("monitor_thread", "monitor_process", "heartbeat", "progress_watchdog"))
    quick = dict.fromkeys((*intervals, "last_call_wait"), timedelta(seconds=0.1))
    more = {**quick, "heartbeat_timeout": timedelta(seconds=1)} if tuned else {}

    def main(call_wrapper: Any = None) -> None:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(f"attempt{call_wrapper.iteration}", store), rank=rank, world_size=world,
            timeout=timedelta(seconds=2 if tuned else 10),
        )  # fmt: skip
        train(rank, world, call_wrapper)

    main.__annotations__["call_wrapper"] = inprocess.CallWrapper  # by the type it knows where to put itself
    inprocess.Wrapper(store_kwargs={"port": port}, **more)(main)()


def nvrx_rank(folder: Path, number: int) -> None:
    """One of three that train and resume."""
    trained = trainee()
    under_nvrx(
        folder, number, RANKS,
        lambda rank, world, wrapper: resume(folder, trained, rank, world, wrapper.iteration, wrapper.atomic),
    )  # fmt: skip


def resume(
    folder: Path, trained: tuple[Any, Any], rank: int, world: int, restart: int, saving: Callable[[], Any]
) -> None:  # fmt: skip
    """Train on and on from the last checkpoint, in the default process group; files are written inside `saving()`."""
    import torch

    (model, optimizer), ready, saved, step = trained, time.time(), folder / "checkpoint.pt", 0
    if saved.is_file():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    shared = torch.nn.parallel.DistributedDataParallel(model)
    restored = time.time()
    while True:
        optimizer.zero_grad()
        backward(shared, step, rank, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        step += 1
        if rank > 0:
            continue
        append(folder / "steps.jsonl", step=step, restart=restart, ready=ready, restored=restored)
        if step % CHECKPOINT_EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            with saving():
                torch.save(state, saved.with_suffix(".tmp"))
                saved.with_suffix(".tmp").replace(saved)


def lighthouse(folder: Path, timeout_ms: int) -> None:
    """torchft's coordinator; `folder`/lighthouse says where it listens."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, heartbeat_timeout_ms=timeout_ms)
    unfinished = folder / "lighthouse.tmp"
    unfinished.write_text(f"http://127.0.0.1:{server.address().rpartition(':')[2]}")
    unfinished.replace(folder / "lighthouse")
    while True:
        time.sleep(60)


def replica(folder: Path, number: int, by_hand: int) -> None:
    """A replica group of one process; dies between two steps when `folder`/kill<number> is there."""
    import torch
    import torch.distributed as dist
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

    model, adamw = trainee()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        adamw.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(), load_state_dict=load, min_replica_size=1, rank=0, world_size=1,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": adamw.state_dict()},
        store_addr="127.0.0.1", store_port=store.port, hostname="127.0.0.1", replica_id=f"replica{number}",
        lighthouse_addr=(folder / "lighthouse").read_text(),
    )  # fmt: skip
    shared = model if by_hand else DistributedDataParallel(manager, model)
    optimizer, parameters = Optimizer(manager, adamw), list(model.parameters())
    asked, said = folder / f"kill{number}", folder / f"replica{number}.jsonl"
    while True:
        before = manager.current_step()
        optimizer.zero_grad()
        backward(shared, before, number, REPLICAS)
        if by_hand:  # in place of the wrapper of DDP
            flat = torch.nn.utils.parameters_to_vector([p.grad for p in parameters])
            manager.allreduce(flat).wait()
            torch.nn.utils.vector_to_parameters(flat, [p.grad for p in parameters])
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        if (step := manager.current_step()) == before:
            continue
        append(said, step=step, together=manager.num_participants())
        if asked.exists():
            asked.unlink()
            time.sleep(0.1)
            append(said, step=step, killed=True)
            os.kill(os.getpid(), signal.SIGKILL)


# ---- the benchmark's side ----


class PeerError(RuntimeError):
    """A peer that ended or hangs."""


class Family:
    """Processes of a script that share a folder; all of them, and theirs, are ended on the way out."""

    def __init__(self, folder: Path, script: str = __file__) -> None:
        self.folder, self.log, self.script = folder, folder / "log", script
        self.environment: dict[str, str] = {}
        """More of it, for those that are started from now on."""
        self._started: list[subprocess.Popen[bytes]] = []
        self._needed: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *_: object) -> None:
        found: list[psutil.Process] = []
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGSTOP)  # so that it starts no more while it is asked for those it has
                found += psutil.Process(process.pid).children(recursive=True)
                process.kill()
            process.wait()
        for each in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(found, timeout=10)

    def start(self, role: str, *numbers: int) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NO_PROXY": "*", "no_proxy": "*",
            "TORCH_CPP_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false", **self.environment,
        }  # fmt: skip
        fixed = [f"--role={role}", f"--folder={self.folder}", f"--parent={os.getpid()}"]
        arguments = [sys.executable, self.script, *fixed, *map(str, map(int, numbers))]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                arguments, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._started.append(process)
        self._needed.append(process)
        return process

    def lose(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of one that is to end. Raises PeerError."""
        self._needed.remove(process)
        self.until(lambda: process.poll() is not None)

    def until(self, reached: Callable[[], bool], deadline_s: float = 120.0) -> None:
        """Wait until `reached()`. Raises PeerError when a process that is needed has ended, or at the deadline."""
        deadline = time.monotonic() + deadline_s
        while not reached():
            ended = [p.args[2] for p in self._needed if p.poll() is not None]
            if ended or time.monotonic() > deadline:
                what = f"{ended[0]} ended" if ended else f"nothing came within {deadline_s:.0f} s"
                words = " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-6:])
                for prefix in (HERE.parent, sys.prefix):
                    words = words.replace(f"{prefix}/", "")
                raise PeerError(f"{what}; said last: {words[-1200:]}")
            time.sleep(0.1)  # times are read from lines; whole files are read here


def torchrun_restart(family: Family, chance: random.Random) -> Iterator[Row]:
    """Kill one of the workers, wait until the run is further than it was; and again."""
    agent, said = psutil.Process(family.start("torchrun-agent").pid), family.folder / "steps.jsonl"

    def committed(restart: int, least: int) -> list[dict[str, Any]]:
        return [line for line in lines(said) if line["restart"] >= restart and line["step"] > least]

    family.until(lambda: bool(committed(0, WARM_STEPS)))
    while True:
        time.sleep(chance.uniform(0.3, 0.8))
        workers = [child for child in agent.children() if "--role=torchrun-worker" in child.cmdline()]
        if len(workers) != WORKERS:
            raise PeerError(f"{len(workers)} workers run; expected {WORKERS}")
        restart, killed = lines(said)[-1]["restart"], time.time()
        chance.choice(workers).kill()
        family.until(lambda restart=restart: bool(committed(restart + 1, 0)))
        before = max(line["step"] for line in lines(said) if line["restart"] <= restart)
        family.until(lambda restart=restart, before=before: bool(committed(restart + 1, before)))
        done = committed(restart + 1, before)[0]
        yield {
            "total_s": done["time"] - killed, "ready_s": done["ready"] - killed,
            "restore_s": done["restored"] - done["ready"], "first_step_s": done["time"] - done["restored"],
        }  # fmt: skip


def torchft(family: Family, chance: random.Random, timeout_ms: int, by_hand: bool) -> Iterator[Row]:
    """Kill one of two replicas, wait for a commit of the other and for a new one to join; and again."""
    folder, said = family.folder, [family.folder / f"replica{number}.jsonl" for number in range(REPLICAS)]
    family.start("lighthouse", timeout_ms)
    family.until((folder / "lighthouse").is_file)
    processes = [family.start("replica", number, by_hand) for number in range(REPLICAS)]

    def committed(number: int, together: int, least: int, seen: int = 0) -> list[float]:
        new = [line for line in lines(said[number])[seen:] if line.get("together") == together]
        return [line["time"] for line in new if line["step"] > least]

    family.until(lambda: all(committed(number, REPLICAS, WARM_STEPS) for number in range(REPLICAS)))
    while True:
        time.sleep(chance.uniform(0.3, 0.8))
        victim, killed = chance.randrange(REPLICAS), time.time()
        if by_hand:
            processes[victim].kill()
        else:
            (folder / f"kill{victim}").touch()
        family.lose(processes[victim])
        known = lines(said[victim])
        last, seen = known[-1]["step"], len(known)
        if not by_hand:
            if "killed" not in known[-1]:
                raise PeerError(f"replica {victim} ended before it was to")
            killed = known[-1]["time"]
        rest = partial(committed, 1 - victim, REPLICAS - 1, last)
        family.until(lambda rest=rest: bool(rest()))
        row, started = {"total_s": rest()[0] - killed}, time.time()
        processes[victim] = family.start("replica", victim, by_hand)
        joined = partial(committed, victim, REPLICAS, last, seen)
        family.until(lambda joined=joined: bool(joined()))
        yield {**row, "rejoin_s": joined()[0] - started}


def nvrx(family: Family, chance: random.Random) -> Iterator[Row]:
    """Kill one of three, wait until the others are further than the run was. One row."""
    said = family.folder / "steps.jsonl"
    family.start("store")
    family.until((family.folder / "store").is_file)
    ranks = [family.start("nvrx-rank", number) for number in range(RANKS)]
    family.until(lambda: bool(lines(said)) and lines(said)[-1]["step"] > WARM_STEPS)
    time.sleep(chance.uniform(0.3, 0.8))
    victim, killed = chance.choice(ranks), time.time()
    victim.kill()
    family.lose(victim)
    before = max(line["step"] for line in lines(said) if line["restart"] == 0)

    def again(least: int) -> list[float]:
        return [line["time"] for line in lines(said) if line["restart"] > 0 and line["step"] > least]

    family.until(lambda: bool(again(before)))
    yield {"total_s": again(before)[0] - killed, "next_s": again(0)[0] - killed}


PEERS: dict[str, Callable[[Family, random.Random], Iterator[Row]]] = {
    "torchrun restart": torchrun_restart,
    "torchft": partial(torchft, timeout_ms=5000, by_hand=False),
    "torchft, 1 s": partial(torchft, timeout_ms=1000, by_hand=False),
    "torchft, 1 s, any moment": partial(torchft, timeout_ms=1000, by_hand=True),
    "nvrx": nvrx,
}
PACKAGES = {"torchft": ("torchft", "torchft==0.2.0"), "nvrx": ("nvidia_resiliency_ext", "nvidia-resiliency-ext==0.4.1")}


def measure_peer(name: str, kills: int, seed: int, advance: Callable[[], None]) -> dict[str, Any]:
    """`kills` recoveries of a peer: those that there were, and an error if it failed or how to install it."""
    rows: list[Row] = []
    found = {"remedy": name, "rows": rows}
    module, package = PACKAGES.get(name.split(",")[0], ("torch", ""))
    if importlib.util.find_spec(module) is None:
        return {**found, "kills": 0, "error": f"not installed: pip install -c constraints.txt {package}"}
    chance = random.Random(f"{seed}/{name}")
    while len(rows) < kills and "error" not in found:  # a peer that brings nobody back has a row a run
        with tempfile.TemporaryDirectory() as folder, Family(Path(folder)) as family:
            try:
                for row in itertools.islice(PEERS[name](family, chance), kills - len(rows)):
                    rows.append(row)
                    advance()
            except (PeerError, psutil.Error, OSError) as error:
                found["error"] = str(error)
    return {**found, "kills": len(rows)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    roles = {
        "torchrun-agent": torchrun_agent, "torchrun-worker": torchrun_worker,
        "lighthouse": lighthouse, "replica": replica, "store": serve_store, "nvrx-rank": nvrx_rank,
    }  # fmt: skip
    parser.add_argument("--role", choices=[*roles], required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parent", type=int, default=os.getppid(), help="end when this process does")
    parser.add_argument("numbers", type=int, nargs="*", help="what the role takes beside its folder")
    options = parser.parse_args()
    die_with_parent(options.parent)
    roles[options.role](options.folder, *options.numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
