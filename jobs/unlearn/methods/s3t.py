"""Exact unlearning of a run of slices (S3T; Basu Roy Chowdhury et al., ICLR 2025, arXiv 2406.16257): the adapters that
have seen the rows' slices are left out, and nothing is trained. See jobs.s3t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jobs.unlearn.method import Goal, Method, State


@dataclass(frozen=True)
class S3T(Method):
    """No steps: what is left has never seen the rows."""

    name: ClassVar[str] = "s3t"
    goal: ClassVar[Goal] = "untraining"
    kinds: ClassVar[tuple[str, ...]] = ()

    def terms(self, state: State) -> Mapping[str, float]:
        """None."""
        return {}
