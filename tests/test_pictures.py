"""A picture that cannot be drawn costs the picture, and not the run that it is of."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist
from rich.console import Console

from jobs.config import TrainConfig
from jobs.plan import Plan
from launch.progress import Display
from launch.run_folder import RunFolder, read_jsonl
from launch.story import Story
from pipeline.exit_codes import STOPPED
from pipeline.schedule.layout import TRAIN, Layout
from recovery.membership import View
from schedulers import gpipe

STEPS = 20
STEP = {
    "kind": "step", "time": 1.0, "step": 1, "loss": 2.5, "tokens": 8, "tokens_per_s": 9.0, "grad_norm": 1, "lr": 0.1,
    "view": 1, "first_sample": 0, "samples": 8,
}  # fmt: skip


class Told:
    """The story of a run without workers: what it says, and the records that are put into its store."""

    def __init__(self, folder: Path) -> None:
        self.store, self.out, self.number = dist.HashStore(), io.StringIO(), 0
        config = TrainConfig(steps=STEPS, workers=2, out=folder)
        layout = Layout({TRAIN: gpipe([(0, 1), (1, 2)], 2)})
        self.folder = RunFolder(folder, "", 0)
        display = Display(STEPS, console=Console(file=self.out, width=200))
        plan = cast("Plan", SimpleNamespace(view=View(1, (0, 1), layout.key), layout=layout))
        self.story = Story(config, plan, self.folder, display, self.store)

    def put(self, record: Any) -> list[dict[str, Any]]:
        """The events that a record of worker 0 leads to."""
        before = len(read_jsonl(self.folder.path / "events.jsonl"))
        self.store.set(f"record/0/{self.number}", json.dumps(record))
        self.number += 1
        self.story.tick([0], 1)
        return read_jsonl(self.folder.path / "events.jsonl")[before:]


def timeline(*spans: str) -> dict[str, Any]:
    """Every op of the plan's stages but those of the ones that were lost, a millisecond each."""
    ops = [f"{kind}[{span}]#{m}" for kind in "FB" for m in (0, 1) for span in spans]
    lane = [[op, at * 1e-3, (at + 1) * 1e-3] for at, op in enumerate(ops)]
    return {"kind": "timeline", "time": 1.0, "lanes": {"0": lane}}


def test_a_stage_that_was_lost_at_the_measured_step_costs_the_picture_alone(tmp_path: Path) -> None:
    told = Told(tmp_path)
    (event,) = told.put(timeline("0:1"))
    assert (event["event"], event["path"]) == ("picture_failed", "timeline.svg")
    assert "timeline.svg is not drawn: forward has no entry for span 1:2" in told.out.getvalue()
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) > 4
    assert told.put(timeline("0:1", "1:2")) == []
    assert (tmp_path / "timeline.svg").is_file()
    told.folder.close()


def test_a_loss_curve_that_cannot_be_drawn_at_the_end_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(tmp_path)
    told.put(STEP)
    told.folder.close()
    monkeypatch.setattr("launch.pictures.loss_svg", lambda *_: 1 / 0)
    told.story.close(STOPPED, as_json=False)
    assert "loss.svg is not drawn: division by zero" in told.out.getvalue()


def test_a_run_that_is_done_stays_done_though_there_is_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("model is too large for this machine")

    told = Told(tmp_path)
    told.put(STEP)
    told.folder.close()
    monkeypatch.setattr("launch.story.continue_text", fails)
    told.story.close(0, as_json=False)
    assert "there is no sample: model is too large for this machine" in told.out.getvalue()


def test_a_reader_of_the_report_that_is_gone_does_not_change_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def gone(*report: object) -> None:
        asked.extend(report)
        raise SystemExit(1)  # as rich does where a pipe is broken

    told = Told(tmp_path)
    told.folder.close()
    monkeypatch.setattr(Console, "print_json", gone)
    told.story.close(STOPPED, as_json=True)
    assert asked


def test_one_fault_is_one_line(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.put(STEP)
    told.story.event("detected", worker=1, reason="was killed by SIGKILL")
    told.story.event("remedy", worker=1, replacement=3, remedy="checkpoint", view=2)
    assert "SIGKILL" not in told.out.getvalue(), "it is not over yet"
    resumed = {"step": 1, "view": 2, "seconds": {"view": 0.25}, "restores": [], "woken": 1.0, "there": 0}
    told.put({"kind": "event", "event": "resumed", "time": 2.0, **resumed})
    told.put({"kind": "event", "event": "rolled_back", "time": 2.0, "step": 0, "to": "start"})
    told.put({**STEP, "step": 1, "view": 2})
    (line,) = [line for line in told.out.getvalue().splitlines() if "SIGKILL" in line]
    assert line.rstrip() == (
        "step 1: worker 1 was killed by SIGKILL · worker 3 takes its place: checkpoint · going on from step 1 after "
        "0.25 s · back to start: 1 steps are run again"
    )
    told.story.event("detected", worker=2, reason="was killed by SIGKILL")
    told.story._since -= 3.0
    told.story.tick([0], 1)
    assert "worker 2 was killed" in told.out.getvalue(), "nobody waits for long to hear of it"
    told.folder.close()


def test_a_curve_is_drawn_of_steps_that_make_one(tmp_path: Path) -> None:
    told = Told(tmp_path)
    for step in (1, 2):
        told.put({**STEP, "step": step, "loss": 4.0 - step})
    told.folder.close()
    told.story.close(STOPPED, as_json=False)
    assert "loss 3.000 to 2.000 in 2 steps" in told.out.getvalue()
    assert "│" not in told.out.getvalue()
