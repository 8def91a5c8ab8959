"""A store as torch's, every call to which takes its time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from tests.simulation.world import World


class Server:
    """What the store holds."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.slow = 1.0


class Client:
    """A connection to the store: every call takes a while, in which others go on."""

    def __init__(self, world: World, server: Server, patient: float = 1.0) -> None:
        self._world, self._server, self._patient = world, server, patient

    def _way(self) -> None:
        chance = self._world.chance
        if chance.random() < self._patient:
            self._world.sleep(self._server.slow * chance.choice((0.0002, 0.0005, 0.001, 0.003)))

    def set(self, key: str, value: str | bytes) -> None:
        self._way()
        self._server.values[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str) -> bytes:
        self._way()
        if key not in self._server.values:
            raise RuntimeError(f"no key {key}")
        return self._server.values[key]

    def check(self, keys_: Sequence[str]) -> bool:
        self._way()
        return all(key in self._server.values for key in keys_)

    def multi_get(self, keys_: Sequence[str]) -> list[bytes]:
        self._way()
        return [self._server.values[key] for key in keys_]

    def add(self, key: str, amount: int) -> int:
        self._way()
        found = int(self._server.values.get(key, b"0")) + amount
        self._server.values[key] = str(found).encode()
        return found

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._way()
        found = self._server.values.get(key)
        if found is None or found == expected.encode():
            self._server.values[key] = found = desired.encode()
        return found

    def delete_key(self, key: str) -> bool:
        self._way()
        return self._server.values.pop(key, None) is not None

    def wait(self, keys_: Sequence[str], timeout: timedelta) -> None:
        deadline = self._world.now + timeout.total_seconds()
        while not self.check(keys_):
            if self._world.now >= deadline:
                raise RuntimeError("timed out")
            self._world.sleep(0.02)
