"""The work of benchmarks/gpu.py: models of published shapes, their weights on disk, the tokens, and the timed loop.

All contenders begin with the same weights, read from one folder, and train on the tokens of engine_peers.py: the same
losses show that they do the same work. Weights are fp32 masters that are computed with in bfloat16 under autocast,
gradients and moments are fp32; who keeps something else says so in its row.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from engine_peers import CLIP, LEARNING_RATE, Work
from gpu_case import Case, synchronize
from gpu_machine import Device
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config
from transformers.utils.logging import disable_progress_bar
from utilisation import step_flops

from pipeline.model.weights import read_config
from pipeline.runtime.peak_flops import BF16, known_peak
from pipeline.state.optimizer import decay_groups

WEIGHT_DECAY = 0.01
SHAPES: dict[str, dict[str, Any]] = {  # of the published config.json of Qwen/Qwen3-0.6B and Qwen/Qwen3-1.7B
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
}
COMMON: dict[str, Any] = {
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": True, "rope_theta": 1_000_000.0,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 64,
}  # fmt: skip
"""In place of a shape's own sizes, to try everything on CPU."""


@dataclass(frozen=True)
class Training:
    """A shape, what of it is trained in a step, and how many steps are timed."""

    shape: str
    sequence: int
    microbatches: int
    batch: int
    steps: int
    warmup: int

    @classmethod
    def of(cls, case: Case, shape: str, microbatches: int, batch: int, steps: int = 5, warmup: int = 2) -> Training:
        """That of a case, tiny where nothing is measured."""
        if case.dry:
            return cls(shape, 16, min(4, microbatches), 1, 2, 1)
        return cls(shape, 2048, microbatches, batch, steps, warmup)

    def work(self, config: PreTrainedConfig) -> Work:
        """The tokens."""
        return Work(
            vocabulary=config.vocab_size, sequence=self.sequence, microbatches=self.microbatches, batch=self.batch
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def prepare(values: dict[str, Any]) -> None:
    """Write the weights of both shapes, drawn on the device, in bfloat16: half the bytes, and exact in fp32."""
    case = Case.from_json(values)
    disable_progress_bar()
    for name, sizes in SHAPES.items():
        began = time.monotonic()
        config = Qwen3Config(**{**COMMON, **sizes, **(TINY if case.dry else {})}, use_cache=False)
        torch.manual_seed(0)
        with torch.device(case.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        model.to(torch.bfloat16).save_pretrained(weights_of(case, name))
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        case.say(f"weights of {name}", parameters_millions=millions, seconds=time.monotonic() - began)
        del model
        gc.collect()


def weights_of(case: Case, shape: str) -> Path:
    """The folder of a shape's config and weights."""
    return case.shared / shape


def load(case: Case, shape: str, dtype: torch.dtype, device: str) -> Any:
    """The whole model in training mode."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        weights_of(case, shape), dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    model.config.use_cache = False
    return model.to(device).train()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that all have: matrices decay, norms do not."""
    groups = decay_groups(dict(model.named_parameters()), WEIGHT_DECAY)
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, fused=True)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean, in fp32; logits [batch, sequence, vocabulary]."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def accumulate(case: Case, work: Work, number: int, one: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A step's microbatches through `one`, which computes a microbatch's mean loss and goes back from what `accumulate`
    divides it to; returns the mean of all."""
    inputs, targets = (each.to(case.device, non_blocking=True) for each in work.data(number))
    parts = zip(inputs.split(work.batch), targets.split(work.batch), strict=True)
    return torch.stack([one(x, y) for x, y in parts]).mean()


def resident_step(case: Case, training: Training) -> Callable[[int], float]:
    """A plain PyTorch loop, all on the device: autocast, clipping, fused AdamW."""
    model = load(case, training.shape, torch.float32, case.device)
    optimizer, work = adamw(model), training.work(model.config)

    def one(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(torch.device(case.device).type, dtype=torch.bfloat16):
            logits = model(input_ids=x, use_cache=False).logits
        loss = cross_entropy(logits, y)
        (loss / work.microbatches).backward()
        return loss.detach()

    def step(number: int) -> float:
        loss = accumulate(case, work, number, one)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # as ours, whose gradients keep their place
        return float(loss)

    return step


def timed(training: Training, step: Callable[[int], float | None], device: str) -> dict[str, Any]:
    """Run the steps of a training; losses of all, seconds of the timed ones, by this process's clock."""
    losses: list[float | None] = []
    seconds: list[float] = []
    for number in range(training.warmup + training.steps):
        synchronize(device)
        began = time.perf_counter()
        losses.append(step(number))
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return {"losses": losses, "seconds": seconds[training.warmup :]}


def figures(case: Case, training: Training, seconds: list[float], losses: list[float]) -> dict[str, Any]:
    """A contender's row: tokens per second, MFU where the device's peak is known, and the losses."""
    config = read_config(weights_of(case, training.shape))
    tokens = training.work(config).tokens
    speed = tokens / statistics.median(seconds)
    peak = None if case.dry else known_peak(str(Device().about()["device"]), BF16)
    used = None if peak is None else speed * step_flops(config, 1, 1, training.sequence) / training.sequence / peak
    return {
        "tokens_per_s": speed, "mfu": used, "step_s": seconds, "losses": losses, "training": training.as_json(),
        "last_loss": losses[-1],
    }  # fmt: skip
