"""Metrics and events for TensorBoard, Weights & Biases and MLflow, none of which is needed.

A tracker that fails while the run goes on costs its own points and a warning, never the run. What the packages read
from their environment (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI ...) is left to them; where nothing is said of a
server, all is written into the run folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from jobs.config import ConfigError, TrainConfig
from launch.goodput import Goodput

_MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_TOLD = ("tokens", "tokens_per_s", "grad_norm", "lr", "tflops", "mfu")


class Tracker(Protocol):
    """Where points go. Any method may raise whatever its package raises."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers as of a committed step."""
        ...

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        """Something happened: see events.jsonl."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard`."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter(str(out / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        self._writer.add_text(name, json.dumps(fields, default=str), step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases: offline, in `wandb`, unless WANDB_MODE or WANDB_API_KEY says otherwise."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        asked = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        project = os.environ.get("WANDB_PROJECT", "unbroken")
        self._run = import_module("wandb").init(
            project=project, name=out.name, dir=str(out), mode=asked, config=dict(settings)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        self._run.log({f"event/{name}": json.dumps(fields, default=str)}, step=step)

    def close(self) -> None:
        self._run.finish()
        import_module("wandb").teardown()  # the process of its own that it has started


class MLflow:
    """A run of MLflow: in `mlflow.db` of the run folder unless MLFLOW_TRACKING_URI says where."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(out / 'mlflow.db').resolve()}"
        self._client = import_module("mlflow").MlflowClient(tracking_uri=where)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "unbroken")
        found = self._client.get_experiment_by_name(name)
        kept = self._client.create_experiment(name) if found is None else found.experiment_id
        self._run = self._client.create_run(kept, run_name=out.name).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._run, key, str(value)[:500])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        self._client.set_tag(self._run, f"event.{step}.{name}", json.dumps(fields, default=str)[:5000])

    def close(self) -> None:
        self._client.set_terminated(self._run)


KINDS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow,
}  # fmt: skip


def require_trackers(config: TrainConfig) -> None:
    """Raise ConfigError, before anything is started, where a package is missing."""
    for name in config.trackers:
        if find_spec(_MODULES[name]) is None:
            raise ConfigError(f"track has {name!r}, whose package is missing; pip install 'unbroken[{name}]'")


class Trackers:
    """All trackers of a run. Nothing that one of them does ends anything: it is told, and asked no more."""

    def __init__(self, config: TrainConfig, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._say, self._goodput = say, Goodput()
        self._trackers: dict[str, Tracker] = {}
        for name in config.trackers:
            self._asking(name, lambda name=name: self._trackers.update({name: KINDS[name](config.out, settings)}))

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A step was committed."""
        self._goodput.step(metrics)
        values = {name: metrics[name] for name in ("loss", *_TOLD) if name in metrics}
        values |= {name: value for name, value in metrics.items() if name.endswith("_bytes")}
        self._all(lambda each: each.log(metrics["step"], {**values, **self._goodput.values()}))

    def event(self, event: str, fields: Mapping[str, Any]) -> None:
        """Something happened."""
        self._goodput.event(event, fields)
        step = int(fields.get("step", 0))
        if event == "evaluation":
            found = {f"held_out_{name}": float(fields[name]) for name in ("loss", "perplexity") if name in fields}
            self._all(lambda each: each.log(step, found))
        else:
            self._all(lambda each: each.event(step, event, fields))

    def close(self) -> None:
        """The run is over."""
        self._all(lambda each: each.close())
        self._trackers = {}

    def _all(self, what: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._asking(name, lambda tracker=tracker: what(tracker))

    def _asking(self, name: str, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:  # whatever a package raises: it is none of the run's
            self._trackers.pop(name, None)
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._say(f"tracker {name} fails: {told}; training goes on without it")
