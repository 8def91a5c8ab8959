"""Rehearse: what is planned, what is sent, what is chosen, and a real loss against the same fit by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from jobs.config import ConfigError, TrainConfig
from jobs.data import Dataset
from launch.forkserver import ForkServer
from pipeline.model.layered import LayeredModel
from pipeline.model.passed import Passed, relative_error
from pipeline.model.stage_fit import fit_stage
from pipeline.runtime.batch import Batch
from pipeline.runtime.boundaries import Boundaries, Passage, Side
from pipeline.runtime.groups import Way
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore
from pipeline.state.source import SourceRefused
from recovery.membership import Move
from recovery.rehearse import FAR, FEWEST, Rehearsal, Rehearse, boundary_bytes, give, require_room, take
from recovery.remedy import CannotRestore, Loss
from tests.test_recovery import _eight_blocks, events, layer, load, train, whole_ledger

CONFIG = LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=64, tie_word_embeddings=False,
)  # fmt: skip
SPAN, CPU = (2, 4), torch.device("cpu")
LOSS = Loss(7, "2:4", 6, (), before=(1, (1, 2)), after=(2, (4, 5)), ring=(7,))


# ---- what is planned ----


def test_both_neighbours_are_asked_whatever_they_hold() -> None:
    assert Rehearse().plan(LOSS) == Move(7, "2:4", "rehearse", ((1, "1:2"), (2, "4:5")))
    ends = Loss(7, "1:5", 6, (), before=(1, (0, 1)), after=(2, (5, 6)), ring=(7,))
    assert Rehearse().plan(ends).sources == ((1, "0:1"), (2, "5:6")), "no neighbour has to resemble it"


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (Loss(7, "0:2", 6, (), None, (2, (2, 4)), ring=(7,)), "span 0:2 holds the embedding or the head"),
        (Loss(7, "2:4", 6, (), None, (2, (4, 5)), ring=(7,)), "the neighbour before span 2:4 is lost too"),
        (Loss(7, "2:4", 6, (), ring=(7,)), "the neighbour before and after span 2:4 is lost too"),
        (Loss(7, "2:4", 6, (), (1, (1, 2)), (2, (4, 5)), ring=(7, 8)), "2 workers are to hold span 2:4, and must come"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(loss: Loss, told: str) -> None:
    with pytest.raises(CannotRestore, match=told):
        Rehearse().plan(loss)


def test_where_no_neighbour_has_blocks_it_stays_as_it_was_built() -> None:
    assert Rehearse().combine([], []) is None


def test_how_much_is_kept_and_what_is_too_little() -> None:
    model = LayeredModel(CONFIG)
    config = TrainConfig(recovery="rehearse", sequence_length=8, microbatch_size=1)
    assert boundary_bytes(config, model) == 12 * 32 * 16 * 2, "as many tokens as it is worth fitting to"
    long = TrainConfig(recovery="rehearse", sequence_length=8192, microbatch_size=4, rehearse_mib=1)
    assert boundary_bytes(long, model) == 0
    with pytest.raises(ConfigError, match="rehearse_mib is 1; allowed: 8 or more with recovery rehearse, for 8"):
        require_room(long, model)
    require_room(TrainConfig(sequence_length=8192, microbatch_size=4, rehearse_mib=1), model)  # auto goes without


# ---- what is sent ----


class Wire:
    """Both ends of a group of two: what one sends the other receives."""

    def __init__(self) -> None:
        self.messages: list[Tensor] = []

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> Any:
        self.messages += [tensor.clone() for tensor in tensors]
        return SimpleNamespace(wait=lambda _: True)

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> Any:
        for tensor in tensors:
            tensor.copy_(self.messages.pop(0))
        return SimpleNamespace(wait=lambda _: True)


def neighbour(generation: int = 0, sides: tuple[Side, ...] = ("into",), shapes: int = 3) -> Any:
    kept = Boundaries(1 << 20, generation)
    for number in range(shapes):
        for side in sides:
            kept.keep(side, SPAN, Passage(5, number), torch.randn(1 + number, 4, 16))
    kept.committed()
    return SimpleNamespace(boundaries=kept, pulse=lambda: None)


def test_hidden_states_arrive_as_they_were_kept() -> None:
    source, wire = neighbour(), Wire()
    way = Way(wire, 0, 16)
    give(source, way, "into", SPAN, None)  # type: ignore[arg-type]
    found = take(source, way, SPAN, 0, None)  # type: ignore[arg-type]
    kept = source.boundaries.of("into", SPAN)
    assert list(found) == list(kept)
    assert all(torch.equal(found[passage], kept[passage]) for passage in kept)
    assert wire.messages == []
    give(source, way, "out of", SPAN, None)  # type: ignore[arg-type]
    assert take(source, way, SPAN, 0, None) == {}, "a neighbour may have nothing yet"  # type: ignore[arg-type]


def test_nothing_of_another_generation_is_taken() -> None:
    way = Way(Wire(), 0, 16)
    give(neighbour(generation=1), way, "into", SPAN, None)  # type: ignore[arg-type]
    with pytest.raises(SourceRefused, match="a neighbour of span 2:4 keeps is of generation 1; the run is at gener"):
        take(neighbour(), way, SPAN, 2, None)  # type: ignore[arg-type]


# ---- what is chosen ----


def joiner(seed: int) -> Any:
    store = ResidentStore(LayeredModel(CONFIG), [SPAN], OptimizerConfig(), seed=seed, device=CPU)
    return SimpleNamespace(store=store, pulse=lambda: None)


def pairs(teacher: Any, count: int) -> list[Passed]:
    draw, module = torch.Generator().manual_seed(3), teacher.store.modules[SPAN]
    with torch.no_grad():
        return [Passed(x := torch.randn(2, 8, 16, generator=draw), module(x)) for _ in range(count)]


def rehearsed(worker: Any, given: list[Passed], other: int | None) -> dict[str, Any]:
    """What is told of a rebuild; `other` is the seed of the neighbours' mean, if there is one."""
    told: list[Any] = []

    def mean() -> bool:
        if other is not None:
            for name, state in joiner(other).store.states.items():
                worker.store.states[name].put(state.tensors())
        return other is not None

    Rehearsal(lambda *_: Batch((), {}), told.append).rebuild(worker, SPAN, given, mean)
    return told[0]


def test_it_begins_with_the_mean_unless_that_is_far_worse_and_ends_with_a_fit() -> None:
    teacher = joiner(1)
    with torch.no_grad():
        for parameter in teacher.store.modules[SPAN].parameters():
            if parameter.dim() == 2:
                parameter.mul_(20.0)
    given = pairs(teacher, 40)
    same = rehearsed(hurt := joiner(2), given, other=None)
    assert same["event"] == "rehearsed"
    assert same["start"] == "what it was built with"
    assert same["error_after"] < same["error_before"]
    assert abs(relative_error(hurt.store.modules[SPAN], given) - same["error_after"]) < 0.2
    alike = rehearsed(joiner(2), given, other=5)
    assert alike["start"] == "the mean of its neighbours", "a mean is taken that is not far worse"
    exact = joiner(1)
    for name, state in teacher.store.states.items():
        exact.store.states[name].put(state.tensors())
    kept = rehearsed(exact, given, other=5)
    assert kept["start"] == "what it was built with", "a mean that is far worse is not taken"
    assert kept["error_after"] == kept["error_before"] < 1e-9
    assert exact.store.modules[SPAN].training, "it goes on with training"


def test_without_enough_pairs_it_is_the_mean() -> None:
    worker, other = joiner(2), joiner(5)
    told = rehearsed(worker, pairs(joiner(1), FEWEST - 1), other=5)
    assert told["event"] == "not_rehearsed"
    assert told["reason"] == (
        f"its neighbours have {FEWEST - 1} microbatches in common; {FEWEST} or more are needed; "
        "it begins as the mean of its neighbours"
    )
    mine, theirs = worker.store.modules[SPAN].state_dict(), other.store.modules[SPAN].state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_only_microbatches_of_which_both_sides_are_known_are_used() -> None:
    into = {Passage(1, m): torch.zeros(1, 2, 16) for m in range(3)}
    out = {Passage(1, m): torch.ones(1, 2, 16) for m in (2, 1, 5)}
    mask = torch.tensor([[1, 0]])
    asked: list[tuple[int, int]] = []

    def batch(step: int, microbatch: int) -> Batch:
        asked.append((step, microbatch))
        return Batch((), {"attention_mask": mask})

    found = Rehearsal(batch).pairs(into, out, CPU)
    assert asked == [(1, 1), (1, 2)]
    assert all(torch.equal(pair.attention_mask, mask) and pair.position_ids is None for pair in found)  # type: ignore[arg-type]


# ---- a real loss ----


def test_the_first_stage_of_blocks_comes_back_as_fitted_by_hand(forkserver: ForkServer, tmp_path: Path) -> None:
    """CheckFree cannot bring it back: its neighbour before holds the embedding. What the neighbours kept of steps is
    computed again here from the checkpoint before each."""
    out = tmp_path / "run"
    flags = ["--workers", "5", "--recovery", "rehearse", "--model", str(_eight_blocks(tmp_path)), "--lr", "1e-2"]
    flags += ["--checkpoint-every", "1", "--keep", "99", "--inject", "kill:worker=1,step=11,at=optimizer"]
    train(forkserver, out, *flags)
    whole_ledger(out)
    (told,) = events(out, "rehearsed")
    (resumed,) = events(out, "resumed")
    assert resumed["restores"] == [[5, "1:3", "rehearse"]]
    assert told["span"] == "1:3"
    assert told["error_after"] < 0.7 * told["error_before"]

    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    layered, dataset = LayeredModel(model.config), Dataset.open(out / "data")
    config = TrainConfig(recovery="rehearse", sequence_length=32, microbatch_size=2)
    count = boundary_bytes(config, layered) // (2 * 32 * layered.hidden_size * 2)  # of the last microbatches
    given: list[Passed] = []
    for number in range(12 * 4 - count, 12 * 4):
        step, microbatch = divmod(number, 4)
        load(model, out, step)
        rows = [torch.from_numpy(dataset.train_sample(8 * step + 2 * microbatch + i)) for i in range(2)]
        with torch.no_grad():
            hidden = model(torch.stack(rows)[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
        given.append(Passed(hidden[0].bfloat16(), hidden[2].bfloat16()))

    stage = layered.build((1, 3), seed=0).eval()
    built = relative_error(stage, given[-1:])
    theirs = {name: t for n in (3, 4) for name, t in layer(out, 12, n).items()}
    with torch.no_grad():
        drawn = {name: weight.clone() for name, weight in stage.state_dict().items()}
        for n in (1, 2):
            for name, parameter in stage.named_layer_parameters(n).items():
                parameter.copy_(theirs[f"param/{name.replace(f'layers.{n - 1}.', f'layers.{n + 1}.')}"])
        if not relative_error(stage, given[-1:]) < FAR * built:
            stage.load_state_dict(drawn)
    fit = fit_stage(stage, given)
    assert told["tokens"] == fit.tokens
    assert told["error_after"] == pytest.approx(fit.after, rel=0.02)
    for n in (1, 2):
        saved = layer(out, 12, n)
        for name, parameter in stage.named_layer_parameters(n).items():
            scale = float(parameter.detach().abs().max())
            assert float((saved[f"param/{name}"] - parameter.detach()).abs().max()) < 0.02 * scale, name
            assert not saved[f"exp_avg/{name}"].any(), "its moments begin anew"
        assert {float(v) for key, v in saved.items() if key.startswith("lr_scale/")} == {1.0}
