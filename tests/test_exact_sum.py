"""Sums without an order: the same bits however microbatches are dealt, and a named end where they cannot be counted."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jobs.config import TrainConfig
from launch.forkserver import ForkServer
from pipeline.state.exact_sum import FRACTION, ExactSum
from tests.harness import Outcome, plain_training, relative_difference, run_workers
from tests.test_parity import MODELS, settings


def summed(parts: list[Tensor]) -> Tensor:
    each = ExactSum(torch.zeros_like(parts[0]))
    for part in parts:
        each.gradient.copy_(part)
        each.count(len(parts))
        assert not each.gradient.any()
    each.finish()
    assert not each.total.any(), "the next step begins at zero"
    return each.gradient


@given(st.integers(0, 2**32), st.integers(1, 9), st.floats(1e-9, 100))
def test_the_order_and_the_dealing_of_microbatches_change_no_bit(seed: int, count: int, scale: float) -> None:
    chance = random.Random(seed)
    made = torch.Generator().manual_seed(seed)
    parts = [torch.randn(37, generator=made) * scale for _ in range(count)]
    shuffled = chance.sample(parts, count)
    found = summed(parts)
    assert torch.equal(found, summed(shuffled))
    cut = chance.randrange(count + 1)  # two replicas, whose totals are added
    a, b = ExactSum(torch.zeros(37)), ExactSum(torch.zeros(37))
    for each, mine in ((a, shuffled[:cut]), (b, shuffled[cut:])):
        for part in mine:
            each.gradient.copy_(part)
            each.count(count)
    a.total += b.total
    a.finish()
    assert torch.equal(found, a.gradient)
    expected = torch.stack(parts).double().sum(0)
    rounded = count * 2.0 ** -(FRACTION + 1)  # of each microbatch, and then fp32's of the sum
    assert ((found - expected).abs() <= rounded + expected.abs() * 2.0**-24).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 2.0**14])
def test_what_cannot_be_counted_is_no_number_afterwards(value: float) -> None:
    each = ExactSum(torch.zeros(5))
    each.gradient[3] = value
    each.count(1)
    assert each.beyond
    each.finish()
    assert each.gradient.isnan().any()
    each.drop()
    assert not each.beyond, "the step did not count"


# ---- engine ----


@cache
def reference(model: str) -> Outcome:
    return plain_training(settings(), MODELS[model])


LAYOUTS = [
    pytest.param(*layout, marks=() if fast else pytest.mark.long)
    for fast, layouts in (
        (True, [("one_f_one_b", 4, 2), ("zero_bubble", 3, 1), ("one_f_one_b", 1, 1)]),
        (False, [("gpipe", 2, 1), ("interleaved", 2, 1), ("balanced", 3, 1), ("zero_bubble", 4, 4)]),
    )
    for layout in layouts
]
_first: dict[str, Outcome] = {}


@pytest.mark.parametrize(("scheduler", "workers", "replicas"), LAYOUTS)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_every_layout_gives_the_same_bits(
    forkserver: ForkServer, tmp_path: Path, model: str, scheduler: str, workers: int, replicas: int
) -> None:
    """GPT-2's embedding and head share a weight, whose gradients come from two workers, or from one."""
    config: TrainConfig = settings(scheduler=scheduler, workers=workers, replicas=replicas, exact_sums=True)
    found = run_workers(forkserver, config, MODELS[model], tmp_path / "run")
    first = _first.setdefault(model, found)
    assert found.losses == first.losses
    assert found.norms == first.norms
    assert all(torch.equal(found.weights[name], first.weights[name]) for name in first.weights)
    assert relative_difference(found.weights, reference(model).weights) <= 1e-5
