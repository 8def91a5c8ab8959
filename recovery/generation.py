"""The generation of a run: how many requests to forget are committed. It is kept in the run folder and only ascends.

What a run saves, sends and loads says its generation (`pipeline.state.source`); what is of another is never used.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.wire import WireError, checked, parse
from recovery.disk import write_flushed

_FILE = "generation.json"


class GenerationError(RuntimeError):
    """The generation of a run that cannot be read, or would not ascend. Names the file."""


def read_generation(out: Path) -> int:
    """That of a run folder; 0 where nothing was committed yet. Raises GenerationError for a file that is none."""
    path = out / _FILE
    try:
        found = checked(parse(path.read_bytes(), _FILE), _FILE, generation=int)["generation"]
    except FileNotFoundError:
        return 0
    except (WireError, OSError) as error:
        raise GenerationError(f"{path} cannot be read ({error}); without it nobody knows what is forgotten") from error
    if found < 0:
        raise GenerationError(f"{path} says {found}; expected 0 or more")
    return found


def raise_generation(out: Path, to: int) -> None:
    """Make `to` the generation of a run, on the disk before this returns. Raises GenerationError where it would not
    ascend; to say again what is said already is no matter."""
    now = read_generation(out)
    if to < now:
        raise GenerationError(f"{out / _FILE} says {now}; a generation only ascends, and {to} is asked for")
    write_flushed(out / _FILE, json.dumps({"generation": to}).encode())
