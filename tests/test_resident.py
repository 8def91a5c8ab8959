"""A store gains and loses layers between two steps: what stays is not touched, what comes is as at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from pipeline.model.layered import LayeredModel
from pipeline.schedule.ops import Span
from pipeline.state.checksum import checksum
from pipeline.state.layer_state import LayerState, StateChanged, stamp
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore, part_holders

CPU = torch.device("cpu")
LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=32, max_position_embeddings=16, tie_word_embeddings=False,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=16, n_layer=4, n_head=2, n_positions=16, vocab_size=32)
CONFIGS: dict[str, PreTrainedConfig] = {"llama": LLAMA, "gpt2, tied": GPT2, "gpt2, frozen ends": GPT2}
TRAINED = {"gpt2, frozen ends": ("*.h.[0123].mlp.*",)}


def store(config: PreTrainedConfig, *spans: Span, trained: Sequence[str] = ()) -> ResidentStore:
    model = LayeredModel(config, trained=trained)
    return ResidentStore(model, spans, OptimizerConfig(warmup_steps=0), seed=5, device=CPU)


def train(each: ResidentStore, steps: int = 2) -> None:
    for number in range(steps):
        for name, state in sorted(each.states.items()):
            seed = number * 100 + sum(map(ord, name))
            state.gradient.normal_(generator=torch.Generator().manual_seed(seed))
            state.apply(0.5, 0.1)


def states(each: ResidentStore) -> dict[str, dict[str, Tensor]]:
    return {name: {key: t.clone() for key, t in state.tensors().items()} for name, state in each.states.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([(0, 2)], [(0, 3)]), ([(0, 3)], [(0, 2)]), ([(2, 4)], [(1, 2), (3, 5)]), ([(0, 2), (4, 6)], [(0, 6)]),
        ([(0, 6)], [(0, 1), (1, 3), (5, 6)]), ([(0, 2)], [(4, 6)]), ([(4, 6)], [(0, 2), (4, 6)]), ([(1, 3)], []),
    ],
)  # fmt: skip
def test_layers_come_and_go_without_touching_the_others(name: str, before: list[Span], after: list[Span]) -> None:
    each, fresh = (store(CONFIGS[name], *spans, trained=TRAINED.get(name, ())) for spans in (before, after))
    train(each)
    had, objects, summed = states(each), dict(each.states), each.gradients.get
    each.hold(after)
    assert each.layers() == [layer for span in after for layer in range(*span)]
    assert each.states.keys() == fresh.states.keys()
    assert each.gradients.keys() == fresh.gradients.keys()
    for part, gradient in each.gradients.items():
        assert summed(part) is gradient, "sums would be of a gradient that nobody adds to any more"
        assert sum(state.gradient.numel() for state in each.states_of(part)) == gradient.numel()
    for state, tensors in states(each).items():
        assert same(tensors, had[state] if state in had else states(fresh)[state]), state
        assert state not in had or each.states[state] is objects[state]
        assert each.states[state].version == (2 if state in had else 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_put_together_again_computes_and_learns_as_if_it_had_never_changed(name: str) -> None:
    """Spans of other lengths, the same layers: outputs, gradients and the next step are the same bits."""
    ids = torch.arange(24).view(2, 12) % 32
    whole, moved = (store(CONFIGS[name], (0, 6), trained=TRAINED.get(name, ())) for _ in range(2))
    for each in (whole, moved):
        train(each)
    moved.hold([(0, 2), (2, 6)])
    moved.hold([(0, 1), (1, 5), (5, 6)])
    for each in (whole, moved):
        each.train(False)
        x = ids
        for module in each.modules.values():
            x = module(x)
        x.float().logsumexp(-1).sum().backward()
        for part, gradient in each.gradients.items():
            assert float(gradient.abs().max()) > 0, part
    for state in whole.states.values():
        assert torch.equal(state.gradient, moved.states[state.name].gradient), state.name
        for each in (state, moved.states[state.name]):
            each.apply(0.1, 0.1)
    assert all(same(tensors, states(moved)[state]) for state, tensors in states(whole).items())
    assert [s.fingerprint() for s in whole.states.values()] == [s.fingerprint() for s in moved.states.values()]


def test_a_frozen_weight_that_both_ends_share_is_one_wherever_they_meet() -> None:
    each = store(GPT2, (4, 6), trained=("*.mlp.*",))
    state = each.states["tied"]
    assert (state.size, each.part_of["tied"], "tied" in each.gradients) == (0, "tied", False)
    each.hold([(0, 2), (4, 6)])
    (weight,) = state.frozen.values()
    weight.fill_(7.0)
    for module in (each.modules[0, 2], each.modules[4, 6]):
        ends = [p for layer in range(*module.span) for p in module.named_layer_parameters(layer).items()]
        assert [bool((p == 7).all()) for name, p in ends if name == "transformer.wte.weight"] == [True]


def test_a_layer_is_held_once() -> None:
    with pytest.raises(ValueError, match="spans 0:2, 1:3 overlap; a worker holds a layer once"):
        store(LLAMA, (0, 2), (1, 3))


def test_states_are_declared_once_with_their_users() -> None:
    assert [(s.name, s.users) for s in LayeredModel(LLAMA).states] == [(str(n), (n,)) for n in range(6)]
    tied = LayeredModel(GPT2)
    assert {s.name: s.users for s in tied.states if s.shared} == {"tied": (0, 5)}
    keys = [key for state in tied.states for key in state.keys]
    assert sorted(keys) == sorted(key for layer in range(6) for key in tied.keys(layer))
    bare = LayeredModel(LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True}))
    assert [s.name for s in bare.states] == ["tied", "1", "2", "3", "4", "5"], "this embedding is nothing but shared"


def test_a_weight_that_both_ends_share_has_all_their_holders() -> None:
    holders = {(0, 2): (0, 3), (2, 4): (1,), (4, 6): (2,)}
    assert part_holders(holders, 6, tied=True)["tied"] == (0, 2, 3)
    assert part_holders(holders, 6, tied=False) == {"0:2": (0, 3), "2:4": (1,), "4:6": (2,)}


def test_a_fingerprint_is_of_every_bit_and_of_step_and_generation() -> None:
    each = store(GPT2, (0, 2))
    state = each.states["1"]
    seen = {state.fingerprint()}
    for tensor in state.tensors().values():
        flat = tensor.view(-1)
        before = flat[-1].clone()
        flat[-1] = torch.nextafter(before, torch.tensor(9.0))
        seen.add(state.fingerprint())
        flat[-1] = before
    state.version += 1
    seen.add(state.fingerprint())
    state.version, state.generation = 0, 1
    seen.add(state.fingerprint())
    assert len(seen) == len(state.tensors()) + 3


def test_a_checkpoint_of_before_has_one_learning_rate_scale_for_a_layer_and_what_it_shares() -> None:
    each = store(GPT2, (0, 2))
    train(each)
    each.states["0"].lr_scale.fill_(1.1)
    saved = {key: tensor.clone() for key, tensor in each.tensors(0).items()}
    (own,) = (key for key in each.states["0"].tensors() if key.startswith("lr_scale/"))
    again = store(GPT2, (0, 2))
    again.states["0"].load({key: tensor for key, tensor in saved.items() if key != own})
    assert float(again.states["0"].lr_scale) == 1.0
    again.states["0"].load(saved)
    assert same(again.states["0"].tensors(), each.states["0"].tensors())
    with pytest.raises(KeyError):
        again.states["0"].load({})


def test_what_is_frozen_has_weights_alone() -> None:
    weight = torch.ones(2, 2)
    state = LayerState("0", {}, OptimizerConfig(), frozen={"w": weight})
    state.apply(1.0, 0.1)
    assert state.tensors().keys() == {"param/w"}
    assert (state.version, state.size, float(state.norm())) == (1, 0, 0.0)


@pytest.mark.parametrize("kind", ["param", "exp_avg", "exp_avg_sq", "step"])
def test_a_bit_that_changes_in_a_sealed_state_is_found_before_it_counts(kind: str) -> None:
    """Odd sizes: no bit is left out at the end. What is written on purpose is stamped."""
    state = LayerState("3", {"w": torch.nn.Parameter(torch.randn(3, 7)), "b": torch.nn.Parameter(torch.randn(1))},
                       OptimizerConfig())  # fmt: skip
    state.apply(1.0, 0.1)
    state.seal()
    state.require_intact()
    for name, last in (("w", 20), ("b", 0)):
        tensor = state.tensors()[f"{kind}/{name}"].detach().view(-1)
        bits = tensor[min(last, len(tensor) - 1) :].view(torch.int32)
        bits.bitwise_xor_(1 << 20)
        with pytest.raises(StateChanged, match="layer 3 is not what step 1 has left"):
            state.apply(1.0, 0.1)
        bits.bitwise_xor_(1 << 20)
        state.require_intact()
    state.apply(1.0, 0.1)
    state.seal()
    state.begin_anew()
    stamp([state], 0, 0)
    state.apply(1.0, 0.1)
    assert state.version == 1


# ---- plain gradient steps ----


def test_sgd_takes_the_gradient_times_the_rate_and_keeps_nothing_else() -> None:
    drawn = torch.Generator().manual_seed(1)
    made = {name: torch.randn(5, 3, generator=drawn) for name in ("a", "b")}

    def state(optimizer: str) -> LayerState:
        parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in made.items()}
        return LayerState("1", parameters, OptimizerConfig(optimizer=optimizer, weight_decay=0.5))

    plain, adamw = state("sgd"), state("adamw")
    plain.lr_scale.fill_(2.0)
    gradient = torch.randn(plain.size, generator=drawn)
    for each in (plain, adamw):
        each.gradient.copy_(gradient)
        each.apply(0.5, 0.1)
    wanted = {name: tensor - 0.1 * gradient.split(15)[at].view(5, 3) for at, (name, tensor) in enumerate(made.items())}
    for name, tensor in plain.weights().items():
        torch.testing.assert_close(tensor, wanted[name])
    assert list(plain.tensors()) == ["param/a", "param/b", "lr_scale/a"] == sorted(plain.keys(), key=plain.keys().index)
    assert plain.version == 1
    assert not plain.gradient.any()
    assert plain.moments("a") == {}

    # a checkpoint of one is read by the other: moments are left out, or begin anew
    other = state("sgd")
    other.load(adamw.tensors())
    assert torch.equal(other.weights()["b"], adamw.weights()["b"])
    adamw.load(plain.tensors())
    assert torch.equal(adamw.weights()["b"], plain.weights()["b"])
    assert not any(tensor.any() for tensor in adamw.moments("a").values())
    with pytest.raises(KeyError):
        adamw.load({key: tensor for key, tensor in state("adamw").tensors().items() if key != "exp_avg/b"})
    plain.begin_anew()
    assert float(plain.lr_scale) == 1.0


# ---- what others fill, and what is known of what does not change ----


def test_what_others_fill_is_not_drawn_or_read_first(tmp_path: Path) -> None:
    model = LayeredModel(GPT2)
    config = OptimizerConfig(warmup_steps=0)
    held = ResidentStore(model, [(0, 2)], config, seed=5, device=CPU, source=tmp_path / "gone", fill=False)
    assert {state.name for state in held.unfilled} == set(held.states)
    held.start_again(held.states.values(), None)
    assert held.unfilled == []
    built = store(GPT2, (0, 2))
    assert all(same(held.tensors(layer), built.tensors(layer)) for layer in range(2))
    held.hold([(0, 3)], fill=False)
    assert [state.name for state in held.unfilled] == ["2"]
    assert all(same(held.tensors(layer), built.tensors(layer)) for layer in range(2))


def test_a_fingerprint_is_computed_once_for_what_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    count = checksum

    def counting(*args: Any) -> int:
        calls.append(None)
        return count(*args)

    monkeypatch.setattr("pipeline.state.layer_state.checksum", counting)
    state = store(GPT2, (0, 2)).states["1"]
    first = state.fingerprint()
    once = len(calls)
    assert state.fingerprint() == first
    assert len(calls) == once
    weight = next(iter(state.weights().values()))
    other = weight.clone()
    state.put({f"param/{next(iter(state.weights()))}": other})
    assert state.fingerprint() == first
    assert len(calls) == 2 * once, "what was put in is looked at, whatever it is"
    weight.view(-1)[3] += 1.0
    assert state.fingerprint() != first
