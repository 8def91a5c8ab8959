"""A lane whose iteration has ended does nothing more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.runtime.lane_executor import LaneExecutor
from pipeline.runtime.mailbox import LinkError
from pipeline.runtime.probe import Unprobed
from pipeline.schedule.ops import RECV, F, Op


def test_nothing_is_begun_once_a_new_view_has() -> None:
    ops, done, reason = (
        [Op(RECV, (0, 1), m, 1, Op(F, (0, 1), m)) for m in range(4)],
        list[int](),
        list[str | None]([None]),
    )
    lane: Any = SimpleNamespace(
        ops=tuple(ops), excerpt=SimpleNamespace(routes={}), model=None, probe=Unprobed(), step=3, place=0,
        settings=SimpleNamespace(recompute=False, compiled=False, device=torch.device("cpu")), ended=lambda: reason[0],
    )  # fmt: skip
    executor = LaneExecutor(lane)

    def receive(op: Op) -> None:
        done.append(op.microbatch)
        if op.microbatch == 1:
            reason[0] = "view 2 has begun"

    executor.handlers[RECV] = receive
    with pytest.raises(LinkError, match=r"#2\)<1 was not begun: view 2 has begun"):
        executor.execute()
    assert done == [0, 1]
