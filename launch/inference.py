"""Where an exported model computes when nothing is trained: on which device, whole or layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from jobs.config import ConfigError
from jobs.unlearn.guard import Guard, plain
from launch.devices import find_devices
from launch.guarded import guard_bytes, put_on
from pipeline.model.hub import cached, how_to_have
from pipeline.model.layered import LayeredModel
from pipeline.model.weights import ModelError, Weights
from pipeline.runtime.offload import Offload, OffloadError, place, skeleton
from pipeline.settings import RunShape, Within, require
from pipeline.state.host_store import HostMemoryError
from pipeline.state.host_weights import HostWeights, WeightLayout

_SPARE = 256 << 20
"""Bytes of a CUDA device that are left to its libraries' workspaces and to what its allocator rounds up."""
_IN_FLIGHT = 2

Working = Callable[[PreTrainedConfig, torch.dtype, torch.device], int]
"""The bytes that the work takes beside the weights."""


@dataclass(frozen=True)
class InferenceSettings:
    """Where a model computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu, cuda, or auto, which takes a CUDA device where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and compute; auto: as the weights are stored."""
    offload: bool = False
    """Hold the weights in host memory, and have layers come to the device as they are computed: for a model that is
    larger than the device. The result is the same."""
    layers_resident: Annotated[int | None, Within(0, 4098)] = None
    """Layers that stay on the device, from the embedding on, with --offload; unset: as many as fit on a CUDA device,
    none on the CPU."""
    layers_in_flight: Annotated[int, Within(1, 4098)] = _IN_FLIGHT
    """Layers that are loaded or computed at once beside these, with --offload."""

    def check(self, _: RunShape) -> None:
        """Raise ConfigError for knobs of --offload without it."""
        for name, unset in (("layers_resident", None), ("layers_in_flight", _IN_FLIGHT)):
            value = getattr(self, name)
            require(self.offload or value == unset, name, value, f"{unset} without offload")


@dataclass(frozen=True)
class Source:
    """A model directory: where its plain weights lie, and what is read before them."""

    path: Path
    directory: Path
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    guard: Guard | None

    @classmethod
    def open(cls, path: Path) -> Source:
        """Raises ConfigError naming the directory when it cannot be read."""
        directory = plain(cached(str(path)) or path)
        if not (directory / "config.json").is_file():
            raise ConfigError(
                f"model is {str(path)!r}, which has no config.json; allowed: a directory written by a run"
                + how_to_have(str(path))
            )
        transformers.utils.logging.disable_progress_bar()
        with _named(path):
            config, guard = AutoConfig.from_pretrained(directory), Guard.read(path)
            return cls(path, directory, config, AutoTokenizer.from_pretrained(directory), guard)

    @property
    def context_length(self) -> int:
        """The most tokens that the model takes."""
        return int(getattr(self.config, "max_position_embeddings", 0) or 10**9)


@dataclass(frozen=True)
class Ready:
    """A model that can be called with what lies on `device`."""

    model: PreTrainedModel
    device: torch.device
    offload: Offload | None = None

    def about(self) -> dict[str, Any]:
        """For the report: of --offload, what was on the device and what was loaded."""
        told: dict[str, Any] = {"device": str(self.device), "dtype": str(self.model.dtype).removeprefix("torch.")}
        if self.offload is not None:
            found, host = self.offload.placement, self.offload.host.layout
            told["offload"] = {
                "layers": host.model.num_layers, "layers_resident": found.resident, "layers_in_flight": found.in_flight,
                "limit_bytes": found.num_bytes, "working_bytes": found.working_bytes,
                "peak_weight_bytes": self.offload.weight_bytes, "host_bytes": host.num_bytes,
                "loaded_bytes": self.offload.loaded_bytes,
            }  # fmt: skip
            if self.device.type == "cuda":
                told["offload"]["peak_device_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return told


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What a file raises that cannot be read becomes a ConfigError that names the model."""
    try:
        yield
    except (ConfigError, OffloadError, HostMemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"model is {str(path)!r}, which cannot be loaded: {error}") from error


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model directory, whole on the CPU, with its guard if it has one, and its tokenizer. Raises ConfigError naming
    the directory when it cannot be read."""
    source = Source.open(path)
    with ready(source, InferenceSettings(device="cpu")) as found:
        return found.model, source.tokenizer


@contextmanager
def ready(
    source: Source, settings: InferenceSettings, tokens: int = 0, working: Working = lambda *_: 0, quiet: bool = True
) -> Iterator[Ready]:
    """The model where it was asked for, with its guard if it has one, for work on rows of so many tokens. Says first
    what it will take, unless `quiet`. Raises ConfigError, OffloadError and HostMemoryError."""
    device = torch.device(find_devices(settings.device, 1).of(0))
    with ExitStack() as stack:
        with _named(source.path):
            guard = source.guard
            if settings.offload:
                beside = 0 if guard is None else guard_bytes(guard, tokens)
                offload = _offloaded(source, settings, device, lambda *about: working(*about) + beside, quiet, stack)
                found = Ready(offload.model, device, offload)
            else:
                found = Ready(_whole(source, settings, device), device)
            if guard is not None:
                put_on(guard, found.model)
        yield found


def _whole(source: Source, settings: InferenceSettings, device: torch.device) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(source.directory, dtype=settings.dtype).eval()
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise OffloadError(
            f"the model does not fit on {device}: {error}; allowed: --offload, or --device cpu"
        ) from error


def _offloaded(
    source: Source, settings: InferenceSettings, device: torch.device, working: Working, quiet: bool, stack: ExitStack
) -> Offload:  # fmt: skip
    if (source.directory / "adapter_config.json").is_file():
        raise ModelError("it has adapters beside its weights; allowed with offload: adapters merged into the weights")
    dtype = _dtype(source, settings)
    layout = WeightLayout(LayeredModel(source.config), dtype)
    room = None if device.type != "cuda" else torch.cuda.mem_get_info(device)[0] - _SPARE
    model = skeleton(source.config, dtype, device)
    beside = working(source.config, dtype, device) + sum(buffer.nbytes for buffer in model.buffers())
    found = place(layout, settings.layers_resident, settings.layers_in_flight, beside, room)
    Console(stderr=True, quiet=quiet).print(
        f"offload: {found.resident} of {layout.model.num_layers} layers stay on {device}, {found.in_flight} in flight; "
        f"at most {found.num_bytes / 2**20:,.1f} MiB there ({found.weight_bytes / 2**20:,.1f} of weights), "
        f"{layout.num_bytes / 2**20:,.1f} MiB of weights in host memory",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    host = HostWeights.read(layout, source.directory)
    if device.type == "cuda":
        host.pin()
        stack.callback(host.unpin)
        torch.cuda.reset_peak_memory_stats(device)
    if (source.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.directory)
    return stack.enter_context(Offload(model, host, found, device))


def _dtype(source: Source, settings: InferenceSettings) -> torch.dtype:
    """As `from_pretrained` decides."""
    asked = settings.dtype if settings.dtype != "auto" else source.config.dtype
    if asked is not None:
        return getattr(torch, asked) if isinstance(asked, str) else asked
    weights = Weights(source.directory)
    first = min(weights.files)
    return weights.read({first: (first,)}, None)[first].dtype
