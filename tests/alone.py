"""A procedure in one process: an oracle of plain autograd over the whole model, which shares no code with the engine's.

Curvature is taken by its definition: every position of every row by itself, and the whole matrix, solved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from jobs.unlearn.job import UnlearnJob
from jobs.unlearn.sampled import drawn
from pipeline.model.layered import LayeredModel
from pipeline.runtime.batch import IGNORED, Needs
from pipeline.runtime.procedure import Vector

Factors = dict[str, tuple[Tensor, Tensor]]
ALL = "all"


class Alone:
    """An Oracle. `dtype` is that of all numbers; "eager" attention can be differentiated again."""

    def __init__(
        self, shape: PreTrainedConfig, job: UnlearnJob, rate: float, seed: int, step: int = 0,
        dtype: torch.dtype = torch.float32, attention: str | None = None,
    ) -> None:  # fmt: skip
        self.job, self.rate, self.step, self.seed = job, rate, step, seed
        self.model = LayeredModel(shape, attention=attention)
        self.module = self.model.build((0, self.model.num_layers), seed=seed).to(dtype)
        self.parameters = {
            name: parameter for layer in range(self.model.num_layers)
            for name, parameter in self.module.named_layer_parameters(layer).items()
        }  # fmt: skip
        self.start = self.flat(self.parameters)
        self.asked = 0

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.parameters])

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split([p.numel() for p in self.parameters.values()])
        return {name: piece.view(p.shape) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)}

    @torch.no_grad()
    def put(self, flat: Tensor) -> None:
        for name, tensor in self.named(flat).items():
            self.parameters[name].copy_(tensor)

    def batches(self, kind: str) -> list[Any]:
        every = range(self.job.microbatches)
        return [self.job.batch(self.step, m, Needs.INPUT | Needs.LOSS) for m in every
                if self.job.rows(self.step, m)[0] == kind]  # fmt: skip

    def mean(self, kind: str) -> Tensor:
        """Of -log p over the labels of a kind."""
        logp: list[Tensor] = []
        for batch in self.batches(kind):
            where = batch["labels"] != IGNORED
            found = torch.log_softmax(self.module(batch["input_ids"])[where], dim=-1)
            logp.append(found.gather(1, batch["labels"][where][:, None])[:, 0])
        return -torch.cat(logp).mean()

    # ---- see Oracle ----

    def weights(self) -> Vector:
        return Vector({ALL: self.start.clone()})

    def gradient(self, weights: Mapping[str, float], at: Vector | None = None) -> Vector:
        self.asked += 1
        self.put(self.start if at is None else self.start + at.parts[ALL])
        loss = sum((weight * self.mean(kind) for kind, weight in weights.items()), torch.zeros(()))
        found = torch.autograd.grad(loss, list(self.parameters.values()))
        self.put(self.start)
        return Vector({ALL: torch.cat([each.reshape(-1) for each in found])})

    def dots(self, *pairs: tuple[Vector, Vector]) -> list[float]:
        return [float(a.parts[ALL].double() @ b.parts[ALL].double()) for a, b in pairs]

    def fit(self, kind: str) -> Factors:
        """Weight -> (A, G), a position at a time."""
        ends = ("0", str(self.model.num_layers - 1))
        linears = {
            name: module for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and name.split(".")[1] not in ends
        }  # fmt: skip
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [
            module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0], out)}))
            for name, module in linears.items()
        ]
        a_sums, g_sums, labels, positions = dict[str, Tensor](), dict[str, Tensor](), 0, 0
        for batch in self.batches(kind):
            logits = self.module(batch["input_ids"])
            sampled = drawn(logits, batch["labels"], batch.sample_ids, self.job.material.seed, self.step)
            where = sampled != IGNORED
            logp = torch.log_softmax(logits[where], dim=-1).gather(1, sampled[where][:, None])
            gradients = torch.autograd.grad(-logp.sum(), [out for _, out in seen.values()])
            labels += int(where.sum())
            for row in range(len(where)):
                last = int(where[row].nonzero().max()) if where[row].any() else -1
                positions += last + 1
                for (name, (given, _)), gradient in zip(seen.items(), gradients, strict=True):
                    module = linears[name]
                    for at in range(last + 1):
                        a, g = given[row, at].detach().double(), gradient[row, at].double()
                        if module.bias is not None:
                            a = torch.cat([a, a.new_ones(1)])
                        a_sums[name] = a_sums.get(name, torch.zeros(())) + torch.outer(a, a)
                        g_sums[name] = g_sums.get(name, torch.zeros(())) + torch.outer(g, g)
        for hook in hooks:
            hook.remove()
        self.linears = linears
        return {name: (a_sums[name] / positions, g_sums[name] / labels) for name in a_sums}

    def solve(self, factors: Factors, vector: Vector, damping: float) -> Vector:
        """The whole matrix of each layer, [rows * columns, rows * columns]."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        given = self.named(vector.parts[ALL])
        found = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
        for name, (a, g) in factors.items():
            module = self.linears[name]
            weight = names[id(module.weight)]
            matrix = given[weight].t() if isinstance(module, Conv1D) else given[weight]
            if module.bias is not None:
                matrix = torch.cat([matrix, given[names[id(module.bias)]][:, None]], dim=1)
            whole = torch.kron(g, a) + damping * torch.eye(matrix.numel(), dtype=torch.float64)
            result = torch.linalg.solve(whole, matrix.double().reshape(-1)).view(matrix.shape).to(matrix.dtype)
            if module.bias is not None:
                found[names[id(module.bias)]] = result[:, -1]
                result = result[:, :-1]
            found[weight] = result.t() if isinstance(module, Conv1D) else result
        return Vector({ALL: self.flat(found)})

    def stepped(self) -> dict[str, Tensor]:
        """The weights after a step."""
        direction: Any = self.job.method.direction(self)  # type: ignore[arg-type]
        return self.named(self.start - self.rate * direction.parts[ALL])
