"""Models that come in by every door and go out again: what is written must load in transformers, equal bit by bit."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from pipeline.model import weights
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import (
    PRESETS,
    ModelError,
    Weights,
    convert_gguf,
    finish_export,
    preset,
    read_config,
    resolve,
    write_shard,
)

IDS = torch.arange(24).view(2, 12)


def save(directory: Path, name: str = "llama-tiny", cuts: tuple[int, ...] = (0, 2, 3, 6), **how: Any) -> LayeredModel:
    """Export a preset as if each span were written by a worker of its own."""
    model = LayeredModel(preset(name))
    spans = list(pairwise(cuts))
    weight_map: dict[str, str] = {}
    for index, span in enumerate(spans):
        module = model.build(span, seed=3)
        named = {n: p for layer in range(*span) for n, p in module.named_layer_parameters(layer).items()}
        owned = {key: named[key] for layer in range(*span) for key in model.keys(layer)}
        weight_map |= write_shard(directory, index + 1, len(spans), owned)
    keys = [key for layer in range(model.num_layers) for key in model.keys(layer)]
    finish_export(directory, model.config, weight_map, keys=keys, **how)
    return model


def logits(model: LayeredModel, **how: Any) -> Tensor:
    return model.build((0, model.num_layers), seed=3, **how).eval()(IDS)


# ---- presets and configs ----


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_models(name: str):
    model = LayeredModel(preset(name))
    millions = sum(map(model.parameter_count, range(model.num_layers))) / 1e6
    expected = {"llama-2m": 1.9, "llama-17m": 17.3, "smollm2-135m": 134.5}
    assert millions == pytest.approx(expected.get(name, 0.2), rel=0.03 if name in expected else 0.3)
    assert preset(name, vocab_size=300).vocab_size == 300
    assert preset(name).vocab_size == PRESETS[name]["vocab_size"]


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(ModelError, match=r"'llama-3m'.*llama-tiny.*gpt2-tiny"):
        preset("llama-3m")


def test_configs_are_read_from_json_and_toml(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(dict(PRESETS["llama-2m"])))
    lines = [f"{k} = {json.dumps(v)}" for k, v in PRESETS["llama-2m"].items() if v is not None]
    (tmp_path / "small.toml").write_text("\n".join(lines))
    fields = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "small.toml"):
        config = read_config(path)
        assert [getattr(config, f) for f in fields] == [getattr(preset("llama-2m"), f) for f in fields]
    found = resolve(tmp_path / "small.toml", tmp_path, vocab_size=99)
    assert isinstance(found, PreTrainedConfig)
    assert found.vocab_size == 99


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "a model config that is no JSON"),
        ("config.json", "[1]", "found list"),
        ("config.json", "{}", r"model_type is 'None'"),
        ("config.json", '{"model_type": "perceptron"}', "'perceptron', which transformers does not know"),
        (
            "config.json",
            '{"model_type": "llama", "hidden_size": "wide"}',
            r"hidden_size is 'wide'; allowed: a whole number of 1 to 1048576",
        ),
        ("shape.toml", "a = = 1", "a model config that is no TOML"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=f"(?s){name}.*{message}"):
        read_config(tmp_path / name)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        *[
            ("llama-tiny", {name: value}, rf"{name} is {value}; allowed: a whole number of 1 to \d+$")
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                         "intermediate_size", "vocab_size", "max_position_embeddings", "head_dim")
            for value in (0, -4, 10**30)
        ],
        *[("gpt2-tiny", {name: 0}, rf"{name} is 0; allowed: a whole number") for name in ("n_embd", "n_layer", "n_head",
                                                                                         "n_positions", "n_inner")],
        ("llama-tiny", {"hidden_size": 64.0}, r"hidden_size is 64.0; allowed: a whole number"),
        ("llama-tiny", {"hidden_size": True}, r"hidden_size is True; allowed: a whole number"),
        ("llama-tiny", {"vocab_size": "256"}, r"vocab_size is '256'; allowed: a whole number"),
        ("llama-tiny", {"num_key_value_heads": 3}, r"num_key_value_heads is 3; allowed: a divisor of num_attention_he"),
        ("gpt2-tiny", {"n_embd": 65}, r"n_embd is 65; allowed: a multiple of n_head \(4\)"),
        ("qwen3-tiny", {"head_dim": None, "hidden_size": 66}, r"hidden_size|head_dim"),
        ("qwen3-tiny", {"head_dim": 15}, r"head_dim is 15; allowed: an even number|odd|even"),
        ("llama-tiny", {"rms_norm_eps": 0}, r"rms_norm_eps is 0; allowed: a number above 0, up to 1"),
        ("llama-tiny", {"attention_dropout": 1.0}, r"attention_dropout is 1.0; allowed: a number of 0 or more and bel"),
        ("llama-tiny", {"initializer_range": -1}, r"initializer_range is -1; allowed: a number of 0 to 100"),
        ("llama-tiny", {"pad_token_id": 256}, r"pad_token_id is 256; allowed: below vocab_size \(256\)"),
        ("llama-tiny", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, r"rope_parameters.rope_theta"),
    ],
    ids=lambda value: " ".join(f"{n} {v}" for n, v in value.items())[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_sizes_that_no_model_has_are_refused_by_field_and_file(
    tmp_path: Path, base: str, changes: dict[str, Any], message: str
):
    path = tmp_path / "shape.json"
    path.write_text(json.dumps({**PRESETS[base], **changes}))
    with pytest.raises(ModelError, match=rf"^{path}: (transformers refuses .*)?({message})"):
        read_config(path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
@pytest.mark.parametrize("name", ["hidden_size", "rms_norm_eps", "initializer_range"])
def test_what_is_no_number_in_a_config_is_refused_by_field_and_file(tmp_path: Path, name: str, value: str):
    path = tmp_path / "shape.json"
    path.write_text(json.dumps({**PRESETS["llama-tiny"], name: "?"}).replace('"?"', value))
    with pytest.raises(ModelError, match=rf"{path}: a model config that holds (nan|inf) at {name}; allowed: finite"):
        read_config(path)
    toml = tmp_path / "shape.toml"
    lines = [f"{k} = {json.dumps(v)}" for k, v in PRESETS["llama-2m"].items() if v is not None and k != name]
    toml.write_text("\n".join([*lines, f"{name} = nan"]))
    with pytest.raises(ModelError, match=rf"{toml}: {name} is nan; allowed: a finite number"):
        read_config(toml)


def test_the_configs_that_transformers_has_are_allowed():
    for name in ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma", "gemma2", "gemma3_text"):
        weights._config(CONFIG_MAPPING[name]().to_dict(), name)


def test_a_binary_config_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="a model config that cannot be read"):
        read_config(tmp_path)


# ---- resolving ----


def test_everything_a_model_can_be_named_by(tmp_path: Path):
    model = save(tmp_path / "model")
    assert resolve(str(tmp_path / "model"), tmp_path) == tmp_path / "model"
    for name in ("llama-tiny", tmp_path / "model" / "config.json"):
        found = resolve(name, tmp_path)
        assert isinstance(found, PreTrainedConfig)
        assert found.hidden_size == model.hidden_size


@pytest.mark.parametrize("name", ["nowhere", "notes.txt", "missing.gguf"])
def test_what_is_no_model_is_refused_with_what_was_looked_for(tmp_path: Path, name: str):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"(?s)found .*expected a directory.*\.gguf.*llama-tiny"):
        resolve(tmp_path / name, tmp_path)


def test_directories_that_are_not_whole_are_refused(tmp_path: Path):
    save(tmp_path / "whole")

    def broken(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "whole", tmp_path / name))

    config_only = broken("config only")
    for file in config_only.glob("model*"):
        file.unlink()
    (config_only / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"looked for model\.safetensors.*found.*pytorch_model\.bin.*config\.json"):
        resolve(config_only, tmp_path)

    no_config = broken("no config")
    (no_config / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: a model config that cannot be read"):
        resolve(no_config, tmp_path)

    no_shard = broken("no shard")
    (no_shard / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names 3 files; not there: model-00002"):
        resolve(no_shard, tmp_path)

    truncated = broken("truncated")
    shard = truncated / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ModelError, match=r"model-00002.*truncated"):
        resolve(truncated, tmp_path)

    swapped = broken("swapped")
    shutil.copy(swapped / "model-00001-of-00003.safetensors", swapped / "model-00002-of-00003.safetensors")
    with pytest.raises(ModelError, match=r"model-00002.*index\.json puts model\.layers\.1.*does not hold"):
        resolve(swapped, tmp_path)

    index = broken("index")
    (index / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ModelError, match="not an index"):
        resolve(index, tmp_path)


def test_only_the_files_of_a_span_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = save(tmp_path)
    found = Weights(tmp_path)
    opened: list[str] = []

    def spy(file: Path, **how: Any) -> Any:
        opened.append(file.name)
        return safe_open(file, **how)

    monkeypatch.setattr(weights, "safe_open", spy)
    tensors = found.read({key: (key,) for key in model.keys(2)})
    assert opened == ["model-00002-of-00003.safetensors"]
    assert set(tensors) == set(model.keys(2))


# ---- exporting ----


@pytest.mark.parametrize("name", [name for name in PRESETS if "tiny" in name])
def test_an_export_loads_in_transformers_and_here(name: str, tmp_path: Path):
    model = save(tmp_path / "staging", name, into=tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"], "nothing else may be left"
    whole, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert whole.dtype == torch.float32
    expected = logits(model)
    torch.testing.assert_close(whole(input_ids=IDS, use_cache=False).logits, expected)
    run = model.build((0, model.num_layers), seed=3)
    for layer in range(model.num_layers):
        for name, parameter in run.named_layer_parameters(layer).items():
            assert torch.equal(parameter, whole.get_parameter(name)), name
    assert torch.equal(logits(model, source=tmp_path / "model"), expected)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) != model.tied, "a tied weight is written once"
    assert index["metadata"]["total_size"] == 4 * sum(map(model.parameter_count, range(model.num_layers)))
    assert AutoConfig.from_pretrained(tmp_path / "model").architectures == [type(whole).__name__]


def test_an_export_may_be_bf16(tmp_path: Path):
    model = LayeredModel(preset("llama-tiny"))
    named = model.build((0, 6), seed=3)
    tensors = {n: p.bfloat16() for layer in range(6) for n, p in named.named_layer_parameters(layer).items()}
    finish_export(tmp_path, model.config, write_shard(tmp_path, 1, 1, tensors))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert whole.dtype == torch.bfloat16
    assert all(torch.equal(p, tensors[n]) for n, p in whole.named_parameters())


def test_an_export_replaces_the_one_before(tmp_path: Path):
    save(tmp_path / "staging", into=tmp_path / "model")
    (tmp_path / "model" / "old").touch()
    save(tmp_path / "staging", into=tmp_path / "model")
    assert not (tmp_path / "model" / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_incomplete_export_is_refused_and_the_old_one_stays(tmp_path: Path):
    model = save(tmp_path / "staging", into=tmp_path / "model")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "model").iterdir()}
    weight_map = write_shard(tmp_path / "staging", 1, 2, {"a": torch.ones(2)})
    into = tmp_path / "model"
    with pytest.raises(ModelError, match="no worker wrote b,"):
        finish_export(tmp_path / "staging", model.config, weight_map, keys=["a", "b"], into=into)
    with pytest.raises(ModelError, match=r"00001-of-00002.* lacks b"):
        finish_export(tmp_path / "staging", model.config, {**weight_map, "b": weight_map["a"]}, into=into)
    with pytest.raises(ModelError, match="00002-of-00002"):
        finish_export(tmp_path / "staging", model.config, {"b": "model-00002-of-00002.safetensors"}, into=into)
    assert before == {p.name: p.stat().st_mtime_ns for p in into.iterdir()}


def test_a_failed_rename_puts_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "model")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "staging":
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "staging", into=tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "staging"]
    Weights(tmp_path / "model")


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(tensors: Any, path: Path, **how: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(ModelError, match="cannot be written: no space"):
        write_shard(tmp_path, 1, 1, {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModelError, match="shard 0 of 2"):
        write_shard(tmp_path, 0, 2, {})


# ---- GGUF ----


def write_gguf(file: Path, model: LayeredModel) -> None:
    """A Llama as GGUF in fp32, with llama.cpp's names, its order of rotary rows, and a vocabulary of bytes."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    module = model.build((0, model.num_layers), seed=3)
    for layer in range(model.num_layers):
        for name, parameter in module.named_layer_parameters(layer).items():
            tensor = parameter.detach()
            if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, transformers rotates halves
                heads = config.num_attention_heads
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("accelerate")
    model = LayeredModel(preset("llama-tiny"))
    write_gguf(tmp_path / "tiny.gguf", model)
    cache = tmp_path / "cache"
    found = resolve(tmp_path / "tiny.gguf", cache)
    assert isinstance(found, Path)
    assert list(cache.iterdir()) == [found], "nothing else may be left"
    assert "quantization_config" not in json.loads((found / "config.json").read_text())
    converted = LayeredModel(read_config(found))
    assert torch.equal(logits(converted, source=found), logits(model))
    monkeypatch.setattr(weights, "_convert", lambda *_: pytest.fail("converted again"))
    assert convert_gguf(tmp_path / "tiny.gguf", cache) == found


def test_a_bad_gguf_file_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="cannot convert"):
        resolve(tmp_path / "bad.gguf", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs gguf and accelerate; pip install 'unbroken\[gguf\]'"):
        resolve(tmp_path / "bad.gguf", tmp_path / "cache")


def test_a_gguf_file_that_has_no_room_as_fp32_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("accelerate")
    model = LayeredModel(preset("llama-tiny"))
    write_gguf(tmp_path / "tiny.gguf", model)
    needed = 4 * sum(map(model.parameter_count, range(model.num_layers)))
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: real._replace(free=needed - 1))
    with pytest.raises(ModelError, match=rf"tiny.gguf: its weights in fp32 take {needed} bytes; {needed - 1} are free"):
        resolve(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: real._replace(free=needed))
    assert isinstance(resolve(tmp_path / "tiny.gguf", tmp_path / "cache"), Path)


def test_a_tokenizer_goes_with_the_model(tmp_path: Path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    save(tmp_path, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"))
    assert AutoTokenizer.from_pretrained(tmp_path)("b")["input_ids"] == [1]


def test_safetensors_of_one_file_are_read(tmp_path: Path):
    save_file({"a": torch.ones(2, dtype=torch.float16)}, tmp_path / "model.safetensors")
    (tensor,) = Weights(tmp_path).read({"x": ("b", "a")}).values()
    assert tensor.dtype == torch.float32
    with pytest.raises(ModelError, match=r"no tensor for y; .*1 others, e\.g\. a"):
        Weights(tmp_path).read({"y": ("b",)})
