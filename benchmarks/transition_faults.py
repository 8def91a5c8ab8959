"""What refuses the known bugs of a transition: our certificate, and torch's distributed checkpoint with its defaults.

    python benchmarks/transition_faults.py --out benchmarks/results

Each bug class is planted in a move between three of our workers, which then testify (transition_bugs.py), and in a save
by two processes that three others load (transition_dcp.py). `passes silently` says how many entries of the loaded state
are not what was trained. The second table says what the certificate costs beside a move of all states of a model
(transition_cost.py): hashes of all that both workers hold, before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.transition_bugs import BEYOND, BUGS, transition  # noqa: E402
from benchmarks.transition_cost import pair_main, summarise  # noqa: E402
from benchmarks.transition_dcp import SIZES, rank_main  # noqa: E402
from launch.forkserver import ForkServer  # noqa: E402

CLEAN = "clean"
DEADLINE_S = 120.0


def process(payload: dict[str, Any]) -> int:
    """What a forked process does."""
    return pair_main(payload) if payload["act"] == "cost" else rank_main(payload)


def together(forkserver: ForkServer, count: int, **payload: Any) -> None:
    """So many processes, to their end. Raises RuntimeError where one fails or they take too long."""
    left = {forkserver.start({"rank": rank, **payload}) for rank in range(count)}
    while left:
        ended = forkserver.poll(DEADLINE_S)
        if not ended or any(each.code for each in ended):
            raise RuntimeError(f"{payload['act']}: {', '.join(map(str, ended)) or f'not done in {DEADLINE_S:g} s'}")
        left -= {each.pid for each in ended}


def ours() -> dict[str, str]:
    """Bug -> what the certificate says, "" where it passes."""
    found = {CLEAN: transition().certificate()["error"]}
    return found | {bug.name: transition(bug).certificate()["error"] for bug in (*BUGS, *BEYOND)}


def theirs(forkserver: ForkServer, folder: Path) -> dict[str, Any]:
    """Bug -> what DCP says, and what it has loaded."""
    for act, count in SIZES.items():
        together(forkserver, count, act=act, folder=str(folder))
    return json.loads((folder / "load.json").read_text())


def row(name: str, ours: str | None, dcp: Mapping[str, Any]) -> dict[str, Any]:
    """A bug by both, each with a verdict: refused, passes silently, or loads right."""
    wrong = len(dcp.get("wrong", []))
    told = "refused" if dcp["error"] else "passes silently" if wrong else "right"
    return {
        "bug": name, "ours": None if ours is None else "refused" if ours else "passes", "ours_says": ours or "",
        "dcp": told, "dcp_at": dcp["at"], "dcp_says": dcp["error"], "dcp_wrong": wrong,
    }  # fmt: skip


def faults_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="planted in a transition")
    for heading in ("bug class", "ours", f"DCP, torch {torch.__version__}"):
        table.add_column(heading, overflow="fold")
    for each in rows:
        mine = "n/a: no copy that is written beside the training" if each["ours"] is None else each["ours"]
        mine += f": {each['ours_says'][:46]}" if each["ours_says"] else ""
        said = each["dcp"] + (f" at {each['dcp_at']}: {each['dcp_says'][:60]}" if each["dcp_says"] else "")
        table.add_row(each["bug"], mine, said + (f", {each['dcp_wrong']} entries wrong" if each["dcp_wrong"] else ""))
    return table


def costs_table(costs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="what the certificate costs")
    for heading in ("model", "state, GB", "move, GB/s", "memcpy, GB/s", "hash, GB/s", "certificate / move", "by CPU"):
        table.add_column(heading)
    for each in costs:
        share = "{median:.2f} ({least:.2f}-{most:.2f})".format(**each["cpu_of_move"])
        speeds = [f"{each[key]:.2f}" for key in ("move_gb_s", "memcpy_gb_s", "hash_gb_s", "certificate_of_move")]
        table.add_row(each["model"], f"{each['bytes'] / 1e9:.3f}", *speeds, share)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["llama-2m", "llama-17m:32"], help="PRESET or PRESET:LAYERS")
    parser.add_argument("--rounds", type=int, default=5, help="moves of each")
    parser.add_argument("--json", action="store_true", help="print the result and nothing else")
    parser.add_argument("--out", type=Path, help="folder for transition-faults.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    forkserver = ForkServer(process)
    try:
        with tempfile.TemporaryDirectory(prefix="transition-") as name:
            mine, dcp, costs = ours(), theirs(forkserver, Path(name)), []
            for model in options.models:
                together(forkserver, 2, act="cost", folder=name, model=model, rounds=options.rounds)
                costs.append(summarise(Path(name), model))
    finally:
        forkserver.close()
    rows = [row(bug, mine.get(bug), said) for bug, said in dcp.items()]
    planted = [each for each in rows if each["bug"] in {bug.name for bug in BUGS}]
    found = {
        "torch": torch.__version__, "planted": len(planted),
        "refused": {
            "ours": sum(each["ours"] == "refused" for each in planted),
            "dcp": sum(each["dcp"] == "refused" for each in planted),
        },
        "faults": rows, "costs": costs,
    }  # fmt: skip
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "transition-faults.json").write_text(json.dumps(found, indent=1) + "\n")
    if options.json:
        print(json.dumps(found))
        return 0
    console = Console(width=150)
    console.print(faults_table(rows), costs_table(costs))
    refused = found["refused"]
    console.print(f"of {len(planted)} planted: ours refuses {refused['ours']}, DCP {refused['dcp']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
