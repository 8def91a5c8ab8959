"""The layer states of a worker that computes with them where they are: on its device, from step to step.

Spans are made of layers; a store gains and loses layers between two steps, and what stays is not touched. The gradients
of a span lie in one flat tensor, which is summed over replicas at once. A weight that embedding and head share is a
state of its own, which both sides hold: its two gradients are summed, so both copies stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.model.layered import TIED, LayeredModel, NamedState
from pipeline.model.span_module import SpanModule
from pipeline.schedule.ops import Span, overlaps, parse_span, span_text
from pipeline.state.exact_sum import ExactSum
from pipeline.state.layer_state import UNFILLED, LayerState, LayerStates
from pipeline.state.masks import read_masks
from pipeline.state.optimizer import OptimizerConfig
from pipeline.state.shard import Share
from pipeline.state.sharded import ShardedState

Holders = Mapping[Span, tuple[int, ...]]


def part_holders(holders: Holders, num_layers: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Part -> the workers that hold a copy and sum its gradient together: each span, and a shared weight if any."""
    parts = {span_text(span): workers for span, workers in holders.items()}
    if tied:
        ends = ((0, 1), (num_layers - 1, num_layers))
        parts[TIED] = tuple(sorted({w for s, ws in holders.items() for w in ws if any(overlaps(s, e) for e in ends)}))
    return parts


def part_span(part: str) -> Span | None:
    """The span that a part is; None for a shared weight."""
    return None if part == TIED else parse_span(part)


class ResidentStore(LayerStates):
    """The spans of one worker. No two of them overlap.

    `states` are those of all layers held, by name, and `part_of` says in which part each is; `gradients` has the flat
    gradient of each part that has one. `aside` are states that are held no more and may still be asked for: none of
    them is of a step that was committed after it was let go.
    """

    def __init__(
        self, model: LayeredModel, spans: Iterable[Span], config: OptimizerConfig, *, seed: int,
        device: torch.device, source: Path | None = None, came_on: Callable[[], None] = lambda: None,
        exact: bool = False, shares: Mapping[str, Share] | None = None, masks: Path | None = None, fill: bool = True,
    ) -> None:  # fmt: skip
        """Weights are those that a run begins with, drawn from the seed or read from `source`. `came_on` is called
        after each layer: a large model takes long. With `exact`, gradients are summed in no order. `shares`, by part,
        says of which only a share of the moments is kept here. `masks` is a folder that says what is updated; without
        one, all is. `fill`: see `hold`."""
        super().__init__(model)
        self.shares, self._masks = dict(shares or {}), masks
        self.config, self._seed, self._device = config, seed, device
        self._came_on, self._exact = came_on, exact
        self.modules: dict[Span, SpanModule] = {}
        self.gradients: dict[str, Tensor] = {}
        self.sums: dict[str, ExactSum] = {}
        self.part_of: dict[str, str] = {}
        self.aside: dict[str, LayerState] = {}
        self._modules_aside: dict[int, nn.Module] = {}
        self._prepared: dict[str, tuple[LayerState, nn.Module]] = {}
        self._rotary: nn.Module | None = None
        self._training = True
        self.hold(spans, source, fill=fill)

    # ---- what is held ----

    def hold(self, spans: Iterable[Span], source: Path | None = None, *, fill: bool = True) -> None:
        """Hold these spans from now on. Layers that are held already, or lie aside, keep their state; new ones are as
        at the start of a run, or, without `fill`, for others to put weights in (`unfilled`); what is held no more lies
        aside until `let_go`. Call it between two steps: gradients are zero afterwards. Raises ValueError for spans that
        overlap."""
        spans = sorted(spans)
        if self.modules and spans == sorted(self.modules):
            return
        layers = [layer for span in spans for layer in range(*span)]
        if len(set(layers)) < len(layers):
            raise ValueError(f"spans {', '.join(map(span_text, spans))} overlap; a worker holds a layer once")
        have = self._modules_aside | {n: layer for span in self.modules.values() for n, layer in _layers(span)}
        rotary = next((module.rotary for module in self.modules.values()), self._rotary)
        wanted = self.model.states_of(layers)
        known = self.aside | self.states
        states = {state.name: known[state.name] for state in wanted if state.name in known}
        share = {name: _held(tensor) for state in states.values() for name, tensor in state.all_weights().items()}
        for run in _runs(layer for layer in layers if layer not in have):
            built = self._build(run, source, share, fill=fill)
            have |= dict(_layers(built))
            rotary = rotary or built.rotary
            for layer in range(*run):
                share |= built.named_layer_parameters(layer)
        for spec in wanted:
            if spec.name not in states:
                part = TIED if spec.shared else next(span_text(s) for s in spans if s[0] <= spec.users[0] < s[1])
                states[spec.name] = self._made(spec, share, part, fill=fill)
        self.aside = {name: state for name, state in known.items() if name not in states}
        self._modules_aside = {layer: module for layer, module in have.items() if layer not in layers}
        self.states = states
        self.modules = {
            span: SpanModule(self.model, span, {str(n): have[n] for n in range(*span)}, rotary) for span in spans
        }
        self.train(self._training)
        self._lay_out()

    def prepare(self, layers: Iterable[int]) -> dict[str, LayerState]:
        """States into which what is to be held soon can be filled, while the worker goes on with what it holds: of
        layers that are held, which nobody computes with yet, their own; of others, new ones."""
        found: dict[str, LayerState] = {}
        for layer in layers:
            (spec,) = (spec for spec in self.model.states_of([layer]) if not spec.shared)
            if spec.name not in self.states:
                built = self._build((layer, layer + 1), None, fill=False)
                part = span_text((layer, layer + 1))
                state = self._made(spec, built.named_layer_parameters(layer), part, fill=False)
                self._prepared[spec.name] = state, dict(_layers(built))[layer]
                self._rotary = built.rotary
            found[spec.name] = self.states[spec.name] if spec.name in self.states else self._prepared[spec.name][0]
        return found

    def adopt(self, states: Iterable[str]) -> None:
        """These of what was prepared lie aside from now on, for `hold`; the others are forgotten."""
        for name in set(states) & set(self._prepared):
            self.aside[name], self._modules_aside[int(name)] = self._prepared[name]
        self._prepared.clear()

    def let_go(self) -> None:
        """Nobody asks any more for what is held no more."""
        self.aside.clear()
        self._modules_aside.clear()

    @property
    def unfilled(self) -> list[LayerState]:
        """The states held into which no weights were put yet."""
        return [state for state in self.states.values() if state.version == UNFILLED]

    def _build(
        self, span: Span, source: Path | None, share: Mapping[str, nn.Parameter] | None = None, *, fill: bool = True
    ) -> SpanModule:  # fmt: skip
        return self.model.build(
            span, seed=self._seed, device=self._device, source=source, share=share, came_on=self._came_on, fill=fill
        )

    def _made(self, spec: NamedState, weights: Mapping[str, nn.Parameter], part: str, *, fill: bool) -> LayerState:
        """A new state of a part; who keeps a share of the part keeps one of the moments."""
        trained, frozen = spec.keys[: spec.trained], spec.keys[spec.trained :]
        whole = partial(LayerState, block=spec.owner in self.model.blocks)
        make = partial(ShardedState, share=self.shares[part]) if part in self.shares else whole
        state = make(
            spec.name, {name: weights[name] for name in trained}, self.config,
            frozen={name: weights[name].detach() for name in frozen},
            masks=None if self._masks is None else read_masks(self._masks, spec),
        )  # fmt: skip
        state.version = 0 if fill else UNFILLED
        state.pull = None if self.model.lora is None else self.model.lora.pull
        return state

    def _lay_out(self) -> None:
        """Put the gradients of each part into one flat tensor."""
        self.gradients.clear()  # the same mapping: who sums them looks in it
        self.sums.clear()
        self.part_of.clear()
        for part in (*map(span_text, self.modules), TIED):
            self.part_of.update({state.name: part for state in self.states_of(part)})
            if states := [state for state in self.states_of(part) if state.size]:
                self.gradients[part] = torch.zeros(sum(s.size for s in states), device=self._device)
                for state, gradient in zip(states, self.gradients[part].split([s.size for s in states]), strict=True):
                    state.bind(gradient)
                if self._exact:
                    self.sums[part] = ExactSum(self.gradients[part])

    def states_of(self, part: str) -> list[LayerState]:
        """The states of a part that are there, held or aside: those of a span's layers, or a shared one."""
        known = self.aside | self.states
        if (span := part_span(part)) is None:
            return [known[part]] if part in known else []
        return [known[s.name] for s in self.model.states_of(range(*span)) if not s.shared and s.name in known]

    def layers(self) -> list[int]:
        """The layers held, ascending."""
        return sorted(layer for span in self.modules for layer in range(*span))

    # ---- a step ----

    def train(self, mode: bool) -> None:
        """Set every module to training (with dropout) or to evaluation."""
        self._training = mode
        for module in self.modules.values():
            module.train(mode)

    def summed(self, part: str) -> Tensor | None:
        """What of a part is summed over its holders, if it has a gradient here."""
        return self.sums[part].total if part in self.sums else self.gradients.get(part)

    def bits(self, part: str) -> Tensor:
        """What a part's new weights are exchanged in, as whole numbers: it takes the place of what is summed."""
        summed = self.summed(part)
        assert summed is not None
        return summed if part in self.sums else summed.view(torch.int32)

    def count(self, span: Span, microbatches: int) -> None:
        """The gradient of one of so many microbatches on a span is there."""
        parts = [span_text(span), *([TIED] if span[0] == 0 or span[1] == self.model.num_layers else [])]
        for part in parts:
            if part in self.sums:
                self.sums[part].count(microbatches)

    def finish_sums(self) -> None:
        """All sums over holders have ended: what is to be applied stands in `gradients`."""
        for each in self.sums.values():
            each.finish()

    def beyond(self) -> dict[str, Tensor]:
        """A state of each part whose gradients are counted -> whether one could not be: a scalar where they are."""
        return {self.states_of(part)[0].name: each.beyond for part, each in self.sums.items()}

    @contextmanager
    def moved(self, by: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the trained weights of the parts held are moved by these vectors, which have the form of their
        gradients. However it ends, they are then what they were, bit for bit."""
        parameters = {part: [p for s in self.states_of(part) for p in s.parameters.values()] for part in by}
        kept = {part: [p.detach().clone() for p in each] for part, each in parameters.items()}
        try:
            with torch.no_grad():
                for part, each in parameters.items():
                    for parameter, piece in zip(each, by[part].split([p.numel() for p in each]), strict=True):
                        parameter.add_(piece.view_as(parameter))
            yield
        finally:
            with torch.no_grad():
                for part, each in parameters.items():
                    for parameter, was in zip(each, kept[part], strict=True):
                        parameter.copy_(was)

    def drop(self) -> None:
        """Forget the gradients of a step that does not count."""
        for gradient in self.gradients.values():
            gradient.zero_()
        for each in self.sums.values():
            each.drop()

    @torch.no_grad()
    def start_again(self, states: Iterable[LayerState], source: Path | None) -> None:
        """Fill in the weights that a run begins with, and no moments. Raises ModelError for a source that is gone."""
        states = list(states)
        wanted = {name for state in states for name in state.weights()}
        fresh: dict[str, nn.Parameter] = {}
        for layer in self.layers():
            if not wanted.isdisjoint(self.model.shapes(layer)):
                fresh |= self._build((layer, layer + 1), source).named_layer_parameters(layer)
        for state in states:
            state.begin_anew()
            state.version = 0
            for name, weight in state.weights().items():
                weight.copy_(fresh[name])


def _runs(layers: Iterable[int]) -> list[Span]:
    """Ascending layers as spans of neighbours."""
    runs: list[Span] = []
    for layer in layers:
        if runs and runs[-1][1] == layer:
            runs[-1] = runs[-1][0], layer + 1
        else:
            runs.append((layer, layer + 1))
    return runs


def _held(weight: Tensor) -> nn.Parameter:
    """A weight of a state, to compute with: what is trained is a parameter, with its gradient; what is frozen becomes
    one where it lies."""
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def _layers(module: SpanModule) -> list[tuple[int, nn.Module]]:
    return [(layer, module.layers[str(layer)]) for layer in range(*module.span)]
