"""Reads what the workers report and turns it into files and lines: the story of a run, as a person reads it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from jobs.config import TrainConfig
from jobs.plan import Plan
from jobs.registry import KINDS
from launch.generate import Continuation, continue_text
from launch.page.files import PAGE
from launch.pictures import Pictures
from launch.progress import Display
from launch.records import check_record
from launch.report import loss_terminal, performance, performance_text
from launch.run_folder import RunFolder, read_jsonl
from launch.signals import skippable
from pipeline.exit_codes import STOPPED
from pipeline.schedule.layout import Layout
from pipeline.wire import WireError
from recovery import keys

_SAID = {
    "detected": "worker {worker} {reason}",
    "remedy": "worker {replacement} takes its place: {remedy}",
    "rejoined": "worker {replacement} is ready and takes the place of worker {worker}: {remedy}",
    "taken_over": "the one before it does its work as well: {remedy}; worker {replacement} is being started",
    "redealt": "its {units} work units go to the others",
    "not_started": "worker {worker} {reason}",
    "joined": "worker {worker} has joined: it is used from the next iteration on",
    "shrunk": "the others take its layers: {remedy}; worker {replacement} joins when it is there",
    "left": "worker {worker} leaves, and the others have what it held",
    "resized": "the run goes on with {workers} worker(s)",
    "too_few": "{workers} worker(s) are left, and {least} are the fewest: the run saves itself and stops",
    "rerouted": "its microbatches take other routes; worker {replacement} is being started",
    "resumed": "going on from step {step} after {seconds[total]:.2f} s",
    "link": "worker {worker} {reason}; nobody is lost: links are built anew",
    "rehearsed": "span {span}, from {start}, was fitted to {tokens:,} tokens in {took:.1f} s: relative error "
    "{error_after:.3f}, from {error_before:.3f}",
    "not_rehearsed": "span {span} was not fitted: {reason}",
    "rolled_back": "back to {to}: {steps_lost} steps are run again",
    "not_finite": "{error}; it is run again",
    "checkpoint_failed": "no checkpoint at step {step}: {error}; training goes on",
    "agent_lost": "agent {agent} {reason}; the cluster is asked for another",
    "agent_came": "agent {agent} has come, on {node}",
    "export_failed": "no model at step {step}: {error}; training goes on",
    "early_stop": "no held-out loss below {best:.4f} in {evaluations} evaluations: the run ends at step {step}",
    "picture_failed": "{path} is not drawn: {error}",
    "unreadable": "something in the store is not of this run, and is left aside: {error}",
}


_TOGETHER = {
    "detected", "remedy", "rejoined", "taken_over", "redealt", "shrunk", "left", "resized", "rerouted", "resumed",
    "rolled_back", "rehearsed", "not_rehearsed",
}  # fmt: skip
"""What is told of one fault, in one line: once the run has gone on, or after this many seconds without that."""
_PATIENCE_S = 2.0
_FEWEST_DRAWN = 10
"""Steps of which a curve still says more than two numbers."""


def _printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _measured(record: dict[str, Any]) -> str:
    """What an evaluation has found, for a person."""
    means = record["means"]
    if "forget_probability" in means:
        forget, keep = means["forget_probability"], means.get("retain_probability", math.nan)
        return f"probability of an answer to forget {forget:.4f}, to keep {keep:.4f}"
    return f"held-out loss {record['loss']:.3f}, perplexity {record['perplexity']:.1f}"


class Story:
    """Reads the workers' records and turns them into files and lines."""

    def __init__(
        self, config: TrainConfig, plan: Plan, folder: RunFolder, display: Display, store: dist.Store | None = None
    ) -> None:
        self._config, self._plan, self._folder, self._display, self._store = config, plan, folder, display, store
        self._pictures = Pictures(config, plan, folder, self.event)
        self._read: dict[int, int] = {}  # worker -> how many of its records
        self._view: int | None = None
        self.step = plan.view.first_step
        self._fault: list[str] = []
        self._since, self._lost_at = 0.0, 0
        self._began = time.monotonic()

    def tick(self, workers: Iterable[int], view: int | None, layout: Layout | None = None) -> None:
        """Handle every record that has come from `workers`, and the last ones of those who were lost since. `view` is
        the one in which a checkpoint may be made true: none while the next is being found out. `layout` is theirs."""
        self._pictures.layout = layout or self._pictures.layout
        assert self._store is not None
        self._view = view
        now = set(workers)
        for worker in sorted(now | set(self._read)):
            number = self._read.get(worker, 0)
            for record in keys.take_records(self._store, worker, number):
                self._take(record, worker, number)
                number += 1
            if worker in now:
                self._read[worker] = number
            else:
                self._read.pop(worker, None)
        if self._fault and time.monotonic() - self._since > _PATIENCE_S:
            self.tell_fault()

    def _take(self, record: dict[str, Any] | WireError, worker: int, number: int) -> None:
        """Handle what stood where a worker reports: it may be none of its records."""
        try:
            if isinstance(record, WireError):
                raise record
            found = check_record(record, self._config.steps)
            if found["kind"] == "ledger":
                assert self._store is not None
                keys.answer_ledger(self._store, worker, number, self._save_ledger(**found))
            else:
                self.handle(found)
        except WireError as error:
            self.event("unreadable", error=f"record {number} of worker {worker}: {error}")

    def _save_ledger(self, step: int, view: int, **_: Any) -> str:
        """Have the ledger on the disk for a checkpoint; why it is not, or why there must be no checkpoint, or ""."""
        if view != self._view:  # others may be about to go back to an older one
            return f"view {view} is over"
        return self._folder.save_ledger(step)

    def event(self, event: str, **fields: Any) -> None:
        """Something happened to the membership: keep it, and say it."""
        fields.setdefault("step", self.step)
        self._folder.event(event, **fields)
        if (line := _SAID.get(event)) is not None:
            told = _printable(line.format(**fields))
            if event not in _TOGETHER:
                self._display.warn(told)
                return
            if not self._fault:
                self._since, self._lost_at = time.monotonic(), fields["step"]
            self._fault.append(told)
            self._display.note(told)

    def tell_fault(self) -> None:
        """One line for all that is known of what has been lost, and what was done."""
        if self._fault:
            told, self._fault = " \u00b7 ".join(self._fault), []
            self._display.warn(f"step {self._lost_at}: {told}")

    def handle(self, record: dict[str, Any]) -> None:
        """Take one record that a worker, or the host of a pool, has made."""
        kind = record.pop("kind")
        if kind == "step":
            self.tell_fault()
            self.step = record["step"]
            self._folder.step(record)
            self._display.step(record)
        elif kind == "timeline":
            step = record.get("step")
            self._pictures.timeline(record["lanes"], step)
            if step is not None:
                self._folder.event("timeline", step=step)
        elif kind == "evaluation":
            self._folder.event("evaluation", **record)
            self._display.say(f"step {record['step']}: {_measured(record)}")
        elif kind == "stopped":
            self._folder.event("stopped", **record)
            self._display.say(f"asked to stop: saved at step {record['step']}; --resume goes on from there", "yellow")
        else:
            if record["event"] == "resumed":
                record["seconds"]["total"] = max(record["seconds"].values())
            if record["event"] == "rolled_back":
                self.step, record["steps_lost"] = record["step"], self.step - record["step"]
            self.event(**record)

    def _sample(self) -> Continuation | None:
        """What the model goes on with. The run is done, and stays so: who does not want to wait goes without."""
        try:
            with skippable():
                return continue_text(self._config.out / "model", None, self._config.sample_tokens, self._config.seed)
        except Exception as error:  # of a model that is exported and whole
            self._display.warn(f"there is no sample: {error}")
        return None

    def close(self, code: int, as_json: bool) -> None:
        """The end: pictures, the loss curve, a sample, and where everything is."""
        if not KINDS[self._config.job].trains:
            self._display.say("what comes before the first step is done" if code != STOPPED else "stopped before it")
            return
        self._pictures.loss()
        path = self._config.out
        self._pictures.sizes(read_jsonl(path / "ledger.jsonl"), read_jsonl(path / "events.jsonl"))
        out, evaluations = self._config.out, self._folder.evaluations
        summary: dict[str, Any] = {
            "exit_code": code, "step": self.step, "seconds": round(time.monotonic() - self._began, 3), "out": str(out),
            "loss": self._folder.metrics[-1]["loss"] if self._folder.metrics else None,
            "held_out_perplexity": evaluations[-1]["perplexity"] if evaluations else None,
            **performance(self._folder.metrics),
        }  # fmt: skip
        sample: Continuation | None = None
        if code != STOPPED:
            summary["model"] = str(out / "model")
            sample = self._sample() if self._config.sample_tokens else None
            if sample is not None:
                summary["sample"] = sample.text
        if as_json:
            self._display.console.file = os.sys.stdout  # type: ignore[attr-defined]
            with suppress(SystemExit):  # rich's, where nobody reads any more: the run has a code of its own
                self._display.console.print_json(json.dumps(summary))
            return
        say = self._display.say
        if (taken := len({line["step"] for line in self._folder.metrics})) >= _FEWEST_DRAWN:
            say(loss_terminal(self._folder.metrics, width=72, height=12))
        elif taken:
            first, last = (self._folder.metrics[at]["loss"] for at in (0, -1))
            say(f"loss {first:.3f} to {last:.3f} in {taken} steps")
        if summary["held_out_perplexity"] is not None:
            say(f"held-out perplexity {summary['held_out_perplexity']:.2f} after {self.step} steps")
        if speed := performance_text(self._folder.metrics):
            say(f"speed     {speed}")
        if sample is not None:
            say(f"sample, after {sample.prompt!r}:\n{_printable(sample.text)}")
        if code != STOPPED:
            say(f"model     {out / 'model'}")
        say(f"report    {out / PAGE}")
        say("pictures  " + "  ".join(str(path) for path in self._pictures.paths))
