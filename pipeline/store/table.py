"""The keys of a store, and what may be done with them: the operations of torch's TCPStore, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

_MOST = 2**63


class Op(IntEnum):
    """What a client asks for. `GET` and `WAIT` are answered once all their keys are there."""

    SET = 1
    GET = 2
    WAIT = 3
    ADD = 4
    COMPARE_SET = 5
    CHECK = 6
    DELETE = 7
    NUM_KEYS = 8
    APPEND = 9


class Answer(IntEnum):
    """How a request has ended."""

    DONE = 1
    LATE = 2
    """A key did not come in time; the fields name those that are missing."""
    WRONG = 3
    """It cannot be done; the field says why."""


class Wrong(ValueError):
    """A request that cannot be done: says why."""


class Table:
    """Keys and values, both bytes."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those that are not there."""
        return [key for key in keys if key not in self._values]

    def apply(self, op: int, fields: Sequence[bytes], number: int) -> tuple[list[bytes], list[bytes]]:
        """Do what is asked; returns (the fields of the answer, the keys that were written). Keys that are waited for
        must be there. Raises Wrong."""
        values = self._values
        match op, list(fields):
            case (Op.SET, [*pairs]) if pairs and len(pairs) % 2 == 0:
                values.update(zip(pairs[::2], pairs[1::2], strict=True))
                return [], pairs[::2]
            case (Op.GET, keys):
                return [values[key] for key in keys], []
            case (Op.WAIT, _):
                return [], []
            case (Op.ADD, [key]):
                values[key] = str(self._sum(key, number)).encode()
                return [values[key]], [key]
            case (Op.COMPARE_SET, [key, expected, desired]):
                if key not in values and expected:
                    return [expected], []  # as torch has it: who expected something is told that it still is so
                if values.get(key, b"") == expected:
                    values[key] = desired
                    return [desired], [key]
                return [values[key]], []
            case (Op.CHECK, keys):
                return [b"" if self.missing(keys) else b"1"], []
            case (Op.DELETE, [key]):
                return [b"" if values.pop(key, None) is None else b"1"], []
            case (Op.NUM_KEYS, []):
                return [str(len(values)).encode()], []
            case (Op.APPEND, [key, more]):
                values[key] = values.get(key, b"") + more
                return [], [key]
            case _:
                raise Wrong(f"operation {op} with {len(fields)} fields is none of a store")

    def _sum(self, key: bytes, number: int) -> int:
        try:
            found = int(self._values.get(key, b"0")) + number
        except ValueError as error:
            raise Wrong(f"{key.decode(errors='replace')} is no number, and nothing can be added to it") from error
        if not -_MOST <= found < _MOST:
            raise Wrong(f"{key.decode(errors='replace')} would be {found}, which no number of 64 bits is")
        return found
