"""A transformers model as layers that can be built, placed and run apart from each other.

Layer 0 is the embedding, 1 to n are the decoder blocks, n + 1 is the final norm and the head. The modules are those of
transformers, located by path and never subclassed or rewritten; only the few lines that tie them together in a
`forward` are written anew here, and the tests hold them against the originals. A worker builds the layers of its spans
and nothing else. Initial weights depend on (seed, layer) alone, so whoever builds a layer gets the same one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.model.families import DROPOUTS, FAMILIES, FULL_ATTENTION, SLIDING, Embedding, Head
from pipeline.model.lora import Adapters, is_adapter, plain_name
from pipeline.model.rng import derive
from pipeline.model.span_module import SpanModule
from pipeline.model.trained import matching
from pipeline.model.weights import ModelError as ModelError
from pipeline.model.weights import Weights
from pipeline.schedule.ops import Span

TIED = "tied"
"""The name of the state of a weight that embedding and head share."""


@dataclass(frozen=True)
class NamedState:
    """What has weights, moments and a version of its own: a layer without what it shares, or a shared weight.

    `users` are the layers that compute with it, ascending; the first one owns it, and its file in a checkpoint has it.
    """

    name: str
    users: tuple[int, ...]
    keys: tuple[str, ...]
    """Full names of its parameters, those that are trained first."""
    trained: int
    """How many of them are trained."""

    @property
    def owner(self) -> int:
        return self.users[0]

    @property
    def shared(self) -> bool:
        """Whether several layers compute with it."""
        return len(self.users) > 1


class LayeredModel:
    """The blueprint of a model: it knows every layer's parameters and can build any span, and holds no weights.

    `attention` is "sdpa" or "eager"; None takes sdpa where the family has it and attention drops nothing, because
    dropout inside sdpa cannot be keyed by sample. With `lora`, decoder blocks have adapters, and these alone are
    trained; else what matches one of the patterns `trained`, if there are any. With `depth`, the model ends after so
    many blocks, and what comes out is their hidden state. Raises ModelError for a config that is not supported.
    """

    def __init__(
        self, config: PreTrainedConfig, *, attention: str | None = None, lora: Adapters | None = None,
        depth: int | None = None, trained: Sequence[str] = (),
    ) -> None:  # fmt: skip
        family = FAMILIES.get(config.model_type)
        if family is None:
            supported = ", ".join(sorted(FAMILIES))
            raise ModelError(f"model_type {config.model_type!r} is not supported; supported: {supported}")
        for option in ("add_cross_attention", "use_bidirectional_attention", "quantization_config"):
            if value := getattr(config, option, None):
                raise ModelError(f"{config.model_type} with {option} = {value!r} is not supported; leave it unset")
        self.family = family
        self.has_dropout = any(getattr(config, name, 0.0) for name in DROPOUTS)
        allowed = ("eager",) if any(getattr(config, name, 0.0) for name in DROPOUTS[:2]) else family.attentions
        if attention is not None and attention not in allowed:
            raise ModelError(f"attention {attention!r} for this {config.model_type}; allowed: {', '.join(allowed)}")
        self.config = copy.deepcopy(config)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    self.config, dtype=torch.float32, attn_implementation=attention or allowed[0]
                )
        except Exception as error:  # what a model is built of raises errors of many unrelated classes
            told = f"{type(error).__name__}: {error}"
            raise ModelError(f"transformers cannot build this {config.model_type} config: {told}") from error
        self._skeleton = cast(PreTrainedModel, model)
        self._ahead: dict[str, nn.Module] = {}
        self.hidden_size: int = self.config.hidden_size
        every = self.config.num_hidden_layers
        if depth is not None and not 1 <= depth <= every:
            raise ModelError(f"a model of {depth} blocks; this one has {every}, so 1 to {every} are allowed")
        self.headed = depth is None
        """Whether the last layer is the head; else all but the first are blocks."""
        self.blocks = range(1, (every if depth is None else depth) + 1)
        self.num_layers: int = self.blocks.stop + self.headed
        tokens, head = f"{family.tokens}.weight", f"{family.head}.weight"
        shared = self._skeleton.get_parameter(tokens) is self._skeleton.get_parameter(head)
        self.tied: bool = shared and self.headed
        self.aliases: Mapping[str, str] = {head: tokens} if shared else {}
        self.tied_keys: tuple[str, ...] = (tokens,) if self.tied else ()
        """Parameters that the head holds too: layer 0 owns them, and both gradients must be summed."""
        if other := {self.attention_type(layer) for layer in self.blocks} - {FULL_ATTENTION, SLIDING}:
            raise ModelError(f"layer_types has {', '.join(sorted(other))}; supported: {FULL_ATTENTION}, {SLIDING}")
        self.lora = lora
        self._adapted: dict[str, nn.Module] = {}
        if lora is not None:
            for number in lora.within(every):
                path = f"{family.blocks}.{number}"
                self._adapted[path] = self._copy(path)
                lora.adapt(self._adapted[path], number, self.hidden_size)
        names = {name for layer in range(self.num_layers) for name in self.shapes(layer)}
        self.partly: bool = lora is not None or bool(trained)
        """Whether some of the weights are frozen."""
        self._trained = frozenset(filter(is_adapter, names) if lora is not None else names)
        if trained:
            known = {name: (name, *(a for a, owner in self.aliases.items() if owner == name)) for name in names}
            self._trained = matching(trained, known)
        if not self._trained:
            raise ModelError(f"nothing is trained: no adapter is in the first {depth} blocks, which alone are computed")

    # ---- what a layer is made of ----

    def paths(self, layer: int) -> dict[str, str]:
        """Part -> path of its module in the transformers model."""
        family = self.family
        if layer == 0:
            found = {"tokens": family.tokens, "positions": family.positions, "dropout": family.dropout}
            return {part: path for part, path in found.items() if path is not None}
        if self.headed and layer == self.num_layers - 1:
            return {"norm": family.norm, "head": family.head}
        if layer in self.blocks:
            return {"block": f"{family.blocks}.{layer - 1}"}
        raise ModelError(f"layer {layer}; the model has layers 0 to {self.num_layers - 1}")

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Full name -> shape of every parameter the layer computes with, a tied head's weight included."""
        return {
            self.full_name(path, name): tuple(parameter.shape)
            for path in self.paths(layer).values()
            for name, parameter in self._adapted.get(path, self.module(path)).named_parameters()
        }

    def keys(self, layer: int) -> tuple[str, ...]:
        """Full state-dict names of the parameters the layer owns; every parameter is owned by exactly one layer."""
        return tuple(name for name in self.shapes(layer) if layer == 0 or name not in self.tied_keys)

    def trainable(self, layer: int) -> tuple[str, ...]:
        """Those of `keys` that are trained: all of them, with LoRA the adapters alone, or what the patterns match."""
        return tuple(name for name in self.keys(layer) if name in self._trained)

    def differentiated(self, layer: int) -> tuple[str, ...]:
        """The trained parameters that the layer computes with, a tied head's weight included unless it is frozen."""
        return tuple(name for name in self.shapes(layer) if name in self._trained)

    def multiplied(self, layer: int) -> frozenset[str]:
        """Full names of the weights and biases of the layer's linear maps, adapters aside: what autocast uses in its
        own dtype alone."""
        found: set[str] = set()
        for path in self.paths(layer).values():
            for inner, module in self._adapted.get(path, self.module(path)).named_modules(prefix=path):
                if isinstance(module, nn.Linear | Conv1D):
                    found.update(self.full_name(inner, name) for name, _ in module.named_parameters(recurse=False))
        return frozenset(name for name in found if not is_adapter(name))

    @cached_property
    def learning(self) -> frozenset[int]:
        """The layers that compute with something that is trained."""
        return frozenset(layer for layer in range(self.num_layers) if self.differentiated(layer))

    @cached_property
    def states(self) -> tuple[NamedState, ...]:
        """Every state of the model, by owner; a weight that both ends share is one, called TIED."""
        found: list[NamedState] = []
        for layer in range(self.num_layers):
            own = [name for name in self.keys(layer) if name not in self.tied_keys]
            trained = [name for name in own if name in self.trainable(layer)]
            if own:
                frozen = [name for name in own if name not in trained]
                found.append(NamedState(str(layer), (layer,), (*trained, *frozen), len(trained)))
            if layer == 0 and self.tied:
                trains = sum(name in self._trained for name in self.tied_keys)
                found.append(NamedState(TIED, (0, self.num_layers - 1), self.tied_keys, trains))
        return tuple(found)

    def states_of(self, layers: Iterable[int]) -> tuple[NamedState, ...]:
        """The states with which any of these layers computes."""
        wanted = set(layers)
        return tuple(state for state in self.states if not wanted.isdisjoint(state.users))

    def parameter_count(self, layer: int) -> int:
        """Number of parameters the layer owns; the sum over layers is that of the model."""
        shapes = self.shapes(layer)
        return sum(math.prod(shapes[name]) for name in self.keys(layer))

    def trained_count(self, layer: int) -> int:
        """Number of those among them that are trained."""
        shapes = self.shapes(layer)
        return sum(math.prod(shapes[name]) for name in self.trainable(layer))

    def parameter_bytes(self, layer: int) -> int:
        """Bytes of fp32 weights that a worker with this layer alone holds, a tied head's copy included."""
        return 4 * sum(math.prod(shape) for shape in self.shapes(layer).values())

    def full_name(self, path: str, local: str) -> str:
        """The state-dict name of parameter `local` of the module at `path`; a tied head's is the embedding's."""
        name = f"{path}.{local}" if self.lora is None else plain_name(f"{path}.{local}")
        return self.aliases.get(name, name)

    def module(self, path: str) -> nn.Module:
        """The module at a path of the transformers model, on the meta device. Raises AttributeError."""
        return self._skeleton.get_submodule(path)

    def attention_type(self, layer: int) -> str:
        """What a decoder block sees: "full_attention" or "sliding_attention"."""
        if self.family.window == "by layer":
            return self.config.layer_types[layer - 1]
        return SLIDING if self.family.window == "if set" and self.config.sliding_window is not None else FULL_ATTENTION

    # ---- building ----

    def build(
        self, span: Span, *, seed: int, device: torch.device | str = "cpu", source: Path | None = None,
        share: Mapping[str, nn.Parameter] | None = None, came_on: Callable[[], None] = lambda: None,
        fill: bool = True,
    ) -> SpanModule:  # fmt: skip
        """The layers of `span` in fp32 on `device`, and nothing of the others.

        Weights are drawn from (seed, layer), the same on every device, or read from the safetensors in the directory
        `source`. Parameters in `share`, by full name, are used instead of new ones; an embedding and its tied head
        inside one span share without being asked. Adapters change nothing about the other weights. `came_on` is called
        after each layer. Without `fill` new weights are whatever the memory held: for who puts others in. Raises
        ModelError.
        """
        lo, hi = span
        if not 0 <= lo < hi <= self.num_layers:
            raise ModelError(f"span {span}; expected 0 <= lo < hi <= {self.num_layers}")
        weights = None if source is None or not fill else Weights(source)
        held = dict(share or {})
        layers: dict[str, nn.Module] = {}
        for layer in range(lo, hi):
            parts: dict[str, Any] = {}
            for part, path in self.paths(layer).items():
                module = self._part(path, layer, seed, torch.device(device), weights, held, fill)
                if self.partly:
                    self._freeze(module, path, seed, torch.device(device), held)
                parts[part] = module
            if layer == 0:
                layers["0"] = Embedding(**parts)
            elif layer not in self.blocks:
                layers[str(layer)] = Head(**parts, cap=getattr(self.config, "final_logit_softcapping", None))
            else:
                layers[str(layer)] = parts["block"]
            came_on()
        return SpanModule(self, span, layers, self.rotary().to(device) if self.family.rotary else None)

    def copy_ahead(self, layers: Iterable[int]) -> None:
        """Have what is copied to build each of these layers, the next time, before it is built."""
        for path in (path for layer in layers for path in self.paths(layer).values()):
            if path not in self._ahead:
                self._ahead[path] = self._copy(path)

    def _copy(self, path: str) -> nn.Module:
        """The module at a path, without weights."""
        return copy.deepcopy(self.module(path), {id(self.config): self.config})

    def _part(
        self, path: str, layer: int, seed: int, device: torch.device, weights: Weights | None,
        held: dict[str, nn.Parameter], fill: bool,
    ) -> nn.Module:  # fmt: skip
        """The module at `path`, with weights; `held` gives shared parameters and receives the new ones."""
        module = self._ahead.pop(path, None) or self._copy(path)
        names = {local: self.full_name(path, local) for local, _ in module.named_parameters()}
        if layer > 0 and set(names.values()) & set(self.tied_keys) - set(held):
            # a lone tied head gets what layer 0 gets
            self._part(self.family.tokens, 0, seed, device, weights, held, fill)
        fresh = {local: name for local, name in names.items() if name not in held}
        if fresh or any(True for _ in module.buffers()):  # else nothing of it is kept
            module = module.to_empty(device="cpu")
        # The same call computes buffers that no file holds, so modules with buffers need it in any case.
        drawn = fill and weights is None and bool(fresh)
        modules = [m for m in module.modules() if drawn or any(True for _ in m.buffers(recurse=False))]
        self._initialise(modules, derive(seed, "init", layer, path))
        if weights is not None:
            tensors = weights.read({name: self.stored_names(name) for name in fresh.values()})
            for local, name in fresh.items():
                copy_weight(module.get_parameter(local), tensors[name], name, weights)
        module = module.to(device) if fresh or any(True for _ in module.buffers()) else module
        for local, name in names.items():
            owner, _, attribute = local.rpartition(".")
            setattr(module.get_submodule(owner), attribute, held.setdefault(name, module.get_parameter(local)))
        return module

    def _freeze(
        self, module: nn.Module, path: str, seed: int, device: torch.device, held: dict[str, nn.Parameter]
    ) -> None:
        """Freeze what is not trained of the module at `path`; a block gets adapters, those that are held or new
        ones."""
        if self.lora is not None and path in self._adapted:
            self.lora.adapt(module, int(path.rpartition(".")[2]), self.hidden_size)
        for local, parameter in list(module.named_parameters()):
            name = self.full_name(path, local)
            if self.lora is not None and is_adapter(name) and name not in held:
                held[name] = nn.Parameter(self.lora.first_value(name, tuple(parameter.shape), seed).to(device))
            owner, _, attribute = local.rpartition(".")
            setattr(module.get_submodule(owner), attribute, held[name].requires_grad_(name in self._trained))

    @torch.no_grad()
    def _initialise(self, modules: Sequence[nn.Module], seed: int) -> None:
        """Fill parameters and buffers as transformers would, children first, from a generator state of their own."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for module in reversed(modules):
                self._skeleton._init_weights(module)

    def rotary(self) -> nn.Module:
        """The module of rotary embeddings, for a family that has it, on the CPU."""
        assert self.family.rotary is not None
        return type(self._skeleton.get_submodule(self.family.rotary))(self.config)

    def stored_names(self, name: str) -> tuple[str, ...]:
        """What a checkpoint may call a parameter: its name, the name without the base model's prefix, a tied name."""
        names = (name, *(alias for alias, owner in self.aliases.items() if owner == name))
        prefix = f"{self._skeleton.base_model_prefix}."
        return (*names, *(other.removeprefix(prefix) for other in names if other.startswith(prefix)))


@torch.no_grad()
def copy_weight(parameter: Tensor, tensor: Tensor, name: str, weights: Weights) -> None:
    """Fill a parameter with what `weights` hold for it. Raises ModelError for one of another shape."""
    if parameter.shape != tensor.shape:
        raise ModelError(
            f"{weights.directory}: {name} has shape {tuple(tensor.shape)}; the config asks for {tuple(parameter.shape)}"
        )
    parameter.copy_(tensor)
