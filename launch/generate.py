"""`unbroken generate`: a sampled continuation from an exported model, in this process, through plain transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from jobs.config import ConfigError
from jobs.unlearn.guard import Guard, plain
from launch.commands import Result
from launch.guarded import put_on
from pipeline.settings import Within, check_bounds

DEFAULT_PROMPT = "def "


@dataclass(frozen=True)
class Continuation:
    """A prompt and what the model sampled after it."""

    prompt: str
    text: str


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model directory, with its guard if it has one, and its tokenizer. Raises ConfigError naming the directory when
    it cannot be read."""
    source = plain(path)
    if not (source / "config.json").is_file():
        raise ConfigError(f"model is {str(path)!r}, which has no config.json; allowed: a directory written by a run")
    transformers.utils.logging.disable_progress_bar()
    try:
        model, guard = AutoModelForCausalLM.from_pretrained(source).eval(), Guard.read(path)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise ConfigError(f"model is {str(path)!r}, which cannot be loaded: {error}") from error
    if guard is not None:
        put_on(guard, model)
    return model, tokenizer


def context_length(model: PreTrainedModel) -> int:
    """The most tokens that the model takes."""
    return int(getattr(model.config, "max_position_embeddings", 0) or 10**9)


def continue_text(path: Path, prompt: str | None, tokens: int, seed: int, temperature: float = 0.8) -> Continuation:
    """Sample `tokens` tokens after `prompt`, top 40, repeatably under `seed`. Raises ConfigError for a directory."""
    model, tokenizer = load(path)
    prompt = DEFAULT_PROMPT if prompt is None else prompt
    inputs = tokenizer(prompt, return_tensors="pt")  # type: ignore[operator]
    ids = inputs["input_ids"]
    if ids.shape[1] == 0:
        ids = torch.tensor([[tokenizer.eos_token_id]])  # type: ignore[attr-defined]
    longest = context_length(model)
    if ids.shape[1] >= longest:
        raise ConfigError(f"prompt has {ids.shape[1]} tokens; allowed: at most {longest}, less the tokens to sample")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(1, min(tokens, longest - ids.shape[1])),
            do_sample=temperature > 0, **({"temperature": temperature, "top_k": 40} if temperature > 0 else {}),
        )  # fmt: skip
    return Continuation(prompt, tokenizer.decode(out[0], skip_special_tokens=True))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class GenerateConfig:
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
    """A sampled text. Raises ConfigError."""
    check_bounds(config)
    result = continue_text(config.model, config.prompt, config.tokens, config.seed, config.temperature)
    return {"prompt": result.prompt, "text": result.text}, result.text
