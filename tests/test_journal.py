"""Lines on a disk that fills up: none is lost or broken, and the run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from jobs.config import TrainConfig
from launch.journal import Journal
from launch.progress import Display
from launch.run_folder import METRICS, RunFolder, lines_after, read_jsonl, standing
from launch.story import Story
from launch.worker_main import Reports
from recovery import keys
from tests.test_checkpoint import largest_file


def record(step: int, view: int = 1) -> dict[str, Any]:
    return {**dict.fromkeys(METRICS, 0.5), "step": step, "view": view, "first_sample": 8 * (step - 1), "samples": 8}


def test_a_full_disk_breaks_no_line_and_loses_none(tmp_path: Path) -> None:
    """The limit falls into the middle of a line: it goes on where it broke off."""
    journal = Journal(tmp_path / "x.jsonl")
    with largest_file(505):
        for n in range(100):
            journal.append({"n": n})
        assert journal.waiting == "x.jsonl cannot be written: File too large"
        assert journal.sync() == journal.waiting
        assert (tmp_path / "x.jsonl").stat().st_size == 505
    journal.append({"n": 100})
    assert journal.waiting == journal.sync() == ""
    journal.close()
    assert read_jsonl(tmp_path / "x.jsonl") == [{"n": n} for n in range(101)]


@pytest.mark.parametrize("kept", [[], [{"n": 0}, {"n": 1}]])
@pytest.mark.parametrize("cut", ["", '{"n"', "x" * 5000])
def test_a_line_that_a_crash_cut_off_is_not_glued_to_the_next(
    tmp_path: Path, kept: list[dict[str, int]], cut: str
) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept) + cut)
    journal = Journal(tmp_path / "x.jsonl")
    journal.append({"n": 2})
    journal.close()
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [*kept, {"n": 2}]


DAMAGED = [
    b'{"step": 3, "lo', b"[1]", b"7", b"", b"\xff\xfe", b"[" * 9999, b'{"no": 1}', b'{"step": "2"}', b'{"step": null}',
    b'{"event": 3, "step": 9}', b'{"event": "evaluation"}', b'{"event": "remedy", "step": 9}',
]  # fmt: skip


def test_damaged_lines_cost_themselves_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "", 0)
    for step in (1, 2):
        folder.step(record(step))
        folder.event("evaluation", step=step, loss=1.0, perplexity=2.7)
        folder.event("remedy", step=step, worker=1, remedy="copy")
    folder.close()
    before = {name: read_jsonl(tmp_path / f"{name}.jsonl") for name in ("metrics", "events", "ledger")}
    for name in before:
        lines = (tmp_path / f"{name}.jsonl").read_bytes().splitlines()
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join([*DAMAGED, *lines, *DAMAGED]))
    said: list[str] = []
    again = RunFolder(tmp_path, "", 2, say=said.append)
    assert again.metrics == before["metrics"]
    assert [event["step"] for event in again.evaluations] == [event["step"] for event in again.marks] == [1, 2]
    again.event("resumed", step=2)
    assert again.save_ledger(2) == ""
    again.close()
    assert said == []
    assert read_jsonl(tmp_path / "ledger.jsonl") == before["ledger"]
    assert read_jsonl(tmp_path / "events.jsonl")[-1]["event"] == "resumed"


def test_a_damaged_line_of_the_ledger_is_a_gap(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    said: list[str] = []
    RunFolder(tmp_path, "", 3, say=said.append).close()
    assert said == ["ledger.jsonl lacks 1 of the steps that were taken before, the first: 2"]


def test_what_waits_has_a_bound_and_what_is_lost_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.journal._MOST", 100)
    journal = Journal(tmp_path / "x.jsonl")
    with largest_file(0):
        for n in range(20):
            journal.append({"n": n})
    assert journal.dropped == 9
    assert journal.sync() == "x.jsonl lacks 9 lines, for which there was no room"
    journal.close()


def test_a_run_folder_goes_on_says_so_once_and_has_all_in_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    folder = RunFolder(tmp_path, "", 0, say=said.append)
    with largest_file(600):
        for step in range(1, 30):
            folder.step(record(step))
            folder.event("checkpoint", step=step)
        assert folder.save_ledger(29) == "ledger.jsonl cannot be written: File too large"
    assert sorted(said) == [
        f"{name}.jsonl cannot be written: File too large; training goes on, and it is tried again"
        for name in ("events", "ledger", "metrics")
    ]
    folder.step(record(30))
    assert folder.save_ledger(30) == ""
    folder.close()
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 31))
    assert [line["step"] for line in read_jsonl(tmp_path / "ledger.jsonl")] == list(range(1, 31))
    assert [line["step"] for line in read_jsonl(tmp_path / "events.jsonl")] == list(range(1, 30))
    assert len(said) == 5, "two files are written again, and the third when it is closed"


def test_a_device_that_is_always_full_costs_its_lines_alone(tmp_path: Path) -> None:
    os.symlink("/dev/full", tmp_path / "events.jsonl")
    said: list[str] = []
    folder = RunFolder(tmp_path, "", 0, say=said.append)
    folder.event("started", step=0)
    folder.step(record(1))
    assert folder.save_ledger(1) == ""
    folder.close()
    assert said[0].startswith("events.jsonl cannot be written: No space left on device; training goes on")
    assert said[-1] == "events.jsonl cannot be written: No space left on device: its last lines are lost"
    assert len(read_jsonl(tmp_path / "ledger.jsonl")) == 1


def test_a_ledger_with_a_gap_is_not_safe(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "", 0)
    folder.step(record(1))
    folder.step(record(3))
    assert folder.save_ledger(1) == ""
    assert folder.save_ledger(3) == "the ledger lacks 1 steps up to step 3, the first: 2"
    folder.step(record(2))
    assert folder.save_ledger(3) == ""
    folder.event("rolled_back", step=1, to="step-00000001", steps_lost=2)
    folder.step(record(2, view=2))
    assert folder.save_ledger(2) == ""
    assert folder.save_ledger(3) == "the ledger lacks 1 steps up to step 3, the first: 3", "that line was undone"
    for step in (3, 4, 5):
        folder.step(record(step, view=2))
    folder.step(record(4, view=3))  # who was to tell of the rollback was lost
    assert folder.save_ledger(4) == ""
    assert folder.save_ledger(5) == "the ledger lacks 1 steps up to step 5, the first: 5"
    folder.close()


def test_a_gap_that_an_earlier_version_left_is_said_and_keeps_nothing_from_being_saved(tmp_path: Path) -> None:
    lines = [{**record(step), "time": 0.0} for step in (1, 2, 5, 6, 7)]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said: list[str] = []
    folder = RunFolder(tmp_path, "", 6, say=said.append)
    assert said == ["ledger.jsonl lacks 2 of the steps that were taken before, the first: 3"]
    folder.step(record(7))
    assert folder.save_ledger(7) == ""
    folder.step(record(9))
    assert folder.save_ledger(9) == "the ledger lacks 1 steps up to step 9, the first: 8"
    folder.close()


def test_no_checkpoint_becomes_true_in_a_view_that_is_over(tmp_path: Path) -> None:
    """Others may be about to go back to an older one: who asks for the ledger of an earlier view is refused."""
    store, folder = dist.HashStore(), RunFolder(tmp_path, "", 0)
    folder.step(record(1))
    plan: Any = SimpleNamespace(view=SimpleNamespace(first_step=0), layout=None)
    story = Story(TrainConfig(out=tmp_path, steps=9), plan, folder, Display(9, quiet=True), store)
    reports = Reports(store, 0)
    answers: list[str | None] = []
    for view in (2, None, 1):
        reports.put({"kind": "ledger", "step": 1, "view": 1})
        story.tick([0], view)
        answers.append(keys.take_ledger_answer(store, 0, len(answers)))
    assert answers == ["view 1 is over", "view 1 is over", ""]
    folder.close()


def test_steps_that_are_taken_again_are_marked_and_the_last_one_stands(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "", 0)
    for step, view in ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (3, 2), (4, 2)):
        folder.step(record(step, view))
    folder.close()
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["again"]) for line in lines] == [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (4, 0)]
    assert [(line["step"], line["view"]) for line in standing(lines)] == [(1, 1), (2, 2), (3, 2), (4, 2)]
    again = RunFolder(tmp_path, "", 2)
    again.step(record(3, 1))
    again.close()
    assert [m["again"] for m in again.metrics] == [0, 0, 1, 0], "a step that a resumed run takes is new to it"


def test_a_device_in_the_place_of_a_file_has_no_lines() -> None:
    """/dev/zero gives bytes for ever: who reads it to its end is ended by the kernel, and was the driver of a run."""
    with open("/dev/zero", "rb", buffering=0) as file:
        assert lines_after(file, 0, "events.jsonl") == ([], 0)
