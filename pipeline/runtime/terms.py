"""The arithmetic of a step's terms: what each sum is divided by, and what a layer's gradient is, that not all visit.

The gradient of term t on a layer is terms[t] * (sum over the microbatches that visit it) / (count of t over those). So
that one backward serves all terms, a microbatch's loss is divided by the counts of the whole step, and a layer's
gradient then by its *share*: the part of the count that came by. Where all microbatches visit, the share is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from pipeline.runtime.batch import Job


class TermError(ValueError):
    """A job whose terms do not fit its schedule, or each other. Names both."""


@dataclass(frozen=True)
class StepTerms:
    """The terms of one step. `counts[m]` are those of microbatch m; `visits[layer]` the microbatches that come by, and
    is empty where none skips what another visits."""

    weights: Mapping[str, float]
    counts: tuple[Mapping[str, int], ...]
    visits: Mapping[int, frozenset[int]] = field(default_factory=dict)
    totals: Mapping[str, int] = field(init=False)
    _shares: dict[int, dict[str, Fraction]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        found = dict.fromkeys(self.weights, 0)
        for m, counts in enumerate(self.counts):
            for term, count in counts.items():
                if term not in found:
                    raise TermError(f"microbatch {m} counts for term {term!r}; the job has {', '.join(self.weights)}")
                found[term] += count
        object.__setattr__(self, "totals", found)

    @classmethod
    def of(
        cls, job: Job, step: int, microbatches: int, visits: Mapping[int, frozenset[int]] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> StepTerms:  # fmt: skip
        """Those of a job's step; `weights` are given where the job itself is not up to date. Raises TermError."""
        return cls(
            job.terms if weights is None else weights,
            tuple(job.counts(step, m) for m in range(microbatches)),
            visits or {},
        )

    def scaled(self, sums: Mapping[str, Tensor]) -> Tensor:
        """The scalar whose backward is that of a microbatch with these sums. A term that nothing counts for is 0."""
        parts = [self.weights[term] / max(1, self.totals[term]) * value for term, value in sums.items()]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def loss(self, sums: Mapping[str, float]) -> float:
        """What is minimised, from the sums over the whole step."""
        return sum(self.weights[term] * value / max(1, self.totals[term]) for term, value in sums.items())

    def _shares_of(self, layer: int) -> dict[str, Fraction]:
        """Term -> the share of its count that comes by a layer; terms of which nothing does are left out."""
        if not self.visits:
            return {}
        if layer not in self._shares:
            came: dict[str, int] = {}
            for m in self.visits.get(layer, ()):
                for term, count in self.counts[m].items():
                    if self.weights[term]:  # else it is told, and has no gradient
                        came[term] = came.get(term, 0) + count
            self._shares[layer] = {t: Fraction(n, self.totals[t]) for t, n in came.items() if n}
        return self._shares[layer]

    def divisor(self, layers: Iterable[int]) -> float | None:
        """What the gradient of something that all `layers` use is divided by at the end of the step: the share that all
        terms have there, 1 where nothing comes by. None where terms have different shares: see `factor`."""
        shares = {share for layer in layers for share in self._shares_of(layer).values()}
        return None if len(shares) > 1 else float(next(iter(shares), 1))

    def factor(self, layer: int, microbatch: int) -> float:
        """What a microbatch's gradient on a layer is multiplied by, where terms have different shares.

        Raises TermError where those of the microbatch itself differ: one backward cannot serve both.
        """
        found = self._shares_of(layer)
        shares = {found[term] for term, count in self.counts[microbatch].items() if count and term in found}
        if len(shares) > 1:
            names = ", ".join(self.counts[microbatch])
            raise TermError(
                f"terms {names} of microbatch {microbatch} have different shares on layer {layer}, which not all "
                "microbatches visit; a schedule without skips is needed"
            )
        return float(1 / next(iter(shares), Fraction(1)))
