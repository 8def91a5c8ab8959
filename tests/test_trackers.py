"""Trackers: what they are told, what their failure costs, what a missing package says, and the real ones offline."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.config import ConfigError, TrainConfig
from launch import trackers
from launch.goodput import Goodput
from launch.page.files import RunFiles
from launch.page.goodput import RunClock, goodput
from launch.run_folder import RunFolder
from launch.trackers import Trackers, require_trackers

STEP = {
    "step": 1, "loss": 2.0, "tokens": 100, "tokens_per_s": 50.0, "grad_norm": 1.0, "lr": 0.1, "view": 1, "mfu": 0.4,
    "first_sample": 0, "samples": 4,
}  # fmt: skip


class Recording:
    """Keeps what it is told; raises in the call whose number is `fails`."""

    def __init__(self, fails: int = 0) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.fails = fails

    def _tell(self, *what: Any) -> None:
        self.told.append(what)
        if len(self.told) == self.fails:
            raise OSError("the server is gone\nand more")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._tell("log", step, dict(values))

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        self._tell("event", step, name)

    def close(self) -> None:
        self._tell("close")


def tracked(out: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], **kinds: Any) -> RunFolder:
    """A run folder with trackers under the names of real ones."""
    for name, each in kinds.items():
        monkeypatch.setitem(trackers.KINDS, name, lambda out, settings, each=each: each)
    config = TrainConfig(track=",".join(kinds), out=out)
    return RunFolder(out, "", 0, Trackers(config, {}, said.append), said.append)


def tell(folder: RunFolder) -> None:
    folder.event("started", step=0)
    folder.step(dict(STEP))
    folder.event("resumed", step=1, seconds={"total": 0.5})
    folder.step({**STEP, "view": 2})  # again
    folder.event("evaluation", step=1, loss=1.5, perplexity=4.5)
    folder.close()


def test_a_tracker_is_told_of_steps_evaluations_events_and_what_faults_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    tell(tracked(tmp_path, monkeypatch, said, wandb=(each := Recording())))
    assert said == []
    assert [what[:1] if what[0] != "event" else what for what in each.told] == [
        ("event", 0, "started"), ("log",), ("event", 1, "resumed"), ("log",), ("log",), ("close",),
    ]  # fmt: skip
    first, again = each.told[1][2], each.told[3][2]
    assert first.items() >= {"loss": 2.0, "mfu": 0.4, "lr": 0.1, "lost_steps": 0.0, "recovery_s": 0.0}.items()
    assert again.items() >= {"lost_steps": 1.0, "recovery_s": 0.5}.items()
    assert 0 <= again["goodput"] <= first["goodput"] <= 1
    assert each.told[4][2] == {"held_out_loss": 1.5, "held_out_perplexity": 4.5}


def test_a_tracker_that_fails_costs_a_warning_and_its_own_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    bad, good = Recording(fails=2), Recording()
    folder = tracked(tmp_path, monkeypatch, said, wandb=bad, mlflow=good)
    tell(folder)
    assert said == ["tracker wandb fails: the server is gone; training goes on without it"]
    assert (len(bad.told), len(good.told)) == (2, 6)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_goodput_is_the_share_of_time_of_steps_that_stand() -> None:
    clock = SimpleNamespace(now=10.0)
    found = Goodput(lambda: clock.now)
    assert found.values() == {"goodput": 0.0, "lost_steps": 0.0, "recovery_s": 0.0}
    steps = ((14.0, 1, 2), (16.0, 2, 2), (18.0, 3, 2), (22.0, 2, 3), (25.0, 3, 2))  # two are undone
    for clock.now, step, seconds in steps:
        found.step({"step": step, "tokens": 100, "tokens_per_s": 100 / seconds})
    found.event("resumed", {"seconds": {"rendezvous": 0.3, "total": 0.7}})
    found.event("checkpoint", {})
    assert found.values() == {"goodput": pytest.approx((2 + 3 + 2) / 15), "lost_steps": 2.0, "recovery_s": 0.7}
    metrics = [{"step": step, "tokens": 100, "tokens_per_s": 100 / seconds} for _, step, seconds in steps]
    ledger = [{"step": step, "time": time} for time, step, _ in steps]
    events = [{"event": "started", "time": 10.0, "step": 0}]
    run = RunFiles(Path("run"), metrics, events, ledger, {}, running=True)
    assert goodput(run, RunClock.of(run), ()).share == pytest.approx(found.values()["goodput"]), "as the report has it"


def test_a_package_that_is_missing_or_unknown_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else name)
    require_trackers(TrainConfig(track="tensorboard", tensorboard=True))
    with pytest.raises(ConfigError, match=r"^track has 'wandb', whose package is missing; pip install 'unbroken\[wand"):
        require_trackers(TrainConfig(track="tensorboard,wandb"))
    with pytest.raises(ConfigError, match=r"^track is 'wandbb'; allowed: one of .*\(did you mean wandb\?\)"):
        TrainConfig(track="wandbb").validate()
    assert TrainConfig(track="mlflow, tensorboard", tensorboard=True).trackers == ("mlflow", "tensorboard")


# ---- the real packages, offline ----


def real(out: Path, name: str) -> None:
    said: list[str] = []
    config = TrainConfig(track=name, out=out)
    tell(RunFolder(out, "", 0, Trackers(config, {"lr": 0.1}, said.append), said.append))
    assert said == []


def test_wandb_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    real(tmp_path, "wandb")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"held_out_loss" in file.read_bytes()


def test_mlflow_keeps_a_run_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    real(tmp_path, "mlflow")
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        found = set(base.execute("select key, value from metrics"))
    assert ("loss", 2.0) in found
    assert ("held_out_loss", 1.5) in found
