"""A million messages through a ring of processes that share memory, while processes are killed and views change.

    python benchmarks/soak_links.py --out benchmarks/results
    python benchmarks/soak_links.py --messages 20000 --seed 3      # to try the script

Each worker of a ring sends to the next one and takes from the one before, over the engine's own links, edited from view
to view by the engine's own communicator. A message has 0 B to 1 MiB, evenly by its logarithm, and contents that follow
from (view, step, sender, number) alone: pieces of random bytes, compared in full when it is taken, and of every eighth
once more when it is let go. Messages are taken in random order, and kept for a while. A step is so many messages of
each worker; it counts when all have taken theirs. Now and then a worker is killed by SIGKILL, at whatever it does, and
another takes its place; or a view begins with nobody lost, in the same ring or another one. Then the step begins again,
and what was under way is stale.

Lost: a message that has not come within its deadline. Repeated: one that is filed twice. Torn: one whose contents are
others. Any of them, or a worker that does not come on, ends the soak with an error. Writes soak-links.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

# The packages come before scripts beside this one: recovery is both.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from engine_ours import hosted_store
from torch import Tensor

from launch.forkserver import ForkServer
from launch.worker_main import connect
from pipeline.runtime.groups import GroupBuilder
from pipeline.runtime.mailbox import LinkError, Mailbox
from pipeline.runtime.reducer import Reducer
from pipeline.runtime.transport import Transport, link_pairs
from pipeline.schedule.ops import Op
from recovery.communicator import Communicator, all_kept

MIB = 1 << 20
RING = 4
AHEAD = 12
"""Messages that a worker has sent before it takes the first."""
KEEPS = 6
"""Messages that it keeps at most."""
WAIT_S = 60.0
POLL_S = 0.002
COUNTS = ("taken", "bytes", "stale", "views")
_MASK = (1 << 64) - 1


def mixed(*words: int) -> int:
    """64 bits that follow from some numbers: SplitMix64 (Steele et al. 2014) over them."""
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state + (word + 1) * 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class Contents:
    """What each message holds: a piece of 4 MiB of random words."""

    def __init__(self) -> None:
        self._words = torch.randint(-(2**62), 2**62, (4 * MIB // 8,), generator=torch.Generator().manual_seed(1))

    def of(self, view: int, step: int, sender: int, number: int) -> Tensor:
        """A view of the words: it is never written."""
        drawn = mixed(view, step, sender, number)
        size = int(2 ** (20 * (drawn & 0xFFFF) / 0xFFFF)) // 8 if drawn & 0x3F0000 else 0
        begin = (drawn >> 24) % (self._words.numel() - MIB // 8)
        return self._words[begin : begin + size]


class Counted(Mailbox):
    """Says when a message is filed twice, and counts those that come too late."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[Any, ...]] = set()
        self.stale = 0
        self.error = ""

    def put(self, view: int, step: int, op: Op, peer: int, deliver_at: float, payload: Tensor) -> None:
        if (view, step) < self._oldest:
            self.stale += 1
        elif (key := (view, step, op, peer)) in self.seen:
            self.error = f"repeated: {op} from worker {peer} in view {view}, step {step}"
        else:
            self.seen.add(key)
        super().put(view, step, op, peer, deliver_at, payload)

    def advance(self, view: int, step: int) -> None:
        super().advance(view, step)
        self.seen = {key for key in self.seen.copy() if key[:2] >= (view, step)}


class SoakError(RuntimeError):
    """What must not happen."""


# ---- a worker ----


def entry(payload: dict[str, Any]) -> int:
    """What a forked worker does."""
    torch.set_num_threads(1)
    store = connect(payload["store"], WAIT_S)
    try:
        Worker(store, payload).run()
    except Exception as error:
        store.set("failed", f"worker {payload['worker']}: {type(error).__name__}: {error}")
        return 1
    return 0


class Worker:
    def __init__(self, store: dist.Store, payload: dict[str, Any]) -> None:
        self.me, self.store, self.each = int(payload["worker"]), store, int(payload["each"])
        self.random, self.contents = random.Random(payload["seed"] * 1000 + self.me), Contents()
        self.box = Counted()
        self.transport = Transport(self.me, mailbox=self.box)
        reducer = Reducer(self.me, lambda _: torch.zeros(1), timeout_s=WAIT_S)
        builder = GroupBuilder(store, self.me, "127.0.0.1", torch.device("cpu"), WAIT_S, self.box.woken)
        self.communicator = Communicator(self.transport, reducer, builder, MIB, demanded=True)
        self.step, self.counts = 0, dict.fromkeys(COUNTS, 0)
        self.newest = int(payload["view"])
        threading.Thread(target=self._watch, args=(connect(payload["store"], WAIT_S),), daemon=True).start()

    def _watch(self, store: dist.Store) -> None:
        """Wake the worker for every new view."""
        while True:
            with suppress(dist.DistStoreError):
                store.wait([f"view/{self.newest + 1}"], timedelta(seconds=1))
                self.newest += 1
                self.box.wake(self.newest, f"view {self.newest} has begun")

    def run(self) -> None:
        """Steps and views, until the store says that it is enough."""
        number = self.newest
        while True:
            try:
                ring = self._enter(number)
                while not self.store.check(["over"]):
                    self._step(number, ring)
                self.transport.close()
                return
            except LinkError as error:
                number = self._next(number, error)

    def _next(self, number: int, error: LinkError) -> int:
        """The view after one that has ended by a loss or by itself. A message that is lost ends no view."""
        if "did not come within" in str(error):
            raise SoakError(f"lost: {error}")
        deadline = time.monotonic() + WAIT_S
        while self.newest <= number:
            if self.store.check(["over"]):
                return number
            if time.monotonic() > deadline:
                raise SoakError(f"no view came after {number}, which ended with: {error}")
            time.sleep(POLL_S)
        return self.newest

    def _all(self, keys: list[str], view: int) -> None:
        """Wait for some keys. Raises LinkError where a new view comes first."""
        deadline = time.monotonic() + WAIT_S
        while not self.store.check(keys):
            if self.newest > view:
                raise LinkError(f"view {view} has ended")
            if time.monotonic() > deadline:
                raise SoakError(f"view {view}: {keys} did not come")
            time.sleep(POLL_S)

    def _enter(self, view: int) -> list[int]:
        """Go into a view with all others: keep the links that both ends have, build the others, agree on the step."""
        ring = json.loads(self.store.get(f"view/{view}"))
        self.transport.view = view
        self.box.advance(view, 0)
        self.communicator.quiesce(set(ring), time.monotonic() + WAIT_S)
        self.store.set(f"told/{view}/{self.me}", json.dumps({"step": self.step, **self.communicator.kept()}))
        self._all([f"told/{view}/{other}" for other in ring], view)
        told = {other: json.loads(self.store.get(f"told/{view}/{other}")) for other in ring}
        self.communicator.agree(all_kept(told), time.monotonic() + WAIT_S)
        pairs = link_pairs({(a, ring[i - 1]) for i, a in enumerate(ring)})
        self.communicator.edit(view, pairs, {})
        self.store.set(f"ready/{view}/{self.me}", "")
        self._all([f"ready/{view}/{other}" for other in ring], view)
        self.communicator.confirm()
        self.step = max(each["step"] for each in told.values())  # who saw that all were done tells the others
        self.box.advance(view, self.step)
        self.counts["views"] += 1
        return ring

    def _step(self, view: int, ring: list[int]) -> None:
        """Send all messages of a step, and take all: it counts when everybody has."""
        at = ring.index(self.me)
        before, after = ring[at - 1], ring[(at + 1) % len(ring)]
        open_, kept = list[int](), list[tuple[int, Tensor]]()
        for number in range(self.each + AHEAD):
            if number < self.each:
                payload = self.contents.of(view, self.step, self.me, number)
                self.transport.send(self.step, Op("F", (0, 1), number), after, payload)
                open_.append(number)
            if number >= AHEAD:
                self._take(view, before, open_.pop(self.random.randrange(min(len(open_), AHEAD))), kept)
            while len(kept) > self.random.randrange(KEEPS + 1):
                self._let_go(view, before, *kept.pop(self.random.randrange(len(kept))))
        while kept:
            self._let_go(view, before, *kept.pop())
        if self.box.error:
            raise SoakError(self.box.error)
        self.store.set(f"done/{view}/{self.step}/{self.me}", "")
        self._all([f"done/{view}/{self.step}/{other}" for other in ring], view)
        self.step += 1
        self.box.advance(view, self.step)
        self.counts |= {"stale": self.box.stale, "slots": sum(link.slots for link in self.transport.links.values())}  # type: ignore[union-attr]
        self.store.set(f"counts/{self.me}", json.dumps({**self.counts, "step": self.step}))

    def _take(self, view: int, peer: int, number: int, kept: list[tuple[int, Tensor]]) -> None:
        found = self.transport.receive(self.step, Op("F", (0, 1), number), peer, time.monotonic() + WAIT_S)
        self._check(found, view, peer, number)
        self.counts["taken"] += 1
        self.counts["bytes"] += found.nbytes
        kept.append((number, found))

    def _let_go(self, view: int, peer: int, number: int, found: Tensor) -> None:
        if number % 8 == 0:  # of what was kept meanwhile, some is read again
            self._check(found, view, peer, number)

    def _check(self, found: Tensor, view: int, peer: int, number: int) -> None:
        if not torch.equal(found, self.contents.of(view, self.step, peer, number)):
            raise SoakError(f"torn: message {number} of worker {peer} in view {view}, step {self.step}")


# ---- who starts, kills, and counts ----


class Soak:
    def __init__(self, store: dist.Store, address: dict[str, Any], forkserver: ForkServer, options: Any) -> None:
        self.store, self.address, self.forkserver, self.options = store, address, forkserver, options
        self.random = random.Random(options.seed)
        self.ring, self.view, self.next = list(range(RING)), 1, RING
        self.pids: dict[int, int] = {}
        self.kills = self.changes = 0
        self.counts: dict[int, dict[str, int]] = {}

    def start(self, worker: int) -> None:
        payload = {"store": self.address, "worker": worker, "view": self.view, "each": self.options.each}
        self.pids[self.forkserver.start({**payload, "seed": self.options.seed})] = worker

    def publish(self) -> None:
        self.store.set(f"view/{self.view}", json.dumps(self.ring))

    def step(self) -> int:
        """The steps that count."""
        for worker in range(self.next):
            if self.store.check([key := f"counts/{worker}"]):
                self.counts[worker] = json.loads(self.store.get(key))
        return max((each["step"] for each in self.counts.values()), default=0)

    def disturb(self) -> None:
        """Kill a worker and put another in its place, or begin a view with nobody lost."""
        if self.random.random() < 0.5:
            pid = self.random.choice(list(self.pids))
            os.kill(pid, signal.SIGKILL)
            self.kills += 1
            while not any(ended.pid == pid for ended in self.forkserver.poll(0.05)):
                pass
            lost = self.pids.pop(pid)
            self.ring[self.ring.index(lost)] = self.next
            self.view += 1
            self.next += 1
            self.publish()
            self.start(self.next - 1)
        else:
            if self.random.random() < 0.5:
                self.random.shuffle(self.ring)
            self.changes += 1
            self.view += 1
            self.publish()

    def run(self) -> dict[str, Any]:
        """Raises SoakError."""
        began = told = moved = time.monotonic()
        self.publish()
        for worker in self.ring:
            self.start(worker)
        step, due = 0, began + 2.0
        while step * RING * self.options.each < self.options.messages:
            time.sleep(0.05)
            if self.store.check(["failed"]):
                raise SoakError(self.store.get("failed").decode())
            for ended in self.forkserver.poll(0.0):
                raise SoakError(f"worker {self.pids.get(ended.pid)} ended by itself: {ended}")
            now = time.monotonic()
            if (newest := self.step()) > step:
                step, moved = newest, now
            if now - moved > 2 * WAIT_S:
                raise SoakError(f"nothing has come on for {2 * WAIT_S:g} s, at step {step}, view {self.view}")
            if now > due:
                self.disturb()
                due = time.monotonic() + self.random.uniform(0.0, 2 * self.options.every)
            if now - told > 10:
                told = now
                print(f"{now - began:5.0f} s: {step * RING * self.options.each} messages, {self.kills} kills, "
                      f"view {self.view}", flush=True)  # fmt: skip
        self.store.set("over", "")
        deadline = time.monotonic() + WAIT_S
        while self.pids and time.monotonic() < deadline:
            for ended in self.forkserver.poll(0.05):
                if ended.code:
                    raise SoakError(f"worker {self.pids.get(ended.pid)} did not end well: {ended}")
                self.pids.pop(ended.pid, None)
        step = self.step()
        return {
            "messages": step * RING * self.options.each, "steps": step, "kills": self.kills,
            "views_with_nobody_lost": self.changes, "views": self.view,
            **{name: sum(each[name] for each in self.counts.values()) for name in ("taken", "bytes", "stale")},
            "most_slots_of_a_worker": max(each["slots"] for each in self.counts.values()),
            "lost": 0, "repeated": 0, "torn": 0, "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1_000_000, help="that count, at least")
    parser.add_argument("--each", type=int, default=500, help="messages of a worker in a step")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between disturbances, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for soak-links.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(1)
    forkserver = ForkServer(entry)  # before anything starts threads
    soak = None
    try:
        with hosted_store() as (store, address):
            soak = Soak(store, address, forkserver, options)
            found = soak.run()
    except SoakError as error:
        print(f"seed {options.seed}: {error}")
        return 1
    finally:
        for pid in {} if soak is None else soak.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        forkserver.close()
    print(", ".join(f"{value} {name.replace('_', ' ')}" for name, value in found.items()))
    if options.out is not None:
        about = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count(),
                 "ring": RING, "each": options.each, "seed": options.seed}  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "soak-links.json").write_text(json.dumps({"about": about, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
