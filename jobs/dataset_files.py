"""The files of a dataset in its folder, and how they come there whole: a folder counts while it has a meta.json, which
goes first and comes last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jobs.data import META
from recovery.disk import flush_folder, write_flushed

ERASING = "meta.json.erasing"
"""What meta.json is called while something is being erased: the dataset does not count then."""


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, which end in a newline each; on the disk before this returns."""
    with path.open("wb") as file:
        file.writelines(line.encode() for line in lines)
        file.flush()
        os.fsync(file.fileno())


def publish(unfinished: Mapping[str, Path], folder: Path, meta: Mapping[str, Any]) -> None:
    """Put files under their names into a dataset's folder, in place of what is there."""
    for name in (META, ERASING):
        (folder / name).unlink(missing_ok=True)
    for name, path in unfinished.items():
        os.replace(path, folder / name)
    write_meta(folder, meta)


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Have a folder count, as that of a dataset with this meta.json."""
    flush_folder(folder)  # first what it tells of
    write_flushed(folder / META, (json.dumps(meta, indent=1) + "\n").encode())


def blank(path: Path, spans: Iterable[tuple[int, int]], meta: Mapping[str, Any]) -> None:
    """Overwrite spans of tokens [start, end) with end tokens where they lie; on the disk before this returns."""
    with path.open("r+b") as file:
        for start, end in spans:
            ends = np.full(max(0, end - start), meta["end_token"], meta["dtype"])
            file.seek(start * ends.itemsize)
            file.write(ends.tobytes())
        file.flush()
        os.fsync(file.fileno())
