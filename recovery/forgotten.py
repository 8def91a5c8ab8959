"""Which rows a run has forgotten, and what an audit is to search for: RUN/forgotten.json, written whole and flushed.

    {"requests": [{"generation": 1, "rows": [{"id": "17", "digest": "..."}], "windows": [...]}]}

An entry is written before the generation of the run is raised, and becomes true with it: of one that the run has not
reached nothing is read, and the next request replaces it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.wire import WireError, checked, listed, parse
from recovery.disk import write_flushed
from recovery.generation import read_generation
from recovery.windows import Windows

FORGOTTEN = "forgotten.json"


class ForgottenError(RuntimeError):
    """What a run has forgotten cannot be read, or would be told otherwise. Names the file, what it says and what is
    asked."""


@dataclass(frozen=True)
class ForgottenRow:
    """A row by its id and the digest of what it said, which is not kept."""

    id: str
    digest: str

    @classmethod
    def from_json(cls, values: Any) -> ForgottenRow:
        """Raises WireError for what is no row."""
        return cls(**checked(values if isinstance(values, dict) else {}, "a row", id=str, digest=str))


@dataclass(frozen=True, eq=False)
class ForgottenRequest:
    """What was forgotten when the run came to `generation`."""

    generation: int
    rows: tuple[ForgottenRow, ...]
    windows: tuple[Windows, ...]

    def as_json(self) -> dict[str, Any]:
        rows = [{"id": row.id, "digest": row.digest} for row in self.rows]
        return {
            "generation": self.generation, "rows": rows, "windows": [windows.as_json() for windows in self.windows]
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Any) -> ForgottenRequest:
        """Raises WireError for what `as_json` has not written."""
        found = checked(
            values if isinstance(values, dict) else {}, "a request", generation=int, rows=list, windows=list
        )
        if found["generation"] < 1:
            raise WireError(f"a request is of generation {found['generation']}; expected 1 or more")
        rows = listed(found["rows"], "rows", ForgottenRow.from_json)
        return cls(found["generation"], rows, listed(found["windows"], "windows", Windows.from_json))


def read_forgotten(run: Path) -> tuple[ForgottenRequest, ...]:
    """What the committed requests of a run have forgotten, in their order. Raises ForgottenError, or GenerationError
    where nobody can tell which are committed."""
    reached = read_generation(run)
    return tuple(request for request in _read(run) if request.generation <= reached)


def add_forgotten(run: Path, generation: int, rows: Sequence[ForgottenRow], windows: Sequence[Windows]) -> None:
    """Tell what is forgotten when the run comes to `generation`, on the disk before this returns. To tell the same rows
    again is no matter, and changes nothing.

    Raises ForgottenError where a generation that the run has reached is told to have forgotten other rows.
    """
    reached = read_generation(run)
    others = [request for request in _read(run) if request.generation <= reached]
    if generation < 1:
        raise ForgottenError(f"rows are to be forgotten in generation {generation}; allowed: 1 or more")
    if (told := next((r for r in others if r.generation == generation), None)) is not None:
        if set(told.rows) != set(rows):
            raise ForgottenError(
                f"{run / FORGOTTEN} says that generation {generation} has forgotten {_short(told.rows)}; asked is to "
                f"say {_short(rows)}. The run is at generation {reached}: what is forgotten stays so"
            )
        return
    request = ForgottenRequest(generation, tuple(rows), tuple(windows))
    ordered = sorted([*others, request], key=lambda each: each.generation)
    try:
        write_flushed(run / FORGOTTEN, json.dumps({"requests": [each.as_json() for each in ordered]}).encode())
    except OSError as error:
        raise ForgottenError(f"{run / FORGOTTEN} cannot be written: {error.strerror}") from error


def forgotten_digests(run: Path) -> frozenset[str]:
    """The digests of all rows that the committed requests of a run have forgotten. Raises as `read_forgotten`."""
    return frozenset(row.digest for request in read_forgotten(run) for row in request.rows)


def _read(run: Path) -> tuple[ForgottenRequest, ...]:
    """Every request that is told of, also one that is not committed."""
    path = run / FORGOTTEN
    try:
        values = checked(parse(path.read_bytes(), FORGOTTEN), FORGOTTEN, requests=list)
        return listed(values["requests"], "requests", ForgottenRequest.from_json)
    except FileNotFoundError:
        return ()
    except (WireError, OSError) as error:
        raise ForgottenError(f"{path} cannot be read ({error}); without it nobody knows what is forgotten") from error


def _short(rows: Sequence[ForgottenRow]) -> str:
    return f"{len(rows)} rows" + (f", the first {rows[0].id!r}" if rows else "")
