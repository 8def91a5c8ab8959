"""What the sealed store costs beside torch's: each operation, and a commit of four workers; and building a group.

    python benchmarks/store.py --out benchmarks/results

`ours` is the store as a run has it, in a process of its own; `ours, thread` the same in a thread of the process that
hosts it. Both are measured with a host that is idle, and with one that computes in Python, as a coordinator that plans
does. Rounds are interleaved; microseconds are the median and the 99th percentile over all rounds. A commit is what
recovery/commit.py does: four processes vote, the last writes the outcome, all read it. TCPStore's `set` returns before
the server has it; ours returns when it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the packages come before scripts beside this one

import torch
import torch.distributed as dist

from benchmarks.runs import meanwhile, shown
from launch.forkserver import ForkServer
from pipeline.runtime.groups import GroupBuilder
from pipeline.store.client import SealedStore
from pipeline.store.hosting import StoreProcess, StoreThread
from recovery.commit import Ballot

TOKEN, WORKERS = b"the token of a benchmark, and of nothing else", 4
KINDS = ("TCPStore", "ours", "ours, thread")
Times = dict[str, list[float]]


def client(kind: str, port: int) -> dist.Store:
    if kind == "TCPStore":
        return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    return SealedStore("127.0.0.1", port, TOKEN)


@contextmanager
def hosted(kind: str) -> Iterator[int]:
    """The port of a store."""
    if kind == "TCPStore":
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        yield server.port
        return
    store = (StoreProcess if kind == "ours" else StoreThread)("127.0.0.1", 0, TOKEN)
    try:
        yield store.port
    finally:
        store.close()


def compute(over: threading.Event) -> None:
    """Work that leaves the interpreter to others only when it must."""
    while not over.is_set():
        sum(range(2000))


def member(payload: dict[str, Any]) -> int:
    """A worker that commits; the first one also times each operation, and tells through a socket of the kernel's."""
    store, me, found = client(payload["kind"], payload["port"]), payload["worker"], dict[str, list[float]]()
    ballot = Ballot(store, payload["view"], me, range(WORKERS))
    for iteration in range(1, payload["commits"] + 1):
        began = time.perf_counter()
        ballot(iteration, {"loss": 1.0, "worker": me}, time.monotonic() + 60)
        found.setdefault("commit", []).append(time.perf_counter() - began)
    if me == 0:
        store.set("there", "1" * 200)
        operations: dict[str, Callable[[], Any]] = {
            "set": lambda: store.set("key", "1" * 200), "get": lambda: store.get("there"),
            "compare_set": lambda: store.compare_set("other", "1", "2"), "add": lambda: store.add("number", 1),
            "check": lambda: store.check(["never"]), "wait": lambda: store.wait(["there"], timedelta(seconds=1)),
            "connect": lambda: client(payload["kind"], payload["port"]),
        }  # fmt: skip
        for name, act in operations.items():
            for _ in range(payload["times"] // (10 if name == "connect" else 1)):
                began = time.perf_counter()
                act()
                found.setdefault(name, []).append(time.perf_counter() - began)
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(payload["tell"])
            end.sendall(json.dumps(found).encode())
    return 0


def measured(forkserver: ForkServer, kind: str, busy: bool, view: int, times: int) -> Times:
    """One round: seconds by operation."""
    with hosted(kind) as port, meanwhile(compute) if busy else nullcontext(), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0store-benchmark-{os.getpid()}-{view}")
        listener.listen()
        listener.settimeout(120)
        payload = {"kind": kind, "port": port, "view": view, "commits": times // 4, "times": times,
                   "tell": listener.getsockname().decode()}  # fmt: skip
        pids = {forkserver.start({**payload, "worker": worker}) for worker in range(WORKERS)}
        end, _ = listener.accept()
        with end:
            said = b"".join(iter(lambda: end.recv(1 << 16), b""))
        while pids:
            pids -= {ended.pid for ended in forkserver.poll(1.0)}
    return json.loads(said)


def groups(rounds: int) -> dict[str, Any]:
    """Milliseconds in which two members build a gloo group, proof and door and all, over a store in memory."""
    store, spent = dist.HashStore(), list[float]()
    ends = [GroupBuilder(store, worker, "127.0.0.1", torch.device("cpu")) for worker in (0, 1)]
    for number in range(rounds):
        began = time.perf_counter()
        threads = [threading.Thread(target=end.build, args=(f"group{number}", [0, 1])) for end in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spent.append(1e3 * (time.perf_counter() - began))
    return {"median_ms": statistics.median(spent), "p95_ms": statistics.quantiles(spent, n=20)[-1]}


def told(seconds: list[float]) -> dict[str, float]:
    p99 = statistics.quantiles(seconds, n=100)[-1]
    return {"p50_us": round(1e6 * statistics.median(seconds), 1), "p99_us": round(1e6 * p99, 1)}


def measure(rounds: int, times: int, advance: Callable[[float], None]) -> dict[str, Any]:
    forkserver, found, view = ForkServer(member), dict[str, Times](), 0
    try:
        for number in range(rounds):
            for busy in (False, True):
                for kind in KINDS:
                    view += 1
                    name = f"{kind}, host computes" if busy else kind
                    for operation, seconds in measured(forkserver, kind, busy, view, times).items():
                        found.setdefault(name, {}).setdefault(operation, []).extend(seconds)
            advance(number + 1)
    finally:
        forkserver.close()
    rows = {name: {operation: told(seconds) for operation, seconds in each.items()} for name, each in found.items()}
    return {"load": os.getloadavg(), "stores": rows, "gloo_group_of_two": groups(100)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="folder for store.json")
    options = parser.parse_args()

    def act(advance: Callable[[float], None]) -> dict[str, Any]:
        return measure(options.rounds, options.times, advance)

    shown("stores", options.rounds, act, options.out, "store.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
