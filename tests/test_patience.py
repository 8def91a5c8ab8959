"""Early stop and models on the way: a run ends whole once its held-out loss falls no more, whoever is lost, and goes on
from there with more patience."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from jobs.config import ConfigError, TrainConfig
from jobs.patience import is_over, known, seen
from launch.forkserver import ForkServer
from tests.harness import Command, run_command
from tests.test_recovery import events, metrics, same_weights, settings


def test_what_was_seen_is_the_lowest_and_how_long_ago() -> None:
    watched: dict[str, Any] = {}
    told = []
    for loss in (3.0, 2.0, 2.0, 2.5, 1.5, 1.6, 1.7):
        watched = json.loads(json.dumps(seen(watched, loss)))
        told.append(known(watched))
    assert told == [(3.0, 0), (2.0, 0), (2.0, 1), (2.0, 2), (1.5, 0), (1.5, 1), (1.5, 2)]
    assert [is_over(watched, patience) for patience in (0, 1, 2, 3)] == [False, True, True, False]
    assert known({"best": "low", "since": 1}) == (None, 0), "what a manifest says may be damaged"


def test_patience_that_nothing_tries_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^patience is 2; allowed: 0 with evaluate_every 0: nothing is evaluated"):
        TrainConfig(patience=2, evaluate_every=0).validate()


def run(forkserver: ForkServer, out: Path, *more: str) -> Command:
    """Whose held-out loss rises from the start: its rate is far too high."""
    flags = ["--lr", "30", "--warmup", "0", "--lr-schedule", "constant", "--evaluate-every", "2", "--export-every", "2"]
    done = run_command(
        forkserver, out.with_suffix(".log"), *settings(out, *flags, "--workers", "2", "--evaluate-samples", "4", *more)
    )
    assert done.code == 0, done.output
    return done


def test_a_run_without_progress_ends_whole_and_goes_on_with_more_patience(
    forkserver: ForkServer, tmp_path: Path
) -> None:
    done = run(forkserver, out := tmp_path / "run", "--patience", "2")
    losses = [event["loss"] for event in events(out, "evaluation")]
    last = len(metrics(out))
    assert last < 14, losses
    assert min(losses[-2:]) >= min(losses[:-2]), "two evaluations were no better"
    assert last == 2 * len(losses)
    assert f"in 2 evaluations: the run ends at step {last}" in done.output
    assert [event["step"] for event in events(out, "early_stop")] == [last]
    assert (out / "checkpoints" / f"step-{last:08d}").is_dir()
    assert (out / "model" / "config.json").is_file()
    # models on the way, each of which transformers loads, the last of them the model at the end
    found = sorted(path.name for path in (out / "exports").iterdir())
    assert found == [f"step-{step:08d}" for step in range(2, last, 2)]
    AutoModelForCausalLM.from_pretrained(out / "exports" / found[0] / "model")
    # over is over, until there is more patience
    again = run(forkserver, out, "--patience", "2", "--resume")
    assert len(metrics(out)) == last, again.output
    run(forkserver, out, "--patience", "4", "--resume")
    assert len(metrics(out)) > last


@pytest.mark.long
@pytest.mark.parametrize("at", ["commit", "join"])
def test_a_loss_on_the_way_changes_nothing_of_when_it_ends(forkserver: ForkServer, tmp_path: Path, at: str) -> None:
    run(forkserver, calm := tmp_path / "calm", "--patience", "2", "--replicas", "2")
    kills = "kill:worker=1,step=3,at=optimizer" + (";kill:worker=2,step=4,at=join" if at == "join" else "")
    run(forkserver, out := tmp_path / "run", "--patience", "2", "--replicas", "2", "--inject", kills)
    assert len(metrics(out)) == len(metrics(calm))
    assert same_weights(out, calm)


@pytest.mark.long
def test_under_roundpipe_too(forkserver: ForkServer, tmp_path: Path) -> None:
    run(forkserver, out := tmp_path / "run", "--patience", "1", "--scheduler", "roundpipe")
    assert len(metrics(out)) < 14
    assert (out / "exports" / "step-00000002" / "model" / "config.json").is_file()
