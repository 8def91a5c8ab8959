"""Models go into PyTorch's distributed checkpoints and come back bit for bit; strangers' pickles are refused."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from jobs.config import TrainConfig
from jobs.dcp import load_dcp, save_dcp
from jobs.plan import find_model
from launch.forkserver import ForkServer
from pipeline.model.weights import ModelError
from tests.harness import run_command
from tests.test_cli import exported
from tests.test_recovery import settings

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return exported(tmp_path / "model", "llama-tiny")


def test_a_model_goes_out_and_comes_back(model: Path, tmp_path: Path) -> None:
    save_dcp(model, tmp_path / "dcp")
    plain = AutoModelForCausalLM.from_pretrained(model)
    state: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in plain.state_dict().items()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    back = load_dcp(tmp_path / "dcp", tmp_path / "converted")
    ours, theirs = weights(back), weights(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert load_dcp(tmp_path / "dcp", tmp_path / "converted") == back
    config = TrainConfig(model=str(tmp_path / "dcp"), out=tmp_path / "run")
    assert find_model(config)[1] == tmp_path / "run" / "converted" / "dcp-dcp"
    with pytest.raises(ModelError, match="is there already; allowed: a folder that is not"):
        save_dcp(model, tmp_path / "dcp")


def written(model: Path, folder: Path, state: dict[str, Any]) -> Path:
    """As a trainer has saved it, with the config beside it."""
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    shutil.copy(model / "config.json", folder / "config.json")
    return folder


def test_a_trainers_checkpoint_with_more_in_it_is_read(model: Path, tmp_path: Path) -> None:
    held = {name: tensor.bfloat16() for name, tensor in weights(model).items()}
    state = {"model": held, "optimizer": {"step": torch.ones(3)}, "train_state": {"step": 7}}
    back = weights(load_dcp(written(model, tmp_path / "titan", state), tmp_path / "converted"))
    assert all(torch.equal(back[name], tensor) for name, tensor in held.items())
    assert back.keys() == held.keys()


def test_other_names_and_shapes_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    held = weights(model)
    other = written(model, tmp_path / "names", {"tok_embeddings.weight": torch.ones(2)})
    with pytest.raises(
        ModelError, match=r"without \d+ of the weights, the first: lm_head.weight; it has tok_embeddings"
    ):
        load_dcp(other, tmp_path / "converted")
    small = written(model, tmp_path / "small", {**held, "lm_head.weight": torch.ones(2, 2)})
    with pytest.raises(ModelError, match=r"lm_head.weight is \(2, 2\); config.json asks for"):
        load_dcp(small, tmp_path / "converted")


class _Call:
    def __reduce__(self) -> Any:
        return os.mkdir, ("taken-over",)


def test_a_strangers_pickle_is_not_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = written(model, tmp_path / "bad", weights(model))
    (folder / ".metadata").write_bytes(pickle.dumps(_Call()))
    with pytest.raises(ModelError, match=r"it has posix\.mkdir, which is no part of it"):
        load_dcp(folder, tmp_path / "converted")
    (folder / ".metadata").write_bytes(b"\x80\x04nothing")
    with pytest.raises(ModelError, match="cannot be read"):
        load_dcp(folder, tmp_path / "converted")
    assert not (tmp_path / "taken-over").exists()


def test_a_run_begins_with_one(model: Path, forkserver: ForkServer, tmp_path: Path) -> None:
    save_dcp(model, tmp_path / "dcp")
    flags = ["--workers", "2", "--steps", "1", "--model", str(tmp_path / "dcp"), "--evaluate-samples", "2"]
    done = run_command(forkserver, tmp_path / "log", *settings(tmp_path / "run", *flags))
    assert done.code == 0, done.output
