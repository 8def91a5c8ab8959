"""A request to forget, as its folder keeps it: what was asked, which rows that means, and how far it has come.

RUN/requests/0001/request.json      this
RUN/requests/0001/...               the files of a run, which a request is: config, checkpoints, ledger, model
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.settings import ConfigError
from pipeline.wire import WireError, checked, parse
from recovery.disk import write_flushed
from recovery.generation import read_generation

FILE = "request.json"
Status = Literal["open", "trained", "committed", "complete"]
"""open: it is worked on, and the run is as it was. trained: its model is there. committed: the run has the new
generation, and what knows more is being put away. complete: all of it is done, and the manifest is written."""
STATUSES: tuple[Status, ...] = ("open", "trained", "committed", "complete")


class RequestError(RuntimeError):
    """A request whose file is none, or that is not where it should be. Names the file."""


@dataclass(frozen=True)
class Request:
    """`forget` and `retain` are parts of the run's rows; `generation` is the one that the run has once it is
    committed; `step` is that of the run's checkpoint from which it begins. `idk` are answers as tokens."""

    number: int
    generation: int
    step: int
    asked: str
    method: str
    forget: tuple[int, ...]
    retain: tuple[int, ...]
    rows: tuple[dict[str, str], ...]
    """All of those to forget, whether the run has learned them or not: id and digest."""
    idk: tuple[tuple[int, ...], ...] = ()
    others: tuple[str, ...] = ()
    """Kinds that have rows of their own, in folders of these names."""
    near: tuple[int, ...] = ()
    """The rows to keep that steps take; none for all of `retain`."""
    neurons: int = 0
    """How many neurons are updated, and nothing else; 0 for all weights."""
    status: Status = "open"
    reapplies: int = 0
    """The request whose update it applies again, if it does: then it has no rows of its own to forget."""

    def at(self, status: Status) -> Request:
        """The same, further on."""
        return replace(self, status=status)

    def write(self, folder: Path) -> Request:
        """Keep it, whole and on the disk before this returns."""
        folder.mkdir(parents=True, exist_ok=True)
        write_flushed(folder / FILE, json.dumps(asdict(self), indent=1).encode())
        return self

    @classmethod
    def read(cls, folder: Path) -> Request:
        """What a folder keeps. Raises RequestError."""
        path = folder / FILE
        try:
            kinds: dict[str, Any] = {
                "number": int, "generation": int, "step": int, "asked": str, "method": str, "forget": list,
                "retain": list, "rows": list, "idk": list, "others": list, "near": list, "neurons": int, "status": str,
                "reapplies": int,
            }  # fmt: skip
            found = checked({"reapplies": 0, **parse(path.read_bytes(), FILE)}, FILE, **kinds)
        except (OSError, WireError) as error:
            raise RequestError(f"{path} cannot be read as a request: {error}") from error
        if found["status"] not in STATUSES:
            raise RequestError(f"{path} says status {found['status']!r}; allowed: {', '.join(STATUSES)}")
        found["idk"] = tuple(tuple(answer) for answer in found["idk"])
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
        return cls(**values)


def folder_of(run: Path, number: int) -> Path:
    """Where a request of a run lies."""
    return run / "requests" / f"{number:04d}"


def next_number(before: Sequence[Request]) -> int:
    """That of the request after those of a run."""
    return max((each.number for each in before), default=0) + 1


def lay_out(run: Path, number: int) -> Path:
    """The folder of a new request, with what it has of its run, in place of one that never became a request."""
    folder = folder_of(run, number)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("tokenizer", "model-config"):
        shutil.copytree(run / name, folder / name)
    return folder


def requests_of(run: Path) -> Sequence[Request]:
    """All requests of a run, in their order. Raises RequestError for a folder that keeps none."""
    folders = sorted(path for path in (run / "requests").glob("[0-9][0-9][0-9][0-9]") if path.is_dir())
    return [Request.read(folder) for folder in folders if (folder / FILE).is_file()]


def require_complete(run: Path) -> None:
    """Raise ConfigError where a request is committed and what follows is not done: until then rows that are forgotten
    are still among the run's tokens."""
    now = read_generation(run)
    for each in requests_of(run):
        if each.status != "complete" and each.generation <= now:
            raise ConfigError(
                f"request {each.number} is committed and not complete; allowed: `unbroken unlearn {run} --resume` first"
            )
