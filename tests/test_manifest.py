"""A manifest is the same bytes for the same facts; and the hashes in it depend on the facts alone."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.unlearn.manifest import (
    Asked,
    Hashes,
    LedgerRange,
    Manifest,
    ManifestError,
    ledger_range,
    versions,
    weights_hash,
)
from pipeline.model.weights import ModelError, finish_export, preset, write_shard
from recovery.forgotten import ForgottenRow

MANIFEST = Manifest(
    generation=2,
    request=Asked((ForgottenRow("7", "ab"), ForgottenRow("ü", "cd")), "all others", "author = Basil"),
    goal="untraining",
    method="simnpo",
    settings={"beta": 0.1, "rate": 1e-05, "layers": [1, 2], "nested": {"b": None, "a": True}},
    hashes=Hashes("d0", "d1", "w0", "w1"),
    ledger=LedgerRange(1, 40, 41, "00"),
    seen_in_steps=(3, 17),
    versions={"python": "3.11"},
    before={"forget": 0.9, "retain": 0.8},
    after={"retain": 0.79, "forget": 1e-9},
    times={"asked": 1.5, "done": 3},
)


def test_a_manifest_is_canonical_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    MANIFEST.write(path)
    data = path.read_bytes()
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert '"id":"ü"'.encode() in data
    assert Manifest.read(path) == MANIFEST
    assert Manifest.read(path).canonical().replace(b'"done":3.0', b'"done":3') == data
    turned = replace(MANIFEST, after=dict(reversed(MANIFEST.after.items())), settings=dict(MANIFEST.settings))
    assert turned.canonical() == data
    assert [each.name for each in tmp_path.iterdir()] == ["manifest.json"]


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    for wrong in (replace(MANIFEST, before={"forget": math.nan}), replace(MANIFEST, settings={"path": Path()})):
        with pytest.raises(ManifestError, match="cannot be written as JSON"):
            wrong.write(tmp_path / "manifest.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ManifestError, match=r"gone/manifest\.json cannot be written: No such file"):
        MANIFEST.write(tmp_path / "gone" / "manifest.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("generation", "1", "generation of .* expected int"),
        ("request", {"rows": [{"id": 3, "digest": ""}], "retain": "", "chosen": ""}, "id of a row is 3"),
        ("hashes", {}, "hashes has no data_before"),
        ("ledger", {"first_step": 1}, "ledger has no last_step"),
        ("seen_in_steps", [-1], "a step is -1"),
        ("before", {"forget": "much"}, "forget of before is 'much'"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    values = json.loads(MANIFEST.canonical())
    (tmp_path / "manifest.json").write_text(json.dumps({**values, field: value}))
    with pytest.raises(ManifestError, match=message):
        Manifest.read(tmp_path / "manifest.json")
    del values[field]
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ManifestError, match=f"has no {field}"):
        Manifest.read(tmp_path / "manifest.json")


def test_versions_are_those_of_what_runs() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert set(found) == {"python", "unbroken", "torch", "transformers"}


def test_the_range_of_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    text = '{"step": 1, "view": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2}\n{"ste'
    path.write_text(text)
    assert ledger_range(path) == LedgerRange(1, 3, 4, hashlib.sha256(text.encode()).hexdigest())
    path.write_text("")
    assert ledger_range(path) == LedgerRange(0, 0, 0, hashlib.sha256(b"").hexdigest())
    with pytest.raises(ManifestError, match="cannot be read: No such file"):
        ledger_range(tmp_path / "gone")


# ---- weights ----


def tensors() -> dict[str, Tensor]:
    values = torch.arange(12, dtype=torch.float32)
    return {"b": values.view(3, 4), "a": values.bfloat16(), "c": torch.tensor(2.0), "none": torch.empty(0, 4)}


def export(folder: Path, *shards: dict[str, Tensor]) -> Path:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        weight_map |= write_shard(folder, number, len(shards), shard)
    return finish_export(folder, preset("llama-tiny"), weight_map)


def test_a_hash_of_weights_is_of_names_types_shapes_and_bytes(tmp_path: Path) -> None:
    each = tensors()
    whole = weights_hash(export(tmp_path / "one", each))
    expected = hashlib.sha256()
    for name, dtype in (("a", "BF16"), ("b", "F32"), ("c", "F32"), ("none", "F32")):
        shape = json.dumps([name, dtype, list(each[name].shape)], separators=(",", ":"))
        expected.update(shape.encode() + b"\n" + each[name].view(torch.uint8 if each[name].dim() else each[name].dtype)
                        .numpy().tobytes())  # fmt: skip
    assert whole == expected.hexdigest()
    parts = [{name: each[name] for name in names} for names in (("c", "a"), ("none", "b"))]
    assert weights_hash(export(tmp_path / "two", *parts)) == whole
    changes: dict[str, dict[str, Tensor]] = {
        "name": {"B": each["b"]}, "type": {"b": each["b"].view(torch.int32)}, "shape": {"b": each["b"].view(4, 3)},
        "bytes": {"b": each["b"] + torch.eye(3, 4)},
    }  # fmt: skip
    rest = {name: tensor for name, tensor in each.items() if name != "b"}
    found = {write_and_hash(tmp_path / how, {**rest, **change}) for how, change in changes.items()}
    assert len(found | {whole}) == 5


def write_and_hash(folder: Path, each: dict[str, Tensor]) -> str:
    folder.mkdir()
    (path,) = set(write_shard(folder, 1, 1, each).values())
    (folder / path).rename(folder / "model.safetensors")
    return weights_hash(folder)


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="looked for model"):
        weights_hash(tmp_path)
    write_and_hash(tmp_path / "one", tensors())
    path = tmp_path / "one" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated or not a safetensors file"):
        weights_hash(tmp_path / "one")
