"""The curvature of a divergence of outputs, as products of two small matrices for each linear layer (KFAC).

The Gauss-Newton matrix H of KL(outputs of the model as it is, outputs) is its Fisher information, here a mean over
labels. For a linear layer y = W a it is taken to be A (x) G (Martens and Grosse, arXiv 1503.05671; weights shared over
positions as in 2311.00636, "expand"):

    A = the mean of a a^T over positions [in, in]        G = the sum of g g^T over positions / labels [out, out]

where g is the gradient, with respect to y, of -log p summed over labels that are drawn from the model's own
distribution. A bias that is trained is a last input that is always 1. With A = Qa La Qa^T and G = Qg Lg Qg^T,
(A (x) G + damping I)^-1 V = Qg [(Qg^T V Qa) / (lg la^T + damping)] Qa^T: damped exactly, in the basis of eigenvectors,
and not by a multiple of the identity in each factor. A span is fitted where it is computed; nothing crosses spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.runtime.batch import Job
from pipeline.runtime.lane_executor import Lane, LaneExecutor, LaneResult, Saved
from pipeline.runtime.reducer import Reducer
from pipeline.schedule.ops import REDUCE, Op, span_text
from pipeline.state.exact_sum import FRACTION, LARGEST
from pipeline.state.resident import ResidentStore


class FitJob(Job, Protocol):
    """A job whose loss is -log p of labels that are drawn from the model's own distribution."""

    @property
    def sampled(self) -> str:
        """The term that this is."""
        ...

    def positions(self, step: int, microbatch: int, /) -> Tensor:
        """The positions that count, [batch, sequence], bool."""
        ...


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder block: full names of what is trained of it, and where its factors lie among those of
    its part. `columns` is the number of inputs, one more with a bias; `across` says that the weight is [in, out]."""

    weight: str
    bias: str | None
    rows: int
    columns: int
    across: bool
    at: int

    def a(self, flat: Tensor) -> Tensor:
        """[columns, columns]."""
        return flat[self.at : self.at + self.columns**2].view(self.columns, self.columns)

    def g(self, flat: Tensor) -> Tensor:
        """[rows, rows]."""
        begin = self.at + self.columns**2
        return flat[begin : begin + self.rows**2].view(self.rows, self.rows)

    @property
    def size(self) -> int:
        return self.columns**2 + self.rows**2


@dataclass(frozen=True)
class Curvature:
    """The factors of the parts that a worker holds, flat; a part without any linear layer has none."""

    store: ResidentStore
    linears: Mapping[str, tuple[Linear, ...]]
    factors: Mapping[str, Tensor]

    def not_finite(self) -> list[str]:
        """Parts whose factors are no numbers."""
        return [part for part, flat in self.factors.items() if not bool(torch.isfinite(flat).all())]

    @torch.no_grad()
    def solve(self, part: str, vector: Tensor, damping: float) -> Tensor:
        """(H + damping I)^-1 of a part's vector [elements]; 0 for what is no linear layer's."""
        found = torch.zeros_like(vector)
        given, solved, at = dict[str, Tensor](), dict[str, Tensor](), 0
        for state in self.store.states_of(part):
            for name, parameter in state.parameters.items():
                piece = slice(at, at + parameter.numel())
                given[name], solved[name] = vector[piece].view_as(parameter), found[piece].view_as(parameter)
                at += parameter.numel()
        for linear in self.linears.get(part, ()):
            flat, weight = self.factors[part], given[linear.weight]
            matrix = weight.t() if linear.across else weight
            if linear.bias is not None:
                matrix = torch.cat([matrix, given[linear.bias][:, None]], dim=1)
            result = solve(linear.a(flat), linear.g(flat), matrix, damping)
            into = solved[linear.weight]
            weights = result[:, : into.shape[0] if linear.across else into.shape[1]]
            into.copy_(weights.t() if linear.across else weights)
            if linear.bias is not None:
                solved[linear.bias].copy_(result[:, -1])
        return found


def solve(a: Tensor, g: Tensor, matrix: Tensor, damping: float) -> Tensor:
    """(A (x) G + damping I)^-1 of a matrix [rows, columns], in float64; what rounding has made negative in the factors'
    eigenvalues is 0."""
    of_a, in_a = torch.linalg.eigh(a.double())
    of_g, in_g = torch.linalg.eigh(g.double())
    turned = in_g.t() @ matrix.double() @ in_a
    turned /= torch.outer(of_g.clamp(min=0), of_a.clamp(min=0)) + damping
    return (in_g @ turned @ in_a.t()).to(matrix.dtype)


class Fitting(AbstractContextManager["Fitting"]):
    """One run of a lane in which factors are collected: A as a layer is computed, G as its gradient comes back."""

    def __init__(self, store: ResidentStore, job: FitJob, lane: Lane) -> None:
        self._store, self._job, self._lane = store, job, lane
        self.linears: dict[str, tuple[Linear, ...]] = {}
        self.factors: dict[str, Tensor] = {}
        self._exact, self._beyond = bool(store.sums), set[str]()
        self._mask: Tensor | None = None
        self._hooks = ExitStack()
        microbatches = range(lane.excerpt.num_microbatches)
        self._labels = sum(job.counts(lane.step, m).get(job.sampled, 0) for m in microbatches)
        self._positions = sum(int(job.positions(lane.step, m).sum()) for m in microbatches)
        for span, module in store.modules.items():
            found = list(_linears(module))
            part = span_text(span)
            self.linears[part] = tuple(linear for linear, _ in found)
            dtype = torch.int64 if self._exact else torch.float32
            size = sum(linear.size for linear, _ in found)
            self.factors[part] = torch.zeros(size, dtype=dtype, device=lane.settings.device)
            for linear, each in found:
                hook = each.register_forward_hook(partial(self._forward, part, linear))
                self._hooks.callback(hook.remove)

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def execute(self, record: bool) -> LaneResult:
        """Run the lane, without the sums over replicas: these gradients are nobody's."""
        ops = tuple(op for op in self._lane.ops if op.kind != REDUCE)
        return _FittingExecutor(self, self._lane, ops).execute(record)

    def summed(self, reducer: Reducer, deadline: float) -> Curvature:
        """The factors over all holders of each part, in pieces of the size of its gradient, as all sums of a group are.
        Raises LinkError."""
        found: dict[str, Tensor] = {}
        for part, flat in sorted(self.factors.items()):
            buffer = self._store.summed(part)
            if buffer is not None and reducer.group(part) is not None:
                for piece in flat.split(buffer.numel()):
                    buffer[: piece.numel()].copy_(piece)
                    buffer[piece.numel() :].zero_()
                    reducer.start(part)
                    reducer.finish(deadline)
                    piece.copy_(buffer[: piece.numel()])
                    reducer.clear()
                buffer.zero_()
            found[part] = (flat.double() * 2.0**-FRACTION).float() if self._exact else flat
            if part in self._beyond:
                found[part].fill_(torch.nan)
        return Curvature(self._store, self.linears, found)

    # ---- what is collected ----

    def begin(self, microbatch: int) -> None:
        """A microbatch is computed forward: now, and not when it is computed again on the way back."""
        self._mask = self._job.positions(self._lane.step, microbatch).to(self._lane.settings.device)

    def end(self) -> None:
        self._mask = None

    def _forward(self, part: str, linear: Linear, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        mask = self._mask
        if mask is None or not output.requires_grad:
            return
        inputs = given[0].detach()[mask]
        if linear.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        self._add(part, linear.a(self.factors[part]), inputs, self._positions)
        output.register_hook(partial(self._backward, part, linear, mask))

    def _backward(self, part: str, linear: Linear, mask: Tensor, gradient: Tensor) -> None:
        self._add(part, linear.g(self.factors[part]), gradient.detach()[mask], self._labels)

    @torch.no_grad()
    def _add(self, part: str, into: Tensor, rows: Tensor, count: int) -> None:
        """Add the mean of the outer products of rows with themselves."""
        with torch.autocast(rows.device.type, enabled=False):
            wide = rows.float()
            found = (wide.t() @ wide) / max(1, count)
        if self._exact:
            if not float(found.abs().amax()) < LARGEST / self._lane.excerpt.num_microbatches:  # nor is NaN
                self._beyond.add(part)
            found = found.double().mul_(2.0**FRACTION).round_().to(torch.int64)
        into += found


class _FittingExecutor(LaneExecutor):
    def __init__(self, fitting: Fitting, lane: Lane, ops: tuple[Op, ...]) -> None:
        super().__init__(replace(lane, excerpt=replace(lane.excerpt, lane=ops)))
        self._fitting = fitting

    def compute(self, op: Op, x: Tensor | None, later: Any) -> Saved:
        self._fitting.begin(op.microbatch)
        try:
            return super().compute(op, x, later)
        finally:
            self._fitting.end()


def _linears(module: Any) -> Iterator[tuple[Linear, nn.Module]]:
    """Those of a span whose weight is trained, in order."""
    at = 0
    for layer in range(*module.span):
        if layer not in module.model.blocks:
            continue
        names = {id(parameter): name for name, parameter in module.named_layer_parameters(layer).items()}
        for each in module.layers[str(layer)].modules():
            if not isinstance(each, nn.Linear | Conv1D) or not each.weight.requires_grad:
                continue
            bias = each.bias if each.bias is not None and each.bias.requires_grad else None
            across = isinstance(each, Conv1D)
            rows, columns = each.weight.shape[::-1] if across else each.weight.shape
            linear = Linear(
                names[id(each.weight)], None if bias is None else names[id(bias)], rows, columns + (bias is not None),
                across, at,
            )  # fmt: skip
            at += linear.size
            yield linear, each
