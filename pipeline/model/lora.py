"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685, section 4.1) on the linear layers of decoder blocks.

A linear layer with frozen weight W computes W x + (alpha / rank) B A x, and only A and B are trained. The modules are
those of the library peft. Here are their names, which leave out what peft adds to them, their first values, the merge
into W, and the folder that `PeftModel.from_pretrained` reads.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.model.projection import PROJECTION, Projections
from pipeline.model.rng import derive
from pipeline.model.weights import ModelError
from pipeline.schedule.ops import Span, span_text
from pipeline.settings import RunShape, Within, require

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR, EVERY = "all-linear", "all"
A, B = ".lora_A.weight", ".lora_B.weight"
_KEPT_AS = "base_model.model."  # what peft puts before a name in a file
_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters."""

    lora_rank: Annotated[int, Within(0, 65536)] = 0
    """Train low-rank adapters of this rank and nothing else (LoRA, through peft; needs the lora extra); 0 trains all
    weights."""
    lora_alpha: Annotated[float, Within(0, 1_000_000, above=True)] = 16.0
    """What an adapter adds is multiplied by this, divided by --lora-rank."""
    lora_targets: str = ALL_LINEAR
    """What gets adapters: all-linear (every linear layer of the decoder blocks), or names separated by commas, such as
    q_proj,v_proj."""
    lora_blocks: str = EVERY
    """Which decoder blocks get adapters: all, or LO:HI, from LO up to and without HI, counted from 0."""

    def lora(self) -> Adapters | None:
        """The adapters that are trained, if it is adapters."""
        if not self.lora_rank:
            return None
        return Lora(self.lora_rank, self.lora_alpha, self.lora_targets, _blocks(self.lora_blocks))

    def check(self, run: RunShape) -> None:
        """Raise ConfigError for targets and blocks that are none, and for blocks of no adapters."""
        require(
            all(name.strip() for name in self.lora_targets.split(",")), "lora_targets", self.lora_targets,
            f"{ALL_LINEAR}, or names separated by commas",
        )  # fmt: skip
        require(
            self.lora_blocks == EVERY or _blocks(self.lora_blocks) is not None, "lora_blocks", self.lora_blocks,
            f"{EVERY}, or LO:HI with LO below HI",
        )  # fmt: skip
        require(
            self.lora_blocks == EVERY or self.lora_rank > 0, "lora_blocks", self.lora_blocks,
            f"{EVERY} without lora_rank",
        )  # fmt: skip


def _blocks(text: str) -> Span | None:
    """What LO:HI says; None for what does not."""
    lo, colon, hi = text.partition(":")
    if not (colon and lo.isdecimal() and hi.isdecimal()) or int(lo) >= int(hi):
        return None
    return int(lo), int(hi)


@dataclass(frozen=True)
class Lora:
    """The adapters of a model. `targets` is "all-linear", or the last words of paths, e.g. "q_proj,v_proj"; `blocks`
    are the decoder blocks, from 0, that have them, None for all."""

    rank: int
    alpha: float = 16.0
    targets: str = ALL_LINEAR
    blocks: Span | None = None
    first: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    """Values that adapters begin with, by full name, where they do not begin as nothing."""
    earlier: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    """A of earlier adapters [all their ranks, inputs], by the full name of the A that is to be orthogonal to them."""
    apart: float = 0.0
    """Weight of |earlier A^T|^2 in what is minimised."""
    digest: str = ""
    """A hash of `first` and `earlier`."""

    @property
    def about(self) -> str:
        """For a person."""
        return f"adapters of rank {self.rank}"

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with (JSON)."""
        told = {"blocks": self.blocks, "apart": self.apart or None, "digest": self.digest or None}
        always: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets}
        return always | {name: value for name, value in told.items() if value is not None}

    def within(self, count: int) -> range:
        """The blocks with adapters of a model of so many. Raises ModelError for some that it does not have."""
        if self.blocks is None:
            return range(count)
        if self.blocks[1] > count:
            raise ModelError(f"lora_blocks is {span_text(self.blocks)}; allowed: within 0:{count}, the model's blocks")
        return range(*self.blocks)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def names(self, block: nn.Module) -> tuple[str, ...]:
        """The linear layers of a decoder block that are adapted. Raises ModelError for a name that it does not have."""
        linear = [path for path, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        allowed = tuple(dict.fromkeys(path.rpartition(".")[2] for path in linear))
        if self.targets == ALL_LINEAR:
            return allowed
        asked = tuple(dict.fromkeys(name.strip() for name in self.targets.split(",")))
        if unknown := [name for name in asked if name not in allowed]:
            raise ModelError(
                f"lora_targets has {', '.join(map(repr, unknown))}; allowed: {ALL_LINEAR}, or some of "
                f"{', '.join(allowed)}"
            )
        return asked

    def config(self, block: nn.Module, *, whole: bool = False) -> LoraConfig:
        """The settings as peft has them, for one such block, or for a `whole` model of them. Raises ModelError where
        peft is missing."""
        if importlib.util.find_spec("peft") is None:
            raise ModelError(f"lora_rank is {self.rank}: LoRA needs peft; pip install 'unbroken[lora]'")
        from peft import LoraConfig  # an extra: only those who train adapters need it

        return LoraConfig(
            r=self.rank, lora_alpha=cast(Any, self.alpha), target_modules=list(self.names(block)), lora_dropout=0.0,
            bias="none", task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in block.modules()),
            layers_to_transform=list(range(*self.blocks)) if whole and self.blocks is not None else None,
        )  # fmt: skip

    def adapt(self, block: nn.Module, number: int, hidden: int) -> None:
        """Put adapters without values (they lie on the meta device) into a decoder block. Raises ModelError."""
        config = self.config(block)
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, block, low_cpu_mem_usage=True)

    def first_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """An adapter's parameter before training: what was given, or from (seed, name) alone, A as peft draws it and B
        zero."""
        if name in self.first:
            return self.first[name].clone()
        value = torch.zeros(shape)
        if name.endswith(A):
            generator = torch.Generator().manual_seed(derive(seed, "lora", name))
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        return value

    @torch.no_grad()
    def merged(self, tensors: Mapping[str, Tensor], module: Callable[[str], nn.Module]) -> dict[str, Tensor]:
        """Full name -> weight with the adapters of `tensors` added and left out; `module` gives the one at a path."""
        merged = {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}
        for name in filter(is_adapter, tensors):
            if name.endswith(A):
                path = name.removesuffix(A)
                change = self.scale * (tensors[path + B] @ tensors[name])
                weight = f"{path}.weight"
                merged[weight] = merged[weight] + (change.T if isinstance(module(path), Conv1D) else change)
        return merged

    @torch.no_grad()
    def pull(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the gradient of apart |earlier A^T|^2 to that of each A."""
        for name, earlier in self.earlier.items():
            if (parameter := parameters.get(name)) is not None and parameter.grad is not None:
                earlier = earlier.to(parameter.device)
                parameter.grad.add_((parameter @ earlier.T) @ earlier, alpha=2 * self.apart)


Adapters = Lora | Projections
"""What is trained beside weights that stay."""


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of Adapters, by its full name."""
    return name.endswith((A, B, PROJECTION))


def plain_name(name: str) -> str:
    """The name of a parameter without what peft adds: a frozen weight has its ordinary one."""
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def save_adapter(folder: Path, config: LoraConfig | None, tensors: Mapping[str, Tensor], base: str | None) -> None:
    """Write the adapters among `tensors` as a folder, which with a `config` peft loads onto `base`. Raises OSError."""
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if config is not None:
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(str(unfinished))
    held: dict[str, Any] = {_KEPT_AS + n: t.detach().cpu().contiguous() for n, t in tensors.items() if is_adapter(n)}
    save_file(held, unfinished / _FILE, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def adapter_of(folder: Path) -> dict[str, Tensor]:
    """What `save_adapter` has written, by full name. Raises ModelError."""
    try:
        return {name.removeprefix(_KEPT_AS): tensor.clone() for name, tensor in load_file(folder / _FILE).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: its adapters cannot be read: {error}") from error
