"""What activations go through is a setting: shared memory can be demanded, and no bit depends on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from jobs.config import ConfigError, TrainConfig
from launch import machine
from launch.config import config_from_toml
from launch.forkserver import ForkServer
from pipeline.runtime import groups
from tests import harness
from tests.harness import Started, run_workers
from tests.test_parity import MODELS, check, reference
from tests.test_parity import settings as training
from tests.test_recovery import events, metrics, same_weights, settings, train, whole_ledger


def test_a_file_of_an_older_version_says_sockets(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('links = "sockets"\n')
    assert config_from_toml(file, TrainConfig).links == "gloo"
    file.write_text('links = "pipes"\n')
    with pytest.raises(ConfigError, match=r"^links is 'pipes'; allowed: 'auto' or 'shm' or 'gloo'"):
        config_from_toml(file, TrainConfig)


def test_memory_that_no_process_can_share_is_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    machine.check_links(TrainConfig(links="shm"))
    monkeypatch.setattr(machine, "machine", lambda: "")
    for links in ("auto", "gloo"):
        machine.check_links(TrainConfig(links=links))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^links is 'shm'; allowed: auto or gloo, as this system has no memfd"):
        machine.check_links(TrainConfig(links="shm"))


def apart(payload: dict[str, Any]) -> int:
    """A command whose workers are all on machines of their own, as far as they can tell."""
    groups.machine = lambda: f"machine of {os.getpid()}"
    return harness._command(payload["argv"], Path(payload["log"]))


def test_workers_on_two_machines_are_refused_before_anything_is_lost(forkserver: ForkServer, tmp_path: Path) -> None:
    """A run that is resumed so keeps what it has, and goes on from there when it is asked for something else."""
    flags = ["--workers", "2"]
    train(forkserver, out := tmp_path / "run", *flags, "--until", "5")
    saved = sorted(path.name for path in (out / "checkpoints").iterdir())
    argv = settings(out, *flags, "--resume", "--links", "shm")
    with Started(forkserver, tmp_path / "apart.log", call="tests.test_links:apart", argv=argv) as started:
        done = started.wait()
    assert done.code == 1, done.output
    told = "links is 'shm', which workers 0 and 1 cannot have: they are not on one machine; allowed here: auto, gloo"
    assert told in " ".join(done.output.replace("│", " ").split()), done.output
    assert "Traceback" not in done.output
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == saved
    assert len(metrics(out)) == 5
    train(forkserver, out, *flags, "--resume", "--links", "gloo")
    whole_ledger(out)


def test_a_run_over_sockets_is_that_of_plain_torch(forkserver: ForkServer, tmp_path: Path) -> None:
    """All others run over shared memory; `make links` has all of them run over each."""
    config = training(scheduler="zero_bubble", workers=4, links="gloo")
    check(run_workers(forkserver, config, MODELS["llama"], tmp_path), reference("llama"))


def test_a_run_that_loses_workers_over_sockets_is_bitwise_the_calm_one_over_shared_memory(
    forkserver: ForkServer, tmp_path: Path
) -> None:
    flags = ["--workers", "4", "--replicas", "2"]
    train(forkserver, calm := tmp_path / "calm", *flags, "--links", "shm")
    kills = "kill:worker=0,step=3,at=forward;kill:worker=3,step=6,at=backward;kill:worker=1,step=9,at=commit"
    train(forkserver, out := tmp_path / "run", *flags, "--links", "gloo", "--inject", kills)
    assert len(events(out, "remedy")) == 3
    whole_ledger(out)
    assert same_weights(out, calm)
