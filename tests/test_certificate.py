"""The bug classes of a transition, planted one by one: the certificate refuses each, and passes what is clean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.model.layered import LayeredModel
from pipeline.model.weights import preset
from pipeline.state.layer_state import LayerState
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore
from recovery.certificate import Witness, certify, write
from recovery.membership import Move, View

MOVES = (Move(1, "1:2", "replica", ((0, "1:2"),)),)


def model() -> LayeredModel:
    config = preset("gpt2-tiny", vocab_size=64)
    config.n_layer = 3
    return LayeredModel(config)


def store(*spans: tuple[int, int], steps: int = 2) -> ResidentStore:
    """Some steps on made-up gradients: the same states on every worker."""
    found = ResidentStore(model(), spans, OptimizerConfig(lr=1e-2), seed=0, device=torch.device("cpu"))
    for step in range(steps):
        for state in found.states.values():
            made = torch.Generator().manual_seed(hash((state.name, step)) % 2**31)
            state.gradient.copy_(torch.randn(state.size, generator=made))
            state.apply(1.0, 1e-2)
    return found


Workers = dict[int, ResidentStore]


def transition() -> tuple[Workers, dict[int, dict[str, int]]]:
    """Worker 0 gives layer 1 to worker 1, which is a copy of it on worker 2: workers, and hashes before."""
    workers = {0: store((0, 2)), 1: store((2, 3)), 2: store((1, 5))}
    before = {w: {name: s.fingerprint() for name, s in each.states.items()} for w, each in workers.items()}
    workers[0].hold([(0, 1)])
    workers[1].hold([(1, 3)])
    taken = workers[1].states["1"]
    given = workers[0].aside["1"]
    taken.load(given.tensors())
    taken.version = given.version
    return workers, before


def vote(workers: Workers, before: Mapping[int, Mapping[str, int]], **keys: Any) -> dict[int, dict[str, Any]]:
    names = {
        0: {"seed": 0, "next_sample": 8},
        1: {"seed": 0, "next_sample": 8},
        2: {"seed": 0, "next_sample": 8, **keys},
    }
    return {
        w: json.loads(json.dumps(asdict(
            Witness.of(w, s.states, s.aside | s.states, before[w], MOVES, names[w])
        ))) for w, s in workers.items()
    }  # fmt: skip


def wanted(workers: Workers) -> dict[str, tuple[int, ...]]:
    names = [state.name for state in workers[0].model.states]
    holders = {"0": (0,), "1": (1, 2), "2": (1, 2), "3": (2,), "4": (2,), "tied": (0, 2)}
    return {name: holders[name] for name in names}


def test_a_clean_transition_passes_and_says_what_it_is() -> None:
    workers, before = transition()
    found = certify(wanted(workers), MOVES, vote(workers, before))
    assert found["error"] == ""
    assert found["states"]["1"] == {"hash": workers[2].states["1"].fingerprint(), "workers": [1, 2]}
    assert set(found["states"]) == set(wanted(workers))


# ---- planted ----


def _swap_halves(tensor: Tensor) -> None:
    """As a fused gate and up whose halves change places: norm and count stay."""
    half = tensor.shape[0] // 2
    tensor.copy_(torch.cat([tensor[half:], tensor[:half]]))


def _first(state: LayerState, kind: str) -> Tensor:
    return next(t for key, t in sorted(state.tensors().items()) if key.startswith(kind) and t.numel() > 1)


def _flip(tensor: Tensor) -> None:
    tensor.view(-1).view(torch.uint8)[0] ^= 1


def _moments_of_another(state: LayerState) -> None:
    a, b = [t for key, t in sorted(state.tensors().items()) if key.startswith("exp_avg_sq/")][:2]
    a.view(-1)[: min(a.numel(), b.numel())].copy_(b.view(-1)[: min(a.numel(), b.numel())])


TAKEN: dict[str, Callable[[LayerState], object]] = {
    "fused halves permuted": lambda s: _swap_halves(_first(s, "param/")),
    "a tensor dropped": lambda s: s.parameters.pop(next(iter(s.parameters))),
    "moments of another tensor": _moments_of_another,
    "empty moments": lambda s: _first(s, "exp_avg/").zero_(),
    "step counter lost": lambda s: next(t for k, t in s.tensors().items() if k.startswith("step/")).zero_(),
    "learning-rate scale lost": lambda s: s.lr_scale.fill_(1.1),
    "a stale tensor of an earlier step": lambda s: setattr(s, "version", s.version - 1),
    "another generation": lambda s: setattr(s, "generation", 1),
    "NaN in one replica": lambda s: _first(s, "param/").view(-1)[:1].fill_(torch.nan),
    "a byte flipped in flight": lambda s: _flip(_first(s, "param/")),
}


@pytest.mark.parametrize("bug", TAKEN)
def test_what_was_taken_wrongly_is_asked_for_again(bug: str) -> None:
    workers, before = transition()
    TAKEN[bug](workers[1].states["1"])
    found = certify(wanted(workers), MOVES, vote(workers, before))
    assert found["again"], found
    assert found["error"].startswith("state 1 is ")
    assert not found["states"]


KEPT: dict[str, Callable[[Workers], object]] = {
    "a snapshot that aliases live memory": lambda w: _flip(_first(w[2].states["3"], "param/")),
    "a master copy that differs": lambda w: _flip(_first(w[0].states["tied"], "exp_avg/")),
}


@pytest.mark.parametrize("bug", KEPT)
def test_what_nobody_moved_and_has_changed_is_refused(bug: str) -> None:
    workers, before = transition()
    KEPT[bug](workers)
    found = certify(wanted(workers), MOVES, vote(workers, before))
    assert found["error"]
    assert not found["again"], "the same moves would not mend it"


def test_an_owner_twice_and_an_owner_missing_are_refused() -> None:
    workers, before = transition()
    workers[0].hold([(0, 2)])
    found = certify(wanted(workers), MOVES, vote(workers, before))
    assert found["error"] == "state 1 is on workers [0, 1, 2]; the layout wants [1, 2]"
    workers, before = transition()
    workers[1].hold([(2, 3)])
    workers[1].let_go()
    found = certify(wanted(workers), MOVES, vote(workers, before))
    assert found["error"] == "state 1 is on workers [2]; the layout wants [1, 2]"


@pytest.mark.parametrize("keys", [{"seed": 1}, {"next_sample": 16}, {"microbatches": 4}])
def test_the_keys_of_another_are_refused(keys: dict[str, int]) -> None:
    """RNG, data cursor, or the batch of the old world."""
    workers, before = transition()
    found = certify(wanted(workers), MOVES, vote(workers, before, **keys))
    assert found["error"].startswith("workers do not count or draw alike")


def test_a_certificate_is_kept(tmp_path: Path) -> None:
    workers, before = transition()
    found = certify(wanted(workers), MOVES, vote(workers, before))
    write(tmp_path / "certificates", View(3, (0, 1, 2), "k", moves=MOVES), 2, found["states"], {"seed": 0})
    (file,) = (tmp_path / "certificates").iterdir()
    kept = json.loads(file.read_text())
    assert (file.name, kept["view"], kept["step"]) == ("view-000003.json", 3, 2)
    assert kept["states"] == found["states"]
    (tmp_path / "file").write_text("")
    write(tmp_path / "file", View(4, (0,), "k"), 2, {}, {})  # a disk that fails costs the file
