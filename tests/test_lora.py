"""Adapters beside frozen weights: equal to peft in one process, the same bits with every number of workers, on the
pipeline and on the pool."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedConfig, Qwen3Config

from jobs.config import ConfigError, TrainConfig
from jobs.plan import make_plan
from launch.config import config_from_toml
from launch.forkserver import ForkServer
from launch.round_train import make_layout
from pipeline.model.layered import LayeredModel, ModelError
from pipeline.model.lora import Lora, is_adapter
from pipeline.model.weights import read_config
from pipeline.schedule.work_units import Cut
from recovery.checkpoint import CheckpointError
from tests.harness import Outcome, plain_training, relative_difference, run_command, run_pool, run_workers
from tests.test_parity import MODELS, TOLERANCE, settings
from tests.test_pool import arguments, equal, same_bits, weights_of

STEPS = 8
LORA = Lora(4, 8.0)


def config(**changes: Any) -> TrainConfig:
    values = {"steps": STEPS, "scheduler": "roundpipe", "at_once": 2, "lr": 1e-2, "lora_rank": 4, "lora_alpha": 8.0}
    return settings(**{**values, **changes})


@cache
def reference(model: str, behind: bool = False, targets: str = "all-linear") -> Outcome:
    return plain_training(config(lora_targets=targets), MODELS[model], behind=behind)


@cache
def first_weights(model: str, lora: Lora | None = LORA) -> dict[str, torch.Tensor]:
    return weights_at_first(MODELS[model], lora)


def weights_at_first(
    model_config: PreTrainedConfig, lora: Lora | None, source: Path | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    blueprint = LayeredModel(model_config, lora=lora)
    found: dict[str, torch.Tensor] = {}
    for layer in range(blueprint.num_layers):
        built = blueprint.build((layer, layer + 1), seed=seed, source=source)
        found |= {n: p.detach() for n, p in built.named_layer_parameters(layer).items()}
    return found


def adapters(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if is_adapter(name)}


def check(found: Outcome, expected: Outcome, model: str) -> None:
    assert found.replicas_equal
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert found.norms == pytest.approx(expected.norms, rel=10 * TOLERANCE)
    assert relative_difference(found.gradients, expected.gradients) <= TOLERANCE
    assert relative_difference(adapters(found.weights), expected.weights) <= TOLERANCE
    assert expected.losses[-1] < expected.losses[0]
    first = first_weights(model, None)
    assert set(found.weights) == {*first, *expected.weights}
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in first.items()), "a frozen weight moved"


@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.long)])
def test_equals_peft_with_every_number_of_workers(forkserver: ForkServer, tmp_path: Path, model: str) -> None:
    one, three = (run_pool(forkserver, config(workers=n), MODELS[model], tmp_path / str(n), True) for n in (1, 3))
    check(one, reference(model), model)
    assert same_bits(one, three)
    evaluated = [[e["loss"] for e in run.details[0]["events"] if e["event"] == "evaluation"] for run in (one, three)]
    assert evaluated[0] == evaluated[1]


def test_small_spans_down_to_the_frozen_embedding(forkserver: ForkServer, tmp_path: Path) -> None:
    """The lowest backward span and the fused one hold nothing that is trained."""
    wide = LayeredModel(MODELS["llama"]).config
    wide.vocab_size = 8000  # no other layer fits into a MiB beside the embedding, or the head
    small = config(workers=2, span_mib=1, lora_targets="q_proj,v_proj")
    found = run_pool(forkserver, small, wide, tmp_path)
    cut = found.details[0]["rounds"].cut
    assert (cut.fused, cut.backward[-1]) == ((7, 8), (0, 1))
    expected = plain_training(small, wide)
    assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert relative_difference(adapters(found.weights), expected.weights) <= TOLERANCE


def test_one_step_behind_equals_a_delayed_reference(forkserver: ForkServer, tmp_path: Path) -> None:
    found = run_pool(forkserver, config(workers=2, optimizer_async=True), MODELS["gpt2"], tmp_path)
    check(found, reference("gpt2", behind=True), "gpt2")


_CALM: list[Outcome] = []
"""The run without a fault, made once."""


@pytest.mark.parametrize(
    "fault",
    ["kill:worker=1,step=3,at=backward", pytest.param("nan:worker=1,step=3,at=backward", marks=pytest.mark.long)],
)
def test_a_fault_changes_no_bit(forkserver: ForkServer, tmp_path: Path, fault: str) -> None:
    hurt = run_pool(forkserver, config(workers=2, rule="round_robin", inject=fault), MODELS["llama"], tmp_path / "hurt")
    assert {"detected", "not_finite"} & {event["event"] for event in hurt.details[0]["events"]}
    if not _CALM:
        _CALM.append(run_pool(forkserver, config(workers=2), MODELS["llama"], tmp_path / "calm"))
    assert same_bits(hurt, _CALM[0])


# ---- the pipeline ----


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("llama", {"scheduler": "one_f_one_b", "workers": 4, "replicas": 2, "shard_optimizer": True, "exact_sums": True,
                   "lora_blocks": "3:5"}),
        ("gpt2", {"scheduler": "zero_bubble", "workers": 4}),
        pytest.param("gpt2", {"scheduler": "balanced", "workers": 2}, marks=pytest.mark.long),
        pytest.param("llama", {"scheduler": "interleaved", "workers": 2, "recompute": True}, marks=pytest.mark.long),
        pytest.param("llama", {"scheduler": "gpipe", "workers": 4, "snapshot": "neighbour"}, marks=pytest.mark.long),
    ],
    ids=lambda value: value if isinstance(value, str) else value["scheduler"],
)  # fmt: skip
def test_a_pipeline_equals_peft(forkserver: ForkServer, tmp_path: Path, model: str, changes: dict[str, Any]) -> None:
    """Spans with nothing to train included: a stage of frozen blocks, the embedding, the head, and what they share."""
    chosen = config(at_once=0, **changes)
    chosen.validate()
    found = run_workers(forkserver, chosen, MODELS[model], tmp_path)
    check(found, plain_training(chosen, MODELS[model]), model)
    if chosen.lora_blocks != "all":
        assert {name.split(".")[2] for name in adapters(found.weights)} == {"3", "4"}


# ---- names, places and first values ----


FAMILIES: dict[str, PreTrainedConfig] = {
    **MODELS,
    "qwen3": Qwen3Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                         num_key_value_heads=2, vocab_size=96, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                               num_key_value_heads=2, head_dim=8, vocab_size=96, sliding_window=8),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_are_what_they_are_without_adapters(tmp_path: Path, family: str) -> None:
    plain, adapted = (weights_at_first(FAMILIES[family], lora) for lora in (None, LORA))
    assert all(torch.equal(adapted[name], tensor) for name, tensor in plain.items())
    added = adapters(adapted)
    assert set(adapted) == {*plain, *added}
    assert all(bool(tensor.any()) == name.endswith("lora_A.weight") for name, tensor in added.items())
    stored = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32)
    stored.save_pretrained(tmp_path)
    read = weights_at_first(FAMILIES[family], LORA, tmp_path)
    assert all(torch.equal(read[name], tensor) for name, tensor in stored.state_dict().items() if name in read)
    assert all(torch.equal(read[name], tensor) for name, tensor in added.items())


@pytest.mark.parametrize("model", MODELS)
def test_frozen_weights_have_neither_gradient_nor_moments(model: str) -> None:
    cut = Cut(((0, 4),), (4, 8), ((0, 4),))
    layouts = {}
    for rank in (0, 4):
        chosen = config(lora_rank=rank, optimizer_async=True)
        layouts[rank] = make_layout(chosen, LayeredModel(MODELS[model], lora=chosen.lora()), cut, 2)
    plain, adapted = layouts[0], layouts[4]
    for name in adapted.places:
        kind, _, key = name.partition("/")
        assert kind not in ("read0", "read1", "exp_avg", "exp_avg_sq") or is_adapter(key), name
    assert adapted.places["grad/0"][1] == adapted.places["grad/7"][1] == (0,)
    assert adapted.gradient_size((0, 8)) < adapted.weight_bytes((0, 8)) / 8
    assert adapted.num_bytes < 0.7 * plain.num_bytes
    span = LayeredModel(MODELS[model], lora=LORA).build((0, 8), seed=0)
    trained = {n for layer in range(8) for n, p in span.named_layer_parameters(layer).items() if p.requires_grad}
    assert trained == {n for layer in range(8) for n in adapted.model.trainable(layer)} != set()


# ---- the command line ----


def lora_arguments(out: Path, *more: str) -> list[str]:
    return arguments(out, "--model", "gpt2-tiny", "--lora-rank", "4", "--lr", "0.01", *more)


PIPE = ("--scheduler", "one_f_one_b", "--exact-sums", "--lora-blocks", "1:3", "--threads", "1")


@pytest.fixture(scope="module")
def piped(forkserver: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on a pipeline, with adapters in two blocks."""
    out = tmp_path_factory.mktemp("lora") / "piped"
    done = run_command(forkserver, out.with_name("log"), *lora_arguments(out, *PIPE))
    assert done.code == 0, done.output
    return out


@pytest.fixture(scope="module")
def whole(forkserver: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without failures."""
    out = tmp_path_factory.mktemp("lora") / "whole"
    done = run_command(forkserver, out.with_name("log"), *lora_arguments(out))
    assert done.code == 0, done.output
    assert "in adapters of rank 4" in done.output
    return out


@pytest.mark.parametrize("kind", ["whole", pytest.param("piped", marks=pytest.mark.long)])
def test_what_is_exported_is_what_peft_computes(request: pytest.FixtureRequest, kind: str) -> None:
    whole: Path = request.getfixturevalue(kind)
    shape = read_config(whole / "model-config")
    base = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    base.load_state_dict(weights_at_first(shape, None), strict=False)
    ids = torch.randint(int(shape.vocab_size), (2, 24), generator=torch.Generator().manual_seed(0))
    merged = AutoModelForCausalLM.from_pretrained(whole / "model").eval()
    with torch.no_grad():
        untrained = base.eval()(ids).logits
        theirs = PeftModel.from_pretrained(base, str(whole / "adapter")).eval()(ids).logits
        ours = merged(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - untrained).abs().max() > 1e-2
    assert json.loads((whole / "adapter" / "adapter_config.json").read_text())["r"] == 4
    blocks = {key.split(".")[4] for key in load_file(whole / "adapter" / "adapter_model.safetensors")}
    assert blocks == ({"1", "2"} if kind == "piped" else set("0123"))
    assert sorted(path.name for path in (whole / "model").iterdir() if path.is_dir()) == []


def test_a_pipeline_that_changes_its_size_is_lost_and_resumed_ends_in_the_same_bits(
    forkserver: ForkServer, tmp_path: Path, piped: Path
) -> None:
    """With nobody's approximation: the frozen weights of who is lost come back exactly, its adapters from before."""
    out = tmp_path / "lost"
    kill = ("--inject", "kill:worker=1,step=5,at=backward;kill:worker=0,step=7,at=commit", "--until", "9")
    lost = run_command(forkserver, tmp_path / "log", *lora_arguments(out, *PIPE, "--workers", "1:2", *kill))
    assert lost.code == 0, lost.output
    told = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert len([event for event in told if event["event"] == "fault"]) == 2
    assert not any("checkfree" in str(event) for event in told if event["event"] != "described")
    more = ("--scheduler", "gpipe", "--workers", "3", "--until", "0", "--inject", "")
    again = run_command(forkserver, tmp_path / "log", "train", "--out", str(out), "--resume", *more)
    assert again.code == 0, again.output
    assert equal(weights_of(piped), weights_of(out))
    ours, theirs = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (out, piped))
    assert equal(ours, theirs)


@pytest.mark.long
def test_a_run_is_lost_resumed_and_ends_in_the_same_bits(forkserver: ForkServer, tmp_path: Path, whole: Path) -> None:
    kills = ";".join(f"kill:worker={w},step=6,at=order" for w in range(2))
    lost = lora_arguments(tmp_path / "lost", "--rule", "round_robin", "--max-failures", "0")
    ended = run_command(forkserver, tmp_path / "log", *lost, "--inject", kills)
    assert ended.code == 1, ended.output
    again = run_command(forkserver, tmp_path / "log", *lost, "--resume")
    assert again.code == 0, again.output
    assert equal(weights_of(whole), weights_of(tmp_path / "lost"))
    saved = config_from_toml(tmp_path / "lost" / "config.toml", TrainConfig)
    with pytest.raises(CheckpointError, match="cannot resume with another lora: rank was 4 and is 8"):
        make_plan(replace(saved, lora_rank=8, resume=True), lambda *_: None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            (
                {"scheduler": "one_f_one_b", "at_once": 0, "recovery": recovery},
                f"recovery is '{recovery}'; allowed: auto, exact, .* with adapters: the mean of two is neither's",
            )
            for recovery in ("checkfree", "copy", "random")
        ),
        ({"lora_blocks": "3:3"}, "lora_blocks is '3:3'; allowed: all, or LO:HI with LO below HI"),
        ({"lora_blocks": "3"}, "lora_blocks is '3'; allowed: all, or LO:HI"),
        ({"lora_rank": 0, "lora_blocks": "0:2"}, "lora_blocks is '0:2'; allowed: all without lora_rank"),
        ({"lora_rank": -1}, "lora_rank is -1; allowed: 0 to 65536"),
        ({"lora_alpha": 0.0}, r"lora_alpha is 0\.0; allowed: above 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf; allowed: above 0"),
        ({"lora_targets": ""}, "lora_targets is ''; allowed: all-linear, or names separated by commas"),
        ({"lora_targets": "q_proj,"}, "lora_targets is 'q_proj,'; allowed: "),
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**changes).validate()


def test_unknown_targets_are_refused_with_those_there_are() -> None:
    with pytest.raises(ModelError, match="lora_targets has 'q_porj'; allowed: all-linear, or some of q_proj, k_proj"):
        LayeredModel(MODELS["llama"], lora=Lora(4, targets="q_porj, v_proj"))


def test_blocks_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(ModelError, match="lora_blocks is 4:7; allowed: within 0:6, the model's blocks"):
        LayeredModel(MODELS["llama"], lora=Lora(4, blocks=(4, 7)))
    with pytest.raises(ModelError, match="no adapter is in the first 2 blocks, which alone are computed"):
        LayeredModel(MODELS["llama"], lora=Lora(4, blocks=(2, 4)), depth=2)


def test_what_is_lost_comes_back_exactly_without_being_told() -> None:
    piped = {"scheduler": "one_f_one_b", "at_once": 0}
    assert config(**piped).resolved().recovery == "exact"
    assert config(**piped, lora_rank=0, trained="*.mlp.*").resolved().recovery == "exact"
    assert config(**piped, lora_rank=0).resolved().recovery == config().resolved().recovery == "auto"


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"LoRA needs peft; pip install 'unbroken\[lora\]'"):
        LayeredModel(MODELS["llama"], lora=LORA)
