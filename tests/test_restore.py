"""A joiner's state is what its remedy says, whatever an earlier remedy has left in it when it was interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from pipeline.model.layered import LayeredModel
from pipeline.runtime.batch import Batch
from pipeline.runtime.groups import Way
from pipeline.runtime.transport import LinkError
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore
from pipeline.state.source import SourceRefused
from recovery import checkpoint
from recovery.checkfree import CheckFreeSettings
from recovery.membership import START, Move, View
from recovery.policy import DEFAULTS, remedies
from recovery.rehearse import Rehearsal
from recovery.restore import restore, roll_back

CONFIG = LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=64, tie_word_embeddings=False,
)  # fmt: skip
MIDDLE, CPU = (2, 4), torch.device("cpu")


def store(seed: int = 0) -> ResidentStore:
    return ResidentStore(LayeredModel(CONFIG), [MIDDLE], OptimizerConfig(), seed=seed, device=CPU)


def state(of: ResidentStore) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for layer in range(*MIDDLE) for key, tensor in of.tensors(layer).items()}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@dataclass
class Wire:
    """A group whose other end sends layer after layer, each behind its header, and then is lost."""

    messages: list[torch.Tensor] = field(default_factory=list)

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Any:
        def wait(timeout: Any) -> None:
            if not self.messages:
                raise RuntimeError("Connection closed by peer")
            tensors[0].copy_(self.messages.pop(0))

        return SimpleNamespace(wait=wait)


def joiner(seed: int = 0) -> Any:
    return SimpleNamespace(
        id=7, store=store(seed), settings=SimpleNamespace(deadline_s=5.0, seed=seed, device=CPU), pulse=lambda: None,
        probe=lambda *_: None,
    )  # fmt: skip


def flat(of: ResidentStore, layer: int, what: str) -> torch.Tensor:
    found = of.tensors(layer)
    left_out = {"state": ("",), "moments": ("lr_scale/",), "weights": ("lr_scale/", "exp_avg", "step/")}[what]
    keys = [key for key in sorted(found) if what == "state" or not key.startswith(left_out)]
    return torch.cat([found[key].reshape(-1) for key in keys])


def sent(of: ResidentStore, what: str, layers: int = 2) -> Wire:
    """All that a holder sends of its layers, or of the first ones."""
    each = [of.states[str(layer)] for layer in range(*MIDDLE)][:layers]
    headers = [torch.tensor([state.version, state.generation]) for state in each]
    return Wire([m for header, s in zip(headers, each, strict=True) for m in (header, flat(of, int(s.name), what))])


def take(worker: Any, remedy: str, *wires: Wire, settings: CheckFreeSettings = DEFAULTS) -> None:
    """The joiner's part in one restore, from workers 1, 2 ..."""
    sources = tuple((number, "2:4") for number, _ in enumerate(wires, 1))
    view = View(3, (1, 2, 7), "", details={"source": None}, moves=(Move(7, "2:4", remedy, sources),))
    communicator: Any = SimpleNamespace(
        ways=lambda *_: nullcontext({n: Way(wire, 0, 16) for n, wire in enumerate(wires)})
    )
    restore(worker, view, communicator, remedies(settings), {"2": 0.6, "3": 0.8}, step=1)


def trained(seed: int) -> ResidentStore:
    """A holder that has made a step."""
    made = store(seed)
    for each in made.states.values():
        each.gradient.normal_(generator=torch.Generator().manual_seed(seed))
        each.apply(1.0, 0.1)
        each.lr_scale.fill_(1.1)
    return made


def neighbours() -> tuple[Wire, Wire]:
    a, b = trained(1), trained(2)
    return sent(a, "weights"), sent(b, "weights")


@pytest.mark.parametrize("remedy", ["checkfree", "random"])
@pytest.mark.parametrize("layers", [1, 2])
def test_what_an_interrupted_replica_has_left_is_no_part_of_what_follows(remedy: str, layers: int) -> None:
    """Two holders of a stage are rebuilt. One of them had begun to take the state of a replica, which was lost then."""
    fresh, hurt, holder = joiner(), joiner(), trained(5)
    wire = sent(holder, "state", layers)
    if layers == 1:
        with pytest.raises(LinkError, match=r"restoring span 2:4 on worker 7 failed: Connection closed by peer"):
            take(hurt, "replica", wire)
    else:
        take(hurt, "replica", wire)
        assert same(state(hurt.store), state(holder))
    for worker in (fresh, hurt):
        take(worker, remedy, *(neighbours() if remedy == "checkfree" else ()))
    assert same(state(fresh.store), state(hurt.store))


@pytest.mark.parametrize("remedy", ["replica", "checkfree"])
@pytest.mark.parametrize(
    ("version", "generation", "told"),
    [
        (0, 0, r"of span 2:4 on worker 1 is of step 0; wanted is step 1"),
        (2, 0, r"of span 2:4 on worker 1 is of step 2; wanted is step 1"),
        (1, 1, r"of span 2:4 on worker 1 is of generation 1; the run is at generation 0, and nothing of another"),
    ],
)
def test_a_state_of_another_step_or_generation_is_refused(
    remedy: str, version: int, generation: int, told: str
) -> None:
    worker, holder = joiner(), trained(5)
    before = state(worker.store)
    holder.states["2"].version, holder.states["2"].generation = version, generation
    carries = "state" if remedy == "replica" else "weights"
    wires = [sent(holder, carries), sent(trained(6), carries)][: 1 if remedy == "replica" else 2]
    with pytest.raises(SourceRefused, match=told):
        take(worker, remedy, *wires)
    after = state(worker.store)
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("param/"))


def test_to_start_again_is_to_be_as_one_has_been_built(tmp_path: Path) -> None:
    worker = joiner(seed=3)
    built = state(worker.store)
    for each in worker.store.states.values():
        each.gradient.fill_(1.0)
        each.apply(1.0, 0.1)
        each.gradient.fill_(1.0)
    assert not same(state(worker.store), built)
    view = View(3, (7,), "", first_step=0, details={"source": None, "attempt": 1}, rollback=START)
    (tmp_path / "step-00000009").mkdir()
    assert roll_back(worker, view, tmp_path) == 0
    assert list(tmp_path.iterdir()) == [], "what was saved after it is of a future that is given up"
    assert same(state(worker.store), built)
    assert all(float(each.gradient.abs().sum()) == 0 for each in worker.store.states.values())


def test_who_builds_a_large_model_is_seen_to_come_on() -> None:
    layers: list[None] = []
    ResidentStore(
        LayeredModel(CONFIG), [MIDDLE], OptimizerConfig(), seed=0, device=CPU, came_on=lambda: layers.append(None)
    )
    assert len(layers) == MIDDLE[1] - MIDDLE[0]


def test_a_remedy_that_is_not_known_is_named() -> None:
    with pytest.raises(LinkError, match="view 3 names the remedy 'magic'; known: replica, rehearse, checkfree"):
        take(joiner(), "magic")


@pytest.mark.parametrize("moments", ["new", "averaged"])
def test_moments_begin_anew_or_are_averaged_and_the_rate_is_what_the_settings_say(moments: Any) -> None:
    worker, sides = joiner(), (trained(1), trained(2))
    wires = [sent(each, "moments" if moments == "averaged" else "weights") for each in sides]
    settings = CheckFreeSettings(checkfree_moments=moments, checkfree_lr_scale=2.0)
    take(worker, "checkfree", *wires, settings=settings)
    assert not any(wire.messages for wire in wires), "all that was sent is taken"
    found, (a, b) = state(worker.store), map(state, sides)
    for key, tensor in found.items():
        mean = (a[key] + b[key]) / 2  # both have the norms of the same layers
        anew = torch.zeros_like(mean) if moments == "new" else mean
        wanted = torch.full_like(mean, 2.0) if key.startswith("lr_scale/") else mean if "param/" in key else anew
        assert torch.allclose(tensor, wanted, atol=1e-7), key
    assert any(key.startswith("exp_avg_sq/") for key in found)


# ---- what no move brings ----


def bare(seed: int = 3) -> Any:
    """A joiner that was built to be filled."""
    worker = joiner(seed)
    worker.store = ResidentStore(LayeredModel(CONFIG), [MIDDLE], OptimizerConfig(), seed=seed, device=CPU, fill=False)
    with torch.no_grad():
        for each in worker.store.states.values():
            for weight in each.weights().values():
                weight.fill_(float("nan"))
    return worker


def settle(worker: Any, view: View, **moved: Any) -> None:
    communicator: Any = SimpleNamespace(ways=lambda *_: nullcontext({}))
    restore(worker, view, communicator, remedies(), {}, step=view.first_step, **moved)


def test_what_no_move_brings_is_as_the_run_began(tmp_path: Path) -> None:
    worker = bare()
    settle(worker, View(2, (7,), "", details={"source": None}, generation=2))
    assert same(state(worker.store), state(store(3)))
    assert {(each.version, each.generation) for each in worker.store.states.values()} == {(0, 2)}
    begun = trained(5)
    folder = checkpoint.begin(tmp_path, 1)
    records = [checkpoint.write_layer(folder, layer, begun.tensors(layer)) for layer in range(*MIDDLE)]
    path = checkpoint.commit(tmp_path, 1, records, {"step": 1})
    again = bare()
    settle(again, View(2, (7,), "", details={"source": None}, first_step=1, checkpoint=str(path)))
    assert same(state(again.store), state(begun))
    assert {each.version for each in again.store.states.values()} == {1}


def test_a_remedy_that_brings_nothing_begins_as_the_run_began() -> None:
    worker = bare()
    settle(worker, View(3, (1, 7), "", details={"source": None}, moves=(Move(7, "2:4", "random", ()),)))
    found, built = (state(each) for each in (worker.store, store(3)))
    assert all(torch.equal(found[key], built[key]) for key in built if not key.startswith("lr_scale/"))
    filled = bare()
    take(filled, "replica", sent(trained(5), "state"))
    assert same(state(filled.store), state(trained(5))), "nothing is left of what it was built with"


def test_a_stage_that_is_rehearsed_begins_from_the_seed_where_the_checkpoint_of_the_start_is_gone(
    tmp_path: Path,
) -> None:
    """Its neighbours hold no blocks, and have nothing to rehearse with: what is left is where it began."""
    worker = bare()
    nothing = [torch.tensor([0, 0])]
    ways = {place: Way(Wire([*nothing]), 0, 16) for place in range(2)}
    view = View(
        3, (1, 2, 7), "", details={"source": None}, checkpoint=str(tmp_path / "gone"),
        moves=(Move(7, "2:4", "rehearse", ((1, "0:1"), (2, "5:6"))),),
    )  # fmt: skip
    told: list[Any] = []
    communicator: Any = SimpleNamespace(ways=lambda *_: nullcontext(ways))
    rehearsal = Rehearsal(lambda *_: Batch((), {}), told.append)
    restore(worker, view, communicator, remedies(), {}, step=1, rehearsal=rehearsal)
    assert [each["event"] for each in told] == ["not_rehearsed"]
    assert same(state(worker.store), state(store(3)))
