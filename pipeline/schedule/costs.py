"""What the simulator must know beside the schedule: seconds of compute, bytes that move and stay, and the links.

Both classes are plain data, made in code from measurements or read from JSON, and refuse by name what cannot be meant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.schedule.ops import B, F, I, R, Schedule, Span

PerSpan = float | Sequence[float] | Mapping[Span, float]
"""One number for every span; or one per layer, summed over a span's layers; or one by span."""

MOST_S = 1e9
"""Seconds that anything may take: more is a slip, and sums of it would not be finite."""
_LIMITS = {"bandwidth": (1e-6, 1e18), "bytes": (0.0, 1e18), "speed": (1e-6, 1e6)}
"""What is not in seconds: a word in its name -> the least and the most. A bandwidth may be inf: without a limit."""


class CostError(ValueError):
    """Costs or a network that cannot be used: names the entry, its value and what is allowed."""


@dataclass(frozen=True)
class Costs:
    """Of one microbatch on a worker of speed 1. Raises CostError for what is no number, or negative."""

    forward: PerSpan = 1.0
    """Seconds of F."""
    backward: PerSpan | None = None
    """Seconds of B; left out, the sum of both halves, or twice the forward."""
    input_gradient: PerSpan | None = None
    """Seconds of I; left out, half of the backward."""
    weight_gradient: PerSpan | None = None
    """Seconds of W; left out, half of the backward."""
    speed: Mapping[int, float] = field(default_factory=dict)
    """Worker -> how many times as fast it computes; 1 where missing."""
    output_bytes: float = 0.0
    """What F sends on to the next span."""
    gradient_bytes: float | None = None
    """What B or I sends back; left out, as much as F sends."""
    activation_bytes: PerSpan = 0.0
    """What F leaves on its worker until the backward."""
    parameter_bytes: PerSpan = 0.0
    """What a span's parameters take on a worker, and what LOAD and OFFLOAD move."""
    host_bandwidth: float = math.inf
    """Bytes per second between a worker and host memory, per direction."""
    reduce_s: PerSpan = 0.0
    """Seconds of summing a span's gradient over its replicas, from when the last of them is there."""
    step_s: PerSpan = 0.0
    """Seconds of STEP."""
    gap_s: float = 0.0
    """Seconds that a worker needs from one compute op to the next one, unless that goes straight on with the same span
    and microbatch, as a loss and its backward do."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Mapping):
                for key, entry in value.items():
                    _number(f"{f.name}[{_text(key)}]", entry, positive=f.name == "speed")
            elif isinstance(value, Sequence) and not isinstance(value, str):
                for i, entry in enumerate(value):
                    _number(f"{f.name}[{i}]", entry)
            elif value is not None:
                _number(f.name, value, positive=f.name == "host_bandwidth")
        if (self.input_gradient is None) != (self.weight_gradient is None):
            raise CostError("input_gradient and weight_gradient: one of them; allowed: both, or neither")

    def seconds(self, kind: str, span: Span) -> float:
        """What F, B, I, W or R of a span takes. Raises CostError where that was not given."""
        if kind in (F, R):
            return self.of("forward", span)
        if kind == B:
            if self.backward is not None:
                return self.of("backward", span)
            if self.input_gradient is not None:
                return self.of("input_gradient", span) + self.of("weight_gradient", span)
            return 2 * self.of("forward", span)
        half = "input_gradient" if kind == I else "weight_gradient"
        return self.seconds(B, span) / 2 if getattr(self, half) is None else self.of(half, span)

    def of(self, name: str, span: Span) -> float:
        """The entry of the named field for `span`. Raises CostError where it has none."""
        value: PerSpan = getattr(self, name)
        if isinstance(value, Mapping):
            if span not in value:
                raise CostError(
                    f"{name} has no entry for span {_text(span)}; it has {', '.join(map(_text, value)) or 'none'}"
                )
            return value[span]
        if isinstance(value, Sequence):
            if span[1] > len(value):
                raise CostError(f"{name} has {len(value)} layers; span {_text(span)} needs {span[1]}")
            return math.fsum(value[span[0] : span[1]])
        return value

    @classmethod
    def uniform(cls, schedule: Schedule, forward: float = 1.0, backward: float = 2.0) -> Costs:
        """Every span of the schedule alike; each half of a backward takes half of it."""
        return cls(dict.fromkeys(schedule.holders, forward), dict.fromkeys(schedule.holders, backward))

    @classmethod
    def from_json(cls, values: Any, spans: Sequence[Span] = ()) -> Costs:
        """From the object that a JSON file holds: the fields above, "forward" at least.

        Per span: a number, a list by layer, or an object {"lo:hi": number}; "speed" is a list or an object by worker;
        "about" is ignored. `spans`, if given, must have a forward, and lists one entry per layer of them. Raises
        CostError.
        """
        if not isinstance(values, dict):
            raise CostError(f"costs are {type(values).__name__}; allowed: an object with 'forward' and more")
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - {*known, "about"}):
            raise CostError(f"costs have {', '.join(unknown)}; allowed: {', '.join(known)}, about")
        if "forward" not in values:
            raise CostError(f"costs have no 'forward'; they have {', '.join(values) or 'nothing'}")
        read: dict[str, Any] = {}
        layers = max((hi for _, hi in spans), default=0)
        for name, value in values.items():
            if name == "speed":
                read[name] = _by_worker(value)
            elif isinstance(value, dict):
                read[name] = {_span(name, key): entry for key, entry in value.items()}
            elif name != "about":
                read[name] = value
            if isinstance(value, list) and name != "speed" and spans and len(value) != layers:
                raise CostError(f"{name} has {len(value)} layers; allowed: {layers}, one per layer of the model")
        costs = cls(**read)
        for span in spans:
            costs.seconds(F, span)
        return costs


@dataclass(frozen=True)
class Network:
    """Links by worker: `latency_s[a][b]` seconds and `bandwidth[a][b]` bytes per second, from a to b.

    A transfer holds its link, one per direction, while its bytes go in, and arrives `latency_s` later; on an
    `exclusive` network it holds the link until it has arrived. The diagonals mean nothing. Raises CostError for
    matrices that are not square or hold what is no number, or negative.
    """

    latency_s: Sequence[Sequence[float]]
    bandwidth: Sequence[Sequence[float]]
    exclusive: bool = False

    def __post_init__(self) -> None:
        size = len(self.latency_s)
        for name, rows, positive in (("latency_s", self.latency_s, False), ("bandwidth", self.bandwidth, True)):
            if len(rows) != size:
                raise CostError(f"{name} has {len(rows)} rows; allowed: {size}, as latency_s has")
            for a, row in enumerate(rows):
                if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != size:
                    found = len(row) if isinstance(row, Sequence) else repr(row)
                    raise CostError(f"{name}[{a}] has {found} entries; allowed: {size}, one per worker")
                for b, entry in enumerate(row):
                    if a != b:
                        _number(f"{name}[{a}][{b}]", entry, positive=positive)

    @classmethod
    def uniform(cls, workers: int, latency_s: float = 0.0, bandwidth: float = math.inf) -> Network:
        """All links alike."""
        return cls([[latency_s] * workers] * workers, [[bandwidth] * workers] * workers)

    @classmethod
    def from_json(cls, values: Any) -> Network:
        """From the object that a JSON file holds.

        Either {"latency_s": matrix, "bandwidth": matrix}, one of which may be left out and where a bandwidth of null
        is unlimited; or {"hop_s": matrix} with the seconds of a whole hop, serialisation included, which holds its
        link unless "contention" is false; what such a file holds beside is ignored. Raises CostError.
        """
        if not isinstance(values, dict):
            raise CostError(
                f"a network is {type(values).__name__}; allowed: an object with latency_s and bandwidth, or hop_s"
            )
        names = {"latency_s", "bandwidth"} & set(values)
        given = {name: values[name] for name in (("hop_s",) if "hop_s" in values else sorted(names))}
        for name, rows in given.items():
            if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
                raise CostError(f"{name} is {rows!r:.80}; allowed: a list with a list per worker")
        if "hop_s" in values:
            if names:
                raise CostError(f"a network has hop_s and {', '.join(sorted(names))}; allowed: one or the other")
            hops = values["hop_s"]
            return cls(
                hops, [[math.inf] * len(hops)] * len(hops), exclusive=values.get("contention", True) is not False
            )
        unknown = set(values) - names - {"about", "contention"}
        if unknown or not names:
            found = ", ".join(sorted(unknown)) or "nothing"
            raise CostError(f"a network has {found}; allowed: latency_s and bandwidth, or hop_s")
        size = len(next(iter(given.values())))
        bandwidth = [
            [math.inf if v is None else v for v in row] for row in given.get("bandwidth", [[None] * size] * size)
        ]
        return cls(given.get("latency_s", [[0.0] * size] * size), bandwidth)

    def hop(self, source: int, target: int, size: float) -> tuple[float, float]:
        """For `size` bytes: seconds that the link is held, and seconds after which they have arrived."""
        if max(source, target) >= len(self.latency_s):
            raise CostError(f"the network has {len(self.latency_s)} workers; worker {source} sends to worker {target}")
        held, latency = size / self.bandwidth[source][target], self.latency_s[source][target]
        return (held + latency if self.exclusive else held), held + latency


def _number(name: str, value: Any, *, positive: bool = False) -> None:
    kind = next((kind for kind in _LIMITS if kind in name), "")
    low, high = _LIMITS.get(kind, (0.0, MOST_S))
    good = isinstance(value, int | float) and not isinstance(value, bool)
    good = good and (low if positive else 0) <= value <= high
    if not good and not (value == math.inf and kind == "bandwidth"):
        raise CostError(f"{name} is {value!r:.40}; allowed: a number of {low if positive else 0:g} to {high:g}")


def _text(key: object) -> str:
    return f"{key[0]}:{key[1]}" if isinstance(key, tuple) else str(key)


def _span(name: str, key: str) -> Span:
    lo, _, hi = key.partition(":")
    if not (_short(lo) and _short(hi) and int(lo) < int(hi)):
        raise CostError(f"{name} has the entry {key!r:.40}; allowed: spans, as '0:2'")
    return int(lo), int(hi)


def _by_worker(value: Any) -> dict[int, Any]:
    if isinstance(value, list):
        return dict(enumerate(value))
    if not isinstance(value, dict) or not all(map(_short, value)):
        raise CostError(f"speed is {value!r:.80}; allowed: a list, or an object by worker")
    return {int(worker): speed for worker, speed in value.items()}


def _short(text: str) -> bool:
    """Whether a text is the number of a layer or of a worker."""
    return text.isdecimal() and len(text) < 10
