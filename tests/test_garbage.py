"""What is never looked through for garbage, and that the rest is."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from launch.forkserver import ForkServer
from pipeline.garbage import no_collection
from tests.harness import Started


@pytest.mark.parametrize("before", [True, False])
def test_collections_are_as_before_when_it_is_over(before: bool) -> None:
    def fails() -> None:
        with no_collection():
            assert not gc.isenabled()
            with no_collection():
                pass
            assert not gc.isenabled()
            raise ZeroDivisionError

    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with pytest.raises(ZeroDivisionError):
            fails()
        assert gc.isenabled() is before
    finally:
        (gc.enable if was else gc.disable)()


def own_mib() -> float:
    """Of this process's memory, what it shares with no other."""
    rows = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(row[1]) for row in rows if row[0] in ("Private_Dirty:", "Private_Clean:")) / 1024


def collects(payload: dict[str, Any]) -> int:
    """In a worker: a whole collection, and one of a ring that the worker itself has made."""
    before = own_mib()
    gc.collect()
    grown = own_mib() - before
    ring: list[Any] = []
    ring.append(ring)
    del ring
    found = {"grown": grown, "collected": gc.collect(), "kept": gc.get_freeze_count(), "by itself": gc.isenabled()}
    Path(payload["log"]).write_text(json.dumps(found))
    return 0


def test_a_collection_in_a_worker_leaves_shared_what_it_was_forked_with(forkserver: ForkServer, tmp_path: Path) -> None:
    with Started(forkserver, tmp_path / "log", call="tests.test_garbage:collects") as started:
        ended = started.wait()
    assert ended.code == 0
    found = json.loads(ended.output)
    assert found["kept"] > 100_000, "all that torch and transformers have made"
    assert found["grown"] < 20, "every page that holds an object would be 100"
    assert found["collected"] == 1
    assert found["by itself"] is True
