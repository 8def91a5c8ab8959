"""Fit the output projections of a run of decoder blocks to what went in and what came out, in closed form.

A block adds two things to the hidden state: what its attention gives and what its MLP gives. Each is a linear map, the
output projection, of features. The features of blocks that know nothing are good enough: projection after projection,
in the order of the forward, is fitted by ridge regression so that it adds its share of what is still missing,
1 / (projections left), to what came before (a greedy fit, as in boosting; Friedman 2001, section 4.2). So 2 L small
linear systems bring L blocks to where gradient descent can go on (`stage_fit.py`). Squared errors are weighed token by
token (`Passed.token_weights`).

Pairs that are withheld choose how strong the ridge is, projection by projection: the strongest of a few that is nearly
as good there as the best (as in the one-standard-error rule, Breiman et al. 1984). A weak one on features that are
small, or much alike, leaves weights so large that the next steps of training throw them about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pipeline.model.passed import TINY, Passed, merged
from pipeline.model.span_module import SpanModule

RIDGES = (1e-1, 1e-2, 1e-3)
"""Times the mean of the diagonal of the features' second moments, the strongest first."""
NEARLY = 1.05
"""Times the least error on withheld pairs is nearly as good."""
_AT_ONCE = 1024  # tokens


def linear_outputs(module: SpanModule) -> bool:
    """Whether what blocks add is linear in their output projections, all of which are trained."""
    family, blocks = module.model.family, [module.layers[str(n)] for n in range(*module.span)]
    if family.out_of_attention is None or not set(range(*module.span)) <= set(module.model.blocks):
        return False
    projections = [block.get_submodule(path) for block in blocks for path in _paths(module)]
    return all(isinstance(weight, nn.Parameter) and weight.requires_grad
               for weight in (projection.weight for projection in projections))  # fmt: skip


def _paths(module: SpanModule) -> tuple[str, str]:
    """Of both output projections of a block."""
    family = module.model.family
    assert family.out_of_attention is not None
    return family.out_of_attention, family.out_of_neurons


@torch.no_grad()
def fit_outputs(
    module: SpanModule, fitted: Sequence[Passed], judged: Sequence[Passed], came_on: Callable[[], None] = lambda: None
) -> None:
    """Set the output projections of the blocks of `module`, which is in evaluation, so that it takes x to y. `judged`
    are the pairs that choose the ridge. `came_on` is called every so often. The blocks are `linear_outputs`."""
    groups = [(pair, system) for system, each in enumerate((fitted, judged)) for pair in merged(each, _AT_ONCE)]
    hidden = [pair.x.float() for pair, _ in groups]
    left = 2 * (module.span[1] - module.span[0])
    for layer in range(*module.span):
        first, second = _paths(module)
        for path in (first, second):
            projection = module.layers[str(layer)].get_submodule(path)
            systems, taken = (_System(), _System()), list[tuple[Tensor, Tensor]]()
            for (pair, system), h in zip(groups, hidden, strict=True):
                features, reached = _features(module, layer, path, pair, h)
                systems[system].add(features, pair.y.float() - reached, pair.token_weights())
                if path == second:
                    taken.append((features, reached))
                came_on()
            found = _solved(*systems) / left
            _put(projection, found)
            left -= 1
            for i, (features, reached) in enumerate(taken):  # which saves another forward
                hidden[i] = reached + features @ found
            came_on()


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
        moments.diagonal().add_(ridge * float(moments.diagonal().mean()) + TINY)
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
    enough = NEARLY * max(min(errors), 0.0) + TINY
    return next((w for w, error in zip(found, errors, strict=True) if error <= enough), found[0])


def _put(projection: nn.Module, found: Tensor) -> None:
    """Make it the projection's weight, which Linear has [out, in] and Conv1D [in, out], and its bias."""
    bias = getattr(projection, "bias", None)
    if bias is not None:
        bias.copy_(found[-1])
        found = found[:-1]
    weight = projection.get_parameter("weight")
    weight.copy_(found.T if isinstance(projection, nn.Linear) else found)
