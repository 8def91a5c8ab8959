"""How the learning rate goes: a linear warm-up, then one of four shapes down to a floor, known from the step alone.

A shape says which share of the way from the floor to the peak is left after the warm-up. Cosine (Loshchilov and Hutter,
arXiv 1608.03983), linear (2310.07831), WSD: the peak, and a linear decay at the end (warm-up, stable, decay; MiniCPM,
2404.06395, section 4), and the peak to the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping


def cosine(step: int, begins: int, total: int, share: float) -> float:
    """Half a cosine from step `begins` to step `total`."""
    return 0.5 * (1 + math.cos(math.pi * _done(step, begins, total)))


def linear(step: int, begins: int, total: int, share: float) -> float:
    """A line from step `begins` to step `total`."""
    return 1 - _done(step, begins, total)


def wsd(step: int, begins: int, total: int, share: float) -> float:
    """The peak, then a line over the last `share` of all steps, or over what the warm-up leaves of them."""
    return 1 - _done(step, max(begins, total - round(share * total)), total)


def constant(step: int, begins: int, total: int, share: float) -> float:
    """The peak."""
    return 1.0


Shape = Callable[[int, int, int, float], float]
SHAPES: Mapping[str, Shape] = {"cosine": cosine, "linear": linear, "wsd": wsd, "constant": constant}
"""Name -> (0-based step, first step after the warm-up, steps in all, WSD's decay share) -> share that is left."""


def _done(step: int, begins: int, total: int) -> float:
    """How far a step is from `begins` to `total`, from 0 to 1."""
    return min(1.0, max(0.0, (step - begins) / max(1, total - begins)))
