"""Layers that move while training goes on: what has come is, to the bit, what was given, or it is not used."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.model.layered import LayeredModel
from pipeline.model.weights import preset
from pipeline.runtime.groups import GroupBuilder
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore
from recovery import keys
from recovery.membership import Move
from recovery.migration import Migration, Plan, layers_of

LAYERS = 6
MOVES = (Move(1, "2:4", "replica", ((0, "2:4"),)),)
PLAN = Plan(1, 2, "there", MOVES)


def model() -> LayeredModel:
    config = preset("llama-tiny", vocab_size=64)
    config.num_hidden_layers = LAYERS - 2
    config.tie_word_embeddings = False
    return LayeredModel(config)


class End:
    """A worker that holds a span, and its part in a migration."""

    def __init__(self, id: int, store: dist.Store, span: tuple[int, int], most_bytes: int) -> None:
        held = ResidentStore(model(), [span], OptimizerConfig(lr=1e-2), seed=id, device=torch.device("cpu"))
        self.worker: Any = SimpleNamespace(id=id, store=held)
        builder = GroupBuilder(store, id, "127.0.0.1", torch.device("cpu"), 20.0)
        self.migration = Migration(self.worker, lambda: builder, store, most_bytes)

    @property
    def states(self) -> Any:
        return self.worker.store.states

    def step(self, number: int) -> None:
        for state in self.states.values():
            made = torch.Generator().manual_seed(1000 * number + int(state.name))
            state.gradient.copy_(torch.randn(state.size, generator=made))
            self.migration.applied(state, 0.5, 1e-2 / (number + 1))
            state.apply(0.5, 1e-2 / (number + 1))
        self.migration.stepped()


@pytest.fixture
def ends() -> Callable[..., tuple[End, End, dist.Store]]:
    def make(most_bytes: int = 1) -> tuple[End, End, dist.Store]:
        store = dist.HashStore()
        return End(0, store, (0, 4), most_bytes), End(1, store, (4, 6), most_bytes), store

    return make


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def both(giver: End, taker: End, view: int = 2, layout: str = "there") -> dict[str, int]:
    """The view changes for both at once."""
    thread = threading.Thread(target=lambda: giver.migration.finish(view, layout))
    thread.start()
    found = taker.migration.finish(view, layout)
    thread.join()
    return found


@pytest.mark.parametrize("most_bytes", [1, 1 << 30], ids=["a layer a step", "all at once"])
def test_what_moves_while_steps_go_on_is_bitwise_what_was_given(ends: Any, most_bytes: int) -> None:
    giver, taker, store = ends(most_bytes)
    giver.step(0)
    for end in (giver, taker):
        end.migration.begin(PLAN, joins=False)
    for number in range(1, 5):
        giver.step(number)
        taker.step(number)
    until(lambda: keys.has_migrated(store, 1, [0]))
    giver.step(5)
    taker.step(5)
    assert both(giver, taker) == {"2": 6, "3": 6}
    taker.worker.store.adopt({"2", "3"})
    taker.worker.store.hold([(2, 6)])
    for name in ("2", "3"):
        assert taker.states[name].fingerprint() == giver.states[name].fingerprint()
    taker.step(6)  # what was adopted trains on
    giver.step(6)
    assert taker.states["3"].fingerprint() == giver.states["3"].fingerprint()


def test_a_worker_that_waits_to_join_listens_at_once(ends: Any) -> None:
    giver, taker, store = ends()
    giver.migration.begin(PLAN, joins=False)
    taker.migration.begin(PLAN, joins=True)
    for number in range(3):
        giver.step(number)
    until(lambda: keys.has_migrated(store, 1, [0]))
    assert both(giver, taker) == {"2": 3, "3": 3}


def test_another_view_than_was_told_of_ends_it_at_once(ends: Any) -> None:
    """A loss does not wait for what is on its way."""
    giver, taker, _ = ends()
    giver.migration.begin(PLAN, joins=False)
    giver.step(0)  # it waits for the other end, which never comes
    began = time.monotonic()
    assert giver.migration.finish(2, "elsewhere") == {}
    assert taker.migration.finish(2, "elsewhere") == {}
    assert time.monotonic() - began < 1.5
    taker.worker.store.adopt(())
    taker.worker.store.hold([(2, 6)])
    assert taker.states["2"].version == 0


def test_who_gives_and_dies_leaves_nothing_that_is_used(ends: Any) -> None:
    giver, taker, _ = ends(1 << 30)
    taker.migration.begin(PLAN, joins=True)
    giver.migration.begin(PLAN, joins=False)
    giver.step(0)
    until(lambda: bool(taker.migration._taking[0].there))
    giver.migration._giving[0].well = False  # as a worker that is gone: its end says nothing more
    giver.step(1)
    found = both(giver, taker, 2, "elsewhere")
    assert all(version <= 1 for version in found.values()), "and it is not of the committed step, 2"


def test_what_is_copied_from_one_worker_alone_may_move_beforehand() -> None:
    assert layers_of(MOVES[0], LAYERS, tied=False) == [2, 3]
    assert layers_of(Move(1, "0:2", "replica", ((0, "0:2"),)), LAYERS, tied=True) == [1]
    assert layers_of(Move(1, "2:4", "checkfree", ((0, "0:2"), (2, "4:6"))), LAYERS, tied=False) == []
    assert layers_of(Move(1, "tied", "replica", ((0, "tied"),)), LAYERS, tied=True) == []
