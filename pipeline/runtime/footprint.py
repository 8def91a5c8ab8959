"""The bytes of a worker at its fullest, by kind: state, activations, messages, buffers, and what an op takes meanwhile.

How many of each thing there may be is proved from the schedule alone (`holdings.py`). What each is worth in bytes is
measured here, on real modules: the lane executor runs one forward and one backward of each kind of span, and every
storage that an operator makes meanwhile is followed until it is freed. What operators and libraries keep to themselves
is not seen; a device's allocator rounds up; and a sum over replicas has buffers of its own.

Over gloo a message is received into a buffer of its own. In shared memory it lies in a slot of its receiver from the
moment it is sent until it is let go, and an op uses it there. A slot that was written may have its pages for good, so
what counts is how many there are: a link grants one only for a message that waits, and then all others are in use; so
there are never more than messages of that link that were sent and not let go at once, which the schedule bounds, or
than those that are there from the start. So back pressure has a bound that no link has to enforce: a limit below it
could end in waiting for each other, one above it would never be reached. A sender keeps the payloads of those messages
alone that wait for a slot, which are among those that have not arrived.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.model.layered import LayeredModel
from pipeline.runtime.batch import Job, Needs
from pipeline.runtime.compute import Settings
from pipeline.runtime.lane_executor import Lane, LaneExecutor, lane_needs, learns
from pipeline.runtime.shared_link import KEPT
from pipeline.runtime.terms import StepTerms
from pipeline.runtime.transport import HEADER_BYTES, span_bytes
from pipeline.schedule.graph import compiled
from pipeline.schedule.holdings import Bound, Held, Sizes, bounds
from pipeline.schedule.layout import Excerpt
from pipeline.schedule.ops import COMPUTE, RECV, SEND, B, F, I, Key, Op, R, Schedule, Span, W
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore

Links = Literal["shm", "gloo"]
"""What messages go through: all of them through the same."""
_ADAMW = OptimizerConfig()
_BUFFERS = 2
"""Per link: the one that is posted, and a sent one that has left while the thread that lets go of it is about to."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one worker in one iteration of a schedule, at most."""

    state: int
    """Weights, gradients and AdamW's two moments."""
    tokens: int
    """The microbatches themselves, kept to the end of the step."""
    held: Held
    """At the fullest moment of the lane."""
    most: Held
    """Of each kind by itself, at whatever moment."""
    boundaries: int = 0
    """Hidden states that are kept in case a neighbour is lost, see `boundaries.py`."""

    @property
    def total(self) -> float:
        return self.state + self.tokens + self.held.total + self.boundaries

    @property
    def activations_alone(self) -> float:
        """State and activations, without all that lies beside them."""
        return self.state + self.most.activations


@dataclass(frozen=True)
class SpanBytes:
    """What one microbatch takes on a span, as measured. `working` by kind of op: beside input, output and what is left
    behind."""

    activation: int
    half: int
    working: Mapping[str, int]


def footprints(
    model: LayeredModel, schedule: Schedule, job: Job, settings: Settings, optimizer: OptimizerConfig = _ADAMW,
    links: Links = "shm", boundary: int = 0,
) -> dict[int, Footprint]:  # fmt: skip
    """Worker -> its bytes at most, whatever the times and the network, under a lowered schedule of resident workers.

    `boundary` is the limit of `Boundaries`. All microbatches are taken to be of the size of the first one of step 0.
    The vectors of a step that is a procedure are not in it.
    Raises ValueError where outputs cross workers and no SEND says when.
    """
    samples, sequence = job.batch(0, 0, Needs.INPUT)["input_ids"].shape
    both = Needs.INPUT | Needs.LOSS
    batches = {needs: job.batch(0, 0, needs).num_bytes for needs in (Needs.NOTHING, Needs.INPUT, Needs.LOSS, both)}
    message = HEADER_BYTES + span_bytes(samples, sequence, model.hidden_size, torch.float32)
    slot = slot_bytes(message - HEADER_BYTES)
    spans, shared = measure(model, schedule, job, settings, links), links == "shm"
    sizes = Sizes(
        activation=lambda span: spans[span].activation, half=lambda span: spans[span].half, message=lambda _: message,
        buffer=0 if shared else message, posted=0 if shared else _BUFFERS * message,
        working=lambda kind, span: spans[span].working.get(kind, 0),
    )  # fmt: skip
    found: dict[int, Footprint] = {}
    for worker, bound in bounds(compiled(schedule), sizes).items():
        lane = schedule.lanes[worker]
        held = {op.span for op in lane if op.kind in COMPUTE}
        kept = sum(batches[needs] for needs in lane_needs(model, lane).values())
        posted = num_slots(bound) * slot if shared else bound.most.posted
        fullest, most = replace(bound.fullest, posted=posted), replace(bound.most, posted=posted)
        under_way = len(schedule.routes) * span_bytes(samples, sequence, model.hidden_size, torch.bfloat16)
        beside = num_boundaries(lane) * (boundary + min(boundary, under_way))
        found[worker] = Footprint(state_bytes(model, held, optimizer), kept, fullest, most, beside)
    return found


def num_boundaries(lane: Iterable[Op]) -> int:
    """Between how many spans and its neighbours a lane moves hidden states forward: sides that are kept."""
    crossing = (
        (op.kind, op.of.span) for op in lane if op.kind in (SEND, RECV) and op.of is not None and op.of.kind == F
    )
    return len(set(crossing))


def slot_bytes(size: int) -> int:
    """Of a slot for payloads of so many bytes: whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def num_slots(bound: Bound) -> int:
    """The slots that a worker's links come to have, of those that anything is sent through, at most."""
    return sum(max(KEPT, most) for most in bound.slots.values())


def state_bytes(model: LayeredModel, spans: Iterable[Span], optimizer: OptimizerConfig = _ADAMW) -> int:
    """What a worker keeps for `spans` from step to step, in fp32: weights, and of what is trained gradients and the
    optimizer's moments. A weight that both ends of the model share counts once."""
    sizes = {
        (None if name in model.tied_keys else span, name): math.prod(shape)
        * (2 + optimizer.num_moments(len(shape), layer in model.blocks) if name in model.differentiated(layer) else 1)
        for span in spans
        for layer in range(*span)
        for name, shape in model.shapes(layer).items()
    }
    return 4 * sum(sizes.values())


# ---- what a microbatch takes on a span ----


def measure(
    model: LayeredModel, schedule: Schedule, job: Job, settings: Settings, links: Links = "shm"
) -> dict[Span, SpanBytes]:
    """Span -> what it takes, by running each kind of span once; of those that are alike, layer by layer, one. Over shm
    what was received lies in its slot, and is in no activation."""
    found: dict[Any, SpanBytes] = {}
    own = _own_inputs(schedule)
    result: dict[Span, SpanBytes] = {}
    for (kind, span, m), worker in schedule.home.items():
        if kind == F and span not in result:
            route = schedule.routes[m]
            alike = (
                _layers(model, span), span in route.forward[1:-1], (W, span, m) in schedule.home,
                learns(model, route, span), span in own,
            )  # fmt: skip
            if alike not in found:
                slots = links == "shm" and span not in own
                found[alike] = _measure(model, schedule, job, settings, worker, span, m, slots)
            result[span] = found[alike]
    return result


def _own_inputs(schedule: Schedule) -> set[Span]:
    """Spans some of whose inputs, or gradients of outputs, come from the same worker: they lie in no slot."""
    own: set[Span] = set()
    for (kind, span, m), worker in schedule.home.items():
        route = schedule.routes[m].forward if kind in (F, R) else schedule.routes[m].backward
        before = route[: route.index(span)][-1:]
        kinds = (F,) if kind in (F, R) else (B, I)
        if any(schedule.home.get((k, each, m)) == worker for each in before for k in kinds):
            own.add(span)
    return own


def _layers(model: LayeredModel, span: Span) -> tuple[Any, ...]:
    """What tells spans apart that take different amounts."""
    blocks = model.blocks
    trained = {n: set(model.differentiated(n)) for n in range(*span)}
    return tuple(
        (
            *((shape, name in trained[n]) for name, shape in model.shapes(n).items()),
            model.attention_type(n) if n in blocks else n,
        )
        for n in range(*span)
    )


def _measure(
    model: LayeredModel, schedule: Schedule, job: Job, settings: Settings, worker: int, span: Span, m: int, slots: bool
) -> SpanBytes:  # fmt: skip
    """Run the forward of microbatch m, and its backward if it has one, in the lane of `worker`, on made-up inputs. They
    do not count where all of them lie in `slots`."""
    store = ResidentStore(model, [span], OptimizerConfig(), seed=0, device=settings.device)
    terms = StepTerms.of(job, 0, len(schedule.routes))
    lane = Lane(
        Excerpt.of(schedule, worker), job, 0, terms, model, store.modules, {span: torch.zeros(0)}, _Nobody(),
        lambda _: None, math.inf, settings,
    )  # fmt: skip
    executor = LaneExecutor(lane)
    store.train(lane.excerpt.trains)
    (forward, back), values = schedule.routes[m], executor.values
    samples, sequence = job.batch(0, m, Needs.INPUT)["input_ids"].shape
    shape = samples, sequence, model.hidden_size
    executor.batch(m)
    size = span_bytes(*shape, torch.float32)
    halves = (W, span, m) in schedule.home
    before, after = forward[: forward.index(span)][-1:], back[: back.index(span)][-1:] if back else ()
    inputs = [(F, each, m) for each in before]
    gradients = [(I if (I, each, m) in schedule.home else B, each, m) for each in after]
    there = {key: torch.zeros(shape, device=settings.device) for key in (*inputs, *gradients) if slots}

    def given(keys: list[Key]) -> dict[Key, Tensor]:
        return {key: there.pop(key) if slots else torch.zeros(shape, device=settings.device) for key in keys}

    with torch.set_grad_enabled(lane.excerpt.trains), Live() as live:
        values.update(given(inputs))
        came = live.now  # the input, which really lies in the buffer that it came in
        rise = live.rise(lambda: executor.forward(Op(F, span, m)))
        if not back:
            return SpanBytes(0, 0, {F: max(0, rise - (size if span != forward[-1] else 0))})
        values.clear()
        unseen = 0 if slots else len(inputs) * (size + HEADER_BYTES) - came
        activation, left = live.now + unseen, live.now - came
        working = {F: rise - left, R: rise - left}
        values.update(given(gradients))
        rise = live.rise(lambda: executor.backward(Op(I if halves else B, span, m)))
        out = size if span != back[-1] else 0
        working[I if halves else B] = max(0, rise - out)
        values.clear()
        half = live.now + unseen - out if halves else 0
        if halves:
            working[W] = live.rise(lambda: executor.weights(Op(W, span, m)))
    return SpanBytes(activation, half, working)


class _Nobody:
    """Links that no op uses here."""

    def send(self, op: Op, peer: int, tensor: Tensor) -> None:
        raise NotImplementedError

    def receive(self, op: Op, peer: int, deadline: float) -> Tensor:
        raise NotImplementedError


class Live(TorchDispatchMode):
    """Inside, `now` is the bytes of all storages that operators have made and that are still there; `peak` the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, tuple[int, Any]] = {}

    def rise(self, work: Callable[[], object]) -> int:
        """How far `now` rises above where it is while `work` is done."""
        before = self.peak = self.now
        work()
        return self.peak - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), made=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), made=True)
        return result

    def _see(self, storage: torch.UntypedStorage, made: bool) -> None:
        """What comes in without having been made here was there before, and counts nothing."""
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes() if made else 0
            self._known[key] = size, weakref.ref(storage, lambda _: self._gone(key))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)[0]
