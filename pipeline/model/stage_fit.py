"""Fit a run of decoder blocks to what went in and what came out: in closed form, and then by gradient descent.

The closed form (`pipeline/model/output_fit.py`) takes random or averaged blocks most of the way in a few seconds, but
only their output projections learn. From there all weights of the blocks learn on, from the pairs alone, with Adam and
in small steps; without the closed form gradient descent gets nowhere in that time. Its rate is 1 / the hidden size, as
the best one of Adam for hidden matrices scales (arXiv 2203.03466). Pairs that are withheld judge after each of the two;
what made nothing better is undone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.model.layered import LayeredModel
from pipeline.model.output_fit import RIDGES, fit_outputs, linear_outputs
from pipeline.model.passed import Passed, merged, relative_error, tokens_of
from pipeline.model.span_module import SpanModule

WITHHELD = 8
"""One pair of so many is for judging, not for fitting."""
PER_FEATURE = 12
"""Tokens for each feature of the widest projection: more of them gain little."""
CLOSED_PER_FEATURE = 6
"""Tokens for each feature that the closed form is given, the newest: more gain nothing."""
A_STEP = 128
"""Tokens of a step of gradient descent: with fewer and larger steps the same time gains less."""
LEARNED_FLOPS = 0.2e12
"""Gradient descent may take so many, some five seconds of a core, ..."""
LEAST_EPOCHS, MOST_EPOCHS = 0.5, 4.0
"""... but passes over all pairs no less and no more often than this: with a large model it takes about as long as the
closed form, with a small one more passes would gain little more."""


@dataclass(frozen=True)
class Fit:
    """`tokens` fitted to, and the error (see `relative_error`) on others, `before` and `after`; they are equal where
    what was there was better, and was left."""

    tokens: int
    before: float
    after: float


def most_tokens(model: LayeredModel) -> int:
    """How many tokens it is worth fitting a block to: so many for each feature of its wider projection."""
    return PER_FEATURE * _widest(model)


def fit_flops(model: LayeredModel, span: tuple[int, int], tokens: int) -> float:
    """What a fit of a span of blocks takes. The closed form: a forward of each block and one of its attention, the
    products of features, and the solutions of the linear systems, with every ridge. Gradient descent. What is withheld
    takes part in the closed form, and goes forward three times more."""
    judged, hidden = tokens / WITHHELD, model.hidden_size
    fitted = tokens - judged
    closed = min(fitted, CLOSED_PER_FEATURE * _widest(model)) + judged
    found = _epochs(model, span, fitted) * _epoch_flops(model, span, fitted)
    for layer in range(*span):
        found += 2 * model.parameter_count(layer) * (1.4 * closed + 3 * judged)
        for features in _features_of(model, layer):
            found += 2 * features * (features + hidden) * closed + len(RIDGES) * features**3 / 3
    return found


@torch.no_grad()
def fit_stage(
    module: SpanModule, pairs: Sequence[Passed], came_on: Callable[[], None] = lambda: None
) -> Fit:  # fmt: skip
    """Make the blocks of `module`, which is in evaluation, take x to y; all of its weights are as they were where that
    does not make it better. Some pairs are withheld to judge by. `came_on` is called every so often. Raises ValueError
    for blocks that it cannot fit, and without two pairs."""
    if not linear_outputs(module):
        raise ValueError(f"the output projections of span {module.span} are not linear in what blocks add, or frozen")
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} pairs; allowed: 2 or more, of which some are withheld")
    every = min(WITHHELD, len(pairs))
    judged, fitted = pairs[::every], [pair for i, pair in enumerate(pairs) if i % every]
    tokens, model = tokens_of(fitted), module.model
    before = best = relative_error(module, judged, came_on)
    for fit in (
        lambda: fit_outputs(module, _last(fitted, CLOSED_PER_FEATURE * _widest(model)), judged, came_on),
        lambda: _learn(module, fitted, _epochs(model, module.span, tokens), came_on),
    ):
        kept = copy.deepcopy(module.state_dict())
        fit()
        if (error := relative_error(module, judged, came_on)) < best:
            best = error
        else:
            module.load_state_dict(kept)
    return Fit(tokens, before, best)


def _last(pairs: Sequence[Passed], tokens: int) -> Sequence[Passed]:
    """The last pairs, with as many tokens as are asked for."""
    first = len(pairs)
    while first > 0 and tokens > 0:
        first -= 1
        tokens -= tokens_of(pairs[first : first + 1])
    return pairs[first:]


@torch.enable_grad()
def _learn(module: SpanModule, pairs: Sequence[Passed], epochs: float, came_on: Callable[[], None]) -> None:
    """By Adam, on the same weighted squared error as the closed form, a few sequences a step in an order that is always
    the same; the rate rises, then falls to nothing. Gradients are clipped, so that the rare step with a token of an
    enormous norm does not outweigh the others."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer, rate = torch.optim.Adam(weights, betas=(0.9, 0.95), fused=True), 1 / module.model.hidden_size
    rows = [pair.rows(i, i + 1) for pair in pairs for i in range(pair.x.shape[0])]
    parts, draw = merged(rows, A_STEP), torch.Generator().manual_seed(0)
    steps = max(1, round(epochs * len(parts)))
    rising, order = max(1, min(10, steps // 4)), list[int]()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / rising) * (1 - step / steps)
        order = order or torch.randperm(len(parts), generator=draw).tolist()
        part = parts[order.pop()]
        optimizer.zero_grad(set_to_none=False)  # a gradient may be part of the stage's own buffer
        (part.error(module).sum() / part.counted().sum().clamp_min(1)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        came_on()
    optimizer.zero_grad(set_to_none=False)


def _epochs(model: LayeredModel, span: tuple[int, int], tokens: float) -> float:
    """How often gradient descent passes over all pairs."""
    return min(MOST_EPOCHS, max(LEAST_EPOCHS, LEARNED_FLOPS / max(1.0, _epoch_flops(model, span, tokens))))


def _epoch_flops(model: LayeredModel, span: tuple[int, int], tokens: float) -> float:
    """A forward, and a backward of twice as much."""
    return 3 * 2 * sum(model.parameter_count(layer) for layer in range(*span)) * tokens


def _widest(model: LayeredModel) -> int:
    return max(_features_of(model, model.blocks[0]))


def _features_of(model: LayeredModel, layer: int) -> list[int]:
    """Of each output projection of a block: it has as many weights for each feature as a hidden state has numbers."""
    paths = [path for path in (model.family.out_of_attention, model.family.out_of_neurons) if path is not None]
    ends = tuple(f"{path}.weight" for path in paths)
    return [math.prod(shape) // model.hidden_size for name, shape in model.shapes(layer).items() if name.endswith(ends)]
