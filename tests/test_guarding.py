"""Requests whose methods guard: real runs, one request after another, a worker lost on the way; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.authors import authors, write
from jobs.unlearn.guard import Guard
from jobs.unlearn.manifest import Manifest, weights_hash
from launch.forkserver import ForkServer
from launch.inference import load
from pipeline.model.lora import A, Lora
from pipeline.state.layer_state import LayerState
from pipeline.state.optimizer import OptimizerConfig
from recovery import checkpoint
from recovery.generation import read_generation
from tests.harness import Command, run_command

SMALL = ("--checkpoint-every", "2", "--evaluate-every", "0", "--json")


@pytest.fixture(scope="module")
def trained(forkserver: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 workers on 60 rows."""
    folder = tmp_path_factory.mktemp("trained")
    write(authors(3, 0), folder / "authors")
    argv = (
        "train", "--out", str(folder / "run"), "--data", str(folder / "authors" / "train.jsonl"), "--model",
        "llama-tiny", "--vocabulary", "400", "--sequence-length", "96", "--workers", "2", "--steps", "12",
        "--microbatches", "4", "--microbatch-size", "2", "--lr", "5e-3", "--checkpoint-every", "0", "--evaluate-every",
        "0", "--sample-tokens", "0", "--threads", "1", "--json",
    )  # fmt: skip
    done = run_command(forkserver, folder / "log", *argv)
    assert done.code == 0, done.output
    return folder / "run"


class Run:
    """A copy of the trained run, and the command."""

    def __init__(self, forkserver: ForkServer, trained: Path, folder: Path) -> None:
        self.forkserver, self.folder, self.path = forkserver, folder, folder / "run"
        shutil.copytree(trained, self.path)

    def __call__(self, *argv: object, code: int = 0) -> Command:
        done = run_command(self.forkserver, self.folder / "log", *map(str, argv))
        assert done.code == code, done.output
        return done

    def unlearn(self, forget: str, method: str, *more: str) -> dict[str, Any]:
        said = self("unlearn", self.path, "--forget", forget, "--method", method, *SMALL, *more).output
        return json.loads(said[said.index("{\n") if "{\n" in said else said.index("{") :])


@pytest.fixture
def run(forkserver: ForkServer, trained: Path, tmp_path: Path) -> Run:
    return Run(forkserver, trained, tmp_path)


def logits(folder: Path) -> torch.Tensor:
    model, _ = load(folder)
    with torch.no_grad():
        return model(torch.arange(3, 35)[None]).logits


def test_mrp(run: Run) -> None:
    """Weights stay, hidden states lose directions, and a second request takes more of them from the same blocks."""
    before, plain = weights_hash(run.path / "model"), logits(run.path / "model")
    calm = Run(run.forkserver, run.path, run.folder / "calm")
    more = ("--steps", "6", "--lr", "2e-2", "--directions", "3")
    told = run.unlearn("author=author-001", "mrp", *more, "--inject", "kill:stage=1,step=3,at=backward")
    assert told["goal"] == "suppression"
    assert told["after"]["forget_probability"] < told["before"]["forget_probability"]
    assert read_generation(run.path) == 1
    manifest = Manifest.read(Path(told["manifest"]))
    assert manifest.hashes.weights_after == manifest.hashes.weights_before == before
    first = Guard.read(run.path / "model")
    assert first is not None
    assert manifest.settings["guard"]["sha256"]
    assert {directions.shape for directions in first.projections.values()} == {(3, 64)}
    assert not torch.allclose(logits(run.path / "model"), plain, atol=1e-3)
    assert checkpoint.find(run.path / "checkpoints", 1).path is not None

    calm.unlearn("author=author-001", "mrp", *more)  # no worker lost: bitwise the same
    again = Guard.read(calm.path / "model")
    assert again is not None
    assert all(torch.equal(first.projections[path], again.projections[path]) for path in first.projections)

    told = run.unlearn("author-002/05", "mrp", *more)
    second = Guard.read(run.path / "model")
    assert second is not None
    assert second.projections.keys() == first.projections.keys()
    for path, directions in second.projections.items():
        assert torch.equal(directions[:3], first.projections[path])
        assert directions.shape == (6, 64)
    audit = run("audit", run.path).output
    assert "guarded   model: its weights still know what mrp suppresses" in audit
    assert "nothing that was forgotten is left" in audit
    assert "its weights still know" in run("train", "--out", run.path, "--resume", "--steps", "14", code=2).output
    asked = ("--forget", "author-002/06", "--method", "npo", "--steps", "2")
    assert "method is 'npo'; allowed: mrp, as before" in run("unlearn", run.path, *asked, code=2).output


def test_o3(run: Run) -> None:
    """Weights stay; a question that the router knows gets the adapter; the second request's adapter begins as the first
    and is pulled apart from it, whoever trains it."""
    before = weights_hash(run.path / "model")
    more = ("--steps", "6", "--lr", "2e-2", "--lora-rank", "2")
    told = run.unlearn("author=author-001", "o3", *more)
    assert told["after"]["forget_probability"] < told["before"]["forget_probability"]
    assert Manifest.read(Path(told["manifest"])).hashes.weights_after == before
    first = Guard.read(run.path / "model")
    assert first is not None
    assert len(first.routers) == 1
    assert not first.earlier
    pool = ("--scheduler", "roundpipe", "--orthogonality", "1e4")
    told = run.unlearn("author=author-002", "o3", *more, *pool)
    second = Guard.read(run.path / "model")
    assert second is not None
    assert len(second.routers) == 2
    assert all(torch.equal(second.earlier[0][name], first.adapter[name]) for name in second.earlier[0])

    def overlap(other: Guard) -> float:
        names = [name for name in first.adapter if name.endswith(A)]
        return sum(float((first.adapter[name] @ other.adapter[name].T).square().sum()) for name in names)

    assert overlap(second) < 0.9 * overlap(first)


def test_an_adapter_is_pulled_apart_from_earlier_ones() -> None:
    """By the gradient of the term, and for real by an optimizer's steps."""
    made = torch.Generator().manual_seed(0)
    earlier = torch.randn(4, 16, generator=made)
    weight = torch.nn.Parameter(torch.randn(2, 16, generator=made))
    lora = Lora(2, earlier={"a.lora_A.weight": earlier}, apart=0.3)
    (0.3 * (earlier @ weight.T).square().sum()).backward()
    wanted, weight.grad = weight.grad, torch.zeros_like(weight)
    lora.pull({"a.lora_A.weight": weight, "a.lora_B.weight": torch.nn.Parameter(torch.zeros(3, 2))})
    assert wanted is not None
    assert torch.allclose(weight.grad, wanted, atol=1e-5)
    state = LayerState("1", {"a.lora_A.weight": weight}, OptimizerConfig(weight_decay=0.0))
    state.pull, before = lora.pull, float((earlier @ weight.detach().T).square().sum())
    for _ in range(20):
        state.apply(0.5, 0.05)
    assert float((earlier @ weight.detach().T).square().sum()) < 0.2 * before


def test_what_is_refused(run: Run) -> None:
    asked = ("unlearn", run.path, "--forget", "author=author-001", "--steps", "2")
    before = sorted(path for path in run.path.rglob("*") if "requests" not in path.parts)
    assert "projected is 9; allowed: 1 to 4" in run(*asked, "--method", "mrp", "--projected", "9", code=2).output
    shard = ("--method", "o3", "--shard-optimizer", "--replicas", "2", "--workers", "4")
    assert "allowed: False for method o3" in run(*asked, *shard, code=2).output
    assert sorted(path for path in run.path.rglob("*") if "requests" not in path.parts) == before
