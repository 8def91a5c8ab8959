"""A lock that is a file: held by one process at a time, gone with it, and never by two, though the file comes and goes.

Who opens the file may get one that its holder is about to remove; a lock on that one locks nobody out. So the lock is
held only if the name still leads to the file that was locked.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def lock(path: Path, mode: int = 0o644) -> int:
    """The descriptor of `path`, made if it is not there and locked for this process alone until it is closed.

    Raises BlockingIOError where another process holds it, OSError where it cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, mode)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _leads_to(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def holder(path: Path) -> int | None:
    """The process that holds the lock on `path`, as this machine knows it; None where nobody does. It takes no lock, by
    which it could keep somebody from taking one."""
    try:
        inode = path.stat().st_ino
        held = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for words in map(str.split, held):  # 1: FLOCK ADVISORY WRITE pid major:minor:inode 0 EOF
        if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
            return int(words[4])
    return None


def unlock(path: Path, descriptor: int) -> None:
    """Remove the file and let go of it: in this order, so that whoever comes next makes a new one."""
    if _leads_to(path, descriptor):
        path.unlink(missing_ok=True)
    os.close(descriptor)


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        named, held = path.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)
