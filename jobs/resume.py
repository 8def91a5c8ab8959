"""What a run may change when it is resumed: where and how it runs, but not what it computes, unless it is told to.

A setting is one of four kinds. Those OF_THE_START say how one start goes and are never taken over. FIXED ones are built
into the weights. The NUMBERS decide what the run computes: another value makes it another run, which --change allows.
All others are free: workers, replicas, scheduler, device, steps, intervals. The model and the data are known by what
they are, not by their path: the checkpoint tells whether they are the same.
"""

from __future__ import annotations

from typing import Any

from jobs.config import ConfigError, TrainConfig
from pipeline.settings import names_of

OF_THE_START = frozenset({
    "resume", "change", "until", "inject", "out", "nodes", "node_rank", "store", "store_port", "token_file", "cluster",
    "agent_workers", "agent_cpus", "cluster_wait", "grad_accumulation", "global_batch",
})  # fmt: skip
FIXED = ("tokenizer", "vocabulary", "dropout", "lora_rank", "lora_alpha", "lora_targets", "lora_blocks", "trained")
NUMBERS = (
    "samples_per_step", "sequence_length", "seed", "dtype", "optimizer", "lr", "warmup", "min_lr_ratio", "weight_decay",
    "beta1", "beta2", "eps", "clip", "skip", "swaps", "full_every", "optimizer_async", "gradient_dtype",
    "exact_sums", "pack", "lr_schedule", "lr_decay_share", "momentum",
    "document_mask",
)  # fmt: skip
OF_THE_DATA = (
    "data", "pack", "text_field", "max_tokens", "held_out", "sequence_length", "seed", "tokenizer", "vocabulary",
)  # fmt: skip
_CALLED = {"samples_per_step": "the global batch (microbatches x microbatch_size)"}


def differences(before: TrainConfig, now: TrainConfig, names: tuple[str, ...]) -> list[str]:
    """ "lr was 0.002 and is 0.5", for each of `names` that differs."""
    return [
        f"{_CALLED.get(name, name)} was {_told(old)} and is {_told(new)}"
        for name in names
        if (old := getattr(before, name)) != (new := getattr(now, name))
    ]


def check_resumed(before: TrainConfig, now: TrainConfig) -> list[str]:
    """What this start of a run changes, as "lr 0.002 -> 0.5". Raises ConfigError for what would make another run of it,
    and has not been allowed by --change."""
    if told := differences(before, now, FIXED):
        raise ConfigError(f"cannot resume: {', '.join(told)}, which the weights are made for; allowed: the same")
    if (told := differences(before, now, NUMBERS)) and not now.change:
        raise ConfigError(
            f"cannot resume: {', '.join(told)}, which would make it another run; allowed: the same, or --change"
        )
    names = [name for name in names_of(type(now)) if name not in OF_THE_START]
    return [f"{name} {_told(getattr(before, name))} -> {_told(getattr(now, name))}" for name in names
            if getattr(before, name) != getattr(now, name)]  # fmt: skip


def other_data(before: TrainConfig | None, now: TrainConfig, told: str) -> str:
    """Why the data of a run are others than those of its checkpoint; `told` where its settings are not known."""
    found = [] if before is None else differences(before, now, OF_THE_DATA)
    if before is not None and not found:
        found = [f"the text that data {now.data!r} names has changed, or the tokenizer"]
    return f"cannot resume with another data: {', '.join(found) or told}. Use the same data, --change, or another --out"


def _told(value: Any) -> str:
    return "unset" if value is None else str(value)
