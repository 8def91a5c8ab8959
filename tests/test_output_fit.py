"""Blocks fitted to what went in and came out: the formula, what it is worth, and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, GPT2Config, LlamaConfig, PreTrainedConfig

from pipeline.model import output_fit
from pipeline.model.layered import LayeredModel
from pipeline.model.output_fit import Passed, fit_outputs, linear_outputs, most_tokens, relative_error
from pipeline.model.span_module import SpanModule

LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=64, tie_word_embeddings=False,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=64, n_positions=32)
GEMMA2 = Gemma2Config(
    hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=64, head_dim=8,
)  # fmt: skip


def blocks(config: PreTrainedConfig, seed: int, scale: float = 1.0) -> SpanModule:
    """Two blocks, whose matrices are larger the larger `scale` is, so that they do something."""
    torch.manual_seed(seed)
    module = LayeredModel(config).build((2, 4), seed=seed).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) * scale / parameter.shape[-1] ** 0.5)
    return module


@torch.no_grad()
def pairs_of(teacher: SpanModule, count: int, seed: int = 0, mask: Tensor | None = None) -> list[Passed]:
    draw = torch.Generator().manual_seed(seed)
    xs = [torch.randn(2, 8, 16, generator=draw) for _ in range(count)]
    return [Passed(x, teacher(x, attention_mask=mask), mask) for x in xs]


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_fit_takes_others_than_those_fitted_most_of_the_way(config: PreTrainedConfig) -> None:
    teacher, student = blocks(config, 0), blocks(config, 1)
    fit = fit_outputs(student, pairs_of(teacher, 64))
    assert fit.tokens == 56 * 16, "of 64 pairs 8 are withheld"
    others = pairs_of(teacher, 8, seed=9)
    found = relative_error(student, others)
    nothing = sum(float(((p.x - p.y).square().sum(-1) / p.y.square().sum(-1)).mean()) for p in others) / 8
    assert found < 0.9 * nothing, "better than a stage that adds nothing"
    assert found < 0.5 * relative_error(blocks(config, 1), others)
    assert abs(found - fit.after) < 0.2 * found, "what was withheld tells of the others"
    assert fit.after < fit.before


@pytest.mark.parametrize("ridge", output_fit.RIDGES)
def test_each_projection_solves_its_weighted_ridge_regression(monkeypatch: pytest.MonkeyPatch, ridge: float) -> None:
    """Against least squares in float64 over the stacked rows, of the first projection of the first block."""
    monkeypatch.setattr(output_fit, "RIDGES", (ridge,))
    teacher, student = blocks(LLAMA, 0), blocks(LLAMA, 1)
    pairs = pairs_of(teacher, 8)
    taken: list[Tensor] = []
    projection = student.layers["2"].get_submodule("self_attn.o_proj")
    handle = projection.register_forward_hook(lambda _, given, __: taken.append(given[0].detach()))
    with torch.no_grad():
        for pair in pairs:
            student.block(2, pair.x)
    handle.remove()
    f = torch.cat([each.flatten(0, 1) for each in taken]).double()
    y, x = (torch.cat([getattr(p, side).flatten(0, 1) for p in pairs]).double() for side in ("y", "x"))
    weight = 1 / y.square().mean(-1).sqrt()
    scaled = ridge * float((f * f * weight[:, None]).sum(0).mean())
    rows = torch.cat([f * weight.sqrt()[:, None], scaled**0.5 * torch.eye(f.shape[1], dtype=torch.double)])
    wanted = torch.cat([(y - x) * weight.sqrt()[:, None], torch.zeros(f.shape[1], 16, dtype=torch.double)])
    expected = torch.linalg.lstsq(rows, wanted).solution / 4  # four projections share what is missing
    with torch.no_grad():
        output_fit._fit(student, pairs, pairs_of(teacher, 2, seed=1), lambda: None)
    found = student.layers["2"].get_submodule("self_attn.o_proj").get_parameter("weight")
    assert float((found.T.double() - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_withheld_pairs_choose_the_strongest_ridge_that_is_nearly_the_best() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(2, 40, 6, generator=draw)
    features[..., 3:] = features[..., :3] + 1e-3 * torch.randn(2, 40, 3, generator=draw)  # much alike
    targets = features[..., :3] @ torch.randn(3, 4, generator=draw) + 0.3 * torch.randn(2, 40, 4, generator=draw)
    weights = torch.rand(2, 40, generator=draw) + 0.5
    fitted, judged = output_fit._System(), output_fit._System()
    fitted.add(features[:1], targets[:1], weights[:1])
    judged.add(features[1:], targets[1:], weights[1:])
    found = {ridge: fitted.solve(ridge) for ridge in output_fit.RIDGES}
    errors = {
        ridge: float(((features[1] @ w - targets[1]).square().sum(-1) * weights[1]).sum()) for ridge, w in found.items()
    }
    for ridge, w in found.items():
        assert judged.error(w) == pytest.approx(errors[ridge], rel=1e-4)
    nearly = [ridge for ridge, error in errors.items() if error <= output_fit.NEARLY * min(errors.values())]
    assert torch.equal(output_fit._solved(fitted, judged), found[max(nearly)])
    assert found[1e-1].norm() < found[1e-3].norm()


def test_what_is_right_already_is_left_bit_for_bit() -> None:
    teacher = blocks(LLAMA, 0)
    pairs, before = pairs_of(teacher, 16), copy.deepcopy(teacher.state_dict())
    fit = fit_outputs(teacher, pairs)
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
        fit_outputs(student, pairs)
        fitted.append(student)
    a, b = (module.state_dict() for module in fitted)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_cannot_be_fitted_is_refused_by_name() -> None:
    normalised = blocks(GEMMA2, 0)
    assert not linear_outputs(normalised)
    with pytest.raises(ValueError, match=r"span \(2, 4\) are not linear in what blocks add, or frozen"):
        fit_outputs(normalised, pairs_of(normalised, 4))
    frozen = blocks(LLAMA, 0)
    frozen.layers["3"].get_submodule("mlp.down_proj").weight.requires_grad_(False)  # type: ignore[union-attr]
    assert not linear_outputs(frozen)
    head = LayeredModel(LLAMA).build((4, 6), seed=0)
    assert not linear_outputs(head), "the head is no block"
    with pytest.raises(ValueError, match="1 pairs; allowed: 2 or more"):
        fit_outputs(blocks(LLAMA, 0), pairs_of(blocks(LLAMA, 0), 1))


def test_who_fits_is_seen_to_come_on_and_weights_stay_parameters() -> None:
    student, beats = blocks(LLAMA, 1), list[None]()
    kept = dict(student.named_parameters())
    fit_outputs(student, pairs_of(blocks(LLAMA, 0), 8), lambda: beats.append(None))
    assert len(beats) > 2 * 2
    assert all(parameter is kept[name] for name, parameter in student.named_parameters())
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in kept.values())


def test_how_many_tokens_are_worth_keeping() -> None:
    assert most_tokens(LayeredModel(LLAMA)) == 12 * 32
    assert most_tokens(LayeredModel(GPT2)) == 12 * 64
