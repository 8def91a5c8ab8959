"""A guarded model: what a guard does to the outputs of plain transformers, to the layer-by-layer forward, on the disk;
the router against its definition; projections against their algebra."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from jobs.config import ConfigError
from jobs.unlearn.guard import BASE, TENSORS, Guard, is_guarded, plain
from jobs.unlearn.methods.o3 import random_labels
from jobs.unlearn.probe import descriptions, logits_of, question
from jobs.unlearn.router import Router, described, least_errors, weight
from launch.guarded import put_on
from launch.inference import load
from pipeline.model.projection import PROJECTION, Projections, project
from pipeline.model.weights import ModelError, preset
from pipeline.runtime.batch import IGNORED

BLOCKS = {"llama-tiny": ("model.layers", "self_attn.q_proj"), "gpt2-tiny": ("transformer.h", "attn.c_attn")}


def model_in(folder: Path, name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(preset(name))
    model.save_pretrained(folder)
    return model.eval()


def guard_of(name: str, method: str, seed: int = 0) -> Guard:
    """Of a preset, with random values large enough to be seen."""
    made, (blocks, linear) = torch.Generator().manual_seed(seed), BLOCKS[name]
    if method == "mrp":
        return Guard("mrp", {f"{blocks}.{n}": torch.randn(2, 64, generator=made) for n in (1, 3)})
    outputs = 192 if name.startswith("gpt2") else 64
    adapter = {
        f"{blocks}.2.{linear}.lora_A.weight": torch.randn(4, 64, generator=made),
        f"{blocks}.2.{linear}.lora_B.weight": torch.randn(outputs, 4, generator=made),
    }
    router = Router(torch.zeros(4, 64), torch.ones(4, 64), torch.zeros(4, 64), 0.0)
    return Guard("o3", adapter=adapter, scale=0.5, strength=1.2, earlier=[dict(adapter)], routers=[router])


def ids_of(seed: int, rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- projections ----


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_projection(directions: int, seed: int) -> None:
    """Nothing of the directions is left, what is orthogonal to them stays, and a second time changes nothing."""
    made = torch.Generator().manual_seed(seed)
    taken, hidden = torch.randn(directions, 16, generator=made), torch.randn(2, 3, 16, generator=made)
    found = project(hidden, taken)
    assert (found @ taken.T).abs().max() < 1e-4
    assert torch.allclose(project(found, taken), found, atol=1e-5)
    explained = torch.linalg.lstsq(taken.T, (hidden - found).reshape(-1, 16).T).solution
    assert torch.allclose(taken.T @ explained, (hidden - found).reshape(-1, 16).T, atol=1e-4)


def test_which_blocks_are_projected() -> None:
    drawn = [Projections(seed=seed).within(12) for seed in range(40)]
    assert all(len(set(each)) == 2 for each in drawn)
    assert all(each == sorted(each) for each in drawn)
    assert set().union(*drawn) == set(range(12))
    kept = Projections(seed=1, kept={7: torch.ones(1, 4)})
    assert kept.within(12) == [7]
    with pytest.raises(ModelError, match="projected is 13; allowed: 1 to 12, the model's blocks"):
        Projections(count=13).within(12)
    with pytest.raises(ModelError, match=r"an earlier request has projected blocks \[7\]; the model has 3"):
        kept.within(3)


def test_earlier_directions_are_taken_too() -> None:
    block, kept = torch.nn.Linear(8, 8), torch.randn(2, 8)
    projections = Projections(3, kept={4: kept})
    projections.adapt(block, 4, 8)
    module = block.get_submodule("projection")
    module.weight = torch.nn.Parameter(projections.first_value("b" + PROJECTION, (3, 8), 5))
    found = block(torch.randn(4, 8))
    assert (found @ kept.T).abs().max() < 1e-4
    assert (found @ module.weight.T).abs().max() < 1e-4
    found.square().sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.abs().max() > 0


# ---- the router ----


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_least_errors(near: list[int], far: list[int]) -> None:
    """No limit makes fewer errors."""
    chosen, told = least_errors(torch.tensor(near).float(), torch.tensor(far).float())

    def errors(limit: float) -> float:
        return sum(x > limit for x in near) / len(near) + sum(x <= limit for x in far) / len(far)

    assert told == pytest.approx(errors(chosen))
    best = min(errors(limit / 2) for limit in range(-1, 20))
    # to know none of them is as bad as to know all, and a router that knows none would be no guard
    assert errors(chosen) <= max(best, 1.0) + 1e-9
    if best < 1.0:
        assert errors(chosen) == pytest.approx(best)


def test_router_tells_questions_apart() -> None:
    made = torch.Generator().manual_seed(0)
    told = torch.randn(3, 8, generator=made)  # what they are told by, in noise that is larger

    def questions(count: int, about: float) -> Tensor:
        return 3 * torch.randn(count, 3, 8, generator=made) + about * told

    forget, retain = questions(40, 3), questions(60, -3)
    router = Router.fit(forget, retain)
    unseen = router.near(questions(200, 3)).float().mean(), router.near(questions(200, -3)).float().mean()
    assert unseen[0] > 0.9
    assert unseen[1] < 0.1
    again = Router.of(router.tensors())
    assert torch.equal(again.near(forget), router.near(forget))
    other = Router.fit(retain, forget)
    found = torch.cat([forget, retain])
    assert torch.equal(weight([router, other], found, 1.2) > 0, router.near(found) | other.near(found))
    assert weight([router], found, 1.2).unique().tolist() == pytest.approx([0.0, 1.2])


def test_a_row_is_left_out_of_its_own_prediction() -> None:
    """Noise alone is told apart no better than by chance, however many directions there are to tell it by."""
    made = torch.Generator().manual_seed(1)
    rows = torch.randn(60, 4, 64, generator=made)
    router = Router.fit(rows[:30], rows[30:])
    other = torch.randn(400, 4, 64, generator=made)
    assert router.near(rows[:30]).float().mean() - router.near(rows[30:]).float().mean() > 0.9, "it knows these"
    assert 0.2 < router.near(other).float().mean() < 0.8


def test_description_is_a_mean_over_the_question() -> None:
    hidden, asked = torch.randn(2, 5, 3), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    found = described(hidden, asked)
    assert torch.allclose(found[0], hidden[0, :2].mean(dim=0))
    assert torch.allclose(found[1], hidden[1].mean(dim=0))
    labels = torch.tensor([[IGNORED, IGNORED, 5, 6, IGNORED], [7, IGNORED, 7, 8, 9], [IGNORED] * 5])
    expected = [[True, True, True, False, False], [True, False, False, False, False], [True] * 5]
    assert question(labels).tolist() == expected


# ---- a guarded model ----


@pytest.mark.parametrize("name", sorted(BLOCKS))
@pytest.mark.parametrize("method", ["mrp", "o3"])
def test_layer_by_layer_is_as_in_transformers(tmp_path: Path, name: str, method: str) -> None:
    """The same logits, and others than those of the plain model."""
    before = model_in(tmp_path / "plain", name)(ids_of(1)).logits
    guard = guard_of(name, method)
    if method == "o3":  # near for the first row alone
        found = descriptions(tmp_path / "plain", [ids_of(1)])[0]
        guard.routers = [Router.fit(found[:1].repeat(2, 1, 1), found[1:])]
    guard.write(tmp_path / "plain", tmp_path / "model")
    (by_layer,) = logits_of(tmp_path / "model", [ids_of(1)])
    model, _ = load_model(tmp_path / "model")
    with torch.no_grad():
        in_transformers = model(ids_of(1)).logits
    assert torch.allclose(by_layer, in_transformers, atol=1e-4)
    changed = (by_layer - before).abs().amax(dim=(1, 2)) > 1e-2
    assert changed.tolist() == ([True] * 3 if method == "mrp" else [True, False, False])


def load_model(folder: Path) -> tuple[PreTrainedModel, Guard]:
    """Without a tokenizer, which these have not."""
    model, guard = AutoModelForCausalLM.from_pretrained(plain(folder)).eval(), Guard.read(folder)
    assert guard is not None
    put_on(guard, model)
    return model, guard


def test_an_answer_goes_the_way_of_its_question(tmp_path: Path) -> None:
    """Generation with a cache is the same as the whole text at once, routed by the prompt."""
    model_in(tmp_path / "plain", "llama-tiny")
    guard = guard_of("llama-tiny", "o3")
    prompt = ids_of(2, rows=1)
    found = descriptions(tmp_path / "plain", [prompt])[0]
    guard.routers = [Router.fit(found.repeat(2, 1, 1), found + 1)]
    guard.write(tmp_path / "plain", tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    with torch.no_grad():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    asked = torch.zeros_like(out[:, :-1]).bool()
    asked[:, : prompt.shape[1]] = True
    (logits,) = logits_of(tmp_path / "model", [out[:, :-1]], [asked])
    assert torch.equal(logits[0, prompt.shape[1] - 1 :].argmax(dim=-1), out[0, prompt.shape[1] :])


@pytest.mark.parametrize("method", ["mrp", "o3"])
def test_on_the_disk(tmp_path: Path, method: str) -> None:
    model_in(tmp_path / "plain", "llama-tiny")
    guard = guard_of("llama-tiny", method)
    guard.write(tmp_path / "plain", tmp_path / "model")
    again = Guard.read(tmp_path / "model")
    assert again is not None
    assert is_guarded(tmp_path / "model")
    assert (again.method, again.scale, again.strength) == (guard.method, guard.scale, guard.strength)
    for had, has in ((guard.projections, again.projections), (guard.adapter, again.adapter)):
        assert had.keys() == has.keys()
        assert all(torch.equal(had[name], has[name]) for name in had)
    assert [sorted(each) for each in again.earlier] == [sorted(each) for each in guard.earlier]
    assert len(again.routers) == len(guard.routers)
    with pytest.raises(ValueError, match="Unrecognized model"):  # nothing loads it without its guard by accident
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    guard.write(tmp_path / "model" / BASE, tmp_path / "model")  # in place of itself
    assert Guard.read(tmp_path / "model") is not None
    (tmp_path / "model" / TENSORS).write_bytes(b"nothing")
    with pytest.raises(ModelError, match="the guard of its model cannot be read"):
        Guard.read(tmp_path / "model")
    with pytest.raises(ConfigError, match="the guard of its model cannot be read"):
        load(tmp_path / "model")


# ---- random labels ----


def test_random_labels() -> None:
    """Keyed by seed, label and position; spread over the vocabulary; IGNORED stays."""
    labels = torch.arange(400).repeat(5, 1)
    labels[:, :3] = IGNORED
    found = random_labels(labels, 50, 0)
    assert torch.equal(found, random_labels(labels, 50, 0))
    assert (found[:, :3] == IGNORED).all()
    assert (found[:, 3:] >= 0).all()
    assert (found[:, 3:] < 50).all()
    assert (found != random_labels(labels, 50, 1)).float().mean() > 0.9
    assert (found[:, 3:] == labels[:, 3:]).float().mean() < 0.05
    counts = torch.bincount(random_labels(torch.arange(20_000)[None], 50, 7)[0], minlength=50)
    assert counts.min() > 250
    assert counts.max() < 600
