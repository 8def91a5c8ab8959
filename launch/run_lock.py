"""A run folder belongs to one run at a time, and a run that is refused leaves the disk as it was."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from pipeline.locks import holder, lock, unlock
from pipeline.settings import ConfigError

_LOCK = ".lock"


def at_work(out: Path) -> int | None:
    """The process of this machine that has the run in `out`; None where nobody works in it."""
    return holder(out / _LOCK)


class RunLock:
    """Holds `out`, which is made if it is not there, from construction to `release`.

    Raises ConfigError where it cannot be made, or where another run works in it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._made = [folder for folder in (out, *out.parents) if not folder.exists()]
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._was_empty = not any(out.iterdir())
            self._lock = lock(out / _LOCK)
        except BlockingIOError as error:
            raise ConfigError(f"out is {str(out)!r}, where another run is at work; allowed: another folder") from error
        except OSError as error:
            self._unmake()
            raise ConfigError(f"out is {str(out)!r}, which cannot be made: {error.strerror}") from error
        with contextlib.suppress(OSError):  # for a person who looks
            os.ftruncate(self._lock, 0)
            os.write(self._lock, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let others have the folder."""
        with contextlib.suppress(OSError):
            unlock(self.out / _LOCK, self._lock)

    def undo(self) -> None:
        """Nothing has come of it: remove what was made, but nothing that was there before."""
        if self._was_empty:
            for path in self.out.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != _LOCK:
                    path.unlink(missing_ok=True)
        self.release()
        self._unmake()

    def _unmake(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()
