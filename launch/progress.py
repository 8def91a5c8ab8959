"""What a person sees while a run works: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_EVERY_S = 5.0
_SPEED_OVER_S = 300.0
"""Over which the time that is left is reckoned: a step may take a minute."""
_TOLD = object()


def _gone() -> suppress:
    """The terminal may be closed, or its reader gone, at any time: what is shown is nobody's loss."""
    return suppress(SystemExit, OSError)


def reached(record: Mapping[str, Any]) -> str:
    """The MFU of a step, where it is known, else its model TFLOP/s, if these are."""
    if "mfu" in record:
        return f"  MFU {100 * record['mfu']:.1f} %"
    return f"  {record['tflops']:.3g} TFLOP/s" if "tflops" in record else ""


class Display:
    """Progress of preparation and of training. With `quiet` nothing is shown at all (--json)."""

    def __init__(self, total_steps: int, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=quiet)
        self._quiet = quiet
        self._total = total_steps
        self._live = self.console.is_terminal and not quiet
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn())
        columns += (TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.console, disable=not self._live,
                             speed_estimate_period=_SPEED_OVER_S)  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._said = 0.0

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with _gone():
            self._bar.stop()

    def say(self, text: str, style: str | None = None) -> None:
        """One line above the bar."""
        if not self._quiet:
            with _gone():
                self._bar.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line about something that is not as it should be."""
        self.say(text, "yellow")

    def note(self, text: str) -> None:
        """What is happening now, beside the bar until the next step."""
        if "training" in self._tasks:
            with _gone():
                self._bar.update(self._tasks["training"], note=text)

    def preparing(self, what: str, share: float) -> None:
        """Progress of the work before the first step; what is done when it is first heard of is told in one line."""
        if what not in self._tasks and share >= 1.0:
            self._tasks[what] = _TOLD
            self.say(what)
        elif self._live:
            with _gone():
                if what not in self._tasks:
                    self._tasks[what] = self._bar.add_task(what, total=100, note="")
                if (task := self._tasks[what]) is not _TOLD:
                    self._bar.update(task, completed=round(100 * share))
        elif share < 1.0:
            self._tasks.setdefault(what, None)
        elif self._tasks[what] is not _TOLD:
            self._tasks[what] = _TOLD
            self.say(f"{what}: done")

    def step(self, record: dict[str, Any]) -> None:
        """A committed step."""
        note = f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tokens/s{reached(record)}"
        more = f"grad_norm {record['grad_norm']:.2f}  lr {record['lr']:.2e}"
        if self._live:
            with _gone():
                if "training" not in self._tasks:
                    self._tasks["training"] = self._bar.add_task(
                        "training", total=self._total, completed=record["step"] - 1, note=""
                    )  # a run that is resumed has not taken the steps before in no time
                self._bar.update(self._tasks["training"], completed=record["step"], note=note)
        elif time.monotonic() - self._said > _PLAIN_EVERY_S or record["step"] == self._total:
            self._said = time.monotonic()
            self.say(f"step {record['step']}/{self._total}  {note}  {more}")
