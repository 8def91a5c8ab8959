"""`unbroken generate`: a sampled continuation from an exported model, in this process, through plain transformers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from jobs.config import ConfigError
from launch.commands import Result
from launch.inference import InferenceSettings, Source, ready
from pipeline.runtime.forward_bytes import generation_bytes
from pipeline.settings import Within, check_groups

DEFAULT_PROMPT = "def "


@dataclass(frozen=True)
class Continuation:
    """A prompt and what the model sampled after it; and where it did so, for the report."""

    prompt: str
    text: str
    about: Mapping[str, Any] = field(default_factory=dict)


def continue_text(
    path: Path, prompt: str | None, tokens: int, seed: int, temperature: float = 0.8,
    settings: InferenceSettings | None = None, quiet: bool = True,
) -> Continuation:  # fmt: skip
    """Sample `tokens` tokens after `prompt`, top 40, repeatably under `seed`; without `settings` whole on the CPU.
    Raises ConfigError for a directory, and what `ready` raises."""
    source = Source.open(path)
    prompt = DEFAULT_PROMPT if prompt is None else prompt
    inputs = source.tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"]
    if ids.shape[1] == 0:
        ids = torch.tensor([[source.tokenizer.eos_token_id]])
    given, longest = ids.shape[1], source.context_length
    if given >= longest:
        raise ConfigError(f"prompt has {given} tokens; allowed: at most {longest}, less the tokens to sample")
    new = max(1, min(tokens, longest - given))
    working = partial(generation_bytes, prompt=given, tokens=given + new)
    with ready(source, settings or InferenceSettings(device="cpu"), given, working, quiet) as found:
        ids = ids.to(found.device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            began = time.monotonic()
            out = found.model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=temperature > 0,
                **({"temperature": temperature, "top_k": 40} if temperature > 0 else {}),
            ).cpu()  # fmt: skip
            took = time.monotonic() - began
        about = found.about() | {"tokens_per_s": (out.shape[1] - given) / took}
    return Continuation(prompt, source.tokenizer.decode(out[0], skip_special_tokens=True), about)  # type: ignore[arg-type]


@dataclass(frozen=True)
class GenerateConfig(InferenceSettings):
    """Sample a continuation from an exported model."""

    model: Path = Path("runs/default/model")
    """A directory that a run exported, or any transformers model directory."""
    prompt: str = "def "
    """The text to go on from."""
    tokens: Annotated[int, Within(1, 65536)] = 100
    """Tokens to sample."""
    temperature: Annotated[float, Within(0, 100)] = 0.8
    """0 takes the likeliest token each time."""
    seed: Annotated[int, Within(-(2**63), 2**63 - 1)] = 0
    """The same seed samples the same text."""
    json: bool = False
    """Print one JSON object."""


def generate(config: GenerateConfig) -> Result:
    """A sampled text. Raises ConfigError, OffloadError and HostMemoryError."""
    check_groups(config)
    result = continue_text(
        config.model, config.prompt, config.tokens, config.seed, config.temperature, config, quiet=config.json
    )  # fmt: skip
    return {"prompt": result.prompt, "text": result.text, **result.about}, result.text
