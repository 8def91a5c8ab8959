"""Checkpoints of an older generation are taken out of the run's reach: fenced, which can be undone, or shredded.

    RUN/fenced/generation-0/step-00000100/   mode 0, as all that is in it
    RUN/fenced/README.txt

A fenced checkpoint has first left the folder in which a run looks, by one rename, and is closed after. One that is
shredded loses its manifest before its layers, so that what is half gone is never taken for whole. Each is therefore, at
any moment, in the way of a repeat or done with: an interrupted call is finished by the next. Nobody may save meanwhile.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Literal

from recovery.checkpoint import MANIFEST, CheckpointError, read_manifest, source
from recovery.disk import flush_folder, write_flushed

FENCED = "fenced"
"""The folder, in a run folder, of what is fenced."""

KEPT_ELSEWHERE = (
    "Every file was overwritten once with zeros and removed. File systems that copy on write, SSDs, snapshots and "
    "backups may still hold what was there; they keep what they keep."
)
"""What is to be said to whoever asked for something to be shredded."""

_README = """\
What is here, and why it cannot be read
=======================================

The run in the folder above has been asked to forget some of its data. The checkpoints
here were saved before that, by a model which still knew what has been forgotten since.
They are kept so that nothing is lost by mistake, and they are closed, so that nothing
of them comes back by mistake. The run never looks here.

generation-G holds the checkpoints that were saved when G requests to forget had been
carried out; generation-unknown those that did not say.

To be rid of them:       chmod -R u+rwX fenced && rm -r fenced
To look into them again: chmod -R u+rwX fenced

A model made from them knows what was forgotten: the audit of the run will say so.
"""
_PIECE = 1 << 22
_CHECKPOINTS = "checkpoints"


class FencingError(RuntimeError):
    """Something that cannot be fenced or shredded. Names the path, what was found and what is allowed."""


def retire(
    run: Path, generation: int, how: Literal["fence", "shred"], came_on: Callable[[], None] = lambda: None
) -> list[Path]:
    """Fence or shred every checkpoint of a run that is older than `generation`, or does not say of which it is: also
    those set aside and those unfinished. Returns where they lie now, or lay; none the second time.

    What is shredded is overwritten once with zeros, flushed and removed: that is no promise about file systems that
    copy on write, SSDs, snapshots and backups, see KEPT_ELSEWHERE. `came_on` is called as the work goes on.
    Raises FencingError, before anything is touched where a checkpoint is a link.
    """
    old = [(path, said) for path, said in _generations(run / _CHECKPOINTS) if said is None or said < generation]
    for path, _ in old:
        _refuse_link(path)
    if how == "fence":
        return _fence(run / FENCED, old, came_on)
    for path, _ in old:
        shred_folder(path, came_on)
    return [path for path, _ in old]


def shred_folder(path: Path, came_on: Callable[[], None] = lambda: None) -> None:
    """Overwrite every file under `path` once with zeros, flush it and remove it, and the folder last. Nothing is there
    to be done where it does not exist; a repeat goes on where it was interrupted.

    Links are removed and not followed. A file that has other names on the disk loses this one and is overwritten with
    its last: else what lies outside would be destroyed. File systems that copy on write, SSDs, snapshots and backups
    keep what they keep. Raises FencingError.
    """
    _refuse_link(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise FencingError(f"{path} is no folder; allowed: a folder, all of which is shredded")
    with _told(path, "shredded"):
        _shred(path, came_on)
        flush_folder(path.parent)


def _generations(root: Path) -> Iterator[tuple[Path, int | None]]:
    """The checkpoints under `root`, and of which generation they say they are; None where that cannot be read."""
    for path in sorted(root.glob("step-*")):
        if path.is_dir():
            try:
                yield path, source(path, read_manifest(path)).generation
            except (CheckpointError, TypeError, ValueError):
                yield path, None


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise FencingError(
            f"{path} is a link to {os.readlink(path)}; allowed: a folder of the run's own. Remove the link, or move "
            "what it leads to here"
        )


@contextmanager
def _told(path: Path, how: str) -> Iterator[None]:
    """Raise FencingError for what the operating system says inside."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise FencingError(f"{path} cannot be {how}: {error.strerror} ({where}). Ask again to go on") from error


# ---- fence ----


def _fence(fenced: Path, old: list[tuple[Path, int | None]], came_on: Callable[[], None]) -> list[Path]:
    if not old and not fenced.is_dir():
        return []
    done: list[Path] = []
    with _told(fenced, "written"):
        fenced.mkdir(exist_ok=True)
        if not (fenced / "README.txt").exists():
            write_flushed(fenced / "README.txt", _README.encode())
    for path, said in old:
        with _told(path, "fenced"):
            folder = fenced / f"generation-{'unknown' if said is None else said}"
            folder.mkdir(exist_ok=True)
            os.rename(path, _free(folder / path.name))
            for changed in (folder, fenced, path.parent):
                flush_folder(changed)
    for path in sorted(fenced.glob("generation-*/*")):  # with those that an interrupted call has left open
        with _told(path, "closed"):
            if stat.S_IMODE(path.lstat().st_mode) != 0 and not path.is_symlink():
                _close(path, came_on)
                done.append(path)
    return done


def _free(path: Path) -> Path:
    """`path`, or where something has that name already, another one beside it."""
    names = (path if number == 1 else path.with_name(f"{path.name}.{number}") for number in count(1))
    return next(name for name in names if not os.path.lexists(name))


def _close(path: Path, came_on: Callable[[], None]) -> None:
    """Mode 0 for all that is in a folder, and for itself last: until then it is seen to be open."""
    for folder, folders, files in os.walk(path, topdown=False):
        for name in (*files, *folders):
            if not os.path.islink(inner := os.path.join(folder, name)):
                os.chmod(inner, 0)
        came_on()
    os.chmod(path, 0)


# ---- shred ----


def _shred(folder: Path, came_on: Callable[[], None]) -> None:
    os.chmod(folder, 0o700)  # it may have been fenced
    with os.scandir(folder) as entries:
        found = sorted((entry.name != MANIFEST, entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    for _, name, is_folder in found:
        if is_folder:
            _shred(folder / name, came_on)
        else:
            shred_file(folder / name, came_on)
    os.rmdir(folder)


def shred_file(path: Path, came_on: Callable[[], None] = lambda: None) -> None:
    """Overwrite a file with zeros, unless others share its bytes, and remove it. Raises OSError."""
    status = path.lstat()
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        os.chmod(path, 0o600)
        zeros, left = memoryview(bytes(min(_PIECE, status.st_size))), status.st_size
        with path.open("r+b", buffering=0) as file:
            while left:
                left -= file.write(zeros[:left])
                came_on()
            os.fsync(file.fileno())
    os.unlink(path)
