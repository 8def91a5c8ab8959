"""Splitting a backward pass into the gradient of its input (I) and of its weights (W), as zero-bubble schedules need.

While `defer_weights` is active, matrix products with a parameter (nn.Linear, and GPT-2's Conv1D through addmm) run
through autograd functions whose backward computes the input gradient at once and puts (input, output gradient) on a
list; `WeightGradients.run` turns the list into weight gradients later, adding each product straight into `weight.grad`.
Other parameters (norms, biases, embeddings) are cheap and get their gradient in I. The idea of a weight-gradient
store is from Zero Bubble Pipeline Parallelism (arXiv 2401.10241, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WeightGradients:
    """The weight gradients of one (span, microbatch) that are still to be computed."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Note that weight.grad += left.T @ right; left is [n, rows], right [n, columns]."""
        self._pending.append((weight, left, right))

    @torch.no_grad()
    def run(self) -> None:
        """Compute all noted gradients in the parameter's dtype, and forget their inputs."""
        for weight, left, right in self._pending:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if left.dtype == weight.grad.dtype:
                weight.grad.addmm_(left.t(), right)
            else:
                weight.grad.add_(left.t() @ right)
        self._pending.clear()


class _Product(torch.autograd.Function):
    """y = x @ m (+ bias), where m is `weight` or, if `transposed`, weight.T (nn.Linear)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, later: WeightGradients
    ) -> Tensor:
        matrix = weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, matrix = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, matrix)
        ctx.weight, ctx.transposed, ctx.later, ctx.bias_dtype = weight, transposed, later, torch.float32
        with torch.autocast(x.device.type, enabled=False):
            if transposed:
                return functional.linear(x, matrix, bias)
            y = x.flatten(0, -2) @ matrix
            return (y if bias is None else y + bias).view(*x.shape[:-1], matrix.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        grad = grads[0]
        flat = grad.flatten(0, -2)
        left, right = (flat, x.flatten(0, -2)) if ctx.transposed else (x.flatten(0, -2), flat)
        ctx.later.add(ctx.weight, left, right)
        grad_x = grad @ (matrix if ctx.transposed else matrix.t()) if ctx.needs_input_grad[0] else None
        grad_bias = flat.sum(0).float() if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None, None


class _DeferWeights(TorchFunctionMode):
    def __init__(self, later: WeightGradients) -> None:
        super().__init__()
        self._later = later

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if func is functional.linear and not (kwargs and "weight" in kwargs):
            x, weight, bias = (*args, kwargs.get("bias"))[:3] if len(args) < 3 else args
            if _is_parameter(weight):
                return _Product.apply(x, weight, bias, True, self._later)
        if func is torch.addmm and not kwargs and _is_parameter(args[2]) and args[1].dim() == 2:
            bias, x, weight = args
            return _Product.apply(x, weight, bias, False, self._later)
        return func(*args, **kwargs)


def _is_parameter(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled()


def defer_weights(later: WeightGradients) -> TorchFunctionMode:
    """A context for a forward pass: its backward puts weight gradients on `later` instead of computing them."""
    return _DeferWeights(later)
