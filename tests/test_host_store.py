"""The host store, the copies between it and a device, and the optimizer beside the pipeline."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from pipeline.model.layered import LayeredModel
from pipeline.runtime.copy_engine import LATER, URGENT, CopyEngine, chunks
from pipeline.schedule.work_units import Cut
from pipeline.state.host_optimizer import HostOptimizer
from pipeline.state.host_store import HostMemoryError, HostStore, StoreLayout, store_path
from pipeline.state.optimizer import OptimizerConfig

CUT = Cut(((0, 2),), (2, 4), ((0, 2),))


@pytest.fixture(scope="module")
def model() -> LayeredModel:
    return LayeredModel(
        LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=64, tie_word_embeddings=True,
        )
    )  # fmt: skip


def layout(model: LayeredModel, **changes: object) -> StoreLayout:
    values = {"microbatches": 2, "batch": 1, "sequence": 8, "blocks": 3, **changes}
    return StoreLayout(model, CUT, **values)  # type: ignore[arg-type]


def test_every_tensor_has_a_place_of_its_own(model: LayeredModel) -> None:
    for behind in (False, True):
        made = layout(model, behind=behind)
        places = [(at, name) for name, (at, _, _) in made.places.items() if name not in ("travels", "end")]
        assert places == sorted(places, key=lambda place: place[0])
        assert len({at for at, _ in places}) == len(places)
        weights = sum(model.parameter_count(layer) for layer in range(model.num_layers))
        assert made.num_bytes >= 4 * weights * (6 if behind else 4)
        assert ("read1/model.norm.weight" in made.places) == behind


def test_what_is_written_outlives_a_killed_writer_and_is_seen_again(model: LayeredModel, tmp_path: Path) -> None:
    made, path = layout(model), store_path(tmp_path)
    store = HostStore.create(made, path)
    try:
        child = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(made, path))
        child.start()
        child.join(20)
        assert child.exitcode == -signal.SIGKILL
        again = HostStore(made, path)
        assert torch.equal(again["x0/1/2"], torch.full((1, 8, 16), 7.0))
        again["x0/1/2"].fill_(8.0)
        assert float(store["x0/1/2"].mean()) == 8.0
    finally:
        store.close()
    assert not path.exists()


def _write_and_die(made: StoreLayout, path: Path) -> None:
    HostStore(made, path)["x0/1/2"].fill_(7.0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_store_in_use_is_refused_and_one_that_was_left_is_replaced(model: LayeredModel, tmp_path: Path) -> None:
    made, path = layout(model), store_path(tmp_path)
    store = HostStore.create(made, path)
    with pytest.raises(HostMemoryError, match="is in use: another run trains in the same folder"):
        HostStore.create(made, path)
    with pytest.raises(HostMemoryError, match=r"found \d+ bytes; this run's has \d+ bytes"):
        HostStore(layout(model, blocks=4), path)
    store["block/0"].fill_(1.0)
    os.close(store._lock)  # as when its process was killed
    store._lock = -1
    new = HostStore.create(made, path)
    assert float(new["block/0"].abs().max()) == 0.0
    new.close()
    with pytest.raises(HostMemoryError, match="found nothing"):
        HostStore(made, path)


def test_too_little_memory_is_refused_by_numbers(
    model: LayeredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(HostMemoryError, match=r"host memory: 0\.00 GiB are needed, 0\.00 GiB are available in"):
        HostStore.create(layout(model), store_path(tmp_path))
    assert not store_path(tmp_path).exists()


def test_urgent_copies_wait_for_one_chunk_at_most() -> None:
    mover = CopyEngine(torch.device("cpu"), "test", chunk=1 << 20)
    try:
        source, target = torch.randn(8 << 20), torch.empty(8 << 20)
        small = torch.randn(16), torch.empty(16)
        later = mover.move([(target, source)], LATER)
        urgent = mover.move([(small[1], small[0])], URGENT)
        urgent.wait(10)
        assert torch.equal(*small)
        later.wait(10)
        assert torch.equal(target, source)
        order = [urgency for _, urgency in mover.copied]
        assert order.count(LATER) == 32
        assert order.index(URGENT) < 31
    finally:
        mover.close()


def test_a_copy_that_fails_is_told_where_it_is_waited_for() -> None:
    mover = CopyEngine(torch.device("cpu"), "test")
    try:
        with pytest.raises(RuntimeError, match="size of tensor"):
            mover.move([(torch.empty(3), torch.empty(4))], URGENT).wait(10)
        mover.move([(torch.empty(3), torch.empty(3))], URGENT).wait(10)
        assert len(chunks(torch.empty(10, 10).t(), torch.empty(10, 10).t(), 8)) == 1
    finally:
        mover.close()


@pytest.mark.parametrize("behind", [False, True])
def test_versions_and_sides(model: LayeredModel, tmp_path: Path, behind: bool) -> None:
    store = HostStore.create(layout(model, behind=behind), store_path(tmp_path))
    optimizer = HostOptimizer(store, OptimizerConfig(lr=0.1, warmup_steps=0), lambda *_: None)
    try:
        optimizer.initialise(0, None)
        history = [{n: t.clone() for n, t in optimizer.weights(1).items()}]
        for step in range(3):
            source = f"read{(step + 1) % 2}" if behind else "param"
            version = max(0, step - 1) if behind else step
            assert optimizer.version((0, 4), source) == version
            assert all(torch.equal(store[f"{source}/{n}"], t) for n, t in history[version].items())
            store["block/0"].fill_(0.5)
            for span in ((2, 4), (0, 2)):
                optimizer.add(0, span)
            optimizer.measure(step)
            optimizer.update(step, 1.0, 0.1)
            optimizer.drain(10)
            history.append({n: t.clone() for n, t in optimizer.weights(1).items()})
            assert float(store["grad/3"].abs().max()) == 0.0
        assert optimizer.updates == 3
    finally:
        optimizer.close()
        store.close()


@pytest.mark.parametrize("behind", [False, True])
def test_what_is_multiplied_travels_narrow(tmp_path: Path, model: LayeredModel, behind: bool) -> None:
    """Linear maps in bf16, the embedding and norms in fp32; a tied weight in both. Copies follow every update."""
    half = layout(model, behind=behind, compute=torch.bfloat16, gradients=torch.bfloat16)
    tied = "model.embed_tokens.weight"
    assert half.travels(0) == {tied: torch.float32}
    assert half.travels(3) == {"model.norm.weight": torch.float32, tied: torch.bfloat16}
    kinds = {name.partition("layers.0.")[2]: dtype for name, dtype in half.travels(1).items()}
    assert {name for name, dtype in kinds.items() if dtype == torch.float32} == {
        "input_layernorm.weight", "post_attention_layernorm.weight"
    }  # fmt: skip
    full = layout(model, behind=behind)
    before = {name for name, (at, _, _) in half.places.items() if at < half.travelling}
    wide = {"model.norm.weight", tied, *(f"model.layers.0.{name}" for name, d in kinds.items() if d == torch.float32)}
    assert all(name.startswith(("exp_avg", "grad/", "param/")) for name in before)
    assert not {f"param/{name}" for name in wide} & before, "what travels as it is"
    assert {f"param/model.layers.0.{name}" for name, d in kinds.items() if d != torch.float32} <= before
    assert half.weight_bytes((1, 3)) < 0.55 * full.weight_bytes((1, 3))
    store = HostStore.create(half, store_path(tmp_path))
    optimizer = HostOptimizer(store, OptimizerConfig(lr=0.1, warmup_steps=0), lambda *_: None)
    try:
        optimizer.initialise(0, None)
        history: list[dict[str, torch.Tensor]] = []
        for step in range(3):
            source = f"read{(step + 1) % 2}" if behind else "param"
            now = {name: t.clone() for n in range(4) for name, t in optimizer.weights(n).items()}
            history.append(now)
            read = history[max(0, step - 1)] if behind else now
            for n in range(4):
                for name, weight in store.weights(n, source).items():
                    assert weight.dtype == half.travels(n)[name]
                    assert torch.equal(weight, read[name].to(weight.dtype))
            store["block/0"].fill_(0.5)
            for span in ((2, 4), (0, 2)):
                optimizer.add(0, span)
            optimizer.measure(step)
            optimizer.update(step, 1.0, 0.1)
            optimizer.drain(10)
            after = {name: t for n in range(4) for name, t in optimizer.weights(n).items()}
            for n in range(4):
                views = half.weight_views([n], torch.empty(half.weight_bytes((n, n + 1)), dtype=torch.uint8))[n]
                assert {name: view.dtype for name, view in views.items()} == half.travels(n)
                for name, weight in store.weights(n).items():
                    assert torch.equal(weight, after[name].to(weight.dtype))
    finally:
        optimizer.close()
        store.close()


def test_the_memory_of_a_killed_host_is_found_again(model: LayeredModel, tmp_path: Path) -> None:
    path = store_path(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=_host_and_die, args=(layout(model), path))
    child.start()
    child.join(20)
    assert path.exists()
    began = time.monotonic()
    HostStore.create(layout(model), path).close()
    assert time.monotonic() - began < 10
    assert not path.exists()


def _host_and_die(made: StoreLayout, path: Path) -> None:
    HostStore.create(made, path)
    os.kill(os.getpid(), signal.SIGKILL)
