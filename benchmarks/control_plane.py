"""What agreeing costs, by the number of workers: a commit, and a view in which one of them is replaced.

    python benchmarks/control_plane.py --out benchmarks/results

The members are simulated: one process votes for all of them in turn, over torch's store in memory, through the code
that real workers run (recovery/commit.py, recovery/member.py, recovery/policy.py). No network, no model. Seconds are
those of all members together on one core; each share is given by itself: a member's own, and what the last to vote does
for all. `view` is the coordinator's next view (what moves, and its text), what every member reads of it, and both votes
by which it begins. A layout of many thousand ops is read by the worker that has come alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the packages come before scripts beside this one

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pipeline.runtime.peak_flops import Capability
from pipeline.runtime.peak_memory import PeakMemory
from pipeline.runtime.step_commit import Combine, Vote, agree
from pipeline.runtime.terms import StepTerms
from pipeline.schedule.layout import EVALUATE, TRAIN, Layout, sends
from pipeline.schedule.lower import lower
from recovery.certificate import Witness, certify
from recovery.commit import Ballot
from recovery.member import combine_ready
from recovery.membership import View, next_view, parts_of, publish, read_layout, read_view
from recovery.policy import Recovery
from recovery.remedy import states_of
from schedulers import plan

COMMIT_S, VIEW_S = 0.050, 1.0
"""The goals at 1,024 members."""
STAGES = 32


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and what came of it."""
    began = time.process_time()
    found = act()
    return time.process_time() - began, found


class Members:
    """Workers of one run: `stages` x replicas, each stage a layer beside both ends."""

    def __init__(self, count: int, microbatches: int) -> None:
        stages = min(STAGES, count)
        self.count, self.replicas, self.microbatches = count, count // stages, microbatches
        self.layers = stages + 2
        train = lower(plan("one_f_one_b", [1.0] * self.layers, stages, microbatches * self.replicas, self.replicas))
        evaluated = plan("one_f_one_b", [1.0] * self.layers, stages, 4, self.replicas, evaluated=self.replicas)
        self.layout = Layout({TRAIN: train, EVALUATE: lower(evaluated)})
        workers = tuple(range(count))
        self.view = View(
            1, workers, self.layout.key, details={"attempt": 1}, places={w: w for w in workers},
            agents=dict.fromkeys(workers, 0), next_worker=count,
        )  # fmt: skip
        self.store = dist.HashStore()
        publish(self.store, self.view, self.layout)

    def vote(
        self, view: View, iteration: int, payload: Callable[[int], dict[str, Any]], combine: Combine
    ) -> list[float]:
        """Everybody votes and reads the outcome; seconds of [voting, combining, reading]."""
        ballots = [Ballot(self.store, view.number, w, view.workers) for w in view.workers]
        spent = [0.0, 0.0, 0.0]
        for ballot in ballots:
            ballot._await = lambda *_: b"commit\n{}"  # type: ignore[method-assign]
        conclude = ballots[-1]._conclude

        def concluding(number: int, how: Combine) -> None:
            spent[1] += timed(lambda: conclude(number, how))[0]

        ballots[-1]._conclude = concluding  # type: ignore[method-assign]
        payloads = [payload(ballot.worker) for ballot in ballots]
        for ballot, each in zip(ballots, payloads, strict=True):
            spent[0] += timed(partial(ballot, iteration, each, time.monotonic() + 60, combine))[0]
        spent[0] -= spent[1]
        key = f"view{view.number}/outcome/{iteration}"
        for _ in ballots:
            spent[2] += timed(lambda: json.loads(self.store.get(key).split(b"\n", 1)[1]))[0]
        return spent

    # ---- a step ----

    def commit(self, iteration: int) -> list[float]:
        """A step: the last stage of each replica tells its losses, the first holder of each layer a norm."""
        schedule, total = self.layout.train, self.microbatches * self.replicas
        terms = StepTerms({"text": 1.0}, tuple({"text": 2048} for _ in range(total)), ())
        states = [str(layer) for layer in range(self.layers)]
        last = max(schedule.holders)
        computed = {m: w for (kind, span, m), w in schedule.home.items() if kind == "F" and span == last}
        mine: dict[int, list[int]] = {}
        for m, worker in computed.items():
            mine.setdefault(worker, []).append(m)
        owned = {places[0]: [str(n) for n in range(*span)] for span, places in schedule.holders.items()}

        def payload(worker: int) -> dict[str, Any]:
            losses = {m: {"text": torch.tensor(2.0 + m / 7)} for m in mine.get(worker, ())}
            squares, memory = dict.fromkeys(owned.get(worker, ()), 0.1234567), PeakMemory(5 << 30, 70 << 30)
            return Vote(losses, squares, {"stop": False}, 0.5, memory).as_json()

        def combine(votes: Any) -> dict[str, Any]:
            return vars(agree(7, terms, states, votes)) | {}

        return self.vote(self.view, iteration, payload, combine)

    # ---- a view ----

    def change(self) -> dict[str, float]:
        """Worker 1 is lost and replaced; seconds by what they go into."""
        recovery = Recovery("auto", self.view, self.layout, self.layers, False, Path("nowhere"))
        planned, after = timed(lambda: recovery.after_loss(self.view, (1,)))
        assert after == next_view(self.view, (1,)) or after.moves
        written, _ = timed(lambda: publish(self.store, after, self.layout))
        read, _ = timed(lambda: [read_view(self.store, after.number) for _ in after.workers])
        joiner, _ = timed(lambda: read_layout(self.store, after, 1))
        holders, at = self.layout.holders, after.at
        located, every = timed(lambda: [parts_of(after, holders, self.layers, False) for _ in after.workers])
        parts = every[0]
        peers: dict[int, set[int]] = {w: set() for w in after.workers}
        for a, b in sends(self.layout.train):
            peers[at[a]].add(at[b])
            peers[at[b]].add(at[a])
        norms = {str(layer): 0.1234567 for layer in range(self.layers)}
        position = {"step": 6, "due": False, "stopping": False, "again": False}

        def ready(worker: int) -> dict[str, Any]:
            came = worker in after.joined
            return {
                "position": None if came else position, "last": None, "norms": {} if came else norms,
                "links": [] if came else sorted(peers[worker] - set(after.joined)),
                "sums": {} if came else {part: 7 for part, workers in parts.items() if worker in workers},
                "capability": Capability(f"cpu of worker {worker}").as_json(),
            }  # fmt: skip

        places = {name: workers for part, workers in parts.items() for name in states_of(part)}
        given = {(source, name) for m in after.moves for source, part in m.sources for name in states_of(part)}

        def testimony(worker: int) -> dict[str, Any]:
            holds = {name: 123456789 for name, workers in places.items() if worker in workers}
            gave = {name: 123456789 for name in places if (worker, name) in given}
            return asdict(Witness(holds, gave, keys=position))

        def certified(votes: Any) -> dict[str, Any]:
            found = certify(places, after.moves, votes)
            assert not found["error"], found
            return found

        first = self.vote(after, 1, ready, combine_ready)
        second = self.vote(after, 2, testimony, certified)
        return {
            "planned": planned + written, "read": read + located + joiner, "voted": first[0] + second[0],
            "combined": first[1] + second[1], "outcomes": first[2] + second[2],
        }  # fmt: skip


def measure(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one number of members: medians, and the spread of the totals."""
    members = Members(count, options.microbatches)
    steps = [members.commit(iteration) for iteration in range(1, options.repeats + 1)]
    views = [Members(count, options.microbatches).change() for _ in range(max(1, options.repeats // 4))]
    commit = [sum(step) for step in steps]
    change = [sum(view.values()) for view in views]
    return {
        "members": count, "stages": min(STAGES, count), "ops": sum(map(len, members.layout.train.lanes.values())),
        "commit_s": statistics.median(commit), "commit_spread": [min(commit), max(commit)],
        "commit_member_s": statistics.median((s[0] + s[2]) / count for s in steps),
        "commit_last_s": statistics.median(s[1] for s in steps),
        "view_s": statistics.median(change), "view_spread": [min(change), max(change)],
        "view_parts_s": {name: statistics.median(view[name] for view in views) for name in views[0]},
    }  # fmt: skip


def main() -> int:
    """Measure, print, save. Returns 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--microbatches", type=int, default=8, help="of each replica")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shown = Console()
    rows = [measure(n, options) for n in track(options.members, "members", console=shown, transient=True)]
    table = Table("members", "ops", "commit ms", "a member µs", "the last ms", "growth", "view ms", "growth")
    before: dict[str, Any] | None = None
    for row in rows:
        grown = ["", ""]
        if before is not None:
            grown = [f"{row[key] / before[key]:.1f} x" for key in ("commit_s", "view_s")]
        table.add_row(
            f"{row['members']:,}", f"{row['ops']:,}", f"{1e3 * row['commit_s']:.1f}",
            f"{1e6 * row['commit_member_s']:.0f}", f"{1e3 * row['commit_last_s']:.1f}", grown[0],
            f"{1e3 * row['view_s']:.0f}", grown[1],
        )  # fmt: skip
        before = row
    shown.print(table)
    missed = [r["members"] for r in rows if r["members"] <= 1024 and (r["commit_s"] > COMMIT_S or r["view_s"] > VIEW_S)]
    shown.print(f"goals at 1,024: a commit in {1e3 * COMMIT_S:.0f} ms, a view in {VIEW_S:g} s of CPU on one core; "
                + ("met" if not missed else f"missed at {missed}"))  # fmt: skip
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        facts = {"date": str(date.today()), "cores": os.cpu_count(), "torch": torch.__version__, "simulated": True}
        text = json.dumps({"facts": facts, "goals": {"commit_s": COMMIT_S, "view_s": VIEW_S}, "rows": rows}, indent=1)
        (options.out / "control-plane.json").write_text(text + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
