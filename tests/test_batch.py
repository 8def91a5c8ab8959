"""The global batch, however it is said, is a number of microbatches, and two ways to say it must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.config import ConfigError, TrainConfig
from launch.cli import configured
from launch.config import to_toml


@pytest.mark.parametrize(
    ("changes", "microbatches"),
    [
        ({}, 8),
        ({"grad_accumulation": 4}, 4),
        ({"grad_accumulation": 4, "workers": 4, "replicas": 2}, 8),
        ({"global_batch": 32, "microbatch_size": 2}, 16),
        ({"global_batch": 32, "grad_accumulation": 4, "replicas": 2, "microbatch_size": 4}, 8),
        ({"microbatches": 6, "global_batch": 24}, 6),
    ],
)
def test_the_formula_holds(changes: dict[str, Any], microbatches: int) -> None:
    config = TrainConfig(**changes).resolved()
    assert config.microbatches == microbatches
    assert config.samples_per_step == microbatches * config.microbatch_size
    assert (config.grad_accumulation, config.global_batch) == (0, 0), "a run is kept with microbatches alone"
    assert config.resolved() == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--global-batch 10", "global_batch is 10; allowed: a multiple of microbatch_size (4)"),
        (
            "--microbatches 8 --grad-accumulation 4",
            "grad_accumulation is 4; allowed: 8 microbatches, as microb",
        ),
        ("--microbatches 16 --global-batch 32", "global_batch is 32; allowed: 16 microbatches, as microbatches has it"),
        (
            "--grad-accumulation 4 --global-batch 32",
            "global_batch is 32; allowed: 4 microbatches, as grad_acc",
        ),
        ("--global-batch 32 --microbatch-size 0", "microbatch_size is 0; allowed: 1 to 65536"),
        ("--grad-accumulation -1", "grad_accumulation is -1; allowed: 0 to 65536"),
    ],
)
def test_contradictions_are_refused(words: str, message: str) -> None:
    """Also where what was asked for is the default: it was asked for."""
    with pytest.raises(ConfigError) as refused:
        configured(TrainConfig, "unbroken train", words.split()).resolved().validate()
    assert str(refused.value).startswith(message)


def test_a_run_that_was_kept_takes_another_way_to_say_it(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(to_toml(TrainConfig(microbatches=16, microbatch_size=2)))
    words = ["--resume", "--out", str(tmp_path)]
    assert configured(TrainConfig, "unbroken train", words).microbatches == 16
    again = configured(TrainConfig, "unbroken train", [*words, "--grad-accumulation", "32", "--microbatch-size", "1"])
    assert (again.microbatches, again.samples_per_step) == (32, 32), "the same global batch"
