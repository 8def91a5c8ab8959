"""The peers of benchmarks/elastic.py: runs under torchft, Ray Train, nvrx and torchrun that shrink and grow.

    python benchmarks/elastic_peers.py --kills 5 --peers torchft,ray,nvrx,torchrun --json --out benchmarks/results
    python benchmarks/elastic.py --kills 20 --peers torchft,ray,nvrx,torchrun --out benchmarks/results

Each trains elastic.py's model on as many samples a step, data parallel (none of them has a pipeline), on two workers,
or on three where two survivors have to find each other. A worker is killed with SIGKILL at a random moment, alone or
with all of its machine, and another one is started once the run has gone further without it. What each is and how it
is hit is said in elastic_peer_torchft.py and its like.

Of a kill and of an arrival: seconds until the next commit with one worker less or more; until the first step that had
not been done before; steps run again until then; the longest time without a new step; samples of a step from then on.
Over the whole run: samples that no standing step has taken, or that several have. NAME has its waits tuned down as far
as its own settings allow; NAME-default has them as they come. Peers that take long are killed fewer times: see PEERS.

Each process is this script with --role, dies with who started it, and is ended on the way out, whatever happened.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

if __name__ == "__main__":  # else recovery.py here would hide the package of that name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import elastic_peer_nvrx, elastic_peer_ray, elastic_peer_torchft, elastic_peer_torchrun
from benchmarks.elastic_peer import Commits, Family, Row, samples
from benchmarks.recovery_peers import PeerError
from launch.forkserver import die_with_parent


class Peer(NamedTuple):
    run: Callable[[Family, random.Random], Iterator[Row]]
    package: str
    workers: int
    most_kills: int


def variants(
    name: str, run: Callable[..., Iterator[Row]], package: str, workers: int, most: int, **settings: tuple[Any, Any]
) -> dict[str, Peer]:
    """A peer under its two names; `settings` are pairs, tuned and default."""
    tuned, default = ({key: pair[at] for key, pair in settings.items()} for at in (0, 1))
    return {
        name: Peer(partial(run, **tuned), package, workers, most),
        f"{name}-default": Peer(partial(run, **default), package, workers, min(2, most // 2)),
    }


BOTH = (True, False)
PEERS = {
    **variants("torchft", elastic_peer_torchft.torchft, "torchft", elastic_peer_torchft.REPLICAS, 100,
               heartbeat_s=(1, 5), timeout_s=(2, 60)),
    **variants("ray", elastic_peer_ray.ray_train, "ray", elastic_peer_ray.NODES, 3, tuned=BOTH),
    **variants("nvrx", elastic_peer_nvrx.nvrx, "nvidia-resiliency-ext", elastic_peer_nvrx.RANKS, 100, tuned=BOTH),
    **variants("torchrun", elastic_peer_torchrun.torchrun, "torch", elastic_peer_torchrun.NODES, 5, tuned=BOTH),
}  # fmt: skip
INSTALL = "pip install -c constraints.txt -e '.[peers,torchft]'"
ROLES: dict[str, Callable[..., None]] = {
    **elastic_peer_torchft.ROLES, **elastic_peer_torchrun.ROLES, **elastic_peer_nvrx.ROLES, **elastic_peer_ray.ROLES,
}  # fmt: skip


def version(package: str) -> str | None:
    """The one that is installed, if any."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def spread(rows: Sequence[Row], name: str) -> dict[str, float]:
    values = sorted(row[name] for row in rows if name in row)
    return {"p50": round(statistics.median(values), 3), "most": round(values[-1], 3), "n": len(values)}


def measure(name: str, kills: int, seed: int, advance: Callable[[], None]) -> dict[str, Any]:
    """A peer's kills and arrivals: those that there were, and an error if it failed or that it is not installed."""
    peer, rows, counted = PEERS[name], list[Row](), list[dict[str, int]]()
    found: dict[str, Any] = {"workers": peer.workers, "version": version(peer.package)}
    if found["version"] is None:
        return {**found, "kills": 0, "error": f"not installed: {INSTALL}"}
    chance = random.Random(f"{seed}/{name}")
    load = [os.getloadavg()[0]]
    while len(rows) < kills and "error" not in found:  # a peer that cannot grow is started anew
        with tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as folder:
            with Family(Path(folder)) as family:
                try:
                    for row in itertools.islice(peer.run(family, chance), kills - len(rows)):
                        rows.append(row)
                        advance()
                except (PeerError, psutil.Error, OSError) as error:
                    found["error"] = str(error)
            counted.append(samples(Commits(Path(folder))()))
    load.append(os.getloadavg()[0])
    names = dict.fromkeys(key for row in rows for key in row)
    return {
        **found, "kills": len(rows), **{key: sum(each[key] for each in counted) for key in counted[0]},
        **{key: spread(rows, key) for key in names}, "load": [round(each, 2) for each in load], "rows": rows,
    }  # fmt: skip


def peers(names: Sequence[str], kills: int, seed: int, advance: Callable[[], None]) -> dict[str, Any]:
    """All of these, one after the other, and of which versions: what elastic-peers.json says."""
    return {
        "cores": os.cpu_count(), "torch": version("torch"),
        "peers": {name: measure(name, min(kills, PEERS[name].most_kills), seed, advance) for name in names},
    }  # fmt: skip


def chosen(text: str) -> list[str]:
    """Names of peers, apart by commas. Raises argparse.ArgumentTypeError."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"no peer is called {unknown[0]!r}; there are {', '.join(PEERS)}")
    return names


def report(console: Console, found: dict[str, Any]) -> None:
    """A table, and a line for each peer that failed."""
    columns = {
        "next commit": "shrink_next_s", "new step": "shrink_new_s", "again": "shrink_again", "batch": "shrink_batch",
        "grown": "grow_next_s", "grown, new step": "grow_new_s", "again ": "grow_again", "stall": "grow_stall_s",
        "batch ": "grow_batch",
    }  # fmt: skip
    table = Table(title="seconds from SIGKILL, and from the start of a new worker: p50 / most")
    for column in ("peer", "kills", *columns, "lost", "repeated"):
        table.add_column(column, justify="right")
    for name, each in found.items():
        values = [each.get(key) for key in columns.values()]
        cells = [f"{v['p50']:.3g} / {v['most']:.3g}" if v else "" for v in values]
        ends = [str(each.get(key, "")) for key in ("samples_lost", "samples_repeated")]
        table.add_row(name, str(each["kills"]), *cells, *ends)
    console.print(table)
    for name, each in found.items():
        if "error" in each:
            console.print(f"{name}: {escape(each['error'])}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="per peer")
    parser.add_argument("--peers", type=chosen, default=[*PEERS], metavar="NAMES", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result and nothing else")
    parser.add_argument("--out", type=Path, help="folder for elastic-peers.json")
    parser.add_argument("--role", choices=[*ROLES], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, default=os.getppid(), help=argparse.SUPPRESS)
    parser.add_argument("numbers", type=int, nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        die_with_parent(options.parent)
        ROLES[options.role](options.folder, *options.numbers)
        return 0
    if options.kills < 1:
        parser.error(f"--kills {options.kills}; expected at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that being stopped also stops what was started
    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        task = progress.add_task("peers", total=None)
        found = peers(options.peers, options.kills, options.seed, lambda: progress.advance(task))
    if options.json:
        print(json.dumps(found))
    else:
        report(Console(width=200), found["peers"])
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        whole = {"command": sys.argv, **found}
        (options.out / "elastic-peers.json").write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
