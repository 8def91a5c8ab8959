"""`unbroken clean`: what runs that are over have left behind; with --remove it goes. Of a run that lives, nothing.

A run that ends, however it ends, takes along what it can. What a SIGKILL or a power cut leaves is known by its name,
and by a lock that nobody holds any more: host memory of a pool, files that were being written, copies of a replay.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.cache import Cache, user_folder
from jobs.space import in_words
from launch.commands import Result
from launch.run_lock import RunLock
from pipeline.locks import holder, lock, unlock
from pipeline.settings import require
from pipeline.state.host_store import stores

_UNFINISHED = re.compile(r".+\.tmp|\..+\.partial")
_ASIDE = re.compile(r"\.(.+)-old-[^-]+")
_STORE, _WRITTEN, _COPY, _KEPT = "host memory of a run", "was being written", "a copy for a replay", "in the cache"


@dataclass(frozen=True)
class CleanConfig:
    """Show what runs that are over have left behind, and remove it."""

    run: Path | None = None
    """A run folder, in which to look for what was being written when its run was killed; unset: shared memory alone."""
    remove: bool = False
    """Remove what is shown."""
    cache: bool = False
    """Tokens and tokenizers in the user's cache, too: the next run makes them anew."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class Left:
    """Something that may go, and what it is."""

    path: Path
    what: str

    @property
    def num_bytes(self) -> int:
        """What it takes on the disk, or of memory."""
        paths = [self.path, *(self.path.rglob("*") if self.path.is_dir() else ())]
        return sum(path.lstat().st_size for path in paths if path.is_file() or path.is_symlink())

    def remove(self) -> bool:
        """Remove it; whether it is gone. A store that a run has taken meanwhile is its own. Raises OSError."""
        if self.what == _STORE:
            try:
                unlock(self.path, lock(self.path, 0o600))
            except BlockingIOError:
                return False
        elif self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)
        return True


def clean(config: CleanConfig) -> Result:
    """What is left, or was. Raises ConfigError for a run that lives, OSError for what cannot be removed."""
    if config.run is None:
        return _told(config, _taken(_found(config), config.remove))
    require((config.run / "config.toml").is_file(), "run", str(config.run), "the folder of a run, with config.toml")
    claim = RunLock(config.run)  # refused where a run is at work
    try:
        return _told(config, _taken(_found(config), config.remove))
    finally:
        claim.release()


def _found(config: CleanConfig) -> Iterator[Left]:
    roots = [None] if config.run is None else [None, config.run]
    yield from (Left(path, _STORE) for root in roots for path in stores(root) if holder(path) is None)
    if config.run is not None:
        yield from _unfinished(config.run)
    if config.cache:
        yield from (Left(path, _KEPT) for path in Cache(user_folder()).entries())


def _unfinished(run: Path) -> Iterator[Left]:
    """What was being written or moved in a run folder. A model that was set aside is kept where no other has come."""
    yield from (Left(path, _COPY) for path in sorted(run.glob("without-*")) if path.is_dir())
    for folder, names, files in os.walk(run):
        for name in sorted([*names, *files]):
            path, aside = Path(folder) / name, _ASIDE.fullmatch(name)
            if _UNFINISHED.fullmatch(name) or (aside is not None and path.with_name(aside[1]).exists()):
                yield Left(path, _WRITTEN)
                with suppress(ValueError):
                    names.remove(name)  # it goes whole


def _taken(found: Iterable[Left], remove: bool) -> list[tuple[Left, int]]:
    """What is there, with its bytes; it is gone where that is asked for."""
    sized = [(left, left.num_bytes) for left in found]
    return [(left, size) for left, size in sized if not remove or left.remove()]


def _told(config: CleanConfig, found: list[tuple[Left, int]]) -> Result:
    total = sum(size for _, size in found)
    values = {
        "left": [{"path": str(left.path), "what": left.what, "bytes": size} for left, size in found],
        "bytes": total, "removed": config.remove,
    }  # fmt: skip
    lines = [f"{in_words(size):>8}  {left.path}  ({left.what})" for left, size in found]
    end = f"{in_words(total)} {'removed' if config.remove else 'may go: --remove'}" if found else "nothing is left"
    return values, "\n".join([*lines, end])
