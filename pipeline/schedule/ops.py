"""The one representation of pipeline work: routes say what must happen, lanes say who does it and in which order.

A scheduler writes a Schedule; the verifier, the simulator, the drawings, the lowering passes and the worker read it.
Work is named by span (a run of layers), never by "stage + 1", so that a microbatch may skip spans, visit them in
another order, or go back through spans that are cut differently. What an op waits for is read from the routes by
`deps`, in one place; `graph.compiled` holds the answers. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

Span = tuple[int, int]
"""Layers `lo, lo + 1, ..., hi - 1` of the model: `(lo, hi)`."""

F, B, I, W, R = "F", "B", "I", "W", "R"
"""Forward, backward, the two halves of a backward (input gradient, weight gradient), and a forward run again: the same
work as F, whose result stays where it is, for the backward of a span that is cut otherwise than the forward ones, or,
on a copy of the span, in case that the worker of F is lost."""
SEND, RECV, LOAD, OFFLOAD, REDUCE, STEP = "SEND", "RECV", "LOAD", "OFFLOAD", "REDUCE", "STEP"
COMPUTE = (F, B, I, W, R)
KINDS = (*COMPUTE, SEND, RECV, LOAD, OFFLOAD, REDUCE, STEP)
ALL = -1
"""The microbatch of an op that belongs to no single one (LOAD, OFFLOAD, REDUCE, STEP)."""


class ScheduleError(ValueError):
    """A schedule, or the text of one, that cannot be accepted. The message says which op or line, and why."""


class Op(NamedTuple):
    """One thing a worker does. SEND and RECV carry the output of the compute op `of` to or from the worker `peer`."""

    kind: str
    span: Span
    microbatch: int = ALL
    peer: int = -1
    of: Op | None = None

    def __str__(self) -> str:
        if self.of is not None:
            return f"{self.kind}({self.of}){'>' if self.kind == SEND else '<'}{self.peer}"
        tail = "" if self.microbatch == ALL else f"#{self.microbatch}"
        return f"{self.kind}[{self.span[0]}:{self.span[1]}]{tail}"


class Route(NamedTuple):
    """The spans one microbatch visits, in order: forward, then back. An empty `backward` is an evaluation."""

    forward: tuple[Span, ...]
    backward: tuple[Span, ...]

    @classmethod
    def through(cls, spans: tuple[Span, ...]) -> Route:
        """Forward through `spans` and back the same way."""
        return cls(spans, spans[::-1])


Node = tuple[int, Op]
"""An op and the worker whose lane holds it: what identifies an op among all lanes."""

Key = tuple[str, Span, int]
"""What identifies a compute op: `op[:3]`, its kind, span and microbatch."""

Needs = dict[tuple[str, Span], tuple[tuple[str, Span], ...]]
"""(F, B or R, span) -> the (F or B, span) of the same microbatch whose output it needs."""


@dataclass(frozen=True)
class Schedule:
    """`routes[m]` is the route of microbatch m; `lanes[w]` the ops of worker w for one iteration, in order."""

    routes: tuple[Route, ...]
    lanes: Mapping[int, tuple[Op, ...]]
    name: str = field(default="schedule", compare=False)

    @cached_property
    def home(self) -> dict[Key, int]:
        """(kind, span, microbatch) of a compute op -> the worker whose lane holds it."""
        return {key: worker for key, (worker, _) in self.nodes.items()}

    @cached_property
    def nodes(self) -> dict[Key, Node]:
        """(kind, span, microbatch) of a compute op -> the op and the worker whose lane holds it."""
        return {op[:3]: (worker, op) for worker, op in self.ops() if op[0] in COMPUTE}

    @cached_property
    def others(self) -> frozenset[Node]:
        """The ops that are no compute ops, with their workers."""
        return frozenset(node for node in self.ops() if node[1][0] not in COMPUTE)

    @cached_property
    def lowered(self) -> bool:
        """Whether data between workers moves by SEND and RECV, or is merely implied."""
        return any(op[0] == SEND or op[0] == RECV for _, op in self.others)

    @cached_property
    def holders(self) -> dict[Span, tuple[int, ...]]:
        """Span -> the workers that compute it, ascending: its replicas."""
        found: dict[Span, set[int]] = {}
        for (kind, span, _), worker in self.home.items():
            if kind != R:
                found.setdefault(span, set()).add(worker)
        return {span: tuple(sorted(workers)) for span, workers in sorted(found.items())}

    @cached_property
    def needs(self) -> tuple[Needs, ...]:
        """`route_needs` of each microbatch; equal routes share one."""
        known = {route: route_needs(route) for route in set(self.routes)}
        return tuple(known[route] for route in self.routes)

    @property
    def num_microbatches(self) -> int:
        return len(self.routes)

    def ops(self) -> Iterator[Node]:
        """Every op with its worker, lane by lane."""
        for worker, lane in self.lanes.items():
            for op in lane:
                yield worker, op

    def __str__(self) -> str:
        return dumps(self)


def span_text(span: Span) -> str:
    """`lo:hi`; `parse_span` reads it."""
    return f"{span[0]}:{span[1]}"


def parse_span(text: str) -> Span:
    """The span that `span_text` wrote. Raises ValueError for any other text."""
    lo, _, hi = text.partition(":")
    return int(lo), int(hi)


def overlaps(a: Span, b: Span) -> bool:
    """Whether two spans share a layer."""
    return a[0] < b[1] and b[0] < a[1]


def route_needs(route: Route) -> Needs:
    """What each op on a route needs, as the order of its spans says.

    A forward waits for the forward before it. A backward waits for the backward before it (the first one: for the
    last forward) and for the forwards that left what it works on: those of the same layers, or, where backward spans
    are cut differently and recompute, also the one that produced the input of its first layer. For that one alone waits
    the recomputation, if a lane has it as an op of its own.
    """
    needs: Needs = {}
    for before, span in zip((None, *route.forward), route.forward, strict=False):
        needs[F, span] = () if before is None else ((F, before),)
    for before, span in zip((None, *route.backward), route.backward, strict=False):
        if span in route.forward:
            sources = [span]
        else:
            first = next((i for i, f in enumerate(route.forward) if overlaps(f, span)), len(route.forward))
            sources = [f for f in route.forward if overlaps(f, span)]
            sources += [route.forward[first - 1]] if first else []
            input_of = [f for f in route.forward if f[0] < span[0] <= f[1]]
            needs[R, span] = tuple((F, f) for f in input_of)
        if before is None and route.forward and route.forward[-1] not in sources:
            sources.append(route.forward[-1])
        needs[B, span] = (*((F, f) for f in sources), *(() if before is None else ((B, before),)))
    return needs


def deps(schedule: Schedule, worker: int, op: Op) -> tuple[Node, ...]:
    """The ops that `op` in the lane of `worker` waits for, beyond what merely stands before it in that lane.

    Data that comes from another worker is waited for at the RECV if the lane has one, else at the op that made it.
    A RECV waits for its SEND, a SEND for what it carries, a STEP for the REDUCE of every holder. REDUCE waits for
    nobody: it starts a sum that goes on beside the lane. Raises ScheduleError where a needed op stands in no lane,
    naming both.
    """
    kind, span, microbatch, peer, of = op
    if kind not in COMPUTE:
        if kind == STEP:
            reduce = Op(REDUCE, span)
            return tuple((w, reduce) for w in schedule.holders.get(span, ()) if (w, reduce) in schedule.others)
        if of is None:
            return ()
        return ((worker, of) if kind == SEND else (peer, Op(SEND, span, microbatch, worker, of)),)
    nodes = schedule.nodes
    try:
        needs = schedule.needs[microbatch]
        if kind == W:
            needed = ((I, span),)
        else:
            needed = needs[(R, span) if kind == R and (R, span) in needs else (F if kind in (F, R) else B, span)]
    except (IndexError, KeyError) as error:
        raise ScheduleError(f"{op} of worker {worker} is on no route") from error
    found: list[Node] = []
    for other, other_span in needed:
        node = nodes.get((other, other_span, microbatch))
        if node is None and other == B:
            node = nodes.get((I, other_span, microbatch))
        if node is None:
            raise ScheduleError(
                f"{op} of worker {worker} needs {Op(other, other_span, microbatch)}, which no lane holds"
            )
        if node[0] != worker and schedule.lowered:
            receive = (worker, Op(RECV, other_span, microbatch, *node))
            node = receive if receive in schedule.others else node
        found.append(node)
    return tuple(found)


# ---- text ----

_HEADER = "unbroken schedule 1"
_OP = re.compile(r"(F|B|I|W|R|LOAD|OFFLOAD|REDUCE|STEP)\[(\d+):(\d+)\](?:#(\d+))?")
_ROUTE = re.compile(r"route (\d+)-(\d+): ([^|]*)\|([^|]*)")
_LINK = re.compile(r"(SEND|RECV)\((.+)\)([<>])(\d+)")


def dumps(schedule: Schedule) -> str:
    """The schedule as text, one line per run of equal routes and one per lane; `loads` gives it back."""
    lines = [f"{_HEADER} {schedule.name}".rstrip(), *routes_text(schedule.routes)]
    lines += [f"lane {w}: {lane_text(lane)}".rstrip() for w, lane in schedule.lanes.items()]
    return "\n".join(lines) + "\n"


def routes_text(routes: Sequence[Route]) -> list[str]:
    """One line per run of equal routes; `parse_routes` reads them."""
    lines: list[str] = []
    start = 0
    for end in range(1, len(routes) + 1):
        if end == len(routes) or routes[end] != routes[start]:
            spans = [" ".join(map(span_text, side)) for side in routes[start]]
            lines.append(f"route {start}-{end - 1}: {spans[0]} | {spans[1]}".rstrip())
            start = end
    return lines


def lane_text(lane: Sequence[Op]) -> str:
    """The ops of a lane in order; `parse_lane` reads them."""
    return " ".join(map(str, lane))


def parse_lane(text: str) -> tuple[Op, ...]:
    """The lane that `lane_text` wrote. Raises ScheduleError."""
    _require_small(text)
    return tuple(map(parse_op, text.split()))


def parse_routes(lines: Iterable[str]) -> tuple[Route, ...]:
    """The routes that `routes_text` wrote. Raises ScheduleError."""
    routes: list[Route] = []
    for line in lines:
        _require_small(line)
        if not (route := _ROUTE.fullmatch(line)):
            raise ScheduleError(f"{line!r}: expected 'route FIRST-LAST: spans | spans'")
        first, last = int(route[1]), int(route[2])
        if first != len(routes) or last < first:
            raise ScheduleError(f"{line!r}: expected the routes from microbatch {len(routes)} on")
        routes += [Route(_parse_spans(route[3], line), _parse_spans(route[4], line))] * (last - first + 1)
    return tuple(routes)


def _require_small(line: str) -> None:
    if large := re.search(r"\d{7,}", line):  # else one line of text fills the memory
        raise ScheduleError(f"{line:.80}: the number {large[0]:.20}; expected numbers below 1000000")


def parse_op(text: str) -> Op:
    """One op from its text, e.g. `F[0:2]#3` or `SEND(F[0:2]#3)>1`. Raises ScheduleError."""
    if plain := _OP.fullmatch(text):
        kind, lo, hi, microbatch = plain.groups()
        if int(lo) >= int(hi):
            raise ScheduleError(f"op {text!r}: the span is empty; expected lo < hi")
        if (microbatch is None) == (kind in COMPUTE):
            raise ScheduleError(f"op {text!r}: {kind} {'needs' if kind in COMPUTE else 'takes no'} #microbatch")
        return Op(kind, (int(lo), int(hi)), ALL if microbatch is None else int(microbatch))
    if link := _LINK.fullmatch(text):
        kind, inner, arrow, peer = link.groups()
        of = parse_op(inner)
        if of.kind not in COMPUTE or (arrow == ">") != (kind == SEND):
            raise ScheduleError(f"op {text!r}: expected SEND(compute op)>worker or RECV(compute op)<worker")
        return Op(kind, of.span, of.microbatch, int(peer), of)
    raise ScheduleError(f"op {text!r}: expected e.g. F[0:2]#3, REDUCE[0:2] or SEND(F[0:2]#3)>1")


def _parse_spans(text: str, line: str) -> tuple[Span, ...]:
    spans: list[Span] = []
    for word in text.split():
        match = re.fullmatch(r"(\d+):(\d+)", word)
        if not match or int(match[1]) >= int(match[2]):
            raise ScheduleError(f"{line!r}: span {word!r}; expected lo:hi with lo < hi")
        spans.append((int(match[1]), int(match[2])))
    return tuple(spans)


def loads(text: str) -> Schedule:
    """The schedule a text holds. Refuses, with a ScheduleError that names the line, any text it cannot read whole."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or not re.fullmatch(rf"{_HEADER}( \S.*)?", lines[0]):
        raise ScheduleError(f"the first line is {lines[0] if lines else ''!r}; expected {_HEADER!r} and a name")
    routes = [line for line in lines[1:] if line.startswith("route")]
    lanes: dict[int, tuple[Op, ...]] = {}
    for line in lines[1:]:
        if line.startswith("route"):
            continue
        _require_small(line)
        if not (lane := re.fullmatch(r"lane (\d+):(.*)", line)):
            raise ScheduleError(f"{line!r}: expected 'route FIRST-LAST: spans | spans' or 'lane WORKER: ops'")
        if int(lane[1]) in lanes:
            raise ScheduleError(f"{line!r}: worker {lane[1]} has a lane already")
        lanes[int(lane[1])] = parse_lane(lane[2])
    return Schedule(parse_routes(routes), lanes, lines[0][len(_HEADER) :].strip())
