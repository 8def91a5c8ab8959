"""Workers that hold nothing: equal to plain torch, to each other bit for bit, and after every kind of death."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.config import TrainConfig
from launch.nursery import Nursery
from tests.harness import Outcome, plain_training, run_pool
from tests.test_parity import MODELS, check, settings

STEPS = 8


def config(**changes: Any) -> TrainConfig:
    return settings(**{"steps": STEPS, "scheduler": "roundpipe", "at_once": 2, **changes})


@cache
def reference(model: str, behind: bool = False) -> Outcome:
    return plain_training(settings(steps=STEPS), MODELS[model], behind=behind)


_calm: dict[tuple[Any, ...], Outcome] = {}


def calm(nursery: Nursery, out: Path, model: str = "llama", **changes: Any) -> Outcome:
    """The run without failures, made once."""
    key = (model, *sorted(changes.items()))
    if key not in _calm:
        _calm[key] = run_pool(nursery, config(**changes), MODELS[model], out / "calm")
    return _calm[key]


def same_bits(a: Outcome, b: Outcome) -> bool:
    return (
        a.losses == b.losses and a.norms == b.norms and all(torch.equal(a.weights[n], t) for n, t in b.weights.items())
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_equals_plain_torch_and_every_other_number_of_workers(
    nursery: Nursery, tmp_path: Path, workers: int, model: str
) -> None:
    found = run_pool(nursery, config(workers=workers), MODELS[model], tmp_path / "run")
    check(found, reference(model))
    assert same_bits(found, calm(nursery, tmp_path, model))
    assert found.details[0]["most_held"] <= 2


@pytest.mark.parametrize("workers", [1, 3])
def test_one_step_behind_equals_a_delayed_reference(nursery: Nursery, tmp_path: Path, workers: int) -> None:
    found = run_pool(nursery, config(workers=workers, optimizer_async=True), MODELS["llama"], tmp_path)
    check(found, reference("llama", behind=True))
    steps = [event for event in found.details[0]["events"] if event["event"] == "step"]
    assert [event["version"] for event in steps] == [max(0, step - 1) for step in range(STEPS)]


POINTS = ("order", "upload", "uploaded", "forward", "backward", "commit", "committed")


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("at", POINTS)
def test_a_killed_worker_changes_no_bit(nursery: Nursery, tmp_path: Path, at: str, behind: bool) -> None:
    killed = config(workers=3, optimizer_async=behind, rule="round_robin", inject=f"kill:worker=1,step=3,at={at}")
    found = run_pool(nursery, killed, MODELS["llama"], tmp_path / "killed")
    events = [event["event"] for event in found.details[0]["events"]]
    assert events.count("detected") == 1, events
    assert same_bits(found, calm(nursery, tmp_path, optimizer_async=behind))
