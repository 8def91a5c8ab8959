"""What a script of Ray Train's gives, and what it gets back. Without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from jobs.config import ConfigError, TrainConfig
from launch import ray_train as script
from launch.agent import RunFailed
from launch.config import config_from_toml
from launch.ray_train import ray_train
from pipeline.exit_codes import GIVE_UP, STOPPED


class Process:
    """In the place of `run_process`: leaves a run folder, and ends as it is told."""

    def __init__(self, folder: Path, code: int = 0) -> None:
        self.folder, self.code, self.settings = folder, code, ""

    def __call__(self, settings: str, environment: dict[str, str], folder: str, **_: Any) -> tuple[int, str]:
        self.settings = settings
        self.folder.mkdir(exist_ok=True)
        lines = [{"step": step, "view": 1, "loss": 1.0 / step} for step in (1, 2, 3, 2)]
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        event = {"event": "evaluation", "step": 2, "loss": 0.7, "perplexity": 2.0}
        (self.folder / "events.jsonl").write_text(json.dumps(event) + "\n")
        (self.folder / "model").mkdir(exist_ok=True)
        return self.code, "unbroken train: worker 1 was killed\n" if self.code else ""


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Process:
    found = Process(tmp_path / "run")
    monkeypatch.setattr(script, "run_process", found)
    return found


def given(process: Process, tmp_path: Path) -> TrainConfig:
    (tmp_path / "given.toml").write_text(process.settings)
    return config_from_toml(tmp_path / "given.toml", TrainConfig)


@pytest.mark.parametrize(
    ("scaling", "workers", "device", "cpus"),
    [
        (SimpleNamespace(num_workers=(2, 4), use_gpu=True, resources_per_worker={"CPU": 3}), (2, 4), "cuda", 3.0),
        (SimpleNamespace(num_workers=4, use_gpu=False, resources_per_worker=None), (1, 4), "auto", 1.0),
        (3, (1, 3), "auto", 1.0),
        ((2, 3), (2, 3), "auto", 1.0),
    ],
)
def test_a_scaling_config_is_read(
    process: Process, tmp_path: Path, scaling: Any, workers: tuple[int, int], device: str, cpus: float
) -> None:
    ray_train(scaling, process.folder, steps=9, data="stdlib")
    config = given(process, tmp_path)
    assert ((config.min_workers, config.workers), config.device, config.agent_cpus) == (workers, device, cpus)
    assert (config.cluster, config.steps, config.out) == ("ray", 9, process.folder)


def test_a_result_is_that_of_the_steps_that_stand(process: Process) -> None:
    found = ray_train(2, process.folder)
    assert (found.metrics["step"], found.metrics["loss"]) == (2, 0.5)
    assert (found.metrics["held_out_loss"], found.metrics["perplexity"]) == (0.7, 2.0)
    assert (found.model, found.checkpoint, found.stopped) == (process.folder / "model", None, False)


def test_a_run_that_has_saved_itself_says_so_and_one_that_fails_raises(process: Process) -> None:
    process.code = STOPPED
    found = ray_train(2, process.folder)
    assert (found.stopped, found.model) == (True, None)
    process.code = GIVE_UP
    with pytest.raises(RunFailed, match="worker 1 was killed") as failed:
        ray_train(2, process.folder)
    assert failed.value.code == GIVE_UP


def test_a_run_that_goes_on_is_given_what_is_asked_now_and_nothing_else(process: Process) -> None:
    ray_train(2, process.folder, resume=True, steps=12)
    assert "lr" not in process.settings
    assert "steps = 12\n" in process.settings


@pytest.mark.parametrize(
    ("scaling", "settings", "message"),
    [
        ("two", {}, "num_workers is 'two'; allowed: a whole number, or"),
        ((3, 2), {}, "num_workers is"),
        (2, {"stpes": 3}, r"stpes \(did you mean steps\?\): no such setting"),
        (2, {"lr": -1.0}, "lr is -1.0; allowed"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    process: Process, scaling: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ray_train(scaling, process.folder, **settings)
    assert not process.folder.exists()
