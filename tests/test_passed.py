"""What passed through blocks: the error, and that cutting and merging it changes nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.model.passed import Passed, merged, relative_error, tokens_of
from tests.passed_blocks import LLAMA, blocks


def gives(what: Any) -> Any:
    """A module that makes this of x."""
    return lambda x, **_: what(x)


def test_the_error_is_that_of_each_token_weighed_by_its_norm() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 16, generator=draw), torch.randn(2, 3, 16, generator=draw)
    y[0, 0] *= 100
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    pair, counted = Passed(x, y, mask), mask.bool()
    missing, norms = (y - x).norm(dim=-1)[counted], y.norm(dim=-1)[counted]
    expected = float((missing.square() / norms).sum() / norms.sum())
    assert relative_error(gives(lambda x: x), [pair]) == pytest.approx(expected, rel=1e-5)
    assert relative_error(gives(torch.zeros_like), [pair]) == pytest.approx(1.0)
    beats = list[None]()
    assert relative_error(gives(lambda _: y), [pair, pair], lambda: beats.append(None)) == 0.0
    assert len(beats) == 2
    assert tokens_of([pair, pair]) == 10


def passed(batch: int, length: int, mask: Tensor | None = None, positions: Tensor | None = None) -> Passed:
    """Through two blocks, which are always the same."""
    x = torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        return Passed(x, blocks(LLAMA, 0)(x, attention_mask=mask, position_ids=positions), mask, positions)


def test_rows_apart_and_together_again_are_what_they_were() -> None:
    padded = torch.ones(2, 8, dtype=torch.int64)
    padded[0, 6:], padded[1, 3:] = 0, 0
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])  # of all rows
    by_row = torch.stack([torch.arange(8), torch.arange(8) + 5])
    pairs = [
        passed(2, 8), passed(2, 8, padded), passed(3, 5), passed(2, 8, None, packed), passed(2, 8, None, by_row),
        passed(2, 8, padded, by_row), passed(1, 8),
    ]  # fmt: skip
    rows = [pair.rows(i, i + 1) for pair in pairs for i in range(pair.x.shape[0])]
    together = merged(rows, 16)
    assert [tuple(part.x.shape[:2]) for part in merged([passed(1, 5)] * 5, 8)] == [(2, 5), (2, 5), (1, 5)]
    for parts in (pairs, rows, together):
        assert tokens_of(parts) == 3 * 16 + 2 * 9 + 15 + 8
        assert relative_error(blocks(LLAMA, 0), parts) < 1e-9
    assert len(together) < len(rows)
    assert [len(part.x) for part in merged(pairs[3:4] * 2, 99)] == [2, 2], "ids of another batch keep it apart"


def test_a_pair_knows_what_it_was_given() -> None:
    seen: list[Any] = []
    mask, positions = torch.ones(2, 4, dtype=torch.int64), torch.arange(4)[None]
    pair = Passed(torch.zeros(2, 4, 16, dtype=torch.bfloat16), torch.ones(2, 4, 16), mask, positions)
    pair.error(lambda x, **given: seen.append(SimpleNamespace(x=x, **given)) or x)  # type: ignore[arg-type,func-returns-value]
    (given,) = seen
    assert given.x.dtype == torch.float32
    assert given.attention_mask is mask
    assert given.position_ids is positions
