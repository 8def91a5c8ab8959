"""Blocks fitted to what went in and came out: what a fit is worth, gradient descent, and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig

from pipeline.model import stage_fit
from pipeline.model.layered import LayeredModel
from pipeline.model.output_fit import linear_outputs
from pipeline.model.passed import Passed, relative_error
from pipeline.model.span_module import SpanModule
from pipeline.model.stage_fit import fit_stage, most_tokens
from tests.passed_blocks import GEMMA2, GPT2, LLAMA, blocks, pairs_of


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_fit_takes_others_than_those_fitted_most_of_the_way(config: PreTrainedConfig) -> None:
    teacher, student = blocks(config, 0), blocks(config, 1)
    fit = fit_stage(student, pairs_of(teacher, 64))
    assert fit.tokens == 56 * 16, "of 64 pairs 8 are withheld"
    others = pairs_of(teacher, 8, seed=9)
    found = relative_error(student, others)
    norms = [(p.y.norm(dim=-1), (p.x - p.y).norm(dim=-1)) for p in others]
    nothing = sum(float((d.square() / y).sum()) for y, d in norms) / sum(float(y.sum()) for y, _ in norms)
    assert found < 0.9 * nothing, "better than a stage that adds nothing"
    assert found < 0.5 * relative_error(blocks(config, 1), others)
    assert abs(found - fit.after) < 0.2 * found, "what was withheld tells of the others"
    assert fit.after < fit.before


def test_what_is_right_already_is_left_bit_for_bit() -> None:
    teacher = blocks(LLAMA, 0)
    pairs, before = pairs_of(teacher, 16), copy.deepcopy(teacher.state_dict())
    fit = fit_stage(teacher, pairs)
    assert fit.before == fit.after < 1e-9
    assert all(torch.equal(before[name], weight) for name, weight in teacher.state_dict().items())


def test_padding_says_nothing() -> None:
    teacher = blocks(LLAMA, 0)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[:, 6:] = 0
    fitted: list[SpanModule] = []
    for noise in (0.0, 100.0):
        student, pairs = blocks(LLAMA, 1), pairs_of(teacher, 16, mask=mask)
        for pair in pairs:
            pair.y[:, 6:] += noise
        fit_stage(student, pairs)
        fitted.append(student)
    a, b = (module.state_dict() for module in fitted)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_who_fits_is_seen_to_come_on_and_weights_stay_parameters() -> None:
    student, beats = blocks(LLAMA, 1), list[None]()
    kept = dict(student.named_parameters())
    fit_stage(student, pairs_of(blocks(LLAMA, 0), 8), lambda: beats.append(None))
    assert len(beats) > 2 * 2
    assert all(parameter is kept[name] for name, parameter in student.named_parameters())
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in kept.values())


def test_what_cannot_be_fitted_is_refused_by_name() -> None:
    normalised = blocks(GEMMA2, 0)
    assert not linear_outputs(normalised)
    frozen = blocks(LLAMA, 0)
    frozen.layers["3"].get_submodule("mlp.down_proj").weight.requires_grad_(False)  # type: ignore[union-attr]
    head = LayeredModel(LLAMA).build((4, 6), seed=0)  # the head is no block
    for module in (normalised, frozen, head):
        lo, hi = module.span
        with pytest.raises(ValueError, match=rf"span \({lo}, {hi}\) are not linear in what blocks add, or frozen"):
            fit_stage(module, pairs_of(blocks(LLAMA, 0), 4))
    with pytest.raises(ValueError, match="1 pairs; allowed: 2 or more"):
        fit_stage(blocks(LLAMA, 0), pairs_of(blocks(LLAMA, 0), 1))


def closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradient descent."""
    monkeypatch.setattr(stage_fit, "_learn", lambda *_: None)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_gradient_descent_goes_on_from_the_closed_form(
    config: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, both, alone = blocks(config, 0), blocks(config, 1), blocks(config, 1)
    pairs, others = pairs_of(teacher, 96), pairs_of(teacher, 8, seed=9)
    fit_stage(both, pairs)
    closed_form(monkeypatch)
    fit_stage(alone, pairs)
    assert relative_error(both, others) < 0.9 * relative_error(alone, others)


@pytest.mark.parametrize("together", [1, 2], ids=["a sequence a step", "two"])
def test_gradient_descent_is_adam_on_the_weighted_error(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """Against the same loop written out, which uses no `Passed`; of every other pair the last tokens are padding."""
    teacher, student, beats = blocks(LLAMA, 0), blocks(LLAMA, 1), list[None]()
    twin = copy.deepcopy(student)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[:, 5:] = 0
    pairs = [pairs_of(teacher, 1, seed, mask if seed % 2 else torch.ones_like(mask))[0] for seed in range(20)]
    monkeypatch.setattr(stage_fit, "A_STEP", 8 * together)
    stage_fit._learn(student, pairs, 0.5, lambda: beats.append(None))

    steps, weights = 20 // together, [*twin.parameters()]
    order = torch.randperm(2 * steps, generator=torch.Generator().manual_seed(0)).tolist()[::-1]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
    assert len(beats) == steps
    for step in range(steps):
        rows = [divmod(order[step] * together + i, 2) for i in range(together)]
        x, y, counted = (torch.stack([getattr(pairs[n], side)[i] for n, i in rows])
                         for side in ("x", "y", "attention_mask"))  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, (step + 1) / (steps // 4)) * (1 - step / steps) / 16
        found = twin(x, attention_mask=counted)
        each = (found - y).square().mean(-1) / y.square().mean(-1).sqrt()
        optimizer.zero_grad()
        each[counted.bool()].mean().backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    for mine, theirs in zip(student.parameters(), weights, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_what_makes_nothing_better_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, fitted = pairs_of(blocks(LLAMA, 0), 16), blocks(LLAMA, 1)
    with monkeypatch.context() as patch:
        closed_form(patch)
        expected = fit_stage(fitted, pairs)

    def spoil(module: SpanModule, *_: object) -> None:
        for weight in module.parameters():
            weight.add_(1.0)

    monkeypatch.setattr(stage_fit, "_learn", spoil)
    student = blocks(LLAMA, 1)
    assert fit_stage(student, pairs) == expected
    found, wanted = student.state_dict(), fitted.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_gradients_are_added_to_the_buffers_there_are_and_cleared() -> None:
    student = blocks(LLAMA, 1)
    buffers = {name: torch.full_like(weight, 7.0) for name, weight in student.named_parameters()}
    for name, weight in student.named_parameters():
        weight.grad = buffers[name]
    fit_stage(student, pairs_of(blocks(LLAMA, 0), 8))
    for name, weight in student.named_parameters():
        assert weight.grad is buffers[name]
        assert not buffers[name].any()


def test_the_closed_form_takes_the_last_pairs_and_gradient_descent_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, student = pairs_of(blocks(LLAMA, 0), 40), blocks(LLAMA, 1)
    taken = dict[str, list[Passed]]()
    monkeypatch.setattr(stage_fit, "fit_outputs", lambda _, fitted, *__: taken.update(closed=list(fitted)))
    monkeypatch.setattr(stage_fit, "_learn", lambda _, fitted, *__: taken.update(learned=list(fitted)))
    fit = fit_stage(student, pairs)
    assert taken["learned"] == [pair for i, pair in enumerate(pairs) if i % 8]
    assert taken["closed"] == taken["learned"][-6 * 32 // 16 :], "6 tokens for each of 32 features, 16 in a pair"
    assert fit.tokens == 35 * 16


def test_gradient_descent_takes_no_longer_than_it_may_or_half_an_epoch() -> None:
    tiny = LayeredModel(LLAMA)
    assert stage_fit._epochs(tiny, (2, 4), 1000) == 4.0
    large = LayeredModel(
        LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=4, num_attention_heads=32)
    )
    assert stage_fit._epochs(large, (2, 4), 130_000) == 0.5
    small = LayeredModel(
        LlamaConfig(hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=3)
    )
    epochs, weights = stage_fit._epochs(small, (1, 5), 8000), 4 * (4 * 192**2 + 3 * 192 * 512 + 2 * 192)
    assert epochs * 6 * weights * 8000 == pytest.approx(0.2e12)
    assert 0.5 < epochs < 4


def test_how_many_tokens_are_worth_keeping() -> None:
    assert most_tokens(LayeredModel(LLAMA)) == 12 * 32
    assert most_tokens(LayeredModel(GPT2)) == 12 * 64
