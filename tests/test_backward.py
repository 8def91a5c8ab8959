"""I and W together must give the gradients of a whole backward pass."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from pipeline.model.backward import WeightGradients, defer_weights
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import preset

CONFIGS = {
    "llama": preset("llama-tiny"),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64, resid_pdrop=0, embd_pdrop=0,
                       attn_pdrop=0),
    "llama with biases": LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                     vocab_size=64, attention_bias=True, mlp_bias=True),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("autocast", [False, True])
def test_split_equals_whole(name: str, autocast: bool) -> None:
    model = LayeredModel(CONFIGS[name])
    span = model.build((1, model.num_layers), seed=3)
    x = torch.randn(2, 8, model.hidden_size, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return span(x).float().square().mean()

    forward().backward()
    assert x.grad is not None
    whole_x, whole = x.grad.clone(), {n: p.grad.clone() for n, p in span.named_parameters() if p.grad is not None}
    x.grad = None
    span.zero_grad()
    later = WeightGradients()
    with defer_weights(later):
        loss = forward()
    loss.backward()
    matrices = [n for n, p in span.named_parameters() if p.dim() == 2]
    assert all(span.get_parameter(n).grad is None for n in matrices), "weight gradients were not put off"
    later.run()
    tolerance = 2e-2 if autocast else 1e-6
    assert torch.allclose(x.grad, whole_x, rtol=tolerance, atol=tolerance * float(whole_x.abs().max()))
    assert set(whole) == {n for n, p in span.named_parameters() if p.grad is not None}
    for n, gradient in whole.items():
        found = span.get_parameter(n).grad
        assert found is not None
        assert found.dtype == torch.float32
        assert torch.allclose(found, gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max())), n


def test_gradients_accumulate_over_microbatches() -> None:
    model = LayeredModel(CONFIGS["llama"])
    span = model.build((1, 2), seed=0)
    x = torch.randn(2, 4, model.hidden_size)
    for _ in range(2):
        later = WeightGradients()
        with defer_weights(later):
            y = span(x).sum()
        y.backward()
        later.run()
    twice = {n: p.grad.clone() for n, p in span.named_parameters() if p.grad is not None}
    span.zero_grad()
    span(x).sum().backward()
    for n, p in span.named_parameters():
        assert p.grad is not None
        assert torch.allclose(twice[n], 2 * p.grad, rtol=1e-5, atol=1e-5), n
