"""Fit a run of decoder blocks to what went in and what came out, in closed form, from back to front of nothing.

A block adds two things to the hidden state: what its attention gives and what its MLP gives. Each is a linear map, the
output projection, of features. The features of blocks that know nothing are good enough: projection after projection,
in the order of the forward, is fitted by ridge regression so that it adds its share of what is still missing,
1 / (projections left), to what came before (a greedy fit, as in boosting; Friedman 2001, section 4.2). So 2 L small
linear systems take the place of gradient descent through L blocks.

What a projection is fitted to is weighed, token by token, by 1 / rms(y): a hidden state is normalised before it is
used, so what counts is a relative error, yet the few tokens of an enormous norm which attention rests on (the massive
activations of arXiv 2402.17762) must come out enormous, and with the square of it they would not.

Pairs that are withheld choose how strong the ridge is, projection by projection: the strongest of a few that is nearly
as good there as the best (as in the one-standard-error rule, Breiman et al. 1984). A weak one on features that are
small, or much alike, leaves weights so large that the next steps of training throw them about.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.model.layered import LayeredModel
from pipeline.model.span_module import SpanModule

RIDGES = (1e-1, 1e-2, 1e-3)
"""Times the mean of the diagonal of the features' second moments, the strongest first."""
NEARLY = 1.05
"""Times the least error on withheld pairs is nearly as good."""
WITHHELD = 8
"""One pair of so many is for judging, not for fitting."""
PER_FEATURE = 12
"""Tokens for each feature of the widest projection: more of them gain little."""


@dataclass(frozen=True)
class Passed:
    """One microbatch through the blocks: `x` and `y` [batch, sequence, hidden], and what else the blocks are given."""

    x: Tensor
    y: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None


@dataclass(frozen=True)
class Fit:
    """`tokens` fitted to, and the error (see `relative_error`) on others, `before` and `after`; they are equal where
    what was there was better, and was left."""

    tokens: int
    before: float
    after: float


def linear_outputs(module: SpanModule) -> bool:
    """Whether what blocks add is linear in their output projections, all of which are trained."""
    family, blocks = module.model.family, [module.layers[str(n)] for n in range(*module.span)]
    if family.out_of_attention is None or not set(range(*module.span)) <= set(module.model.blocks):
        return False
    projections = [block.get_submodule(path) for block in blocks for path in _paths(module)]
    return all(isinstance(weight, nn.Parameter) and weight.requires_grad
               for weight in (projection.weight for projection in projections))  # fmt: skip


def most_tokens(model: LayeredModel) -> int:
    """How many tokens it is worth fitting a block to: so many for each feature of its wider projection."""
    return PER_FEATURE * max(_features_of(model, model.blocks[0]))


def fit_flops(model: LayeredModel, span: tuple[int, int], tokens: int) -> float:
    """What a fit of a span of blocks takes: a forward of each block and one of its attention, the products of features,
    and the solutions of the linear systems, with every ridge."""
    hidden, found = model.hidden_size, 0.0
    for layer in range(*span):
        shapes = model.shapes(layer)
        weights = sum(math.prod(shape) for shape in shapes.values())
        found += 1.4 * 2 * weights * tokens
        for features in _features_of(model, layer):
            found += 2 * features * (features + hidden) * tokens + len(RIDGES) * features**3 / 3
    return found


def _features_of(model: LayeredModel, layer: int) -> list[int]:
    """Of each output projection of a block: it has as many weights for each feature as a hidden state has numbers."""
    paths = [path for path in (model.family.out_of_attention, model.family.out_of_neurons) if path is not None]
    ends = tuple(f"{path}.weight" for path in paths)
    return [math.prod(shape) // model.hidden_size for name, shape in model.shapes(layer).items() if name.endswith(ends)]


@torch.no_grad()
def relative_error(module: SpanModule, pairs: Sequence[Passed], came_on: Callable[[], None] = lambda: None) -> float:
    """Mean over the tokens of |found - y|^2 / |y|^2, padding aside."""
    total, count = 0.0, 0
    for pair in pairs:
        found = module(pair.x.float(), attention_mask=pair.attention_mask, position_ids=pair.position_ids)
        y = pair.y.float()
        each = (found - y).square().sum(-1) / y.square().sum(-1).clamp_min(_TINY)
        counted = _counted(pair)
        total, count = total + float(each[counted].sum()), count + int(counted.sum())
        came_on()
    return total / max(1, count)


@torch.no_grad()
def fit_outputs(
    module: SpanModule, pairs: Sequence[Passed], came_on: Callable[[], None] = lambda: None
) -> Fit:  # fmt: skip
    """Set the output projections of the blocks of `module`, which is in evaluation, so that it takes x to y; all of its
    weights are as they were where that does not make it better. Some pairs are withheld to judge by. `came_on` is
    called every so often. Raises ValueError for blocks that it cannot fit, and without two pairs."""
    if not linear_outputs(module):
        raise ValueError(f"the output projections of span {module.span} are not linear in what blocks add, or frozen")
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} pairs; allowed: 2 or more, of which some are withheld")
    judged = pairs[:: max(2, min(WITHHELD, len(pairs)))]
    fitted = [pair for i, pair in enumerate(pairs) if i % max(2, min(WITHHELD, len(pairs)))]
    before = relative_error(module, judged, came_on)
    kept = copy.deepcopy(module.state_dict())
    _fit(module, fitted, judged, came_on)
    after = relative_error(module, judged, came_on)
    if not after < before:
        module.load_state_dict(kept)
        after = before
    return Fit(sum(int(_counted(pair).sum()) for pair in fitted), before, after)


_TINY = 1e-12
_AT_ONCE = 1024  # tokens


def _counted(pair: Passed) -> Tensor:
    """Which tokens are no padding: [batch, sequence]."""
    mask = pair.attention_mask
    return torch.ones(pair.x.shape[:2], dtype=torch.bool, device=pair.x.device) if mask is None else mask.bool()


def _paths(module: SpanModule) -> tuple[str, str]:
    """Of both output projections of a block."""
    family = module.model.family
    assert family.out_of_attention is not None
    return family.out_of_attention, family.out_of_neurons


def _fit(
    module: SpanModule, fitted: Sequence[Passed], judged: Sequence[Passed], came_on: Callable[[], None]
) -> None:  # fmt: skip
    groups = [(pair, system) for system, each in enumerate((fitted, judged)) for pair in _merged(each)]
    hidden = [pair.x.float() for pair, _ in groups]
    left = 2 * (module.span[1] - module.span[0])
    for layer in range(*module.span):
        first, second = _paths(module)
        for path in (first, second):
            projection = module.layers[str(layer)].get_submodule(path)
            systems, taken = (_System(), _System()), list[tuple[Tensor, Tensor]]()
            for (pair, system), h in zip(groups, hidden, strict=True):
                features, reached = _features(module, layer, path, pair, h)
                systems[system].add(features, pair.y.float() - reached, _weights(pair))
                if path == second:
                    taken.append((features, reached))
                came_on()
            found = _solved(*systems) / left
            _put(projection, found)
            left -= 1
            for i, (features, reached) in enumerate(taken):  # which saves another forward
                hidden[i] = reached + features @ found
            came_on()


def _merged(pairs: Sequence[Passed]) -> list[Passed]:
    """Microbatches of one shape, several at a time: small products waste most of a core."""
    found: list[list[Passed]] = []
    for pair in pairs:
        last = found[-1] if found else []
        tokens = sum(each.x.shape[0] * each.x.shape[1] for each in last)
        if last and _alike(last[0]) == _alike(pair) and tokens < _AT_ONCE and _alike(pair) is not None:
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


def _weights(pair: Passed) -> Tensor:
    """Of each token's squared error: 1 / rms(y), and 0 for padding. [batch, sequence]"""
    rms = pair.y.float().square().mean(-1).clamp_min(_TINY).sqrt()
    return _counted(pair) / rms


def _through(module: SpanModule, layer: int, pair: Passed, hidden: Tensor) -> Tensor:
    """One block on a hidden state."""
    return module.block(layer, hidden, attention_mask=pair.attention_mask, position_ids=pair.position_ids)


def _features(module: SpanModule, layer: int, path: str, pair: Passed, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a projection [batch, sequence, features], with a 1 for its bias if it has one, and the hidden
    state without what the projection would add."""
    projection, taken = module.layers[str(layer)].get_submodule(path), list[Tensor]()
    first = path == _paths(module)[0]

    def took(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        taken[:] = [given[0], made]
        if first:  # what follows in the block is not needed yet
            raise _Taken

    handle = projection.register_forward_hook(took)
    try:
        out = _through(module, layer, pair, hidden)
    except _Taken:
        out = None
    finally:
        handle.remove()
    features, made = taken
    if getattr(projection, "bias", None) is not None:
        features = torch.cat([features, torch.ones_like(features[..., :1])], -1)
    return features, hidden if out is None else out - made


class _Taken(Exception):
    """A projection has been reached, and what comes after it is not wanted."""


class _System:
    """The normal equations of a ridge regression, added up token by token."""

    def __init__(self) -> None:
        self.moments: Tensor | None = None
        self.targets: Tensor | None = None
        self.squares = 0.0

    def add(self, features: Tensor, targets: Tensor, weights: Tensor) -> None:
        """[batch, sequence, features], [batch, sequence, hidden] and [batch, sequence]."""
        scale = weights.sqrt()[..., None]
        f, t = (features * scale).flatten(0, 1), (targets * scale).flatten(0, 1)
        moments, products = f.T @ f, f.T @ t
        self.moments = moments if self.moments is None else self.moments.add_(moments)
        self.targets = products if self.targets is None else self.targets.add_(products)
        self.squares += float(t.square().sum())

    def solve(self, ridge: float) -> Tensor:
        """[features, hidden]: the least weighted squared error plus `ridge` of the squared weights."""
        assert self.moments is not None
        assert self.targets is not None
        moments = self.moments.double()
        moments.diagonal().add_(ridge * float(moments.diagonal().mean()) + _TINY)
        return torch.cholesky_solve(self.targets.double(), torch.linalg.cholesky(moments)).float()

    def error(self, weights: Tensor) -> float:
        """The weighted squared error of such weights."""
        assert self.moments is not None
        assert self.targets is not None
        w = weights.double()
        return self.squares + float((w * (self.moments.double() @ w - 2 * self.targets.double())).sum())


def _solved(fitted: _System, judged: _System) -> Tensor:
    """With the strongest ridge that is nearly as good as the best one on what is judged by."""
    found = [fitted.solve(ridge) for ridge in RIDGES]
    errors = [judged.error(weights) for weights in found]
    enough = NEARLY * max(min(errors), 0.0) + _TINY
    return next((w for w, error in zip(found, errors, strict=True) if error <= enough), found[0])


def _put(projection: nn.Module, found: Tensor) -> None:
    """Make it the projection's weight, which Linear has [out, in] and Conv1D [in, out], and its bias."""
    bias = getattr(projection, "bias", None)
    if bias is not None:
        bias.copy_(found[-1])
        found = found[:-1]
    weight = projection.get_parameter("weight")
    weight.copy_(found.T if isinstance(projection, nn.Linear) else found)
