"""A worker that holds nothing: it takes work units, loads their spans from the host store, and gives back results.

It knows no other worker and no schedule. Orders and facts ("the input of layer 5 of microbatch 3 is there") come over
one socket as JSON, and so do its answers; numbers move through the store alone. Whatever it has not answered for may be
done again by another: hidden states are the same bits again, and a gradient counts when its block is accepted, which
carries a tally of what was added to it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.layered import SpanModule
from pipeline.runtime.batch import Batch, Job, ToldJob
from pipeline.runtime.channel import Channel, ChannelClosed, ChannelFull
from pipeline.runtime.compute import Output, Settings, compute, needs
from pipeline.runtime.copy_engine import LATER, URGENT, CopyEngine
from pipeline.runtime.orders import Gradient, Loaded, Order
from pipeline.runtime.peak_flops import Capability
from pipeline.runtime.peak_memory import peak_memory
from pipeline.runtime.probe import READING, Probe, Unprobed
from pipeline.runtime.terms import StepTerms
from pipeline.schedule.layout import EVALUATE, TRAIN
from pipeline.schedule.ops import LOAD, B, F, Op, R
from pipeline.schedule.work_units import BACKWARD, FORWARD
from pipeline.state.host_store import HostStore

_EVENTS = 1024  # that are told of one unit
_HELD = 2  # spans whose weights are here at once: one that is computed, one that is being loaded


class Recalled(Exception):
    """The order at hand is taken back: what it waits for was lost and must be made first."""


class PoolClosed(RuntimeError):
    """The host has closed the connection: the run is over, or the host is gone."""


class StatelessWorker:
    """Serves units until it is told to end. `jobs` gives the microbatches of each kind of run, by name."""

    def __init__(
        self, id: int, store: HostStore, jobs: Mapping[str, Job], settings: Settings, channel: Channel,
        probe: Probe | None = None, chunk: int = 64 << 20,
    ) -> None:  # fmt: skip
        self.id, self.store, self.jobs, self.settings, self.channel = id, store, jobs, settings, channel
        self.probe = probe or Unprobed()
        self.layout, self.model, self.device = store.layout, store.layout.model, settings.device
        self.cuda = self.device.type == "cuda"
        self.up = CopyEngine(self.device, f"up-{id}", chunk)
        self.down = CopyEngine(self.device, f"down-{id}", chunk)
        cut = self.layout.cut
        largest = max(self.layout.weight_size(span) for span in (*cut.forward, cut.fused, *cut.backward))
        self.buffers = [torch.empty(largest, device=self.device) for _ in range(_HELD)]
        self.gradient = torch.empty(self.layout.block_size, device=self.device) if self.cuda else None
        self.free = list(range(_HELD))
        self.shells: dict[tuple[int, int], SpanModule] = {}
        self.orders: deque[Order] = deque()
        self.facts: set[tuple[int, str, int, int]] = set()  # run, x or dx, microbatch, layer
        self.terms: dict[int, StepTerms] = {}  # by run
        self.running: Order | None = None
        self.most_held = 0

    def serve(self) -> None:
        """Answer orders until the host says that it is over. Raises PoolClosed when the host is gone."""
        self.tell(hello=self.id, capability=Capability.of(self.settings, self.id).as_json())
        try:
            while True:
                while not self.orders:
                    if self.listen(None):
                        return
                self.prepare()
                order = self.orders[0]
                try:
                    self.running = order
                    self.run(order)
                except Recalled:
                    self.tell(recalled=order.id)
                self.running = None
                self.orders.popleft()
                self.let_go(order)
        finally:
            self.up.close()
            self.down.close()

    # ---- talking ----

    def tell(self, **message: Any) -> None:
        """Send one message. Raises PoolClosed."""
        try:
            self.channel.send(message, self.settings.deadline_s)
        except (ChannelClosed, ChannelFull, TimeoutError) as error:
            raise PoolClosed("the host of the run is gone, or does not listen") from error

    def listen(self, timeout_s: float | None) -> bool:
        """Take one message, if one comes in time; whether it is the last. Raises PoolClosed."""
        try:
            message = self.channel.receive(timeout_s)
        except ChannelClosed as error:
            raise PoolClosed("the host of the run is gone") from error
        if message is None:
            return False
        if "recall" in message:
            self.recall(message["recall"])
        for run, kind, m, layer in message.get("facts", ()):
            self.facts.add((run, kind, m, layer))
        if "do" in message:
            order = Order.from_json(message["do"])
            self.facts = {fact for fact in self.facts if fact[0] >= order.run - 1}
            self.orders.append(order)
            self.probe("order", order.step)
            self.prepare()
        return "end" in message

    def recall(self, id: int) -> None:
        """Give an order back. Raises Recalled where it is the one at hand; one that is done already is no matter."""
        order = next((order for order in self.orders if order.id == id), None)
        if order is None:
            return
        if order is self.orders[0] and self.running is order:
            raise Recalled
        self.orders.remove(order)
        if order.loaded is not None:
            self.let_go(order)
        self.tell(recalled=id)

    def catch_up(self) -> None:
        """Take what has come meanwhile, so that the next span is loaded beside the work on this one."""
        while self.channel.ready:
            if self.listen(0.0):
                raise PoolClosed("the host has ended the run in the middle of a unit")

    def wait_for(self, order: Order, kind: str, m: int, layer: int) -> None:
        """Return once a hidden state is there. Raises TimeoutError at the deadline."""
        deadline = time.monotonic() + self.settings.deadline_s
        while (order.run, kind, m, layer) not in self.facts:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(
                    f"worker {self.id} has waited {self.settings.deadline_s:g} s for {kind} of layer {layer}, "
                    f"microbatch {m}, in step {order.step}"
                )
            if self.listen(left):
                raise PoolClosed("the host has ended the run in the middle of a unit")

    # ---- weights ----

    def prepare(self) -> None:
        """Begin to load the spans of the orders at hand, as far as there is room."""
        for order in self.orders:
            if order.loaded is None:
                order.loaded = self.shared(order) or (self.load(order) if self.free else None)

    def shared(self, order: Order) -> Loaded | None:
        """The weights that an earlier order at hand has, if it is of the same span and iteration."""
        for other in self.orders:
            if other.loaded and (other.span, other.source, other.run) == (order.span, order.source, order.run):
                other.loaded.users += 1
                return other.loaded
        return None

    def load(self, order: Order) -> Loaded:
        buffer = self.free.pop()
        flat, layers = self.buffers[buffer], list(range(*order.span))
        views = self.layout.weight_views(layers, flat)
        versions = self.store[f"version/{order.source}"][layers[0] : layers[-1] + 1]
        if int(versions.max()) != (version := int(versions.min())):
            raise RuntimeError(f"span {order.span} has weights of versions {versions.tolist()}; expected one")
        pairs = [(views[n][name], host) for n in layers for name, host in self.store.weights(n, order.source).items()]
        ticket = self.up.move(pairs, LATER, self.mark())
        parts: dict[str, nn.Module] = {}
        parameters: dict[int, dict[str, nn.Parameter]] = {}
        for layer in layers:
            shell = self.shell(buffer, layer)
            parameters[layer] = shell.adopt(layer, views[layer])
            parts[str(layer)] = shell.layers[str(layer)]
        self.most_held = max(self.most_held, _HELD - len(self.free))
        self.probe("upload", order.step)
        rotary = self.shell(buffer, layers[0]).rotary
        return Loaded(buffer, SpanModule(self.model, order.span, parts, rotary), parameters, ticket, version)

    def shell(self, buffer: int, layer: int) -> SpanModule:
        """A layer without weights, to be filled from a buffer."""
        if (buffer, layer) not in self.shells:
            empty = {n: nn.Parameter(torch.empty(s, device="meta")) for n, s in self.model.shapes(layer).items()}
            self.shells[buffer, layer] = self.model.build((layer, layer + 1), seed=0, device=self.device, share=empty)
        return self.shells[buffer, layer]

    def let_go(self, order: Order) -> None:
        """Give the buffer back, unless another order goes on with it."""
        assert order.loaded is not None
        order.loaded.users -= 1
        if not order.loaded.users:
            self.free.append(order.loaded.buffer)

    # ---- compute ----

    def run(self, order: Order) -> None:
        """All microbatches of a unit, and its commit."""
        assert order.loaded is not None
        if order.told is not None and isinstance(job := self.jobs[order.job], ToldJob):
            job.hear(order.step, order.told)
        began = time.monotonic()
        order.loaded.ticket.wait(self.settings.deadline_s)
        if time.monotonic() - began > 1e-4:
            order.events.append((str(Op(LOAD, order.span)), began, time.monotonic()))
        self.probe("uploaded", order.step)
        training = order.kinds != FORWARD or order.job == TRAIN
        order.loaded.module.train(training)
        with self.summing(order) if B in order.kinds else nullcontext() as gradient:
            for place, m in enumerate(order.microbatches):
                self.catch_up()
                if place == len(order.microbatches) // 2:
                    reading = order.job not in (TRAIN, EVALUATE)
                    self.probe(READING if reading else "forward" if gradient is None else "backward", order.step)
                took, out = self.forward(order, m) if gradient is None else self.backward(order, m, gradient)
                if m not in order.skip:
                    sums = None if out.sums is None else {term: float(value) for term, value in out.sums.items()}
                    self.tell(op=order.id, m=m, sums=sums, busy=took)
            if gradient is not None:
                self.commit(order, gradient)
        self.probe("commit", order.step)
        self.running = None  # what has been told cannot be recalled
        memory = peak_memory(self.device).as_json()
        self.tell(unit=order.id, version=order.loaded.version, events=order.events, held=self.most_held, memory=memory)
        self.probe("committed", order.step)

    @contextmanager
    def summing(self, order: Order) -> Iterator[Gradient]:
        """Inside, gradients are summed for an order: for no other, whoever shares its weights."""
        assert order.loaded is not None
        block = self.store[f"block/{order.block}"][: self.layout.gradient_size(order.span)]
        flat = block if self.gradient is None else self.gradient[: block.numel()]
        gradient = Gradient(flat.zero_(), block, self.store[f"tally/{order.block}"].zero_(), [])
        try:
            for layer, named in self.layout.gradient_views(list(range(*order.span)), flat).items():
                for name, view in named.items():
                    parameter = order.loaded.parameters[layer][name]
                    parameter.grad = view
                    gradient.views.append((parameter, view))
            yield gradient
        finally:
            for parameter, _ in gradient.views:
                parameter.grad = None

    def poison(self) -> None:
        """Make the gradient at hand not a number, as a fault would."""
        if self.running is not None and self.running.loaded is not None:
            held = [parameter for named in self.running.loaded.parameters.values() for parameter in named.values()]
            gradient = next((parameter.grad for parameter in held if parameter.grad is not None), None)
            if gradient is not None:
                gradient.view(-1)[0] = float("nan")

    def commit(self, order: Order, gradient: Gradient) -> None:
        """Have the gradient in its block, and say there for which order: on the CPU it was summed there."""
        if gradient.flat is not gradient.block:
            pairs = [(gradient.block, gradient.flat)]
            self.down.move(pairs, LATER, self.mark()).wait(self.settings.deadline_s)
        gradient.tally[0] = order.id

    def mark(self) -> Any:
        """What copies must wait for: all that has been queued for the device so far."""
        if not self.cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def fetch(self, order: Order, kind: str, m: int, layer: int, rows: int) -> Tensor:
        """A hidden state, or the gradient of one, once it is there. Raises TimeoutError."""
        self.wait_for(order, kind, m, layer)
        host = self.store[f"{kind}{order.side}/{m}/{layer}"][:rows]
        here = torch.empty(host.shape, device=self.device)
        self.up.move([(here, host)], URGENT, self.mark()).wait(self.settings.deadline_s)
        return here

    def give(self, order: Order, kind: str, m: int, values: Mapping[int, Tensor]) -> None:
        """Put hidden states of a microbatch (layer -> tensor) where others find them."""
        pairs = [
            (self.store[f"{kind}{order.side}/{m}/{layer}"][: y.shape[0]], y.detach().float())
            for layer, y in values.items()
        ]
        self.down.move(pairs, URGENT, self.mark()).wait(self.settings.deadline_s)

    def input(self, order: Order, batch: Batch, m: int) -> Tensor:
        lo = order.span[0]
        return self.fetch(order, "x", m, lo, len(batch.sample_ids)) if lo else batch["input_ids"]

    def output(self, order: Order, batch: Batch, x: Tensor, taps: dict[int, Tensor] | None = None) -> Output:
        assert order.loaded is not None
        job = self.jobs[order.job]
        if order.run not in self.terms:
            self.terms = {run: terms for run, terms in self.terms.items() if run >= order.run - 1}
            self.terms[order.run] = StepTerms.of(job, order.step, self.layout.microbatches, weights=order.weights)
        return compute(order.loaded.module, x, job, batch, order.step, self.terms[order.run], self.settings, taps=taps)

    def forward(self, order: Order, m: int) -> tuple[float, Output]:
        """A forward; returns the seconds that it took without waiting, and what came out."""
        batch = self.batch(order, m)
        x = self.input(order, batch, m)
        lo, hi = order.span
        inside = [layer for layer in self.layout.boundaries if lo < layer < hi and order.job == TRAIN]
        taps = dict.fromkeys(inside, x)
        with self.timed(order, F, m) as taken, torch.no_grad():
            out = self.output(order, batch, x, taps)
        if m not in order.skip:
            self.give(order, "x", m, {**taps, **({hi: out.y} if out.sums is None else {})})
        return taken[0], out

    def backward(self, order: Order, m: int, into: Gradient) -> tuple[float, Output]:
        """A backward, with the forward that it needs right before it."""
        batch, (lo, hi) = self.batch(order, m), order.span
        x = self.input(order, batch, m)
        x = x.requires_grad_() if lo else x
        with self.timed(order, R if order.kinds == BACKWARD else F, m) as first:
            out = self.output(order, batch, x)
        gradient: Tensor | None = None
        if hi < self.model.num_layers:
            gradient = self.fetch(order, "dx", m, hi, len(batch.sample_ids)).to(out.y.dtype)
        with self.timed(order, B, m) as second:
            if out.y.requires_grad:  # else all up to here is frozen
                torch.autograd.backward(out.y, gradient)
            into.add(m)
        if lo and m not in order.skip:
            assert x.grad is not None
            self.give(order, "dx", m, {lo: x.grad})
        return first[0] + second[0], out

    @contextmanager
    def timed(self, order: Order, kind: str, m: int) -> Iterator[list[float]]:
        """Notes an op; a worker that is to be slow takes its time."""
        taken: list[float] = [0.0]
        began = time.monotonic()
        yield taken
        if self.probe.slowdown > 1:
            time.sleep((self.probe.slowdown - 1) * (time.monotonic() - began))
        end = time.monotonic()
        taken[0] = end - began
        if len(order.events) < _EVENTS:
            order.events.append((str(Op(kind, order.span, m)), began, end))

    def batch(self, order: Order, m: int) -> Batch:
        return self.jobs[order.job].batch(order.step, m, needs(self.model, order.span)).to(self.device)
