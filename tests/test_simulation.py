"""The control plane under a virtual clock, seed by seed: what must hold does, and what is planted is found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from recovery.commit import COMMIT, Ballot, Follower
from recovery.policy import Recovery
from tests.simulation.__main__ import main, simulate
from tests.simulation.worker import SimState, calm

SEEDS, CHUNK = 400, 200  # `make soak` runs 100,000


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_invariant_holds_in_every_run(first: int) -> None:
    ended = [simulate(seed).codes[0] for seed in range(first, first + CHUNK)]
    assert torch.is_grad_enabled(), "a simulated run has left something behind"
    assert ended.count(0) > 0.9 * CHUNK, "nearly all faults are survived"


def test_a_seed_is_one_run() -> None:
    a, b = simulate(7), simulate(7)
    assert a.events == b.events
    assert a.world.now == b.world.now
    assert simulate(8).events != a.events


def test_a_calm_run_is_what_it_is_held_against() -> None:
    assert len({calm(layer, steps) for layer in range(6) for steps in range(9)}) == 54, "no two states are alike"
    state = SimState("3")
    with pytest.raises(AssertionError, match="step 1 is made on layer 3 of step 0"):
        state.step(1)


# ---- planted ----


class Overwriting(Ballot):
    """The last to vote writes its outcome whatever stands there: the coordinator may have ended the step before."""

    def _conclude(self, iteration: int, combine: Any) -> None:
        votes = self.store.multi_get([self._vote(iteration, m) for m in self.members])
        found = combine({m: json.loads(vote) for m, vote in zip(self.members, votes, strict=True)})
        self.store.set(f"view{self.view}/outcome/{iteration}", f"{COMMIT}\n{json.dumps(found)}")


def _not_ended(follower: Follower) -> None:
    """The coordinator publishes the next view and does not end the step under way."""


forget = Recovery.after_loss


def _stale(recovery: Recovery, view: Any, lost: tuple[int, ...]) -> Any:
    """Who joins is given nothing."""
    return replace(forget(recovery, view, lost), moves=(), rollback=None)


def seeds_until(broken: Callable[[int], Any], most: int = 400) -> str:
    for seed in range(most):
        try:
            broken(seed)
        except AssertionError as error:
            return str(error)
    return ""


def test_an_outcome_that_is_written_twice_is_found() -> None:
    told = seeds_until(lambda seed: simulate(seed, ballot=Overwriting))
    assert "replay: python -m tests.simulation --seed" in told


@pytest.mark.parametrize(
    ("where", "name", "what"),
    [(Follower, "abort", _not_ended), (Recovery, "after_loss", _stale)],
    ids=["a step that is not ended", "a state that does not move"],
)
def test_what_is_planted_is_found(where: Any, name: str, what: Any) -> None:
    with patch.object(where, name, what):
        assert "replay: python -m tests.simulation --seed" in seeds_until(simulate)


def test_a_failing_seed_is_replayed_by_its_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["simulation", "--seed", "7"])
    assert main() == 0
    assert re.search(r"[{ ]0: 0[,}]", capsys.readouterr().out.rsplit("ended with", 1)[1])
    monkeypatch.setattr(Recovery, "after_loss", _stale)
    found = seeds_until(simulate)
    seed = found.rsplit(" ", 1)[-1]
    monkeypatch.setattr("sys.argv", ["simulation", "--seed", seed])
    assert main() == 1
    assert "detected" in capsys.readouterr().out, "what happened is told"
