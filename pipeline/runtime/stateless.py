"""A worker that holds nothing: it takes work units, loads their spans from the host store, and gives back results.

It knows no other worker and no schedule. Orders and facts ("the input of layer 5 of microbatch 3 is there") come over
one socket as JSON, and so do its answers; numbers move through the store alone. Whatever it has not answered for may be
done again by another: hidden states are the same bits again, and a gradient counts when its block is accepted, which
carries a tally of what was added to it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.batch import Batch, Job, ToldJob
from pipeline.runtime.channel import Channel, ChannelClosed, ChannelFull
from pipeline.runtime.compute import Output, Settings, compute, needs
from pipeline.runtime.copy_engine import URGENT, CopyEngine, Ticket
from pipeline.runtime.device_time import Clock
from pipeline.runtime.handover import Handover, Results
from pipeline.runtime.orders import Gradient, Order
from pipeline.runtime.peak_flops import Capability
from pipeline.runtime.peak_memory import peak_memory
from pipeline.runtime.probe import READING, Probe, Unprobed
from pipeline.runtime.span_loader import SpanLoader
from pipeline.runtime.terms import StepTerms
from pipeline.schedule.layout import EVALUATE, TRAIN
from pipeline.schedule.ops import LOAD, B, F, Op, R
from pipeline.schedule.work_units import BACKWARD, FORWARD
from pipeline.state.host_store import HostStore


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
        self.loader = SpanLoader(store, self.device, self.up)
        self.handover = Handover(store, self.device, self.down, self.tell, self.fail, settings.deadline_s)
        self.gradient: Gradient | None = None
        """That which is summed."""
        self.coming: dict[tuple[str, int, int], tuple[Tensor, Ticket]] = {}
        """What the unit at hand needs, and is being loaded: by kind, microbatch and layer."""
        self.clock = Clock(self.device)
        self.failed: BaseException | None = None
        self._telling = threading.Lock()
        self.orders: deque[Order] = deque()
        self.facts: set[tuple[int, str, int, int]] = set()  # run, x or dx, microbatch, layer
        self.terms: dict[int, StepTerms] = {}  # by run
        self.running: Order | None = None

    def serve(self) -> None:
        """Answer orders until the host says that it is over. Raises PoolClosed when the host is gone."""
        self.tell(hello=self.id, capability=Capability.of(self.settings, self.id).as_json())
        try:
            while True:
                while not self.orders:
                    if self.listen(None):
                        return
                self.loader.prepare(self.orders, self.probe)
                order = self.orders[0]
                try:
                    self.running = order
                    self.run(order)
                except Recalled:
                    self.tell(recalled=order.id)
                self.running = None
                self.orders.popleft()
                self.loader.let_go(order)
        except PoolClosed:
            if self.failed is not None:
                raise self.failed from None
            raise
        finally:
            self.up.close()
            self.down.close()

    # ---- talking ----

    def fail(self, error: BaseException) -> None:
        """Something has failed on the thread that copies: it ends the worker where that listens."""
        self.failed = self.failed or error
        with suppress(OSError):
            self.channel.socket.shutdown(socket.SHUT_RD)

    def tell(self, **message: Any) -> None:
        """Send one message. Raises PoolClosed."""
        try:
            with self._telling:
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
            self.loader.prepare(self.orders, self.probe)
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
            self.loader.let_go(order)
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
        if self.clock.idle:
            self.clock = Clock(self.device)
        self.probe("uploaded", order.step)
        training = order.kinds != FORWARD or order.job == TRAIN
        order.loaded.module.train(training)
        self.coming.clear()
        with self.handover.summing(order) if B in order.kinds else nullcontext() as self.gradient:
            gradient = self.gradient
            for place, m in enumerate(order.microbatches):
                self.catch_up()
                if place == len(order.microbatches) // 2:
                    reading = order.job not in (TRAIN, EVALUATE)
                    self.probe(READING if reading else "forward" if gradient is None else "backward", order.step)
                for ahead in order.microbatches[place : place + 2]:
                    self.begin_fetching(order, ahead)
                results = self.forward(order, m) if gradient is None else self.backward(order, m, gradient)
                self.handover.give(order, m, results)
        self.gradient = None
        self.running = None  # what is on its way cannot be recalled
        memory = peak_memory(self.device).as_json()
        about = {"version": order.loaded.version, "held": self.loader.most_held, "memory": memory}
        self.handover.commit(order, gradient, self.probe, **about)

    def poison(self) -> None:
        """Make the gradient at hand not a number, as a fault would."""
        if self.gradient is not None and self.running is not None:
            self.gradient.flat[:1] = float("nan")

    # ---- a microbatch ----

    def begin_fetching(self, order: Order, m: int) -> None:
        """Begin to load what a microbatch needs, as far as it is there."""
        lo, hi = order.span
        wanted = [("x", lo)] if lo else []
        if B in order.kinds and hi < self.model.num_layers:
            wanted.append(("dx", hi))
        for kind, layer in wanted:
            if (order.run, kind, m, layer) in self.facts and (kind, m, layer) not in self.coming:
                self.coming[kind, m, layer] = self.fetching(order, kind, m, layer)

    def fetching(self, order: Order, kind: str, m: int, layer: int) -> tuple[Tensor, Ticket]:
        """A hidden state that is being loaded."""
        host = self.store[f"{kind}{order.side}/{m}/{layer}"]
        here = self.up.empty(host.nbytes).view(host.dtype).view(host.shape)
        return here, self.up.move([(here, host)], URGENT)

    def fetch(self, order: Order, kind: str, m: int, layer: int, rows: int) -> Tensor:
        """A hidden state, or the gradient of one, once it is there. Raises TimeoutError."""
        self.wait_for(order, kind, m, layer)
        here, ticket = self.coming.pop((kind, m, layer), None) or self.fetching(order, kind, m, layer)
        ticket.wait(self.settings.deadline_s)
        return here[:rows]

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

    def forward(self, order: Order, m: int) -> Results:
        """A forward, and the hidden states that others begin with."""
        batch = self.batch(order, m)
        x = self.input(order, batch, m)
        lo, hi = order.span
        inside = [layer for layer in self.layout.boundaries if lo < layer < hi and order.job == TRAIN]
        taps = dict.fromkeys(inside, x)
        found = Results(self.clock)
        with self.timed(found, F), torch.no_grad():
            out = self.output(order, batch, x, taps)
        found.sums = out.sums
        states = {**taps, **({hi: out.y} if out.sums is None else {})}
        found.states = {("x", layer): state for layer, state in states.items()}
        return found

    def backward(self, order: Order, m: int, into: Gradient) -> Results:
        """A backward, with the forward that it needs right before it."""
        batch, (lo, hi) = self.batch(order, m), order.span
        x = self.input(order, batch, m)
        x = x.requires_grad_() if lo else x
        found = Results(self.clock)
        with self.timed(found, R if order.kinds == BACKWARD else F):
            out = self.output(order, batch, x)
        found.sums = out.sums
        gradient: Tensor | None = None
        if hi < self.model.num_layers:
            gradient = self.fetch(order, "dx", m, hi, len(batch.sample_ids)).to(out.y.dtype)
        with self.timed(found, B):
            if out.y.requires_grad:  # else all up to here is frozen
                torch.autograd.backward(out.y, gradient)
            into.add(m)
        if lo:
            assert x.grad is not None
            found.states = {("dx", lo): x.grad}
        return found

    @contextmanager
    def timed(self, results: Results, kind: str) -> Iterator[None]:
        """Notes an op; a worker that is to be slow takes its time."""
        began = self.clock.mark()
        yield
        if self.probe.slowdown > 1:
            time.sleep((self.probe.slowdown - 1) * self.clock.seconds(began, self.clock.mark()))
        results.timed.append((kind, began, self.clock.mark()))

    def batch(self, order: Order, m: int) -> Batch:
        return self.jobs[order.job].batch(order.step, m, needs(self.model, order.span)).to(self.device)
