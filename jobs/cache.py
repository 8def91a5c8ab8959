"""What one run has made of its text, a tokenizer or tokens, is there for the next: a folder of the user's.

It is $UNBROKEN_CACHE (the word off: no cache), else `unbroken` in $XDG_CACHE_HOME or ~/.cache. An entry is one file
whose name tells by hashes what it was made from: a hash of the rest, a line of JSON about it, and the content.
It is written beside its place and moved there, so that it is whole or absent, and two runs may write the same one at
once. What is read is checked and copied: no run folder needs the cache, and none can harm it. Beyond a bound the
entries go that were not used for longest. What goes wrong here costs the cache, never the run, and is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from recovery.fencing import FencingError, shred_file

BOUND_BYTES = 8 << 30
"""What all entries may take together."""

Kind = Literal["tokens", "tokenizer"]
_OURS = re.compile(r"(tokens|tokenizer)-[0-9a-f-]+(\..*\.tmp)?")
_PIECE = 1 << 20
_STALE_S = 3600.0
"""The age at which a file that is being written has been left behind by a run that was killed."""


def user_folder() -> Path | None:
    """Where this user's cache is; None where there is none."""
    own, shared = os.environ.get("UNBROKEN_CACHE", ""), os.environ.get("XDG_CACHE_HOME", "")
    if own == "off":
        return None
    try:
        if own:
            return Path(own).expanduser()
        return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "unbroken"
    except RuntimeError:  # there is no such home
        return None


@dataclass(frozen=True)
class Cache:
    """The entries in `folder`, none without one. `tell` takes a line for whoever watches the run."""

    folder: Path | None = None
    tell: Callable[[str], None] = lambda line: None
    bound_bytes: int = BOUND_BYTES

    def keys(self, kind: Kind, prefix: str) -> list[str]:
        """The keys of a kind that begin with `prefix`."""
        found = [] if self.folder is None else self._files()
        names = [path.name.removeprefix(f"{kind}-") for path in found if path.name.startswith(f"{kind}-{prefix}")]
        return sorted(name for name in names if not name.endswith(".tmp"))

    def take(self, kind: Kind, key: str, into: BinaryIO) -> dict[str, Any] | None:
        """Copy an entry's content; returns what was kept about it. None if there is none that is whole: what `into`
        then holds is worth nothing. Raises OSError for `into` alone."""
        if self.folder is None:
            return None
        path = self.folder / f"{kind}-{key}"
        try:
            file = path.open("rb")
        except OSError:
            return None
        with file:
            said, about = _line(file), _line(file)
            digest = hashlib.blake2b(about)
            while piece := _piece(file):
                digest.update(piece)
                into.write(piece)
        if said != digest.hexdigest().encode() + b"\n":
            self.tell(f"{kind} in the cache damaged and made anew: {path}")
            return None
        with suppress(OSError):
            os.utime(path)  # used now
        self.tell(f"{kind} taken from the cache")
        return json.loads(about)

    def put(self, kind: Kind, key: str, about: dict[str, Any], content: BinaryIO) -> None:
        """Keep what `content` holds from its start, and what is said `about` it."""
        if self.folder is None:
            return
        head, temporary = json.dumps(about).encode() + b"\n", None
        try:
            size = content.seek(0, os.SEEK_END)
            if size > self.bound_bytes:
                raise OSError(0, f"{size:,} bytes; the cache holds {self.bound_bytes:,}")
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f"{kind}-{key}.", suffix=".tmp", dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                file.write(_hash(head, content).encode() + b"\n" + head)
                content.seek(0)
                shutil.copyfileobj(content, file, _PIECE)
            os.replace(temporary, self.folder / f"{kind}-{key}")
            self._evict()
        except OSError as error:
            self.tell(f"{kind} not kept in the cache {str(self.folder)!r}: {error.strerror}")
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def remove(self, kind: Kind, unwanted: Callable[[dict[str, Any], BinaryIO], bool]) -> list[Path]:
        """Overwrite and remove every entry that is `unwanted`, by what is kept about it and its content; also those of
        which that cannot be told. Returns where they were. Raises FencingError where one cannot be removed."""
        removed = list[Path]()
        for path in [] if self.folder is None else sorted(self._files()):
            if not path.name.startswith(f"{kind}-") or path.name.endswith(".tmp"):
                continue
            with suppress(FileNotFoundError):  # another run may be quicker
                with path.open("rb") as file:
                    _line(file)
                    try:
                        drop = unwanted(json.loads(_line(file)), file)
                    except (OSError, ValueError, KeyError, TypeError):
                        drop = True
                if drop:
                    self._shred(path)
                    removed.append(path)
        return removed

    def _shred(self, path: Path) -> None:
        try:
            shred_file(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise FencingError(
                f"{path} in the cache has what is forgotten and cannot be removed: {error.strerror}; remove it, or set "
                "UNBROKEN_CACHE=off to leave the cache as it is"
            ) from error

    def entries(self) -> list[Path]:
        """Where all that is kept lies."""
        return [] if self.folder is None else sorted(path for path in self._files() if not path.name.endswith(".tmp"))

    def _files(self) -> list[Path]:
        """Entries, and what is being written: a folder that somebody names may hold other things as well."""
        assert self.folder is not None
        try:
            return [path for path in self.folder.iterdir() if _OURS.fullmatch(path.name)]
        except OSError:
            return []

    def _evict(self) -> None:
        """Remove what was used longest ago until the rest is within the bound."""
        entries: list[tuple[float, int, Path]] = []
        for path in self._files():
            with suppress(OSError):  # another run may be quicker
                status = path.stat()
                if not path.name.endswith(".tmp"):
                    entries.append((status.st_mtime_ns, status.st_size, path))
                elif time.time() - status.st_mtime > _STALE_S:
                    path.unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.bound_bytes:
                break
            with suppress(OSError):
                path.unlink()
            total -= size


def _hash(head: bytes, content: BinaryIO) -> str:
    digest = hashlib.blake2b(head)
    content.seek(0)
    while piece := content.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _line(file: BinaryIO) -> bytes:
    try:
        return file.readline(_PIECE)
    except OSError:
        return b""


def _piece(file: BinaryIO) -> bytes:
    """More of a file; nothing where a disk fails, which the hash then tells."""
    try:
        return file.read(_PIECE)
    except OSError:
        return b""
