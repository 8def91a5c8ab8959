"""Spans against the transformers models they are cut from: the same weights must give the same logits and gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from pipeline.model.families import FAMILIES
from pipeline.model.layered import LayeredModel, ModelError
from pipeline.model.rng import RngKey, keyed_dropout
from pipeline.model.span_module import SpanModule

SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 61, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 61, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}

SLIDING = "sliding_attention"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama padded row": ("llama", {"pad_token_id": 0}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "qwen2": ("qwen2", {}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 window": ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral window": ("mistral", {"sliding_window": 8}),
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"sliding_window": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "layer_types": [SLIDING, "full_attention", SLIDING],
                               "tie_word_embeddings": True, "final_logit_softcapping": 5.0}),
}  # fmt: skip
CUTS = ((0, 1, 2, 4, 5), (0, 5), (0, 2, 3, 5))
SEQUENCE = 20  # longer than every sliding window above


def config_of(case: str, **changes: Any) -> PreTrainedConfig:
    kind, own = CASES[case]
    return CONFIG_MAPPING[kind](**{**(GPT2 if kind == "gpt2" else SHAPE), **own, **changes})


def build_chain(model: LayeredModel, cut: tuple[int, ...], **how: Any) -> list[SpanModule]:
    return [model.build(span, seed=5, **how) for span in pairwise(cut)]


def run_chain(spans: list[SpanModule], ids: Tensor, **how: Any) -> Tensor:
    x = ids
    for span in spans:
        x = span(x, **how)
    return x


def named(spans: list[SpanModule]) -> dict[str, nn.Parameter]:
    return {n: p for s in spans for layer in range(*s.span) for n, p in s.named_layer_parameters(layer).items()}


def reference(model: LayeredModel, spans: list[SpanModule], attention: str) -> Any:
    """The whole transformers model with the weights of the spans."""
    whole = AutoModelForCausalLM.from_config(model.config, attn_implementation=attention, dtype=torch.float32)
    state = {name: parameter.detach().clone() for name, parameter in named(spans).items()}
    for alias, owner in model.aliases.items():
        state[alias] = state[owner]
    whole.load_state_dict(state, strict=True)
    return whole


def ids_of(batch: int = 3, sequence: int = SEQUENCE) -> Tensor:
    return torch.randint(0, 61, (batch, sequence), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_spans_compute_what_transformers_computes(case: str, attention: str):
    config = config_of(case)
    if attention not in FAMILIES[config.model_type].attentions:
        pytest.skip(f"transformers has no {attention} for {config.model_type}")
    model = LayeredModel(config, attention=attention)
    ids = ids_of()
    whole = None
    for cut in CUTS:
        spans = build_chain(model, cut)
        whole = whole or reference(model, spans, attention)
        whole.zero_grad()
        expected = whole(input_ids=ids, use_cache=False).logits
        actual = run_chain(spans, ids)
        assert torch.equal(actual, expected)
        weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
        (expected * weights).sum().backward()
        (actual * weights).sum().backward()
        gradients: dict[str, Tensor] = {}
        for span in spans:  # a tied weight on two workers has its gradient in two pieces
            seen: set[int] = set()
            for layer in range(*span.span):
                for name, parameter in span.named_layer_parameters(layer).items():
                    if id(parameter) not in seen:
                        assert parameter.grad is not None, name
                        gradients[name] = gradients.get(name, torch.zeros(())) + parameter.grad
                        seen.add(id(parameter))
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole.get_parameter(name).grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", ["llama", "mistral window", "qwen2 window", "gpt2", "gemma2", "gemma3"])
def test_padding_and_packing_are_masked_as_transformers_masks_them(case: str):
    model = LayeredModel(config_of(case))
    spans = build_chain(model, (0, 2, 4, 5))
    whole = reference(model, spans, model.config._attn_implementation)
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    mask[2, :4] = 0
    packed = torch.cat((torch.arange(12), torch.arange(SEQUENCE - 12)))[None].expand(3, -1)
    plain = run_chain(spans, ids)
    for how in ({"attention_mask": mask}, {"attention_mask": torch.ones_like(ids)}, {"position_ids": packed}):
        assert torch.equal(run_chain(spans, ids, **how), whole(input_ids=ids, use_cache=False, **how).logits)
    assert not torch.allclose(plain, run_chain(spans, ids, attention_mask=mask)), "the mask must matter"
    assert not torch.allclose(plain, run_chain(spans, ids, position_ids=packed)), "the packing must matter"


@pytest.mark.parametrize("case", CASES)
def test_weights_do_not_depend_on_the_cut(case: str):
    model = LayeredModel(config_of(case))
    torch.manual_seed(1)
    whole = named(build_chain(model, (0, 5)))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    apart: dict[str, Tensor] = {}
    for layer in reversed(range(5)):
        for name, parameter in model.build((layer, layer + 1), seed=5).named_layer_parameters(layer).items():
            assert torch.equal(apart.setdefault(name, parameter), parameter), f"two copies of {name} differ"
    assert torch.equal(state, torch.get_rng_state()), "building must not touch the global generator"
    assert set(apart) == set(whole) == {key for layer in range(5) for key in model.keys(layer)}
    assert all(torch.equal(apart[name], whole[name]) for name in whole)
    other = model.build((1, 2), seed=6).named_layer_parameters(1)
    assert not all(torch.equal(other[name], whole[name]) for name in other)
    first, second = (list(model.build((layer, layer + 1), seed=5).parameters()) for layer in (1, 2))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a.std() > 0), "layers must differ"


@pytest.mark.parametrize("case", CASES)
def test_weights_are_distributed_as_transformers_distributes_them(case: str):
    config = config_of(case, **({"n_embd": 96} if CASES[case][0] == "gpt2" else {"hidden_size": 96}))
    model = LayeredModel(config)
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config)
    ours = named(build_chain(model, (0, 5)))
    for name, theirs in whole.named_parameters():
        mine = ours[name]
        if theirs.std() < 1e-6:
            assert torch.equal(mine, theirs), name
        else:
            tolerance = 5 / (2 * theirs.numel()) ** 0.5
            assert abs(mine.std() / theirs.std() - 1) < 2 * tolerance, name
            assert abs(mine.mean()) < 5 * theirs.std() / theirs.numel() ** 0.5, name
            assert not torch.equal(mine, theirs)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_knows_its_parameters_without_being_built(case: str):
    model = LayeredModel(config_of(case))
    whole = AutoModelForCausalLM.from_config(model.config)
    assert model.num_layers == 5
    assert model.hidden_size == 32
    keys = [key for layer in range(5) for key in model.keys(layer)]
    assert len(keys) == len(set(keys))
    assert set(keys) == {name for name, _ in whole.named_parameters()}  # which names a tied weight once
    assert sum(map(model.parameter_count, range(5))) == sum(p.numel() for p in whole.parameters())
    for layer in range(5):
        span = model.build((layer, layer + 1), seed=0)
        held = span.named_layer_parameters(layer)
        assert {name: tuple(p.shape) for name, p in held.items()} == model.shapes(layer)
        assert {id(p) for p in held.values()} == {id(p) for p in span.parameters()}
        assert sum(p.nbytes for p in span.parameters()) == model.parameter_bytes(layer)
        assert set(held) == {*model.keys(layer), *(model.tied_keys if layer == 4 else ())}


@pytest.mark.parametrize("case", ["llama tied", "gpt2", "gemma"])
def test_an_embedding_and_its_tied_head_on_one_worker_are_one_parameter(case: str):
    model = LayeredModel(config_of(case))
    assert model.tied
    (key,) = model.tied_keys
    for first, second in (((0, 1), (4, 5)), ((4, 5), (0, 1))):
        one = model.build(first, seed=5)
        shared = {key: one.named_layer_parameters(first[0])[key]}
        two = model.build(second, seed=5, share=shared)
        assert two.named_layer_parameters(second[0])[key] is shared[key]
        ends = {first[0]: one, second[0]: two}
        hidden = ends[0](ids_of())
        expected = model.build((0, 1), seed=5)(ids_of())
        assert torch.equal(hidden, expected), "buffers of a module with shared weights must be filled too"
        ends[4](hidden).sum().backward()
        assert shared[key].grad is not None
    whole = model.build((0, 5), seed=5)
    assert whole.named_layer_parameters(0)[key] is whole.named_layer_parameters(4)[key]


def test_only_the_span_is_made():
    config = config_of("llama", num_hidden_layers=40, hidden_size=512, intermediate_size=2048, vocab_size=50_000)
    model = LayeredModel(config)
    assert all(p.is_meta for p in model._skeleton.parameters())
    span = model.build((7, 8), seed=0)
    assert not any(t.is_meta for t in (*span.parameters(), *span.buffers()))
    assert sum(p.numel() for p in span.parameters()) == model.parameter_count(7) < 5_000_000


# ---- dropout ----

DROPS = {"attn_pdrop": 0.2, "embd_pdrop": 0.3, "resid_pdrop": 0.1}


def gpt2_with_dropout() -> tuple[LayeredModel, Tensor, RngKey]:
    return LayeredModel(config_of("gpt2", **DROPS)), ids_of(4, 12), RngKey(seed=9, step=4, sample_ids=(7, 3, 100, 8))


def test_dropout_inside_transformers_own_model_is_the_same():
    """The reference is the whole GPT-2 of transformers in training mode, each part under its layer's key."""
    model, ids, key = gpt2_with_dropout()
    spans = build_chain(model, (0, 2, 5))
    whole = reference(model, spans, "eager").train()
    for layer, part in enumerate((whole.transformer.drop, *whole.transformer.h)):
        part.forward = under(part.forward, key, layer)
    expected = whole(input_ids=ids, use_cache=False).logits
    actual = run_chain(spans, ids, rng=key)
    assert torch.equal(actual, expected)
    whole.eval()
    assert torch.equal(run_chain([s.eval() for s in spans], ids), whole(input_ids=ids, use_cache=False).logits)
    assert not torch.allclose(actual, whole(input_ids=ids, use_cache=False).logits, atol=1e-3)


def under(forward: Any, key: RngKey, layer: int) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with keyed_dropout(key, layer):
            return forward(*args, **kwargs)

    return run


def test_dropout_is_the_same_however_samples_and_layers_are_grouped():
    model, ids, key = gpt2_with_dropout()
    expected = run_chain(build_chain(model, (0, 5)), ids, rng=key)
    for rows in ((0, 1), (2, 3), (3, 1)):
        part = replace(key, sample_ids=tuple(key.sample_ids[row] for row in rows))
        actual = run_chain(build_chain(model, (0, 1, 3, 5)), ids[list(rows)], rng=part)
        torch.testing.assert_close(actual, expected[list(rows)], rtol=1e-5, atol=1e-6)
    other = run_chain(build_chain(model, (0, 5)), ids, rng=replace(key, step=5))
    assert not torch.allclose(other, expected, atol=1e-3)


def test_recomputation_gives_the_same_gradients_from_less_memory():
    model, ids, key = gpt2_with_dropout()
    found = []
    for recompute in (False, True):
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        spans = build_chain(model, (0, 2, 5))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = run_chain(spans, ids, rng=key, recompute=recompute)
        logits.pow(2).sum().backward()
        found.append(({name: p.grad for name, p in named(spans).items()}, saved))
    (plain, plain_bytes), (again, again_bytes) = found
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert again_bytes < plain_bytes / 2


def test_attention_dropout_takes_the_attention_that_can_be_keyed():
    assert LayeredModel(config_of("llama")).config._attn_implementation == "sdpa"
    model = LayeredModel(config_of("llama", attention_dropout=0.1))
    assert model.has_dropout
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match=r"'sdpa'.*allowed: eager"):
        LayeredModel(config_of("llama", attention_dropout=0.1), attention="sdpa")


# ---- other precisions ----


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma3"])
def test_autocast_computes_what_transformers_computes(case: str):
    """With hidden states of its dtype between layers, wherever spans end; near what they would be without that."""
    model = LayeredModel(config_of(case))
    spans, whole_span = build_chain(model, (0, 2, 5)), build_chain(model, (0, 5))
    whole = reference(model, spans, model.config._attn_implementation)

    def rounded(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args[0].bfloat16(), *args[1:]), kwargs

    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = whole(input_ids=ids_of(), use_cache=False).logits
        for module in (*whole.get_submodule(model.family.blocks), whole.get_submodule(model.family.norm)):
            module.register_forward_pre_hook(rounded, with_kwargs=True)
        expected = whole(input_ids=ids_of(), use_cache=False).logits
        found = run_chain(spans, ids_of())
        assert spans[0](ids_of()).dtype == torch.bfloat16
        assert torch.equal(found, expected)
        assert torch.equal(run_chain(whole_span, ids_of()), expected)
    assert not torch.equal(found, plain)
    assert torch.allclose(found, plain, atol=0.02)


def test_masters_are_fp32_whatever_the_config_says():
    model = LayeredModel(config_of("llama", dtype="bfloat16"))
    assert {p.dtype for p in model.build((0, 5), seed=0).parameters()} == {torch.float32}


# ---- loading ----


@pytest.mark.parametrize("case", ["llama", "llama tied", "gpt2", "gemma", "qwen3"])
def test_a_span_is_read_from_safetensors(case: str, tmp_path: Any):
    model = LayeredModel(config_of(case))
    whole = reference(model, build_chain(model, (0, 5)), model.config._attn_implementation)
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = whole(input_ids=ids_of(), use_cache=False).logits
    spans = [model.build(span, seed=77, source=tmp_path) for span in pairwise((0, 1, 3, 5))]
    assert torch.equal(run_chain(spans, ids_of()), expected)


def test_other_names_for_the_same_weights_are_found(tmp_path: Any):
    """As in GPT-2's first files: no prefix, buffers of older versions, bf16; and the tied weight under the head."""
    model = LayeredModel(config_of("gpt2"))
    expected = model.build((0, 5), seed=5)
    state = {n.removeprefix("transformer."): p.detach().bfloat16() for n, p in named([expected]).items()}
    state["lm_head.weight"] = state.pop("wte.weight")
    save_file({**state, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, tmp_path / "model.safetensors")
    spans = [model.build(span, seed=1, source=tmp_path) for span in pairwise((0, 2, 5))]
    for name, parameter in named(spans).items():
        assert torch.equal(parameter, named([expected])[name].bfloat16().float())


def test_missing_and_misshapen_tensors_are_named(tmp_path: Any):
    model = LayeredModel(config_of("llama"))
    state = {name: p.detach().clone() for name, p in named(build_chain(model, (0, 5))).items()}
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({name: t for name, t in state.items() if name != key}, tmp_path / "model.safetensors")
    model.build((0, 2), seed=0, source=tmp_path)  # does not need it
    with pytest.raises(ModelError, match=key):
        model.build((0, 5), seed=0, source=tmp_path)
    save_file({**state, key: torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{key} has shape \(3, 4\).*\(48, 32\)"):
        model.build((2, 3), seed=0, source=tmp_path)


# ---- refusals ----


def test_other_families_are_refused_with_the_list():
    with pytest.raises(ModelError, match=r"'opt'.*gemma, .*gpt2, llama, mistral, qwen2, qwen3"):
        LayeredModel(CONFIG_MAPPING["opt"]())


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt2", {"n_head": 5}, "num_heads"),
        ("qwen3", {"layer_types": [SLIDING, "chunked_attention", SLIDING]}, "chunked_attention; supported"),
    ],
)
def test_configs_that_cannot_run_are_refused(case: str, changes: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        LayeredModel(config_of(case, **changes))


def test_wrong_arguments_are_refused():
    model = LayeredModel(config_of("gpt2", **DROPS))
    for span in ((0, 6), (2, 2), (-1, 2)):
        with pytest.raises(ModelError, match="0 <= lo < hi <= 5"):
            model.build(span, seed=0)
    with pytest.raises(ModelError, match="layers 0 to 4"):
        model.keys(5)
    with pytest.raises(ModelError, match=r"'flash'.*allowed"):
        LayeredModel(config_of("llama"), attention="flash")
    spans = build_chain(model, (0, 2, 5))
    with pytest.raises(ModelError, match="no rng"):
        spans[0](ids_of())
    with pytest.raises(ModelError, match="hidden states"):
        spans[1](ids_of())
    with pytest.raises(ModelError, match=r"70 tokens.*up to 64"):
        spans[0].eval()(ids_of(2, 70))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", ["llama tied", "gpt2", "gemma3", "mistral window"])
def test_a_gpu_gets_the_same_weights_and_logits(case: str):
    model = LayeredModel(config_of(case))
    spans, there = build_chain(model, (0, 2, 5)), build_chain(model, (0, 2, 5), device="cuda")
    for name, parameter in named(there).items():
        assert torch.equal(parameter.cpu(), named(spans)[name])
    actual = run_chain(there, ids_of().cuda()).cpu()
    torch.testing.assert_close(actual, run_chain(spans, ids_of()), rtol=1e-4, atol=1e-4)
