"""The fault matrix: every kind of fault at every point of a step and of a change of membership, in real runs.

    python benchmarks/matrix.py --out benchmarks/results
    python benchmarks/matrix.py --only kill,gil --at forward,copy

A cell is a small run of three or four processes that is hit once; at recovery, join and copy, which follow a loss,
another worker is killed first. It ends well (`correct`: the weights are bitwise those of a run of another size that
nothing happened to, and the ledger has every sample once), or it saves itself as it was asked to (`saved`, code 75), or
by an error that says what was lost or found wrong (`named`, code 1 or 93); a run that was saved or ended by an error is
resumed, and has to end as the calm one does. Anything else is WRONG, and so is a process that is left behind; what
takes more than the deadline is a HANG. Seconds are from the fault to the next commit, or to the end. A bit flipped in a
copy harms nobody by itself, so another worker is lost after it; in flip-other-lost that is the one with the only other
copy, so that nothing is left to compare with. nan-in-a-save is of a step that is saved. A new kind or point is a word
in KINDS or POINTS of matrix_cells.py; with --only or --at the other cells of matrix.json stay as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path[0] = str(Path(__file__).parent.parent)  # else benchmarks/recovery.py would hide the package of that name

from benchmarks.matrix_cells import GOOD, POINTS, ROWS, STORE, Found, calm, cells, run_cell, store_lost  # noqa: E402
from benchmarks.runs import command  # noqa: E402
from launch.forkserver import ForkServer  # noqa: E402


def entry(payload: dict[str, Any]) -> int:
    """The entry of a ForkServer."""
    return command({"arguments": payload["argv"], "log": payload["log"]})


def table(found: Sequence[Found]) -> Table:
    """Rows and columns of what was found."""
    points = [at for at in (*POINTS, "any") if any(each.at == at for each in found)]
    shown = Table("fault", *points, caption="seconds to the next commit; s: saved itself, n: ended by a named error")
    for row in dict.fromkeys(each.row for each in found):
        at = {each.at: each for each in found if each.row == row}
        shown.add_row(row, *(word(at[point]) if point in at else "" for point in points))
    return shown


def word(found: Found) -> str:
    """A cell of the table."""
    if found.verdict not in GOOD or found.seconds is None:
        return found.verdict
    return f"{found.seconds:.2f}" + ("" if found.verdict == "correct" else f" {found.verdict[0]}")


def matrix(
    forkserver: ForkServer, rows: Sequence[str], points: Sequence[str], done: Callable[[Found, int], None]
) -> list[Found]:
    """Run all cells of these rows and columns; `done` is told of each, and how many there are."""
    wanted_cells = list(cells(rows, points))
    found: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="matrix-") as root:
        (Path(root) / "calm").mkdir()
        wanted = calm(forkserver, Path(root) / "calm")
        for cell in wanted_cells:
            folder = Path(root) / "cell"
            folder.mkdir()
            found.append(run_cell(forkserver, cell, folder, wanted))
            shutil.rmtree(folder)
            done(found[-1], len(wanted_cells))
        if STORE in rows:
            (Path(root) / "store").mkdir()
            found.append(store_lost(forkserver, Path(root) / "store"))
            done(found[-1], len(wanted_cells))
    return found


def _words(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; allowed: {', '.join(allowed)}")
        return names

    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_words(ROWS), default=list(ROWS), help="rows, apart by commas")
    parser.add_argument("--at", type=_words(POINTS), default=list(POINTS), help="points, apart by commas")
    parser.add_argument("--json", action="store_true", help="print the cells and nothing else")
    parser.add_argument("--out", type=Path, help="folder for matrix.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    forkserver, console = ForkServer(entry), Console(stderr=True)
    try:
        with Progress(console=console, disable=options.json) as progress:
            task = progress.add_task("cells", total=None)

            def done(found: Found, of: int) -> None:
                progress.update(task, advance=1, total=of)
                if found.verdict not in GOOD or not console.is_terminal:
                    progress.console.print(f"{found.row} at {found.at}: {found.verdict} {found.said}", markup=False)

            found = matrix(forkserver, options.only, options.at, done)
    finally:
        forkserver.close()
    every = [asdict(each) for each in found]
    if options.json:
        print(json.dumps(every, indent=1))
    else:
        Console(width=160).print(table(found))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "matrix.json").write_text(json.dumps(with_others(options.out / "matrix.json", every), indent=1))
    return 0 if all(each.verdict in GOOD for each in found) else 1


def with_others(path: Path, every: list[dict[str, Any]]) -> dict[str, Any]:
    """What goes into a file: the cells found, and those of earlier runs that this one has not been asked for."""
    met = {(each["row"], each["at"]) for each in every}
    earlier = json.loads(path.read_text())["cells"] if path.exists() else []
    cells = [*every, *(each for each in earlier if (each["row"], each["at"]) not in met)]
    order = [(row, at) for row in ROWS for at in (*POINTS, "any")]
    return {"command": sys.argv, "cells": sorted(cells, key=lambda each: order.index((each["row"], each["at"])))}


if __name__ == "__main__":
    sys.exit(main())
