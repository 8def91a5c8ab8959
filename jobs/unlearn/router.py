"""Whether a question is about what was to be forgotten, by the hidden states that the model has of it (O3's router).

A question is described by the mean of each block's output over its tokens. One request's router is a ridge regression
on such descriptions, +1 for the rows to forget and -1 for those to keep. How strong the ridge is, and from which score
on a question counts, are those with the fewest errors, both kinds counting alike, when each row is left out of its own
prediction. The paper has a second model and hand-tuned thresholds there (arXiv 2407.10223); this is our reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_LEAST = 1e-6
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Times the number of rows."""


@dataclass(frozen=True)
class Router:
    """`mean`, `spread` and `direction` are [blocks, hidden]."""

    mean: Tensor
    spread: Tensor
    direction: Tensor
    limit: float

    @classmethod
    def fit(cls, forget: Tensor, retain: Tensor) -> Router:
        """From descriptions of questions [rows, blocks, hidden] of rows to forget and of rows to keep."""
        rows = torch.cat([forget, retain])
        mean, spread = rows.mean(dim=0), rows.std(dim=0, correction=0).clamp(min=_LEAST)
        made = cls(mean, spread, torch.zeros_like(mean), 0.0)
        whose = torch.cat([torch.ones(len(forget)), -torch.ones(len(retain))]).double()
        flat = made.normal(rows).double().flatten(1) / mean.numel() ** 0.5
        products, found = flat @ flat.T, list[tuple[float, float, Tensor]]()
        for ridge in _RIDGES:
            inverse = torch.linalg.inv(products + ridge * len(rows) * torch.eye(len(rows), dtype=torch.float64))
            weights = inverse @ whose
            left_out = whose - weights / inverse.diagonal()  # of a row, by all others: the closed form of a ridge
            limit, errors = least_errors(-left_out[: len(forget)], -left_out[len(forget) :])
            found.append((errors, limit, flat.T @ weights / mean.numel() ** 0.5))
        _, limit, direction = min(found, key=lambda each: each[0])
        return replace(made, direction=direction.float().view_as(mean), limit=limit)

    def normal(self, found: Tensor) -> Tensor:
        """[rows, blocks, hidden], what is off the mean, in spreads."""
        return (found - self.mean) / self.spread

    def distance(self, found: Tensor) -> Tensor:
        """[rows, blocks, hidden] -> [rows]: the less, the more it is about what was to be forgotten."""
        return -(self.normal(found) * self.direction).sum(dim=(1, 2))

    def near(self, found: Tensor) -> Tensor:
        """[rows], bool: whether a question is about what was to be forgotten."""
        return self.distance(found) <= self.limit

    def tensors(self) -> dict[str, Tensor]:
        """As it is kept; `of` takes it back."""
        limit = torch.tensor([self.limit], dtype=torch.float64)
        return {"mean": self.mean, "spread": self.spread, "direction": self.direction, "limit": limit}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Router:
        """From what `tensors` has given. Raises KeyError."""
        return cls(tensors["mean"], tensors["spread"], tensors["direction"], float(tensors["limit"]))


def least_errors(near: Tensor, far: Tensor) -> tuple[float, float]:
    """The limit with the smallest sum of the shares of `near` [n] above it and of `far` [m] up to it, and that sum; in
    the middle between two values, and of several the lowest."""
    values = torch.cat([near, far]).double().unique()
    limits = [*((values[1:] + values[:-1]) / 2).tolist(), float(values[-1])]
    errors = [float((near > limit).double().mean() + (far <= limit).double().mean()) for limit in limits]
    return limits[errors.index(min(errors))], min(errors)


def weight(routers: Sequence[Router], found: Tensor, strength: float) -> Tensor:
    """w of each question [rows]: `strength` where any router knows it, else 0; `found` is [rows, blocks, hidden]."""
    known = torch.zeros(len(found), dtype=torch.bool)
    for router in routers:
        known |= router.near(found)
    return known * strength


def described(hidden: Tensor, asked: Tensor) -> Tensor:
    """The mean of hidden states [rows, sequence, hidden] over positions `asked` [rows, sequence]: [rows, hidden]."""
    weights = asked.to(hidden.dtype)
    return torch.einsum("rs,rsh->rh", weights, hidden) / weights.sum(dim=1, keepdim=True).clamp(min=1)
