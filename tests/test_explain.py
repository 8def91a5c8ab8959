"""`unbroken explain recovery`: the order, what cannot be and why, and what is reckoned."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from jobs.config import ConfigError, TrainConfig
from launch.cli import main
from launch.explain import TopicSettings, explain
from pipeline.model.layered import LayeredModel
from pipeline.model.stage_fit import fit_flops
from pipeline.model.weights import preset
from recovery.policy import POLICIES
from recovery.rehearse import boundary_bytes

FIXED = TopicSettings(bandwidth_mib=100.0, gflops=10.0)
FIVE = TrainConfig(workers=5, ends="apart", model="llama-2m")


def told(config: TrainConfig) -> dict[int, dict[str, Any]]:
    """Worker -> remedy -> what is said of it."""
    values, _ = explain(config, FIXED)
    return {worker: {each["remedy"]: each for each in group["remedies"]}
            for group in values["workers"] for worker in group["lost"]}  # fmt: skip


def test_what_auto_does_stands_in_its_order_with_reasons() -> None:
    values, text = explain(FIVE, FIXED)
    assert values["order"] == list(POLICIES["auto"])
    found = told(FIVE)
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert list(found[2]) == list(POLICIES["auto"])
    assert found[2]["replica"]["why_not"] == "no other worker holds span 3:5"
    assert found[2]["rehearse"]["why_not"] == found[2]["checkfree"]["why_not"] == ""
    assert "holds no decoder block" in found[1]["checkfree"]["why_not"]
    assert found[1]["rehearse"]["why_not"] == ""
    assert "holds the embedding or the head" in found[0]["rehearse"]["why_not"]
    assert found[0]["checkpoint"]["loses"] == "nothing, but up to 80 steps are run again"
    assert "the first that can be is taken" in text


def test_bytes_and_seconds_are_those_of_the_model_and_the_layout() -> None:
    found, model = told(FIVE), LayeredModel(preset("llama-2m", vocab_size=2048))
    block = sum(math.prod(shape) for layer in (3, 4) for shape in model.shapes(layer).values())
    mean = found[2]["checkfree"]
    assert mean["moved"] == 2 * 4 * block
    assert mean["seconds"] == pytest.approx(mean["moved"] / (100 * 2**20))
    averaged = told(replace(FIVE, checkfree_moments="averaged"))[2]["checkfree"]
    assert averaged["moved"] == 3 * mean["moved"], "weights and two moments"
    kept = boundary_bytes(FIVE, model)
    fit = found[2]["rehearse"]
    assert fit["moved"] == mean["moved"] + 2 * kept
    tokens = kept // (model.hidden_size * 2)
    assert fit["seconds"] == pytest.approx(fit["moved"] / (100 * 2**20) + fit_flops(model, (3, 5), tokens) / 10e9)
    copies = told(replace(FIVE, workers=4, replicas=2, ends="auto"))
    assert {each["replica"]["why_not"] for each in copies.values()} == {""}
    assert copies[0]["replica"]["moved"] % (3 * 4) == 0, "weights and two moments"


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_can_be_explained(policy: str) -> None:
    config = replace(FIVE, recovery=policy, ends="in-line" if policy == "redundant" else "auto", workers=6)
    values, _ = explain(config, FIXED)
    for group in values["workers"]:
        assert [each["remedy"] for each in group["remedies"]] == list(POLICIES[policy])
        assert all(each["why_not"] or each["loses"] for each in group["remedies"])


def test_the_command_takes_its_topic_as_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "recovery", "--workers", "4", "--gflops", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recovery"] == "auto"
    assert main(["explain", "weather"]) == 2
    assert "topic" in capsys.readouterr().err


def test_a_pool_loses_no_state() -> None:
    with pytest.raises(ConfigError, match="scheduler is 'roundpipe'; allowed: any but roundpipe, which loses no state"):
        explain(replace(FIVE, scheduler="roundpipe", ends="auto"), FIXED)
