"""Runs the parts of benchmarks/gpu.py one after another, each in a forked process with a deadline, and keeps gpu.json.

The file is written anew, whole, whenever there is something new. A part that runs over is ended with all that it has
started, and is told as cut, with the rows that it had said.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_engine  # noqa: F401  (what the parts import is there before they are forked)
import gpu_links  # noqa: F401
import gpu_offload  # noqa: F401
import gpu_peers  # noqa: F401
import gpu_recovery  # noqa: F401
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from gpu_case import Case, end_children, entry, last_lines, read_rows
from gpu_machine import about
from gpu_report import goals, show
from gpu_sections import GOALS, SECTIONS, Part, Section

import launch.train  # noqa: F401
from launch.forkserver import ForkServer
from launch.warm import warm_up
from pipeline.state.host_store import store_path

DONE, CUT, FAILED, MISSING = "done", "cut", "failed", "missing"
_LEAST_S = 4.0
"""A part for which less time than this is left is not begun."""
_POLL_S = 0.1
_ENDING_S = 10.0


@dataclass
class Report:
    """What is known of a run, and its file. `found` has a list of parts by section."""

    path: Path
    about: dict[str, Any]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self) -> None:
        """Replace the file: whoever reads it finds it whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"about": self.about, "sections": self.found, "goals": goals(GOALS, self.found)}
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(whole, indent=1) + "\n")
        unfinished.replace(self.path)


def run(asked: Sequence[str], dry: bool, seconds: float, out: Path, scratch: Path) -> int:
    """Run the sections asked for, and show what was found. Returns the exit code."""
    from jobs.config import TrainConfig

    warm_up(TrainConfig(model="llama-2m"))
    forkserver = ForkServer(entry)  # before anything here starts a thread
    clear_locks()
    began = time.monotonic()
    sections = [each for each in SECTIONS if each.letter in ("0", *asked)]
    report = Report(out / "gpu.json", {"command": sys.argv, "dry": dry, "limit_s": seconds, "whole": False})
    try:
        report.about |= about()
        report.write()
        whole, share = sum(section.share for section in sections), 0.0
        for section in sections:
            share += section.share / whole
            run_section(section, forkserver, report, scratch, dry, began + seconds * share)
        report.about["whole"] = True
    finally:
        forkserver.close()
        report.about["seconds"] = round(time.monotonic() - began, 1)
        report.write()
        show(report.about, report.found, goals(GOALS, report.found), SECTIONS)
    return 0 if ran(sections, report.found) else 1


def ran(sections: Sequence[Section], found: dict[str, dict[str, Any]]) -> bool:
    """Whether all parts are done but those of peers."""
    parts = [each for section in sections for each in found.get(section.letter, {"parts": ()})["parts"]]
    return len(found) == len(sections) and all(each["state"] == DONE for each in parts if not each["peer"])


def run_section(
    section: Section, forkserver: ForkServer, report: Report, scratch: Path, dry: bool, deadline: float
) -> None:
    """Run the parts of a section, none of them after `deadline` (time.monotonic seconds)."""
    parts: list[dict[str, Any]] = []
    report.found[section.letter] = {"title": section.title, "parts": parts}
    for number, part in enumerate(section.parts):
        if dry and part.round > 1:
            continue
        limit_s = min(part.limit_s, deadline - time.monotonic())
        known = {"part": part.name, "round": part.round, "peer": part.peer}
        if limit_s < _LEAST_S:
            parts.append({**known, "state": CUT, "error": "no time was left to begin", "rows": []})
            report.write()
            continue
        folder = scratch / f"{section.letter}{number}"
        folder.mkdir()
        case = Case(section.letter, part.name, folder, scratch, dry, limit_s)
        parts.append({**known, "state": CUT, "error": "the run was ended", "rows": []})  # until it is known
        try:
            run_part(part, case, forkserver, parts[-1], report)
        finally:
            store_path(folder).unlink(missing_ok=True)  # where a part was cut, nobody else gives that memory back
            shutil.rmtree(folder, ignore_errors=True)


def run_part(part: Part, case: Case, forkserver: ForkServer, told: dict[str, Any], report: Report) -> None:
    """Run one part to its end or limit; `told` and the report's file follow it."""
    answer = case.folder / "answer.json"
    began = time.monotonic()
    pid = forkserver.start({"call": part.call, "argument": case.as_json(), "answer": str(answer)})
    ended = ""
    try:
        while not ended and time.monotonic() < began + case.limit_s:
            ended = next((str(exit_) for exit_ in forkserver.poll(_POLL_S) if exit_.pid == pid), "")
            if (rows := read_rows(case)) != told["rows"]:
                told["rows"] = rows
                report.write()
    finally:
        if not ended:
            _end(pid, forkserver)
        told["seconds"] = round(time.monotonic() - began, 2)
    told["rows"] = read_rows(case)
    log = answer.with_suffix(".log")
    said = last_lines(log.read_text(errors="replace")) if log.is_file() else []
    found = json.loads(answer.read_text()) if answer.is_file() else {}
    if "missing" in found:
        told |= {"state": MISSING, "missing": found["missing"]}
    elif "error" in found:
        told |= {"state": FAILED, "error": found["error"], "traceback": found["traceback"]}
    elif "value" in found:
        told |= {"state": DONE}
    elif ended:
        told |= {"state": FAILED, "error": f"its process {ended}", "said": said}
    else:
        told |= {"state": CUT, "error": f"it took longer than {case.limit_s:.0f} s", "said": said}
    if told["state"] in (DONE, MISSING):
        told.pop("error")
    report.write()


def clear_locks() -> None:
    """Remove what who compiles an extension leaves when it is killed: the next one would wait for it for ever."""
    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR", os.devnull)).glob("*/lock"):
        lock.unlink(missing_ok=True)


def _end(pid: int, forkserver: ForkServer) -> None:
    """SIGKILL a part's process and all that it has started."""
    end_children(pid, itself=True)
    deadline = time.monotonic() + _ENDING_S
    while time.monotonic() < deadline and not any(exit_.pid == pid for exit_ in forkserver.poll(_POLL_S)):
        pass
    clear_locks()
