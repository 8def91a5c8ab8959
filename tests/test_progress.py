"""What is told before the first step: one line for each thing, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from launch.progress import Display


@pytest.mark.parametrize("terminal", [True, False])
def test_what_was_done_at_once_is_one_line_and_what_took_time_is_progress(terminal: bool) -> None:
    out = io.StringIO()
    with Display(5, console=Console(file=out, force_terminal=terminal, width=120)) as display:
        for share in (0.0, 0.5, 1.0, 1.0):
            display.preparing("tokenising", share)
        for _ in range(2):
            display.preparing("tokens taken from the cache", 1.0)
    lines = [line.strip() for line in re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", out.getvalue()).splitlines()]
    assert lines.count("tokens taken from the cache") == 1
    if terminal:
        assert "100/100" in next(line for line in reversed(lines) if "tokenising" in line)
        assert not [line for line in lines if "cache" in line and "/100" in line]
    else:
        assert lines == ["tokenising: done", "tokens taken from the cache"]


@pytest.mark.parametrize(
    ("known", "shown"),
    [
        ({}, "7 tokens/s"), ({"tflops": 0.0312}, "7 tokens/s  0.0312 TFLOP/s"),
        ({"tflops": 3.0, "mfu": 0.415}, "7 tokens/s  MFU 41.5 %"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("terminal", [True, False])
def test_a_step_says_its_mfu_or_what_is_known_of_it(known: dict[str, float], shown: str, terminal: bool) -> None:
    out = io.StringIO()
    with Display(5, console=Console(file=out, force_terminal=terminal, width=150)) as display:
        display.step({"step": 5, "loss": 1.0, "tokens_per_s": 7.0, "grad_norm": 1.0, "lr": 1.0, **known})
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", out.getvalue())
    assert shown in text
    assert ("MFU" in text, "TFLOP" in text) == ("mfu" in known, known.keys() == {"tflops"})


class Closed(io.StringIO):
    """A terminal that was closed."""

    closed_now, refused = False, 0

    def write(self, text: str) -> int:
        if self.closed_now:
            self.refused += 1
            raise OSError(5, "Input/output error")
        return super().write(text)

    def flush(self) -> None:
        self.write("")


def test_a_terminal_that_is_closed_ends_nothing() -> None:
    out = Closed()
    record = {"step": 1, "loss": 1.0, "tokens_per_s": 1.0, "grad_norm": 1.0, "lr": 1.0}
    with Display(5, console=Console(file=out, force_terminal=True)) as display:
        display.step(record)
        out.closed_now = True
        display.preparing("tokenising", 0.5)
        display.step({**record, "step": 2})
        display.say("a line")
    assert out.refused > 2


def test_nothing_is_told_when_an_object_is_to_be_printed() -> None:
    out = io.StringIO()
    with Display(5, quiet=True, console=Console(file=out, force_terminal=True)) as display:
        display.preparing("tokens taken from the cache", 1.0)
        display.preparing("tokenising", 0.5)
    assert out.getvalue() == ""


def test_a_resumed_run_counts_its_own_steps_for_the_time_that_is_left() -> None:
    record = {"step": 101, "loss": 1.0, "tokens_per_s": 1.0, "grad_norm": 1.0, "lr": 1.0}
    out = io.StringIO()
    with Display(200, console=Console(file=out, force_terminal=True, width=120)) as display:
        display.step(record)
        (task,) = display._bar.tasks
        assert (task.completed, task.speed) == (101, None)
        display.note("worker 1 was killed by SIGKILL")
    assert "ETA" in out.getvalue()
    assert "worker 1 was killed by SIGKILL" in out.getvalue()
