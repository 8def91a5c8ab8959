"""A stateless worker between its host and its store: orders that share weights, orders that are taken back."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from jobs.text import TextJob
from pipeline.model.layered import LayeredModel
from pipeline.runtime.channel import Channel
from pipeline.runtime.compute import Settings
from pipeline.runtime.stateless import StatelessWorker
from pipeline.schedule.work_units import FUSED, Cut
from pipeline.state.host_optimizer import HostOptimizer
from pipeline.state.host_store import HostStore, StoreLayout, store_path
from pipeline.state.optimizer import OptimizerConfig
from tests.harness import random_tokens

CUT = Cut(((0, 2),), (2, 4), ((0, 2),))
MICROBATCHES = 4
PATIENCE_S = 20.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HostStore]:
    model = LayeredModel(
        LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=64, tie_word_embeddings=False,
        )
    )  # fmt: skip
    made = HostStore.create(StoreLayout(model, CUT, MICROBATCHES, 2, 8, blocks=4), store_path(tmp_path))
    optimizer = HostOptimizer(made, OptimizerConfig(), lambda *_: None)
    optimizer.initialise(0, None)
    optimizer.close()
    for m in range(MICROBATCHES):
        made[f"x0/{m}/2"].copy_(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(m)))
    yield made
    made.close()


class Host:
    """The host's end of the channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def order(self, number: int, microbatches: tuple[int, ...], facts: bool = True, run: int = 0) -> None:
        order = {
            "id": number, "run": run, "step": 0, "job": "train", "kinds": FUSED, "span": (2, 4), "source": "param",
            "microbatches": microbatches, "side": 0, "block": number, "skip": [],
        }  # fmt: skip
        self.channel.send({"do": order, "facts": [[run, "x", m, 2] for m in microbatches] if facts else []}, PATIENCE_S)

    def next(self, name: str) -> dict[str, Any]:
        """The next message that has a field."""
        while (message := self.channel.receive(PATIENCE_S)) is not None:
            assert "error" not in message, message
            if name in message:
                return message
        raise AssertionError(f"no {name} came")


@contextmanager
def working(store: HostStore) -> Iterator[Host]:
    """A worker that serves in a thread of its own."""
    job = TextJob(lambda i: random_tokens(64, 9, i), 8, microbatches=MICROBATCHES, size=2)
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    worker = StatelessWorker(
        0, store, {"train": job}, Settings(torch.device("cpu"), deadline_s=PATIENCE_S), Channel(theirs)
    )
    found: list[BaseException] = []

    def serve() -> None:
        try:
            worker.serve()
        except BaseException as error:
            found.append(error)
        finally:
            worker.channel.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    host = Host(Channel(mine))
    host.next("hello")
    try:
        yield host
    finally:
        host.channel.post({"end": True})
        thread.join(PATIENCE_S)
        host.channel.close()
        assert not thread.is_alive()
        assert not found, found


def gradient(store: HostStore, block: int) -> torch.Tensor:
    return store[f"block/{block}"].clone()


def test_an_order_that_is_taken_back_takes_nothing_from_the_one_that_shares_its_weights(store: HostStore) -> None:
    """Two orders of one span; the second waits and is recalled while the first is between two microbatches."""
    with working(store) as host:
        host.order(1, (0, 1, 2))
        host.next("unit")
        whole = gradient(store, 1)
        assert whole.abs().sum() > 0

        host.order(2, (0, 1, 2), facts=False, run=1)  # what is known of another run is nothing to it
        host.order(3, (3,), facts=False, run=1)
        host.channel.send({"facts": [[1, "x", 0, 2]]}, PATIENCE_S)
        host.next("op")  # the first microbatch of order 2 is done, and it waits for the second
        host.channel.send({"recall": 3}, PATIENCE_S)
        assert host.next("recalled")["recalled"] == 3
        host.channel.send({"facts": [[1, "x", 1, 2], [1, "x", 2, 2]]}, PATIENCE_S)
        assert host.next("unit")["unit"] == 2
        assert torch.equal(gradient(store, 2), whole)
        assert store.lacks(2, 2, (0, 1, 2)) == ""


def test_a_block_tells_what_was_added_to_it(store: HostStore) -> None:
    with working(store) as host:
        host.order(1, (0, 2))
        host.next("unit")
        assert store.lacks(1, 1, (0, 2)) == ""
        assert "microbatches [1] not once each" in store.lacks(1, 1, (0, 1, 2))
        assert "microbatches [2] not once each" in store.lacks(1, 1, (0,))
        assert "was not written for order 5, but for 1" in store.lacks(1, 5, (0, 2))

        host.order(2, (0, 1), facts=False)
        host.channel.send({"facts": [[0, "x", 0, 2]]}, PATIENCE_S)
        host.next("op")
        assert "was not written for order 2, but for 0" in store.lacks(2, 2, (0, 1)), "it is not complete"
        host.channel.send({"facts": [[0, "x", 1, 2]]}, PATIENCE_S)
        host.next("unit")


def test_a_gradient_that_autograd_has_put_elsewhere_is_no_gradient(
    store: HostStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever takes the views away from the parameters, the microbatch is not counted: the worker fails by name."""
    backward = torch.autograd.backward

    def losing(*args: Any, **kwargs: Any) -> None:
        backward(*args, **kwargs)
        for parameter in parameters:
            parameter.grad = None if parameter.grad is None else parameter.grad.clone()

    job = TextJob(lambda i: random_tokens(64, 9, i), 8, microbatches=MICROBATCHES, size=2)
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    worker = StatelessWorker(
        0, store, {"train": job}, Settings(torch.device("cpu"), deadline_s=PATIENCE_S), Channel(theirs)
    )
    host = Host(Channel(mine))
    host.order(1, (0, 1))
    worker.listen(PATIENCE_S)
    worker.loader.prepare(worker.orders, worker.probe)
    loaded = worker.orders[0].loaded
    assert loaded is not None
    parameters = [parameter for named in loaded.parameters.values() for parameter in named.values()]
    monkeypatch.setattr(torch.autograd, "backward", losing)
    with pytest.raises(RuntimeError, match="the gradient of microbatch 0 was not summed where it counts"):
        worker.run(worker.orders[0])
    assert "was not written for order 1" in store.lacks(1, 1, (0, 1))
    assert all(parameter.grad is None for parameter in parameters), "the next order finds nothing of this one"
    for end in (worker.up, worker.down, worker.channel, host.channel):
        end.close()
