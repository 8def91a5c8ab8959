"""A step asks its device for numbers once: nothing else in it waits for the device, and times are the device's own."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model.layered import LayeredModel
from pipeline.runtime import device_time, step_commit, worker
from pipeline.runtime.compute import Settings
from pipeline.runtime.device_time import Clock, read_back
from pipeline.runtime.reducer import Reducer
from pipeline.runtime.step_commit import StepCommit
from pipeline.runtime.transport import Transport
from pipeline.runtime.worker import StepResult, Worker
from pipeline.schedule.layout import Excerpt
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.resident import ResidentStore
from tests.test_terms import CONFIG, SPANS, Mixed, alone, route

ASKS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.is_nonzero"}
"""What waits for a device to have computed: `.item()`, float(), bool(), and shapes that follow from values."""


ROOT = Path(__file__).parent.parent
ON_THE_HOST = {("test_terms.py", "counts"), ("layered.py", "build")}
"""What reads tensors that never were on a device, as does who reads `lr_scale`; and what is done once, before any
step."""


class Asking(TorchDispatchMode):
    """Notes every operator that asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        if name in ASKS:
            frames = [
                f for f in traceback.extract_stack() if str(ROOT) in f.filename and "site-packages" not in f.filename
            ][:-1]
            known = any((Path(frame.filename).name, frame.name) in ON_THE_HOST for frame in frames)
            if not known and "float(self.lr_scale)" not in str(frames[-1].line):
                self.asked.append(f"{name} in {frames[-1].name}")
        return func(*args, **(kwargs or {}))


def step(device: torch.device, autocast: torch.dtype | None, split: bool, exact: bool, clip: float) -> StepResult:
    """One step of a small model on one worker, with terms of two kinds."""
    store = ResidentStore(
        LayeredModel(CONFIG), SPANS, OptimizerConfig(clip=clip, warmup_steps=0), seed=3, device=device, exact=exact
    )

    def myself(_: int, payload: dict[str, Any], deadline: float, combine: Any, voted: Any = None) -> Any:
        return json.loads(json.dumps(combine({0: json.loads(json.dumps(payload))})))

    one = Worker(
        0, store, Transport(0), Reducer(0, store.summed), StepCommit(myself), Settings(device, 3, autocast)
    )  # fmt: skip
    job = Mixed(["forget", "retain", "retain", "forget"], both=True)
    schedule = alone([route(*SPANS)] * 4, split)
    return one.run(Excerpt.of(schedule, 0), job, 0, record=True)


every = pytest.mark.parametrize(
    ("autocast", "split", "exact", "clip"),
    [
        (None, False, False, 1.0), (None, True, False, 0.0), (None, False, True, 0.01),
        (torch.bfloat16, False, False, 1.0), (torch.bfloat16, True, False, 0.01),
    ],
)  # fmt: skip


@every
def test_a_step_asks_its_device_once(
    monkeypatch: pytest.MonkeyPatch, autocast: torch.dtype | None, split: bool, exact: bool, clip: float
) -> None:
    asked: list[int] = []

    def counted(numbers: Mapping[Any, Any]) -> dict[Any, float]:
        asked.append(sum(isinstance(value, torch.Tensor) for value in numbers.values()))
        return read_back(numbers)

    for module in (worker, step_commit):
        monkeypatch.setattr(module, "read_back", counted)
    with Asking() as asking:
        result = step(torch.device("cpu"), autocast, split, exact, clip)
    assert asking.asked == []
    assert [count for count in asked if count] == [4 + 2 + len(SPANS) + 2 + (len(SPANS) if exact else 0)]
    assert result.means.keys() == {"forget", "retain", "flat"}
    assert result.grad_norm > 0
    assert all(0 <= event.start <= event.end for event in result.events)


def test_asking_is_noticed() -> None:
    with Asking() as asking:
        assert float(torch.ones(())) == 1.0
        assert bool(torch.ones(2)[0] > 0)
    assert asking.asked == ["aten._local_scalar_dense in test_asking_is_noticed"] * 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every
def test_a_step_on_cuda_does_not_synchronise(
    monkeypatch: pytest.MonkeyPatch, autocast: torch.dtype | None, split: bool, exact: bool, clip: float
) -> None:
    """torch.cuda.set_sync_debug_mode raises at every call that waits, but in the places that may."""

    def allowed(function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*arguments: Any) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            try:
                return function(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        return inside

    monkeypatch.setattr(worker, "read_back", allowed(read_back))
    monkeypatch.setattr(device_time.Clock, "seconds", allowed(Clock.seconds))
    made = ResidentStore.__init__
    monkeypatch.setattr(ResidentStore, "__init__", allowed(made))
    step(torch.device("cuda:0"), autocast, split, exact, clip)  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(torch.device("cuda:0"), autocast, split, exact, clip)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.grad_norm > 0
    assert any(event.end > event.start for event in result.events)


def test_numbers_are_read_as_they_are() -> None:
    values = torch.rand(5).tolist()
    assert read_back({}) == {}
    assert read_back({i: torch.tensor(value) for i, value in enumerate(values)}) == dict(enumerate(values))
    mixed = {"a": torch.tensor(0.1), "b": torch.tensor(True), "c": 2.5, "d": torch.tensor(1e300, dtype=torch.float64)}
    assert read_back(mixed) == {"a": torch.tensor(0.1).item(), "b": 1.0, "c": 2.5, "d": 1e300}
