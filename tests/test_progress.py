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


def test_nothing_is_told_when_an_object_is_to_be_printed() -> None:
    out = io.StringIO()
    with Display(5, quiet=True, console=Console(file=out, force_terminal=True)) as display:
        display.preparing("tokens taken from the cache", 1.0)
        display.preparing("tokenising", 0.5)
    assert out.getvalue() == ""
