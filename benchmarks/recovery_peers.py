"""The peers of benchmarks/recovery.py: from SIGKILL to the next commit under torchrun's restarts and under torchft.

    python benchmarks/recovery.py --only 'torchrun restart' torchft 'torchft, 1 s timeout' --kills 20

All train a plain transformers Llama of the size of preset llama-2m, data parallel over gloo on one thread per process,
on as many tokens a step as recovery.py asks for (random ones, which cost the same). Who commits a step appends a line.

`torchrun restart`: four processes under torchrun --max-restarts, DDP, torch.save every 20 steps. SIGKILL at a random
moment on a random process, rank 0 included; then torchrun ends the others, starts all again, and they resume. Until
`restarted_s` the first step is done again; `total_s` also includes the other steps since the checkpoint.

`torchft` (0.2.0): two replica groups of one process, a lighthouse on 127.0.0.1, Manager, ProcessGroupGloo, and the DDP
and optimizer wrappers. A replica is killed between steps, by its own hand when asked to, 0.1 s after its commit, when
the other waits for it as well: a kill in the middle of a backward pass makes the survivor's DDP wrapper raise an
AssertionError, which ends it too. `total_s` is until the survivor's next commit; `rejoin_s` is from the start of a new
process in the place of the dead until both commit together. The survivor waits for the lighthouse's heartbeat timeout:
5 s unless told otherwise, and 1 s in `torchft, 1 s timeout`. Neither peer has a pipeline to repair, as ours has.

Each process is this script with --role, dies with who started it, and is ended on the way out, whatever happened.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
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
from pathlib import Path
from typing import Any

import psutil

MODEL = {  # preset llama-2m, with the vocabulary of --tokenizer bytes
    "hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 352, "vocab_size": 258, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "use_cache": False,
}  # fmt: skip
SAMPLES, SEQUENCE, CHECKPOINT_EVERY, CLIP = 8, 64, 20, 1.0
WORKERS, REPLICAS, WARM_STEPS = 4, 2, 25
TORCHFT = "pip install -c constraints.txt torchft==0.2.0"

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
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)


def torchrun_agent(folder: Path) -> None:
    """torchrun itself, within a process that dies with the benchmark."""
    from torch.distributed.run import main

    main(
        [
            "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(WORKERS), "--max-restarts", "1000000",
            "--monitor-interval", "0.1", __file__, "--role", "torchrun-worker", "--folder", str(folder),
        ]
    )  # fmt: skip


def torchrun_worker(folder: Path) -> None:
    """One of four: resume, then train on and on. The store outlives a restart, so each has names of its own."""
    import torch
    import torch.distributed as dist

    rank, world, restart = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore(f"restart{restart}", store), rank=rank, world_size=world)
    model, optimizer = trainee()
    saved, step = folder / "checkpoint.pt", 0
    if saved.is_file():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    shared = torch.nn.parallel.DistributedDataParallel(model)
    while True:
        optimizer.zero_grad()
        backward(shared, step, rank, world)
        optimizer.step()
        step += 1
        if rank > 0:
            continue
        append(folder / "steps.jsonl", step=step, restart=restart)
        if step % CHECKPOINT_EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
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


def replica(folder: Path, number: int) -> None:
    """A replica group of one process; dies between two steps when `folder`/kill<number> is there."""
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
    shared, optimizer = DistributedDataParallel(manager, model), Optimizer(manager, adamw)
    asked, said = folder / f"kill{number}", folder / f"replica{number}.jsonl"
    while True:
        before = manager.current_step()
        optimizer.zero_grad()
        backward(shared, before, number, REPLICAS)
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
    """Processes of this script that share a folder; all of them, and theirs, are ended on the way out."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *_: object) -> None:
        found: list[psutil.Process] = []
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGSTOP)  # so that it starts no more while it is asked for those it has
                found += psutil.Process(process.pid).children(recursive=True)
                process.kill()
            process.wait()
        for each in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(found, timeout=10)

    def start(self, role: str, **more: Any) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NO_PROXY": "*", "no_proxy": "*",
            "TORCH_CPP_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        fields = {"role": role, "folder": self.folder, "parent": os.getpid(), **more}
        arguments = [sys.executable, __file__, *(f"--{name}={value}" for name, value in fields.items())]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                arguments, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._processes.append(process)
        return process

    def lost(self, process: subprocess.Popen[bytes], deadline_s: float = 60.0) -> None:
        """Wait for the end of one that is to be killed. Raises PeerError."""
        self._processes.remove(process)
        try:
            self.until(lambda: process.poll() is not None, deadline_s)
        except PeerError:
            self._processes.append(process)
            raise

    def until(self, reached: Callable[[], bool], deadline_s: float = 120.0) -> None:
        """Wait until `reached()`. Raises PeerError when a process ends before, or at the deadline."""
        deadline = time.monotonic() + deadline_s
        while not reached():
            ended = [p.args[2] for p in self._processes if p.poll() is not None]
            if ended or time.monotonic() > deadline:
                what = f"{ended[0]} ended" if ended else f"nothing came within {deadline_s:.0f} s"
                words = " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-6:])
                here = f"{Path(__file__).resolve().parent.parent}/"
                raise PeerError(f"{what}; said last: {words[-1200:].replace(here, '')}")
            time.sleep(0.002)


def torchrun_restart(family: Family, chance: random.Random) -> Iterator[Row]:
    """Kill one of the workers, wait until the run is further than it was; and again."""
    agent, said = psutil.Process(family.start("torchrun-agent").pid), family.folder / "steps.jsonl"

    def committed(restart: int, least: int) -> list[float]:
        return [line["time"] for line in lines(said) if line["restart"] >= restart and line["step"] > least]

    family.until(lambda: bool(committed(0, WARM_STEPS)))
    while True:
        time.sleep(chance.uniform(0.3, 0.8))
        workers = [child for child in agent.children() if "torchrun-worker" in child.cmdline()]
        if len(workers) != WORKERS:
            raise PeerError(f"{len(workers)} workers run; expected {WORKERS}")
        restart, killed = lines(said)[-1]["restart"], time.time()
        chance.choice(workers).kill()
        family.until(lambda restart=restart: bool(committed(restart + 1, 0)))
        before = max(line["step"] for line in lines(said) if line["restart"] <= restart)
        family.until(lambda restart=restart, before=before: bool(committed(restart + 1, before)))
        totals, firsts = committed(restart + 1, before), committed(restart + 1, 0)
        yield {"total_s": totals[0] - killed, "restarted_s": firsts[0] - killed}


def torchft(family: Family, chance: random.Random, timeout_ms: int) -> Iterator[Row]:
    """Kill one of two replicas between steps, wait for the other's commit and for a new one to join; and again."""
    folder, said = family.folder, [family.folder / f"replica{number}.jsonl" for number in range(REPLICAS)]
    family.start("lighthouse", timeout=timeout_ms)
    family.until((folder / "lighthouse").is_file)
    processes = [family.start("replica", number=number) for number in range(REPLICAS)]

    def together(number: int, seen: int = 0) -> bool:
        return any(line.get("together") == REPLICAS for line in lines(said[number])[seen:])

    family.until(lambda: all(together(n) and lines(said[n])[-1]["step"] >= WARM_STEPS for n in range(REPLICAS)))
    while True:
        time.sleep(chance.uniform(0.3, 0.8))
        victim = chance.randrange(REPLICAS)
        (folder / f"kill{victim}").touch()
        family.lost(processes[victim])
        death, seen = lines(said[victim])[-1], len(lines(said[victim]))
        if "killed" not in death:
            raise PeerError(f"replica {victim} ended before it was to")

        def committed(other: int = 1 - victim, last: int = death["step"]) -> list[float]:
            return [line["time"] for line in lines(said[other]) if line["step"] > last]

        family.until(lambda committed=committed: bool(committed()))
        row, started = {"total_s": committed()[0] - death["time"]}, time.time()
        processes[victim] = family.start("replica", number=victim)
        family.until(lambda victim=victim, seen=seen: together(victim, seen))
        yield {**row, "rejoin_s": time.time() - started}


PEERS: dict[str, Callable[[Family, random.Random], Iterator[Row]]] = {
    "torchrun restart": torchrun_restart,
    "torchft": lambda family, chance: torchft(family, chance, 5000),
    "torchft, 1 s timeout": lambda family, chance: torchft(family, chance, 1000),
}


def measure_peer(name: str, kills: int, seed: int, advance: Callable[[], None]) -> dict[str, Any]:
    """`kills` recoveries of a peer: those that there were, and an error if it failed or how to install it."""
    rows: list[Row] = []
    found = {"remedy": name, "rows": rows}
    if name.startswith("torchft") and importlib.util.find_spec("torchft") is None:
        return {**found, "kills": 0, "error": f"not installed: {TORCHFT}"}
    with tempfile.TemporaryDirectory() as folder, Family(Path(folder)) as family:
        try:
            for row in itertools.islice(PEERS[name](family, random.Random(f"{seed}/{name}")), kills):
                rows.append(row)
                advance()
        except (PeerError, psutil.Error, OSError) as error:
            found["error"] = str(error)
    return {**found, "kills": len(rows)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    roles = {"torchrun-agent", "torchrun-worker", "lighthouse", "replica"}
    parser.add_argument("--role", choices=sorted(roles), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parent", type=int, default=os.getppid(), help="end when this process does")
    parser.add_argument("--number", type=int, default=0, help="which replica")
    parser.add_argument("--timeout", type=int, default=5000, help="milliseconds without a heartbeat")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != options.parent:
        return 1
    if options.role == "torchrun-agent":
        torchrun_agent(options.folder)
    elif options.role == "torchrun-worker":
        torchrun_worker(options.folder)
    elif options.role == "lighthouse":
        lighthouse(options.folder, options.timeout)
    else:
        replica(options.folder, options.number)
    return 0


if __name__ == "__main__":
    sys.exit(main())
