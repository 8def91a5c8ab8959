"""Sums of gradients that do not depend on their order, so that they are the same on any number of workers.

Addition of floats is not associative: the sum over eight microbatches is another one on two replicas than on one. Here
each microbatch's gradient becomes whole numbers of 2^-48, whose sums are exact in 64 bits. An fp32 number of 6e-8 or
more is such a number as it is; what is smaller is rounded by 2e-15 at most. The price is 8 bytes a parameter, and twice
the bytes in a sum over replicas.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

FRACTION = 48
"""Bits after the point."""
LARGEST = 2.0 ** (62 - FRACTION)
"""What no sum may reach."""
_AT_ONCE = 1 << 18  # elements: so that what lies between stays in a cache
_ON_A_DEVICE = 1 << 26  # where each part is a handful of kernels


class ExactSum:
    """The sum of one flat `gradient` [elements], fp32, over the microbatches of a step.

    Between microbatches `gradient` is zero and `total` [elements], int64, has what was counted; `total` is what is
    summed over replicas. `beyond` says whether anything was too large to be counted, or no number.
    """

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient
        self.total = torch.zeros_like(gradient, dtype=torch.int64)
        self.beyond = torch.zeros((), dtype=torch.bool, device=gradient.device)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = _AT_ONCE if self.gradient.device.type == "cpu" else _ON_A_DEVICE
        return zip(self.gradient.split(size), self.total.split(size), strict=True)

    @torch.no_grad()
    def count(self, microbatches: int) -> None:
        """Add what stands in the gradient, of one of so many microbatches, and make it zero."""
        for part, total in self._parts():
            least, most = torch.aminmax(part)
            self.beyond |= ~((most < LARGEST / microbatches) & (least > -LARGEST / microbatches))  # so is NaN
            total += part.double().mul_(2.0**FRACTION).round_().to(torch.int64)
        self.gradient.zero_()

    @torch.no_grad()
    def finish(self) -> None:
        """Put the sum into the gradient; the next one begins at zero."""
        for part, total in self._parts():
            part.copy_(total.double().mul_(2.0**-FRACTION))
        self.gradient.masked_fill_(self.beyond, torch.nan)
        self.total.zero_()

    def drop(self) -> None:
        """Forget all that was counted."""
        self.total.zero_()
        self.beyond.zero_()
