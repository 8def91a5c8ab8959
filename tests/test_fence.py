"""What an older generation has left comes back by no way: each source of state, and each path that takes from it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.model.layered import LayeredModel
from pipeline.model.weights import preset
from pipeline.runtime.groups import Way
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore
from pipeline.state.source import Source, SourceRefused
from recovery import checkpoint, restore
from recovery.checkpoint import Verifier
from recovery.membership import START, Move, View
from recovery.policy import remedies
from tests.test_checkpoint import flip

KINDS = ("start", "checkpoint", "host", *remedies())


def saved(root: Path, step: int, generation: int, state: str) -> None:
    """A checkpoint: whole, set aside, unfinished or damaged."""
    folder = checkpoint.begin(root, step)
    record = checkpoint.write_layer(folder, 0, {"param/w": torch.full((3,), float(generation))})
    if state == "unfinished":
        return
    path = checkpoint.commit(root, step, [record], {"step": step, "generation": generation})
    if state == "aside":
        path.rename(path.with_name(f"{path.name}.old"))
    elif state == "damaged":
        flip(path / "layer-00000.safetensors", 20)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 4), st.sampled_from(["whole", "aside", "damaged", "unfinished"])),
        max_size=6, unique_by=lambda each: each[0],
    ),
    st.integers(0, 4),
)  # fmt: skip
def test_no_checkpoint_of_another_generation_is_found(
    tmp_path_factory: pytest.TempPathFactory, folders: list[tuple[int, int, str]], generation: int
) -> None:
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    for step, of, state in sorted(folders):
        saved(root, step, of, state)
    found = Verifier(generation).find(root)
    usable = [step for step, of, state in folders if of == generation and state in ("whole", "aside")]
    assert (found.manifest and found.manifest["extra"]["step"]) == max(usable, default=None)
    if found.path is not None and found.manifest is not None:
        assert float(checkpoint.read_layer(found.path, found.manifest, 0)["param/w"][0]) == generation


@given(st.sampled_from(KINDS), st.integers(0, 5), st.integers(0, 5), st.integers(0, 9), st.none() | st.integers(0, 9))
def test_a_source_gives_what_is_wanted_or_nothing(
    kind: str, has: int, wanted: int, step: int, asked: int | None
) -> None:
    source = Source(kind, "somewhere", step, has)
    if has == wanted and asked in (None, step):
        assert source.require(asked, wanted) is source
        return
    with pytest.raises(SourceRefused, match=r"nothing of another may come back|wanted is step"):
        source.require(asked, wanted)


def store() -> ResidentStore:
    model = LayeredModel(preset("llama-tiny", vocab_size=32))
    return ResidentStore(model, [(0, 2)], OptimizerConfig(), seed=0, device=torch.device("cpu"))


def view(generation: int, **more: Any) -> View:
    return View(2, (0, 1), "key", details={"source": None}, generation=generation, first_step=0, **more)


def test_the_start_of_a_run_is_of_the_first_generation(tmp_path: Path) -> None:
    held, pulse = store(), SimpleNamespace(count=0)
    worker: Any = SimpleNamespace(id=1, store=held, pulse=pulse)
    assert restore.roll_back(worker, view(0, rollback=START), tmp_path) == 0
    before = held.weights(0)
    kept = {name: weight.clone() for name, weight in before.items()}
    with pytest.raises(SourceRefused, match="weights from the seed is of generation 0; the run is at generation 1"):
        restore.roll_back(worker, view(1, rollback=START), tmp_path)
    assert all(torch.equal(kept[name], weight) for name, weight in held.weights(0).items()), "nothing was filled in"


def test_a_checkpoint_that_a_view_names_is_asked_what_it_is_of(tmp_path: Path) -> None:
    saved(tmp_path, 4, 1, "whole")
    held: Any = SimpleNamespace(owners=[], load=None)
    path = checkpoint.directory(tmp_path, 4)
    assert restore.load_checkpoint(held, path, 1) == 4
    with pytest.raises(SourceRefused, match="is of generation 1; the run is at generation 2"):
        restore.load_checkpoint(held, path, 2)


class Wire:
    """A group of two whose other end says that what it sends is of a step and a generation."""

    def __init__(self, step: int, generation: int) -> None:
        self.header = torch.tensor([step, generation])

    def recv(self, tensors: list[torch.Tensor], *_: int) -> Any:
        if tensors[0].dtype == torch.int64:
            tensors[0].copy_(self.header)
        else:
            tensors[0].fill_(7.0)
        return SimpleNamespace(wait=lambda _: None)


@pytest.mark.parametrize("remedy", [name for name in remedies() if name not in ("random", "rehearse")])
@pytest.mark.parametrize("generation", [0, 2])
def test_what_a_worker_sends_is_refused_by_whoever_takes_it(remedy: str, generation: int) -> None:
    """A replica, a copy in memory, neighbours, a twin, a redundant stage: whatever the remedy, the header decides. What
    neighbours rehearse with is in test_rehearse."""
    held = store()
    worker: Any = SimpleNamespace(
        id=1, store=held, pulse=lambda: None, probe=lambda *_: None, settings=SimpleNamespace(deadline_s=1.0)
    )
    move = Move(1, "0:2", remedy, ((0, "0:2"),))
    kept = {name: weight.clone() for name, weight in held.weights(1).items()}
    ways = {0: Way(cast(Any, Wire(3, generation)), 0, 16)}
    with pytest.raises(SourceRefused, match=f"is of generation {generation}; the run is at generation 1"):
        restore._take(worker, view(1), move, ways, remedies()[remedy], {}, 3, (), None)
    assert all(torch.equal(kept[name], weight) for name, weight in held.weights(1).items())
    ways = {0: Way(cast(Any, Wire(3, 1)), 0, 16)}
    restore._take(worker, view(1), move, ways, remedies()[remedy], {}, 3, (), None)
    assert all(state.generation == 1 for state in held.states_of("0:2"))
