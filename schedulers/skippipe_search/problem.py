"""What SkipPipe plans for: nodes, their links and stages, and which paths through them a microbatch may take.

Nodes are workers. A path starts at a node of the first stage, which holds the data, the embedding, the head and the
loss, visits one node of each of `path_length - 1` other stages, in ascending order but for at most one pair of
neighbours that may change places, comes home for the loss and goes back the same way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.schedule.costs import MOST_S

Path = tuple[int, ...]
"""The nodes of one microbatch in the order of its forward; the first is its home."""

MOST_MICROBATCHES = 65536
_NEAR = 24
_GAP = 0.16  # of a forward: with it the four published iterations of the reference come out within 1 %


class NetworkError(ValueError):
    """A network file or a problem that cannot be planned: names the entry or the constraint, and what is allowed."""


@dataclass(frozen=True)
class RoutingProblem:
    """`hop_s[a][b]`: seconds from the end of an op on node a until its output is on node b.

    `forward_s`, `backward_s` and `loss_s` (head, loss and their backward) are of one microbatch on a node of speed 1;
    after each op a node needs `gap_s` before the next. A node holds at most `slots[n]` microbatches from forward to
    backward. The microbatches are dealt to the nodes of the first stage in turn. Raises NetworkError.
    """

    hop_s: Sequence[Sequence[float]]
    stages: tuple[tuple[int, ...], ...]
    path_length: int
    num_microbatches: int
    forward_s: float = 1.0
    backward_s: float = 1.5
    loss_s: float = 0.25
    gap_s: float = 0.0
    slots: tuple[int, ...] = ()
    speed: tuple[float, ...] = ()
    swaps: bool = False
    contention: bool = False
    """Whether a link carries one microbatch at a time, per direction."""
    replica_hop_s: float = math.inf
    """The slowest link that may lie within a stage, whose nodes sum gradients, where stages are searched too."""

    def __post_init__(self) -> None:
        nodes = sorted(n for stage in self.stages for n in stage)
        size = len(self.hop_s)
        if [len(row) for row in self.hop_s] != [size] * size:
            raise NetworkError(f"hop_s is {size} rows of {sorted({len(r) for r in self.hop_s})}; allowed: a square")
        if not self.stages or any(not stage for stage in self.stages):
            raise NetworkError(f"stages is {list(self.stages)}; allowed: one or more nodes in each")
        if len(set(nodes)) < len(nodes) or nodes[0] < 0 or nodes[-1] >= size:
            raise NetworkError(f"stages names nodes {nodes}; allowed: each of 0 to {size - 1} at most once")
        if not 1 <= self.path_length <= len(self.stages):
            raise NetworkError(f"path_length is {self.path_length}; allowed: 1 to {len(self.stages)}, the stages")
        if self.num_microbatches > MOST_MICROBATCHES:
            raise NetworkError(f"microbatches: {self.num_microbatches}; allowed: at most {MOST_MICROBATCHES}")
        if self.num_microbatches < len(self.stages[0]):
            raise NetworkError(
                f"microbatches: {self.num_microbatches}; allowed: {len(self.stages[0])} or more, one per node of the "
                "first stage"
            )
        for name in ("slots", "speed"):
            found = getattr(self, name)
            if found and len(found) != size:
                raise NetworkError(f"{name} has {len(found)} entries; allowed: {size}, one per node")
        if not self.slots:
            object.__setattr__(self, "slots", (self.num_microbatches,) * size)
        if not self.speed:
            object.__setattr__(self, "speed", (1.0,) * size)
        if few := [n for n in nodes if self.slots[n] < 1]:
            raise NetworkError(
                f"memory_slots of node {few[0]} is {self.slots[few[0]]}: no path can visit it; allowed: 1 or more"
            )
        quotas(self)

    @property
    def homes(self) -> tuple[int, ...]:
        """The nodes of the first stage."""
        return self.stages[0]

    def microbatches_of(self, home: int) -> range:
        """The microbatches that start at a node of the first stage."""
        return range(self.stages[0].index(home), self.num_microbatches, len(self.stages[0]))

    @property
    def stage_of(self) -> dict[int, int]:
        """Node -> its stage."""
        return {node: i for i, stage in enumerate(self.stages) for node in stage}

    def seconds(self, kind: str, node: int) -> float:
        """What "forward", "backward" or "loss" takes on a node."""
        return {"forward": self.forward_s, "backward": self.backward_s, "loss": self.loss_s}[kind] / self.speed[node]

    def round_trip(self, path: Path) -> float:
        """Seconds from the start of a path's first forward to the end of its last backward, nothing in its way."""
        return self.travel(path) + self.loss_s / self.speed[path[0]] + sum(
            (self.forward_s + self.backward_s) / self.speed[node] for node in path
        )  # fmt: skip

    def travel(self, path: Path) -> float:
        """The part of a round trip that is spent on links."""
        hop = self.hop_s
        total, before = 0.0, path[0]
        for node in (*path[1:], path[0]):
            if node != before:
                total += hop[before][node] + hop[node][before]
            before = node
        return total

    def home(self, microbatch: int) -> int:
        """Microbatches are dealt to the nodes of the first stage in turn."""
        return self.stages[0][microbatch % len(self.stages[0])]

    def with_stages(self, stages: Sequence[Sequence[int]], path_length: int | None = None) -> RoutingProblem:
        """The same network, otherwise cut; paths as long as they were unless told."""
        length = self.path_length if path_length is None else path_length
        made = replace(self, stages=tuple(map(tuple, stages)), path_length=length)
        for name in ("hops", "both_ways", "nearest"):  # of a large network they take longer than a plan may
            if name in self.__dict__:
                made.__dict__[name] = self.__dict__[name]
        return made

    @cached_property
    def hops(self) -> NDArray[np.float64]:
        """hop_s as an array."""
        return np.array(self.hop_s, dtype=np.float64)

    @cached_property
    def both_ways(self) -> NDArray[np.float64]:
        """[a, b]: a hop there and one back; none from a node to itself."""
        both = self.hops + self.hops.T
        np.fill_diagonal(both, 0.0)
        return both

    @property
    def stage_by_node(self) -> NDArray[np.int64]:
        """`stage_of` as an array; -1 for a node in no stage."""
        found = np.full(len(self.hop_s), -1)
        for i, stage in enumerate(self.stages):
            found[list(stage)] = i
        return found

    @cached_property
    def nearest(self) -> NDArray[np.int64]:
        """[node, rank]: the nodes that are fewest seconds away, there and back, at most `_NEAR` of them."""
        far = self.both_ways.copy()
        np.fill_diagonal(far, np.inf)
        return np.argsort(far, axis=1, kind="stable")[:, : max(1, min(_NEAR, len(far) - 1))].copy()


def quotas(problem: RoutingProblem) -> tuple[tuple[int, int], dict[int, tuple[int, int]]]:
    """The fewest and the most visits of each stage but the first, and of each of its nodes: as even as whole numbers
    allow. A stage that two counts are possible for has nodes for which both are. Raises NetworkError."""
    others = problem.stages[1:]
    visits = problem.num_microbatches * (problem.path_length - 1)
    if visits and not others:
        raise NetworkError("path_length is above 1, but there is one stage alone")
    low, high = (visits // len(others), -(-visits // len(others))) if others else (0, 0)
    nodes: dict[int, tuple[int, int]] = {}
    for stage in others:
        nodes.update(dict.fromkeys(stage, (low // len(stage), -(-high // len(stage)))))
    return (low, high), nodes


def check_paths(problem: RoutingProblem, paths: Sequence[Path], *, balanced: bool = True) -> None:
    """That paths are legal and visits balanced. Raises NetworkError, naming the path and the constraint."""
    stage_of = problem.stage_of
    for m, path in enumerate(paths):
        stages = [stage_of.get(node, -1) for node in path]
        where = f"path of microbatch {m}, nodes {list(path)}, stages {stages}:"
        if -1 in stages:
            raise NetworkError(f"{where} node {path[stages.index(-1)]} is in no stage")
        if stages[0] != 0:
            raise NetworkError(f"{where} the first stage is never skipped, and comes first")
        if len(set(stages)) < len(stages):
            raise NetworkError(f"{where} a stage is visited twice")
        swapped = [i for i in range(len(stages) - 1) if stages[i] > stages[i + 1]]
        ordered = sorted(stages)
        for i in swapped:
            ordered[i], ordered[i + 1] = ordered[i + 1], ordered[i]
        if ordered != stages or len(swapped) > int(problem.swaps):
            allowed = "at most one pair of neighbours" if problem.swaps else "none (swaps are off)"
            raise NetworkError(f"{where} stages change places; allowed: {allowed}")
        if balanced and len(path) != problem.path_length:
            raise NetworkError(f"{where} visits {len(path)} stages; allowed: {problem.path_length}")
    if not balanced:
        return
    (low, high), nodes = quotas(problem)
    visits = Counter(node for path in paths for node in path[1:])
    for i, stage in enumerate(problem.stages[1:], 1):
        if not low <= (n := sum(visits[node] for node in stage)) <= high:
            raise NetworkError(
                f"stage {i} is visited {n} times; allowed: {low} to {high}, so that all are trained alike"
            )
    for node, (least, most) in nodes.items():
        if not least <= visits[node] <= most:
            raise NetworkError(f"node {node} is visited {visits[node]} times; allowed: {least} to {most}")


# ---- files ----


def routing_from_json(
    values: Any, *, skip: float | None = None, swaps: bool = False, contention: bool = False,
    stages: int | None = None, microbatches: int | None = None,
) -> RoutingProblem:  # fmt: skip
    """The problem that a network file holds.

    "hop_s" (a matrix of seconds) is needed; "stages" (lists of nodes) or `stages` (how many, of equal size) too.
    "forward_s", "backward_s", "loss_s", "gap_s", "speed" (by node), "memory_slots" (one number, or by node),
    "microbatches_per_first_stage_node" and "path_length" may be given; what else there is, is not read. `skip` is the
    share of stages that a path leaves out, `microbatches` those of all homes. Raises NetworkError.
    """
    if not isinstance(values, Mapping) or "hop_s" not in values:
        raise NetworkError("a network for skippipe is an object with hop_s, a matrix of seconds from node to node")
    hops = _matrix(values["hop_s"])
    size = len(hops)
    if "stages" in values:
        cut = values["stages"]
        lists = isinstance(cut, list) and cut and all(isinstance(stage, list) for stage in cut)
        if not lists or not all(_whole(n) for stage in cut for n in stage):
            raise NetworkError(f"stages is {cut!r:.80}; allowed: a list of lists of nodes")
        cut = tuple(tuple(stage) for stage in cut)
        if stages is not None and stages != len(cut):
            raise NetworkError(f"the network file has {len(cut)} stages; {stages} are asked for")
    elif stages is not None and 1 <= stages <= size:
        cut = tuple(tuple(range(i * size // stages, (i + 1) * size // stages)) for i in range(stages))
    else:
        raise NetworkError(f"stages: {stages} for {size} nodes; allowed: in the file, or a number of 1 to {size}")
    forward = _seconds(values, "forward_s", 1.0)
    slots, speed = values.get("memory_slots", []), values.get("speed", [])
    slots = [slots] * size if _whole(slots) else slots
    if not isinstance(slots, list) or not all(_whole(k) for k in slots):
        raise NetworkError(f"memory_slots is {slots!r:.80}; allowed: a whole number, or one per node")
    if not isinstance(speed, list) or not all(_number(v) and 1e-6 <= v <= 1e6 for v in speed):
        raise NetworkError(f"speed is {speed!r:.80}; allowed: a list of numbers of 1e-06 to 1e+06, one per node")
    per_home = values.get("microbatches_per_first_stage_node", 1)
    length = values.get("path_length", len(cut)) if skip is None else length_for(skip, len(cut))
    for name, value in (("microbatches_per_first_stage_node", per_home), ("path_length", length)):
        if not _whole(value) or not 0 <= value <= MOST_MICROBATCHES:
            raise NetworkError(f"{name} is {value!r:.40}; allowed: a whole number of 0 to {MOST_MICROBATCHES}")
    return RoutingProblem(
        hops, cut, length, per_home * len(cut[0]) if microbatches is None else microbatches,
        forward, _seconds(values, "backward_s", 1.5 * forward),
        _seconds(values, "loss_s", 0.25 * forward), _seconds(values, "gap_s", _GAP * forward), tuple(slots),
        tuple(float(v) for v in speed), swaps, contention,
        max((hops[a][b] for s in cut for a in s for b in s if a != b and {a, b} <= set(range(size))), default=math.inf)
        if "stages" in values else math.inf,
    )  # fmt: skip


def length_for(skip: float, stages: int) -> int:
    """How many stages a path visits when it skips this share of them. Raises NetworkError where none fits."""
    length = round(stages * (1 - skip))
    if not 0 <= skip < 1 or length < 1 or abs(skip - (1 - length / stages)) > 0.02:
        fits = ", ".join(f"{1 - n / stages:.2f}" for n in range(stages, 0, -1))
        raise NetworkError(
            f"skip is {skip}, which no route satisfies: a path visits whole stages, the first always; allowed for "
            f"{stages} stages: {fits}"
        )
    return length


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_S


def _seconds(values: Mapping[str, Any], name: str, default: float) -> float:
    value = values.get(name, default)
    if not _number(value):
        raise NetworkError(f"{name} is {value!r:.40}; allowed: seconds, 0 to {MOST_S:g}")
    return float(value)


def _matrix(rows: Any) -> list[list[float]]:
    """hop_s, every pair given and none negative; the diagonal means nothing."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise NetworkError(f"hop_s is {rows!r:.80}; allowed: a list with a list per node")
    for a, row in enumerate(rows):
        if len(row) != len(rows):
            raise NetworkError(
                f"hop_s[{a}] has {len(row)} entries: pairs are missing; allowed: {len(rows)}, one per node"
            )
        for b, value in enumerate(row):
            if a != b and not _number(value):
                raise NetworkError(f"hop_s[{a}][{b}] is {value!r:.40}; allowed for every pair: 0 to {MOST_S:g} seconds")
    return [[0.0 if a == b else float(v) for b, v in enumerate(row)] for a, row in enumerate(rows)]
