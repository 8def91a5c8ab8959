"""Anybody may write to the store: what is read from it is what it should be, or is left aside by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pipeline.schedule.layout import TRAIN, Layout
from pipeline.wire import WireError
from recovery import keys
from recovery.checkpoint import CheckpointError, FileRecord
from recovery.membership import MembershipError, View, publish, read_view
from schedulers import plan
from tests.test_wire import JSON

READERS: dict[str, Callable[[dist.Store], Any]] = {
    "beat/3": lambda store: keys.read_beat(store, 3),
    "agent/3": lambda store: keys.read_agent(store, 3),
    "loss/3": lambda store: keys.read_loss(store, 3),
    "complaint/3": lambda store: keys.read_complaint(store, 3),
    "error/3": lambda store: keys.read_error(store, 3),
    "failed": keys.failure,
    "leave/3": lambda store: keys.leaves(store, 3),
    "migration": keys.read_migration,
    "over": keys.ended,
    "stop": keys.stop_asked,
    "ledger/3/0": lambda store: keys.take_ledger_answer(store, 3, 0),
    "record/3/0": lambda store: list(keys.take_records(store, 3, 0)),
    "view/3": lambda store: read_view(store, 3),
}


def read(store: dist.Store, key: str) -> Any:
    try:
        return READERS[key](store)
    except (WireError, MembershipError) as error:
        return error


@pytest.mark.parametrize("key", READERS)
@given(data=st.binary(min_size=1, max_size=40))
def test_bytes_of_a_stranger_are_no_value(key: str, data: bytes) -> None:
    store = dist.HashStore()
    store.set(key, data)
    read(store, key)


@pytest.mark.parametrize("key", READERS)
@given(values=st.dictionaries(
    st.sampled_from(["worker", "reason", "told", "time", "number", "waiting", "progress", "built", "text", "fatal",
                     "workers", "layout", "places", "joined", "moves", "error", "kind", "step"]),
    JSON,
))  # fmt: skip
def test_json_of_a_stranger_is_no_value(key: str, values: dict[str, Any]) -> None:
    store = dist.HashStore()
    store.set(key, json.dumps(values))
    read(store, key)


def test_what_is_written_is_read() -> None:
    store = dist.HashStore()
    assert keys.read_beat(store, 1) is None
    keys.beat(store, 1, found := keys.Beat(7, "the output of F", 3, True))
    assert keys.read_beat(store, 1) == found
    keys.report_loss(store, 4, "was killed by SIGKILL")
    keys.report_loss(store, 5, "ValueError: x", told=True)
    assert keys.newest_loss(store).startswith(b"5 ")
    reports = [keys.read_loss(store, n) for n in range(3, 6)]
    assert [(r.worker, r.told) for r in reports if r is not None] == [(4, False), (5, True)]
    assert reports[0] is None
    keys.report_error(store, 5, error := keys.ErrorReport("ValueError: x", fatal=False))
    assert keys.read_error(store, 5) == error
    keys.complain(store, 2, 1, "gone")
    assert keys.read_complaint(store, 2) == (1, "gone")
    assert keys.leaves(store, 2) is None
    keys.leave(store, 2, 12.5)
    assert keys.leaves(store, 2) == 12.5
    keys.stay(store, 2)
    assert keys.leaves(store, 2) is None
    assert keys.read_migration(store) is None
    keys.tell_migration(store, told := {"number": 3, "view": 2, "layout": "k", "moves": []})
    assert keys.read_migration(store) == told
    keys.say_migrated(store, 3, 1)
    assert keys.has_migrated(store, 3, [1])
    assert not keys.has_migrated(store, 3, [0, 1])
    assert keys.failure(store) is None
    keys.fail(store, "first")
    keys.fail(store, "second")
    assert keys.failure(store) == keys.Failure("first"), "the first reason is the reason"
    assert keys.ended(store) is None
    keys.end(store, 75)
    assert keys.ended(store) == 75
    keys.put_record(store, 2, 0, {"kind": "stopped", "step": 3})
    keys.put_record(store, 2, 1, {"kind": "stopped", "step": 4})
    assert [r["step"] for r in keys.take_records(store, 2, 0) if isinstance(r, dict)] == [3, 4]
    assert list(keys.take_records(store, 2, 0)) == [], "they are gone"
    assert keys.claim(store, "a")
    assert not keys.claim(store, "a")


def test_a_view_is_read_as_it_was_written_or_not_at_all() -> None:
    store = dist.HashStore()
    layout = Layout({TRAIN: plan("one_f_one_b", [1.0] * 4, 2, 2)})
    view = View(2, (0, 3), layout.key, places={0: 0, 3: 1}, agents={0: 0, 1: 0}, joined={3: 1}, next_worker=4)
    publish(store, view, layout)
    assert read_view(store, 2) == view
    for name, wrong in {
        "number": 3, "places": {"a": 0}, "moves": [{"worker": 0}], "awaited": [[9, 0, 0, 1]],
        "agents": [[0, 0, 0, 1 << 40]], "joined": [[0, 0, 2, 1]], "layout": 7, "details": None, "next_worker": "4",
    }.items():  # fmt: skip
        fields = {**json.loads(store.get("view/2")), name: wrong}
        store.set("view/9", json.dumps({**fields, "number": 9} if name != "number" else fields))
        with pytest.raises(MembershipError, match="view 9 cannot be read: "):
            read_view(store, 9)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "layer-1.safetensors", "layer-00001.safetensors/..", "manifest.json"]
)
def test_a_file_of_a_peer_lies_in_the_checkpoint(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"expected layer-NNNNN\.safetensors"):
        FileRecord.from_json({"name": name, "layer": 1, "size": 1, "crc32": 1})
    with pytest.raises(CheckpointError):
        FileRecord.from_json({"name": "layer-00001.safetensors", "layer": 1, "size": "1", "crc32": 1, "more": 1})
