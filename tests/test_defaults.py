"""What is unset follows from what the model is and how long the run is; it is kept, and what is odd is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.config import ConfigError, TrainConfig
from jobs.remarks import remarks
from launch.config import config_from_toml
from launch.forkserver import ForkServer
from pipeline.state.optimizer import OptimizerConfig, learning_rate
from tests.harness import run_command
from tests.test_cli import exported


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model directory: weights that are meant to be kept."""
    return str(exported(tmp_path_factory.mktemp("trained") / "model", "llama-tiny"))


def test_from_scratch_the_defaults_are_what_they_were() -> None:
    """240 steps at 2e-3 with 20 of warm-up, on the standard library."""
    known = TrainConfig().resolved()
    assert (known.lr, known.warmup, known.data) == (2e-3, 20, "stdlib")
    assert TrainConfig().optimizer_config() == OptimizerConfig(2e-3, 240, 20, 0.1, (0.9, 0.95), 1e-8, 0.1, 1.0, "torch")


@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 1), (6, 1), (30, 3), (99, 10), (195, 20), (240, 20), (10_000, 20)]
)  # fmt: skip
def test_warm_up_is_a_tenth_of_a_short_run(steps: int, warmup: int) -> None:
    assert TrainConfig(steps=steps).resolved().warmup == warmup
    assert TrainConfig(steps=steps, warmup=7).resolved().warmup == 7
    assert TrainConfig(steps=steps, warmup=0).optimizer_config().warmup_steps == 0


@pytest.mark.parametrize(
    ("changes", "lr"),
    [
        ({}, 2e-5),
        ({"scheduler": "roundpipe"}, 2e-5),
        ({"scheduler": "roundpipe", "lora_rank": 8}, 2e-4),
        ({"lr": 1e-3}, 1e-3),
    ],
)
def test_trained_weights_are_not_ruined_by_the_rate_of_random_ones(
    trained: str, changes: dict[str, Any], lr: float
) -> None:
    config = TrainConfig(model=trained, data="some.txt", **changes)
    assert config.resolved().lr == config.optimizer_config().lr == lr
    assert config.resolved().resolved() == config.resolved()


def test_adapters_on_random_weights_learn_as_these_do() -> None:
    assert TrainConfig(scheduler="roundpipe", lora_rank=8).resolved().lr == 2e-3


def test_trained_weights_are_not_silently_trained_on_the_standard_library(trained: str, tmp_path: Path) -> None:
    config = TrainConfig(model=trained).resolved()
    assert config.data is None
    with pytest.raises(ConfigError, match=rf"^data is unset; allowed with the weights of model '{trained}': files of"):
        config.validate()
    TrainConfig(model=trained, data="stdlib").resolved().validate()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"^data is unset"):
        TrainConfig(model=str(tmp_path / "model.gguf")).resolved().validate()


def test_what_was_resolved_is_kept(forkserver: ForkServer, trained: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a pipeline of workers trains on this. " * 400)
    flags = ["train", "--model", trained, "--workers", "2", "--microbatches", "2", "--sequence-length", "32"]
    flags += ["--steps", "2", "--sample-tokens", "0", "--threads", "1", "--out", str(tmp_path / "run")]
    refused = run_command(forkserver, tmp_path / "log", *flags)
    assert (refused.code, "unbroken train: data is unset; allowed" in refused.output) == (2, True)
    done = run_command(forkserver, tmp_path / "log", *flags, "--data", str(tmp_path / "text.txt"))
    assert done.code == 0, done.output
    kept = config_from_toml(tmp_path / "run" / "config.toml", TrainConfig)
    assert (kept.lr, kept.warmup, kept.data) == (2e-5, 1, str(tmp_path / "text.txt"))
    assert "global batch: 8 samples of 32 tokens, so 256 tokens a step\n" in done.output
    assert "space: " in done.output


# ---- what is said ----

AND = "and the run has"


@pytest.mark.parametrize(
    ("changes", "first_step", "said"),
    [
        ({}, 0, []),
        ({"steps": 1}, 0, []),
        ({"steps": 6}, 0, []),
        ({"steps": 6, "warmup": 5}, 0, []),
        ({"steps": 6, "warmup": 20}, 0, [f"warmup is 20 {AND} 6 steps: the learning rate only rises, to 0.0006 of"]),
        ({"steps": 6, "warmup": 6}, 0, [f"warmup is 6 {AND} 6 steps: the learning rate only rises, to 0.002 of 0.0"]),
        ({"inject": "kill:worker=1,step=239"}, 0, []),
        ({"inject": "kill:worker=1,step=7;rate:p=0.1; nan:stage=0,step=240"}, 0, ["inject 'nan:stage=0,step=240' n"]),
        ({"inject": "kill:worker=1,step=7"}, 8, ["inject 'kill:worker=1,step=7' never happens: this start takes s"]),
    ],
)  # fmt: skip
def test_what_is_hardly_meant_is_said(changes: dict[str, Any], first_step: int, said: list[str]) -> None:
    found = remarks(TrainConfig(**changes), first_step)
    assert [line[: len(start)] for line, start in zip(found, said, strict=True)] == said


def test_what_the_remark_says_of_the_rate_is_so() -> None:
    config = TrainConfig(steps=6, warmup=20).optimizer_config()
    assert learning_rate(config, 5) == pytest.approx(0.0006)
