"""Whether a question is about what was to be forgotten, by the hidden states that the model has of it (O3's router).

A question is described by the mean of each block's output over its tokens. One request's router knows the mean and the
spread of these over its rows to forget, and from which distance on a question is another one: the distance that tells
the rows to forget from those to keep with the fewest errors, both kinds counting alike. The paper has a second model
and hand-tuned thresholds there (arXiv 2407.10223); this is our reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = 1e-6


@dataclass(frozen=True)
class Router:
    """`mean` and `spread` are [blocks, hidden]."""

    mean: Tensor
    spread: Tensor
    limit: float

    @classmethod
    def fit(cls, forget: Tensor, retain: Tensor) -> Router:
        """From descriptions of questions [rows, blocks, hidden] of rows to forget and of rows to keep."""
        mean = forget.mean(dim=0)
        spread = torch.cat([forget, retain]).std(dim=0, correction=0).clamp(min=_LEAST)
        made = cls(mean, spread, 0.0)
        return cls(mean, spread, least_errors(made.distance(forget), made.distance(retain)))

    def distance(self, found: Tensor) -> Tensor:
        """[rows, blocks, hidden] -> [rows]: mean square of what is off, in spreads."""
        return ((found - self.mean) / self.spread).square().mean(dim=(1, 2))

    def near(self, found: Tensor) -> Tensor:
        """[rows], bool: whether a question is about what was to be forgotten."""
        return self.distance(found) <= self.limit

    def tensors(self) -> dict[str, Tensor]:
        """As it is kept; `of` takes it back."""
        return {"mean": self.mean, "spread": self.spread, "limit": torch.tensor([self.limit], dtype=torch.float64)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Router:
        """From what `tensors` has given. Raises KeyError."""
        return cls(tensors["mean"], tensors["spread"], float(tensors["limit"]))


def least_errors(near: Tensor, far: Tensor) -> float:
    """The limit with the smallest sum of the shares of `near` [n] above it and of `far` [m] up to it; in the middle
    between two values, and of several the lowest."""
    values = torch.cat([near, far]).double().unique()
    limits = [*((values[1:] + values[:-1]) / 2).tolist(), float(values[-1])]
    errors = [float((near > limit).double().mean() + (far <= limit).double().mean()) for limit in limits]
    return limits[errors.index(min(errors))]


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
