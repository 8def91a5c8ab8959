"""The bug classes of a transition, planted one by one: the certificate refuses each, and passes what is clean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.transition_bugs import BEYOND, BUGS, HOLDERS, MOVES, Bug, transition
from benchmarks.transition_dcp_bugs import FAULTS
from pipeline.model.layered import TIED, LayeredModel
from pipeline.model.weights import preset
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore
from recovery.certificate import Witness, write
from recovery.membership import Move, View


def test_a_clean_transition_passes_and_says_what_it_is() -> None:
    moved = transition()
    found = moved.certificate()
    assert found["error"] == ""
    assert found["states"]["1"] == {"hash": moved.source.fingerprint(), "workers": [1]}
    assert found["states"]["2"] == {"hash": moved.workers[2].states["2"].fingerprint(), "workers": [1, 2]}
    assert set(found["states"]) == set(HOLDERS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_refused(bug: Bug) -> None:
    found = transition(bug).certificate()
    assert found["error"]
    assert found["again"] == bug.again, "the same move is made again where that may mend it, and nowhere else"
    assert not found["states"]


def test_all_twelve_classes_are_planted_and_compared_with_dcp() -> None:
    assert len({bug.kind for bug in BUGS}) == 12
    assert {bug.name for bug in (*BUGS, *BEYOND)} <= set(FAULTS)


@pytest.mark.parametrize("bug", BEYOND, ids=lambda bug: bug.name)
def test_what_all_agree_on_is_not_seen(bug: Bug) -> None:
    assert transition(bug).certificate()["error"] == ""


REFUSALS = {
    "moments of another or empty: zeros": "state 1 is ",
    "a shard or an owner twice: two owners": "state 1 is on workers [0, 1]; the layout wants [1]",
    "a tensor dropped: the share of one worker": "state 1 is on workers []; the layout wants [1]",
    "RNG key or cursor of another: the RNG key": "workers do not count or draw alike",
    "a replica differs or is NaN: differs": "the copies of state 2 differ, by checksum",
    "snapshot aliases live memory: a step writes into it": "states 1 of worker 0 have changed in the transition",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_names_what_and_whose(name: str) -> None:
    (bug,) = [bug for bug in BUGS if bug.name == name]
    assert transition(bug).certificate()["error"].startswith(REFUSALS[name])


def test_another_generation_is_refused() -> None:
    other = Bug("another generation", "of the run", lambda moved: setattr(moved.taken, "generation", 1))
    assert transition(other).certificate()["again"]


def test_what_was_kept_and_has_changed_is_refused() -> None:
    """Of a state that no other worker holds."""

    def change(state: torch.Tensor) -> None:
        state.view(-1)[0] += 1

    kept = Bug("kept", "changed", lambda moved: change(next(iter(moved.workers[2].states["3"].tensors().values()))))
    found = transition(kept).certificate()
    assert found["error"] == "states 3 of worker 2 have changed in the transition"
    assert not found["again"], "the same moves would not mend it"


def test_a_layer_that_owns_nothing_but_a_shared_weight_can_be_given() -> None:
    config = preset("llama-tiny", vocab_size=64)
    config.tie_word_embeddings = True
    held = ResidentStore(LayeredModel(config), [(0, 2)], OptimizerConfig(), seed=0, device=torch.device("cpu"))
    assert set(held.states) == {"1", TIED}
    moves = (Move(1, "0:2", "replica", ((0, "0:2"),)),)
    assert set(Witness.of(0, held.states, held.states, {}, moves, {}).gave) == {"1"}


def test_a_certificate_is_kept(tmp_path: Path) -> None:
    states = transition().certificate()["states"]
    write(tmp_path / "certificates", View(3, (0, 1, 2), "k", moves=MOVES), 2, states, {"seed": 0})
    (file,) = (tmp_path / "certificates").iterdir()
    kept = json.loads(file.read_text())
    assert (file.name, kept["view"], kept["step"]) == ("view-000003.json", 3, 2)
    assert kept["states"] == states
    (tmp_path / "file").write_text("")
    write(tmp_path / "file", View(4, (0,), "k"), 2, {}, {})  # a disk that fails costs the file
