"""A run's story is made of records that anybody may have put into its store: what is none is named, no more."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.records import check_record
from launch.run_folder import read_jsonl
from pipeline.exit_codes import STOPPED
from pipeline.wire import WireError
from tests.test_pictures import STEP, STEPS, Told
from tests.test_wire import JSON

RESUMED = {
    "kind": "event", "time": 1.0, "event": "resumed", "step": 1, "view": 2, "seconds": {"links": 0.5}, "restores": [],
    "there": 0,
    "woken": 1.0,
}  # fmt: skip
ROLLED_BACK = {
    "kind": "event", "time": 1.0, "event": "rolled_back", "step": 1, "to": "step-00000001",
}  # fmt: skip
FAILED = {"kind": "event", "time": 1.0, "event": "checkpoint_failed", "step": 1, "error": "no room"}
TIMELINE = {"kind": "timeline", "time": 1.0, "lanes": {"0": [["F[0:1]#0", 0.0, 1.0]]}}
LEDGER = {"kind": "ledger", "time": 1.0, "step": 1, "view": 1}
GOOD = (STEP, RESUMED, ROLLED_BACK, FAILED, TIMELINE, LEDGER)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"kind": "step", "time": 1.0},
        {**STEP, "loss": "low"},
        {**STEP, "tflops": float("inf")},
        {**STEP, "mfu": "high"},
        {**STEP, "peak_host_bytes": -1},
        {**STEP, "peak_device_bytes_sum": 0.5},
        {**STEP, "loss": 10**400},
        {**STEP, "loss": float("nan")},
        {**STEP, "lr": float("inf")},
        {**STEP, "kind": "leap"},
        {**STEP, "step": STEPS + 1},
        {**STEP, "step": -1},
        {**STEP, "tokens": 2**63},
        {**STEP, "tokens": -1},
        {**STEP, "time": 10**400},
        {"kind": "event", "time": 1.0, "event": "view"},
        {"kind": "event", "time": 1.0, "event": "resumed", "step": 1},
        {**RESUMED, "seconds": {}},
        {**RESUMED, "seconds": {"links": "1"}},
        {**RESUMED, "seconds": {"links": float("nan")}},
        {**RESUMED, "restores": [[0, [0, 1], "copy"]]},
        {**RESUMED, "restores": json.loads("[" * 900 + "]" * 900)},
        {"kind": "event", "time": 1.0, "event": "fault", "worker": "%s", "step": 1, "fault": "kill", "at": "x"},
        {"kind": "evaluation", "time": 1.0, "step": 1, "loss": float("nan"), "perplexity": 1.0},
        {**TIMELINE, "lanes": {"0": [["F[0:1]#0", 0.0]]}},
        {**TIMELINE, "lanes": {"0": [["F[0:1]#0", 0.0, float("inf")]]}},
        {**TIMELINE, "lanes": {"0": [[f"F[0:{'9' * 5000}]#0", 0.0, 1.0]]}},
        {**TIMELINE, "lanes": {"0": [["F[0:1]#10000000", 0.0, 1.0]]}},
        {**TIMELINE, "lanes": {"x": []}},
        {**TIMELINE, "lanes": {"9" * 5000: []}},
        {**TIMELINE, "lanes": {"0": [["nothing", 0.0, 1.0]]}},
        {**LEDGER, "step": 10**15},
        {**LEDGER, "view": "1"},
    ],
)
def test_a_record_that_is_none_is_named_and_ends_nothing(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WireError):
        check_record(record, STEPS)
    told = Told(tmp_path)
    assert [event["event"] for event in told.put(record)] == ["unreadable"]
    told.put(STEP)
    assert [m["step"] for m in told.folder.metrics] == [1]
    told.folder.close()


@pytest.mark.parametrize("record", GOOD, ids=lambda record: record.get("event", record["kind"]))
def test_a_record_is_its_fields_and_no_others(record: dict[str, Any], tmp_path: Path) -> None:
    """Other names would be taken for those of the reader's own arguments."""
    found = check_record({**record, "self": 1, "values": 2, "total": 3, "record": 4, "label": 5}, STEPS)
    assert found == record
    assert found is not record
    told = Told(tmp_path)
    told.put(STEP)
    events = told.put({**record, "self": 1, "label": 2})
    assert not [event for event in events if event["event"] == "unreadable"]
    told.folder.close()


def test_a_whole_number_becomes_a_float() -> None:
    assert type(check_record(STEP, STEPS)["grad_norm"]) is float
    assert check_record({**RESUMED, "seconds": {"links": 1}}, STEPS)["seconds"] == {"links": 1.0}
    check_record({"kind": "stopped", "time": time.time(), "step": STEPS}, STEPS)


def test_how_far_a_rollback_goes_is_told_by_who_has_seen_all_steps(tmp_path: Path) -> None:
    """The worker that leads afterwards may have come just now."""
    told = Told(tmp_path)
    for step in (1, 2, 3):
        told.put({**STEP, "step": step})
    lost = [told.put({**ROLLED_BACK, "step": step})[-1]["steps_lost"] for step in (1, 1, 0)]
    assert lost == [2, 0, 1]
    told.folder.close()


def test_the_host_of_a_pool_hands_over_records_with_more_in_them(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.story.handle({**{name: STEP[name] for name in STEP if name != "time"}, "version": 7, "workers": 2})
    told.folder.close()
    assert [line["version"] for line in read_jsonl(tmp_path / "ledger.jsonl")] == [7]


def test_what_a_terminal_would_obey_or_cannot_show_is_not_printed(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.put({**FAILED, "error": "\x1b[2J\ud800"})
    assert "no checkpoint at step 1: \ufffd[2J\ufffd" in told.out.getvalue()
    told.folder.close()


ANY = st.one_of(
    JSON, st.sampled_from([10**400, -1, 10**15, float("nan"), float("inf"), 1e308, -1e308, "\ud800", "", {}])
)


@settings(deadline=None, max_examples=60)
@given(changes=st.lists(st.tuples(st.sampled_from(GOOD), st.dictionaries(
    st.sampled_from(sorted({*STEP, *RESUMED, *ROLLED_BACK, *FAILED, *TIMELINE, "self", "event"})), ANY, max_size=3,
)), max_size=4))  # fmt: skip
def test_no_record_of_a_stranger_ends_a_run(changes: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        told = Told(Path(folder))
        told.put(STEP)
        for record, change in changes:
            told.put({**record, **change})
        told.folder.close()
        told.story.close(STOPPED, as_json=False)
