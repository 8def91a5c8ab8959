"""Workers that share the optimizer's state, with and without real faults: the bits of those that share nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.forkserver import ForkServer
from tests import test_recovery as recovered
from tests.harness import Command, run_command, run_workers
from tests.test_parity import MODELS, settings
from tests.test_recovery import POINTS, events, same_weights


@pytest.mark.parametrize(
    ("workers", "replicas", "model", "changes"),
    [
        (2, 2, "gpt2", {"clip": 0.05}),
        (3, 3, "llama", {"clip": 0.05, "exact_sums": True, "microbatches": 3}),
        (4, 2, "gpt2", {"scheduler": "balanced", "dtype": "bfloat16"}),
        pytest.param(4, 2, "gpt2", {"exact_sums": True}, marks=pytest.mark.long),
        pytest.param(4, 2, "llama", {"clip": 0.0}, marks=pytest.mark.long),
        pytest.param(6, 3, "gpt2", {"clip": 0.05, "snapshot": "neighbour", "microbatches": 3}, marks=pytest.mark.long),
        pytest.param(4, 2, "llama", {"scheduler": "interleaved", "microbatches": 4}, marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_workers_that_share_are_bitwise_those_that_do_not(
    forkserver: ForkServer, tmp_path: Path, workers: int, replicas: int, model: str, changes: dict[str, object]
) -> None:
    """The GPT-2 has a tied head, whose holders are all ends of all replicas."""
    config = settings(workers=workers, replicas=replicas, steps=6, lr=0.01, **changes)
    shared = replace(config, shard_optimizer=True)
    config.validate()
    shared.validate()
    plain = run_workers(forkserver, replace(config, snapshot="off"), MODELS[model], tmp_path / "plain")
    found = run_workers(forkserver, shared, MODELS[model], tmp_path / "shared")
    assert found.replicas_equal
    assert (found.losses, found.norms) == (plain.losses, plain.norms)
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in plain.weights.items())


# ---- whole runs ----

SHARED = (*POINTS, "exchange")
THREE = ("--microbatches", "6", "--replicas", "3", "--exact-sums")
STEPS = 16


def run(forkserver: ForkServer, out: Path, *more: str) -> Command:
    done = run_command(
        forkserver, out.with_suffix(".log"),
        *recovered.settings(out, "--shard-optimizer", "--steps", str(STEPS), *THREE, *more),
    )  # fmt: skip
    assert done.code == 0, done.output
    return done


@pytest.fixture(scope="module")
def calm(forkserver: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that shares nothing, on one worker."""
    out = tmp_path_factory.mktemp("calm") / "run"
    recovered.train(forkserver, out, "--steps", str(STEPS), *THREE, "--replicas", "1", "--workers", "1")
    return out


def test_without_a_second_keeper_a_loss_at_any_point_goes_back_to_a_checkpoint(
    forkserver: ForkServer, calm: Path, tmp_path: Path
) -> None:
    steps = (3, 6, 8, 11, 13, 15)
    kills = ";".join(f"kill:worker={w},step={s},at={at}" for w, (s, at) in enumerate(zip(steps, SHARED, strict=True)))
    done = run(forkserver, out := tmp_path / "run", "--workers", "6", "--inject", kills)
    assert "if one of workers 0 to 5 is lost: checkpoint, up to 5 steps again" in done.output
    assert [event["to"] for event in events(out, "rolled_back")] == [
        "start", "step-00000005", "step-00000005", "step-00000010", "step-00000010",
        "step-00000015",
    ]  # fmt: skip
    assert same_weights(out, calm)


def test_with_a_second_keeper_a_loss_at_any_point_takes_nothing_along(
    forkserver: ForkServer, calm: Path, tmp_path: Path
) -> None:
    """Two replicas give what the third has lost; after two that are lost together all go back."""
    kills = ";".join(f"kill:worker={w},step={2 + 2 * w},at={at}" for w, at in enumerate(SHARED))
    flags = ["--workers", "6", "--snapshot", "neighbour", "--checkpoint-every", "12"]
    done = run(forkserver, out := tmp_path / "run", *flags, "--inject", kills)
    assert done.output.count("was killed by SIGKILL") == len(SHARED)
    assert [event["remedy"] for event in events(out, "remedy")] == ["shards"] * len(SHARED)
    assert not events(out, "rolled_back")
    assert same_weights(out, calm)
    certificate = json.loads(sorted((out / "certificates").glob("view-*.json"))[-1].read_text())
    assert {len(state["workers"]) for name, state in certificate["states"].items() if "/" in name} == {2}
    twice = "kill:worker=0,step=7;kill:worker=2,step=7,at=recovery"  # before anybody has what the first one had
    run(forkserver, out := tmp_path / "twice", *flags, "--checkpoint-every", "5", "--inject", twice)
    assert [event["to"] for event in events(out, "rolled_back")] == ["step-00000005"]
    assert same_weights(out, calm)


def test_what_loses_nobody_goes_on_from_where_it_was(forkserver: ForkServer, calm: Path, tmp_path: Path) -> None:
    """A gradient that is no number, and links that break."""
    faults = "nan:worker=1,step=6,at=backward;cut:worker=2,step=8,at=exchange;cut:worker=0,step=12,at=reduce"
    run(forkserver, out := tmp_path / "run", "--workers", "6", "--inject", faults)
    assert len(events(out, "fault")) == 3
    assert not events(out, "rolled_back")
    assert same_weights(out, calm)


def test_checkpoints_are_of_the_same_form(forkserver: ForkServer, calm: Path, tmp_path: Path) -> None:
    """Of three that share, of two, of one that has all, and of three again: files and weights are those of one."""
    out = tmp_path / "run"
    legs = (("6", "3", ""), ("2", "2", ""), ("2", "1", "no"), ("3", "3", ""))
    for number, (workers, replicas, shares) in enumerate(legs):
        flags = ["--workers", workers, "--replicas", replicas, *(["--resume"] if number else [])]
        inject = ["--max-failures", "0", "--inject", f"kill:worker=0,step={4 * number + 5}"] if number < 3 else []
        done = run_command(
            forkserver, tmp_path / "log",
            *recovered.settings(out, *THREE, *flags, "--steps", str(STEPS), "--checkpoint-every", "4", *inject),
            "--no-shard-optimizer" if shares else "--shard-optimizer",
        )  # fmt: skip
        assert done.code == (1 if inject else 0), done.output
        assert number == 0 or f"resuming at step {4 * number}" in done.output
    assert same_weights(out, calm)
    ours, theirs = (path / "checkpoints" / f"step-{STEPS:08}" for path in (out, calm))
    for file in sorted(theirs.glob("*.safetensors")):
        a, b = load_file(file), load_file(ours / file.name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key].view(torch.int32), b[key].view(torch.int32)) for key in a)


def test_without_exact_sums_a_loss_is_that_of_the_run_that_shares_nothing(
    forkserver: ForkServer, tmp_path: Path
) -> None:
    """The new weights then take the place of the gradient; floats of three are summed in the order of who is there."""
    flags = ["--workers", "3", "--replicas", "3", "--microbatches", "6", "--checkpoint-every", "0"]
    kills = ["--inject", "kill:worker=1,step=5,at=backward;kill:worker=2,step=8,at=reduce"]
    recovered.train(forkserver, plain := tmp_path / "plain", *flags, *kills)
    shared = ["--shard-optimizer", "--snapshot", "neighbour"]
    recovered.train(forkserver, out := tmp_path / "shared", *flags, *kills, *shared)
    assert [event["remedy"] for event in events(out, "remedy")] == ["shards", "shards"]
    assert same_weights(out, plain)
