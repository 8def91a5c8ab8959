"""Lines that a run leaves behind, one JSON object each. A disk that is full costs time, and never a line or the run.

What cannot be written waits in memory and is tried again with the next line; a line that was written in part goes on
where it broke off, so the file never holds half of one, whatever happens in between.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_MOST = 64 << 20
"""Bytes that wait at most; past that the newest lines are dropped, and counted."""


class Journal:
    """A file of JSON lines that is appended to. `waiting` is why there are lines that are not on the disk, or "".

    A last line that a crash has cut off goes when the file is opened: the next one would be glued to it.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file cannot be opened."""
        self.path, self.waiting, self.dropped = path, "", 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._left = bytearray()
        whole = size = os.fstat(self._file).st_size
        while whole and os.pread(self._file, 1, whole - 1) != b"\n":
            whole -= 1
        if whole < size:
            os.ftruncate(self._file, whole)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line, now or as soon as it can be."""
        data = json.dumps(line).encode() + b"\n"
        if len(self._left) + len(data) > _MOST:
            self.dropped += 1
        else:
            self._left += data
        self.flush()

    def flush(self) -> None:
        """Write what waits, as far as the disk takes it."""
        try:
            while self._left:
                del self._left[: os.write(self._file, self._left)]
            self.waiting = ""
        except OSError as error:
            self.waiting = f"{self.path.name} cannot be written: {error.strerror}"

    def sync(self) -> str:
        """Have all lines on the disk; why they are not, or ""."""
        self.flush()
        if not self.waiting:
            try:
                os.fsync(self._file)
            except OSError as error:
                self.waiting = f"{self.path.name} cannot be written: {error.strerror}"
        if self.dropped:
            return f"{self.path.name} lacks {self.dropped} lines, for which there was no room"
        return self.waiting

    def close(self) -> None:
        """Try once more to write what waits, and close the file."""
        self.flush()
        os.close(self._file)
