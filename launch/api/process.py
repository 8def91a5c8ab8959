"""A command of ours in a process of its own: a notebook has threads, and the agents of a run fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.agent import RunFailed
from pipeline.exit_codes import STOPPED, USAGE
from pipeline.settings import ConfigError

_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); from launch.api.child import run; sys.exit(run())"
_LAST = 1 << 16
"""Bytes of what a process says of which the last words are taken."""


class Process:
    """The command, from construction on. It does not look where it is run for packages, as `unbroken` does not."""

    def __init__(self, command: str, words: Iterable[str]) -> None:
        self._name, self._asked = f"unbroken {command}", False
        self._said, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (open until it ends)
        theirs, self._lifeline = os.pipe()  # nobody writes to it: that it is closed is what is told
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(_ROOT), command, *words], stdin=theirs, stdout=self._said,
                stderr=self._errors, start_new_session=True,  # what a terminal sends comes by `ask_to_stop` alone
            )  # fmt: skip
        except OSError:
            self._close()
            raise
        finally:
            os.close(theirs)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code once it has ended, or minus the signal that killed it."""
        return self._ended(self._process.poll())

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises TimeoutError after so many seconds."""
        try:
            code = self._ended(self._process.wait(timeout))
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{self._name} (pid {self.pid}) has not ended within {timeout:g} s") from error
        assert code is not None
        return code

    def ask_to_stop(self) -> None:
        """Have it save itself and end. Asked twice, it is told once."""
        if not self._asked and self.poll() is None:
            self._asked = True
            self._process.send_signal(signal.SIGTERM)

    def said(self) -> str:
        """What it has printed."""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")

    def require_done(self) -> int:
        """The exit code of a process that has ended, 0 or STOPPED. Raises ConfigError or RunFailed, with its last
        words, where it is another."""
        code = self.wait(0)
        if code == -signal.SIGTERM and self._asked:  # before it could know what that means
            return STOPPED
        if code in (0, STOPPED):
            return code
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _LAST))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        told = lines[-1].removeprefix(f"{self._name}: ") if lines else "it said nothing"
        if code == USAGE:
            raise ConfigError(told)
        raise RunFailed(told if code > 0 else f"the process was killed by signal {-code}; it said last: {told}", code)

    def _ended(self, code: int | None) -> int | None:
        if code is not None:
            self._close()
        return code

    def _close(self) -> None:
        if self._lifeline >= 0:
            with suppress(OSError):
                os.close(self._lifeline)
            self._lifeline = -1


def flags(values: Mapping[str, Any]) -> list[str]:
    """Settings as the words of a command line."""
    words = list[str]()
    for name, value in values.items():
        flag = name.replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag}={value}")
    return words
