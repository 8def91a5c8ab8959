"""A run as an object: it is started in a process of its own, watched by its files, and ended with the interpreter."""

from __future__ import annotations

import base64
import html
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jobs.config import TrainConfig
from jobs.unlearn.config import UnlearnConfig
from launch.api.lines import Lines, identity
from launch.api.process import Process, flags
from launch.api.result import Result, code_told
from launch.api.signatures import checked, takes
from launch.evaluate import EvalConfig, evaluate
from launch.export import ExportConfig, export
from launch.generate import GenerateConfig, generate
from launch.report import loss_svg
from launch.resume import kept_values
from launch.run_folder import pictured, standing
from launch.run_lock import at_work
from pipeline.exit_codes import STOPPED
from pipeline.settings import ConfigError, check_bounds, require

_LOOK_S = 0.1
"""Seconds between two looks at the files of a run."""
_STOP_S = 600.0
"""Seconds that a run has to save itself before its process is said to hang."""

Told = Callable[[dict[str, Any]], object]
"""Is called with a record (a line of metrics.jsonl) or an event (a line of events.jsonl)."""


@dataclass(frozen=True)
class RunSettings(TrainConfig):
    """The settings of a run, as `unbroken train --help` explains them, and who is told what."""

    on_record: Told | None = None
    """Is called with every committed step, by whoever waits for the run or iterates over it."""
    on_event: Told | None = None
    """Is called in the same way with everything else that happens: evaluations, checkpoints, losses, views."""


class Run:
    """A training run. Keyword arguments are the settings of `unbroken train`, with the same names, defaults and checks.

    `start` returns at once; iteration yields the record of every committed step as it comes and ends with the run.
    Ctrl-C while it is waited for has the run save itself. When this interpreter goes, however it does, the run saves
    itself and ends too. Raises ConfigError for a setting that is none, or that cannot work.
    """

    @takes(RunSettings)
    def __init__(self, *, on_record: Told | None = None, on_event: Told | None = None, **settings: Any) -> None:
        for name in settings:
            require(name != "json", name, settings[name], "only in the command: records are what it prints")
        kept = kept_values(Path(settings.get("out", TrainConfig().out))) if settings.get("resume") is True else {}
        self._settings = settings
        self._hold(checked(TrainConfig, {**kept, **settings}).resolved(), on_record, on_event)
        self.config.validate()

    def _hold(self, config: TrainConfig, on_record: Told | None, on_event: Told | None) -> None:
        self.config = config
        """The settings, those included that follow from others."""
        self._on_record, self._on_event = on_record, on_event
        self._process: Process | None = None
        self._attached = False
        self._records, self._events = list[dict[str, Any]](), list[dict[str, Any]]()
        self._from: int | None = None  # the step after which this start of the run begins, once that is known
        self._new_records, self._new_events = Lines(self.folder / "metrics.jsonl"), Lines(self.folder / "events.jsonl")

    @property
    def folder(self) -> Path:
        """Where all that the run leaves lies."""
        return self.config.out

    # ---- to its end ----

    def start(self) -> Self:
        """Begin, in a process of its own. Raises ConfigError where it has begun already."""
        require(not self._attached and self._process is None, "start", "again",
                f"once; Run(out={str(self.folder)!r}, resume=True) goes on with what has ended")  # fmt: skip
        records, events = self.folder / "metrics.jsonl", self.folder / "events.jsonl"
        past = events.stat().st_size if events.is_file() else 0
        self._new_records, self._new_events = Lines(records, identity(records)), Lines(events, at=past)
        self._process = Process("train", [*flags(self._settings), "--json"])
        return self

    @property
    def running(self) -> bool:
        """Whether it has begun and goes on."""
        if self._process is not None:
            return self._process.poll() is None
        return self._attached and at_work(self.folder) is not None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The record of every step of this start of the run, as a line of metrics.jsonl has it; of a run that goes on,
        as they come. What a rollback has undone comes again, with `again` counted up. Raises as `result` does."""
        self._require_begun()
        at = 0
        try:
            while True:
                goes_on = self.running  # asked before the last look, so that nothing is missed
                self._look()
                while at < len(self._records):
                    at += 1
                    yield self._records[at - 1]
                if not goes_on:
                    break
                time.sleep(_LOOK_S)
        except KeyboardInterrupt:
            self.stop()
            raise
        self.result()

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for its end; on Ctrl-C it saves itself first. Raises TimeoutError after so many seconds, after which it
        goes on, and as `result` does."""
        self._require_begun()
        try:
            self._await(timeout)
        except KeyboardInterrupt:
            self.stop()
            raise
        return self.result()

    def result(self) -> Result:
        """How it has ended, once it has. Raises ConfigError for what it could not be started with, and RunFailed, with
        its last words, where it has failed; TimeoutError while it goes on."""
        self._require_begun()
        if self.running:
            raise TimeoutError(f"the run in {str(self.folder)!r} goes on; wait() waits for its end")
        self._look()
        code = code_told(self.folder, self.events) if self._process is None else self._process.require_done()
        return Result.of(self.folder, code, self.records, self.events)

    def stop(self, timeout: float = _STOP_S) -> Result:
        """Have it save itself and end, and wait for that. Raises TimeoutError after so many seconds, and as `result`
        does."""
        self._require_begun()
        if self._process is not None:
            self._process.ask_to_stop()
        elif (pid := at_work(self.folder)) is not None:
            require(pid > 0, "stop", str(self.folder), "where the run is at work, which this process cannot see")
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGTERM)
        self._await(timeout)
        return self.result()

    def __enter__(self) -> Self:
        return self if self._process is not None or self._attached else self.start()

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.stop()

    def _require_begun(self) -> None:
        require(self._process is not None or self._attached, "run", str(self.folder), "start() before it is waited for")

    def _await(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.running:
            self._look()
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"the run in {str(self.folder)!r} has not ended within {timeout:g} s")
            time.sleep(_LOOK_S)

    # ---- what is seen ----

    def _look(self) -> None:
        """Take what is new in its files, and tell who is to be told."""
        for event in self._new_events.take():
            if "event" in event and "step" in event:
                self._events.append(event)
                self._from = event["step"] if event["event"] == "started" and self._from is None else self._from
                if self._on_event is not None:
                    self._on_event(event)
        if self._from is None:  # what is there was taken over from before
            return
        for record in self._new_records.take():
            if "loss" in record and record.get("step", 0) > self._from:
                self._records.append(record)
                if self._on_record is not None:
                    self._on_record(record)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records that stand, of this start of the run, up to now: one of each step."""
        self._look()
        return standing(self._records)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What has happened beside steps, up to now."""
        self._look()
        return list(self._events)

    def _status(self) -> str:
        found, total = self.records, self.config.last_step
        if self._process is None and not self._attached:
            return "not started"
        at = (
            f"step {found[-1]['step']:,} of {total:,}, loss {found[-1]['loss']:.4g}"
            if found
            else f"0 of {total:,} steps"
        )
        return f"{at}, {'running' if self.running else 'ended'}"

    def __repr__(self) -> str:
        return f"<unbroken.Run {str(self.folder)!r}: {self._status()}>"

    def _repr_html_(self) -> str:
        """For a notebook: the loss up to now, with what was lost on the way."""
        told, records = html.escape(f"{self.folder}: {self._status()}"), self.records
        try:
            drawn = loss_svg(records, pictured(self.events))
        except ValueError:  # there is none yet
            return f"<p>{told}</p>"
        image = base64.b64encode(drawn.encode()).decode()
        return f'<p>{told}</p><img alt="the loss of the run" src="data:image/svg+xml;base64,{image}">'

    # ---- afterwards ----

    @takes(UnlearnConfig)
    def unlearn(self, **settings: Any) -> dict[str, Any]:
        """Have the model forget rows of its data, in a process of its own: `unbroken unlearn`, with the same settings,
        of which `forget` says what and `method` how. Returns what --json prints. Raises ConfigError, and RunFailed."""
        for name in ("run", "json"):
            require(name not in settings, name, settings.get(name), "nothing: it is this run that forgets")
        check_bounds(checked(UnlearnConfig, settings))
        process = Process("unlearn", [*flags({"run": self.folder, **settings}), "--json"])
        try:
            process.wait()
        except KeyboardInterrupt:
            process.ask_to_stop()
            process.wait(_STOP_S)
            raise
        if process.require_done() == STOPPED:
            raise ConfigError(
                "resume is False; allowed: unlearn(resume=True), as the request was stopped, and is saved"
            )
        return json.loads(process.said())

    @takes(EvalConfig)
    def evaluate(self, **settings: Any) -> dict[str, Any]:
        """The loss and the perplexity of the exported model, in this process: `unbroken eval`, on what the run has held
        out unless `data` says otherwise. Raises ConfigError and its like."""
        return evaluate(checked(EvalConfig, {"model": self.folder / "model", **settings, "json": True}))[0]

    def generate(
        self, prompt: str, *, tokens: int = 100, temperature: float = 0.8, seed: int = 0, **settings: Any
    ) -> str:
        """What the exported model goes on with after a prompt, in this process: `unbroken generate`, with all of its
        settings. Raises ConfigError and its like."""
        own = {"prompt": prompt, "tokens": tokens, "temperature": temperature, "seed": seed}
        asked = {"model": self.folder / "model", **settings, **own, "json": True}
        return str(generate(checked(GenerateConfig, asked))[0]["text"])

    def export(self, out: str | Path, step: int | None = None) -> Path:
        """Write the newest checkpoint, or that of a step, as a model directory that transformers loads, whether the run
        has ended or goes on: `unbroken export`. Raises ConfigError, CheckpointError and ModelError."""
        return Path(export(checked(ExportConfig, {"run": self.folder, "step": step, "out": out}))[0]["model"])


def load(folder: str | Path, *, on_record: Told | None = None, on_event: Told | None = None) -> Run:
    """The run whose folder that is: one that has ended, or one that goes on, whoever has started it on this machine. It
    does not end with this interpreter. Raises ConfigError for what is no run folder."""
    out = Path(folder)
    require((out / "config.toml").is_file(), "folder", str(folder), "the folder of a run, which has config.toml in it")
    run = object.__new__(Run)
    run._hold(checked(TrainConfig, {**kept_values(out), "out": out}), on_record, on_event)
    run._attached, run._from = True, 0
    return run
