"""What a part of benchmarks/gpu.py is given, and how its processes are started, heard and ended.

A part is a function that measures something and says each row as soon as it has it; it runs in a process of its own,
forked from one that has imported everything and has never touched CUDA. What it forks in turn, and the ranks of its
peers, run functions that are named as "module:function" and give back JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from launch.forkserver import DEAF_TO, ForkServer

_PR_SET_CHILD_SUBREAPER = 36
_ENDING_S = 10.0
_LAST_LINES = 6


class Missing(Exception):
    """A peer that cannot run here. The message says why."""


@dataclass(frozen=True)
class Case:
    """One part of one run. `folder` is the part's own and is gone afterwards; `shared` is that of all parts, where the
    weights lie; `limit_s` is how long the part may take."""

    section: str
    part: str
    folder: Path
    shared: Path
    dry: bool
    limit_s: float

    @property
    def device(self) -> str:
        """Of all that is measured."""
        return "cpu" if self.dry else "cuda:0"

    @property
    def rows(self) -> Path:
        """Where the rows go, one line of JSON each."""
        return self.folder / "rows.jsonl"

    def say(self, row: str, **figures: Any) -> None:
        """Add a row, or say it anew: the last one of a name counts."""
        with self.rows.open("a") as file:
            file.write(json.dumps({"row": row, **figures}) + "\n")

    def as_json(self) -> dict[str, Any]:
        """For `from_json`, in another process."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        """What `as_json` gave."""
        return cls(**{**values, "folder": Path(values["folder"]), "shared": Path(values["shared"])})


def read_rows(case: Case) -> list[dict[str, Any]]:
    """What a part has said so far; a line that is not whole yet is left out."""
    found: dict[str, dict[str, Any]] = {}
    if case.rows.is_file():
        for line in case.rows.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                found[row["row"]] = row
    return list(found.values())


def require(*packages: str) -> None:
    """Raise Missing, by its name, for a package that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Missing(f"not installed: {package}")


def last_lines(text: str, count: int = _LAST_LINES) -> list[str]:
    """The end of what a process wrote."""
    return [line[-300:] for line in text.strip().splitlines()[-count:]]


def entry(payload: dict[str, Any]) -> int:
    """What every forked process here does: call a function with its argument, keeping what it says and returns."""
    for signum in DEAF_TO:
        signal.signal(signum, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # whoever loses its parent below is still found here
    os.environ.update(payload.get("environment", {}))
    torch.set_num_threads(torch.get_num_threads())  # torch renews its pool after a fork: two threads at once fail in it
    answer = Path(payload["answer"])
    with open(answer.with_suffix(".log"), "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    module, _, name = payload["call"].partition(":")
    try:
        found = {"value": getattr(importlib.import_module(module), name)(payload["argument"])}
    except Missing as error:
        found = {"missing": str(error)}
    except BaseException as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"[:600], "traceback": last_lines(traceback.format_exc())}
    finally:
        end_children(os.getpid())
    unfinished = answer.with_suffix(".tmp")
    unfinished.write_text(json.dumps(found))
    unfinished.replace(answer)
    return 0


def end_children(pid: int, itself: bool = False) -> None:
    """SIGKILL all that a process has started and what these have started, and wait for their end; the process too, if
    it is to be ended `itself`."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        if itself:
            top.suspend()  # so that it starts no more while it is asked for those it has
        found = top.children(recursive=True)
        for process in [*found, *([top] if itself else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if itself:  # else nobody may be there to collect them
            psutil.wait_procs(found, timeout=_ENDING_S)


def crew(
    forkserver: ForkServer, folder: Path, call: str, arguments: Sequence[dict[str, Any]], limit_s: float,
    environment: dict[str, str] | None = None,
) -> list[Any]:  # fmt: skip
    """Call a function in one process per argument, at once, and return what each returns.

    Raises RuntimeError with what the first that failed said, or at the limit; all are ended then.
    """
    running: dict[int, int] = {}
    deadline = time.monotonic() + limit_s
    answers = [folder / f"{call.replace(':', '-')}-{i}.json" for i in range(len(arguments))]
    for answer in answers:
        answer.unlink(missing_ok=True)
    try:
        for i, argument in enumerate(arguments):
            asked = {"call": call, "argument": argument, "answer": str(answers[i]), "environment": environment or {}}
            running[forkserver.start(asked)] = i
        found: dict[int, Any] = {}
        while running:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{call}: processes {sorted(running.values())} did not end in {limit_s:.0f} s")
            for exit_ in forkserver.poll(0.1):
                i = running.pop(exit_.pid)
                answer = json.loads(answers[i].read_text()) if answers[i].is_file() else {"error": str(exit_)}
                if "missing" in answer:
                    raise Missing(answer["missing"])
                if "error" in answer:
                    log = answers[i].with_suffix(".log").read_text(errors="replace")
                    raise RuntimeError(f"process {i} of {call}: {answer['error']}; {' | '.join(last_lines(log, 4))}")
                found[i] = answer["value"]
        return [found[i] for i in range(len(arguments))]
    finally:
        for pid in running:
            end_children(pid, itself=True)
        deadline = time.monotonic() + _ENDING_S
        while running and time.monotonic() < deadline:
            for exit_ in forkserver.poll(0.1):
                running.pop(exit_.pid, None)


def synchronize(device: str) -> None:
    """Wait for all that the device has been asked for."""
    if device != "cpu":
        torch.cuda.synchronize()
