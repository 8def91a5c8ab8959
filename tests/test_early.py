"""Refused early: what the settings and the model's config tell is not found out after the text has been read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.config import ConfigError, TrainConfig
from jobs.early import check_early, tokenizer_kind
from jobs.plan import make_plan
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import PRESETS, preset
from recovery.inject import InjectionError
from tests.test_cli import exported


def network(folder: Path) -> Path:
    """Four nodes in two stages."""
    path = folder / "network.json"
    path.write_text(json.dumps({"hop_s": [[0.0, 0.01, 0.01, 0.01]] * 4, "stages": [[0, 1], [2, 3]]}))
    return path


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"workers": 9}, ConfigError, r"workers 9 / replicas 1 asks for 9 spans; allowed: at most 6, the layers"),
        ({"workers": 4, "scheduler": "interleaved"}, ConfigError, r"x chunks 2 asks for 8 spans; allowed: at most 6"),
        ({"sequence_length": 2049}, ConfigError, r"sequence_length is 2049; allowed: at most 2048 for model llama"),
        ({"model": "small.json"}, ConfigError, r"has 2048 tokens; model '.*small.json' allows at most 300; see vocab"),
        ({"model": "small.json", "vocabulary": 301}, ConfigError, r"has 301 tokens; model '.*small.json' allows at mo"),
        ({"model": "narrow.json", "tokenizer": "bytes"}, ConfigError, r"tokenizer 'bytes' has 258 tokens; model"),
        (
            {"scheduler": "roundpipe", "model": "wide.json", "vocabulary": 300, "span_mib": 1}, ValueError,
            r"span_mib is 1; allowed: 17 or more, for the weights of layer 1",
        ),
        ({"scheduler": "skippipe", "network": "network.json", "workers": 3}, ConfigError, r"workers is 3; allowed: 4"),
        (
            {"scheduler": "skippipe", "network": "network.json", "inject": "kill:stage=2,step=1"}, InjectionError,
            r"stage is 2; allowed: 0 to 1",
        ),
        ({"resume": True}, ConfigError, r"holds no valid checkpoint$"),
        ({"tokenizer": "byte"}, ValueError, r"allowed: bytes, bpe, model, or a directory \(did you mean bytes\?\)"),
        ({"tokenizer": "FOLDER"}, ValueError, r"tokenizer is '.*', which holds none of tokenizer.json"),
    ],
)  # fmt: skip
def test_it_is_refused_before_text_is_read_or_a_tokenizer_is_trained(
    tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    network(tmp_path)
    for name, more in (("small", {"vocab_size": 300}), ("narrow", {"vocab_size": 200}),
                       ("wide", {"vocab_size": 300, "hidden_size": 1024, "intermediate_size": 32})):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps({**PRESETS["llama-tiny"], **more}))
    changes = {name: str(tmp_path) if value == "FOLDER" else value for name, value in changes.items()}
    for name in ("model", "network"):
        if str(changes.get(name)).endswith(".json"):
            changes = {**changes, name: tmp_path / changes[name]}
    config = TrainConfig(**{"model": "llama-tiny", "data": "nowhere.txt", "out": tmp_path / "run", **changes})
    config = TrainConfig(**{**vars(config), "model": str(config.model)})
    told: list[str] = []
    with pytest.raises(kind, match=message):
        make_plan(config, lambda what, share: told.append(what))
    assert told == []
    assert not (tmp_path / "run").exists()


def test_the_tokens_of_a_preset_are_bounded_by_its_tokenizer() -> None:
    for changes, tokens in (({}, 2048), ({"vocabulary": 500}, 500), ({"tokenizer": "bytes"}, 258)):
        model = check_early(TrainConfig(model="llama-tiny", **changes), preset("llama-tiny"), None)
        assert int(model.config.vocab_size) == tokens
    own = preset("llama-tiny", vocab_size=3000)
    assert int(check_early(TrainConfig(model="own.json"), own, None).config.vocab_size) == 3000


def test_a_tokenizer_is_known_before_it_is_made(tmp_path: Path) -> None:
    model = exported(tmp_path / "model", "llama-tiny")
    assert tokenizer_kind(TrainConfig(), None) == "bpe"
    assert tokenizer_kind(TrainConfig(), model) == "model"
    assert tokenizer_kind(TrainConfig(tokenizer="bytes"), model) == "bytes"
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    assert tokenizer_kind(TrainConfig(out=tmp_path / "run"), None) == "bpe"
    assert tokenizer_kind(TrainConfig(out=tmp_path / "run", resume=True), None) == "model"
    assert LayeredModel(preset("llama-tiny")).num_layers == 6
