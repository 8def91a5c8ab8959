"""What went into a run of decoder blocks and what came out, microbatch by microbatch, and how far a module is off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.span_module import SpanModule

TINY = 1e-12


@dataclass(frozen=True)
class Passed:
    """One microbatch through the blocks: `x` and `y` [batch, sequence, hidden], and what else the blocks are given."""

    x: Tensor
    y: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    def counted(self) -> Tensor:
        """Which tokens are no padding: [batch, sequence]."""
        mask = self.attention_mask
        return torch.ones(self.x.shape[:2], dtype=torch.bool, device=self.x.device) if mask is None else mask.bool()

    def token_weights(self) -> Tensor:
        """Of each token's squared error: 1 / rms(y), and 0 for padding. [batch, sequence]

        A hidden state is normalised before it is used, so what counts is a relative error, yet the few tokens of an
        enormous norm which attention rests on (the massive activations of arXiv 2402.17762) must come out enormous, and
        with the square of it they would not.
        """
        rms = self.y.float().square().mean(-1).clamp_min(TINY).sqrt()
        return self.counted() / rms

    def error(self, module: SpanModule) -> Tensor:
        """The weighted squared error of each token that a module makes of x: [batch, sequence]."""
        found = module(self.x.float(), attention_mask=self.attention_mask, position_ids=self.position_ids)
        return (found - self.y.float()).square().mean(-1) * self.token_weights()

    def rows(self, first: int, end: int) -> Passed:
        """Some sequences of it."""
        others = (self.attention_mask, self.position_ids)
        cut = [each if each is None or each.shape[0] != self.x.shape[0] else each[first:end] for each in others]
        return Passed(self.x[first:end], self.y[first:end], *cut)


@torch.no_grad()
def relative_error(module: SpanModule, pairs: Sequence[Passed], came_on: Callable[[], None] = lambda: None) -> float:
    """Over the tokens, padding aside, the sum of |found - y|^2 / |y| by that of |y|; that of zeros is 1."""
    total, whole = 0.0, 0.0
    for pair in pairs:
        total += float(pair.error(module).sum())
        whole += float((pair.y.float().square().mean(-1) * pair.token_weights()).sum())
        came_on()
    return total / max(TINY, whole)


def tokens_of(pairs: Sequence[Passed]) -> int:
    """Padding aside."""
    return sum(int(pair.counted().sum()) for pair in pairs)


def merged(pairs: Sequence[Passed], at_once: int) -> list[Passed]:
    """Microbatches of one shape, several at a time, until they have `at_once` tokens: small products waste most of a
    core. The last ones of a shape may have fewer."""
    found: list[list[Passed]] = []
    for pair in pairs:
        last = found[-1] if found else []
        tokens = sum(each.x.shape[0] * each.x.shape[1] for each in last)
        if last and _alike(last[0]) == _alike(pair) and tokens < at_once and _alike(pair) is not None:
            last.append(pair)
        else:
            found.append([pair])
    names = ("x", "y", "attention_mask", "position_ids")
    return [Passed(*(_cat([getattr(each, name) for each in group]) for name in names)) for group in found]  # type: ignore[arg-type]


def _alike(pair: Passed) -> tuple[object, ...] | None:
    """What pairs that can be put together have in common; None for one that stays alone."""
    others = (pair.attention_mask, pair.position_ids)
    if any(other is not None and other.shape[0] != pair.x.shape[0] for other in others):
        return None
    return (*pair.x.shape[1:], *(other is None for other in others))


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if there else None
