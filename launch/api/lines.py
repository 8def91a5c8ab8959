"""The lines of a JSONL file as they come, while another process appends to it or writes it anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.run_folder import lines_after

Identity = tuple[int, int]
"""Device and inode of a file: another one once it was written anew."""


def identity(path: Path) -> Identity | None:
    """That of a file; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class Lines:
    """Reads on from where it was. What had the identity `before`, a run's that is over, is not read, but what takes its
    place; or, with `at`, what comes after so many bytes of it."""

    def __init__(self, path: Path, before: Identity | None = None, at: int = 0) -> None:
        self._path, self._before, self._at = path, before, at

    def take(self) -> list[dict[str, Any]]:
        """The lines that have come whole since. A damaged one is left out."""
        if (now := identity(self._path)) is None or now == self._before:
            return []
        try:
            with self._path.open("rb") as file:
                found, self._at = lines_after(file, self._at, self._path.name)
        except OSError:
            return []
        return found
