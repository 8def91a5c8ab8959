"""A checksum that any change of a bit changes, wherever tensors begin and end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.state.checksum import _COLUMNS, _ROWS, _odd, _odd_of, checksum

SIZES = [1, 3, 4, 5, 7, 9, 4 * _COLUMNS - 4, 4 * _COLUMNS, 4 * _COLUMNS + 6, 4 * _COLUMNS * _ROWS + 4]


def noise(size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_every_bit_counts(size: int) -> None:
    data = noise(size)
    was = checksum([data])
    assert was == checksum([data.clone()])
    places = {0, 1, size // 2, size - 2, size - 1} & set(range(size))
    for place in places:
        for bit in range(8):
            data[place] ^= 1 << bit
            assert checksum([data]) != was
            data[place] ^= 1 << bit
    assert checksum([data]) == was
    assert checksum([data], "3/1") != was


@given(st.lists(st.integers(0, 200), min_size=1, max_size=5), st.integers(0, 2**31), st.data())
def test_where_it_lies_counts(sizes: list[int], seed: int, data: st.DataObject) -> None:
    """Other borders, another order, or two bytes that change places."""
    parts = [noise(size, seed + i) for i, size in enumerate(sizes)]
    was = checksum(parts)
    whole = torch.cat(parts)
    if len(parts) > 1:
        assert checksum([whole]) != was
        assert checksum([*parts, torch.empty(0, dtype=torch.uint8)]) != was
    if len(whole) > 1:
        a, b = data.draw(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, len(whole) - 1)))
        other = whole.clone()
        other[a], other[b] = whole[b].item(), whole[a].item()
        assert (checksum(other.split(sizes)) == was) == torch.equal(other, whole)


@pytest.mark.parametrize("bit", [0, 30, 31])
def test_two_changes_do_not_hide_each_other(bit: int) -> None:
    """Signs of two numbers too, wherever they stand."""
    values = torch.randn(3 * _COLUMNS)
    words, was = values.view(torch.int32), checksum([values])
    for other in (1, 2, 3, 7, _COLUMNS - 1, _COLUMNS, _COLUMNS + 1, 3 * _COLUMNS - 1):
        for place in (0, other):
            words[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
        assert checksum([values]) != was
        for place in (0, other):
            words[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert checksum([values]) == was


def test_it_is_that_of_the_numbers_wherever_they_lie() -> None:
    data = torch.randn(100, 7)
    assert checksum([data.t()]) == checksum([data.t().contiguous()])
    assert checksum([data]) != checksum([data.t()])
    odd = torch.empty(8 * 50 + 4, dtype=torch.uint8)[4:]  # not on a border of 8 bytes
    odd.copy_(noise(400))
    assert checksum([odd]) != checksum([odd.flip(0)])


def test_all_factors_are_odd() -> None:
    cpu = torch.device("cpu")
    for factors in (_odd(_COLUMNS, 0, cpu), _odd(_ROWS + 1, 1 << 32, cpu)):
        assert bool((factors & 1).all())
        assert len(factors.unique()) == len(factors)
    assert all(_odd_of(place) % 2 for place in range(-50, 50))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", SIZES)
def test_a_device_counts_as_the_cpu(size: int) -> None:
    assert checksum([noise(size).cuda()]) == checksum([noise(size)])
