"""A node of a Ray cluster is lost: Unbroken on Ray beside Ray Train's own elastic trainer, turn by turn.

    python benchmarks/ray_elastic.py --rounds 3 --out benchmarks/results

Each turn begins a cluster of raylets on this machine (a head without CPUs, two nodes of one), a run on it, and has one
node killed with SIGKILL, its raylet and all that it has started, at a random moment; once the run has gone further
without it a node is added. The model and the batch are those of elastic_peers.py, which runs Ray Train alone and among
others; here it is its `ray`, with waits tuned down as far as its settings allow. Ours is `unbroken train --cluster ray
--workers 1:2` with its settings as they come, `--snapshot neighbour` and `--cooldown 0`.

Of a kill and of an arrival: seconds until the next commit with one worker less or more, until the first step that had
not been done before, and steps run again until then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if __name__ == "__main__":  # else recovery.py here would hide the package of that name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.elastic_peer import Commits, Family, Line, Row, samples
from benchmarks.elastic_peer_ray import NODE, NODES, driver, ray_train, turns
from benchmarks.elastic_peers import INSTALL, spread, version
from benchmarks.recovery_peers import PeerError
from launch.forkserver import die_with_parent
from launch.run_folder import read_jsonl

FLAGS = [
    "--model", "llama-tiny", "--tokenizer", "bytes", "--max-tokens", "400000", "--sequence-length", "64",
    "--evaluate-every", "0", "--sample-tokens", "0", "--checkpoint-every", "20", "--steps", "99999", "--warmup", "20",
    "--recovery", "exact", "--exact-sums", "--snapshot", "neighbour", "--cooldown", "0", "--workers", f"1:{NODES}",
]  # fmt: skip


def ours_driver(folder: Path) -> None:
    """The cluster and the run; adds a node when `folder`/add is there."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder)}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    for _ in range(NODES):
        cluster.add_node(**NODE)
    command = [sys.executable, "-P", "-m", "launch", "train", "--cluster", "ray", "--out", str(folder / "run")]
    run = subprocess.Popen([*command, *FLAGS], env={**os.environ, "RAY_ADDRESS": cluster.address})
    while run.poll() is None:
        time.sleep(0.05)
        if (folder / "add").exists():
            (folder / "add").unlink()
            cluster.add_node(**NODE)


class OurCommits(Commits):
    """The lines of a run's ledger, as those of the peers are."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.out = folder / "run"

    def __call__(self) -> list[Line]:
        views = {1: NODES, **{e["view"]: len(e["workers"]) for e in self.lines("events") if e["event"] == "view"}}
        return [
            {**line, "world": views.get(line["view"], 0), "first": line["first_sample"], "epoch": float(line["view"])}
            for line in self.lines("ledger")
        ]

    def lines(self, name: str) -> list[Line]:
        path = self.out / f"{name}.jsonl"
        return read_jsonl(path, time=float) if path.is_file() else []


def raylets() -> list[psutil.Process]:
    """Of the nodes that have an agent."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["environ"]):
        if "UNBROKEN_AGENT" in (process.info["environ"] or {}):
            found |= {each.pid: each for each in process.parents() if each.name() == "raylet"}
    return list(found.values())


def ours(family: Family, chance: random.Random) -> Iterator[Row]:
    """As `elastic_peer_ray.ray_train`."""
    family.start("ours-driver")
    yield from turns(family, OurCommits(family.folder), chance, raylets)


def measure(name: str, chance: random.Random) -> dict[str, Any]:
    """One kill and one arrival on a cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as path:
        folder, found, load = Path(path), dict[str, Any](), os.getloadavg()[0]
        with Family(folder, "ray_elastic.py") as family:
            try:
                turns = ours(family, chance) if name == "unbroken" else ray_train(family, chance, tuned=True)
                found = dict(next(islice(turns, 1)))
            except (PeerError, psutil.Error, OSError) as error:
                found = {"error": str(error)}
        lines = OurCommits(folder)() if name == "unbroken" else Commits(folder)()
        return {**found, **samples(lines), "load": round(load, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="kills of each, turn by turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result and nothing else")
    parser.add_argument("--out", type=Path, help="folder for ray-elastic.json")
    parser.add_argument("--role", choices=["ours-driver", "ray-driver"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    parser.add_argument("numbers", type=int, nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        die_with_parent(options.parent)
        ours_driver(options.folder) if options.role == "ours-driver" else driver(options.folder, *options.numbers)
        return 0
    if version("ray") is None:
        parser.error(f"ray is not installed: {INSTALL}")
    rows: dict[str, list[dict[str, Any]]] = {"unbroken": [], "ray": []}
    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        task = progress.add_task("kills", total=2 * options.rounds)
        for number in range(options.rounds):
            for name, found in rows.items():
                found.append(measure(name, random.Random(f"{options.seed}/{number}/{name}")))
                progress.advance(task)
    names = (
        "shrink_next_s",
        "shrink_new_s",
        "shrink_again",
        "grow_next_s",
        "grow_again",
        "grow_stall_s",
        "shrink_batch",
    )
    told = {
        name: {**{key: spread(found, key) for key in names if any(key in each for each in found)}, "rows": found}
        for name, found in rows.items()
    }
    whole = {"command": sys.argv, "cores": os.cpu_count(), "ray": version("ray"), "torch": version("torch"), **told}
    if options.json:
        print(json.dumps(whole))
    else:
        table = Table(title="seconds from SIGKILL of a node, and from the start of a new one: p50 / most")
        for column in ("", "measured", *names):
            table.add_column(column, justify="right")
        for name in rows:
            cells = [f"{v['p50']:.3g} / {v['most']:.3g}" if (v := told[name].get(key)) else "" for key in names]
            done = sum("error" not in each for each in rows[name])
            table.add_row(name, f"{done} of {options.rounds}", *cells)
        console = Console(width=180)
        console.print(table)
        for name, found in rows.items():
            for each in (each for each in found if "error" in each):
                console.print(f"{name}, load {each['load']}: {each['error'][:300]}", highlight=False, markup=False)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "ray-elastic.json").write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
