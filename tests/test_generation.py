"""The generation of a run only ascends, and nothing of another one is used: in the run folder, among checkpoints, when
a worker loads, and when a view begins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.schedule.layout import Layout
from pipeline.state.source import Source, SourceRefused
from recovery import checkpoint
from recovery.generation import GenerationError, raise_generation, read_generation
from recovery.member import Member
from recovery.membership import START, MembershipError, View
from recovery.policy import Recovery
from recovery.remedy import CannotRestore
from recovery.restore import load_checkpoint, roll_back
from tests.test_restore import joiner, trained


def save(root: Path, step: int, generation: int) -> Path:
    each = trained(1)
    folder = checkpoint.begin(root, step)
    records = [checkpoint.write_layer(folder, layer, each.tensors(layer)) for layer in each.layers()]
    return checkpoint.commit(root, step, records, {"step": step, "generation": generation})


def test_a_generation_only_ascends_and_survives(tmp_path: Path) -> None:
    assert read_generation(tmp_path) == 0
    raise_generation(tmp_path, 2)
    raise_generation(tmp_path, 2)
    assert read_generation(tmp_path) == 2
    with pytest.raises(GenerationError, match="a generation only ascends, and 1 is asked for"):
        raise_generation(tmp_path, 1)
    assert read_generation(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["generation.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"generation": -1}', '{"generation": true}', '{"generation": "1"}'])
def test_one_that_cannot_be_read_is_not_taken_for_the_first(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation.json").write_text(text)
    with pytest.raises(GenerationError, match=r"generation\.json"):
        read_generation(tmp_path)


def test_a_checkpoint_of_another_generation_is_skipped_by_name(tmp_path: Path) -> None:
    save(tmp_path, 3, 0)
    save(tmp_path, 6, 1)
    save(tmp_path, 9, 2)
    found = checkpoint.find(tmp_path, 1)
    assert found.path == tmp_path / "step-00000006"
    assert found.skipped == (
        (tmp_path / "step-00000009", "checkpoint of step-00000009 is of generation 2; the run is at generation 1, and "
         "nothing of another may come back"),
    )  # fmt: skip
    assert checkpoint.find(tmp_path, 3).path is None


def test_a_worker_loads_no_checkpoint_of_another_generation(tmp_path: Path) -> None:
    path, worker = save(tmp_path, 3, 1), joiner()
    before = {name: state.fingerprint() for name, state in worker.store.states.items()}
    with pytest.raises(SourceRefused, match="is of generation 1; the run is at generation 0"):
        load_checkpoint(worker.store, path)
    assert {name: state.fingerprint() for name, state in worker.store.states.items()} == before
    assert load_checkpoint(worker.store, path, 1) == 3
    assert {(s.version, s.generation) for s in worker.store.states.values()} == {(3, 1)}


def test_nobody_goes_back_to_a_start_that_is_older_than_what_was_forgotten(tmp_path: Path) -> None:
    details: dict[str, Any] = {"source": None, "attempt": 1}
    view = View(3, (7,), "", details=details, rollback=START, generation=1)
    with pytest.raises(SourceRefused, match="start of weights from the seed is of generation 0"):
        roll_back(joiner(), view, tmp_path)
    recovery = Recovery("auto", view, Layout({}), 6, False, tmp_path)
    with pytest.raises(CannotRestore, match="the start of the run is older than what was forgotten since"):
        recovery.rollback_target()


@pytest.mark.parametrize(("version", "generation"), [(4, 0), (6, 0), (5, 1)])
def test_a_view_begins_with_nothing_of_another_step_or_generation(version: int, generation: int) -> None:
    """A worker that was stopped and comes back, a spare one, a machine with its old folder: whatever it holds."""
    worker = joiner()
    for state in worker.store.states.values():
        state.version = 5
    member: Any = SimpleNamespace(worker=worker)
    Member._check_states(member, View(2, (7,), ""), 5)
    worker.store.states["3"].version, worker.store.states["3"].generation = version, generation
    with pytest.raises(MembershipError, match=f"has layer 3 of step {version}, generation {generation}; the run is at"):
        Member._check_states(member, View(2, (7,), ""), 5)


def test_any_step_may_do_where_the_generation_is_right() -> None:
    source = Source("checkpoint", "here", 7, 0)
    assert source.require(None, 0) is source.require(7, 0)
    with pytest.raises(SourceRefused, match="checkpoint of here is of step 7; wanted is step 8"):
        source.require(8, 0)
