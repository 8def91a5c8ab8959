"""Replays one seed, or runs many. See the package."""

from __future__ import annotations

import argparse
import sys
import traceback

from rich.console import Console
from rich.progress import track

from recovery.commit import Ballot
from tests.simulation import __doc__ as about
from tests.simulation.run import Run


def simulate(seed: int, *, log: bool = False, ballot: type[Ballot] = Ballot) -> Run:
    """One run. Raises AssertionError, with the command that replays it, where something does not hold."""
    run = Run(seed, log=log, ballot=ballot)
    try:
        run.execute()
    except Exception as error:
        if log:
            traceback.print_exception(error)
        raise AssertionError(
            f"seed {seed}: {type(error).__name__}: {error}; replay: python -m tests.simulation --seed {seed}"
        ) from error
    return run


def many(seeds: range) -> str:
    """Run them all; what came of it. Raises AssertionError."""
    well = commits = faults = 0
    for seed in track(seeds, "seeds", transient=True):
        run = simulate(seed)
        well += run.codes.get(0) == 0
        commits, faults = commits + len(run.committed), faults + len(run.faults)
    return (
        f"{len(seeds):,} runs, {faults:,} faults, {commits:,} commits; {well:,} ended well, {len(seeds) - well:,} by a "
        "named error: all invariants hold"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="replay this one, and print what happens")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    if options.seed is None:
        Console().print(many(range(options.first, options.first + options.seeds)))
        return 0
    try:
        run = simulate(options.seed, log=True)
    except AssertionError:
        return 1
    Console().print(f"ended with {run.codes}, {len(run.committed)} commits, {'; '.join(run.errors) or 'no error'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
