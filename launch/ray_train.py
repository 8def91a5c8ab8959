"""Unbroken in a script of Ray Train's: `ray_train(ScalingConfig(...), ...)` beside `TorchTrainer(...).fit()`.

    from ray.train import ScalingConfig
    result = ray_train(ScalingConfig(num_workers=(2, 4)), out="/shared/run", model="llama-2m", data="stdlib", steps=240)
    result.metrics["loss"], result.checkpoint, result.model

The run is a process of its own, as `unbroken train --cluster ray` is, so that the threads of the script and of Ray are
not where workers are forked, and the script can be anything: a job, a notebook, a task.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
import tomli_w

from jobs.cluster import RAY
from jobs.config import ConfigError, TrainConfig
from launch.agent import RunFailed
from launch.agent_process import run_process
from launch.config import config_from_dict, to_toml
from launch.run_folder import read_jsonl, standing
from launch.signals import stop_signals
from pipeline.exit_codes import STOPPED
from recovery import checkpoint


@dataclass(frozen=True)
class RayResult:
    """What a run has come to. `metrics` are those of its last step, with `held_out_loss` and `perplexity` where it has
    been evaluated; `checkpoint` is its newest valid one, and `model` the exported one, None before the end."""

    metrics: Mapping[str, Any]
    checkpoint: Path | None
    model: Path | None
    path: Path
    stopped: bool
    """Whether it was asked to stop, or had too few workers, and has saved itself: call again with resume=True."""


def ray_train(scaling: Any, out: str | Path, **settings: Any) -> RayResult:
    """Train with `settings` of `unbroken train` (names as in its config.toml) on the agents of a Ray cluster: the one
    that this process is connected to, else the one that `--cluster ray` finds.

    `scaling` is a ray.train.ScalingConfig, of which num_workers, use_gpu and the CPUs of resources_per_worker are read,
    or workers: MAX, or (MIN, MAX). A number is at most so many, and one at least: lost nodes make the run smaller.

    Raises ConfigError for settings that cannot be used, before anything is started, and RunFailed.
    """
    values = {"cluster": RAY, **settings, **_scaled(scaling), "out": Path(out).absolute()}
    config = config_from_dict(TrainConfig, values)
    if not config.resume:
        config.validate()
    text = to_toml(config) if not config.resume else _given(values)

    children: list[Popen[str]] = []

    def stop(number: int) -> None:
        for child in children:
            child.send_signal(number)

    main = threading.current_thread() is threading.main_thread()  # no other gets signals
    with stop_signals(stop) if main else nullcontext():
        code, said = run_process(text, _address(), os.getcwd(), started=children.append)
    if code not in (0, STOPPED):
        raise RunFailed(said.strip() or f"the run has ended with exit code {code}", code)
    return result(config.out, stopped=code == STOPPED)


def result(out: Path, *, stopped: bool = False) -> RayResult:
    """What a run folder says of its run."""
    steps, events = standing(read_jsonl(out / "metrics.jsonl", step=int)), read_jsonl(out / "events.jsonl", event=str)
    metrics = dict(steps[-1]) if steps else {}
    if evaluations := [event for event in events if event["event"] == "evaluation"]:
        metrics |= {"held_out_loss": evaluations[-1]["loss"], "perplexity": evaluations[-1]["perplexity"]}
    model = out / "model"
    found = checkpoint.find(out / "checkpoints").path
    return RayResult(metrics, found, model if not stopped and model.is_dir() else None, out, stopped)


def _given(values: Mapping[str, Any]) -> str:
    """What was given, as TOML: the others are those that the run has kept."""
    return tomli_w.dumps({key: str(value) if isinstance(value, Path) else value for key, value in values.items()})


def _scaled(scaling: Any) -> dict[str, Any]:
    """The settings that a ScalingConfig, or a number of workers, or two, come to. Raises ConfigError."""
    wanted = getattr(scaling, "num_workers", scaling)
    least, most = wanted if isinstance(wanted, tuple) and len(wanted) == 2 else (1, wanted)
    if not (isinstance(least, int) and isinstance(most, int) and 0 < least <= most):
        raise ConfigError(f"num_workers is {wanted!r}; allowed: a whole number, or (MIN, MAX)")
    found: dict[str, Any] = {"min_workers": least, "workers": most}
    if getattr(scaling, "use_gpu", False):
        found["device"] = "cuda"
    if cpus := (getattr(scaling, "resources_per_worker", None) or {}).get("CPU"):
        found["agent_cpus"] = float(cpus)
    return found


def _address() -> dict[str, str]:
    """Where the cluster is that this process is connected to, if it is."""
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if ray.is_initialized() else {}
