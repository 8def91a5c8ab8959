"""A run of layers that is ready to compute: what a worker's forward and backward go through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from pipeline.model.compiled import run_compiled
from pipeline.model.families import SLIDING
from pipeline.model.rng import RngKey, keyed_dropout
from pipeline.model.weights import ModelError
from pipeline.schedule.ops import Span

if TYPE_CHECKING:
    from pipeline.model.layered import LayeredModel


class SpanModule(nn.Module):
    """A run of layers, ready to compute. `layers` is keyed by str(layer)."""

    def __init__(self, model: LayeredModel, span: Span, layers: dict[str, nn.Module], rotary: nn.Module | None) -> None:
        super().__init__()
        self.span, self.model = span, model
        self.layers = nn.ModuleDict(layers)
        self.rotary = rotary

    def named_layer_parameters(self, layer: int) -> dict[str, nn.Parameter]:
        """Full name -> every parameter the layer computes with; a tied head's weight has the embedding's name."""
        module = self.layers[str(layer)]
        found: dict[str, nn.Parameter] = {}
        for part, path in self.model.paths(layer).items():
            for name, parameter in (module if part == "block" else module.get_submodule(part)).named_parameters():
                found[self.model.full_name(path, name)] = parameter
        return found

    def adopt(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """Make `tensors` (full name -> weight, not copied) the layer's parameters; returns those. Raises KeyError."""
        module, trained = self.layers[str(layer)], set(self.model.differentiated(layer))
        found: dict[str, nn.Parameter] = {}
        for part, path in self.model.paths(layer).items():
            root = module if part == "block" else module.get_submodule(part)
            for local in [local for local, _ in root.named_parameters()]:
                owner, _, attribute = local.rpartition(".")
                name = self.model.full_name(path, local)
                found[name] = nn.Parameter(tensors[name], requires_grad=name in trained)
                setattr(root.get_submodule(owner), attribute, found[name])
        return found

    def forward(
        self, x: Tensor, *, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        rng: RngKey | None = None, recompute: bool = False, compiled: bool = False,
        taps: dict[int, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Ids [batch, sequence] if the span holds layer 0, else hidden [batch, sequence, hidden] -> hidden, or logits.

        `attention_mask` [batch, sequence] is 1 for tokens and 0 for padding. `position_ids` [batch or 1, sequence]
        that start again inside a row, without a mask, separate packed samples. In training, a model with dropout
        needs `rng`. With `recompute`, decoder blocks keep their input only and run again in the backward pass; with
        `compiled`, they go through torch.compile.
        `taps` has layers of the span as keys and receives what goes into them. Under autocast hidden states have its
        dtype between layers, wherever a span ends: so they cross links in it, and results do not depend on the cut.
        Raises ModelError.
        """
        if x.dim() != (2 if self.span[0] == 0 else 3):
            wanted = "ids [batch, sequence]" if self.span[0] == 0 else "hidden states [batch, sequence, hidden]"
            raise ModelError(f"span {self.span} takes {wanted}; got a tensor of shape {tuple(x.shape)}")
        drops = self.training and self.model.has_dropout
        if drops and rng is None:
            raise ModelError(f"span {self.span} trains with dropout and got no rng; pass the RngKey of the microbatch")
        places = torch.arange(x.shape[1], device=x.device)[None] if position_ids is None else position_ids
        inputs: Callable[[int], dict[str, Any]] | None = None
        kind = x.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        between = torch.get_autocast_dtype(kind) if casts else None
        for layer in range(*self.span):
            if taps is not None and layer in taps:
                taps[layer] = x
            module = self.layers[str(layer)]
            is_block = layer in self.model.blocks
            if layer == 0:
                run = partial(module, position_ids=places)
            elif is_block:
                inputs = inputs or self._block_inputs(x, attention_mask, position_ids, places)
                inner = inputs(layer)
                run = partial(run_compiled, module, inner) if compiled else partial(module, **inner)
            else:
                run = module
            keyed = partial(_run_keyed, run, rng if drops else None, layer)
            if recompute and is_block and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(keyed, x, use_reentrant=False, preserve_rng_state=False))
            else:
                x = keyed(x)
            if between is not None and (is_block or layer == 0):
                x = x.to(between)
        return x

    def block(
        self, layer: int, x: Tensor, *, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """One decoder block of the span alone, as `forward` runs it in evaluation."""
        places = torch.arange(x.shape[1], device=x.device)[None] if position_ids is None else position_ids
        return self.layers[str(layer)](x, **self._block_inputs(x, attention_mask, position_ids, places)(layer))

    def _block_inputs(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, places: Tensor
    ) -> Callable[[int], dict[str, Any]]:
        """Block -> its arguments; masks and rotary embeddings are made once for all blocks of an attention type."""
        model = self.model
        blocks = [layer for layer in range(*self.span) if layer in model.blocks]
        made: dict[str, dict[str, Any]] = {}
        for kind in {model.attention_type(layer) for layer in blocks}:
            create = create_sliding_window_causal_mask if kind == SLIDING else create_causal_mask
            # The fourth argument, no cache, has another name in every few releases of transformers.
            made[kind] = {
                "attention_mask": create(model.config, hidden, attention_mask, None, position_ids),
                "position_ids": places,
            }
            if self.rotary is not None:
                by_type = (kind,) if model.family.rotary_by_type else ()
                exact = hidden.new_empty(0, dtype=torch.float32)  # of it the device and the dtype are looked at
                made[kind]["position_embeddings"] = self.rotary(exact, places, *by_type)
        return lambda layer: made[model.attention_type(layer)]


def _run_keyed(run: Callable[[Tensor], Tensor], rng: RngKey | None, layer: int, x: Tensor) -> Tensor:
    with nullcontext() if rng is None else keyed_dropout(rng, layer):
        return run(x)
