"""`unbroken export`: any checkpoint of a run as a model that transformers loads, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from jobs.config import TrainConfig
from jobs.dcp import is_dcp, load_dcp
from jobs.tokenizer import build_tokenizer
from launch.config import to_toml
from launch.export import ExportConfig, export
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import preset
from pipeline.settings import ConfigError
from recovery import checkpoint
from recovery.generation import raise_generation

IDS = torch.arange(12)[None] % 200


def lay_out(run: Path, steps: tuple[int, ...] = (4, 8), generation: int = 0, **changes: Any) -> LayeredModel:
    """A run folder with checkpoints, whose weights are those of the seed that their step is."""
    config = TrainConfig(model="llama-tiny", **changes)
    shape = preset("llama-tiny", vocab_size=258)
    run.mkdir()
    (run / "config.toml").write_text(to_toml(config))
    shape.save_pretrained(run / "model-config")
    build_tokenizer("bytes", 0, ()).save_pretrained(run / "tokenizer")
    model = LayeredModel(shape, lora=config.lora())
    for step in steps:
        save(run, model, step, generation)
    return model


def save(run: Path, model: LayeredModel, step: int, generation: int) -> None:
    whole, root = model.build((0, model.num_layers), seed=step), run / "checkpoints"
    folder, records = checkpoint.begin(root, step), list[checkpoint.FileRecord]()
    for layer in range(model.num_layers):
        named = {key: whole.named_layer_parameters(layer)[key].detach() for key in model.keys(layer)}
        records.append(checkpoint.write_layer(folder, layer, {f"param/{key}": t + 0.01 for key, t in named.items()}))
    checkpoint.commit(root, step, records, {"step": step, "generation": generation})


def logits(path: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(path).eval()(IDS).logits.detach()


def expected(model: LayeredModel, step: int) -> Tensor:
    """By the module that the checkpoint's weights were taken from, changed as they were."""
    whole = model.build((0, model.num_layers), seed=step).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.01)
        return whole(IDS)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=["all weights", "adapters"])
def test_a_checkpoint_becomes_a_model_that_transformers_loads(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = tmp_path / "run"
    model = lay_out(run, **changes)
    saved = run / "checkpoints" / "step-00000004"
    for asked, step in (({}, 8), ({"step": 4}, 4), ({"run": saved}, 4)):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        values, text = export(ExportConfig(**{"run": run, "out": out, **asked}))
        assert (values["step"], values["model"], values["generation"]) == (step, str(out), 0)
        assert f"of step {step} of" in text
        assert torch.allclose(logits(out), expected(model, step), atol=1e-5)
    assert not torch.allclose(expected(model, 4), expected(model, 8), atol=1e-2)


def test_the_newest_that_is_whole_is_taken_and_a_damaged_one_refused(tmp_path: Path) -> None:
    model = lay_out(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000008" / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert export(ExportConfig(tmp_path / "run", tmp_path / "out"))[0]["step"] == 4
    assert torch.allclose(logits(tmp_path / "out"), expected(model, 4), atol=1e-5)
    with pytest.raises(checkpoint.CheckpointError, match=r"layer-00001.safetensors has checksum .*, written was"):
        export(ExportConfig(tmp_path / "run", tmp_path / "other", step=8))
    assert not (tmp_path / "other").exists()


def test_what_knows_what_is_forgotten_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = lay_out(run, steps=(4,))
    raise_generation(run, 1)
    save(run, model, 8, generation=1)
    assert export(ExportConfig(run, tmp_path / "out"))[0]["generation"] == 1
    assert json.loads((tmp_path / "out" / "unbroken.json").read_text()) == {"generation": 1}
    with pytest.raises(ConfigError, match="is of generation 0"):
        export(ExportConfig(run, tmp_path / "other", step=4))
    (run / "model").mkdir()
    (run / "model" / "guard.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"allowed: '.*run/model' itself, which has its guard"):
        export(ExportConfig(run, tmp_path / "other"))


def test_what_is_no_run_or_no_place_is_refused_by_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    lay_out(run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "bare").mkdir()
    for asked, told in (
        ({"run": tmp_path / "bare"}, r"^run is '.*bare'; allowed: the folder of a run, which has config.toml in it"),
        ({"step": 5}, r"^step is 5; allowed: that of a checkpoint: step-00000004, step-00000008"),
        ({"out": tmp_path / "full"}, r"^out is '.*full'; allowed: a folder that is new or empty"),
        ({"run": run / "checkpoints" / "step-00000004", "step": 4}, r"^step is 4; allowed: nothing with a checkpoint"),
        ({"step": -1}, r"^step is -1; allowed: 0 to"),
    ):
        with pytest.raises(ConfigError, match=told):
            export(ExportConfig(**{"run": run, "out": tmp_path / "out", **asked}))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_goes_out_for_pytorch_and_comes_back(tmp_path: Path) -> None:
    model = lay_out(tmp_path / "run")
    (tmp_path / "out").mkdir()
    values, _ = export(ExportConfig(tmp_path / "run", tmp_path / "out", step=4, to="dcp"))
    assert values["form"] == "dcp"
    assert is_dcp(tmp_path / "out")
    assert torch.allclose(logits(load_dcp(tmp_path / "out", tmp_path / "back")), expected(model, 4), atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out", "run"]
