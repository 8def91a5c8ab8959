"""The token of a run: who does not know it cannot speak to its store, and so to none of its processes.

It is in a file of --token-file, in UNBROKEN_TOKEN, or made anew; then it lies in the run folder if other machines, or
other slots of torchrun, have to read it there. It never is on a command line, in a record or in a log.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from jobs.config import ConfigError, TrainConfig
from pipeline.store.handshake import LEAST_BYTES

VARIABLE = "UNBROKEN_TOKEN"
_FILE = "token"
_POLL_S = 0.05


def find_token(
    config: TrainConfig, rank: int, agents: int, timeout_s: float = 60.0, environment: Mapping[str, str] = os.environ
) -> bytes:
    """The token of this agent's run: agent 0 makes one where none is given, the others wait for its file. Raises
    ConfigError for one that others can read, or that is too short, and where none comes."""
    path = config.out / _FILE
    if config.token_file is not None:
        return read_token(config.token_file, "token_file")
    if given := environment.get(VARIABLE):
        return _long_enough(given.strip().encode(), VARIABLE, "what it holds")
    if rank == 0:
        return read_token(path, _FILE) if agents > 1 and path.exists() else secrets.token_hex(LEAST_BYTES).encode()
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"there is no {str(path)!r}, for {timeout_s:.0f} s; allowed: an --out that all machines of the run "
                f"see, where the first writes its token, or --token-file or {VARIABLE} on each"
            )
        time.sleep(_POLL_S)
    return read_token(path, _FILE)


def read_token(path: Path, name: str) -> bytes:
    """The token in a file that is ours alone. Raises ConfigError, which calls it `name`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise ConfigError(
                    f"{name} is {str(path)!r}, of user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}; "
                    f"allowed: a file of user {os.getuid()} with mode 0600, which nobody else can read"
                )
            return _long_enough(file.read(4096).strip(), name, f"what {str(path)!r} holds")
    except OSError as error:
        raise ConfigError(f"{name} is {str(path)!r}, which cannot be read: {error.strerror}") from error


def _long_enough(token: bytes, name: str, what: str) -> bytes:
    if len(token) < LEAST_BYTES:
        raise ConfigError(
            f"{name}: {what} is a token of {len(token)} bytes; allowed: {LEAST_BYTES} or more, such as those of "
            "`openssl rand -hex 32`"
        )
    return token


def leave_token(config: TrainConfig, token: bytes, agents: int, placed: bool = False) -> None:
    """Have it in the run folder, whole and ours alone, where other agents look for it there; `placed` by a cluster,
    they have no environment of their own. Raises ConfigError."""
    path = config.out / _FILE
    if agents == 1 or config.token_file is not None or (os.environ.get(VARIABLE) and not placed):
        return
    if path.exists() and read_token(path, _FILE) == token:
        return
    temporary = path.with_name(f".{_FILE}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(token + b"\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"out is {str(config.out)!r}, where the run's token cannot be written: {error}") from error
