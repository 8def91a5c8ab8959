"""What a stranger can do to a run: hostile bytes, half messages and crowds at every port that it listens on.

    python benchmarks/fuzz.py --out benchmarks/results

Four runs, each calm first and then under attack for as long as it lasts: workers with sockets between them (`--links
gloo`) of which one is killed on the way, so that groups are built anew meanwhile; the same with shared memory; a pool;
and one whose store gets 40,000 connections as fast as they go, of which each says half a handshake. Ports are those at
which any process of the run listens, found again twice a second; Unix sockets by their names. The stranger has no
token. It says random bytes, half of a handshake, whole ones under a token of its own with sealed frames behind, what
torch's own store would understand, and the numbers by which gloo tells its connections apart; many of its connections
stay open. A run is harmed unless it ends with 0, the losses of the calm one to the last bit, and a ledger of every step
once.
"""

from __future__ import annotations

import argparse
import os
import random
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the packages come before scripts beside this one

import psutil

from benchmarks.runs import command, shown
from launch.forkserver import ForkServer
from launch.run_folder import read_jsonl, standing
from pipeline.store.frames import pack
from pipeline.store.handshake import HELLO, NONCE_BYTES, PROOF_BYTES, Secrets
from pipeline.store.table import Op

KILLED = ["--workers", "4", "--replicas", "2", "--exact-sums", "--inject", "kill:worker=2,step=40,at=backward"]
FLOOD = "a flood of half messages at the store"
RUNS = {
    "sockets, a worker killed": [*KILLED, "--links", "gloo"],
    "shared memory, a worker killed": KILLED,
    "a pool": ["--scheduler", "roundpipe", "--workers", "2"],
    FLOOD: ["--workers", "2"],
}
UNHARMED = "unharmed: exit code 0, the calm run's losses to the last bit, ledger whole"
HELD, UNDER_WAY, BURST, DEADLINE_S = 2_000, 512, 2_000, 600.0


def flags(out: Path, steps: int, more: list[str]) -> list[str]:
    return [
        "train", "--json", "--out", str(out), "--model", "llama-tiny", "--tokenizer", "bytes", "--data", "stdlib",
        "--max-tokens", "200000", "--sequence-length", "64", "--microbatches", "4", "--steps", str(steps),
        "--evaluate-every", "0", "--checkpoint-every", "0", "--sample-tokens", "0", "--threads", "1", *more,
    ]  # fmt: skip


def hostile(chance: random.Random) -> tuple[str, bytes]:
    """(its kind, what a connection says at once)."""
    noise = chance.randbytes(chance.choice([1, 8, 47, 48, 80, 300, 4096]))
    nonce = bytes(NONCE_BYTES)
    secrets = Secrets.of(b"a token that is not that of the run", nonce, chance.randbytes(NONCE_BYTES))
    frame = secrets.seals(server=False)[0].seal(pack(Op.SET, [b"unbroken/failed", b'{"reason": "forged", "code": 1}']))
    kinds = {
        "random bytes": noise,
        "half a handshake": (HELLO + nonce)[: chance.randrange(1, len(HELLO) + NONCE_BYTES)],
        "a handshake and noise": HELLO + nonce + noise,
        "a handshake and sealed frames": HELLO + nonce + secrets.client_proof + frame * chance.randrange(1, 4),
        "a handshake that is sent back": HELLO + nonce + bytes(PROOF_BYTES),
        "a frame of 4 GiB": HELLO + nonce + secrets.client_proof + b"\xff\xff\xff\xff" + noise,
        "torch's store": bytes([9])
        + struct.pack("<I", 0x3C85F7CE)
        + b"\x00"
        + struct.pack("<Q", 15)
        + b"unbroken/failed",
        "gloo's numbers": struct.pack("<q", chance.randrange(64)),
        "gloo's numbers and noise": struct.pack("<q", chance.randrange(64)) + noise,
        "nothing": b"",
    }
    kind = chance.choice(list(kinds))
    return kind, kinds[kind]


class Stranger:
    """One thread, many connections: some go at once, some stay half open until there are too many."""

    def __init__(self, seed: int) -> None:
        self._chance, self._selector = random.Random(seed), selectors.DefaultSelector()
        self._held: deque[socket.socket] = deque()
        self._under_way = 0
        self.tried, self.let_in, self.sent, self.heard = (Counter[str]() for _ in range(4))
        self.kinds, self.ports = Counter[str](), dict[str, set[Any]]()

    def attack(self, what: str, at: Any, kind_of_socket: int) -> None:
        """Begin one connection to a listener of this kind."""
        end = socket.socket(socket.AF_INET if isinstance(at, tuple) else socket.AF_UNIX, kind_of_socket)
        end.setblocking(False)
        kind, said = hostile(self._chance)
        self.ports.setdefault(what, set()).add(at)
        self.tried[what] += 1
        self.kinds[kind] += 1
        with suppress(BlockingIOError):
            try:
                end.connect(at)
            except BlockingIOError:
                raise
            except OSError:
                end.close()
                return
        self._selector.register(end, selectors.EVENT_WRITE, (what, said, time.monotonic()))
        self._under_way += 1

    def flood(self, at: Any, count: int) -> None:
        """So many connections that each say half a handshake; the newest stay open."""
        what = "the store"
        self.ports.setdefault(what, set()).add(at)
        for _ in range(count):
            self.tried[what] += 1
            self.kinds["half a handshake"] += 1
            with suppress(OSError):
                self._held.append(socket.create_connection(at, timeout=5))
                self.let_in[what] += 1
                self.sent[what] += self._held[-1].send(HELLO + bytes(self._chance.randrange(NONCE_BYTES)))
            while len(self._held) > HELD:
                self._held.popleft().close()

    def go_on(self) -> None:
        """Say what is to be said where a connection is there; give up those that are not let in."""
        for key, _ in self._selector.select(0.005 if self._under_way >= UNDER_WAY else 0.0):
            what, said, _ = key.data
            end = self._forget(key.fileobj)
            try:
                if error := end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(error, os.strerror(error))
                self.let_in[what] += 1
                self.sent[what] += end.send(said) if said else 0
                with suppress(BlockingIOError):
                    self.heard[what] += len(end.recv(4096))
            except OSError:
                end.close()
                continue
            if self._chance.random() < 0.5:
                end.close()
            else:
                self._held.append(end)
        while len(self._held) > HELD:
            self._held.popleft().close()
        for key in list(self._selector.get_map().values()) if self._under_way >= UNDER_WAY else ():
            if time.monotonic() - key.data[2] > 0.3:
                self._forget(key.fileobj).close()

    def _forget(self, end: Any) -> socket.socket:
        self._selector.unregister(end)
        self._under_way -= 1
        return end

    @property
    def busy(self) -> bool:
        return self._under_way >= UNDER_WAY

    def close(self) -> None:
        for end in [*self._held, *(key.fileobj for key in self._selector.get_map().values())]:
            end.close()  # type: ignore[union-attr]
        self._selector.close()

    def found(self) -> dict[str, Any]:
        return {
            what: {"listeners": len(self.ports[what]), "connections": self.tried[what], "let_in": self.let_in[what],
                   "bytes_sent": self.sent[what], "bytes_heard": self.heard[what]}
            for what in sorted(self.tried)
        }  # fmt: skip


def listeners(pid: int) -> list[tuple[str, Any, int]]:
    """(what listens, its address, the kind of its socket) of all processes of a run."""
    found: list[tuple[str, Any, int]] = []
    with suppress(psutil.Error):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.Error):
                what = "the store" if "pipeline.store.hosting" in process.cmdline() else "gloo, of a worker"
                ports = {tuple(c.laddr) for c in process.net_connections("tcp") if c.status == "LISTEN"}
                found += [(what, at, socket.SOCK_STREAM) for at in sorted(ports)]
                names = {(c.laddr, c.type) for c in process.net_connections("unix") if "@unbroken-" in str(c.laddr)}
                found += [("a Unix socket", "\0" + name[1:], kind) for name, kind in sorted(names)]
    return found


def run(
    forkserver: ForkServer, folder: Path, arguments: list[str], stranger: Stranger | None, flood: int = 0
) -> dict[str, Any]:
    """One run to its end, under attack or not; `flood`: by so many connections at its store, and nothing else."""
    out, log, began = folder / "run", folder / "log", time.monotonic()
    pid = forkserver.start({"arguments": [*arguments], "log": str(log)})
    ended, targets, looked = None, list[tuple[str, Any, int]](), 0.0
    try:
        while ended is None and time.monotonic() < began + DEADLINE_S:
            ended = next((e.code for e in forkserver.poll(0.0 if stranger else 0.1) if e.pid == pid), None)
            if stranger is None:
                continue
            if time.monotonic() - looked > 0.5:
                targets, looked = listeners(pid), time.monotonic()
                if flood:
                    stores = [at for what, at, _ in targets if what == "the store"]
                    targets = []
                    if stores and (out / "metrics.jsonl").exists():
                        stranger.flood(stores[0], min(flood, BURST))
                        flood, looked = flood - min(flood, BURST), 0.0
            for _ in range(32):
                if targets and not stranger.busy:
                    stranger.attack(*stranger._chance.choice(targets))
            stranger.go_on()
            if not targets:
                time.sleep(0.01)
        ledger = standing(read_jsonl(out / "ledger.jsonl", step=int))
        events = read_jsonl(out / "events.jsonl", event=str)
        times = [line["time"] for line in ledger]
        training_s = times[-1] - times[0] if times else None
        return {
            "code": ended, "losses": [m["loss"] for m in standing(read_jsonl(out / "metrics.jsonl", step=int))],
            "steps": [line["step"] for line in ledger], "samples": [line["first_sample"] for line in ledger],
            "lost": sum(e["event"] == "detected" for e in events), "training_s": training_s,
            "said": "" if ended == 0 else log.read_text(errors="replace")[-800:],
        }  # fmt: skip
    finally:
        with suppress(ProcessLookupError):
            if ended is None:
                os.kill(pid, signal.SIGKILL)
                forkserver.poll(5.0)
        shutil.rmtree(out, ignore_errors=True)


def measure(steps: int, seed: int, names: list[str], advance: Any) -> dict[str, Any]:
    """Every run, calm and attacked."""
    found: dict[str, Any] = {"steps": steps, "seed": seed, "runs": {}}
    forkserver = ForkServer(command)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        for number, name in enumerate(names):
            arguments, stranger = flags(folder / "run", steps, RUNS[name]), Stranger(seed + number)
            calm = run(forkserver, folder, arguments, None)
            advance(number + 0.4)
            try:
                attacked = run(forkserver, folder, arguments, stranger, 40_000 if name == FLOOD else 0)
            finally:
                stranger.close()
            whole = attacked["steps"] == list(range(1, steps + 1)) and attacked["samples"] == calm["samples"]
            harmed = attacked["code"] != 0 or attacked["losses"] != calm["losses"] or not whole
            found["runs"][name] = {
                "outcome": "harmed" if harmed else UNHARMED,
                "calm": {key: calm[key] for key in ("code", "lost", "training_s", "said")},
                "attacked": {key: attacked[key] for key in ("code", "lost", "training_s", "said")},
                "connections": sum(stranger.tried.values()), "bytes_sent": sum(stranger.sent.values()),
                "by_listener": stranger.found(), "by_kind": dict(sorted(stranger.kinds.items())),
            }  # fmt: skip
            advance(number + 1.0)
    finally:
        forkserver.close()
        shutil.rmtree(folder, ignore_errors=True)
    runs = found["runs"].values()
    sums = {key: sum(each[key] for each in runs) for key in ("connections", "bytes_sent")}
    return {**found, **sums, "unharmed": sum(each["outcome"] == UNHARMED for each in runs)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, help="folder for fuzz.json")
    options = parser.parse_args()

    def act(advance: Any) -> dict[str, Any]:
        return measure(options.steps, options.seed, options.only, advance)

    found = shown("strangers at every port", len(options.only), act, options.out, "fuzz.json")
    return 0 if found["unharmed"] == len(options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
