"""What neighbours keep of a span: the last of committed steps, within a bound, of one generation."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.boundaries import Boundaries, Passage

SPAN = (2, 4)


def hidden(value: float, batch: int = 1) -> torch.Tensor:
    return torch.full((batch, 4, 8), value)


SIZE = 4 * 8 * 2
"""Bytes of one, in bfloat16."""


def test_what_is_kept_is_a_copy_in_bfloat16_once_its_step_is_committed() -> None:
    kept, given_ = Boundaries(10 * SIZE), hidden(1.0)
    kept.keep("into", SPAN, Passage(3, 0), given_)
    given_.zero_()
    assert kept.of("into", SPAN) == {}, "the step may still be run again"
    kept.committed()
    (found,) = kept.of("into", SPAN).values()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), hidden(1.0))
    assert kept.of("out of", SPAN) == {}
    assert kept.of("into", (4, 6)) == {}


def test_a_step_that_is_interrupted_leaves_nothing_and_makes_no_room() -> None:
    kept = Boundaries(2 * SIZE)
    for microbatch in range(2):
        kept.keep("into", SPAN, Passage(0, microbatch), hidden(0.0))
    kept.committed()
    for microbatch in range(2):
        kept.keep("into", SPAN, Passage(1, microbatch), hidden(1.0))
    kept.enter(0)
    kept.committed()
    assert list(kept.of("into", SPAN)) == [Passage(0, 0), Passage(0, 1)]


def test_nothing_of_another_generation_is_kept() -> None:
    kept = Boundaries(2 * SIZE)
    kept.keep("into", SPAN, Passage(0, 0), hidden(0.0))
    kept.committed()
    kept.enter(0)
    assert len(kept.of("into", SPAN)) == 1
    kept.enter(1)
    assert kept.of("into", SPAN) == {}
    assert kept.num_bytes == 0


@given(
    st.integers(0, 6 * SIZE),
    st.lists(st.tuples(st.sampled_from(["into", "out of"]), st.booleans()), max_size=30),
)
def test_the_bound_holds_and_what_is_left_is_the_last(limit: int, adds: list[tuple[str, bool]]) -> None:
    kept, order = Boundaries(limit), list[tuple[str, Passage]]()
    for step, (side, commits) in enumerate(adds):
        kept.keep(side, SPAN, Passage(step, 0), hidden(float(step)))  # type: ignore[arg-type]
        order.append((side, Passage(step, 0)))
        if commits:
            kept.committed()
        assert kept.num_bytes <= 2 * 2 * limit, "two sides, and a step under way that is no larger"
    kept.committed()
    for side in ("into", "out of"):
        found = kept.of(side, SPAN)
        assert sum(tensor.nbytes for tensor in found.values()) <= limit
        mine = [passage for each, passage in order if each == side]
        assert list(found) == mine[len(mine) - len(found) :]
        assert all(torch.equal(t.float(), torch.full_like(t.float(), p.step)) for p, t in found.items())
